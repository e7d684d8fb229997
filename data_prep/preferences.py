"""Preference rows in any common form (offline_lmrl/data/preference_forms.py) to comparisons."""

from functools import partial
from pathlib import Path
from typing import Any

from data_prep.comparisons import convert
from offline_lmrl.data.preference_forms import read_comparison


def prepare(
    input: str | Path, output: str | Path, *, validation: float = 0.1, allow_empty: bool = False, seed: int = 0,
    processes: int = 1,
) -> dict[str, Any]:
    """Read prompt/chosen/rejected or prompt/responses/ranks and write train.jsonl, validation.jsonl and report.json.

    Args:
      input: a .jsonl, .jsonl.gz or .parquet file, a folder of those, a datasets folder or a hub name.
      output: folder, made if it is missing.
      validation: share of the groups (first user turns) that goes to validation, where the source has no such split.
      allow_empty: keep comparisons with an empty reply.
      seed: of the split.
      processes: how many read rows at once.
    Returns: counts and facts, as in report.json.
    Raises: InputError if nothing can be read or the output cannot be written.
    """
    return convert(input, partial(read_comparison, allow_empty=allow_empty), output, validation, seed, processes)
