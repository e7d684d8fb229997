"""The toys: what their logs hold and what their environments pay."""

import itertools
from collections import Counter

import numpy as np
import pytest

from offline_lmrl.errors import InputError
from offline_lmrl.tasks.toys import (
    NODES,
    STARTS,
    Corridor,
    Count,
    Count1,
    Gamble,
    HiddenRule,
    Talk,
    TalkTrap,
    Walk,
)
from offline_lmrl.tokens.tokenizers import train_tokenizer

TOYS = [Corridor, Gamble, Count, Count1, Talk, TalkTrap, HiddenRule, Walk]


def play(environment, seed, texts):
    first = environment.reset(seed)
    return first, [environment.step(text) for text in texts]


def test_code_then_one_earns_the_optimum_from_every_start():
    corridor = Corridor(code_seed=3)
    for seed in range(STARTS):
        first, results = play(corridor, seed, [*corridor.codes[seed], "1\n"])
        assert first[0].content == f"start {seed}"
        assert results[2].turns[0].content == "junction"
        assert [result.reward for result in results] == [0, 0, 0, corridor.optimum()]
        assert results[3].terminated


def test_any_other_code_ends_with_nothing():
    corridor = Corridor(code_seed=3)
    wrong = "".join("10"[int(bit)] for bit in corridor.codes[5])
    _, results = play(corridor, 5, wrong)
    assert results[0].turns[0].content == f"start 5 {wrong[0]}"
    assert results[2] == ((), 0.0, True, False)
    assert corridor.labels() == {"start": 5, "reached": False, "invalid": 0}


def test_text_that_is_no_choice_ends_with_nothing():
    corridor = Corridor()
    assert play(corridor, 0, ["left"])[1] == [((), 0.0, True, False)]
    assert corridor.labels()["invalid"] == 1


def test_codes_belong_to_their_seed():
    assert Corridor(1).codes == Corridor(1).codes != Corridor(2).codes
    assert all(len(code) == 3 and set(code) <= {"0", "1"} for code in Corridor(1).codes)


def test_no_logged_episode_from_a_start_earns_but_the_logs_hold_the_way():
    logs = Corridor(code_seed=7).logs(2000, seed=0)
    rewarded = [log for log in logs if log.total_return > 0]
    assert len(rewarded) == 1000
    assert {log.turns[0].content for log in rewarded} == {"junction"}
    from_starts = [log for log in logs if log.turns[0].content != "junction"]
    assert {log.turns[0].content for log in from_starts} == {f"start {start}" for start in range(STARTS)}
    reached = [log for log in from_starts if any(turn.content == "junction" for turn in log.turns)]
    # one of eight codes is right: 1000 / 8, give or take four standard deviations of 10.5
    assert 83 < len(reached) < 167
    assert {log.turns[-1].content for log in reached} == {"0"}
    assert all(log.terminated and log.turns[-1].is_trainable for log in logs)


@pytest.mark.parametrize("toy", TOYS)
def test_logs_belong_to_their_seed(toy):
    logs = toy().logs(50, seed=1)
    assert logs == toy().logs(50, seed=1) != toy().logs(50, seed=2)
    assert len({log.group for log in logs}) == len(logs) == 50


@pytest.mark.parametrize("toy", [Count, Count1, Talk, TalkTrap, Walk])
def test_replayed_logs_give_the_logged_rewards_and_observations(toy):
    environment = toy()
    openings = {environment.reset(seed)[0].content: seed for seed in range(20)}
    for log in environment.logs(40, seed=3):
        agent = [turn for turn in log.turns if turn.is_trainable]
        first, results = play(environment, openings[log.turns[0].content], [turn.content for turn in agent])
        assert [turn.reward for turn in agent] == [result.reward for result in results]
        replies = [turn for result in results for turn in result.turns]
        assert [*first, *replies] == [turn for turn in log.turns if not turn.is_trainable]
        assert [result.terminated or result.truncated for result in results] == [False] * (len(agent) - 1) + [True]
        assert log.terminated == results[-1].terminated


def test_gamble_pays_five_for_sure_or_ten_by_chance():
    gamble = Gamble()
    assert {play(gamble, seed, ["safe"])[1][0].reward for seed in range(50)} == {5}
    rewards = Counter(play(gamble, seed, ["gamble"])[1][0].reward for seed in range(2000))
    assert set(rewards) == {0, 10}
    assert 146 < rewards[10] < 254  # 200, give or take four standard deviations of 13.4
    assert gamble.optimum() == 5


def test_gamble_pays_nothing_for_another_text():
    gamble = Gamble()
    assert play(gamble, 0, ["both"])[1] == [((), 0.0, True, False)]
    assert gamble.labels() == {"choice": "both", "invalid": 1}


def test_gamble_logs_both_choices_with_their_mean_pay():
    logs = Gamble().logs(4000, seed=0)
    pay = {
        choice: [log.total_return for log in logs if log.turns[-1].content == choice] for choice in ("safe", "gamble")
    }
    assert 1874 < len(pay["safe"]) < 2126  # half of 4000, give or take four standard deviations of 31.6
    assert set(pay["safe"]) == {5}
    assert 0.7 < sum(pay["gamble"]) / len(pay["gamble"]) < 1.3  # mean 1, standard error 0.07


@pytest.mark.parametrize("toy", [Count, Count1, Talk, TalkTrap, HiddenRule, Walk])
def test_words_are_single_tokens(toy):
    tokens = 8 if toy in (Count1, Talk) else 1
    logs = toy().logs(500, seed=0)
    tokenizer = train_tokenizer((turn.content for log in logs for turn in log.turns), 320)
    for turn in {turn for log in logs for turn in log.turns}:
        assert len(tokenizer(turn.content).input_ids) == (tokens if turn.is_trainable else 1)


