"""Acceptance gates of return conditioning: what is asked for is earned, and the ask is updated. `pytest -m gates`."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from offline_lmrl.algorithms.behaviour_cloning import BCConfig, BCTrainer
from offline_lmrl.algorithms.return_conditioned import ReturnConditionedConfig, ReturnConditionedTrainer
from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.decoding.sampler import DecodingConfig
from offline_lmrl.environments.rollouts import rollout
from offline_lmrl.environments.scripted import Forced
from offline_lmrl.models.guided import return_tokens_of
from offline_lmrl.tasks.count import Count, Count1, Talk
from offline_lmrl.tokens.batching import encode_trajectories
from offline_lmrl.tokens.conditioning import LABEL, returns_to_go
from tests.gates.small import fitted

pytestmark = pytest.mark.gates

EPISODES = 64  # per ask


def trained(folder, logs, seed, steps):
    """Plays what is asked: ask -> policy."""
    run = fitted(ReturnConditionedConfig, ReturnConditionedTrainer, folder, logs, seed, steps)
    return lambda ask: LanguagePolicy(run.model, run.renderer, DecodingConfig(max_new_tokens=20, ask=ask))


class Held:
    """The ablation: the policy never hears of a reward, so its ask stays what it was."""

    def __init__(self, policy):
        self.policy = policy

    def start(self, seeds):
        self.session = self.policy.start(seeds)
        return self

    def reply(self, rows, histories, options=None):
        unpaid = [[replace(turn, reward=None) for turn in history] for history in histories]
        return self.session.reply(rows, unpaid, options)


def achieved(policy, toy):
    return np.array([t.total_return for t in rollout(policy, toy, range(EPISODES))])


def obedience(play, toy, asks):
    """Correlation, mean distance and rank correlation (Spearman's, of ask and mean) of what is asked and achieved."""
    earned = np.array([achieved(play(float(ask)), toy) for ask in asks])
    asked = np.array(asks, dtype=float)
    order = np.corrcoef(asked.argsort(), earned.mean(1).argsort().argsort())[0, 1]
    distance = np.abs(asked[:, None] - earned).mean()
    return np.corrcoef(np.repeat(asked, EPISODES), earned.ravel())[0, 1], distance, order


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_count_earns_what_is_asked_of_it(tmp_path, seed):
    play = trained(tmp_path, Count().logs(4000, seed), seed, steps=600)
    correlation, distance, order = obedience(play, Count, range(9))
    assert correlation > 0.9 and distance < 0.75 and order > 0.9
    assert achieved(play("max"), Count).mean() >= 7.5
    earned, wasted = ["g"] * 3, ["a"] * 3
    assert achieved(Forced(play(5.0), earned), Count).mean() == pytest.approx(5, abs=1)
    assert achieved(Forced(Held(play(5.0)), earned), Count).mean() >= 7
    assert achieved(Forced(play(5.0), wasted), Count).mean() == pytest.approx(5, abs=1)
    assert obedience(lambda ask: Held(play(ask)), Count, range(2, 7))[1] > 1.5


def held_out_loss(run, logs, return_tokens=None):
    encoded = encode_trajectories(logs, replace(run.encoder, return_ids_for=return_tokens), Counter())
    return run.evaluate(replace(run.train_dataset, encoded=encoded))["eval_loss"]


def test_the_null_row_is_the_cloned_policy(tmp_path):
    logs, held_out = Count().logs(4000, 0), Count().logs(1000, 1)
    cloned = fitted(BCConfig, BCTrainer, tmp_path / "bc", logs, 0, 600)
    told = fitted(ReturnConditionedConfig, ReturnConditionedTrainer, tmp_path / "rc", logs, 0, 600)
    null = held_out_loss(told, held_out, return_tokens_of(told.model, told.renderer).nulls)
    assert null == pytest.approx(held_out_loss(cloned, held_out), abs=0.02)


def test_shuffled_returns_are_not_obeyed(tmp_path):
    logs = Count().logs(4000, 0)
    order = np.random.default_rng(0).permutation(len(logs))
    shuffled = [replace(t, labels={LABEL: returns_to_go(logs[i])}) for t, i in zip(logs, order, strict=True)]
    correlation, *_ = obedience(trained(tmp_path, shuffled, 0, steps=600), Count, range(9))
    assert abs(correlation) < 0.2


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_one_long_turn_earns_what_is_asked_of_it(tmp_path, seed):
    play = trained(tmp_path, Count1().logs(4000, seed), seed, steps=600)
    correlation, distance, order = obedience(play, Count1, range(9))
    assert correlation > 0.9 and distance < 0.75 and order > 0.9
    assert achieved(play("max"), Count1).mean() >= 7.5


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_second_turn_of_a_talk_earns_what_the_first_left_over(tmp_path, seed):
    play = trained(tmp_path, Talk().logs(4000, seed), seed, steps=900)
    first = "g a b c d e f h"  # earns 1
    second = achieved(Forced(play(6.0), [first]), Talk) - 1
    assert second.mean() == pytest.approx(5, abs=1)
