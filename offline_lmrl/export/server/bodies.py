"""Read the bodies of requests, in the form of OpenAI's API, with the fields of DecodingConfig beside its own.

A field that does not exist, has a wrong value, or asks for something that this server cannot do is refused by name,
so that no reply is written in another way than was asked for.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import NoneType
from typing import Any, get_args

from offline_lmrl.decoding.config import DecodingConfig
from offline_lmrl.errors import InputError, require, shown
from offline_lmrl.logs.messages import read_request
from offline_lmrl.logs.record import Record
from offline_lmrl.logs.trajectory import Turn, parse_json
from offline_lmrl.settings import REQUIRED, arguments, parameters_of

MOST_TOP = 20  # alternatives per token, as in OpenAI's API
MOST_STOPS = 16  # stop texts; each is searched for after every token
MOST_SEED = 2**32  # as for `generate`: the seeds of further replies are larger
ANY = object()

# Fields of OpenAI's API without a counterpart here -> their values that ask for nothing. Null asks for nothing either.
WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "prompt_cache_key": (ANY,),  # prompts are cached in any case
    "prompt_cache_options": (ANY,),
    "prompt_cache_retention": (ANY,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}


@dataclass(kw_only=True)
class _Body:
    """Fields of both routes; those of DecodingConfig are fields too."""

    model: str | None = None
    n: int = 1
    best_of: int = 1
    seed: int | None = None
    stream: bool = False
    stream_options: dict | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    user: str | None = None
    safety_identifier: str | None = None
    metadata: dict | None = None


@dataclass(kw_only=True)
class _ChatBody(_Body):
    messages: list = field(default=REQUIRED)
    logprobs: bool = False
    top_logprobs: int | None = None
    generation_config: str | None = None


@dataclass(kw_only=True)
class _TextBody(_Body):
    prompt: Any = field(default=REQUIRED)
    logprobs: int | None = None


@dataclass(frozen=True)
class Asked:
    """What a request asks for.

    Attributes:
      chat: True for /v1/chat/completions, False for /v1/completions.
      prompts: the dialogue, as the only one; or texts and lists of token ids that are continued as they are.
      decoding: fields of DecodingConfig that replace those of the run.
      n: replies to each prompt.
      best_of: replies from which the scorer chooses each of them.
      seed: the seed of the first reply; None = one is drawn.
      top: alternatives per token whose log-probabilities are returned; None = no log-probabilities.
      model: name of the model; None = not given.
      stream: True: send every piece of text when it is there.
      include_usage: send the numbers of tokens at the end of a stream.
      labels: what the sender says about the request, for the log.
    """

    chat: bool
    prompts: tuple[Sequence[Turn] | str | list[int], ...]
    decoding: Mapping[str, Any]
    n: int = 1
    best_of: int = 1
    seed: int | None = None
    top: int | None = None
    model: str | None = None
    stream: bool = False
    include_usage: bool = False
    labels: Mapping[str, Any] = field(default_factory=dict)

    @property
    def replies(self) -> int:
        """The number of replies that are written."""
        return len(self.prompts) * self.n * self.best_of


def read_chat(raw: bytes) -> Asked:
    """Read the body of a request to /v1/chat/completions.

    Raises: InputError "field: found X, expected Y".
    """
    body, decoding = _read(raw, _ChatBody)
    if body.generation_config is not None:
        decoding = _of_transformers(body.generation_config) | decoding
    require(
        body.top_logprobs is None or body.logprobs,
        f"top_logprobs: found {body.top_logprobs} without logprobs, expected logprobs: true too",
    )
    return _asked(body, decoding, (_read_messages(body.messages),), _top(body.logprobs, body.top_logprobs or 0))


def read_text(raw: bytes) -> Asked:
    """Read the body of a request to /v1/completions.

    Raises: InputError "field: found X, expected Y".
    """
    body, decoding = _read(raw, _TextBody)
    top = _top(body.logprobs is not None, body.logprobs or 0, "logprobs")
    return _asked(body, decoding, _read_prompts(body.prompt), top)


def _read(raw: bytes, form: type[_Body]) -> tuple[Any, dict[str, Any]]:
    """Return the body as an instance of `form`, and the fields of DecodingConfig in it."""
    given = _object(raw)
    for name, harmless in WITHOUT_EFFECT.items():
        value = given.pop(name, None)
        if value is not None and ANY not in harmless and value not in harmless:
            wanted = " or ".join(map(json.dumps, harmless)) or "null"
            raise InputError(f"{name}: found {shown(value)}, which this server cannot do, expected {wanted}")
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    own, decoding = parameters_of(form), parameters_of(DecodingConfig)
    # OpenAI's clients send null for "not given"; of the run's own settings, null is a value: it switches them off.
    off = {name for name, one in decoding.items() if NoneType in get_args(one.hint)} - {"top_p"}
    given = {name: value for name, value in given.items() if value is not None or name not in {*own, *decoding} - off}
    values = arguments(own | decoding, given)
    changes = {name: values.pop(name) for name in decoding if name in values}
    DecodingConfig(**changes)  # refuses a number out of range
    return form(**values), changes


def _object(raw: bytes) -> dict[str, Any]:
    try:
        body = _json_object(raw.decode(), "body")
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeError as error:  # bytes that are not UTF-8, or half a surrogate pair
        raise InputError("body: found text that UTF-8 cannot hold, expected a JSON object in UTF-8") from error
    return body


def _json_object(text: str, name: str) -> dict[str, Any]:
    """Read a JSON object; `name` is that of the field in errors."""
    try:
        found = parse_json(text)
    except ValueError as error:
        raise InputError(f"{name}: found text that is not JSON ({error}), expected a JSON object") from error
    require(isinstance(found, dict), f"{name}: found {shown(found)}, expected a JSON object")
    return found


def _asked(body: _Body, decoding: dict[str, Any], prompts: tuple, top: int | None) -> Asked:
    for name in ("n", "best_of"):
        require(vars(body)[name] >= 1, f"{name}: found {vars(body)[name]}, expected at least 1")
    require(
        body.seed is None or 0 <= body.seed < MOST_SEED,
        f"seed: found {body.seed}, expected a whole number from 0 to {MOST_SEED - 1}",
    )
    require(
        len(decoding.get("stop", ())) <= MOST_STOPS,
        f"stop: found {len(decoding.get('stop', ()))} texts, expected at most {MOST_STOPS}",
    )
    options = body.stream_options or {}
    require(
        set(options) <= {"include_usage", "include_obfuscation"} and not (options and not body.stream),
        f"stream_options: found {shown(options)}, expected include_usage, together with stream: true",
    )
    labels = {name: vars(body)[name] for name in ("user", "safety_identifier", "metadata") if vars(body)[name]}
    return Asked(
        isinstance(body, _ChatBody),
        prompts,
        _longest(body, decoding),
        body.n,
        body.best_of,
        body.seed,
        top,
        body.model,
        body.stream,
        bool(options.get("include_usage")),
        labels,
    )


def _longest(body: _Body, decoding: dict[str, Any]) -> dict[str, Any]:
    """Return the changes of the decoding with max_new_tokens, whatever its name in the body."""
    names = {
        name: vars(body)[name] for name in ("max_completion_tokens", "max_tokens") if vars(body)[name] is not None
    }
    names |= {"max_new_tokens": decoding["max_new_tokens"]} if "max_new_tokens" in decoding else {}
    require(len(set(names.values())) <= 1, f"{' and '.join(names)}: found different numbers, expected one of them")
    for name, value in names.items():
        require(value >= 1, f"{name}: found {value}, expected at least 1")
        return decoding | {"max_new_tokens": value}
    return decoding


def _top(wanted: bool, most: int, name: str = "top_logprobs") -> int | None:
    require(0 <= most <= MOST_TOP, f"{name}: found {most}, expected 0 to {MOST_TOP}")
    return most if wanted else None


def _read_messages(messages: list) -> list[Turn]:
    """Read messages as a row of a log is read. Sampled ids are not taken from a sender, only text is."""
    where = "request"
    try:
        turns = read_request(Record({"messages": messages}, where, Counter()), "messages")
    except InputError as error:
        raise InputError(str(error).removeprefix(f"{where}: ")) from error
    return [replace(turn, token_ids=None, behaviour_log_prob=None) for turn in turns]


def _read_prompts(prompt: Any) -> tuple[str | list[int], ...]:
    """Read a text, a list of token ids, or a list of either."""
    prompts = prompt if isinstance(prompt, list) and not _are_ids(prompt) else [prompt]
    if not prompts or not all(one and (isinstance(one, str) or _are_ids(one)) for one in prompts):
        raise InputError(f"prompt: found {shown(prompt)}, expected text, token ids, or a list of them")
    return tuple(prompts)


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(one) is int for one in value)


def _of_transformers(text: str) -> dict[str, Any]:
    """Return the decoding that a GenerationConfig, which `transformers chat` sends as JSON text, asks for."""
    name = "generation_config"
    given = _json_object(text, name)
    given = {key: value for key, value in given.items() if value is not None and key != "transformers_version"}
    sampled, stops = given.pop("do_sample", True), given.pop("stop_strings", None)
    known = parameters_of(DecodingConfig)
    changes = arguments(known, given, name) | ({} if stops is None else arguments(known, {"stop": stops}, name))
    return changes if sampled else changes | {"temperature": 0.0}
