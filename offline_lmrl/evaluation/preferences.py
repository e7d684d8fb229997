"""How well a scorer agrees with held-out preferences, with intervals, beside what needs no reading at all: length; and
what choosing by it does to a policy that can be listed."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch

from offline_lmrl.data.comparison import Comparison
from offline_lmrl.data.errors import InputError
from offline_lmrl.data.io import group_key
from offline_lmrl.data.preferences import score_rows
from offline_lmrl.data.protocols import Scorer
from offline_lmrl.decoding.scorers import fitting
from offline_lmrl.evaluation.metrics import Cells
from offline_lmrl.ops.preferences import best_of_n, best_of_n_kl, best_of_n_kl_bound, calibration_error

BASELINES = {
    "the longer reply": lambda row, i: sum(len(turn.content) for turn in row.options[i]),
    "the shorter reply": lambda row, i: -sum(len(turn.content) for turn in row.options[i]),
}


def judge(scorer: Scorer, comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Facts over all pairs of options of one comparison that are no tie, as plain values.

    "accuracy": how often the better option scores higher, equal scores half, with its 95% interval over groups (pairs
    of one prompt are not independent), which speaks of this scorer alone. "baselines": the same for length, and, where
    `labels["options"]` name the `generator` of all, for who wins more often among these very pairs; "difference": that
    of the scorer less the best of them, pair by pair. "cross entropy": mean −[p log σ(Δ) + (1 − p) log σ(−Δ)] in nats,
    .693 where it says nothing; "calibration error" of σ(Δ) against p, each pair in both orders, as many logs put the
    better reply first. The last two ask a scorer in units of log odds. Comparisons of which an option is too long for
    the scorer are left out of all of it, and counted.

    Raises: InputError where no comparison fits, or none has such a pair.
    """
    counts: Counter[str] = Counter()
    comparisons = fitting(comparisons, scorer, counts)
    scores = score_rows([(row.context, row.options) for row in comparisons], scorer)
    pairs = [
        (place, i, j, row.preference(i, j))
        for place, row in enumerate(comparisons)
        for i, j in combinations(range(len(row.options)), 2)
        if row.preference(i, j) != 0.5
    ]
    if not pairs:
        raise InputError("comparisons: found only ties, expected pairs of which one reply is better")

    def right(value) -> Cells:
        """Of a function (comparison's place, option) -> number: how often the better option has more of it."""
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
    """What best-of-n by a score makes of a policy whose answers can be listed, exactly: a row per n.

    "kl": of the best of n to the policy, in nats; "bound": log n − (n − 1)/n, which it does not exceed; "score" and
    "gold": their means. Where gold falls while the score rises, the score is over-optimised (Gao et al. 2023).

    Args: prob (V,) of each answer, score (V,) that chooses, gold (V,) that is meant.
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
    """A feature: the share of its pairs that the author of an option wins; none where authors are not known."""

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
