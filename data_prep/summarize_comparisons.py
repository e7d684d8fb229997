"""Convert comparisons of two summaries (Stiennon et al. 2020; openai/summarize-from-feedback, folder `comparisons`).

A row is `info`, two `summaries`, and the `choice` of a worker. How rows are read:
- The text to summarise is a forum post or an article of a site; the fields present determine which, not the batch
  name.
- White space at the ends of a summary is removed: in some batches it reveals the author.
- The worker's confidence is one number for both summaries (the paper's appendix C), from 1 (surely the first summary)
  to 9 (surely the second), as in the repository's example. It is kept in the labels; `soft` makes the target from it.
  If it contradicts the choice, the choice is used, and the row is counted.
- valid1 was used to choose models and becomes the validation split; valid2 was used for final figures and becomes the
  test split.
- The group is the post: all rows with one id or with the same words.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_prep.comparisons import ComparisonImporter
from data_prep.groups import join_groups
from data_prep.source import Found, Report, Splits
from offline_lmrl.errors import require
from offline_lmrl.logs.comparison import Comparison
from offline_lmrl.logs.comparison_checks import Feature
from offline_lmrl.logs.io import Row
from offline_lmrl.logs.record import Record, drop_if
from offline_lmrl.logs.trajectory import Turn
from offline_lmrl.settings import setting

SPLITS = {"train": "train", "valid1": "validation", "valid2": "test", "test": "test"}
_PARTS = {"subreddit": "SUBREDDIT: r/", "title": "TITLE: ", "post": "POST: ", "article": "ARTICLE: "}
_SCALE = 9


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
        return by_own_split(found, join=self.group is None)

    def features(self, found: Found) -> Mapping[str, Feature]:
        """Count how often a person's summary and that of the generally preferred policy win."""
        wins = win_rates([row for rows in found.values() for _, row in rows])
        return {
            "the summary that a person wrote": lambda row, i: row.labels["options"][i].get("policy") == "ref",
            "the summary of the policy that is preferred more often": lambda row, i: wins[
                row.labels["options"][i].get("policy")
            ],
        }


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


def by_own_split(found: Mapping[str, Sequence[tuple[str, Row]]], join: bool) -> dict[str, list[Row]]:
    """Return rows by the split that each of them names, instead of by the file that they are from.

    Args:
      found: split of the source -> pairs of (split that the row names, row).
      join: join the groups of rows about one post (`join_groups`).
    Returns: split -> rows, without empty splits.
    """
    splits: dict[str, list[Row]] = {split: [] for split in SPLITS.values()}
    for rows in found.values():
        for split, row in rows:
            splits[split].append(row)
    splits = {split: rows for split, rows in splits.items() if rows}
    return join_groups(splits) if join else splits


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
