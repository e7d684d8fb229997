"""Output on disk: whole or absent, by one command at a time, and without a trace of those that were killed.

Whoever writes holds an flock on the folder it works in, which ends with the process, however that ends. What lies in
a folder of ours that nobody holds was left by a kill: `sweep` removes it, and puts back what it had moved aside.
"""

import fcntl
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from offline_lmrl.data.errors import InputError
from offline_lmrl.data.trajectory import shown

ASIDE = "replaced"  # in a staging folder: what its output takes the place of
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?:\d+|\w{8})\.(?P<kind>tmp|old)")
# Libraries in Rust and C++ say in words that a file could not be written.
_ERRNO = re.compile(r"os error (\d+)")
_WRITE_FAILED = re.compile(r"PytorchStreamWriter|inline_container|iostream error")
_held: dict[tuple[int, int], int] = {}  # (device, inode) of a folder -> its locked descriptor


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Raise what keeps `path` from being written as one InputError that names it, whichever library writes."""
    try:
        yield
    except OSError as error:
        raise _unwritable(path, error.strerror or str(error)) from error
    except Exception as error:
        text = (str(error).splitlines() or [""])[0]
        if isinstance(error, InputError):
            raise
        if number := _ERRNO.search(text):
            raise _unwritable(path, os.strerror(int(number[1]))) from error
        if isinstance(error, SafetensorError) or _WRITE_FAILED.search(text):
            raise _unwritable(path, f"a write that failed, as on a full disk ({text})") from error
        raise


def _unwritable(path: str | Path, reason: str) -> InputError:
    return InputError(f"{path}: found {reason}, expected a path that can be written")


@contextmanager
def reading(path: str | Path, advice: str = "a whole file") -> Iterator[None]:
    """Raise whatever a file of ours makes a reader raise as one InputError that names it, and says what to do."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        first = (str(error).splitlines() or [""])[0].split(". ")[0].strip()
        kind = type(error).__name__ + (f": {first[:200]}" if first else "")
        raise InputError(f"{path}: found a damaged file ({kind}), expected {advice}") from error


def read_object(path: str | Path, advice: str = "a whole file") -> dict[str, Any]:
    """The JSON object in a file of ours. Raises: InputError where it is damaged."""
    with reading(path, advice):
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise TypeError("no object of JSON")
    return found


def differences(found: Any, expected: Any, where: str = "") -> dict[str, tuple[Any, Any]]:
    """Every setting, by dotted name, in which two resolved configs disagree, with its value in both.

    At the top only what is expected is compared; a setting that is not there is null.
    """
    if isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        found, expected = dict(enumerate(found)), dict(enumerate(expected))
    if not (isinstance(found, Mapping) and isinstance(expected, Mapping)):
        return {} if found == expected else {where: (found, expected)}
    names = {**expected, **(found if where else {})}
    below = f"{where}." if where else ""
    return {
        place: values
        for name in names
        for place, values in differences(found.get(name), expected.get(name), f"{below}{name}").items()
    }


def say_differences(found: Any, expected: Any) -> str:
    """All settings that two resolved configs disagree on, in one line; "" where they agree."""
    return "; ".join(
        f"{name}: found {shown(there)}, expected {shown(here)}"
        for name, (there, here) in differences(found, expected).items()
    )


def sync(path: Path) -> None:
    """Have a file, or all files of a folder, on the disk."""
    for entry in [path, *path.rglob("*")] if path.is_dir() else [path]:
        sync_entry(entry)


def sync_entry(path: Path) -> None:
    """Have a file on the disk, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def staging(path: Path) -> Iterator[Path]:
    """Give an empty folder beside `path` to make it in. It is gone afterwards, with those that kills left there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent, path.name)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        try:
            descriptor = _lock(folder)
        except (FileNotFoundError, BlockingIOError):  # another command is sweeping it
            continue
        break
    try:
        yield folder
    finally:
        _clear(folder, path)
        _release(descriptor)


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Hold a folder for this process; what kills left in it is removed. Within this process it may be held again.

    The folder is made, and it and those above it are gone afterwards where they are new and empty.
    Raises: InputError where another process holds it.
    """
    folder = Path(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        place = _identity(folder)
        try:
            descriptor = None if place in _held else _lock(folder)
        except BlockingIOError as error:
            raise InputError(
                f"{folder}: found another command at work in this folder, expected one at a time: "
                "wait until it is done, or take another output"
            ) from error
    if descriptor is not None:
        _held[place] = descriptor
    try:
        with writing(folder):
            sweep(folder)
        yield
    finally:
        if descriptor is not None:
            _release(_held.pop(place))
        for path in made:
            with suppress(OSError):  # which says that there is something in it now
                path.rmdir()


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove what killed commands left in a folder, of the output `name` or of all, or put it back."""
    for path in folder.iterdir():
        found = _LEFTOVER.fullmatch(path.name)
        if found is None or name not in (None, found["name"]):
            continue
        with suppress(FileNotFoundError, BlockingIOError):  # somebody is at work there
            descriptor = _lock(path)
            if descriptor is not None:
                target = folder / found["name"]
                if found["kind"] == "old" and not target.exists():
                    path.rename(target)
                else:
                    _clear(path, target)
            _release(descriptor)


def _clear(path: Path, target: Path) -> None:
    """Remove a staging folder, or a file; what it had moved aside goes back where nothing took its place."""
    if (path / ASIDE).exists() and not target.exists():
        (path / ASIDE).rename(target)
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


def _lock(path: Path) -> int | None:
    """The descriptor that holds a file or folder; None, with a warning, on a file system that knows no such locks.

    Raises: BlockingIOError where another process holds it, FileNotFoundError where it was removed meanwhile.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _identity(path) != (os.fstat(descriptor).st_dev, os.fstat(descriptor).st_ino):
            raise FileNotFoundError(path)
    except (BlockingIOError, FileNotFoundError):
        os.close(descriptor)
        raise
    except OSError as error:
        os.close(descriptor)
        logging.getLogger(__name__).warning(
            "%s: cannot be locked (%s): run one command at a time there", path, error.strerror
        )
        return None
    return descriptor


def _release(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)


def _forget() -> None:
    """In a forked child: leave the folders to its parent, so that they are free when that one ends."""
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget)
