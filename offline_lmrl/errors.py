"""The one error for bad input, and helpers that print values and libraries' errors in its form."""

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

LONGEST_MESSAGE = 2000
MAX_WHOLE = 2**63  # torch, Arrow and numpy cannot hold numbers from here on
_SHOWN = 60  # characters of a value
_LISTED = 20  # names
_BITS = 1000  # of the largest whole number that is printed; Python refuses to print beyond about 14,000


class InputError(ValueError):
    """The error for a file, row, setting or name given by the user that cannot be used.

    The message is one line with the place, the field, what was found and what was expected, for example `logs.jsonl:7:
    messages[2].reward: found nan, expected a finite number`. Print the found value with `shown`. The command line
    prints the message unchanged and exits with code 2. The middle of a message longer than LONGEST_MESSAGE characters,
    for example with a library's own text in it, is replaced by " ... ".
    """

    def __init__(self, message: str):
        if len(message) > LONGEST_MESSAGE:
            half = LONGEST_MESSAGE // 2 - 3
            message = f"{message[:half]} ... {message[-half:]}"
        super().__init__(message)


def shown(value: Any) -> str:
    """Return a value as an error message prints it: one line of at most 60 characters.

    It takes little time even for a large value or a list that contains itself.
    """
    text = ""
    for part in _parts(value):
        text += part
        if len(text) > _SHOWN:
            break
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def listed(names: Iterable[str]) -> str:
    """Return names, joined by commas, as an error message lists them; unusual names are printed by `shown`."""
    names = list(names)
    plain = [name if re.fullmatch(rf"[\w.-]{{1,{_SHOWN}}}", name) else shown(name) for name in names[:_LISTED]]
    return ", ".join([*plain, "..."] if len(names) > _LISTED else plain)


def _parts(value: Any) -> Iterator[str]:
    """Yield `repr(value)` piece by piece; long texts, bytes and whole numbers are shortened."""
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


class at:  # noqa: N801 (used like a function; a class, because readers of rows enter it for every field)
    """Context manager: put the place of a row, "file:row", and a joint in front of the message of every InputError."""

    def __init__(self, where: str, joint: str = ": "):
        self.place = where + joint

    def __enter__(self) -> None:
        """Do nothing: only the end matters."""

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, InputError):
            raise InputError(f"{self.place}{error}") from error


def require(holds: bool, message: str) -> None:
    """Check a condition on something given by the user.

    Raises: InputError with this message if the condition does not hold.
    """
    if not holds:
        raise InputError(message)


class Stopped(KeyboardInterrupt):
    """Raised when a signal ends a command, after the command has left nothing half done.

    Attributes:
      line: the message that tells the user how to continue; "" = none.
      number: the number of the signal.
    """

    def __init__(self, line: str, number: int):
        super().__init__(line, number)
        self.line, self.number = line, number


class Failed(RuntimeError):
    """Raised at the end of a command of which one part failed and the rest succeeded.

    The traceback of the failed part has been printed. The message is one line that names the part. The command line
    prints it unchanged and exits with code 1.
    """


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextmanager
def _as_input_error(message_of: Callable[[str], str]) -> Iterator[None]:
    """Context manager: turn any exception into an InputError; `message_of` maps its first line to the message."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(message_of(first_line(error))) from error


@contextmanager
def reading_pretrained(name: str | Path, what: str) -> Iterator[None]:
    """Context manager: turn any exception raised while loading a model or tokenizer into one InputError.

    Args:
      name: the folder or hub name that is loaded.
      what: "model", "tokenizer" or a similar noun for the message.

    Raises: InputError with the name and the first line of the library's message.
    """

    def message(first: str) -> str:
        if os.path.isdir(name):  # False, without an error, for a name that cannot be a path
            return (
                f"{name}: found a folder whose {what} cannot be read ({first}), expected a {what} that transformers "
                "can load"
            )
        return (
            f"{name}: found no such folder, and no {what} of that name could be loaded from the hub ({first}), "
            "expected one of them"
        )

    with _as_input_error(message):
        yield


@contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Context manager: limit the time of code of others that might never end, such as a downloaded chat template.

    It works in the main thread only; other threads cannot be interrupted, and run without a limit.

    Args:
      seconds: the limit, in seconds.
      what: name of this code in the message, a noun such as "template".

    Raises: InputError if the code takes longer.
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
        # Restore an outer timer with the time that it has left; 0 would cancel it, so at least 1 ms.
        signal.setitimer(signal.ITIMER_REAL, left and max(left - (time.monotonic() - start), 1e-3))


@contextmanager
def reading(where: str | Path, what: str) -> Iterator[None]:
    """Context manager: turn any exception raised while a library reads data into one InputError.

    Args:
      where: the start of the message, such as "file:row".
      what: a noun for the data, such as "a Parquet file".

    Raises: InputError with the place and the first line of the library's message.
    """
    with _as_input_error(
        lambda first: f"{where}: found {what} that cannot be read ({first}), expected a complete one"
    ):
        yield
