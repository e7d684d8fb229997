"""Acceptance gates on tasks with a known optimum: the method passes, its ablation fails. `pytest -m gates`."""

import pytest

from offline_lmrl.algorithms.behaviour_cloning import BCConfig, BCTrainer
from offline_lmrl.algorithms.ilql import ILQLConfig, ILQLTrainer
from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.decoding.sampler import DecodingConfig
from offline_lmrl.environments.rollouts import rollout
from offline_lmrl.ops.value_learning import expectile_loss
from offline_lmrl.tasks.corridor import Corridor
from offline_lmrl.tasks.gamble import Gamble
from tests.gates.small import fitted

pytestmark = pytest.mark.gates

ILQL = {"target_rate": 0.05, "discount_per_turn": 1.0, "conservative_weight": 0.01, "value_weight": 10.0}


def play(folder, logs, make_environment, config, trainer, steps, seed, episodes, **decoding):
    """The episodes played after training on the logs with one seed."""
    settings = ILQL | decoding.pop("settings") if config is ILQLConfig else {}
    run = fitted(
        config,
        trainer,
        folder,
        logs,
        seed,
        steps,
        context=1,
        max_length=32,
        per_device_train_batch_size=128,
        **settings,
    )
    policy = LanguagePolicy(run.model, run.renderer, DecodingConfig(max_new_tokens=6, **decoding), context=1)
    return rollout(policy, make_environment, range(episodes))


def mean_return(played):
    return sum(t.total_return for t in played) / len(played)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_corridor_needs_stitching(tmp_path, seed):
    corridor = Corridor(code_seed=seed)
    logs = corridor.logs(20_000, seed)

    def make():
        return Corridor(code_seed=seed)

    def ilql(name, **settings):
        return mean_return(
            play(
                tmp_path / name,
                logs,
                make,
                ILQLConfig,
                ILQLTrainer,
                1500,
                seed,
                16,
                settings=settings,
                temperature=0.0,
                beta=30.0,
                support=0.02,
            )
        )

    assert ilql("ilql", expectile=0.8) >= 0.9
    assert ilql("quarter", expectile=0.8, conservative_share=0.25) >= 0.9  # the term at a quarter of the tokens
    assert ilql("monte_carlo", expectile=0.8, monte_carlo=1.0) < 0.5  # returns from a start are all 0
    sampled = play(tmp_path / "bc", logs, make, BCConfig, BCTrainer, 600, seed, 320, temperature=1.0)
    assert mean_return(sampled) < 0.3


class LuckyTrainer(ILQLTrainer):
    """The ablation: an expectile of Monte-Carlo returns as Q, which mixes luck with choice."""

    def losses(self, outputs, batch):
        total, logged = super().losses(outputs, batch)
        lucky = sum(expectile_loss(q, batch["steps"]["return_to_go"], self.args.expectile) for q in outputs["q"])
        return total + self.args.value_weight * (lucky - logged["loss/q"]), logged


def share_of_safe(folder, seed, expectile, trainer, steps=300):
    settings = {"expectile": expectile}
    played = play(
        folder,
        Gamble().logs(4000, seed),
        Gamble,
        ILQLConfig,
        trainer,
        steps,
        seed,
        400,
        settings=settings,
        temperature=1.0,
        beta=30.0,
        support=0.02,
    )
    return sum(t.labels["choice"] == "safe" for t in played) / len(played)


@pytest.mark.parametrize("expectile", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gamble_is_not_taken_for_skill(tmp_path, seed, expectile):
    assert share_of_safe(tmp_path, seed, expectile, ILQLTrainer) >= 0.95


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_an_expectile_of_returns_takes_the_gamble(tmp_path, seed):
    # Q(gamble) solves .95 · .1 (10 − q) = .05 · .9 q: 6.8, above the safe 5
    # The rare prize pulls Q up slowly, hence the longer run.
    assert share_of_safe(tmp_path, seed, 0.95, LuckyTrainer, steps=900) <= 0.05
