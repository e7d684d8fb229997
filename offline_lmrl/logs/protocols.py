"""Structural types for players, environments and scorers; no base classes to inherit.

In an episode the environment gives turns, the agent replies with one text, and the environment steps, and so on. All
calls are batched over rows. Each row has its own seed, so an episode does not depend on the others in the batch.
"""

import importlib
import inspect
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from offline_lmrl.errors import InputError, shown
from offline_lmrl.logs.trajectory import Turn


class StepResult(NamedTuple):
    """The environment's answer to an agent turn.

    Attributes:
      turns: the environment's turns that follow.
      reward: the reward of the agent turn.
      terminated: the episode ended.
      truncated: the episode was cut off.
    """

    turns: Sequence[Turn]
    reward: float
    terminated: bool
    truncated: bool


class Environment(Protocol):
    """An environment that plays one episode at a time.

    Three methods are optional:
    - `labels() -> dict`: facts for the results table once the episode is over (invalid actions, for example).
    - `options() -> list[str] | None`: the only texts allowed for the coming agent turn; None = any text.
    - `task(seed) -> str`: the task of the episode with this seed, used to choose its demonstrations.
    """

    def reset(self, seed: int) -> Sequence[Turn]:
        """Start the episode of this seed; return the turns before the agent's first."""

    def step(self, text: str) -> StepResult:
        """Play the agent's text."""


class VectorEnvironment(Protocol):
    """An environment that plays many episodes at once.

    `rows` index into the seeds of the last reset. A finished row is not stepped again.
    `labels(row)`, `options(row)` and `task(seed)` are optional, as in `Environment`.
    """

    def reset(self, seeds: Sequence[int]) -> list[Sequence[Turn]]:
        """Start one episode per seed; return each episode's turns before the agent's first."""

    def step(self, rows: Sequence[int], texts: Sequence[str]) -> list[StepResult]:
        """Play one text in each of these rows; return the results in the same order."""


def is_vector(environment: Any) -> bool:
    """True for a VectorEnvironment, whose `step` takes rows and texts; the `step` of an Environment takes one text."""
    parameters = inspect.signature(environment.step).parameters.values()
    return sum(parameter.default is parameter.empty for parameter in parameters) == 2


class Scorer(Protocol):
    """A reward model, rule or Q head that rates alternative continuations of one context.

    Two members are optional:
    - `score_each(rows)`: score many pairs of context and options at once. `score_rows` (logs/preferences.py) uses it
      if present.
    - `origin`: what the scorer was made from (the name of a run, a specification), as values that JSON can hold. It is
      stored beside the rewards that the scorer gives.
    """

    def score(self, context: Sequence[Turn], options: Sequence[Sequence[Turn]]) -> np.ndarray:
        """Return one raw score per option, shape (K,); higher is better."""


@dataclass(frozen=True)
class Reply:
    """One sampled agent turn.

    Attributes:
      text: the turn's text without its closing token.
      token_ids: the sampled ids with the closing token; None for players without a tokenizer.
      log_prob: log probability of each id under the distribution it was sampled from, in nats.
      policy_log_prob: log probability of each id under the unguided policy at the same temperature, in nats.
      closed: the closing token was sampled; False = the length limit ended the turn.
      labels: facts about how the reply was chosen, such as its score, as values that JSON can hold.
    """

    text: str
    token_ids: tuple[int, ...] | None = None
    log_prob: tuple[float, ...] | None = None
    policy_log_prob: tuple[float, ...] | None = None
    closed: bool = True
    labels: Mapping[str, Any] = field(default_factory=dict, compare=False)


class Session(Protocol):
    """One batch of episodes from their first turn to their last. A session may keep caches per row.

    Two members are optional:
    - `fingerprint`: that of the tokenizer to which the replies' token_ids belong.
    - `labels(row) -> dict`: facts for the results table once the episode is over (the requested return, for example).
    """

    def reply(
        self,
        rows: Sequence[int],
        histories: Sequence[Sequence[Turn]],
        options: Sequence[Sequence[str] | None] | None = None,
    ) -> list[Reply]:
        """Return the next agent turn of each of these rows.

        Args:
          histories: all turns so far of each row.
          options: the texts to which each row's reply is restricted; None = any text.
        """


class Policy(Protocol):
    """A player: a language model with its decoding, or a script.

    The `start` of a policy that reads demonstrations first also takes `few_shot`: for each row its list of
    demonstrations, or None.
    """

    def start(self, seeds: Sequence[int]) -> Session:
        """Return a session with one row per seed."""


def import_object(name: str, field: str) -> Any:
    """Import the object called package.module:name; modules in the working folder are found too.

    Args:
      field: the setting that the error names.

    Raises: InputError if it cannot be imported or does not exist.
    """
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
