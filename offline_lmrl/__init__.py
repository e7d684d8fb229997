"""Offline reinforcement learning for language models: logs in, value-guided text out.

The names below are loaded when they are first used, so that `import offline_lmrl` costs next to nothing.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Turn": "data.trajectory",
    "Trajectory": "data.trajectory",
    "Comparison": "data.comparison",
    "read_trajectories": "data.io",
    "read_comparisons": "data.io",
    "write_trajectories": "data.io",
    "write_comparisons": "data.io",
    "to_trajectories": "data.preferences",
    "to_comparisons": "data.preferences",
    "preference_rows": "data.preferences",
    "label_rows": "data.preferences",
    "sft_rows": "data.preferences",
    "PromptSpec": "data.demonstrations",
    "Renderer": "data.rendering",
    "load_model": "models.guided",
    "SamplingConfig": "decoding.sampler",
    "LanguagePolicy": "decoding.policy",
    "make_environment": "environments",
    "rollout": "environments.rollouts",
    "BCConfig": "algorithms.behaviour_cloning",
    "BCTrainer": "algorithms.behaviour_cloning",
    "ILQLConfig": "algorithms.ilql",
    "ILQLTrainer": "algorithms.ilql",
    "ReturnConditionedConfig": "algorithms.return_conditioned",
    "ReturnConditionedTrainer": "algorithms.return_conditioned",
    "IQLConfig": "algorithms.iql",
    "IQLTrainer": "algorithms.iql",
    "PPOConfig": "algorithms.ppo",
    "PPOTrainer": "algorithms.ppo",
    "RewardModelConfig": "algorithms.reward_model",
    "RewardModelTrainer": "algorithms.reward_model",
    "load_scorer": "decoding.scorers",
    "relabel_comparisons": "decoding.scorers",
    "relabel_trajectories": "decoding.scorers",
    "BestOfN": "decoding.reranking",
    "PlannerConfig": "decoding.planner",
    "Planner": "decoding.planner",
    "evaluate_policy": "evaluation.play",
    "evaluate_offline": "evaluation.offline",
    "CompareConfig": "evaluation.config",
    "run_compare": "evaluation.compare",
    "export": "evaluation.export",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
