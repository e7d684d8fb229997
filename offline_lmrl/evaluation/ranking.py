"""How well numbers that a model gives to rows order them as their outcomes do; numpy only.

    Spearman's ρ = correlation of the ranks of scores and outcomes, in [−1, 1]; 0 without any relation
    AUC = P(score_i > score_j | outcome_i > outcome_j), equal scores count half; 0.5 without any relation

With two different outcomes, such as thumbs up and down, this is the usual area under the ROC curve; with more it is
the concordance over all pairs with unequal outcomes. The intervals come from a jackknife that leaves out one group of
rows at a time (a block of several groups if there are more than BLOCKS), so rows of a group may depend on each other.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from offline_lmrl.evaluation.metrics import Estimate
from offline_lmrl.ops.intervals import student_t, wilson

SAME = 1e-12  # values of a statistic that differ by less are equal but for rounding
BLOCKS = 100  # most parts of the data that a jackknife leaves out in turn
MOST_ROWS = 4000  # rows whose pairs are counted; of more, so many are drawn


@dataclass(frozen=True)
class RankAgreement:
    """How well scores order rows as their outcomes do, with 95% intervals; `str` formats it.

    correlation: Spearman's rank correlation.
    auc: probability that of two rows with unequal outcomes the one with the higher outcome has the higher score.
    """

    correlation: Estimate
    auc: Estimate

    def __str__(self) -> str:
        return f"rank correlation {self.correlation.to_text(2)}, AUC {self.auc.to_text(2)}, n={self.correlation.n}"


def rank_agreement(
    scores: Sequence[float], outcomes: Sequence[float], groups: Sequence[Hashable]
) -> RankAgreement | None:
    """Return the rank correlation and the AUC of scores against outcomes.

    Args:
      scores: (n,) finite numbers.
      outcomes: (n,) finite numbers.
      groups: (n,) the group of each row; rows of one group may depend on each other.
    Returns: the agreement; None if all scores or all outcomes are equal, since nothing is ordered then.
    """
    score, outcome = np.asarray(scores, dtype=np.float64), np.asarray(outcomes, dtype=np.float64)
    number = np.unique(np.array([repr(group) for group in groups]), return_inverse=True)[1]
    if len(score) > MOST_ROWS:
        drawn = np.random.default_rng(0).choice(len(score), MOST_ROWS, replace=False)
        score, outcome, number = score[drawn], outcome[drawn], np.unique(number[drawn], return_inverse=True)[1]
    if not len(score) or np.ptp(score) == 0 or np.ptp(outcome) == 0:
        return None
    block = np.random.default_rng(0).permutation(number.max() + 1)[number] % BLOCKS
    return RankAgreement(
        _jackknifed(*_correlations(score, outcome, block), len(score), -1.0),
        _jackknifed(*_aucs(score, outcome, block), len(score), 0.0),
    )


def _jackknifed(whole: float, without: Sequence[float | None], n: int, least: float) -> Estimate:
    """Return a statistic with the 95% interval of its jackknife over blocks, cut to [least, 1].

    If it is the same without each block, as in a perfect order, the interval is Wilson's for that share of blocks.

    Args:
      whole: the statistic of all n rows.
      without: the statistic of the rows outside each block; None where it has no value.
      n: number of rows.
      least: the smallest possible value.
    """
    if len(without) < 2:
        return Estimate(whole, -np.inf, np.inf, n)
    left = np.array([value for value in without if value is not None])
    if np.ptp(left) < SAME:
        ends = wilson((whole - least) / (1 - least), len(without), student_t(np.inf))
        return Estimate(whole, *(least + (1 - least) * end for end in ends), n)
    spread = np.square(left - left.mean()).sum() * (len(left) - 1) / len(left)
    half = student_t(len(left) - 1) * float(np.sqrt(spread))
    return Estimate(whole, max(least, whole - half), min(1.0, whole + half), n)


def _correlations(score: np.ndarray, outcome: np.ndarray, block: np.ndarray) -> tuple[float, list[float | None]]:
    """Return Spearman's ρ of n rows, and that without each block; None where all values of one side are equal."""

    def spearman(kept: np.ndarray | slice) -> float | None:
        ranks = [_ranks(score[kept]), _ranks(outcome[kept])]
        return None if any(len(np.unique(rank)) < 2 for rank in ranks) else float(np.corrcoef(*ranks)[0, 1])

    return spearman(slice(None)), [spearman(block != one) for one in np.unique(block)]


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return the ranks of values (n,), from 1; equal values get the mean of their ranks."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def _aucs(score: np.ndarray, outcome: np.ndarray, block: np.ndarray) -> tuple[float, list[float | None]]:
    """Return the AUC of n rows, and that without each block; None where all outcomes that are left are equal."""
    order = np.argsort(block, kind="stable")
    score, outcome, starts = score[order], outcome[order], np.unique(block[order], return_index=True)[1]
    higher = outcome[:, None] > outcome  # (n, n), True if row i has the higher outcome of i and j
    won = np.where(higher, 0.5 + 0.5 * np.sign(score[:, None] - score), 0.0)
    # (blocks, blocks): sums over the pairs with row i in one block and row j in the other
    sums = [np.add.reduceat(np.add.reduceat(pairs, starts, 0, dtype=float), starts, 1) for pairs in (won, higher)]
    won, pairs = (one.sum() - one.sum(0) - one.sum(1) + np.diag(one) for one in sums)
    left = [float(w / n) if n > 0 else None for w, n in zip(won, pairs, strict=True)]
    return float(sums[0].sum() / sums[1].sum()), left
