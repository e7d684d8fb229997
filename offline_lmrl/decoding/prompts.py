"""Running a causal LM on prompts in batches, from where their caches end.

A row is one prompt with what the model adds to it. With two streams each row passes through the model twice, in one
batch and one cache: once with its requested returns, and once with the null condition (no requested return) in their
place. Cache and outputs then have 2 · B rows; those under the null condition come last.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel

from offline_lmrl.decoding.cache import CacheMemory, cache_argument, is_kept_per_token, new_cache
from offline_lmrl.models.adapters import part_of
from offline_lmrl.models.value_heads import forward_with_q

MOST_TOKENS = 32_768  # limit on rows × (prompt + longest reply) in one batch
MOST_LOGITS = 2**25  # limit on rows × vocabulary in one batch
ENOUGH_ROWS = 64  # a batch with this many rows is closed at the first prompt with less than half as much to read

SomeRows = TypeVar("SomeRows", bound="Rows")


class LastOutputs(NamedTuple):
    """What a model computed after the last token of R rows.

    logits: (R, V), fp32.
    hidden: hidden states, (R, d); None = not asked for.
    q: Q of all tokens, (H, R, V); None = not asked for.
    """

    logits: Tensor
    hidden: Tensor | None = None
    q: Tensor | None = None

    def select(self, rows: Tensor | slice) -> "LastOutputs":
        """Return the outputs of only these rows."""
        hidden, q = self.hidden, self.q
        return LastOutputs(
            self.logits[rows], None if hidden is None else hidden[rows], None if q is None else q[:, rows]
        )


@dataclass
class Rows:
    """A batch of B rows in the model's cache. All tensors are on the model's device.

    Args:
      index: (B,) long, index of each row's prompt in `Prompts`.
      length: (B,) long, number of tokens of the prompt, without padding.
      mask: (B, width + longest reply) bool, False at padding.
      cache: keys and values of streams · B rows.
      width: number of columns of the prompts, padding included.
      padded: True if any prompt has padding in those columns.
      streams: 1 or 2.
    """

    index: Tensor
    length: Tensor
    mask: Tensor
    cache: DynamicCache
    width: int
    padded: bool
    streams: int

    def in_cache(self, rows: Tensor) -> Tensor:
        """Return the cache rows (streams · R,) of R batch rows (R,): all of stream 0, then all of stream 1, if any."""
        return torch.cat([rows + stream * len(self.index) for stream in range(self.streams)])

    def select(self: SomeRows, rows: Tensor) -> SomeRows:
        """Return a batch of only these rows, (R,) indices; the cache is changed in place."""
        self.cache.reorder_cache(self.in_cache(rows))  # recurrent layers lack batch_select_indices, but have this
        chosen = {name: value[rows] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **chosen)


class CachedModel:
    """A causal LM that runs on tokens which follow cached ones.

    Args:
      model: any causal LM of transformers; hidden states and Q need a guided model.
    Attributes:
      null: the id of the null condition, which comes after the vocabulary and before the ids of the return bins; None
        for a model without returns.
      most_rows: limit on the rows of a batch.

    Raises: InputError if the model takes no cache.
    """

    def __init__(self, model: PreTrainedModel):
        self.model, self.cache_argument = model, cache_argument(model)
        conditioned = part_of(model, "return_embedding") is not None
        self.null = model.get_input_embeddings().weight.shape[0] if conditioned else None
        self.most_rows = max(1, MOST_LOGITS // model.config.get_text_config().vocab_size)

    def forward(
        self, ids: Tensor, mask: Tensor | None, position: Tensor, cache: DynamicCache, reads: frozenset[str]
    ) -> LastOutputs:
        """Run the model on T tokens per row, which follow the cached ones.

        Args:
          ids: (B, T) token ids.
          mask: (B, cached + T) bool, True at real tokens; None = no padding anywhere.
          position: (B, T) position ids.
          cache: the cache of the B rows, which is extended in place.
          reads: what to compute beside the logits: "hidden states", or "all of Q", which includes them.
        Returns: the outputs after the last token.
        """
        if self.cache_argument == "cache_params" and mask is not None:
            mask = mask[:, -ids.shape[1] :]  # a recurrent state has no columns, so there is no padding left to mask
        inputs = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": position,
            self.cache_argument: cache,
            "use_cache": True,
            "logits_to_keep": 1,
        }
        if "all of Q" in reads:
            outputs, hidden, q = forward_with_q(self.model, **inputs)
            return LastOutputs(outputs.logits[:, -1].float(), hidden[:, -1], q[:, :, -1])
        if "hidden states" in reads:
            outputs, hidden = self.model.forward_with_hidden(**inputs)
            return LastOutputs(outputs.logits[:, -1].float(), hidden[:, -1])
        return LastOutputs(self.model(**inputs).logits[:, -1].float())

    def next(self, rows: Rows, tokens: Tensor, step: int, reads: frozenset[str]) -> LastOutputs:
        """Run the model on the token that was drawn for each row.

        Args:
          rows: the batch.
          tokens: (B,) the drawn tokens.
          step: their index after the prompt, from 0.
          reads: as in `forward`.
        """
        # Columns count the padding of the batch; positions do not, so they start from each row's own length.
        columns, streams = rows.width + step + 1, rows.streams
        return self.forward(
            tokens.unsqueeze(-1).repeat(streams, 1),
            rows.mask[:, :columns].repeat(streams, 1) if rows.padded else None,
            (rows.length + step).unsqueeze(-1).repeat(streams, 1),
            rows.cache,
            reads,
        )


@dataclass
class Prompts:
    """The prompts of one call, with what is cached of them. Lists have one entry per prompt.

    Args:
      model: the model.
      ids: token ids, with return ids if a return is requested; at least one id each.
      keys: key of each prompt in `memory`. The cache of its second stream has the key ~key (bitwise not).
      memory: the stored caches, which must be kept per token; None = no reuse.
      streams: number of passes of each prompt through the model, 1 or 2.
      reserve: most tokens that will be added to a prompt.
    """

    model: CachedModel
    ids: list[list[int]]
    keys: list[int]
    memory: CacheMemory | None
    streams: int
    reserve: int

    def __post_init__(self) -> None:
        # Sliding windows and recurrent states cannot be cut to the first tokens of a prompt, so they are not reused.
        if self.memory is not None and not is_kept_per_token(new_cache(self.model.model, 0)):
            self.memory = None
        self.cached = [0] * len(self.ids)  # per prompt, the tokens from its start that are cached for each stream
        if self.memory is not None:
            self.memory.keep_only([*self.keys, *(~key for key in self.keys)])
            held = list(map(self.memory.reusable, *self._streams_of(self.keys, self.ids)))
            # `held` lists stream 0 of all prompts, then stream 1: entries i, i + n belong to prompt i.
            self.cached = [min(held[i :: len(self.ids)]) for i in range(len(self.ids))]

    def _streams_of(self, keys: Sequence[int], ids: Sequence[list[int]]) -> tuple[list[int], list[list[int]]]:
        """Return the keys in `memory` and the ids of stream 0, followed by those of stream 1 if there is one.

        In stream 1, the null condition replaces the requested returns.
        """
        if self.streams == 1:
            return list(keys), list(ids)
        null = self.model.null
        # All ids above `null` are returns, so the minimum replaces each return by the null condition.
        return [*keys, *(~key for key in keys)], [*ids, *([min(t, null) for t in own] for own in ids)]

    def batches(self, reads: frozenset[str]) -> Iterator[tuple[list[int], Rows, LastOutputs]]:
        """Yield, batch by batch, the indices of the prompts, their rows, and the outputs after each prompt."""
        for chunk in self._chunks():
            yield chunk, *self._read(chunk, reads)

    def _chunks(self) -> Iterator[list[int]]:
        """Yield the indices of the prompts in batches within MOST_TOKENS and MOST_LOGITS.

        Prompts are sorted by the number of their tokens that are not cached, most first, with equal prompts together.
        """
        most_rows, most_tokens = self.model.most_rows // self.streams or 1, MOST_TOKENS // self.streams
        unread = [len(ids) - cached for ids, cached in zip(self.ids, self.cached, strict=True)]
        chunk: list[int] = []
        columns = 0
        for i in sorted(range(len(self.ids)), key=lambda i: (-unread[i], self.ids[i])):
            own = len(self.ids[i]) + self.reserve
            columns = max(columns, own)
            full = len(chunk) == most_rows or (len(chunk) + 1) * columns > most_tokens
            if chunk and (full or len(chunk) >= ENOUGH_ROWS and 2 * unread[i] < unread[chunk[0]]):
                yield chunk
                chunk, columns = [], own
            chunk.append(i)
        if chunk:
            yield chunk

    def _read(self, chunk: list[int], reads: frozenset[str]) -> tuple[Rows, LastOutputs]:
        """Run the model on the tokens of each prompt that are not cached; equal prompts are run once."""
        device = self.model.model.device
        distinct: dict[tuple[int, ...], int] = {}
        for i in chunk:
            distinct.setdefault(tuple(self.ids[i]), i)
        first = list(distinct.values())
        keys, prompts = self._streams_of([self.keys[i] for i in first], [self.ids[i] for i in first])
        cached = [self.cached[i] for i in first] * self.streams
        cache = new_cache(self.model.model, self.reserve)
        mask = torch.zeros(len(keys), 0, dtype=torch.bool, device=device)
        if any(cached):
            mask = self.memory.gather(keys, cached, cache)
        unread = [torch.tensor(ids[known:]) for ids, known in zip(prompts, cached, strict=True)]
        ids = pad_sequence(unread, batch_first=True, padding_side="left").to(device)
        real = pad_sequence([torch.ones_like(new) for new in unread], batch_first=True, padding_side="left").to(device)
        # Both parts are padded on the left, so a row may also have padding between its cached and its new tokens.
        mask = torch.cat([mask, real.bool()], dim=1)
        padded = any(len(self.ids[i]) < mask.shape[1] for i in first)
        position = (mask.cumsum(-1) - 1).clamp(min=0)  # padding does not count; the clamp is for padding itself
        # The cumulative sum needed the cached columns; the model gets the positions of the new ones only.
        position = position[:, -ids.shape[1] :]
        outputs = self.model.forward(ids, mask if padded else None, position, cache, reads)

        # Copy what was computed once per distinct prompt to all rows that share the prompt.
        place = {prompt: n for n, prompt in enumerate(distinct)}
        own = torch.tensor([place[tuple(self.ids[i])] for i in chunk], device=device)
        all_streams = torch.cat([own + stream * len(first) for stream in range(self.streams)])
        if len(first) < len(chunk):
            cache.reorder_cache(all_streams)
        rows = Rows(
            index=torch.tensor(chunk, device=device),
            # Rows end in the last column, which is never padding; `own` indexes stream 0, which comes first.
            length=position[own, -1] + 1,
            mask=torch.nn.functional.pad(mask[own], (0, self.reserve), value=True),
            cache=cache,
            width=mask.shape[1],
            padded=padded,
            streams=self.streams,
        )
        return rows, outputs.select(all_streams)

    def store(self, rows: Rows, leaving: Tensor, replies: Sequence[list[int]], columns: int) -> None:
        """Store the caches of rows that leave the batch, if there is a memory.

        Args:
          rows: the batch.
          leaving: (R,) indices of these rows in the batch.
          replies: ids that were drawn for each of them.
          columns: number of columns after the prompts that the cache holds.
        """
        if self.memory is None:
            return
        places = rows.index[leaving].tolist()
        mask = rows.mask[leaving, : rows.width + columns]
        drawn = torch.tensor([len(reply) for reply in replies], device=mask.device)
        mask[:, rows.width :] = torch.arange(columns, device=mask.device) < drawn.unsqueeze(
            -1
        )  # hides what came later
        # The model has not read the token that was drawn last, so a reply may be longer than the cache.
        ids = [self.ids[place] + reply[:columns] for place, reply in zip(places, replies, strict=True)]
        keys, ids = self._streams_of([self.keys[place] for place in places], ids)
        self.memory.store_cache(keys, ids, rows.cache, rows.in_cache(leaving), mask.repeat(rows.streams, 1))
