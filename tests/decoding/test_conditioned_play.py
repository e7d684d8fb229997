"""Asking a policy for a return: what it is told turn by turn, guidance by hand, caches, and what is refused."""

import logging
import math

import pytest
import torch
from torch.testing import assert_close

from offline_lmrl.decoding import asks
from offline_lmrl.decoding import policy as policies
from offline_lmrl.decoding.config import PlannerConfig
from offline_lmrl.decoding.distribution import reduce_q
from offline_lmrl.decoding.policy import LanguagePolicy, LanguageSession, RequestValues, load_value_model
from offline_lmrl.decoding.sampler import DecodingConfig
from offline_lmrl.decoding.scorers import load_scorer
from offline_lmrl.environments.rollouts import rollout
from offline_lmrl.errors import InputError
from offline_lmrl.logs.protocols import StepResult
from offline_lmrl.logs.trajectory import Trajectory, Turn
from offline_lmrl.models.guided import add_return_heads, add_returns, add_value_heads, as_guided
from offline_lmrl.models.loading import build_model
from offline_lmrl.models.value_heads import ValueHeadsConfig
from offline_lmrl.tokens.conditioning import ReturnScale
from offline_lmrl.tokens.rendering import Renderer
from offline_lmrl.tokens.tokenizers import train_tokenizer

RENDERER = Renderer(train_tokenizer(["move left", "move right", "you are at 1, 2"], 270))
SPEC = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128}
LOGS = [Trajectory((Turn("user", "at"), Turn("assistant", "go", reward=float(r)))) for r in range(5)]  # bins 0..4
HISTORIES = [[Turn("user", "you are at 1, 2")], [Turn("user", "move")]]


def conditioned(heads=True, logs=LOGS, **block):
    """Weights far from uniform, so that mistakes show."""
    model = as_guided(build_model(SPEC, RENDERER.tokenizer))
    if heads:
        add_value_heads(model, ValueHeadsConfig("linear"))
    scale = ReturnScale.fit(logs, per=block.pop("per", "global"))
    block = {
        "condition": "embedding",
        "bins": scale.bins,
        "discount_per_turn": 1.0,
        "scale": scale.to_dict(),
        "opening": list(RENDERER.agent_opening),
    } | block
    add_returns(model, block)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


MODEL = conditioned()
NULL = len(RENDERER.tokenizer)


def policy(model=MODEL, window=None, **decoding):
    return LanguagePolicy(model, RENDERER, DecodingConfig(**{"max_new_tokens": 5} | decoding), **window or {})


def prompts_of(monkeypatch, player):
    """The return_tokens that each reply was told, read off what the sampler is given."""
    told = []
    sample = player.sampler.sample

    def spy(prompts, *args):
        told.append([[token - NULL for token in prompt if token >= NULL] for prompt in prompts])
        return sample(prompts, *args)

    monkeypatch.setattr(player.sampler, "sample", spy)
    return told


def play(player, rewards, fresh=False, asked=None):
    """Two rows, one turn per reward; fresh: every turn gets a new session, so nothing is cached or remembered."""
    histories = [list(history) for history in HISTORIES]
    session = player.start([5, 6], asked)
    everything = []
    for reward in rewards:
        if fresh:
            drawn, session = session.drawn, player.start([5, 6], asked)
            session.drawn = drawn
        replies = session.reply([0, 1], histories)
        for history, reply in zip(histories, replies, strict=True):
            history += [Turn("assistant", reply.text, None, reward, reply.token_ids), Turn("user", "left")]
        everything += replies
    return everything


def test_the_ask_goes_down_with_every_reward_and_past_return_ids_stay(monkeypatch):
    player = policy(ask=4.0)
    told = prompts_of(monkeypatch, player)
    play(player, [1.0, None, 2.0, 0.0])
    # bins of 4, 3, 3, 1 are 4, 3, 3, 1; null is 0, so bin b shows as b + 1
    assert [turn[0] for turn in told] == [[5], [5, 4], [5, 4, 4], [5, 4, 4, 2]]
    assert [turn[1] for turn in told] == [turn[0] for turn in told]


