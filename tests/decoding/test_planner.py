"""Planning: equal to sampling where nothing is to choose, scores by hand, caches, scorers, and what is refused."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from offline_lmrl.decoding import planner as planning
from offline_lmrl.decoding import policy as policies
from offline_lmrl.decoding.config import PlannerConfig
from offline_lmrl.decoding.planner import Planner, PlannerSession, ValueModelScorer
from offline_lmrl.decoding.policy import SAMPLE_STRIDE, LanguagePolicy
from offline_lmrl.decoding.sampler import DecodingConfig
from offline_lmrl.errors import InputError
from offline_lmrl.logs.scale import RewardScale
from offline_lmrl.logs.trajectory import Trajectory, Turn
from offline_lmrl.models.guided import add_return_heads, add_returns, add_value_heads
from offline_lmrl.models.loading import build_model
from offline_lmrl.models.value_heads import ValueHeadsConfig
from offline_lmrl.tokens.batching import WindowDataset, encode_trajectories
from offline_lmrl.tokens.conditioning import ReturnScale
from offline_lmrl.tokens.episodes import EpisodeEncoder, StepRule
from offline_lmrl.tokens.rendering import Renderer
from offline_lmrl.tokens.tokenizers import train_tokenizer

RENDERER = Renderer(train_tokenizer(["move left", "move right", "you are at 1, 2"], 270))
SPEC = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128}
LOGS = [Trajectory((Turn("user", "at"), Turn("assistant", "go", reward=float(r)))) for r in range(5)]
HISTORIES = [[Turn("user", "you are at 1, 2")], [Turn("user", "move")]]
BINS = {
    "returns": {"edges": [0.5], "means": [0.0, 1.0]},
    "reward": {"edges": [0.1, 0.5], "means": [0.0, 0.3, 1.0]},
    "after": {"edges": [0.5], "means": [0.0, 1.0]},
    "ended": {"edges": [], "means": [0.0]},
    "discount_per_turn": 0.5,
}


def planning_model(heads=True):
    """Weights far from uniform, so that mistakes show."""
    model = add_value_heads(build_model(SPEC, RENDERER.tokenizer), ValueHeadsConfig("linear"))
    scale = ReturnScale.fit(LOGS)
    add_returns(
        model,
        {
            "condition": "embedding",
            "bins": scale.bins,
            "discount_per_turn": 1.0,
            "scale": scale.to_dict(),
            "opening": list(RENDERER.agent_opening),
        },
    )
    if heads:
        add_return_heads(model, BINS)
    model.config.offline_lmrl["reward_scale"] = {"shift": 0.0, "scale": 2.0, "scored_turns": 0}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


MODEL = planning_model()


def policy(model=MODEL, context=None, stride=1, few_shot=None, **decoding):
    form = DecodingConfig(**{"max_new_tokens": 4, "top_k": 5} | decoding)
    return LanguagePolicy(model, RENDERER, form, context=context, stride=stride, few_shot=few_shot)


def play(player, turns=2):
    """Two rows; all replies, and the histories that they led to."""
    histories, said = [list(history) for history in HISTORIES], []
    session = player.start([5, 6])
    for _ in range(turns):
        replies = session.reply([0, 1], histories)
        for history, reply in zip(histories, replies, strict=True):
            history += [Turn("assistant", reply.text, None, 1.0, reply.token_ids), Turn("user", "left")]
        said += replies
    return said, histories, session


class Fixed:
    """Return heads that always say the same."""

    def __init__(self, *outcome):
        self.said = torch.tensor(outcome)

    def outcome(self, closing):
        return self.said.expand(len(closing), 3)


@pytest.mark.parametrize("depth", [1, 2])
def test_one_beam_with_one_proposal_says_what_the_policy_says(depth):
    replies, histories, _ = play(policy())
    planned, _, _ = play(Planner(policy(ask="max"), width=1, expand=1, depth=depth))
    assert [reply.token_ids for reply in planned] == [reply.token_ids for reply in replies]
    assert_close(planned[3].log_prob, replies[3].log_prob)
    assert len({reply.token_ids for reply in replies}) > 1


@pytest.mark.parametrize("depth, score", [(1, 6.0), (2, 5.0), (3, 4.5)])
def test_a_plan_is_worth_what_its_turns_pay_and_what_follows_the_last(depth, score):
    planner = Planner(policy(), width=2, expand=2, depth=depth)
    # unit 2, discount 1/2: 2 · (1 + 4/2) = 6, 2 · 1 + 1/2 · 6 = 5, 2 · 1 + 1/2 · 2 · 1 + 1/4 · 6 = 4.5
    planner.heads = Fixed(1.0, 4.0, 0.0)
    _, _, session = play(planner, turns=1)
    assert session.labels(0)["scores"] == [pytest.approx(score)]


def test_nothing_is_imagined_behind_the_end_of_an_episode():
    planner = Planner(policy(), width=2, expand=2, depth=3)
    planner.heads = Fixed(1.0, 4.0, 1.0)
    planner.environment = None
    _, _, session = play(planner, turns=1)
    assert session.labels(1)["scores"] == [pytest.approx(6.0)]


def test_the_best_of_the_different_proposals_is_said_as_an_uncached_pass_scores_it():
    player = policy()
    (reply, _), _, session = play(Planner(player, expand=8), turns=1)
    drawn = [player.start([5 + number * SAMPLE_STRIDE]).reply([0], HISTORIES[:1])[0] for number in range(8)]
    rated = {}
    for one in drawn:
        ids = [*player.null_window(HISTORIES[0], 5), *one.token_ids]
        _, hidden = MODEL.forward_with_hidden(input_ids=torch.tensor([ids]))
        reward, after, _ = MODEL.return_heads.outcome(hidden[:, -1])[0].tolist()
        rated.setdefault(one.text, 2 * (reward + 0.5 * after))
    assert len(rated) > 2
    assert reply.text == max(rated, key=rated.get)
    assert session.scores[0] == [pytest.approx(rated[reply.text], abs=1e-4)]


@pytest.mark.parametrize("context", [None, 2])
def test_caches_change_no_plan(monkeypatch, context):
    cached, _, with_caches = play(Planner(policy(context=context), width=2, expand=3, depth=2))
    monkeypatch.setattr(planning, "CACHE_BYTES", 0)
    fresh, _, without = play(Planner(policy(context=context), width=2, expand=3, depth=2))
    assert [reply.token_ids for reply in cached] == [reply.token_ids for reply in fresh]
    assert_close(torch.tensor(with_caches.scores[0]), torch.tensor(without.scores[0]), atol=1e-4, rtol=0)


def spy(monkeypatch, sampler):
    """Records the prompts that a sampler is given, one list per call."""
    fed, sample = [], sampler.sample
    monkeypatch.setattr(
        sampler,
        "sample",
        lambda prompts, *args, **more: (fed.append(list(prompts)), sample(prompts, *args, **more))[1],
    )
    return fed


@pytest.mark.parametrize("context, stride, prompt", [(1, 1, None), (2, 1, LOGS[3:4]), (None, 1, None), (4, 2, None)])
@pytest.mark.parametrize("imaginations", [1, 2, 3])
def test_what_is_imagined_is_read_after_the_same_ids_as_in_training(
    monkeypatch, context, stride, prompt, imaginations
):
    player = policy(context=context, stride=stride, few_shot=prompt)
    planner = Planner(player, width=1, expand=1, depth=imaginations + 1)
    planner.heads = Fixed(0.0, 0.0, 0.0)
    proposed, imagined = spy(monkeypatch, player.sampler), spy(monkeypatch, planner.environment("user"))
    plans, score = [], PlannerSession._score
    monkeypatch.setattr(
        PlannerSession,
        "_score",
        lambda self, beams, *rest: (plans.append(beams[0].turns), score(self, beams, *rest))[1],
    )
    past = [turn for i in range(2) for turn in (Turn("user", f"at {i}"), Turn("assistant", "move left"))]
    planner.start([5]).reply([0], [[*past, Turn("user", "you are at 1, 2")]])

    plan = Trajectory(tuple(plans[-1]), labels={"tokenizer": RENDERER.fingerprint})
    assert len(plan.turns) == 6 + 2 * imaginations and len(imagined) == imaginations
    encoder = EpisodeEncoder(
        RENDERER, player.window, StepRule(), RewardScale(), player.return_tokens.nulls, replies=True
    )
    encoded = encode_trajectories([plan], encoder, Counter(), [player.shared_few_shot.without_returns])
    batch = WindowDataset(encoded, 0, next_rows=False, end_rows=False, replies=True).batch(
        range(len(encoded.lists["turns"][1]) - 1)
    )
    states = list(zip(*(batch["environment"][name].tolist() for name in ("row", "state")), strict=True))
    replies = [(row, state) for row, state in states if (row, state - 1) not in states]
    own = sorted({*zip(*(batch["steps"][name].tolist() for name in ("row", "open_state")), strict=True)})
    for fed, places in ((imagined, replies[2:]), (proposed, own[2:])):
        assert [call[0] for call in fed] == [batch["input_ids"][row, : at + 1].tolist() for row, at in places]


def test_a_plan_ends_before_a_reply_that_max_length_cannot_hold(caplog):
    player = LanguagePolicy(MODEL, RENDERER, DecodingConfig(max_new_tokens=4, top_k=5), max_length=9)
    assert player.null_reply_window([Turn("user", "at"), Turn("assistant", "1, 2, 1, 2")], "user", 4) is None
    planner = Planner(player, width=2, expand=2, depth=3)
    planner.heads = Fixed(1.0, 4.0, 0.0)
    for seed in range(4):
        session = planner.start([seed])
        session.reply([0], [[Turn("user", "at")]])
        assert session.labels(0)["scores"] == [pytest.approx(6.0)]  # of one turn, as with depth 1
    assert caplog.text.count("planner: some plans end before the environment's next reply") == 1


def test_a_scorer_decides_and_sees_what_comes_before_the_reply():
    seen = []

    class Longest:
        def score(self, context, options):
            seen.append([(turn.role, turn.is_trainable) for turn in context])
            return np.array([float(len(option[0].content)) for option in options])

    player = policy(planning_model(heads=False))
    planned, _, _ = play(Planner(player, Longest(), expand=6), turns=1)
    texts = [player.start([5 + number * SAMPLE_STRIDE]).reply([0], HISTORIES[:1])[0].text for number in range(6)]
    assert len(planned[0].text) == max(map(len, texts))
    assert seen[0] == [("user", False)]


def test_a_critic_rates_a_reply_by_the_smaller_q_of_its_closing_token():
    critic = policy()
    context = [*HISTORIES[0], Turn("assistant", "go", False), Turn("user", "left")]
    scores = ValueModelScorer(critic).score(context, [[Turn("assistant", "move")], [Turn("assistant", "1")]])
    trained = [*HISTORIES[0], Turn("assistant", "go"), Turn("user", "left")]
    for score, text in zip(scores, ("move", "1"), strict=True):
        ids = [*critic.null_window(trained, 5), *RENDERER.encode_content(text)]
        _, hidden = MODEL.forward_with_hidden(input_ids=torch.tensor([ids]))
        q = MODEL.q_values(hidden[:, -1])[:, 0, RENDERER.close_id]
        assert score == pytest.approx(2 * q.min().item(), abs=1e-4)


def test_options_restrict_what_is_said():
    options = [["move left", "move right"], ["left"]]
    session = Planner(policy(max_new_tokens=8), width=2, expand=4, depth=2).start([5, 6])
    replies = session.reply([0, 1], HISTORIES, options)
    assert replies[0].text in options[0] and replies[1].text == "left"


def test_planned_tokens_are_all_that_was_drawn():
    _, _, session = play(Planner(policy(stop=(), max_new_tokens=1), width=1, expand=3, depth=2), turns=1)
    assert session.labels(0)["planned_tokens"] == 3 + 1 + 3  # proposals, the environment's reply, proposals


def test_settings_name_what_rates_the_plans(monkeypatch):
    critic, loaded = policy(), []
    monkeypatch.setattr(policies, "load_value_model", lambda run, device: loaded.append((run, device)) or critic)
    made = PlannerConfig(3, 2, 1, "runs/ilql").planner(policy())
    assert (made.width, made.expand, made.depth, made.scorer.value_model.model) == (3, 2, 1, MODEL)
    assert PlannerConfig().planner(policy()).scorer is None and loaded == [("runs/ilql", MODEL.device)]


def test_greedy_proposals_are_refused_where_there_are_several():
    with pytest.raises(InputError, match="temperature: found 0, expected above 0"):
        Planner(policy(temperature=0.0), expand=2)
    Planner(policy(temperature=0.0), expand=1)


def test_a_model_without_return_heads_and_settings_out_of_range_are_refused():
    bare = policy(planning_model(heads=False))
    with pytest.raises(InputError, match="found a model without return heads"):
        Planner(bare)
    with pytest.raises(InputError, match="found a model without return heads"):
        Planner(bare, ValueModelScorer(bare), depth=2)
    for name in ("width", "expand", "depth"):
        with pytest.raises(InputError, match=f"{name}: found 0, expected a whole number from 1"):
            Planner(policy(), **{name: 0})
