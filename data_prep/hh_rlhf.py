"""Convert hh-rlhf (Bai et al. 2022; anthropics/hh-rlhf) to comparisons.

A row is two transcripts, `chosen` and `rejected`. How rows are read:
- Turns are split at "\\n\\nHuman:" and "\\n\\nAssistant:" only. A tag elsewhere was written by the model; it stays
  part of the text, and the row is counted. Turns are stripped. Consecutive turns of one speaker were one turn, and are
  merged.
- Only the last reply was judged. All turns before it are context, and must be the same on both sides, or the row is
  dropped.
- An empty reply may have been preferred as harmless; it is kept only with `allow_empty`.
- The group is the first human turn, since many rows are branches of one conversation.
"""

import re
from dataclasses import dataclass

from data_prep.comparisons import StreamingImporter
from offline_lmrl.logs.comparison import Comparison
from offline_lmrl.logs.preference_forms import is_transcript, read_comparison
from offline_lmrl.logs.record import Record
from offline_lmrl.settings import setting

SIDES = ("chosen", "rejected")
_INNER_TAG = re.compile(r"\b(Human|Assistant):")


@dataclass(frozen=True, kw_only=True)
class HhRlhf(StreamingImporter):
    """Read transcripts and write train.jsonl, validation.jsonl, test.jsonl (of a test file) and report.json."""

    allow_empty: bool = setting(False, "keep rows in which a reply is empty")

    def read(self, row: Record) -> Comparison | None:
        """Return the comparison of two transcripts, `chosen` and `rejected`."""
        for side in SIDES:
            if not is_transcript(row.get(side)):
                raise row.error(side, "a transcript of Human and Assistant")
        sides = {side: row[side] for side in SIDES}
        comparison = read_comparison(sides | {"source": "hh-rlhf"}, row.where, row.repairs, self.allow_empty)
        if comparison is not None:
            turns = [*comparison.context, *(turn for option in comparison.options for turn in option)]
            row.count(
                "kept: row with a speaker tag inside a turn", any(_INNER_TAG.search(turn.content) for turn in turns)
            )
        return comparison
