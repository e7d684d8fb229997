"""Read text and messages as turns: the one reader of everything that a row, a prompt file or a request holds.

A message is a dict with role and content, and perhaps other fields of `Turn`. Other spellings are read too, and
counted: `from` and `value` (ShareGPT), other names of roles, `weight: 0` for a message that is not trained on, and
rewards written as text. Content that is a list of text parts is joined. Tool calls and a thought (`reasoning_content`
or `thinking`) are stored apart from the text, for the chat template. Content that is not text drops the row.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from offline_lmrl.errors import InputError, at, require, shown
from offline_lmrl.logs.record import WORDS, Drop, Record, drop_if, read_text
from offline_lmrl.logs.trajectory import OPTIONAL_TURN_FIELDS, ROLES, Turn, finite, messages_of, parse_json

PARTS_JOINED = "repaired: text parts joined"
REWARD_REMOVED = "repaired: reward removed from an untrained turn"
DIALOGUES = ("messages", "conversations", "conversation")  # columns that hold a whole dialogue
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
_ROLE_NAMES = {
    **{role: role for role in ROLES},
    "developer": "system",
    "human": "user",
    "prompter": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "bot", "ai", "function_call"), "assistant"),
    **dict.fromkeys(("function", "function_response", "tool_response", "observation"), "tool"),
}
_TOOL_FIELDS = {"role", "content", *OPTIONAL_TURN_FIELDS}
_FIELDS = _TOOL_FIELDS - {"name", "tool_call_id"}  # which templates print of tools only


def read_turns(
    row: Record, field: str, role: str | None = None, *, context: bool = False, allow_empty: bool = False
) -> list[Turn]:
    """Read the turns that a field of a row holds.

    Args:
      field: the field: a list of messages, JSON text of one, or a text.
      role: the speaker of the one turn that a text is, "user" or "assistant"; "" is no turn of a user. None = a text
        has to be the JSON text of a list.
      context: the turns are mere context: no turn of the agent among them is trained on.
      allow_empty: accept an agent turn without text.

    Raises: Drop for content that is not text. InputError for values of the wrong type and, unless `allow_empty`, for
      an agent turn without text.
    """
    value = row.get(field)
    if role is not None and isinstance(value, str):
        if value:
            return [Turn(role, read_text(value))]
        require(role == "user", f"{row.where}: {field}: found empty text, expected the text of the agent's turn")
        return []  # the agent opens the dialogue
    messages = as_list(value, row.repairs)
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise row.error(field, "a list of messages")
    return [
        _turn(message, f"{row.where}: {field}[{i}]", row.repairs, context, allow_empty)
        for i, message in enumerate(messages)
    ]


def read_request(row: Record, field: str) -> list[Turn]:
    """Read the turns of a prompt that the caller will reply to, and whose row can therefore not be dropped.

    Args:
      field: the field with the prompt, a text of the user or a list of messages; see also `with_tools`.

    Raises: InputError where `read_turns` raises InputError or Drop, and for a field without a message.
    """
    prompt = row.get(field)
    if isinstance(prompt, str):  # also an empty one
        row = Record({**row, field: [{"role": "user", "content": prompt}]}, row.where, row.repairs)
    elif not isinstance(prompt, list | tuple) or not prompt:
        raise row.error(field, "text or a list of messages")
    try:
        return with_tools(read_turns(row, field), row)
    except Drop as drop:
        raise InputError(f"{row.where}: {field}: found {drop}, expected messages of text") from drop


def read_dialogue(
    dialogue: str | Sequence[Turn | Mapping[str, Any]], where: str, field: str = "prompt"
) -> tuple[Turn, ...]:
    """Return the turns of a dialogue, which is a text (one user turn) or a list of turns or messages.

    Args:
      dialogue: the text or list.
      where: the start of error messages, such as "file:row".
      field: the field that holds the dialogue.
    Raises: InputError as `read_request` does.
    """
    given = dialogue if isinstance(dialogue, list | tuple) else ()
    messages = [messages_of([turn])[0] if isinstance(turn, Turn) else turn for turn in given]
    turns = read_request(Record({field: messages or dialogue}, where, Counter()), field)
    # A turn stays as it is: reading it as a message would drop its name.
    return tuple(own if isinstance(own, Turn) else read for own, read in zip(given or turns, turns, strict=True))


def with_tools(turns: Sequence[Turn], row: Record) -> list[Turn]:
    """Return the turns with a row's list of tools on the leading system turn, which is created if there is none.

    The column `tools` is a list of schemas, or JSON text of one; if it is empty or null, the turns stay as they are.
    """
    if row.get("tools") is None:
        return list(turns)
    has_system = bool(turns) and turns[0].role == "system"
    with at(row.where):
        leading = replace(turns[0] if has_system else Turn("system", ""), tools=row["tools"])
    return list(turns) if leading.tools is None else [leading, *turns[has_system:]]


def as_number(name: str, value: Any, repairs: Counter) -> float:
    """Return a finite number, which may also be written as text; true is 1 and false 0.

    Raises: InputError that starts with `name`; the caller puts the file and row before it.
    """
    if isinstance(value, str) and NUMBER.fullmatch(value.strip()):
        repairs[f"repaired: {name} written as text"] += 1
        value = float(value)
    elif isinstance(value, str):
        value = WORDS.get(value.strip().casefold(), value)
    if isinstance(value, bool):
        repairs[f"repaired: {name} true or false taken as 1 or 0"] += 1
        value = float(value)
    return finite(name, value)


def as_list(value: Any, repairs: Counter) -> Any:
    """Parse text that spells a list in JSON; return any other value unchanged."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = parse_json(value)
        except ValueError:
            return value
        repairs["repaired: list written as JSON text"] += 1
    return value


