"""Acceptance gates of policy extraction: a plain policy keeps what its critic knows. `pytest -m gates`.

The ablation, weights of 1, is behaviour cloning to the bit (tests/algorithms/test_awr.py) and fails in test_toys.py.
"""

import pytest

from offline_lmrl.algorithms.awr import AWRConfig, AWRTrainer
from offline_lmrl.algorithms.ilql import ILQLConfig, ILQLTrainer
from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.environments.rollouts import rollout
from offline_lmrl.tasks.corridor import Corridor
from offline_lmrl.tasks.gamble import Gamble
from tests.gates.small import fitted

pytestmark = pytest.mark.gates

ILQL = {"target_rate": 0.05, "discount_per_turn": 1.0, "conservative_weight": 0.01, "value_weight": 10.0}
WINDOW = {"context": 1, "max_length": 32, "per_device_train_batch_size": 128}


def extracted(folder, logs, seed, critic_steps, steps, inverse_temperature, expectile=0.8):
    """A plain policy behind an ILQL critic of the same logs."""
    fitted(ILQLConfig, ILQLTrainer, folder / "ilql", logs, seed, critic_steps, expectile=expectile, **WINDOW, **ILQL)
    fitted(
        AWRConfig,
        AWRTrainer,
        folder / "awr",
        logs,
        seed,
        steps,
        value_model=str(folder / "ilql"),
        inverse_temperature=inverse_temperature,
        **WINDOW,
    )
    return folder / "awr"


def play(run, make_environment, episodes, temperature):
    policy = LanguagePolicy.load(run, device="cpu", temperature=temperature, max_new_tokens=6)
    assert policy.model.value_heads is None
    return rollout(policy, make_environment, range(episodes))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_corridor_is_stitched_without_heads_at_decoding(tmp_path, seed):
    corridor = Corridor(code_seed=seed)
    run = extracted(tmp_path, corridor.logs(20_000, seed), seed, 1500, 400, inverse_temperature=10.0)
    played = play(run, lambda: Corridor(code_seed=seed), 16, temperature=0.0)
    assert sum(t.total_return for t in played) / 16 >= 0.9


@pytest.mark.parametrize("expectile", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gamble_is_not_taken_for_skill(tmp_path, seed, expectile):
    # Q differs by (5 − 1)/10, so the share of safe is σ(.4 β_w): .998 at β_w = 15
    run = extracted(tmp_path, Gamble().logs(4000, seed), seed, 300, 300, inverse_temperature=15.0, expectile=expectile)
    played = play(run, Gamble, 400, temperature=1.0)
    assert sum(t.labels["choice"] == "safe" for t in played) / len(played) >= 0.95
