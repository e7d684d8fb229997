"""What players, environments and scorers look like from outside: structural types, no base classes to inherit.

An episode alternates: the environment gives turns, the agent replies with one text, the environment steps. Everything
comes in batches over rows, and each row has its own seed, so an episode does not depend on its neighbours.
"""

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from offline_lmrl.data.errors import InputError, shown
from offline_lmrl.data.trajectory import Turn


class StepResult(NamedTuple):
    """What follows an agent turn: the reply, the reward of that turn, and whether the episode ended or was cut."""

    turns: Sequence[Turn]
    reward: float
    terminated: bool
    truncated: bool


class Environment(Protocol):
    """One episode at a time.

    Three methods are optional: `labels() -> dict`, facts for the table once the episode is over (invalid actions,
    say), `options() -> list[str] | None`, the only texts allowed for the coming agent turn, and `task(seed) -> str`,
    the task of the episode of a seed, whose demonstrations are of use in it.
    """

    def reset(self, seed: int) -> Sequence[Turn]:
        """Starts the episode of this seed; returns the turns before the agent's first."""

    def step(self, text: str) -> StepResult:
        """Takes the agent's text."""


class VectorEnvironment(Protocol):
    """Many episodes at once; `rows` index into the seeds of the last reset, and a finished row is not stepped again.

    `labels(row)`, `options(row)` and `task(seed)` are optional, as in `Environment`.
    """

    def reset(self, seeds: Sequence[int]) -> list[Sequence[Turn]]:
        """Starts one episode per seed; returns each one's turns before the agent's first."""

    def step(self, rows: Sequence[int], texts: Sequence[str]) -> list[StepResult]:
        """Takes one text for each of these rows; results in the same order."""


class Scorer(Protocol):
    """Rates alternative continuations of one context: reward models, rules, Q heads.

    Optional: `score_each(rows)`, for many pairs of context and options at once, which `score_rows`
    (data/preferences.py) uses where it is there; and `origin`, what it was made from (the name of a run, a
    specification), values that JSON can hold, which is kept beside the rewards that it gives.
    """

    def score(self, context: Sequence[Turn], options: Sequence[Sequence[Turn]]) -> np.ndarray:
        """One raw score per option, shape (K,); higher is better."""


@dataclass(frozen=True)
class Reply:
    """One agent turn as sampled.

    Attributes:
      text: the turn's text, closing token removed.
      token_ids: the sampled ids, closing token included; None for players without a tokenizer.
      log_prob: per id, under the distribution it was sampled from, in nats.
      policy_log_prob: per id, under the unguided policy at the same temperature, in nats.
      closed: the closing token was sampled; False = the length limit ended the turn.
      labels: facts about how it was chosen, such as its score, that JSON can hold.
    """

    text: str
    token_ids: tuple[int, ...] | None = None
    log_prob: tuple[float, ...] | None = None
    policy_log_prob: tuple[float, ...] | None = None
    closed: bool = True
    labels: Mapping[str, Any] = field(default_factory=dict, compare=False)


class Session(Protocol):
    """One batch of episodes from their first turn to their last; it may keep caches per row.

    Optional: `fingerprint`, of the tokenizer that the replies' token_ids belong to, and `labels(row) -> dict`, facts
    for the table once the episode is over (the return that was asked for, say).
    """

    def reply(
        self,
        rows: Sequence[int],
        histories: Sequence[Sequence[Turn]],
        options: Sequence[Sequence[str] | None] | None = None,
    ) -> list[Reply]:
        """The next agent turn of each of these rows, given all turns so far; `options` restrict it to given texts."""


class Policy(Protocol):
    """A player: a language model with its decoding, or a script.

    `start` of one that reads demonstrations first also takes `prompts`, a list of them or None for each row.
    """

    def start(self, seeds: Sequence[int]) -> Session:
        """A session with one row per seed."""


def imported(name: str, field: str) -> Any:
    """What is called package.module:name, also in the working folder. Raises: InputError that names the field."""
    module_name, _, attribute = name.partition(":")
    wanted = "expected package.module:function or package.module:Class"
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a console script does not look there, unlike `python -m`
    try:
        module = importlib.import_module(module_name)
    except (ImportError, TypeError, ValueError) as error:
        raise InputError(f"{field}: found {shown(name)}, which cannot be imported ({error}), {wanted}") from error
    if not hasattr(module, attribute):
        raise InputError(f"{field}: found {shown(name)}, but {module} has no {attribute}, {wanted}")
    return getattr(module, attribute)
