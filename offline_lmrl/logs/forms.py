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
an entry of that name. A row in which the agent abstained (`generate --threshold`) is dropped, and so is a line of
`serve --log` without messages (a refused request, or a log without texts).

Other spellings are read too, and counted: `conversations` with `from` and `value` (ShareGPT), `response` for
`completion`, other names of roles, and numbers, true and false and lists written as text (a CSV file can hold nothing
else). `weight: 0` on a message of the agent means that it is not trained on.

Content that is a list of text parts is joined. Tool calls, a thought (`reasoning_content` or `thinking`), and a column
`tools` are stored apart from the text, for the chat template; the column goes to the leading system turn. A row is
dropped if one of its messages has neither content nor tool calls, or has content that is an object or has a part that
is not text. Any other value of the wrong type is an error.

How messages are read is described in `messages`.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from offline_lmrl.errors import InputError, at, listed, require, shown
from offline_lmrl.logs.messages import DIALOGUES, NUMBER, as_number, read_turns, with_tools
from offline_lmrl.logs.record import WORDS, Drop, Record, drop_if, is_whole, read_text
from offline_lmrl.logs.trajectory import Trajectory, Turn, read_labels

ROW_REWARD = "repaired: reward of the row put on its last agent turn"
ABSTAINED = "the agent abstained, so there is no reply"
NOT_ANSWERED = "a served request without messages and a reply"

COMPARISON_FIELDS = (("chosen",), ("rejected",), ("responses", "ranks"), ("responses", "rank"), ("options", "target"))

COMPLETIONS = ("completion", "response")
_ROW_FIELDS = {"terminated", "group", "task", "source", "labels"}
_SCORE_NAMES = ("score", "rating", "label", "stars", "thumb", "thumbs", "feedback", "quality")

Made = TypeVar("Made")


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

    def read(row: Record) -> Trajectory:
        turns, group, used = _turns(row, reward)
        turns = with_tools(turns, row)
        drop_if(not any(turn.is_trainable for turn in turns) and labels_of(row).get("abstained") is True, ABSTAINED)
        return build_trajectory(row, turns, {"group": group}, _ROW_FIELDS, used | {"tools"})

    return read_or_drop(read, row, where, counts)


def read_or_drop(read: Callable[[Record], Made], row: Any, where: str, counts: Counter) -> Made | None:
    """Read a row, which has to be an object, and count its repairs, or return None and count why it is dropped.

    Args:
      read: reads the row; raises Drop to leave it out.
      row: the row.
      where: "file:row", the start of every error message.
      counts: incremented for each repair of a kept row, or once for a dropped row.
    """
    if not isinstance(row, Mapping):
        raise InputError(f"{where}: row: found {shown(row)}, expected an object")
    record = Record(row, where, Counter())
    try:
        made = read(record)
    except Drop as drop:
        counts[f"dropped: {drop}"] += 1
        return None
    counts.update(record.repairs)
    return made


def build_trajectory(
    row: Record, turns: Sequence[Turn], default: Mapping[str, Any], given: Collection[str], used: Collection[str]
) -> Trajectory:
    """Build a trajectory of turns and the other columns of a row.

    Args:
      default: values of the trajectory's fields, if the row has none.
      given: the columns that are fields of the trajectory; see `given_fields`.
      used: further columns that were used. All others are kept in the labels, unless those have an entry of that name.
    Raises: InputError for an invalid field, or if no turn is trainable.
    """
    fields = {**default, **given_fields(row, given)}
    with at(row.where):
        labels = {**row.others({*given, *used}), **read_labels(fields.pop("labels", None))}
        made = Trajectory(tuple(turns), labels=labels, **fields)
        if not any(turn.is_trainable for turn in turns):
            roles = ", ".join(dict.fromkeys(turn.role for turn in turns))
            raise InputError(f"messages: found only untrained turns ({roles}), expected at least one agent turn")
    return made


def labels_of(row: Record) -> dict[str, Any]:
    """Return the column `labels` of a row, which may be JSON text; {} if there is none."""
    with at(row.where):
        return read_labels(row.get("labels"))


def _turns(row: Record, reward: str | None) -> tuple[list[Turn], str, set[str]]:
    """Read the turns of a row, with the score of the row as the reward of the agent's last turn.

    Args:
      reward: the column that holds the score; None = `reward`, or `label` in a row with a prompt.
    Returns: the turns; the group, a hash of the prompt ("" for a row without a prompt); and the columns used.
    Raises: InputError for a comparison, an unknown form or a value of the wrong type.
    """
    for fields in COMPARISON_FIELDS:
        if row.present.issuperset(fields):
            raise InputError(
                f"{row.where}: {fields[0]}: found a comparison, expected a scored row (messages, or prompt and "
                "completion with a reward or label); set data.preference, or call to_trajectories, to turn "
                "comparisons into scored rows"
            )
    dialogue = next((name for name in DIALOGUES if name in row.present), None)
    drop_if(dialogue is None and "served" in row.present, NOT_ANSWERED)
    completion = next((name for name in COMPLETIONS if name in row.present), None)
    used = {"reward"} if reward is None else set()
    if dialogue is not None:
        turns, columns = read_dialogue(row, dialogue)
        return _scored(row, dialogue, turns, _score(row, turns, reward)), "", used | columns
    if "prompt" in row.present and completion is not None:
        prompt = read_turns(row, "prompt", "user", context=True)
        turns = read_turns(row, completion, "assistant")
        row.count(f"repaired: column {completion!r} read as completion", completion != "completion")
        require(
            any(turn.is_trainable for turn in turns),
            f"{row.where}: {completion}: found no agent turn, expected at least one",
        )
        turns = [*prompt, *_scored(row, completion, turns, _prompt_score(row, turns, reward))]
        return turns, _prompt_group(prompt), used | {"prompt", completion}
    found = listed(sorted(row.present)) or "none"
    raise InputError(
        f"{row.where}: fields: found {found}, expected messages, or prompt and completion with a reward or label"
    )


