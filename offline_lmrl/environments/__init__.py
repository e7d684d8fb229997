"""Text environments that a policy can play: games, toys, a negotiation, prompt sets, or your own."""

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
    """Make an environment for `rollout`: itself if it plays many episodes at once, else a factory of it.

    Args:
      name: one of ENVIRONMENTS, or "package.module:Class" of your own; the working folder is searched too.
      settings: the arguments of its class.

    Raises: InputError if the name is unknown (naming the nearest one), or if the class does not take the settings.
    """
    factory = functools.partial(_find(name), **settings)
    try:
        inspect.signature(factory.func).bind(**settings)
    except TypeError as error:
        raise InputError(f"environment {name}: {error}") from error
    environment = factory()  # even if only the factory is returned, so that wrong settings raise now
    return environment if is_vector(environment) else factory


def task_of(environment: VectorEnvironment | Callable[[], Environment]) -> Callable[[int], str]:
    """Return the function that maps the seed of an episode to the name of its task.

    Args:
      environment: an environment or a factory of it, as `rollout` takes it.
    Raises: InputError if the environment does not name tasks.
    """
    made = environment() if callable(environment) else environment
    if not hasattr(made, "task"):
        raise InputError(
            f"environment: found {type(made).__name__}, which has no method task(seed), expected one with it: "
            "demonstrations are chosen by the task of an episode"
        )
    return made.task


def is_vector(environment: Any) -> bool:
    """True for a VectorEnvironment, whose `step` takes rows and texts; the `step` of an Environment takes one text."""
    parameters = inspect.signature(environment.step).parameters.values()
    return sum(parameter.default is parameter.empty for parameter in parameters) == 2


def _find(name: str) -> Callable[..., Any]:
    require_text("environment.name", name)
    path = ENVIRONMENTS.get(name, name)
    if not path.partition(":")[2]:
        near = difflib.get_close_matches(name, ENVIRONMENTS, n=1, cutoff=0)[0]
        raise InputError(
            f"environment: found {shown(name)}, expected a known name, such as {near!r}, or package.module:Class"
        )
    return imported(path, "environment")
