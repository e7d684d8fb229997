import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from offline_lmrl.decoding.policy import NO_FEW_SHOT, FewShotIds, LanguagePolicy
from offline_lmrl.decoding.sampler import DecodingConfig
from offline_lmrl.environments.rollouts import rollout
from offline_lmrl.errors import InputError
from offline_lmrl.evaluation.offline import guidance_by_beta, measure_logs, show
from offline_lmrl.evaluation.offline_report import (
    calibration,
    evaluate_offline,
    ranking_accuracy,
    value_ranking,
)
from offline_lmrl.logs.io import write_trajectories
from offline_lmrl.logs.trajectory import Trajectory, Turn
from offline_lmrl.models.guided import add_value_heads
from offline_lmrl.models.loading import build_model
from offline_lmrl.models.step_outputs import States
from offline_lmrl.models.value_heads import ValueHeadsConfig
from offline_lmrl.tasks.corridor import Corridor
from offline_lmrl.tokens.few_shot import FewShotConfig, few_shot_ids
from offline_lmrl.tokens.rendering import Renderer
from offline_lmrl.tokens.tokenizers import train_tokenizer
from offline_lmrl.tokens.windows import WindowRule

TOKENIZER = train_tokenizer(["a b"], 300)
RENDERER = Renderer(TOKENIZER)
A, B = RENDERER.encode_content("a")[0], RENDERER.encode_content("b")[0]
OPENING, CLOSE = RENDERER.agent_opening[-1], RENDERER.close_id


class Table(torch.nn.Module):
    """A model that looks at the last token alone: π(a) = 3/4, π(b) = 1/4 to begin with, then the turn closes.

    Q is 1 for a, 3 for b, 2 for closing; V is 1.5. Hidden states are one-hot rows of the last token.
    """

    device = torch.device("cpu")
    value_heads = True

    def __init__(self, heads=True, scale=1.0):
        super().__init__()
        self.config = SimpleNamespace(offline_lmrl={"reward_scale": {"shift": 0.0, "scale": scale}})
        if not heads:
            self.value_heads = None
        prob = torch.zeros(len(TOKENIZER), len(TOKENIZER))
        prob[OPENING, [A, B]] = torch.tensor([0.75, 0.25])
        prob[[A, B], CLOSE] = 1.0
        self.head = torch.nn.Linear(*prob.shape, bias=False)
        self.head.weight.data = (prob + 1e-30).log().T

    def get_output_embeddings(self):
        return self.head

    def forward_with_hidden(self, input_ids, attention_mask, use_cache):
        hidden = torch.nn.functional.one_hot(input_ids, len(TOKENIZER)).float()
        return SimpleNamespace(logits=self.head(hidden)), hidden

    def q_values(self, hidden, candidates=None):
        q = torch.zeros(2, len(hidden), len(TOKENIZER))
        q[:, :, [A, B, CLOSE]] = torch.tensor([1.0, 3.0, 2.0])
        q[1] += 0.5  # the minimum of the heads is the first
        return q if candidates is None else q.gather(-1, candidates.expand(2, -1, -1))

    def v_values(self, hidden):
        return torch.full(hidden.shape[:1], 1.5)


def table_policy(heads=True, scale=1.0, **decoding):
    return SimpleNamespace(
        model=Table(heads, scale),
        renderer=RENDERER,
        window=WindowRule(),
        few_shot=None,
        return_tokens=None,
        spec=FewShotConfig(),
        shared_few_shot=NO_FEW_SHOT,
        decoding=DecodingConfig(**decoding),
    )


def said(text, reward, group="g", terminated=True):
    return Trajectory((Turn("user", "?"), Turn("assistant", text, reward=reward)), terminated=terminated, group=group)


