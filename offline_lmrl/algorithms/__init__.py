"""The algorithms, all of them offline except ppo. A new one needs a file in this folder and a line in `ALGORITHMS`."""

from importlib import import_module

from offline_lmrl.errors import InputError, shown

# name -> module, config class, trainer class; modules are imported when an algorithm is used
ALGORITHMS = {
    "bc": ("behaviour_cloning", "BCConfig", "BCTrainer"),
    "ilql": ("ilql", "ILQLConfig", "ILQLTrainer"),
    "return_conditioned": ("return_conditioned", "ReturnConditionedConfig", "ReturnConditionedTrainer"),
    "awr": ("awr", "AWRConfig", "AWRTrainer"),
    "ppo": ("ppo", "PPOConfig", "PPOTrainer"),
    "reward_model": ("reward_model", "RewardModelConfig", "RewardModelTrainer"),
}


def load_algorithm(name: str) -> tuple[type, type]:
    """Import an algorithm by name.

    Args:
      name: a key of ALGORITHMS.
    Returns: its config class and its trainer class.
    Raises: InputError if the name is unknown.
    """
    if name not in ALGORITHMS:
        raise InputError(f"algorithm: found {shown(name)}, expected one of {', '.join(ALGORITHMS)}")
    module, config, trainer = ALGORITHMS[name]
    loaded = import_module(f"{__name__}.{module}")
    return getattr(loaded, config), getattr(loaded, trainer)
