"""Acceptance gates of policy extraction: a plain policy keeps what its critic knows. `pytest -m gates`.

The ablation, weights of 1, is behaviour cloning to the bit (tests/algorithms/test_iql.py) and fails in test_toys.py.
"""

import pytest
import transformers

from offline_lmrl.algorithms.ilql import ILQLConfig, ILQLTrainer
from offline_lmrl.algorithms.iql import IQLConfig, IQLTrainer
from offline_lmrl.data.tokenizers import train_tokenizer
from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.environments.rollouts import rollout
from offline_lmrl.environments.toys import Corridor, Gamble
from offline_lmrl.models.guided import build_model

pytestmark = pytest.mark.gates

SPEC = {
    "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 168,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 32,
    "tie_word_embeddings": True, "initializer_range": 0.1,
}  # fmt: skip
ILQL = {"target_rate": 0.05, "discount_per_turn": 1.0, "conservative_weight": 0.01, "value_weight": 10.0}


def trained(folder, logs, config, trainer, steps, seed, **settings):
    """The folder of a run from scratch on these logs."""
    tokenizer = train_tokenizer((turn.content for t in logs for turn in t.turns), 320)
    args = config(
        output_dir=str(folder), max_steps=steps, seed=seed, per_device_train_batch_size=128, context=1, max_length=32,
        per_device_eval_batch_size=512, learning_rate=2e-3, adam_beta2=0.98, save_strategy="no", use_cpu=True,
        disable_tqdm=True, report_to="none", **settings,
    )  # fmt: skip
    transformers.set_seed(seed)
    run = trainer(build_model(SPEC, tokenizer), args, logs, None, tokenizer)
    run.train()
    run.save_model()
    return folder


def extracted(folder, logs, seed, critic_steps, steps, inverse_temperature, expectile=0.8):
    """A plain policy behind an ILQL critic of the same logs."""
    critic = trained(folder / "ilql", logs, ILQLConfig, ILQLTrainer, critic_steps, seed, expectile=expectile, **ILQL)
    settings = {"critic": str(critic), "inverse_temperature": inverse_temperature}
    return trained(folder / "iql", logs, IQLConfig, IQLTrainer, steps, seed, **settings)


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
