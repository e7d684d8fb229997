"""Convert solutions in labelled steps (Lightman et al. 2023) to trajectories, in TRL's form of stepwise supervision.

A row is `prompt, completions, labels`. How rows are read:
- Every step is a turn of the agent and earns 1 if its label is true and −1 if it is false. A longer solution of right
  steps thus earns more; with `right` 0, only mistakes count.
- A step without a label is context, since nobody rated it.
- White space around a step, which separates it from the next step, is removed, since the end of a turn is marked by
  the chat format.
- Some sources stop at the first mistake, others continue. Right steps after a wrong one are kept, and rows with such
  steps are counted.
- Whether the final answer is correct does not count. A column for it is kept in the labels.
"""

from dataclasses import dataclass, replace

from data_prep.trajectories import TrajectoryImporter
from offline_lmrl.errors import require
from offline_lmrl.logs.forms import build_trajectory
from offline_lmrl.logs.preference_forms import read_context, root_group
from offline_lmrl.logs.record import Record, drop_if, thumb
from offline_lmrl.logs.trajectory import Trajectory, Turn
from offline_lmrl.settings import setting


@dataclass(frozen=True, kw_only=True)
class Stepwise(TrajectoryImporter):
    """Read rows of prompt, completions and labels and write train.jsonl, validation.jsonl and report.json."""

    right: float = setting(1.0, "reward of a right step")
    wrong: float = setting(-1.0, "reward of a wrong step; less than `right`")

    def check(self) -> None:
        """Check the settings."""
        require(self.wrong < self.right, f"wrong: found {self.wrong}, expected a number below right ({self.right})")

    def read(self, row: Record) -> Trajectory:
        """Return the trajectory of one solution, with one agent turn per step."""
        require(row.get("prompt") is not None, f"{row.where}: prompt: found none, expected text or messages")
        steps, values = row.each("completions"), row.items_of("labels")
        require(
            len(steps) == len(values),
            f"{row.where}: labels: found {len(values)} for {len(steps)} completions, expected one for each completion",
        )
        context = read_context(row, "prompt")
        turns, labels = [], []
        for i, (name, value) in enumerate(zip(steps, values, strict=True)):
            step = steps.text(name)
            label = thumb(value, f"labels[{i}]", row.where, row.repairs)
            if not step.strip():
                row.count("repaired: empty step left out")
                continue
            row.count("repaired: white space around a step removed", step != step.strip())
            labels.append(label)
            reward = None if label is None else self.right if label else self.wrong
            turns.append(Turn("assistant", step.strip(), label is not None, reward))
        rated = [label for label in labels if label is not None]
        drop_if(not rated, "no step with a label")
        row.count("kept: a right step after a wrong one", rated != sorted(rated, reverse=True))
        made = build_trajectory(
            row,
            [*context, *turns],
            {"group": root_group(context), "source": "stepwise"},
            ("group", "source"),
            ("prompt", "completions"),
        )
        return replace(made, labels={**made.labels, "labels": labels})
