"""The figures of a report, made from the rows of results.jsonl alone. They need matplotlib (extra `plots`).

A `Key` (report.py) is a method with a way of decoding and of choosing β, the weight of value guidance; its runs are
the rows of its training seeds. Colour shows the method, the shape of a marker the decoding; a hollow marker is a β
chosen by returns. If no row has a number that a figure needs, or if the figure would be a single point or values that
are practically equal, the report prints this reason instead of the figure.
"""

import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from offline_lmrl.comparison.report import Key, Results, mean_of, short
from offline_lmrl.comparison.rows import Row
from offline_lmrl.evaluation.metrics import Estimate

Axes = Figure = Any  # matplotlib's classes; it is imported only when something is drawn

INK, PAPER = "#1f2328", "#ffffff"  # text and background; the HTML page replaces them by its own colours
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#7b6fd0",
           "#a00000", "#00a6a6", "#66a61e", "#e7298a", "#b07aa1", "#9c755f", "#4e79a7", "#f28e2b")  # fmt: skip
FEW_KEYS = 8  # a matrix with more rows has no space for numbers in its fields
MARKERS = {"sampled": "o", "greedy": "s", "planned": "^"}
SAME = 0.005  # axes whose values differ by less than this share of the largest have ticks such as 6.994 and 7.004
NO_KL = 1e-6  # nats; log-probabilities in fp32 that should be equal give a KL up to this size
WIDTH = 4.4  # inches; narrow, so that the text is readable on a phone
STYLE = {
    "font.size": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "offline_lmrl",
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#8a919966",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    **{name: INK for name in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")},
}


@dataclass(frozen=True)
class Drawing:
    """A drawn figure.

    name: stem of its file names.
    title: title, as plain text.
    caption: what the figure shows, as plain text.
    svg: the figure as SVG.
    png: the figure as PNG.
    """

    name: str
    title: str
    caption: str
    svg: str
    png: bytes


class Missing(Exception):
    """Raised if the rows lack what a figure needs or if it would show nothing; the message is the reason to print."""


def draw(results: Results) -> tuple[list[Drawing], dict[str, str]]:
    """Draw all figures for which the rows suffice. The same rows give the same bytes.

    Returns: the drawn figures; and title -> reason for each figure that was not drawn.
    Raises: ModuleNotFoundError without matplotlib.
    """
    import matplotlib

    drawings, missing = [], {}
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE, "backend": "agg"}):
        for name, (title, plot) in FIGURES.items():
            try:
                figure, caption = plot(results)
                _check_shows_something(figure)
            except Missing as reason:
                missing[title] = str(reason)
                continue
            drawings.append(Drawing(name, title, caption, *files_of(figure)))
    return drawings, missing | NEVER


def _check_shows_something(figure: Figure) -> None:
    """Check that the axes hold several points, and that the values along each axis that has a label differ.

    Error bars and the lines of `_level` count as values, because a score can be compared with them; if the limits of
    an axis were set, as where both axes have the same ones, they count instead.

    Args:
      figure: a finished figure with one pair of axes. A matrix, which draws no markers and labels no axis, passes.
    Raises: Missing.
    """
    (axes,) = figure.axes
    lines = [line.get_xydata() for line in axes.lines if line.get_transform() is axes.transData]  # no reference lines
    points = {tuple(point) for line in lines for point in line if np.isfinite(point).all()}
    if len(points) == 1:
        raise Missing("it would show a single point")
    x = axes.get_xlabel(), axes.dataLim.intervalx if axes.get_autoscalex_on() else axes.get_xlim()
    y = axes.get_ylabel(), axes.dataLim.intervaly if axes.get_autoscaley_on() else axes.get_ylim()
    for label, (low, high) in (x, y):
        if not label or high - low > SAME * max(abs(low), abs(high)):
            continue
        least, most = (short(end) if end >= 1000 else f"{end:.4g}" for end in (low, high))
        if least == most:
            raise Missing(f"“{label}” is {least} everywhere")
        raise Missing(f"“{label}” is nearly the same everywhere: from {least} to {most}")


