"""Return-conditioned training: what is learnt, what is kept of the model it starts from, and what it refuses."""

import pytest
import torch
from torch.testing import assert_close

from offline_lmrl.algorithms import load_algorithm
from offline_lmrl.decoding.policy import LanguagePolicy, generate_texts
from offline_lmrl.decoding.sampler import DecodingConfig
from offline_lmrl.errors import InputError
from offline_lmrl.logs.trajectory import Trajectory, Turn
from offline_lmrl.models.loading import build_model, load_model
from offline_lmrl.tokens.tokenizers import train_tokenizer

TOKENIZER = train_tokenizer(["good bad fine say it\n", "quality: 1/2 2/2"], 300)
SPEC = {
    "model_type": "gpt2",
    "n_layer": 2,
    "n_embd": 32,
    "n_head": 2,
    "n_positions": 64,
    "initializer_range": 0.2,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
ASKED = [Turn("user", "say it")]


PAYS = {"good": 1.0, "bad": -1.0}  # labels of preference


def episode(*replies, pays=PAYS):
    turns = (turn for text in replies for turn in (*ASKED, Turn("assistant", text, reward=pays[text])))
    return Trajectory(tuple(turns))


PREFERENCES = [episode("good"), episode("bad")] * 8


def trainer(folder, algorithm="return_conditioned", model=None, logs=PREFERENCES, lora=None, **settings):
    torch.manual_seed(0)
    config, cls = load_algorithm(algorithm)
    args = config(
        **{
            "output_dir": str(folder),
            "max_steps": 2,
            "per_device_train_batch_size": 8,
            "max_length": 64,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "learning_rate": 1e-2,
        }
        | settings
    )
    return cls(model or build_model(SPEC, TOKENIZER), args, logs, None, TOKENIZER, lora)


def reply(folder, **decoding):
    """To ASKED, by the run in a folder."""
    policy = LanguagePolicy.load(folder, device="cpu", max_new_tokens=6, **decoding)
    return generate_texts(policy, [ASKED])[0][0].text


def saved(run):
    run.train()
    run.save_model()
    return run.args.output_dir


@pytest.mark.parametrize("condition", ["embedding", "text"])
def test_the_labels_of_preferences_are_obeyed(tmp_path, condition):
    folder = saved(trainer(tmp_path, max_steps=40, condition=condition))
    texts = {ask: reply(folder, ask=ask, temperature=0.0) for ask in (1.0, -1.0, "max", "p0")}
    assert texts == {1.0: "good", -1.0: "bad", "max": "good", "p0": "bad"}
    assert LanguagePolicy.load(folder, device="cpu").decoding.ask == "p90"


def test_the_run_holds_what_its_returns_mean(tmp_path):
    folder = saved(trainer(tmp_path, decoding=DecodingConfig(ask="p50", condition_scale=0.5)))
    block = load_model(folder).config.offline_lmrl
    assert block["algorithm"] == "return_conditioned"
    assert (block["returns"]["condition"], block["returns"]["bins"]) == ("embedding", 2)
    assert block["returns"]["scale"]["tables"][""]["counts"] == [8, 8]
    assert block["decoding"]["ask"] == "p50" and block["decoding"]["condition_scale"] == 0.5


def test_windows_carry_return_ids_before_every_agent_turn(tmp_path):
    run = trainer(tmp_path, logs=[episode("good", "bad"), episode("bad", "bad")])
    # returns to go 0 −1 and −2 −1, bins of −2 −1 0 behind null
    rows, null = run.train_dataset.batch([0, 1])["input_ids"].tolist(), len(TOKENIZER)
    assert [[token - null for token in row if token >= null] for row in rows] == [[3, 2], [1, 2]]
    opening = run.renderer.agent_opening
    for row in rows:
        places = [i for i, token in enumerate(row) if token >= null]
        assert [tuple(row[i + 1 : i + 1 + len(opening)]) for i in places] == [opening] * 2


def test_the_table_learns_at_its_own_rate_without_decay(tmp_path):
    run = trainer(tmp_path)
    run.create_optimizer_and_scheduler(2)
    groups = run.optimizer.param_groups
    table = set(run.model.return_embedding.parameters())
    assert set(groups[-1]["params"]) == table and not any(table & set(g["params"]) for g in groups[:-1])
    assert (groups[-1]["initial_lr"], groups[-1]["weight_decay"]) == (0.1, 0.0)
    assert sum(len(g["params"]) for g in groups) == len(list(run.model.parameters()))


def test_a_run_goes_on_in_its_own_bins(tmp_path):
    first = saved(trainer(tmp_path / "first"))
    other = [episode("good"), episode("bad", pays={"bad": -9.0})]
    again = trainer(tmp_path / "again", model=load_model(first), logs=other)
    assert again.model.config.offline_lmrl["returns"] == load_model(first).config.offline_lmrl["returns"]
    assert_close(again.model.return_embedding.rows(), load_model(first).return_embedding.rows())


@pytest.mark.parametrize("algorithm", ["bc", "ilql"])
def test_it_starts_from_another_run_and_keeps_its_values_as_they_are(tmp_path, algorithm):
    first = load_model(saved(trainer(tmp_path / "first", algorithm)))
    heads = {name: value.clone() for name, value in first.state_dict().items() if "value_heads" in name}
    run = trainer(tmp_path / "run", model=first)
    loaded = load_model(saved(run))
    assert (loaded.value_heads is not None) == (algorithm == "ilql")
    for name, value in heads.items():
        assert torch.equal(loaded.state_dict()[name], value), name
    if algorithm == "ilql":
        assert run.encoder.scale.to_dict() == loaded.config.offline_lmrl["reward_scale"]
        reply(tmp_path / "run", ask="auto", beta=1.0, condition_scale=0.5)


def test_values_learnt_behind_it_leave_the_policy_to_the_bit(tmp_path):
    folder = saved(trainer(tmp_path / "first"))
    ids = torch.tensor([[len(TOKENIZER) + 2, 5, 9]])
    expected = load_model(folder)(input_ids=ids).logits
    frozen = {"policy_weight": 0.0, "value_grad_scale": 0.0, "weight_decay": 0.0}
    run = trainer(tmp_path / "values", "ilql", model=load_model(folder), **frozen)
    batch = run.train_dataset.batch(range(16))
    assert (batch["input_ids"] == len(TOKENIZER)).sum() == 16 and batch["input_ids"].max() == len(TOKENIZER)
    loaded = load_model(saved(run))
    assert torch.equal(loaded(input_ids=ids).logits, expected)
    assert loaded.config.offline_lmrl["returns"] == load_model(folder).config.offline_lmrl["returns"]
    reply(tmp_path / "values", ask="auto", beta=1.0, condition_scale=1.0)


def test_cloning_behind_it_gives_a_plain_policy(tmp_path):
    folder = saved(trainer(tmp_path / "first"))
    run = trainer(tmp_path / "bc", "bc", model=load_model(folder))
    assert run.model.return_embedding is None and "returns" not in run.model.config.offline_lmrl
    assert run.train_dataset.batch([0])["input_ids"].max() < len(TOKENIZER)


def test_an_adapter_brings_the_table_back(tmp_path):
    peft = pytest.importorskip("peft")
    build_model(SPEC, TOKENIZER).save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(target_modules="all-linear", r=2, task_type="CAUSAL_LM")
    run = trainer(tmp_path / "run", model=load_model(tmp_path / "base"), lora=lora)
    before = run.model.return_embedding.rows().detach().clone()
    loaded = load_model(saved(run))
    assert not torch.equal(run.model.return_embedding.rows(), before)
    assert torch.equal(loaded.return_embedding.rows(), run.model.return_embedding.rows())
    reply(tmp_path / "run", ask=1.0, condition_scale=1.0)


@pytest.mark.parametrize(
    "logs, settings, message",
    [
        ([Trajectory((Turn("user", "a"), Turn("assistant", "b")))], {}, "found no rewards"),
        ([episode("good"), episode("good")], {}, "found the same return, 1,"),
        (PREFERENCES, {"text": "reply\n", "condition": "text"}, "text: found"),
    ],
)
def test_data_that_tells_no_returns_apart_is_refused(tmp_path, logs, settings, message):
    with pytest.raises(InputError, match=message):
        trainer(tmp_path, logs=logs, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"bins": 1},
        {"binning": "log"},
        {"per": "row"},
        {"condition": "prefix"},
        {"condition_dropout": 1.5},
        {"discount_per_turn": 0.0},
    ],
)
def test_settings_out_of_range_are_refused_by_name(tmp_path, settings):
    with pytest.raises(InputError, match=f"{next(iter(settings))}: found"):
        trainer(tmp_path, **settings)


