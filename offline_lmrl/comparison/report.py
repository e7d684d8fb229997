"""The tables of results, made from their rows alone (rows.py)."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from offline_lmrl.comparison.rows import Row, read_results
from offline_lmrl.errors import InputError
from offline_lmrl.evaluation.metrics import Cells, Estimate
from offline_lmrl.logs.terminal import visible

if TYPE_CHECKING:
    from rich.table import Table

FEW_SEEDS = 5  # with fewer, intervals over seeds are wide, so the mean of every seed is printed too
COLUMNS = ("method", "decoding", "score [95%]", "beta", "per seed", "normalised")  # these come first, in this order

Line = dict[str, str]  # one line of a table: name of the column -> text


def short(count: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"


# Columns with the mean over the runs of a method: name -> (function from a run to its number, or None; format)
PLAY: dict[str, tuple[Callable[[Row], Any], Callable[[float], str]]] = {
    "agent turns": (lambda run: run["turns"], "{:.1f}".format),
    "agent tokens": (lambda run: run["tokens"], "{:.1f}".format),
    "invalid": (lambda run: run["invalid_rate"], "{:.1%}".format),
    "training KL": (lambda run: run.get("training_kl"), "{:.2f}".format),
}
COSTS: dict[str, tuple[Callable[[Row], Any], Callable[[float], str]]] = {
    "training tokens": (lambda run: run["cost"].get("training_tokens"), short),
    "training s": (lambda run: run["cost"].get("training_seconds"), "{:.0f}".format),
    "environment steps": (lambda run: run["cost"].get("environment_steps"), short),
    "reward queries": (lambda run: run["cost"].get("reward_queries"), short),
    "played tokens": (lambda run: run["cost"].get("played_tokens"), short),
    "selection tokens": (lambda run: run["cost"].get("selection_tokens") or None, short),
    "generated": (lambda run: run["cost"]["generated_tokens"], short),
}


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
    # Of a published result without a score, only labels are known, which this table does not have.
    lines = [line for line in table_lines(results, decimals) if "score [95%]" in line]
    baseline = f"minus {results.shown['baseline']}"
    for line in lines:
        line |= {"β": line.get("beta", ""), "cost": _short_cost(line)}
    columns = ("method", "decoding", "β", "score [95%]", baseline, "cost")
    caption = "Cost: tokens read in training + environment steps. All columns: table.md and report."
    if any(estimate.seeds == 1 for estimate in results.estimates.values()):
        caption += " With one training seed, an interval describes that run."
    drawn = Table(box=None, pad_edge=False, caption=caption, caption_justify="left")
    # The remark on cut logs in the first line is the longest text; wrapped like this, it leaves space for intervals.
    widest = max([18, *(len(key.method) for key in results.groups)])
    columns = [name for name in columns if any(line.get(name) for line in lines)]
    for name in columns:
        drawn.add_column(Text(visible(name)), overflow="fold", max_width=widest if name == "method" else None)
    for line in lines:
        cells = (line.get(name, "").removesuffix(" of this run") for name in columns)
        drawn.add_row(*(Text(visible(cell)) for cell in cells))
    return drawn


def _short_cost(line: Line) -> str:
    cost = " + ".join(line[name] for name in ("training tokens", "environment steps") if name in line)
    return f"{cost} (declared)" if cost and "declared" in line.get("regime", "") else cost


class Key(NamedTuple):
    """A method in one setting, by which runs are grouped over their seeds; `str` formats it for tables.

    method: name of the method.
    decode: "sampled", "greedy" or "planned".
    chosen: how β, the weight of value guidance, was chosen: "offline", from held-out logs; "returns", by the returns
      of other played episodes; "given", by the user; None, no value guidance.
    """

    method: str
    decode: str
    chosen: str | None

    def __str__(self) -> str:
        how = {None: "", "offline": ", β offline", "returns": ", β by returns", "given": ", β given"}[self.chosen]
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
        self.cells = {
            key: Cells.summed((run["seed"], *cell) for run in runs for cell in run["cells"])
            for key, runs in self.groups.items()
        }

    def of(self, *kinds: str) -> list[Row]:
        return [row for row in self.rows if row["kind"] in kinds]

    @cached_property
    def estimates(self) -> dict[Key, Estimate]:
        return {key: cells.estimate() for key, cells in self.cells.items()}

    def difference(self, key: Key, other: Key) -> Estimate | None:
        """Return the difference of the mean scores, key − other, paired by training seed and episodes.

        None if the two share no training seed, or differ in their episodes: sampled play may repeat the episodes,
        while greedy play has each once.
        """
        mine, theirs = self.cells[key], self.cells[other]
        if not set(mine.seeds) & set(theirs.seeds) or self._episodes(key) != self._episodes(other):
            return None
        return (mine - theirs).estimate()

    def _episodes(self, key: Key) -> dict[Any, int]:
        """Return the number of episodes of each cluster that every run of a method and setting played."""
        return {cluster: count for cluster, _, count in self.groups[key][0]["cells"]}

    def against_baseline(self, key: Key) -> Estimate | None:
        """Return the mean score of the key minus that of the baseline, paired by training seed and episodes.

        The baseline is taken under the same decoding and choice of β, else without guidance, else in sampled play.
        None for the baseline itself, and if the two cannot be paired.
        """
        baseline = self.shown["baseline"]
        alike = (Key(baseline, *way) for way in (key[1:], (key.decode, None), ("sampled", None)))
        rival = next((other for other in alike if other in self.cells), None)
        return None if rival is None or key.method == baseline else self.difference(key, rival)

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
            if (a.decode == "greedy") == (b.decode == "greedy") and self._episodes(a) == self._episodes(b):
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


def table_lines(results: Results, decimals: int = 2) -> list[Line]:
    """Return the lines of the table that `table` describes, in the same order."""
    lines = [_fixed_line(row, results.shown["labels"], decimals) for row in results.of("behaviour", "optimum")]
    lines += [_method_line(key, results, decimals) for key in results.groups]
    return lines + [_fixed_line(row, None, decimals) for row in results.of("published")]


def _fixed_line(row: Row, labels: Collection[str] | None, decimals: int) -> Line:
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
    return line | _label_cells([row], labels)


def _method_line(key: Key, results: Results, decimals: int) -> Line:
    """Return the table line of a method in one setting, without the columns it has no value for."""
    runs, shown, per_seed = results.groups[key], results.shown, results.cells[key].per_seed()
    line = {
        "method": key.method,
        "decoding": key.decode,
        "score [95%]": _in_run(results.estimates[key], decimals),
    }
    if key.chosen is not None:
        betas = list(dict.fromkeys(f"{run['beta']:g}" for run in runs))
        betas = betas if len(betas) == 1 else [f"{run['beta']:g}" for run in runs]
        line["beta"] = f"{'/'.join(betas)} ({key.chosen})"
    if 1 < len(per_seed) < FEW_SEEDS:
        line["per seed"] = " ".join(f"{mean:.2f}" for mean in per_seed.values())
    if runs[0]["normalised"] is not None:
        line["normalised"] = f"{mean_of(run['normalised'] for run in runs):.1f}"
    if difference := results.against_baseline(key):
        line[f"minus {shown['baseline']}"] = f"{_in_run(difference, decimals)}{'*' * difference.sure}"
    line |= _label_cells(runs, shown["labels"]) | _means(runs, PLAY)
    if any("ratio_max" in run for run in runs):
        line["largest ratio"] = f"{max(run.get('ratio_max', 0.0) for run in runs):.3g}"
    declared = " (declared, and its cost)" if runs[0].get("declared") else ""
    one = " (one model)" if len(runs) > 1 and len({run.get("run", run["seed"]) for run in runs}) == 1 else ""
    return line | {
        "episodes": str(sum(run["n"] for run in runs)),
        "seeds": " ".join(str(run["seed"]) for run in runs) + one,
        "regime": f"{runs[0]['regime']}{declared}",
        **_means(runs, COSTS),
    }


def _in_run(estimate: Estimate, decimals: int) -> str:
    return estimate.to_text(decimals) + " of this run" * (estimate.seeds == 1 and estimate.interval is not None)


def _means(runs: Sequence[Row], columns: Mapping[str, tuple[Callable[[Row], Any], Callable[[float], str]]]) -> Line:
    """Return the cells of PLAY or COSTS with the mean over the runs that have a number."""
    known = {name: [n for n in map(number, runs) if n is not None] for name, (number, _) in columns.items()}
    return {name: columns[name][1](mean_of(numbers)) for name, numbers in known.items() if numbers}


def _label_cells(rows: Sequence[Row], names: Collection[str] | None) -> Line:
    """Return the mean of each label over the rows that have it; `names`: the labels that are shown, None = all."""
    shown = dict.fromkeys(name for row in rows for name in row["labels"] if names is None or name in names)
    return {name: f"{mean_of(row['labels'][name] for row in rows if name in row['labels']):.3g}" for name in shown}


def mean_of(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


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
