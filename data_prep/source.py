"""Base classes of the sources: the settings that they share, reading rows, dividing them into splits, and writing.

Every row of an importer's source is imported or dropped for a named reason, and the counts add up: rows = imported +
Σ dropped.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from typing import Any

from offline_lmrl.errors import InputError, require, shown
from offline_lmrl.logs.comparison import Comparison
from offline_lmrl.logs.files import locked, move_into, staging, writing
from offline_lmrl.logs.io import (
    REPORT,
    Row,
    group_key,
    holds_comparisons,
    parsed,
    raw_splits,
    read_comparisons,
    read_trajectories,
    split_by_group,
    write_text,
)
from offline_lmrl.logs.io import write_rows as write_lines
from offline_lmrl.logs.io import write_trajectories as write_rows
from offline_lmrl.logs.preference_forms import root_group
from offline_lmrl.logs.record import Drop, Record
from offline_lmrl.logs.trajectory import Trajectory
from offline_lmrl.logs.trl import TrlForm
from offline_lmrl.settings import setting

VALIDATION_SHARE = 0.1
Found = dict[str, list[Any]]  # the results of `read` by split of the source
Splits = Mapping[str, Sequence[Any]]  # rows by split
Report = dict[str, Any]
_FOUND = re.compile(r"(?P<field>.*?): found .*, expected (?P<expected>.*)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Source(TrlForm):
    """A source of training data; the fields of a subclass are its settings.

    Raises: InputError for a setting that cannot be used.
    """

    output: str | Path = setting(MISSING, "folder to write to; created if needed")
    seed: int = setting(0, "random seed of the data and of the split")

    def __post_init__(self) -> None:
        given = vars(self)
        for name in ("input", "output"):
            require(given.get(name) != "", f"{name}: found empty text, expected a path")
        super().__post_init__()
        check_share(given.get("validation", 0))
        if "input" in given:
            source, output = Path(given["input"]).resolve(), Path(self.output).resolve()
            require(
                output not in (source, source.parent if source.is_file() else None),
                f"output: found {self.output}, which is or contains the input, expected another folder",
            )
        self.check()

    def check(self) -> None:
        """Check the settings of a subclass.

        Raises: InputError for a setting that cannot be used.
        """

    def prepare(self) -> Report:
        """Write the data and report.json, and return the content of report.json.

        Raises: InputError if nothing can be read or made, or the output cannot be written.
        """
        with locked(self.output):
            return self.make() if self.to is None else self._make_rows()

    def _make_rows(self) -> Report:
        """Make the data, write their rows for TRL and the report, and return the report."""
        with prepared(self.output) as folder:
            with staging(folder / "data") as temporary:
                data = temporary / "data"  # the staging folder itself is locked
                report = replace(self, output=data, to=None, threshold=None, keep_share=1.0).make()
                splits = {
                    path.stem: (read_comparisons if holds_comparisons(path) else read_trajectories)(path)
                    for path in sorted(data.glob("*.jsonl"))
                }
            require_no_other_splits(self.output, splits)
            counts: Counter[str] = Counter()
            made = self.convert(splits, counts)
            for name, rows in made.items():
                write_lines(folder / f"{name}.jsonl", rows)
            report[f"rows for {self.to}"] = {**{name: len(rows) for name, rows in made.items()}, **+counts}
            write_json(folder / REPORT, report)
        return report

    def make(self) -> Report:
        """Make and write the data while the output folder is locked; return the content of report.json."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class FileSource(Source):
    """A source that reads files."""

    input: str | Path = setting(
        MISSING, "a file (JSON Lines, JSON, CSV, TSV or Parquet), a folder of them, a datasets folder or a hub name"
    )


