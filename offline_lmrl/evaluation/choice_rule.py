"""The rule by which β, or the return to request, is chosen from held-out logs alone.

    1. A choice must not break the text: of its replies to held-out prompts, at most MORE_BROKEN more than of the plain
       policy's are looping, at most as many more are unfinished, and at most as many more are empty. Replies that are
       unlikely under the plain policy do not count: on tasks of a few tokens, better play is often unlikely play.
    2. The cautious advantage of a choice is its realised advantage (realised.py) less a quarter of the distance to the
       lower end of its 95 % interval, which is half a standard error. If none of these choices has one above 0, the
       plain policy is chosen: without guidance and without a requested return.
    3. Else the smallest β, or the first request given, whose cautious advantage is within NEAR of the best.

The advantage grows with β as long as Q orders held-out outcomes, and its error grows faster where Q does not. Once
the best logged tokens have nearly all the probability it stays level, while a larger β still leads away from the
states of the logs; hence 3. Only replies show what a choice does to text there; hence 1. How much of the gain of
choosing by play the rule keeps is measured in configs/guides/choosing_beta.md.
"""

import math
from collections.abc import Sequence

from offline_lmrl.evaluation.choices import ChoiceRow

MORE_BROKEN = 0.05  # a share of replies
NEAR = 0.05  # a share of the best cautious advantage
RULE = (
    f"the smallest within {NEAR:.0%} of the largest realised advantage (less half its standard error), among choices "
    f"of whose replies at most {100 * MORE_BROKEN:.0f} in 100 more are repeated, unfinished or empty than with β 0; "
    "β 0 if none is above 0"
)


def choose(rows: Sequence[ChoiceRow]) -> ChoiceRow:
    """Return the chosen row.

    Args:
      rows: `ChoiceTable.rows`; the first is the plain policy's.
    """
    plain = rows[0]
    known = [row for row in rows[1:] if row.realised is not None and math.isfinite(cautious(row))]
    fluent = [row for row in known if _is_fluent(row, plain)]
    best = max(map(cautious, fluent), default=0.0)
    if best <= 0:
        return plain
    near = [row for row in fluent if cautious(row) >= (1 - NEAR) * best]
    return min(near, key=lambda row: row.choice.beta)  # of requests, the first


def cautious(row: ChoiceRow) -> float:
    """Return the realised advantage of a row less half a standard error, in reward units."""
    return row.realised.mean - (row.realised.mean - row.realised.low) / 4


def _is_fluent(row: ChoiceRow, plain: ChoiceRow) -> bool:
    pairs = ((row.repeated, plain.repeated), (row.unfinished, plain.unfinished), (row.empty, plain.empty))
    return all(round(share - usual, 9) <= MORE_BROKEN for share, usual in pairs)
