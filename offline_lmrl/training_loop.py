"""The base of trainers with a loop of their own, on accelerate: the optimizer, averaged weights, and the run's folder.

The folder is that of any other run: metrics.jsonl, checkpoints that are whole or absent and go on to the same bits,
and the model at its top.
"""

import contextlib
import json
import math
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator, DistributedDataParallelKwargs
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedTokenizerBase

from offline_lmrl.data.errors import InputError
from offline_lmrl.data.files import read_object, reading
from offline_lmrl.models.adapters import save_heads
from offline_lmrl.models.renderers import training_renderer
from offline_lmrl.training import BaseConfig, check_processes, move_model
from offline_lmrl.training_checkpoint import (
    DAMAGED,
    STAGING,
    Signals,
    append_metrics,
    filling,
    keep_metrics_until,
    last_complete,
    missing,
    publish,
    rotate,
    step_of,
    stopped,
)


class LoopTrainer:
    """What a trainer is made of that plays in a loop of its own.

    A subclass gives itself a policy and a module around it (`set_up`), loops in `train`, and says what else the next
    iteration depends on (`memory`, `remember`). What is random depends on seed and iteration alone.

    Args:
      find_unused_parameters: whether some are not reached by every loss.
    """

    algorithm = ""
    plays = True
    regime = "environment"
    signals: Signals | None = None  # at which training stops, behind a checkpoint

    def __init__(
        self,
        args: BaseConfig,
        processing_class: PreTrainedTokenizerBase,
        policy: nn.Module,
        find_unused_parameters: bool,
    ):
        self.args = args
        self.device = args.device  # before the accelerator: it resets what accelerate shares between objects
        self.accelerator = Accelerator(
            mixed_precision="bf16" if args.bf16 else "no",
            cpu=args.use_cpu,
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=find_unused_parameters)],
        )
        self.renderer = training_renderer(processing_class, policy, args.template, args.output_dir)
        self.counts: Counter[str] = Counter()
        self.totals: Counter[str] = Counter()
        self.iteration, self.updates = 0, 0

    def set_up(self, module: nn.Module, policy: nn.Module, average: bool) -> None:
        """Takes what is trained (module) and saved (policy), and prepares optimizer and schedule.

        average: whether averaged weights are kept, which are then the ones that are saved.
        """
        args, self.module, self.policy = self.args, module, policy
        self.trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self.trained.items()} if average else None
        optimizer = torch.optim.AdamW(
            self.trained.values(),
            args.learning_rate,
            (args.adam_beta1, args.adam_beta2),
            args.adam_epsilon,
            args.weight_decay,
        )
        self.scheduler = transformers.get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            args.get_warmup_steps(args.max_steps),
            args.max_steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
        self.wrapped, self.optimizer = self.accelerator.prepare(module, optimizer)

    # What a subclass says of itself.

    def memory(self) -> dict[str, Any]:
        """What the next iteration depends on beside weights, optimizer, schedule and counts, as plain values."""
        return {}

    def remember(self, memory: Mapping[str, Any]) -> None:
        """The inverse of `memory`."""

    # Accounts.

    def mean(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Over the processes."""
        if self.args.world_size == 1 or not metrics:
            return dict(metrics)
        values = torch.tensor(list(metrics.values()), device=self.args.device)
        return dict(zip(metrics, self.accelerator.reduce(values, "mean").tolist(), strict=True))

    def costs(self) -> dict[str, int]:
        """What the run took, for complete.json."""
        return {"steps": self.iteration} | dict(self.totals)

    def outcome(self) -> dict[str, float]:
        """What is measured when training ends, for complete.json."""
        return {}

    @property
    def total_steps(self) -> int:
        """Iterations of the whole run."""
        return self.args.max_steps

    @property
    def model(self) -> nn.Module:
        """The policy."""
        return self.policy

    @property
    def is_quiet(self) -> bool:
        return self.args.disable_tqdm or not self.accelerator.is_main_process

    def log(self, metrics: Mapping[str, float]) -> None:
        """Appends a row to metrics.jsonl; null where there is no number (variance explained of returns all alike)."""
        if self.args.should_save:
            known = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
            append_metrics(self.args.output_dir, {"step": self.iteration, **known})

    # Going on, and stopping.

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint of the run that training can go on from."""
        return last_complete(self.args.output_dir, self.lacking)

    def lacking(self, checkpoint: Path) -> list[str]:
        """What of that which exact resuming reads is not in the checkpoint."""
        average = ["average.safetensors"] if self.average is not None else []
        return missing(checkpoint, ["trained.safetensors", *average, "optimizer.pt", "loop.json"])

    def begin(self, checkpoint: str | Path | None) -> None:
        """Reads the checkpoint, if one is given, and drops what an earlier try wrote beyond it."""
        if checkpoint is not None:
            self.load(Path(checkpoint))
        if self.args.should_save:
            folder = Path(self.args.output_dir)
            shutil.rmtree(folder / STAGING, ignore_errors=True)
            keep_metrics_until(folder, self.iteration)
            rotate(folder, self.iteration, self.args.save_total_limit)
        self.accelerator.wait_for_everyone()

    def finish_iteration(self) -> None:
        """Saves a checkpoint where one is due or a signal came, which then stops training behind it."""
        number = None if self.signals is None else self.signals.agreed(self.args.world_size)
        last = self.iteration == self.args.max_steps
        stops = number is not None and not last
        if stops or self.saves(last):
            self.save_checkpoint()
        if stops:
            raise stopped(number, self.args.output_dir, self.iteration, self.args.max_steps)

    # Saving.

    def saves(self, last: bool) -> bool:
        """Whether a checkpoint is due."""
        return self.args.save_strategy == "steps" and (last or self.iteration % int(self.args.save_steps) == 0)

    def save_checkpoint(self) -> None:
        """Everything that the next iteration depends on, and the policy as `save_model` writes it; whole or absent."""
        if self.args.should_save:
            folder, name = Path(self.args.output_dir), f"checkpoint-{self.iteration}"
            shutil.rmtree(folder / STAGING, ignore_errors=True)
            written = folder / STAGING / name
            with filling(folder / STAGING, folder / name):
                written.mkdir(parents=True)
                self._write_policy(written)
                save_file(
                    {name: p.detach().contiguous() for name, p in self.trained.items()},
                    written / "trained.safetensors",
                )
                if self.average is not None:
                    save_file(self.average, written / "average.safetensors")
                state = {"optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict()}
                torch.save(state, written / "optimizer.pt")
                (written / "loop.json").write_text(
                    json.dumps(
                        {
                            "iteration": self.iteration,
                            "updates": self.updates,
                            "totals": self.totals,
                            "counts": self.counts,
                            "memory": self.memory(),
                            "processes": self.args.world_size,
                        }
                    ),
                    encoding="utf-8",
                )
            publish(written, folder / name)
            rotate(folder, self.iteration, self.args.save_total_limit)
            shutil.rmtree(folder / STAGING, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def load(self, checkpoint: Path) -> None:
        """The inverse of `save_checkpoint`. Raises: InputError where that is not complete, or damaged."""
        if names := self.lacking(checkpoint):
            raise InputError(f"{checkpoint}: found no {', '.join(names)}, expected {DAMAGED}")
        loop = checkpoint / "loop.json"
        found = read_object(loop, DAMAGED)
        check_processes(checkpoint, found.get("processes", 1), self.args.world_size)
        with reading(checkpoint / "trained.safetensors", DAMAGED):
            stored = load_file(checkpoint / "trained.safetensors")
            if names := set(self.trained) ^ set(stored):
                raise InputError(f"{checkpoint}: found other weights than this run trains, first {min(names)}")
            with torch.no_grad():
                for name, parameter in self.trained.items():
                    parameter.copy_(stored[name])
        if self.average is not None:
            with reading(checkpoint / "average.safetensors", DAMAGED):
                average = load_file(checkpoint / "average.safetensors")
                self.average = {name: average[name].to(self.args.device) for name in self.trained}  # in their order
        with reading(checkpoint / "optimizer.pt", DAMAGED):
            state = torch.load(checkpoint / "optimizer.pt", map_location=self.args.device, weights_only=True)
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
        with reading(loop, DAMAGED):
            self.iteration, self.updates = found["iteration"], found["updates"]
            self.totals, self.counts = Counter(found["totals"]), Counter(found["counts"])
            self.remember(found["memory"])
            if self.iteration != step_of(checkpoint):
                raise ValueError(f"iteration {self.iteration}")

    def save_model(self, output_dir: str | None = None) -> None:
        """The policy alone, its averaged weights where there are any: a plain model of its base class."""
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            staging = folder / STAGING
            shutil.rmtree(staging, ignore_errors=True)  # what a kill left half written
            with filling(staging, folder):
                staging.mkdir(parents=True)
                self._write_policy(staging)
                move_model(staging, folder)
        self.accelerator.wait_for_everyone()

    def _write_policy(self, folder: Path) -> None:
        with self._averaged():
            self.policy.save_pretrained(folder)
            if hasattr(self.policy, "peft_config"):
                save_heads(self.policy, folder)
        self.renderer.tokenizer.save_pretrained(folder)

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """The averaged weights in the place of the trained ones."""
        if self.average is None:
            yield
            return
        trained = {name: p.detach().clone() for name, p in self.trained.items()}
        with torch.no_grad():
            for name, p in self.trained.items():
                p.copy_(self.average[name])
            try:
                yield
            finally:
                for name, p in self.trained.items():
                    p.copy_(trained[name])