@dataclass(frozen=True, kw_only=True)
class Importer(FileSource):
    """A source of rows. A subclass makes one row of training data of each in `read`.

    Where several rows belong together, it makes the final rows in `assemble`.
    """

    validation: float = setting(
        VALIDATION_SHARE, "share of the groups that goes to validation if the source has no validation split"
    )
    group: str | None = setting(
        None,
        "column by which rows are kept together in one split, such as a customer; null = the prompt or conversation",
    )

    def read(self, row: Record) -> Any:
        """Make a row of training data of a row of the source, whose repairs are counted in `row.repairs`.

        Returns: the row of training data, perhaps as the last item of a tuple; or None for a row that is dropped and
          counted in `row.repairs` under "dropped: ...".
        Raises: Drop to leave the row out for a reason, or InputError, which leaves it out for the field that the error
          names and what was expected there.
        """
        raise NotImplementedError

    def assemble(self, found: Found, report: Report) -> Splits:
        """Make the final rows by split of the results of `read` by split, and add facts about them to the report."""
        return found

    def joined(self, rows: Splits) -> Splits:
        """Return rows whose group is the source's id so far with the groups of `join_groups`.

        If the user named the column of the group, the rows stay as they are.
        """
        return join_groups(rows) if self.group is None else rows

    def import_rows(self) -> tuple[Found, Report]:
        """Apply `read` to each row.

        Returns: the results by split of the source ("all" if it has no splits), and the entries with which the report
          begins: the numbers of rows, imported, dropped, repaired and kept rows.
        Raises: InputError if the source cannot be read, or none of its rows can be used.
        """
        counts: Counter[str] = Counter()
        made = {}
        for name, rows in raw_splits(self.input).items():
            found = (self.import_row(where, row, counts) for where, row in rows)
            made[name] = [one for one in found if one is not None]
        return made, self.counted(counts)

    def import_row(self, where: str, raw: Any, counts: Counter[str]) -> Any:
        """Return the result of `read` for a raw row (see `logs.io.parsed`), or None if the row is dropped."""

        def read(repairs: Counter[str]) -> Any:
            row = parsed(raw, where, repairs)
            one = self.read_value(row, where, repairs)
            fields = row if isinstance(row, Mapping) else {}
            return None if one is None else self.grouped(one, Record(fields, where, repairs))

        return count_row(read, where, counts)

    def read_value(self, row: Any, where: str, repairs: Counter[str]) -> Any:
        """Return the result of `read` for a row of plain values, which has to be an object.

        Args:
          where: "file:row", the start of error messages.
          repairs: incremented for each repair, under a key that describes it.
        """
        require(isinstance(row, Mapping), f"{where}: row: found {shown(row)}, expected an object")
        return self.read(Record(row, where, repairs))

    def grouped(self, one: Any, row: Record) -> Any:
        """Return a result of `read` with the group that the user's column names, if the user named one."""
        if self.group is None:
            return one
        if isinstance(one, tuple) and isinstance(one[-1], Trajectory | Comparison):
            return (*one[:-1], self.grouped(one[-1], row))
        return replace(one, group=row.group(self.group))

    def counted(self, counts: Counter[str]) -> Report:
        """Return the entries with which a report begins: counts of rows read, imported, dropped and repaired.

        Raises: InputError if no row was imported.
        """
        dropped = part(counts, "dropped: ")
        if not counts["imported"]:
            why = "; ".join(f"{reason}: {n}" for reason, n in Counter(dropped).most_common(3)) or "no rows"
            raise InputError(f"{self.input}: found no row to use ({why}), expected at least one")
        assert counts["imported"] + sum(dropped.values()) == counts["rows"]
        return {
            "rows": counts["rows"],
            "imported": counts["imported"],
            "dropped": dropped,
            "repaired": part(counts, "repaired: "),
            "kept as it is": part(counts, "kept: "),
        }


def count_row(read: Callable[[Counter[str]], Any], where: str, counts: Counter[str]) -> Any:
    """Read one row; return the result, or None if the row is dropped.

    Args:
      read: reads the row, and increments its argument for each repair.
      where: "file:row", the start of error messages.
      counts: incremented under "rows"; and then under "imported" and for each repair, or under "dropped: " and the
        reason. The repairs of a dropped row are not counted.
    """
    counts["rows"] += 1
    repairs: Counter[str] = Counter()
    try:
        one = read(repairs)
    except Drop as drop:
        counts[f"dropped: {drop}"] += 1
        return None
    except InputError as error:
        # Remove what is specific to the row (the found value, indices into lists) from the reason; otherwise there
        # would be as many reasons as rows.
        text = str(error).removeprefix(f"{where}: ")
        match = _FOUND.fullmatch(text)
        reason = f"{match['field']}: expected {match['expected']}" if match else text
        counts["dropped: " + re.sub(r"\[\d+\]", "", reason)] += 1
        return None
    counts["imported"] += one is not None
    counts.update({key: n for key, n in repairs.items() if one is not None or key.startswith("dropped: ")})
    return one


def part(counts: Counter, prefix: str) -> dict[str, int]:
    """Return the counts under keys that start with a prefix, without the prefix, the largest first."""
    return {
        name.removeprefix(prefix): n
        for name, n in counts.most_common()
        if isinstance(name, str) and name.startswith(prefix)
    }


def check_share(validation: float) -> None:
    """Check that the validation share is at least 0 and below 1, so that some groups are left to train on.

    Raises: InputError if it is not.
    """
    require(0 <= validation < 1, f"validation: found {validation}, expected 0 to below 1")


