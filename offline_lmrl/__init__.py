"""Offline reinforcement learning for language models: it learns from logs, and decodes text guided by values.

The names below are imported when they are first used, so that `import offline_lmrl` itself takes hardly any time.
"""

from importlib import import_module
from typing import Any

__version__ = "0.2.0"

_HOMES = {
    "Turn": "logs.trajectory",
    "Trajectory": "logs.trajectory",
    "Comparison": "logs.comparison",
    "read_trajectories": "logs.io",
    "read_comparisons": "logs.io",
    "write_trajectories": "logs.io",
    "write_comparisons": "logs.io",
    "to_trajectories": "logs.preferences",
    "to_comparisons": "logs.preferences",
    "preference_rows": "logs.trl",
    "label_rows": "logs.trl",
    "sft_rows": "logs.trl",
    "write_rows": "logs.io",
    "FewShotConfig": "tokens.few_shot",
    "Renderer": "tokens.rendering",
    "load_model": "models.loading",
    "DecodingConfig": "decoding.sampler",
    "LanguagePolicy": "decoding.policy",
    "Request": "decoding.batch",
    "SamplingLoop": "decoding.loop",
    "Watch": "evaluation.while_training",
    "WatchConfig": "evaluation.while_training",
    "make_environment": "tasks",
    "rollout": "environments.rollouts",
    "BCConfig": "algorithms.behaviour_cloning",
    "BCTrainer": "algorithms.behaviour_cloning",
    "MCAWBCConfig": "algorithms.mc_awbc",
    "MCAWBCTrainer": "algorithms.mc_awbc",
    "ILQLConfig": "algorithms.ilql",
    "ILQLTrainer": "algorithms.ilql",
    "ReturnConditionedConfig": "algorithms.return_conditioned",
    "ReturnConditionedTrainer": "algorithms.return_conditioned",
    "AWRConfig": "algorithms.awr",
    "IQLConfig": "algorithms.awr",
    "AWRTrainer": "algorithms.awr",
    "IQLTrainer": "algorithms.awr",
    "PPOConfig": "algorithms.ppo",
    "PPOTrainer": "algorithms.ppo",
    "RewardModelConfig": "algorithms.reward_model",
    "RewardModelTrainer": "algorithms.reward_model",
    "load_scorer": "decoding.scorers",
    "relabel_comparisons": "decoding.scorers",
    "relabel_trajectories": "decoding.scorers",
    "BestOfN": "decoding.reranking",
    "rejection_sample": "decoding.reranking",
    "PlannerConfig": "decoding.planner",
    "Planner": "decoding.planner",
    "evaluate_policy": "evaluation.play",
    "evaluate_offline": "evaluation.offline_report",
    "CompareConfig": "comparison.config",
    "run_compare": "comparison.compare",
    "export_run": "export.run",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
