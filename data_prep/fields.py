"""Fields of raw rows: of the type an importer needs, or an InputError "where: name: found X, expected Y"."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from offline_lmrl.data.errors import InputError
from offline_lmrl.data.forms import is_whole, read_text
from offline_lmrl.data.trajectory import finite, require_list, shown


def text(record: Mapping, name: str, where: str) -> str:
    """Text, which may be empty. Raises Drop too, for text that UTF-8 cannot hold."""
    value = record.get(name)
    if not isinstance(value, str):
        raise InputError(f"{where}: {name}: found {shown(value)}, expected text")
    return read_text(value)


def number(record: Mapping, name: str, where: str) -> float:
    """A finite number."""
    try:
        return finite(name, record.get(name))
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def whole(record: Mapping, name: str, where: str) -> int:
    """A number without a fraction; Parquet with nulls and pandas make 3 a 3.0."""
    value = number(record, name, where)
    if value != int(value):
        raise InputError(f"{where}: {name}: found {value}, expected a whole number")
    return int(value)


def items(record: Mapping, name: str, where: str) -> Sequence[Any]:
    """A list."""
    try:
        return require_list(name, record.get(name))
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def objects(record: Mapping, name: str, where: str) -> Sequence[Mapping]:
    """A list of objects."""
    values = items(record, name, where)
    for i, value in enumerate(values):
        if not isinstance(value, Mapping):
            raise InputError(f"{where}: {name}[{i}]: found {shown(value)}, expected an object")
    return values


def inner(record: Mapping, name: str, where: str) -> Mapping:
    """An object."""
    value = record.get(name)
    if not isinstance(value, Mapping):
        raise InputError(f"{where}: {name}: found {shown(value)}, expected an object")
    return value


def group(record: Mapping, name: str, where: str) -> str:
    """The text or whole number in a column that says which rows stay together."""
    value = record.get(name)
    if is_whole(value):
        return str(int(value))
    if not isinstance(value, str) or not value:
        raise InputError(f"{where}: {name}: found {shown(value)}, expected a group: text or a whole number")
    return read_text(value)


def facts(record: Mapping, names: Iterable[str]) -> dict[str, str | float]:
    """The texts, numbers and flags under some names, for the labels; anything else is left out."""
    return {name: record[name] for name in names if isinstance(record.get(name), str | int | float)}
