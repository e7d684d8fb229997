"""The tables of a comparison, made from the rows of results.jsonl alone.

A row is one line of results.jsonl. Its `kind` is one of:

    comparison    the config, and the baseline and label columns that tables show
    behaviour     the training data
    optimum       the best possible mean score, if the environment knows it
    published     a result that is quoted, never measured here
    run           the result of one method, training seed and setting

A setting is a way of decoding ("sampled", "greedy" or "planned") together with the way in which β, the weight of value
guidance, was chosen. A row of kind run, called a run here, stores the outcome of its episodes as `cells`, a list of
[cluster, sum of scores, number of episodes], from which means, intervals and paired differences over seeds are
computed; a cluster is a set of episodes that depend on each other. `scores` lists the single episode scores of each
cell, in the same order for every method.
"""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from offline_lmrl.errors import InputError
from offline_lmrl.evaluation.metrics import Cells, Estimate
from offline_lmrl.logs.files import reading
from offline_lmrl.logs.terminal import visible
from offline_lmrl.logs.trajectory import shown
from offline_lmrl.renamed import current

if TYPE_CHECKING:
    from rich.table import Table

FEW_SEEDS = 5  # with fewer, intervals over seeds are wide, so the mean of every seed is printed too
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
Line = dict[str, str]  # one line of a table: name of the column -> text


def _current_row(row: Any) -> Any:
    """Return a row of results with its algorithm and config under their current names; the rest holds none."""
    if not isinstance(row, dict):
        return row
    return row | current({name: row[name] for name in ("algorithm", "config") if name in row})


def read_results(path: str | Path) -> list[dict[str, Any]]:
    """Read the rows of a results.jsonl.

    Raises: InputError "file:row: ..." for the first row that `compare` cannot have written.
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
    """Check the fields of a row that NEEDED requires, and the form of its `cells`.

    Args:
      row: the parsed row.
      where: "file:row", the start of the error message.
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
    """Return the results as a Markdown table with all columns, which are aligned.

    Its lines are the mean return of the training data, the optimum, each method and setting over its seeds, and the
    published results. The score is the mean over seeds and episodes with its 95% interval (evaluation/metrics.py). The
    column "minus BASELINE" is the difference from the baseline under the same decoding, paired by training seed and
    episodes; planned play is compared with the baseline's sampled play if the baseline has no planner. A `*` marks a
    difference whose interval excludes 0. With one training seed, intervals are "of this run", over episodes, and
    nothing is starred. A β marked "offline" was chosen from held-out logs, one marked "returns" by playing.

    Args:
      results: path of a results.jsonl, or its rows.
    """
    rows = read_results(results) if isinstance(results, str | Path) else results
    return markdown(table_lines(Results(rows)))


def terminal_table(rows: Sequence[Row]) -> "Table":
    """Return the results as a table for a terminal: the lines of `table` with its most important columns only.

    Scores of 10 and more have one decimal, others two; the line then fits 100 columns. In a narrower terminal, and if
    a name or a list of βs is long, cells are wrapped, not cut.

    Args:
      rows: rows of results.
    """
    from rich.table import Table
    from rich.text import Text

    results = Results(rows)
    decimals = 1 if any(abs(estimate.mean) >= 10 for estimate in results.estimates.values()) else 2
    lines = [_fixed_line(row, (), decimals) for row in results.of("behaviour", "optimum")]
    lines += [_terminal_line(key, results, decimals) for key in results.groups]
    # Of a published result without a score, only labels are known, which this table does not have.
    lines += [_fixed_line(row, (), decimals) for row in results.of("published") if row.get("score") is not None]
    columns = ("method", "decoding", "β", "score [95%]", f"minus {results.shown['baseline']}", "cost")
    columns = [name for name in columns if any(line.get(name) for line in lines)]
    caption = "Cost is that of training. All columns are in table.md and in the report."
    if any(estimate.seeds == 1 for estimate in results.estimates.values()):
        caption += " With one training seed, an interval describes that run."
    drawn = Table(box=None, pad_edge=False, caption=caption, caption_justify="left")
    # The remark on cut logs in the first line is the longest text; wrapped like this, it leaves space for intervals.
    widest = max([18, *(len(key.method) for key in results.groups)])
    for name in columns:
        drawn.add_column(Text(visible(name)), overflow="fold", max_width=widest if name == "method" else None)
    for line in lines:
        drawn.add_row(*(Text(visible(line.get(name, ""))) for name in columns))
    return drawn


class Key(NamedTuple):
    """A method in one setting, by which runs are grouped over their seeds; `str` formats it for tables.

    method: name of the method.
    decode: "sampled", "greedy" or "planned".
    chosen: how β, the weight of value guidance, was chosen: "offline", from held-out logs; "returns", by the returns
      of other played episodes; None, no value guidance.
    """

    method: str
    decode: str
    chosen: str | None

    def __str__(self) -> str:
        how = {None: "", "offline": ", β offline", "returns": ", β by returns"}[self.chosen]
        return f"{self.method}, {self.decode}{how}"


