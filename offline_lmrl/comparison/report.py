"""The tables of a comparison, made from the rows of results.jsonl alone.

The `kind` of a row is one of:

    comparison    the config, and the baseline and label columns that tables show
    behaviour     the training data
    optimum       the best possible mean score, if the environment knows it
    published     a result that is quoted, never measured here
    run           one method, training seed and setting

A run stores its outcome as `cells`, a list of [cluster, sum of scores, episodes], from which means, intervals and
paired differences over seeds are computed. `scores` lists the episode scores of each cell one by one, in the same
order for every method.
"""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from offline_lmrl.errors import InputError
from offline_lmrl.evaluation.metrics import Cells, Estimate
from offline_lmrl.logs.files import reading
from offline_lmrl.logs.trajectory import shown
from offline_lmrl.renamed import current

FEW_SEEDS = 5  # with fewer, intervals over seeds are wide, so every seed's value is printed too
COLUMNS = ("method", "decoding", "score [95%]", "beta", "per seed", "normalised")

# kind of row -> fields that `read_results` requires, with their types
NEEDED = {
    "comparison": {},
    "behaviour": {"method": str},
    "optimum": {"method": str},
    "published": {"method": str},
    "run": {"method": str, "decode": str, "seed": int, "cells": list, "config": dict},
}

Row = Mapping[str, Any]
Line = dict[str, str]  # column -> cell


def _current_row(row: Any) -> Any:
    """Return a row of results with its algorithm and config under their current names; the rest holds none."""
    if not isinstance(row, dict):
        return row
    return row | current({name: row[name] for name in ("algorithm", "config") if name in row})


def read_results(path: str | Path) -> list[dict[str, Any]]:
    """Read the rows of a results.jsonl.

    Raises: InputError "file:row: ..." for a row that no comparison writes.
    """
    with reading(path, "rows of results as JSON"):
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(_current_row(json.loads(line)))
        except ValueError as error:
            raise InputError(f"{path}:{number}: found {error}, expected one row of results as JSON") from error
        _check_row(rows[-1], f"{path}:{number}")
    return rows


def _check_row(row: Any, where: str) -> None:
    """Check the fields of a row that are listed in NEEDED, and the form of its cells.

    Args:
      where: "file:row", for the error message.
    Raises: InputError that names the field.
    """
    kind = row.get("kind") if isinstance(row, dict) else None
    if not isinstance(kind, str) or kind not in NEEDED:
        raise InputError(f"{where}: kind: found {shown(kind)}, expected one of {', '.join(NEEDED)}")
    for name, type_ in NEEDED[kind].items():
        if not isinstance(row.get(name), type_):
            raise InputError(f"{where}: {name}: found {shown(row.get(name))}, expected what `compare` writes")
    for cell in row["cells"] if kind == "run" else ():
        if not (isinstance(cell, list) and len(cell) == 3 and all(isinstance(n, int | float) for n in cell[1:])):
            raise InputError(f"{where}: cells: found {shown(cell)}, expected [cluster, sum of scores, episodes]")


def table(results: str | Path | Sequence[Row]) -> str:
    """Return the results as a Markdown table, aligned for terminals.

    Its lines are the behaviour, the optimum, each method and setting over its seeds, and the published results. The
    score is the mean over seeds and episodes with its 95% interval (see metrics). The difference column is paired by
    training seed and episodes with the baseline under the same decoding; planned play is compared with the baseline's
    sampled play if the baseline does not plan. A `*` marks an interval that excludes 0. With one training seed,
    intervals are "of this run", over episodes, and nothing is starred. A β marked "returns" was chosen by playing.

    Args:
      results: path of a results.jsonl, or its rows.
    """
    rows = read_results(results) if isinstance(results, str | Path) else results
    return markdown(table_lines(Results(rows)))


class Key(NamedTuple):
    """A method in one setting.

    decode: "sampled", "greedy" or "planned".
    chosen: how β was chosen, "offline" or "returns"; None without value guidance.
    """

    method: str
    decode: str
    chosen: str | None

    def __str__(self) -> str:
        how = {None: "", "offline": ", β offline", "returns": ", β by returns"}[self.chosen]
        return f"{self.method}, {self.decode}{how}"