def _turn(message: Any, where: str, repairs: Counter, context: bool, allow_empty: bool) -> Turn:
    """Read one message; see `read_turns`.

    Args:
      where: "file:row: field[i]", the start of every error message.
      repairs: incremented for each repair, under a key that describes it.
    """
    if not isinstance(message, Mapping):
        raise InputError(f"{where}: found {shown(message)}, expected an object with role and content")
    fields = _named({name: value for name, value in message.items() if value is not None}, repairs)
    role = fields.setdefault("role")
    if context and role == "assistant":
        fields["trainable"] = False
    if role == "assistant" and fields.get("weight") in (0, 1) and fields.pop("weight") == 0:
        both = f"{where}.weight: found 0 together with trainable: true, expected only one of them"
        require(fields.setdefault("trainable", False) is not True, both)
        repairs["repaired: weight 0 read as trainable: false"] += 1
    if isinstance(fields.get("reward"), str):
        with at(where, "."):
            fields["reward"] = as_number("reward", fields["reward"], repairs)
    fields["content"] = _content(fields, repairs)
    thoughts = [fields.pop(name) for name in ("thinking", "reasoning_content") if name in fields]
    if thoughts:
        fields["thinking"] = _thought(thoughts, where)
    if "tool_calls" in fields:
        # Arrow adds every field that any row has to all rows, as null, so a null in a call means "absent".
        fields["tool_calls"] = _without_nulls(fields["tool_calls"] or None)
    if role == "assistant" and fields.get("trainable") is False and fields.pop("reward", None) is not None:
        repairs[REWARD_REMOVED] += 1
    for name in fields.keys() - (_TOOL_FIELDS if role == "tool" else _FIELDS):
        repairs[f"repaired: message field {shown(name)} left out"] += 1
        del fields[name]
    with at(where, "."):
        turn = Turn(**fields)
        # An empty text with sampled ids is a real action, the closing token; without ids, there is nothing to learn.
        spoke = turn.content or turn.token_ids or turn.tool_calls or allow_empty
        require(spoke or not turn.is_trainable, "content: found empty text, expected the text of the agent's turn")
    return turn


def _named(fields: dict[str, Any], repairs: Counter) -> dict[str, Any]:
    """Return the fields of a message under the field names, and with the names of roles, of this project."""
    for other, name in (("from", "role"), ("value", "content")):
        if other in fields and name not in fields:
            repairs[f"repaired: {other} read as {name}"] += 1
            fields[name] = fields.pop(other)
    role = fields.get("role")
    ours = _ROLE_NAMES.get(role.strip().casefold(), role) if isinstance(role, str) else role
    if ours != role:
        repairs[f"repaired: role {role!r} read as {ours!r}"] += 1
        fields["role"] = ours
    return fields


def _content(message: Mapping, repairs: Counter) -> Any:
    """Return the content of a message as one text; a number or the like is returned unchanged, and refused later.

    Raises: Drop if there is no content, or it is not text.
    """
    content = message.get("content")
    if isinstance(content, list | tuple):
        content = "".join(map(_part, content))
        repairs[PARTS_JOINED] += 1
    if content is None and message.get("tool_calls"):
        content = ""
    drop_if(content is None, "message without content")
    drop_if(isinstance(content, Mapping), "content that is not text")
    return read_text(content) if isinstance(content, str) else content


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise Drop(f"content part of type {shown(kind)}")


def _thought(values: Sequence[Any], where: str) -> str | None:
    """Return an agent's thought from the fields `thinking` and `reasoning_content`; None if no text is in them."""
    for value in values:
        if not isinstance(value, str | None):
            raise InputError(f"{where}.thinking: found {shown(value)}, expected text")
    thoughts = {read_text(value) for value in values if value}
    twice = f"{where}.thinking: found a text that differs from reasoning_content, expected only one of the two"
    require(len(thoughts) <= 1, twice)
    return thoughts.pop() if thoughts else None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [_without_nulls(inner) for inner in value]
    return value
