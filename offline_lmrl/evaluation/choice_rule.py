"""The rule by which β, or the return to request, is chosen from held-out logs alone.

    1. A choice must not break the text: of its replies to held-out prompts, at most MORE_BROKEN more than of the plain
       policy's are looping, at most as many more are unfinished, and at most as many more are empty. Replies that are
       unlikely under the plain policy do not count: on tasks of a few tokens, better play is often unlikely play.
    2. Among these, the choice with the best cautious realised advantage (realised.py): its estimate less a quarter of
       the distance to the lower end of its 95 % interval, which is half a standard error.
    3. If none is above 0, the plain policy: without guidance and without a requested return.

The advantage grows with β as long as Q orders held-out outcomes, its error grows faster where Q does not, and only
replies show what a choice does to text beyond the states of the logs. How much of the gain of choosing by play the
rule keeps is measured in configs/guides/choosing_beta.md.
"""

from collections.abc import Sequence

from offline_lmrl.evaluation.choices import ChoiceRow

MORE_BROKEN = 0.05  # a share of replies
RULE = (
    f"the largest realised advantage less half its standard error, among choices with at most {MORE_BROKEN:.0%} more "
    "repeated, unfinished or empty replies than β 0; β 0 if none is above 0"
)


def choose(rows: Sequence[ChoiceRow]) -> ChoiceRow:
    """Return the chosen row.

    Args:
      rows: `ChoiceTable.rows`; the first is the plain policy's.
    """
    plain = rows[0]
    fluent = [row for row in rows[1:] if _is_fluent(row, plain) and row.realised is not None]
    best = max(fluent, key=cautious, default=plain)  # of equals, the first
    return best if best is not plain and cautious(best) > 0 else plain


def cautious(row: ChoiceRow) -> float:
    """Return the realised advantage of a row less half a standard error, in reward units."""
    return row.realised.mean - (row.realised.mean - row.realised.low) / 4


def _is_fluent(row: ChoiceRow, plain: ChoiceRow) -> bool:
    pairs = ((row.repeated, plain.repeated), (row.unfinished, plain.unfinished), (row.empty, plain.empty))
    return all(share <= usual + MORE_BROKEN for share, usual in pairs)
