"""Acceptance gates of planning: looking ahead finds what pays later, a step at a time does not. `pytest -m gates`."""

import pytest

from offline_lmrl.algorithms.return_conditioned import ReturnConditionedConfig, ReturnConditionedTrainer
from offline_lmrl.decoding.planner import Planner
from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.decoding.sampler import SamplingConfig
from offline_lmrl.environments.rollouts import rollout
from offline_lmrl.environments.toys import TalkTrap
from tests.gates.small import fitted

pytestmark = pytest.mark.gates


def mean_return(policy, episodes):
    return sum(t.total_return for t in rollout(policy, TalkTrap, range(episodes))) / episodes


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_two_turns_of_looking_ahead_leave_the_bait(tmp_path, seed):
    logs = TalkTrap().logs(12_000, seed)  # one in 320 shows what pays after a greeting
    run = fitted(ReturnConditionedConfig, ReturnConditionedTrainer, tmp_path, logs, seed, 3000, condition_dropout=1.0,
                 return_weight=1.0, environment_weight=1.0)  # fmt: skip
    policy = LanguagePolicy(run.model, run.renderer, SamplingConfig(max_new_tokens=4, ask=None), max_length=96)
    assert mean_return(policy, 400) <= 0.5
    assert mean_return(Planner(policy, width=16, expand=64, depth=1), 64) < 0.5
    assert mean_return(Planner(policy, width=16, expand=64, depth=2), 64) >= 0.95 * TalkTrap().optimum()
