"""A scored dialogue or game: `Turn`, `Trajectory`, and their form on disk.

A trajectory is one episode of an agent that acts by text. The turns on which a model is trained are `trainable`, by
default those of the agent. Only a trainable turn may have a reward, in the raw units of the log. A record is the same
data as one plain dict, without loss, as stored in one line of JSON Lines or one row of Parquet.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from numbers import Integral, Real
from typing import Any

from offline_lmrl.errors import InputError, shown

ROLES = ("system", "user", "assistant", "tool", "environment")
OPTIONAL_TURN_FIELDS = (
    "trainable",
    "reward",
    "token_ids",
    "behaviour_log_prob",
    "thinking",
    "tool_calls",
    "tools",
    "name",
    "tool_call_id",
)
LARGEST_NUMBER = 1e30
MAX_NESTING = 200  # trees of replies nest two levels per turn; JSON, pickle and repr fail at a depth near 900


@dataclass(frozen=True)
class Turn:
    """One uninterrupted contribution of one speaker.

    Attributes:
      role: the speaker, one of ROLES.
      content: the text, unchanged; may be empty.
      trainable: True: an action of the agent, whose tokens are trained on. False: context only. None means
        (role == "assistant").
      reward: the reward that the turn earned, finite, only on trainable turns; None = not scored, counts as 0.
      token_ids: the ids as sampled, closing token included; None = unknown. Encoding the text may give other ids.
      behaviour_log_prob: log-probability of each of `token_ids` under the policy that sampled them, in nats.
      thinking: the agent's thought before its words, if the log stores it separately (`reasoning_content`,
        `thinking`).
      tool_calls: the agent's tool calls as JSON text of a list of {"function": {"name", "arguments"}, "id"?}; a list
        is also accepted. The chat template prints them.
      tools: on a leading system turn, the schemas of the tools available in the dialogue, as JSON text or a list. If
        the content is empty, the turn is not a system text but only holds the tools.
      name: on a tool's turn, the name of the tool.
      tool_call_id: on a tool's turn, the id of the call that it answers.

    Raises: InputError that names the invalid field.
    """

    role: str
    content: str
    trainable: bool | None = None
    reward: float | None = None
    token_ids: tuple[int, ...] | None = None
    behaviour_log_prob: tuple[float, ...] | None = None
    thinking: str | None = None
    tool_calls: str | None = None
    tools: str | None = None
    name: str | None = None
    tool_call_id: str | None = None

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise InputError(f"role: found {shown(self.role)}, expected one of {', '.join(ROLES)}")
        require_text("content", self.content)
        if not isinstance(self.trainable, bool | None):
            raise InputError(f"trainable: found {shown(self.trainable)}, expected true, false or null")
        if self.reward is not None:
            reward = finite("reward", self.reward)
            if not self.is_trainable:
                whose = "a" if self.trainable is None else "an untrained"
                raise InputError(
                    f"reward: found {reward} on {whose} turn of role {self.role!r}, "
                    "expected rewards only on the agent turn that earned them"
                )
            object.__setattr__(self, "reward", reward)
        if self.token_ids is not None:
            object.__setattr__(self, "token_ids", _token_ids(self.token_ids))
        if self.behaviour_log_prob is not None:
            values = require_list("behaviour_log_prob", self.behaviour_log_prob)
            log_prob = tuple(finite("behaviour_log_prob", value) for value in values)
            object.__setattr__(self, "behaviour_log_prob", log_prob)
            if self.token_ids is not None and len(log_prob) != len(self.token_ids):
                raise InputError(
                    f"behaviour_log_prob: found {len(log_prob)} for {len(self.token_ids)} token_ids, "
                    "expected one for each token id"
                )
        for name, role in (
            ("thinking", "assistant"),
            ("tool_calls", "assistant"),
            ("tools", "system"),
            ("name", None),
            ("tool_call_id", None),
        ):
            value = vars(self)[name]
            if value is None:
                continue
            if role not in (None, self.role):
                raise InputError(
                    f"{name}: found a value on a turn of role {self.role!r}, expected one only on role {role!r}"
                )
            if name in ("tool_calls", "tools"):
                object.__setattr__(self, name, _objects_text(name, value))
            else:
                require_text(name, value)

    @property
    def is_trainable(self) -> bool:
        """True if the turn is an action of the agent: its tokens are trained on, and it may have a reward."""
        return self.role == "assistant" if self.trainable is None else self.trainable

    @property
    def spoken(self) -> tuple[str, ...]:
        """The role and all text (content, thought, tool calls, tools), by which turns are compared."""
        apart = (self.thinking or "", self.tool_calls or "", self.tools or "")
        return (self.role, self.content, *(apart if any(apart) else ()))


@dataclass(frozen=True)
class Trajectory:
    """One episode.

    Attributes:
      turns: at least one.
      terminated: True: the episode ended by itself. False: it was cut off, so the return after its last turn is
        estimated by V and not 0.
      group: a key of the prompt or conversation that the episode is about; "" = unknown. Trajectories of one group
        always go to the same split (train, validation or test).
      task: the name of the task; few-shot demonstrations of an episode may be chosen by it. "" = unknown.
      source: the name of the data set, file or player that the episode is from.
      labels: raw human signals and private facts by name, as values that JSON can store; never shown to a model.

    Raises: InputError that names the invalid field.
    """

    turns: tuple[Turn, ...]
    terminated: bool = True
    group: str = ""
    task: str = ""
    source: str = ""
    labels: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "turns", tuple(self.turns))
        if not self.turns:
            raise InputError("turns: found none, expected at least one")
        for turn in self.turns:
            if not isinstance(turn, Turn):
                raise InputError(f"turns: found {shown(turn)}, expected Turn objects")
        if not isinstance(self.terminated, bool):
            raise InputError(f"terminated: found {shown(self.terminated)}, expected true or false")
        for name in ("group", "task", "source"):
            require_text(name, vars(self)[name])
        require_labels(self.labels)

    @property
    def total_return(self) -> float:
        """The undiscounted sum of the rewards; an unscored turn counts as 0."""
        return math.fsum(turn.reward for turn in self.turns if turn.reward is not None)


def to_record(trajectory: Trajectory) -> dict[str, Any]:
    """Return the trajectory as a record: turns as messages without None fields, and labels as JSON text.

    Raises: InputError if the labels cannot be written as JSON.
    """
    return {
        "messages": messages_of(trajectory.turns),
        "terminated": trajectory.terminated,
        "group": trajectory.group,
        "task": trajectory.task,
        "source": trajectory.source,
        "labels": labels_text(trajectory.labels),
    }


def messages_of(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Return turns as plain dicts, without fields that are None."""
    messages = []
    for turn in turns:
        message: dict[str, Any] = {"role": turn.role, "content": turn.content}
        for name in OPTIONAL_TURN_FIELDS:
            value = vars(turn)[name]
            if value is not None:
                message[name] = list(value) if isinstance(value, tuple) else value
        messages.append(message)
    return messages


