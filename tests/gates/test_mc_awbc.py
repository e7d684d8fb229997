"""Acceptance gate of cloning weighted by returns: the policy is the one that the formula gives. `pytest -m gates`."""

import numpy as np
import pytest

from offline_lmrl.algorithms.mc_awbc import MCAWBCConfig, MCAWBCTrainer
from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.decoding.sampler import DecodingConfig
from offline_lmrl.environments.rollouts import rollout
from offline_lmrl.tasks.count import Count1
from tests.gates.small import fitted

pytestmark = pytest.mark.gates

RETURNS = np.arange(9)  # of Count1's logs, uniform


def expected(inverse_temperature, clip=20.0):
    """The mean return of μ(a) · min(exp(β_w (R − 4) / σ), c), normalised; 8 is the optimum."""
    weight = np.minimum(np.exp(inverse_temperature * (RETURNS - 4) / RETURNS.std()), clip)
    return (weight * RETURNS).sum() / weight.sum()


def played(folder, seed, inverse_temperature):
    run = fitted(
        MCAWBCConfig,
        MCAWBCTrainer,
        folder,
        Count1().logs(4000, seed),
        seed,
        600,
        inverse_temperature=inverse_temperature,
    )
    policy = LanguagePolicy(run.model, run.renderer, DecodingConfig(max_new_tokens=20))
    return np.mean([t.total_return for t in rollout(policy, Count1, range(400))])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_return_is_that_of_the_weighted_logs_and_without_weights_that_of_the_logs(tmp_path, seed):
    assert expected(2.0) == pytest.approx(7.11, abs=0.01)
    assert played(tmp_path / "weighted", seed, 2.0) == pytest.approx(expected(2.0), abs=0.4)  # standard error .06
    assert played(tmp_path / "uniform", seed, 0.0) == pytest.approx(4.0, abs=0.5)  # the ablation; standard error .13
