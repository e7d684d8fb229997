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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from offline_lmrl.errors import InputError, listed, shown

Made = TypeVar("Made")
WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "text",
    Path: "a path",
    NoneType: "null",
    list: "a list",
    tuple: "a list",
    Sequence: "a list",
    dict: "a mapping of settings",
    Mapping: "a mapping of settings",
}


def setting(default: Any, help: str) -> Any:
    """Return a dataclass field with a default and the text that the command line shows for it.

    Args:
      default: the default, or a function without arguments that makes it, for mutable values such as lists.
      help: what the setting does, its unit, and what null means.
    """
    if callable(default):
        return field(default_factory=default, metadata={"help": help})
    return field(default=default, metadata={"help": help})


class Word(str):
    """The value of a setting on the command line: text, unless the setting takes another type.

    Attributes:
      value: the value of the text in YAML, for settings that do not take text.
    """

    value: Any

    def __new__(cls, text: str, value: Any) -> "Word":
        word = super().__new__(cls, text)
        word.value = value
        return word


class Parameter(NamedTuple):
    """A field of a dataclass, or a parameter of a function or class.

    hint: its type; Any if it has no annotation.
    default: MISSING if it has none; a new value if the dataclass makes one.
    help: the text of a field made by `setting`; "" = none.
    """

    hint: Any
    default: Any
    help: str = ""


def parameters_of(make: Callable[..., Any]) -> dict[str, Parameter]:
    """Return name -> parameter of a dataclass, class or function, in the order of declaration."""
    if is_dataclass(make):
        hints = get_type_hints(make)
        return {
            f.name: Parameter(
                hints[f.name],
                f.default if f.default_factory is MISSING else f.default_factory(),
                f.metadata.get("help", ""),
            )
            for f in fields(make)
            if f.init
        }
    hints = get_type_hints(make.__init__ if isinstance(make, type) else make)
    named = (p for p in inspect.signature(make).parameters.values() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL))
    return {p.name: Parameter(hints.get(p.name, Any), MISSING if p.default is p.empty else p.default) for p in named}


def build(make: Callable[..., Made], given: Mapping[str, Any], where: str = "") -> Made:
    """Make a dataclass or another class from a mapping of settings.

    Args:
      make: the class.
      given: name -> value, with mappings for the dataclasses inside it.
      where: dotted name of the mapping, for error messages; "" = the top.
    Raises: InputError that names the setting, what was found and what was expected; also for a ValueError
      of the class.
    """
    return _Reader(make, where).build(make, given, where)


def arguments(
    make: Callable[..., Any],
    given: Mapping[str, Any],
    where: str = "",
    readers: Mapping[Any, Callable[[Any], Any]] | None = None,
) -> dict[str, Any]:
    """Check and convert the settings that are given for a function or class, which is not called.

    Args: as in `build`, and
      readers: further types -> function that converts a plain value to that type; None = none.
    Returns: name -> value, for the settings that are given.
    Raises: InputError that names the setting.
    """
    return _Reader(make, where, readers or {}).arguments(make, given, where)


def plain(value: Any) -> Any:
    """Return a value with all words of the command line in it replaced by their values in YAML."""
    if isinstance(value, Word):
        return value.value
    if isinstance(value, Mapping):
        return {name: plain(inner) for name, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list) else value


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
    """Return the dataclass that a type is or, if it is a union, contains; None = it has none."""
    return next((part for part in (hint, *_members(hint)) if isinstance(part, type) and is_dataclass(part)), None)


def names_of(make: Callable[..., Any], where: str = "") -> Iterator[str]:
    """Yield the dotted names of all settings, of the dataclasses inside too."""
    for name, parameter in parameters_of(make).items():
        yield _join(where, name)
        if inner := dataclass_in(parameter.hint):
            yield from names_of(inner, _join(where, name))


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
    """Reads the settings of one thing; `root` and `where` are that thing and its dotted name, for suggestions."""

    root: Callable[..., Any]
    where: str
    readers: Mapping[Any, Callable[[Any], Any]] = field(default_factory=dict)

    def build(self, make: Callable[..., Any], given: Mapping[str, Any], where: str, default: Any = None) -> Any:
        """Make `make` from settings; those that are not given are those of `default`, an instance of it, or None."""
        try:
            values = self.arguments(make, given, where, complete=default is None)
            return make(**values) if default is None else replace(default, **values)
        except InputError:
            raise
        except ValueError as error:  # raised by a class about its own settings
            raise InputError(f"{where}: {error}" if where else str(error)) from error

    def arguments(
        self, make: Callable[..., Any], given: Mapping[str, Any], where: str, complete: bool = True
    ) -> dict[str, Any]:
        """Check and convert settings; `complete`: those without a default must be given."""
        parameters, found = parameters_of(make), {}
        for name, value in given.items():
            if name not in parameters:
                raise self._unknown(name if isinstance(name, str) else shown(name), where, parameters)
            parameter = parameters[name]
            kind = get_origin(parameter.hint) or parameter.hint
            if plain(value) is None and (is_dataclass(kind) or kind in (dict, Mapping, list, tuple, Sequence)):
                continue  # a group of settings, or a list, in which every line is a comment
            default = parameter.default if is_dataclass(parameter.default) else None
            found[name] = self.convert(value, parameter.hint, _join(where, name), default)
        for name, parameter in parameters.items():
            if complete and name not in found and parameter.default is MISSING:
                raise InputError(f"{_join(where, name)}: missing, expected {expected(parameter.hint)}")
        return found

    def _unknown(self, name: str, where: str, parameters: Iterable[str]) -> InputError:
        hint = (
            nearest(_join(where, name), names_of(self.root, self.where)) or f", expected one of {listed(parameters)}"
        )
        return InputError(f"{_join(where, name)}: found a setting that does not exist{hint}")

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
        value = plain(value) if not isinstance(value, Mapping) else value
        if is_dataclass(origin) and isinstance(value, Mapping):
            return self.build(origin, value, where, default)
        if origin in (list, tuple, Sequence) and isinstance(value, list | tuple):
            part = parts[0] if parts else Any
            made = [self.convert(inner, part, f"{where}[{i}]") for i, inner in enumerate(value)]
            return tuple(made) if origin is tuple else made
        if origin in (dict, Mapping) and isinstance(value, Mapping):
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
        errors = []
        for member in sorted(members, key=lambda member: (member is str) == isinstance(value, Word)):
            try:
                return self.convert(value, member, where, default)
            except InputError as error:
                errors.append(error)
        # An error inside the value, such as an unknown key of a mapping, says more than the list of types.
        inside = [error for error in errors if not str(error).startswith(f"{where}: found ")]
        raise inside[0] if inside else _wrong(value, hint, where)


SCALARS = (bool, int, float, str, Path, NoneType)


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
    value = plain(value)
    try:
        if hint in (int, float) and isinstance(value, int | float | str) and not isinstance(value, bool):
            number = hint(value) if isinstance(value, str) or hint is float else value
            if isinstance(number, hint) and math.isfinite(number):
                return number
        if hint is bool and isinstance(value, bool):
            return value
        if isinstance(hint, type) and issubclass(hint, Enum):
            return hint(value)
    except (ValueError, OverflowError):
        pass
    raise _wrong(value, hint, where)


def _members(hint: Any) -> tuple[Any, ...]:
    """Return the types of a union; () for any other type."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else ()


def _wrong(value: Any, hint: Any, where: str) -> InputError:
    value = "null" if plain(value) is None else shown(plain(value))
    return InputError(f"{where}: found {value}, expected {expected(hint)}")


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name
