"""Convert red-team attempts (Ganguli et al. 2022; anthropics/hh-rlhf, red-team-attempts) to scored trajectories.

A row is one transcript and its rating. How rows are read:
- The public file is one JSON list, whatever its suffix.
- The rating, from 0 to 4, is of the whole attempt and high if the attack succeeded. Every reply is trained on, and the
  last one earns −rating, or instead the unchanged score of a preference model, which is low if a reply was harmful.
- Turns are split and merged as in hh-rlhf. A last message without a reply is removed.
- The group is the first message. All other fields are in the labels, the team member as `annotator`.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from data_prep import trajectories
from data_prep.comparisons import import_rows
from data_prep.fields import number
from offline_lmrl.errors import InputError
from offline_lmrl.logs.forms import Drop, extra_columns
from offline_lmrl.logs.preference_forms import is_transcript, root_group, transcript
from offline_lmrl.logs.trajectory import Trajectory, shown

HIGHEST = 4
_MEMBER, _SCORE = "red_team_member_id", "min_harmlessness_score_transcript"


def prepare(
    input: str | Path,
    output: str | Path,
    *,
    reward: Literal["rating", "harmlessness"] = "rating",
    validation: float = 0.1,
    group: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Read red-team attempts and write train.jsonl, validation.jsonl and report.json.

    Args:
      input: the public file, a folder with it or a hub name.
      output: folder to write to; created if needed.
      reward: rating (the attacker's, 0 to 4, negated) or harmlessness (a preference model's score of the most harmful
        reply, unbounded).
      validation: share of the groups (first messages) that goes to validation.
      group: column by which rows are kept together in one split, such as a customer; null = the first message.
      seed: random seed of the split.
    Returns: the content of report.json: counts of rows, repairs and drops, and facts about the data.
    Raises: InputError if nothing can be read or the output cannot be written.
    """

    def read(row: Mapping, where: str, counts: Counter[str]) -> Trajectory:
        return read_attempt(row, where, counts, reward)

    made, report = import_rows(input, read, group)
    return trajectories.publish(made, output, {**report, "reward": reward}, validation, seed)


def read_attempt(row: Mapping, where: str, counts: Counter[str], reward: str = "rating") -> Trajectory:
    """Return the trajectory of one attempt, whose last reply has the reward.

    Args:
      row: has `transcript`, and `rating` or the preference model's score.
      where: "file:row", the start of error messages.
      counts: incremented for each repair, under a key that describes it.
      reward: "rating" or "harmlessness", see `prepare`.

    Raises: Drop if the row cannot be used, InputError for values of the wrong type.
    """
    if not is_transcript(row.get("transcript")):
        raise InputError(
            f"{where}: transcript: found {shown(row.get('transcript'))}, expected a transcript of Human and Assistant"
        )
    turns = transcript(row["transcript"], counts)
    if turns[-1].role == "user":
        counts["repaired: last message without a reply removed"] += 1
        turns.pop()
    if not all(turn.content for turn in turns if turn.is_trainable):
        raise Drop("empty reply")
    field = "rating" if reward == "rating" else _SCORE
    if row.get(field) is None:
        raise Drop(f"no {field}")
    value = number(row, field, where)
    if reward == "rating" and not 0 <= value <= HIGHEST:
        raise InputError(f"{where}: rating: found {value}, expected 0 to {HIGHEST}")
    turns[-1] = replace(turns[-1], reward=-value if reward == "rating" else value)
    labels = extra_columns(row, {name for name in row if row[name] is not None} - {"transcript"}, counts)
    if _MEMBER in labels:
        labels["annotator"] = labels.pop(_MEMBER)
    return Trajectory(tuple(turns), group=root_group(turns), task="red-team", source="red-team", labels=labels)