class Results:
    """The rows of a comparison, sorted by kind and setting.

    rows: all rows.
    shown: the row of kind "comparison".
    groups: the runs of each setting, in the order of the rows.
    cells: the outcome of each setting over its runs.

    Raises: InputError if there is no row of kind "comparison".
    """

    def __init__(self, rows: Sequence[Row]):
        self.rows = rows
        self.shown = next((row for row in rows if row["kind"] == "comparison"), None)
        if self.shown is None:
            raise InputError("results: found no row of kind comparison, expected one")
        self.groups: dict[Key, list[Row]] = {}
        for row in self.of("run"):
            self.groups.setdefault(Key(row["method"], row["decode"], row["beta_chosen"]), []).append(row)
        self.cells = {key: _cells(runs) for key, runs in self.groups.items()}

    def of(self, *kinds: str) -> list[Row]:
        return [row for row in self.rows if row["kind"] in kinds]

    @cached_property
    def estimates(self) -> dict[Key, Estimate]:
        return {key: cells.estimate() for key, cells in self.cells.items()}

    def difference(self, key: Key, other: Key) -> Estimate | None:
        """Return the paired difference, key − other.

        None if the two share no training seed, or differ in their number of episodes.
        """
        mine, theirs = self.cells[key], self.cells[other]
        # Sampled play may repeat the episodes, while greedy play has each once; these two cannot be paired.
        if not set(mine.seeds) & set(theirs.seeds) or mine.count.sum(1)[0] != theirs.count.sum(1)[0]:
            return None
        return (mine - theirs).estimate()

    @cached_property
    def wins(self) -> dict[str, dict[tuple[Key, Key], Estimate]]:
        """The share of episodes in which setting a scores more than setting b, by (a, b).

        Episodes are paired by training seed and episode; a tie counts half. Greedy settings are compared among each
        other, under "greedy", and all others under "sampled".
        """
        found: dict[str, dict[tuple[Key, Key], Estimate]] = {"sampled": {}, "greedy": {}}
        keys = [key for key, runs in self.groups.items() if all("scores" in run for run in runs)]
        for a, b in combinations(keys, 2):
            if (a.decode == "greedy") != (b.decode == "greedy"):
                continue
            if pairs := list(_wins(self.groups[a], self.groups[b])):
                won = Cells.summed(pairs).share()
                lost = won._replace(mean=1 - won.mean, low=1 - won.high, high=1 - won.low)
                found["greedy" if a.decode == "greedy" else "sampled"] |= {(a, b): won, (b, a): lost}
        return found


def _wins(mine: Sequence[Row], theirs: Sequence[Row]) -> Iterator[tuple[Any, Any, float, int]]:
    """Yield (training seed, cluster, wins of `mine`, episodes) for each cell of the training seeds that both have."""
    rivals = {run["seed"]: run for run in theirs}
    for run in mine:
        if run["seed"] not in rivals:
            continue
        other = rivals[run["seed"]]
        scores = {cell[0]: values for cell, values in zip(other["cells"], other["scores"], strict=True)}
        for cell, values in zip(run["cells"], run["scores"], strict=True):
            pairs = list(zip(values, scores[cell[0]], strict=True))
            yield run["seed"], cell[0], sum((a > b) + 0.5 * (a == b) for a, b in pairs), len(pairs)


def table_lines(results: Results) -> list[Line]:
    """Return the lines of the table, each a mapping from column to text: one per fixed row and per setting."""
    shown, labels = results.shown, results.shown["labels"]
    lines = [_fixed_line(row, labels) for row in results.of("behaviour", "optimum")]
    lines += [_method_line(key, runs, results.cells, shown) for key, runs in results.groups.items()]
    return lines + [_fixed_line(row, None) for row in results.of("published")]


def _cells(runs: Iterable[Row]) -> Cells:
    return Cells.summed((run["seed"], cluster, total, count) for run in runs for cluster, total, count in run["cells"])


def _fixed_line(row: Row, labels: Collection[str] | None) -> dict[str, str]:
    """Return the line of a behaviour, optimum or published row, with the columns that it has.

    Args:
      labels: names of the labels that become columns; None = all.
    """
    line = {"method": f"{row['method']} (published)" if row["kind"] == "published" else row["method"]}
    if row.get("score") is not None:
        line["score [95%]"] = f"{row['score']:.2f}"
        if row.get("interval"):
            line["score [95%]"] += f" [{row['interval'][0]:.2f}, {row['interval'][1]:.2f}]"
    if row.get("normalised") is not None:
        line["normalised"] = f"{row['normalised']:.1f}"
    return line | {name: f"{value:.3g}" for name, value in _chosen(row["labels"], labels).items()}


