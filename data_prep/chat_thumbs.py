"""Convert chats in which people rated some replies with a thumb to trajectories, in which only these have a reward.

Two forms are read: `messages` with `reaction` or `reactions` (`turn, value`, 1 or −1, and any other fields), and the
reactions of ComparIA (`conversation_a, conversation_b, model_pos, msg_index, response_content, liked, disliked`). How
rows are read:
- A reply with a thumb earns 1 or −1. All other turns are context: a missing thumb is not a neutral one.
- `turn` counts messages from 0. If it is not the index of an agent's reply, the log may have counted without the
  system message. If the text of the reply was logged too, only a reply with this text is meant.
- A reaction is left out if it is neither up nor down, is not on a reply of the agent, or contradicts another. A row
  with no other reaction is dropped.
- The turns after the last reply with a thumb are cut off, since no reward is known for them.

People react to replies that are unusual, so shares of thumbs are not shares of good replies. The report gives the
number of replies with a thumb.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from data_prep.source import Found, Report, Splits
from data_prep.trajectories import TrajectoryImporter
from offline_lmrl.errors import require, shown
from offline_lmrl.logs.forms import build_trajectory
from offline_lmrl.logs.messages import read_turns
from offline_lmrl.logs.preference_forms import root_group
from offline_lmrl.logs.record import Drop, Record, drop_if
from offline_lmrl.logs.trajectory import Trajectory, Turn

_TAGS = ("useful", "complete", "creative", "clear_formatting", "incorrect", "superficial", "instructions_not_followed")
_COMPARIA = {
    "conversation_a",
    "conversation_b",
    "model_pos",
    "msg_index",
    "question_content",
    "response_content",
    "liked",
    "disliked",
    "comment",
    *_TAGS,
}


@dataclass(frozen=True, kw_only=True)
class ChatThumbs(TrajectoryImporter):
    """Read chats with reactions and write train.jsonl, validation.jsonl and report.json."""

    def read(self, row: Record) -> Trajectory:
        """Return the trajectory of one chat, in which the replies with a thumb have the reward 1 or −1."""
        if row.get("messages") is None and row.get("model_pos") is not None:
            row = Record(_from_comparia(row), row.where, row.repairs)
        require(
            row.get("messages") is not None and (row.get("reaction") is not None or row.get("reactions") is not None),
            f"{row.where}: fields: found {shown(list(row))}, expected messages and reaction {{turn, value}}, "
            "or messages and reactions, a list of those",
        )
        turns = read_turns(row, "messages", allow_empty=True)
        found = [row.inner("reaction")] if row.get("reactions") is None else row.objects("reactions")
        drop_if(any(turn.reward is not None for turn in turns), "rewards in addition to reactions")
        scored = _scores([Record(reaction, row.where, row.repairs) for reaction in found], turns, row.repairs)
        row.count("kept: a chat that does not end with the agent", turns[-1].role != "assistant")
        credited = [
            replace(turn, trainable=None if i in scored else False, reward=scored.get(i))
            if i in scored or turn.is_trainable
            else turn
            for i, turn in enumerate(turns[: max(scored) + 1])
        ]
        made = build_trajectory(
            row,
            credited,
            {"group": root_group(turns), "source": "chat-thumbs"},
            ("group", "source"),
            ("messages", "reaction", "reactions"),
        )
        reactions = [reaction.columns(reaction) for reaction in found]
        agent_turns = sum(turn.role == "assistant" for turn in turns)
        return replace(made, labels={**made.labels, "reactions": reactions, "agent_turns": agent_turns})

    def assemble(self, found: Found, report: Report) -> Splits:
        """Add to the report the number of replies with a thumb."""
        rows = [row for some in found.values() for row in some]
        rewards = Counter(turn.reward for row in rows for turn in row.turns)
        report["replies"] = {
            "by the agent": sum(row.labels["agent_turns"] for row in rows),
            "thumbs up": rewards[1.0],
            "thumbs down": rewards[-1.0],
        }
        return found


def _from_comparia(row: Record) -> dict[str, Any]:
    """Convert a row of ComparIA to one with `messages` and `reaction`; `reaction` also has the text of the reply."""
    side = row["model_pos"]
    if side not in ("a", "b"):
        raise row.error("model_pos", "a or b")
    reaction = {
        "turn": row.get("msg_index"),
        "text": row.get("response_content"),
        "liked": row.get("liked"),
        "disliked": row.get("disliked"),
        "tags": [name for name in _TAGS if row.get(name) is True],
        "comment": row.get("comment"),
    }
    others = {name: value for name, value in row.items() if name not in _COMPARIA}
    return {"messages": row.get(f"conversation_{side}"), "reaction": reaction, **others}


def _scores(reactions: Sequence[Record], turns: Sequence[Turn], repairs: Counter[str]) -> dict[int, float]:
    """Return {index of a turn: 1 or −1} for the turns with a usable reaction; the others are counted by reason.

    Raises: Drop if there is no usable reaction.
    """
    thumbs: dict[int, float | None] = {}
    reasons: list[str] = []
    for reaction in reactions:
        try:
            value, turn = _value(reaction), _turn(reaction, turns)
        except Drop as drop:
            reasons.append(str(drop))
        else:
            thumbs[turn] = value if thumbs.get(turn, value) == value else None
    scored = {turn: value for turn, value in thumbs.items() if value is not None}
    reasons += ["contradictory reactions to one reply"] * (len(thumbs) - len(scored))
    drop_if(not scored, reasons[0] if reasons else "no reaction")
    repairs.update(f"repaired: left out: {reason}" for reason in reasons)
    return scored


def _value(reaction: Record) -> float:
    """Return the reaction's value, 1 (thumb up) or −1.

    Raises: Drop if it has neither.
    """
    if reaction.get("value") is not None:
        value = reaction.number("value")
    else:
        liked, disliked = map(reaction.thumb, ("liked", "disliked"))
        value = float(bool(liked) - bool(disliked))
    drop_if(value not in (1, -1), "a reaction that is neither up nor down")
    return value


def _turn(reaction: Record, turns: Sequence[Turn]) -> int:
    """Return the index of the turn that the reaction is about.

    Raises: Drop if that turn is not a reply of the agent.
    """
    place = reaction.whole("turn")
    quoted = None if reaction.get("text") is None else reaction.text("text").strip()
    replies = [
        i
        for i, turn in enumerate(turns)
        if turn.role == "assistant" and turn.content.strip() and quoted in (None, turn.content.strip())
    ]
    if place in replies:
        return place
    if turns and turns[0].role == "system" and place + 1 in replies:
        reaction.count("repaired: turn counted without the system message")
        return place + 1
    if quoted is not None and len(replies) == 1:
        reaction.count("repaired: reply found by its text")
        return replies[0]
    raise Drop("a reaction that is not on a reply of the agent")
