"""Means with intervals, paired differences and normalised scores. numpy only.

A method is trained once per training seed, and every one of these runs plays the same episodes. Episodes that depend
on each other, because they share a scenario or a start, form a cluster. The outcomes are therefore added up in a
table, `Cells`, with one cell per training seed and cluster, and their mean varies with both. Three estimates measure
this variance: A is the jackknife over seeds, B the jackknife over clusters, and E comes from the residual of the cells
without the effects of seeds and clusters. If S seeds play C clusters equally often, the three are the mean squares of
an analysis of variance divided by S·C, and

    Var(mean) = A + B − E    (A and B both contain E, which counts once); at least A and at least B
    df = (a + d)² / (a² / (S − 1) + d² / (C − 1)),    a = A · (1 + 8/(S − 1)⁴),    d = (Var − A) · (1 + 8/(C − 1)⁴)

The interval is that of Student's t with these degrees of freedom (Satterthwaite 1946). Deviation: the factors 1 + 8/…⁴
are our own. With two seeds, A is computed from a single difference and often far too small, and the formula without
the factors then gives A too little weight. The factors were chosen by simulation; tests/evaluation/test_coverage.py
measures coverage, false findings and width. For comparison, a percentile bootstrap covers 75 % instead of 95 % at
three seeds. The factors cost width: if only clusters differ, the interval from two seeds is up to 2.4 times as wide as
one that assumes equal seeds. No rule that uses these mean squares alone does much better: the best rule within 1.15
times the width covers 88 %. With one seed, the interval is the one over the clusters and describes only that run.
"""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from offline_lmrl.errors import require
from offline_lmrl.ops.intervals import student_t, wilson

# Labels that `rollout` adds to an episode for its own bookkeeping; they are no results of the play.
BOOKKEEPING_LABELS = frozenset({"seed", "tokenizer", "policy_log_prob", "options"})


class Estimate(NamedTuple):
    """A mean and its 95% interval.

    mean: the mean.
    low: lower end of the interval; −∞ for one seed with one cluster, because these show no variation.
    high: upper end of the interval; +∞ in the same case.
    n: number of episodes (or of pairs, where the mean is over pairs).
    seeds: number of training seeds. With one, the interval describes that run only, not the method.
    """

    mean: float
    low: float
    high: float
    n: int
    seeds: int = 1

    @property
    def interval(self) -> list[float] | None:
        """[low, high], as JSON can store it; None if they are infinite."""
        return [self.low, self.high] if math.isfinite(self.low) else None

    @classmethod
    def stored(cls, mean: float, interval: list[float] | None, n: int) -> "Estimate":
        """Rebuild the estimate of one run from stored values.

        Args:
          mean: the mean.
          interval: [low, high], the value of the property `interval`; None = no interval.
          n: number of episodes (or of pairs, where the mean is over pairs).
        """
        low, high = interval or (-math.inf, math.inf)
        return cls(mean, low, high, n)

    def excludes(self, value: float) -> bool:
        """True if there are several training seeds and `value` is outside the interval."""
        return self.seeds > 1 and not self.low <= value <= self.high

    @property
    def sure(self) -> bool:
        """True if this estimate, a difference between two methods, is of several seeds and its interval excludes 0."""
        return self.excludes(0)

    def to_text(self, decimals: int) -> str:
        """Return "mean [low, high]" with this many decimals; without an interval, the mean and the reason."""
        if self.interval is None:
            return f"{self.mean:.{decimals}f} (no interval: only one cluster of episodes)"
        return f"{self.mean:.{decimals}f} [{self.low:.{decimals}f}, {self.high:.{decimals}f}]"

    def __str__(self) -> str:
        return self.to_text(2) + " of this run" * (self.seeds == 1 and self.interval is not None)