def _chosen(labels: Mapping[str, float], names: Collection[str] | None) -> dict[str, float]:
    return {name: value for name, value in labels.items() if names is None or name in names}


def _method_line(key: tuple, runs: Sequence[Row], cells: Mapping[tuple, Cells], shown: Row) -> dict[str, str]:
    method, decode, chosen = key
    mine = cells[key]
    line = {"method": method, "decoding": decode, "score [95%]": str(mine.estimate())}
    if chosen is not None:
        betas = [f"{run['beta']:g}" for run in runs]
        line["beta"] = f"{betas[0] if len(set(betas)) == 1 else '/'.join(betas)} ({chosen})"
    if 1 < len(mine.seeds) < FEW_SEEDS:
        line["per seed"] = " ".join(f"{mean:.2f}" for mean in mine.per_seed().values())
    if runs[0]["normalised"] is not None:
        line["normalised"] = f"{_mean(run['normalised'] for run in runs):.1f}"
    baseline = shown["baseline"]
    # the baseline under the same decoding, else without guidance, else in sampled play
    alike = ((baseline, decode, chosen), (baseline, decode, None), (baseline, "sampled", None))
    rivals = [cells[other] for other in alike if other in cells]
    if method != baseline and rivals and set(mine.seeds) & set(rivals[0].seeds):
        difference = (mine - rivals[0]).estimate()
        line[f"minus {baseline}"] = f"{difference}{'*' * difference.sure}"
    labels = [_chosen(run["labels"], shown["labels"]) for run in runs]
    for name in dict.fromkeys(name for means in labels for name in means):
        line[name] = f"{_mean(means[name] for means in labels if name in means):.3g}"
    line["agent turns"] = f"{_mean(run['turns'] for run in runs):.1f}"
    line["agent tokens"] = f"{_mean(run['tokens'] for run in runs):.1f}"
    line["invalid"] = f"{_mean(run['invalid_rate'] for run in runs):.1%}"
    if any("ratio_max" in run for run in runs):
        line["training KL"] = f"{_mean(run['training_kl'] for run in runs if 'training_kl' in run):.2f}"
        line["largest ratio"] = f"{max(run.get('ratio_max', 0.0) for run in runs):.3g}"
    line["episodes"] = str(sum(run["n"] for run in runs))
    line["seeds"] = " ".join(str(run["seed"]) for run in runs)
    line["regime"] = runs[0]["regime"]
    line["training tokens"] = short(_mean(run["cost"]["training_tokens"] for run in runs))
    line["training s"] = f"{_mean(run['cost']['training_seconds'] for run in runs):.0f}"
    for name in ("environment_steps", "reward_queries", "played_tokens", "selection_tokens"):
        if any(run["cost"].get(name) for run in runs):
            line[name.replace("_", " ")] = short(_mean(run["cost"].get(name, 0) for run in runs))
    line["generated"] = short(_mean(run["cost"]["generated_tokens"] for run in runs))
    return line


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def short(count: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"


def columns_of(lines: Sequence[Line]) -> list[str]:
    """Return the columns that at least one line fills: those of COLUMNS first, the others in order of appearance."""
    present = dict.fromkeys(name for line in lines for name in line)
    # Later lines may have columns that the first ones lack, so the longest line decides the order of the rest.
    rest = max(lines, key=len, default={})
    return [name for name in dict.fromkeys([*COLUMNS, *rest, *present]) if name in present]


def markdown(lines: Sequence[Line]) -> str:
    """Return the lines as a Markdown table with aligned columns."""
    names = columns_of(lines)
    widths = {name: max(len(name), *(len(line.get(name, "")) for line in lines)) for name in names}

    def shown(cells: Mapping[str, str]) -> str:
        return "| " + " | ".join(cells.get(name, "").ljust(widths[name]) for name in names) + " |"

    rule = "|" + "|".join("-" * (widths[name] + 2) for name in names) + "|"
    return "\n".join([shown({name: name for name in names}), rule, *map(shown, lines)])
