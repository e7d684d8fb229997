"""Read YAML from users (settings files, scorers, command-line values) as plain values.

jsonargparse parses the text, since unlike plain PyYAML it reads `1e-5` as a number. Before parsing, this module
refuses text that would expand without end; after parsing, it refuses values that no setting can have.
"""

from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader

from offline_lmrl.errors import InputError, require, shown
from offline_lmrl.logs.trajectory import MAX_NESTING

MAX_VALUES = 100_000  # each alias counts as many values as it refers to
MAX_WHOLE = 2**63  # torch, Arrow and numpy cannot hold numbers from here on

_read = get_loader("yaml")


def load_yaml(text: str) -> Any:
    """Return the value of a YAML text: mappings with text as names, lists, text, numbers, true, false or null.

    Raises: yaml.YAMLError for text that is not YAML or contains other values; its subclass NoEnd for text with more,
      or deeper nested, values than settings can have.
    """
    try:
        _count(text)
        value = _read(text)
    except TypeError as error:  # jsonargparse raises it for a mapping whose only name is null
        raise yaml.YAMLError("the key None, expected text") from error
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
    for event in yaml.parse(text, Loader=yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader):
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
