"""Turn comparisons into batches: each option is rendered once as rows of tokens, and a batch gathers comparisons.

A comparison has one context and K options: the replies (one or more turns) among which people chose. An option is one
row of tokens: context and reply. With `by_turn`, where each agent turn is scored separately, an option is one row per
agent turn: the turns that a policy with the same window rule sees before that turn, and the turn itself
(tokens/windows.py). A scored trajectory becomes a comparison with one option, whose target is the trajectory's return.
"""

import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from offline_lmrl.errors import InputError, require
from offline_lmrl.logs.comparison import Comparison
from offline_lmrl.logs.io import in_temporary_folder
from offline_lmrl.logs.parallel import chunks, map_in_order
from offline_lmrl.logs.terminal import tracked
from offline_lmrl.logs.trajectory import Trajectory, Turn, with_own_token_ids
from offline_lmrl.tokens.batching import PackedDataset, pad, pick, places_of
from offline_lmrl.tokens.column_files import counted, map_columns, write_columns
from offline_lmrl.tokens.rendering import Renderer
from offline_lmrl.tokens.windows import EncodedDialogue, WindowRule, agent_turns

_NOT_ACTION, _ACTION, _CLOSING = 0, 1, 2
_CHUNK = 500  # number of comparisons that a process renders at a time
Lists = tuple[np.ndarray, np.ndarray]  # the values of some lists, concatenated; the length of each list


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


