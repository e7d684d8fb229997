"""Settings: fields with help texts, and the one way from plain values to the dataclass or function that takes them.

`train`, `compare`, the other commands and the specifications of scorers all read their settings here, so that names
and types follow one set of rules and errors have one wording:

- names and types are those of the fields of a dataclass, or of the annotated parameters of a function or class;
- a dataclass in a field takes a mapping, whose keys replace those of the field's default;
- null for such a field, a mapping or a list means that it is not given, unless its type has null;
- a whole number serves as a float, and text as a number if it is one ("1e-4", which plain PyYAML reads as text);
- a list serves as a tuple.
"""

import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from offline_lmrl.errors import MAX_WHOLE, InputError, listed, shown

SCALARS = (bool, int, float, str, Path, NoneType)
LISTS = (list, tuple, Sequence)
MAPPINGS = (dict, Mapping)
WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "text",
    Path: "a path",
    NoneType: "null",
    **dict.fromkeys(LISTS, "a list"),
    **dict.fromkeys(MAPPINGS, "a mapping of settings"),
}
REQUIRED = MISSING  # the default of a setting that has to be given
Made = TypeVar("Made")


def setting(default: Any, help: str) -> Any:
    """Return a dataclass field with a default and the text that the command line shows for it.

    Args:
      default: the default, or a function without arguments that makes it, for mutable values such as lists; REQUIRED
        = none.
      help: what the setting does, its unit, and what null means.
    """
    if callable(default):
        return field(default_factory=default, metadata={"help": help})
    return field(default=default, metadata={"help": help})


class Word(str):
    """The value of a setting on the command line: text, unless the setting takes another type.

    Attributes:
      value: the value of the text in YAML, for settings that do not take text; the text if it has none.
      problem: the reason why it has none; "" = it has one.
    """

    value: Any
    problem: str

    def __new__(cls, text: str, value: Any, problem: str = "") -> "Word":
        word = super().__new__(cls, text)
        word.value, word.problem = value, problem
        return word


class Parameter(NamedTuple):
    """A field of a dataclass, or a parameter of a function or class.

    hint: its type; Any if it has no annotation.
    default: MISSING if it has none.
    help: what it does; "" = not known.
    """

    hint: Any
    default: Any = MISSING
    help: str = ""


Parameters = Mapping[str, Parameter]


def parameters_of(make: Callable[..., Any]) -> dict[str, Parameter]:
    """Return name -> parameter of a dataclass, class or function, in the order of declaration.

    The help is that of the field (`setting`), or the text after the parameter's name in the docstring's "Args:".
    """
    if is_dataclass(make):
        hints, own = get_type_hints(make), [f for f in fields(make) if f.init]
        defaults = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in own}
        return {f.name: Parameter(hints[f.name], defaults[f.name], f.metadata.get("help", "")) for f in own}
    try:
        hints = get_type_hints(make.__init__ if isinstance(make, type) else make)
    except (NameError, TypeError):  # annotations that only a type checker can read, or none: any value will do
        hints = {}
    listed_there = (inspect.getdoc(make) or "").partition("Args:\n")[2]
    texts = dict(re.findall(r"^  (\w+): (.*(?:\n    .*)*)", listed_there, re.MULTILINE))
    return {
        p.name: Parameter(
            hints.get(p.name, Any),
            MISSING if p.default is p.empty else p.default,
            " ".join(texts.get(p.name, "").split()),
        )
        for p in inspect.signature(make).parameters.values()
        if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    }


def build(make: Callable[..., Made], given: Mapping[str, Any], where: str = "") -> Made:
    """Make a dataclass or another class from a mapping of settings.

    Args:
      make: the class.
      given: name -> value, with mappings for the dataclasses inside it.
      where: dotted name of the mapping, for error messages; "" = the top.
    Raises: InputError that names the setting, what was found and what was expected; a ValueError of the class too.
    """
    return _Reader(parameters_of(make), where).build(make, given, where)


def arguments(
    parameters: Parameters,
    given: Mapping[str, Any],
    where: str = "",
    readers: Mapping[Any, Callable[[Any], Any]] | None = None,
) -> dict[str, Any]:
    """Check and convert the settings that are given for a function or class, without calling it.

    Args:
      parameters: the settings that exist, such as `parameters_of` a function.
      given: name -> value, with mappings for dataclasses.
      where: dotted name of the mapping, for error messages; "" = the top.
      readers: further types -> function that converts a plain value to that type; None = none.
    Returns: name -> value, for the settings that are given, and for dataclasses that have no default.
    Raises: InputError that names the setting, what was found and what was expected.
    """
    return _Reader(parameters, where, readers or {}).arguments(parameters, given, where)


