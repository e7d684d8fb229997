"""Turn trajectories into batches of token rows and packed action steps.

A window is a row of tokens with agent turns to train on; a step is one token that the agent chose in it; a log is cut
if it ends before the episode does (tokens/episodes.py). There is one index convention: in state (row, t) the model has
read tokens 0..t of that row, and its action is token t+1. Rendering and index arithmetic happen once, in
`encode_trajectories`; a batch is then a few gathers over flat arrays, from which the steps are expanded (steps.py).
"""

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain, repeat
from pathlib import Path
from typing import BinaryIO, NamedTuple, NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor

from offline_lmrl.errors import InputError, require
from offline_lmrl.logs.files import reading
from offline_lmrl.logs.io import atomic_output, in_temporary_folder
from offline_lmrl.logs.parallel import chunks, map_in_order
from offline_lmrl.logs.terminal import tracked
from offline_lmrl.logs.trajectory import Trajectory
from offline_lmrl.tokens.column_files import counted, map_columns, write_columns
from offline_lmrl.tokens.episodes import EpisodeEncoder, RowKind, StepRule, TurnEnd, Window
from offline_lmrl.tokens.steps import REPLY, TURN, expand, reply_states
from offline_lmrl.tokens.windows import Ids

IDS = np.dtype("i4")
# The fields of `Window`, and the type of their values.
LISTS = {"input_ids": IDS, "next_ids": IDS, "end_ids": IDS, "replies": REPLY, "turns": TURN, "apart": IDS}
_END = "_ends"  # after the name of a list: the column of its ends
_KINDS = {**LISTS, **{f"{name}{_END}": np.dtype("i8") for name in LISTS}}  # the columns of encoded windows in files
_CHUNK = 500  # trajectories that a process renders at a time, and windows whose steps are expanded at a time
FlatLists = tuple[np.ndarray, np.ndarray]  # the values of L lists, concatenated; (L+1,) offsets of the lists


class ActionSteps(TypedDict):
    """The batch as an MDP: N agent tokens, packed, without padding or prompt tokens.

    Each entry is (N,): float32 for reward, discount, bootstrap, return_to_go and end_discount, bool for has_target and
    closes_turn, long for all others.

    row: batch row of the state.
    state: column of the state in that row.
    action: id of the token that the agent chose there. It is the token at (row, state + 1), except for a closing
      action that the template prints as another token, or not at all, once the dialogue continues.
    reward: scaled reward paid between this state and the next.
    discount: γ between this state and the next.
    next_row: batch row of the next state.
    next_state: column of the next state.
    bootstrap: 1 if V of the next state counts, 0 after a terminal action.
    has_target: False only for the last action of a log that was cut right after a finished agent turn: neither the
      reward nor the state after it is known.
    closes_turn: True if the action ends its turn.
    turn: index of the turn in its trajectory.
    open_state: column of the turn's first state.
    return_to_go: sum of the discounted scaled rewards to the end of the log.
    end_row: batch row of the state whose V replaces the rewards after the end of a cut log.
    end_state: column of that state.
    end_discount: discount from this state to that V; 0 if the episode terminated.
    """

    row: Tensor
    state: Tensor
    action: Tensor
    reward: Tensor
    discount: Tensor
    next_row: Tensor
    next_state: Tensor
    bootstrap: Tensor
    has_target: Tensor
    closes_turn: Tensor
    turn: Tensor
    open_state: Tensor
    return_to_go: Tensor
    end_row: Tensor
    end_state: Tensor
    end_discount: Tensor


class TokenBatch(TypedDict):
    """B rows of T tokens, padded on the right.

    The first rows are the windows, which hold the trained turns. The rows after them hold the states after a window or
    at the end of a cut log, of which only V is computed.
    """

    input_ids: Tensor  # (B,T) long
    attention_mask: Tensor  # (B,T) bool
    action_mask: Tensor  # (B,T) bool: token t was chosen by the agent and is trained in this window
    steps: ActionSteps
    windows: int  # number of windows; all steps are in these first rows
    # "row" and "state", (E,) long: the state before each of the E tokens of the environment's replies
    environment: NotRequired[dict[str, Tensor]]


class Item(NamedTuple):
    """A reference to one item of a data set; the collator gathers all items of a batch at once."""

    dataset: "PackedDataset"
    index: int


class PackedDataset(torch.utils.data.Dataset):
    """The base of data sets that build a whole batch of items at once, with `batch` and `surplus_batch`."""

    def __getitem__(self, index: int) -> Item:
        return Item(self, int(index))


