"""Read fields of raw rows with the type that an importer needs.

In all functions, `record` is a row, or an object inside a row; `name` is the field to read; and `where` ("file:row")
is the start of error messages. A field that is missing or of another type raises InputError
"where: name: found X, expected Y".
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from offline_lmrl.errors import InputError
from offline_lmrl.logs.forms import is_whole, read_text
from offline_lmrl.logs.trajectory import finite, require_list, shown


def text(record: Mapping, name: str, where: str) -> str:
    """Return a field that is text, possibly empty.

    Raises: Drop if UTF-8 cannot encode it. InputError if it is not text.
    """
    value = record.get(name)
    if not isinstance(value, str):
        raise InputError(f"{where}: {name}: found {shown(value)}, expected text")
    return read_text(value)


def number(record: Mapping, name: str, where: str) -> float:
    """Return a field that is a finite number."""
    try:
        return finite(name, record.get(name))
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def whole(record: Mapping, name: str, where: str) -> int:
    """Return a field that is a whole number. 3.0 is one too, since Parquet with nulls and pandas turn 3 into 3.0."""
    value = number(record, name, where)
    if value != int(value):
        raise InputError(f"{where}: {name}: found {value}, expected a whole number")
    return int(value)


def items(record: Mapping, name: str, where: str) -> Sequence[Any]:
    """Return a field that is a list."""
    try:
        return require_list(name, record.get(name))
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def objects(record: Mapping, name: str, where: str) -> Sequence[Mapping]:
    """Return a field that is a list of objects (dicts)."""
    values = items(record, name, where)
    for i, value in enumerate(values):
        if not isinstance(value, Mapping):
            raise InputError(f"{where}: {name}[{i}]: found {shown(value)}, expected an object")
    return values


def inner(record: Mapping, name: str, where: str) -> Mapping:
    """Return a field that is an object (dict)."""
    value = record.get(name)
    if not isinstance(value, Mapping):
        raise InputError(f"{where}: {name}: found {shown(value)}, expected an object")
    return value


def group(record: Mapping, name: str, where: str) -> str:
    """Return a field that holds the group of a row, as text: the text itself, or the digits of a whole number."""
    value = record.get(name)
    if is_whole(value):
        return str(int(value))
    if not isinstance(value, str) or not value:
        raise InputError(f"{where}: {name}: found {shown(value)}, expected a group: text or a whole number")
    return read_text(value)


def known_values(record: Mapping, names: Iterable[str]) -> dict[str, str | float]:
    """Return {name: value} for those of `names` whose value is text, a number or a truth value, to store as labels."""
    return {name: record[name] for name in names if isinstance(record.get(name), str | int | float)}
