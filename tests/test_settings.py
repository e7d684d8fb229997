"""Settings from plain values and from words of the command line: names, types, and errors in one line."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pytest

from offline_lmrl.cli.parser import Command
from offline_lmrl.errors import InputError
from offline_lmrl.settings import Parameter, Word, arguments, build, expected, parameters_of, setting


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True)
class Inner:
    depth: int = setting(1, "Levels.")
    width: float = setting(2.0, "In tokens.")

    def __post_init__(self):
        if self.depth < 1:
            raise InputError(f"depth: found {self.depth}, expected at least 1")


@dataclass
class Outer:
    name: str
    rate: float = 0.1
    count: int = 3
    fast: bool = False
    folder: Path | None = None
    kind: Literal["tied", "linear", 4] = "tied"
    sizes: tuple[int, ...] = (1, 2)
    ask: float | str | None = None
    asks: tuple[float | str, ...] | None = None
    colour: Colour | str = "red"
    table: Mapping[str, Mapping[str, float]] = setting(dict, "Numbers by name.")
    free: dict[str, Any] = setting(dict, "Anything.")
    inner: Inner = setting(lambda: Inner(depth=7), "A group.")
    maybe: Inner | None = None

    def __post_init__(self):
        if self.rate < 0:
            raise ValueError("the rate is below 0")


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        ({"rate": 2}, "rate", 2.0),
        ({"rate": "1e-4"}, "rate", 1e-4),
        ({"rate": Word("1e-4", 1e-4)}, "rate", 1e-4),
        ({"count": Word("5", 5)}, "count", 5),
        ({"name": Word("5", 5)}, "name", "5"),
        ({"folder": Word("5", 5)}, "folder", Path("5")),
        ({"folder": Word("null", None)}, "folder", None),
        ({"fast": Word("true", True)}, "fast", True),
        ({"kind": Word("linear", "linear")}, "kind", "linear"),
        ({"kind": Word("4", 4)}, "kind", 4),
        ({"sizes": [4, 5]}, "sizes", (4, 5)),
        ({"sizes": None}, "sizes", (1, 2)),
        ({"ask": Word("2", 2)}, "ask", 2.0),
        ({"name": Word("{x", "{x", "no end")}, "name", "{x"),
        ({"ask": Word("max", "max")}, "ask", "max"),
        ({"ask": "2"}, "ask", "2"),  # quoted in a file: text, because the setting takes text
        ({"ask": 2}, "ask", 2.0),
        ({"asks": Word("[0, p50]", [0, "p50"])}, "asks", (0.0, "p50")),
        ({"colour": Word("blue", "blue")}, "colour", Colour.BLUE),
        ({"table": {"ours": {"score": 1}}}, "table", {"ours": {"score": 1.0}}),
        ({"free": {"a": Word("2", 2), "b": "2", "c": None}}, "free", {"a": 2, "b": "2", "c": None}),
        ({"free": None}, "free", {}),
        ({"inner": {"width": 5}}, "inner", Inner(7, 5.0)),  # over the field's default, not over that of the class
        ({"inner": Word("{depth: 2}", {"depth": 2})}, "inner", Inner(2)),
        ({"inner": Inner(4)}, "inner", Inner(4)),
        ({"maybe": {"depth": 2}}, "maybe", Inner(2)),
        ({"maybe": None}, "maybe", None),
    ],
)
def test_a_value_becomes_what_the_setting_takes(given, name, value):
    found = getattr(build(Outer, {"name": "x", **given}), name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rtae": 1}, "rtae: found a setting that does not exist; did you mean 'rate'?"),
        ({"depth": 1}, "depth: found a setting that does not exist; did you mean 'inner.depth'?"),
        ({"inner": {"rate": 1}}, "inner.rate: found a setting that does not exist; did you mean 'rate'?"),
        ({"maybe": {"dept": 1}}, "maybe.dept: found a setting that does not exist; did you mean 'maybe.depth'?"),
        ({3: 1}, "3: found a setting that does not exist, expected one of name, rate, count, "),
        ({"name": 5}, "name: found 5, expected text"),
        ({"name": None}, "name: found null, expected text"),
        ({"rate": "fast"}, "rate: found 'fast', expected a finite number"),
        ({"rate": True}, "rate: found True, expected a finite number"),
        ({"rate": math.nan}, "rate: found nan, expected a finite number"),
        ({"rate": Word("nan", "nan")}, "rate: found 'nan', expected a finite number"),
        ({"count": 2.5}, "count: found 2.5, expected a whole number"),
        ({"free": {"a": Word("{x", "{x", "no end")}}, "free.a: found text that is not YAML (no end)"),
        ({"count": Word("{x", "{x", "no end")}, "count: found '{x', expected a whole number"),
        ({"count": 2**63}, "count: found 9223372036854775808, expected a number of at most 64 bits"),
        ({"count": True}, "count: found True, expected a whole number"),
        ({"count": 10**400}, "count: found "),
        ({"fast": Word("", None)}, "fast: found '', expected true or false"),
        ({"kind": Word("no", False)}, "kind: found 'no', expected one of tied, linear, 4"),
        ({"fast": 1}, "fast: found 1, expected true or false"),
        ({"folder": [1]}, "folder: found [1], expected a path or null"),
        ({"kind": "cubic"}, "kind: found 'cubic', expected one of tied, linear, 4"),
        ({"sizes": "12"}, "sizes: found '12', expected a list"),
        ({"sizes": [1, "a"]}, "sizes[1]: found 'a', expected a whole number"),
        ({"ask": [1]}, "ask: found [1], expected a finite number or text or null"),
        ({"asks": [[1]]}, "asks[0]: found [1], expected a finite number or text"),
        ({"table": {"ours": 3}}, "table.ours: found 3, expected a mapping of settings"),
        ({"inner": 3}, "inner: found 3, expected a mapping of settings"),
        ({"maybe": {"depth": "x"}}, "maybe.depth: found 'x', expected a whole number"),
        ({"maybe": {"depth": 0}}, "depth: found 0, expected at least 1"),
        ({"rate": -1}, "the rate is below 0"),
    ],
)
def test_a_wrong_value_is_one_line_with_the_key_what_was_found_and_what_was_expected(given, message):
    with pytest.raises(InputError) as error:
        build(Outer, {"name": "x", **given})
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_the_place_of_the_mapping_is_in_every_message():
    for given, message in (
        ({}, "methods.a.name: missing, expected text"),
        ({"name": "x", "rate": "y"}, "methods.a.rate: found 'y'"),
        ({"name": "x", "rtae": 1}, "methods.a.rtae: found a setting that does not exist; did you mean 'methods.a."),
        ({"name": "x", "rate": -1}, "methods.a: the rate is below 0"),
    ):
        with pytest.raises(InputError, match=message):
            build(Outer, given, "methods.a")


class Rule:
    def __init__(self, scorers: Sequence[complex], words: int, names: Sequence[str] = (), other=None, **more: int):
        pass


def test_functions_and_classes_are_read_by_their_annotations():
    def function(first: int, second: "float" = 1.0):
        pass

    assert arguments(parameters_of(function), {"first": Word("2", 2)}) == {"first": 2}
    given = {"scorers": ["1j", 2], "words": 3, "names": ["a"], "other": [Word("1", 1)]}
    found = arguments(parameters_of(Rule), given, readers={complex: complex})
    assert found == {"scorers": [1j, 2], "words": 3, "names": ["a"], "other": [1]}
    with pytest.raises(InputError, match="^scorer.words: missing, expected a whole number$"):
        arguments(parameters_of(Rule), {"scorers": []}, "scorer", {complex: complex})


def test_types_are_put_in_plain_words():
    assert expected(int | None) == "a whole number or null"
    assert expected(dict[str, Any] | str) == "a mapping of settings or text"
    assert expected(Colour) == "one of red, blue"


def test_only_a_null_on_the_command_line_is_null():
    words = Command("x", {}).words(["--a", "", "--b", "#1", "--c", "null", "--d=~", "--e", "5 # five"])
    parameters = {name: Parameter(str | None) for name in words} | {"e": Parameter(int | None)}
    assert arguments(parameters, words) == {"a": "", "b": "#1", "c": None, "d": None, "e": 5}
    with pytest.raises(InputError, match="^a: found '', expected a whole number or null$"):
        arguments({"a": Parameter(int | None)}, {"a": words["a"]})


def test_an_empty_key_is_named():
    with pytest.raises(InputError, match="^'': found a setting that does not exist"):
        arguments({"a": Parameter(int)}, {"": 1})
