"""From comparisons to batches: each option as rows of tokens, rendered once, gathered by comparison.

An option is one row, context and reply. Or, where each of its agent turns is judged on its own (`by_turn`), it is one
row per agent turn: what a policy with the same window rule sees before that turn, and the turn (data/windows.py).
A scored trajectory is a comparison of one option, whose target is its return.
"""

import sys
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor

from offline_lmrl.data.batching import FlatLists, pad, pick, places_of
from offline_lmrl.data.comparison import Comparison
from offline_lmrl.data.errors import InputError
from offline_lmrl.data.io import in_temporary_folder
from offline_lmrl.data.parallel import chunks, map_in_order
from offline_lmrl.data.rendering import EncodedTurn, Renderer
from offline_lmrl.data.trajectory import Trajectory, Turn, leading_system_turns, with_own_token_ids
from offline_lmrl.data.windows import WindowRule, first_visible

_NOT_ACTION, _ACTION, _CLOSING = 0, 1, 2
_CHUNK = 500  # comparisons that a process renders at once


class ComparisonBatch(TypedDict):
    """C comparisons of M = ΣK options, as B rows of T tokens. The options of a comparison stand together, in order,
    and so do the rows of an option.

    A row is context + option, so B = M, and the context is the same in all rows of a comparison, truncation included;
    or it is one agent turn of an option, after what that turn sees.
    """

    input_ids: Tensor  # (B,T) long
    attention_mask: Tensor  # (B,T) bool
    action_mask: Tensor  # (B,T) bool: the agent wrote token t of the option; where a head per token is read
    closing_mask: Tensor  # (B,T) bool: token t is the last of its agent turn; where a head per turn is read
    last: Tensor  # (B,) long: the option's last action token, where a terminal head is read
    option: Tensor  # (B,) long: row -> option, 0 to M − 1
    comparison: Tensor  # (M,) long: option -> comparison, 0 to C − 1
    target: Tensor  # (M,) float: probability that this option is the best of its comparison; its return where alone
    rank: Tensor  # (M,) long: place of this option's group in the ranking, 0 = best
    weight: Tensor  # (C,) float
    strength: Tensor  # (C,) float: `labels["strength"]`, 0 where it is not known


class ComparisonRef(NamedTuple):
    """One item of a `ComparisonDataset`: the collator gathers all items of a batch at once."""

    dataset: "ComparisonDataset"
    index: int


class ComparisonDataset(torch.utils.data.Dataset):
    """Comparisons as flat arrays; made by `encode_comparisons`. Its length, and so a batch size, counts comparisons.

    Args:
      input_ids, actions: one list per row: tokens, and for each token whether it is no action, one, or one that closes
        its turn.
      row_offsets: (options + 1,) where the rows of each option start, and where the last one's end.
      offsets: (len + 1,) where the options of each comparison start, and where the last one's end.
      target, rank: one value per option. weight, strength: one value per comparison.
      pad_id: fills the right of shorter rows; the attention mask, not the id, says what is real.
    """

    def __init__(
        self,
        input_ids: FlatLists,
        actions: FlatLists,
        row_offsets: np.ndarray,
        offsets: np.ndarray,
        target: np.ndarray,
        rank: np.ndarray,
        weight: np.ndarray,
        strength: np.ndarray,
        pad_id: int,
    ):
        self.input_ids, self.actions, self.pad_id = input_ids, actions, pad_id
        self.row_offsets, self.offsets = row_offsets, offsets
        self.target, self.rank, self.weight, self.strength = target, rank, weight, strength

    def __len__(self) -> int:
        return len(self.weight)

    def __getitem__(self, index: int) -> ComparisonRef:
        return ComparisonRef(self, int(index))

    @property
    def lengths(self) -> np.ndarray:
        """(len,) tokens of each comparison's longest row."""
        return np.maximum.reduceat(np.diff(self.input_ids[1]), self.row_offsets[self.offsets[:-1]])

    @property
    def tokens(self) -> int:
        """Tokens of all rows, which an epoch reads."""
        return len(self.input_ids[0])

    def facts(self) -> dict[str, int]:
        return {"comparisons": len(self), "options": len(self.target), "tokens": self.tokens}

    def batch(self, indices: Sequence[int]) -> ComparisonBatch:
        """These comparisons as one padded batch."""
        index = np.asarray(indices)
        options, sizes = places_of(self.offsets, index)
        rows, parts = places_of(self.row_offsets, options)
        values, lengths = pick(self.input_ids, rows)
        input_ids, attention_mask = pad([(values, lengths)], self.pad_id)
        actions, _ = pad([pick(self.actions, rows)], _NOT_ACTION)
        return {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(attention_mask),
            "action_mask": torch.from_numpy(actions != _NOT_ACTION),
            "closing_mask": torch.from_numpy(actions == _CLOSING),
            "last": torch.from_numpy(actions.shape[1] - 1 - (actions != _NOT_ACTION)[:, ::-1].argmax(axis=1)),
            "option": torch.from_numpy(np.repeat(np.arange(len(options)), parts)),
            "comparison": torch.from_numpy(np.repeat(np.arange(len(index)), sizes)),
            "target": torch.from_numpy(self.target[options]),
            "rank": torch.from_numpy(self.rank[options].astype(np.int64)),
            "weight": torch.from_numpy(self.weight[index]),
            "strength": torch.from_numpy(self.strength[index]),
        }

    def surplus_batch(self) -> ComparisonBatch:
        """One comparison of weight 0, for a rank that has nothing to learn but must run forward."""
        batch = self.batch([0])
        batch["weight"] = torch.zeros_like(batch["weight"])
        return batch


