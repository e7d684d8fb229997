"""Read and write data (JSON Lines, Parquet, CSV, `datasets` folders, hub names), split it by group and hash it.

A row is one line of a data file, or the `Trajectory` or `Comparison` read from it. A group is a set of rows about one
prompt or conversation, which must all be in the same split (train, validation or test).
"""

import csv
import errno
import gzip
import hashlib
import json
import math
import os
import pickle
import re
import sys
import tempfile
import zlib
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from itertools import accumulate, count
from pathlib import Path
from typing import Any, TypeVar

from offline_lmrl.errors import InputError, first_line, reading, require, shown
from offline_lmrl.logs.comparison import Comparison
from offline_lmrl.logs.comparison import to_record as comparison_record
from offline_lmrl.logs.files import ASIDE, staging, sweep, sync, writing
from offline_lmrl.logs.forms import COMPARISON_FIELDS, no_score, read_row
from offline_lmrl.logs.hub import ask_hub
from offline_lmrl.logs.parallel import chunks, map_in_order
from offline_lmrl.logs.preference_forms import read_comparison
from offline_lmrl.logs.trajectory import MAX_NESTING, Trajectory, Turn, names_in, nests_too_deep, require_text
from offline_lmrl.logs.trajectory import to_record as trajectory_record

Row = TypeVar("Row", Trajectory, Comparison)
Kept = TypeVar("Kept", bound=Sequence)
RawRows = Iterable[tuple[str, Any]]  # ("file:row", a raw row for `parsed`)

_TABLES = (".csv", ".csv.gz", ".tsv", ".tsv.gz")
_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", *_TABLES)
REPEATED_KEY = "repaired: JSON key given twice, its last value used"
_SPLIT_NAMES = {"train", "validation", "test"}
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_BOM = b"\xef\xbb\xbf"
_LFS_POINTER = b"version https://git-lfs"
_SHARD = re.compile(r"-\d+-of-\d+$")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CHUNK = 500  # rows that a process reads at once
REPORT = "report.json"  # `prepare` writes it last: a folder without it is not finished
_DATASETS_FOLDER = "a datasets folder"


def read_trajectories(
    source: str | Path, *, split: str | None = None, counts: Counter | None = None, reward: str | None = None
) -> list[Trajectory]:
    """Read the trajectories of a file, a folder or a hub dataset, in any scored form of `offline_lmrl.logs.forms`.

    Args:
      source: a file (JSON with a row per line or one list, CSV, TSV, each also as .gz, or Parquet), a folder of such
        files, a folder that `save_to_disk` of `datasets` wrote, or a hub name `owner/name`. In a folder, .json files
        beside other data are ignored.
      split: the split to read. Needed if the source has several. A folder with a file named train, validation or test
        is a folder of splits; in any other folder the files are parts of one data set.
      counts: incremented for every repair and every dropped row, under a key that describes it.
      reward: the column that holds a row's score, if it is not `reward` or `label`.

    Raises: InputError `file:row: field: found X, expected Y`.
    """
    return _scored(_part(source, split), str(source), counts, reward)


def read_comparisons(
    source: str | Path, *, split: str | None = None, counts: Counter | None = None
) -> list[Comparison]:
    """Read the comparisons of a source, in any form of `offline_lmrl.logs.preference_forms`.

    Args and errors: see `read_trajectories`.
    """
    return _read(_part(source, split), str(source), counts, read_comparison)


class Stored(Sequence[Row]):
    """An immutable list of rows that is kept on disk and read row by row, so that memory holds 8 bytes per row.

    The rows are in an unnamed temporary file, which forked processes can read too.

    Args:
      pickled: the rows in order, each pickled. `store` makes such a list from rows that are not pickled.
    """

    def __init__(self, pickled: Iterable[bytes]):
        self._ends = array("q", [0])
        with in_temporary_folder():
            self._file = tempfile.TemporaryFile()
            for row in pickled:
                self._ends.append(self._ends[-1] + self._file.write(row))
            self._file.flush()

    def __len__(self) -> int:
        return len(self._ends) - 1

    @cached_property
    def hash(self) -> str:
        """The `data_hash` of the rows, computed once, as they never change."""
        return _hash_of(self)

    def __getitem__(self, index):
        places = range(len(self))[index]
        if isinstance(places, range):
            return [self[i] for i in places]
        start = self._ends[places]
        # pread takes its own offset: forked processes share the file's position, so seek and read would race.
        return pickle.loads(os.pread(self._file.fileno(), self._ends[places + 1] - start, start))


