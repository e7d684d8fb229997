"""Rank correlation and AUC against values worked by hand."""

import numpy as np
import pytest

from offline_lmrl.evaluation.ranking import rank_agreement


def alone(n):
    return list(range(n))


def test_values_without_ties_are_those_worked_by_hand():
    # ranks of scores 1 2 3 4, of outcomes 2 1 4 3: Σd² = 4, ρ = 1 − 6 · 4 / (4 · 15) = .6; 4 of 6 pairs are concordant
    found = rank_agreement([0.1, 0.2, 0.3, 0.4], [5.0, 2.0, 9.0, 7.0], alone(4))
    assert found.correlation.mean == pytest.approx(0.6) and found.auc.mean == pytest.approx(4 / 6)


def test_ties_get_the_mean_of_their_ranks_and_count_half():
    # thumbs: scores 1 2 2 3, outcomes 0 0 1 1. Ranks 1 2.5 2.5 4 and 1.5 1.5 3.5 3.5: cov = 3/4, variances 4.5/4 and 1
    found = rank_agreement([1.0, 2.0, 2.0, 3.0], [0.0, 0.0, 1.0, 1.0], alone(4))
    assert found.correlation.mean == pytest.approx(3 / 4 / np.sqrt(4.5 / 4))
    assert found.auc.mean == pytest.approx(3.5 / 4)  # pairs (down, up): 1<2, 1<3, 2=2, 2<3


def test_perfect_and_reversed_orders_reach_the_ends():
    outcome = np.repeat([0.0, 1.0], 10)
    assert rank_agreement(outcome, outcome, alone(20)).auc.mean == 1.0
    reversed_ = rank_agreement(-outcome, outcome, alone(20))
    assert reversed_.auc.mean == 0.0 and reversed_.correlation.mean == pytest.approx(-1.0)
    assert reversed_.auc.low == 0.0 and 0.0 < reversed_.auc.high < 0.2  # a width although no block changes it
    assert reversed_.correlation.low == -1.0 and reversed_.correlation.high < -0.6


@pytest.mark.parametrize(
    ("scores", "outcomes"), [([], []), ([1.0], [2.0]), ([1.0, 1.0], [0.0, 1.0]), ([1.0, 2.0], [3.0, 3.0])]
)
def test_nothing_is_ordered_where_all_are_equal(scores, outcomes):
    assert rank_agreement(scores, outcomes, alone(len(scores))) is None


def test_one_group_has_no_interval():
    found = rank_agreement([1.0, 2.0, 3.0], [1.0, 3.0, 2.0], ["g"] * 3)
    assert found.correlation.interval is None and found.auc.interval is None and "nan" not in str(found)


def covered(groups_of, draws=150, n=60):
    """Share of draws whose intervals hold the true ρ and AUC of two standard normals with correlation r."""
    rng, r, hits = np.random.default_rng(0), 0.5, np.zeros(2)
    rho, auc = 6 / np.pi * np.arcsin(r / 2), 0.5 + np.arcsin(r) / np.pi  # Spearman's and Kendall's τ of a normal pair
    for _ in range(draws):
        x, noise = rng.normal(size=(2, n))
        x, noise = groups_of(x), groups_of(noise)
        found = rank_agreement(x, r * x + np.sqrt(1 - r * r) * noise, np.arange(len(x)) % n)
        hits += [found.correlation.low <= rho <= found.correlation.high, found.auc.low <= auc <= found.auc.high]
    return hits / draws


def test_intervals_hold_the_truth_as_often_as_they_promise():
    assert (covered(lambda x: x) > 0.90).all()


def test_rows_of_a_group_count_as_one_where_they_repeat_each_other():
    assert (covered(lambda x: np.tile(x, 3), draws=50) > 0.88).all()


def test_of_many_rows_a_sample_is_compared(monkeypatch):
    monkeypatch.setattr("offline_lmrl.evaluation.ranking.MOST_ROWS", 50)
    score = np.arange(200.0)
    found = rank_agreement(score, score, score)
    assert found.auc.n == 50 and found.auc.mean == 1.0