def collate_comparisons(items: Sequence[ComparisonRef]) -> ComparisonBatch:
    """The data collator: items of one `ComparisonDataset`."""
    return items[0].dataset.batch([item.index for item in items])


def encode_comparisons(
    comparisons: Sequence[Comparison],
    renderer: Renderer,
    window: WindowRule,
    counts: Counter[str],
    processes: int = 1,
    by_turn: bool = False,
) -> ComparisonDataset:
    """Renders every comparison once; all that a batch needs lies in files without a name in the temporary folder.

    Where a comparison is longer than `window` allows, all its options lose the same oldest turns of the context, and
    never a token of their own; a comparison with an option that does not fit is dropped as a whole.

    Args:
      counts: receives what was dropped or lost turns, by reason.
      processes: how many render at once.
      by_turn: one row per agent turn of an option, each behind what `window` lets it see, instead of one per option.
    Raises: InputError where no comparison is left.
    """
    return _dataset(comparisons, partial(_compared, renderer, window, by_turn), renderer.close_id, counts, processes)


def encode_scored(
    trajectories: Sequence[Trajectory],
    renderer: Renderer,
    window: WindowRule,
    counts: Counter[str],
    processes: int = 1,
    by_turn: bool = False,
) -> ComparisonDataset:
    """Scored trajectories as comparisons of one option: all from the first agent turn on, with the return as target.

    Args, Raises: as `encode_comparisons`.
    """
    return _dataset(trajectories, partial(_rated, renderer, window, by_turn), renderer.close_id, counts, processes)


class _Rendered(NamedTuple):
    """Some comparisons: values per token, per row, per option and per comparison, of the kinds in _CODES.

    token_ends, row_ends, option_ends: tokens up to the end of each row, rows up to the end of each option, and options
    up to the end of each comparison.
    All are arrays where they are made, then files, where ends count from the very first comparison on and have a 0 in
    front, and at last what is read from those.
    """

    input_ids: Any
    actions: Any
    token_ends: Any
    row_ends: Any
    target: Any
    rank: Any
    option_ends: Any
    weight: Any
    strength: Any


_CODES = "ibqqfiqff"
Row = tuple[list[int], list[int]]  # tokens, and what each token is
# (rows of each option, target, ranks, weight, strength) of a comparison; None: it does not fit.
_Encoded = tuple[list[list[Row]], Sequence[float], Sequence[int], float, float] | None


def _compared(
    renderer: Renderer, window: WindowRule, by_turn: bool, row: Comparison, counts: Counter[str]
) -> _Encoded:
    rows = _own_rows(row, renderer, window, counts, by_turn)
    return rows and (rows, row.target, row.ranks, row.weight, float(row.labels.get("strength") or 0.0))