@contextmanager
def in_temporary_folder() -> Iterator[None]:
    """Context manager: turn "no space left" in the temporary folder into an InputError that names the folder."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise InputError(
            f"{tempfile.gettempdir()}: found {error.strerror}, expected enough space for the data in the temporary "
            "folder; set TMPDIR to use another one"
        ) from error


def store(rows: Iterable[Row]) -> Stored[Row]:
    """Write rows to a temporary file, one at a time; return a list that reads them from there when needed."""
    return Stored(map(pickle.dumps, rows))


def store_comparisons(
    source: str | Path, *, split: str | None = None, counts: Counter | None = None, processes: int = 1
) -> Stored[Comparison]:
    """Read comparisons as `read_comparisons` does, but with several processes, and keep them on disk.

    Memory does not grow with the size of the data, except by 8 bytes per row.

    Args:
      source, split, counts: see `read_comparisons`.
      processes: how many processes read rows at once; 1 = only the calling process.
    """
    mine: Counter = Counter()
    stored = _stored(_part(source, split), read_comparison, mine, processes)
    return _kept(stored, str(source), counts, mine)


def store_trajectories(
    source: str | Path,
    *,
    split: str | None = None,
    counts: Counter | None = None,
    reward: str | None = None,
    processes: int = 1,
) -> Stored[Trajectory]:
    """Read trajectories as `read_trajectories` does, but with several processes, and keep them on disk.

    Memory does not grow with the size of the data, except by 8 bytes per row.

    Args:
      source, split, counts, reward: see `read_trajectories`.
      processes: how many processes read rows at once; 1 = only the calling process.
    """
    mine: Counter = Counter()
    stored = _stored(_part(source, split), partial(read_row, reward=reward), mine, processes)
    return _with_scores(_kept(stored, str(source), None, mine), str(source), counts, mine, reward)


def read_splits(
    source: str | Path, *, counts: Counter | None = None, reward: str | None = None
) -> dict[str, list[Trajectory]]:
    """Read every split of a source as `read_trajectories` reads one.

    Args: see `read_trajectories`.
    Returns: name of the split -> its trajectories. A source without splits has the one key "all".
    """
    counts = Counter() if counts is None else counts
    return {name: _scored(rows, f"{source} ({name})", counts, reward) for name, rows in raw_splits(source).items()}


def read_comparison_splits(source: str | Path, *, counts: Counter | None = None) -> dict[str, list[Comparison]]:
    """Read every split of a source of comparisons.

    Args: see `read_trajectories`.
    Returns: name of the split -> its comparisons. A source without splits has the one key "all".
    """
    counts = Counter() if counts is None else counts
    return {
        name: _read(rows, f"{source} ({name})", counts, read_comparison) for name, rows in raw_splits(source).items()
    }


def write_trajectories(path: str | Path, trajectories: Iterable[Trajectory]) -> None:
    """Write trajectories without loss. An existing file is replaced only after everything is written.

    Args:
      path: the suffix decides the format: .jsonl, .jsonl.gz, .parquet, or else a folder for `datasets.load_from_disk`.

    Raises: InputError if there is nothing to write or the path cannot be written.
    """
    _write(Path(path), [trajectory_record(trajectory) for trajectory in trajectories], "trajectories")


def write_comparisons(path: str | Path, comparisons: Iterable[Comparison]) -> None:
    """Write comparisons without loss. Args and errors: see `write_trajectories`."""
    _write(Path(path), [comparison_record(comparison) for comparison in comparisons], "comparisons")


def write_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write plain rows as JSON Lines, gzipped if the suffix is .gz.

    Raises: InputError if there is nothing to write or the path cannot be written.
    """
    path, rows = Path(path), list(rows)
    require(rows, f"{path}: found no rows to write, expected at least one")
    with atomic_output(path) as temporary:
        _write_lines(temporary, rows, compressed=path.suffix == ".gz")


