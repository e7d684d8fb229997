"""Acceptance gates of return conditioning where returns mislead: what stitches, and what takes luck for skill.
`pytest -m gates`."""

import pytest

from offline_lmrl.algorithms.ilql import ILQLConfig, ILQLTrainer
from offline_lmrl.algorithms.return_conditioned import ReturnConditionedConfig, ReturnConditionedTrainer
from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.decoding.sampler import DecodingConfig
from offline_lmrl.environments.rollouts import rollout
from offline_lmrl.tasks.corridor import Corridor
from offline_lmrl.tasks.gamble import Gamble
from tests.gates.small import fitted

pytestmark = pytest.mark.gates

WINDOW = {"context": 1, "max_length": 32, "per_device_train_batch_size": 128}
VALUES = {
    "expectile": 0.8,
    "target_rate": 0.05,
    "discount_per_turn": 1.0,
    "conservative_weight": 0.01,
    "value_weight": 10.0,
}


def played(run, make_environment, episodes, **decoding):
    policy = LanguagePolicy(run.model, run.renderer, DecodingConfig(max_new_tokens=6, **decoding), context=1)
    return rollout(policy, make_environment, range(episodes))


def share(trajectories, reached):
    return sum(map(reached, trajectories)) / len(trajectories)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_labels_of_a_critic_stitch_where_logged_returns_do_not(tmp_path, seed):
    def make():
        return Corridor(code_seed=seed)

    def conditioned(name, **settings):
        return fitted(
            ReturnConditionedConfig, ReturnConditionedTrainer, tmp_path / name, logs, seed, 600, **WINDOW, **settings
        )

    logs = make().logs(20_000, seed)
    ask_one = played(conditioned("dt"), make, 320, ask=1.0)
    assert share(ask_one, lambda t: t.total_return == 1) < 0.3
    fitted(ILQLConfig, ILQLTrainer, tmp_path / "ilql", logs, seed, 1500, **WINDOW, **VALUES)
    qdt = conditioned("qdt", value_model=str(tmp_path / "ilql"))
    asked_for_v = played(qdt, make, 320, ask=f"auto:{tmp_path / 'ilql'}")
    assert share(asked_for_v, lambda t: t.total_return == 1) > 0.8


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_high_ask_takes_the_gamble_and_labels_of_q_do_not(tmp_path, seed):
    logs = Gamble().logs(4000, seed)

    def gambles(name, ask, **settings):
        run = fitted(
            ReturnConditionedConfig, ReturnConditionedTrainer, tmp_path / name, logs, seed, 300, **WINDOW, **settings
        )
        return share(played(run, Gamble, 400, ask=ask), lambda t: t.labels["choice"] == "gamble")

    assert gambles("dt", 10.0) > 0.9  # what was lucky once is what earns 10, as the logs tell it
    fitted(ILQLConfig, ILQLTrainer, tmp_path / "ilql", logs, seed, 300, **WINDOW, **VALUES)
    assert gambles("qdt", "max", value_model=str(tmp_path / "ilql"), relabel="q") < 0.05
