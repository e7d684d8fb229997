"""Convert people's choices and ratings of summaries (Stiennon et al. 2020; openai/summarize-from-feedback).

Comparisons of two summaries (folder `comparisons`): a row is `info`, two `summaries`, and the `choice` of a worker.
How rows are read:
- The text to summarise is a forum post or an article of a site; the fields present determine which, not the batch
  name.
- White space at the ends of a summary is removed: in some batches it reveals the author.
- The worker's confidence is one number for both summaries (the paper's appendix C), from 1 (surely the first summary)
  to 9 (surely the second), as in the repository's example. It is kept in the labels; `soft` makes the target from it.
  If it contradicts the choice, the choice is used, and the row is counted.
- valid1 was used to choose models and becomes the validation split; valid2 was used for final figures and becomes the
  test split.
- The group is the post: all rows with one id or with the same words.

Ratings (folder `axis_evals`): a row has `info`, the text to summarise, and one `summary` with the ratings of a worker,
from 1 to 7, on several `axes` (AXES). It becomes one trajectory, whose reward is a weighted sum of the ratings. A
rating depends on the quality of the summary and also on the difficulty of the text (the post), so by default the mean
reward of each post is subtracted. The labels hold the ratings, the raw reward and the subtracted mean.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from data_prep.comparisons import ComparisonImporter
from data_prep.source import Found, Report, Splits
from data_prep.trajectories import TrajectoryImporter
from offline_lmrl.errors import require
from offline_lmrl.logs.comparison import Comparison
from offline_lmrl.logs.comparison_checks import Feature
from offline_lmrl.logs.io import group_key
from offline_lmrl.logs.preference_forms import root_group
from offline_lmrl.logs.record import Record, drop_if
from offline_lmrl.logs.trajectory import Trajectory, Turn
from offline_lmrl.settings import setting

SPLITS = {"train": "train", "valid1": "validation", "valid2": "test", "test": "test"}
_PARTS = {"subreddit": "SUBREDDIT: r/", "title": "TITLE: ", "post": "POST: ", "article": "ARTICLE: "}
_SCALE = 9
AXES = ("overall", "accuracy", "coverage", "coherence")
_HIGHEST = 7


@dataclass(frozen=True, kw_only=True)
class SummarizeComparisons(ComparisonImporter):
    """Read comparisons of summaries and write train.jsonl, validation.jsonl, test.jsonl and report.json."""

    soft: bool = setting(
        False,
        "make the target from the worker's confidence if it is known: P(the second summary is better) = "
        "(confidence − 1) / 8",
    )

    def read(self, row: Record) -> tuple[str, Comparison]:
        """Return the split that one row names, and the comparison of its two summaries."""
        context, known = read_info(row)
        summaries = row.objects("summaries")
        require(len(summaries) == 2, f"{row.where}: summaries: found {len(summaries)}, expected 2")
        texts = [read_summary(summary) for summary in summaries]
        drop_if(texts[0].split() == texts[1].split(), "identical summaries")
        choice = row.whole("choice")
        require(choice in (0, 1), f"{row.where}: choice: found {choice}, expected 0 or 1")
        labels = {**known, "options": [summary.known("policy", "note") for summary in summaries]}
        second = float(choice)
        confidence = _confidence(row)
        if confidence is not None:
            labels["confidence"] = confidence
            given = (confidence - 1) / (_SCALE - 1)
            if (given > 0.5) != choice and given != 0.5:
                row.count("kept: the confidence favours the summary that was not chosen")
            elif self.soft:
                second = given
        elif self.soft:
            row.count("kept: no confidence, so the target is the choice")
        return SPLITS[row.choice("split", SPLITS)], Comparison(
            context,
            tuple((Turn("assistant", words),) for words in texts),
            (1 - second, second),
            group=known["id"],
            source="summarize-comparisons",
            labels=labels,
        )

    def assemble(self, found: Found, report: Report) -> Splits:
        """Divide the rows into the splits that they name, and join the groups of a post."""
        return self.joined(by_own_split(found))

    def features(self, found: Found) -> Mapping[str, Feature]:
        """Count how often a person's summary and that of the generally preferred policy win."""
        wins = win_rates([row for rows in found.values() for _, row in rows])
        return {
            "the summary that a person wrote": lambda row, i: row.labels["options"][i].get("policy") == "ref",
            "the summary of the policy that is preferred more often": lambda row, i: wins[
                row.labels["options"][i].get("policy")
            ],
        }


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
        found = Record(summary.inner("axes"), f"{row.where}: axes", row.repairs)
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
        made = self.joined(by_own_split(found))
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


def read_info(row: Record) -> tuple[tuple[Turn, ...], dict[str, Any]]:
    """Return the user turn with the text to summarise, as a tuple, and facts for the labels.

    Returns: the turn; and id and site of the text, worker, batch and split, by name, as far as they are known.
    Raises: Drop if the text is empty. InputError for values of the wrong type.
    """
    info = row.inner("info")
    kinds = [name for name in ("post", "article") if info.get(name) is not None]
    require(
        len(kinds) == 1,
        f"{info.where}: found {' and '.join(kinds) or 'neither'}, expected exactly one of post and article",
    )
    info.words(kinds[0], "empty post or article")
    parts = [start + info.text(name) for name, start in _PARTS.items() if info.get(name) is not None]
    known = {"id": info.text("id"), **info.known("site"), **row.known("worker", "batch", "split")}
    return (Turn("user", "\n\n".join([*parts, "TL;DR:"])),), known


def read_summary(summary: Record) -> str:
    """Return the text of a summary without white space at its ends.

    Raises: Drop if the text is empty.
    """
    words = summary.words("text", "empty summary")
    summary.count("repaired: white space removed at the ends of a summary", words != words.strip())
    return words.strip()


def by_own_split(found: Found) -> Splits:
    """Return rows by the split that each of them names, instead of by the file that they are from.

    Args:
      found: split of the source -> pairs of (split that the row names, row).
    Returns: split -> rows, without empty splits.
    """
    splits = {split: [] for split in SPLITS.values()}
    for split, row in (pair for rows in found.values() for pair in rows):
        splits[split].append(row)
    return {split: rows for split, rows in splits.items() if rows}


def win_rates(rows: Sequence[Comparison]) -> dict[str | None, float]:
    """Return {policy: share of comparisons in which its summary is preferred}; None is the key of unknown policies."""
    wins = defaultdict(list)
    for row in rows:
        for option, probability in zip(row.labels["options"], row.target, strict=True):
            wins[option.get("policy")].append(probability)
    return {policy: math.fsum(some) / len(some) for policy, some in wins.items()}


def _confidence(row: Record) -> float | None:
    extra = None if row.get("extra") is None else row.inner("extra")
    return None if extra is None or extra.get("confidence") is None else extra.between("confidence", 1, _SCALE)
