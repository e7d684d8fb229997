"""Demonstration prompts (Prompt-DT: Xu et al. 2022): other episodes of the same task, read before a window.

They stand behind the renderer's preamble, before everything of the window itself, and stay whole while old turns of
the window are dropped. No step lies in them, so they carry no loss. A model that is conditioned on returns reads them
with their own slots. Nothing but their turns marks where one ends and the next begins.

Deviations from the paper: a demonstration is given whole unless a part is asked for (the paper's code: its last
steps); prompt and window share one embedding; each row keeps its demonstrations in all epochs.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from offline_lmrl.data.errors import InputError, shown
from offline_lmrl.data.rendering import Renderer
from offline_lmrl.data.trajectory import Trajectory, with_own_token_ids

PARTS = ("whole", "first", "last", "best", "random")
Ids = tuple[int, ...]


class Shown(NamedTuple):
    """Turns first..stop−1 of a demonstration."""

    trajectory: Trajectory
    first: int
    stop: int


@dataclass(frozen=True)
class PromptSpec:
    """Which demonstrations a row is trained behind, and what is shown of them. A row without a prompt has none of it.

    n: demonstrations per row, all different and of the row's task.
    part: whole, or `turns` agent turns in a row with what was said before each: the first, the last, the best (largest
      sum of rewards, the earliest of equals) or random ones. turns: how many; of a demonstration with fewer, all.
    max_tokens: most tokens of all n together, slots included.
    exclude_self: a row is never its own demonstration, where the data are their own demonstrations.
    drop: share of the rows that is trained without a prompt, 0 to 1.
    demonstrations: file, folder or hub name of trajectories; None = the rows of the same data.
    seed: which rows get which demonstrations is a function of it and the row's number alone, the same in every epoch
      and after every resumption.
    """

    n: int = 1
    part: Literal["whole", "first", "last", "best", "random"] = "whole"
    turns: int = 1
    max_tokens: int = 512
    exclude_self: bool = True
    drop: float = 0.0
    demonstrations: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            raise InputError(f"prompt.part: found {shown(self.part)}, expected one of {', '.join(PARTS)}")
        for name in ("n", "turns", "max_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"prompt.{name}: found {getattr(self, name)}, expected at least 1")
        if not 0 <= self.drop <= 1:
            raise InputError(f"prompt.drop: found {self.drop}, expected 0 to 1")
        if self.seed < 0:
            raise InputError(f"prompt.seed: found {self.seed}, expected at least 0")

    def cut(self, demonstration: Trajectory, rng: np.random.Generator) -> Shown:
        """The part of a demonstration that is shown; `rng` chooses random turns."""
        agent = [index for index, turn in enumerate(demonstration.turns) if turn.is_trainable]
        last = len(agent) - self.turns  # the latest place where that many agent turns begin
        if self.part == "whole" or last < 0:
            return Shown(demonstration, 0, len(demonstration.turns))
        place = {"first": 0, "last": last}.get(self.part)
        if self.part == "best":
            rewards = [demonstration.turns[index].reward or 0.0 for index in agent]
            place = int(np.argmax([sum(rewards[i : i + self.turns]) for i in range(last + 1)]))
        elif self.part == "random":
            place = int(rng.integers(last + 1))
        return Shown(demonstration, agent[place - 1] + 1 if place else 0, agent[place + self.turns - 1] + 1)


def draw_prompts(
    spec: PromptSpec, trajectories: Sequence[Trajectory], demonstrations: Sequence[Trajectory] | None = None
) -> Iterator[tuple[Shown, ...]]:
    """The prompt of every trajectory, in their order; () for those that are trained without one.

    Args:
      demonstrations: what is drawn from; None = the trajectories themselves.
    Raises: InputError for a row without a task, and for a task with too few demonstrations.
    """
    pool = trajectories if demonstrations is None else demonstrations
    of_task: dict[str, list[int]] = defaultdict(list)
    for index, demonstration in enumerate(pool):
        of_task[demonstration.task].append(index)
    excludes = demonstrations is None and spec.exclude_self
    for row, trajectory in enumerate(trajectories):
        if not trajectory.task:
            raise InputError(f"row {row + 1}: task: found none, expected one: demonstrations are of the same task")
        known = of_task.get(trajectory.task, [])
        available = len(known) - excludes
        if available < spec.n:
            others = " beside the row itself" if excludes else ""
            raise InputError(
                f"row {row + 1}: prompt.n: found {available} demonstrations of task {trajectory.task!r}"
                f"{others}, expected at least {spec.n}"
            )
        rng = np.random.default_rng((spec.seed, row))
        if rng.random() < spec.drop:
            yield ()
            continue
        drawn = rng.choice(available, spec.n, replace=False)
        if excludes:
            drawn += drawn >= bisect_left(known, row)  # steps over the row itself
        yield tuple(spec.cut(pool[known[place]], rng) for place in drawn)


def task_prompts(
    spec: PromptSpec, demonstrations: Sequence[Trajectory], task: Callable[[int], str]
) -> Callable[[int], list[Trajectory]]:
    """What an episode is played behind, as a function of its seed: `spec.n` demonstrations of its task, all different.

    Args:
      spec: `n` and `seed` are read; a part is shown where the policy does so. task: of the episode of a seed.
    Raises: InputError, when called, for a task with too few demonstrations.
    """
    of_task: dict[str, list[Trajectory]] = defaultdict(list)
    for demonstration in demonstrations:
        of_task[demonstration.task].append(demonstration)

    def prompt(seed: int) -> list[Trajectory]:
        known = of_task.get(task(seed), [])
        if len(known) < spec.n:
            raise InputError(f"demonstrations: found {len(known)} of task {task(seed)!r}, expected at least {spec.n}")
        chosen = np.random.default_rng((spec.seed, seed)).choice(len(known), spec.n, replace=False)
        return [known[place] for place in chosen]

    return prompt


def prompt_ids(
    shown: Sequence[Shown], renderer: Renderer, slots: Callable[[Trajectory], Sequence[Ids]] | None = None
) -> Ids:
    """The ids of a prompt.

    Args:
      slots: gives what stands before the opening of each agent turn, as in `EpisodeEncoder`; None = nothing.
    """
    ids: list[int] = []
    for trajectory, first, stop in shown:
        turns = with_own_token_ids(trajectory, renderer.fingerprint).turns
        agent = [index for index, turn in enumerate(turns) if turn.is_trainable]
        slot = dict(zip(agent, slots(trajectory)[: len(agent)], strict=True)) if slots else {}
        encoded = [turn.behind(slot.get(index, ())) for index, turn in enumerate(renderer.encode(turns))]
        part = turns[first:stop]
        pieces = renderer.window_ids(part, encoded[first:stop], 0, len(part), live=False)
        ids += [token for piece in pieces for token in piece]
    return tuple(ids)


def encode_prompts(
    spec: PromptSpec,
    trajectories: Sequence[Trajectory],
    demonstrations: Sequence[Trajectory] | None,
    renderer: Renderer,
    slots: Callable[[Trajectory], Sequence[Ids]] | None,
) -> Iterator[Ids]:
    """The ids of the prompt of every trajectory; arguments as in `draw_prompts` and `prompt_ids`.

    Raises: InputError also for a prompt of more than max_tokens.
    """
    for row, part in enumerate(draw_prompts(spec, trajectories, demonstrations)):
        ids = prompt_ids(part, renderer, slots)
        if len(ids) > spec.max_tokens:
            raise InputError(
                f"row {row + 1}: prompt.max_tokens: found a prompt of {len(ids)} tokens, expected at "
                f"most {spec.max_tokens}; raise it, show fewer demonstrations, or a part of them"
            )
        yield ids
