"""Means with intervals, paired differences and normalised scores. numpy only.

Episodes are crossed with training runs: every run plays the same episodes, and episodes that share a scenario (or a
start) are not independent. A result therefore is a `Cells` table, training seed × cluster, and its mean varies with
both. Three jackknives say how much: A leaves out seeds, B clusters, E is what is left of the cells once both are taken
away. Where S seeds play C clusters equally often they are the mean squares of an analysis of variance over SC, and

    Var(mean) = A + B − E    (A and B each hold E once too often), never taken below A or B
    df = (a + d)² / (a² / (S − 1) + d² / (C − 1)),    a = A · (1 + 8/(S − 1)⁴),    d = (Var − A) · (1 + 8/(C − 1)⁴)

The interval is t's with these degrees of freedom (Satterthwaite 1946). The factors are our own: with two seeds A rests
on one number, which is often far too small, and the plain formula then takes it for unimportant; they were chosen by
simulation (tests/evaluation/test_coverage.py, which holds coverage, false findings and width). A percentile bootstrap
covers 75 % instead of 95 % at three seeds. The price: where only clusters differ, two seeds cost an interval of up to
2.4 times the width that it would have for who knows that seeds do not. No rule that sees these mean squares alone does
much better: the best within 1.15 times covers 88 %. With one seed the interval speaks of that run, over its clusters.
"""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from offline_lmrl.data.errors import InputError
from offline_lmrl.ops.intervals import student_t, wilson

# What rollouts record about an episode that is no outcome of it.
BOOKKEEPING_LABELS = frozenset({"seed", "tokenizer", "policy_log_prob", "options"})


class Estimate(NamedTuple):
    """A mean and its 95% interval.

    low, high: the ends; infinite where a single cluster of a single seed counts, which shows no variation.
    n: episodes.
    seeds: training seeds; with one the interval speaks of that run over episodes, and nothing of the method.
    """

    mean: float
    low: float
    high: float
    n: int
    seeds: int = 1

    @property
    def interval(self) -> list[float] | None:
        """The ends for a file of JSON, None where they are infinite."""
        return [self.low, self.high] if math.isfinite(self.low) else None

    @property
    def sure(self) -> bool:
        """Whether a difference says that one method is better: several seeds, and an interval without 0."""
        return self.seeds > 1 and not self.low <= 0 <= self.high

    def to_text(self, decimals: int) -> str:
        """Mean and interval, without saying of what."""
        if self.interval is None:
            return f"{self.mean:.{decimals}f} (no interval: one cluster of episodes counts)"
        return f"{self.mean:.{decimals}f} [{self.low:.{decimals}f}, {self.high:.{decimals}f}]"

    def __str__(self) -> str:
        return self.to_text(2) + " of this run" * (self.seeds == 1 and self.interval is not None)


