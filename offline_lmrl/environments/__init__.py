"""Tasks in text that a policy can play: games, toys, a negotiation, or your own."""

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any

from offline_lmrl.data.errors import InputError, shown
from offline_lmrl.data.protocols import Environment, VectorEnvironment, imported
from offline_lmrl.data.trajectory import require_text

ENVIRONMENTS = {
    "maze": "offline_lmrl.environments.maze:Maze",
    "wordle": "offline_lmrl.environments.wordle:Wordle",
    "corridor": "offline_lmrl.environments.toys:Corridor",
    "gamble": "offline_lmrl.environments.toys:Gamble",
    "count": "offline_lmrl.environments.toys:Count",
    "count1": "offline_lmrl.environments.toys:Count1",
    "talk": "offline_lmrl.environments.toys:Talk",
    "talk_trap": "offline_lmrl.environments.toys:TalkTrap",
    "hidden_rule": "offline_lmrl.environments.toys:HiddenRule",
    "walk": "offline_lmrl.environments.toys:Walk",
    "pref_gold": "offline_lmrl.environments.pref_gold:PrefGold",
    "negotiation": "offline_lmrl.environments.negotiation:Negotiation",
    "prompts": "offline_lmrl.environments.prompts:PromptEnvironment",
}


def make_environment(name: str, **settings: Any) -> VectorEnvironment | Callable[[], Environment]:
    """What `rollout` takes: the environment itself if it plays many episodes at once, else a factory of it.

    Args:
      name: one of ENVIRONMENTS, or "package.module:Class" of your own, also in the working folder.
      settings: the arguments of its class.

    Raises InputError for a name that is not known (naming the nearest) and for settings the class does not take.
    """
    factory = functools.partial(_find(name), **settings)
    try:
        inspect.signature(factory.func).bind(**settings)
    except TypeError as error:
        raise InputError(f"environment {name}: {error}") from error
    environment = factory()  # also where only a factory is needed: wrong settings show now, not in the first episode
    return environment if is_vector(environment) else factory


def task_of(environment: VectorEnvironment | Callable[[], Environment]) -> Callable[[int], str]:
    """What names the task of an episode by its seed; `environment` is whatever `rollout` takes.

    Raises: InputError where nothing does.
    """
    made = environment() if callable(environment) else environment
    if not hasattr(made, "task"):
        raise InputError(
            f"environment: found {type(made).__name__}, which names no task of an episode, expected one "
            "with task(seed), by which demonstrations are chosen"
        )
    return made.task


def is_vector(environment: Any) -> bool:
    """Whether this is a VectorEnvironment: its `step` takes rows and texts, that of an Environment one text."""
    parameters = inspect.signature(environment.step).parameters.values()
    return sum(parameter.default is parameter.empty for parameter in parameters) == 2


def _find(name: str) -> Callable[..., Any]:
    require_text("environment.name", name)
    path = ENVIRONMENTS.get(name, name)
    if not path.partition(":")[2]:
        near = difflib.get_close_matches(name, ENVIRONMENTS, n=1, cutoff=0)[0]
        raise InputError(
            f"environment: found {shown(name)}, expected {near!r}, say, or your own as package.module:Class"
        )
    return imported(path, "environment")
