"""Evaluation of a scorer: its agreement with held-out preferences, compared with baselines that need no model (such as
choosing by length), and best-of-n computed exactly for a policy whose answers can be enumerated."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch

from offline_lmrl.decoding.scorers import drop_too_long
from offline_lmrl.errors import require
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
    """Measure how well a scorer agrees with people's preferences.

    A pair is two options (replies) of one comparison that are not tied. p is the probability that the first one is
    better, Δ the score of the first minus that of the second. Comparisons with an option that is too long for the
    scorer are left out everywhere, and counted. The last two measures below need a scorer in units of log odds.

    Returns: values that JSON can hold, by name: the number of comparisons left out; "comparisons", "pairs" and
      "groups" (such as prompts), the numbers of those measured; and
      "accuracy": share of pairs whose better option scores higher; equal scores count half. A text, "mean [low,
        high]", whose 95% interval treats the pairs of a group as dependent and describes this scorer only.
      "baselines": the same share for the longer and for the shorter option and, if `labels["options"]` name the
        `generator` (author) of every option, for the option whose author wins more often among these same pairs.
      "difference": accuracy of the scorer minus that of the best baseline, pair by pair, as such a text.
      "cross entropy": mean −[p log σ(Δ) + (1 − p) log σ(−Δ)] in nats; 0.693 for a scorer that gives equal scores.
      "calibration error": of σ(Δ) as a prediction of p. Each pair is counted in both orders, because many logs put the
        better reply first.
    Raises: InputError if every comparison has an option that is too long, or if all options are tied.
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
    require(len(pairs) > 0, "comparisons: found only ties, expected pairs in which one reply is better")

    def right(value) -> Cells:
        """Count, by group, the pairs in which the better option has the higher value; equal values count half.

        Args:
          value: function from the index of a comparison and the index of an option in it to a number.
        """
        agreed = [np.sign(value(place, i) - value(place, j)) * np.sign(p - 0.5) for place, i, j, p in pairs]
        groups = (group_key(comparisons[place]) for place, *_ in pairs)
        return Cells.of((0, group, 0.5 + 0.5 * sign) for group, sign in zip(groups, agreed, strict=True))

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
    """Compute exactly what best-of-n by a score gives for each n, for a policy with M possible answers.

    The score is over-optimised where the true reward falls while the score rises (Gao et al. 2023).

    Args:
      prob: (M,), the policy's probability of each answer.
      score: (M,), the score that chooses the best of n answers.
      gold: (M,), the true reward of each answer.
      ns: values of n.
    Returns: one mapping per value of n: "n"; "kl", KL(best of n ‖ policy) in nats; "bound", log n − (n − 1)/n, which
      "kl" does not exceed; "score" and "gold", the expected score and true reward of the chosen answer.
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
    """Return a baseline that rates an option by the share of pairs that its author wins.

    Args:
      pairs: (index of a comparison, i, j, probability that its option i is better than j) of each pair.
      comparisons: the comparisons.
    Returns: name of the baseline -> function from a comparison and the index of an option to its value; empty if the
      author of any option in the pairs is unknown.
    """

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
