"""The algorithms: offline all but ppo. Adding one is a file beside these and a line here."""

from importlib import import_module

from offline_lmrl.data.errors import InputError, shown

# name -> module, config class, trainer class; imported on use
ALGORITHMS = {
    "bc": ("behaviour_cloning", "BCConfig", "BCTrainer"),
    "ilql": ("ilql", "ILQLConfig", "ILQLTrainer"),
    "return_conditioned": ("return_conditioned", "ReturnConditionedConfig", "ReturnConditionedTrainer"),
    "iql": ("iql", "IQLConfig", "IQLTrainer"),
    "ppo": ("ppo", "PPOConfig", "PPOTrainer"),
    "reward_model": ("reward_model", "RewardModelConfig", "RewardModelTrainer"),
}


def load_algorithm(name: str) -> tuple[type, type]:
    """(config class, trainer class) of an algorithm. Raises: InputError for an unknown name."""
    if name not in ALGORITHMS:
        raise InputError(f"algorithm: found {shown(name)}, expected one of {', '.join(ALGORITHMS)}")
    module, config, trainer = ALGORITHMS[name]
    loaded = import_module(f"{__name__}.{module}")
    return getattr(loaded, config), getattr(loaded, trainer)
