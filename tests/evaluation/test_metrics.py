import numpy as np
import pytest

from offline_lmrl.errors import InputError
from offline_lmrl.evaluation.metrics import Cells, ScoreScale, label_means, mean_interval
from offline_lmrl.ops.intervals import student_t


def test_the_mean_counts_every_episode_once_whatever_its_cluster():
    # (1 + 2 + 3 + 10) / 4, not the mean of the two cluster means 2 and 10
    estimate = mean_interval([1.0, 2.0, 3.0, 10.0], clusters=["a", "a", "a", "b"])
    assert estimate.mean == 4.0 and estimate.n == 4


def test_equal_outcomes_have_an_interval_of_no_width():
    assert mean_interval([3.0] * 20)[:3] == (3.0, 3.0, 3.0)


def test_the_interval_of_independent_episodes_is_that_of_the_normal_distribution():
    values = np.random.default_rng(0).normal(5.0, 2.0, size=400)
    estimate = mean_interval(values.tolist())
    half = 1.96 * values.std() / np.sqrt(400)  # about 0.196
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.02)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.02)


def test_copies_of_an_episode_in_one_cluster_do_not_narrow_the_interval():
    values = np.random.default_rng(1).normal(size=50).tolist()
    once = mean_interval(values)
    copied = mean_interval([value for value in values for _ in range(8)], [i for i in range(50) for _ in range(8)])
    assert copied.low == pytest.approx(once.low) and copied.high == pytest.approx(once.high)
    independent = mean_interval([value for value in values for _ in range(8)])
    assert independent.high - independent.low < 0.5 * (once.high - once.low)  # 1 / sqrt(8) = .35


def test_a_difference_between_training_seeds_widens_the_interval():
    # No variance within a seed: t over the seed means 0, 1, 2, whose half is 4.303 · 1 / √3.
    cells = Cells.of((seed, episode, float(seed)) for seed in range(3) for episode in range(100))
    estimate = cells.estimate()
    assert estimate.mean == 1.0 and estimate.high == pytest.approx(1 + 4.302653 / 3**0.5, abs=1e-3)
    assert estimate.low == pytest.approx(2 - estimate.high) and estimate.seeds == 3


def test_the_interval_of_seeds_and_clusters_is_the_one_worked_by_hand():
    # Seed means 2 and 4, cluster means 1, 2 and 6: A = 2 / (2 · 1) = 1, B = (4 + 1 + 9) / (3 · 2) = 2.3333; the rest
    # is (1 −1 0; −1 1 0), E = 4 / 36 · 6 / 2 = .3333; Var = 3. a = 1 · 9, d = 2 · 1.5, df = 12² / (9² + 3² / 2) = 1.68
    table = [[1.0, 0.0, 5.0], [1.0, 4.0, 7.0]]
    estimate = Cells.of((s, c, value) for s, row in enumerate(table) for c, value in enumerate(row)).estimate()
    assert estimate.mean == 3.0 and estimate.high == pytest.approx(3 + student_t(144 / 85.5) * 3**0.5)


def test_a_chance_agreement_of_two_seeds_does_not_vanish_the_interval():
    values = np.random.default_rng(4).normal(size=(2, 50))
    values -= values.mean(1, keepdims=True)  # both seeds have the very same mean
    both = Cells.of((s, c, value) for s in (0, 1) for c, value in enumerate(values[s].tolist())).estimate()
    pooled = 1.96 * values.mean(0).std(ddof=1) / 50**0.5
    assert both.high == pytest.approx(pooled, rel=0.05)


def test_few_large_clusters_have_few_degrees_of_freedom():
    even = Cells.summed((0, c, float(c % 2) * 10, 10) for c in range(20)).estimate()
    uneven = Cells.summed((0, c, float(c % 2) * n, n) for c, n in enumerate([60, 60] + [4] * 18)).estimate()
    assert even.high - even.low == pytest.approx(2 * student_t(19) * 0.5 / 19**0.5)
    # weights 60², 60², 18 · 4²: df = 7488² / (2 · 3600² + 18 · 16²) − 1 = 1.16, where 20 clusters would have 19
    assert uneven.high - uneven.low > 3 * (even.high - even.low)


def test_one_cluster_of_one_seed_has_no_interval_and_says_so():
    estimate = Cells.of([(0, "a", 1.0), (0, "a", 3.0)]).estimate()
    assert estimate.interval is None and not estimate.sure
    assert str(estimate) == "2.00 (no interval: only one cluster of episodes)"


def test_a_cluster_that_has_nearly_all_the_weight_does_not_look_certain():
    # Weights as of importance sampling: without the first cluster the mean is near 1, without any other it is 3.
    returns, weights = [3.0, 1.0, 2.0, 5.0], [1.0, np.exp(-20.0), np.exp(-21.0), np.exp(-22.0)]
    near = Cells.summed((0, i, w * r, w) for i, (r, w) in enumerate(zip(returns, weights, strict=True))).estimate()
    weights = [1.0, *(np.exp(-60.0) * w for w in weights[1:])]
    far = Cells.summed((0, i, w * r, w) for i, (r, w) in enumerate(zip(returns, weights, strict=True))).estimate()
    assert far.low == pytest.approx(near.low, rel=1e-3) and far.high - far.low > 20
    weights = [1.0, 0.0, 0.0, 0.0]
    none = Cells.summed((0, i, w * r, w) for i, (r, w) in enumerate(zip(returns, weights, strict=True))).estimate()
    assert none.mean == 3.0 and none.interval is None


