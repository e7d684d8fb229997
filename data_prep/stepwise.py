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

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_prep import fields, trajectories
from data_prep.comparisons import import_rows
from offline_lmrl.errors import InputError
from offline_lmrl.logs.forms import Drop, extra_columns, given_fields, thumb
from offline_lmrl.logs.preference_forms import read_context, root_group
from offline_lmrl.logs.trajectory import Trajectory, Turn, build_trajectory

_FIELDS = {"prompt", "completions", "group", "source"}


def prepare(
    input: str | Path,
    output: str | Path,
    *,
    right: float = 1.0,
    wrong: float = -1.0,
    validation: float = 0.1,
    group: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Read rows of prompt, completions and labels and write train.jsonl, validation.jsonl and report.json.

    Args:
      input: a .jsonl, .jsonl.gz or .parquet file, a folder of such files, a datasets folder or a hub name.
      output: folder to write to; created if needed.
      right: reward of a right step.
      wrong: reward of a wrong step; less than `right`.
      validation: share of the groups (prompts) that goes to validation if the source has no validation split.
      group: column by which rows are kept together in one split, such as a customer; null = the prompt.
      seed: random seed of the split.
    Returns: the content of report.json: counts of rows, repairs and drops, and facts about the data.
    Raises: InputError if nothing can be read or the output cannot be written.
    """
    if not wrong < right:
        raise InputError(f"wrong: found {wrong}, expected a number below right ({right})")

    def read(row: Mapping, where: str, counts: Counter[str]) -> Trajectory:
        return read_steps(row, where, counts, right, wrong)

    made, report = import_rows(input, read, group)
    return trajectories.publish(made, output, report, validation, seed)


def read_steps(row: Mapping, where: str, counts: Counter[str], right: float = 1.0, wrong: float = -1.0) -> Trajectory:
    """Return the trajectory of one solution, with one agent turn per step.

    Args:
      row: has `prompt`, `completions` and `labels`.
      where: "file:row", the start of error messages.
      counts: incremented for each repair, under a key that describes it.
      right: reward of a right step.
      wrong: reward of a wrong step.

    Raises: Drop if the row cannot be used, InputError for values of the wrong type.
    """
    if row.get("prompt") is None:
        raise InputError(f"{where}: prompt: found none, expected text or messages")
    steps, values = fields.items(row, "completions", where), fields.items(row, "labels", where)
    if len(steps) != len(values):
        raise InputError(
            f"{where}: labels: found {len(values)} for {len(steps)} completions, expected one for each completion"
        )
    context = read_context(row["prompt"], where, counts)
    turns, labels = [], []
    for i, value in enumerate(values):
        step = fields.text({f"completions[{i}]": steps[i]}, f"completions[{i}]", where)
        label = thumb(value, f"labels[{i}]", where, counts)
        if not step.strip():
            counts["repaired: empty step left out"] += 1
            continue
        if step != step.strip():
            counts["repaired: white space around a step removed"] += 1
        labels.append(label)
        turns.append(
            Turn("assistant", step.strip(), label is not None, None if label is None else right if label else wrong)
        )
    judged = [label for label in labels if label is not None]
    if not judged:
        raise Drop("no step with a label")
    if judged != sorted(judged, reverse=True):
        counts["kept: a right step after a wrong one"] += 1
    given = given_fields(row, ("group", "source"), where, counts)
    made = build_trajectory([*context, *turns], {"group": root_group(context), "source": "stepwise", **given}, where)
    extra = extra_columns(row, {name for name in row if row[name] is not None} - _FIELDS, counts)
    return replace(made, labels={**extra, "labels": labels})
