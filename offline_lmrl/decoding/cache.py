"""Caches of attention keys and values that are kept between turns, so that rows can be batched anew every turn.

A row is one token sequence that the model continues, such as an episode. The caller names it by an integer, its key.
"""

import copy
import inspect
from collections import Counter
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

    def keep(self, rows: Tensor, first: int) -> None:
        """Keep only some rows and columns, in place.

        Args:
          rows: (R,) long, the row that comes to each place. Only those that change their place are copied.
          first: the first column that is kept.
        """
        moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero().squeeze(-1)
        width = self.get_seq_length()
        kept = []
        for states in self.buffers or (self.keys, self.values):
            states[moved, :, first:width] = states[rows[moved], :, first:width]
            kept.append(states[: len(rows), :, first:])
        self.buffers = kept
        self.keys, self.values = (buffer[:, :, : width - first] for buffer in kept)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.buffers = []  # the reordered keys and values are new tensors, without spare space


def joined_cache(parts: Sequence[tuple[DynamicCache, Tensor | None, int]], width: int, reserve: int) -> DynamicCache:
    """Return a cache of rows of one or several caches, right-aligned, with space for `reserve` tokens more.

    Args:
      parts: caches that are kept per token; the rows that are taken from each, (R,) long, None = all; and the column
        from which on they are taken.
      width: number of columns, at least as many as are taken from each part; those before a part are 0.
      reserve: number of tokens for which space is left.
    """
    joined = copy.copy(parts[0][0])
    joined.layers = []
    for layers in zip(*(cache.layers for cache, _, _ in parts), strict=True):
        layer = ReservingLayer(reserve)
        joined.layers.append(layer)
        if not layers[0].is_initialized:  # a layer that uses the keys and values of another one
            continue
        layer.lazy_initialization(layers[0].keys, layers[0].values)
        for name in ("keys", "values"):
            taken = []
            for own, (_, rows, first) in zip(layers, parts, strict=True):
                states = getattr(own, name)[:, :, first:]
                taken.append(states if rows is None else states.index_select(0, rows))
            _, heads, _, size = taken[0].shape
            buffer = taken[0].new_empty(sum(map(len, taken)), heads, width + reserve, size)
            for place, states in zip(buffer.split([len(states) for states in taken]), taken, strict=True):
                empty = width - states.shape[2]
                place[:, :, :empty] = 0.0
                place[:, :, empty:width] = states
            layer.buffers.append(buffer)
        layer.keys, layer.values = (buffer[:, :, :width] for buffer in layer.buffers)
    return joined


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
      max_bytes: limit on the size of all stored caches, in bytes. Where a new one would exceed it, those that were
        not used for the longest time are dropped; their rows compute their whole prompt again at the next turn.
    Attributes:
      rows: key -> block, the row's index in it, and the cached ids; the least recently used row comes first.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.rows: dict[int, tuple[_Block, int, list[int]]] = {}

    @property
    def bytes(self) -> int:
        """The size of all stored caches in bytes; rows of one batch share a block, which counts once."""
        return sum({id(block): block.bytes for block, _, _ in self.rows.values()}.values())

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
        if ids[:most] == list(prompt[:most]):
            return most
        return next(i for i in range(most) if ids[i] != prompt[i])

    def longest(self, prompt: Sequence[int]) -> int | None:
        """Return the key, 0 or more, of the row that holds most tokens from the start of a prompt; None = no row."""
        held = {row: self.reusable(row, prompt) for row in self.rows if row >= 0}
        best = max(held, key=held.get, default=None)
        return best if best is not None and held[best] else None

    def is_continued(self, row: int, prompt: Sequence[int]) -> bool:
        """True if a prompt goes on where the row's cache ends, so that the cache of the prompt holds all of it."""
        return self.reusable(row, prompt) == len(self.rows[row][2])

    def drop(self, rows: Iterable[int]) -> None:
        for row in rows:
            self.rows.pop(row, None)

    def store_cache(
        self, rows: Sequence[int], ids: Sequence[list[int]], cache: DynamicCache, chosen: Tensor, mask: Tensor
    ) -> None:
        """Store the caches of R rows, unless they alone exceed max_bytes.

        Args:
          rows: R keys under which the caches are stored.
          ids: per row, the ids that its cache holds, as many as its mask has True columns.
          cache: the cache of a batch that contains the rows.
          chosen: (R,) long, the index of each row in that cache.
          mask: (R, L) bool, True at columns that hold a token.
        """
        first, end = 0, mask.shape[1]
        # If all rows of the batch are stored at once, `chosen` is the identity, and nothing has to be copied, unless
        # most of the space that is allocated holds no token.
        size, allocated = _bytes((layer.keys, layer.values) for layer in cache.layers), _allocated(cache)
        whole = len(rows) == cache.layers[0].keys.shape[0] and allocated <= 2 * size
        if not whole:
            columns = mask.any(0).nonzero()
            first, end = int(columns[0]), int(columns[-1]) + 1
            size = size * len(rows) * (end - first) // (cache.layers[0].keys.shape[0] * cache.layers[0].keys.shape[2])
        size = allocated if whole else size
        if size > self.max_bytes:
            return
        self._make_space(size)
        layers = [
            (layer.keys, layer.values)
            if whole
            else (layer.keys[chosen, :, first:end], layer.values[chosen, :, first:end])
            for layer in cache.layers
        ]
        block = _Block(layers, mask[:, first:end], size)
        self.drop(rows)  # so that they come last in the order of use
        self.rows.update({row: (block, i, ids[i]) for i, row in enumerate(rows)})

    def _make_space(self, needed: int) -> None:
        """Drop the least recently used rows until a new block of this size, in bytes, is within the limit."""
        shared = Counter(id(block) for block, _, _ in self.rows.values())
        held = self.bytes
        for row in list(self.rows):
            if held + needed <= self.max_bytes:
                return
            block = self.rows.pop(row)[0]
            shared[id(block)] -= 1
            held -= block.bytes * (not shared[id(block)])

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
        for row in rows:
            if row in self.rows:
                self.rows[row] = self.rows.pop(row)  # the row that is used last comes last
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


def _allocated(cache: DynamicCache) -> int:
    """Return the bytes that a cache keeps in memory, with the space for tokens to come."""
    return sum(states.untyped_storage().nbytes() for layer in cache.layers for states in (layer.keys, layer.values))
