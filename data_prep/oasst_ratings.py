"""Convert OpenAssistant conversation trees (Köpf et al. 2023) to scored replies, each rated by itself.

Messages are read and left out as in `data_prep.oasst`. Every rated reply of the assistant becomes a trajectory. The
messages from the root to the reply are context, which is not trained on. The reply earns
- "quality": the mean quality that its reviewers gave it, in [0, 1], or
- "thumbs": (up − down) / (up + down) of its thumbs, in [−1, 1].
A reply without a rating is not a bad reply; it is left out and counted.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from data_prep.oasst import Message, MessageImporter, Reply, turns_of
from data_prep.trajectories import TrajectoryImporter
from offline_lmrl.logs.preference_forms import root_group
from offline_lmrl.logs.trajectory import Trajectory, as_context
from offline_lmrl.settings import setting


@dataclass(frozen=True, kw_only=True)
class OasstRatings(MessageImporter, TrajectoryImporter):
    """Read messages, threads or trees and write train.jsonl, validation.jsonl and report.json.

    The entry `assembled` of the report counts every message once.
    """

    reward: Literal["quality", "thumbs"] = setting(
        "quality", "the reward of a reply: quality (its mean rating, in [0, 1]) or thumbs ((up − down) / (up + down))"
    )

    def rows_of(self, replies: Iterable[Reply], counts: Counter[str]) -> Iterator[Trajectory]:
        """Yield a trajectory of each rated reply."""
        for before, reply in replies:
            score = reply.labels["labels"].get("quality") if self.reward == "quality" else _thumbs(reply)
            if score is None:
                counts[f"replies without {self.reward}"] += 1
                continue
            counts["replies scored"] += 1
            context = turns_of(before)
            turns = (*as_context(context), replace(reply.turn, reward=score))
            group = reply.group or root_group(context) or reply.id
            yield Trajectory(turns, group=group, source="oasst", labels=reply.labels)

    def expected_replies(self, counts: Counter[str]) -> str:
        """Return the end of the error message for messages without rated replies."""
        return f"no reply with {self.reward} ({dict(counts)}), expected one or more"


def _thumbs(reply: Message) -> float | None:
    up, down = (reply.labels["emojis"].get(name, 0) for name in ("+1", "-1"))
    return (up - down) / (up + down) if up + down else None
