"""Turn comparisons into batches: each option is rendered once as rows of tokens, and a batch gathers comparisons.

A comparison has one context and K options: the replies (one or more turns) among which people chose. An option is one
row of tokens: context and reply. With `by_turn`, where each agent turn is scored separately, an option is one row per
agent turn: the turns that a policy with the same window rule sees before that turn, and the turn itself
(tokens/windows.py). A scored trajectory becomes a comparison with one option, whose target is the trajectory's return.
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

from offline_lmrl.errors import InputError
from offline_lmrl.logs.comparison import Comparison
from offline_lmrl.logs.io import in_temporary_folder
from offline_lmrl.logs.parallel import chunks, map_in_order
from offline_lmrl.logs.trajectory import Trajectory, Turn, leading_system_turns, with_own_token_ids
from offline_lmrl.tokens.batching import FlatLists, pad, pick, places_of
from offline_lmrl.tokens.rendering import EncodedTurn, Renderer
from offline_lmrl.tokens.windows import WindowRule, first_visible

_NOT_ACTION, _ACTION, _CLOSING = 0, 1, 2
_CHUNK = 500  # number of comparisons that a process renders at a time


class ComparisonBatch(TypedDict):
    """A batch of C comparisons with M = ΣK options in total, as B rows of T tokens, padded on the right.

    The options of a comparison are adjacent and in order, and so are the rows of an option. Without `by_turn`, a row
    is context + option, so B = M, and all rows of a comparison have the same context, truncated at the same turn. With
    `by_turn`, a row is one agent turn of an option, after the turns visible to it.
    """

    input_ids: Tensor  # (B,T) long
    attention_mask: Tensor  # (B,T) bool
    action_mask: Tensor  # (B,T) bool: the agent wrote token t of the option; a reward head "token" scores these
    closing_mask: Tensor  # (B,T) bool: token t is the last of its agent turn; a reward head "turn" scores these
    last: Tensor  # (B,) long: column of the row's last action token; a reward head "terminal" scores it
    option: Tensor  # (B,) long: row -> option, 0 to M − 1
    comparison: Tensor  # (M,) long: option -> comparison, 0 to C − 1
    target: Tensor  # (M,) float: probability that this option is the best of its comparison; if alone, its return
    rank: Tensor  # (M,) long: rank of this option in its comparison, 0 = best; tied options share a rank
    weight: Tensor  # (C,) float: how much the comparison counts in the loss, above 0
    strength: Tensor  # (C,) float: by how much the better option is better, `labels["strength"]`; 0 if unknown


class ComparisonRef(NamedTuple):
    """A reference to one item of a `ComparisonDataset`; the collator gathers all items of a batch at once."""

    dataset: "ComparisonDataset"
    index: int


class ComparisonDataset(torch.utils.data.Dataset):
    """A data set of comparisons as flat arrays, made by `encode_comparisons` or `encode_scored`.

    Its length, and therefore a batch size, counts comparisons.

    Args:
      input_ids: one list of token ids per row.
      actions: one list per row with the kind of each token: 0 = not chosen by the agent, 1 = an action, 2 = the action
        that closes its turn.
      row_offsets: (options + 1,) index of each option's first row, then the number of rows.
      offsets: (comparisons + 1,) index of each comparison's first option, then the number of options.
      target: (options,), probability that the option is the best of its comparison, or a trajectory's return.
      rank: (options,), rank of the option in its comparison, 0 = best.
      weight: (comparisons,), weight of the comparison in the loss, above 0.
      strength: (comparisons,), by how much the better option is better; 0 = unknown.
      pad_id: the id that fills shorter rows on the right. Only the attention mask distinguishes padding from tokens.
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
        """The number of tokens of each comparison's longest row, (len(self),)."""
        return np.maximum.reduceat(np.diff(self.input_ids[1]), self.row_offsets[self.offsets[:-1]])

    @property
    def tokens(self) -> int:
        """The number of tokens in an epoch, over all rows."""
        return len(self.input_ids[0])

    def summary(self) -> dict[str, int]:
        return {"comparisons": len(self), "options": len(self.target), "tokens": self.tokens}

    def batch(self, indices: Sequence[int]) -> ComparisonBatch:
        """Return the comparisons with these indices as one padded batch."""
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
        """Return one comparison of weight 0, for a rank that has no data left but must run a forward pass."""
        batch = self.batch([0])
        batch["weight"] = torch.zeros_like(batch["weight"])
        return batch


