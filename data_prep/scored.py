"""Convert scored rows in any common form (offline_lmrl/logs/forms.py) to trajectories in splits.

Nothing is changed except for the repairs described there, which are counted. The group of a row that has none is a
hash of its first user turn.
"""

from dataclasses import dataclass, replace

from data_prep.source import Found, Report, Splits
from data_prep.trajectories import TrajectoryImporter
from offline_lmrl.errors import require
from offline_lmrl.logs.forms import no_score, read_row
from offline_lmrl.logs.preference_forms import root_group
from offline_lmrl.logs.record import Record
from offline_lmrl.logs.trajectory import Trajectory
from offline_lmrl.settings import setting


@dataclass(frozen=True, kw_only=True)
class Scored(TrajectoryImporter):
    """Read scored conversations or replies and write train.jsonl, validation.jsonl and report.json."""

    reward: str | None = setting(
        None, "the column that holds the score of a row; null = `reward`, or `label` in rows with a prompt"
    )

    def read(self, row: Record) -> Trajectory | None:
        """Return the trajectory of one row."""
        made = read_row(row, row.where, row.repairs, self.reward)
        if made is None:
            return None
        own = made.group if row.get("group") is not None else root_group(made.turns)
        return replace(made, group=own, source=made.source or "scored")

    def assemble(self, found: Found, report: Report) -> Splits:
        """Check that some row has the column with the scores."""
        lacking = report["kept as it is"].get(no_score(str(self.reward)).removeprefix("kept: "))
        require(
            lacking != report["imported"],
            f"{self.input}: {self.reward}: found no row with this column, expected the name of the column that "
            "holds the scores",
        )
        return found
