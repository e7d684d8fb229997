"""Off-policy estimates against values that can be written down."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

from offline_lmrl.algorithms.behaviour_cloning import BCConfig, BCTrainer
from offline_lmrl.cli.main import main
from offline_lmrl.decoding.distribution import next_token
from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.decoding.sampler import DecodingConfig
from offline_lmrl.environments.rollouts import rollout
from offline_lmrl.errors import InputError
from offline_lmrl.evaluation import off_policy
from offline_lmrl.evaluation.off_policy import FitConfig, fitted_q_evaluation, importance_sampling
from offline_lmrl.logs.io import write_trajectories
from offline_lmrl.logs.protocols import StepResult
from offline_lmrl.logs.trajectory import Trajectory, Turn
from offline_lmrl.models.loading import build_model
from offline_lmrl.tokens.rendering import Renderer
from offline_lmrl.tokens.tokenizers import train_tokenizer

TOKENIZER = train_tokenizer(["0 1 a b safe gamble or ?"], 270)
SPEC = {"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 16, "initializer_range": 0.2}
# s0: a -> end, 0;  b -> s1        s1: a -> end, 0;  b -> end, 1
S0 = (Turn("user", "0"),)
S1 = (*S0, Turn("assistant", "b", reward=0.0), Turn("user", "1"))
ENDS = [
    Trajectory((*S0, Turn("assistant", "a", reward=0.0))),
    Trajectory((*S1, Turn("assistant", "a", reward=0.0))),
    Trajectory((*S1, Turn("assistant", "b", reward=1.0))),
]


def numbered(trajectories):
    return [replace(t, group=str(i)) for i, t in enumerate(trajectories)]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A clone that says b more often than the logs below; only a, b and the closing are left to it."""
    folder = tmp_path_factory.mktemp("clone")
    transformers.set_seed(0)
    logs = [ENDS[0]] * 1 + [ENDS[1]] * 6 + [ENDS[2]] * 3
    args = BCConfig(
        output_dir=str(folder),
        max_steps=120,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        context=1,
        max_length=16,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
    )
    run = BCTrainer(build_model(SPEC, TOKENIZER), args, logs, None, TOKENIZER)
    run.train()
    run.save_model(str(folder))
    return folder


@pytest.fixture(scope="module")
def policy(clone):
    return LanguagePolicy.load(clone, device="cpu", support=0.05, max_new_tokens=3)


def chance_of_b(policy, state):
    """π(b) where the sampler would draw, and whether nothing but a and b is left."""
    renderer = policy.renderer
    ids = [[*renderer.preamble_of(()), *renderer.encode_turn(state[-1]).ids, *renderer.agent_opening]]
    with torch.no_grad():
        logits, _ = policy.model.eval().forward_with_hidden(input_ids=torch.tensor(ids))
    log_prob = next_token(logits.logits[0, -1], policy.decoding).scores
    a, b = (policy.renderer.encode_content(letter)[0] for letter in "ab")
    assert log_prob[[a, b]].exp().sum().item() == pytest.approx(1, abs=1e-6)
    return log_prob[b].exp().item()


# Converged: at 500 steps and 3e-3 the fit was still moving, and whether it passed hung on the number of threads.
FIT = FitConfig(steps=1000, fits=1, batch_size=64, learning_rate=1e-3, target_rate=0.2)


def test_fitted_q_reaches_the_value_of_the_policy_not_of_the_logs(policy):
    p0, p1 = chance_of_b(policy, S0), chance_of_b(policy, S1)
    # These say b with .5 and .25, which is worth .125.
    found = fitted_q_evaluation(policy, numbered(([ENDS[0]] * 8 + [ENDS[1]] * 6 + [ENDS[2]] * 2) * 4), FIT)
    assert found.value == pytest.approx(p0 * p1, abs=0.04) and p0 * p1 > 0.2
    assert found.td_error < 0.15


def test_fitted_q_goes_on_behind_a_cut(policy):
    p0, p1 = chance_of_b(policy, S0), chance_of_b(policy, S1)
    from_s1 = [Trajectory((S1[-1], Turn("assistant", said, reward=paid))) for said, paid in (("a", 0.0), ("b", 1.0))]
    logs = [Trajectory(S1, terminated=False)] * 4 + [ENDS[0]] * 4 + from_s1 * 2  # no episode from s0 earns anything
    # One fit is off by ± .03, so that the last digits of the policy's weights would decide.
    found = fitted_q_evaluation(policy, numbered(logs * 4), replace(FIT, fits=4))
    assert found.value == pytest.approx((8 * p0 * p1 + 4 * p1) / 12, abs=0.03)


def test_fits_are_drawn_anew_and_the_same_again(policy):
    logs = numbered([ENDS[0]] * 4 + [ENDS[2]] * 4)
    seen = []
    first, again = (
        fitted_q_evaluation(policy, logs, FitConfig(3, fits=2, batch_size=4), lambda *n: seen.append(n))
        for _ in range(2)
    )
    assert first == again and seen[:6] == [(i, 6) for i in range(1, 7)] and first.fits[0] != first.fits[1]


def stand_in(monkeypatch, log_prob, n):
    """What reading logs of one token per turn says."""
    steps = SimpleNamespace(trajectory=np.arange(n), turn=np.ones(n, dtype=int), acting_log_prob=np.array(log_prob))
    monkeypatch.setattr(off_policy, "measure_logs", lambda *_: steps)
    model = SimpleNamespace(config=SimpleNamespace(offline_lmrl={}))
    return SimpleNamespace(return_tokens=None, model=model, renderer=SimpleNamespace(fingerprint="me"))


