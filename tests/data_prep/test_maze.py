"""Maze logs: every step obeys the game, and only stitching leads from a bar to the goal."""

import json
from collections import Counter

import pytest

from data_prep.maze import PARTS, SOLVER_SHARE, UPPER_BARS, MazeLogs, logs
from offline_lmrl.errors import InputError
from offline_lmrl.logs.io import read_trajectories
from offline_lmrl.tasks.maze import FREE, GOAL, MAX_STEPS, STARTS, Maze


@pytest.fixture(scope="module")
def episodes():
    return logs("full", 300, seed=1)


def positions(trajectory):
    """The cells of an episode, read from its texts: "... You are at 5, 3. ..."."""
    texts = [turn.content for turn in trajectory.turns if turn.role == "user"]
    return [tuple(int(part) for part in text.split("You are at ")[1].split(".")[0].split(", ")) for text in texts]


def test_parts_cover_the_maze_and_meet_in_row_five():
    assert set().union(*PARTS.values()) == FREE
    assert set.intersection(*map(set, PARTS.values())) == {(5, column) for column in range(3, 10)}
    assert [name for name, part in PARTS.items() if GOAL in part] == ["lower"]


def test_no_episode_from_an_upper_bar_reaches_the_goal(episodes):
    from_bars = [episode for episode in episodes if positions(episode)[0] in UPPER_BARS]
    assert len(from_bars) > 50
    assert not any(episode.terminated for episode in from_bars)
    assert any(episode.terminated for episode in episodes)


def test_every_episode_is_what_the_environment_plays(episodes):
    for episode in episodes[:50]:
        maze = Maze("full", start=positions(episode)[0])
        turns = list(maze.reset(0))
        for turn in episode.turns[1:]:
            if turn.is_trainable:
                result = maze.step(turn.content)
                assert turn.reward == result.reward
                turns += [turn, *result.turns]
        assert tuple(turns) == episode.turns
        assert result.terminated == episode.terminated


def test_only_the_last_step_may_leave_its_part_and_a_cut_keeps_its_observation(episodes):
    for episode in episodes:
        part, cells = PARTS[episode.labels["part"]], positions(episode)
        assert part.issuperset(cells[:-1])
        assert (cells[-1] not in part) == (episode.labels["end"] == "leaving")
        assert episode.turns[-1].is_trainable == episode.terminated == (episode.labels["end"] == "goal")
        assert (len(cells) - 1 == MAX_STEPS) or episode.labels["end"] != "length"


def test_every_cell_and_move_is_in_the_logs_and_some_episodes_are_the_solvers(episodes):
    seen = {
        (cell, turn.content)
        for episode in episodes
        for cell, turn in zip(positions(episode), (t for t in episode.turns if t.is_trainable), strict=False)
    }
    assert len(seen) == 4 * len(STARTS)
    solvers = sum(episode.labels["player"] == "solver" for episode in episodes)
    assert abs(solvers - SOLVER_SHARE * 300) < 25  # four standard deviations of 6.2


def test_partial_logs_hold_the_same_moves(episodes):
    partial = logs("partial", 20, seed=1)
    assert [[t.content for t in e.turns if t.is_trainable] for e in partial] == [
        [t.content for t in e.turns if t.is_trainable] for e in episodes[:20]
    ]
    assert not any("You are at" in turn.content for episode in partial for turn in episode.turns)


def test_prepare_writes_what_it_reports_and_repeats_itself(tmp_path):
    report = MazeLogs(output=tmp_path / "a", episodes=60, seed=2).prepare()
    train, validation = (read_trajectories(tmp_path / "a" / f"{name}.jsonl") for name in ("train", "validation"))
    both = [*train, *validation]
    assert report == json.loads((tmp_path / "a" / "report.json").read_text())
    assert report["episodes"] == len(both) == 60
    assert 0 < len(validation) < 20
    assert not {row.group for row in train} & {row.group for row in validation}
    assert report["steps"] == sum(turn.is_trainable for row in both for turn in row.turns)
    assert report["reached_goal"] == sum(row.terminated for row in both)
    assert report["reached_goal"] + report["cut_by_leaving"] + report["cut_by_length"] == 60
    assert report["mean_return"] == pytest.approx(sum(row.total_return for row in both) / 60)
    assert Counter(path.name for path in (tmp_path / "a").iterdir()) == Counter(
        ["train.jsonl", "validation.jsonl", "report.json"]
    )
    MazeLogs(output=tmp_path / "b", episodes=60, seed=2).prepare()
    assert (tmp_path / "a" / "train.jsonl").read_bytes() == (tmp_path / "b" / "train.jsonl").read_bytes()


def test_no_episodes_is_an_input_error_and_leaves_nothing(tmp_path):
    with pytest.raises(InputError, match="episodes"):
        MazeLogs(output=tmp_path / "out", episodes=0).prepare()
    assert not (tmp_path / "out").exists()
