"""The row forms that logs come in, read as trajectories. Nothing is repaired or dropped without being counted.

    messages: [{role, content, reward?, trainable?, token_ids?, behaviour_log_prob?}]     the project's own form
    prompt, completion, reward      reward: a number, or null = not scored
    prompt, completion, label       label: true = 1.0, false = 0.0, null = not scored

`prompt` and `completion` are text (a user turn, an agent turn) or lists of messages; the score goes to the last agent
turn of the completion, and agent turns in the prompt are context: nobody scored them. All forms may carry `terminated,
group, task, source, labels`; without a group, a prompt form's group is a hash of its prompt. Other columns are kept in
`labels`, where a column of that name is not there already. A row in which the agent abstained (`generate --threshold`)
is dropped.

Content that is a list of text parts is joined. Tool calls, a thought (`reasoning_content` or `thinking`), and a column
`tools` are kept apart for the chat template; the column goes to the leading system turn. A message whose content is
anything else that is not text drops its row; a value of the wrong type is an error.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from offline_lmrl.data.errors import InputError
from offline_lmrl.data.trajectory import (
    OPTIONAL_TURN_FIELDS,
    Trajectory,
    Turn,
    build_trajectory,
    read_labels,
    shown,
    turn_from_record,
)

PARTS_JOINED = "repaired: text parts joined"
REWARD_REMOVED = "repaired: reward removed from an untrained turn"
ABSTAINED = "abstained, no reply"

COMPARISON_FIELDS = (("chosen",), ("rejected",), ("responses", "ranks"), ("responses", "rank"),
                     ("options", "target"))

_MESSAGE_FIELDS = {"role", "content", "reasoning_content", *OPTIONAL_TURN_FIELDS}
_ROW_FIELDS = {"terminated", "group", "task", "source", "labels"}


class Drop(Exception):
    """The row cannot be used; the message is the reason that is counted."""


def read_row(row: Any, where: str, counts: Counter) -> Trajectory | None:
    """The trajectory of one row in any accepted form, or None if the row is dropped.

    Args:
      row: one object of a log.
      where: "file:row", put in front of every error.
      counts: gets one count per repair of a kept row, or the reason of the drop.

    Raises InputError for comparisons, unknown forms and values of the wrong type.
    """
    if not isinstance(row, Mapping):
        raise InputError(f"{where}: row: found {shown(row)}, expected an object")
    present = {name for name, value in row.items() if value is not None}
    repairs: Counter = Counter()
    try:
        turns, group, used = _turns(row, present, where, repairs)
        if "tools" in present:
            turns, used = with_tools(turns, row["tools"], where), used | {"tools"}
        if not any(turn.is_trainable for turn in turns) and _abstained(row, where):
            raise Drop(ABSTAINED)
    except Drop as drop:
        counts[f"dropped: {drop}"] += 1
        return None
    trajectory = build_trajectory(turns, {"group": group, **_given(row, _ROW_FIELDS)}, where)
    extra = extra_columns(row, present - used - _ROW_FIELDS, repairs)
    counts.update(repairs)
    return replace(trajectory, labels={**extra, **trajectory.labels}) if extra else trajectory


def with_tools(turns: Sequence[Turn], tools: Any, where: str) -> list[Turn]:
    """The turns with a row's list of tools on the leading system turn, which is made where there is none."""
    has_system = bool(turns) and turns[0].role == "system"
    try:
        leading = replace(turns[0] if has_system else Turn("system", ""), tools=tools)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    return list(turns) if leading.tools is None else [leading, *turns[has_system:]]


def _abstained(row: Mapping, where: str) -> bool:
    """Whether `generate` wrote the row for a reply that its scorer held back."""
    try:
        return read_labels(row.get("labels")).get("abstained") is True
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def extra_columns(row: Mapping, names: set[str], repairs: Counter) -> dict[str, Any]:
    """The columns of a row that go to the labels; what JSON cannot hold is left out and counted."""
    extra = {}
    for name in sorted(names):
        try:
            extra[name] = json.loads(json.dumps(row[name]))
        except (TypeError, ValueError):
            repairs[f"repaired: column {name!r} left out, not JSON"] += 1
    return extra


def _turns(row: Mapping, present: set[str], where: str, repairs: Counter) -> tuple[list[Turn], str, set[str]]:
    """The turns, the group where the row gives none, and the fields used up."""
    for fields in COMPARISON_FIELDS:
        if set(fields) <= present:
            raise InputError(f"{where}: {fields[0]}: found a comparison, expected a scored row (messages, or prompt, "
                             "completion and reward or label); comparisons are scored by to_trajectories, or "
                             "data.preference")
    if "messages" in present:
        if "reward" in present:
            raise InputError(f"{where}: reward: found {shown(row['reward'])} beside messages, "
                             "expected rewards inside the message of the agent turn that earned them")
        return read_messages(row["messages"], where, "messages", repairs), "", {"messages"}
    if {"prompt", "completion"} <= present:
        prompt = read_prompt(row["prompt"], where, repairs)
        completion = _completion(row["completion"], where, repairs)
        return [*prompt, *_scored(completion, row, where)], _prompt_group(prompt), {"prompt", "completion", "reward"}
    found = ", ".join(sorted(present)) or "none"
    raise InputError(f"{where}: fields: found {found}, expected messages, or prompt, completion and reward or label")