def split_by_group(rows: Iterable[Row], shares: Mapping[str, float], seed: int) -> dict[str, list[Row]]:
    """Split rows so that no group is in two splits.

    A hash of the seed and the group decides the split, so adding rows never moves a row to another split. For a row
    without a group, a hash of its content takes the place of the group.

    Args:
      shares: name of the split -> its expected share of the groups; the shares sum to 1.
      seed: another seed gives another division.
    Returns: name of the split -> its rows, in their order; the names are those of `shares`.

    Raises: InputError if the shares are negative or do not sum to 1.
    """
    require(
        all(share >= 0 for share in shares.values()) and math.isclose(math.fsum(shares.values()), 1.0),
        f"shares: found {dict(shares)}, expected shares from 0 up that sum to 1",
    )
    splits: dict[str, list[Row]] = {name: [] for name in shares}
    names, bounds = list(shares), list(accumulate(shares.values()))
    for row in rows:
        digest = hashlib.sha256(f"{seed}:{group_key(row)}".encode()).digest()
        uniform = int.from_bytes(digest[:8]) / 2**64  # in [0, 1)
        place = min(bisect_right(bounds, uniform), len(names) - 1)  # rounding may leave the last bound under 1
        splits[names[place]].append(row)
    return splits


def group_key(row: Trajectory | Comparison) -> str:
    """Return the row's group, or a hash of its content if it has none; rows of equal keys must be in one split."""
    return row.group or "row:" + content_key(row)


def shared_groups(first: Sequence[Row], second: Sequence[Row]) -> set[str]:
    """Return the `group_key`s that occur in both sets of rows. Memory holds only the keys of the second set."""
    keys = {group_key(row) for row in second}
    return keys.intersection(map(group_key, first))


def in_one_group(rows: Sequence[Row]) -> bool:
    """True if there are several rows and all are of one group."""
    return len(rows) > 1 and bool(rows[0].group) and all(row.group == rows[0].group for row in rows)


def content_key(row: Trajectory | Comparison) -> str:
    """Return a hash of the content of a row, as hexadecimal text; rows with equal hashes are duplicates.

    The content of a trajectory is the turns, their rewards, and `terminated`. The content of a comparison is the
    context and the options in any order.
    """
    if isinstance(row, Comparison):
        content = [_spoken(row.context), sorted(map(_spoken, row.options))]
    else:
        content = [_spoken(row.turns), row.terminated]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def data_hash(rows: Iterable[Trajectory | Comparison]) -> str:
    """Return a sha256 of all fields of all rows, in order. Equal hashes mean equal data."""
    return rows.hash if isinstance(rows, Stored) else _hash_of(rows)


