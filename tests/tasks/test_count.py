"""Count, Count1 and Talk: their logs, what they pay, and the exact player of a requested return."""

from collections import Counter

import numpy as np
import pytest

from offline_lmrl.environments.rollouts import rollout
from offline_lmrl.environments.scripted import Forced
from offline_lmrl.tasks.count import AskPlayer, Count, Count1, Talk
from tests.tasks.playing import agent_turns


def achieved(policy, toy, episodes=20):
    return [episode.total_return for episode in rollout(policy, toy, range(episodes))]


def test_count_pays_one_for_g_and_ends_after_eight_turns():
    count = Count()
    assert [turn.content for turn in count.reset(5)] == ["next"]
    results = [count.step(text) for text in ["g", "a", " g\n", "gg", "g g", "", "h", "g"]]
    assert [result.reward for result in results] == [1, 0, 1, 0, 0, 0, 0, 1]
    assert [result.terminated for result in results] == [False] * 7 + [True]
    assert [len(result.turns) for result in results] == [1] * 7 + [0]
    assert count.labels() == {"invalid": 3}  # gg, g g and nothing


def test_count1_pays_the_number_of_g_in_exactly_eight_letters():
    def pay(text):
        count = Count1()
        count.reset(0)
        result = count.step(text)
        assert result.terminated and not result.turns
        return result.reward, count.labels()["invalid"]

    assert pay("g a g b h g c d") == (3, 0)
    assert pay("g " * 8) == (8, 0)
    assert pay("g " * 9) == pay("g " * 7) == pay("g g g g g g g i") == pay("gggggggg") == (0, 1)


def test_talk_has_two_turns_of_eight_letters():
    talk = Talk()
    talk.reset(0)
    first, second = talk.step("g a a a a a a a"), talk.step("g g g g g a a a")
    assert (first.reward, first.terminated, first.turns[0].content) == (1, False, "next")
    assert second == ((), 5.0, True, False)


@pytest.mark.parametrize("toy, best", [(Count, 8), (Count1, 8), (Talk, 16)])
def test_optimum_is_a_g_everywhere(toy, best):
    assert toy().optimum() == best
    assert achieved(Forced(AskPlayer(toy, 0), [" ".join("g" * toy.letters)] * toy.turns), toy, 1) == [best]


@pytest.mark.parametrize("toy", [Count, Count1])
def test_logged_returns_of_count_are_uniform_from_0_to_8(toy):
    logs = toy().logs(4500, seed=0)
    returns = Counter(log.total_return for log in logs)
    assert set(returns) == set(range(9))
    assert all(415 < n < 585 for n in returns.values())  # 500 each, give or take four standard deviations of 21
    unpaid = Counter(letter for log in logs for turn in agent_turns(log) for letter in turn.content.split())
    del unpaid["g"]
    assert set(unpaid) == set("abcdefh")
    assert all(2350 < n < 2800 for n in unpaid.values())  # half of 36,000 letters, over seven: 2571
    assert all(log.terminated and log.task == toy.name and log.turns[-1].is_trainable for log in logs)


def test_logged_turns_of_talk_are_independent_and_uniform():
    rewards = np.array([[turn.reward for turn in agent_turns(log)] for log in Talk().logs(4500, seed=0)])
    assert rewards.shape == (4500, 2)
    for turn in range(2):
        assert all(415 < n < 585 for n in Counter(rewards[:, turn]).values())
    assert abs(np.corrcoef(rewards.T)[0, 1]) < 0.06  # standard error .015; with one p for both it would be .8


@pytest.mark.parametrize("toy", [Count, Count1, Talk])
def test_exact_player_earns_every_ask(toy):
    for ask in range(int(toy().optimum()) + 1):
        assert set(achieved(AskPlayer(toy, ask), toy)) == {ask}


@pytest.mark.parametrize("ask, earned", [(-2, 0), (11, 8)])
def test_an_ask_outside_the_possible_earns_the_nearest(ask, earned):
    assert set(achieved(AskPlayer(Count, ask), Count)) == {earned}


def test_a_fractional_ask_is_earned_in_the_mean():
    returns = achieved(AskPlayer(Count, 2.5), Count, 400)
    assert set(returns) == {2, 3}
    assert abs(np.mean(returns) - 2.5) < 0.1  # standard error .025


def test_exact_player_is_the_behaviour_given_its_return():
    # Among logs of return 3 the first letter is paid in 3 of 8, and so it is for the player asked for 3.
    logs = [log for log in Count().logs(9000, seed=1) if log.total_return == 3]
    logged = np.mean([agent_turns(log)[0].reward for log in logs])
    played = np.mean([agent_turns(episode)[0].reward for episode in rollout(AskPlayer(Count, 3), Count, range(1000))])
    assert abs(logged - 3 / 8) < 0.062 and abs(played - 3 / 8) < 0.062  # about 1000 each: standard error .0153


def test_earned_turns_show_the_update_of_the_ask():
    earned = ["g"] * 3
    assert set(achieved(Forced(AskPlayer(Count, 5), earned), Count)) == {5}
    assert set(achieved(Forced(AskPlayer(Count, 5, update=False), earned), Count)) == {8}


def test_wasted_turns_leave_the_ask_to_the_rest():
    assert set(achieved(Forced(AskPlayer(Count, 5), ["a"] * 3), Count)) == {5}


def test_second_turn_of_talk_earns_what_the_first_left():
    policy = Forced(AskPlayer(Talk, 6), ["g a a a a a a a"])
    assert {tuple(turn.reward for turn in agent_turns(episode)) for episode in rollout(policy, Talk, range(20))} == {
        (1, 5)
    }


def test_an_ask_that_is_held_is_missed():
    # Held at r, turn m from the end pays with probability min(1, r/m), so r turns pay for sure and the total is above:
    # r = 2: 2/3 + 2/4 + ... + 2/8 = 2.436, 3: 2.654, 4: 2.538, 5: 2.173 and 6: 1.607 too much; the mean is 2.28
    errors = [np.mean(achieved(AskPlayer(Count, ask, update=False), Count, 300)) - ask for ask in range(2, 7)]
    assert errors == pytest.approx([2.436, 2.654, 2.538, 2.173, 1.607], abs=0.3)  # standard errors up to .06
    assert np.mean(errors) == pytest.approx(2.28, abs=0.15)
