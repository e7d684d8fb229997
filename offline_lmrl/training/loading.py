"""The order of training rows, and batches that give each row to exactly one process (rank)."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, repeat
from typing import Any

import torch

from offline_lmrl.tokens.batching import Item


class LengthGroupedSampler(torch.utils.data.Sampler[int]):
    """A sampler that shuffles the rows so that neighbours have similar lengths.

    The shuffled rows are cut into pools of 50 batches; each pool is sorted by length, and then the batches are
    shuffled. The order depends on (seed, epoch) alone, so that resuming is exact.

    Args:
      lengths: (rows,) number of tokens of each row.
      batch_size: rows per batch, over all ranks.
      seed: seed of the shuffle.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int):
        self.lengths, self.pool, self.seed, self.epoch = torch.as_tensor(lengths), 50 * batch_size, seed, 0
        self.batch_size = batch_size

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        shuffled = torch.randperm(len(self.lengths), generator=generator)
        pools = [pool[self.lengths[pool].argsort(descending=True, stable=True)] for pool in shuffled.split(self.pool)]
        batches = [batch for pool in pools for batch in pool.split(self.batch_size)]
        full = [batch for batch in batches if len(batch) == self.batch_size]
        order = torch.randperm(len(full), generator=generator)  # else lengths would fall within each pool
        rest = [batch for batch in batches if len(batch) < self.batch_size]
        return iter(torch.cat([*(full[i] for i in order), *rest]).tolist())


class EvenBatches(torch.utils.data.BatchSampler):
    """A batch sampler that gives every rank (process) the same number of batches, all of the same size.

    The last batches of an epoch are filled up with the index `surplus`, which `collate_even` drops. accelerate would
    repeat the epoch's first rows instead, and they would count twice.

    Args:
      sampler: yields the indices of the rows in the order of training.
      batch_size: indices per batch.
      ranks: number of ranks; the number of batches becomes a multiple of it.
      surplus: an index that no row has, such as the number of rows.
    """

    def __init__(self, sampler: torch.utils.data.Sampler[int], batch_size: int, ranks: int, surplus: int):
        super().__init__(sampler, batch_size, drop_last=False)
        self.ranks, self.surplus = ranks, surplus

    def __len__(self) -> int:
        return -(-super().__len__() // self.ranks) * self.ranks

    def __iter__(self) -> Iterator[list[int]]:
        for batch in chain(super().__iter__(), repeat([], len(self) - super().__len__())):
            yield batch + [self.surplus] * (self.batch_size - len(batch))


def collate_even(items: Sequence[Item]) -> Mapping[str, Any]:
    """Collate a batch of `EvenBatches`, without its surplus indices.

    Every rank must run a forward pass, so a batch of surplus indices only becomes one row without weight in the loss.

    Args:
      items: references to rows of one data set; the index of a surplus reference is at least the number of rows.
    Returns: the batch as the data set's `batch` makes it, name -> tensor (or a dict of tensors, or a number).
    """
    dataset = items[0].dataset
    real = [item.index for item in items if item.index < len(dataset)]
    return dataset.batch(real) if real else dataset.surplus_batch()
