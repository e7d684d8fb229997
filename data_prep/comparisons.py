"""Shared code of the importers of preferences: read rows, write comparisons in splits, and report counts.

Every row becomes a comparison or is dropped for a named reason, and the counts add up: rows = imported + Σ dropped,
and imported = the comparisons of all splits + those merged into others + those removed because their group is in a
later split.

Until all rows are read, comparisons are stored on disk in buckets: files, of which each holds all comparisons of some
groups. Merging, splitting and counting need one group at a time, so memory holds one bucket and not all data.
"""

import heapq
import json
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from data_prep import fields
from data_prep.reports import prepared, require_no_other_splits, write_json
from offline_lmrl.errors import InputError
from offline_lmrl.logs.comparison import Comparison, to_record
from offline_lmrl.logs.comparison_checks import Feature, count_features, merge_repeats, summary
from offline_lmrl.logs.files import staging
from offline_lmrl.logs.forms import Drop
from offline_lmrl.logs.io import REPORT, Row, atomic_output, group_key, parsed, raw_splits, split_by_group
from offline_lmrl.logs.parallel import chunks, map_in_order
from offline_lmrl.logs.preference_forms import read_comparison
from offline_lmrl.logs.trajectory import Trajectory, shown

_BUCKETS = 512  # by group: with a million comparisons, each holds a few thousand
_CHUNK = 500  # rows that a process reads at once
_FOUND = re.compile(r"(?P<field>.*?): found .*, expected (?P<expected>.*)", re.DOTALL)


def convert(
    source: str | Path,
    read: Callable[[Any, str, Counter], Comparison | None],
    output: str | Path,
    validation: float,
    seed: int,
    processes: int = 1,
    group: str | None = None,
) -> dict[str, Any]:
    """Import rows that each make one comparison, and write splits and report, as `import_rows` and `publish` do.

    Memory does not grow with the number of rows.

    Args:
      source: file, folder or hub name.
      read: function (row, "file:row", counter for repairs) that returns a comparison, or None if it drops the row; see
        `import_rows`.
      output: folder to write to.
      validation: share of the groups that goes to validation; see `separate`.
      seed: random seed of the split.
      processes: number of processes that read rows.
      group: the column that holds the group; None = the group that `read` sets.
    Returns: the content of report.json.
    """
    parts = raw_splits(source)
    counts: Counter[str] = Counter()
    with prepared(output) as made, staging(Path(output) / "buckets") as folder:
        found = ((name, place, where, row) for name, rows in parts.items() for place, (where, row) in enumerate(rows))
        for lines, mine in map_in_order(partial(_convert, read, group), chunks(found, _CHUNK), processes):
            counts.update(mine)
            _spill(lines, folder)
        head = _counted(source, counts)
        return _finish(folder, list(parts), output, made, head, validation, seed, processes, {})


def import_rows(
    source: str | Path, read: Callable[[Any, str, Counter], Any], group: str | None = None, lists: bool = False
) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """Apply `read` to each row of a source.

    Args:
      source: file, folder or hub name.
      read: function (row, "file:row", counter) -> result. It increments the counter for each repair of the row. It
        drops a row by raising Drop, or by returning None after it has counted the drop. A row for which it raises
        InputError is dropped too, and counted under the field that the error names and what was expected there.
      group: the column that holds the group of the result of `read`; None = the group that `read` sets.
      lists: True: accept rows that are lists and not objects, and therefore have no columns.
    Returns: the results by split of the source ("all" if it has no splits), and the entries with which the report
      begins: the numbers of rows, imported, dropped, repaired and kept rows.
    Raises: InputError if the source cannot be read, or none of its rows can be used.
    """
    made: dict[str, list[Any]] = {}
    counts: Counter[str] = Counter()
    for name, rows in raw_splits(source).items():
        found = (read_raw(row, where, read, counts, group, lists) for where, row in rows)
        made[name] = [one for one in found if one is not None]
    return made, _counted(source, counts)


def check_share(validation: float) -> None:
    """Check that the validation share is at least 0 and below 1, so that some groups are left to train on.

    Raises: InputError if it is not.
    """
    if not 0 <= validation < 1:
        raise InputError(f"validation: found {validation}, expected 0 to below 1")


def separate(made: Mapping[str, list[Row]], validation: float, seed: int) -> tuple[dict[str, list[Row]], int]:
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


