"""Measure a policy while it trains: by play in an environment, or by fitted Q evaluation on held-out logs.

The metrics are rows of the run's metrics.jsonl, so that trackers, the terminal and `plot` show them. A run that is
watched in an environment is marked so, because whoever chooses settings by these metrics uses the environment.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.errors import require
from offline_lmrl.evaluation.off_policy import FitConfig, fitted_q_evaluation
from offline_lmrl.evaluation.play import evaluate_policy
from offline_lmrl.logs.trajectory import Trajectory
from offline_lmrl.settings import setting
from offline_lmrl.tasks import make_environment
from offline_lmrl.training.trainer import OfflineTrainer

WATCHED = "watched in an environment"  # added to the regime of a run


@dataclass(frozen=True)
class WatchConfig:
    """How the policy is measured after each checkpoint and at the end: in an environment, by fitted Q evaluation."""

    environment: dict[str, Any] | None = setting(
        None, "`name`, a known environment or package.module:Class (its code runs), and its settings; null = no play."
    )
    episodes: int = setting(20, "Episodes that are played.")
    first_seed: int = setting(2_000_000, "First episode seed; take others than those of the final evaluation.")
    fqe: int = setting(0, "Optimizer steps of fitted Q evaluation on the validation data; 0 = none.")

    def __post_init__(self) -> None:
        require(
            self.environment is None or "name" in self.environment,
            "evaluation.environment.name: missing, expected the environment that the policy plays in",
        )
        require(
            self.environment is not None or self.fqe > 0, "evaluation: found neither environment nor fqe, expected one"
        )
        require(self.episodes >= 1, f"evaluation.episodes: found {self.episodes}, expected at least 1")
        require(self.fqe >= 0, f"evaluation.fqe: found {self.fqe}, expected at least 0")


class Watch(TrainerCallback):
    """A callback that measures the policy after each checkpoint and at the last step, and logs the metrics.

    The random state of training is left as it was.

    Args:
      trainer: the trainer, to which this callback is then added: `trainer.add_callback(Watch(trainer, config))`.
      config: the settings.
      validation: held-out trajectories, for fitted Q evaluation.
    Raises: InputError if the trainer trains no policy, there are no held-out data for fitted Q
      evaluation, or the policy cannot reply within max_length.
    """

    def __init__(self, trainer: OfflineTrainer, config: WatchConfig, validation: Sequence[Trajectory] | None = None):
        require(
            isinstance(trainer, OfflineTrainer),
            "evaluation: found it for an algorithm that trains no policy on logs, expected none",
        )
        require(
            config.fqe == 0 or bool(validation),
            f"evaluation.fqe: found {config.fqe}, expected 0, as there are no validation data",
        )
        self.trainer, self.config, self.validation = trainer, config, validation
        policy = trainer.policy()
        policy.null_window((), policy.decoding.max_new_tokens)  # raises now, not after the first checkpoint
        self.environment = config.environment and make_environment(**config.environment)

    def on_save(self, args, state, control, **kwargs) -> None:
        if state.global_step < state.max_steps:
            self.measure(state, control)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step >= state.max_steps:
            self.measure(state, control)

    def measure(self, state: Any, control: Any) -> None:
        if not state.is_world_process_zero:
            return
        logs, policy, metrics = control.should_log, self.trainer.policy(), {}
        with _random_state_kept(), self.trainer.accelerator.autocast():
            if self.environment is not None:
                metrics |= self._played(policy)
            if self.config.fqe:
                metrics |= self._fitted(policy)
        self.trainer.log(metrics)
        control.should_log = logs  # a row of losses may be due, and `log` clears this

    def _played(self, policy: LanguagePolicy) -> dict[str, float]:
        config = self.config
        seeds = range(config.first_seed, config.first_seed + config.episodes)
        with self.trainer.display.bar("playing", config.episodes) as progress:
            score = evaluate_policy(policy, self.environment, seeds, progress=progress).score()
        low, high = score.interval or (score.mean, score.mean)
        return {"environment/score": score.mean, "environment/score_low": low, "environment/score_high": high}

    def _fitted(self, policy: LanguagePolicy) -> dict[str, float]:
        fit = FitConfig(self.config.fqe)
        with self.trainer.display.bar("fitting Q", fit.steps * fit.fits) as progress, torch.enable_grad():
            found = fitted_q_evaluation(policy, self.validation, fit, progress)
        return {"fqe/value": found.value, "fqe/td_error": found.td_error}


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Context manager: restore the random states of Python, numpy and torch at the end."""
    python, arrays = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
