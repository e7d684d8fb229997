"""The double-T maze of LMRL-Gym (Abdulhai et al. 2023) as a text game, re-implemented from its rules.

Cells are (row, column) from 0. The goal is (8, 6); the other 25 free cells are the starts. A step costs 1, but the
step that reaches the goal costs nothing; a text that is no action costs 4. After 100 steps the episode is cut: it is
then `truncated` and not `terminated`.

A full observation names the goal, the position and the walls, so it is the state, and a policy needs to see only the
last turn (`context: 1`). A partial observation names only the walls; there, the published policies see the last 40
texts.
"""

import functools
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from offline_lmrl.environments.scripted import distances_to
from offline_lmrl.errors import require, shown
from offline_lmrl.logs.protocols import StepResult
from offline_lmrl.logs.trajectory import Turn

Cell = tuple[int, int]

MOVES: dict[str, Cell] = {"move left": (0, -1), "move right": (0, 1), "move up": (-1, 0), "move down": (1, 0)}
SIDES: dict[str, Cell] = {"right": (0, 1), "left": (0, -1), "above": (-1, 0), "below": (1, 0)}
GOAL: Cell = (8, 6)
FREE: frozenset[Cell] = frozenset(
    [(1, column) for column in (*range(1, 6), *range(7, 12))]
    + [(row, column) for row in (2, 3, 4) for column in (3, 9)]
    + [(5, column) for column in range(3, 10)]
    + [(row, 6) for row in (6, 7, 8)]
)
STARTS: tuple[Cell, ...] = tuple(sorted(FREE - {GOAL}))
MAX_STEPS = 100


def move(cell: Cell, action: str) -> Cell:
    """Return the cell that one of the four MOVES leads to; a move into a wall does not change the cell."""
    row, column = cell[0] + MOVES[action][0], cell[1] + MOVES[action][1]
    return (row, column) if (row, column) in FREE else cell


def observation(cell: Cell, observed: Literal["full", "partial"]) -> str:
    """Return the text observed in `cell`: goal, position and adjacent walls ("full"), or only walls ("partial")."""
    walls = [side for side, (down, right) in SIDES.items() if (cell[0] + down, cell[1] + right) not in FREE]
    text = f"There {'is a wall' if len(walls) == 1 else 'are walls'} {', '.join(walls)}."
    if observed == "full":
        text = f"The goal is at {GOAL[0]}, {GOAL[1]}. You are at {cell[0]}, {cell[1]}. {text}"
    return text


def distances() -> dict[Cell, int]:
    """Return the number of steps from every free cell to the goal."""
    # Every move has an opposite move, so the cells that a cell leads to are also those that lead to it.
    return distances_to(GOAL, lambda cell: [move(cell, action) for action in MOVES])


class Maze:
    """The maze; implements Environment.

    Args:
      observed: "full" or "partial" observations.
      start: (row, column) where every episode starts; None = STARTS[seed % 25], so that seeds 0..799 are 32 episodes
        from each of the 25 starts.
    """

    def __init__(self, observed: Literal["full", "partial"] = "full", start: Sequence[int] | None = None):
        require(observed in ("full", "partial"), f"observed: found {shown(observed)}, expected 'full' or 'partial'")
        require(
            start is None or tuple(start) in STARTS,
            f"start: found {shown(start)}, expected a free cell (row, column) other than the goal",
        )
        self.observed = observed
        self.start = None if start is None else tuple(start)

    def reset(self, seed: int) -> Sequence[Turn]:
        """Start an episode and return its first observation, a user turn."""
        self.first = self.position = self.start or STARTS[seed % len(STARTS)]
        self.steps = self.invalid = 0
        return self._observe()

    def step(self, text: str) -> StepResult:
        """Play one of the four MOVES; white space around the text is ignored.

        An episode that is cut still returns the observation after its last step.
        """
        action = text.strip()
        self.steps += 1
        if action in MOVES:
            self.position = move(self.position, action)
        else:
            self.invalid += 1
        if self.position == GOAL:
            return StepResult((), 0.0, True, False)
        reward = -1.0 if action in MOVES else -4.0
        return StepResult(self._observe(), reward, False, self.steps == MAX_STEPS)

    def labels(self) -> dict[str, object]:
        """Return `invalid`, the number of texts that were no action, and `start`, the start cell [row, column]."""
        return {"invalid": self.invalid, "start": list(self.first)}

    def optimum(self) -> float:
        """Return the mean return, over the starts, of the best player: −6.84 for full observation.

        For partial observation, the best player does not know its start but remembers all observations and actions.
        Its return is far above −25.75, the return that has the published score 100 (configs/maze/partial.yaml).
        """
        return optimum(self.observed, STARTS if self.start is None else (self.start,))

    def _observe(self) -> Sequence[Turn]:
        return (Turn("user", observation(self.position, self.observed)),)


Belief = tuple[tuple[Cell, int], ...]  # cells where the player may be, each with the number of starts that lead there


def optimum(observed: Literal["full", "partial"], starts: Sequence[Cell] = STARTS) -> float:
    """Return the exact mean return, over `starts`, of the best player with perfect memory.

    A belief b is the set of cells where the player may be, each with a weight: the number of starts from which the
    player would now be there. Moves and observations are deterministic, so the number of steps that cost 1, summed
    over these starts, obeys

        cost_n(b) = min_a [ weight of b that action a does not move to the goal + Σ_parts cost_{n−1}(part) ],

    where n steps are left and the parts are the beliefs after a, one per observation. With full observation every part
    is one cell.

    Args:
      observed: "full" or "partial" observations.
      starts: the cells where episodes start, all equally likely.
    """

    @functools.cache
    def cost(belief: Belief, steps_left: int) -> int:
        if not steps_left:
            return 0
        costs = []
        for action in MOVES:
            moved: Counter[Cell] = Counter()
            for cell, weight in belief:
                moved[move(cell, action)] += weight
            del moved[GOAL]  # arriving is free and ends the episode
            costs.append(
                moved.total() + sum(cost(part, steps_left - 1) for part in _split_by_observation(moved, observed))
            )
        return min(costs)

    return -sum(cost(belief, MAX_STEPS) for belief in _split_by_observation(Counter(starts), observed)) / len(starts)


def _split_by_observation(weights: Counter[Cell], observed: Literal["full", "partial"]) -> list[Belief]:
    """Split weighted cells into beliefs, one for each observation: cells that look alike stay together.

    Args:
      weights: cell -> its weight.
      observed: "full" or "partial" observations.
    """
    parts: dict[str, list[tuple[Cell, int]]] = {}
    for cell, weight in sorted(weights.items()):
        parts.setdefault(observation(cell, observed), []).append((cell, weight))
    return [tuple(part) for part in parts.values()]
