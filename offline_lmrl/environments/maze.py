"""The double-T maze of LMRL-Gym (Abdulhai et al. 2023) as a text game, re-implemented from its rules.

Cells are (row, column) from 0. The goal is (8, 6), the other 25 free cells are the starts. A step costs 1, the step
that reaches the goal nothing, a text that is no action 4; after 100 steps the episode is cut, which is no end of the
game: it is `truncated` and never `terminated`.

Full observation names the goal, the position and the walls, so that a policy that sees one turn (`context: 1`) plays
a Markov game. Partial observation names the walls only; the published policies see the last 40 texts then.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Literal

from offline_lmrl.data.errors import InputError, shown
from offline_lmrl.data.protocols import StepResult
from offline_lmrl.data.trajectory import Turn

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
# Returns that the published scale maps to 0, 50 and 100: the worst play, the mean of the published logs, the best.
SCALES = {"full": (-101.0, -83.0, -6.84), "partial": (-101.0, -83.0, -25.75)}


def move(cell: Cell, action: str) -> Cell:
    """The cell that one of the four MOVES leads to; walking into a wall leaves the position."""
    row, column = cell[0] + MOVES[action][0], cell[1] + MOVES[action][1]
    return (row, column) if (row, column) in FREE else cell


def observation(cell: Cell, observed: Literal["full", "partial"]) -> str:
    """What the player is told in `cell`: three short sentences (full) or the last of them, the walls (partial)."""
    walls = [side for side, (down, right) in SIDES.items() if (cell[0] + down, cell[1] + right) not in FREE]
    text = f"There {'is a wall' if len(walls) == 1 else 'are walls'} {', '.join(walls)}."
    if observed == "full":
        text = f"The goal is at {GOAL[0]}, {GOAL[1]}. You are at {cell[0]}, {cell[1]}. {text}"
    return text


def normalised(score: float, observed: Literal["full", "partial"] = "full") -> float:
    """Published score of a mean return: piecewise linear through (−101, 0), (−83, 50) and (the best return, 100)."""
    low, middle, high = SCALES[observed]
    if score < middle:
        return 50 * (score - low) / (middle - low)
    return 50 + 50 * (score - middle) / (high - middle)


def distances() -> dict[Cell, int]:
    """Steps from every free cell to the goal, by breadth-first search."""
    found, frontier = {GOAL: 0}, [GOAL]
    for cell in frontier:  # grows while it is read
        for action in MOVES:  # moves are undone by moves, so the search may run from the goal
            neighbour = move(cell, action)
            if neighbour not in found:
                found[neighbour] = found[cell] + 1
                frontier.append(neighbour)
    return found


class Maze:
    """One player in the maze; implements Environment.

    Args:
      observed: "full" or "partial".
      start: (row, column) of every episode; None takes STARTS[seed % 25], so that seeds 0..799 are 32 episodes from
        each of the 25 starts.
    """

    behaviour = -83.0  # mean return of the published logs; the logs of `prepare maze` report their own

    def __init__(self, observed: Literal["full", "partial"] = "full", start: Sequence[int] | None = None):
        if observed not in SCALES:
            raise InputError(f"observed: found {shown(observed)}, expected 'full' or 'partial'")
        if start is not None and tuple(start) not in STARTS:
            raise InputError(f"start: found {tuple(start)}, expected a free cell (row, column) other than the goal")
        self.observed = observed
        self.start = None if start is None else tuple(start)

    def reset(self, seed: int) -> Sequence[Turn]:
        """Start an episode and give its first observation, a user turn."""
        self.first = self.position = self.start or STARTS[seed % len(STARTS)]
        self.steps = self.invalid = 0
        return self._observe()

    def step(self, text: str) -> StepResult:
        """Play one of the four MOVES (white space around it is ignored); the last step's observation is kept."""
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
        """Number of texts that were no action, and the start cell of the episode."""
        return {"invalid": self.invalid, "start": list(self.first)}

    def optimum(self) -> float:
        """Mean return over the starts of the best player: −6.84 for full observation.

        For partial observation it is the best player that remembers everything it has seen, who does not know its
        start; the published scale puts 100 at −25.75 there, far below.
        """
        return optimum(self.observed, STARTS if self.start is None else (self.start,))

    def _observe(self) -> Sequence[Turn]:
        return (Turn("user", observation(self.position, self.observed)),)


Belief = tuple[tuple[Cell, int], ...]  # cells where the player may be, each with the number of starts that led there


def optimum(observed: Literal["full", "partial"], starts: Sequence[Cell] = STARTS) -> float:
    """Exact mean return of the best player with perfect memory, over `starts`.

    Moves and observations are certain, so what the player knows is a set of weighted cells. The expected number of
    paid steps from it obeys  cost(b) = min_a [ steps of b not arriving under a + Σ cost(parts of b told apart) ]; it
    is iterated from 0 to its fixed point. Full observation tells all cells apart, which is breadth-first search.
    """
    first = _told_apart(Counter(starts), lambda cell: observation(cell, observed))
    choices: dict[Belief, list[tuple[int, list[Belief]]]] = {}
    frontier = list(first)
    for belief in frontier:  # grows while it is read
        if belief in choices:
            continue
        choices[belief] = []
        for action in MOVES:
            moved: Counter[Cell] = Counter()
            for cell, weight in belief:
                moved[move(cell, action)] += weight
            del moved[GOAL]  # arriving is free and ends the episode
            parts = _told_apart(moved, lambda cell: observation(cell, observed))
            choices[belief].append((moved.total(), parts))
            frontier.extend(parts)
    cost, previous = dict.fromkeys(choices, 0), None
    while cost != previous:
        previous = cost
        cost = {b: min(paid + sum(previous[p] for p in parts) for paid, parts in choices[b]) for b in choices}
    return -sum(cost[belief] for belief in first) / len(starts)


def _told_apart(weights: Counter[Cell], observe: Callable[[Cell], Hashable]) -> list[Belief]:
    """Split weighted cells into the sets that one observation each leaves possible."""
    parts: dict[Hashable, list[tuple[Cell, int]]] = {}
    for cell, weight in sorted(weights.items()):
        parts.setdefault(observe(cell), []).append((cell, weight))
    return [tuple(part) for part in parts.values()]
