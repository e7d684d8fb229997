"""ILQL: losses by hand, what changes nothing, where gradients go, how a log's end counts, runs that come back."""

import json

import pytest
import torch
from torch.testing import assert_close

from offline_lmrl.algorithms.ilql import ILQLConfig, ILQLTrainer, ilql_losses, utterance_losses
from offline_lmrl.decoding.policy import LanguagePolicy, generate_texts
from offline_lmrl.decoding.sampler import DecodingConfig
from offline_lmrl.logs.trajectory import Trajectory, Turn
from offline_lmrl.models.loading import build_model, load_model
from offline_lmrl.tokens.batching import WindowDataset
from offline_lmrl.tokens.tokenizers import train_tokenizer

TOKENIZER = train_tokenizer(["left right up down", "you are at 1 2 3 4 5 6 7 8 9"], 300)
SPEC = {
    "model_type": "gpt2",
    "n_layer": 1,
    "n_embd": 16,
    "n_head": 2,
    "n_positions": 64,
    "initializer_range": 0.2,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}


def user(text):
    return Turn("user", text)


def agent(text, reward=None, **more):
    return Turn("assistant", text, reward=reward, **more)


LOGS = [  # ragged; the third is cut behind an observation, the fourth behind a finished agent turn
    Trajectory((user("you are at 1"), agent("left", 1.0))),
    Trajectory((user("you are at 2"), agent("right up", 0.0), user("you are at 3 4"), agent("up", 2.0))),
    Trajectory((user("at 5"), agent("down", -1.0), user("at 6"), agent("up", 0.5), user("at 7")), terminated=False),
    Trajectory((user("you are at 8"), agent("down", 1.0), user("at 9"), agent("left", 3.0)), terminated=False),
]


def config(folder, **settings):
    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "target_rate": 0.1,
        "max_length": 64,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **settings,
    }
    return ILQLConfig(output_dir=str(folder), use_cpu=True, **settings)


def trainer(folder, logs=LOGS, model=None, peft_config=None, **settings):
    torch.manual_seed(0)
    model = build_model(SPEC, TOKENIZER) if model is None else model
    return ILQLTrainer(model, config(folder, **settings), logs, None, TOKENIZER, peft_config)


def test_the_config_stores_the_form_of_decoding_and_what_is_not_at_its_default(tmp_path):
    form = {"beta": 4.0, "q_reduce": "min", "support": 0.02, "candidates": None, "clip": None}
    assert config(tmp_path).to_dict()["decoding"] == form
    args = config(tmp_path, decoding=DecodingConfig(beta=2.0, stop=("\n",)))
    stored = form | {"beta": 2.0, "support": 0.0, "stop": ("\n",)}
    assert args.to_dict()["decoding"] == stored
    assert json.loads(args.to_json_string())["decoding"] == stored | {"stop": ["\n"]}
    assert "beta" in args.to_sanitized_dict()["decoding"]


def with_random_heads(run):
    """Fresh heads are constant, so they would hide what they read; online and target heads differ here."""
    torch.manual_seed(1)
    for parameter in run.model.value_heads.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return run


def all_windows(run):
    return run.train_dataset.batch(range(len(run.train_dataset)))


def gradients(model):
    """Name -> gradient, of the parameters that the last backward reached with anything but 0."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def loss_and_gradients(run, batch, backward=None):
    """Loss per action token, sorted by (window, state), and the gradients of the batch's loss."""
    run.model.zero_grad(set_to_none=True)
    steps = batch["steps"]
    run.compute_loss(run.model, batch, num_items_in_batch=len(steps["row"])).backward()
    with torch.no_grad():
        per_step, _ = run.losses(run.outputs(run.model, batch), batch)
    return per_step, gradients(run.model)


# Numbers by hand.

