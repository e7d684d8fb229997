"""Convert comments on a post and their votes (Ethayarajh et al. 2022; stanfordnlp/SHP and SHP-2) to comparisons.

A row is a post, `history`, with two comments A and B, and `labels`, which is 1 if A got more votes. How rows are read:
- More votes are evidence for a comment only if it did not have more time to collect them. A row is dropped if its
  preferred comment is the older one, or if its votes contradict its label.
- The strength of the preference is log(score_ratio), where score_ratio is the ratio of the votes. Ratios near 1 are
  noise; `min_ratio` drops such rows.
- A few comments on one post may make hundreds of pairs; only the `max_pairs` pairs with the highest ratios are kept.
- The group is the post: all rows with one id or with the same words.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from data_prep.comparisons import ComparisonImporter
from data_prep.source import Found, Report, Splits
from offline_lmrl.errors import require
from offline_lmrl.logs.comparison import Comparison
from offline_lmrl.logs.io import group_key
from offline_lmrl.logs.record import Record, drop_if
from offline_lmrl.logs.trajectory import Turn
from offline_lmrl.settings import setting

SIDES = ("A", "B")
_LOST = ("[deleted]", "[removed]")


@dataclass(frozen=True, kw_only=True)
class Shp(ComparisonImporter):
    """Read pairs of comments and write train.jsonl, validation.jsonl, test.jsonl and report.json."""

    min_ratio: float = setting(1.0, "smallest ratio of the votes of a pair that is kept, from 1 up")
    max_pairs: int | None = setting(5, "largest number of pairs of one post; null = all")

    def check(self) -> None:
        """Check the settings."""
        require(self.min_ratio >= 1, f"min_ratio: found {self.min_ratio}, expected a number from 1 up")
        require(
            self.max_pairs is None or self.max_pairs >= 1,
            f"max_pairs: found {self.max_pairs}, expected a number from 1 up, or null",
        )

    def read(self, row: Record) -> Comparison:
        """Return the comparison of the two comments on one post."""
        post, *comments = map(row.text, ("history", "human_ref_A", "human_ref_B"))
        drop_if(not post.strip() or not all(comment.strip() for comment in comments), "empty post or comment")
        drop_if(any(comment.strip() in _LOST for comment in comments), "comment that was deleted")
        drop_if(comments[0].split() == comments[1].split(), "identical comments")
        label = row.number("labels")
        if label not in (0, 1):
            raise row.error("labels", "1 for A or 0 for B")
        better, worse = (0, 1) if label else (1, 0)
        votes = [row.number(f"score_{side}") for side in SIDES]
        drop_if(votes[better] <= votes[worse], "votes that contradict the label")
        written = [row.number(f"created_at_utc_{side}") for side in SIDES]
        drop_if(written[better] < written[worse], "the preferred comment is the older one")
        ratio = row.number("score_ratio")
        require(ratio >= 1, f"{row.where}: score_ratio: found {ratio}, expected a number from 1 up")
        drop_if(ratio < self.min_ratio, "ratio of the votes below min_ratio")
        named = [row.known(f"c_root_id_{side}", f"score_{side}", f"created_at_utc_{side}") for side in SIDES]
        options = [{name[:-2]: value for name, value in option.items()} for option in named]
        return Comparison(
            (Turn("user", post),),
            tuple((Turn("assistant", comment),) for comment in comments),
            (float(better == 0), float(better == 1)),
            group=row.text("post_id"),
            source="shp",
            labels={**row.known("domain"), "strength": math.log(ratio), "options": options},
        )

    def assemble(self, found: Found, report: Report) -> Splits:
        """Join the groups of a post, and keep its pairs with the highest ratios."""
        made = self.joined(found)
        if self.max_pairs is None:
            return made
        made = {split: strongest(rows, self.max_pairs) for split, rows in made.items()}
        kept = sum(map(len, made.values()))
        if kept < report["imported"]:
            report["dropped"]["more than max_pairs of one post"] = report["imported"] - kept
            report["imported"] = kept
        return made


def strongest(rows: Sequence[Comparison], most: int) -> list[Comparison]:
    """Keep, for each post, the pairs with the highest ratios of votes; the order of the rows stays.

    Args:
      rows: comparisons whose group is the post.
      most: largest number of pairs kept per post.
    """
    by_post = defaultdict(list)
    for place, row in enumerate(rows):
        by_post[group_key(row)].append(place)
    kept = {
        place
        for places in by_post.values()
        for place in sorted(places, key=lambda place: -rows[place].labels["strength"])[:most]
    }
    return [row for place, row in enumerate(rows) if place in kept]
