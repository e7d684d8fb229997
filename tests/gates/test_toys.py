"""Acceptance gates on tasks with a known optimum: the method passes, its ablation fails. `pytest -m gates`."""

import pytest

from offline_lmrl.algorithms.behaviour_cloning import BCConfig, BCTrainer
from offline_lmrl.algorithms.ilql import ILQLConfig, ILQLTrainer
from offline_lmrl.data.tokenizers import train_tokenizer
from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.decoding.sampler import SamplingConfig
from offline_lmrl.environments.rollouts import rollout
from offline_lmrl.environments.toys import Corridor, Gamble
from offline_lmrl.models.guided import build_model

pytestmark = pytest.mark.gates

SPEC = {
    "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 168, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 32, "tie_word_embeddings": True, "initializer_range": 0.1,
}  # fmt: skip
ILQL = {"target_rate": 0.05, "discount_per_turn": 1.0, "conservative_weight": 0.01, "value_weight": 10.0}


def play(folder, logs, make_environment, config, trainer, steps, seed, episodes, **sampling):
    """Mean return after training on the logs with one seed."""
    tokenizer = train_tokenizer((turn.content for t in logs for turn in t.turns), 320)
    args = config(
        output_dir=str(folder), max_steps=steps, seed=seed, per_device_train_batch_size=128, context=1, max_length=32,
        save_strategy="no", use_cpu=True, disable_tqdm=True, adam_beta2=0.98,
        **({"learning_rate": 2e-3} | (ILQL | sampling.pop("settings") if config is ILQLConfig else {})),
    )  # fmt: skip
    import transformers

    transformers.set_seed(seed)
    run = trainer(build_model(SPEC, tokenizer), args, logs, None, tokenizer)
    run.train()
    policy = LanguagePolicy(run.model, run.renderer, SamplingConfig(max_new_tokens=6, **sampling), context=1)
    played = rollout(policy, make_environment, range(episodes))
    return sum(t.total_return for t in played) / len(played)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_corridor_needs_stitching(tmp_path, seed):
    corridor = Corridor(code_seed=seed)
    logs = corridor.logs(20_000, seed)

    def make():
        return Corridor(code_seed=seed)

    def ilql(name, **settings):
        return play(tmp_path / name, logs, make, ILQLConfig, ILQLTrainer, 1500, seed, 16,
                    settings=settings, temperature=0.0, beta=30.0, support=0.02)  # fmt: skip

    assert ilql("ilql", expectile=0.8) >= 0.9
    assert ilql("monte_carlo", expectile=0.8, monte_carlo=1.0) < 0.5  # returns from a start are all 0
    sampled = play(tmp_path / "bc", logs, make, BCConfig, BCTrainer, 600, seed, 320, temperature=1.0)
    assert sampled < 0.3


@pytest.mark.parametrize("expectile", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gamble_is_not_taken_for_skill(tmp_path, seed, expectile):
    logs = Gamble().logs(4000, seed)
    share = play(tmp_path, logs, Gamble, ILQLConfig, ILQLTrainer, 300, seed, 400,
                 settings={"expectile": expectile}, temperature=1.0, beta=30.0, support=0.02)  # fmt: skip
    assert share >= 0.95 * 5.0
