"""Base classes of the importers of preferences: merge comparisons, write them in splits, and report counts.

The counts add up: imported = the comparisons of all splits + those merged into others + those removed because their
group is in a later split.

Until all rows are read, comparisons are stored on disk in buckets: files, of which each holds all comparisons of some
groups. Merging, splitting and counting need one group at a time, so memory holds one bucket and not all data.
"""

import heapq
import json
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.source import Found, Importer, Report, part, prepared, require_no_other_splits, separate, write_json
from offline_lmrl.logs.comparison import Comparison, to_record
from offline_lmrl.logs.comparison_checks import Feature, count_features, merge_repeats, summary
from offline_lmrl.logs.files import staging
from offline_lmrl.logs.io import REPORT, atomic_output, group_key, raw_splits
from offline_lmrl.logs.parallel import chunks, map_in_order
from offline_lmrl.logs.preference_forms import read_comparison
from offline_lmrl.settings import setting

_BUCKETS = 512  # by group: with a million comparisons, each holds a few thousand
_CHUNK = 500  # rows that a process reads at once


@dataclass(frozen=True, kw_only=True)
class ComparisonImporter(Importer):
    """An importer whose rows are comparisons."""

    def features(self, found: Found) -> Mapping[str, Feature]:
        """Return name -> function (comparison, index of an option) that returns a number.

        For each feature the report counts how often the option with the larger number is preferred, in addition to
        those that are always in the report (_FEATURES in logs/comparison_checks.py, such as the length of the reply).

        Args:
          found: the results of `read` by split.
        """
        return {}

    def make(self) -> Report:
        """Read all rows, merge repeated comparisons, split by group, and write <split>.jsonl and report.json."""
        found, report = self.import_rows()
        made = self.assemble(found, report)
        with open_buckets(self.output, list(made), self.validation, self.seed) as buckets:
            return buckets.publish(made, report, self.features(found))


@dataclass(frozen=True, kw_only=True)
class StreamingImporter(ComparisonImporter):
    """An importer of rows that each make one comparison; memory does not grow with the number of rows."""

    processes: int = setting(1, "number of processes that read rows")

    def make(self) -> Report:
        """Read the rows with several processes, and publish them."""
        parts = raw_splits(self.input)
        counts: Counter[str] = Counter()
        with open_buckets(self.output, list(parts), self.validation, self.seed, self.processes) as buckets:
            rows = ((name, i, where, row) for name, some in parts.items() for i, (where, row) in enumerate(some))
            for lines, mine in map_in_order(self._lines, chunks(rows, _CHUNK), self.processes):
                counts.update(mine)
                buckets.add(lines)
            return buckets.finish(self.counted(counts))

    def _lines(self, chunk: Sequence[tuple[str, int, str, Any]]) -> tuple[list[tuple[int, str]], Counter[str]]:
        counts: Counter[str] = Counter()
        made = [(name, place, self.import_row(where, row, counts)) for name, place, where, row in chunk]
        return [_line(name, place, row) for name, place, row in made if row is not None], counts