def _rated(renderer: Renderer, window: WindowRule, by_turn: bool, row: Trajectory, counts: Counter[str]) -> _Encoded:
    turns = with_own_token_ids(row, renderer.fingerprint).turns
    start = next((i for i, turn in enumerate(turns) if turn.is_trainable), None)
    if start is None:
        raise InputError("trajectories: found one without an agent turn, expected at least one")
    rows = encode_options(turns[:start], [turns[start:]], renderer, window, counts, by_turn)
    return rows and (rows, (row.total_return,), (0,), 1.0, 0.0)


def _rendered(
    rows: Sequence, encode: Callable[[Any, Counter[str]], _Encoded], places: Iterable[int]
) -> tuple[_Rendered, Counter[str]]:
    counts: Counter[str] = Counter()
    made = _Rendered(*map(array, _CODES))
    for i in places:
        encoded = encode(rows[i], counts)
        if encoded is None:
            continue
        options, target, ranks, weight, strength = encoded
        for option in options:
            for ids, kinds in option:
                made.input_ids.extend(ids)
                made.actions.extend(kinds)
                made.token_ends.append(len(made.input_ids))
            made.row_ends.append(len(made.token_ends))
        made.target.extend(target)
        made.rank.extend(ranks)
        made.option_ends.append(len(made.target))
        made.weight.append(weight)
        made.strength.append(strength)
    return made, counts


def _dataset(
    rows: Sequence, encode: Callable[[Any, Counter[str]], _Encoded], pad_id: int, counts: Counter[str], processes: int
) -> ComparisonDataset:
    places, tokens, lists, options = chunks(range(len(rows)), _CHUNK), 0, 0, 0
    with in_temporary_folder(), ExitStack() as opened:
        files = _Rendered(*(opened.enter_context(tempfile.TemporaryFile()) for _ in _CODES))
        for file in (files.token_ends, files.row_ends, files.option_ends):
            file.write(bytes(8))  # the first list starts at 0
        for part, mine in map_in_order(partial(_rendered, rows, encode), places, processes):
            counts.update(mine)
            ends = {
                "token_ends": tokens + np.asarray(part.token_ends),
                "row_ends": lists + np.asarray(part.row_ends),
                "option_ends": options + np.asarray(part.option_ends),
            }
            tokens, lists = tokens + len(part.input_ids), lists + len(part.token_ends)
            options += len(part.target)
            for file, values in zip(files, part._replace(**ends), strict=True):
                file.write(values)
        if not options:
            raise InputError(f"comparisons: found none that fits, expected at least one ({dict(counts)})")
        read = _Rendered(*(np.asarray(np.memmap(file, code, "r")) for file, code in zip(files, _CODES, strict=True)))
    flat = (read.input_ids, read.token_ends), (read.actions, read.token_ends)
    return ComparisonDataset(
        *flat, read.row_ends, read.option_ends, read.target, read.rank, read.weight, read.strength, pad_id
    )


def fitting(
    comparisons: Iterable[Comparison], renderer: Renderer, window: WindowRule, counts: Counter[str]
) -> list[Comparison]:
    """The comparisons whose options all fit: what is left out of one side must not stay in as the other.

    Args: as `encode_comparisons`.
    """
    return [row for row in comparisons if _own_rows(row, renderer, window, counts) is not None]


def _own_rows(
    comparison: Comparison, renderer: Renderer, window: WindowRule, counts: Counter[str], by_turn: bool = False
) -> list[list[Row]] | None:
    """`encode_options` of a comparison, whose sampled ids are used where they are this renderer's."""
    turns = [
        with_own_token_ids(
            Trajectory((*comparison.context, *option), labels=comparison.labels), renderer.fingerprint
        ).turns
        for option in comparison.options
    ]
    start = len(comparison.context)
    return encode_options(turns[0][:start], [row[start:] for row in turns], renderer, window, counts, by_turn)


