"""Base class of the importers of scored replies: write trajectories in splits, and report counts.

The counts add up: imported = the trajectories of all splits + those removed because their group is in a later split.
"""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from data_prep.source import Importer, Report, require_no_other_splits, separate, write_trajectories
from offline_lmrl.logs.comparison import Comparison
from offline_lmrl.logs.comparison_checks import baselines, data_faults
from offline_lmrl.logs.io import group_key
from offline_lmrl.logs.trajectory import Trajectory
from offline_lmrl.tokens.checks import check


@dataclass(frozen=True, kw_only=True)
class TrajectoryImporter(Importer):
    """An importer whose rows are scored trajectories."""

    def make(self) -> Report:
        """Read all rows, split by group, and write <split>.jsonl and report.json."""
        found, report = self.import_rows()
        splits, removed = separate(self.assemble(found, report), self.validation, self.seed)
        splits = {name: rows for name, rows in splits.items() if rows}
        require_no_other_splits(self.output, splits)
        everything = [row for rows in splits.values() for row in rows]
        found = check(splits).to_dict()
        report = {
            **report,
            "removed, their group is in a later split": removed,
            "splits": {
                name: {fact: value for fact, value in split.items() if value is not None}
                for name, split in found["splits"].items()
            },
            "warnings": found["warnings"],
            "checks": {**_disagreements(everything), **data_faults(everything)},
            "baselines": baselines(scored_pairs(everything)),
        }
        return write_trajectories(self.output, splits, report)


def scored_pairs(rows: Sequence[Trajectory]) -> list[tuple[Comparison, int, int]]:
    """Pair scored turns at random, and return those pairs whose rewards differ, for `comparison_checks.baselines`.

    Each turn is used at most once, so the pairs are independent. Nobody compared these turns: the pairs only show
    which features go with a higher reward, whatever the prompt.

    Returns: per pair, a comparison of the two turns without context, and the indices of the option with the higher
      reward (0) and of the other one (1).
    """
    turns = [turn for row in rows for turn in row.turns if turn.reward is not None]
    random.Random(0).shuffle(turns)
    pairs = [sorted(pair, key=lambda turn: -turn.reward) for pair in zip(turns[::2], turns[1::2], strict=False)]
    return [
        (Comparison((), tuple((replace(turn, reward=None),) for turn in pair), (1.0, 0.0), group=f"{place}"), 0, 1)
        for place, pair in enumerate(pairs)
        if pair[0].reward != pair[1].reward
    ]


def _disagreements(rows: Sequence[Trajectory]) -> dict[str, int]:
    by_words, by_group = defaultdict(set), defaultdict(set)
    for row in rows:
        by_words[tuple((turn.spoken, turn.is_trainable) for turn in row.turns)].add(row.total_return)
        by_group[group_key(row)].add(row.total_return)
    return {
        "texts with different returns": sum(len(returns) > 1 for returns in by_words.values()),
        "groups with one return only": sum(len(returns) == 1 for returns in by_group.values()),
    }
