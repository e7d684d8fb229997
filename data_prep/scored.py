"""Convert scored rows in any common form (offline_lmrl/logs/forms.py) to trajectories in splits.

Nothing is changed except for the repairs described there, which are counted. The group of a row that has none is a
hash of its first user turn.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_prep import trajectories
from data_prep.comparisons import import_rows
from offline_lmrl.errors import InputError
from offline_lmrl.logs.forms import no_score, read_row
from offline_lmrl.logs.preference_forms import root_group
from offline_lmrl.logs.trajectory import Trajectory


def prepare(
    input: str | Path,
    output: str | Path,
    *,
    reward: str | None = None,
    validation: float = 0.1,
    group: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Read scored conversations or replies and write train.jsonl, validation.jsonl and report.json.

    Args:
      input: a file of JSON Lines, JSON, CSV, TSV or Parquet, a folder of such files, a datasets folder or a hub name.
      output: folder to write to; created if needed.
      reward: the column that holds the score of a row; null = `reward`, or `label` in rows with a prompt.
      validation: share of the groups that goes to validation if the source has no validation split.
      group: column by which rows are kept together in one split, such as a customer; null = the column `group`, or the
        first user turn in rows without it.
      seed: random seed of the split.
    Returns: the content of report.json: counts of rows, repairs and drops, and facts about the data.
    Raises: InputError if nothing can be read, no row has the column `reward`, or the output cannot be written.
    """

    def read(row: Mapping, where: str, counts: Counter[str]) -> Trajectory | None:
        made = read_row(row, where, counts, reward)
        if made is None:
            return None
        own = made.group if row.get("group") is not None else root_group(made.turns)
        return replace(made, group=own, source=made.source or "scored")

    made, report = import_rows(input, read, group)
    lacking = report["kept as it is"].get(no_score(str(reward)).removeprefix("kept: "))
    if lacking == report["imported"]:
        raise InputError(
            f"{input}: {reward}: found no row with this column, expected the name of the column that holds the scores"
        )
    return trajectories.publish(made, output, report, validation, seed)