def files_of(figure: Figure) -> tuple[str, bytes]:
    svg, png = io.StringIO(), io.BytesIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))  # a date would change the bytes every time
    figure.savefig(svg, format="svg", metadata=nothing)
    figure.savefig(png, format="png", dpi=160, metadata={"Software": None})
    return svg.getvalue(), png.getvalue()


def new_axes(height: float = 3.4, **labels: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set(**labels)
    axes.set_axisbelow(True)
    return figure, axes


def colours(results: Results) -> dict[str, str]:
    methods = dict.fromkeys(key.method for key in results.groups)
    return {method: COLOURS[i % len(COLOURS)] for i, method in enumerate(methods)}


def _marker(results: Results, key: Key) -> dict[str, Any]:
    colour = colours(results)[key.method]
    fill = PAPER if key.chosen == "returns" else colour
    return {"marker": MARKERS[key.decode], "color": colour, "markerfacecolor": fill}


def _mark(axes: Axes, results: Results, key: Key, x: float) -> None:
    """Draw one marker at (x, mean score of the key), with the score's 95% interval as a vertical bar."""
    estimate = results.estimates[key]
    axes.errorbar(x, estimate.mean, yerr=_ends([estimate]), markersize=6, linewidth=1.5, **_marker(results, key))


def _legend(figure: Figure, results: Results, keys: Iterable[Key]) -> None:
    """Draw the legend of these keys below the axes.

    It explains the colour of each method; the shape of each decoding, if there are several; and full and hollow
    markers, if a β was chosen by returns.
    """
    from matplotlib.lines import Line2D

    keys, colour = list(keys), colours(results)
    methods = dict.fromkeys(key.method for key in keys)
    handles = [Line2D([], [], color=colour[method], linewidth=3, label=method) for method in methods]
    sign = partial(Line2D, [], [], linestyle="", color="#8a9199")
    if len(decodes := dict.fromkeys(key.decode for key in keys)) > 1:
        handles += [sign(marker=MARKERS[decode], label=decode) for decode in decodes]
    if any(key.chosen == "returns" for key in keys):
        handles += [sign(marker="o", label="β offline"), sign(marker="o", markerfacecolor=PAPER, label="β by returns")]
    columns = 3 if max(len(handle.get_label()) for handle in handles) <= 14 else 2
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, handlelength=1.4, columnspacing=1.2)


def _ends(estimates: Sequence[Estimate]) -> np.ndarray:
    """Return the lengths of the error bars of n estimates, (2, n): below and above each mean.

    An estimate without interval gets 0 and 0, so that no bar is drawn.
    """
    known = [estimate.interval or (estimate.mean, estimate.mean) for estimate in estimates]
    means = np.array([estimate.mean for estimate in estimates])
    return np.stack([means - [low for low, _ in known], [high for _, high in known] - means])


def _level(results: Results, line: Callable) -> None:
    """Draw lines at the mean score of the logs and at the best possible score, if they are known.

    Args:
      results: the rows.
      line: `axes.axhline` or `axes.axvline`, depending on the axis that shows the score.
    """
    for row in results.of("behaviour", "optimum"):
        if row.get("score") is not None:
            style = {"behaviour": ":", "optimum": "--"}[row["kind"]]
            line(row["score"], color="#8a9199", linestyle=style, linewidth=1.2, zorder=1)


LEVELS = "Dotted line: mean score of the logs; dashed line: best possible score; each only if it is known."


