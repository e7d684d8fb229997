"""HiddenRule: rules, splits, demonstrations and what answers pay."""

from collections import Counter

import numpy as np
import pytest

from offline_lmrl.errors import InputError
from offline_lmrl.logs.trajectory import Turn
from offline_lmrl.tasks.hidden_rule import ORDERS, HiddenRule
from tests.tasks.playing import agent_turns


def test_held_out_rules_are_a_fifth_and_apart_from_the_training_rules():
    training, held_out = HiddenRule().rules, HiddenRule(held_out=True).rules
    assert (len(training), len(held_out)) == (1344, 336)
    assert len({*training, *held_out}) == 1680  # 8 · 7 · 6 · 5
    assert all(len(set(rule)) == 4 and set(rule) <= set("abcdefgh") for rule in training + held_out)
    assert HiddenRule(held_out=True, split_seed=1).rules != held_out
    logged = {log.task for log in HiddenRule().logs(500, seed=0)}
    shown = {log.task for log in HiddenRule(held_out=True).demonstrations(1, seed=0)}
    assert len(shown) == 336 and not logged & shown


def test_right_answers_earn_the_optimum_and_others_nothing():
    hidden = HiddenRule(held_out=True)
    rule = hidden.rules[7]
    answers = dict(zip("wxyz", rule, strict=True))
    turns, paid, heard = hidden.reset(7), [], []
    while turns:
        heard.append(turns[0].content)
        result = hidden.step(f" {answers[heard[-1]]}\n")
        paid.append(result.reward)
        turns = result.turns
    assert sorted(heard) == list("wxyz")
    assert paid == [1, 1, 1, 1] and result.terminated
    assert hidden.optimum() == 4
    assert hidden.labels() == {"task": f"hidden_rule-{rule}", "invalid": 0}
    assert hidden.task(7) == hidden.task(7 + 336) == f"hidden_rule-{rule}"
    cue = hidden.reset(7)[0].content
    (wrong, *_) = set("abcdefgh") - {answers[cue]}
    assert hidden.step(wrong).reward == 0
    assert hidden.step("nothing").reward == 0
    assert hidden.labels()["invalid"] == 1


def test_seeds_are_every_rule_with_every_order_of_the_cues():
    hidden = HiddenRule(held_out=True)
    episodes = set()
    for seed in range(336 * 24):
        hidden.reset(seed)
        episodes.add((hidden.rule, hidden.cues))
    assert len(episodes) == 336 * 24


def test_behaviour_is_right_in_seven_of_ten_turns_and_wrong_in_all_ways():
    logs = HiddenRule().logs(2000, seed=0)
    rewards = [turn.reward for log in logs for turn in agent_turns(log)]
    assert abs(np.mean(rewards) - 0.7) < 0.021  # 8000 turns: four standard errors of .0051
    assert all(sorted(turn.content for turn in log.turns[::2]) == list("wxyz") for log in logs)
    wrong = Counter()
    for log in logs:
        answers = dict(zip("wxyz", log.task.removeprefix("hidden_rule-"), strict=True))
        for cue, answer in zip(log.turns[::2], log.turns[1::2], strict=True):
            assert answer.reward == (answer.content == answers[cue.content])
            if not answer.reward:
                others = sorted(set("abcdefgh") - {answers[cue.content]})
                wrong[others.index(answer.content)] += 1
    assert all(267 < wrong[i] < 419 for i in range(7))  # 2400 over seven: 343, of standard deviation 18.6


def test_demonstrations_are_all_right_and_share_the_task_of_the_seed():
    hidden = HiddenRule(held_out=True)
    shown = hidden.demonstrations(2, seed=3)
    assert [log.task for log in shown[::2]] == [hidden.task(seed) for seed in range(336)]
    assert [log.task for log in shown[::2]] == [log.task for log in shown[1::2]]
    assert all(log.total_return == 4 and log.terminated for log in shown)
    assert len({log.group for log in shown}) == len(shown)
    assert shown == hidden.demonstrations(2, seed=3) != hidden.demonstrations(2, seed=4)
    with pytest.raises(InputError, match="per_rule: found 0"):
        hidden.demonstrations(0, seed=0)


def test_replayed_logs_of_a_rule_give_the_logged_rewards_and_cues():
    hidden = HiddenRule()
    for log in [*hidden.logs(40, seed=3), *hidden.demonstrations(1, seed=3)[:40]]:
        number = hidden.rules.index(log.task.removeprefix("hidden_rule-"))
        order = ORDERS.index(tuple(turn.content for turn in log.turns[::2]))
        seed = number + len(hidden.rules) * ((order - number) % len(ORDERS))
        turns = list(hidden.reset(seed))
        for turn in agent_turns(log):
            result = hidden.step(turn.content)
            turns += [Turn("assistant", turn.content, reward=result.reward), *result.turns]
        assert tuple(turns) == log.turns and result.terminated and log.terminated
        assert hidden.labels()["task"] == log.task