def build_inner(config: Any) -> None:
    """Make the dataclasses inside a dataclass of the plain values that a Python program gave for them.

    A mapping replaces the keys of the field's default, and null means what it means in a file.

    Args:
      config: the instance, which is changed.
    Raises: InputError that names the setting, what was found and what was expected.
    """
    inner = {name: one for name, one in parameters_of(type(config)).items() if dataclass_in(one.hint)}
    made = arguments(inner, {name: vars(config)[name] for name in inner})
    vars(config).update({name: made.get(name, one.default) for name, one in inner.items()})


def plain(value: Any) -> Any:
    """Return a value with all words of the command line in it replaced by their values in YAML."""
    if isinstance(value, Word):
        return value.value
    if isinstance(value, Mapping):
        return {name: plain(inner) for name, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list) else value


def set_dotted(settings: dict[str, Any], dotted: str, value: Any) -> None:
    """Set the value of a dotted key in nested mappings, which are copied before they are changed.

    Args:
      settings: the mapping, which is changed.
      dotted: the key, such as "evaluation.episodes".
      value: the value; it replaces a mapping as a whole.
    """
    *parents, last = dotted.split(".")
    for key in parents:
        inner = settings.get(key)
        inner = inner.value if isinstance(inner, Word) else inner
        settings[key] = dict(inner) if isinstance(inner, Mapping) else {}
        settings = settings[key]
    settings[last] = value


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the end of an error message about an unknown name: "; did you mean 'x'?", or "" if no name is near.

    Args:
      name: the unknown name, perhaps with dots.
      known: the names that exist.
    """
    known, name = list(known), name[:200]  # a longer name is no misspelling and is slow to compare
    leaf = name.rpartition(".")[2]
    # The right name under the wrong group (`learning_rate` for `args.learning_rate`) is nearer than any spelling.
    near = [other for other in known if other.rpartition(".")[2] == leaf]
    near = near or get_close_matches(name, known, n=1)
    near = near or get_close_matches(name.partition(".")[0], known, n=1)  # a key inside a free mapping
    return f"; did you mean {near[0]!r}?" if near else ""


def dataclass_in(hint: Any) -> type | None:
    """Return the dataclass that a type is or, as a union, contains; None = neither."""
    return next((part for part in (hint, *_members(hint)) if isinstance(part, type) and is_dataclass(part)), None)


def all_settings(parameters: Parameters, where: str = "") -> Iterator[tuple[str, Parameter]]:
    """Yield (dotted name, parameter) of all settings; those of a dataclass follow the setting that holds it."""
    for name, parameter in parameters.items():
        yield _join(where, name), parameter
        if inner := dataclass_in(parameter.hint):
            yield from all_settings(parameters_of(inner), _join(where, name))


def expected(hint: Any) -> str:
    """Return a type in the words of an error message, such as "a whole number or null"."""
    if members := _members(hint):
        return " or ".join(expected(member) for member in members)
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    kind = get_origin(hint) or hint
    if kind in WORDS:
        return WORDS[kind]
    if is_dataclass(kind):
        return WORDS[Mapping]
    if isinstance(kind, type) and issubclass(kind, Enum):
        return f"one of {', '.join(str(member.value) for member in kind)}"
    return kind.__name__ if isinstance(kind, type) else "a value"


@dataclass(frozen=True)
class _Reader:
    """Reads the settings of one thing; `root` are all its settings and `where` its dotted name, for suggestions."""

    root: Parameters
    where: str
    readers: Mapping[Any, Callable[[Any], Any]] = field(default_factory=dict)

    def build(self, make: Callable[..., Any], given: Mapping[str, Any], where: str, default: Any = None) -> Any:
        """Make `make` from settings; those that are not given are those of `default`, an instance of it, or None."""
        parameters = parameters_of(make)
        if default is not None:
            parameters = {name: one._replace(default=getattr(default, name)) for name, one in parameters.items()}
        try:
            values = self.arguments(parameters, given, where)
            return make(**values) if default is None else replace(default, **values)
        except InputError:
            raise
        except ValueError as error:  # raised by a class about its own settings
            raise InputError(f"{where}: {error}" if where else str(error)) from error

    def arguments(self, parameters: Parameters, given: Mapping[str, Any], where: str) -> dict[str, Any]:
        for name in given:
            if name not in parameters:
                raise self._unknown(name if name and isinstance(name, str) else shown(name), where, parameters)
        found = {}
        for name, (hint, default, _) in parameters.items():
            key, kind, value = _join(where, name), get_origin(hint) or hint, given.get(name, MISSING)
            if value is not MISSING and plain(value) is None and (is_dataclass(kind) or kind in LISTS + MAPPINGS):
                value = MISSING  # a group of settings, or a list, in which every line is a comment
            if value is not MISSING:
                found[name] = self.convert(value, hint, key, default if is_dataclass(default) else None)
            elif default is MISSING and is_dataclass(kind):
                found[name] = self.build(kind, {}, key)
            elif default is MISSING:
                raise InputError(f"{key}: missing, expected {expected(hint)}")
        return found

    def _unknown(self, name: str, where: str, parameters: Parameters) -> InputError:
        key, known = _join(where, name), [known for known, _ in all_settings(self.root, self.where)]
        hint = nearest(key, known) or f", expected {f'one of {listed(parameters)}' if parameters else 'none'}"
        return InputError(f"{key}: found a setting that does not exist{hint}")

    def convert(self, value: Any, hint: Any, where: str, default: Any = None) -> Any:
        """Return the value as the type `hint`.

        Args:
          value: a plain value, or a Word.
          hint: the type.
          where: dotted name of the setting.
          default: an instance of the dataclass `hint`, which supplies the settings that are not given; None = none.
        Raises: InputError that names the setting.
        """
        origin, parts = get_origin(hint) or hint, get_args(hint)
        if _members(hint):
            return self._any_of(value, hint, where, default)
        if origin in self.readers:
            return self.readers[origin](plain(value))
        if origin in SCALARS or origin is Literal or (isinstance(origin, type) and issubclass(origin, Enum)):
            return _scalar(value, hint, where)
        if isinstance(value, Word):
            if value.problem:
                raise InputError(f"{where}: found text that is not YAML ({value.problem})")
            value = value.value
        if is_dataclass(origin) and isinstance(value, Mapping):
            return self.build(origin, value, where, default)
        if origin in LISTS and isinstance(value, list | tuple):
            part = parts[0] if parts else Any
            made = [self.convert(inner, part, f"{where}[{i}]") for i, inner in enumerate(value)]
            return tuple(made) if origin is tuple else made
        if origin in MAPPINGS and isinstance(value, Mapping):
            part = parts[1] if parts else Any
            return {name: self.convert(inner, part, f"{where}.{name}") for name, inner in value.items()}
        if origin in WORDS or (is_dataclass(origin) and not isinstance(value, origin)):
            raise _wrong(value, hint, where)
        return plain(value)  # Any, a made dataclass, or a type that only Python code can give, such as a policy

    def _any_of(self, value: Any, hint: Any, where: str, default: Any) -> Any:
        """Return the value as the first type of a union that takes it.

        Text in a file stays text if the union has it. A word of the command line is text only if no other type takes
        it.
        """
        members = [member for member in _members(hint) if member is not NoneType]
        if plain(value) is None and len(members) < len(_members(hint)):
            return None
        texts = [member for member in (str, Path) if member in members]
        others = [member for member in members if member not in texts]
        errors = []
        for member in others + texts if isinstance(value, Word) else texts + others:
            try:
                return self.convert(value, member, where, default)
            except InputError as error:
                errors.append(error)
        # An error inside the value, such as an unknown key of a mapping, says more than the list of types.
        inside = [error for error in errors if not str(error).startswith(f"{where}: found ")]
        raise inside[0] if inside else _wrong(value, hint, where)


def _scalar(value: Any, hint: Any, where: str) -> Any:
    """Return a value as the number, text, path, choice or truth value that `hint` is.

    Raises: InputError if it is none.
    """
    if get_origin(hint) is Literal:
        for choice in (value, plain(value)):
            if any(choice == other and type(other) in (type(choice), str) for other in get_args(hint)):
                return str(choice) if isinstance(choice, str) else choice
        raise _wrong(value, hint, where)
    if hint is str and isinstance(value, str):
        return str(value)
    if hint is Path and isinstance(value, str | Path):
        return Path(value)
    found = plain(value)
    number = _number(found, hint) if hint in (int, float) else None
    if isinstance(number, int) and abs(number) >= MAX_WHOLE:
        raise InputError(f"{where}: found {shown(number)}, expected a number of at most 64 bits")
    if number is not None:
        return number
    if hint is bool and isinstance(found, bool):
        return found
    if isinstance(hint, type) and issubclass(hint, Enum) and found in [member.value for member in hint]:
        return hint(found)
    raise _wrong(value, hint, where)


def _number(value: Any, kind: type) -> int | float | None:
    """Return a number, or text that is one, as the finite `kind`, int or float; None if it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = kind(value) if isinstance(value, str) or kind is float else value
        return number if isinstance(number, kind) and (kind is int or math.isfinite(number)) else None
    except (ValueError, OverflowError):
        return None


def _members(hint: Any) -> tuple[Any, ...]:
    """Return the types of a union; () for any other type."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else ()


def _wrong(value: Any, hint: Any, where: str) -> InputError:
    if isinstance(value, Word) and isinstance(value.value, bool | None):
        value = str(value)  # as it was typed: "no", not False
    value = "null" if value is None else shown(plain(value))
    return InputError(f"{where}: found {value}, expected {expected(hint)}")


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name
