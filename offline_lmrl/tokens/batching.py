"""Turn trajectories into batches of token rows and packed action steps.

A window is a row of tokens with agent turns to train on; a step is one token that the agent chose in it; a log is cut
if it ends before the episode does (tokens/episodes.py). There is one index convention: in state (row, t) the model has
read tokens 0..t of that row, and its action is token t+1. Rendering and index arithmetic happen once, in
`encode_trajectories`; a batch is then a few gathers over flat arrays.
"""

from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from typing import NamedTuple, NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor

from offline_lmrl.errors import require
from offline_lmrl.logs.terminal import tracked
from offline_lmrl.logs.trajectory import Trajectory
from offline_lmrl.tokens.episodes import EpisodeEncoder, RowKind, Step, Window
from offline_lmrl.tokens.windows import Ids

ROWS = ("input_ids", "next_ids", "end_ids")
LISTS = (*ROWS, "environment")  # columns of whole windows; all other columns have one value per step
STEP_CODES = {float: "f", bool: "b", int: "i"}
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
class WindowDataset(PackedDataset):
    """A data set of windows, stored as flat arrays of values and offsets, so that a batch is a few numpy gathers.

    Args:
      flat: name -> column with one list per window, for all of LISTS and all fields of `Step`. Further columns with
        one value per step are added to the steps of a batch under their name.
      pad_id: the id that fills shorter rows on the right. Only the attention mask distinguishes padding from tokens.
      next_rows: True: a batch includes the rows that only serve to compute V of the next state.
      end_rows: True: a batch includes the rows that only serve to compute V at the end of a cut log.
      replies: True: a batch has the entry "environment"; the encoder must have been made with `replies` too.
    """

    flat: Mapping[str, FlatLists]
    pad_id: int
    next_rows: bool = field(kw_only=True)
    end_rows: bool = field(kw_only=True)
    replies: bool = field(default=False, kw_only=True)

    def __len__(self) -> int:
        return len(self.flat["input_ids"][1]) - 1

    def with_columns(self, **columns: np.ndarray) -> "WindowDataset":
        """Return a copy with further columns, which have one value per step."""
        offsets = self.flat["state"][1]
        return replace(self, flat={**self.flat, **{name: (values, offsets) for name, values in columns.items()}})

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each window, (len(self),)."""
        return np.diff(self.flat["input_ids"][1])

    @property
    def step_offsets(self) -> np.ndarray:
        """The index of each window's first step among all N steps, and N at the end, (len(self) + 1,)."""
        return self.flat["state"][1]

    @property
    def action_tokens(self) -> int:
        return len(self.flat["state"][0])

    @property
    def tokens(self) -> int:
        """The number of tokens in an epoch, including the rows that only serve to compute V."""
        read = {"input_ids": True, "next_ids": self.next_rows, "end_ids": self.end_rows}
        return sum(len(self.flat[name][0]) for name, used in read.items() if used)

    @property
    def closing_steps(self) -> np.ndarray:
        """A mask (N,) bool of the data set's N steps, True for those that close a turn and have a target."""
        return self.flat["closes_turn"][0].astype(bool) & self.flat["has_target"][0].astype(bool)

    @staticmethod
    def items_in(batch: TokenBatch) -> int:
        """Return the number of steps of a batch, over which losses are averaged."""
        return len(batch["steps"]["row"])

    def summary(self) -> dict[str, int]:
        return {"windows": len(self), "tokens": self.tokens, "action tokens": self.action_tokens}

    @property
    def mean_return(self) -> float:
        """The mean scaled return-to-go over all action tokens, to which value heads are initialised."""
        return float(self.flat["return_to_go"][0].mean())

    def batch(self, indices: Sequence[int]) -> TokenBatch:
        """Return the windows with these indices as one padded batch; the rows for V only come after the windows."""
        index = np.asarray(indices)
        column = {name: pick(values, index) for name, values in self.flat.items()}
        rows = [column["input_ids"]]
        window = np.arange(len(index))
        extra = {"next": self.next_rows, "end": self.end_rows}
        # The batch row of each window's own row and of its extra rows, in the order of RowKind.
        places = [window]
        for name, present in extra.items():
            places.append(_append_rows(rows, column[f"{name}_ids"]) if present else np.zeros_like(window))
        input_ids, attention_mask = pad(rows, self.pad_id)

        steps = {name: values for name, (values, _) in column.items() if name not in LISTS}
        row = steps["row"] = np.repeat(window, column["state"][1])
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
            "steps": _tensors(steps),
            "windows": len(index),
        }
        if self.replies:
            state, lengths = column["environment"]
            batch["environment"] = _tensors({"row": np.repeat(window, lengths), "state": state})
        return batch

    def step_columns(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return the columns of the steps of these windows that name no place in a batch, (N,) each."""
        named = {
            "state",
            *(name for name in self.flat if name.startswith(("next_", "end_")) and name != "end_discount"),
        }
        kept = [name for name in self.flat if name not in {*LISTS, *named}]
        return _tensors({name: pick(self.flat[name], np.asarray(indices))[0] for name in kept})

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
    per_step = np.cumsum([0, *map(len, states)])
    none = np.zeros(len(actions), dtype=np.int64), per_step  # no step has a next state, and no log is cut
    columns = dict.fromkeys(("next_row_kind", "next_state", "end_row_kind", "end_state"), none) | {
        "input_ids": (np.concatenate(rows), np.cumsum([0, *map(len, rows)])),
        "state": (np.concatenate(states), per_step),
        "action": (np.array(actions), per_step),
    }
    return WindowDataset(columns, 0, next_rows=False, end_rows=False)


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
        name: torch.from_numpy(values.astype(kinds.get(values.dtype.char, np.int64)))
        for name, values in columns.items()
    }


def encode_trajectories(
    trajectories: Iterable[Trajectory],
    encoder: EpisodeEncoder,
    counts: Counter[str],
    few_shot: Iterable[Ids] | None = None,
) -> dict[str, FlatLists]:
    """Render every trajectory once and return the columns of a `WindowDataset`.

    Args:
      counts: a Counter, updated in place: message -> number of dropped turns, steps without a target or other faults.
      few_shot: per trajectory, the ids of the few-shot demonstrations that all its windows contain after the preamble
        (tokens/few_shot.py); None = no demonstrations.
    Raises: InputError if no agent turn fits into max_length.
    """
    if isinstance(trajectories, Sized):
        trajectories = tracked(trajectories, "rendering", len(trajectories))
    rows = ((t, ()) for t in trajectories) if few_shot is None else zip(trajectories, few_shot, strict=True)
    return columns_of((window for t, ids in rows for window in encoder.encode(t, counts, ids)), counts)


def columns_of(windows: Iterable[Window], counts: Counter[str]) -> dict[str, FlatLists]:
    """Return the columns of a `WindowDataset` of these windows.

    Args:
      counts: message -> number of dropped turns or other faults, for the error message.
    Raises: InputError if there is no window.
    """
    values = {name: array("i") for name in LISTS} | {
        name: array(STEP_CODES[kind]) for name, kind in Step.__annotations__.items()
    }
    lengths = {name: array("q", [0]) for name in values}
    for window in windows:
        lists = window._asdict()
        steps = zip(*lists.pop("steps"), strict=True)
        for name, items in (lists | dict(zip(Step._fields, steps, strict=True))).items():
            values[name].extend(items)
            lengths[name].append(len(items))
    require(
        len(lengths["input_ids"]) > 1,
        f"data: found no agent turn that fits into max_length, expected at least one ({dict(counts)})",
    )
    return {name: (np.asarray(values[name]), np.cumsum(np.asarray(lengths[name]))) for name in values}
