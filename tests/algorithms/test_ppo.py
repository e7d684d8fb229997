"""PPO's loop, item by item: what is read, credited, learnt and saved."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from offline_lmrl.algorithms import load_algorithm
from offline_lmrl.algorithms.ppo import PPOConfig, PPOTrainer, Update, check_start, credit, ppo_losses, shape_scores
from offline_lmrl.algorithms.reward_model import RewardModelConfig, RewardModelTrainer
from offline_lmrl.comparison.compare import run_compare
from offline_lmrl.comparison.config import CompareConfig, EvaluationConfig
from offline_lmrl.comparison.measure import training_cost
from offline_lmrl.comparison.rows import read_results
from offline_lmrl.decoding.config import DecodingConfig
from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.decoding.scorers import RewardModel
from offline_lmrl.environments.prompts import PromptEnvironment
from offline_lmrl.errors import InputError
from offline_lmrl.logs.comparison import Comparison
from offline_lmrl.logs.io import read_trajectories, write_trajectories
from offline_lmrl.logs.protocols import StepResult
from offline_lmrl.logs.trajectory import Trajectory, Turn, as_context
from offline_lmrl.models.loading import build_model
from offline_lmrl.models.reward_model import build_reward_model, load_reward_model
from offline_lmrl.ops.policy_gradient import Moments, adaptive_kl_weight, tensorflow_adam_eps
from offline_lmrl.run import DataConfig, ModelConfig, RunConfig, input_hashes, train
from offline_lmrl.run_folder import weights_hash
from offline_lmrl.tasks.gamble import Gamble
from offline_lmrl.tokens.tokenizers import train_tokenizer

TOKENIZER = train_tokenizer(["left right up down", "you are at 1 2 3"], 300)
# Dropout is on in the config, and must not be in any forward.
SPEC = {
    "model_type": "gpt2",
    "n_layer": 1,
    "n_embd": 16,
    "n_head": 2,
    "n_positions": 96,
    "resid_pdrop": 0.5,
    "embd_pdrop": 0.5,
    "attn_pdrop": 0.5,
    "initializer_range": 0.2,
}


class Ragged:
    """One to three turns, scored by their number of letters "e" and bytes; every third seed is cut, not ended."""

    def __init__(self, end_by_itself=False, gain=1.0, chatter="on", options=None):
        self.end_by_itself, self.gain, self.chatter, self.allowed = end_by_itself, gain, chatter, options

    def reset(self, seed):
        self.left, self.cut = 1 + seed % 3, seed % 3 == 0 and not self.end_by_itself
        return (Turn("user", f"you are at {seed % 3}"),)

    def step(self, text):
        self.left -= 1
        reward = self.gain * (text.count("e") + 0.25 * len(text) + 1)
        last = self.left == 0
        turns = () if last and not self.cut else (Turn("user", self.chatter),)
        return StepResult(turns, reward, last and not self.cut, last and self.cut)

    def options(self):
        return self.allowed


def model(seed=0):
    torch.manual_seed(seed)
    return build_model(SPEC, TOKENIZER)


def trainer(folder, environment=Ragged, *, network=None, ptx=None, lora=None, **settings):
    settings = {
        "max_steps": 2,
        "episodes": 6,
        "epochs": 2,
        "minibatches": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "seed": 0,
        "max_length": 96,
        "save_strategy": "no",
        "disable_tqdm": True,
        "save_rollouts": False,
        "decoding": {"max_new_tokens": 4},
        **settings,
    }
    settings["decoding"] = DecodingConfig(**settings["decoding"])
    args = PPOConfig(output_dir=str(folder), use_cpu=True, **settings)
    return PPOTrainer(network or model(), args, environment, ptx, TOKENIZER, lora)


def read(run):
    """The first iteration's episodes and what was read of them."""
    played = run.rollouts.play(run.iteration)
    return played, run.observe(played)


def give_credit(run, experience):
    """Add the advantages of an experience, in place; return the metrics."""
    return credit(experience, run.args, run.state["kl_weight"])


def weights(run):
    return torch.cat([p.detach().flatten() for p in run.learner.trained.values()])