# Three steps and twin heads; the last step is the one whose target is not known.
STEPS = {
    "reward": torch.tensor([0.0, 1.0, 5.0]),
    "bootstrap": torch.tensor([1.0, 0.0, 1.0]),
    "discount": torch.tensor([0.99, 0.99, 0.99]),
    "return_to_go": torch.tensor([0.99, 1.0, 9.0]),
    "end_discount": torch.tensor([0.5, 0.0, 1.0]),
    "has_target": torch.tensor([True, True, False]),
}
OUTPUTS = {
    "log_prob": torch.tensor([-0.5, -1.0, -2.0]),
    "q": torch.tensor([[1.0, 0.4, 3.0], [0.5, 0.2, 3.0]]),
    "target_q": torch.tensor([0.9, 0.5, 9.0]),
    "v": torch.tensor([0.3, 0.7, 0.0]),
    "next_v": torch.tensor([0.1, 5.0, 7.0]),
    "end_v": torch.tensor([2.0, 3.0, 4.0]),
    "counted": torch.tensor([0, 1]),
    "logsumexp_q": torch.tensor([[2.0, 3.0], [2.5, 3.0]]),
}


def test_losses_equal_the_numbers_worked_by_hand_and_are_zero_without_a_target(tmp_path):
    losses = ilql_losses(OUTPUTS, STEPS, config(tmp_path, expectile=0.7))
    # y = .99 · .1 and 1: (1 − .099)² + (.5 − .099)² and (.4 − 1)² + (.2 − 1)²
    assert_close(losses["q"], torch.tensor([0.972602, 1.0, 0.0]))
    # .7 · (.9 − .3)² and .3 · (.5 − .7)²
    assert_close(losses["v"], torch.tensor([0.252, 0.012, 0.0]))
    # (2 − 1) + (2.5 − .5) and (3 − .4) + (3 − .2)
    assert_close(losses["conservative"], torch.tensor([3.0, 5.4, 0.0]))
    # the policy learns from every action, scored or not
    assert_close(losses["policy"], torch.tensor([0.5, 1.0, 2.0]))


def test_a_share_of_the_steps_stands_for_all_of_them(tmp_path):
    part = OUTPUTS | {"counted": torch.tensor([1]), "logsumexp_q": torch.tensor([[3.0], [3.0]])}
    # one of two steps: twice (3 − .4) + (3 − .2); drawn as often as the other, its mean is 3 + 5.4
    losses = ilql_losses(part, STEPS, config(tmp_path, conservative_share=0.5))
    assert_close(losses["conservative"], torch.tensor([0.0, 10.8, 0.0]))


def test_the_monte_carlo_share_mixes_in_returns_that_v_closes(tmp_path):
    # TD targets .099 and 1; returns .99 + .5 · 2 = 1.99 and 1 + 0 · 3 = 1. A quarter of the returns:
    # .75 · .099 + .25 · 1.99 = .57175: (1 − .57175)² + (.5 − .57175)²; the second target stays 1
    mixed = ilql_losses(OUTPUTS, STEPS, config(tmp_path, monte_carlo=0.25))
    assert_close(mixed["q"], torch.tensor([0.188546125, 1.0, 0.0]))
    # returns alone: (1 − 1.99)² + (.5 − 1.99)²
    alone = ilql_losses(OUTPUTS, STEPS, config(tmp_path, monte_carlo=1.0))
    assert_close(alone["q"], torch.tensor([3.2002, 1.0, 0.0]))


def test_the_policy_is_weighted_by_the_exponential_of_the_advantage(tmp_path):
    # exp(2 · .6) · .5, exp(2 · −.2) · 1, and exp(2 · 9) cut to 100, times 2
    losses = ilql_losses(OUTPUTS, STEPS, config(tmp_path, inverse_temperature=2.0))
    assert_close(losses["policy"], torch.tensor([1.6600585, 0.6703200, 200.0]))


def test_without_the_conservative_weight_its_term_is_left_out(tmp_path):
    outputs = {name: values for name, values in OUTPUTS.items() if name not in ("counted", "logsumexp_q")}
    losses = ilql_losses(outputs, STEPS, config(tmp_path, conservative_weight=0.0))
    assert set(losses) == {"q", "v", "policy"}
    assert "conservative" in ilql_losses(OUTPUTS, STEPS, config(tmp_path))


