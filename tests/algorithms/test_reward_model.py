"""Reward models: what is minimised, what is learnt, how scores are normalised, and that transformers opens the run."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from offline_lmrl import run
from offline_lmrl.algorithms.reward_model import (
    RewardModelConfig,
    RewardModelTrainer,
    accuracy,
    bootstrap_sample,
    pairs_loss,
)
from offline_lmrl.decoding.scorers import RewardModel, relabel_trajectories
from offline_lmrl.errors import InputError
from offline_lmrl.logs import io
from offline_lmrl.logs.comparison import Comparison
from offline_lmrl.logs.io import read_trajectories, write_comparisons, write_trajectories
from offline_lmrl.logs.parallel import map_in_order
from offline_lmrl.logs.trajectory import Trajectory, Turn, as_context
from offline_lmrl.models.loading import build_model, load_model
from offline_lmrl.models.reward_model import build_reward_model, head_of, load_reward_model, option_scores, read_mask
from offline_lmrl.run import DataConfig, ModelConfig
from offline_lmrl.run_folder import read_report
from offline_lmrl.tokens import comparison_batching
from offline_lmrl.tokens.tokenizers import train_tokenizer

TOKENIZER = train_tokenizer(["good bad fine", "say it 1 2 3"], 290)
SPEC = {
    "model_type": "gpt2",
    "n_layer": 1,
    "n_embd": 16,
    "n_head": 2,
    "n_positions": 64,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}


def compare(texts, target, ranking=None, **more):
    return Comparison(
        (Turn("user", "say it"),), tuple((Turn("assistant", text),) for text in texts), target, ranking, **more
    )


# The reply with "good" in it is better, wherever it stands.
RULE = [
    compare((f"good {i}", f"bad {i}") if i % 2 else (f"bad {i}", f"good {i}"), (i % 2, 1 - i % 2)) for i in range(24)
]
RANKED = [
    compare(("good", "fine", "say", "bad"), (1.0, 0.0, 0.0, 0.0), ((0,), (1, 2), (3,))),
    compare(("bad", "good"), (0.5, 0.5)),
    compare(("1", "2", "3"), (0.0, 1.0, 0.0), weight=3.0),
]


def trainer(folder, data=RULE, held_out=None, model=None, peft_config=None, **settings):
    torch.manual_seed(0)
    settings = {
        "max_steps": 6,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_length": 64,
        **settings,
    }
    args = RewardModelConfig(output_dir=str(folder), use_cpu=True, **settings)
    model = model or build_reward_model(SPEC, TOKENIZER, args.head)
    return RewardModelTrainer(model, args, data, held_out, TOKENIZER, peft_config)


def parameters(made):
    return torch.cat([p.detach().flatten() for p in made.model.parameters()])


def batch_of(made):
    return made.train_dataset.batch(range(len(made.train_dataset)))


def scores(made, batch):
    return scores_of(made.model, batch, made.args.head)


def scores_of(model, batch, head):
    with torch.no_grad():
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        return model.eval()(**inputs, read=read_mask(batch, head))


def config(tmp_path, **settings):
    return RewardModelConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, **settings)


def test_the_loss_of_a_ranking_with_a_tie_by_hand(tmp_path):
    batch = {
        "target": torch.tensor([1.0, 0.0, 0.0, 0.0]),
        "rank": torch.tensor([0, 1, 1, 2]),
        "comparison": torch.zeros(4, dtype=torch.long),
        "strength": torch.tensor([2.0]),
    }
    score = torch.tensor([2.0, 1.0, 3.0, 0.0])
    # best against the others: Δ = 1, −1, 2; the tied two against the last: Δ = 1, 3; the tie itself says nothing here
    cost = [math.log1p(math.exp(-lead)) for lead in (1.0, -1.0, 2.0, 1.0, 3.0)]
    assert_close(pairs_loss(score, batch, config(tmp_path)), torch.tensor([sum(cost) / 5]))
    # the best should lead by .25 · 2 more
    cost = [math.log1p(math.exp(-lead)) for lead in (0.5, -1.5, 1.5, 1.0, 3.0)]
    assert_close(pairs_loss(score, batch, config(tmp_path, margin=0.25)), torch.tensor([sum(cost) / 5]))


def test_a_label_that_is_surely_wrong_costs_no_more_than_the_floor(tmp_path):
    batch = {
        "target": torch.tensor([1.0, 0.0]),
        "rank": torch.tensor([0, 1]),
        "comparison": torch.tensor([0, 0]),
        "strength": torch.zeros(1),
    }
    score = torch.tensor([0.0, 6.0], requires_grad=True)  # Δ = −6
    loss = pairs_loss(score, batch, config(tmp_path, error_rate=0.1))
    assert_close(loss, torch.tensor([2.95]), atol=0.005, rtol=0)  # −log(.9 σ(−6) + .05); 6.00 without the floor
    loss.sum().backward()
    assert score.grad.abs().max() < 0.05  # .998 without


@pytest.mark.parametrize("bootstrap", [None, 3])
def test_a_file_that_two_processes_render_teaches_what_its_rows_teach(tmp_path, bootstrap, monkeypatch):
    write_comparisons(tmp_path / "pairs.jsonl", RULE)
    one, used = trainer(tmp_path / "one", bootstrap=bootstrap), []

    def noted(function, items, processes):
        used.append(processes)
        return map_in_order(function, items, processes)

    for module in (io, comparison_batching):
        monkeypatch.setattr(module, "map_in_order", noted)
    two = trainer(tmp_path / "two", str(tmp_path / "pairs.jsonl"), bootstrap=bootstrap, processes=2)
    assert used == [2] * (2 if bootstrap is None else 3)  # to read, to render, and to render what is left out
    one.train()
    two.train()
    assert torch.equal(parameters(two), parameters(one))
    assert two.model.config.offline_lmrl == one.model.config.offline_lmrl
    with pytest.raises(InputError, match="processes: found 0, expected 1 to 1000000"):
        config(tmp_path, processes=0)


def test_a_run_goes_on_with_other_processes(tmp_path):
    write_comparisons(tmp_path / "pairs.jsonl", RULE)
    data = DataConfig(str(tmp_path / "pairs.jsonl"))
    settings = {"max_steps": 1, "save_strategy": "no", "disable_tqdm": True, "max_length": 64}
    for processes in (1, 2):
        args = config(tmp_path / "run", processes=processes, **settings)
        run.train(run.RunConfig("reward_model", ModelConfig(scratch=SPEC, vocab_size=280), data, args))
    assert "processes" not in (tmp_path / "run" / "config.yaml").read_text()


def test_accuracy_counts_equal_scores_half_and_ties_not_at_all():
    batch = {
        "target": torch.tensor([1.0, 0.0, 0.5, 0.5, 0.2, 0.8]),
        "rank": torch.tensor([0, 1, 0, 0, 1, 0]),
        "comparison": torch.tensor([0, 0, 1, 1, 2, 2]),
        "weight": torch.ones(3),
    }
    assert accuracy(torch.tensor([1.0, 0.0, 5.0, 0.0, 1.0, 1.0]), batch).tolist() == [1.0, 0.5]
    assert accuracy(torch.tensor([0.0, 1.0, 5.0, 0.0, 1.0, 0.0]), batch).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("head", ["terminal", "turn", "token"])
def test_a_planted_rule_is_learnt_and_the_run_opens_as_a_plain_classifier(tmp_path, head):
    made = trainer(tmp_path, held_out=RULE[:6], head=head, max_steps=25)
    made.train()
    metrics = made.evaluate()
    assert metrics["eval_accuracy"] == 1.0 and metrics["eval_loss"] < 0.5
    made.save_model(str(tmp_path))
    batch = batch_of(made)
    normalised = scores(made, batch) + made.model.config.offline_lmrl["reward"]["bias"]
    assert_close(normalised.mean(), torch.tensor(0.0), atol=1e-4, rtol=0)
    assert_close(normalised.std(correction=0), torch.tensor(1.0), atol=1e-4, rtol=0)
    again = load_reward_model(tmp_path)
    assert again.config.offline_lmrl["reward"]["head"] == head
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        found = again.eval()(input_ids=ids, attention_mask=mask, read=read_mask(batch, head))
        assert_close(found, scores(made, batch))
        if head == "terminal":
            plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)
            padded = torch.where(mask, ids, plain.config.pad_token_id)
            logits = plain(input_ids=padded, attention_mask=mask).logits.squeeze(-1)
        else:
            plain = AutoModelForTokenClassification.from_pretrained(tmp_path).eval()
            per_token = plain(input_ids=ids, attention_mask=mask).logits.squeeze(-1)
            logits = (per_token * read_mask(batch, head)).sum(1)
    assert type(plain).__module__.startswith("transformers.") and plain.config.num_labels == 1
    assert plain.config.architectures == [type(plain).__name__]
    assert_close(logits, found, atol=1e-5, rtol=1e-5)


RATED = [
    Trajectory((Turn("user", "say it"), Turn("assistant", text, reward=rating)))
    for i in range(8)
    for text, rating in ((f"good {i}", 7.0), (f"fine {i}", 5.0), (f"bad {i}", 1.0))
]


def test_ratings_are_learnt_and_come_back_in_their_unit_or_normalised(tmp_path):
    settings = {"loss": "regression", "normalise": "none", "eval_strategy": "steps", "eval_steps": 60}
    made = trainer(tmp_path, RATED, RATED[:3], max_steps=60, **settings)
    made.train()
    assert made.state.log_history[-2]["eval_error"] < 0.8  # in the ratings' unit
    found = scores(made, made.train_dataset.batch(range(3))) + made.model.config.offline_lmrl["reward"]["bias"]
    assert_close(found, torch.tensor([7.0, 5.0, 1.0]), atol=0.8, rtol=0)
    standard = trainer(tmp_path, RATED, loss="regression", max_steps=2)
    standard.train()
    found = scores(standard, batch_of(standard)) + standard.model.config.offline_lmrl["reward"]["bias"]
    assert_close(found.std(correction=0), torch.tensor(1.0), atol=1e-4, rtol=0)


def test_pre_training_reads_every_reply_marked_good_and_marked_bad_and_hands_its_head_on(tmp_path):
    votes = trainer(tmp_path, RULE[:6], RULE[:2], binarise=True, normalise="none")
    assert (len(votes.train_dataset), len(votes.eval_dataset)) == (12, 4)
    text = [votes.renderer.tokenizer.decode(ids) for ids in votes.train_dataset.batch([0])["input_ids"]]
    assert "good:" in text[0] and "bad:" in text[1] and text[0].replace("good:", "bad:", 1) == text[1]
    votes.train()
    votes.save_model(str(tmp_path / "votes"))
    after = trainer(tmp_path / "run", model=load_reward_model(tmp_path / "votes"))
    assert torch.equal(parameters(after), parameters(votes)) and len(after.train_dataset) == 24
    with pytest.raises(InputError, match="binarise: found true with loss: regression"):
        config(tmp_path, loss="regression", binarise=True)


@pytest.mark.parametrize("normalise", ["centre", "standard"])
def test_scores_of_the_replies_of_reference_are_normalised(tmp_path, normalise):
    write_trajectories(
        tmp_path / "said.jsonl",
        [Trajectory((Turn("user", "say it"), Turn("assistant", text))) for text in ("good", "fine 1", "fine 2")],
    )
    made = trainer(tmp_path, normalise=normalise, reference=str(tmp_path / "said.jsonl"))
    made.train()
    bias = made.model.config.offline_lmrl["reward"]["bias"]
    found = scores(made, made.reference.batch(range(3))) + bias
    assert_close(found.mean(), torch.tensor(0.0), atol=1e-4, rtol=0)
    assert (abs(found.std(correction=0) - 1) < 1e-4) == (normalise == "standard")
    assert abs((scores(made, batch_of(made)) + bias).mean()) > 1e-3
    found = run.input_hashes(ModelConfig(path="x"), RULE, None, made.args)
    assert found["reference"] == run.data_hash(read_trajectories(tmp_path / "said.jsonl"))
    with pytest.raises(InputError, match="reference: found a source with normalise: none"):
        config(tmp_path, reference="x", normalise="none")


def test_each_loss_takes_its_own_kind_of_data(tmp_path):
    write_trajectories(tmp_path / "rated.jsonl", RATED)
    assert list(config(tmp_path, processes=2).read_rows(tmp_path / "rated.jsonl")) == RATED
    with pytest.raises(InputError, match="loss: found pairs with scored trajectories, expected comparisons"):
        trainer(tmp_path, RATED)
    with pytest.raises(InputError, match="loss: found regression with comparisons, expected scored trajectories"):
        trainer(tmp_path, RULE, loss="regression")
    with pytest.raises(InputError, match="regression on ratings that are all 7"):
        trainer(tmp_path, RATED[::3], loss="regression")


@pytest.mark.parametrize("loss", ["pairs", "best_of_k", "plackett_luce"])
def test_micro_batches_give_the_step_of_the_whole_batch(tmp_path, loss):
    data = [*RULE[:6], *RANKED[:2]]
    # Adam would blow up the rounding of gradients that are next to nothing.
    settings = {"loss": loss, "max_steps": 2, "optim": "sgd", "learning_rate": 0.1, "normalise": "none"}
    whole = trainer(tmp_path / "a", data, **settings)
    split = trainer(tmp_path / "b", data, **settings, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    start = parameters(whole)
    whole.train()
    assert (parameters(whole) - start).abs().max() > 1e-3
    split.train()
    assert_close(parameters(split), parameters(whole), atol=1e-5, rtol=0)


def test_two_options_cost_the_same_under_every_loss(tmp_path):
    losses = []
    for loss in ("pairs", "best_of_k", "plackett_luce"):
        made = trainer(tmp_path, loss=loss)
        losses.append(made.losses(made.outputs(made.model.eval(), batch_of(made)), batch_of(made))[0])
    assert_close(losses[0], losses[1])
    assert_close(losses[0], losses[2])


def dialogue(*replies):
    return tuple(turn for i, text in enumerate(replies) for turn in (Turn("assistant", text), Turn("user", f"on {i}")))


BEFORE = (Turn("user", "say it"), Turn("assistant", "1"), Turn("user", "go"))
SEGMENTS = [
    Comparison(BEFORE, (dialogue(*one), dialogue(*two)), (1.0, 0.0))
    for one, two in ((("good", "bad", "good"), ("bad",)), (("good",), ("bad", "bad")))
]


@pytest.mark.parametrize("head", ["turn", "token"])
def test_with_a_context_each_turn_is_read_alone_in_training_scoring_and_relabelling(tmp_path, head):
    made = trainer(tmp_path, SEGMENTS, head=head, context=2, max_steps=3, normalise="centre")
    batch = batch_of(made)
    rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
    texts = [made.renderer.tokenizer.decode(row[mask]) for row, mask in rows]
    assert batch["option"].tolist() == [0, 0, 0, 1, 2, 3, 3] and batch["comparison"].tolist() == [0, 0, 1, 1]
    assert batch["closing_mask"].sum(1).tolist() == [1] * 7
    third = ["bad", "on 1", "good"]  # after two turns of its reply, and nothing older
    places = [texts[2].index(text) for text in third]
    assert places == sorted(places) and "on 0" not in texts[2] and "say it" not in texts[2]
    assert "say it" not in texts[0] and "go" in texts[0]
    made.train()
    made.save_model(str(tmp_path))
    scorer = RewardModel.load(tmp_path, device="cpu")
    assert scorer.window.context == 2
    found = torch.tensor(np.concatenate(scorer.score_each([(row.context, row.options) for row in SEGMENTS])))
    bias = made.model.config.offline_lmrl["reward"]["bias"]
    with torch.no_grad():
        learnt = option_scores(made.model.eval(), batch, head)
    assert_close(found.float(), learnt + bias)
    # turns by hand: what is older than two turns does not count, nor does what follows
    replies = [Trajectory((*as_context(BEFORE), *SEGMENTS[0].options[0]))]
    (whole,) = relabel_trajectories(replies, scorer, "turn")
    rewards = [turn.reward for turn in whole.turns if turn.reward is not None]
    alone = [
        scorer.score(before, [(Turn("assistant", text),)])[0] - bias
        for before, text in ((BEFORE[1:], "good"), (dialogue("good"), "bad"), (dialogue("good", "bad")[2:], "good"))
    ]
    assert rewards == pytest.approx([value + bias / 3 for value in alone], abs=1e-5)
    assert whole.total_return == pytest.approx(found[0].item(), abs=1e-5)


def test_weights_count_relative_to_their_mean_and_a_surplus_batch_for_nothing(tmp_path):
    made = trainer(tmp_path, RANKED)
    assert made.train_dataset.weight.tolist() == pytest.approx([0.6, 0.6, 1.8])
    surplus = made.train_dataset.surplus_batch()
    loss, logged = made.losses(made.outputs(made.model, surplus), surplus)
    assert made.train_dataset.items_in(surplus) == 0 and loss.tolist() == [0.0] and logged["accuracy"].numel() == 0
    assert made.train_dataset.items_in(batch_of(made)) == 3


def test_a_bootstrap_sample_is_as_large_as_the_data_and_follows_its_seed(tmp_path):
    drawn = [trainer(tmp_path, bootstrap=seed).train_dataset.batch(range(24))["input_ids"] for seed in (1, 1, 2)]
    assert drawn[0].equal(drawn[1]) and not drawn[0].equal(drawn[2])
    assert len({tuple(row.tolist()) for row in drawn[0]}) < 48
    held_out = trainer(tmp_path, held_out=RULE, bootstrap=1).eval_dataset
    assert len({tuple(row.tolist()) for row in held_out.batch(range(24))["input_ids"]}) == 48


def test_a_bootstrap_sample_draws_whole_groups_and_leaves_the_others_out():
    rows = [replace(row, group=f"g{i // 3}") for i, row in enumerate(RULE)]
    drawn, left_out = bootstrap_sample(rows, 5)
    groups = np.random.default_rng(5).integers(8, size=8).tolist()
    assert sorted(drawn) == sorted(i for g in groups for i in range(3 * g, 3 * g + 3))
    assert left_out.tolist() == [i for i in range(24) if i // 3 not in groups] and 0 < len(left_out) < 24
    drawn, left_out = bootstrap_sample([RULE[0], RULE[1], RULE[0]], 0)  # without groups, equal rows are one
    assert {0, 2} <= set(drawn) or {0, 2} <= set(left_out)


@pytest.mark.parametrize("normalise", ["none", "standard"])
def test_a_run_is_judged_on_what_its_bootstrap_left_out(tmp_path, normalise):
    rows = [replace(row, labels={"strength": 1.0}) for row in RULE]
    write_comparisons(tmp_path / "pairs.jsonl", rows)
    args = config(
        tmp_path / "run",
        bootstrap=3,
        margin=1.0,
        error_rate=0.1,
        normalise=normalise,
        max_steps=4,
        learning_rate=1e-2,
        max_length=64,
        save_strategy="no",
        disable_tqdm=True,
    )
    model = ModelConfig(scratch=SPEC, vocab_size=290)
    folder = run.train(run.RunConfig("reward_model", model, DataConfig(str(tmp_path / "pairs.jsonl")), args))
    left_out = [rows[i] for i in bootstrap_sample(rows, 3)[1]]
    found = RewardModel.load(folder, device="cpu").score_each([(row.context, row.options) for row in left_out])
    lead = [scores @ np.subtract(row.target, row.target[::-1]) for row, scores in zip(left_out, found, strict=True)]
    report = read_report(folder)
    assert report["oob_comparisons"] == len(left_out) > 4
    assert report["oob_accuracy"] == pytest.approx(np.mean(np.array(lead) > 0))
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["oob_cross_entropy"] for row in logged if "oob_loss" in row] == [report["oob_cross_entropy"]]
    # of raw scores, with the share of random labels and without the margin, whatever the scores become afterwards
    expected = np.mean([-math.log(0.9 / (1 + math.exp(-one)) + 0.05) for one in lead])
    assert (report["oob_cross_entropy"] == pytest.approx(expected, abs=1e-5)) == (normalise == "none")
    assert report["oob_loss"] > report["oob_cross_entropy"] + 0.05


def test_a_bootstrap_that_draws_everything_is_told_and_has_no_figures(tmp_path):
    made = trainer(tmp_path, [replace(row, group="one") for row in RULE], bootstrap=0, max_steps=1)
    made.train()
    assert made.outcome == {} and any("all drawn by bootstrap" in reason for reason in made.counts)


def test_left_out_rows_that_do_not_fit_leave_a_run_without_figures_and_stop_no_training(tmp_path):
    long = compare(("good " * 60, "bad " * 60), (1.0, 0.0))
    groups = np.random.default_rng(5).integers(8, size=8).tolist()
    rows = [replace(row if i // 3 in groups else long, group=f"g{i // 3}") for i, row in enumerate(RULE)]
    made = trainer(tmp_path, rows, bootstrap=5, max_steps=1)
    made.train()
    assert made.outcome == {} and any("left out, useless to measure the run" in reason for reason in made.counts)


def test_ratings_that_were_left_out_are_judged_in_their_unit(tmp_path):
    made = trainer(tmp_path, RATED, bootstrap=1, loss="regression", normalise="none", max_steps=40)
    made.train()
    left_out = [RATED[i] for i in bootstrap_sample(RATED, 1)[1]]
    bias = made.model.config.offline_lmrl["reward"]["bias"]
    found = scores(made, made.left_out.batch(range(len(left_out)))) + bias
    error = np.mean([abs(score - row.total_return) for score, row in zip(found.tolist(), left_out, strict=True)])
    assert made.outcome["oob_error"] == pytest.approx(error, abs=1e-3)


def test_resuming_equals_the_uninterrupted_run_to_the_bit(tmp_path):
    straight = trainer(tmp_path, save_strategy="steps", save_steps=2, per_device_train_batch_size=5)
    straight.train()
    resumed = trainer(tmp_path, per_device_train_batch_size=5)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert torch.equal(parameters(resumed), parameters(straight))


def test_a_policys_trunk_gets_a_fresh_head_and_a_reward_model_keeps_its_own(tmp_path):
    policy = build_model(SPEC, TOKENIZER)
    policy.save_pretrained(tmp_path / "policy")
    model = load_reward_model(tmp_path / "policy", "terminal")
    trunk = dict(policy.transformer.named_parameters())
    assert all(torch.equal(value, trunk[name]) for name, value in model.transformer.named_parameters())
    assert_close(head_of(model).weight.std().item(), 1 / math.sqrt(17), atol=0.1, rtol=0)
    model.save_pretrained(tmp_path / "reward")
    again = load_reward_model(tmp_path / "reward", "terminal")
    assert torch.equal(head_of(again).weight, head_of(model).weight)
    with pytest.raises(InputError, match="head: found 'turn', but .* has the head 'terminal'"):
        load_reward_model(tmp_path / "reward", "turn")
    with pytest.raises(InputError, match="found no reward model .*GPT2LMHeadModel"):
        load_reward_model(tmp_path / "policy")
    with pytest.raises(InputError, match="^model: .*reward: found a reward model, expected a causal LM"):
        load_model(tmp_path / "reward")


@pytest.mark.parametrize(
    ("head", "plain"), [("terminal", AutoModelForSequenceClassification), ("token", AutoModelForTokenClassification)]
)
def test_an_adapter_trains_with_its_head_in_full_and_comes_back(tmp_path, head, plain):
    peft = pytest.importorskip("peft")
    build_model(SPEC, TOKENIZER).save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    write_comparisons(tmp_path / "train.jsonl", RULE)
    data = DataConfig(str(tmp_path / "train.jsonl"))
    settings = {"max_steps": 12, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "max_length": 64}
    args = config(tmp_path / "run", head=head, save_strategy="steps", save_steps=6, disable_tqdm=True, **settings)
    model = ModelConfig(path=str(tmp_path / "base"), lora={"r": 4})
    run.train(run.RunConfig("reward_model", model, data, args))
    with pytest.raises(InputError, match="^model: .*run: found a reward model, expected a causal LM"):
        load_model(tmp_path / "run")
    scorer = RewardModel.load(tmp_path / "run", device="cpu")
    good, bad = ((Turn("assistant", text),) for text in ("good 2", "bad 2"))
    high, low = scorer.score(RULE[0].context, [good, bad])
    assert high > low + 0.5
    trained = {name for name, weight in scorer.model.named_parameters() if weight.requires_grad}
    assert trained and all("lora_" in name or "modules_to_save" in name for name in trained)
    frozen = load_reward_model(tmp_path / "base", head)
    assert not torch.equal(head_of(scorer.model).weight, head_of(frozen).weight)
    # peft puts it on a plain classifier, which has to be told that there is one label
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    alone = plain.from_pretrained(tmp_path / "base", num_labels=1)
    alone = peft.PeftModel.from_pretrained(alone, tmp_path / "run").eval()
    alone.config.pad_token_id = scorer.model.config.pad_token_id
    with torch.no_grad():
        assert_close(alone(**batch).logits, scorer.model(**batch).logits)
    resumed = trainer(
        tmp_path / "again",
        model=load_reward_model(tmp_path / "base", head),
        head=head,
        max_steps=12,
        peft_config=peft.LoraConfig(target_modules="all-linear", r=4),
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6"))
    assert_close(scores(resumed, batch_of(resumed)), scores_of(scorer.model, batch_of(resumed), head))
    with pytest.raises(InputError, match="head: found 'turn', but .* has the head"):
        load_reward_model(tmp_path / "run", "turn")


def test_a_run_is_trained_from_files_and_is_not_trained_twice(tmp_path):
    write_comparisons(tmp_path / "train.jsonl", RULE)
    data = DataConfig(str(tmp_path / "train.jsonl"), str(tmp_path / "train.jsonl"))
    args = config(tmp_path / "run", max_steps=2, max_length=64, save_strategy="no", disable_tqdm=True)
    model = ModelConfig(scratch=SPEC, vocab_size=290)
    facts = run.dry_run(run.RunConfig("reward_model", model, data, args))
    assert (facts["comparisons"], facts["options"]) == (24, 48)
    done = run.train(run.RunConfig("reward_model", model, data, args))
    written = (done / "complete.json").stat().st_mtime_ns
    assert run.train(run.RunConfig("reward_model", model, data, args)) == done
    assert (done / "complete.json").stat().st_mtime_ns == written
    load_reward_model(done)


def test_settings_and_data_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(InputError, match="error_rate: found 1.0"):
        config(tmp_path, error_rate=1.0)
    with pytest.raises(InputError, match="error_rate: found 0.1 with loss: best_of_k, expected 0, as only "):
        config(tmp_path, loss="best_of_k", error_rate=0.1)
    with pytest.raises(InputError, match="margin: found 2 with loss: regression, expected 0"):
        config(tmp_path, loss="regression", margin=2.0)
    with pytest.raises(InputError, match="context: found 1 with head: terminal, .* expected null, or head: turn or t"):
        config(tmp_path, context=1)
    with pytest.raises(InputError, match="comparison 3 has 3 options without a ranking"):
        trainer(tmp_path, RANKED, loss="plackett_luce")