def read_dialogue(row: Record, name: str) -> tuple[list[Turn], set[str]]:
    """Read the turns of a column that holds a dialogue; return them and the names of the columns that were used.

    A ShareGPT row may have its system text in the column `system`; this text then becomes the first turn.

    Args:
      name: the column, one of DIALOGUES.
    """
    turns, system = read_turns(row, name), row.get("system")
    if name == "messages" or not isinstance(system, str) or any(turn.role == "system" for turn in turns):
        return turns, {name}
    row.count("repaired: column 'system' read as the first turn", system)
    return [*([Turn("system", read_text(system))] if system else []), *turns], {name, "system"}


def _prompt_score(row: Record, turns: Sequence[Turn], reward: str | None) -> float | None:
    """Return the score of a row with a prompt; None = not scored.

    Raises: InputError if `reward` is None and the row has neither the column `reward` nor `label`, not even as null.
    """
    if reward is None and "reward" not in row and "label" not in row:
        known = {*_ROW_FIELDS, "prompt", *COMPLETIONS}
        columns = likely_scores(name for name, value in row.items() if name not in known and is_score(value))
        raise InputError(
            f"{row.where}: reward: found neither reward nor label, expected one of them (null = not scored)"
            f"{reward_hint(columns)}"
        )
    score = _score(row, turns, reward)
    label = None if reward is not None else row.thumb("label")
    return float(label) if score is None and label is not None else score


def _score(row: Record, turns: Sequence[Turn], column: str | None) -> float | None:
    """Return the score of a row, a number; true counts 1 and false 0. None = not scored.

    Rows that `prepare` wrote have the named column in their labels, and their turns already have the rewards. For such
    a row the result is None.

    Args:
      turns: the turns read from the row.
      column: the column that holds the score; None = `reward`.
    """
    name = "reward" if column is None else column
    value = row.get(name)
    if column is not None and name not in row:
        value = labels_of(row).get(name)
        row.count(no_score(name), value is None)
        if value is not None and any(turn.reward is not None for turn in turns):
            return None
    if value is None:
        return None
    with at(row.where):
        return as_number(name, value, row.repairs)


def no_score(name: str) -> str:
    """Return the key under which rows without the column `name`, which should hold the score, are counted."""
    return f"kept: no {name!r} in the row, so it is not scored"


def is_score(value: Any) -> bool:
    """True for a number or a truth value, which may be written as text."""
    if isinstance(value, str):
        return bool(NUMBER.fullmatch(value.strip())) or value.strip().casefold() in WORDS
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


def _scored(row: Record, field: str, turns: list[Turn], score: float | None) -> list[Turn]:
    """Return the turns with the row's score, if there is one, as the reward of the agent's last turn.

    Args:
      field: the column that the turns are from, for error messages.
    Raises: InputError if a turn already has a reward.
    """
    agent = [i for i, turn in enumerate(turns) if turn.is_trainable]
    if score is None or not agent:
        return turns
    for i in agent:
        if turns[i].reward is not None:
            raise InputError(
                f"{row.where}: reward: found one for the row and another in {field}[{i}], expected only one"
            )
    row.count(ROW_REWARD, field in DIALOGUES)  # rows of the other form have no place for it but a column
    turns[agent[-1]] = replace(turns[agent[-1]], reward=score)
    return turns


def given_fields(row: Record, names: Collection[str]) -> dict[str, Any]:
    """Return {name: value} for the named fields of a row, without those that are missing or null.

    Values are converted: a whole number under group, task or source to text, text under `terminated` to true or false,
    and text under `weight` to a number.

    Raises: InputError if a text under `terminated` or `weight` cannot be converted.
    """
    given = {name: row[name] for name in names if row.get(name) is not None}
    for name in ("group", "task", "source"):
        if is_whole(given.get(name)):
            row.count(f"repaired: {name} given as a number, read as text")
            given[name] = str(int(given[name]))
    if isinstance(given.get("terminated"), str | int):
        given["terminated"] = row.thumb("terminated")
    if isinstance(given.get("weight"), str):
        with at(row.where):
            given["weight"] = as_number("weight", given["weight"], row.repairs)
    return given


def _prompt_group(prompt: Sequence[Turn]) -> str:
    text = json.dumps([turn.spoken for turn in prompt])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
