"""Convert ratings of summaries (Stiennon et al. 2020; openai/summarize-from-feedback, `axis_evals`) to trajectories.

A row has `info`, the text to summarise, and one `summary` with the ratings of a worker, from 1 to 7, on several `axes`
(AXES). It becomes one trajectory, whose reward is a weighted sum of the ratings. A rating depends on the quality of
the summary and also on the difficulty of the text (the post), so by default the mean reward of each post is
subtracted. The labels hold the ratings, the raw reward and the subtracted mean. White space, splits and groups are
treated as in `summarize_comparisons`.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_prep import trajectories
from data_prep.comparisons import import_rows
from data_prep.fields import inner, known_values, number
from data_prep.groups import join_groups
from data_prep.summarize_comparisons import by_own_split, read_info, read_split, read_summary
from offline_lmrl.errors import InputError
from offline_lmrl.logs.forms import Drop
from offline_lmrl.logs.io import group_key
from offline_lmrl.logs.preference_forms import root_group
from offline_lmrl.logs.trajectory import Trajectory, Turn

AXES = ("overall", "accuracy", "coverage", "coherence")
_HIGHEST = 7


def prepare(
    input: str | Path,
    output: str | Path,
    *,
    overall: float = 1.0,
    accuracy: float = 0.0,
    coverage: float = 0.0,
    coherence: float = 0.0,
    centre: bool = True,
    validation: float = 0.1,
    group: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Read rated summaries and write train.jsonl, validation.jsonl, test.jsonl and report.json.

    Args:
      input: a file of ratings, a folder of them or a hub name.
      output: folder to write to; created if needed.
      overall: weight of this axis in the reward; a row without a rating on an axis with a weight other than 0 is
        dropped.
      accuracy: weight of this axis in the reward.
      coverage: weight of this axis in the reward.
      coherence: weight of this axis in the reward.
      centre: subtract from each reward the mean reward of the post's summaries.
      validation: share of the posts that goes to validation if there are rows of the train split and none of the
        validation split.
      group: column by which rows are kept together in one split, such as a customer; null = the post.
      seed: random seed of the split.
    Returns: the content of report.json: counts of rows, repairs and drops, and facts about the data.
    Raises: InputError if all weights are 0, nothing can be read or the output cannot be written.
    """
    given = dict(zip(AXES, (overall, accuracy, coverage, coherence), strict=True))
    weights = {axis: weight for axis, weight in given.items() if weight}
    if not weights:
        raise InputError(
            f"overall: found weights of 0 on all of {', '.join(AXES)}, expected another weight on at least one of them"
        )

    def read(row: Mapping, where: str, counts: Counter[str]) -> tuple[str, Trajectory]:
        return read_rating(row, where, counts, weights)

    found, report = import_rows(input, read, group)
    made = join_groups(by_own_split(found)) if group is None else by_own_split(found)
    if centre:
        made = centred(made, group_key if group is None else lambda row: root_group(row.turns))
    return trajectories.publish(made, output, {**report, "weights": weights}, validation, seed)


def read_rating(
    row: Mapping, where: str, counts: Counter[str], weights: Mapping[str, float]
) -> tuple[str, Trajectory]:
    """Return the split that one row names, and the trajectory of its summary.

    Args:
      row: has `info`, `summary` and `split`.
      where: "file:row", the start of error messages.
      counts: incremented for each repair, under a key that describes it.
      weights: axis -> its weight in the reward.

    Raises: Drop if the row cannot be used, InputError for values of the wrong type.
    """
    context, known = read_info(row, where)
    summary = inner(row, "summary", where)
    words = read_summary(summary, f"{where}: summary", counts)
    found = inner(summary, "axes", f"{where}: summary")
    axes = {axis: number(found, axis, f"{where}: axes") for axis in AXES if found.get(axis) is not None}
    for axis, rating in axes.items():
        if not 1 <= rating <= _HIGHEST:
            raise InputError(f"{where}: axes: {axis}: found {rating}, expected 1 to {_HIGHEST}")
    for axis in weights:
        if axis not in axes:
            raise Drop(f"no rating on the axis {axis}")
    raw = math.fsum(weight * axes[axis] for axis, weight in weights.items())
    turns = (*context, Turn("assistant", words, reward=raw))
    labels = {
        **known,
        **known_values(summary, ("policy", "note")),
        "axes": {**known_values(found, found), **axes},
        "reward": {"raw": raw, "shift": 0.0},
    }
    return read_split(row, where), Trajectory(
        turns, group=known["id"], task="summarize", source="summarize-axes", labels=labels
    )


def centred(
    made: Mapping[str, Sequence[Trajectory]], post: Callable[[Trajectory], str] = group_key
) -> dict[str, list[Trajectory]]:
    """Subtract from each reward the mean reward of all rows on the same post, in all splits.

    Args:
      made: rows by split.
      post: function that returns the key of the post that a row is about.
    """
    raws = defaultdict(list)
    for rows in made.values():
        for row in rows:
            raws[post(row)].append(row.total_return)
    means = {one: math.fsum(some) / len(some) for one, some in raws.items()}
    return {split: [_shifted(row, means[post(row)]) for row in rows] for split, rows in made.items()}


def _shifted(row: Trajectory, shift: float) -> Trajectory:
    reply = replace(row.turns[-1], reward=row.total_return - shift)
    reward = {**row.labels["reward"], "shift": shift}
    return replace(row, turns=(*row.turns[:-1], reply), labels={**row.labels, "reward": reward})
