"""Corridor: its logs hold the whole path but no episode of a start earns, and only the code pays."""

from offline_lmrl.tasks.corridor import STARTS, Corridor
from tests.tasks.playing import play


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