@dataclass
class Buckets:
    """Comparisons on disk, which `finish` merges, splits and counts, one bucket at a time.

    Attributes:
      folder: the folder with the buckets.
      made: the staging folder, whose files are moved to `output` later.
      output: the user's folder, which is only checked for splits of an earlier call.
      names: the splits of the source.
      validation: share of the groups that goes to validation; see `separate`.
      seed: random seed of the split.
      processes: number of processes, which each take one bucket at a time.
      features: further features for the report; see `ComparisonImporter.features`.
    """

    folder: Path
    made: Path
    output: str | Path
    names: Sequence[str]
    validation: float
    seed: int
    processes: int = 1
    features: Mapping[str, Feature] = field(default_factory=dict)

    def publish(
        self, rows: Mapping[str, Sequence[Comparison]], report: Mapping[str, Any], features: Mapping[str, Feature]
    ) -> dict[str, Any]:
        """Add comparisons by split of the source, and finish.

        Args:
          report: the entries with which the report begins.
          features: further features for the report; see `ComparisonImporter.features`.
        Returns: the content of report.json.
        """
        self.features = features
        self.add(_line(name, place, row) for name, some in rows.items() for place, row in enumerate(some))
        return self.finish(report)

    def add(self, lines: Iterable[tuple[int, str]]) -> None:
        """Add comparisons, each as the number of its bucket and the line that is stored there (`_line`)."""
        by_bucket: dict[int, list[str]] = defaultdict(list)
        for number, line in lines:
            by_bucket[number].append(line + "\n")
        for number, some in by_bucket.items():
            with (self.folder / f"bucket-{number:03}").open("a", encoding="utf-8") as file:
                file.writelines(some)

    def finish(self, report: Mapping[str, Any]) -> dict[str, Any]:
        """Settle every bucket, write the splits and the report, and return the whole report."""
        counts: Counter = Counter()
        for mine in map_in_order(self._settle, sorted(self.folder.glob("bucket-*")), self.processes):
            counts.update(mine)
        splits = {
            key[1]: {"comparisons": n, "groups": counts["split groups", key[1]]}
            for key, n in counts.items()
            if key[0] == "split rows" and n
        }
        require_no_other_splits(self.output, splits)
        report = {
            **report,
            "merged": part(counts, "merged: "),
            "removed, their group is in a later split": counts["removed"],
            "splits": splits,
            **summary(counts),
        }
        for name in splits:
            self._join(name)
        write_json(self.made / REPORT, report)
        return report

    def _settle(self, bucket: Path) -> Counter:
        """Merge and split the comparisons of one bucket; return counts for the report.

        Each split of the bucket is written to a file next to it, in the order of the source.
        """
        made: dict[str, list[Comparison]] = {name: [] for name in self.names}
        places: dict[tuple, int] = {}
        with bucket.open(encoding="utf-8") as lines:
            for name, place, record in map(json.loads, lines):
                row = read_comparison(record, str(bucket), Counter(), allow_empty=True)
                made[name].append(row)
                places.setdefault(_words(row), place)  # merged comparisons take the place of their first row
        counts: Counter = Counter()
        merged = {name: merge_repeats(rows, counts) for name, rows in made.items()}
        splits, counts["removed"] = separate(merged, self.validation, self.seed)
        for name, rows in splits.items():
            counts["split rows", name] += len(rows)
            counts["split groups", name] += len(set(map(group_key, rows)))
            with bucket.with_name(f"{name}.{bucket.name}").open("w", encoding="utf-8") as file:
                file.writelines(
                    f"{places[_words(row)]} {json.dumps(to_record(row), ensure_ascii=False)}\n"
                    for row in sorted(rows, key=lambda row: places[_words(row)])
                )
        counts.update(count_features([row for rows in splits.values() for row in rows], self.features))
        return counts

    def _join(self, name: str) -> None:
        """Write a split from its parts in all buckets."""
        with ExitStack() as opened, atomic_output(self.made / f"{name}.jsonl") as temporary:
            parts = [
                opened.enter_context(path.open(encoding="utf-8")) for path in self.folder.glob(f"{name}.bucket-*")
            ]
            # Each part is sorted by the place of its rows, so merging restores the order of the source.
            lines = heapq.merge(*parts, key=lambda line: int(line.partition(" ")[0]))
            with temporary.open("w", encoding="utf-8") as file:
                file.writelines(line.partition(" ")[2] for line in lines)


@contextmanager
def open_buckets(
    output: str | Path, names: Sequence[str], validation: float, seed: int, processes: int = 1
) -> Iterator[Buckets]:
    """Context manager: yield empty `Buckets`, and afterwards move what they wrote into `output`.

    Args: see `Buckets`.
    """
    with prepared(output) as made, staging(Path(output) / "buckets") as folder:
        yield Buckets(folder, made, output, names, validation, seed, processes)


def _line(name: str, place: int, row: Comparison) -> tuple[int, str]:
    """Return the number of the comparison's bucket, and the line that is stored there.

    Args:
      name: split of the source.
      place: index of the comparison in the split.
    """
    return zlib.crc32(group_key(row).encode()) % _BUCKETS, json.dumps([name, place, to_record(row)])


def _words(row: Comparison) -> tuple:
    return row.group, row.context, frozenset(row.options)
