"""What intervals promise, held by simulation: how often they cover, call equal methods different, find a difference.

A score is seed effect + cluster effect + noise of one unit per episode. `pytest -m slow -s` prints the tables.
"""

import math

import numpy as np
import pytest

from offline_lmrl.evaluation.metrics import Cells
from offline_lmrl.ops.intervals import student_t

pytestmark = pytest.mark.slow

SEEDS = (2, 3, 5, 10)
SEED_SD = (0.0, 0.1, 0.3, 1.0)
CLUSTER_SD = (0.0, 0.5)
SHAPES = ((10, 20), (25, 8), (200, 4))  # clusters, episodes of each


def played(rng: np.random.Generator, seeds: int, shape: tuple[int, int], seed_sd: float, cluster: np.ndarray) -> Cells:
    clusters, episodes = shape
    mean = seed_sd * rng.normal(size=(seeds, 1)) + cluster + rng.normal(size=(seeds, clusters)) / math.sqrt(episodes)
    count = np.full((seeds, clusters), float(episodes))
    return Cells(tuple(range(seeds)), tuple(range(clusters)), mean * episodes, count)


def textbook(seeds: int, shape: tuple[int, int], seed_sd: float, cluster_sd: float) -> float:
    """Half the width of t's interval for who knows the variance of seeds, clusters and noise; Satterthwaite's df."""
    clusters, episodes = shape
    rest = 1 / episodes
    a, b = clusters * seed_sd**2 + rest, seeds * cluster_sd**2 + rest
    df = (a + b - rest) ** 2 / (a**2 / (seeds - 1) + b**2 / (clusters - 1) + rest**2 / ((seeds - 1) * (clusters - 1)))
    return student_t(max(df, 1.0)) * math.sqrt((a + b - rest) / (seeds * clusters))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seeds", SEEDS)
def test_intervals_cover_and_are_no_wider_than_need_be(seeds, shape, repeats=1000):
    rng = np.random.default_rng([seeds, *shape])
    widths, missed = [], []
    for cluster_sd in CLUSTER_SD:
        for seed_sd in SEED_SD:
            found = [
                played(rng, seeds, shape, seed_sd, cluster_sd * rng.normal(size=shape[0])).estimate()
                for _ in range(repeats)
            ]
            covered = np.mean([estimate.low <= 0 <= estimate.high for estimate in found])
            width = np.mean([estimate.high - estimate.low for estimate in found])
            widths.append(width / (2 * textbook(seeds, shape, seed_sd, cluster_sd)))
            print(
                f"{seeds} seeds, {shape[0]} clusters x {shape[1]}, seed sd {seed_sd}, cluster sd {cluster_sd}: "
                f"covers {covered:.3f}, {widths[-1]:.2f} of the textbook's width"
            )
            if covered < 0.92:
                missed.append((seed_sd, cluster_sd, covered))
    assert not missed
    # With two seeds no rule has both where clusters differ and seeds hardly do: see metrics.
    assert seeds == 2 or max(widths) <= 1.15


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seeds", SEEDS)
def test_equal_methods_are_seldom_called_different(seeds, shape, repeats=1000):
    rng = np.random.default_rng([100 + seeds, *shape])
    for cluster_sd in CLUSTER_SD:
        for seed_sd in SEED_SD:
            false = 0
            for _ in range(repeats):
                scenario = cluster_sd * rng.normal(size=shape[0])  # hard for both
                one, other = (played(rng, seeds, shape, seed_sd, scenario) for _ in range(2))
                false += (one - other).estimate().sure
            print(
                f"{seeds} seeds, {shape[0]} clusters x {shape[1]}, seed sd {seed_sd}, cluster sd {cluster_sd}: "
                f"{false / repeats:.3f} false"
            )
            assert false / repeats <= 0.06 + 2 * math.sqrt(0.06 * 0.94 / repeats)  # the simulation's own noise


@pytest.mark.parametrize("seed_sd", [0.1, 0.3, 1.0])
def test_a_difference_of_two_seed_standard_deviations_is_found_with_five_seeds(seed_sd, repeats=1000):
    # The standard deviation of the paired difference over seeds: of two methods' own, √(sd² + sd²).
    rng = np.random.default_rng([7, int(10 * seed_sd)])
    better = 0
    for _ in range(repeats):
        levels = (np.full(200, add) for add in (2 * seed_sd, 0.0))
        one, other = (played(rng, 5, (200, 4), seed_sd / math.sqrt(2), level) for level in levels)
        difference = (one - other).estimate()
        better += difference.sure and difference.low > 0
    print(f"seed sd of the difference {seed_sd}: found {better / repeats:.3f}")
    assert better / repeats >= 0.85


@pytest.mark.parametrize("clusters", [5, 10, 100])
def test_one_run_covers_its_own_mean(clusters, repeats=2000):
    rng = np.random.default_rng(clusters)
    covered = 0
    for _ in range(repeats):
        estimate = played(rng, 1, (clusters, 4), 0.0, 0.5 * rng.normal(size=clusters)).estimate()
        covered += estimate.low <= 0 <= estimate.high
    assert covered / repeats >= 0.94


@pytest.mark.parametrize("share", [0.5, 0.8, 0.97])
def test_shares_of_uneven_groups_cover(share, repeats=1000):
    """Pairs of a group agree in part: each takes the group's own coin with probability a half."""
    rng = np.random.default_rng(int(100 * share))
    covered = 0
    for _ in range(repeats):
        sizes = rng.integers(1, 8, size=40)
        common = rng.random(40) < share
        own = [rng.random(n) < share for n in sizes]
        alike = [rng.random(n) < 0.5 for n in sizes]
        won = np.array([np.where(a, c, o).sum() for a, c, o in zip(alike, common, own, strict=True)])
        groups = enumerate(zip(won.tolist(), sizes.tolist(), strict=True))
        estimate = Cells.summed((0, group, wins, pairs) for group, (wins, pairs) in groups).share()
        covered += estimate.low <= share <= estimate.high
    print(f"share {share}: covers {covered / repeats:.3f}")
    assert covered / repeats >= 0.92
