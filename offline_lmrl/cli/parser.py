"""The command line of a command: its words become settings (offline_lmrl/settings.py), which its help lists.

The settings of a command are the fields of its config dataclass or the parameters of its function. A settings file
gives values, and the command line overrides them.
"""

import argparse
import inspect
import json
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, is_dataclass
from enum import Enum
from functools import partial
from typing import Any, Literal, get_args, get_origin

import yaml

from offline_lmrl.errors import InputError, shown
from offline_lmrl.logs.yaml_text import NoEnd, load_yaml
from offline_lmrl.renamed import current_keys
from offline_lmrl.settings import (
    LISTS,
    Parameter,
    Parameters,
    Word,
    all_settings,
    arguments,
    dataclass_in,
    expected,
    parameters_of,
    set_dotted,
)

NULLS = ("null", "Null", "NULL", "~")


@dataclass(frozen=True)
class Command:
    """The command line of one command.

    name: its words after the program's name, such as "evaluate play".
    parameters: its settings.
    about: the text at the top of the help.
    positional: names of the settings that are given without a name, in order; one that takes a list takes all words.
    decoding: fields of DecodingConfig that are settings too. Those that are given are one entry, `decoding`.
    inherited: dotted names of settings that the help lists only with --help_all.
    takes_file: a settings file, which the caller reads, comes first.
    """

    name: str
    parameters: Parameters
    about: str = ""
    positional: Sequence[str] = ()
    decoding: Parameters = field(default_factory=dict)
    inherited: Collection[str] = ()
    takes_file: bool = False

    @property
    def usage(self) -> str:
        """The command line with what has to be given."""
        if self.takes_file:
            return f"offline-lmrl {self.name} FILE.yaml [--key value ...]"
        needed = {name for name, one in self.parameters.items() if _is_required(one)}
        words = [f"{name.upper()} ..." if self._takes_all(name) else name.upper() for name in self.positional]
        words += [f"--{name} {name.upper()}" for name in self.parameters if name in needed - set(self.positional)]
        return " ".join(["offline-lmrl", self.name, *words, "[--key value ...]"])

    def read(
        self, argv: Sequence[str], settings: Mapping[str, Any] | None = None, source: str | None = None
    ) -> dict[str, Any]:
        """Read the settings of a file and of the command line, which overrides the file.

        Args:
          argv: the command line after the command and its file.
          settings: the settings of the file; None = no file.
          source: name of the file, for error messages; None = no file.
        Returns: name -> value of the settings that are given.
        Raises: InputError that names the setting, and the file if the value is from the file; SystemExit after --help.
        """
        self.show_help(argv)
        known = {**self.parameters, **self.decoding}
        hints = {name: one.hint for name, one in all_settings(known)}
        named = self.words(argv, {name for name, hint in hints.items() if bool in (hint, *get_args(hint))})
        given = dict(settings or {})
        for key, word in named.items():
            if dataclass_in(hints.get(key)) and isinstance(word.value, Mapping):
                for name, value in word.value.items():  # over the settings that the file has there
                    set_dotted(given, f"{key}.{name}", value)
            else:
                set_dotted(given, key, word)
        for name, parameter in known.items():
            if _is_required(parameter) and name not in given:
                raise InputError(f"{name}: missing, expected `{self.usage}`")
        try:
            values = arguments(known, given)
        except InputError as error:
            where = str(error).partition(":")[0]  # the key, which lacks its mapping if a dataclass has found the error
            if source is None or any(f".{where}." in f".{key}." or where.startswith(f"{key}.") for key in named):
                raise
            raise InputError(f"{source}: {error}") from error
        if self.decoding:
            values["decoding"] = {name: values.pop(name) for name in self.decoding if name in values}
        return values

    def show_help(self, argv: Sequence[str]) -> None:
        """Print the help and exit, if the command line asks for it."""
        if asks_help(argv):
            print(self.help("--help_all" in argv))
            sys.exit(0)

    def words(self, argv: Sequence[str], flags: Collection[str] = ()) -> dict[str, Any]:
        """Return dotted key -> word of a command line, under the current names of renamed settings.

        Args:
          argv: the command line after the command and its file.
          flags: keys that need no value, which is then true.
        Raises: InputError for a word without a key that is no positional setting, and as `split_words` does.
        """
        loose, named = split_words(argv, flags)
        placed: dict[str, Any] = {}
        for name in self.positional[: len(loose)]:
            placed[name], loose = (loose, []) if self._takes_all(name) else (loose[0], loose[1:])
        if loose:
            raise InputError(f"found {shown(str(loose[0]))} among the settings, expected --key value pairs")
        # The settings of a source of data have names of their own.
        return placed | (named if self.name.startswith("prepare ") else current_keys(named))

    def _takes_all(self, name: str) -> bool:
        return get_origin(self.parameters[name].hint) in LISTS

    def _is_inherited(self, name: str) -> bool:
        return any(f"{name}.".startswith(f"{other}.") for other in self.inherited)

    def help(self, everything: bool = False) -> str:
        """Return the help; `everything`: with the inherited settings."""
        parser = argparse.ArgumentParser(prog="offline-lmrl", usage=self.usage, description=self.about, add_help=False)
        groups = {"": parser.add_argument_group("settings")}
        for name, parameter in sorted(all_settings(self.parameters), key=lambda one: self._is_inherited(one[0])):
            if self._is_inherited(name) and not everything:
                continue
            if inner := dataclass_in(parameter.hint):
                text = parameter.help or (inner.__doc__ or "").partition("\n")[0]
                groups[name] = parser.add_argument_group(f"{name}.*", text)
            else:
                _add_option(groups[name.rpartition(".")[0]], name, parameter, name in self.positional)
        if self.decoding:
            group = parser.add_argument_group("decoding (default: the value saved with the run)")
            for name, parameter in self.decoding.items():
                _add_option(group, name, parameter._replace(default=MISSING), False)
        return parser.format_help().rstrip()