# Four tokens of three turns: the first token closes none; the last turn has no target.
REPLY_STEPS = {
    "closes_turn": torch.tensor([False, True, True, True]),
    "reward": torch.tensor([9.0, 0.0, 1.0, 5.0]),
    "bootstrap": torch.tensor([1.0, 1.0, 0.0, 1.0]),
    "discount": torch.tensor([1.0, 0.5, 0.5, 0.5]),
    "return_to_go": torch.zeros(4),
    "end_discount": torch.zeros(4),
    "has_target": torch.tensor([True, True, True, False]),
}
REPLY_OUTPUTS = {
    "utterance_next_v": torch.tensor([0.5, 7.0, 7.0]),
    "utterance_q": torch.tensor([[0.55, 0.8, 0.0], [0.25, 1.2, 0.0]]),
    "utterance_v": torch.tensor([0.2, 0.9, 0.0]),
    "utterance_target_q": torch.tensor([0.3, 0.5, 1.0]),
}


def test_losses_of_whole_replies_equal_the_numbers_worked_by_hand(tmp_path):
    losses = utterance_losses(REPLY_OUTPUTS, REPLY_STEPS, config(tmp_path, expectile=0.7, discount_per_turn=0.9))
    # y = .9 · .5 = .45 and 1: .1² + .2² + .7 · .1², and .2² + .2² + .3 · .4²
    assert_close(losses, torch.tensor([0.057, 0.128, 0.0]))


def test_the_loss_is_the_weighted_sum_and_replies_count_where_they_close(tmp_path):
    settings = {
        "expectile": 0.7,
        "policy_weight": 2.0,
        "value_weight": 3.0,
        "conservative_weight": 0.5,
        "utterance_weight": 10.0,
        "discount_per_turn": 0.9,
    }
    run = trainer(tmp_path, **settings)
    outputs = REPLY_OUTPUTS | {
        "log_prob": torch.tensor([-1.0, -1.0, -1.0, -1.0]),
        "q": torch.tensor([[8.0, 0.0, 2.0, 0.0]]),
        "target_q": torch.tensor([0.0, 1.0, 0.0, 0.0]),
        "v": torch.zeros(4),
        "next_v": torch.tensor([-1.0, 2.0, 9.0, 9.0]),
        "counted": torch.tensor([0, 1, 2]),
        "logsumexp_q": torch.tensor([[8.0, 2.0, 2.0]]),
    }
    # y = 9 − 1, .5 · 2, 1: Q's losses 0, 1, 1, and none; V's 0, .7, 0, none; conservative 0, 2, 0, none
    total, logged = run.losses(outputs, {"steps": REPLY_STEPS})
    assert_close(total, torch.tensor([2.0, 2 + 3 * 1.7 + 1 + 0.57, 2 + 3 + 1.28, 2.0]))
    assert_close(logged["loss/utterance"], torch.tensor([0.057, 0.128, 0.0]))


# What changes nothing.


def with_padding(run, batch):
    other = torch.full((len(batch["input_ids"]), 5), 70)
    return batch | {
        "input_ids": torch.cat([batch["input_ids"], other], 1),
        "attention_mask": torch.cat([batch["attention_mask"], torch.zeros_like(other, dtype=torch.bool)], 1),
    }


def with_rows_that_nobody_reads(run, batch):
    return batch | {
        "input_ids": torch.cat([batch["input_ids"], batch["input_ids"].flip(0)]),
        "attention_mask": torch.cat([batch["attention_mask"], batch["attention_mask"].flip(0)]),
    }


def in_another_order(run, batch):
    return run.train_dataset.batch(list(range(len(run.train_dataset)))[::-1])


def as_another_token_pads(run, batch):
    dataset = WindowDataset(run.train_dataset.encoded, 71, next_rows=True, end_rows=True)
    return dataset.batch(range(len(dataset)))


@pytest.mark.parametrize("context", [None, 1])
@pytest.mark.parametrize(
    "change", [with_padding, with_rows_that_nobody_reads, in_another_order, as_another_token_pads]
)
def test_loss_and_gradients_do_not_depend_on_how_the_batch_is_laid_out(tmp_path, change, context):
    settings = {"monte_carlo": 0.3, "inverse_temperature": 1.0, "utterance_weight": 0.5, "context": context}
    run = with_random_heads(trainer(tmp_path, **settings))
    batch = all_windows(run)
    expected, expected_gradients = loss_and_gradients(run, batch)
    found, found_gradients = loss_and_gradients(run, change(run, batch))
    if change is in_another_order:  # of windows: the steps of each keep theirs
        lengths = batch["steps"]["row"].bincount().tolist()
        found = torch.cat(found.split(lengths[::-1])[::-1])
    assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert found_gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert_close(found_gradients[name], gradient, atol=1e-5, rtol=1e-5, msg=name)


