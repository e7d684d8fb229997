"""The one error for bad input from outside, and the words for values of the wrong type."""

import os
import re
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

LONGEST_MESSAGE = 2000
_SHOWN = 60  # characters of a value
_LISTED = 20  # names
_BITS = 1000  # of a whole number that is printed; beyond some 14,000 Python prints none


class InputError(ValueError):
    """A file, row, setting or name from outside that cannot be used.

    The message is one line that says where, which field, what was found and what was expected, for example
    `logs.jsonl:7: messages[2].reward: found nan, expected a finite number`. The command line prints it as it is and
    exits with code 2. What was found goes in by `shown`. Of a message that is longer than LONGEST_MESSAGE all the
    same, as one with a library's own words may be, the middle is left out.
    """

    def __init__(self, message: str):
        if len(message) > LONGEST_MESSAGE:
            half = LONGEST_MESSAGE // 2 - 3
            message = f"{message[:half]} ... {message[-half:]}"
        super().__init__(message)


def shown(value: Any) -> str:
    """A value as an error prints it: one short line, as fast for a large one, or one that holds itself, as for a
    small one."""
    text = ""
    for part in _parts(value):
        text += part
        if len(text) > _SHOWN:
            break
    return _short(text)


def listed(names: Iterable[str]) -> str:
    """Names from outside, as an error lists them: plain ones as they are, others as values."""
    names = list(names)
    plain = [name if re.fullmatch(rf"[\w.-]{{1,{_SHOWN}}}", name) else shown(name) for name in names[:_LISTED]]
    return ", ".join([*plain, "..."] if len(names) > _LISTED else plain)


def _parts(value: Any) -> Iterator[str]:
    """The text that `repr` gives, piece by piece; of text and bytes the beginning."""
    if isinstance(value, str | bytes):
        yield repr(value[: _SHOWN + 1])
    elif isinstance(value, int) and value.bit_length() > _BITS:
        yield f"a whole number of {value.bit_length()} bits"
    elif type(value) in (list, tuple, dict):
        opening, closing = {list: "[]", tuple: "()", dict: "{}"}[type(value)]
        yield opening
        for i, inner in enumerate(value):
            yield ", " if i else ""
            yield from _parts(inner)
            if isinstance(value, Mapping):
                yield from chain([": "], _parts(value[inner]))
        yield f"{',' if isinstance(value, tuple) and len(value) == 1 else ''}{closing}"
    else:
        yield repr(value)


class Stopped(KeyboardInterrupt):
    """A signal ended a command, which left nothing half done: the line that says how it goes on, and the signal."""

    def __init__(self, line: str, number: int):
        super().__init__(line, number)
        self.line, self.number = line, number


class Failed(RuntimeError):
    """A part of a command failed after the program had printed its traceback, and the rest of the command was done.

    The message is one line that says which part; the command line prints it as it is and exits with code 1.
    """


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextmanager
def opening(name: str | Path, what: str) -> Iterator[None]:
    """Around a library's call that opens the model or the tokenizer (`what`) of a folder or hub name. Whatever the
    library raises is about what it read.

    Raises: InputError that shows the name and the first line of what the library says about it.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        first = _first_line(error)
        if os.path.isdir(name):  # False for what no path can be
            raise InputError(
                f"{name}: found a folder whose {what} cannot be read ({first}), "
                f"expected a {what} that transformers opens"
            ) from error
        raise InputError(
            f"{name}: found no such folder, and the hub gave no {what} of that name ({first}), expected one of them"
        ) from error


@contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Around a program from outside (`what`), such as a chat template, which may have no end. Threads other than the
    main one cannot be stopped and are not.

    Raises: InputError where it takes longer.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise InputError(f"{what}: found one that runs for more than {seconds:g} s, expected one that ends")

    before, start = signal.signal(signal.SIGALRM, stop), time.monotonic()
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)
        # What somebody else waits for comes when it would have come.
        signal.setitimer(signal.ITIMER_REAL, left and max(left - (time.monotonic() - start), 1e-3))


@contextmanager
def reading(where: str | Path, what: str) -> Iterator[None]:
    """Around a library's call that reads data (`what`). Whatever the library raises is about what it read.

    Raises: InputError that says where, and the first line of what the library says.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        first = _first_line(error)
        raise InputError(f"{where}: found {what} that cannot be read ({first}), expected a whole one") from error


def in_our_words(message: str, prefix: str = "") -> str:
    """jsonargparse's error about a value of the wrong type as `key: found x, expected y`; other messages as they are.

    prefix: what stands before the key, its dot included.
    """
    message = " ".join(message.split())
    if ours := re.search(r"Errors: - (\S+: found .*) - Expected a <class 'NoneType'>", message):
        return ours[1]  # from inside a dataclass that may be null
    problem = re.match(r'Parser key "([^"]+)": (.*)$', message)
    if not problem:
        return message
    key, rest = f"{prefix}{problem[1]}", problem[2]
    given = re.search(r".*(?:Given value|Got value): (.*)$", rest)
    expected = re.search(r"Subtypes: \[(.*?)\] Errors|Expected an? (.*?)\. Got value", rest)
    if not (given and expected):
        return f"{key}: {rest}"
    plain = _plain_type(expected[1] or expected[2])
    if re.fullmatch(r"[+-]?(nan|inf(inity)?)", given[1], re.IGNORECASE):  # which Python counts among the floats
        plain = re.sub(r"\bfloat\b", "a finite number", plain)
    return f"{key}: found {_short(given[1])}, expected {plain}"


def _short(text: str) -> str:
    """A value as jsonargparse prints it, no longer than `shown` shows one."""
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def _plain_type(text: str) -> str:
    """A type as jsonargparse prints it, for people: <class 'int'>, <class 'NoneType'> -> int or null."""
    text = re.sub(r"<(?:class|enum) '(?:\w+\.)*(\w+)'>", r"\1", text)
    text = text.replace("typing.", "").replace("NoneType", "null")
    if choices := re.fullmatch(r"Literal\[(.*)\]", text):
        return f"one of {choices[1]}"
    return re.sub(r", (?![^\[]*\])", " or ", text)
