"""Convert preference rows in any common form (offline_lmrl/logs/preference_forms.py) to comparisons.

Rows of the project's own form (`context, options, target`) keep their context and options, but are dropped if two
replies are identical or one is empty. (In rows of `prompt, responses, ranks`, a response that is empty or identical to
another is left out, and the others are kept.)
"""

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.comparisons import convert
from offline_lmrl.logs.comparison import Comparison
from offline_lmrl.logs.preference_forms import read_comparison, require_replies


def prepare(
    input: str | Path,
    output: str | Path,
    *,
    validation: float = 0.1,
    group: str | None = None,
    allow_empty: bool = False,
    seed: int = 0,
    processes: int = 1,
) -> dict[str, Any]:
    """Read pairs, ranked responses or comparisons and write train.jsonl, validation.jsonl and report.json.

    Args:
      input: a .jsonl, .jsonl.gz or .parquet file, a folder of such files, a datasets folder or a hub name.
      output: folder to write to; created if needed.
      validation: share of the groups (first user turns) that goes to validation if the source has no validation split.
      group: column by which rows are kept together in one split, such as a customer; null = the first user turn.
      allow_empty: keep comparisons with an empty reply.
      seed: random seed of the split.
      processes: number of processes that read rows.
    Returns: the content of report.json: counts of rows, repairs and drops, and facts about the data.
    Raises: InputError if nothing can be read or the output cannot be written.
    """
    return convert(
        input, partial(read_preference, allow_empty=allow_empty), output, validation, seed, processes, group
    )


def read_preference(row: Any, where: str, counts: Counter[str], allow_empty: bool = False) -> Comparison | None:
    """Read a row as `read_comparison` does, and check its replies, also those of a row of the project's own form.

    Args:
      where: "file:row", the start of error messages.
      counts: incremented for each repair, or once for a dropped row, under a key that describes it.
      allow_empty: keep comparisons with an empty reply.
    Raises: Drop if two replies are identical or one is empty.
    """
    comparison = read_comparison(row, where, counts, allow_empty)
    if comparison is not None:
        require_replies(comparison.options, allow_empty)
    return comparison
