"""Convert ratings of summaries (Stiennon et al. 2020; openai/summarize-from-feedback, `axis_evals`) to trajectories.

A row has `info`, the text to summarise, and one `summary` with the ratings of a worker, from 1 to 7, on several `axes`
(AXES). It becomes one trajectory, whose reward is a weighted sum of the ratings. A rating depends on the quality of
the summary and also on the difficulty of the text (the post), so by default the mean reward of each post is
subtracted. The labels hold the ratings, the raw reward and the subtracted mean. White space, splits and groups are
treated as in `summarize_comparisons`.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from data_prep.source import Found, Report, Splits
from data_prep.summarize_comparisons import SPLITS, by_own_split, read_info, read_summary
from data_prep.trajectories import TrajectoryImporter
from offline_lmrl.errors import require
from offline_lmrl.logs.io import group_key
from offline_lmrl.logs.preference_forms import root_group
from offline_lmrl.logs.record import Record, drop_if
from offline_lmrl.logs.trajectory import Trajectory, Turn
from offline_lmrl.settings import setting

AXES = ("overall", "accuracy", "coverage", "coherence")
_HIGHEST = 7


@dataclass(frozen=True, kw_only=True)
class SummarizeAxes(TrajectoryImporter):
    """Read rated summaries and write train.jsonl, validation.jsonl, test.jsonl and report.json."""

    overall: float = setting(
        1.0,
        "weight of this axis in the reward; a row without a rating on an axis with a weight other than 0 is dropped",
    )
    accuracy: float = setting(0.0, "weight of this axis in the reward")
    coverage: float = setting(0.0, "weight of this axis in the reward")
    coherence: float = setting(0.0, "weight of this axis in the reward")
    centre: bool = setting(True, "subtract from each reward the mean reward of the post's summaries")

    def check(self) -> None:
        """Check the settings."""
        require(
            self.weights,
            f"overall: found weights of 0 on all of {', '.join(AXES)}, expected another weight on at least one of "
            "them",
        )

    @property
    def weights(self) -> dict[str, float]:
        """The weights that are not 0, by axis."""
        return {axis: vars(self)[axis] for axis in AXES if vars(self)[axis]}

    def read(self, row: Record) -> tuple[str, Trajectory]:
        """Return the split that one row names, and the trajectory of its summary."""
        context, known = read_info(row)
        summary = row.inner("summary")
        words = read_summary(summary)
        found = replace(summary.inner("axes"), where=f"{row.where}: axes")
        axes = {axis: found.number(axis) for axis in AXES if found.get(axis) is not None}
        for axis in axes:
            found.between(axis, 1, _HIGHEST)
        for axis in self.weights:
            drop_if(axis not in axes, f"no rating on the axis {axis}")
        raw = math.fsum(weight * axes[axis] for axis, weight in self.weights.items())
        labels = {
            **known,
            **summary.known("policy", "note"),
            "axes": {**found.known(*found), **axes},
            "reward": {"raw": raw, "shift": 0.0},
        }
        return SPLITS[row.choice("split", SPLITS)], Trajectory(
            (*context, Turn("assistant", words, reward=raw)),
            group=known["id"],
            task="summarize",
            source="summarize-axes",
            labels=labels,
        )

    def assemble(self, found: Found, report: Report) -> Splits:
        """Divide the rows into the splits that they name, join the groups of a post, and centre its rewards."""
        report["weights"] = self.weights
        made = by_own_split(found, join=self.group is None)
        if not self.centre:
            return made
        return centred(made, group_key if self.group is None else lambda row: root_group(row.turns))


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