def test_rows_have_asks_of_their_own(monkeypatch):
    player = policy(ask=4.0)
    told = prompts_of(monkeypatch, player)
    play(player, [1.0, 0.0], asked=["p50", None])
    assert told == [[[3], [0]], [[3, 2], [0, 0]]]


def test_return_ids_stay_when_an_old_reward_is_revised_and_follows_the_ask_in_a_new_session(monkeypatch):
    player = policy(ask=4.0)
    told = prompts_of(monkeypatch, player)
    history = [Turn("user", "move")]
    session = player.start([1])
    for reward in (1.0, 1.0):
        session.reply([0], [history])
        history = [*history, Turn("assistant", "go", reward=reward), Turn("user", "left")]
    history[1] = Turn("assistant", "go", reward=3.0)
    session.reply([0], [history])
    player.start([1]).reply([0], [history])
    assert [turn[0] for turn in told[2:]] == [[5, 4, 3], [5, 2, 1]]


@pytest.mark.parametrize("form", [{}, {"condition_scale": 1.0}, {"beta": 1.0, "ask": "auto"}], ids=str)
@pytest.mark.parametrize("window", [{}, {"context": 1}, {"context": 2}], ids=str)
def test_caches_and_memory_change_nothing(form, window):
    player = policy(window=window, **{"ask": 4.0} | form)
    fresh = play(player, [1.0, 0.0, 2.0], fresh=True)
    if form.get("ask") != "auto":  # which a new session would have to guess for past turns
        for cached, uncached in zip(play(player, [1.0, 0.0, 2.0]), fresh, strict=True):
            assert cached.token_ids == uncached.token_ids
            assert_close(torch.tensor(cached.log_prob), torch.tensor(uncached.log_prob), atol=1e-4, rtol=0)
    session = player.start([5, 6])
    both = session.reply([1, 0], HISTORIES[::-1])
    assert [reply.token_ids for reply in both[::-1]] == [reply.token_ids for reply in fresh[:2]]


@torch.no_grad()
def expected_log_probs(prompt, reply, w, beta, temperature, top_k, support):
    """The formula spelt out for every token of a reply, with uncached forwards of both rows; and log π(·|ask)."""
    null = [min(token, NULL) for token in prompt]
    guided, unguided = [], []
    for n, token in enumerate(reply):
        ids = torch.tensor([[*row, *reply[:n]] for row in (prompt, null)])
        outputs, hidden = MODEL.forward_with_hidden(input_ids=ids)
        told, plain = outputs.logits[:, -1].log_softmax(-1)
        filtered = plain if w or beta else told
        keep = filtered.exp() >= support * filtered.exp().max()
        keep &= filtered >= filtered.sort(descending=True).values[top_k - 1]
        scores = ((1 + w) * told - w * plain) / temperature + beta * MODEL.q_values(hidden[1, -1]).amin(0)
        guided.append(scores.masked_fill(~keep, -torch.inf).log_softmax(-1)[token])
        unguided.append((told / temperature).log_softmax(-1)[token])
    return torch.stack(guided), torch.stack(unguided)


@pytest.mark.parametrize(
    "w, beta, temperature, top_k, support",
    [
        (0.0, 0.0, 0.7, 9, 0.0),
        (1.5, 0.0, 1.0, NULL, 0.0),
        (0.5, 1.0, 0.6, NULL, 0.01),
        (0.0, 2.0, 1.0, 7, 0.0),
        (2.0, -0.5, 1.3, 12, 0.02),
    ],
)
def test_guidance_is_the_formula_on_both_rows(monkeypatch, w, beta, temperature, top_k, support):
    player = policy(ask=4.0, condition_scale=w, beta=beta, temperature=temperature, top_k=top_k, support=support)
    prompts, sample = [], player.sampler.sample
    monkeypatch.setattr(player.sampler, "sample", lambda given, *rest: prompts.extend(given) or sample(given, *rest))
    replies = play(player, [1.0, 1.0])
    for prompt, reply in zip(prompts, replies, strict=True):
        expected, policy_log_prob = expected_log_probs(prompt, reply.token_ids, w, beta, temperature, top_k, support)
        assert_close(torch.tensor(reply.log_prob), expected, atol=1e-4, rtol=0)
        assert_close(torch.tensor(reply.policy_log_prob), policy_log_prob, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "form, streams",
    [
        ({"ask": 4.0}, 1),
        ({"condition_scale": 1.0}, 1),
        ({"ask": 4.0, "condition_scale": 1.0}, 2),
        ({"ask": 4.0, "beta": 1.0}, 2),
        ({"beta": 1.0}, 1),
    ],
)
def test_rows_are_read_twice_only_where_a_return_is_told_and_something_guides(monkeypatch, form, streams):
    player, rows = policy(**form), []
    forward = player.sampler.cached_model.forward
    monkeypatch.setattr(
        player.sampler.cached_model, "forward", lambda ids, *rest: rows.append(len(ids)) or forward(ids, *rest)
    )
    play(player, [1.0])
    assert rows[0] == 2 * streams


