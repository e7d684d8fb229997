"""What the importers of preferences share: rows in, comparisons in splits and a report out.

Every row becomes a comparison or is dropped for a named reason, and the counts add up: rows = imported + Σ dropped,
and imported = the comparisons of all splits + those merged into others + those removed because their group is in a
later split.

Comparisons wait on disk, in buckets by group, until all are read: what is merged, split and counted needs its own
group only, so memory holds a bucket and not the data. A bucket holds its groups whole.
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
from offline_lmrl.data.comparison import Comparison, to_record
from offline_lmrl.data.comparison_checks import Feature, facts, merge_repeats, tally
from offline_lmrl.data.errors import InputError
from offline_lmrl.data.files import staging
from offline_lmrl.data.forms import Drop
from offline_lmrl.data.io import REPORT, Row, atomic_output, group_key, parsed, raw_splits, split_by_group
from offline_lmrl.data.parallel import chunks, map_in_order
from offline_lmrl.data.preference_forms import read_comparison
from offline_lmrl.data.trajectory import Trajectory, shown

_BUCKETS = 512  # by group: of a million comparisons each holds some thousand
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
    """`import_rows` and `publish` where each row makes one comparison: in a memory that does not grow with the rows.

    Args:
      read, group: as in `import_rows`.
      processes: how many read rows at once.
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
    """What `read` makes of each row of a source, by split, and the counts.

    Args:
      read: takes an object, "file:row" and a counter of its repairs. It drops a row by raising Drop, or by returning
        None once it has counted the drop. A row that it refuses with an InputError is dropped too, and counted under
        the error's field and what was expected there.
      group: the column that holds the group of what `read` makes; None = the group that it gives.
      lists: whether a row may be a list, which has no columns.
    Raises: InputError for a source that cannot be read, or of which no row can be used.
    """
    made: dict[str, list[Any]] = {}
    counts: Counter[str] = Counter()
    for name, rows in raw_splits(source).items():
        found = (read_raw(row, where, read, counts, group, lists) for where, row in rows)
        made[name] = [one for one in found if one is not None]
    return made, _counted(source, counts)


def check_share(validation: float) -> None:
    """Raises InputError unless a share of the groups can go to validation, so that some are left to train on."""
    if not 0 <= validation < 1:
        raise InputError(f"validation: found {validation}, expected 0 to below 1")


def separate(made: Mapping[str, list[Row]], validation: float, seed: int) -> tuple[dict[str, list[Row]], int]:
    """The rows of a source in splits that share no group, and how many rows had to leave for that.

    A source without splits, or with a train split but no validation, gets a share `validation` of its groups as one.
    A group that is in two splits leaves all but the last.

    Args:
      made: rows by split of the source, "all" where it has none.
    Raises: InputError for a share that is not from 0 to below 1.
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
    """Merges repeats, splits by group, writes <split>.jsonl and report.json; returns the report.

    Args:
      rows: comparisons by split of the source.
      report: what comes before in the report.
      validation, seed: as in `separate`.
      features: further baselines by name.
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
    """From the buckets in `folder` to files and report in `made`. A group is in one bucket: each is done by itself."""
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
        **facts(counts),
    }
    for name in splits:
        with ExitStack() as opened, atomic_output(made / f"{name}.jsonl") as temporary:
            parts = [opened.enter_context(path.open(encoding="utf-8")) for path in folder.glob(f"{name}.bucket-*")]
            file = opened.enter_context(temporary.open("w", encoding="utf-8"))
            file.writelines(
                line.partition(" ")[2] for line in heapq.merge(*parts, key=lambda line: int(line.partition(" ")[0]))
            )
    write_json(made / REPORT, report)
    return report


def _settle(
    bucket: Path, names: Sequence[str], validation: float, seed: int, features: Mapping[str, Feature]
) -> Counter:
    """Merges and splits the comparisons of one bucket, and writes them beside it, in the order of the source."""
    made: dict[str, list[Comparison]] = {name: [] for name in names}
    places: dict[tuple, int] = {}
    with bucket.open(encoding="utf-8") as lines:
        for line in lines:
            name, place, record = json.loads(line)
            row = read_comparison(record, str(bucket), Counter(), allow_empty=True)
            made[name].append(row)
            places.setdefault(_words(row), place)
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
    counts.update(tally([row for rows in splits.values() for row in rows], features))
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
    """A line of a bucket, and the number of the bucket."""
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
    """The head of a report. Raises InputError where no row was imported."""
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
    """What `read` makes of a row, as in `import_rows`, or None where it is dropped; `counts` gets the row, its repairs
    or why it is dropped, and how often it was imported."""
    counts["rows"] += 1
    mine: Counter[str] = Counter()  # the repairs of a row that is dropped do not count
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
        # The reason must not hold what is particular to the row, or there are as many reasons as rows: that is in
        # what was found, and in the places of lists.
        text = str(error).removeprefix(f"{where}: ")
        match = _FOUND.fullmatch(text)
        reason = f"{match['field']}: expected {match['expected']}" if match else text
        counts["dropped: " + re.sub(r"\[\d+\]", "", reason)] += 1
        return None
    counts["imported"] += one is not None
    counts.update(mine if one is not None else {name: n for name, n in mine.items() if name.startswith("dropped: ")})
    return one


def _in_group(one: Any, group: str) -> Any:
    """What was made of a row, or a split and that, with another group."""
    if isinstance(one, tuple) and isinstance(one[-1], Trajectory | Comparison):
        return (*one[:-1], replace(one[-1], group=group))
    return replace(one, group=group)


def _part(counts: Counter, prefix: str) -> dict[str, int]:
    return {
        name.removeprefix(prefix): n
        for name, n in counts.most_common()
        if isinstance(name, str) and name.startswith(prefix)
    }
