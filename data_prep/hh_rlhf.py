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
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.comparisons import convert
from offline_lmrl.errors import InputError
from offline_lmrl.logs.comparison import Comparison
from offline_lmrl.logs.preference_forms import is_transcript, read_comparison
from offline_lmrl.logs.trajectory import shown

SIDES = ("chosen", "rejected")
_INNER_TAG = re.compile(r"\b(Human|Assistant):")


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
    """Read transcripts and write train.jsonl, validation.jsonl (test.jsonl if there is a test file) and report.json.

    Args:
      input: a file of one public folder, such as harmless-base, or that folder with its train and test files.
      output: folder to write to; created if needed.
      validation: share of the groups (first human turns) of the training rows that goes to validation.
      group: column by which rows are kept together in one split, such as a customer; null = the first human turn.
      allow_empty: keep rows in which a reply is empty.
      seed: random seed of the split.
      processes: number of processes that read rows.
    Returns: the content of report.json: counts of rows, repairs and drops, and facts about the data.
    Raises: InputError if nothing can be read or the output cannot be written.
    """
    return convert(
        input, partial(read_transcripts, allow_empty=allow_empty), output, validation, seed, processes, group
    )


def read_transcripts(row: Mapping, where: str, counts: Counter[str], allow_empty: bool = False) -> Comparison | None:
    """Return the comparison of one row, or None if the row is dropped.

    Args:
      row: has two transcripts, `chosen` and `rejected`.
      where: "file:row", the start of error messages.
      counts: incremented for each repair, or once for a dropped row, under a key that describes it.
      allow_empty: keep a row with an empty reply.
    Raises: InputError if the row is not a pair of transcripts.
    """
    for side in SIDES:
        if not is_transcript(row.get(side)):
            raise InputError(
                f"{where}: {side}: found {shown(row.get(side))}, expected a transcript of Human and Assistant"
            )
    comparison = read_comparison(
        {side: row[side] for side in SIDES} | {"source": "hh-rlhf"}, where, counts, allow_empty
    )
    if comparison is not None:
        turns = [*comparison.context, *(turn for option in comparison.options for turn in option)]
        if any(_INNER_TAG.search(turn.content) for turn in turns):
            counts["kept: row with a speaker tag inside a turn"] += 1
    return comparison