def join_groups(made: Mapping[str, list[Row]]) -> dict[str, list[Row]]:
    """Return the rows with new groups: two rows get the same group if they have the same id or first user turn.

    If rows A and B have the same id, and B and C the same first user turn (`root_group`), all three get one group. The
    id alone misses prompts that were posted twice; the words alone miss prompts that were edited.

    Args:
      made: rows by split; the group of a row is the source's id so far.
    """
    parents: dict[tuple[bool, str], tuple[bool, str]] = {}

    def find(key: tuple[bool, str]) -> tuple[bool, str]:
        while parents.setdefault(key, key) != key:
            parents[key] = parents[parents[key]]  # union-find with path halving
            key = parents[key]
        return key

    def links(row: Row) -> list[tuple[bool, str]]:
        root = root_group(row.turns if isinstance(row, Trajectory) else row.context)
        return [(is_id, name) for is_id, name in ((False, root), (True, row.group)) if name]

    for rows in made.values():
        for row in rows:
            roots = [find(key) for key in links(row)]
            for root in roots:
                parents[root] = min(roots)  # independent of the order of rows; words come before ids
    return {
        name: [replace(row, group=find(links(row)[0])[1]) if links(row) else row for row in rows]
        for name, rows in made.items()
    }


def separate(made: Mapping[str, Sequence[Row]], validation: float, seed: int) -> tuple[dict[str, list[Row]], int]:
    """Make splits that share no group; return them and the number of rows removed to achieve this.

    If the source has no splits, or a train split but no validation split, a share of its training groups becomes the
    validation split. The rows of a group that is in several splits are kept only in the last of these splits (train is
    the first).

    Args:
      made: rows by split of the source; "all" if it has no splits.
      validation: share of the groups that becomes the validation split, from 0 to below 1.
      seed: random seed of the split.
    Raises: InputError if the share is out of range.
    """
    check_share(validation)
    splits = {
        "train" if name == "all" else name: made[name]
        for name in sorted(made, key=lambda name: name not in ("all", "train"))
    }
    if "train" in splits and "validation" not in splits and validation > 0:
        parts = split_by_group(splits.pop("train"), {"train": 1 - validation, "validation": validation}, seed)
        splits = {**parts, **splits}
    removed, later = 0, set()
    for name in reversed(splits):
        own = [row for row in splits[name] if group_key(row) not in later]
        removed += len(splits[name]) - len(own)
        later |= {group_key(row) for row in own}
        splits[name] = own
    return splits, removed


@contextmanager
def prepared(output: str | Path) -> Iterator[Path]:
    """Context manager: yield a temporary folder, and afterwards move its files into `output`, the report last.

    The caller writes a data set and its report to the temporary folder. If an error occurs before the move, `output`
    stays as it was. If the process is killed during the move, `output` has no report, which counts as not finished.

    Raises: InputError if `output` cannot be written, or another process has locked it.
    """
    output = Path(output)
    with locked(output), writing(output), staging(output / REPORT) as folder:
        try:
            yield folder
        except InputError as error:  # name the user's folder instead of the staging folder
            raise InputError(str(error).replace(str(folder), str(output))) from error
        move_into(folder, output, [REPORT])


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON, in one step: an interrupted call leaves the old file, or none, at `path`."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_trajectories(
    output: str | Path,
    splits: Mapping[str, Sequence[Trajectory]],
    report: Report,
    files: Mapping[str, Any] | None = None,
) -> Report:
    """Write <split>.jsonl of each split that is not empty, and report.json; return the report.

    Args:
      files: file name -> content of further JSON files; None = no others.
    """
    with prepared(output) as folder:
        for name, rows in splits.items():
            if rows:
                write_rows(folder / f"{name}.jsonl", rows)
        for name, content in {**(files or {}), REPORT: report}.items():
            write_json(folder / name, content)
    return report


def write_shares(output: str | Path, rows: Sequence[Trajectory], seed: int, report: Report) -> Report:
    """Write a share of the groups to validation.jsonl and the others to train.jsonl, and report.json."""
    shares = {"train": 1 - VALIDATION_SHARE, "validation": VALIDATION_SHARE}
    return write_trajectories(output, split_by_group(rows, shares, seed), report)


def require_no_other_splits(output: str | Path, splits: Collection[str]) -> None:
    """Check that the folder has no split files of an earlier call besides those that will be replaced.

    Their groups may be in the new splits too.

    Args:
      output: the folder; it need not exist.
      splits: names of the new splits.
    Raises: InputError if the folder has other splits.
    """
    others = sorted(path.name for path in Path(output).glob("*.jsonl") if path.stem not in splits)
    require(
        not others,
        f"{output}: found {', '.join(others)} of another run, expected an empty folder or no splits "
        f"other than {', '.join(splits)}",
    )