@pytest.mark.parametrize("toy", TOYS)
def test_no_episodes_is_an_input_error(toy):
    with pytest.raises(InputError, match="episodes: found 0"):
        toy().logs(0, seed=0)


@pytest.mark.parametrize(
    "greeting, reply, letter", [("w", "y", "a"), ("x", "w", "c"), ("y", "z", "f"), ("z", "x", "h")]
)
def test_patience_then_the_letter_of_the_reply_earns_the_optimum(greeting, reply, letter):
    trap = TalkTrap()
    first, (patient, paid) = play(trap, "wxyz".index(greeting), ["patient", letter + "\n"])
    assert first[0].content == greeting
    assert (patient.turns[0].content, patient.reward, patient.terminated) == (reply, 0, False)
    assert paid == ((), 1.0, True, False)
    assert trap.labels() == {"patient": True, "invalid": 0}
    for other in set("abcdefgh") - {letter}:
        assert play(trap, "wxyz".index(greeting), ["patient", other])[1][1].reward == 0


def test_optimum_of_the_trap_is_patience():
    assert TalkTrap().optimum() == 1


@pytest.mark.parametrize("word, reward, invalid", [("bait", 0.3, 0), ("a", 0, 0), ("both", 0, 1)])
def test_after_the_bait_and_any_other_word_nothing_pays(word, reward, invalid):
    trap = TalkTrap()
    for seed in range(4):
        for letter in "abcdefgh":
            first, second = play(trap, seed, [word, letter])[1]
            assert (first.turns[0].content, first.reward) == ("bad", reward)
            assert second == ((), 0.0, True, False)
    assert trap.labels() == {"patient": False, "invalid": invalid}


def test_behaviour_of_the_trap_takes_the_bait():
    logs = TalkTrap().logs(8000, seed=0)
    words = Counter(log.turns[1].content for log in logs)
    assert set(words) == {"bait", "patient", *"abcdefgh"}
    assert 5435 < words["bait"] < 5765  # 5600, give or take four standard deviations of 41
    assert 692 < words["patient"] < 908  # 800, of 26.8
    # .7 · .3 + .1 / 8 = .2225; the second moment is .7 · .09 + .0125, so a standard deviation of .161 / √8000 = .0018
    assert abs(np.mean([log.total_return for log in logs]) - 0.2225) < 0.0073
    patient = [log.total_return for log in logs if log.turns[1].content == "patient"]
    assert abs(np.mean(patient) - 0.125) < 0.05  # below the bait's .3; standard error .0117
    assert {log.turns[-1].content for log in logs} == set("abcdefgh")


def test_steps_towards_the_goal_earn_the_optimum():
    walk = Walk(graph_seed=4)
    returns = []
    for seed in range(20):
        walk.reset(seed)
        total, result = 0, None
        while result is None or not result.terminated:
            result = walk.step(min(walk.edges[walk.node], key=walk.distances.get))
            total += result.reward
        assert walk.labels() == {"start": NODES[1 + seed], "shortest": -total, "arrived": True, "invalid": 0}
        returns.append(total)
    assert np.mean(returns) == pytest.approx(walk.optimum())


def test_no_random_walk_beats_the_fewest_steps():
    walk = Walk(graph_seed=4)
    logs = walk.logs(500, seed=0)
    assert all(log.total_return <= -walk.distances[log.turns[0].content] for log in logs)
    steps = {(here.content, there.content) for log in logs for here, there in itertools.pairwise(log.turns)}
    assert {(here, there) for here, there in steps if here != there} == {
        (node, after) for node in NODES for after in walk.edges[node]
    }


def test_optimum_of_graphs_drawn_by_hand():
    walk = Walk()
    walk.edges = {node: ["a"] for node in NODES} | {"b": ["c"]}
    assert walk.optimum() == pytest.approx(-(19 * 1 + 2) / 20)
    # A chain u → t → … → b → a: 1 to 10 steps from b to k, and the other ten are cut after 10.
    walk.edges = {"a": []} | {node: [before] for before, node in itertools.pairwise(NODES)}
    assert walk.optimum() == pytest.approx(-(55 + 10 * 10) / 20)


def test_walk_ends_at_the_goal_at_a_missing_edge_and_after_ten_steps():
    walk = Walk()
    walk.edges = {"b": ["c", "a"], "c": ["b"]}
    first, (there, back, arrival) = play(walk, 0, ["c", "b\n", "a"])
    assert [first[0].content, there.turns[0].content, back.turns[0].content] == ["b", "c", "b"]
    assert (there.reward, there.terminated, there.truncated) == (-1, False, False)
    assert arrival == ((), -1.0, True, False)
    missing = play(walk, 0, ["c", "a"])[1][1]
    assert missing == ((), -10.0, True, False)
    assert (walk.labels()["arrived"], walk.labels()["invalid"]) == (False, 1)
    results = play(walk, 0, ["c", "b"] * 5)[1]
    assert [result.truncated for result in results] == [False] * 9 + [True]
    assert results[-1].turns[0].content == "b" and not results[-1].terminated


def test_graphs_belong_to_their_seed_and_lead_to_the_goal_from_everywhere():
    assert Walk(1).edges == Walk(1).edges != Walk(2).edges
    for seed in range(8):
        walk = Walk(seed)
        assert set(walk.distances) == set(NODES) and walk.edges["a"] == []
        assert not any(node in walk.edges[node] for node in NODES)
        assert 0 < sum(map(len, walk.edges.values())) < 80  # 40 expected of 400
