"""Gamble: what both choices pay, in logs and in play."""

from collections import Counter

from offline_lmrl.tasks.gamble import Gamble
from tests.tasks.playing import play


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
