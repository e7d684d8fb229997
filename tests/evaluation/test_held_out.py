"""The held-out regression against a plain solve of its equations, and its interval against repeated draws."""

import numpy as np
import pytest

from offline_lmrl.evaluation.held_out import HeldOutQ


def drawn(rng, n=80, width=6, per_group=2, noise=1.0):
    x = rng.normal(size=(n, width))
    groups = [f"g{i // per_group}" for i in range(n)]
    shared = np.repeat(rng.normal(size=n // per_group), per_group)
    return x, x[:, 0] + noise * (0.7 * shared + 0.7 * rng.normal(size=n)), groups


def test_a_reply_is_rated_by_the_ridge_solution_without_its_fold():
    x, y, groups = drawn(np.random.default_rng(0))
    q = HeldOutQ.fit(x, y, groups)
    z = (x - x.mean(0)) / x.std(0)
    fold = np.array([q.fold_of[group] for group in groups])
    assert sorted(set(fold)) == [0, 1, 2, 3, 4]
    # λ from the squared errors of each candidate, by the primal normal equations
    solved = {}
    for penalty in 10.0 ** np.arange(-2, 5) * np.square(z).sum(1).mean():
        predicted, thetas = np.zeros(len(y)), []
        for number in range(5):
            own = fold != number
            centred = z[own] - z[own].mean(0)
            theta = np.linalg.solve(centred.T @ centred + penalty * np.eye(6), centred.T @ (y[own] - y[own].mean()))
            predicted[~own] = y[own].mean() + (z[~own] - z[own].mean(0)) @ theta
            thetas.append(theta)
        solved[np.square(y - predicted).sum()] = predicted, thetas
    predicted, thetas = solved[min(solved)]
    np.testing.assert_allclose(q.predicted, predicted, rtol=1e-8)
    change = np.random.default_rng(1).normal(size=x.shape) * 0.1
    gains = [step @ thetas[number] for step, number in zip(change / x.std(0), fold, strict=True)]
    found = q.difference(x.clip(-1, 1) + change, x.clip(-1, 1), groups)
    assert found.mean == pytest.approx(np.mean(gains))


def test_the_interval_holds_the_expected_estimate():
    """Over draws of the logs and of the prompts; the truth is what the shrunk fit has in the mean."""
    estimates = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        x, y, groups = drawn(rng)
        plain, chosen = rng.normal(size=(2, 40, 6))
        chosen[:, 0] += 0.5
        estimates.append(HeldOutQ.fit(x, y, groups).difference(chosen, plain, [f"g{i}" for i in range(40)]))
    expected = np.mean([one.mean for one in estimates])
    assert 0.35 < expected < 0.5  # .5 is the truth; ridge shrinks it
    assert np.mean([one.low <= expected <= one.high for one in estimates]) >= 0.93


def test_features_that_predict_nothing_promise_nothing():
    rng = np.random.default_rng(0)
    x, y, groups = rng.normal(size=(60, 50)), rng.choice([-1.0, 1.0], 60), [str(i) for i in range(60)]
    q = HeldOutQ.fit(x, y, groups)
    found = q.difference(x + 3.0, x, groups)
    assert found.low < 0 < found.high and abs(found.mean) < 0.3


def test_extreme_and_constant_features_are_not_extrapolated():
    x, y, groups = drawn(np.random.default_rng(0))
    x[:, 5] = 2.0
    q = HeldOutQ.fit(x, y, groups)
    far, near = x.copy(), x.copy()
    far[:, 0], near[:, 0] = 1e6, x[:, 0].mean() + 4 * x[:, 0].std()
    far[:, 5] = 1e6
    assert q.difference(far, near, groups).mean == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(("returns", "groups"), [([1.0, 1.0], ["a", "b"]), ([0.0, 1.0], ["a", "a"])])
def test_equal_returns_and_single_groups_give_no_fit(returns, groups):
    assert HeldOutQ.fit(np.eye(2), np.array(returns), groups) is None


def test_a_prompt_whose_group_no_fit_used_is_rated_too():
    x, y, groups = drawn(np.random.default_rng(0))
    q = HeldOutQ.fit(x, y, groups)
    ones, new = x[:10] * 0 + 0.1, [f"new{i}" for i in range(10)]
    # every fit rates as many of them: the mean is that over known groups of every fold
    known = [next(group for group in groups if q.fold_of[group] == i % 5) for i in range(10)]
    expected = q.difference(ones, ones * 0, known).mean
    assert q.difference(ones, ones * 0, new).mean == pytest.approx(expected)