def publish(
    rows: Mapping[str, list[Comparison]],
    output: str | Path,
    report: Mapping[str, Any],
    validation: float,
    seed: int,
    features: Mapping[str, Feature] | None = None,
) -> dict[str, Any]:
    """Merge repeated comparisons, split by group, and write <split>.jsonl and report.json.

    Args:
      rows: comparisons by split of the source.
      output: folder to write to.
      report: the entries with which the report begins.
      validation: share of the groups that goes to validation; see `separate`.
      seed: random seed of the split.
      features: name -> function (comparison, index of an option) that returns a number. For each feature the report
        counts how often the option with the larger number is preferred. None = no features but those that are always
        in the report (_FEATURES in logs/comparison_checks.py, such as the length of the reply).
    Returns: the content of report.json.
    """
    with prepared(output) as made, staging(Path(output) / "buckets") as folder:
        _spill((_line(name, place, row) for name, some in rows.items() for place, row in enumerate(some)), folder)
        return _finish(folder, list(rows), output, made, report, validation, seed, 1, features or {})


def _finish(
    folder: Path,
    names: Sequence[str],
    output: str | Path,
    made: Path,
    report: Mapping[str, Any],
    validation: float,
    seed: int,
    processes: int,
    features: Mapping[str, Feature],
) -> dict[str, Any]:
    """Merge, split and count the buckets in `folder`, each by itself; write the splits and the report to `made`.

    Args:
      folder: the folder with the buckets.
      names: the splits of the source.
      output: the user's folder, which is only checked for splits of an earlier call.
      made: the staging folder, whose files are moved to `output` later.
      report: the entries with which the report begins.
      validation: share of the groups that goes to validation; see `separate`.
      seed: random seed of the split.
      features: further features for the report; see `publish`.
      processes: number of processes, which each take one bucket at a time.
    Returns: the content of report.json.
    """
    settle = partial(_settle, names=names, validation=validation, seed=seed, features=features)
    counts: Counter = Counter()
    for mine in map_in_order(settle, sorted(folder.glob("bucket-*")), processes):
        counts.update(mine)
    splits = {
        key[1]: {"comparisons": n, "groups": counts["split groups", key[1]]}
        for key, n in counts.items()
        if key[0] == "split rows" and n
    }
    require_no_other_splits(output, splits)
    report = {
        **report,
        "merged": _part(counts, "merged: "),
        "removed, their group is in a later split": counts["removed"],
        "splits": splits,
        **summary(counts),
    }
    for name in splits:
        with ExitStack() as opened, atomic_output(made / f"{name}.jsonl") as temporary:
            parts = [opened.enter_context(path.open(encoding="utf-8")) for path in folder.glob(f"{name}.bucket-*")]
            file = opened.enter_context(temporary.open("w", encoding="utf-8"))
            # Each part is sorted by the place of its rows, so merging restores the order of the source.
            file.writelines(
                line.partition(" ")[2] for line in heapq.merge(*parts, key=lambda line: int(line.partition(" ")[0]))
            )
    write_json(made / REPORT, report)
    return report


def _settle(
    bucket: Path, names: Sequence[str], validation: float, seed: int, features: Mapping[str, Feature]
) -> Counter:
    """Merge and split the comparisons of one bucket; return counts for the report.

    Each split of the bucket is written to a file next to it, in the order of the source.

    Args:
      bucket: the bucket's file.
      names: the splits of the source.
      validation: share of the groups that goes to validation; see `separate`.
      seed: random seed of the split.
      features: further features for the report; see `publish`.
    """
    made: dict[str, list[Comparison]] = {name: [] for name in names}
    places: dict[tuple, int] = {}
    with bucket.open(encoding="utf-8") as lines:
        for line in lines:
            name, place, record = json.loads(line)
            row = read_comparison(record, str(bucket), Counter(), allow_empty=True)
            made[name].append(row)
            places.setdefault(_words(row), place)  # merged comparisons take the place of their first row
    counts: Counter = Counter()
    splits, counts["removed"] = separate(
        {name: merge_repeats(rows, counts) for name, rows in made.items()}, validation, seed
    )
    for name, rows in splits.items():
        counts["split rows", name] += len(rows)
        counts["split groups", name] += len({group_key(row) for row in rows})
        with bucket.with_name(f"{name}.{bucket.name}").open("w", encoding="utf-8") as file:
            file.writelines(
                f"{places[_words(row)]} {json.dumps(to_record(row), ensure_ascii=False)}\n"
                for row in sorted(rows, key=lambda row: places[_words(row)])
            )
    counts.update(count_features([row for rows in splits.values() for row in rows], features))
    return counts


