"""Caches of attention keys and values that are kept between turns, so that rows can be batched anew every turn.

A row is one token sequence that the model continues, such as an episode. The caller names it by an integer, its key.
"""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from offline_lmrl.errors import InputError
from offline_lmrl.models.adapters import without_adapter

Layer = tuple[Tensor, Tensor]  # keys and values, each (B, heads, L, width)


class ReservingLayer(DynamicLayer):
    """A cache layer that, whenever its space is too small, allocates space for `reserve` tokens more than it needs.

    If no reply is longer than `reserve`, it copies keys and values once per reply. DynamicLayer copies them for every
    token, which took a third of the time of a rollout with long windows.
    """

    def __init__(self, reserve: int):
        super().__init__()
        self.reserve = reserve
        self.buffers: list[Tensor] = []  # self.keys and self.values are views of the filled part

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> Layer:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old = self.get_seq_length()
        new = old + key_states.shape[-2]
        if not self.buffers or self.buffers[0].shape[-2] < new:
            held, self.buffers = (self.keys, self.values), []
            for states, before in zip((key_states, value_states), held, strict=True):
                self.buffers.append(states.new_empty(*states.shape[:-2], new + self.reserve, states.shape[-1]))
                if old:
                    self.buffers[-1][..., :old, :] = before
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[..., old:new, :] = states
        self.keys, self.values = (buffer[..., :new, :] for buffer in self.buffers)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.buffers = []  # the reordered keys and values are new tensors, without spare space


def cache_argument(model: PreTrainedModel) -> str:
    """Return the name of the model's forward argument for a cache; in state-space models it is cache_params.

    Args:
      model: a causal LM, or a PeftModel around one.
    Raises: InputError if the model takes no cache.
    """
    base = without_adapter(model)
    known = inspect.signature(base.forward).parameters
    for name in ("past_key_values", "cache_params"):
        if name in known:
            return name
    raise InputError(f"model: found {type(base).__name__}, expected one that takes past_key_values")