def encode_options(
    context: Sequence[Turn],
    options: Sequence[Sequence[Turn]],
    renderer: Renderer,
    window: WindowRule,
    counts: Counter[str],
    by_turn: bool = False,
) -> list[list[Row]] | None:
    """Per option its rows: tokens, and what each token is (no action, an action, an action that closes its turn).

    Sampled ids, if there are any, must be this renderer's. None where an option does not fit; `counts` is told of that
    and of lost turns. by_turn: as in `encode_comparisons`.
    """
    rows = [[*context, *option] for option in options]
    counts.update({line for row in rows for line in renderer.printer.faults_in(row)})
    encoded = [renderer.encode(row) for row in rows]
    cut = _cut_by_turn if by_turn else _cut_as_one_turn
    cuts = cut(rows, encoded, len(context), renderer, window)
    if cuts is None:
        counts["comparisons dropped: an option longer than max_length"] += 1
        return None
    roomy = cut(rows, encoded, len(context), renderer, replace(window, max_length=sys.maxsize))
    if cuts != roomy:
        counts["comparisons that lost old turns of the context"] += 1
    return [
        [_row(row[:stop], turns[:stop], start, first, renderer, counts) for start, first, stop in spans]
        for row, turns, spans in zip(rows, encoded, cuts, strict=True)
    ]


# (first turn of the reply, first turn that is seen behind the leading system turns, end of the reply) of each row
_Spans = list[tuple[int, int, int]]


def _cut_as_one_turn(
    rows: Sequence[Sequence[Turn]],
    encoded: Sequence[Sequence[EncodedTurn]],
    start: int,
    renderer: Renderer,
    window: WindowRule,
) -> list[_Spans] | None:
    """One row per option, from turn `start` on. All options together are one coming turn, as long as the longest of
    them, so the context stays the same for all. None where that does not fit."""
    head = leading_system_turns(rows[0][:start])
    before = [turn.longest for turn in encoded[0][:start]]
    longest = max(sum(turn.longest for turn in turns[start:]) for turns in encoded)
    fixed = len(renderer.preamble_of(rows[0])) + sum(before[:head])
    first = first_visible(window, [*before, longest], start, head, fixed)
    return None if first is None else [[(start, first, len(row))] for row in rows]


def _cut_by_turn(
    rows: Sequence[Sequence[Turn]],
    encoded: Sequence[Sequence[EncodedTurn]],
    start: int,
    renderer: Renderer,
    window: WindowRule,
) -> list[_Spans] | None:
    """One row per agent turn from turn `start` on, cut as the window of a policy. None where one does not fit."""
    cuts = []
    for row, turns in zip(rows, encoded, strict=True):
        head, lengths = leading_system_turns(row), [turn.longest for turn in turns]
        fixed = len(renderer.preamble_of(row)) + sum(lengths[:head])
        agent = (i for i in range(start, len(row)) if row[i].is_trainable)
        cuts.append([(i, first_visible(window, lengths, i, head, fixed), i + 1) for i in agent])
    return None if any(first is None for spans in cuts for _, first, _ in spans) else cuts


def _row(
    turns: Sequence[Turn],
    encoded: Sequence[EncodedTurn],
    start: int,
    first: int,
    renderer: Renderer,
    counts: Counter[str],
) -> tuple[list[int], list[int]]:
    """A context and, from turn `start` on, a reply: tokens, and what each token is.

    Where the template prints no closing, the agent's closing token ends the row: scores are read there. Inside an
    option it is the token before the next turn. A turn of the agent's that the template prints otherwise once others
    follow holds no actions, which is counted.
    """
    pieces = renderer.window_ids(turns, encoded, first, len(turns), live=True)
    if turns[-1].role == "assistant":
        last = encoded[-1]
        pieces[-1] = (*pieces[-1], *last.actions[len(pieces[-1]) - last.action_start :])
    ids = [*renderer.preamble_of(turns), *(token for piece in pieces for token in piece)]
    kinds, place = [_NOT_ACTION] * len(ids), len(ids)
    for index in range(len(turns) - 1, start - 1, -1):
        turn, piece = encoded[index], pieces[index - len(turns)]
        place -= len(piece)
        if not turns[index].is_trainable:
            continue
        begin, kept = turn.action_start, len(turn.actions) - 1
        if piece[begin : begin + kept] != turn.actions[:kept]:
            counts["agent turns inside a reply without actions: the template prints them otherwise there"] += 1
            continue
        closing = piece[begin + kept : begin + kept + 1]
        closes = bool(closing) and (closing == turn.actions[kept:] or renderer.is_control(closing[0]))
        stop = place + begin + kept + closes
        kinds[place + begin : stop] = [_ACTION] * (kept + closes)
        kinds[stop - 1] = _CLOSING
    return ids, kinds