def test_steps_carry_likelihood_values_and_what_the_log_earned():
    steps = measure_logs(table_policy(scale=10.0), [said("b", 4.0), said("a", 1.0)])
    assert steps.trajectory.tolist() == [0, 0, 1, 1] and steps.token.tolist() == [B, CLOSE, A, CLOSE]
    np.testing.assert_allclose(steps.log_prob, [math.log(0.25), 0.0, math.log(0.75), 0.0], atol=1e-6)
    np.testing.assert_allclose(steps.q, [30.0, 20.0, 10.0, 20.0])  # the model's 3, 2, 1, 2 in reward units
    np.testing.assert_allclose(steps.v, 15.0)
    np.testing.assert_allclose(steps.return_to_go, [4.0, 4.0, 1.0, 1.0], rtol=1e-6)


@pytest.mark.parametrize("source", ["given", "own", "file", "held out"])
def test_logs_are_read_behind_demonstrations(monkeypatch, tmp_path, source):
    policy, read, forward = table_policy(), [], Table.forward_with_hidden
    logs = [replace(said("b", 4.0), task="t"), replace(said("a", 1.0), task="t")]
    shown = logs[::-1] if source == "held out" else [replace(said("a a b", 1.0), task="t")] * 2
    ids = [few_shot_ids([policy.spec.cut(one, None)], RENDERER) for one in shown]
    if source == "own":
        policy.few_shot, policy.shared_few_shot = shown[:1], FewShotIds((), ids[0])
    elif source != "given":  # as the run was trained, but for the rows that it left without a prompt
        write_trajectories(tmp_path / "shown.jsonl", shown[:1])
        policy.spec = FewShotConfig(
            drop=1.0, demonstrations=str(tmp_path / "shown.jsonl") if source == "file" else None
        )
        policy.model.config.offline_lmrl["few_shot"] = {}

    def watched(self, input_ids, attention_mask, use_cache):
        read.extend(row[mask].tolist() for row, mask in zip(input_ids, attention_mask, strict=True))
        return forward(self, input_ids, attention_mask, use_cache)

    monkeypatch.setattr(Table, "forward_with_hidden", watched)
    steps = measure_logs(policy, logs, demonstrations=shown[:1] if source == "given" else None)
    assert steps.token.tolist() == [B, CLOSE, A, CLOSE]
    n = len(RENDERER.preamble_of(()))
    assert [tuple(row[n : n + len(own)]) for row, own in zip(read, ids, strict=True)] == ids
    assert all(len(row) > n + len(own) for row, own in zip(read, ids, strict=True))


def test_what_a_cut_log_would_have_earned_is_not_known():
    steps = measure_logs(table_policy(), [said("b", 4.0, terminated=False)])
    assert np.isnan(steps.return_to_go).all() and calibration(steps) == []


@pytest.mark.parametrize(
    ("beta", "decoding", "kl", "changed"),
    [
        # b : a = 1/3 · exp(2β). β = ln 3 / 2 makes it 1: KL = ½ ln(2/3) + ½ ln 2
        (math.log(3) / 2, {}, 0.5 * math.log(2 / 3) + 0.5 * math.log(2), None),
        # β = ln 3 makes it 3: KL = ¼ ln(1/3) + ¾ ln 3, and b is now the best
        (math.log(3), {}, 0.5 * math.log(3), True),
        # Q − V is −½ and 1½; capped at 0, b : a = 1/3 · exp(½β): β = 2 ln 3 makes it 1
        (2 * math.log(3), {"clip": 0.0}, 0.5 * math.log(2 / 3) + 0.5 * math.log(2), None),
        # only a is left: KL = ln(4/3) whatever β
        (math.log(3), {"support": 0.5}, math.log(4 / 3), False),
        (math.log(3), {"candidates": 1}, math.log(4 / 3), False),
        (0.0, {"candidates": 1}, 0.0, False),  # candidates are for guidance, and there is none
    ],
    ids=["even", "turned", "clip", "support", "candidates", "unguided"],
)
def test_divergence_of_guidance_is_exact(beta, decoding, kl, changed):
    (entry,) = guidance_by_beta(measure_logs(table_policy(**decoding), [said("a", 1.0)], [beta]), [beta])
    assert entry["kl"] == pytest.approx(kl / 2, abs=1e-5)  # the closing token, which is certain, adds 0
    if changed is not None:  # an even choice may fall either way
        assert entry["changed"] == changed / 2