def labels_text(labels: Mapping[str, Any]) -> str:
    """Return labels as JSON text; `read_labels` is the inverse.

    Raises: InputError for values that JSON cannot store.
    """
    try:
        return json.dumps(dict(labels), sort_keys=True)
    except (TypeError, ValueError) as error:
        raise InputError(f"labels: found {error}, expected values that JSON can hold") from error


def leading_system_turns(turns: Sequence[Turn]) -> int:
    """Return the number of system turns at the start, which stay in a model's input when old turns are left out."""
    return next((i for i, turn in enumerate(turns) if turn.role != "system"), len(turns))


def as_context(turns: Iterable[Turn]) -> list[Turn]:
    """Return the turns as mere context: none of them is trainable, and none has a reward."""
    return [replace(turn, trainable=False, reward=None) if turn.is_trainable else turn for turn in turns]


def with_own_token_ids(trajectory: Trajectory, fingerprint: str) -> Trajectory:
    """Return the trajectory with its sampled token ids if this renderer understands them, else a copy without them.

    A renderer turns dialogues into token ids, by a tokenizer and a chat format. `labels["tokenizer"]` is the
    fingerprint of the renderer with which the ids were sampled; ids of unknown origin are removed. The
    log-probabilities of removed ids are removed too.

    Args:
      fingerprint: the fingerprint of the renderer that will be used.
    """
    if trajectory.labels.get("tokenizer") == fingerprint or all(turn.token_ids is None for turn in trajectory.turns):
        return trajectory
    return replace(
        trajectory, turns=tuple(replace(turn, token_ids=None, behaviour_log_prob=None) for turn in trajectory.turns)
    )


