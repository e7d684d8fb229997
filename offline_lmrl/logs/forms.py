"""Read rows of logs, in several forms, as trajectories. Every repair and every dropped row is counted.

A row is one line of a data file, as a dict. These forms are read:

    messages: [{role, content, reward?, trainable?, token_ids?, behaviour_log_prob?}]     the project's own form
    messages, reward                one number for the whole conversation
    prompt, completion, reward      reward: a number, or null = not scored
    prompt, completion, label       label: true = 1.0, false = 0.0, null = not scored

`prompt` and `completion` are text (a user turn, an agent turn) or lists of messages. The score of a row goes to its
last agent turn. Agent turns in the prompt are context and have no score. The setting `data.reward` names another
column that holds the score. All forms may contain `terminated, group, task, source, labels`. Without a group, the
group of a row with a prompt is a hash of the prompt. Other columns are kept in `labels`, unless `labels` already has
an entry of that name. A row in which the agent abstained (`generate --threshold`) is dropped.

Other spellings are read too, and counted: `conversations` with `from` and `value` (ShareGPT), `response` for
`completion`, other names of roles, and numbers, true and false and lists written as text (a CSV file can hold nothing
else). `weight: 0` on a message of the agent means that it is not trained on.

Content that is a list of text parts is joined. Tool calls, a thought (`reasoning_content` or `thinking`), and a column
`tools` are stored apart from the text, for the chat template; the column goes to the leading system turn. A row is
dropped if one of its messages has neither content nor tool calls, or has content that is an object or has a part that
is not text. Any other value of the wrong type is an error.

In all functions, `where` is "file:row", the start of every error message, and `repairs` is a counter that is
incremented for each repair, under a key that describes it.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from offline_lmrl.errors import InputError, at, listed, shown
from offline_lmrl.logs.record import WORDS, Drop, Record, is_whole, read_text, thumb
from offline_lmrl.logs.trajectory import (
    OPTIONAL_TURN_FIELDS,
    ROLES,
    Trajectory,
    Turn,
    build_trajectory,
    finite,
    parse_json,
    read_labels,
    turn_from_record,
)

PARTS_JOINED = "repaired: text parts joined"
REWARD_REMOVED = "repaired: reward removed from an untrained turn"
ROW_REWARD = "repaired: reward of the row put on its last agent turn"
ABSTAINED = "the agent abstained, so there is no reply"

COMPARISON_FIELDS = (("chosen",), ("rejected",), ("responses", "ranks"), ("responses", "rank"), ("options", "target"))

DIALOGUES = ("messages", "conversations", "conversation")  # columns that hold a whole dialogue
COMPLETIONS = ("completion", "response")
_ROLE_NAMES = {
    **{role: role for role in ROLES},
    "developer": "system",
    "human": "user",
    "prompter": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "bot", "ai", "function_call"), "assistant"),
    **dict.fromkeys(("function", "function_response", "tool_response", "observation"), "tool"),
}
_MESSAGE_FIELDS = {"role", "content", "reasoning_content", *OPTIONAL_TURN_FIELDS}
_ROW_FIELDS = {"terminated", "group", "task", "source", "labels"}
_SCORE_NAMES = ("score", "rating", "label", "stars", "thumb", "thumbs", "feedback", "quality")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)


def read_row(row: Any, where: str, counts: Counter, reward: str | None = None) -> Trajectory | None:
    """Read the trajectory of one row in any accepted form; return None if the row is dropped.

    Args:
      row: the row, a dict from column names to values.
      where: "file:row", the start of every error message.
      counts: incremented for each repair of a kept row, under "repaired: ..." (or "kept: ..." for a row that lacks the
        column `reward`), or once for a dropped row, under "dropped: " and the reason.
      reward: the column (or entry of `labels`) that holds the score. None = `reward`, or `label` in a row with a
        prompt.

    Raises: InputError for comparisons, unknown forms and values of the wrong type.
    """
    if not isinstance(row, Mapping):
        raise InputError(f"{where}: row: found {shown(row)}, expected an object")
    present = {name for name, value in row.items() if value is not None}
    repairs: Counter = Counter()
    try:
        turns, group, used = _turns(row, present, where, repairs, reward)
        if "tools" in present:
            turns, used = with_tools(turns, row["tools"], where), used | {"tools"}
        if not any(turn.is_trainable for turn in turns) and _abstained(row, where):
            raise Drop(ABSTAINED)
    except Drop as drop:
        counts[f"dropped: {drop}"] += 1
        return None
    trajectory = build_trajectory(
        turns, {"group": group, **given_fields(Record(row, where, repairs), _ROW_FIELDS)}, where
    )
    extra = Record(row, where, repairs).columns(present - used - _ROW_FIELDS)
    counts.update(repairs)
    return replace(trajectory, labels={**extra, **trajectory.labels}) if extra else trajectory


def with_tools(turns: Sequence[Turn], tools: Any, where: str) -> list[Turn]:
    """Return the turns with a row's list of tools on the leading system turn, which is created if there is none.

    Args:
      tools: list of schemas, or JSON text of one; if it is empty, the turns stay as they are.
    """
    has_system = bool(turns) and turns[0].role == "system"
    with at(where):
        leading = replace(turns[0] if has_system else Turn("system", ""), tools=tools)
    return list(turns) if leading.tools is None else [leading, *turns[has_system:]]


def _abstained(row: Mapping, where: str) -> bool:
    """True if `generate --threshold` wrote the row and the agent abstained: its reply scored below the threshold."""
    with at(where):
        return read_labels(row.get("labels")).get("abstained") is True


def _turns(
    row: Mapping, present: set[str], where: str, repairs: Counter, reward: str | None
) -> tuple[list[Turn], str, set[str]]:
    """Read the turns of a row, with the score of the row as the reward of the agent's last turn.

    Args:
      present: the columns of the row that are not null.
      reward: the column that holds the score; None = `reward`, or `label` in a row with a prompt.
    Returns: the turns; the group, a hash of the prompt ("" for a row without a prompt); and the columns used.
    Raises: InputError for a comparison, an unknown form or a value of the wrong type.
    """
    for fields in COMPARISON_FIELDS:
        if set(fields) <= present:
            raise InputError(
                f"{where}: {fields[0]}: found a comparison, expected a scored row (messages, or prompt and completion "
                "with a reward or label); set data.preference, or call to_trajectories, to turn comparisons into "
                "scored rows"
            )
    dialogue = next((name for name in DIALOGUES if name in present), None)
    completion = next((name for name in COMPLETIONS if name in present), None)
    if dialogue is not None:
        turns, used = read_dialogue(row, dialogue, where, repairs)
        score = _score(row, turns, reward, where, repairs)
        return _scored(turns, score, dialogue, where, repairs), "", used | ({"reward"} if reward is None else set())
    if "prompt" in present and completion is not None:
        prompt = read_prompt(row["prompt"], where, repairs)
        turns = _completion(row[completion], where, completion, repairs)
        if completion != "completion":
            repairs[f"repaired: column {completion!r} read as completion"] += 1
        if not any(turn.is_trainable for turn in turns):
            raise InputError(f"{where}: {completion}: found no agent turn, expected at least one")
        scored = _scored(turns, _prompt_score(row, turns, where, repairs, reward), completion, where, Counter())
        used = {"prompt", completion} | ({"reward"} if reward is None else set())
        return [*prompt, *scored], _prompt_group(prompt), used
    found = listed(sorted(present)) or "none"
    raise InputError(
        f"{where}: fields: found {found}, expected messages, or prompt and completion with a reward or label"
    )


def read_dialogue(row: Mapping, name: str, where: str, repairs: Counter) -> tuple[list[Turn], set[str]]:
    """Read the turns of a column that holds a dialogue; return them and the names of the columns that were used.

    A ShareGPT row may have its system text in the column `system`; this text then becomes the first turn.

    Args:
      name: the column, one of DIALOGUES.
    """
    turns, used = read_messages(row[name], where, name, repairs), {name}
    if name != "messages" and isinstance(row.get("system"), str) and not any(turn.role == "system" for turn in turns):
        used.add("system")
        if row["system"]:
            repairs["repaired: column 'system' read as the first turn"] += 1
            turns.insert(0, Turn("system", read_text(row["system"])))
    return turns, used


def read_prompt(value: Any, where: str, repairs: Counter) -> list[Turn]:
    """Read the turns of a prompt. Agent turns among them are context (trainable = False).

    Args:
      value: text (a user turn; "" = no turn) or a list of messages.
    """
    if isinstance(value, str):
        return [Turn("user", read_text(value))] if value else []  # without a prompt the agent opens
    if isinstance(value, Sequence):
        value = [
            {**message, "trainable": False}
            if isinstance(message, Mapping) and _role(message) == "assistant"
            else message
            for message in value
        ]
    return read_messages(value, where, "prompt", repairs)


def _completion(value: Any, where: str, field: str, repairs: Counter) -> list[Turn]:
    if not isinstance(value, str):
        return read_messages(value, where, field, repairs)
    if not value:
        raise InputError(f"{where}: {field}: found empty text, expected the text of the agent's turn")
    return [Turn("assistant", read_text(value))]


def _prompt_score(
    row: Mapping, turns: Sequence[Turn], where: str, repairs: Counter, reward: str | None
) -> float | None:
    """Return the score of a row with a prompt; None = not scored.

    Raises: InputError if `reward` is None and the row has neither the column `reward` nor `label`, not even as null.
    """
    if reward is None and "reward" not in row and "label" not in row:
        known = {*_ROW_FIELDS, "prompt", *COMPLETIONS}
        columns = likely_scores(name for name, value in row.items() if name not in known and is_score(value))
        raise InputError(
            f"{where}: reward: found neither reward nor label, expected one of them (null = not scored)"
            f"{reward_hint(columns)}"
        )
    score = _score(row, turns, reward, where, repairs)
    label = None if reward is not None else thumb(row.get("label"), "label", where, repairs)
    return float(label) if score is None and label is not None else score


def _score(row: Mapping, turns: Sequence[Turn], column: str | None, where: str, repairs: Counter) -> float | None:
    """Return the score of a row, a number; true counts 1 and false 0. None = not scored.

    Rows that `prepare` wrote have the named column in their labels, and their turns already have the rewards. For such
    a row the result is None.

    Args:
      turns: the turns read from the row.
      column: the column that holds the score; None = `reward`.
    """
    name = "reward" if column is None else column
    value = row.get(name)
    with at(where):
        if column is not None and name not in row:
            value = read_labels(row.get("labels")).get(name)
            if value is None:
                repairs[no_score(name)] += 1
            elif any(turn.reward is not None for turn in turns):
                return None
        return None if value is None else as_number(name, value, repairs)


def no_score(name: str) -> str:
    """Return the key under which rows without the column `name`, which should hold the score, are counted."""
    return f"kept: no {name!r} in the row, so it is not scored"


def is_score(value: Any) -> bool:
    """True for a number or a truth value, which may be written as text."""
    if isinstance(value, str):
        return bool(_NUMBER.fullmatch(value.strip())) or value.strip().casefold() in WORDS
    return isinstance(value, int | float)


def likely_scores(names: Iterable[str]) -> list[str]:
    """Return the columns whose name suggests a score; if there are none, the first three columns.

    Args:
      names: columns whose values can be scores (`is_score`).
    """
    names = list(names)
    return [name for name in names if name.casefold() in _SCORE_NAMES] or names[:3]


def reward_hint(columns: Sequence[str]) -> str:
    """Return the end of an error message about a missing score: which setting reads the score from another column.

    Args:
      columns: columns that may hold the score; none = no hint, "".
    """
    if not columns:
        return ""
    first, *others = map(shown, columns)
    also = f" (or {', '.join(others)})" if others else ""
    return (
        f"; column {first}{also} may hold the score: use --data.reward {first}, "
        f"or --reward {first} for check and evaluate"
    )


def _scored(turns: list[Turn], score: float | None, field: str, where: str, repairs: Counter) -> list[Turn]:
    """Return the turns with the row's score, if there is one, as the reward of the agent's last turn.

    Args:
      field: the column that the turns are from, for error messages.
    Raises: InputError if a turn already has a reward.
    """
    agent = [i for i, turn in enumerate(turns) if turn.is_trainable]
    if score is None or not agent:
        return turns
    rewarded = [i for i in agent if turns[i].reward is not None]
    if rewarded:
        raise InputError(
            f"{where}: reward: found one for the row and another in {field}[{rewarded[0]}], expected only one"
        )
    repairs[ROW_REWARD] += 1
    turns[agent[-1]] = replace(turns[agent[-1]], reward=score)
    return turns


def as_number(name: str, value: Any, repairs: Counter) -> float:
    """Return a finite number, which may also be written as text; true is 1 and false 0.

    Raises: InputError that starts with `name`; the caller puts the file and row before it.
    """
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        repairs[f"repaired: {name} written as text"] += 1
        value = float(value)
    elif isinstance(value, str) and value.strip().casefold() in WORDS:
        value = WORDS[value.strip().casefold()]
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


def given_fields(row: Record, names: Collection[str]) -> dict[str, Any]:
    """Return {name: value} for the named fields of a row, without those that are missing or null.

    Values are converted: a whole number under group, task or source to text, text under `terminated` to true or false,
    and text under `weight` to a number.

    Raises: InputError if a text under `terminated` or `weight` cannot be converted.
    """
    given = {name: row[name] for name in names if row.get(name) is not None}
    for name in ("group", "task", "source"):
        if is_whole(given.get(name)):
            row.repairs[f"repaired: {name} given as a number, read as text"] += 1
            given[name] = str(int(given[name]))
    if isinstance(given.get("terminated"), str | int):
        given["terminated"] = row.thumb("terminated")
    if isinstance(given.get("weight"), str):
        with at(row.where):
            given["weight"] = as_number("weight", given["weight"], row.repairs)
    return given


def read_messages(messages: Any, where: str, field: str, repairs: Counter, allow_empty: bool = False) -> list[Turn]:
    """Read the turns of a list of messages.

    Args:
      messages: list of dicts with role and content, or JSON text of such a list.
      field: the column that holds the messages, for error messages.
      allow_empty: accept an agent turn without text.

    Raises: Drop for content that is not text. InputError for values of the wrong type and, unless `allow_empty`, for
      an agent turn without text.
    """
    messages = as_list(messages, repairs)
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise InputError(f"{where}: {field}: found {shown(messages)}, expected a list of messages")
    return [_turn(message, f"{where}: {field}[{i}]", repairs, allow_empty) for i, message in enumerate(messages)]


def prompt_messages(messages: Any, where: str, field: str) -> list[Turn]:
    """Read the messages of a prompt that the caller will reply to, and whose row can therefore not be dropped.

    Args: see `read_messages`.
    Raises: InputError where `read_messages` raises InputError or Drop.
    """
    try:
        return read_messages(messages, where, field, Counter())
    except Drop as drop:
        raise InputError(f"{where}: {field}: found {drop}, expected messages of text") from drop


def _turn(message: Any, where: str, repairs: Counter, allow_empty: bool) -> Turn:
    if not isinstance(message, Mapping):
        raise InputError(f"{where}: found {shown(message)}, expected an object with role and content")
    message = _named(message, where, repairs)
    plain = {**message, "content": _content(message, repairs), "thinking": _thought(message, where)}
    if plain.get("tool_calls") and not isinstance(plain["tool_calls"], str):
        # Arrow adds every field that any row has to all rows, as null, so a null in a call means "absent".
        plain["tool_calls"] = _without_nulls(plain["tool_calls"])
    elif not plain.get("tool_calls"):
        plain.pop("tool_calls", None)
    if plain.get("role") == "assistant" and plain.get("trainable") is False and plain.get("reward") is not None:
        repairs[REWARD_REMOVED] += 1
        del plain["reward"]
    left_out = message.keys() - _MESSAGE_FIELDS
    if message.get("role") != "tool":  # templates print names of tools only
        left_out |= message.keys() & {"name", "tool_call_id"}
    for name in left_out:
        plain.pop(name)
        if message[name] is not None:
            repairs[f"repaired: message field {shown(name)} left out"] += 1
    return turn_from_record(plain, where, allow_empty)


def _named(message: Mapping, where: str, repairs: Counter) -> dict[str, Any]:
    """Return a message without null fields, and with the field names and roles of this project.

    Handles ShareGPT's `from` and `value`, other names of roles, `weight`, and rewards written as text.
    """
    message = {name: value for name, value in message.items() if value is not None}
    for other, name in (("from", "role"), ("value", "content")):
        if other in message and name not in message:
            repairs[f"repaired: {other} read as {name}"] += 1
            message[name] = message.pop(other)
    role = _role(message)
    if role != message.get("role"):
        repairs[f"repaired: role {message['role']!r} read as {role!r}"] += 1
        message["role"] = role
    if message.get("weight") in (0, 1) and role == "assistant":
        if message.pop("weight") == 0:
            if message.setdefault("trainable", False) is True:
                raise InputError(f"{where}.weight: found 0 together with trainable: true, expected only one of them")
            repairs["repaired: weight 0 read as trainable: false"] += 1
    if isinstance(message.get("reward"), str):
        try:
            message["reward"] = as_number("reward", message["reward"], repairs)
        except InputError as error:
            raise InputError(f"{where}.{error}") from error
    return message


def _role(message: Mapping) -> Any:
    """Return this project's name for the role of a message, or the role unchanged if it is unknown."""
    role = message.get("role", message.get("from"))
    return _ROLE_NAMES.get(role.strip().casefold(), role) if isinstance(role, str) else role


def _content(message: Mapping, repairs: Counter) -> Any:
    """Return the content of a message as one text; a number or the like is returned unchanged, and refused later.

    Raises: Drop if there is no content, or it is not text.
    """
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
    """Return an agent's thought from the field `thinking` or `reasoning_content`; None if it is missing or empty."""
    thoughts = {message[name] for name in ("thinking", "reasoning_content") if isinstance(message.get(name), str)}
    thoughts = {thought for thought in map(read_text, thoughts) if thought}
    if len(thoughts) > 1:
        raise InputError(
            f"{where}.thinking: found a text that differs from reasoning_content, expected only one of the two"
        )
    return thoughts.pop() if thoughts else None


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise Drop(f"content part of type {shown(kind)}")


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [_without_nulls(inner) for inner in value]
    return value


def _prompt_group(prompt: Sequence[Turn]) -> str:
    text = json.dumps([turn.spoken for turn in prompt])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
