"""Convert single replies with a thumb to trajectories, in the form of KTO (Ethayarajh et al. 2024) and TRL.

A row is `prompt, completion, label`, TRL's unpaired preference. How rows are read:
- The last agent turn of the reply has the reward 1 if the label is true and −1 if it is false; other turns have none.
- Prompt and completion are text, messages or a transcript; a prompt repeated at the start of a completion is removed.
- A row without a label is dropped: it is not a bad reply.
- The report gives the numbers n_D and n_U of true and false labels, and weights that balance them: KTO's λ, with
  n_D λ_D = n_U λ_U.
"""

from collections import Counter
from dataclasses import dataclass, replace

from data_prep.source import Found, Report, Splits
from data_prep.trajectories import TrajectoryImporter
from offline_lmrl.errors import require
from offline_lmrl.logs.forms import build_trajectory
from offline_lmrl.logs.preference_forms import read_context, read_reply, root_group
from offline_lmrl.logs.record import Record, drop_if
from offline_lmrl.logs.trajectory import Trajectory


@dataclass(frozen=True, kw_only=True)
class Kto(TrajectoryImporter):
    """Read rows of prompt, completion and label and write train.jsonl, validation.jsonl and report.json."""

    def read(self, row: Record) -> Trajectory:
        """Return the trajectory of one row, whose last agent turn has the reward 1 or −1."""
        for name in ("prompt", "completion"):
            require(row.get(name) is not None, f"{row.where}: {name}: found none, expected text or messages")
        label = row.thumb("label")
        drop_if(label is None, "no label")
        context = read_context(row, "prompt")
        reply = read_reply(row, "completion", context, row["prompt"])
        agent = [i for i, turn in enumerate(reply) if turn.is_trainable]
        drop_if(not agent, "a completion without an agent turn")
        drop_if(not all(reply[i].content.strip() for i in agent), "empty reply")
        drop_if(any(turn.reward is not None for turn in reply), "a reward in addition to the label")
        reply[agent[-1]] = replace(reply[agent[-1]], reward=1.0 if label else -1.0)
        made = build_trajectory(
            row,
            [*context, *reply],
            {"group": root_group(context), "source": "kto"},
            ("group", "source", "labels"),
            ("prompt", "completion", "label"),
        )
        return replace(made, labels={**made.labels, "label": label})

    def assemble(self, found: Found, report: Report) -> Splits:
        """Add to the report the numbers of true and false labels and the weights that balance them."""
        counts = Counter(row.total_return > 0 for rows in found.values() for row in rows)
        report["labels"] = {"true": counts[True], "false": counts[False]}
        if counts[True] and counts[False]:
            report["weights that balance the labels"] = {
                name: round(max(counts.values()) / n, 4) for name, n in report["labels"].items()
            }
        return found
