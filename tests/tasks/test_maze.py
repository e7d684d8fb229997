"""The double-T maze: its map, its texts, its rewards and its scale."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from offline_lmrl.errors import InputError
from offline_lmrl.evaluation.metrics import ScoreScale
from offline_lmrl.tasks import make_environment
from offline_lmrl.tasks.maze import FREE, GOAL, MOVES, STARTS, Maze, distances

CONFIGS = Path(__file__).parents[2] / "configs" / "maze"

# Drawn by hand from the rules: # wall, . free, G goal.
MAP = """
#############
#.....#.....#
###.#####.###
###.#####.###
###.#####.###
###.......###
######.######
######.######
######G######
#############
""".split()


def play(maze, actions):
    return [maze.step(action) for action in actions]


def test_free_cells_and_goal_are_those_of_the_drawn_map():
    drawn = {(row, column) for row, line in enumerate(MAP) for column, sign in enumerate(line) if sign != "#"}
    assert set(FREE) == drawn
    assert MAP[GOAL[0]][GOAL[1]] == "G"
    assert len(STARTS) == 25


def test_distances_are_those_counted_by_hand():
    # (1, 1): 2 right, 4 down, 3 right, 3 down
    assert [distances()[cell] for cell in ((8, 6), (7, 6), (5, 6), (5, 3), (1, 3), (1, 1))] == [0, 1, 3, 6, 10, 12]


def test_optimum_is_the_published_one():
    # steps from the bars 10+11+11+12+12 twice, the legs 7+8+9 twice, row 5 3+4+4+5+5+6+6, the stem 1+2: 196;
    # the last step of each of the 25 episodes is free: (196 − 25) / 25
    assert Maze("full").optimum() == pytest.approx(-6.84)
    assert sum(distances()[start] - 1 for start in STARTS) / 25 == pytest.approx(6.84)


def test_optimum_without_positions_lies_between_the_published_one_and_the_full_one():
    assert -25.75 < Maze("partial").optimum() < -6.84
    assert Maze("partial", start=(7, 6)).optimum() == 0


def test_full_observation_has_three_sentences_and_partial_only_the_walls():
    assert Maze("full", start=(5, 3)).reset(0)[0].content == (
        "The goal is at 8, 6. You are at 5, 3. There are walls left, below."
    )
    (turn,) = Maze("partial", start=(5, 6)).reset(0)
    assert (turn.role, turn.content) == ("user", "There is a wall above.")


def test_every_cell_is_told_apart_by_the_full_observation_only():
    full = {Maze("full", start=start).reset(0)[0].content for start in STARTS}
    partial = {Maze("partial", start=start).reset(0)[0].content for start in STARTS}
    assert len(full) == 25
    assert len(partial) < 10


def test_step_costs_one_wall_or_not_and_the_arrival_is_free():
    maze = Maze(start=(6, 6))
    maze.reset(0)
    wall, down, goal = play(maze, ["move left", "move down\n", "move down"])
    assert (wall.reward, wall.terminated, wall.truncated) == (-1, False, False)
    assert "You are at 6, 6." in wall.turns[0].content
    assert "You are at 7, 6." in down.turns[0].content
    assert goal == ((), 0.0, True, False)


def test_unknown_text_costs_four_and_is_counted():
    maze = Maze(start=(6, 6))
    maze.reset(0)
    results = play(maze, ["jump", "Move down", ""])
    assert [result.reward for result in results] == [-4, -4, -4]
    assert maze.labels() == {"invalid": 3, "start": [6, 6]}
    maze.reset(1)
    assert maze.labels()["invalid"] == 0


def test_hundredth_step_is_a_cut_and_no_end():
    maze = Maze(start=(1, 1))
    maze.reset(0)
    results = play(maze, ["move up"] * 100)
    assert not any(result.terminated for result in results)
    assert [result.truncated for result in results] == [False] * 99 + [True]
    assert "You are at 1, 1." in results[-1].turns[0].content


def test_goal_on_the_hundredth_step_is_an_end():
    maze = Maze(start=(7, 6))
    maze.reset(0)
    assert play(maze, ["move left"] * 99 + ["move down"])[-1] == ((), 0.0, True, False)


def test_seeds_0_to_799_are_32_episodes_from_each_start():
    maze, starts = Maze(), []
    for seed in range(800):
        maze.reset(seed)
        starts.append(tuple(maze.labels()["start"]))
    assert {starts.count(start) for start in STARTS} == {32}


def test_best_player_earns_the_optimum():
    maze, returns, remaining = Maze(), [], distances()
    for seed in range(25):
        maze.reset(seed)
        total, ended = 0.0, False
        while not ended:
            row, column = maze.position
            ways = {action: remaining.get((row + down, column + right), 99) for action, (down, right) in MOVES.items()}
            _, reward, ended, _ = maze.step(min(ways, key=ways.get))
            total += reward
        returns.append(total)
    assert np.mean(returns) == pytest.approx(maze.optimum())


def test_published_scores_lie_on_the_scale_of_the_shipped_comparisons():
    def scale(name):
        return ScoreScale(**yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["evaluation"]["score"])

    assert [scale("full").normalise(score) for score in (-101, -92, -83, -6.84)] == pytest.approx([0, 25, 50, 100])
    assert scale("full").normalise(-6.97) == pytest.approx(99.9, abs=0.05)  # published full-maze ILQL
    assert scale("partial").normalise(-52.9) == pytest.approx(76.3, abs=0.05)  # and the partial one


@pytest.mark.parametrize("arguments", [{"observed": "half"}, {"start": (0, 0)}, {"start": GOAL}])
def test_unknown_setting_is_an_input_error_that_names_it(arguments):
    with pytest.raises(InputError, match=next(iter(arguments))):
        Maze(**arguments)


class Open:
    """An environment of a user that takes every setting."""

    def __init__(self, level: "Unknown" = 1, **more):  # noqa: F821
        self.more = more

    def reset(self, seed):
        return ()

    def step(self, text):
        return (), 0.0, True, False


def test_the_settings_of_an_environment_are_those_of_its_class():
    assert make_environment("maze", observed="partial")().observed == "partial"
    assert make_environment(f"{__name__}:Open", level="x", other=[1])().more == {"other": [1]}
    for settings, message in (
        ({"observd": "full"}, "environment.observd: found a setting that does not exist; did you mean"),
        ({"observed": "all"}, "environment.observed: found 'all', expected one of full, partial"),
        ({"start": 3}, "environment.start: found 3, expected a list or null"),
    ):
        with pytest.raises(InputError, match=message):
            make_environment("maze", **settings)