def read_prompt(value: Any, where: str, repairs: Counter) -> list[Turn]:
    """The turns of a prompt, text or conversational; agent turns in it are context."""
    if isinstance(value, str):
        return [Turn("user", read_text(value))] if value else []  # without a prompt the agent opens
    if isinstance(value, Sequence):
        value = [{**message, "trainable": False}
                 if isinstance(message, Mapping) and message.get("role") == "assistant" else message
                 for message in value]
    return read_messages(value, where, "prompt", repairs)


def _completion(value: Any, where: str, repairs: Counter) -> list[Turn]:
    if not isinstance(value, str):
        return read_messages(value, where, "completion", repairs)
    if not value:
        raise InputError(f"{where}: completion: found empty text, expected the text of the agent's turn")
    return [Turn("assistant", read_text(value))]


def _scored(completion: list[Turn], row: Mapping, where: str) -> list[Turn]:
    """The completion with the row's score on its last agent turn."""
    if "reward" not in row and "label" not in row:
        raise InputError(f"{where}: reward: found neither reward nor label, expected one of them (null = not scored)")
    reward, label = row.get("reward"), row.get("label")
    if not isinstance(label, bool | None):
        raise InputError(f"{where}: label: found {shown(label)}, expected true, false or null")
    if reward is None and label is not None:
        reward = float(label)
    agent = [i for i, turn in enumerate(completion) if turn.is_trainable]
    if not agent:
        raise InputError(f"{where}: completion: found no agent turn, expected at least one")
    if reward is None:
        return completion
    if completion[agent[-1]].reward is not None:
        raise InputError(f"{where}: reward: found one for the row and one in completion[{agent[-1]}], expected one")
    try:
        completion[agent[-1]] = replace(completion[agent[-1]], reward=reward)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    return completion


def read_messages(messages: Any, where: str, field: str, repairs: Counter, allow_empty: bool = False) -> list[Turn]:
    """The turns of a list of messages.

    Raises Drop for content that is not text, InputError for values of the wrong type and, unless `allow_empty`, for
    an agent's turn without text.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise InputError(f"{where}: {field}: found {shown(messages)}, expected a list of messages")
    return [_turn(message, f"{where}: {field}[{i}]", repairs, allow_empty) for i, message in enumerate(messages)]


def _turn(message: Any, where: str, repairs: Counter, allow_empty: bool) -> Turn:
    if not isinstance(message, Mapping):
        raise InputError(f"{where}: found {shown(message)}, expected an object with role and content")
    plain = {**message, "content": _content(message, repairs), "thinking": _thought(message, where)}
    if plain.get("tool_calls") and not isinstance(plain["tool_calls"], str):
        # Arrow fills every field that some other row has with null, so a null in a call says nothing.
        plain["tool_calls"] = _without_nulls(plain["tool_calls"])
    elif not plain.get("tool_calls"):
        plain.pop("tool_calls", None)
    if plain.get("role") == "assistant" and plain.get("trainable") is False and plain.get("reward") is not None:
        repairs[REWARD_REMOVED] += 1
        del plain["reward"]
    left_out = message.keys() - _MESSAGE_FIELDS
    if message.get("role") != "tool":  # whoever else has a name: templates do not print it
        left_out |= message.keys() & {"name", "tool_call_id"}
    for name in left_out:
        plain.pop(name)
        if message[name] is not None:
            repairs[f"repaired: message field {name!r} left out"] += 1
    return turn_from_record(plain, where, allow_empty)


def _content(message: Mapping, repairs: Counter) -> Any:
    """The content as one text; values that are no kind of content at all are returned as they are, to be refused."""
    content = message.get("content")
    if isinstance(content, list | tuple):
        content = "".join(_part(part) for part in content)
        repairs[PARTS_JOINED] += 1
    if content is None and message.get("tool_calls"):
        content = ""
    if content is None:
        raise Drop("message without content")
    if isinstance(content, Mapping):
        raise Drop("content that is not text")
    return read_text(content) if isinstance(content, str) else content


def _thought(message: Mapping, where: str) -> str | None:
    """An agent's thought, under either of the names in use; an empty one says nothing."""
    thoughts = {message[name] for name in ("thinking", "reasoning_content") if isinstance(message.get(name), str)}
    thoughts = {thought for thought in map(read_text, thoughts) if thought}
    if len(thoughts) > 1:
        raise InputError(f"{where}.thinking: found another text than in reasoning_content, expected one of them")
    return thoughts.pop() if thoughts else None


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise Drop(f"content part of type {kind!r}")


def read_text(text: str) -> str:
    """The text itself; raises Drop where UTF-8 cannot hold it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Drop("text with half a surrogate pair") from error
    return text


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [_without_nulls(inner) for inner in value]
    return value


def _given(row: Mapping, names: set[str]) -> dict[str, Any]:
    return {name: row[name] for name in names if row.get(name) is not None}


def _prompt_group(prompt: Sequence[Turn]) -> str:
    text = json.dumps([[turn.role, turn.content] for turn in prompt])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