@dataclass(frozen=True, eq=False)
class EncodedWindows:
    """Windows as flat arrays: the tokens of their rows, and one record per trained turn.

    lists: name -> one list per window, for all of LISTS.
    step_rule: the rule for rewards, discounts and next states of the steps.
    """

    lists: Mapping[str, FlatLists]
    step_rule: StepRule


@dataclass(frozen=True, eq=False)
class WindowDataset(PackedDataset):
    """A data set of windows, so encoded that a batch is a few numpy gathers.

    Args:
      encoded: the windows.
      pad_id: the id that fills shorter rows on the right. Only the attention mask distinguishes padding from tokens.
      next_rows: True: a batch includes the rows that only serve to compute V of the next state.
      end_rows: True: a batch includes the rows that only serve to compute V at the end of a cut log.
      replies: True: a batch has the entry "environment"; the encoder must have been made with `replies` too.
      extra: name -> further column with one value per step, which the steps of a batch hold too.
    """

    encoded: EncodedWindows
    pad_id: int
    next_rows: bool = field(kw_only=True)
    end_rows: bool = field(kw_only=True)
    replies: bool = field(default=False, kw_only=True)
    extra: Mapping[str, np.ndarray] = field(default_factory=dict, kw_only=True)

    def __len__(self) -> int:
        return len(self.encoded.lists["input_ids"][1]) - 1

    def with_columns(self, **columns: np.ndarray) -> "WindowDataset":
        """Return a copy with further columns, which have one value per step."""
        return replace(self, extra={**self.extra, **columns})

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each window, (len(self),)."""
        return np.diff(self.encoded.lists["input_ids"][1])

    @cached_property
    def step_offsets(self) -> np.ndarray:
        """The index of each window's first step among all N steps, and N at the end, (len(self) + 1,)."""
        turns, offsets = self.encoded.lists["turns"]
        return np.concatenate([[0], turns["actions"].cumsum(dtype=np.int64)])[offsets]

    @property
    def action_tokens(self) -> int:
        return int(self.step_offsets[-1])

    @property
    def tokens(self) -> int:
        """The number of tokens in an epoch, including the rows that only serve to compute V."""
        read = {"input_ids": True, "next_ids": self.next_rows, "end_ids": self.end_rows}
        return sum(len(self.encoded.lists[name][0]) for name, used in read.items() if used)

    @property
    def reply_tokens(self) -> int:
        """The number of tokens of the environment's replies that are targets."""
        return int(self.encoded.lists["replies"][0]["tokens"].sum(dtype=np.int64))

    @property
    def closing_steps(self) -> int:
        """The number of steps that close a turn and have a target."""
        turns, _ = self.encoded.lists["turns"]
        return int(((turns["end"] <= TurnEnd.TERMINATED) & (turns["actions"] > 0)).sum())

    @property
    def last_steps(self) -> np.ndarray:
        """The index of the last step of each trained turn among all N steps, (M,)."""
        counts = self.encoded.lists["turns"][0]["actions"]
        return counts[counts > 0].cumsum(dtype=np.int64) - 1

    @staticmethod
    def items_in(batch: TokenBatch) -> int:
        """Return the number of steps of a batch, over which losses are averaged."""
        return len(batch["steps"]["row"])

    def summary(self) -> dict[str, int]:
        return {"windows": len(self), "tokens": self.tokens, "action tokens": self.action_tokens}

    @property
    def mean_return(self) -> float:
        """The mean scaled return-to-go over all action tokens, to which value heads are initialised."""
        total = sum(steps["return_to_go"].sum(dtype=np.float64) for steps in self.step_parts())
        return float(total / self.action_tokens)

    def step_parts(self) -> Iterator[dict[str, np.ndarray]]:
        """Yield the columns of all N steps, in order and a part at a time: name -> (n,), as `expand` returns them."""
        for start in range(0, len(self), _CHUNK):
            index = np.arange(start, min(start + _CHUNK, len(self)))
            yield self._steps(index, pick(self.encoded.lists["input_ids"], index))[0]

    def closing_columns(self) -> dict[str, np.ndarray]:
        """Return the columns of the M steps that close a turn and have a target: name -> (M,), as `expand` returns."""
        return joined(
            {name: values[part["closes_turn"] & part["has_target"]] for name, values in part.items()}
            for part in self.step_parts()
        )

    def columns(self, *names: str) -> dict[str, np.ndarray]:
        """Return columns of all N steps, name -> (N,), in one pass over the data: of those that `expand` returns."""
        return joined({name: part[name] for name in names} for part in self.step_parts())

    def column(self, name: str) -> np.ndarray:
        """Return a column of all N steps, (N,): one that `expand` returns, or a further one."""
        return self.extra[name] if name in self.extra else self.columns(name)[name]

    def _steps(
        self, index: np.ndarray, rows: tuple[np.ndarray, np.ndarray]
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Return the columns of the n steps of some windows, and the place in `index` of each step's window, (n,).

        Args:
          index: indices of the windows.
          rows: their input_ids, concatenated, and the length of each row.
        """
        turns, counts = pick(self.encoded.lists["turns"], index)
        of_turn, (tokens, lengths) = np.repeat(np.arange(len(index)), counts), rows
        apart, _ = pick(self.encoded.lists["apart"], index)
        steps = expand(turns, (lengths.cumsum() - lengths)[of_turn], tokens, apart, self.encoded.step_rule)
        return steps, np.repeat(of_turn, turns["actions"])

    def batch(self, indices: Sequence[int]) -> TokenBatch:
        """Return the windows with these indices as one padded batch; the rows for V only come after the windows."""
        index = np.asarray(indices)
        rows = [pick(self.encoded.lists["input_ids"], index)]
        steps, row = self._steps(index, rows[0])
        window = np.arange(len(index))
        extra = {"next": self.next_rows, "end": self.end_rows}
        # The batch row of each window's own row and of its extra rows, in the order of RowKind.
        places = [window]
        for name, present in extra.items():
            ids = self.encoded.lists[f"{name}_ids"]
            places.append(_append_rows(rows, pick(ids, index)) if present else np.zeros_like(window))
        input_ids, attention_mask = pad(rows, self.pad_id)

        steps["row"] = row
        for name, present in extra.items():
            kind = steps.pop(f"{name}_row_kind")
            steps[f"{name}_row"] = np.choose(kind, [of_window[row] for of_window in places])
            if not present:  # V is never used there, but the index must still be valid
                steps[f"{name}_state"] = np.where(kind == RowKind.OWN, steps[f"{name}_state"], 0)
        # A closing action may be missing from its row (at the row's end) or be printed as another token: mask only
        # true actions.
        inside = steps["state"] + 1 < input_ids.shape[1]
        place = row[inside], steps["state"][inside] + 1
        action_mask = np.zeros_like(attention_mask)
        action_mask[place] = (input_ids[place] == steps["action"][inside]) & attention_mask[place]
        batch = {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(attention_mask),
            "action_mask": torch.from_numpy(action_mask),
            "steps": _tensors(steps | self._extra_of(index)),
            "windows": len(index),
        }
        if self.replies:
            replies, counts = pick(self.encoded.lists["replies"], index)
            state, of_reply = reply_states(replies)
            batch["environment"] = _tensors({"row": np.repeat(window, counts)[of_reply], "state": state})
        return batch

    def _extra_of(self, index: np.ndarray) -> dict[str, np.ndarray]:
        """Return the further columns of the steps of the windows with these indices."""
        places, _ = places_of(self.step_offsets, index) if self.extra else ((), ())
        return {name: values[places] for name, values in self.extra.items()}

    def step_columns(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return the columns of the steps of these windows that name no place in a batch, (N,) each."""
        index = np.asarray(indices)
        steps, _ = self._steps(index, pick(self.encoded.lists["input_ids"], index))
        places = ("state", "next_row_kind", "next_state", "end_row_kind", "end_state")
        return _tensors({name: steps[name] for name in steps if name not in places} | self._extra_of(index))

    def surplus_batch(self) -> TokenBatch:
        """Return one window without steps, for a rank that has no data left but must run a forward pass."""
        batch = self.batch([0])
        batch["action_mask"] = torch.zeros_like(batch["action_mask"])
        for packed in ("steps", "environment")[: 1 + self.replies]:
            batch[packed] = {name: values[:0] for name, values in batch[packed].items()}
        return batch


def token_rows(rows: Sequence[Sequence[int]], states: Sequence[Sequence[int]]) -> WindowDataset:
    """Return a data set of rows of tokens with a step at each of some states, for a model to read.

    Args:
      rows: token ids of each row.
      states: the states of each row at which there is a step. Its action is the next token, or 0 at the end of a row.
    """
    following = [[*row[1:], 0] for row in rows]
    actions = [tokens[state] for tokens, places in zip(following, states, strict=True) for state in places]
    turns = np.zeros(len(actions), TURN)  # each state is a turn of one action; no step has a next state
    turns["open_state"], turns["last_action"] = np.concatenate(states), actions
    turns["actions"], turns["in_row"] = 1, True
    lists = {name: (np.zeros(0, kind), np.zeros(len(rows) + 1, np.int64)) for name, kind in LISTS.items()} | {
        "input_ids": (np.concatenate(rows), np.cumsum([0, *map(len, rows)])),
        "turns": (turns, np.cumsum([0, *map(len, states)])),
    }
    return WindowDataset(EncodedWindows(lists, StepRule()), 0, next_rows=False, end_rows=False)


def reply_rows(texts: Iterable[tuple[Sequence[int], Sequence[int]]]) -> WindowDataset:
    """Return `token_rows` of prompts with replies, with a step at each token of a reply.

    Args:
      texts: token ids of each prompt, at least one, and of the reply to it.
    """
    texts = list(texts)
    states = [range(len(prompt) - 1, len(prompt) + len(reply) - 1) for prompt, reply in texts]
    return token_rows([[*prompt, *reply] for prompt, reply in texts], states)


def token_batches(lengths: np.ndarray, token_budget: int) -> list[np.ndarray]:
    """Cut rows into batches of similar length, which need little padding, the longest first.

    Args:
      lengths: number of tokens of each row.
      token_budget: largest number of tokens of a batch, padding included; a longer row is a batch of its own.
    Returns: the indices of the rows of each batch.
    """
    order, start, batches = np.argsort(-lengths, kind="stable"), 0, []
    while start < len(order):
        batches.append(order[start : start + max(1, token_budget // lengths[order[start]])])
        start += len(batches[-1])
    return batches


def pick(flat: FlatLists, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the values of the lists with the indices (n,), concatenated, and the length of each list, (n,)."""
    values, offsets = flat
    places, lengths = places_of(offsets, index)
    return values[places], lengths


def places_of(offsets: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions of the values of some lists, concatenated, and the length of each list, (n,).

    Args:
      offsets: (L+1,) where each of L lists starts, and where the last one ends.
      index: (n,) indices of the lists.
    """
    lengths = offsets[index + 1] - offsets[index]
    # Position j of the result is j plus a shift per list: its offset less the total length of the lists before it.
    starts = np.repeat(offsets[index] - np.concatenate([[0], lengths.cumsum()[:-1]]), lengths)
    return starts + np.arange(lengths.sum()), lengths


def _append_rows(rows: list, extra: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Append the non-empty lists of `extra` to `rows`; return the batch row of every list, 0 for an empty one.

    Args:
      rows: entries (values, lengths): some rows, concatenated, and the length of each.
      extra: one list per window, as values and lengths.
    """
    values, lengths = extra
    present = lengths > 0
    first = sum(len(lengths) for _, lengths in rows)
    rows.append((values, lengths[present]))
    return np.where(present, first + present.cumsum() - 1, 0)


def pad(rows: Sequence[tuple[np.ndarray, np.ndarray]], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.concatenate([lengths for _, lengths in rows])
    mask = np.arange(lengths.max()) < lengths[:, None]
    ids = np.full(mask.shape, pad_id, dtype=np.int64)
    ids[mask] = np.concatenate([values for values, _ in rows])
    return ids, mask


def _tensors(columns: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    kinds = {"f": np.float32, "b": bool}
    return {
        name: torch.from_numpy(values.astype(kinds.get(values.dtype.kind, np.int64), copy=False))
        for name, values in columns.items()
    }


def encode_trajectories(
    trajectories: Sequence[Trajectory],
    encoder: EpisodeEncoder,
    counts: Counter[str],
    few_shot: Iterable[Ids] | None = None,
    processes: int = 1,
    kept: Path | None = None,
) -> EncodedWindows:
    """Render every trajectory once and return the windows, which are read from files as they are needed.

    Memory does not grow with the data while they are encoded.

    Args:
      counts: a Counter, updated in place: message -> number of dropped turns, steps without a target or other faults.
      few_shot: per trajectory, the ids of the few-shot demonstrations that all its windows contain after the preamble
        (tokens/few_shot.py); None = no demonstrations.
      processes: number of processes that render in parallel.
      kept: folder in which the encoded data stay for later calls, whose name stands for all arguments but
        `processes`. If it is there already, nothing is rendered. None = unnamed files in the temporary folder.
    Raises: InputError if no agent turn fits into max_length, or `kept` is damaged or cannot be written.
    """
    mine = counts if kept is None else Counter()  # what is kept with the data counts nothing else
    before = repeat((), len(trajectories)) if few_shot is None else few_shot
    work = chunks(zip(range(len(trajectories)), before, strict=True), _CHUNK)
    parts = counted(map_in_order(partial(_encoded, encoder, trajectories), work, processes), mine)
    parts = tracked(parts, "rendering, in chunks", -(-len(trajectories) // _CHUNK))
    if kept is None:
        with in_temporary_folder(), ExitStack() as opened:
            files = {name: opened.enter_context(tempfile.TemporaryFile()) for name in _KINDS}
            _write(parts, files, mine)
            flat = map_columns(files, _KINDS)
    else:
        if not kept.exists():
            _keep(parts, kept, mine)
        with reading(kept, "encoded data as they were written; remove this folder, and they are encoded again"):
            flat = map_columns({name: kept / name for name in _KINDS}, _KINDS)
            for name in LISTS:
                if flat[f"{name}{_END}"][-1] != len(flat[name]):
                    raise ValueError(f"{name} has {len(flat[name])} values")
            counts.update(json.loads((kept / "counts.json").read_text()))
    return EncodedWindows({name: (flat[name], flat[f"{name}{_END}"]) for name in LISTS}, encoder.step_rule)


def _encoded(
    encoder: EpisodeEncoder, trajectories: Sequence[Trajectory], places: Iterable[tuple[int, Ids]]
) -> tuple[dict[str, np.ndarray], Counter[str]]:
    """Return the columns of some trajectories, and counts of faults; `places` are their indices and few-shot ids."""
    counts: Counter[str] = Counter()
    lists = flatten([window for i, ids in places for window in encoder.encode(trajectories[i], counts, ids)])
    ends = {f"{name}{_END}": lengths.cumsum() for name, (_, lengths) in lists.items()}
    return {name: values for name, (values, _) in lists.items()} | ends, counts


def _write(parts: Iterable[Mapping[str, np.ndarray]], files: Mapping[str, BinaryIO], counts: Counter[str]) -> None:
    sizes = write_columns(parts, files, {f"{name}{_END}": name for name in LISTS})
    _require_windows(sizes["input_ids"], counts)


def _keep(parts: Iterable[Mapping[str, np.ndarray]], folder: Path, counts: Counter[str]) -> None:
    """Write the columns of all parts, and `counts`, which grow with them, to a folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_output(folder) as unfinished, ExitStack() as opened:
            unfinished.mkdir()
            files = {name: opened.enter_context(open(unfinished / name, "wb")) for name in _KINDS}
            _write(parts, files, counts)
            (unfinished / "counts.json").write_text(json.dumps(counts))
    except InputError:
        if not folder.exists():  # otherwise another run has written the same data meanwhile
            raise


def _require_windows(tokens: int, counts: Counter[str]) -> None:
    require(
        tokens > 0,
        f"data: found no agent turn that fits into max_length, expected at least one ({dict(counts)})",
    )


def encoded_windows(windows: Iterable[Window], encoder: EpisodeEncoder, counts: Counter[str]) -> EncodedWindows:
    """Return windows that `encoder` made as flat arrays.

    Args:
      counts: message -> number of dropped turns or other faults, for the error message.
    Raises: InputError if there is no window.
    """
    lists = flatten(list(windows))
    _require_windows(len(lists["input_ids"][0]), counts)
    ends = {name: np.concatenate([[0], lengths.cumsum()]) for name, (_, lengths) in lists.items()}
    return EncodedWindows({name: (values, ends[name]) for name, (values, _) in lists.items()}, encoder.step_rule)


def joined(parts: Iterable[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Concatenate the columns of some parts, at least one, which have the same names."""
    parts = list(parts)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def flatten(windows: Sequence[Window]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the lists of some windows: name -> their values, concatenated, and the length of each list."""
    columns = zip(*windows, strict=True) if windows else repeat((), len(LISTS))
    return {
        name: (np.array(list(chain.from_iterable(lists)), LISTS[name]), np.array(list(map(len, lists)), np.int64))
        for name, lists in zip(Window._fields, columns, strict=True)
    }
