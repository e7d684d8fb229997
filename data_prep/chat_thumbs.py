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
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_prep import fields, trajectories
from data_prep.comparisons import import_rows
from offline_lmrl.errors import InputError
from offline_lmrl.logs.forms import Drop, extra_columns, given_fields, read_messages, thumb
from offline_lmrl.logs.preference_forms import root_group
from offline_lmrl.logs.trajectory import Trajectory, Turn, build_trajectory, shown

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
_FIELDS = {"messages", "reaction", "reactions", "group", "source"}


def prepare(
    input: str | Path,
    output: str | Path,
    *,
    validation: float = 0.1,
    group: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Read chats with reactions and write train.jsonl, validation.jsonl and report.json.

    Args:
      input: a .jsonl, .jsonl.gz or .parquet file, a folder of such files or a hub name. A row has `messages` and
        either `reaction`, an object of `turn` (index of the rated message, from 0) and `value` (1 or -1), or
        `reactions`, a list of such objects; or it has the columns of ComparIA's data set of reactions.
      output: folder to write to; created if needed.
      validation: share of the groups (first user turns) that goes to validation if the source has no validation split.
      group: column by which rows are kept together in one split, such as a customer; null = the first user turn.
      seed: random seed of the split.
    Returns: the content of report.json: counts of rows, repairs and drops, and facts about the data.
    Raises: InputError if nothing can be read or the output cannot be written.
    """
    made, report = import_rows(input, read_chat, group)
    rows = [row for some in made.values() for row in some]
    rewards = Counter(turn.reward for row in rows for turn in row.turns)
    report["replies"] = {
        "by the agent": sum(row.labels["agent_turns"] for row in rows),
        "thumbs up": rewards[1.0],
        "thumbs down": rewards[-1.0],
    }
    return trajectories.publish(made, output, report, validation, seed)


def read_chat(row: Mapping, where: str, counts: Counter[str]) -> Trajectory:
    """Return the trajectory of one chat, in which the replies with a thumb have the reward 1 or −1.

    Args:
      row: in one of the two forms that the module describes.
      where: "file:row", the start of error messages.
      counts: incremented for each repair, under a key that describes it.

    Raises: Drop if the row cannot be used, InputError for values of the wrong type.
    """
    if row.get("messages") is None and row.get("model_pos") is not None:
        row = _from_comparia(row, where)
    if row.get("messages") is None or (row.get("reaction") is None and row.get("reactions") is None):
        raise InputError(
            f"{where}: fields: found {shown(list(row))}, expected messages and reaction {{turn, value}}, "
            "or messages and reactions, a list of those"
        )
    turns = read_messages(row.get("messages"), where, "messages", counts, allow_empty=True)
    if row.get("reactions") is None:
        found = [fields.inner(row, "reaction", where)]
    else:
        found = fields.objects(row, "reactions", where)
    if any(turn.reward is not None for turn in turns):
        raise Drop("rewards in addition to reactions")
    thumbs: dict[int, float | None] = {}
    reasons: list[str] = []
    for reaction in found:
        try:
            value = _value(reaction, where, counts)
            turn = _turn(reaction, turns, where, counts)
        except Drop as drop:
            reasons.append(str(drop))
            continue
        thumbs[turn] = value if thumbs.get(turn, value) == value else None
    reasons += ["contradictory reactions to one reply"] * sum(value is None for value in thumbs.values())
    scored = {turn: value for turn, value in thumbs.items() if value is not None}
    if not scored:
        raise Drop(reasons[0] if reasons else "no reaction")
    counts.update(f"repaired: left out: {reason}" for reason in reasons)
    if turns[-1].role != "assistant":
        counts["kept: a chat that does not end with the agent"] += 1
    credited = [
        replace(turn, trainable=None, reward=scored[i])
        if i in scored
        else replace(turn, trainable=False)
        if turn.is_trainable
        else turn
        for i, turn in enumerate(turns[: max(scored) + 1])
    ]
    given = given_fields(row, ("group", "source"), where, counts)
    made = build_trajectory(credited, {"group": root_group(turns), "source": "chat-thumbs", **given}, where)
    labels = extra_columns(row, {name for name in row if row[name] is not None} - _FIELDS, counts)
    return replace(
        made,
        labels={
            **labels,
            "reactions": [extra_columns(reaction, set(reaction), counts) for reaction in found],
            "agent_turns": sum(turn.role == "assistant" for turn in turns),
        },
    )


def _from_comparia(row: Mapping, where: str) -> dict[str, Any]:
    """Convert a row of ComparIA to one with `messages` and `reaction`; `reaction` also has the text of the reply."""
    side = row["model_pos"]
    if side not in ("a", "b"):
        raise InputError(f"{where}: model_pos: found {shown(side)}, expected a or b")
    reaction = {
        "turn": row.get("msg_index"),
        "text": row.get("response_content"),
        "liked": row.get("liked"),
        "disliked": row.get("disliked"),
        "tags": [name for name in _TAGS if row.get(name) is True],
        "comment": row.get("comment"),
    }
    return {
        "messages": row.get(f"conversation_{side}"),
        "reaction": reaction,
        **{name: value for name, value in row.items() if name not in _COMPARIA},
    }


def _value(reaction: Mapping, where: str, counts: Counter[str]) -> float:
    """Return the reaction's value, 1 (thumb up) or −1.

    Raises: Drop if it has neither.
    """
    if reaction.get("value") is not None:
        value = fields.number(reaction, "value", where)
    else:
        liked, disliked = (thumb(reaction.get(name), name, where, counts) for name in ("liked", "disliked"))
        value = float(bool(liked) - bool(disliked))
    if value not in (1, -1):
        raise Drop("a reaction that is neither up nor down")
    return value


def _turn(reaction: Mapping, turns: Sequence[Turn], where: str, counts: Counter[str]) -> int:
    """Return the index of the turn that the reaction is about.

    Raises: Drop if that turn is not a reply of the agent.
    """
    place = fields.whole(reaction, "turn", where)
    quoted = None if reaction.get("text") is None else fields.text(reaction, "text", where).strip()
    replies = [
        i
        for i, turn in enumerate(turns)
        if turn.role == "assistant" and turn.content.strip() and quoted in (None, turn.content.strip())
    ]
    if place in replies:
        return place
    if turns and turns[0].role == "system" and place + 1 in replies:
        counts["repaired: turn counted without the system message"] += 1
        return place + 1
    if quoted is not None and len(replies) == 1:
        counts["repaired: reply found by its text"] += 1
        return replies[0]
    raise Drop("a reaction that is not on a reply of the agent")
