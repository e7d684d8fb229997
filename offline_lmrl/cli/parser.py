"""Parsing of a command's settings, typed by the functions and dataclasses that receive them, with one-line errors.

jsonargparse does the parsing. This module adds a settings file, whose values the command line overrides; a suggestion
for a misspelt key; and the help texts that are stored in dataclass fields (offline_lmrl/settings.py).
"""

import difflib
import json
import re
from argparse import SUPPRESS
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentParser, Namespace

from offline_lmrl.errors import InputError, in_our_words, shown
from offline_lmrl.logs.yaml_text import load_yaml, read_yaml, require_an_end, too_large


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
    near = near or difflib.get_close_matches(name, known, n=1)
    near = near or difflib.get_close_matches(name.partition(".")[0], known, n=1)  # a key inside a free mapping
    return f"; did you mean {near[0]!r}?" if near else ""


class Parser(ArgumentParser):
    """A command's parser, which raises InputError instead of printing its usage, and refuses abbreviated names."""

    def __init__(self, usage: str = "", description: str | None = None, **more: Any):
        """Create the parser of one command.

        Args:
          usage: the command line without the program's name, for help and errors.
          description: text at the top of the help; None = none.
          more: extra arguments that jsonargparse passes when it creates sub-parsers for optional dataclasses.
        """
        usage = f"offline-lmrl {usage}"
        super().__init__(prog="offline-lmrl", usage=usage, description=description, allow_abbrev=False, **more)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise InputError(self._in_our_words(" ".join(message.split()))) from ex

    def add_dataclass(
        self, cls: type, key: str | None = None, base: type | None = None, show_base: bool = True
    ) -> None:
        """Add the fields of a dataclass as options `--key.field`.

        Args:
          cls: the dataclass.
          key: prefix of the options; None = no prefix.
          base: base class of `cls`. Its fields come last in the help, except those that a subclass declares again.
            None = all fields keep their order.
          show_base: False: leave these last fields out of the help.
        """
        self.add_class_arguments(cls, key)
        prefix = f"{key}." if key else ""
        texts = field_help(cls, prefix)
        inherited = set() if base is None else {f"{prefix}{name}" for name in _only_in(base, cls)}
        for group in self._action_groups:
            for action in group._group_actions:
                if action.dest in (self.groups or {}) or action.dest.endswith(".help"):
                    action.help = SUPPRESS  # jsonargparse's own: a file for a group, help of a nested class
                elif action.dest in inherited and not show_base:
                    action.help = SUPPRESS
                else:
                    action.help = texts.get(action.dest, action.help)
            # The sort is stable: inherited fields move to the end, all else keeps its order.
            group._group_actions.sort(key=lambda action: action.dest in inherited)

    def add_overrides(self, cls: type, title: str, skip: Collection[str] = ()) -> None:
        """Add the fields of a dataclass as options `--field`; the parsed result has only the fields that were given.

        Args:
          cls: the dataclass.
          title: heading of these options in the help.
          skip: names of fields to leave out.
        """
        hints, texts, group = get_type_hints(cls), field_help(cls), self.add_argument_group(title)
        for field in (field for field in fields(cls) if field.name not in skip):
            group.add_argument(f"--{field.name}", type=hints[field.name], default=SUPPRESS, help=texts.get(field.name))

    def parse(self, argv: Sequence[str], settings: Mapping[str, Any] | None = None, source: str = "") -> Namespace:
        """Parse the settings of a file and of the command line, which overrides the file.

        Args:
          argv: the command line after the command and its file.
          settings: the settings of the file; None = no file.
          source: name of the file, for error messages.
        Returns: the settings by name. The fields that `add_dataclass` added under a key are one entry: an instance of
          the dataclass, under that key.
        Raises: InputError that names the setting, and the file if the value is from the file.
        """
        start = None
        if settings:
            try:
                start = self._parse_file(settings)
            except InputError as error:
                raise InputError(f"{source}: {error}") from error
        for word in argv:
            try:
                require_an_end(word.partition("=")[2] if word.startswith("--") else word)
            except yaml.YAMLError as error:
                raise InputError(f"found {shown(word)}, with {error}, expected the value of a setting") from error
        values = self.parse_args([*self._restated(argv, start), *argv], namespace=start)
        self._refuse_nulls(values)
        for key, value in values.items():
            if too_large(value):
                self.error(f"{key}: found {shown(value)}, expected a number of at most 64 bits")
        try:
            return self.instantiate(values)
        except InputError:
            raise
        except ValueError as error:  # raised by a dataclass about its own fields
            self.error(str(error), error)

    def _restated(self, argv: Sequence[str], start: Namespace | None) -> list[str]:
        """Return groups of settings from the file as arguments, if the command line also sets fields in them.

        This is needed for groups that may be null (optional dataclasses), because jsonargparse does not merge the
        fields of such a group from file and command line.

        Args:
          argv: the command line.
          start: parsed settings of the file, in which the groups found are set to None; None = no file.
        Returns: arguments that set these groups as in the file, to be put before those of the command line.
        """
        arguments = []
        for action in self._actions if start is not None else ():
            optional = type(None) in get_args(getattr(action, "_typehint", None))
            stated = start.get(action.dest) if optional else None
            if isinstance(stated, Namespace) and any(re.match(rf"--{action.dest}([.=]|$)", word) for word in argv):
                start[action.dest] = None
                arguments += [f"--{action.dest}", json.dumps(stated.as_dict())]
        return arguments

    def _parse_file(self, settings: Mapping[str, Any]) -> Namespace:
        # A group in which every line is a comment is null.
        stated = {key: value for key, value in settings.items() if value is not None}
        for key in self.groups or {}:
            if not isinstance(stated.get(key, {}), Mapping):
                raise InputError(f"{key}: found {shown(stated[key])}, expected a mapping of settings")
        return self.parse_object(stated, _skip_required=True)

    def _refuse_nulls(self, values: Namespace) -> None:
        """Refuse null for settings whose type does not allow it, because jsonargparse accepts null for every type.

        Raises: InputError that names the setting.
        """
        for action in self._actions:
            typed = getattr(action, "_typehint", None)
            if typed is None or action.default is None or action.dest not in values or values[action.dest] is not None:
                continue
            if typed is not Any and type(None) not in get_args(typed):
                self.error(f"{action.dest}: found null, expected a value such as {action.default!r}")

    def _in_our_words(self, message: str) -> str:
        known = [action.dest for action in self._actions if action.option_strings and action.dest != "help"]
        if found := re.search(r"(?:Group '(.+)' does not accept option|Option) '(.+?)'", message):
            key = ".".join(part for part in found.groups() if part)
            return f"{key}: found a setting that does not exist{nearest(key, known)}"
        if found := re.match(r"unrecognized arguments: (\S+)", message):
            if not found[1].startswith("-"):
                return f"found {shown(found[1])} among the settings, expected --key value pairs"
            key = found[1].lstrip("-").partition("=")[0]
            return f"--{key}: found a setting that does not exist{nearest(key, known)}"
        if found := re.match(r"the following arguments are required: (.+)", message):
            return f"{found[1]}: missing, expected `{self.usage}`"
        return in_our_words(message)


