"""Write output that is whole or absent, by one command at a time, without leftovers of killed commands.

Output is built in a staging folder, which is hidden and next to the output path, and is renamed when it is complete. A
command holds an flock on its staging folder; the lock ends with the process, however the process ends. A staging
folder without a lock was therefore left by a killed command: `sweep` removes it. If that command had moved an old
output into it and had not yet replaced that output, `sweep` restores the old output first.
"""

import fcntl
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from offline_lmrl.errors import InputError
from offline_lmrl.logs.trajectory import shown

ASIDE = "replaced"  # name, in a staging folder, of the old output that is being replaced
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?:\d+|\w{8})\.(?P<kind>tmp|old)")
# Libraries in Rust and C++ report a failed write only in the text of their error.
_ERRNO = re.compile(r"os error (\d+)")
_WRITE_FAILED = re.compile(r"PytorchStreamWriter|inline_container|iostream error")
_held: dict[tuple[int, int], int] = {}  # (device, inode) of a folder -> its locked descriptor


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Context manager: turn any error that prevents writing `path`, from whichever library, into one InputError."""
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
def reading(path: str | Path, advice: str = "a complete file") -> Iterator[None]:
    """Context manager: turn any exception from reading a file of this project into an InputError that names the file.

    Args:
      path: the file that the message names.
      advice: the end of the message, after "expected": what a usable file would be, or what the user can do.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        first = (str(error).splitlines() or [""])[0].split(". ")[0].strip()
        kind = type(error).__name__ + (f": {first[:200]}" if first else "")
        raise InputError(f"{path}: found a damaged file ({kind}), expected {advice}") from error


def read_object(path: str | Path, advice: str = "a complete file") -> dict[str, Any]:
    """Return the JSON object in a file that this project wrote.

    Args:
      advice: the end of the error message, after "expected"; see `reading`.

    Raises: InputError if the file is missing or damaged.
    """
    with reading(path, advice):
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise TypeError("not a JSON object")
    return found


def differences(found: Any, expected: Any, where: str = "") -> dict[str, tuple[Any, Any]]:
    """Return the settings in which two configs with all defaults filled in differ, such as a saved and a new one.

    At the top level only the names in `expected` are compared. A missing setting counts as None.

    Args:
      where: the dotted name of the part that is compared; "" = the whole config.
    Returns: dotted name of the setting -> (value in `found`, value in `expected`).
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
    """Describe in one line all `differences` between two configs; return "" if they agree."""
    return "; ".join(
        f"{name}: found {shown(there)}, expected {shown(here)}"
        for name, (there, here) in differences(found, expected).items()
    )


def cache_folder(name: str) -> Path:
    """Return the folder of this user for files of some kind that can be computed again."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "offline_lmrl" / name


def sync(path: Path) -> None:
    """Flush a file, or all files in a folder, to the disk."""
    for entry in [path, *path.rglob("*")] if path.is_dir() else [path]:
        sync_entry(entry)


def sync_entry(path: Path) -> None:
    """Flush one path to the disk: the content of a file, or the list of file names of a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move_into(staged: Path, folder: Path, last: Collection[str]) -> None:
    """Move the files of a staging folder into a folder, one by one, and remove the staging folder.

    Args:
      last: names of the files without which the folder counts as not finished. They are removed first and moved last,
        so that nobody takes a half-finished move for a whole one.
    """
    for name in last:
        (folder / name).unlink(missing_ok=True)
    for path in sorted(staged.iterdir(), key=lambda path: path.name in last):
        sync(path)
        os.replace(path, folder / path.name)
    staged.rmdir()


@contextmanager
def staging(path: Path) -> Iterator[Path]:
    """Context manager: yield an empty, locked folder next to `path`, the path of the output that is built in it.

    The folder is removed afterwards; the caller moves the output out of it before that. Leftovers of killed commands
    for the same output are removed first.
    """
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
    """Context manager: lock a folder for this process, and remove what killed commands left in it.

    The same process may enter it for a folder that it has already locked. The folder and its parents are created if
    needed; those that were created and are empty at the end are removed again.

    Raises: InputError if another process has locked the folder, or it cannot be written.
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
                f"{folder}: found another command at work in this folder, expected only one at a time; "
                "wait until it is done, or choose another folder"
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
            with suppress(OSError):  # it is not empty: keep it
                path.rmdir()


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove what killed commands left in a folder, and restore old outputs that they had moved aside.

    Args:
      name: file name of the output whose leftovers are removed; None = those of every output in the folder.
    """
    for path in folder.iterdir():
        found = _LEFTOVER.fullmatch(path.name)
        if found is None or name not in (None, found["name"]):
            continue
        with suppress(FileNotFoundError, BlockingIOError):  # another command is using or sweeping it
            descriptor = _lock(path)
            if descriptor is not None:
                target = folder / found["name"]
                if found["kind"] == "old" and not target.exists():
                    path.rename(target)
                else:
                    _clear(path, target)
            _release(descriptor)


def _clear(path: Path, target: Path) -> None:
    """Remove a staging folder or file; first move an old output that is in it back to `target` if that is missing."""
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
    """Lock a file or folder.

    Returns: the descriptor whose closing ends the lock; None, with a warning, if the file system has no such locks.

    Raises: BlockingIOError if another process has locked it. FileNotFoundError if it was removed meanwhile.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between open and flock, another process may have removed the folder or put another in its place.
        if _identity(path) != (os.fstat(descriptor).st_dev, os.fstat(descriptor).st_ino):
            raise FileNotFoundError(path)
    except (BlockingIOError, FileNotFoundError):
        os.close(descriptor)
        raise
    except OSError as error:
        os.close(descriptor)
        logging.getLogger(__name__).warning(
            "%s: this folder or file cannot be locked (%s); run only one command at a time there", path, error.strerror
        )
        return None
    return descriptor


def _release(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)


def _forget() -> None:
    """Close the inherited locks in a forked child, so that the folders are free as soon as the parent ends."""
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget)
