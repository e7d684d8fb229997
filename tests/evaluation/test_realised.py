"""Realised advantages by hand and by enumeration, those of requests against play, and the rule that reads them."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from offline_lmrl.environments.rollouts import rollout
from offline_lmrl.evaluation.choice_rule import choose
from offline_lmrl.evaluation.choices import Choice
from offline_lmrl.evaluation.metrics import Estimate
from offline_lmrl.evaluation.offline import measure_logs
from offline_lmrl.evaluation.realised import ask_log_prob, realised_advantage
from offline_lmrl.logs.protocols import StepResult
from offline_lmrl.logs.trajectory import Turn
from tests.decoding.test_conditioned_play import policy as conditioned_policy
from tests.evaluation.test_offline import said, table_policy

BETA = math.log(3)  # the table's π(b) = 1/4 becomes 3/4


def realised(logs, policy=None, beta=BETA):
    steps = measure_logs(policy or table_policy(), logs, [beta])
    return realised_advantage(steps, steps.guided_log_prob[0], logs)


def test_by_hand():
    # b: (3/4 − 1/4) / (1/4) · (4 − 1.5) = 5; a: (1/4 − 3/4) / (3/4) · (1 − 1.5) = 1/3; closing is certain
    found = realised([said("b", 4.0, "g"), said("a", 1.0, "h")])
    assert found.mean == pytest.approx((5 + 1 / 3) / 2, rel=1e-5) and found.n == 2
    assert found.low < found.mean < found.high


def test_logs_in_the_shares_of_the_policy_give_the_exact_gain():
    logs = [said("a", 1.0, f"a{i}") for i in range(3)] + [said("b", 4.0, "b")]
    gain = (0.25 * 1 + 0.75 * 4) - (0.75 * 1 + 0.25 * 4)
    assert realised(logs).mean == pytest.approx(gain, rel=1e-5)
    # greedy: all a, then all b
    assert realised(logs, table_policy(temperature=0.0), 2 * BETA).mean == pytest.approx(4 - 1, rel=1e-5)
    # outcomes that do not depend on the reply
    assert realised([said("a", 2.0), said("a", 2.0), said("a", 2.0), said("b", 2.0)]).mean == pytest.approx(
        0, abs=1e-5
    )


def test_dropped_tokens_and_cut_logs_add_nothing():
    logs = [said("b", 4.0, "g"), said("a", 1.0, "h")]
    assert realised(logs, table_policy(support=0.5)).mean == pytest.approx(0, abs=1e-6)  # a is all that is left
    assert realised([*logs, said("b", 9.0, "c", terminated=False)]).mean == pytest.approx((5 + 1 / 3) / 2, rel=1e-5)
    assert realised([said("b", 9.0, terminated=False)]) is None


def test_without_value_heads_the_mean_return_is_expected():
    logs = [said("b", 4.0, "g"), said("a", 1.0, "h")]  # 2.5 on average
    steps = measure_logs(table_policy(heads=False), logs)
    log_prob = np.array([math.log(0.75), 0.0, math.log(0.25), 0.0])
    assert realised_advantage(steps, log_prob, logs).mean == pytest.approx((2 * 1.5 + 2 / 3 * 1.5) / 2, rel=1e-5)


class Steps:
    """Three agent turns, each of which earns 1."""

    def reset(self, seed):
        self.left = 3
        return (Turn("user", "you are at 1, 2"),)

    def step(self, text):
        self.left -= 1
        return StepResult((Turn("user", "move"),) if self.left else (), 1.0, self.left == 0, False)


def test_a_request_has_the_log_probs_of_its_own_play():
    logs = rollout(conditioned_policy(ask=3.0), Steps, range(4))
    steps = measure_logs(conditioned_policy(), logs)
    found = ask_log_prob(conditioned_policy(), logs, 3.0, steps)
    played = [value for log in logs for turn in log.turns for value in turn.behaviour_log_prob or ()]
    np.testing.assert_allclose(found, played, atol=1e-4)
    assert np.abs(found - steps.unguided_log_prob).max() > 0.05
    named = ask_log_prob(conditioned_policy(), logs, "max", steps)
    np.testing.assert_array_equal(
        named, ask_log_prob(conditioned_policy(), logs, 4.0, steps)
    )  # the best logged return
    assert ask_log_prob(conditioned_policy(), logs, "auto", steps) is None
    assert ask_log_prob(conditioned_policy(condition_scale=1.0), logs, 3.0, steps) is None


def row(beta, mean, low, **faults):
    realised = None if mean is None else Estimate(mean, low, 2 * mean - low, 9)
    faults = {"repeated": 0.0, "unfinished": 0.1, "empty": 0.0} | faults
    return SimpleNamespace(choice=Choice(beta), realised=realised, **faults)


def test_the_rule_takes_the_best_cautious_advantage_among_fluent_choices():
    plain, small, large, noisy = row(0, 0.0, 0.0), row(2, 1.0, 0.6), row(4, 1.4, 0.8), row(8, 1.5, -1.0)
    assert choose([plain, small, large, noisy]) is large
    for fault in ({"repeated": 0.06}, {"unfinished": 0.16}, {"empty": 0.06}):
        assert choose([plain, small, row(4, 9.0, 8.0, **fault), row(8, None, None)]) is small
    assert choose([plain, small, row(4, 9.0, 8.0, unfinished=0.14, empty=0.04)]).realised.mean == 9.0
    assert choose([plain, row(2, 0.2, -0.7)]) is plain and choose([plain]) is plain


def test_of_nearly_equal_choices_the_smallest_beta_is_taken():
    plain, level = row(0, 0.0, 0.0), [row(64, 10.0, 10.0), row(16, 9.6, 9.6), row(8, 9.4, 9.4)]
    assert choose([plain, *level]).choice.beta == 16
    asks = [SimpleNamespace(**{**vars(one), "choice": Choice(ask=ask)}) for one, ask in zip(level, "abc", strict=True)]
    assert choose([plain, *asks]).choice.ask == "a"


def test_a_choice_whose_advantage_is_no_number_hides_no_other():
    plain, good = row(0, 0.0, 0.0), row(1, 1.0, 0.6)
    for unknown in (row(2, math.nan, math.nan), row(2, math.inf, math.nan), row(2, 1.0, -math.inf)):
        assert choose([plain, unknown, good]) is good and choose([plain, unknown]) is plain


def test_five_more_of_a_hundred_broken_replies_are_allowed_at_every_share():
    for usual in range(95):
        some = row(1, 1.0, 0.6, unfinished=(usual + 5) / 100)
        assert choose([row(0, 0.0, 0.0, unfinished=usual / 100), some]) is some


def test_a_token_that_the_policy_holds_for_impossible_gives_a_finite_number():
    logs = [said("b", 4.0, "g"), said("a", 1.0, "h")]
    steps = measure_logs(table_policy(), logs, [BETA])
    rare = replace(steps, log_prob=np.where(steps.log_prob < -1, np.float32(-120), steps.log_prob))
    found = realised_advantage(rare, np.zeros_like(rare.log_prob), logs)
    assert math.isfinite(found.mean) and found.mean > 1e50
