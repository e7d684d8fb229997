"""Acceptance gate of off-policy estimates: what a policy is worth, read off another one's episodes.

`pytest -m gates -s` prints every figure. The ablation, the mean return of those episodes, fails the same check.
"""

import numpy as np
import pytest
import torch

from offline_lmrl.algorithms.behaviour_cloning import BCConfig, BCTrainer
from offline_lmrl.decoding.distribution import next_token
from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.environments.rollouts import rollout
from offline_lmrl.environments.scripted import scripted_episode
from offline_lmrl.evaluation.off_policy import fitted_q_evaluation, importance_sampling
from offline_lmrl.tasks.corridor import STARTS, Corridor
from offline_lmrl.tokens.windows import policy_window
from tests.gates.small import fitted

pytestmark = pytest.mark.gates

EPISODES = 2000
SKILL = 0.8  # chance of the right choice in what the policy is cloned from
TOLERANCE = 0.05


def right_choice(corridor):
    return "1" if corridor.at_junction else corridor.codes[corridor.start][len(corridor.path)]


def skilled_logs(code_seed):
    """Each choice is right with a chance of SKILL: .41 of the episodes win."""
    rng = np.random.default_rng(code_seed)
    corridor = Corridor(code_seed)

    def choose():
        right = right_choice(corridor)
        return right if rng.random() < SKILL else str(1 - int(right))

    return [scripted_episode(corridor, corridor.reset(episode), choose) for episode in range(300 * STARTS)]


@torch.no_grad()
def chance(policy, turns, text):
    """π of a reply, its closing token included, in the distribution that play draws from."""
    renderer, total = policy.renderer, 0.0
    ids = list(policy_window(turns, renderer, policy.window))
    for token in (*renderer.encode_content(text), renderer.close_id):
        logits, _ = policy.model.eval().forward_with_hidden(input_ids=torch.tensor([ids]))
        drawn = next_token(logits.logits[0, -1:], policy.decoding)
        total += drawn.over_vocabulary(logits.logits.shape[-1])[0, token].item()
        ids.append(token)
    return np.exp(total)


def exact_value(policy, code_seed):
    """Backwards from the end: V(s) = π(right|s) · V(behind it), as whatever else is said there earns nothing."""
    values = []
    for start in range(STARTS):
        corridor, value = Corridor(code_seed), 1.0
        turns = corridor.reset(start)
        while turns:
            text = right_choice(corridor)
            value *= chance(policy, turns, text)
            turns = corridor.step(text).turns
        values.append(value)
    return np.mean(values)


def is_right(estimate, value):
    return abs(estimate - value) < TOLERANCE


def estimates(folder, seed):
    """The value of a clone, what play and both estimates say of it, and the mean return of the logs they read."""
    fitted(
        BCConfig,
        BCTrainer,
        folder,
        skilled_logs(seed),
        seed,
        400,
        context=1,
        max_length=32,
        per_device_train_batch_size=128,
    )
    policy = LanguagePolicy.load(folder, device="cpu", support=0.02, max_new_tokens=4)
    hot = policy.with_decoding(temperature=2.0)
    logs = rollout(hot, lambda: Corridor(seed), range(EPISODES))
    value = exact_value(policy, seed)
    played, logged = (
        np.mean([t.total_return for t in trajectories])
        for trajectories in (rollout(policy, lambda: Corridor(seed), range(EPISODES, 2 * EPISODES)), logs)
    )
    weighted, fit = importance_sampling(policy, logs), fitted_q_evaluation(policy, logs)
    print(
        f"\nseed {seed}: value {value:.3f} (played {played:.3f}), weighted importance sampling {weighted}, fitted Q "
        f"evaluation {fit}, mean return of the logs {logged:.3f}"
    )
    return value, played, weighted.score.mean, fit.value, logged


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_both_estimates_read_the_value_of_the_policy_off_hotter_play(tmp_path, seed):
    value, played, weighted, fit, logged = estimates(tmp_path, seed)
    assert abs(played - value) < 4 * np.sqrt(value * (1 - value) / EPISODES)
    assert is_right(weighted, value) and is_right(fit, value)
    assert not is_right(logged, value)