def test_the_distribution_of_each_beta_is_computed_once(monkeypatch):
    computed, distribution = [], States.distribution
    monkeypatch.setattr(States, "distribution", lambda s, form: computed.append(form.beta) or distribution(s, form))
    logs = [said("b", 4.0)]
    steps = measure_logs(table_policy(beta=2.0), logs, [0.0, 1.0, 2.0])
    assert sorted(computed) == [0.0, 1.0, 2.0]
    np.testing.assert_array_equal(steps.acting_log_prob, steps.guided_log_prob[2])
    np.testing.assert_array_equal(steps.unguided_log_prob, steps.guided_log_prob[0])
    computed.clear()
    measure_logs(table_policy(), logs)
    assert computed == [0.0]


def test_calibration_sets_predictions_beside_returns():
    steps = measure_logs(table_policy(), [said("a", 2.0), said("b", 6.0)])
    # Q of a, two closings and b: 1, 2, 2, 3; in two bins: (a, closing of a), (closing of b, b)
    assert calibration(steps, bins=2) == [
        {"q": 1.5, "return_to_go": 2.0, "n": 2},
        {"q": 2.5, "return_to_go": 6.0, "n": 2},
    ]


def test_ranking_counts_the_pairs_of_a_group_in_the_right_order():
    logs = [
        said("b", 1.0, "right"),
        said("a", 0.0, "right"),
        said("b", 0.0, "wrong"),
        said("a", 1.0, "wrong"),
        said("a", 0.0, "tied"),
        said("a", 1.0, "tied"),
        said("b", 1.0, "equal"),
        said("a", 1.0, "equal"),  # equal returns say nothing
        said("b", 0.0, "cut"),
        said("a", 9.0, "cut", terminated=False),
        said("b", 0.0, ""),
        said("a", 9.0, ""),  # rows without a group are not one group
    ]
    accuracy = ranking_accuracy(measure_logs(table_policy(), logs), logs)
    assert accuracy.mean == 0.5 and accuracy.n == 3  # (1 + 0 + ½) / 3
    assert ranking_accuracy(measure_logs(table_policy(), logs[:2]), logs[:2]).mean == 1.0
    assert ranking_accuracy(measure_logs(table_policy(), logs[6:8]), logs[6:8]) is None


def test_turns_and_rows_are_ordered_with_one_reply_per_prompt():
    logs = [said("b", 4.0, "1"), said("a", 1.0, "2"), said("a", 2.0, "3"), said("b", 3.0, "4")]
    twice = Trajectory((*logs[0].turns, *logs[1].turns), group="5")  # b earns 4, then a earns 1
    cut = said("a", 9.0, "6", terminated=False)
    found = value_ranking(measure_logs(table_policy(), [*logs, cut]), [*logs, cut])
    # Σ(Q − V) is 2 of b and 0 of a: of the six pairs, 4 > 1, 4 > 2, 3 > 1 and 3 > 2 are right, two are equal
    assert found["Σ(Q − V) of a turn"].auc.mean == found["Σ(Q − V) of a row"].auc.mean == pytest.approx(5 / 6)
    assert found["Q of a turn"] is found["Q of a row"] is None  # Q of the closing token is always 2
    found = value_ranking(measure_logs(table_policy(), [*logs, twice]), [*logs, twice])
    assert found["Σ(Q − V) of a turn"].correlation.n == 6 and found["Σ(Q − V) of a row"].correlation.n == 5
    assert value_ranking(measure_logs(table_policy(), [cut]), [cut]) == {}


