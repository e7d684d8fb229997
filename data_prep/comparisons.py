"""What the importers of preferences share: rows in, comparisons in splits and a report out.

Every row becomes a comparison or is dropped for a named reason, and the counts add up: rows = imported + Σ dropped,
and imported = the comparisons of all splits + those merged into others + those removed because their group is in a
later split.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data_prep.reports import write_json
from offline_lmrl.data.comparison import Comparison
from offline_lmrl.data.comparison_checks import Feature, describe, merge_repeats
from offline_lmrl.data.errors import InputError
from offline_lmrl.data.forms import Drop
from offline_lmrl.data.io import Row, group_key, raw_splits, split_by_group, write_comparisons
from offline_lmrl.data.trajectory import shown

_FOUND = re.compile(r"(?P<field>.*?): found .*, expected (?P<expected>.*)", re.DOTALL)


def import_rows(
    source: str | Path, read: Callable[[Any, str, Counter], Any]
) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """What `read` makes of each row of a source, by split, and the counts.

    Args:
      read: takes an object, "file:row" and a counter of its repairs. It drops a row by raising Drop, or by returning
        None once it has counted the drop. A row that it refuses with an InputError is dropped too, and counted under
        the error's field and what was expected there.
    Raises: InputError for a source that cannot be read, or of which no row can be used.
    """
    made: dict[str, list[Any]] = {}
    counts: Counter[str] = Counter()
    total = 0
    for name, rows in raw_splits(source).items():
        made[name] = []
        for where, row in rows:
            total += 1
            one = _read(row, where, read, counts)
            if one is not None:
                made[name].append(one)
    dropped = _part(counts, "dropped: ")
    if not any(made.values()):
        why = "; ".join(f"{reason}: {n}" for reason, n in Counter(dropped).most_common(3)) or "no rows"
        raise InputError(f"{source}: found no row to use ({why}), expected at least one")
    imported = sum(map(len, made.values()))
    assert imported + sum(dropped.values()) == total
    return made, {"rows": total, "imported": imported, "dropped": dropped, "repaired": _part(counts, "repaired: "),
                  "kept as it is": _part(counts, "kept: ")}


def separate(made: Mapping[str, list[Row]], validation: float, seed: int) -> tuple[dict[str, list[Row]], int]:
    """The rows of a source in splits that share no group, and how many rows had to leave for that.

    A source without splits, or with a train split but no validation, gets a share `validation` of its groups as one.
    A group that is in two splits leaves all but the last.

    Args:
      made: rows by split of the source, "all" where it has none.
    """
    splits = {"train" if name == "all" else name: made[name]
              for name in sorted(made, key=lambda name: name not in ("all", "train"))}  # fmt: skip
    if "train" in splits and "validation" not in splits and validation > 0:
        parts = split_by_group(splits.pop("train"), {"train": 1 - validation, "validation": validation}, seed)
        splits = {**parts, **splits}
    removed, later = 0, set()
    for name in reversed(splits):
        own = [row for row in splits[name] if group_key(row) not in later]
        removed += len(splits[name]) - len(own)
        later |= {group_key(row) for row in own}
        splits[name] = own
    return {name: rows for name, rows in splits.items() if rows}, removed


def publish(
    made: Mapping[str, list[Comparison]], output: str | Path, report: Mapping[str, Any], validation: float, seed: int,
    features: Mapping[str, Feature] | None = None,
) -> dict[str, Any]:
    """Merges repeats, splits by group, writes <split>.jsonl and report.json; returns the report.

    Args:
      made: comparisons by split of the source.
      report: what comes before in the report.
      validation, seed: as in `separate`.
      features: further baselines by name.
    """
    merges: Counter[str] = Counter()
    splits, removed = separate({name: merge_repeats(rows, merges) for name, rows in made.items()}, validation, seed)
    everything = [row for rows in splits.values() for row in rows]
    report = {
        **report,
        "merged": _part(merges, "merged: "),
        "removed, their group is in a later split": removed,
        "splits": {name: {"comparisons": len(rows), "groups": len({group_key(row) for row in rows})}
                   for name, rows in splits.items()},
        **describe(everything, features),
    }  # fmt: skip
    for name, rows in splits.items():
        write_comparisons(Path(output) / f"{name}.jsonl", rows)
    write_json(Path(output) / "report.json", report)
    return report


def _read(row: Any, where: str, read: Callable[[Any, str, Counter], Any], counts: Counter[str]) -> Any:
    mine: Counter[str] = Counter()  # the repairs of a row that is dropped do not count
    try:
        if isinstance(row, InputError):
            raise row
        if not isinstance(row, Mapping):
            raise InputError(f"{where}: row: found {shown(row)}, expected an object")
        one = read(row, where, mine)
    except Drop as drop:
        counts[f"dropped: {drop}"] += 1
        return None
    except InputError as error:
        # The reason must not hold what is particular to the row, or there are as many reasons as rows.
        text = str(error).removeprefix(f"{where}: ")
        match = _FOUND.fullmatch(text)
        reason = f"{match['field']}: expected {match['expected']}" if match else text
        counts["dropped: " + re.sub(r"(?<![\w-])\d+", "N", re.sub(r"\[\d+\]", "", reason))] += 1
        return None
    counts.update(mine if one is not None else {name: n for name, n in mine.items() if name.startswith("dropped: ")})
    return one


def _part(counts: Counter[str], prefix: str) -> dict[str, int]:
    return {name.removeprefix(prefix): n for name, n in counts.most_common() if name.startswith(prefix)}