def new_cache(model: PreTrainedModel, reserve: int) -> DynamicCache:
    """Return an empty cache with the kinds of layers that the model needs; plain ones become `ReservingLayer`.

    Args:
      model: a causal LM, or a PeftModel around one.
      reserve: number of tokens that the coming reply may have.
    """
    cache = DynamicCache(config=model.config)
    cache.layers = [ReservingLayer(reserve) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def is_kept_per_token(cache: DynamicCache) -> bool:
    """True if every layer holds one entry per token; layers with sliding windows or recurrent states do not."""
    return all(isinstance(layer, ReservingLayer) for layer in cache.layers)


@dataclass(frozen=True)
class _Block:
    """The stored cache of one batch of B rows, in L columns that each hold a token or padding.

    Args:
      layers: keys and values of each layer, (B, heads, L, width of a head).
      mask: (B, L) bool, True at columns that hold a token; the tokens of a row are in order, from left to right.
      bytes: size of `layers` in bytes.
    """

    layers: list[Layer]
    mask: Tensor
    bytes: int


class CacheMemory:
    """A store that keeps the caches of rows between turns.

    At the next turn, a row's cache is reused for the first tokens of its prompt, as far as they equal the cached ids.

    Args:
      max_bytes: limit on the size of all stored caches, in bytes. Caches that would exceed it are not stored; their
        rows compute their whole prompt again at the next turn.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.rows: dict[int, tuple[_Block, int, list[int]]] = {}  # key -> block, the row's index in it, cached ids

    def keep_only(self, rows: Sequence[int]) -> None:
        """Drop all rows but these: the others have usually finished, and would keep their batch's cache in memory."""
        self.rows = {row: self.rows[row] for row in rows if row in self.rows}

    def fork(self, sources: Mapping[int, int]) -> "CacheMemory":
        """Return a new memory in which each row starts with the cache of a row of this one; no tensor is copied.

        Args:
          sources: key of each row in the new memory -> key of a row in this one; a source without a cache is ignored.
        """
        other = CacheMemory(self.max_bytes)
        other.rows = {row: self.rows[source] for row, source in sources.items() if source in self.rows}
        return other

    def reusable(self, row: int, prompt: Sequence[int]) -> int:
        """Return the number of tokens, from the start of the prompt (ids), that the row's cache holds.

        The number is less than the prompt's length, because the model has to run on at least one token to give logits.
        """
        if row not in self.rows:
            return 0
        ids = self.rows[row][2]
        most = min(len(ids), len(prompt) - 1)
        return next((i for i in range(most) if ids[i] != prompt[i]), most)

    def store_cache(
        self, rows: Sequence[int], ids: Sequence[list[int]], cache: DynamicCache, chosen: Tensor, mask: Tensor
    ) -> None:
        """Store the caches of R rows, if max_bytes allows it.

        Args:
          rows: R keys under which the caches are stored.
          ids: per row, the ids that its cache holds, as many as its mask has True columns.
          cache: the cache of a batch that contains the rows.
          chosen: (R,) long, the index of each row in that cache.
          mask: (R, L) bool, True at columns that hold a token.
        """
        # Rows of one batch share a block, which counts once.
        held = {id(block): block.bytes for block, _, _ in self.rows.values()}
        share = len(rows) / cache.layers[0].keys.shape[0]
        if sum(held.values()) + share * _bytes((layer.keys, layer.values) for layer in cache.layers) > self.max_bytes:
            return
        # If all rows of the batch are stored at once, `chosen` is the identity, and nothing has to be copied.
        whole = len(rows) == cache.layers[0].keys.shape[0]
        layers = [
            (layer.keys, layer.values) if whole else (layer.keys[chosen], layer.values[chosen])
            for layer in cache.layers
        ]
        block = _Block(layers, mask, _bytes(layers))
        self.rows.update({row: (block, i, ids[i]) for i, row in enumerate(rows)})

    def gather(self, rows: Sequence[int], tokens: Sequence[int], cache: DynamicCache) -> Tensor:
        """Fill an empty cache with the first tokens[i] tokens of each row, right-aligned.

        Args:
          rows: keys of the B rows.
          tokens: number of tokens to take from each row; 0 for a row that has no cache here.
          cache: the empty cache, which is changed in place.
        Returns: (B, max(tokens)) bool mask, True at the filled columns, on the cache's device.
        """
        length = max(tokens)
        places: dict[int, list[int]] = {}  # id of a block -> the positions in `rows` of the rows it holds
        for i, row in enumerate(rows):
            if tokens[i]:
                places.setdefault(id(self.rows[row][0]), []).append(i)
        copies = [self._copies(rows, tokens, places_in_block) for places_in_block in places.values()]
        for index, (keys, values) in enumerate(copies[0][0].layers):
            filled = []
            for which, like in ((0, keys), (1, values)):
                # Columns without a token stay 0; the mask hides them.
                new = like.new_zeros(len(rows), like.shape[1], length, like.shape[3])
                for block, from_row, from_column, to_row, to_column in copies:
                    # Two index tensors around a slice put their axis first: both sides are (N, heads, width).
                    new[to_row, :, to_column] = block.layers[index][which][from_row, :, from_column]
                filled.append(new)
            cache.update(*filled, index)
        device = copies[0][0].mask.device
        return torch.arange(length, device=device) >= length - torch.tensor(tokens, device=device).unsqueeze(-1)

    def _copies(self, rows: Sequence[int], tokens: Sequence[int], places: list[int]) -> tuple:
        """Find the N cached tokens to copy out of one block (the stored cache of one batch) into a new cache.

        Args:
          rows: as in `gather`.
          tokens: as in `gather`.
          places: positions in `rows` of the rows that the block holds.
        Returns: the block, then four index tensors (N,): each token's row and column in the block, and its row and
          column in the new cache.
        """
        block = self.rows[rows[places[0]]][0]
        device = block.mask.device
        source = torch.tensor([self.rows[rows[i]][1] for i in places], device=device)
        target = torch.tensor(places, device=device)
        count = torch.tensor([tokens[i] for i in places], device=device)
        real = block.mask[source]
        order = real.cumsum(-1)  # 1 at a row's first token, 2 at its second
        row, column = (real & (order <= count.unsqueeze(-1))).nonzero(as_tuple=True)
        # Right-aligned: the first token of a row goes to column max(tokens) − count, its last one to the last column.
        to_column = max(tokens) - count[row] + order[row, column] - 1
        return block, source[row], column, target[row], to_column


def _bytes(layers: Iterable[Layer]) -> int:
    return sum(part.numel() * part.element_size() for layer in layers for part in layer)
