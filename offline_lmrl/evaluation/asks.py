"""The achieved return of a return-conditioned policy as a function of the requested one, which shows whether
conditioning works.

A requested return is called an ask. All asks are fixed before play. The curve only shows how a policy responds: do not
use it to choose the ask of a reported result.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.evaluation.metrics import Estimate
from offline_lmrl.evaluation.play import EvaluationResult, evaluate_policy

FEW_TURNS = 30  # a bin with fewer training turns is marked in the table


@dataclass(frozen=True)
class AskPoint:
    """The result of one ask over many episodes.

    The model is given a request as a bin, one of the ranges into which the returns of the training data are divided.

    ask: the ask as it was given: a number in reward units, or a name such as "p90".
    asked: return requested at the first agent turn, mean over episodes, in reward units.
    bin: number, from 0, of the bin that was most often requested for the first reply.
    training_turns: number of training turns in that bin.
    clipped: share of episodes whose first request was outside the returns of the training data.
    achieved: mean score (undiscounted return) with its 95% interval.
    """

    ask: float | str
    asked: float
    bin: int
    training_turns: int
    clipped: float
    achieved: Estimate


def ask_curve(
    policy: LanguagePolicy, environment: Any, asks: Sequence[float | str], seeds: Sequence[int], **play: Any
) -> list[AskPoint]:
    """Play the same episodes once for each requested return (ask).

    Args:
      policy: a policy whose model was trained with returns; its own ask is replaced.
      environment: a VectorEnvironment, or a function that makes an Environment, as in `evaluate_policy`.
      asks: numbers in reward units, or names such as "p90".
      seeds: seeds of the episodes.
      play: further arguments of `evaluate_policy`.
    Returns: one point per ask, in their order.
    Raises: InputError, before anything is played, if the model cannot be conditioned on one of the asks.
    """
    asking = [policy.with_decoding(ask=ask) for ask in asks]
    return [ask_point(one, evaluate_policy(one, environment, seeds, **play)) for one in asking]


def ask_point(policy: LanguagePolicy, result: EvaluationResult) -> AskPoint:
    """Summarise the episodes in `result`, which were played with the ask in `policy.decoding`."""
    labelled = [row["labels"] for row in result.episodes]
    used = Counter(labels["bin"] for labels in labelled).most_common(1)[0][0]
    return AskPoint(
        ask=policy.decoding.ask,
        asked=float(np.mean([labels["ask"] for labels in labelled])),
        bin=used,
        training_turns=policy.return_tokens.scale.table(policy.task).counts[used],
        clipped=float(np.mean([labels["clipped"] for labels in labelled])),
        achieved=result.score(),
    )


def ask_table(points: Sequence[AskPoint]) -> str:
    """Return a text table of requested and achieved returns, one line per ask.

    With at least three asks and varying returns, a last line has the correlation of requested and achieved returns and
    their mean absolute distance.
    """
    lines = [f"{'ask':>8} {'requested':>9} {'bin':>5} {'training turns':>15} {'clipped':>8}   achieved [95%]"]
    for point in points:
        few = "  (few training turns)" if point.training_turns < FEW_TURNS else ""
        lines.append(
            f"{point.ask!s:>8} {point.asked:9.3f} {point.bin:5d} {point.training_turns:15d} "
            f"{point.clipped:8.0%}   {point.achieved} n={point.achieved.n}{few}"
        )
    for found in _obedience(points):
        lines.append(f"correlation {found['correlation']:.3f}, mean distance {found['mean_distance']:.3f}")
    return "\n".join(lines)


def ask_rows(points: Sequence[AskPoint]) -> list[dict[str, Any]]:
    """Return the contents of `ask_table` as values that JSON can hold.

    Returns: one row per ask with the fields of `AskPoint`, in which `achieved` is a mapping with `mean`, `low`, `high`
      (both None without an interval) and `n`, the number of episodes; then the row of `_obedience`, if there is one.
    """
    rows = []
    for point in points:
        low, high = point.achieved.interval or (None, None)
        achieved = {"mean": point.achieved.mean, "low": low, "high": high, "n": point.achieved.n}
        rows.append(asdict(point) | {"achieved": achieved})
    return rows + _obedience(points)


def _obedience(points: Sequence[AskPoint]) -> list[dict[str, float]]:
    """Measure how well the achieved returns follow the requested ones.

    Returns: a list of one row: `correlation`, and `mean_distance`, the mean absolute difference in reward units. The
      list is empty for fewer than three points, or if all requested or all achieved returns are equal.
    """
    asked, achieved = _axes(points)
    if len(points) < 3 or asked.std() == 0 or achieved.std() == 0:
        return []
    correlation = float(np.corrcoef(asked, achieved)[0, 1])
    return [{"correlation": correlation, "mean_distance": float(np.abs(asked - achieved).mean())}]


def draw_asks(points: Sequence[AskPoint], path: Path) -> None:
    """Plot achieved against requested return, one marker per point, with 95% intervals, and save the plot.

    Args:
      points: the points of one policy, in any order.
      path: file to write; its suffix decides the format (.png, .svg, .pdf).
    Raises: ModuleNotFoundError without matplotlib (extra `plots`).
    """
    from matplotlib.figure import Figure

    points = sorted(points, key=lambda point: point.asked)
    asked, achieved = _axes(points)
    ends = np.array([point.achieved.interval or [point.achieved.mean] * 2 for point in points]).T
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.axline((asked.mean(), asked.mean()), slope=1, color="0.7", linestyle=":", label="achieved = requested")
    axes.fill_between(asked, *ends, alpha=0.2)
    axes.plot(asked, achieved, marker="o", label="achieved, with 95% interval")
    axes.set(xlabel="requested return", ylabel="achieved return")
    axes.legend(frameon=False)
    figure.savefig(path)


def _axes(points: Sequence[AskPoint]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([point.asked for point in points]), np.array([point.achieved.mean for point in points])
