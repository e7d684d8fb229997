"""YAML from outside: it ends, it is plain, and what cannot be used is one line."""

import time
from typing import Any

import pytest
import yaml

from offline_lmrl.cli.parser import Command
from offline_lmrl.errors import LONGEST_MESSAGE, InputError
from offline_lmrl.logs.yaml_text import load_yaml, read_yaml
from offline_lmrl.settings import Parameter, arguments


def nested(inner: str) -> str:
    """Nine levels, each of nine aliases for the level before it: 9⁹ values in a few hundred characters."""
    lines = [f"a0: &a0 {inner}"]
    for i in range(1, 10):
        aliases = ",".join([f"*a{i - 1}"] * 9)
        lines.append(f"a{i}: &a{i} " + (f"[{aliases}]" if inner.startswith("[") else f"{{<<: [{aliases}]}}"))
    return "\n".join(lines)


REFUSED = {
    "itself in a list": ("a: &a [*a]", "which refers to no value that ends before it"),
    "itself merged": ("&a {b: {<<: *a}}", "which refers to no value that ends before it"),
    "many aliases": (nested("[x]"), "more than 100000 values"),
    "many merges": (nested("{k: 1}"), "more than 100000 values"),
    "a long chain": ("a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 300)), "200 levels"),
    "open lists": ("[" * 500_000, "deeper than 200 levels"),
    "open mappings": ("{a: " * 100_000, "deeper than 200 levels"),
    "lists by dashes": ("- " * 100_000, "deeper than 200 levels"),
    "a question mark": ("? ", "the key None, expected text"),
    "a list as a name": ("? [a]\n: b", "unhashable"),
    "a number as a name": ("1: 2", "the key 1, expected text"),
    "digits": ("a: " + "1" * 5000, "4300 digits"),
    "65 bits": ("a: 18446744073709551616", "at most 64 bits"),
    "no such month": ("a: !!timestamp 2001-99-99", "month must be in"),
    "no number": ("a: !!int x", "invalid literal"),
    "no truth value": ("a: !!bool x", "cannot be read"),
    "a set": ("a: !!set {b}", "expected a mapping, a list"),
    "bytes": ("a: !!binary 'aGk='", "expected a mapping, a list"),
    "a Python name": ("a: !!python/name:os.system", "constructor"),
    "NUL": ('a: "b\\0"', "without NUL"),
    "half a pair": ("a: \udcff", "surrogates"),
}


@pytest.mark.parametrize(("text", "said"), REFUSED.values(), ids=list(REFUSED))
def test_what_has_no_end_or_is_no_setting_is_refused_at_once(tmp_path, text, said):
    start = time.perf_counter()
    with pytest.raises(yaml.YAMLError, match=said):
        load_yaml(text)
    with pytest.raises(InputError, match=said) as refused:
        arguments({"key": Parameter(Any)}, Command("x", {}).words(["--key", text]))
    assert len(str(refused.value)) <= LONGEST_MESSAGE and "\n" not in str(refused.value)
    if "\udcff" not in text:
        (tmp_path / "settings.yaml").write_text(text)
        with pytest.raises(InputError, match=said):
            read_yaml(tmp_path / "settings.yaml", "settings")
    assert time.perf_counter() - start < 5


def test_plain_settings_are_read_as_they_are():
    text = "base: &base {rate: 1e-5, names: [a, null, true]}\nmine: {<<: *base, date: 2001-02-03, n: -3}"
    base = {"rate": 1e-5, "names": ["a", None, True]}
    assert load_yaml(text) == {"base": base, "mine": {**base, "date": "2001-02-03", "n": -3}}


@pytest.mark.parametrize(
    ("text", "value"),
    {
        "args:": {"args": None},
        "{a, b}": {"a": None, "b": None},
        "[.5, .5e3, 1E-4, 1_0.5, 1.e2]": [0.5, 500, 1e-4, 10.5, 100],
    }.items(),
)
def test_keys_without_values_are_mappings_and_all_spellings_of_a_number_are_numbers(text, value):
    assert load_yaml(text) == value


@pytest.mark.parametrize(("content", "said"), [(b"\xff: 1", "not UTF-8"), (b"[1]", "found .1., expected a mapping")])
def test_a_file_without_settings_is_refused(tmp_path, content, said):
    (tmp_path / "settings.yaml").write_bytes(content)
    with pytest.raises(InputError, match=said):
        read_yaml(tmp_path / "settings.yaml", "settings")
    with pytest.raises(InputError, match="nowhere.yaml: found No such file or directory, expected a YAML file"):
        read_yaml(tmp_path / "nowhere.yaml", "settings")