def metrics(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def without_times(rows):
    return [{k: v for k, v in row.items() if not k.endswith(("seconds", "runtime"))} for row in rows]


OPTIONS = ["left", "left up", "right"]


@pytest.mark.parametrize(
    "environment, decoding",
    [
        (Ragged, {"temperature": 0.7}),
        (Ragged, {"temperature": 1.3, "top_k": 5, "top_p": 0.9}),
        (lambda: Ragged(options=OPTIONS), {"max_new_tokens": 16}),
    ],
)
def test_before_a_step_sampler_learner_and_reference_agree(tmp_path, environment, decoding):
    """Items 3 to 6 and 8: one temperature, one mask, no dropout, a reference that is the start; fp32 throughout."""
    run = trainer(tmp_path, environment, decoding={"max_new_tokens": 4, **decoding})
    _, experience = read(run)
    log_prob = experience.column("behaviour_log_prob")
    torch.testing.assert_close(log_prob, experience.column("sampled_log_prob"), atol=1e-5, rtol=0)
    assert torch.equal(log_prob, experience.column("ref_log_prob"))
    check_start(experience, bf16=False)
    assert (ratios(run, experience) - 1).abs().max() < 1e-5


@torch.no_grad()
def ratios(run, experience):
    """Of the first minibatch, were it all windows in the order in which they were read."""
    give_credit(run, experience)
    order = np.argsort(-experience.windows.lengths, kind="stable")
    _, compared = run.update.ppo_terms(experience, order, warming=False)
    return (compared["log_prob"] - compared["behaviour_log_prob"]).exp()


def test_a_network_in_bf16_gives_log_probs_in_fp32(tmp_path):
    """Item 8: a log-softmax in bf16 is off by more than .01."""
    run = trainer(tmp_path, network=model().bfloat16(), per_device_train_batch_size=64)
    _, experience = read(run)
    assert (ratios(run, experience) - 1).abs().max() < 1e-3


def test_sampled_ids_that_text_would_not_give_again_keep_ratio_1(tmp_path):
    run = trainer(tmp_path)
    played, experience = read(run)
    turns = [turn for t in played for turn in t.turns if turn.is_trainable]
    again = [tuple(run.renderer.encode_content(turn.content)) for turn in turns]
    said = [tuple(i for i in turn.token_ids if i != run.renderer.close_id) for turn in turns]
    assert any(a != b for a, b in zip(again, said, strict=True))
    steps = experience.windows.batch(np.arange(len(experience.windows)))["steps"]
    assert steps["action"].tolist() == [i for turn in turns for i in turn.token_ids]
    check_start(experience, bf16=False)
    assert (ratios(run, experience) - 1).abs().max() < 1e-5


def test_log_probs_are_those_of_the_tokens_that_were_said(tmp_path):
    """Items 1 and 29: their sum is −n times the loss of transformers on the agent's tokens, the closing one too."""
    run = trainer(tmp_path, episodes=3)
    _, experience = read(run)
    for window in range(len(experience.windows)):
        index = np.array([window])
        batch = experience.windows.batch(index)
        labels = torch.where(batch["action_mask"], batch["input_ids"], -100)
        with torch.no_grad():
            loss = run.model(input_ids=batch["input_ids"], labels=labels).loss
        mine = experience.column("behaviour_log_prob")[experience.places(index)]
        assert mine.sum().item() == pytest.approx(-len(mine) * loss.item(), abs=1e-4)


def test_padding_and_neighbours_change_nothing(tmp_path):
    """Items 2 and 21."""
    one, all_ = trainer(tmp_path, per_device_train_batch_size=1), trainer(tmp_path, per_device_train_batch_size=64)
    played = one.rollouts.play(0)
    for name in ("behaviour_log_prob", "next_v", "entropy"):
        found = [run.observe(played).column(name) for run in (one, all_)]
        torch.testing.assert_close(*found, atol=1e-5, rtol=0)


def test_values_start_at_0_and_scores_lie_on_the_tokens_that_close_turns(tmp_path):
    """Items 7, 9, 10 and 12."""
    run = trainer(tmp_path, gae_lambda=1.0, whiten_advantages=False, kl_weight=0.5)
    played, experience = read(run)
    reward = experience.column("reward")
    scores = [turn.reward for t in played for turn in t.turns if turn.is_trainable]
    assert torch.equal(reward[reward != 0], torch.tensor(scores))
    assert torch.equal(reward != 0, experience.column("closes_turn").bool())
    give_credit(run, experience)
    assert not experience.column("behaviour_v").any() and not experience.column("next_v").any()
    torch.testing.assert_close(experience.column("advantage"), experience.column("return_to_go"))


@pytest.mark.parametrize("context", [None, 1])
def test_v_is_that_of_what_was_read_and_goes_on_where_the_agent_speaks_next(tmp_path, context):
    """Items 1 and 11: also where that lies in another window."""
    run = trainer(tmp_path, episodes=3, context=context)
    torch.nn.init.normal_(run.learner.module.value_head.weight)
    _, experience = read(run)
    v, next_v = experience.column("behaviour_v"), experience.column("next_v")
    batch = experience.windows.batch(np.arange(len(experience.windows)))
    steps = batch["steps"]
    with torch.no_grad():
        for row, state, found in zip(steps["row"], steps["state"], v, strict=True):
            hidden = run.model.get_decoder()(input_ids=batch["input_ids"][row, : state + 1].unsqueeze(0))[0][0, -1:]
            assert run.learner.module.value_head(hidden).item() == pytest.approx(found.item(), abs=1e-4)
    same = torch.from_numpy(experience.episode[1:] == experience.episode[:-1])
    torch.testing.assert_close(next_v[:-1][same], v[1:][same], atol=1e-4, rtol=0)
    assert v.std() > 0.1 and len(v) > same.sum() + 1


def test_whitened_rewards_keep_their_mean(tmp_path):
    """Item 15; V and the divergence are 0, so that the advantages of λ = 0 are the rewards."""
    run = trainer(tmp_path, lambda: Ragged(gain=3.0), whiten_rewards=True, whiten_advantages=False, gae_lambda=0.0)
    _, experience = read(run)
    give_credit(run, experience)
    reward, white = experience.column("reward"), experience.column("advantage")
    assert white.mean().item() == pytest.approx(reward.mean().item(), rel=1e-4)
    assert white.var(correction=0).item() == pytest.approx(1, abs=1e-4) and reward.var() > 2


def test_the_terms_of_the_loss_have_their_signs_and_weights_and_need_a_target(tmp_path):
    """Items 19, 20 and 27."""
    args = PPOConfig(output_dir=str(tmp_path), use_cpu=True, entropy_weight=0.01)
    two = torch.ones(2)
    outputs = {"log_prob": math.log(1.3) * two, "v": 0.9 * two, "entropy": 0.7 * two}
    steps = {
        "behaviour_log_prob": 0 * two,
        "behaviour_v": 0 * two,
        "advantage": 2 * two,
        "returns": two,
        "has_target": torch.tensor([True, False]),
    }
    found = {name: term.tolist() for name, term in ppo_losses(outputs, steps, args).items()}
    # −2 · 1.2; .1 · ½ (.2 − 1)²; −.01 · .7
    assert found["policy"] == pytest.approx([-2.4, 0]) and found["value"] == pytest.approx([0.032, 0])
    assert found["entropy"] == pytest.approx([-0.007, 0])


def test_a_turn_that_was_cut_before_anybody_replied_has_no_target(tmp_path):
    class Silent(Ragged):
        def step(self, text):
            last = self.left == 1
            return super().step(text)._replace(turns=() if last else (Turn("user", "on"),))

    run = trainer(
        tmp_path,
        lambda: Silent(options=OPTIONS),
        decoding={"max_new_tokens": 16},
        first_seed=3,
        episodes=1,
        whiten_advantages=False,
        max_steps=1,
        minibatches=1,
    )
    played, experience = read(with_v(run, 0.5))
    assert not played[0].terminated and played[0].turns[-1].is_trainable
    assert experience.column("has_target").tolist() == [True] * (len(experience.episode) - 1) + [False]
    give_credit(run, experience)
    assert experience.column("advantage")[-1] == experience.column("returns")[-1] == 0
    run.train()
    assert math.isfinite(metrics(tmp_path)[0]["grad_norm"])


def test_the_divergence_is_taken_off_every_token(tmp_path):
    run = trainer(tmp_path, kl_weight=0.5, gae_lambda=0.0, whiten_advantages=False)
    with torch.no_grad():
        for p in run.passes.reference.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    _, experience = read(run)
    found = give_credit(run, experience)
    kl = experience.column("behaviour_log_prob") - experience.column("ref_log_prob")
    torch.testing.assert_close(experience.column("advantage"), experience.column("reward") - 0.5 * kl)
    assert found["kl"] == pytest.approx(kl.sum().item() / 6, rel=1e-4) and kl.abs().max() > 0.01


@pytest.mark.parametrize("part, message", [("reference", "not the model that the run starts"), ("sampler", "sampler")])
def test_a_run_whose_divergence_does_not_start_at_0_stops_and_names_the_cause(tmp_path, part, message):
    run = trainer(tmp_path)
    if part == "reference":
        with torch.no_grad():
            run.passes.reference.get_input_embeddings().weight.mul_(1.1)
    else:
        run.rollouts.player.sampler.config = run.rollouts.player.sampler.config.from_dict(
            {"temperature": 0.5, "max_new_tokens": 4}
        )
    with pytest.raises(InputError, match=f"KL at step 0: .*{message}"):
        run.train()
    assert not (tmp_path / "metrics.jsonl").exists() and run.learner.updates == 0


def with_v(run, value):
    torch.nn.init.constant_(run.learner.module.value_head.bias, value)
    return run


def test_a_cut_episode_goes_on_in_v_and_a_finished_one_does_not(tmp_path):
    """Item 11: the same replies, cut or ended by the environment, differ by γ V at their last token."""
    credited = []
    for end_by_itself in (False, True):
        run = trainer(
            tmp_path,
            lambda end=end_by_itself: Ragged(end),
            first_seed=3,
            episodes=1,
            gae_lambda=0.0,
            whiten_advantages=False,
            discount_per_turn=0.9,
        )
        played, experience = read(with_v(run, 0.5))
        assert played[0].terminated == end_by_itself
        give_credit(run, experience)
        credited.append(experience.column("advantage"))
    difference = credited[0] - credited[1]
    assert difference[-1].item() == pytest.approx(0.9 * 0.5) and not difference[:-1].any()


def test_what_the_environment_says_is_no_step(tmp_path):
    """Item 11: longer replies of the environment leave advantages as they are."""
    found = []
    for chatter in ("on", "on and on and on"):
        run = trainer(tmp_path, episodes=3)
        played = run.rollouts.play(0)
        told = [
            Trajectory(
                tuple(Turn("user", chatter) if turn.content == "on" else turn for turn in t.turns),
                t.terminated,
                labels=t.labels,
            )
            for t in played
        ]
        experience = run.observe(told)
        experience.add(ref_log_prob=experience.column("behaviour_log_prob"))
        give_credit(run, experience)
        found.append(experience.column("advantage"))
    torch.testing.assert_close(*found)


def test_returns_come_before_whitening(tmp_path):
    """Items 17 and 18."""
    found = {}
    for whitened in (True, False):
        run = trainer(tmp_path, whiten_advantages=whitened)
        _, experience = read(with_v(run, 0.3))
        give_credit(run, experience)
        found[whitened] = experience
    returns = found[True].column("returns")
    assert torch.equal(returns, found[False].column("returns"))
    raw = found[False].column("advantage")
    torch.testing.assert_close(returns, raw + 0.3)
    white = found[True].column("advantage")[found[True].column("has_target").bool()]
    assert white.mean().abs() < 1e-5 and white.var(correction=0) == pytest.approx(1, abs=1e-4)


def test_scaled_scores_forget_their_unit(tmp_path):
    """Item 16."""
    runs = [
        trainer(
            tmp_path,
            lambda gain=gain: Ragged(gain=gain),
            scale_scores=True,
            kl_weight=0.0,
            max_steps=1,
            adam_epsilon=1e-2,
        )
        for gain in (1.0, 100.0)
    ]
    for one in runs:
        one.train()
    torch.testing.assert_close(weights(runs[0]), weights(runs[1]), atol=1e-5, rtol=0)
    assert Moments(*runs[1].state["moments"]).std == pytest.approx(
        100 * Moments(*runs[0].state["moments"]).std, rel=1e-4
    )


def test_scores_are_clipped_behind_their_scale_and_unfinished_turns_pay(tmp_path):
    """Items 16 and 28: the same text with and without its closing token differs by the rule."""
    close = TOKENIZER.eos_token_id
    said = [(5, close), (5, 6)]
    turns = [Turn("assistant", "x", reward=2.0, token_ids=ids, behaviour_log_prob=(-1.0, -1.0)) for ids in said]
    logs = [Trajectory((Turn("user", "q"), turn)) for turn in turns]

    def scores(**settings):
        args = trainer(tmp_path, **settings).args
        return [t.total_return for t in shape_scores(logs, frozenset({close}), args, Moments())[0]]

    assert scores() == [2.0, 2.0]
    assert scores(unfinished_score=-1.0) == [2.0, -1.0]
    assert scores(unfinished_penalty=0.5) == [2.0, 1.5]
    assert scores(unfinished_penalty=0.5, clip_scores=1.7) == [1.7, 1.5]
    assert scores(unfinished_penalty=0.5, scale_scores=True, clip_scores=7.0) == pytest.approx([7.0, 6.0])  # σ .25


def test_micro_batches_give_the_step_of_the_whole_minibatch(tmp_path):
    """Item 22, on ragged lengths, with logged data beside them."""
    logs = [Trajectory((Turn("user", "q"), Turn("assistant", "left " * (1 + i % 3)))) for i in range(5)]
    whole, split = (
        trainer(tmp_path, per_device_train_batch_size=size, max_steps=1, ptx=logs, ptx_weight=0.5, adam_epsilon=1e-2)
        for size in (64, 1)
    )
    whole.train()
    split.train()
    torch.testing.assert_close(weights(split), weights(whole), atol=2e-5, rtol=0)


def test_every_window_is_used_as_often_as_there_are_epochs(tmp_path, monkeypatch):
    """Item 23."""
    used, terms = [], Update.ppo_terms

    def counted(self, experience, index, warming):
        used.append(index)
        return terms(self, experience, index, warming)

    monkeypatch.setattr(Update, "ppo_terms", counted)
    run = trainer(tmp_path, max_steps=1, epochs=3, context=1)
    run.train()
    used = np.concatenate(used)
    assert (np.bincount(used) == 3).all() and len(used) == 3 * run.totals["environment_steps"]
    assert used[: len(used) // 3].tolist() != used[len(used) // 3 : 2 * len(used) // 3].tolist()


def test_the_learning_rate_ends_at_its_nth_part(tmp_path):
    """Item 25."""
    run = trainer(tmp_path, max_steps=4, episodes=2, epochs=1, minibatches=1)
    run.train()
    found = [row["learning_rate"] for row in metrics(tmp_path) if "learning_rate" in row]
    assert found == pytest.approx([1e-2, 0.75e-2, 0.5e-2, 0.25e-2])


def test_gradients_are_clipped_and_adam_takes_either_epsilon(tmp_path, monkeypatch):
    """Items 24 and 26."""
    run = trainer(tmp_path, max_steps=1, max_grad_norm=1e-3, tensorflow_eps=True)
    seen, step = [], run.learner.optimizer.step

    def watched():
        norm = torch.stack([p.grad.norm() for p in run.learner.trained.values()]).norm()
        seen.append((norm.item(), run.learner.optimizer.param_groups[0]["eps"]))
        step()

    monkeypatch.setattr(run.learner.optimizer, "step", watched)
    run.train()
    assert all(norm <= 1e-3 + 1e-6 for norm, _ in seen) and metrics(tmp_path)[0]["grad_norm"] > 1e-2
    assert [eps for _, eps in seen] == pytest.approx([tensorflow_adam_eps(1e-5, 0.999, k) for k in (1, 2, 3, 4)])
    assert trainer(tmp_path).learner.optimizer.param_groups[0]["eps"] == 1e-5


def test_an_update_stops_where_the_policy_is_too_far(tmp_path):
    """Item 30."""
    run = trainer(tmp_path, max_steps=1, learning_rate=1.0, epochs=4, stop_kl=0.01)
    run.train()
    assert metrics(tmp_path)[0]["minibatches"] == run.learner.updates < 8


def test_a_policy_that_left_its_language_stops_the_run(tmp_path):
    run = trainer(tmp_path, max_steps=9, learning_rate=0.1, max_kl=1e-4)
    with pytest.raises(InputError, match="max_kl: found a KL of .* nats per episode in iteration 2, expected at most"):
        run.train()
    assert len(metrics(tmp_path)) == 2


def test_what_to_watch_is_written_down_and_beta_follows_its_recurrence(tmp_path):
    """Items 14 and 31."""
    run = trainer(tmp_path, max_steps=4, kl_target=0.5, kl_horizon=60, kl_weight=0.1)
    run.train()
    rows = metrics(tmp_path)[:-1]
    wanted = {
        "score", "kl", "kl_per_token", "kl_weight", "entropy", "explained_variance", "approx_kl", "ratio_max",
        "clip_fraction", "value_clip_fraction", "tokens", "turns", "closed", "terminated", "loss/policy", "loss/value",
        "grad_norm", "learning_rate", "minibatches", "episodes", "environment_steps", "reward_queries",
        "generated_tokens", "training_tokens", "rollout_seconds", "update_seconds",
    }  # fmt: skip
    assert wanted <= set(rows[0]) and rows[0]["kl"] == 0 and rows[-1]["kl"] > 0
    expected = [0.1]
    for row in rows[:-1]:
        expected.append(adaptive_kl_weight(expected[-1], row["kl"], 0.5, 6, 60))
    assert [row["kl_weight"] for row in rows] == pytest.approx(expected) and expected[1] < 0.1
    assert rows[-1]["episodes"] == 24 and rows[-1]["environment_steps"] == rows[-1]["reward_queries"] == 48


def test_logged_data_add_their_gradient_gamma_times(tmp_path):
    """g = g_ppo + γ · g_lm."""
    logs = [Trajectory((Turn("user", "q"), Turn("assistant", "left up")))]

    def gradient(network, **settings):
        run = trainer(tmp_path, network=network, ptx=logs, **settings)
        experience = read(run)[1]
        give_credit(run, experience)
        run.learner.step = lambda: 0.0
        index = np.arange(len(experience.windows))
        run.update.minibatch(experience, index, np.random.default_rng(0), warming=False)
        return torch.cat([p.grad.flatten() for n, p in run.learner.trained.items() if n.startswith("policy")]), run

    both, _ = gradient(model(), ptx_weight=0.5)
    ppo, run = gradient(model())
    run.learner.optimizer.zero_grad()
    ids = [i for turn in logs[0].turns for i in run.renderer.encode_turn(turn).ids]
    ids = torch.tensor([[*run.renderer.preamble_of(()), *ids]])
    said = len(run.renderer.encode_content("left up")) + 1
    labels = torch.full_like(ids, -100)
    labels[0, -said:] = ids[0, -said:]
    run.model(input_ids=ids, labels=labels).loss.backward()
    lm = torch.cat([p.grad.flatten() for n, p in run.learner.trained.items() if n.startswith("policy")])
    torch.testing.assert_close(both, ppo + 0.5 * lm, atol=1e-6, rtol=0)
    assert (both - ppo).abs().max() > 0.1


def test_logged_windows_come_in_the_share_that_is_asked_for(tmp_path, monkeypatch):
    logs = [Trajectory((Turn("user", "q"), Turn("assistant", "left up")))] * 4
    seen, terms = [], Update.ptx_terms
    monkeypatch.setattr(Update, "ptx_terms", lambda self, index: seen.append(len(index)) or terms(self, index))
    run = trainer(tmp_path, max_steps=1, epochs=1, minibatches=1, ptx=logs, ptx_weight=0.1, ptx_examples=1.5)
    run.train()
    assert sum(seen) == 9 and max(seen) == 4  # for six episodes, four windows at once


def test_warm_up_moves_the_value_head_alone(tmp_path):
    run = trainer(tmp_path, max_steps=1, value_warmup=1, entropy_weight=1.0)
    before = {name: p.detach().clone() for name, p in run.learner.trained.items()}
    run.train()
    moved = {name for name, p in run.learner.trained.items() if not torch.equal(p, before[name])}
    assert moved and all(name.startswith("value_head") for name in moved)


def test_a_value_model_of_its_own_leaves_the_policy_alone(tmp_path):
    runs = [
        trainer(
            tmp_path, max_steps=1, epochs=1, minibatches=1, value_model="copy", value_weight=weight, max_grad_norm=0.0
        )
        for weight in (0.0, 1.0)
    ]
    start = weights(runs[0])
    for one in runs:
        one.train()
    policies = [torch.cat([p.detach().flatten() for p in one.model.parameters()]) for one in runs]
    torch.testing.assert_close(*policies)
    assert any(n.startswith("value_trunk") for n in runs[1].learner.trained) and not torch.equal(
        weights(runs[1]), start
    )


def reward_run(folder, head="terminal", lora=None, steps=10, **settings):
    """The run of a reward model that prefers the longer of two OPTIONS."""
    torch.manual_seed(1)
    network = build_reward_model(SPEC, TOKENIZER, head)
    if lora is not None:
        network.save_pretrained(folder / "base")
        network = load_reward_model(folder / "base")
    said = [
        [(Turn("assistant", text),) for text in (longer, shorter)]
        for longer in OPTIONS
        for shorter in OPTIONS
        if len(longer) > len(shorter)
    ]
    rows = [Comparison((Turn("user", f"you are at {i}"),), tuple(pair), (1.0, 0.0)) for i in range(3) for pair in said]
    common = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "max_length": 96}
    args = RewardModelConfig(
        output_dir=str(folder), head=head, max_steps=steps, learning_rate=1e-2, **common, **settings
    )
    run = RewardModelTrainer(network, args, rows, None, TOKENIZER, lora)
    run.train()
    run.save_model()
    return str(folder)


def from_reward(folder, reward, **settings):
    settings = {"decoding": {"max_new_tokens": 16}, "episodes": 16, "reward_scale": 4.0, "max_steps": 1, **settings}
    return trainer(folder, lambda: Ragged(options=OPTIONS), value_model=reward, **settings)


@pytest.mark.parametrize(
    ("head", "settings"),
    [
        ("terminal", {}),
        ("turn", {"normalise": "centre", "context": 1}),
        ("terminal", {"lora": 4}),
    ],
)
def test_v_starts_at_the_score_of_a_reward_model_where_that_is_read(tmp_path, head, settings):
    """A score is read at the token that closes a turn: in the state after the one in which that token is chosen."""
    settings, lora = dict(settings), None
    if rank := settings.pop("lora", None):
        lora = pytest.importorskip("peft").LoraConfig(target_modules="all-linear", r=rank)
    reward = reward_run(tmp_path / "reward", head, lora, **settings)
    run = from_reward(tmp_path, reward, context=settings.get("context"))
    played, experience = read(run)
    batch = experience.windows.batch(np.arange(len(experience.windows)))
    closing = batch["steps"]["closes_turn"].bool()
    row, closed = batch["steps"]["row"][closing], batch["steps"]["state"][closing] + 1
    assert (batch["input_ids"][row, closed] == run.renderer.close_id).all()
    batch["steps"] = {"row": row, "state": closed}
    with torch.no_grad():
        found = run.learner.module(batch)["v"].numpy()
    agent = [(t, i) for t in played for i, turn in enumerate(t.turns) if turn.is_trainable]
    scorer = RewardModel.load(reward, device="cpu")  # of the same replies as text
    score = np.concatenate(scorer.score_each([(as_context(t.turns[:i]), [[t.turns[i]]]) for t, i in agent]))
    assert found == pytest.approx(score / 4.0, abs=1e-5) and score.std() > 0.1
    assert np.corrcoef(found, score)[0, 1] > 0.95


def test_v_learns_on_from_a_reward_model_and_from_a_copy_of_the_policy_starts_at_0(tmp_path):
    reward = reward_run(tmp_path / "reward")
    assert PPOConfig(output_dir=str(tmp_path), use_cpu=True).named_run is None
    run = from_reward(tmp_path, reward)
    found = input_hashes(ModelConfig(path="x"), [], None, run.args)
    assert found["value_weights"] == weights_hash(reward) is not None
    start = {name: p.detach().clone() for name, p in run.learner.trained.items()}
    assert sum(name.startswith("value_trunk") for name in start) > 10
    run.train()
    assert all(
        not torch.equal(p, start[name]) for name, p in run.learner.trained.items() if name.startswith("value_head")
    )
    assert not torch.equal(run.learner.trained["value_trunk.wte.weight"], start["value_trunk.wte.weight"])
    _, experience = read(from_reward(tmp_path, "copy"))
    assert not experience.column("behaviour_v").any()


@pytest.mark.parametrize(
    ("made", "settings", "message"),
    [
        ({"head": "token"}, {}, "^value_model: .*reward: found a reward model with head: token, whose score is a sum"),
        ({"head": "turn", "context": 2}, {"context": 1}, "with context: 2, expected this run's context, 1, as V"),
        ({}, {"scale_scores": True}, "^scale_scores: found true with the reward model .*, expected only one of them"),
        (
            {},
            {"template": "plain"},
            "^value_model: .*reward: tokenizer: found fingerprint .*, expected .*: the model ",
        ),
    ],
)
def test_a_reward_model_at_whose_score_no_v_can_start_is_refused_in_one_line(tmp_path, made, settings, message):
    reward = reward_run(tmp_path / "reward", normalise="none", steps=1, **made)
    with pytest.raises(InputError, match=message):
        from_reward(tmp_path, reward, **settings)


def test_the_reference_never_moves(tmp_path):
    """Item 6."""
    run = trainer(tmp_path)
    before = [p.clone() for p in run.passes.reference.parameters()]
    run.train()
    assert all(torch.equal(*pair) for pair in zip(before, run.passes.reference.parameters(), strict=True))


def test_an_adapter_has_the_model_without_it_as_reference(tmp_path):
    peft = pytest.importorskip("peft")
    model().save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.5)
    network = model()
    network.config._name_or_path = network.name_or_path = str(tmp_path / "base")
    run = trainer(tmp_path / "run", network=network, lora=lora, episodes=3)
    assert run.passes.reference is None and not any("base_layer" in name for name in run.learner.trained)
    run.train()
    _, experience = read(run)
    frozen = trainer(tmp_path / "other", episodes=3)
    ref = frozen.observe(run.rollouts.play(run.iteration)).column("ref_log_prob")
    torch.testing.assert_close(experience.column("ref_log_prob"), ref, atol=1e-5, rtol=0)
    assert not torch.allclose(experience.column("behaviour_log_prob"), ref)
    run.save_model(str(tmp_path / "run"))
    assert LanguagePolicy.load(tmp_path / "run", device="cpu").model.value_heads is None