def test_more_guidance_moves_replies_further_from_the_plain_policy():
    def distance(w):
        replies = play(policy(ask=4.0, condition_scale=w, max_new_tokens=12), [0.0, 0.0])
        return sum(sum(reply.log_prob) - sum(reply.policy_log_prob) for reply in replies)

    assert distance(0.0) == pytest.approx(0.0, abs=1e-4)
    assert distance(4.0) > 0.1


def test_no_reserved_id_is_ever_drawn():
    player = policy(ask=4.0, temperature=3.0, condition_scale=0.5, max_new_tokens=64)
    histories = HISTORIES * 100
    replies = player.start(range(200)).reply(range(200), histories)
    drawn = [token for reply in replies for token in reply.token_ids]
    assert len(drawn) > 10_000 and max(drawn) < NULL


# The best Q of the state as the ask


@torch.no_grad()
def best_q(model, prompt):
    """Of the tokens with at least .02 of the likeliest one's probability, the best smaller Q."""
    outputs, hidden = model.forward_with_hidden(input_ids=torch.tensor([prompt]))
    probability = outputs.logits[0, -1].softmax(-1)
    return max(
        min(head[token].item() for head in model.q_values(hidden[0, -1]))
        for token in range(len(probability))
        if probability[token] >= 0.02 * probability.max()
    )


def test_auto_asks_once_for_the_best_q_where_no_return_is_told_and_then_takes_off_what_is_earned(monkeypatch):
    scale = {"shift": 0.5, "scale": 10.0, "scored_turns": 2}
    monkeypatch.setitem(MODEL.config.offline_lmrl, "reward_scale", scale)
    session = policy(ask="auto").start([5])
    history = list(HISTORIES[0])
    read = [*RENDERER.preamble_of(()), *RENDERER.encode_turn(history[0]).ids, NULL, *RENDERER.agent_opening]
    best = best_q(MODEL, read) * 10 + 0.5 * 2  # 2 scored turns, each shifted by .5
    for reward in (1.0, -3.0, 0.0):
        (reply,) = session.reply([0], [history])
        history += [Turn("assistant", reply.text, None, reward, reply.token_ids), Turn("user", "left")]
    assert session.requests.used[0] == pytest.approx([best, best - 1, best + 2], abs=1e-3)
    assert session.labels(0)["ask"] == pytest.approx(best, abs=1e-3)


def test_what_the_policy_would_hardly_say_is_no_candidate_for_the_best_q():
    player = policy()
    hidden = torch.eye(player.model.config.n_embd)[:2]
    q = reduce_q(player.model.q_values(hidden), "min")
    logits = torch.full_like(q, -100.0)
    logits[:, 7], logits[:, 3], logits[:, 5] = 0.0, math.log(0.021), math.log(0.019)
    expected = torch.maximum(q[:, 7], q[:, 3])  # 5 is below .02 of the best, whatever its Q
    assert_close(RequestValues(player).head_of("auto")(hidden, logits), expected, rtol=0, atol=0)


def test_a_history_that_was_changed_is_read_anew(monkeypatch):
    session = policy(ask="auto").start([5])
    read, values = [], LanguageSession._values
    monkeypatch.setattr(LanguageSession, "_values", lambda *args: read.append(values(*args)[0]) or read[-1:])
    first = [Turn("user", "move"), Turn("assistant", "go", reward=2.0), Turn("user", "left")]
    other = [Turn("user", "left"), Turn("assistant", "on", reward=1.0), Turn("user", "move")]
    session.reply([0], [first[:1]])
    session.reply([0], [first])
    session.reply([0], [other])
    assert read[0] is not None and read[1] is None
    assert session.requests.used[0] == pytest.approx([read[2] + 1.0, read[2]])