def _hash_of(rows: Iterable[Trajectory | Comparison]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        record = comparison_record(row) if isinstance(row, Comparison) else trajectory_record(row)
        digest.update(json.dumps(record, sort_keys=True, separators=(",", ":")).encode() + b"\n")
    return digest.hexdigest()


@contextmanager
def atomic_output(path: str | Path) -> Iterator[Path]:
    """Context manager: yield a temporary path at which the caller writes a file or folder, then rename it to `path`.

    After an error, nothing is left at the temporary path, and what was at `path` is unchanged. A file replaces an
    existing file; a folder replaces only a `datasets` folder or an empty one.

    Raises: InputError if `path` cannot be written.
    """
    path = Path(path)
    require(path.name, f"{path}: found a path without a file name, expected one that can be written")
    with writing(path), staging(path) as folder:
        temporary = folder / path.name
        yield temporary
        sync(temporary)
        if temporary.is_dir() and _is_dataset(path):
            os.replace(path, folder / ASIDE)  # os.replace cannot put a folder over a full one
        os.replace(temporary, path)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, in one step: an interrupted call leaves the old file, or none, at `path`.

    Raises: InputError if the path cannot be written.
    """
    with atomic_output(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def is_prepared(data: str | Path, output: str | Path) -> bool:
    """True if data exist and are complete.

    Data outside the folder `output`, which the command `prepare` writes, count as complete. Data inside it are
    complete if `prepare` has written its report there, which it does last. Leftovers of killed commands in `output`
    are removed first.

    Args:
      data: the file or folder that is needed.
      output: the folder that `prepare` writes.
    """
    place, folder = Path(data).resolve(), Path(output).resolve()
    if folder.is_dir():
        sweep(folder)
    return place.exists() and (folder not in (place, *place.parents) or (folder / REPORT).exists())


def raw_splits(source: str | Path, split: str | None = None) -> dict[str, RawRows]:
    """Return the splits of a source, without reading their rows.

    Args:
      source: see `read_trajectories`.
      split: the only split to load if the source is a hub dataset; None = all.
    Returns: name of the split ("all" for a source without splits) -> iterable of ("file:row", raw row), which reads
      rows during iteration. `parsed` makes plain values of a raw row.
    Raises: InputError if the source does not exist.
    """
    path = Path(source)
    if path.is_file():
        return {"all": _file_rows(path)}
    if path.is_dir() and str(source):  # no text would be the current folder
        return _dataset_parts(path) if _is_dataset(path) else _folder_parts(path)
    # If the folder before the slash exists, or the name has a known suffix, a path was meant and not a hub name.
    if _HUB_NAME.fullmatch(str(source)) and not path.parent.exists() and not path.name.endswith(_SUFFIXES):
        return _hub_parts(str(source), split)
    raise InputError(
        f"{str(source) or repr('')}: found no such file, folder or hub name, "
        f"expected a {', '.join(_SUFFIXES)} file, a folder of such files, or a hub name (owner/name)"
    )


def holds_comparisons(source: str | Path) -> bool:
    """True if the first row of a source is a comparison.

    Raises: InputError if the source or its first row cannot be read.
    """
    where, row = next((first for rows in raw_splits(source).values() for first in rows), ("", None))
    row = row and parsed(row, where)
    return isinstance(row, Mapping) and any(row.get(name) is not None for name, *_ in COMPARISON_FIELDS)


def _part(source: str | Path, split: str | None) -> RawRows:
    parts = raw_splits(source, split)
    require(
        split is not None or len(parts) <= 1, f"{source}: split: found none chosen, expected one of {', '.join(parts)}"
    )
    require(
        split is None or split in parts, f"{source}: split: found {shown(split)}, expected one of {', '.join(parts)}"
    )
    (rows,) = parts.values() if split is None else (parts[split],)
    return rows


def _read(
    rows: RawRows, source: str, counts: Counter | None, read: Callable[[Any, str, Counter], Row | None]
) -> list[Row]:
    mine: Counter = Counter()
    return _kept(list(_made(rows, read, mine)), source, counts, mine)


def _scored(rows: RawRows, source: str, counts: Counter | None, reward: str | None) -> list[Trajectory]:
    """Read trajectories whose score is in the column `reward`; None = the usual columns.

    Raises: InputError if no row has this column.
    """
    mine: Counter = Counter()
    made = _read(rows, source, mine, partial(read_row, reward=reward))
    return _with_scores(made, source, counts, mine, reward)


def _with_scores(made: Kept, source: str, counts: Counter | None, mine: Counter, reward: str | None) -> Kept:
    require(
        reward is None or mine[no_score(reward)] != len(made),
        f"{source}: {reward}: found no row with this column, expected the name of the column that holds the scores",
    )
    if counts is not None:
        counts.update(mine)
    return made


def _stored(
    rows: RawRows, read: Callable[[Any, str, Counter], Row | None], counts: Counter, processes: int
) -> Stored[Row]:
    def pickled() -> Iterator[bytes]:
        for some, mine in map_in_order(partial(_pickled, read), chunks(rows, _CHUNK), processes):
            counts.update(mine)
            yield from some

    return Stored(pickled())


def _made(rows: RawRows, read: Callable[[Any, str, Counter], Row | None], counts: Counter) -> Iterator[Row]:
    for where, row in rows:
        repairs: Counter = Counter()
        if (one := read(parsed(row, where, repairs), where, counts)) is not None:
            counts.update(repairs)
            yield one


def _pickled(read: Callable[[Any, str, Counter], Row | None], rows: RawRows) -> tuple[list[bytes], Counter]:
    counts: Counter = Counter()
    return [pickle.dumps(row) for row in _made(rows, read, counts)], counts


def _kept(kept: Kept, source: str, counts: Counter | None, mine: Counter) -> Kept:
    if counts is not None:
        counts.update(mine)
    if not kept:
        why = "; ".join(f"{reason}: {n}" for reason, n in mine.items()) or "no rows"
        raise InputError(f"{source}: found no row to use ({why}), expected at least one")
    return kept


def _spoken(turns: Iterable[Turn]) -> list[list[Any]]:
    return [[*turn.spoken, turn.is_trainable, turn.reward] for turn in turns]


def _file_rows(path: Path) -> RawRows:
    try:
        with path.open("rb") as file:
            start = file.read(len(_LFS_POINTER))
    except OSError as error:
        raise InputError(f"{path}: found {error}, expected a file that can be read") from error
    require(
        start != _LFS_POINTER, f"{path}: found a git-LFS pointer, expected the file itself; fetch it with git lfs pull"
    )
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    if path.name.endswith(_TABLES):
        return _table_rows(path)
    if path.name.endswith(_SUFFIXES):
        return _json_rows(path)
    raise InputError(f"{path}: found suffix {path.suffix!r}, expected one of {', '.join(_SUFFIXES)}")


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as lines:
            if lines.peek(4).removeprefix(_BOM).startswith(b"["):
                # Whatever its suffix, such a file is one list of rows, or has one row per line that is itself a list.
                try:
                    whole = _elements(lines.read().removeprefix(_BOM))
                except (ValueError, RecursionError):
                    lines.seek(0)
                else:
                    yield from _numbered(whole, str(path), "a JSON list")
                    return
            for number, line in enumerate(lines, 1):
                if line := line.removeprefix(_BOM if number == 1 else b"").strip():
                    yield f"{path}:{number}", line
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}:{number + 1}: found {error}, expected a file that can be read") from error


def _elements(text: bytes) -> list[bytes]:
    """Return the elements of a JSON list, each as its own JSON text.

    Raises: ValueError if the text is not exactly one list.
    """
    # Each element stays text, so that `parsed` checks it as it checks a line of JSON Lines.
    text, decoder, space, found = text.decode(), json.JSONDecoder(), re.compile(r"[ \t\r\n]*"), []
    place = space.match(text, 1).end()
    while text[place : place + 1] != "]" or found:
        _, end = decoder.raw_decode(text, place)
        found.append(text[place:end].encode())
        place = space.match(text, end).end()
        if text[place : place + 1] != ",":
            break
        place = space.match(text, place + 1).end()
    if text[place : place + 1] != "]" or text[place + 1 :].strip():
        raise ValueError(f"found no end of a list at character {place}")
    return found


def _table_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield ("file:line", (header, cells)) for each row of a CSV or TSV file; `line` is where the row begins."""
    # A quoted cell may hold line breaks: a row begins at line `start` and ends at line `number`.
    number, start = 0, 1

    def text(lines: Iterable[bytes]) -> Iterator[str]:
        nonlocal number
        for number, line in enumerate(lines, 1):
            yield line.removeprefix(_BOM if number == 1 else b"").decode()

    csv.field_size_limit(sys.maxsize)
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as lines:
            first = lines.peek(4096).splitlines()[:1] or [b""]
            # Spreadsheets separate cells by semicolons in languages that write 1,5 for 1.5.
            wide = b";" in first[0] and b"," not in first[0]
            delimiter = "\t" if ".tsv" in path.suffixes else ";" if wide else ","
            header = None
            for cells in csv.reader(text(lines), delimiter=delimiter, strict=True):
                if header is None:
                    header = [name.strip() for name in cells]
                    if twice := [name for name, n in Counter(header).items() if n > 1]:
                        raise InputError(f"{path}:1: header: found {shown(twice[0])} twice, expected different names")
                elif cells:
                    yield f"{path}:{start}", (header, cells)
                start = number + 1
    except UnicodeDecodeError as error:
        raise InputError(f"{path}:{number}: text: found bytes that are not UTF-8, expected UTF-8") from error
    except csv.Error as error:
        raise InputError(
            f"{path}:{start}: CSV: found a row that does not parse ({error}), "
            "expected cells, quoted where they hold quotes or line breaks"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}:{number + 1}: found {error}, expected a file that can be read") from error


def _cells(header: list[str], cells: list[str], where: str) -> dict[str, str | None]:
    """Return a row of a table as {name in the header: text of the cell}; an empty cell becomes None."""
    require(
        len(cells) == len(header), f"{where}: row: found {len(cells)} cells, expected {len(header)} as in the header"
    )
    return {name: cell or None for name, cell in zip(header, cells, strict=True)}


def parsed(row: Any, where: str, counts: Counter | None = None) -> Any:
    """Return a raw row as plain values: parse JSON bytes, or turn the cells of a table into a dict.

    Args:
      row: JSON as bytes, (header, cells) of a table, or plain values.
      where: the start of error messages, "file:row".
      counts: incremented for each key that is repeated in a JSON object; its last value is used.

    Raises: InputError if the row cannot be used.
    """
    if isinstance(row, tuple):
        return _cells(*row, where)
    may_hold_half_a_pair = not isinstance(row, bytes) or b"\\u" in row  # UTF-8 text needs an escape for it
    row = _loaded(row, where, counts) if isinstance(row, bytes) else row
    if nests_too_deep(row):
        raise _too_deep(where)
    try:
        for name in names_in(row) if may_hold_half_a_pair else ():
            require_text("a key", name)
    except InputError as error:
        raise InputError(f"{where}: JSON: {error}") from error
    return row


def _loaded(text: bytes, where: str, counts: Counter | None = None) -> Any:
    def made(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if counts is not None and len(found) < len(pairs):
            counts[REPEATED_KEY] += len(pairs) - len(found)
        return found

    try:
        return json.loads(text.decode(), object_pairs_hook=made)
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: text: found bytes that are not UTF-8, expected UTF-8") from error
    except RecursionError as error:
        raise _too_deep(where) from error
    except ValueError as error:
        raise InputError(
            f"{where}: JSON: found a line that does not parse ({error}), expected one JSON object per line"
        ) from error


def _too_deep(where: str) -> InputError:
    return InputError(f"{where}: JSON: found nesting deeper than {MAX_NESTING} levels, expected less nesting")


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield ("file:row", row as a dict) by pyarrow alone, which ignores metadata of other libraries in the file."""
    import pyarrow.parquet

    def rows() -> Iterator[Any]:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_CHUNK):
                batch.validate(full=True)  # offsets in a damaged file may point outside its buffers
                yield from batch.to_pylist(maps_as_pydicts="strict")

    yield from _numbered(rows(), str(path), "a Parquet file")


def _folder_parts(folder: Path) -> dict[str, RawRows]:
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name.endswith(_SUFFIXES)]
    # A .json file beside data of another suffix is a report on the data.
    files = [path for path in files if path.suffix != ".json"] or files
    require(files, f"{folder}: found no data files, expected {', '.join(_SUFFIXES)} files or a datasets folder")
    named: dict[str, list[Path]] = {}
    for path in files:
        stem = next(path.name.removesuffix(suffix) for suffix in _SUFFIXES if path.name.endswith(suffix))
        named.setdefault(_SHARD.sub("", stem), []).append(path)
    if not _SPLIT_NAMES & named.keys():
        named = {"all": files}
    return {name: _chain(paths) for name, paths in named.items()}


def _chain(paths: Sequence[Path]) -> Iterator[tuple[str, Any]]:
    for path in paths:
        yield from _file_rows(path)


def _is_dataset(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _dataset_parts(folder: Path) -> dict[str, RawRows]:
    import datasets

    with reading(folder, _DATASETS_FOLDER):
        loaded = datasets.load_from_disk(folder)
        for part in loaded.values() if isinstance(loaded, Mapping) else [loaded]:
            part.data.validate(full=True)  # offsets in a damaged file may point outside its buffers
    return _named_parts(loaded, str(folder))


def _hub_parts(name: str, split: str | None) -> dict[str, RawRows]:
    import datasets

    if not (Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")).exists():
        ask_hub(name, "dataset", "README.md")
    try:
        loaded = datasets.load_dataset(name, split=split)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{name}: found no file or folder, and no dataset of that name on the hub ({first_line(error)}), expected "
            "one of them"
        ) from error
    return _named_parts(loaded if split is None else {split: loaded}, name)


def _named_parts(loaded: Any, source: str) -> dict[str, RawRows]:
    parts = loaded if isinstance(loaded, Mapping) else {"all": loaded}
    return {
        str(name): _numbered(rows, source if rows is loaded else f"{source}/{name}", _DATASETS_FOLDER)
        for name, rows in parts.items()
    }


def _numbered(rows: Iterable[Any], source: str, what: str) -> Iterator[tuple[str, Any]]:
    found = iter(rows)
    for number in count(1):
        with reading(f"{source}:{number}", what):
            row = next(found, found)  # the iterator itself marks the end, since a row may be None
        if row is found:
            return
        yield f"{source}:{number}", row


def _write(path: Path, records: list[dict[str, Any]], what: str) -> None:
    require(records, f"{path}: found no {what} to write, expected at least one")
    with atomic_output(path) as temporary:
        if path.name.endswith((".jsonl", ".jsonl.gz")):
            _write_lines(temporary, records, compressed=path.suffix == ".gz")
        elif path.suffix == ".parquet":
            _dataset(records).to_parquet(temporary)
        else:
            _dataset(records).save_to_disk(temporary)


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]], compressed: bool) -> None:
    with (gzip.open if compressed else open)(path, "wt", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _dataset(records: list[dict[str, Any]]):
    """Return the records as a `datasets.Dataset`.

    Every field has a declared type, so a column of nulls keeps its type.
    """
    from datasets import Dataset, Features, List, Value

    text, number, whole = Value("string"), Value("float64"), Value("int64")
    turn = {
        "role": text,
        "content": text,
        "trainable": Value("bool"),
        "reward": number,
        "token_ids": List(whole),
        "behaviour_log_prob": List(number),
        **dict.fromkeys(("thinking", "tool_calls", "tools", "name", "tool_call_id"), text),
    }
    types = {
        "messages": List(turn),
        "terminated": Value("bool"),
        "group": text,
        "task": text,
        "source": text,
        "labels": text,
        "context": List(turn),
        "options": List(List(turn)),
        "target": List(number),
        "ranking": List(List(whole)),
        "weight": number,
    }

    def whole_turns(messages: list) -> list:
        return [
            whole_turns(message) if isinstance(message, list) else {name: message.get(name) for name in turn}
            for message in messages
        ]

    rows = [
        {
            name: whole_turns(value) if name in ("messages", "context", "options") else value
            for name, value in record.items()
        }
        for record in records
    ]
    return Dataset.from_list(rows, features=Features({name: types[name] for name in records[0]}))