SETTINGS_THAT_BIND = {
    "clip_range": {"clip_range": 1e-3},
    "value_clip_range": {"value_clip_range": 1e-3},
    "entropy_weight": {"entropy_weight": 0.1},
    "gae_lambda": {"gae_lambda": 0.5},
    "whiten_advantages": {"whiten_advantages": False},
    "whiten_rewards": {"whiten_rewards": True},
    "kl_estimator": {"kl_estimator": "k3"},
    "kl_target": {"kl_target": 0.1, "kl_horizon": 10},
    "scale_scores": {"scale_scores": True},
    "clip_scores": {"clip_scores": 1.0},
    "unfinished_score": {"unfinished_score": -1.0},
    "unfinished_penalty": {"unfinished_penalty": 1.0},
    "tensorflow_eps": {"tensorflow_eps": True},
    "lr_scheduler_type": {"lr_scheduler_type": "constant"},
    "max_grad_norm": {"max_grad_norm": 0.05},
    "reward_scale": {"reward_scale": 10.0},
    "discount_per_turn": {"discount_per_turn": 0.5},
    "minibatches": {"minibatches": 3},
    "discount_per_token": {"discount_per_token": 0.9},
    "epochs": {"epochs": 1},
    "kl_weight": {"kl_weight": 0.0},
    "value_weight": {"value_weight": 1.0},
    "stop_kl": {"stop_kl": 1e-4},
    "adam_epsilon": {"adam_epsilon": 1e-5},
    "warmup_steps": {"warmup_steps": 2},
    "value_warmup": {"value_warmup": 1},
    "max_turns": {"max_turns": 1},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    run = trainer(tmp_path_factory.mktemp("plain"), max_steps=3, kl_weight=1.0, adam_epsilon=1e-3)
    run.train()
    return weights(run)


@pytest.mark.parametrize("toggle", SETTINGS_THAT_BIND)
def test_each_setting_changes_what_is_learnt_within_three_iterations(tmp_path, plain, toggle):
    run = trainer(tmp_path, **{"max_steps": 3, "kl_weight": 1.0, "adam_epsilon": 1e-3, **SETTINGS_THAT_BIND[toggle]})
    run.train()
    assert (weights(run) - plain).abs().max() > 1e-6


def test_averaged_weights_are_the_ones_that_are_saved(tmp_path):
    run = trainer(tmp_path, max_steps=1, epochs=1, minibatches=1, ema=0.75)
    start = run.model.get_input_embeddings().weight.detach().clone()
    run.train()
    trained = run.model.get_input_embeddings().weight.detach().clone()
    run.save_model(str(tmp_path))
    saved = LanguagePolicy.load(tmp_path, device="cpu").model.get_input_embeddings().weight
    torch.testing.assert_close(saved, 0.75 * start + 0.25 * trained)
    assert torch.equal(run.model.get_input_embeddings().weight, trained) and not torch.equal(start, trained)


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    settings = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "ema": 0.9,
        "scale_scores": True,
        "kl_target": 0.1,
        "value_model": "copy",
        "ptx_weight": 0.1,
        "save_rollouts": True,
        "ptx": [Trajectory((Turn("user", "q"), Turn("assistant", "left up")))] * 3,
    }
    straight = trainer(tmp_path / "straight", **settings)
    straight.train()
    stopped, update = trainer(tmp_path / "stopped", **settings), Update.run

    def killed(self, experience, iteration):
        found = update(self, experience, iteration)
        if iteration == 3:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(Update, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    monkeypatch.undo()
    resumed = trainer(tmp_path / "stopped", **settings)
    resumed.train(str(tmp_path / "stopped" / "checkpoint-2"))
    assert torch.equal(weights(resumed), weights(straight))
    assert all(torch.equal(resumed.learner.average[name], value) for name, value in straight.learner.average.items())
    assert without_times(metrics(tmp_path / "stopped")) == without_times(metrics(tmp_path / "straight"))
    assert resumed.costs() == straight.costs()
    resumed.train(str(tmp_path / "stopped" / f"checkpoint-{resumed.iteration}"))
    assert [("train_runtime" in row) for row in metrics(tmp_path / "stopped")] == [False] * 4 + [True]
    files = sorted(path.name for path in (tmp_path / "straight" / "rollouts").iterdir())
    assert len(files) == 4
    for name in files:
        texts = [(tmp_path / side / "rollouts" / name).read_text() for side in ("straight", "stopped")]
        assert texts[0] == texts[1]


def test_rollouts_are_offline_data_with_their_ids_and_log_probs(tmp_path):
    run = trainer(tmp_path, max_steps=2, save_rollouts=True)
    run.train()
    logs = read_trajectories(tmp_path / "rollouts")
    assert len(logs) == 12 and len({t.labels["seed"] for t in logs}) == 12
    turns = [turn for t in logs for turn in t.turns if turn.is_trainable]
    assert all(turn.token_ids and turn.behaviour_log_prob and turn.reward is not None for turn in turns)
    assert {t.labels["tokenizer"] for t in logs} == {run.renderer.fingerprint}


def test_an_environment_that_never_ends_is_cut(tmp_path):
    class Endless(Ragged):
        def step(self, text):
            return StepResult((Turn("user", "on"),), 1.0, False, False)

    played = trainer(tmp_path, Endless, max_turns=3, episodes=2).rollouts.play(0)
    assert all(not t.terminated and sum(turn.is_trainable for turn in t.turns) == 3 for t in played)


def test_prompts_with_a_function_are_an_environment(tmp_path):
    environment = PromptEnvironment(["up", "down", "up"], lambda c, t, k: [float(len(x)) for x in t])
    run = trainer(tmp_path, environment)
    run.train()
    assert run.totals["reward_queries"] == 12 and run.counts["prompts dropped: seen before"] == 1
    assert math.isfinite(metrics(tmp_path)[0]["score"])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"decoding": {"temperature": 0.0}}, "decoding.temperature: found 0"),
        ({"decoding": {"beta": 2.0}}, "decoding.beta: found 2.0, expected the default"),
        ({"decoding": {"stop": ["x"]}}, "decoding.stop: found"),
        ({"kl_estimator": "k2"}, "kl_estimator: found 'k2'"),
        ({"clip_scores": -1.0}, "clip_scores: found -1.0"),
        ({"gae_lambda": 1.5}, "gae_lambda: found 1.5"),
        ({"ptx_weight": 1.0}, "ptx_weight: found 1.0, but no logged data"),
    ],
)
def test_settings_that_cannot_be_are_one_line(tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        trainer(tmp_path, **settings)


SCRATCH = {"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 1, "n_positions": 64}
SHORT = {
    "max_steps": 2,
    "episodes": 4,
    "max_length": 64,
    "use_cpu": True,
    "disable_tqdm": True,
    "save_steps": 1,
    "decoding": {"max_new_tokens": 3},
}


def test_its_run_is_a_folder_like_any_other(tmp_path):
    model, environment = ModelConfig(scratch=SCRATCH), {"name": "gamble"}

    def learn():
        args = PPOConfig(output_dir=str(tmp_path / "run"), **SHORT | {"decoding": DecodingConfig(max_new_tokens=3)})
        return train(RunConfig("ppo", model, DataConfig(), args, environment))

    folder = learn()
    found = yaml.safe_load((folder / "config.yaml").read_text())
    assert found["algorithm"] == "ppo" and found["environment"] == environment and found["data"]["train"] is None
    report = (folder / "complete.json").read_text()
    assert json.loads(report)["environment_steps"] == json.loads(report)["reward_queries"] == 8
    cost = training_cost(folder)
    assert cost["environment_steps"] == 8 and cost["training_tokens"] == json.loads(report)["training_tokens"] > 0
    assert LanguagePolicy.load(folder, device="cpu").decoding.max_new_tokens == 3
    before = (folder / "metrics.jsonl").read_text()
    learn()
    assert (folder / "metrics.jsonl").read_text() == before
    (folder / "complete.json").unlink()
    learn()
    assert (folder / "complete.json").read_text() == report


@pytest.mark.parametrize(
    "algorithm, environment, message",
    [
        ("ppo", None, "environment.name: missing, expected the environment that ppo plays in"),
        ("bc", {"name": "gamble"}, "environment: found .*, expected none, as bc learns from data"),
        ("bc", None, "data.train: missing"),
    ],
)
def test_what_an_algorithm_learns_from_has_to_be_there(tmp_path, algorithm, environment, message):
    write_trajectories(tmp_path / "logs.jsonl", Gamble().logs(4, seed=0))
    data = DataConfig(str(tmp_path / "logs.jsonl")) if environment or algorithm == "ppo" else DataConfig()
    config = load_algorithm(algorithm)[0](output_dir=str(tmp_path / "run"), use_cpu=True, max_steps=1, max_length=64)
    with pytest.raises(InputError, match=message):
        train(RunConfig(algorithm, ModelConfig(scratch=SCRATCH), data, config, environment))
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_comparison_trains_it_in_the_environment_and_counts_its_steps(tmp_path):
    write_trajectories(tmp_path / "logs.jsonl", Gamble().logs(8, seed=0))
    config = CompareConfig(
        environment={"name": "gamble"},
        data={"train": str(tmp_path / "logs.jsonl")},
        output=str(tmp_path / "out"),
        methods={"ppo": {"algorithm": "ppo", "args": SHORT}},
        seeds=(3,),
        model={"scratch": SCRATCH},
        evaluation=EvaluationConfig(episodes=2, decoding={"max_new_tokens": 3}),
    )
    run_compare(config)
    rows = [row for row in read_results(tmp_path / "out" / "results.jsonl") if row["kind"] == "run"]
    assert {row["regime"] for row in rows} == {"environment"} and len(rows) == 2
    assert {row["cost"]["environment_steps"] for row in rows} == {8}
    logged = metrics(tmp_path / "out" / "runs" / "ppo-3")[:-1]
    assert {row["training_kl"] for row in rows} == {logged[-1]["kl"]}
    assert {row["ratio_max"] for row in rows} == {max(row["ratio_max"] for row in logged)}
    drawn = (tmp_path / "out" / "table.md").read_text()
    assert all(name in drawn for name in ("environment steps", "training KL", "largest ratio"))


def test_each_process_needs_an_episode(tmp_path, monkeypatch):
    monkeypatch.setattr(PPOConfig, "world_size", 7)
    with pytest.raises(InputError, match="episodes: found 6, expected at least one for each of 7 processes"):
        trainer(tmp_path)
