"""Convert single replies with a thumb to trajectories, in the form of KTO (Ethayarajh et al. 2024) and TRL.

A row is `prompt, completion, label`, TRL's unpaired preference. How rows are read:
- The last agent turn of the reply has the reward 1 if the label is true and −1 if it is false; other turns have none.
- Prompt and completion are text, messages or a transcript; a prompt repeated at the start of a completion is removed.
- A row without a label is dropped: it is not a bad reply.
- The report gives the numbers n_D and n_U of true and false labels, and weights that balance them: KTO's λ, with
  n_D λ_D = n_U λ_U.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_prep import trajectories
from data_prep.comparisons import import_rows
from offline_lmrl.errors import InputError
from offline_lmrl.logs.forms import Drop, extra_columns, given_fields, thumb
from offline_lmrl.logs.preference_forms import read_context, read_reply, root_group
from offline_lmrl.logs.trajectory import Trajectory, build_trajectory

_FIELDS = {"prompt", "completion", "label", "group", "source", "labels"}


def prepare(
    input: str | Path,
    output: str | Path,
    *,
    validation: float = 0.1,
    group: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Read rows of prompt, completion and label and write train.jsonl, validation.jsonl and report.json.

    Args:
      input: a .jsonl, .jsonl.gz or .parquet file, a folder of such files, a datasets folder or a hub name.
      output: folder to write to; created if needed.
      validation: share of the groups (first user turns) that goes to validation if the source has no validation split.
      group: column by which rows are kept together in one split, such as a customer; null = the first user turn.
      seed: random seed of the split.
    Returns: the content of report.json: counts of rows, repairs and drops, and facts about the data.
    Raises: InputError if nothing can be read or the output cannot be written.
    """
    made, report = import_rows(input, read_labelled, group)
    counts = Counter(row.total_return > 0 for rows in made.values() for row in rows)
    report = {**report, "labels": {"true": counts[True], "false": counts[False]}}
    if counts[True] and counts[False]:
        most = max(counts.values())
        report["weights that balance the labels"] = {
            name: round(most / counts[label], 4) for name, label in (("true", True), ("false", False))
        }
    return trajectories.publish(made, output, report, validation, seed)


def read_labelled(row: Mapping, where: str, counts: Counter[str]) -> Trajectory:
    """Return the trajectory of one row, whose last agent turn has the reward 1 or −1.

    Args:
      row: has `prompt`, `completion` and `label`.
      where: "file:row", the start of error messages.
      counts: incremented for each repair, under a key that describes it.

    Raises: Drop if the row cannot be used, InputError for values of the wrong type.
    """
    for name in ("prompt", "completion"):
        if row.get(name) is None:
            raise InputError(f"{where}: {name}: found none, expected text or messages")
    label = thumb(row.get("label"), "label", where, counts)
    if label is None:
        raise Drop("no label")
    context = read_context(row["prompt"], where, counts)
    reply = read_reply(row["completion"], context, row["prompt"], where, "completion", counts)
    agent = [i for i, turn in enumerate(reply) if turn.is_trainable]
    if not agent:
        raise Drop("a completion without an agent turn")
    if not all(reply[i].content.strip() for i in agent):
        raise Drop("empty reply")
    if any(turn.reward is not None for turn in reply):
        raise Drop("a reward in addition to the label")
    reply[agent[-1]] = replace(reply[agent[-1]], reward=1.0 if label else -1.0)
    given = given_fields(row, ("group", "source", "labels"), where, counts)
    made = build_trajectory([*context, *reply], {"group": root_group(context), "source": "kto", **given}, where)
    extra = extra_columns(row, {name for name in row if row[name] is not None} - _FIELDS, counts)
    return replace(made, labels={**extra, **made.labels, "label": label})