def test_auto_with_a_run_asks_for_the_best_q_that_this_run_sees(tmp_path, monkeypatch):
    torch.manual_seed(7)
    critic = add_value_heads(build_model({**SPEC, "n_embd": 8}, RENDERER.tokenizer), ValueHeadsConfig(kind="mlp"))
    for parameter in critic.value_heads.parameters():
        torch.nn.init.normal_(parameter)
    critic.config.offline_lmrl |= {
        "reward_scale": {"shift": 0.0, "scale": 3.0, "scored_turns": 0},
        "window": {"context": 1, "stride": 1, "max_length": 32},
    }
    critic.eval().save_pretrained(tmp_path / "critic")
    RENDERER.tokenizer.save_pretrained(tmp_path / "critic")
    player = policy(conditioned(heads=False), ask=f"auto:{tmp_path / 'critic'}")
    session = player.start([5])
    said = Turn("assistant", "go", reward=1.0)
    session.reply([0], [[Turn("user", "move"), said, Turn("user", "left")]])
    seen = RENDERER.encode_turn(Turn("user", "left")).ids  # context 1
    expected = 3 * best_q(critic, [*RENDERER.preamble_of(()), *seen, *RENDERER.agent_opening])
    assert session.requests.used[0] == pytest.approx([expected + 1, expected], abs=1e-3)
    conditioned(heads=False).save_pretrained(tmp_path / "plain")
    RENDERER.tokenizer.save_pretrained(tmp_path / "plain")
    with pytest.raises(InputError, match="plain: found a model without value heads, expected one that has them"):
        policy(conditioned(heads=False), ask=f"auto:{tmp_path / 'plain'}")
    monkeypatch.setattr(policies, "load_value_model", None)
    player.with_decoding(temperature=0.0).start([5]).reply([0], HISTORIES[:1])  # it is loaded once


def test_a_critic_that_counts_turns_otherwise_is_named_once_and_one_behind_demonstrations_refused(tmp_path, caplog):
    critic = add_value_heads(build_model({**SPEC, "n_embd": 8}, RENDERER.tokenizer), ValueHeadsConfig())
    critic.config.offline_lmrl |= {"step_rule": {"discount_per_turn": 0.9}}
    critic.save_pretrained(tmp_path / "critic")
    RENDERER.tokenizer.save_pretrained(tmp_path / "critic")
    player = policy(ask=f"auto:{tmp_path / 'critic'}")
    player.with_decoding(temperature=0.0).start([5]).reply([0], HISTORIES[:1])
    (said,) = [record.message for record in caplog.records if "discount_per_turn" in record.message]
    assert said.startswith("ask: found discount_per_turn 0.9 in the run ") and "expected the model's 1: " in said
    caplog.clear()
    policy(conditioned(discount_per_turn=0.9), ask=f"auto:{tmp_path / 'critic'}")
    assert not caplog.records
    critic.config.offline_lmrl |= {"few_shot": {"n": 1}}
    critic.save_pretrained(tmp_path / "critic")
    shown = "value_model: found a model trained with few-shot demonstrations, expected one trained without"
    with pytest.raises(InputError, match=shown):
        policy(ask=f"auto:{tmp_path / 'critic'}")
    with pytest.raises(InputError, match="value_model: found a model trained with few-shot demonstrations"):
        load_scorer({"kind": "value_heads", "run": str(tmp_path / "critic"), "device": "cpu"})
    with pytest.raises(InputError, match="value_model: found a model trained with few-shot demonstrations"):
        PlannerConfig(scorer=str(tmp_path / "critic")).planner(policy())


def test_auto_explains_an_unknown_past_by_its_rewards():
    session = policy(ask="auto").start([5])
    history = [Turn("user", "move"), Turn("assistant", "go", reward=2.0), Turn("user", "left")]
    session.reply([0], [history])
    then, now = session.requests.used[0]
    assert then == pytest.approx(now + 2.0)


