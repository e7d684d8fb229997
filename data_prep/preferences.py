"""Convert preference rows in any common form (offline_lmrl/logs/preference_forms.py) to comparisons.

Rows of the project's own form (`context, options, target`) keep their context and options, but are dropped if two
replies are identical or one is empty. (In rows of `prompt, responses, ranks`, a response that is empty or identical to
another is left out, and the others are kept.)
"""

from dataclasses import dataclass

from data_prep.comparisons import StreamingImporter
from offline_lmrl.logs.comparison import Comparison
from offline_lmrl.logs.preference_forms import read_comparison, require_replies
from offline_lmrl.logs.record import Record
from offline_lmrl.settings import setting


@dataclass(frozen=True, kw_only=True)
class Preferences(StreamingImporter):
    """Read pairs, ranked responses or comparisons and write train.jsonl, validation.jsonl and report.json."""

    allow_empty: bool = setting(False, "keep comparisons with an empty reply")

    def read(self, row: Record) -> Comparison | None:
        """Read a row as `read_comparison` does, and check its replies, also those of the project's own form."""
        comparison = read_comparison(row, row.where, row.repairs, self.allow_empty)
        if comparison is not None:
            require_replies(comparison.options, self.allow_empty)
        return comparison