HALF = (math.log(0.5),)


def said(reward, behaviour=HALF, **fields):
    turn = Turn("assistant", "x", reward=reward, token_ids=(7,), behaviour_log_prob=behaviour)
    return Trajectory((Turn("user", "?"), turn), labels={"tokenizer": "me"}, **fields)


def test_weights_are_ratios_of_whole_episodes(monkeypatch):
    # w = .8/.5, .2/.5, .2/.5 = 1.6, .4, .4: (1.6 · 1 + .4 · 0 + .4 · 3) / 2.4; (Σw)² / Σw² = 5.76 / 2.88
    policy = stand_in(monkeypatch, np.log([0.8, 0.2, 0.2]), 3)
    found = importance_sampling(policy, [said(1.0), said(0.0), said(3.0, terminated=False)])
    assert found.score.mean == pytest.approx(2.8 / 2.4) and found.effective == pytest.approx(2.0)
    assert found.score.n == 3 and "2.0 of 3 episodes (cut episodes: 1, with" in str(found)


def test_weights_of_long_episodes_do_not_overflow(monkeypatch):
    policy = stand_in(monkeypatch, [2000.0, 1999.0], 2)
    found = importance_sampling(policy, [said(1.0), said(0.0)])
    assert found.score.mean == pytest.approx(1 / (1 + math.exp(-1)))


@pytest.mark.parametrize(
    "logs, log_prob, message",
    [
        ([said(1.0), said(1.0, None)], [0.0, 0.0], "found 1 of 2 trajectories without behaviour_log_prob"),
        ([replace(said(1.0), labels={})], [0.0], "found 1 of 1"),  # another tokenizer's ids
        ([said(1.0), Trajectory((Turn("user", "?"),))], [0.0, 0.0], "found 1 of 2"),
        ([said(1.0)], [-np.inf], "found only trajectories of probability 0 under this policy"),
    ],
)
def test_logs_that_cannot_be_weighed_say_why(monkeypatch, logs, log_prob, message):
    with pytest.raises(InputError, match=message):
        importance_sampling(stand_in(monkeypatch, log_prob, len(logs)), logs)


class Echo:
    """One turn; pays 1 for the one right text."""

    def __init__(self, right):
        self.right = right

    def reset(self, seed):
        return (Turn("user", "?"),)

    def step(self, text):
        return StepResult((), float(text == self.right), True, False)


def test_hot_play_is_weighed_to_the_score_of_warm_play():
    torch.manual_seed(3)
    form = DecodingConfig(temperature=2.0, top_k=5, max_new_tokens=2)
    hot = LanguagePolicy(build_model(SPEC, TOKENIZER), Renderer(TOKENIZER), form, context=1, max_length=16)
    warm = hot.with_decoding(temperature=0.7)
    (best,) = rollout(hot.with_decoding(temperature=0.0), lambda: Echo(""), [0])
    logs, play = (
        rollout(policy, lambda: Echo(best.turns[-1].content), range(first, first + 1000))
        for policy, first in ((hot, 0), (warm, 5000))
    )
    plain, truth = (np.mean([t.total_return for t in played]) for played in (logs, play))
    found = importance_sampling(warm, logs)
    assert abs(found.score.mean - truth) < 0.06 and truth - plain > 0.1 and 30 < found.effective < 1000


def test_a_policy_that_is_asked_for_returns_is_refused():
    with pytest.raises(InputError, match="conditioned on returns"):
        importance_sampling(SimpleNamespace(return_tokens=object()), [])
    with pytest.raises(InputError, match="conditioned on returns"):
        fitted_q_evaluation(SimpleNamespace(return_tokens=object()), [])


class Chain:
    """The chain above as an environment."""

    def reset(self, seed):
        self.state = 0
        return S0

    def step(self, text):
        if text != "b" or self.state:
            return StepResult((), float(text == "b"), True, False)
        self.state = 1
        return StepResult((Turn("user", "1"),), 0.0, False, False)


def test_evaluate_prints_them_below_what_logs_say(clone, policy, tmp_path, capsys):
    played = rollout(policy, Chain, range(40))
    write_trajectories(tmp_path / "played.jsonl", played)
    write_trajectories(tmp_path / "plain.jsonl", ENDS)
    form = ["--support", "0.05", "--max_new_tokens", "3", "--device", "cpu"]
    assert main(["evaluate", "logs", str(clone), "--data", str(tmp_path / "played.jsonl"), "--fqe", "2", *form]) == 0
    printed = capsys.readouterr().out
    mean = sum(t.total_return for t in played) / 40  # what the policy played itself has the same weight throughout
    found = float(printed.partition("weighted importance sampling: ")[2].partition(" [")[0])
    assert found == pytest.approx(mean, abs=0.006) and "sample size 40.0 of 40" in printed
    assert printed.index("log π per agent token") < printed.index("logs alone") < printed.index("fitted Q evaluation")
    assert main(["evaluate", "logs", str(clone), "--data", str(tmp_path / "plain.jsonl"), *form]) == 0
    printed = capsys.readouterr().out
    assert "weighted importance sampling: not computed, found 3 of 3 trajectories without" in printed
    assert "fitted Q" not in printed
