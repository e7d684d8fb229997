"""Cloning weighted by Monte-Carlo returns: weights by hand, cut logs, and weights of 1 as behaviour cloning."""

import math

import numpy as np
import pytest
import torch

from offline_lmrl.algorithms.mc_awbc import MCAWBCConfig
from offline_lmrl.errors import InputError
from offline_lmrl.logs.trajectory import Trajectory, Turn
from tests.training.test_trainer import logs, parameters, trainer

ASKED = Turn("user", "up")


def episode(*rewards, terminated=True):
    turns = [turn for reward in rewards for turn in (ASKED, Turn("assistant", "up", reward=reward))]
    return Trajectory(tuple(turns if terminated else [*turns, ASKED]), terminated=terminated)


def weights(folder, data, **settings):
    """The weights by turn of each trajectory, of which each is one window."""
    run = trainer(folder, algorithm="mc_awbc", data=data, context=None, **settings)
    batch = run.train_dataset.batch(range(len(data)))
    _, logged = run.losses(run.outputs(run.model, batch), batch)
    found = {}
    for row, turn, weight in zip(batch["steps"]["row"], batch["steps"]["turn"], logged["weight"], strict=True):
        found.setdefault(int(row), {})[int(turn)] = float(weight)
    return [list(turns.values()) for turns in found.values()]


def test_weights_are_exponentials_of_standardised_returns(tmp_path):
    found = weights(tmp_path, [episode(4.0), episode(1.0), episode(1.0)], inverse_temperature=0.5)
    # mean 2, standard deviation √2
    assert found == [pytest.approx([math.exp(x / math.sqrt(2))], rel=1e-4) for x in (1.0, -0.5, -0.5)]
    (first, *_) = weights(tmp_path, [episode(9.0), episode(0.0)], inverse_temperature=9.0)
    assert first == [20.0]  # e⁹, clipped


def test_a_turn_is_weighed_by_what_follows_it(tmp_path):
    (found,) = weights(tmp_path, [episode(3.0, 1.0)], reward_scale=1.0)
    assert found == pytest.approx([math.e, 1 / math.e], rel=1e-4)  # returns 4 and 1, or 1 and −1 of shifted rewards
    data, returns = [episode(3.0, 1.0, 2.0)], np.array([4.0, 2.0, 2.0])  # with γ = .5: 3 + ½ (1 + ½ 2), 1 + ½ 2, 2
    (found,) = weights(tmp_path, data, reward_scale=1.0, discount_per_turn=0.5)
    assert found == pytest.approx(np.exp((returns - returns.mean()) / returns.std()), rel=1e-4)


def test_the_mean_of_finished_logs_takes_the_place_of_what_follows_a_cut(tmp_path):
    data = [episode(2.0), episode(0.0), episode(-2.0, terminated=False)]
    advantage = np.array([1.0, -1.0, -2.0])  # the mean of the finished is 1, so the last is worth −2 + 1
    found = weights(tmp_path, data, reward_scale=1.0)
    assert np.ravel(found) == pytest.approx(np.exp(advantage / advantage.std()), rel=1e-4)
    finished, other = weights(tmp_path, [episode(2.0, terminated=False), episode(0.0, terminated=False)])
    assert finished == pytest.approx([math.e], rel=1e-4) and other == pytest.approx([1 / math.e], rel=1e-4)


def test_weights_of_one_are_behaviour_cloning_to_the_bit(tmp_path):
    runs = [
        trainer(tmp_path / "bc", algorithm="bc"),
        trainer(tmp_path / "mc", algorithm="mc_awbc", inverse_temperature=0.0),
    ]
    for run in runs:
        run.train()
    assert torch.equal(*map(parameters, runs))
    weighted = trainer(tmp_path / "weighted", algorithm="mc_awbc", data=logs())
    weighted.train()
    assert not torch.equal(parameters(weighted), parameters(runs[0]))


def test_equal_returns_and_settings_out_of_range_are_refused(tmp_path):
    with pytest.raises(InputError, match="^data: found the same return at every step"):
        trainer(tmp_path, algorithm="mc_awbc", data=[episode(1.0), episode(1.0)])
    with pytest.raises(InputError, match="^discount_per_turn: found 2"):
        MCAWBCConfig(output_dir=str(tmp_path), discount_per_turn=2)