def score_per_method(results: Results) -> tuple[Figure, str]:
    keys = list(results.groups)
    if not keys:
        raise Missing("no method has been measured yet")
    figure, axes = new_axes(0.34 * len(keys) + 1.1, xlabel="score")
    _level(results, axes.axvline)
    for place, key in enumerate(keys):
        estimate, style = results.estimates[key], _marker(results, key)
        seeds = list(results.cells[key].per_seed().values())
        if len(seeds) > 1:
            axes.plot(seeds, [place + 0.22] * len(seeds), "|", color=style["color"], markersize=6)
        axes.errorbar(estimate.mean, place, xerr=_ends([estimate]), markersize=6, linewidth=2, **style)
    axes.set_yticks(range(len(keys)), [str(key) for key in keys])
    axes.set_ylim(len(keys) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    return figure, (
        "Mean over training seeds and episodes with its 95% interval (with one seed: of this run over episodes); the "
        f"ticks below it are the means of the seeds. {LEVELS}"
    )


def return_against_kl(results: Results) -> tuple[Figure, str]:
    figure, axes = new_axes(xlabel="√KL(decoding ‖ policy), √nats per episode", ylabel="score")
    keys = [key for key, runs in results.groups.items() if all(run.get("kl") is not None for run in runs)]
    if not keys:
        raise Missing("no row has a KL, which only sampled play of a language model gives")
    _level(results, axes.axhline)
    colour = colours(results)
    for key in keys:
        runs = results.groups[key]
        for run in runs:
            tried = [entry for entry in run["betas_tried"] or () if entry.get("kl") is not None and "score" in entry]
            thin = {"color": colour[key.method], "linewidth": 0.9, "alpha": 0.6}
            if tried:
                ends = [Estimate.stored(entry["score"], entry["interval"], 0) for entry in tried]
                axes.errorbar(*_track(tried), yerr=_ends(ends), elinewidth=0.6, marker=".", **thin)
            axes.plot(*_track(run.get("curve") or ()), **thin)
        _mark(axes, results, key, _root(mean_of(run["kl"] for run in runs)))
    _legend(figure, results, keys)
    return figure, (
        "Large markers: the reported settings with their 95% intervals. The KL is that of the decoded distribution "
        "from the method's own policy at the same temperature, without filters and guidance. Thin lines, one per "
        "training seed: every β that was tried, on the episodes for choosing β; for PPO its iterations, with the KL "
        "from its start policy."
    )


def _track(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    return [_root(row["kl"]) for row in rows], [row["score"] for row in rows]


def _root(kl: float | None) -> float:
    """Return √KL; 0 for an estimate that is negative, which sampling can give, or a rounding error; NaN for None."""
    if kl is None:
        return math.nan
    return math.sqrt(kl) if kl > NO_KL else 0.0


def _against(results: Results, label: str, cost: Callable[[Row], float | None]) -> Axes:
    """Draw one marker per key: mean score against mean cost, both over its training seeds; add the legend.

    Args:
      results: the rows.
      label: name of the cost, for the x axis.
      cost: function from a run (a row of results.jsonl) to its cost; None = unknown, and its key is left out.
    """
    figure, axes = new_axes(xlabel=label, ylabel="score")
    _level(results, axes.axhline)
    costs = {key: [cost(run) for run in runs] for key, runs in results.groups.items()}
    known = {key: mean_of(numbers) for key, numbers in costs.items() if None not in numbers}
    for key, x in known.items():
        _mark(axes, results, key, x)
    _legend(figure, results, known)
    return axes


def _count_scale(axes: Axes, zero: float | None = None) -> None:
    """Label the x axis with short counts ("20k"); make it logarithmic if the counts differ by a factor of 5 or more.

    Args:
      axes: the axes, with all data drawn.
      zero: x position at which counts of 0 were drawn; the axis is then always logarithmic. None = no count is 0.
    """
    from matplotlib.ticker import MaxNLocator, NullLocator

    low, high = axes.dataLim.intervalx
    ticks = MaxNLocator(5, steps=(1, 2, 5, 10)).tick_values(low, high)
    if zero is not None or high >= 5 * low:
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        low = low if zero is None else 4 * zero  # `return_against_play` draws 0 at a quarter of the least count
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
        ticks = [step * 10.0**power for power in powers for step in (1, 2, 5)]
    shown = {tick: short(tick) for tick in ticks if low <= tick <= high}
    shown |= {} if zero is None else {zero: "0"}
    axes.set_xticks(list(shown), list(shown.values()))


def return_against_training(results: Results) -> tuple[Figure, str]:
    if not any(run["cost"].get("training_tokens") for run in results.of("run")):
        raise Missing("no method has training tokens")
    axes = _against(results, "training tokens", lambda run: run["cost"].get("training_tokens"))
    _count_scale(axes)
    return axes.figure, (
        f"A token counts each time it is read, also in runs that a method starts or learns from. {LEVELS}"
    )


def loss_against_steps(results: Results) -> tuple[Figure, str]:
    runs = [run for run in results.of("run") if run.get("training")]
    if not runs:
        raise Missing("no method here has logged a loss of agent tokens")
    figure, axes = new_axes(xlabel="optimizer steps", ylabel="−log π per agent token, nats")
    for run in runs:
        for name, style in (("loss", "-"), ("held_out", "--")):
            points = [(row["step"], row[name]) for row in run["training"] if name in row]
            if points:
                colour = colours(results)[run["method"]]
                axes.plot(*zip(*points, strict=True), color=colour, linestyle=style, linewidth=0.9, alpha=0.8)
    _legend(figure, results, [Key(run["method"], "sampled", "offline") for run in runs])
    return figure, "One line per training seed: in training (solid) and of the validation data (dashed)."


def return_against_play(name: str, results: Results) -> tuple[Figure, str]:
    costs = [run["cost"].get(name, 0) for run in results.of("run")]
    least = min(filter(None, costs), default=None)
    if least is None:
        raise Missing("no method here played or queried rewards in training")
    if name == "reward_queries" and costs == [run["cost"].get("environment_steps", 0) for run in results.of("run")]:
        raise Missing("it equals the figure with environment steps, because every step was scored")
    curves = [(run, row) for run in results.of("run") for row in run.get("curve") or () if row[name] > 0]
    least = min([least, *(row[name] for _, row in curves)])
    nowhere = least / 4  # x position of runs with a count of 0, because a logarithmic axis has no 0
    axes = _against(results, name.replace("_", " "), lambda run: run["cost"].get(name, 0) or nowhere)
    for run in results.of("run"):
        points = [row for row in run.get("curve") or () if row[name] > 0]
        thin = {"color": colours(results)[run["method"]], "linewidth": 0.9, "alpha": 0.6}
        axes.plot([row[name] for row in points], [row["score"] for row in points], **thin)
    divided = 0 in costs  # else nothing is left of the divider, and an axis with one count would look like two
    _count_scale(axes, nowhere if divided else None)
    if divided:
        axes.axvline(least / 2, color="#8a9199", linewidth=0.8)
    logs = "Left of the vertical line: methods that learnt from logs alone. " if divided else ""
    return axes.figure, (
        f"Large markers: the score in this evaluation. {logs}"
        f"Thin lines, one per training seed: the score of the episodes played in training. {LEVELS}"
    )


def return_against_decoding(results: Results) -> tuple[Figure, str]:
    if not results.groups:
        raise Missing("no method has been measured yet")
    axes = _against(results, "generated tokens per answer", _tokens_per_answer)
    if any("planned_tokens" in run["labels"] for run in results.of("run")):
        _count_scale(axes)
    return axes.figure, f"All sampled tokens count, also those that a planner imagines. {LEVELS}"


def _tokens_per_answer(run: Row) -> float:
    return run["labels"].get("planned_tokens", run["tokens"]) / run["turns"]


def achieved_against_asked(results: Results) -> tuple[Figure, str]:
    keys = [key for key, runs in results.groups.items() if all("ask" in run["labels"] for run in runs)]
    if not keys:
        raise Missing("no method here has a requested return; `evaluate play --asks` draws the curve of a single run")
    figure, axes = new_axes(xlabel="requested return", ylabel="achieved return")
    asked = [mean_of(run["labels"]["ask"] for run in results.groups[key]) for key in keys]
    axes.axline((asked[0], asked[0]), slope=1, color="#8a9199", linestyle=":", linewidth=1.2)
    for x, key in zip(asked, keys, strict=True):
        _mark(axes, results, key, x)
    low, high = np.min(axes.dataLim.get_points()), np.max(axes.dataLim.get_points())
    margin = 0.05 * (high - low) or 1.0
    axes.set(xlim=(low - margin, high + margin), ylim=(low - margin, high + margin))
    _legend(figure, results, keys)
    return figure, "On the dotted line, the achieved return equals the requested one."


def calibration_of_q(results: Results) -> tuple[Figure, str]:
    runs = [run for run in results.of("run") if run.get("calibration") and run["decode"] == "sampled"]
    if not runs:
        raise Missing("no row has Q and realised returns: no method has value heads, or all held-out logs are cut")
    figure, axes = new_axes(xlabel="Q of the logged token", ylabel="realised return")
    lowest = min(entry["q"] for run in runs for entry in run["calibration"])
    axes.axline((lowest, lowest), slope=1, color="#8a9199", linestyle=":", linewidth=1.2)
    for run in runs:
        line = {"color": colours(results)[run["method"]], "linewidth": 1.2, "marker": "o", "markersize": 4}
        bins = run["calibration"]
        axes.plot([entry["q"] for entry in bins], [entry["return_to_go"] for entry in bins], **line)
    _legend(figure, results, [Key(run["method"], "sampled", "offline") for run in runs])
    return figure, (
        "Agent tokens of held-out logs, in equally full bins of Q; one line per training seed. On the dotted line, Q "
        "equals the discounted return that followed the token. Below it, Q is higher than that return, which is "
        "expected if Q belongs to a better policy than the logs. If a line does not rise, Q does not separate good "
        "tokens from bad ones."
    )


def win_rates(decode: str, results: Results) -> tuple[Figure, str]:
    found = results.wins[decode]
    if not found:
        raise Missing("fewer than two settings have the score of every episode")
    keys = list(dict.fromkeys(key for pair in found for key in pair))
    figure, axes = new_axes(0.42 * len(keys) + 1.6)
    shares = np.array([[found[a, b].mean if (a, b) in found else math.nan for b in keys] for a in keys])
    places = np.arange(len(keys) + 1) - 0.5
    axes.pcolormesh(places, places, np.ma.masked_invalid(shares), cmap="PuOr", vmin=0, vmax=1, alpha=0.75)
    axes.invert_yaxis()
    for (a, b), estimate in found.items() if len(keys) <= FEW_KEYS else ():
        sure = "*" * estimate.excludes(0.5)
        text = f"{100 * estimate.mean:.0f}{sure}"
        axes.text(keys.index(b), keys.index(a), text, ha="center", va="center", color="#000000", fontsize=8)
    names = [str(key).replace(f", {decode}", "", 1) for key in keys]
    axes.set_yticks(range(len(keys)), [f"{name}  {i + 1}" for i, name in enumerate(names)])
    axes.set_xticks(range(len(keys)), [str(i + 1) for i in range(len(keys))])
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    return figure, (
        "Percentage of episodes in which the setting of the row scores higher than that of the column; a tie counts "
        "half. * marks a 95% interval over several training seeds that excludes 50%. The table below lists all shares "
        "with their intervals."
    )


FIGURES: dict[str, tuple[str, Callable[[Results], tuple[Figure, str]]]] = {
    "score": ("Score per method", score_per_method),
    "kl": ("Return against √KL", return_against_kl),
    "training": ("Loss in training", loss_against_steps),
    "environment_steps": ("Return against environment steps", partial(return_against_play, "environment_steps")),
    "reward_queries": ("Return against reward queries", partial(return_against_play, "reward_queries")),
    "training_tokens": ("Return against training tokens", return_against_training),
    "generated_tokens": ("Return against generated tokens per answer", return_against_decoding),
    "asked": ("Achieved against requested return", achieved_against_asked),
    "calibration": ("Calibration of Q", calibration_of_q),
    "wins": ("Win rates, sampled", partial(win_rates, "sampled")),
    "wins_greedy": ("Win rates, greedy", partial(win_rates, "greedy")),
}
NEVER = {
    "Proxy and gold score against √KL": "a comparison has one score and no reward models of several sizes",
    "Data quality × method": "a comparison has one data set",
    "Accuracy and calibration of a reward model": "no row has them; `evaluate scorer` prints them",
    "Accuracy against coverage": "methods of a comparison cannot abstain",
}
