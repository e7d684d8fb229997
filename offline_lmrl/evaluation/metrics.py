"""Means with intervals, paired differences and normalised scores. numpy only.

Episodes are crossed with training runs: every run plays the same episodes, and episodes that share a scenario (or a
start) are not independent. A result therefore is a `Cells` table, training seed × cluster, and the bootstrap draws
seeds and clusters with replacement, independently of each other; a cell counts as often as both were drawn (Owen 2007,
"The pigeonhole bootstrap"). Drawing clusters anew within each seed would take a hard scenario that all seeds share for
bad luck of several. With one seed the interval speaks of that run alone.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from offline_lmrl.data.errors import InputError

# What rollouts record about an episode that is no outcome of it.
BOOKKEEPING_LABELS = frozenset({"seed", "tokenizer", "policy_log_prob", "options"})


class Estimate(NamedTuple):
    """A mean, the ends of its 95% interval, and the number of episodes it was taken over."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


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

    def estimate(self, draws: int = 2000, level: float = 0.95, random_seed: int = 0) -> Estimate:
        """Mean over all episodes with its percentile bootstrap interval."""
        if not self.count.sum():
            raise ValueError("estimate: no episodes")
        seed_weight, cluster_weight = _weights(*self.count.shape, draws, random_seed)
        total = ((seed_weight @ self.total) * cluster_weight).sum(1)
        count = ((seed_weight @ self.count) * cluster_weight).sum(1)
        drawn = count > 0  # a draw may miss every filled cell of a ragged table
        low, high = np.quantile(total[drawn] / count[drawn], [(1 - level) / 2, (1 + level) / 2])
        return Estimate(float(self.total.sum() / self.count.sum()), float(low), float(high), int(self.count.sum()))


@lru_cache(maxsize=4)  # a report asks for hundreds of intervals of tables of one shape
def _weights(n_seeds: int, n_clusters: int, draws: int, random_seed: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each seed (draws, S) and each cluster (draws, C) is drawn."""
    generator = np.random.default_rng(random_seed)
    seed_weight = generator.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), size=draws)
    return seed_weight, generator.multinomial(n_clusters, np.full(n_clusters, 1 / n_clusters), size=draws)


def mean_interval(values: Sequence[float], clusters: Sequence[Hashable] | None = None) -> Estimate:
    """Mean of one run's episodes with its interval; episodes with an equal cluster are drawn together."""
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
