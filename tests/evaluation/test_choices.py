"""The measures of each β and requested return, on tiny models and by independent paths."""

import numpy as np
import pytest
import torch

from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.decoding.sampler import DecodingConfig
from offline_lmrl.evaluation.choices import Choice, measure_choices
from offline_lmrl.evaluation.offline import measure_logs
from offline_lmrl.logs.trajectory import Trajectory, Turn
from offline_lmrl.models.guided import add_value_heads
from offline_lmrl.models.loading import build_model
from offline_lmrl.models.value_heads import ValueHeadsConfig
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
