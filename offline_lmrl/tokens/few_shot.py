"""Few-shot demonstrations (Prompt-DT: Xu et al. 2022): other episodes of the same task, put before a window.

A window is what the policy sees before a reply (tokens/windows.py). The demonstrations come after its preamble (what
the template prints before the first turn) and before its turns. They stay whole when old turns of the window are
dropped. They contain no trained tokens, so they contribute no loss. For a return-conditioned model, each of their
agent turns has the ids of its own return-to-go (tokens/conditioning.py). No separator is put between demonstrations.

Deviations from the paper: a demonstration is whole unless `part` selects a part (the paper's code: its last steps);
demonstrations and window share one embedding; each row keeps its demonstrations in all epochs.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal, NamedTuple

import numpy as np

from offline_lmrl.errors import InputError, require, shown
from offline_lmrl.logs.trajectory import Trajectory, with_own_token_ids
from offline_lmrl.settings import setting
from offline_lmrl.tokens.rendering import Renderer
from offline_lmrl.tokens.windows import EncodedDialogue, Ids, agent_turns

PARTS = ("whole", "first", "last", "best", "random")


class Shown(NamedTuple):
    """The shown part of a demonstration: the turns first..stop−1 of a trajectory."""

    trajectory: Trajectory
    first: int
    stop: int


@dataclass(frozen=True)
class FewShotConfig:
    """The settings that choose and truncate the few-shot demonstrations of each training row."""

    n: int = setting(1, "Number of demonstrations per row, all different and all of the row's task.")
    part: Literal["whole", "first", "last", "best", "random"] = setting(
        "whole",
        "whole, or `turns` consecutive agent turns with the turns before each: the first, the last, the best (largest "
        "sum of rewards; the earliest if equal) or random ones.",
    )
    turns: int = setting(1, "Number of agent turns in a part; a demonstration with fewer is shown whole.")
    max_tokens: int = setting(
        512, "Maximum number of tokens of all n demonstrations together, return_ids_for included."
    )
    exclude_self: bool = setting(
        True,
        "Never show a row itself as a demonstration; without effect if `demonstrations` are other data.",
    )
    drop: float = setting(0.0, "Share of the rows that are trained without demonstrations, 0 to 1.")
    demonstrations: str | None = setting(
        None,
        "File, folder or hub name of trajectories; null = the training rows themselves.",
    )
    seed: int = setting(
        0,
        "Seed of the choice. A row's demonstrations depend only on the seed and the row's number, so they are the "
        "same in every epoch and after every resumption.",
    )

    def __post_init__(self) -> None:
        require(self.part in PARTS, f"few_shot.part: found {shown(self.part)}, expected one of {', '.join(PARTS)}")
        for name, value, least in (
            ("n", self.n, 1),
            ("turns", self.turns, 1),
            ("max_tokens", self.max_tokens, 1),
            ("seed", self.seed, 0),
        ):
            require(value >= least, f"few_shot.{name}: found {value}, expected at least {least}")
        require(0 <= self.drop <= 1, f"few_shot.drop: found {self.drop}, expected a share from 0 to 1")

    def cut(self, demonstration: Trajectory, rng: np.random.Generator) -> Shown:
        """Return the part of a demonstration to show, as `part` and `turns` select it; only "random" uses `rng`."""
        agent = agent_turns(demonstration.turns)
        last = len(agent) - self.turns  # the last index at which so many agent turns can begin
        if self.part == "whole" or last < 0:
            return Shown(demonstration, 0, len(demonstration.turns))
        place = {"first": 0, "last": last}.get(self.part)
        if self.part == "best":
            rewards = [demonstration.turns[index].reward or 0.0 for index in agent]
            place = int(np.argmax([sum(rewards[i : i + self.turns]) for i in range(last + 1)]))
        elif self.part == "random":
            place = int(rng.integers(last + 1))
        return Shown(demonstration, agent[place - 1] + 1 if place else 0, agent[place + self.turns - 1] + 1)


def draw_few_shot(
    spec: FewShotConfig, trajectories: Sequence[Trajectory], demonstrations: Sequence[Trajectory] | None = None
) -> Iterator[tuple[Shown, ...]]:
    """Draw, for each training row, `spec.n` demonstrations of the same task, and yield the parts to show.

    Args:
      spec: how demonstrations are chosen and cut.
      trajectories: the training rows.
      demonstrations: the trajectories to draw from; None = `trajectories`.
    Returns: one tuple per row, in order; () for a row that is trained without demonstrations (`spec.drop`).
    Raises: InputError for a row without a task, and for a task with too few demonstrations.
    """
    pool = trajectories if demonstrations is None else demonstrations
    of_task = _rows_of_task(pool)
    excludes = demonstrations is None and spec.exclude_self
    for row, trajectory in enumerate(trajectories):
        require(
            bool(trajectory.task),
            f"row {row + 1}: task: found none, expected one, because demonstrations come from the same task",
        )
        known = of_task.get(trajectory.task, [])
        available = len(known) - excludes
        if available < spec.n:
            others = " other than the row itself" if excludes else ""
            raise InputError(
                f"row {row + 1}: few_shot.n: found {available} demonstrations of task {trajectory.task!r}"
                f"{others}, expected at least {spec.n}"
            )
        rng = np.random.default_rng((spec.seed, row))
        if rng.random() < spec.drop:
            yield ()
            continue
        drawn = rng.choice(available, spec.n, replace=False)
        if excludes:
            drawn += drawn >= bisect_left(known, row)  # skip the row itself
        yield tuple(spec.cut(pool[known[place]], rng) for place in drawn)


def few_shot_of_task(
    spec: FewShotConfig, demonstrations: Sequence[Trajectory], task: Callable[[int], str]
) -> Callable[[int], list[Trajectory]]:
    """Return a function that draws the demonstrations of an episode to be played.

    Args:
      spec: only `n` and `seed` are used here; the policy later selects the part to show.
      demonstrations: the trajectories to draw from.
      task: a function from an episode's seed to its task.
    Returns: a function from an episode's seed to `spec.n` different demonstrations of the episode's task, whole. It
      raises InputError for a task with too few demonstrations.
    """
    of_task = _rows_of_task(demonstrations)

    def drawn(seed: int) -> list[Trajectory]:
        known = of_task.get(task(seed), [])
        require(
            len(known) >= spec.n,
            f"demonstrations: found {len(known)} of task {task(seed)!r}, expected at least {spec.n}",
        )
        chosen = np.random.default_rng((spec.seed, seed)).choice(len(known), spec.n, replace=False)
        return [demonstrations[known[place]] for place in chosen]

    return drawn


def _rows_of_task(demonstrations: Sequence[Trajectory]) -> dict[str, list[int]]:
    """Map each task to the indices of its demonstrations."""
    of_task: dict[str, list[int]] = defaultdict(list)
    for index, demonstration in enumerate(demonstrations):
        of_task[demonstration.task].append(index)
    return of_task


def few_shot_ids(
    shown: Sequence[Shown], renderer: Renderer, return_ids_for: Callable[[Trajectory], Sequence[Ids]] | None = None
) -> Ids:
    """Return the token ids of the shown parts of few-shot demonstrations, concatenated.

    Args:
      shown: the parts, in order.
      return_ids_for: a function of a trajectory that returns, for each of its agent turns, the return ids to put
        before the opening, such as `ReturnTokens.of_log`; an entry for a turn after the end is not used; None = no
        ids.
    """
    ids: list[int] = []
    for trajectory, first, stop in shown:
        turns = with_own_token_ids(trajectory, renderer.fingerprint).turns
        own = return_ids_for and return_ids_for(trajectory)[: len(agent_turns(turns))]
        part, encoded = turns[first:stop], EncodedDialogue(turns, renderer, own).encoded[first:stop]
        ids += chain.from_iterable(renderer.window_ids(part, encoded, 0, len(part), live=False))
    return tuple(ids)


def encode_few_shot(
    spec: FewShotConfig,
    trajectories: Sequence[Trajectory],
    demonstrations: Sequence[Trajectory] | None,
    renderer: Renderer,
    return_ids_for: Callable[[Trajectory], Sequence[Ids]] | None,
) -> Iterator[Ids]:
    """Draw the demonstrations of each training row and yield their token ids, () for a row without any.

    Arguments are those of `draw_few_shot` and `few_shot_ids`.

    Raises: InputError as `draw_few_shot`, and if the demonstrations of a row have more than `spec.max_tokens` tokens.
    """
    for row, part in enumerate(draw_few_shot(spec, trajectories, demonstrations)):
        ids = few_shot_ids(part, renderer, return_ids_for)
        require(
            len(ids) <= spec.max_tokens,
            f"row {row + 1}: few_shot.max_tokens: found demonstrations of {len(ids)} tokens, expected at "
            f"most {spec.max_tokens}; raise few_shot.max_tokens, lower few_shot.n, or show only a part of each "
            "demonstration (few_shot.part)",
        )
        yield ids
