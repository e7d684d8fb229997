"""The algorithms, all of them offline except ppo. A new one needs a file in this folder and a line in `ALGORITHMS`."""

from importlib import import_module
from typing import Literal, NamedTuple

from offline_lmrl.errors import InputError, shown


class Algorithm(NamedTuple):
    """An algorithm by the names of its parts, which are imported when it is used.

    module: its module in this folder.
    config: the config class.
    trainer: the trainer class.
    trains_values: its runs have value heads.
    plays: it is trained by playing in an environment, not from data alone.
    value_model: use of the run in the setting `value_model`: "learns" from its Q and V, or "starts" V from its trunk;
      None = the algorithm has no such setting.
    """

    module: str
    config: str
    trainer: str
    trains_values: bool = False
    plays: bool = False
    value_model: Literal["learns", "starts"] | None = None

    @property
    def regime(self) -> str:
        """The information that its runs learn from, as reports name it."""
        return "environment" if self.plays else "labels only"


class Algorithms(dict[str, Algorithm]):
    """Algorithms by name. Raises: InputError if a name is unknown."""

    def __missing__(self, name: str) -> Algorithm:
        raise InputError(f"algorithm: found {shown(name)}, expected one of {', '.join(self)}")


ALGORITHMS = Algorithms(
    bc=Algorithm("behaviour_cloning", "BCConfig", "BCTrainer"),
    mc_awbc=Algorithm("mc_awbc", "MCAWBCConfig", "MCAWBCTrainer"),
    ilql=Algorithm("ilql", "ILQLConfig", "ILQLTrainer", trains_values=True),
    return_conditioned=Algorithm(
        "return_conditioned", "ReturnConditionedConfig", "ReturnConditionedTrainer", value_model="learns"
    ),
    awr=Algorithm("awr", "AWRConfig", "AWRTrainer", value_model="learns"),
    ppo=Algorithm("ppo", "PPOConfig", "PPOTrainer", plays=True, value_model="starts"),
    reward_model=Algorithm("reward_model", "RewardModelConfig", "RewardModelTrainer"),
)


def load_algorithm(name: str) -> tuple[type, type]:
    """Import an algorithm by name.

    Args:
      name: a key of ALGORITHMS.
    Returns: its config class and its trainer class.
    Raises: InputError if the name is unknown.
    """
    algorithm = ALGORITHMS[name]
    loaded = import_module(f"{__name__}.{algorithm.module}")
    return getattr(loaded, algorithm.config), getattr(loaded, algorithm.trainer)
