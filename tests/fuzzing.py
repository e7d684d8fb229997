"""Damage for inputs of all kinds, and what has to hold whatever is damaged: an answer in time, and one line of it."""

import contextlib
import copy
import io
import json
import random
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from offline_lmrl.cli import main
from offline_lmrl.errors import LONGEST_MESSAGE


class TooLong(BaseException):
    """A case that did not end in time; no Exception, which the code under test may catch."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def stop(*_):
        raise TooLong(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_command(*arguments: Any, seconds: float = 60, stdin: str = "") -> tuple[int, str, str]:
    """A command in this process: exit code, stdout, stderr. It has to end in time, with 0, or with 2 and one line."""
    out, err = io.StringIO(), io.StringIO()
    with time_limit(seconds), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _stdin(stdin):
        code = main([str(argument) for argument in arguments])
    out, err = out.getvalue(), err.getvalue()
    assert code in (0, 2), (code, err)
    if code == 2:
        said = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(said) == 1 and len(said[0]) <= LONGEST_MESSAGE + 10, err[:2000]
        err = said[0]
    out.encode()  # what a terminal has to take
    return code, out, err


@contextlib.contextmanager
def _stdin(text: str) -> Iterator[None]:
    before, sys.stdin = sys.stdin, io.StringIO(text)
    try:
        yield
    finally:
        sys.stdin = before


def deep(levels: int) -> Any:
    value: Any = 0
    for i in range(levels):
        value = [value] if i % 2 else {"x": value}
    return value


WILD = (
    None, True, False, 0, 1, 3, -1, 2**31, 2**63, -(2**63) - 1, 10**25, 10**400, 0.5, -1.5, 1e308, -1e308, 5e-324,
    float("nan"), float("inf"), "", " ", "\n", "x", "a b", "0", "1e999", "nan", "true", "null", "\0", "\x1b[31m\x07",
    "\ud83d", "a\udcffb", "\u2028\u202e", "x" * 5000, "\n\nHuman: a\n\nAssistant: b", "{", "[]", '{"a": 1}', [], {},
    [None], [[]], [[[0]]], ["x"], [1, "x", None], {"role": 1}, {"role": "assistant"}, {"": ""}, {"\ud83d": 1},
    {"type": "image", "url": "x"}, {"role": "assistant", "content": "a"}, [{"role": "assistant", "content": "a"}],
    [{"type": "text", "text": "a"}, {"type": "x" * 3000}], deep(150), deep(196), deep(198), deep(199), deep(200),
    deep(201),
)  # fmt: skip
NAMES = ("", "x", "\ud83d", "\0", "x" * 3000, "labels", "group", "source", "reward", "label", "messages", "role",
         "tool_calls", "weight", "margin", "options", "target", "ranks", "task", "terminated", "\x1b[2J")  # fmt: skip


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything inside a value."""
    found = []
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        found.append((value, key))
        if len(found) < 2000:
            found += places(value[key])
    return found


def mutated(value: Any, rng: random.Random, wild: Sequence[Any] = WILD, names: Sequence[str] = NAMES) -> Any:
    """A copy with one to three things changed."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        found = places(value)
        if not found:
            return copy.deepcopy(rng.choice(wild))
        parent, key = rng.choice(found)
        kind = rng.randrange(9)
        if kind == 0:
            del parent[key]
        elif kind <= 3:
            parent[key] = copy.deepcopy(rng.choice(wild))
        elif kind == 4:
            parent[key] = rng.choice(([parent[key]], {rng.choice(names): parent[key]}))
        elif kind == 5:
            other, place = rng.choice(found)
            if place in other if isinstance(other, dict) else place < len(other):
                parent[key] = copy.deepcopy(other[place])
        elif kind == 6 and isinstance(parent, dict):
            parent[rng.choice(names)] = parent.pop(key)
        elif kind == 7 and isinstance(parent, dict):
            parent[rng.choice(names)] = copy.deepcopy(rng.choice(wild))
        elif isinstance(parent, list):
            parent[key:key] = [copy.deepcopy(parent[key])] * rng.choice((1, 2, 9))
    return value


def damaged_bytes(content: bytes, rng: random.Random) -> bytes:
    """The content with a byte changed, a part gone, doubled or put in, or cut short."""
    at, some = rng.randrange(len(content) + 1), rng.randrange(1, 40)
    kind = rng.randrange(7)
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + content[at + some :]
    if kind == 2:
        return content[:at] + content[at : at + some] * 2 + content[at + some :]
    if kind == 3:
        return content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :]
    put_in = rng.choice((b"\xff", b"\0", b"\xef\xbb\xbf", b"9" * 5000, b"NaN", b"1e999", b"\\ud83d", b"\\u0000", b"[",
                         b"}", b'"', b",", b"[" * 1000, b"\x1b]0;x\x07", b"-", b"\r"))  # fmt: skip
    return content[:at] + put_in + content[at:]


def mutated_lines(rows: Sequence[Any], n: int, seed: int) -> list[bytes]:
    """n lines of JSON, each a row with something changed; one in five is damaged as text too."""
    rng = random.Random(seed)
    lines = []
    for _ in range(n):
        line = json.dumps(mutated(rng.choice(rows), rng)).encode()
        line = damaged_bytes(line, rng) if rng.randrange(5) == 0 else line
        lines.append(line.replace(b"\n", b" ") or b" ")
    return lines


def each(n: int, check: Callable[[random.Random], None], seed: int) -> None:
    """Runs a check on n random cases; a failure names its case."""
    for case in range(n):
        try:
            check(random.Random(f"{seed}:{case}"))
        except BaseException as error:
            error.add_note(f"seed {seed}, case {case} of {n}")
            raise
