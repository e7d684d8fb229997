"""The base of trainers that run their own training loop, on accelerate: optimizer, averaged weights, and run folder.

The run folder has the same contents as that of other trainers: metrics.jsonl, the model, and checkpoints that are
complete or absent and from which training resumes bit for bit.
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

from offline_lmrl.errors import InputError
from offline_lmrl.logs.files import read_object, reading
from offline_lmrl.models.adapters import has_adapter, save_heads
from offline_lmrl.models.renderers import training_renderer
from offline_lmrl.renamed import current
from offline_lmrl.training.checkpoint import (
    DAMAGED,
    STAGING,
    Signals,
    check_processes,
    filling,
    last_complete,
    missing,
    move_model,
    publish,
    rotate,
    step_of,
    stopped,
)
from offline_lmrl.training.config import BaseConfig
from offline_lmrl.training.metrics import append_metrics, keep_metrics_until


class LoopTrainer:
    """The base class of trainers that run their own loop and generate their data.

    A subclass has to:
    - call `set_up(module, policy, average)` in its constructor: `module` holds all trained parameters, `policy` is the
      part of it that is saved (`module` may also hold a value head, for example), and `average` is True to keep
      averaged weights;
    - run the loop in `train`, one iteration (playing and learning) after another;
    - save and restore its extra state in `state_dict` and `load_state_dict`;
    - draw random numbers that depend only on the seed and the iteration, so that training resumes exactly.

    Args:
      args: the settings.
      processing_class: the tokenizer.
      policy: the model that plays. If it was trained before, its run metadata decide how dialogues become tokens.
      find_unused_parameters: True if some losses do not reach all parameters; DistributedDataParallel needs to know.
    """

    algorithm = ""
    plays = True
    regime = "environment"
    signals: Signals | None = None  # training stops at these, after writing a checkpoint

    def __init__(
        self,
        args: BaseConfig,
        processing_class: PreTrainedTokenizerBase,
        policy: nn.Module,
        find_unused_parameters: bool,
    ):
        self.args = args
        self.device = args.device  # before the accelerator, as it resets state that accelerate shares
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
        """Set the module and the policy, and make optimizer and learning rate schedule.

        Args:
          module: contains all trained parameters.
          policy: the part of `module` that is saved as the run's model.
          average: True: keep averaged weights, which are saved instead of the trained ones.
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

    # Methods for subclasses to define.

    def state_dict(self) -> dict[str, Any]:
        """Return extra state to save so that training resumes exactly, as plain values for JSON.

        Weights, optimizer, schedule and counts are saved anyway.
        """
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""

    # Metrics and counts.

    def mean(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return the mean of every metric over the processes, by name."""
        if self.args.world_size == 1 or not metrics:
            return dict(metrics)
        values = torch.tensor(list(metrics.values()), device=self.args.device)
        return dict(zip(metrics, self.accelerator.reduce(values, "mean").tolist(), strict=True))

    def costs(self) -> dict[str, int]:
        """Return the number of iterations so far as `steps`, and the totals of the run by name, for complete.json."""
        return {"steps": self.iteration} | dict(self.totals)

    def outcome(self) -> dict[str, float]:
        """Return measurements made at the end of training, for complete.json."""
        return {}

    @property
    def total_steps(self) -> int:
        """The number of iterations of the whole run."""
        return self.args.max_steps

    @property
    def model(self) -> nn.Module:
        """The policy."""
        return self.policy

    @property
    def is_quiet(self) -> bool:
        return self.args.disable_tqdm or not self.accelerator.is_main_process

    def log(self, metrics: Mapping[str, float]) -> None:
        """Append a row to metrics.jsonl: the iteration as `step`, and the metrics.

        A number that is not finite is written as null, such as the explained variance of returns that do not vary.
        """
        if self.args.should_save:
            known = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
            append_metrics(self.args.output_dir, {"step": self.iteration, **known})

    # Resuming and stopping.

    def last_checkpoint(self) -> Path | None:
        """Return the newest complete checkpoint of the run; None if there is none."""
        return last_complete(self.args.output_dir, self.lacking)

    def lacking(self, checkpoint: Path) -> list[str]:
        """Return the names of files that exact resuming needs and the checkpoint does not have."""
        average = ["average.safetensors"] if self.average is not None else []
        return missing(checkpoint, ["trained.safetensors", *average, "optimizer.pt", "loop.json"])

    def begin(self, checkpoint: str | Path | None) -> None:
        """Load a checkpoint, if one is given, and remove the rows of metrics that were written after it.

        A checkpoint that a killed process left half written is removed, too.

        Args:
          checkpoint: folder of the checkpoint; None = start anew, without the rows of metrics of earlier training.
        """
        if checkpoint is not None:
            self.load(Path(checkpoint))
        if self.args.should_save:
            folder = Path(self.args.output_dir)
            # Left half written by a killed process.
            shutil.rmtree(folder / STAGING, ignore_errors=True)
            keep_metrics_until(folder, self.iteration)
            rotate(folder, self.iteration, self.args.save_total_limit)
        self.accelerator.wait_for_everyone()

    def finish_iteration(self) -> None:
        """Save a checkpoint if one is due or a signal came.

        Raises: Stopped after a signal, to end training.
        """
        # With several processes this is a collective call, so all of them make it in every iteration.
        number = None if self.signals is None else self.signals.agreed(self.args.world_size)
        last = self.iteration == self.args.max_steps
        stops = number is not None and not last
        if stops or self.saves(last):
            self.save_checkpoint()
        if stops:
            raise stopped(number, self.args.output_dir, self.iteration, self.args.max_steps)

    # Saving.

    def saves(self, last: bool) -> bool:
        """Return True if a checkpoint is due after this iteration.

        Args:
          last: True if this is the last iteration of the run.
        """
        return self.args.save_strategy == "steps" and (last or self.iteration % int(self.args.save_steps) == 0)

    def save_checkpoint(self) -> None:
        """Save a checkpoint: everything that the next iteration depends on, and the policy as `save_model` writes it.

        The checkpoint is written in a staging folder and then renamed, so that it is complete or absent.
        """
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
                            "state": self.state_dict(),
                            "processes": self.args.world_size,
                        }
                    ),
                    encoding="utf-8",
                )
            # Old checkpoints are removed after the new one is published, so that a complete one always exists.
            publish(written, folder / name)
            rotate(folder, self.iteration, self.args.save_total_limit)
            shutil.rmtree(folder / STAGING, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def load(self, checkpoint: Path) -> None:
        """Restore what `save_checkpoint` saved.

        Raises: InputError if the checkpoint is incomplete or damaged, or if it has the weights of another model or was
          written by another number of processes.
        """
        if names := self.lacking(checkpoint):
            raise InputError(f"{checkpoint}: found no {', '.join(names)}, expected {DAMAGED}")
        loop = checkpoint / "loop.json"
        found = current(read_object(loop, DAMAGED))
        check_processes(checkpoint, found.get("processes", 1), self.args.world_size)
        with reading(checkpoint / "trained.safetensors", DAMAGED):
            stored = load_file(checkpoint / "trained.safetensors")
            if names := set(self.trained) ^ set(stored):
                raise InputError(
                    f"{checkpoint}: found the weights of another model, expected those of this run; the first name "
                    f"that only one of them has is {min(names)}"
                )
            with torch.no_grad():
                # Copied in place, because the optimizer and the wrapped module hold these very tensors.
                for name, parameter in self.trained.items():
                    parameter.copy_(stored[name])
        if self.average is not None:
            with reading(checkpoint / "average.safetensors", DAMAGED):
                average = load_file(checkpoint / "average.safetensors")
                self.average = {name: average[name].to(self.args.device) for name in self.trained}  # same order
        with reading(checkpoint / "optimizer.pt", DAMAGED):
            state = torch.load(checkpoint / "optimizer.pt", map_location=self.args.device, weights_only=True)
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
        with reading(loop, DAMAGED):
            self.iteration, self.updates = found["iteration"], found["updates"]
            self.totals, self.counts = Counter(found["totals"]), Counter(found["counts"])
            self.load_state_dict(found["state"])
            # `reading` turns this into the InputError of a damaged file.
            if self.iteration != step_of(checkpoint):
                raise ValueError(f"iteration {self.iteration}")

    def save_model(self, output_dir: str | None = None) -> None:
        """Save the policy alone, with averaged weights if there are any, as a plain model of its base class."""
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            staging = folder / STAGING
            shutil.rmtree(staging, ignore_errors=True)  # left half written by a killed process
            with filling(staging, folder):
                staging.mkdir(parents=True)
                self._write_policy(staging)
                move_model(staging, folder)
        self.accelerator.wait_for_everyone()

    def _write_policy(self, folder: Path) -> None:
        with self._averaged():
            self.policy.save_pretrained(folder)
            if has_adapter(self.policy):
                save_heads(self.policy, folder)
        self.renderer.tokenizer.save_pretrained(folder)

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """A context manager in whose body the averaged weights, if there are any, replace the trained ones."""
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
