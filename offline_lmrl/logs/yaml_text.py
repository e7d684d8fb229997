"""Read YAML from users (settings files, scorers, command-line values) as plain values.

Unlike plain PyYAML, it reads `1e-5` as a number and a date as text. Before parsing, this module refuses text that
would expand without end; after parsing, it refuses values that no setting can have.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from offline_lmrl.errors import MAX_WHOLE, InputError, require, shown
from offline_lmrl.logs.trajectory import MAX_NESTING

MAX_VALUES = 100_000  # each alias counts as many values as it refers to


class _Loader(yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader):
    """PyYAML's safe loader with other rules for the type of plain text."""

    yaml_implicit_resolvers = {
        first: [(tag, text) for tag, text in rules if tag.rpartition(":")[2] not in ("float", "timestamp")]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"""[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?$  # 1.5, 1.5e-3
        |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$                   # 1e-3, which PyYAML takes for text
        |[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?$            # .5
        |[-+]?\.(?:inf|Inf|INF)$
        |\.(?:nan|NaN|NAN)$""",
        re.VERBOSE,
    ),
    list("-+0123456789."),
)


def load_yaml(text: str) -> Any:
    """Return the value of a YAML text: mappings with text as names, lists, text, numbers, true, false or null.

    Raises: yaml.YAMLError for text that is not YAML or contains other values; its subclass NoEnd for text with more,
      or deeper nested, values than settings can have.
    """
    try:
        _count(text)
        value = yaml.load(text, _Loader)
    except (ValueError, LookupError) as error:  # a bad number, date or truth value, or text that UTF-8 cannot hold
        raise yaml.YAMLError(f"a value that cannot be read: {error}") from error
    _require_plain(value)
    return value


def read_yaml(path: str | Path, what: str) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Args:
      what: a noun for the content of the file, such as "settings" or "a scorer", for error messages.

    Raises: InputError if the file cannot be read or is not a mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        found = "bytes that are not UTF-8" if isinstance(error, UnicodeDecodeError) else error
        found = error.strerror if isinstance(error, OSError) and error.strerror else found
        raise InputError(f"{path}: found {found}, expected a YAML file of {what}") from error
    return yaml_mapping(text, str(path), what)


def yaml_mapping(text: str, where: str, what: str) -> dict[str, Any]:
    """Return the mapping in a YAML text.

    Args:
      where: the start of error messages, such as the file's path.
      what: a noun for the content of the text, such as "settings" or "a scorer", for error messages.

    Raises: InputError if the text is not a mapping in YAML.
    """
    try:
        value = load_yaml(text)
    except yaml.YAMLError as error:
        raise InputError(f"{where}: found text that is not YAML ({' '.join(str(error).split())})") from error
    require(isinstance(value, dict), f"{where}: found {shown(value)}, expected a mapping of {what}")
    return value


class NoEnd(yaml.YAMLError):
    """An error for YAML text with more values, or deeper nested ones, than settings can have."""


def _count(text: str) -> None:
    """Count the values of a YAML text while it is scanned, without building them; raise NoEnd if there are too many.

    NoEnd is also raised for values nested deeper than MAX_NESTING levels.
    """
    whole: dict[str, tuple[int, int]] = {}  # anchor -> (values, levels) of what it names
    open_values: list[tuple[str | None, int, int]] = [(None, 0, 0)]  # (anchor, values, levels) of open collections
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            open_values.append((event.anchor, 1, 1))
            if len(open_values) > MAX_NESTING:
                raise NoEnd(f"values nested deeper than {MAX_NESTING} levels")
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, values, levels = open_values.pop()
            whole[anchor] = values, levels
        elif isinstance(event, yaml.ScalarEvent):
            values, levels = whole[event.anchor] = 1, 0
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in whole:
                raise NoEnd(f"*{event.anchor[:60]}, which refers to no value that ends before it")
            values, levels = whole[event.anchor]
        else:
            continue
        anchor, before, deepest = open_values[-1]
        open_values[-1] = anchor, before + values, max(deepest, 1 + levels)
        if before + values > MAX_VALUES or len(open_values) + levels > MAX_NESTING:
            raise NoEnd(f"more than {MAX_VALUES} values, or some nested deeper than {MAX_NESTING} levels")


def _require_plain(value: Any) -> None:
    for inner in value if isinstance(value, list) else value.values() if isinstance(value, dict) else ():
        _require_plain(inner)
    for name in value if isinstance(value, dict) else ():
        if not isinstance(name, str):
            raise yaml.YAMLError(f"the key {shown(name)}, expected text: put it in quotes")
    if not isinstance(value, list | dict | str | int | float | None):
        raise yaml.YAMLError(f"{shown(value)}, expected a mapping, a list, text or a number")
    if isinstance(value, str) and "\0" in value:
        raise yaml.YAMLError(f"{shown(value)}, expected text without NUL characters")
    if isinstance(value, int) and abs(value) >= MAX_WHOLE:
        raise yaml.YAMLError(f"{shown(value)}, expected a number of at most 64 bits")