@dataclass(frozen=True)
class Cells:
    """The sums of an outcome (such as the score) by training seed and cluster of dependent episodes.

    seeds: the S training seeds.
    clusters: the ids of the C clusters.
    total: (S, C), float, sum of the outcome over the episodes of each seed and cluster.
    count: (S, C), float, number of these episodes; may be 0.
    """

    seeds: tuple[Hashable, ...]
    clusters: tuple[Hashable, ...]
    total: np.ndarray
    count: np.ndarray

    @classmethod
    def of(cls, values: Iterable[tuple[Hashable, Hashable, float]]) -> "Cells":
        """Build the table from one (training seed, cluster, outcome) per episode."""
        return cls.summed((seed, cluster, value, 1) for seed, cluster, value in values)

    @classmethod
    def summed(cls, sums: Iterable[tuple[Hashable, Hashable, float, int]]) -> "Cells":
        """Build the table from rows (training seed, cluster, sum of the outcome, number of episodes).

        Rows of the same seed and cluster are added up.
        """
        sums = list(sums)
        seeds = {seed: i for i, seed in enumerate(dict.fromkeys(row[0] for row in sums))}
        clusters = {cluster: i for i, cluster in enumerate(dict.fromkeys(row[1] for row in sums))}
        total, count = np.zeros((len(seeds), len(clusters))), np.zeros((len(seeds), len(clusters)))
        for seed, cluster, value, episodes in sums:
            total[seeds[seed], clusters[cluster]] += value
            count[seeds[seed], clusters[cluster]] += episodes
        return cls(tuple(seeds), tuple(clusters), total, count)

    def __sub__(self, other: "Cells") -> "Cells":
        """Return the paired difference self − other: the difference of the sums in each cell, over common seeds.

        Raises: ValueError if the two have different clusters, or different numbers of episodes in a cell.
        """
        seeds = [seed for seed in self.seeds if seed in other.seeds]
        mine = [self.seeds.index(seed) for seed in seeds]
        theirs = [other.seeds.index(seed) for seed in seeds]
        if set(self.clusters) != set(other.clusters):
            raise ValueError("paired difference: the two methods did not play the same episodes")
        columns = [other.clusters.index(cluster) for cluster in self.clusters]
        count, other_count = self.count[mine], other.count[theirs][:, columns]
        if not np.array_equal(count, other_count):
            raise ValueError("paired difference: the two methods did not play the same number of episodes per cluster")
        return Cells(tuple(seeds), self.clusters, self.total[mine] - other.total[theirs][:, columns], count)

    def per_seed(self) -> dict[Hashable, float]:
        """Return the mean outcome of each training seed."""
        means = self.total.sum(1) / self.count.sum(1)
        return dict(zip(self.seeds, means.tolist(), strict=True))

    @property
    def mean(self) -> float:
        """The mean of the outcome over all episodes. Raises: ValueError if there are none."""
        if not self.count.sum():
            raise ValueError("mean: no episodes")
        return float(self.total.sum() / self.count.sum())

    def estimate(self) -> Estimate:
        """Return the mean over all episodes with the 95% interval that the module's docstring describes."""
        variance, df = self._variance()
        half = student_t(df) * math.sqrt(variance) if df and math.isfinite(variance) else math.inf
        return Estimate(self.mean, self.mean - half, self.mean + half, round(self.count.sum()), len(self.seeds))

    def share(self) -> Estimate:
        """Return the mean of outcomes in [0, 1] with Wilson's 95% interval.

        The interval stays within [0, 1] and has a width even if all outcomes are equal. The sample size in Wilson's
        formula is the number of independent outcomes whose mean would have the variance that `estimate` uses. If all
        outcomes are 0 or all are 1, the sample size is the effective number of clusters, (Σn)² / Σn², where n is the
        number of episodes of each cluster.
        """
        variance, df = self._variance()
        mean, episodes = self.mean, float(self.count.sum())
        # Without variation nothing shows how much the episodes of a cluster depend on each other: assume wholly.
        if df is None or mean in (0.0, 1.0):
            n, df = episodes**2 / float(np.square(self.count.sum(0)).sum()), math.inf
        else:
            # n independent outcomes of this mean would have variance mean · (1 − mean) / n
            n = min(episodes, mean * (1 - mean) / variance) if variance > 0 else episodes
        low, high = wilson(mean, n, student_t(df))
        return Estimate(mean, low, high, round(episodes), len(self.seeds))

    def _variance(self) -> tuple[float, float | None]:
        """Return Var(mean) and df, as defined in the module's docstring; (0, None) for one seed with one cluster."""
        (a, df_a), (b, df_b) = (_jackknife(self.total.sum(axis), self.count.sum(axis)) for axis in (1, 0))
        if df_a is None or df_b is None:
            return max(a, b), df_a or df_b  # an axis with one unit has variance 0 and no df
        variance = max(a + b - self._residual(), a, b)
        parts = a * (1 + 8 / df_a**4), (variance - a) * (1 + 8 / df_b**4)
        if sum(parts) == 0:
            return 0.0, min(df_a, df_b)
        return variance, sum(parts) ** 2 / (parts[0] ** 2 / df_a + parts[1] ** 2 / df_b)

    def _residual(self) -> float:
        """Return E, the variance of the mean due to the residual of the cells without seed and cluster effects."""
        with np.errstate(invalid="ignore"):  # 0/0 for an empty row or column; its cells have weight 0 below
            seeds, clusters = (self.total.sum(axis) / self.count.sum(axis) for axis in (1, 0))
        effects = seeds[:, None] + clusters - self.mean
        rest = self.total - self.count * np.nan_to_num(effects)
        # The residual of s · c cells has only (s − 1)(c − 1) degrees of freedom.
        s, c = (np.count_nonzero(self.count.sum(axis)) for axis in (1, 0))
        return float(np.square(rest).sum() / self.count.sum() ** 2 * s * c / ((s - 1) * (c - 1)))