def _convert(
    read: Callable[[Any, str, Counter], Comparison | None],
    group: str | None,
    chunk: Sequence[tuple[str, int, str, Any]],
) -> tuple[list[tuple[int, str]], Counter[str]]:
    counts: Counter[str] = Counter()
    lines = []
    for name, place, where, row in chunk:
        made = read_raw(row, where, read, counts, group)
        if made is not None:
            lines.append(_line(name, place, made))
    return lines, counts


def _line(name: str, place: int, row: Comparison) -> tuple[int, str]:
    """Return the number of the comparison's bucket, and the line that is stored there.

    Args:
      name: split of the source.
      place: index of the comparison in the split.
    """
    return zlib.crc32(group_key(row).encode()) % _BUCKETS, json.dumps([name, place, to_record(row)])


def _spill(lines: Iterable[tuple[int, str]], folder: Path) -> None:
    by_bucket: dict[int, list[str]] = defaultdict(list)
    for number, line in lines:
        by_bucket[number].append(line + "\n")
    for number, some in by_bucket.items():
        with (folder / f"bucket-{number:03}").open("a", encoding="utf-8") as file:
            file.writelines(some)


def _words(row: Comparison) -> tuple:
    return row.group, row.context, frozenset(row.options)


def _counted(source: str | Path, counts: Counter[str]) -> dict[str, Any]:
    """Return the entries with which a report begins: counts of rows read, imported, dropped and repaired.

    Raises: InputError if no row was imported.
    """
    dropped = _part(counts, "dropped: ")
    if not counts["imported"]:
        why = "; ".join(f"{reason}: {n}" for reason, n in Counter(dropped).most_common(3)) or "no rows"
        raise InputError(f"{source}: found no row to use ({why}), expected at least one")
    assert counts["imported"] + sum(dropped.values()) == counts["rows"]
    return {
        "rows": counts["rows"],
        "imported": counts["imported"],
        "dropped": dropped,
        "repaired": _part(counts, "repaired: "),
        "kept as it is": _part(counts, "kept: "),
    }


def read_raw(
    row: Any,
    where: str,
    read: Callable[[Any, str, Counter], Any],
    counts: Counter[str],
    group: str | None = None,
    lists: bool = False,
) -> Any:
    """Apply `read` to a row as described in `import_rows`; return its result, or None if the row is dropped.

    Args:
      row: a raw row, see `offline_lmrl.logs.io.parsed`.
      where: "file:row", the start of error messages.
      read: function (row, "file:row", counter) -> result; see `import_rows`.
      group: the column that holds the group of the result; None = the group that `read` sets.
      lists: True: accept rows that are lists and not objects.
      counts: incremented under "rows"; and then under "imported" and for each repair, or under "dropped: " and the
        reason.
    """
    counts["rows"] += 1
    mine: Counter[str] = Counter()  # separate, because the repairs of a dropped row are not counted
    try:
        row = parsed(row, where, mine)
        if not isinstance(row, Mapping | list if lists else Mapping):
            raise InputError(f"{where}: row: found {shown(row)}, expected an object")
        one = read(row, where, mine)
        if group is not None and one is not None:
            row = row if isinstance(row, Mapping) else {}
            one = _in_group(one, fields.group(row, group, where))
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
    counts.update(mine if one is not None else {name: n for name, n in mine.items() if name.startswith("dropped: ")})
    return one


def _in_group(one: Any, group: str) -> Any:
    """Return `one` with `group` as the group of its row.

    Args:
      one: a result of `read` in `import_rows`: a row, or a tuple whose last item is a row.
    """
    if isinstance(one, tuple) and isinstance(one[-1], Trajectory | Comparison):
        return (*one[:-1], replace(one[-1], group=group))
    return replace(one, group=group)


def _part(counts: Counter, prefix: str) -> dict[str, int]:
    return {
        name.removeprefix(prefix): n
        for name, n in counts.most_common()
        if isinstance(name, str) and name.startswith(prefix)
    }
