"""Read fields of raw rows with the type that an importer needs.

A field of another type raises InputError "where: name: found X, expected Y".
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from offline_lmrl.errors import InputError
from offline_lmrl.logs.forms import is_whole, read_text
from offline_lmrl.logs.trajectory import finite, require_list, shown


def text(record: Mapping, name: str, where: str) -> str:
    """Return a text, which may be empty.

    Raises: Drop if UTF-8 cannot hold it, InputError if it is not text.
    """
    value = record.get(name)
    if not isinstance(value, str):
        raise InputError(f"{where}: {name}: found {shown(value)}, expected text")
    return read_text(value)


def number(record: Mapping, name: str, where: str) -> float:
    """Return a finite number."""
    try:
        return finite(name, record.get(name))
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def whole(record: Mapping, name: str, where: str) -> int:
    """Return a number without a fraction. A float counts: Parquet with nulls and pandas turn 3 into 3.0."""
    value = number(record, name, where)
    if value != int(value):
        raise InputError(f"{where}: {name}: found {value}, expected a whole number")
    return int(value)


def items(record: Mapping, name: str, where: str) -> Sequence[Any]:
    """Return a list."""
    try:
        return require_list(name, record.get(name))
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def objects(record: Mapping, name: str, where: str) -> Sequence[Mapping]:
    """Return a list of objects."""
    values = items(record, name, where)
    for i, value in enumerate(values):
        if not isinstance(value, Mapping):
            raise InputError(f"{where}: {name}[{i}]: found {shown(value)}, expected an object")
    return values


def inner(record: Mapping, name: str, where: str) -> Mapping:
    """Return an object."""
    value = record.get(name)
    if not isinstance(value, Mapping):
        raise InputError(f"{where}: {name}: found {shown(value)}, expected an object")
    return value


def group(record: Mapping, name: str, where: str) -> str:
    """Return the text or whole number that identifies which rows stay together, as text."""
    value = record.get(name)
    if is_whole(value):
        return str(int(value))
    if not isinstance(value, str) or not value:
        raise InputError(f"{where}: {name}: found {shown(value)}, expected a group: text or a whole number")
    return read_text(value)


def known_values(record: Mapping, names: Iterable[str]) -> dict[str, str | float]:
    """Return the texts, numbers and flags under some names, for the labels; other values are left out."""
    return {name: record[name] for name in names if isinstance(record.get(name), str | int | float)}