@dataclass(frozen=True, eq=False)
class ComparisonDataset(PackedDataset):
    """A data set of comparisons as flat arrays, made by `encode_comparisons`.

    Its length, and therefore a batch size, counts comparisons.

    Args:
      input_ids: (tokens,), token ids of all rows.
      actions: (tokens,), kind of each token: 0 = not chosen by the agent, 1 = an action, 2 = the action that closes
        its turn.
      row_ends: (rows + 1,), number of tokens up to the end of each row, after a 0.
      option_ends: (options + 1,), number of rows up to the end of each option, after a 0.
      target: (options,), probability that the option is the best of its comparison, or a trajectory's return.
      rank: (options,), rank of the option in its comparison, 0 = best.
      comparison_ends: (comparisons + 1,), number of options up to the end of each comparison, after a 0.
      weight: (comparisons,), weight of the comparison in the loss, above 0.
      strength: (comparisons,), by how much the better option is better; 0 = unknown.
      pad_id: the id that fills shorter rows on the right. Only the attention mask distinguishes padding from tokens.
    """

    input_ids: np.ndarray
    actions: np.ndarray
    row_ends: np.ndarray
    option_ends: np.ndarray
    target: np.ndarray
    rank: np.ndarray
    comparison_ends: np.ndarray
    weight: np.ndarray
    strength: np.ndarray
    pad_id: int

    def __len__(self) -> int:
        return len(self.weight)

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each comparison's longest row, (len(self),)."""
        return np.maximum.reduceat(np.diff(self.row_ends), self.option_ends[self.comparison_ends[:-1]])

    @property
    def tokens(self) -> int:
        """The number of tokens in an epoch, over all rows."""
        return len(self.input_ids)

    @staticmethod
    def items_in(batch: "ComparisonBatch") -> int:
        """Return the number of comparisons of a batch; those of weight 0, which only fill up a rank, are left out."""
        return int((batch["weight"] > 0).sum())

    def summary(self) -> dict[str, int]:
        return {"comparisons": len(self), "options": len(self.target), "tokens": self.tokens}

    def batch(self, indices: Sequence[int]) -> ComparisonBatch:
        """Return the comparisons with these indices as one padded batch."""
        index = np.asarray(indices)
        options, sizes = places_of(self.comparison_ends, index)
        rows, parts = places_of(self.option_ends, options)
        ids, kinds = (pick((values, self.row_ends), rows) for values in (self.input_ids, self.actions))
        return {
            **row_tensors(ids, kinds, self.pad_id),
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
    rows: Sequence[Comparison] | Sequence[Trajectory],
    renderer: Renderer,
    window: WindowRule,
    counts: Counter[str],
    processes: int = 1,
    by_turn: bool = False,
) -> ComparisonDataset:
    """Render every comparison once and return a data set that reads from anonymous files in the temporary folder.

    A scored trajectory is a comparison of one option, the turns from the first agent turn on, whose target is the
    trajectory's return. If a comparison is longer than `window` allows, the oldest turns of the context are dropped,
    the same ones for all options (with `by_turn`, for each row separately); a reply is never shortened. If an option
    does not fit even without them, the whole comparison is dropped.

    Args:
      rows: comparisons, or scored trajectories.
      window: the limits on turns and tokens of a row.
      counts: a Counter, updated in place: message -> number of comparisons that were dropped, lost turns or have
        another fault.
      processes: number of processes that render in parallel.
      by_turn: False: one row per option. True: one row per agent turn of an option, each after the turns that `window`
        lets the agent see there.
    Raises: InputError if no comparison is left, or if a trajectory has no agent turn.
    """
    render = partial(_rendered, partial(_encoded, renderer, window, by_turn), rows)
    parts = counted(map_in_order(render, chunks(range(len(rows)), _CHUNK), processes), counts)
    with in_temporary_folder(), ExitStack() as opened:
        files = {name: opened.enter_context(tempfile.TemporaryFile()) for name in _CODES}
        sizes = write_columns(tracked(parts, "rendering, in chunks", -(-len(rows) // _CHUNK)), files, _ENDS)
        require(
            bool(sizes["target"]),
            f"comparisons: found none that fits into max_length, expected at least one ({dict(counts)})",
        )
        read = map_columns(files, _CODES)
    return ComparisonDataset(**read, pad_id=renderer.close_id)


def row_tensors(ids: Lists, kinds: Lists, pad_id: int) -> dict[str, Tensor]:
    """Return the entries of a `ComparisonBatch` that describe its rows: the two masks of actions, and those before.

    Args:
      ids: the token ids of all rows, concatenated, and the length of each row.
      kinds: the kind of each token (see `ComparisonDataset`), as `ids`.
      pad_id: the id that fills shorter rows on the right.
    """
    input_ids, attention_mask = pad([ids], pad_id)
    actions, _ = pad([kinds], _NOT_ACTION)
    chosen = actions != _NOT_ACTION
    columns = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "action_mask": chosen,
        "closing_mask": actions == _CLOSING,
        # argmax on the reversed row finds the last action token
        "last": chosen.shape[1] - 1 - chosen[:, ::-1].argmax(axis=1),
    }
    return {name: torch.from_numpy(values) for name, values in columns.items()}


# The flat columns of a `ComparisonDataset` and the code of their type. In the processes that render, they are arrays
# of a part of the data. The main process appends them to one file per column, which the data set reads as memory maps.
_CODES = {
    "input_ids": "i",
    "actions": "b",
    "row_ends": "q",
    "option_ends": "q",
    "target": "f",
    "rank": "i",
    "comparison_ends": "q",
    "weight": "f",
    "strength": "f",
}
_ENDS = {"row_ends": "input_ids", "option_ends": "row_ends", "comparison_ends": "target"}  # the column that is counted
Row = tuple[list[int], list[int]]  # token ids, and the kind of each token
# The rows of each option, target, ranks, weight and strength of a comparison; None if it does not fit.
_Encoded = tuple[list[list[Row]], Sequence[float], Sequence[int], float, float] | None


def _encoded(
    renderer: Renderer, window: WindowRule, by_turn: bool, row: Comparison | Trajectory, counts: Counter[str]
) -> _Encoded:
    if isinstance(row, Trajectory):
        whole, start = [row], next(iter(agent_turns(row.turns)), None)
        values = (row.total_return,), (0,), 1.0, 0.0
        if start is None:
            raise InputError("trajectories: found one without an agent turn, expected at least one")
    else:
        start = len(row.context)
        whole = [Trajectory((*row.context, *option), labels=row.labels) for option in row.options]
        values = row.target, row.ranks, row.weight, float(row.labels.get("strength") or 0.0)
    own = [with_own_token_ids(one, renderer.fingerprint).turns for one in whole]
    options = encode_options(own[0][:start], [turns[start:] for turns in own], renderer, window, counts, by_turn)
    return options and (options, *values)


def _rendered(
    encode: Callable[[Any, Counter[str]], _Encoded], rows: Sequence, places: Iterable[int]
) -> tuple[dict[str, array], Counter[str]]:
    counts: Counter[str] = Counter()
    made = {name: array(code) for name, code in _CODES.items()}
    for encoded in (encode(rows[i], counts) for i in places):
        if encoded is None:
            continue
        options, target, ranks, weight, strength = encoded
        for option in options:
            for ids, kinds in option:
                made["input_ids"].extend(ids)
                made["actions"].extend(kinds)
                made["row_ends"].append(len(made["input_ids"]))
            made["option_ends"].append(len(made["row_ends"]))
        made["target"].extend(target)
        made["rank"].extend(ranks)
        made["comparison_ends"].append(len(made["target"]))
        made["weight"].append(weight)
        made["strength"].append(strength)
    return made, counts


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
    dialogues = [EncodedDialogue([*context, *option], renderer) for option in options]
    faults = chain.from_iterable(renderer.check.faults_in(dialogue.turns) for dialogue in dialogues)
    counts.update([*dict.fromkeys(faults)])  # each fault once per comparison
    cut = _cut_by_turn if by_turn else _cut_as_one_turn
    cuts = cut(dialogues, len(context), window)
    if cuts is None:
        counts["comparisons dropped: an option longer than max_length"] += 1
        return None
    if cuts != cut(dialogues, len(context), window.without_max_length):
        counts["comparisons that lost old turns of the context"] += 1
    return [[_row(dialogue, span, counts) for span in spans] for dialogue, spans in zip(dialogues, cuts, strict=True)]


# The spans of an option, one per row. A span names the turns of the row by their indices: the first turn of the reply,
# the first visible turn after the leading system turns, and the turn after the end of the reply.
_Span = tuple[int, int, int]


def _cut_as_one_turn(dialogues: Sequence[EncodedDialogue], start: int, window: WindowRule) -> list[list[_Span]] | None:
    """Return the spans of each option: one, which holds the whole reply; None if an option does not fit.

    All options keep the same turns of the context: those that `window` keeps before the longest option.

    Args:
      dialogues: for each option, the turns of context and reply.
      start: number of turns in the context, and therefore index of the first turn of every reply.
      window: the limits on turns and tokens of a row.
    """
    longest = max(sum(dialogue.lengths[start:]) for dialogue in dialogues)
    first = dialogues[0].first_visible(window, start, longest)
    return None if first is None else [[(start, first, len(dialogue.turns))] for dialogue in dialogues]


def _cut_by_turn(dialogues: Sequence[EncodedDialogue], start: int, window: WindowRule) -> list[list[_Span]] | None:
    """Return the spans of each option: one per agent turn of its reply; None if such a turn does not fit.

    A span holds the turns that a policy with this window rule sees before the agent turn, and that turn as the reply.
    The arguments are those of `_cut_as_one_turn`.
    """
    cuts = [
        [(i, dialogue.first_visible(window, i), i + 1) for i in agent_turns(dialogue.turns) if i >= start]
        for dialogue in dialogues
    ]
    return None if any(first is None for spans in cuts for _, first, _ in spans) else cuts


def _row(dialogue: EncodedDialogue, span: _Span, counts: Counter[str]) -> Row:
    """Return the token ids and the kind of each token of the row of a span.

    If the template prints no closing token, the agent's is appended at the end of the row, because scores are computed
    there; an agent turn inside the reply closes with its last printed token instead. An agent turn that the template
    prints differently once other turns follow gets no actions; `counts`, a Counter, is updated with the number of such
    turns.
    """
    start, first, stop = span
    pieces = dialogue.pieces(first, stop, live=True)
    last = dialogue.encoded[stop - 1]
    if dialogue.turns[stop - 1].role == "assistant":
        pieces[-1] = (*pieces[-1], *last.actions[len(pieces[-1]) - last.action_start :])
    ids = dialogue.joined(pieces)
    kinds, place = [_NOT_ACTION] * len(ids), len(ids)
    # Count from the end, because `pieces` lacks the turns that the window cut off between system turns and context.
    for index in range(stop - 1, start - 1, -1):
        turn, piece = dialogue.encoded[index], pieces[index - stop]
        place -= len(piece)
        if not dialogue.turns[index].is_trainable:
            continue
        begin, kept = turn.action_start, len(turn.actions) - 1
        if piece[begin : begin + kept] != turn.actions[:kept]:
            counts[
                "agent turns inside a reply that have no actions, because the template prints them differently there"
            ] += 1
            continue
        closing = piece[begin + kept : begin + kept + 1]
        closes = bool(closing) and (closing == turn.actions[kept:] or closing[0] in dialogue.renderer.encoder.controls)
        end = place + begin + kept + closes
        kinds[place + begin : end] = [_ACTION] * (kept + closes)
        kinds[end - 1] = _CLOSING
    return ids, kinds