def test_an_expert_asks_for_the_return_that_the_heads_expect_where_none_is_told(monkeypatch):
    bins = {name: {"edges": [0.5], "means": [0.0, 1.0]} for name in ("returns", "reward", "after", "ended")}
    model = add_return_heads(conditioned(), bins | {"discount_per_turn": 1.0})
    torch.nn.init.normal_(model.return_heads.returns.weight)
    monkeypatch.setitem(model.config.offline_lmrl, "reward_scale", {"shift": 0.0, "scale": 4.0, "scored_turns": 0})
    read = [*RENDERER.preamble_of(()), *RENDERER.encode_turn(HISTORIES[0][0]).ids, NULL, *RENDERER.agent_opening]
    _, hidden = model.forward_with_hidden(input_ids=torch.tensor([read]))
    high = model.return_heads.returns(hidden[:, -1]).softmax(-1)[0, 1].item()
    session = policy(model).start([5, 6, 7, 8], ["expert:0", "expert:2.5", "auto", 1.0])
    session.reply([0, 1, 2, 3], [HISTORIES[0]] * 4)
    preferred = high * math.exp(2.5)
    asked = [session.requests.used[row][0] for row in range(4)]
    assert asked[:2] == pytest.approx([4 * high, 4 * preferred / (1 - high + preferred)], abs=1e-3)
    assert asked[2] != asked[0] and asked[3] == 1.0


# generate


def plain_prompt(history):
    ids = [*RENDERER.preamble_of(()), *(token for turn in history for token in RENDERER.encode_turn(turn).ids)]
    return [*ids, *RENDERER.agent_opening]


