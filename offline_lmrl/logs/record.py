"""`Record`: a row, or an object inside a row, with its place for error messages and a counter of its repairs."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from offline_lmrl.errors import InputError, at, require, shown
from offline_lmrl.logs.trajectory import finite, require_list

WORDS = {"true": True, "false": False, "1": True, "0": False}


class Drop(Exception):
    """Raised if a row cannot be used and is left out; the message is the reason under which this is counted."""


def drop_if(holds: Any, reason: str) -> None:
    """Leave the row out for a reason, if a condition holds.

    Raises: Drop if it does.
    """
    if holds:
        raise Drop(reason)


class Record(dict[str, Any]):
    """A row, or an object inside a row, as a dict from names to values.

    Its methods return a field of the type that an importer needs; for a missing field, or one of another type, they
    raise InputError "where: name: found X, expected Y".

    Args:
      fields: name -> value.
      where: the start of error messages, "file:row", with the names of the fields around an inner object.
      repairs: a counter that is incremented for each repair of the row, under a key that describes it.
    """

    def __init__(self, fields: Mapping[str, Any], where: str, repairs: Counter[str]):
        super().__init__(fields)
        self.where, self.repairs = where, repairs

    @cached_property
    def present(self) -> set[str]:
        """The names of the fields that are not null."""
        return {name for name, value in self.items() if value is not None}

    def count(self, what: str, holds: Any = True) -> None:
        """Count a repair, or a fact about a row that is kept as it is, if it holds for the row.

        Args:
          what: the key, such as "repaired: end token removed" or "kept: tie".
        """
        if holds:
            self.repairs[what] += 1

    def error(self, name: str, expected: str) -> InputError:
        """Return the error for a field that holds something else than what was expected."""
        return InputError(f"{self.where}: {name}: found {shown(self.get(name))}, expected {expected}")

    def text(self, name: str) -> str:
        """Return a field that is text, possibly empty.

        Raises: Drop if UTF-8 cannot encode it. InputError if it is not text.
        """
        if not isinstance(self.get(name), str):
            raise self.error(name, "text")
        return read_text(self[name])

    def words(self, name: str, reason: str) -> str:
        """Return a field that is text with more than white space; raise Drop with this reason if it has none."""
        drop_if(not self.text(name).strip(), reason)
        return self[name]

    def number(self, name: str) -> float:
        """Return a field that is a finite number."""
        with at(self.where):
            return finite(name, self.get(name))

    def between(self, name: str, lowest: float, highest: float) -> float:
        """Return a field that is a number in a range, its ends included."""
        value = self.number(name)
        require(lowest <= value <= highest, f"{self.where}: {name}: found {value}, expected {lowest} to {highest}")
        return value

    def whole(self, name: str) -> int:
        """Return a field that is a whole number. 3.0 is one too: Parquet with nulls and pandas turn 3 into 3.0."""
        value = self.number(name)
        require(value == int(value), f"{self.where}: {name}: found {value}, expected a whole number")
        return int(value)

    def choice(self, name: str, known: Iterable[str]) -> str:
        """Return a field that is one of the known words."""
        if self.text(name) not in known:
            raise self.error(name, f"one of {', '.join(known)}")
        return self[name]

    def thumb(self, name: str) -> bool | None:
        """Return a field that is true, false or null; see `thumb`."""
        return thumb(self.get(name), name, self.where, self.repairs)

    def items_of(self, name: str) -> Sequence[Any]:
        """Return a field that is a list."""
        with at(self.where):
            return require_list(name, self.get(name))

    def each(self, name: str) -> "Record":
        """Return the items of a field that is a list as a record: "name[0]" -> the first item, and so on."""
        return Record({f"{name}[{i}]": item for i, item in enumerate(self.items_of(name))}, self.where, self.repairs)

    def texts(self, name: str) -> list[str]:
        """Return a field that is a list of texts."""
        found = self.each(name)
        return [found.text(item) for item in found]

    def numbers(self, name: str) -> list[float]:
        """Return a field that is a list of finite numbers."""
        found = self.each(name)
        return [found.number(item) for item in found]

    def objects(self, name: str) -> list["Record"]:
        """Return a field that is a list of objects."""
        found = self.each(name)
        return [found.inner(item) for item in found]

    def inner(self, name: str, expected: str = "an object") -> "Record":
        """Return a field that is an object.

        Args:
          expected: what the error message expects in its place.
        """
        if not isinstance(self.get(name), Mapping):
            raise self.error(name, expected)
        return Record(self[name], f"{self.where}: {name}", self.repairs)

    def group(self, name: str) -> str:
        """Return a field that holds the group of a row, as text: the text itself, or the digits of a whole number."""
        value = self.get(name)
        if is_whole(value):
            return str(int(value))
        if not isinstance(value, str) or not value:
            raise self.error(name, "a group: text or a whole number")
        return read_text(value)

    def known(self, *names: str) -> dict[str, str | float]:
        """Return {name: value} for those of `names` whose value is text, a number or a truth value, for labels."""
        return {name: self[name] for name in names if isinstance(self.get(name), str | int | float)}

    def columns(self, names: Iterable[str]) -> dict[str, Any]:
        """Return fields as entries for labels. Values that JSON cannot hold are left out and counted."""
        extra = {}
        for name in sorted(names):
            try:
                extra[name] = json.loads(json.dumps(self[name]))
            except (TypeError, ValueError):
                self.repairs[f"repaired: column {shown(name)} left out, because JSON cannot hold it"] += 1
        return extra

    def others(self, used: Iterable[str]) -> dict[str, Any]:
        """Return all fields but those that are used or null as entries for labels; see `columns`."""
        return self.columns(self.present.difference(used))


def thumb(value: Any, name: str, where: str, repairs: Counter) -> bool | None:
    """Return a label that is true, false or None; true and false may also be given as words or as 1 and 0.

    Args:
      name: the column, for error messages and counts.
      where: "file:row", the start of error messages.
      repairs: incremented for a label given in another way.
    Raises: InputError for any other value.
    """
    if isinstance(value, bool | None):
        return value
    field = name.partition("[")[0]
    if isinstance(value, str) and value.strip().casefold() in WORDS:
        repairs[f"repaired: {field} written as a word"] += 1
        return WORDS[value.strip().casefold()]
    if value in (0, 1):
        repairs[f"repaired: {field} 1 or 0 taken as true or false"] += 1
        return bool(value)
    raise InputError(f"{where}: {name}: found {shown(value)}, expected true, false or null")


def read_text(text: str) -> str:
    """Return the text itself if UTF-8 can encode it.

    Raises: Drop if UTF-8 cannot.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Drop("text with half a surrogate pair") from error
    return text


def is_whole(value: Any) -> bool:
    """True for a number without a fraction. A float counts: Parquet turns 3 into 3.0 in a column with nulls."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value % 1 == 0
