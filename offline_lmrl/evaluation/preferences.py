"""Evaluation of a scorer: its agreement with held-out preferences, beside baselines that need no model (length), and
the effect of best-of-n by a score on a policy whose answers can be enumerated."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch

from offline_lmrl.decoding.scorers import drop_too_long
from offline_lmrl.errors import InputError
from offline_lmrl.evaluation.metrics import Cells
from offline_lmrl.logs.comparison import Comparison
from offline_lmrl.logs.io import group_key
from offline_lmrl.logs.preferences import score_rows
from offline_lmrl.logs.protocols import Scorer
from offline_lmrl.ops.preferences import best_of_n, best_of_n_kl, best_of_n_kl_bound, calibration_error

BASELINES = {
    "the longer reply": lambda row, i: sum(len(turn.content) for turn in row.options[i]),
    "the shorter reply": lambda row, i: -sum(len(turn.content) for turn in row.options[i]),
}


def evaluate_scorer(scorer: Scorer, comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Measure how well a scorer agrees with comparisons.

    A pair is two options of one comparison, without a tie; p is the probability that the first is better, and Δ its
    score minus that of the second. The last two measures below need a scorer in units of log odds. Comparisons with an
    option that is too long for the scorer are left out everywhere, and counted.

    Returns: plain values by name, among them
      "accuracy": share of pairs whose better option scores higher; equal scores count half. The 95% interval is over
        groups, because pairs of one prompt are not independent, and describes this scorer alone.
      "baselines": the same share for choosing by length, and, if `labels["options"]` name the `generator` of every
        option, for choosing the author that wins more often among these very pairs.
      "difference": accuracy of the scorer minus that of the best baseline, paired.
      "cross entropy": mean −[p log σ(Δ) + (1 − p) log σ(−Δ)] in nats; .693 for a scorer that gives equal scores.
      "calibration error": that of σ(Δ) against p. Each pair enters in both orders, because many logs put the better
        reply first.
    Raises: InputError if no comparison fits or no pair remains.
    """
    counts: Counter[str] = Counter()
    comparisons = drop_too_long(comparisons, scorer, counts)
    scores = score_rows([(row.context, row.options) for row in comparisons], scorer)
    pairs = [
        (place, i, j, row.preference(i, j))
        for place, row in enumerate(comparisons)
        for i, j in combinations(range(len(row.options)), 2)
        if row.preference(i, j) != 0.5
    ]
    if not pairs:
        raise InputError("comparisons: found only ties, expected pairs in which one reply is better")

    def right(value) -> Cells:
        """Count, by group, how often the better option has the higher value; equal values count half.

        Args:
          value: function (index of a comparison, index of an option) -> number.
        """
        return Cells.of(
            (0, group_key(comparisons[place]), 0.5 + 0.5 * _sign(value(place, i) - value(place, j)) * _sign(p - 0.5))
            for place, i, j, p in pairs
        )

    found = right(lambda place, i: scores[place][i])
    features = BASELINES | _authors(pairs, comparisons)
    others = {name: right(lambda place, i, f=feature: f(comparisons[place], i)) for name, feature in features.items()}
    best = max(others.values(), key=lambda cells: cells.mean)
    lead = torch.tensor([scores[place][i] - scores[place][j] for place, i, j, _ in pairs], dtype=torch.float64)
    prob = torch.tensor([p for *_, p in pairs], dtype=torch.float64)
    softplus = torch.nn.functional.softplus
    return {
        "comparisons": len(comparisons),
        **counts,
        "pairs": len(pairs),
        "groups": len(found.clusters),
        "accuracy": found.share().to_text(3),
        "baselines": {name: cells.share().to_text(3) for name, cells in others.items()},
        "difference": (found - best).estimate().to_text(3),
        "cross entropy": (prob * softplus(-lead) + (1 - prob) * softplus(lead)).mean().item(),
        "calibration error": calibration_error(torch.cat([lead, -lead]).sigmoid(), torch.cat([prob, 1 - prob])).item(),
    }


def best_of_n_curve(
    prob: torch.Tensor, score: torch.Tensor, gold: torch.Tensor, ns: Sequence[int]
) -> list[dict[str, float]]:
    """Compute best-of-n by a score exactly, for a policy whose V answers can be enumerated.

    The score is over-optimised where gold falls while the score rises (Gao et al. 2023).

    Args:
      prob: (V,), probability of each answer.
      score: (V,), the score that chooses the best of n.
      gold: (V,), the true reward.
      ns: values of n.
    Returns: one row per `n`: "kl", KL(best of n ‖ policy) in nats; "bound", log n − (n − 1)/n, which "kl" does not
      exceed; and "score" and "gold", their means over the best of n.
    """
    rows = []
    for n in ns:
        best = best_of_n(prob, score, n)
        rows.append(
            {
                "n": n,
                "kl": best_of_n_kl(prob, score, n).item(),
                "bound": best_of_n_kl_bound(n),
                "score": (best @ score.double()).item(),
                "gold": (best @ gold.double()).item(),
            }
        )
    return rows


def _authors(pairs: Sequence[tuple], comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Return a baseline that rates an option by the share of pairs that its author wins; empty if an author is
    unknown."""

    def author(row: Comparison, i: int) -> str | None:
        return (row.labels.get("options") or [{}] * len(row.options))[i].get("generator")

    won: dict[str | None, list[float]] = defaultdict(list)
    for place, i, j, p in pairs:
        won[author(comparisons[place], i)].append(p)
        won[author(comparisons[place], j)].append(1 - p)
    if None in won:
        return {}
    mean = {name: math.fsum(values) / len(values) for name, values in won.items()}
    return {"the reply of the author that wins more often here": lambda row, i: mean[author(row, i)]}


def _sign(value: float) -> float:
    return math.copysign(1.0, value) if value else 0.0