def _jackknife(total: np.ndarray, count: np.ndarray) -> tuple[float, float | None]:
    """Return the jackknife variance of Σ total / Σ count over K units (seeds or clusters), and its degrees of freedom.

    With m_k the mean without unit k, the variance is (K − 1)/K · Σ_k (m_k − mean of all m_k)². The degrees of freedom
    are K − 1 for units with equal counts, and fewer if a few units hold most episodes.

    Args:
      total: (K,), sum of the outcome over the episodes of each unit.
      count: (K,), number of episodes of each unit; units without episodes are ignored.
    Returns: variance and degrees of freedom (at least 1); (0, None) for fewer than two units.
    """
    total, count = total[count > 0], count[count > 0]
    if len(count) < 2:
        return 0.0, None
    without = _without_each(total) / _without_each(count)
    weight = np.square(count)
    df = weight.sum() ** 2 / np.square(weight).sum() - 1
    return float((len(count) - 1) / len(count) * np.square(without - without.mean()).sum()), float(max(df, 1.0))


def _without_each(values: np.ndarray) -> np.ndarray:
    """Return, for each of K values, the sum of all others, (K,).

    Each sum adds the values before and the values after the one left out. Subtracting that value from the total
    instead would leave only rounding error if it makes up almost all of the total.
    """
    before, after = np.cumsum(values[:-1]), np.cumsum(values[:0:-1])[::-1]
    return np.concatenate([[0.0], before]) + np.concatenate([after, [0.0]])


def mean_interval(values: Sequence[float], clusters: Sequence[Hashable] | None = None) -> Estimate:
    """Return the mean over the episodes of one run with its 95% interval over clusters of episodes.

    Args:
      values: outcome of each episode.
      clusters: cluster of each episode; episodes of one cluster depend on each other. None = all are independent.
    """
    keys = range(len(values)) if clusters is None else clusters
    return Cells.of((0, key, value) for key, value in zip(keys, values, strict=True)).estimate()


@dataclass(frozen=True)
class ScoreScale:
    """The piecewise-linear scale of LMRL-Gym (Abdulhai et al. 2023), on which min, mean and max become 0, 50 and 100.

    min: worst score.
    mean: mean score of the data.
    max: best score.
    """

    min: float
    mean: float
    max: float

    def __post_init__(self) -> None:
        require(
            self.min < self.mean < self.max,
            f"score: found min {self.min}, mean {self.mean}, max {self.max}, expected min < mean < max",
        )

    def normalise(self, score: float) -> float:
        """Return the score on this scale, not clipped: below 0 if it is below `min`, above 100 if above `max`."""
        if score < self.mean:
            return 50.0 * (score - self.min) / (self.mean - self.min)
        return 50.0 + 50.0 * (score - self.mean) / (self.max - self.mean)


def label_means(episodes: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return the mean of every numeric or boolean label over the episodes that have it.

    An episode without the label, or with the value None, does not count: if an environment sets `score_agreed` only
    on agreement, the mean of that label is the mean score given agreement. Labels that hold text or lists, and those
    of BOOKKEEPING_LABELS, are ignored.

    Args:
      episodes: the labels of each episode, name -> value.
    Returns: name -> mean; a boolean counts as 0 or 1.
    """
    values: dict[str, list[float]] = {}
    for labels in episodes:
        for name, value in labels.items():
            if isinstance(value, bool | int | float | np.number | np.bool_) and name not in BOOKKEEPING_LABELS:
                values.setdefault(name, []).append(float(value))
    return {name: sum(column) / len(column) for name, column in values.items()}
