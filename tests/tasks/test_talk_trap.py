"""TalkTrap: patience earns the optimum, the bait does not."""

from collections import Counter

import numpy as np
import pytest

from offline_lmrl.tasks.talk_trap import TalkTrap
from tests.tasks.playing import play


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
