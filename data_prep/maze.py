"""Generate logs of scripted players in the double-T maze, which can only be solved by combining parts of episodes.

85% of the episodes are uniformly random walks, and 15% are played by a suboptimal solver. Each episode is confined to
one of three parts of the maze that share row 5: the left T, the right T, and the lower part with the goal. No episode
that starts in the upper bar of a T reaches the goal, but together the parts contain every step of the way.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from data_prep.source import Report, Source, write_shares
from offline_lmrl.errors import require
from offline_lmrl.logs.trajectory import Trajectory, Turn
from offline_lmrl.settings import setting
from offline_lmrl.tasks.maze import FREE, GOAL, MAX_STEPS, MOVES, Cell, Maze, distances, move

UPPER_BARS = frozenset(cell for cell in FREE if cell[0] == 1)
PARTS: dict[str, frozenset[Cell]] = {
    "left": frozenset(cell for cell in FREE if cell[0] == 5 or (cell[0] < 5 and cell[1] < 6)),
    "right": frozenset(cell for cell in FREE if cell[0] == 5 or (cell[0] < 5 and cell[1] > 6)),
    "lower": frozenset(cell for cell in FREE if cell[0] >= 5),
}
SOLVER_SHARE = 0.15
SOLVER_SKILL = 0.3  # probability that the solver moves along a shortest way; its other moves are random


@dataclass(frozen=True, kw_only=True)
class MazeLogs(Source):
    """Play the scripted players and write train.jsonl, validation.jsonl (10% of the episodes) and report.json.

    Episodes that are cut when they leave their part make `mean_return` in the report higher than the return of the
    same players in the whole maze.
    """

    observed: Literal["full", "partial"] = setting(
        "full", "full or partial observations; the moves are the same for both"
    )
    episodes: int = setting(1240, "number of episodes, 1,240 in the published logs")

    def check(self) -> None:
        """Check the settings."""
        require(self.episodes >= 1, f"episodes: found {self.episodes}, expected at least 1")

    def make(self) -> Report:
        """Play and write the episodes."""
        trajectories = logs(self.observed, self.episodes, self.seed)
        return write_shares(self.output, trajectories, self.seed, _report(trajectories))


def logs(observed: Literal["full", "partial"], episodes: int, seed: int) -> list[Trajectory]:
    """Play episodes of the scripted players, each in a group of its own.

    Args:
      observed: "full" or "partial" observations.
      episodes: number of episodes.
      seed: random seed of the players.
    Returns: trajectories with the labels `part` (left, right or lower), `player` (solver or walk) and `end` (see
      `_play`).
    """
    rng = np.random.default_rng(seed)
    remaining = distances()

    def walk(cell: Cell) -> str:
        return str(rng.choice(list(MOVES)))

    def solve(cell: Cell) -> str:
        shortest = min(MOVES, key=lambda action: remaining[move(cell, action)])
        return shortest if rng.random() < SOLVER_SKILL else walk(cell)

    trajectories = []
    for episode in range(episodes):
        part = str(rng.choice(list(PARTS)))
        starts = sorted(PARTS[part] - {GOAL})
        start = starts[rng.integers(len(starts))]
        player, name = (solve, "solver") if rng.random() < SOLVER_SHARE else (walk, "walk")
        turns, end = _play(Maze(observed, start), player, PARTS[part])
        # The data must contain the way from a bar to the goal, but never within one episode.
        assert not (start in UPPER_BARS and end == "goal"), f"episode {episode} runs from {start} to the goal"
        trajectories.append(
            Trajectory(
                turns,
                terminated=end == "goal",
                group=f"maze-{seed}-{episode}",
                task="maze",
                source="scripted",
                labels={"part": part, "player": name, "end": end},
            )
        )
    return trajectories


def _play(maze: Maze, player: Callable[[Cell], str], part: frozenset[Cell]) -> tuple[tuple[Turn, ...], str]:
    """Play one episode, and return its turns and the way in which it ended.

    Args:
      player: returns the action in a cell.
      part: the cells in which the episode stays.
    Returns: the turns, with the last observation of an episode that is cut; and "goal" if the episode reached the
      goal, "leaving" if it was cut because it left the part, or "length" if it was cut after MAX_STEPS.
    """
    turns, end = list(maze.reset(seed=0)), ""
    while not end:
        action = player(maze.position)
        result = maze.step(action)
        turns += [Turn("assistant", action, reward=result.reward), *result.turns]
        if result.terminated:
            end = "goal"
        elif maze.position not in part:
            end = "leaving"
        elif maze.steps == MAX_STEPS:
            end = "length"
    return tuple(turns), end


def _report(trajectories: list[Trajectory]) -> dict[str, float]:
    ends = Counter(trajectory.labels["end"] for trajectory in trajectories)
    steps = sum(turn.is_trainable for trajectory in trajectories for turn in trajectory.turns)
    return {
        "episodes": len(trajectories),
        "steps": steps,
        "reached_goal": ends["goal"],
        "cut_by_leaving": ends["leaving"],
        "cut_by_length": ends["length"],
        "mean_return": sum(trajectory.total_return for trajectory in trajectories) / len(trajectories),
        "mean_length": steps / len(trajectories),
    }
