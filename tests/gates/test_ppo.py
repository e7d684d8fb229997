"""Acceptance gates of PPO: the closed form of its objective, and a task whose optimum is known.

`pytest -m gates -s` prints what each seed reached.
"""

import math

import numpy as np
import pytest
import torch
import transformers

import offline_lmrl.algorithms.ppo as ppo
from offline_lmrl.algorithms.behaviour_cloning import BCConfig, BCTrainer
from offline_lmrl.algorithms.ppo import PPOConfig, PPOTrainer
from offline_lmrl.decoding.config import DecodingConfig
from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.environments.rollouts import rollout
from offline_lmrl.logs.protocols import StepResult
from offline_lmrl.logs.trajectory import Trajectory, Turn
from offline_lmrl.models.loading import build_model
from offline_lmrl.tasks.count import Count
from offline_lmrl.tokens.tokenizers import train_tokenizer

pytestmark = pytest.mark.gates

SPEC = {
    "model_type": "gpt2",
    "n_layer": 1,
    "n_embd": 32,
    "n_head": 2,
    "n_positions": 32,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
COMMON = {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "report_to": "none"}
ASK = Turn("user", "next")
BANDIT = tuple("abcdefgh")
PAIRS = tuple(f"{x} {y}" for x in "abcd" for y in "abcd")
TOKENIZER = train_tokenizer([*BANDIT, *PAIRS, "next"] * 4, 280)


class Choice:
    """One of a few texts, each with its reward."""

    def __init__(self, texts):
        self.texts = texts
        # Spread over all texts, so that pairs are no sums of their letters.
        self.reward = dict(zip(texts, np.cos(2.4 * np.arange(len(texts))), strict=True))

    def reset(self, seed):
        return (ASK,)

    def step(self, text):
        return StepResult((), float(self.reward[text]), True, False)

    def options(self):
        return list(self.texts)


def probabilities(run, texts):
    """π and π_ref of every text among the texts."""
    ids = [(*run.renderer.encode_content(text), run.renderer.close_id) for text in texts]
    labels = {"tokenizer": run.renderer.fingerprint, "options": {"1": list(texts)}}
    told = [
        Turn("assistant", text, reward=0.0, token_ids=i, behaviour_log_prob=(0.0,) * len(i))
        for text, i in zip(texts, ids, strict=True)
    ]
    experience = run.observe([Trajectory((ASK, turn), labels=labels) for turn in told])
    episode = torch.from_numpy(experience.episode)
    return [
        torch.zeros(len(texts)).index_add(0, episode, experience.column(name)).exp()
        for name in ("behaviour_log_prob", "ref_log_prob")
    ]


def distance_to_closed_form(folder, texts, seed, kl_weight=0.5):
    """Total variation between the trained policy and ref · exp(R/β) / Z."""
    transformers.set_seed(seed)
    # At twice this learning rate one seed of eight collapsed in its first ten iterations and did not quite come back.
    args = PPOConfig(
        output_dir=str(folder),
        seed=seed,
        max_steps=48,
        episodes=256,
        epochs=2,
        minibatches=2,
        learning_rate=5e-3,
        per_device_train_batch_size=256,
        max_length=32,
        kl_weight=kl_weight,
        whiten_advantages=False,
        value_weight=0.5,
        value_clip_range=None,
        decoding=DecodingConfig(max_new_tokens=8),
        save_rollouts=False,
        **COMMON,
    )
    environment = Choice(texts)
    run = PPOTrainer(build_model(SPEC, TOKENIZER), args, lambda: Choice(texts), None, TOKENIZER)
    run.train()
    policy, ref = probabilities(run, texts)
    assert policy.sum().item() == pytest.approx(1, abs=1e-4)
    best = ref * (torch.tensor([environment.reward[text] for text in texts]) / kl_weight).exp()
    distance = (policy - best / best.sum()).abs().sum().item() / 2
    print(f"\nseed {seed}, {len(texts)} texts: total variation {distance:.4f} to the closed form")
    return distance


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("texts", [BANDIT, PAIRS], ids=["one token of 8", "two tokens of 4"])
def test_the_policy_reaches_the_closed_form_of_its_objective(tmp_path, texts, seed):
    assert distance_to_closed_form(tmp_path, texts, seed) < 0.05


def test_with_the_sign_of_the_divergence_flipped_it_does_not(tmp_path, monkeypatch):
    right = ppo.kl_shaped_reward
    monkeypatch.setattr(ppo, "kl_shaped_reward", lambda reward, kl, kl_weight: right(reward, kl, -kl_weight))
    assert distance_to_closed_form(tmp_path, BANDIT, seed=0) > 0.2


def cloned(folder, seed):
    """Behaviour cloning on the logs of Count, which say "g" half of the time.

    Long enough that hardly a token is left that no log holds: there nothing but the divergence keeps turns short.
    """
    logs = Count().logs(500, seed)
    transformers.set_seed(seed)
    args = BCConfig(
        output_dir=str(folder),
        seed=seed,
        max_steps=300,
        per_device_train_batch_size=64,
        context=1,
        max_length=32,
        learning_rate=5e-3,
        **COMMON,
    )
    run = BCTrainer(build_model(SPEC, TOKENIZER), args, logs, None, TOKENIZER)
    run.train()
    run.save_model(str(folder))
    return folder


def play(folder):
    return rollout(LanguagePolicy.load(folder, device="cpu", max_new_tokens=4), Count, range(50))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_count_is_learnt_within_8192_environment_steps(tmp_path, seed):
    start = cloned(tmp_path / "bc", seed)
    # Adam's first steps move every weight by the whole learning rate. At 2e-3 without a warm-up they taught one of 25
    # seeds (100 to 124) never to close a turn.
    args = PPOConfig(
        output_dir=str(tmp_path / "ppo"),
        seed=seed,
        max_steps=32,
        episodes=32,
        epochs=4,
        minibatches=2,
        per_device_train_batch_size=128,
        context=1,
        max_length=32,
        learning_rate=2e-3,
        warmup_steps=4,
        kl_weight=0.05,
        decoding=DecodingConfig(max_new_tokens=4),
        **COMMON,
    )
    run = PPOTrainer(str(start), args, Count)
    run.train()
    run.save_model(str(tmp_path / "ppo"))
    assert run.totals["environment_steps"] <= 8192
    before, after = play(start), play(tmp_path / "ppo")
    cloned_score, score = (sum(t.total_return for t in played) / len(played) for played in (before, after))
    print(
        f"\nseed {seed}: {score:.2f} of {Count().optimum():g} after {run.totals['environment_steps']} environment "
        f"steps, {cloned_score:.2f} before"
    )
    assert cloned_score < 6 and score >= 0.95 * Count().optimum()
    # No trick with lengths: eight turns of a letter, each closed by its token.
    lengths = {len(turn.token_ids) for t in after for turn in t.turns if turn.is_trainable}
    assert max(lengths) <= 3 and not math.isnan(score)