def test_the_report_prints_everything_and_chooses_beta():
    logs = [said("b", 1.0), said("a", 0.0)]
    report = evaluate_offline(table_policy(), logs, betas=[0.1, math.log(3)], prompts=0)
    assert report.agent_tokens == 4 and report.chosen is None and report.ranking.mean == 1.0
    assert report.log_prob.mean == pytest.approx((math.log(0.25) + math.log(0.75)) / 4)
    text = str(report)
    assert "2 trajectories, 4 agent tokens" in text and "chosen" not in text and "n=1" in text


def test_a_policy_without_heads_has_its_likelihood_only():
    report = evaluate_offline(table_policy(heads=False), [said("a", 0.0)], betas=[1.0], prompts=0)
    assert report.by_beta is None and "beta" not in str(report)
    with pytest.raises(InputError, match="betas: found"):
        measure_logs(table_policy(heads=False), [said("a", 0.0)], [1.0])


def test_logs_without_a_turn_that_fits_are_an_input_error():
    policy = table_policy()
    policy.window = WindowRule(max_length=3)
    with pytest.raises(InputError, match="no agent turn that fits"):
        measure_logs(policy, [said("a", 0.0)])


def test_a_dialogue_is_shown_token_by_token():
    lines = show(table_policy(), said("b", 4.0)).splitlines()
    assert lines[0] == "return 4" and lines[1] == "user: ?" and lines[2] == "assistant: b   [reward 4]"
    assert lines[3].split() == ["'b'", "log", "π", "-1.386", "Q", "3.000", "V", "1.500", "Q", "−", "V", "+1.500"]
    assert len(lines) == 5 and "the log was cut" in show(table_policy(), said("b", 4.0, terminated=False))


@pytest.fixture(scope="module")
def played():
    """A random guided model and episodes that it played with guidance."""
    tokenizer = train_tokenizer(["start 1 0", "junction", "01"], 300)
    spec = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 64, "initializer_range": 0.3}
    torch.manual_seed(0)
    model = add_value_heads(build_model(spec, tokenizer), ValueHeadsConfig(kind="linear"))
    for parameter in model.value_heads.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    renderer = Renderer(tokenizer)
    policy = LanguagePolicy(model, renderer, DecodingConfig(max_new_tokens=5, temperature=1.0), max_length=64)
    return policy, rollout(policy, Corridor, range(8))


def test_logged_log_probs_are_those_of_play(played):
    policy, trajectories = played
    steps = measure_logs(policy, trajectories)
    drawn = [p for t in trajectories for turn in t.turns if turn.is_trainable for p in turn.behaviour_log_prob]
    np.testing.assert_allclose(steps.log_prob, drawn, atol=1e-4)


def test_the_batch_size_changes_nothing(played):
    policy, trajectories = played
    whole, single = (measure_logs(policy, trajectories, [2.0], token_budget=size) for size in (4096, 1))
    for name in ("token", "log_prob", "q", "v", "kl"):
        np.testing.assert_allclose(getattr(whole, name), getattr(single, name), atol=1e-5)


FORMS = [{}, {"support": 0.3, "temperature": 0.5}, {"candidates": 7, "clip": 0.01}, {"top_k": 9}]


@pytest.mark.parametrize("form", FORMS)
def test_guidance_is_measured_on_the_distribution_that_the_sampler_draws_from(played, form):
    policy, trajectories = played
    guided = LanguagePolicy(policy.model, policy.renderer, DecodingConfig(max_new_tokens=1, beta=5.0, **form))
    (history,) = Corridor().reset(0)
    renderer = policy.renderer
    prompt = [*renderer.preamble_of(()), *renderer.encode_turn(history).ids, *renderer.agent_opening]
    # Monte Carlo over the sampler's own draws: the mean of log p − log π over many seeds
    replies = guided.sampler.sample([prompt] * 4000, range(4000))
    drawn = np.array([reply.log_prob[0] - reply.policy_log_prob[0] for reply in replies])
    exact = measure_logs(guided, [Trajectory((history, Turn("assistant", "0", reward=0.0)))], [5.0]).kl[0, 0]
    assert exact > 0.1 and abs(exact - drawn.mean()) < 4 * drawn.std() / math.sqrt(4000)