def encode_comparisons(
    comparisons: Sequence[Comparison],
    renderer: Renderer,
    window: WindowRule,
    counts: Counter[str],
    processes: int = 1,
    by_turn: bool = False,
) -> ComparisonDataset:
    """Render every comparison once and return a data set that reads from anonymous files in the temporary folder.

    If a comparison is longer than `window` allows, the oldest turns of the context are dropped, the same ones for all
    options (with `by_turn`, for each row separately); a reply is never shortened. If an option does not fit even
    without them, the whole comparison is dropped.

    Args:
      window: the limits on turns and tokens of a row.
      counts: a Counter, updated in place: message -> number of comparisons that were dropped, lost turns or have
        another fault.
      processes: number of processes that render in parallel.
      by_turn: False: one row per option. True: one row per agent turn of an option, each after the turns that `window`
        lets the agent see there.
    Raises: InputError if no comparison is left.
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
    """Render scored trajectories as comparisons of one option: the turns from the first agent turn on.

    The target of the option is the trajectory's return.

    Args:
      window: the limits on turns and tokens of a row.
      counts: a Counter, updated in place: message -> number of trajectories that were dropped, lost turns or have
        another fault.
      processes: number of processes that render in parallel.
      by_turn: False: one row per trajectory. True: one row per agent turn, after the turns that `window` lets the
        agent see there.
    Raises: InputError if no trajectory is left, or if one has no agent turn.
    """
    return _dataset(trajectories, partial(_rated, renderer, window, by_turn), renderer.close_id, counts, processes)


class _Rendered(NamedTuple):
    """Some rendered comparisons as flat columns with the types in _CODES.

    input_ids and actions have one value per token; target and rank one per option; weight and strength one per
    comparison.

    token_ends: per row, the number of tokens up to its end.
    row_ends: per option, the number of rows up to its end.
    option_ends: per comparison, the number of options up to its end.

    In the processes that render, the columns are arrays of a part of the data. The main process appends them to one
    file per column, in which the ends count from the first comparison of the data set and begin with a 0. The data set
    reads these files as memory maps.
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
Row = tuple[list[int], list[int]]  # token ids, and the kind of each token
# The rows of each option, target, ranks, weight and strength of a comparison; None if it does not fit.
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
            file.write(bytes(8))  # the first offset is 0
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
            raise InputError(
                f"comparisons: found none that fits into max_length, expected at least one ({dict(counts)})"
            )
        read = _Rendered(*(np.asarray(np.memmap(file, code, "r")) for file, code in zip(files, _CODES, strict=True)))
    flat = (read.input_ids, read.token_ends), (read.actions, read.token_ends)
    return ComparisonDataset(
        *flat, read.row_ends, read.option_ends, read.target, read.rank, read.weight, read.strength, pad_id
    )


def _own_rows(
    comparison: Comparison, renderer: Renderer, window: WindowRule, counts: Counter[str], by_turn: bool = False
) -> list[list[Row]] | None:
    """Apply `encode_options` to a comparison, after removing sampled ids of another tokenizer or template."""
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
    """Return the rows of each option: token ids, and the kind of each token (see `ComparisonDataset`).

    Args:
      context: turns that all options share.
      options: the turns of each option. Sampled ids, if any, must come from this renderer's tokenizer and template.
      window: the limits on turns and tokens of a row.
      counts: a Counter, updated in place if an option does not fit, the context loses turns or the template prints a
        turn with a fault.
      by_turn: False: one row per option. True: one row per agent turn of an option.
    Returns: one list of rows per option, or None if an option does not fit.
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


# The spans of an option, one per row. A span names the turns of the row by their indices: the first turn of the reply,
# the first visible turn after the leading system turns, and the turn after the end of the reply.
_Spans = list[tuple[int, int, int]]


def _cut_as_one_turn(
    rows: Sequence[Sequence[Turn]],
    encoded: Sequence[Sequence[EncodedTurn]],
    start: int,
    renderer: Renderer,
    window: WindowRule,
) -> list[_Spans] | None:
    """Return the spans of each option (see _Spans): one, which holds the whole reply; None if an option does not fit.

    All options keep the same turns of the context: those that `window` keeps before the longest option.

    Args:
      rows: for each option, the turns of context and reply.
      encoded: the same turns, encoded.
      start: number of turns in the context, and therefore index of the first turn of every reply.
      renderer: the renderer of the turns.
      window: the limits on turns and tokens of a row.
    """
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
    """Return the spans of each option (see _Spans): one per agent turn of its reply; None if such a turn does not fit.

    A span holds the turns that a policy with this window rule sees before the agent turn, and that turn as the reply.

    Args:
      rows: for each option, the turns of context and reply.
      encoded: the same turns, encoded.
      start: number of turns in the context, and therefore index of the first turn of every reply.
      renderer: the renderer of the turns.
      window: the limits on turns and tokens of a row.
    """
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
    """Return the token ids and the kind of each token of a row: a context and, from turn `start` on, a reply.

    If the template prints no closing token, the agent's is appended at the end of the row, because scores are computed
    there; an agent turn inside the reply closes with its last printed token instead. An agent turn that the template
    prints differently once other turns follow gets no actions; `counts` records the number of such turns.

    Args:
      turns: all turns up to the end of the reply.
      encoded: the same turns, encoded.
      start: index of the first turn of the reply.
      first: index of the first visible turn after the leading system turns.
      renderer: the renderer of the turns.
      counts: a Counter, updated in place.
    """
    pieces = renderer.window_ids(turns, encoded, first, len(turns), live=True)
    if turns[-1].role == "assistant":
        last = encoded[-1]
        pieces[-1] = (*pieces[-1], *last.actions[len(pieces[-1]) - last.action_start :])
    ids = [*renderer.preamble_of(turns), *(token for piece in pieces for token in piece)]
    kinds, place = [_NOT_ACTION] * len(ids), len(ids)
    # Count from the end, because `pieces` lacks the turns that the window cut off between system turns and context.
    for index in range(len(turns) - 1, start - 1, -1):
        turn, piece = encoded[index], pieces[index - len(turns)]
        place -= len(piece)
        if not turns[index].is_trainable:
            continue
        begin, kept = turn.action_start, len(turn.actions) - 1
        if piece[begin : begin + kept] != turn.actions[:kept]:
            counts[
                "agent turns inside a reply that have no actions, because the template prints them differently there"
            ] += 1
            continue
        closing = piece[begin + kept : begin + kept + 1]
        closes = bool(closing) and (closing == turn.actions[kept:] or renderer.is_control(closing[0]))
        stop = place + begin + kept + closes
        kinds[place + begin : stop] = [_ACTION] * (kept + closes)
        kinds[stop - 1] = _CLOSING
    return ids, kinds