class Results:
    """The rows of a comparison, grouped by kind, method and setting.

    shown: the row of kind "comparison".
    groups: the runs (one per seed) of each method and setting, in the order of the rows.
    cells: the scores of the same runs, added up by training seed and cluster of episodes.

    Args:
      rows: all rows of results.jsonl.
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
        """Return the difference of the mean scores, key − other, paired by training seed and episodes.

        None if the two share no training seed, or differ in their number of episodes.
        """
        mine, theirs = self.cells[key], self.cells[other]
        # Sampled play may repeat the episodes, while greedy play has each once; these two cannot be paired.
        if not set(mine.seeds) & set(theirs.seeds) or mine.count.sum(1)[0] != theirs.count.sum(1)[0]:
            return None
        return (mine - theirs).estimate()

    def against_baseline(self, key: Key) -> Estimate | None:
        """Return the mean score of the key minus that of the baseline, paired by training seed and episodes.

        The baseline is taken under the same decoding and choice of β, else without guidance, else in sampled play.
        None for the baseline itself, and if the two share no training seed.
        """
        baseline = self.shown["baseline"]
        alike = ((baseline, key.decode, key.chosen), (baseline, key.decode, None), (baseline, "sampled", None))
        rivals = [self.cells[other] for other in alike if other in self.cells]
        if key.method == baseline or not rivals or not set(self.cells[key].seeds) & set(rivals[0].seeds):
            return None
        return (self.cells[key] - rivals[0]).estimate()

    @cached_property
    def wins(self) -> dict[str, dict[tuple[Key, Key], Estimate]]:
        """The share of episodes in which one method and setting, a, scores higher than another one, b.

        It maps "greedy" and "sampled" to {(a, b): share with its interval}. Under "greedy" are the pairs of greedy
        settings, under "sampled" the pairs of sampled and planned ones. Both methods of a pair play the same episode
        with the same training seed; a tie counts half.
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
    """Yield (training seed, cluster, wins of `mine`, number of episodes) for the training seeds that both have.

    Args:
      mine: the runs of one method and setting, whose wins are counted; a tie counts half.
      theirs: the runs of another method or setting, which played the same episodes.
    """
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
    """Return the lines of the table that `table` describes, in the same order."""
    lines = [_fixed_line(row, results.shown["labels"]) for row in results.of("behaviour", "optimum")]
    lines += [_method_line(key, results) for key in results.groups]
    return lines + [_fixed_line(row, None) for row in results.of("published")]


def _cells(runs: Iterable[Row]) -> Cells:
    return Cells.summed((run["seed"], cluster, total, count) for run in runs for cluster, total, count in run["cells"])


def _fixed_line(row: Row, labels: Collection[str] | None, decimals: int = 2) -> Line:
    """Return the table line of a row of kind behaviour, optimum or published, without the columns it has no value for.

    Args:
      row: the row.
      labels: names of the labels that become columns; None = all.
      decimals: decimals of the score.
    """
    line = {"method": f"{row['method']} (published)" if row["kind"] == "published" else row["method"]}
    if row.get("score") is not None:
        score = Estimate.stored(row["score"], row.get("interval"), 0)
        line["score [95%]"] = score.to_text(decimals) if score.interval else f"{score.mean:.{decimals}f}"
    if row.get("normalised") is not None:
        line["normalised"] = f"{row['normalised']:.1f}"
    return line | {name: f"{value:.3g}" for name, value in _chosen(row["labels"], labels).items()}


def _chosen(labels: Mapping[str, float], names: Collection[str] | None) -> dict[str, float]:
    return {name: value for name, value in labels.items() if names is None or name in names}


def _betas(key: Key, runs: Sequence[Row]) -> str:
    betas = [f"{run['beta']:g}" for run in runs]
    return f"{betas[0] if len(set(betas)) == 1 else '/'.join(betas)} ({key.chosen})"


def _terminal_line(key: Key, results: Results, decimals: int) -> Line:
    runs = results.groups[key]
    line = {"method": key.method, "decoding": key.decode, "score [95%]": results.estimates[key].to_text(decimals)}
    if key.chosen is not None:
        line["β"] = _betas(key, runs)
    if difference := results.against_baseline(key):
        line[f"minus {results.shown['baseline']}"] = f"{difference.to_text(decimals)}{'*' * difference.sure}"
    line["cost"] = f"{short(_mean(run['cost']['training_tokens'] for run in runs))} tokens"
    if steps := _mean(run["cost"].get("environment_steps", 0) for run in runs):
        line["cost"] += f", {short(steps)} steps"
    return line


def _method_line(key: Key, results: Results) -> Line:
    runs, mine, shown = results.groups[key], results.cells[key], results.shown
    line = {"method": key.method, "decoding": key.decode, "score [95%]": str(results.estimates[key])}
    if key.chosen is not None:
        line["beta"] = _betas(key, runs)
    if 1 < len(mine.seeds) < FEW_SEEDS:
        line["per seed"] = " ".join(f"{mean:.2f}" for mean in mine.per_seed().values())
    if runs[0]["normalised"] is not None:
        line["normalised"] = f"{_mean(run['normalised'] for run in runs):.1f}"
    if difference := results.against_baseline(key):
        line[f"minus {shown['baseline']}"] = f"{difference}{'*' * difference.sure}"
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
    """Return the columns that at least one line has: those of COLUMNS first, the others in the lines' own order."""
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
