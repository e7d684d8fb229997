"""What a return-conditioned policy earns for what it is asked: the curve that shows whether asking works.

The asks are stated before the play; a curve shows how a policy answers and is no way to choose the ask of a headline.
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

FEW_TURNS = 30  # training turns under which a bin has hardly been learnt


@dataclass(frozen=True)
class AskPoint:
    """One ask over many episodes.

    ask: as given. asked: the mean return it stood for at the first turn, in logged units. bin: the one told there most
    often. training_turns: in that bin. clipped: share of episodes whose ask lay outside the training data.
    achieved: the score.
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
    """Plays the same episodes for every ask.

    Args:
      environment, play: as `evaluate_policy` takes them.
    Raises: InputError for an ask that the model cannot understand, before anything is played.
    """
    asking = [policy.with_sampling(ask=ask) for ask in asks]
    return [ask_point(one, evaluate_policy(one, environment, seeds, **play)) for one in asking]


def ask_point(policy: LanguagePolicy, result: EvaluationResult) -> AskPoint:
    """What came of the ask in the policy's sampling form."""
    told = [row["labels"] for row in result.episodes]
    used = Counter(labels["bin"] for labels in told).most_common(1)[0][0]
    return AskPoint(
        ask=policy.sampling.ask,
        asked=float(np.mean([labels["ask"] for labels in told])),
        bin=used,
        training_turns=policy.slots.scale.table(policy.task).counts[used],
        clipped=float(np.mean([labels["clipped"] for labels in told])),
        achieved=result.score(),
    )


def ask_table(points: Sequence[AskPoint]) -> str:
    """asked → achieved, a line per ask; with three asks or more also how closely the second follows the first."""
    lines = [f"{'ask':>8} {'asked':>9} {'bin':>5} {'training turns':>15} {'clipped':>8}   achieved [95%]"]
    for point in points:
        few = "  (hardly learnt)" if point.training_turns < FEW_TURNS else ""
        lines.append(
            f"{point.ask!s:>8} {point.asked:9.3f} {point.bin:5d} {point.training_turns:15d} "
            f"{point.clipped:8.0%}   {point.achieved} n={point.achieved.n}{few}"
        )
    for found in _obedience(points):
        lines.append(f"correlation {found['correlation']:.3f}, mean distance {found['mean_distance']:.3f}")
    return "\n".join(lines)


def ask_rows(points: Sequence[AskPoint]) -> list[dict[str, Any]]:
    """What `ask_table` says, as plain values: a row per ask, its `achieved` as mean, low, high (null without an
    interval) and n, and a last one with `correlation` and `mean_distance`."""
    rows = []
    for point in points:
        low, high = point.achieved.interval or (None, None)
        achieved = {"mean": point.achieved.mean, "low": low, "high": high, "n": point.achieved.n}
        rows.append(asdict(point) | {"achieved": achieved})
    return rows + _obedience(points)


def _obedience(points: Sequence[AskPoint]) -> list[dict[str, float]]:
    """How closely what was achieved follows what was asked; nothing for fewer than three points, or equal ones."""
    asked, achieved = _axes(points)
    if len(points) < 3 or asked.std() == 0 or achieved.std() == 0:
        return []
    correlation = float(np.corrcoef(asked, achieved)[0, 1])
    return [{"correlation": correlation, "mean_distance": float(np.abs(asked - achieved).mean())}]


def draw_asks(points: Sequence[AskPoint], path: Path) -> None:
    """Writes the curve as a picture. Raises: ModuleNotFoundError without matplotlib (extra `plots`)."""
    from matplotlib.figure import Figure

    points = sorted(points, key=lambda point: point.asked)
    asked, achieved = _axes(points)
    ends = np.array([point.achieved.interval or [point.achieved.mean] * 2 for point in points]).T
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.axline((asked.mean(), asked.mean()), slope=1, color="0.7", linestyle=":", label="as asked")
    axes.fill_between(asked, *ends, alpha=0.2)
    axes.plot(asked, achieved, marker="o", label="achieved, 95 %")
    axes.set(xlabel="return asked for", ylabel="return achieved")
    axes.legend(frameon=False)
    figure.savefig(path)


def _axes(points: Sequence[AskPoint]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([point.asked for point in points]), np.array([point.achieved.mean for point in points])
