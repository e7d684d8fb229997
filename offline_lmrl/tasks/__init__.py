"""Text environments that a policy can play: games, toys, a negotiation, prompt sets, or your own.

Environments implement `Environment` or `VectorEnvironment` (logs/protocols.py).
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from offline_lmrl.errors import InputError, require, shown
from offline_lmrl.logs.protocols import Environment, VectorEnvironment, import_object, is_vector, optional
from offline_lmrl.logs.trajectory import require_text
from offline_lmrl.settings import Parameter, arguments, nearest, parameters_of

ENVIRONMENTS = {
    "maze": "offline_lmrl.tasks.maze:Maze",
    "wordle": "offline_lmrl.tasks.wordle:Wordle",
    "corridor": "offline_lmrl.tasks.corridor:Corridor",
    "gamble": "offline_lmrl.tasks.gamble:Gamble",
    "count": "offline_lmrl.tasks.count:Count",
    "count1": "offline_lmrl.tasks.count:Count1",
    "talk": "offline_lmrl.tasks.count:Talk",
    "talk_trap": "offline_lmrl.tasks.talk_trap:TalkTrap",
    "hidden_rule": "offline_lmrl.tasks.hidden_rule:HiddenRule",
    "walk": "offline_lmrl.tasks.walk:Walk",
    "pref_gold": "offline_lmrl.tasks.pref_gold:PrefGold",
    "support": "offline_lmrl.tasks.support:Support",
    "negotiation": "offline_lmrl.tasks.negotiation:Negotiation",
    "prompts": "offline_lmrl.environments.prompts:PromptEnvironment",
}


def make_environment(name: str, **settings: Any) -> VectorEnvironment | Callable[[], Environment]:
    """Make an environment for `rollout` (environments/rollouts.py).

    Args:
      name: one of ENVIRONMENTS, or "package.module:Class" of your own; the working folder is searched too.
      settings: keyword arguments of the environment's class.
    Returns: the environment if it plays many episodes at once; else a function that makes a new environment per call.
    Raises: InputError if the name is unknown (naming the nearest one), or the class does not take a setting or value.
    """
    make = _find(name)
    known = parameters_of(make)
    if any(one.kind is one.VAR_KEYWORD for one in inspect.signature(make).parameters.values()):
        known = {**dict.fromkeys(settings, Parameter(Any)), **known}
    factory = functools.partial(make, **arguments(known, settings, "environment"))
    environment = factory()  # even if only the factory is returned, so that wrong settings raise now
    return environment if is_vector(environment) else factory


def task_of(environment: VectorEnvironment | Callable[[], Environment]) -> Callable[[int], str]:
    """Return the function that maps the seed of an episode to the name of its task.

    Args:
      environment: the result of `make_environment`.
    Raises: InputError if the environment has no method `task`.
    """
    made = environment() if callable(environment) else environment
    task = optional(made, "task")
    require(
        task is not None,
        f"environment: found {type(made).__name__}, which has no method task(seed), expected one with it: "
        "demonstrations are chosen by the task of an episode",
    )
    return task


def _find(name: str) -> Callable[..., Any]:
    require_text("environment.name", name)
    path = ENVIRONMENTS.get(name, name)
    if not path.partition(":")[2]:
        raise InputError(
            f"environment: found {shown(name)}, expected package.module:Class or one of {', '.join(ENVIRONMENTS)}"
            f"{nearest(name, ENVIRONMENTS)}"
        )
    return import_object(path, "environment")
