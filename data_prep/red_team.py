"""Convert red-team attempts (Ganguli et al. 2022; anthropics/hh-rlhf, red-team-attempts) to scored trajectories.

A row is one transcript and its rating. How rows are read:
- The public file is one JSON list, whatever its suffix.
- The rating, from 0 to 4, is of the whole attempt and high if the attack succeeded. Every reply is trained on, and the
  last one earns −rating, or instead the unchanged score of a preference model, which is low if a reply was harmful.
- Turns are split and merged as in hh-rlhf. A last message without a reply is removed.
- The group is the first message. All other fields are in the labels, the team member as `annotator`.
"""

from dataclasses import dataclass, replace
from typing import Literal

from data_prep.source import Found, Report, Splits
from data_prep.trajectories import TrajectoryImporter
from offline_lmrl.logs.preference_forms import is_transcript, root_group, transcript
from offline_lmrl.logs.record import Record, drop_if
from offline_lmrl.logs.trajectory import Trajectory
from offline_lmrl.settings import setting

HIGHEST = 4
_MEMBER, _SCORE = "red_team_member_id", "min_harmlessness_score_transcript"


@dataclass(frozen=True, kw_only=True)
class RedTeam(TrajectoryImporter):
    """Read red-team attempts and write train.jsonl, validation.jsonl and report.json."""

    reward: Literal["rating", "harmlessness"] = setting(
        "rating",
        "rating (the attacker's, 0 to 4, negated) or harmlessness (a preference model's score of the most harmful "
        "reply, unbounded)",
    )

    def read(self, row: Record) -> Trajectory:
        """Return the trajectory of one attempt, whose last reply has the reward."""
        if not is_transcript(row.get("transcript")):
            raise row.error("transcript", "a transcript of Human and Assistant")
        turns = transcript(row["transcript"], row.repairs)
        if turns[-1].role == "user":
            row.count("repaired: last message without a reply removed")
            turns.pop()
        drop_if(not all(turn.content for turn in turns if turn.is_trainable), "empty reply")
        field = "rating" if self.reward == "rating" else _SCORE
        drop_if(row.get(field) is None, f"no {field}")
        score = -row.between(field, 0, HIGHEST) if self.reward == "rating" else row.number(field)
        turns[-1] = replace(turns[-1], reward=score)
        labels = row.others({"transcript"})
        if _MEMBER in labels:
            labels["annotator"] = labels.pop(_MEMBER)
        return Trajectory(tuple(turns), group=root_group(turns), task="red-team", source="red-team", labels=labels)

    def assemble(self, found: Found, report: Report) -> Splits:
        """Add to the report how replies were rewarded."""
        report["reward"] = self.reward
        return found