def test_rows_that_close_returns_change_nothing_where_returns_are_not_used(tmp_path):
    run = with_random_heads(trainer(tmp_path, context=1))
    longer = WindowDataset(run.train_dataset.encoded, 0, next_rows=True, end_rows=True).batch(range(len(LOGS) + 3))
    batch = all_windows(run)
    assert len(longer["input_ids"]) > len(batch["input_ids"]) and longer["windows"] == batch["windows"] == 7
    expected, expected_gradients = loss_and_gradients(run, batch)
    found, found_gradients = loss_and_gradients(run, longer)
    assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for name, gradient in expected_gradients.items():
        assert_close(found_gradients[name], gradient, atol=1e-5, rtol=1e-5, msg=name)


def test_states_before_tokens_of_the_environment_and_padding_get_no_gradient(tmp_path):
    run = with_random_heads(trainer(tmp_path, inverse_temperature=1.0, monte_carlo=0.3))
    kept = []

    def keep(module, args, output):
        output[0].retain_grad()
        kept.append(output[0])

    handle = run.model.transformer.register_forward_hook(keep)
    batch = all_windows(run)
    run.compute_loss(run.model, batch, num_items_in_batch=1).backward()
    handle.remove()
    reached = kept[0].grad.abs().sum(-1) > 0  # (B,T): the state t from which token t + 1 was chosen
    assert torch.equal(reached[:, :-1], batch["action_mask"][: batch["windows"], 1:])
    assert not reached[:, -1].any()


# Where gradients go.


@pytest.mark.parametrize("scale, trunk", [(0.0, set()), (1.0, {"trunk"})])
def test_every_term_moves_its_own_parts_only(tmp_path, scale, trunk):
    settings = {"value_grad_scale": scale, "utterance_weight": 1.0, "inverse_temperature": 1.0, "monte_carlo": 0.3}
    run = with_random_heads(trainer(tmp_path, **settings))
    batch = all_windows(run)
    outputs = run.outputs(run.model, batch)
    losses = ilql_losses(outputs, batch["steps"], run.args)
    losses["utterance"] = utterance_losses(outputs, batch["steps"], run.args)
    moved = {}
    for name, values in losses.items():
        run.model.zero_grad(set_to_none=True)
        values.sum().backward(retain_graph=True)
        moved[name] = {part.split(".")[1] if "value_heads" in part else "trunk" for part in gradients(run.model)}
    assert moved == {
        "q": {"q"} | trunk,
        "v": {"v"} | trunk,
        "conservative": {"q"} | trunk,
        "policy": {"trunk"},
        "utterance": {"utterance_q", "utterance_v"} | trunk,
    }


def test_detached_values_leave_the_trunk_to_the_policy_alone(tmp_path):
    run = with_random_heads(trainer(tmp_path, value_grad_scale=0.0, utterance_weight=1.0))
    policy = with_random_heads(trainer(tmp_path, value_weight=0.0, conservative_weight=0.0))
    policy.model.transformer.load_state_dict(run.model.transformer.state_dict())
    _, together = loss_and_gradients(run, all_windows(run))
    _, alone = loss_and_gradients(policy, all_windows(policy))
    assert alone and all("value_heads" not in name for name in alone)
    for name, gradient in alone.items():
        assert torch.equal(together[name], gradient), name


# How the end of a log counts.


@pytest.mark.parametrize("context", [None, 1])
def test_a_cut_log_adds_the_discounted_value_behind_it_and_a_terminated_one_does_not(tmp_path, context):
    turns = (user("at 5"), agent("down", -1.0), user("at 6"), agent("up", 0.5), user("at 7"))
    logs = [Trajectory(turns, terminated=True), Trajectory(turns, terminated=False)]
    settings = {"discount_per_turn": 0.9, "reward_scale": 2.0, "context": context}
    run = with_random_heads(trainer(tmp_path, logs, **settings))
    batch = all_windows(run)
    steps, outputs = batch["steps"], run.outputs(run.model, batch)
    losses = ilql_losses(outputs, steps, run.args)["q"]
    closing = [n for n in range(len(losses)) if steps["turn"][n] == 3 and steps["closes_turn"][n]]

    seen = turns if context is None else turns[-1:]
    ids = [*run.renderer.preamble_of(()), *(i for turn in seen for i in run.renderer.encode_turn(turn).ids)]
    ids = torch.tensor([[*ids, *run.renderer.agent_opening]])
    with torch.no_grad():
        _, hidden = run.model.forward_with_hidden(input_ids=ids)
        value = run.model.v_values(hidden[0, -1])
    reward = (0.5 - run.encoder.scale.shift) / 2
    assert value.abs() > 0.05  # else the two targets could not be told apart
    for n, target in zip(closing, [torch.tensor(reward), reward + 0.9 * value], strict=True):
        assert_close(losses[n], (outputs["q"][:, n] - target).square().sum())


