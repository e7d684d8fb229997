"""Keys and values that outlive a turn: kept per row, so that rows may come, leave and be batched anew at will."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from offline_lmrl.data.errors import InputError

Layer = tuple[Tensor, Tensor]  # keys and values, each (B, heads, L, width)


class RoomyLayer(DynamicLayer):
    """Keys and values with room for `room` more tokens: one copy per reply, where DynamicLayer copies for every token.

    (Those copies took a third of the time of a rollout with long windows.)
    """

    def __init__(self, room: int):
        super().__init__()
        self.room = room
        self.buffers: list[Tensor] = []  # keys and values are views of the filled part

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> Layer:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old = self.get_seq_length()
        new = old + key_states.shape[-2]
        if not self.buffers or self.buffers[0].shape[-2] < new:
            held, self.buffers = (self.keys, self.values), []
            for states, before in zip((key_states, value_states), held, strict=True):
                self.buffers.append(states.new_empty(*states.shape[:-2], new + self.room, states.shape[-1]))
                if old:
                    self.buffers[-1][..., :old, :] = before
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[..., old:new, :] = states
        self.keys, self.values = (buffer[..., :new, :] for buffer in self.buffers)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.buffers = []


def cache_argument(model: PreTrainedModel) -> str:
    """The name under which a model, or the one in a PeftModel, takes a cache; state-space models have their own.

    Raises: InputError where it takes none.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    known = inspect.signature(base.forward).parameters
    for name in ("past_key_values", "cache_params"):
        if name in known:
            return name
    raise InputError(f"model: found {type(base).__name__}, expected one that takes past_key_values")


def new_cache(model: PreTrainedModel, room: int) -> DynamicCache:
    """An empty cache of the model's own kinds of layers; plain ones keep room for the coming reply."""
    cache = DynamicCache(config=model.config)
    cache.layers = [RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def is_kept_per_token(cache: DynamicCache) -> bool:
    """Whether every layer holds one entry per token read; sliding windows and recurrent states do not."""
    return all(isinstance(layer, RoomyLayer) for layer in cache.layers)


@dataclass(frozen=True)
class _Block:
    """What one batch left behind; mask (B, L) tells the columns that hold a token of the row, in order."""

    layers: list[Layer]
    mask: Tensor
    bytes: int


class CacheMemory:
    """The caches of a session's rows between turns. A row's cache is reused as far as its ids are those of the prompt.

    Args:
      max_bytes: blocks beyond this are not kept; their rows read their whole prompt again next turn.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.rows: dict[int, tuple[_Block, int, list[int]]] = {}  # row -> block, index in it, ids read

    def retain(self, rows: Sequence[int]) -> None:
        """Forgets all other rows: those that are not asked for have usually finished, and would hold their block."""
        self.rows = {row: self.rows[row] for row in rows if row in self.rows}

    def fork(self, sources: Mapping[int, int]) -> "CacheMemory":
        """A memory of its own in which each row begins with what its source has here; no tensor is copied."""
        other = CacheMemory(self.max_bytes)
        other.rows = {row: self.rows[source] for row, source in sources.items() if source in self.rows}
        return other

    def reusable(self, row: int, prompt: Sequence[int]) -> int:
        """How many first tokens of the prompt are cached; at least one token is always left to be read."""
        if row not in self.rows:
            return 0
        ids = self.rows[row][2]
        most = min(len(ids), len(prompt) - 1)
        return next((i for i in range(most) if ids[i] != prompt[i]), most)

    def park(
        self, rows: Sequence[int], ids: Sequence[list[int]], cache: DynamicCache, chosen: Tensor, mask: Tensor
    ) -> None:
        """Keeps the caches of these rows, if there is room.

        Args:
          ids: what each row has read, as many as its mask has columns set.
          chosen: (R,) where the rows are in the cache. mask: (R, L) columns that hold a token.
        """
        held = {id(block): block.bytes for block, _, _ in self.rows.values()}
        share = len(rows) / cache.layers[0].keys.shape[0]
        if sum(held.values()) + share * _bytes((layer.keys, layer.values) for layer in cache.layers) > self.max_bytes:
            return
        whole = len(rows) == cache.layers[0].keys.shape[0]
        layers = [
            (layer.keys, layer.values) if whole else (layer.keys[chosen], layer.values[chosen])
            for layer in cache.layers
        ]
        block = _Block(layers, mask, _bytes(layers))
        self.rows.update({row: (block, i, ids[i]) for i, row in enumerate(rows)})

    def gather(self, rows: Sequence[int], kept: Sequence[int], cache: DynamicCache) -> Tensor:
        """Fills an empty cache with the first kept[i] tokens of each row, right-aligned.

        Returns: (B, max(kept)) bool mask of the filled columns, on the cache's device.
        """
        length = max(kept)
        places: dict[int, list[int]] = {}  # block -> the positions in `rows` that it serves
        for i, row in enumerate(rows):
            if kept[i]:
                places.setdefault(id(self.rows[row][0]), []).append(i)
        copies = [self._copies(rows, kept, places_in_block) for places_in_block in places.values()]
        for index, (keys, values) in enumerate(copies[0][0].layers):
            filled = []
            for which, like in ((0, keys), (1, values)):
                new = like.new_zeros(len(rows), like.shape[1], length, like.shape[3])
                for block, from_row, from_column, to_row, to_column in copies:
                    new[to_row, :, to_column] = block.layers[index][which][from_row, :, from_column]
                filled.append(new)
            cache.update(*filled, index)
        device = copies[0][0].mask.device
        return torch.arange(length, device=device) >= length - torch.tensor(kept, device=device).unsqueeze(-1)

    def _copies(self, rows: Sequence[int], kept: Sequence[int], places: list[int]) -> tuple:
        """One block and, for every token to copy from it, the row and column it comes from and goes to."""
        block = self.rows[rows[places[0]]][0]
        device = block.mask.device
        source = torch.tensor([self.rows[rows[i]][1] for i in places], device=device)
        target = torch.tensor(places, device=device)
        count = torch.tensor([kept[i] for i in places], device=device)
        real = block.mask[source]
        order = real.cumsum(-1)  # 1 for a row's first token
        row, column = (real & (order <= count.unsqueeze(-1))).nonzero(as_tuple=True)
        to_column = max(kept) - count[row] + order[row, column] - 1
        return block, source[row], column, target[row], to_column


def _bytes(layers: Iterable[Layer]) -> int:
    return sum(part.numel() * part.element_size() for layer in layers for part in layer)