def test_one_seed_speaks_of_its_run_and_of_no_method():
    one = Cells.of((0, c, 1.0 + c % 2) for c in range(40)).estimate()
    two = Cells.of((s, c, 1.0 + c % 2) for s in (0, 1) for c in range(40)).estimate()
    assert one.low > 0 and not one.sure and str(one).endswith("] of this run")
    assert two.low > 0 and two.sure and str(two).endswith("]")


def test_a_share_keeps_within_its_ends_and_is_never_certain():
    sure = Cells.of((0, c, 1.0) for c in range(20) for _ in range(5)).share()
    # Wilson of 20 clusters of 20: 20 / (20 + 1.96²)
    assert sure.mean == sure.high == 1.0 and sure.low == pytest.approx(20 / (20 + 1.959964**2), abs=1e-4)
    even = Cells.of((0, c, float(c % 2)) for c in range(400)).share()
    assert even.low == pytest.approx(0.5 - 1.96 * 0.5 / 20, abs=2e-3) and even.n == 400


def test_scenarios_that_all_seeds_share_are_not_averaged_away_by_seeds():
    # Every seed has the same outcome per scenario: three seeds know no more of the scenarios than one.
    hard = np.random.default_rng(2).normal(size=60).tolist()
    one = Cells.of((0, i, value) for i, value in enumerate(hard)).estimate()
    three = Cells.of((seed, i, value) for seed in range(3) for i, value in enumerate(hard)).estimate()
    assert three.high - three.low == pytest.approx(one.high - one.low, rel=0.1)


def test_a_paired_difference_removes_what_both_share():
    luck = np.random.default_rng(3).normal(0.0, 10.0, size=80).tolist()
    better = Cells.of((seed, i, value + 1.0) for seed in (0, 1) for i, value in enumerate(luck))
    worse = Cells.of((seed, i, value) for seed in (1, 0) for i, value in reversed(list(enumerate(luck))))
    difference = (better - worse).estimate()
    assert difference.mean == pytest.approx(1.0) and difference.low == pytest.approx(1.0)
    alone = better.estimate()
    assert alone.high - alone.low > 3.0  # 2 · 1.96 · 10 / sqrt(80) = 4.4 would hide it


def test_a_difference_takes_the_seeds_that_both_have():
    first = Cells.of([(0, "a", 1.0), (1, "a", 5.0)])
    second = Cells.of([(1, "a", 2.0), (2, "a", 9.0)])
    difference = first - second
    assert difference.seeds == (1,) and difference.total.tolist() == [[3.0]]


@pytest.mark.parametrize("other", [[(0, "b", 1.0)], [(0, "a", 1.0), (0, "a", 1.0)]], ids=["cluster", "count"])
def test_a_difference_of_other_episodes_is_refused(other):
    with pytest.raises(ValueError, match="did not play the same"):
        Cells.of([(0, "a", 1.0)]) - Cells.of(other)


def test_sums_and_single_episodes_make_the_same_cells():
    single = Cells.of([(0, "a", 1.0), (0, "a", 2.0), (1, "a", 4.0)])
    summed = Cells.summed([(0, "a", 3.0, 2), (1, "a", 4.0, 1)])
    assert np.array_equal(single.total, summed.total) and np.array_equal(single.count, summed.count)
    assert summed.per_seed() == {0: 1.5, 1: 4.0}


def test_cells_that_are_missing_in_a_ragged_table_do_no_harm():
    estimate = Cells.of([(0, "a", 1.0), (1, "b", 3.0)]).estimate()
    assert estimate.mean == 2.0 and estimate.high == pytest.approx(2 + 12.7062)  # two units, however they are named


@pytest.mark.parametrize(
    ("scale", "score", "expected"),
    [
        # Wordle and the full maze of LMRL-Gym: raw means and the normalised figures published for them
        (ScoreScale(-6.0, -4.121715, -1.935), -2.0354, 97.7),
        (ScoreScale(-6.0, -4.121715, -1.935), -5.42, 15.4),
        (ScoreScale(-101.0, -83.0, -6.84), -6.97, 99.9),
        (ScoreScale(-101.0, -83.0, -6.84), -101.0, 0.0),
        (ScoreScale(-101.0, -83.0, -6.84), -83.0, 50.0),
        (ScoreScale(0.0, 1.0, 2.0), 3.0, 150.0),  # not clipped
    ],
)
def test_the_normalised_score_is_piecewise_linear(scale, score, expected):
    assert scale.normalise(score) == pytest.approx(expected, abs=0.05)


def test_a_scale_out_of_order_is_an_input_error():
    with pytest.raises(InputError, match="min < mean < max"):
        ScoreScale(0.0, 5.0, 3.0)


def test_label_means_skip_episodes_without_the_label_and_what_is_no_number():
    episodes = [
        {"agreed": True, "score_agreed": 6, "start": [1, 2], "seed": 7, "tokenizer": "abc"},
        {"agreed": False, "score_agreed": None, "start": [1, 3], "seed": 8},
    ]
    assert label_means(episodes) == {"agreed": 0.5, "score_agreed": 6.0}