def call(
    usage: str,
    function: Callable[..., Any],
    argv: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    positional: bool = True,
) -> Any:
    """Call a function with arguments from the command line and return its result.

    Args:
      usage: the command line without the program's name, for help and errors.
      function: the function; its parameters become the options, and its docstring their help.
      argv: the command line after the command.
      settings: arguments by name, from a config; the command line overrides them. None = no config.
      positional: True: required parameters are given without a name, in order; False: as `--name value`.
    Raises: InputError that names the argument which cannot be used.
    """
    parser = Parser(usage)
    parser.add_function_arguments(function, as_positional=positional)
    return function(**parser.parse(argv, settings, usage).as_dict())


def split_file(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """Split a command line into FILE.yaml, which comes first (None if there is none), and the settings after it."""
    has_file = bool(argv) and not argv[0].startswith("-")
    return (argv[0], list(argv[1:])) if has_file else (None, list(argv))


def read_settings(path: str | Path) -> dict[str, Any]:
    """Read the mapping in a YAML file; unlike in plain PyYAML, `1e-5` is a number.

    Raises: InputError if the file cannot be read or does not hold a mapping.
    """
    return read_yaml(path, "settings")


def overrides_of(argv: Sequence[str]) -> dict[str, Any]:
    """Parse pairs `--a.b value` and `--a.b=value`, with values in YAML, to {"a.b": value}.

    Args:
      argv: the command line after the command and its file.
    Raises: InputError if an argument is not part of such a pair, or a value is not YAML.
    """
    given, rest = {}, list(argv)
    while rest:
        key, equals, value = rest.pop(0).partition("=")
        if not key.startswith("--"):
            raise InputError(f"found {shown(key)} among the settings, expected --key value pairs")
        if not equals:
            if not rest:
                raise InputError(f"{key}: found nothing after it, expected a value")
            value = rest.pop(0)
        try:
            given[key.removeprefix("--")] = load_yaml(value)
        except yaml.YAMLError as error:
            raise InputError(f"{key}: found text that is not YAML ({' '.join(str(error).split())})") from error
    return given


def field_help(cls: type, prefix: str = "") -> dict[str, str]:
    """Return dotted name -> help text of a dataclass's fields, and of the fields of dataclasses inside it.

    Args:
      cls: the dataclass.
      prefix: start of every dotted name, with a dot at its end; "" = none.
    """
    texts = {f"{prefix}{field.name}": field.metadata["help"] for field in fields(cls) if "help" in field.metadata}
    for name, hint in get_type_hints(cls).items():
        for part in (hint, *get_args(hint)):  # get_args: a dataclass that may be null
            if is_dataclass(part):
                texts |= field_help(part, f"{prefix}{name}.")
    return texts


def _only_in(base: type, cls: type) -> set[str]:
    """Return the names of the fields of `base` that neither `cls` nor a class between them declares again.

    A subclass declares a field again to change its default, for example.
    """
    between = cls.__mro__[: cls.__mro__.index(base)]
    return {field.name for field in fields(base)} - {
        name for parent in between for name in parent.__dict__.get("__annotations__", ())
    }
