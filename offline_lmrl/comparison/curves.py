"""The curves of trainings from their metrics.jsonl: one panel per metric, one colour per run. Needs matplotlib."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from offline_lmrl.comparison.figures import COLOURS, STYLE, Figure
from offline_lmrl.errors import InputError, require
from offline_lmrl.logs.io import atomic_output
from offline_lmrl.training.display import metrics_of
from offline_lmrl.training.metrics import CLOSING, METRICS, read_metrics

COLUMNS = 3
PANEL = (3.2, 2.3)  # inches
BAND = ("environment/score_low", "environment/score_high")  # ends of the interval of environment/score
Point = tuple[int, float]


def curves_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[bool, list[Point]]]:
    """Return the curves of a run: metric -> {False: points in training, True: points of held-out data}.

    Args:
      rows: the rows of its metrics.jsonl. Values that are no finite number are left out.
    """
    found: dict[str, dict[bool, list[Point]]] = {}
    for row in rows:
        held_out, metrics = metrics_of(row)
        for name, value in metrics.items() if CLOSING not in row else ():
            if isinstance(value, int | float) and math.isfinite(value):
                found.setdefault(name, {}).setdefault(held_out, []).append((row["step"], value))
    return found


def draw_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Draw the curves of runs.

    Args:
      runs: name of the run -> rows of its metrics.jsonl.
    Returns: a figure of matplotlib.
    Raises: InputError if the rows hold no metric, or without matplotlib.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ImportError as error:
        raise InputError(
            "plot: found no package matplotlib; install it with `pip install 'offline_lmrl[plots]'`"
        ) from error
    curves = {name: curves_of(rows) for name, rows in runs.items()}
    metrics = [name for name in dict.fromkeys(name for found in curves.values() for name in found) if name not in BAND]
    if not metrics:
        raise InputError(f"{', '.join(runs)}: found no metrics of training steps, expected some; train longer")
    columns = min(COLUMNS, len(metrics))
    lines = -(-len(metrics) // columns)
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE}):
        figure = Figure(figsize=(columns * PANEL[0], lines * PANEL[1] + 0.5), layout="constrained")
        for place, metric in enumerate(metrics, 1):
            axes = figure.add_subplot(lines, columns, place)
            axes.set(title=metric, xlabel="step")
            for number, found in enumerate(curves.values()):
                _draw(axes, found, metric, COLOURS[number % len(COLOURS)])
        handles = [Line2D([], [], color=COLOURS[i % len(COLOURS)], label=name) for i, name in enumerate(runs)]
        if any(True in kinds for found in curves.values() for kinds in found.values()):
            handles.append(Line2D([], [], color="#8a9199", linestyle="--", marker=".", label="held-out data"))
        figure.legend(handles=handles, loc="outside lower center", ncols=min(3, len(handles)))
    return figure


def _draw(axes: Any, found: Mapping[str, Mapping[bool, Sequence[Point]]], metric: str, colour: str) -> None:
    for held_out, points in found.get(metric, {}).items():
        # A single point would be invisible as a line.
        style = {"linestyle": "--", "marker": "."} if held_out else {"marker": "." if len(points) < 3 else ""}
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.2, **style)
    if metric == "environment/score":
        low, high = (dict(found.get(name, {}).get(False, ())) for name in BAND)
        steps = sorted(low.keys() & high.keys())
        axes.fill_between(steps, [low[s] for s in steps], [high[s] for s in steps], color=colour, alpha=0.2)


def plot_runs(runs: Sequence[str | Path], output: Path | None = None) -> Path:
    """Draw the curves of runs into a file.

    Args:
      runs: run directories.
      output: the file, whose ending is .png or .svg; None = curves.png in the directory of a single run.
    Returns: the file.
    Raises: InputError if a run has no metrics, `output` is missing for several runs, or its ending is another.
    """
    if output is None:
        if len(runs) > 1:
            raise InputError(f"output: missing, expected the file for the curves of {len(runs)} runs")
        output = Path(runs[0]) / "curves.png"
    if output.suffix not in (".png", ".svg"):
        raise InputError(f"output: found {output}, expected a file that ends in .png or .svg")
    for run in runs:
        require((Path(run) / METRICS).exists(), f"{run}: found no {METRICS}, expected the folder of a run")
    figure = draw_curves({str(run): read_metrics(run) for run in runs})
    with atomic_output(output) as temporary:
        figure.savefig(temporary, format=output.suffix[1:], dpi=160)
    return output
