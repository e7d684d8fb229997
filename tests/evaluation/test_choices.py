"""The measures of each β and requested return, on tiny models and by independent paths."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.decoding.sampler import DecodingConfig
from offline_lmrl.evaluation.choices import PLAIN, Choice, measure_choices
from offline_lmrl.evaluation.offline import measure_logs
from offline_lmrl.evaluation.offline_report import evaluate_offline
from offline_lmrl.logs.trajectory import Trajectory, Turn
from offline_lmrl.models.guided import add_returns, add_value_heads, as_guided
from offline_lmrl.models.loading import build_model
from offline_lmrl.models.value_heads import ValueHeadsConfig
from offline_lmrl.tokens.conditioning import ReturnScale
from offline_lmrl.tokens.rendering import Renderer
from offline_lmrl.tokens.tokenizers import train_tokenizer

WORDS = "hello there good bad fine yes no".split()


@pytest.fixture(scope="module")
def policy():
    tokenizer = train_tokenizer([" ".join(WORDS)], 300)
    spec = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 64, "initializer_range": 0.3}
    torch.manual_seed(0)
    model = add_value_heads(build_model(spec, tokenizer), ValueHeadsConfig(kind="linear"))
    for parameter in model.value_heads.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return LanguagePolicy(model, Renderer(tokenizer), DecodingConfig(max_new_tokens=8, support=0.0), max_length=64)


@pytest.fixture(scope="module")
def logs():
    """One reply per prompt; those that contain "good" are thumbed up."""
    rng = np.random.default_rng(0)
    found = []
    for i in range(60):
        words = rng.choice(WORDS, 3).tolist()
        reply = Turn("assistant", " ".join(words), reward=float("good" in words))
        found.append(Trajectory((Turn("user", " ".join(rng.choice(WORDS, 2))), reply), group=f"g{i}"))
    return found


@pytest.fixture(scope="module")
def table(policy, logs):
    return measure_choices(policy, logs, [Choice(1.0), Choice(30.0)], prompts=20)


def test_the_plain_policy_comes_first_and_differs_from_itself_in_nothing(table):
    plain = table.rows[0]
    assert [row.choice.beta for row in table.rows] == [0.0, 1.0, 30.0] and len(table.prompts) == 20
    assert plain.advantage[:3] == (0.0, 0.0, 0.0) and plain.kl_logged == plain.changed == 0.0
    assert plain.kl_reply.mean == pytest.approx(0.0, abs=1e-5)
    assert plain.unlikely == 1 / 20  # the first percentile is just above the least likely of 20 replies


def test_replies_and_log_probs_are_those_of_the_policy_itself(policy, table):
    row = table.rows[2]
    session = policy.with_decoding(beta=30.0).start(range(20))
    replies = session.reply(range(20), table.prompts)
    assert row.texts == tuple(reply.text for reply in replies)
    sums = [(sum(r.log_prob), sum(r.policy_log_prob), len(r.log_prob)) for r in replies]
    guided, plain, tokens = np.array(sums).sum(0)
    assert row.log_prob.mean == pytest.approx(plain / tokens) and row.tokens.mean == tokens / 20
    assert row.kl_token.mean == pytest.approx((guided - plain) / tokens)
    assert row.kl_reply.mean == pytest.approx((guided - plain) / 20)
    assert row.unfinished == np.mean([not r.closed for r in replies])


def test_the_divergence_on_logged_states_is_exact(policy, logs, table):
    steps = measure_logs(policy, logs, [30.0])
    assert table.rows[2].kl_logged == pytest.approx(steps.kl.mean(), rel=1e-5)
    assert table.rows[2].changed == pytest.approx(steps.changed.mean())


def test_replies_are_rated_without_their_own_group(policy, logs, table):
    assert table.fitted == 60 and table.held_out.auc.mean > 0.6  # a wanted word shows in the mean embedding
    assert all(row.advantage.low < row.advantage.mean < row.advantage.high for row in table.rows[1:])


@pytest.fixture(scope="module")
def conditioned(policy, logs):
    """A return-conditioned model whose weights are far from uniform, without value heads."""
    renderer = policy.renderer
    spec = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 64}
    model, scale = as_guided(build_model(spec, renderer.tokenizer)), ReturnScale.fit(logs)
    known = {"condition": "embedding", "bins": scale.bins, "discount_per_turn": 1.0, "scale": scale.to_dict()}
    add_returns(model, known | {"opening": list(renderer.agent_opening)})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return LanguagePolicy(model.eval(), renderer, DecodingConfig(max_new_tokens=8), max_length=64)


def test_a_requested_return_has_a_row_measured_without_the_request(conditioned, logs):
    table = measure_choices(conditioned, logs, [Choice(ask="max")], prompts=10)
    plain, asked = table.rows
    assert plain.choice == PLAIN and asked.kl_logged is None and asked.texts != plain.texts
    # log π of the same replies by the plain policy, from the sampler's own numbers, and from one forward pass
    session = conditioned.with_decoding(ask="max").start(range(10))
    replies = session.reply(range(10), table.prompts)
    assert asked.texts == tuple(reply.text for reply in replies)
    total = 0.0
    for reply, prompt in zip(replies, table.prompts, strict=True):
        window = conditioned.null_window(prompt, 8)
        with torch.inference_mode():
            logits = conditioned.model(torch.tensor([[*window, *reply.token_ids]])).logits[0, len(window) - 1 : -1]
        total += logits.log_softmax(-1).gather(-1, torch.tensor(reply.token_ids)[:, None]).sum().item()
    tokens = sum(len(reply.token_ids) for reply in replies)
    assert asked.log_prob.mean == pytest.approx(total / tokens, rel=1e-4)
    own = sum(sum(reply.log_prob) for reply in replies)
    assert asked.kl_reply.mean == pytest.approx((own - total) / 10, rel=1e-3)


def test_asks_are_the_candidates_of_a_return_conditioned_run(conditioned, logs):
    report = evaluate_offline(conditioned, logs[:20], prompts=4)
    assert [str(row.choice) for row in report.choices.rows] == ["β 0", "ask p50", "ask p75", "ask p90", "ask max"]
    assert report.calibration is None and report.chosen is not None and "nan" not in str(report)


@pytest.mark.parametrize("case", ["one row", "no rewards", "cut", "one group", "no heads"])
def test_poor_logs_leave_numbers_out(policy, logs, case):
    few = {"one row": logs[:1], "one group": [replace(log, group="g") for log in logs[:6]]}.get(case, logs[:6])
    if case == "no rewards":
        few = [replace(log, turns=(log.turns[0], replace(log.turns[1], reward=None))) for log in few]
    elif case == "cut":
        few = [replace(log, terminated=False) for log in few]
    if case == "no heads":
        spec = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 64}
        model = as_guided(build_model(spec, policy.renderer.tokenizer)).eval()
        policy = LanguagePolicy(model, policy.renderer, policy.decoding, max_length=64)
    report = evaluate_offline(policy, few, betas=[4.0], prompts=4)
    text = str(report)
    assert not re.search(r"\b(nan|inf)\b", text)
    assert [row.choice.beta for row in report.choices.rows] == ([0.0] if case == "no heads" else [0.0, 4.0])
    if case != "no heads":
        assert all(row.advantage is None for row in report.choices.rows)
        assert "no gain is estimated" in text


def test_few_and_equal_contexts_are_asked_once(policy, logs):
    same = [replace(logs[0], group="g") for _ in range(3)]
    assert len(measure_choices(policy, same, [Choice(1.0)]).prompts) == 1


def test_a_window_without_space_for_a_reply_keeps_the_other_measures(policy, logs):
    tight = LanguagePolicy(policy.model, policy.renderer, DecodingConfig(max_new_tokens=50), max_length=40)
    report = evaluate_offline(tight, logs[:4], betas=[4.0])
    assert report.choices is None and report.chosen is None and report.by_beta[1]["kl"] > 0
    assert "no replies were generated: max_length: found 40" in str(report)