def generate(model, prompts, **options):
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    options = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": RENDERER.close_id, "pad_token_id": 0} | options
    output = model.generate(input_ids=ids, attention_mask=mask, **options)
    assert torch.equal(output[:, :width], ids.repeat_interleave(len(output) // len(ids), 0))
    return output[:, width:].tolist()


def test_generate_equals_the_sampler(monkeypatch):
    # Earlier turns that earned nothing are told the same return by both.
    histories = [[*HISTORIES[0], Turn("assistant", "go", reward=0.0), Turn("user", "left")], HISTORIES[1]]
    prompts = list(map(plain_prompt, histories))
    for asked in ([4.0, 1.0], ["max", "p0"]):
        session = policy(temperature=0.0, max_new_tokens=6).start([0, 1], asked)
        replies = [list(reply.token_ids) for reply in session.reply([0, 1], histories)]
        for row, reply in zip(generate(MODEL, prompts, ask=asked), replies, strict=True):
            assert row[: len(reply)] == reply
    monkeypatch.setitem(MODEL.config.offline_lmrl, "decoding", {"ask": 4.0})
    assert generate(MODEL, prompts) == generate(MODEL, prompts, ask=4) == generate(MODEL, prompts, ask=[4.0, 4.0])
    generate(MODEL, prompts, repetition_penalty=1.1)  # which looks up scores by id


def test_generate_refuses_what_it_cannot_tell():
    prompt = plain_prompt(HISTORIES[0])
    with pytest.raises(InputError, match="prompt: found .* at its end, expected the ids of the agent's opening"):
        generate(MODEL, [prompt[:-1]], ask=1.0)
    with pytest.raises(InputError, match="expected both to be 0: generate runs one pass"):
        generate(MODEL, [prompt], ask=1.0, beta=2.0)
    for wrong in (float("nan"), "auto"):
        with pytest.raises(InputError, match="ask: found"):
            generate(MODEL, [prompt], ask=wrong)
    with pytest.raises(InputError, match="ask: found 1.0, expected None, as this model has no return embedding"):
        generate(as_guided(build_model(SPEC, RENDERER.tokenizer)), [prompt], ask=1.0)


# What the table shows


class Paying:
    """Two turns; whatever is said pays 1."""

    def reset(self, seed):
        self.left = 2
        return HISTORIES[0]

    def step(self, text):
        self.left -= 1
        return StepResult([Turn("user", "left")] if self.left else [], 1.0, not self.left, False)


def test_a_rollout_says_what_was_asked_and_an_ask_beyond_the_data_is_said_once(caplog, monkeypatch):
    asks._WARNED.clear()
    with caplog.at_level(logging.WARNING):
        played = rollout(policy(ask=9.0), Paying, range(3), batch_size=2)
    assert [{name: t.labels[name] for name in ("ask", "bin", "clipped")} for t in played] == [
        {"ask": 9.0, "bin": 4, "clipped": True}
    ] * 3
    assert [record.message for record in caplog.records] == [
        "ask: found 9, expected 0 to 4, the returns in the training data; the nearest bin, 4 of 0 to 4, is requested "
        "instead"
    ]
    caplog.clear()
    values = iter([7.0, 8.0, 9.0])
    monkeypatch.setattr(LanguageSession, "_values", lambda session, rows, histories: [next(values) for _ in rows])
    policy(ask="auto").start([1, 2, 3]).reply([0, 1, 2], HISTORIES[:1] * 3)
    (said,) = caplog.records  # a value per state, but one line
    assert said.message.startswith("ask: found 7 for auto, expected 0 to 4")
    monkeypatch.undo()
    (inside,) = rollout(policy(ask="max"), Paying, [0])
    assert (inside.labels["ask"], inside.labels["bin"], inside.labels["clipped"]) == (4.0, 4, False)
    assert "ask" not in rollout(policy(), Paying, [0])[0].labels


def test_an_ask_for_the_usual_return_is_said_once(caplog):
    asks._WARNED.clear()
    logs = [Trajectory((Turn("user", "move"), Turn("assistant", "go", reward=r))) for r in [0.0] * 19 + [5.0]]
    player = policy(conditioned(logs=logs), ask="p90")
    player.with_decoding(temperature=0.0).start([1, 2], ["p90", "max"]).reply([0, 1], HISTORIES[:1] * 2)
    assert [record.message for record in caplog.records] == [
        "ask: found p90, the return 0, which is in the same bin as the median of the training data, "
        "expected a return in a higher bin; the best return is 5 (ask: max)"
    ]


# What is refused


def test_asks_and_forms_that_the_model_cannot_serve_are_refused():
    plain, textual = as_guided(build_model(SPEC, RENDERER.tokenizer)), conditioned(condition="text", text="{bin}")
    for model, form, message in (
        (plain, {"ask": 1.0}, "ask: found 1.0, expected null.*not trained with returns"),
        (plain, {"condition_scale": 1.0}, "condition_scale: found 1.0, expected 0"),
        (textual, {"ask": 1.0, "condition_scale": 1.0}, "condition_scale: found 1.0, expected 0"),
        (conditioned(heads=False), {"ask": "auto"}, "ask: found 'auto', but this model has no value heads"),
        (conditioned(), {"ask": "expert:3"}, "ask: found 'expert:3', but this model has no return heads"),
    ):
        with pytest.raises(InputError, match=message):
            policy(model, **form)
    for wrong in (float("nan"), "p101", True):
        with pytest.raises(InputError, match="ask: found"):
            DecodingConfig(ask=wrong)
    with pytest.raises(InputError, match="ask: found 'most'"):
        policy().start([1], ["most"])


def test_returns_per_task_need_the_task(tmp_path):
    logs = [Trajectory(t.turns, task=task) for task in ("a", "b") for t in LOGS]
    model = conditioned(logs=logs, per="task")
    with pytest.raises(InputError, match="task: found '', expected a task of the training data"):
        policy(model, ask="max")
    player = LanguagePolicy(model, RENDERER, DecodingConfig(ask="max", max_new_tokens=2), task="b")
    play(player, [1.0])
    model.config.offline_lmrl |= {"decoding": {"ask": "max"}}
    model.save_pretrained(tmp_path)
    RENDERER.tokenizer.save_pretrained(tmp_path)
    assert (
        load_value_model(tmp_path).decoding.ask is None
    )  # values are read where nothing is asked for, of whatever task


def test_returns_as_text_are_read_in_the_same_place(monkeypatch):
    player = policy(conditioned(condition="text", text="{bin} of {bins} "), ask=4.0)
    prompts, sample = [], player.sampler.sample
    monkeypatch.setattr(player.sampler, "sample", lambda given, *rest: prompts.extend(given) or sample(given, *rest))
    play(player, [3.0, 0.0])
    text = RENDERER.tokenizer.decode(prompts[2])
    assert text.index("5 of 5 ") < text.index("2 of 5 ") and len(prompts[2]) > len(prompts[0])
