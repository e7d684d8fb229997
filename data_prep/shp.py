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
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.comparisons import import_rows, publish
from data_prep.fields import known_values, number, text
from data_prep.groups import join_groups
from offline_lmrl.errors import InputError
from offline_lmrl.logs.comparison import Comparison
from offline_lmrl.logs.forms import Drop
from offline_lmrl.logs.io import group_key
from offline_lmrl.logs.trajectory import Turn, shown

SIDES = ("A", "B")
_LOST = ("[deleted]", "[removed]")


def prepare(
    input: str | Path,
    output: str | Path,
    *,
    min_ratio: float = 1.0,
    max_pairs: int | None = 5,
    validation: float = 0.1,
    group: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Read pairs of comments and write train.jsonl, validation.jsonl, test.jsonl and report.json.

    Args:
      input: a file, the folder of a domain with its train, validation and test files, or a hub name.
      output: folder to write to; created if needed.
      min_ratio: smallest ratio of the votes of a pair that is kept, from 1 up.
      max_pairs: largest number of pairs of one post; null = all.
      validation: share of the posts that goes to validation if the source has no validation split.
      group: column by which rows are kept together in one split, such as a customer; null = the post.
      seed: random seed of the split.
    Returns: the content of report.json: counts of rows, repairs and drops, and facts about the data.
    Raises: InputError for settings out of range, if nothing can be read or the output cannot be written.
    """
    if min_ratio < 1:
        raise InputError(f"min_ratio: found {min_ratio}, expected a number from 1 up")
    if max_pairs is not None and max_pairs < 1:
        raise InputError(f"max_pairs: found {max_pairs}, expected a number from 1 up, or null")

    def read(row: Mapping, where: str, counts: Counter[str]) -> Comparison:
        return read_pair(row, where, min_ratio)

    found, report = import_rows(input, read, group)
    made = join_groups(found) if group is None else found
    if max_pairs is not None:
        made = {split: strongest(rows, max_pairs) for split, rows in made.items()}
        kept = sum(map(len, made.values()))
        if kept < report["imported"]:
            dropped = {**report["dropped"], "more than max_pairs of one post": report["imported"] - kept}
            report = {**report, "imported": kept, "dropped": dropped}
    return publish(made, output, report, validation, seed)


def read_pair(row: Mapping, where: str, min_ratio: float = 1.0) -> Comparison:
    """Return the comparison of one row.

    Args:
      row: has a post, two comments and their votes, under the names of the public data.
      where: "file:row", the start of error messages.
      min_ratio: smallest ratio of the votes of a pair that is kept.
    Raises: Drop if the row cannot be used, InputError for values of the wrong type.
    """
    post, *comments = (text(row, name, where) for name in ("history", "human_ref_A", "human_ref_B"))
    if not post.strip() or not all(comment.strip() for comment in comments):
        raise Drop("empty post or comment")
    if any(comment.strip() in _LOST for comment in comments):
        raise Drop("comment that was deleted")
    if comments[0].split() == comments[1].split():
        raise Drop("identical comments")
    label = number(row, "labels", where)
    if label not in (0, 1):
        raise InputError(f"{where}: labels: found {shown(row['labels'])}, expected 1 for A or 0 for B")
    better, worse = (0, 1) if label else (1, 0)
    votes = [number(row, f"score_{side}", where) for side in SIDES]
    if votes[better] <= votes[worse]:
        raise Drop("votes that contradict the label")
    written = [number(row, f"created_at_utc_{side}", where) for side in SIDES]
    if written[better] < written[worse]:
        raise Drop("the preferred comment is the older one")
    ratio = number(row, "score_ratio", where)
    if ratio < 1:
        raise InputError(f"{where}: score_ratio: found {ratio}, expected a number from 1 up")
    if ratio < min_ratio:
        raise Drop("ratio of the votes below min_ratio")
    options = [known_values(row, (f"c_root_id_{side}", f"score_{side}", f"created_at_utc_{side}")) for side in SIDES]
    options = [{name[:-2]: value for name, value in option.items()} for option in options]
    return Comparison(
        (Turn("user", post),),
        tuple((Turn("assistant", comment),) for comment in comments),
        (float(better == 0), float(better == 1)),
        group=text(row, "post_id", where),
        source="shp",
        labels={**known_values(row, ("domain",)), "strength": math.log(ratio), "options": options},
    )


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