def asks_help(argv: Sequence[str]) -> bool:
    return bool({"-h", "--help", "--help_all"} & set(argv))


def _is_required(parameter: Parameter) -> bool:
    return parameter.default is MISSING and not is_dataclass(parameter.hint)


def _add_option(group: Any, name: str, parameter: Parameter, positional: bool) -> None:
    kind = expected(parameter.hint)
    default = "" if parameter.default is MISSING else f"; default: {_as_yaml(parameter.default)}"
    text = f"{parameter.help} ({kind}{default})".strip().replace("%", "%%")  # argparse formats texts with %
    if positional:
        group.add_argument(name, help=text)
        return
    choices = get_args(parameter.hint) if get_origin(parameter.hint) is Literal else ()
    is_flag = parameter.hint is bool
    choices = ("true", "false") if is_flag else choices
    metavar = f"{{{','.join(map(str, choices))}}}" if choices else name.rpartition(".")[2].upper()
    group.add_argument(f"--{name}", metavar=metavar, help=text, nargs="?" if is_flag else None)


def _as_yaml(value: Any) -> str:
    value = value.value if isinstance(value, Enum) else value
    return value if value and isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def ready(name: str, function: Callable[..., Any], argv: Sequence[str], positional: Sequence[str] = ()) -> partial:
    """Read a command's settings, and return the function with them, to be called without arguments.

    Args:
      name: the words of the command after the program's name.
      function: its parameters, or the fields of a dataclass that is its only parameter, are the settings. Fields of
        DecodingConfig are settings too if it has a setting `decoding`, a mapping of those that are given.
      argv: the command line after the command.
      positional: names of the settings that are given without a name, in order.
    Raises: InputError that names the setting; SystemExit after --help.
    """
    hints = [one.hint for one in parameters_of(function).values()]
    make = hints[0] if len(hints) == 1 and is_dataclass(hints[0]) else function
    parameters = parameters_of(make)
    own = vars(make).get("__annotations__", {})  # listed before those of a base class
    parameters = dict(sorted(parameters.items(), key=lambda one: one[0] not in own))
    decoding: Parameters = {}
    if parameters.pop("decoding", None) is not None:
        from offline_lmrl.decoding.config import DecodingConfig

        decoding = parameters_of(DecodingConfig)
    about = re.split(r"\n(?:Args|Returns|Raises|Attributes):", inspect.getdoc(make) or "")[0]
    values = Command(name, parameters, about, positional, decoding).read(argv)
    return partial(function, **values) if make is function else partial(function, make(**values))


def split_words(argv: Sequence[str], flags: Collection[str] = ()) -> tuple[list[Word], dict[str, Word]]:
    """Split a command line into words without a name, and pairs `--key value` or `--key=value`.

    Args:
      argv: the command line after the command and its file.
      flags: keys that need no value, which is then true.
    Returns: the words without a name, and key -> value.
    Raises: InputError if a key has no value, or a value is YAML with too many values.
    """
    loose, named, rest = [], {}, list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            loose.append(_word(word))
            continue
        key, equals, value = word[2:].partition("=")
        if not equals and key in flags and (not rest or not isinstance(_word(rest[0]).value, bool)):
            value = "true"
        elif not equals:
            if not rest or rest[0].startswith("--"):
                raise InputError(f"--{key}: found nothing after it, expected a value")
            value = rest.pop(0)
        named[key] = _word(value)
    return loose, named


def _word(text: str) -> Word:
    try:
        value = load_yaml(text)
    except NoEnd as error:
        raise InputError(f"found {shown(text)}, with {error}, expected the value of a setting") from error
    except yaml.YAMLError as error:
        return Word(text, text, " ".join(str(error).split()))
    # An empty text (of an unset shell variable) and "#1" (a comment) have no value in YAML, but are not null.
    return Word(text, text if value is None and text.strip() not in NULLS else value)


def split_file(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """Split a command line into FILE.yaml, which comes first (None if there is none), and the settings after it."""
    has_file = bool(argv) and not argv[0].startswith("-")
    return (argv[0], list(argv[1:])) if has_file else (None, list(argv))