@dataclass(frozen=True)
class Cells:
    """Sums of an outcome by training seed and cluster of episodes.

    seeds: S labels; clusters: C labels; total: (S, C) sum of the outcome; count: (S, C) episodes, 0 where none.
    """

    seeds: tuple[Hashable, ...]
    clusters: tuple[Hashable, ...]
    total: np.ndarray
    count: np.ndarray

    @classmethod
    def of(cls, values: Iterable[tuple[Hashable, Hashable, float]]) -> "Cells":
        """From (training seed, cluster, outcome) of every episode."""
        return cls.summed((seed, cluster, value, 1) for seed, cluster, value in values)

    @classmethod
    def summed(cls, sums: Iterable[tuple[Hashable, Hashable, float, int]]) -> "Cells":
        """From (training seed, cluster, sum of the outcome, episodes), as results files keep it."""
        sums = list(sums)
        seeds = {seed: i for i, seed in enumerate(dict.fromkeys(row[0] for row in sums))}
        clusters = {cluster: i for i, cluster in enumerate(dict.fromkeys(row[1] for row in sums))}
        total, count = np.zeros((len(seeds), len(clusters))), np.zeros((len(seeds), len(clusters)))
        for seed, cluster, value, episodes in sums:
            total[seeds[seed], clusters[cluster]] += value
            count[seeds[seed], clusters[cluster]] += episodes
        return cls(tuple(seeds), tuple(clusters), total, count)

    def __sub__(self, other: "Cells") -> "Cells":
        """Paired difference over the training seeds both have, self − other, episode by episode.

        Raises: ValueError where the two did not play the same episodes.
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
        """Mean outcome of each training seed."""
        means = self.total.sum(1) / self.count.sum(1)
        return dict(zip(self.seeds, means.tolist(), strict=True))

    @property
    def mean(self) -> float:
        """Mean over all episodes."""
        if not self.count.sum():
            raise ValueError("mean: no episodes")
        return float(self.total.sum() / self.count.sum())

    def estimate(self) -> Estimate:
        """Mean over all episodes with its interval, see the top of the file."""
        variance, df = self._variance()
        half = student_t(df) * math.sqrt(variance) if df and math.isfinite(variance) else math.inf
        return Estimate(self.mean, self.mean - half, self.mean + half, round(self.count.sum()), len(self.seeds))

    def share(self) -> Estimate:
        """The same of outcomes in [0, 1], with Wilson's interval, which never leaves it and does not vanish where all
        outcomes are alike: of as many independent outcomes as have the same variance, or, where all are 0 or all 1, as
        there are clusters."""
        variance, df = self._variance()
        mean, episodes = self.mean, float(self.count.sum())
        if df is None or mean in (0.0, 1.0):  # nothing says how alike the episodes of a cluster are: wholly
            n, df = episodes**2 / float(np.square(self.count.sum(0)).sum()), math.inf
        else:
            n = min(episodes, mean * (1 - mean) / variance) if variance > 0 else episodes
        low, high = wilson(mean, n, student_t(df))
        return Estimate(mean, low, high, round(episodes), len(self.seeds))

    def _variance(self) -> tuple[float, float | None]:
        """Of the mean, and its degrees of freedom; None of one seed and one cluster."""
        axes = [_jackknife(self.total.sum(axis), self.count.sum(axis)) for axis in (1, 0)]
        (a, df_a), (b, df_b) = ((v, df) if df else (0.0, None) for v, df in axes)
        if df_a is None or df_b is None:
            return max(a, b), df_a or df_b  # one of them is 0
        variance = max(a + b - self._residual(), a, b)
        parts = a * (1 + 8 / df_a**4), (variance - a) * (1 + 8 / df_b**4)
        if sum(parts) == 0:
            return 0.0, min(df_a, df_b)
        return variance, sum(parts) ** 2 / (parts[0] ** 2 / df_a + parts[1] ** 2 / df_b)

    def _residual(self) -> float:
        """Variance of the mean by what is left of the cells without the effects of seeds and of clusters."""
        with np.errstate(invalid="ignore"):  # an empty cell counts as often as it has episodes, 0 times
            seeds, clusters = (self.total.sum(axis) / self.count.sum(axis) for axis in (1, 0))
        effects = seeds[:, None] + clusters - self.mean
        rest = self.total - self.count * np.nan_to_num(effects)
        s, c = (np.count_nonzero(self.count.sum(axis)) for axis in (1, 0))
        return float(np.square(rest).sum() / self.count.sum() ** 2 * s * c / ((s - 1) * (c - 1)))


def _jackknife(total: np.ndarray, count: np.ndarray) -> tuple[float, float | None]:
    """Variance of Σ total / Σ count over K units, (K − 1)/K · Σ (the mean without unit k − mean of these)², and its
    degrees of freedom: K − 1 of equal units, fewer where few of them hold most episodes. None of one unit."""
    total, count = total[count > 0], count[count > 0]
    if len(count) < 2:
        return 0.0, None
    without = _without_each(total) / _without_each(count)
    weight = np.square(count)
    df = weight.sum() ** 2 / np.square(weight).sum() - 1
    return float((len(count) - 1) / len(count) * np.square(without - without.mean()).sum()), float(max(df, 1.0))


def _without_each(values: np.ndarray) -> np.ndarray:
    """The sum without each of K values, (K,), from those before and those after it: of a total that one value makes up
    almost alone, subtracting that value would leave nothing but rounding."""
    before, after = np.cumsum(values[:-1]), np.cumsum(values[:0:-1])[::-1]
    return np.concatenate([[0.0], before]) + np.concatenate([after, [0.0]])


def mean_interval(values: Sequence[float], clusters: Sequence[Hashable] | None = None) -> Estimate:
    """Mean of one run's episodes with its interval; episodes with an equal cluster are not independent."""
    keys = range(len(values)) if clusters is None else clusters
    return Cells.of((0, key, value) for key, value in zip(keys, values, strict=True)).estimate()


@dataclass(frozen=True)
class ScoreScale:
    """Piecewise-linear scale of LMRL-Gym (Abdulhai et al. 2023): 0 the worst, 50 the data's mean, 100 the best."""

    min: float
    mean: float
    max: float

    def __post_init__(self) -> None:
        if not self.min < self.mean < self.max:
            found = f"min {self.min}, mean {self.mean}, max {self.max}"
            raise InputError(f"score: found {found}, expected min < mean < max")

    def normalise(self, score: float) -> float:
        """Not clipped: a score beyond the ends stays visible as below 0 or above 100."""
        if score < self.mean:
            return 50.0 * (score - self.min) / (self.mean - self.min)
        return 50.0 + 50.0 * (score - self.mean) / (self.max - self.mean)


def label_means(episodes: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Mean of every numeric or yes/no label over the episodes that have it.

    An episode without the label, or with None, does not count: an environment that gives `score_agreed` only on
    agreement gets the mean score when agreed. Texts and lists are facts for the reader, not for a mean.
    """
    values: dict[str, list[float]] = {}
    for labels in episodes:
        for name, value in labels.items():
            if isinstance(value, bool | int | float | np.number | np.bool_) and name not in BOOKKEEPING_LABELS:
                values.setdefault(name, []).append(float(value))
    return {name: sum(column) / len(column) for name, column in values.items()}
