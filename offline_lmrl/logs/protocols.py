"""Structural types for players, environments and scorers; no base classes to inherit.

In an episode the environment gives turns, the agent replies with one text, the environment answers with further turns,
and so on. Several episodes are played at once, as a batch. A row is the index of an episode in its batch. Each row has
its own seed, so an episode does not depend on the others in the batch.
"""

import importlib
import inspect
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from offline_lmrl.errors import InputError, shown
from offline_lmrl.logs.trajectory import Turn

# The optional members of environments, sessions and scorers, with the value of each where an object lacks it.
OPTIONAL: dict[str, Any] = {
    "labels": lambda *row: {},
    "options": lambda *row: None,
    "task": None,
    "fingerprint": None,
    "counts": {},
    "origin": None,
    "score_each": None,
    "fits": lambda context, options: True,
    "shift": 0.0,
}


def optional(owner: Any, member: str) -> Any:
    """Return an optional member of an environment, session or scorer, or the value in OPTIONAL if `owner` lacks it."""
    return getattr(owner, member, OPTIONAL[member])


class StepResult(NamedTuple):
    """The environment's answer to an agent turn.

    Attributes:
      turns: the environment's turns that follow the agent turn.
      reward: the reward of the agent turn.
      terminated: True if the episode ended by itself.
      truncated: True if the episode was cut off, for example by a limit on its length.
    """

    turns: Sequence[Turn]
    reward: float
    terminated: bool
    truncated: bool


class Environment(Protocol):
    """An environment that plays one episode at a time.

    Four members are optional (`optional` returns them or their defaults):
    - `labels() -> dict`: facts about the finished episode for the results table (number of invalid actions, for
      example).
    - `options() -> list[str] | None`: the only texts allowed for the next agent turn; None = any text.
    - `task(seed) -> str`: the name of the task in the episode with this seed, by which few-shot demonstrations are
      chosen.
    - `counts`: reason -> number of rows that the environment left out of its own data.
    """

    def reset(self, seed: int) -> Sequence[Turn]:
        """Start the episode of this seed; return the turns before the agent's first turn."""

    def step(self, text: str) -> StepResult:
        """Play a text as the agent's turn; return the environment's answer."""


class VectorEnvironment(Protocol):
    """An environment that plays many episodes at once.

    Row i is the episode of the i-th seed of the last reset. A finished row is not stepped again.
    The members `labels(row)`, `options(row)`, `task(seed)` and `counts` are optional; they mean the same as in
    `Environment`.
    """

    def reset(self, seeds: Sequence[int]) -> list[Sequence[Turn]]:
        """Start one episode per seed; return, for each, the turns before the agent's first turn."""

    def step(self, rows: Sequence[int], texts: Sequence[str]) -> list[StepResult]:
        """Play texts[i] as the agent's turn in the episode rows[i]; return one result per row, in the same order."""


def is_vector(environment: Any) -> bool:
    """True for a VectorEnvironment, whose `step` takes rows and texts; the `step` of an Environment takes one text."""
    parameters = inspect.signature(environment.step).parameters.values()
    return sum(parameter.default is parameter.empty for parameter in parameters) == 2


@runtime_checkable
class Scorer(Protocol):
    """A reward model, rule or Q head that rates alternative replies (options) to one context.

    Four members are optional:
    - `fits(context, options) -> bool`: False if the options are too long for the scorer.
    - `shift`: the constant in every score that no turn of a reply earned.
    - `score_each(rows)`: score many (context, options) at once, with one result of `score` per row. `score_rows`
      (logs/preferences.py) uses it if present.
    - `origin`: the name or specification that the scorer was loaded from, as values that JSON can hold. It is stored
      with the rewards that the scorer gives.
    """

    def score(self, context: Sequence[Turn], options: Sequence[Sequence[Turn]]) -> np.ndarray:
        """Return the scores of K alternative replies to a context, (K,); higher is better.

        Args:
          context: the turns before the replies.
          options: the replies, each a sequence of turns.
        """


@dataclass(frozen=True)
class Reply:
    """One sampled agent turn.

    Attributes:
      text: the turn's text without its closing token.
      token_ids: the sampled ids with the closing token; None for players without a tokenizer.
      log_prob: log probability of each id under the distribution it was sampled from, in nats.
      policy_log_prob: log probability of each id, in nats, under the policy at the sampling temperature, without
        guidance by Q and V and without filters such as top-p.
      closed: True if the closing token was sampled; False if the length limit ended the turn.
      labels: facts about how the reply was chosen, such as its score, as values that JSON can hold.
    """

    text: str
    token_ids: tuple[int, ...] | None = None
    log_prob: tuple[float, ...] | None = None
    policy_log_prob: tuple[float, ...] | None = None
    closed: bool = True
    labels: Mapping[str, Any] = field(default_factory=dict, compare=False)


class Session(Protocol):
    """A policy's side of one batch of episodes, from their first turn to their last. It may keep caches per row.

    Two members are optional:
    - `fingerprint`: a hash that identifies the tokenizer and chat format to which the replies' token_ids belong.
    - `labels(row) -> dict`: facts about the finished episode for the results table (the requested return, for
      example).
    """

    def reply(
        self,
        rows: Sequence[int],
        histories: Sequence[Sequence[Turn]],
        options: Sequence[Sequence[str] | None] | None = None,
    ) -> list[Reply]:
        """Return the next agent turn of each of these rows.

        Args:
          rows: indices of episodes that have not ended.
          histories: for each of `rows`, all turns of the episode so far.
          options: for each of `rows`, the texts to which the reply is restricted, or None for any text; None = no row
            is restricted.
        """


class Policy(Protocol):
    """A player: a language model with its decoding, or a script.

    The `start` of a policy that can read few-shot demonstrations also takes the argument `few_shot`: a list with one
    entry per seed, either a list of demonstrations (trajectories) or None for no demonstrations.
    """

    def start(self, seeds: Sequence[int]) -> Session:
        """Start a batch of episodes; return the session, in which row i is played with the sampling seed seeds[i]."""


def import_object(name: str, field: str) -> Any:
    """Import the object called package.module:name; modules in the working folder are found too.

    Args:
      name: such as "my_rewards:score".
      field: the setting that the error message names.

    Raises: InputError if the object cannot be imported or does not exist.
    """
    module_name, _, attribute = name.partition(":")
    wanted = "expected package.module:function or package.module:Class"
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a console script does not look there, unlike `python -m`
    try:
        module = importlib.import_module(module_name)
    except (ImportError, TypeError, ValueError) as error:
        raise InputError(f"{field}: found {shown(name)}, which cannot be imported ({error}), {wanted}") from error
    try:
        return getattr(module, attribute)
    except AttributeError as error:
        raise InputError(f"{field}: found {shown(name)}, but {module} has no {attribute}, {wanted}") from error