def test_heads_and_replies_of_the_environment_add_to_the_loss_by_their_weights(tmp_path):
    run = trainer(
        tmp_path, logs=[episode("good", "bad"), episode("bad", "bad")], return_weight=2.0, environment_weight=0.5
    )
    steps = {"closes_turn": torch.tensor([False, True, False, True])}
    outputs = {
        "log_prob": torch.tensor([-1.0, -2.0, -3.0, -4.0]),
        "outcome_log_prob": torch.tensor([-10.0, -20.0]),
        "outcome_mask": torch.tensor([False, True]),
        "environment_log_prob": torch.tensor([-4.0, -4.0]),
    }
    loss, logged = run.losses(outputs, {"steps": steps})
    assert loss.tolist() == [2.0, 3.0, 4.0, 45.0]  # 1 more each for .5 · 8 / 4, and 2 · 20 where the turn counts
    assert logged["loss/returns"].tolist() == [20.0] and logged["loss/environment"].tolist() == [4.0, 4.0]


def test_heads_are_fitted_to_the_turns_trained_on_null_rows_and_saved(tmp_path):
    logs = [episode("good", "bad"), episode("bad", "bad")]
    settings = {"return_weight": 1.0, "environment_weight": 1.0, "condition_dropout": 1.0, "logging_steps": 1}
    run = trainer(tmp_path, logs=logs, **settings)
    before = run.model.return_heads.reward.bias.detach().clone()
    folder = saved(run)
    block = load_model(folder).config.offline_lmrl["return_heads"]
    # scaled by the range 2 and shifted by the mean −.5: rewards .75 and −.25, returns .5 and −.5, then −.25 after each
    assert block["reward"]["means"] == pytest.approx([-0.25, 0.75])
    assert block["returns"]["means"] == pytest.approx([-0.5, -0.25, 0.5])
    assert block["after"]["means"] == pytest.approx([-0.25, 0.0])
    assert block["ended"]["means"] == [0.0, 1.0]
    assert not torch.equal(run.model.return_heads.reward.bias, before)
    assert {"loss/returns", "loss/environment"} <= {name for row in run.state.log_history for name in row}
    again = trainer(tmp_path / "again", model=load_model(folder), logs=logs)
    assert not any(p.requires_grad for p in again.model.return_heads.parameters())
    valued = trainer(tmp_path / "valued", "ilql", model=load_model(folder), logs=logs)
    heads = [p.detach().clone() for p in valued.model.return_heads.parameters()]
    valued.train()
    valued.compute_loss(valued.model, valued.train_dataset.batch([0, 1]), num_items_in_batch=4).backward()
    # what trains has a gradient, or several ranks would wait for it in vain
    assert all(p.grad is not None for p in valued.model.parameters() if p.requires_grad)
    assert all(torch.equal(p, q) for p, q in zip(valued.model.return_heads.parameters(), heads, strict=True))