def test_an_episode_that_loses_its_oldest_turns_stays_terminated_and_one_that_loses_its_end_is_cut(tmp_path):
    text, long = "x" * 20, "x" * 60  # a byte each: one exchange fits into 40 tokens, two or a long reply do not
    oldest = Trajectory((user(text), agent("up", 0.0), user(text), agent("down", 1.0)))
    end = Trajectory((user(text), agent("up", 0.0), user("at 3"), agent(long, 1.0)))
    steps = all_windows(trainer(tmp_path, [oldest, end], max_length=40))["steps"]
    closing = steps["closes_turn"]
    assert steps["row"][closing].tolist() == [0, 1, 2]
    assert steps["turn"][closing].tolist() == [1, 3, 1]
    assert steps["bootstrap"][closing].tolist() == [1.0, 0.0, 1.0]


# Runs that come back.


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items() if value.is_floating_point()}


def assert_equal_weights(model, expected):
    found = weights(model)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_heads_of_whole_replies_train_and_come_back(tmp_path):
    run = trainer(tmp_path, utterance_weight=0.5)
    before = weights(run.model)
    run.train()
    after = weights(run.model)
    for head in ("utterance_q", "utterance_v", "utterance_target_q"):
        name = f"value_heads.{head}.bias"
        assert not torch.equal(after[name], before[name]), head
    assert all("loss/utterance" in row for row in run.state.log_history if "loss/q" in row)
    run.save_model(str(tmp_path / "run"))
    loaded = load_model(tmp_path / "run")
    assert loaded.config.offline_lmrl["value_heads"]["utterance"]
    assert_equal_weights(loaded, after)


@pytest.fixture
def lora(tmp_path):
    """A saved base model, and the settings of an adapter for it."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    build_model(SPEC, TOKENIZER).save_pretrained(tmp_path / "base")
    adapter = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    return str(tmp_path / "base"), adapter


def test_an_adapter_trains_and_resumes_to_equal_parameters(tmp_path, lora):
    base, adapter = lora
    settings = {"model": base, "peft_config": adapter, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    straight = trainer(tmp_path / "run", **settings)
    before = weights(straight.model)
    straight.train()
    after = weights(straight.model)
    for name, value in after.items():
        still = "lora_" not in name and "value_heads" not in name
        assert not still or torch.equal(value, before[name]), name
        assert "lora_" not in name or not torch.equal(value, before[name]), name
    resumed = trainer(tmp_path / "run", **settings)
    with torch.no_grad():  # all that the checkpoint must bring back
        for name, parameter in resumed.model.named_parameters():
            if "lora_" in name or "value_heads" in name:
                parameter.add_(1.0)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    assert_equal_weights(resumed.model, after)


def test_the_saved_adapter_opens_as_a_guided_policy(tmp_path, lora):
    base, adapter = lora
    run = trainer(tmp_path / "run", model=base, peft_config=adapter, decoding=DecodingConfig(beta=3.0), context=2)
    run.train()
    run.save_model(str(tmp_path / "run"))
    policy = LanguagePolicy.load(tmp_path / "run", device="cpu", max_new_tokens=4, temperature=0.0)
    assert policy.decoding.beta == 3.0 and policy.window.context == 2
    assert_equal_weights(policy.model, weights(run.model))
    played = LanguagePolicy(run.model.eval(), run.renderer, policy.decoding, context=2, max_length=64)
    history = [[user("you are at 2")]]
    assert generate_texts(policy, history)[0][0] == generate_texts(played, history)[0][0]