def parse_json(text: str) -> Any:
    """Return the value of JSON text.

    Raises: ValueError, with a short reason, for text that does not parse or is nested deeper than MAX_NESTING.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    if nests_too_deep(value):
        raise ValueError(f"nested deeper than {MAX_NESTING} levels")
    return value


def nests_too_deep(value: Any) -> bool:
    """True if lists and objects are nested more than MAX_NESTING levels deep."""
    level = [value] if isinstance(value, list | tuple | dict) else []
    for _ in range(MAX_NESTING):
        if not level:
            return False
        level = [
            inner
            for one in level
            for inner in (one.values() if isinstance(one, dict) else one)
            if isinstance(inner, list | tuple | dict)
        ]
    return bool(level)


def names_in(value: Any) -> Iterator[Any]:
    """Yield the keys of all objects (dicts) inside a JSON value, at every level."""
    level = [value]
    while level:
        objects = [one for one in level if isinstance(one, dict)]
        yield from chain.from_iterable(objects)
        level = [
            inner
            for one in level
            if isinstance(one, list | dict)
            for inner in (one.values() if isinstance(one, dict) else one)
        ]


def require_labels(labels: Any) -> None:
    """Check that labels are an object that can be written and read again.

    Raises: InputError for labels that are not an object, or are nested so deep that they could not be read again.
    """
    if not isinstance(labels, Mapping):
        raise InputError(f"labels: found {shown(labels)}, expected an object")
    if nests_too_deep(dict(labels)):
        raise InputError(f"labels: found nesting deeper than {MAX_NESTING} levels, expected less nesting")


def require_text(name: str, value: Any) -> None:
    """Check that a value is text that UTF-8 can encode (JSON text can contain half a surrogate pair).

    Args:
      name: the field that the error message names.
    Raises: InputError if it is not.
    """
    if not isinstance(value, str):
        raise InputError(f"{name}: found {shown(value)}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{name}: found half a surrogate pair at character {error.start}, expected text") from error


def finite(name: str, value: Any) -> float:
    """Return the value as a float.

    Args:
      name: the field that the error message names.
    Raises: InputError unless it is a finite number of at most LARGEST_NUMBER in size, so that sums of such numbers,
      and training in 32 bits, do not overflow.
    """
    if isinstance(value, bool) or not isinstance(value, float | Real):  # float first, since Real is ten times slower
        raise InputError(f"{name}: found {shown(value)}, expected a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise InputError(f"{name}: found {number}, expected a finite number")
    if abs(number) > LARGEST_NUMBER:
        raise InputError(f"{name}: found {number}, expected a number up to {LARGEST_NUMBER:g}")
    return number


def require_list(name: str, value: Any) -> Sequence:
    """Return the value itself if it is a sequence other than text, such as a list or a tuple.

    Args:
      name: the field that the error message names.
    Raises: InputError if it is not.
    """
    if not isinstance(value, list | tuple | Sequence) or isinstance(value, str):
        raise InputError(f"{name}: found {shown(value)}, expected a list")
    return value


def _token_ids(value: Any) -> tuple[int, ...]:
    for token in require_list("token_ids", value):
        if isinstance(token, bool) or not isinstance(token, int | Integral) or not 0 <= token < 2**31:
            raise InputError(f"token_ids: found {shown(token)}, expected integers from 0 to 2³¹ − 1")
    return tuple(int(token) for token in value)


def _objects_text(name: str, value: Any) -> str | None:
    """Return a list of objects, given as a list or as JSON text, as JSON text; keys keep their order.

    Args:
      name: the field of the turn, "tool_calls" or "tools".
    Returns: the text, or None for an empty list.
    Raises: InputError if the value is not a list of objects, or a tool call has no name.
    """
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError as error:
            raise InputError(f"{name}: found text that is not JSON ({error}), expected a list of objects") from error
    if not isinstance(value, list | tuple) or not all(isinstance(item, Mapping) for item in value):
        raise InputError(f"{name}: found {shown(value)}, expected a list of objects")
    if name == "tool_calls":
        for call in value:
            function = call.get("function", call)
            if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
                raise InputError(f"{name}: found {shown(call)}, expected an object with function.name")
    try:
        text = json.dumps(list(value), ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: found {error}, expected values that JSON can hold") from error
    require_text(name, text)
    return text if value else None


def read_labels(value: Any) -> dict[str, Any]:
    """Return labels given as JSON text, an object or null.

    Raises: InputError for anything else.
    """
    if isinstance(value, str) and value:
        try:
            value = parse_json(value)
        except ValueError as error:
            raise InputError(f"labels: found text that is not JSON ({error}), expected a JSON object") from error
    if not isinstance(value or {}, Mapping):
        raise InputError(f"labels: found {shown(value)}, expected an object")
    return dict(value or {})


def message_of(turn: Turn) -> dict[str, Any]:
    """Return a turn as a message for chat templates.

    A thought is stored under both names that templates use, `thinking` and `reasoning_content`.
    """
    message: dict[str, Any] = {"role": turn.role, "content": turn.content}
    if turn.thinking is not None:
        message |= {"reasoning_content": turn.thinking, "thinking": turn.thinking}
    if turn.tool_calls is not None:
        message["tool_calls"] = [_call(call) for call in json.loads(turn.tool_calls)]
    return message | {name: vars(turn)[name] for name in ("name", "tool_call_id") if vars(turn)[name]}


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tool call as {"type", "function": {"name", "arguments"}}.

    If the arguments are JSON text of an object, they become that object.
    """
    function = dict(call.get("function") or call)
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except ValueError:
            parsed = arguments
        arguments = parsed if isinstance(parsed, dict) else arguments
    outer = {name: call[name] for name in ("id",) if call.get(name) is not None}
    return {"type": "function", **outer, "function": function | {"arguments": arguments}}