@pytest.mark.parametrize("settings", [{"condition": "text"}, {"condition_dropout": 0.0}])
def test_heads_are_refused_where_every_row_has_a_condition(tmp_path, settings):
    with pytest.raises(InputError, match="return_weight: found 1.0"):
        trainer(tmp_path, return_weight=1.0, **settings)


# Cut right after the agent's turn, so that nobody knows what it earned.
CUT = [Trajectory((*ASKED, Turn("assistant", "good", reward=float(i))), terminated=False) for i in range(4)]


@pytest.mark.parametrize(
    ("name", "logs", "what"),
    [
        ("environment_weight", PREFERENCES, "a reply of the environment"),
        ("return_weight", CUT, "a finished agent turn after which the log continues or ends"),
    ],
)
def test_a_weight_whose_loss_has_no_target_in_the_data_is_refused(tmp_path, name, logs, what):
    with pytest.raises(InputError) as refused:
        trainer(tmp_path, logs=logs, **{name: 0.5})
    assert str(refused.value) == f"{name}: found 0.5, expected 0, as no window of the training data holds {what}"


def test_the_weight_of_whole_replies_is_refused_where_no_reply_has_an_outcome(tmp_path):
    with pytest.raises(InputError, match="utterance_weight: found 2, expected 0, as no window of the training data"):
        trainer(tmp_path, "ilql", logs=CUT, utterance_weight=2.0)


def test_return_heads_are_refused_on_a_model_that_reads_its_returns_as_text(tmp_path):
    folder = saved(trainer(tmp_path, condition="text"))
    with pytest.raises(InputError, match="return_weight: found 1, expected 0, as the model reads returns as text"):
        trainer(tmp_path / "again", model=load_model(folder), return_weight=1.0)


def test_replies_cost_tokens_only_where_they_are_learnt(tmp_path):
    logs = [episode("good", "bad"), episode("bad", "bad")]
    bare, with_replies = (trainer(tmp_path, logs=logs, context=1, environment_weight=w) for w in (0.0, 1.0))
    reply = len(bare.renderer.encode_turn(ASKED[0]).ids)
    assert with_replies.train_dataset.tokens == bare.train_dataset.tokens + 2 * reply
    assert "environment" not in bare.train_dataset.batch([0])
    batch = with_replies.train_dataset.batch([0])
    text = batch["input_ids"][0][batch["environment"]["state"] + 1]
    assert TOKENIZER.decode(text) == "say it" + TOKENIZER.decode(bare.renderer.closing("user"))


def test_a_metric_that_counted_nothing_is_left_out_of_the_log(tmp_path):
    logs = [episode("good", "bad"), episode("bad")]
    settings = {"environment_weight": 1.0, "context": 1, "logging_steps": 1, "max_steps": 8}
    run = trainer(tmp_path, logs=logs, per_device_train_batch_size=1, **settings)
    run.train()
    rows = [row for row in run.state.log_history if "loss" in row]
    told = [row["loss/environment"] for row in rows if "loss/environment" in row]
    assert 0 < len(told) < len(rows) == 8  # one window in three has a reply
    assert all(value == value for row in rows for value in row.values())
