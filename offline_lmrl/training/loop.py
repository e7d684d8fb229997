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
from types import MappingProxyType
from typing import Any

import torch
import transformers
from accelerate import Accelerator, DistributedDataParallelKwargs
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from offline_lmrl.errors import InputError, require
from offline_lmrl.logs.files import move_into, read_object, reading
from offline_lmrl.models.adapters import has_adapter, save_heads
from offline_lmrl.models.renderers import training_renderer
from offline_lmrl.renamed import current
from offline_lmrl.training.checkpoint import (
    CONFIG_FILES,
    DAMAGED,
    STAGING,
    Signals,
    check_processes,
    filling,
    last_complete,
    missing,
    publish,
    rotate,
    step_of,
    stopped,
)
from offline_lmrl.training.config import BaseConfig
from offline_lmrl.training.display import TrainingDisplay, commands_after
from offline_lmrl.training.metrics import append_metrics, keep_metrics_until
from offline_lmrl.training.publishing import CARD, create_repository, model_card, model_files, upload


class Learner:
    """The trained parameters with their optimizer, learning rate schedule and averaged weights.

    Args:
      accelerator: prepares module and optimizer.
      module: contains all trained parameters.
      args: the settings of AdamW, of the schedule and of gradient clipping.
      ema: decay per optimizer step of averaged weights; 0 = no average.

    Attributes:
      module: the module as it was given; `wrapped` is the one for the training forward pass.
      trained: the trained parameters by name.
      average: their averages by name; empty = no average.
      updates: number of optimizer steps so far.
    """

    def __init__(self, accelerator: Accelerator, module: nn.Module, args: BaseConfig, ema: float):
        self.accelerator, self.module, self.args, self.ema, self.updates = accelerator, module, args, ema, 0
        self.trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self.trained.items()} if ema > 0 else {}
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
        self.wrapped, self.optimizer = accelerator.prepare(module, optimizer)

    def step(self) -> float:
        """Take an optimizer step on the accumulated gradients, then update the averaged weights.

        Returns: the gradient norm before clipping.
        Raises: InputError if that norm is not finite.
        """
        parameters = list(self.trained.values())
        norm = float(self.accelerator.clip_grad_norm_(parameters, self.args.max_grad_norm or math.inf))
        require(
            math.isfinite(norm),
            f"loss: found a gradient of norm {norm} in iteration {self.scheduler.last_epoch + 1}, expected a "
            "finite one; lower learning_rate",
        )
        self.updates += 1
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average:
            torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in parameters], 1 - self.ema)
        return norm

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """A context manager in whose body the averaged weights, if there are any, replace the trained ones."""
        last = {name: self.trained[name].detach().clone() for name in self.average}
        _copy(self.average, self.trained)
        try:
            yield
        finally:
            _copy(last, self.trained)

    @property
    def weight_files(self) -> dict[str, dict[str, Tensor]]:
        """The trained and the averaged weights, by the names of their files in a checkpoint."""
        return {"trained.safetensors": self.trained} | ({"average.safetensors": self.average} if self.average else {})

    def save(self, checkpoint: Path) -> None:
        """Write the weights and the state of optimizer and schedule into a folder."""
        for file, weights in self.weight_files.items():
            save_file({name: weight.detach().contiguous() for name, weight in weights.items()}, checkpoint / file)
        state = {"optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict()}
        torch.save(state, checkpoint / "optimizer.pt")

    def load(self, checkpoint: Path) -> None:
        """Restore what `save` wrote.

        Raises: InputError if a file is damaged or has the weights of another model.
        """
        for file, weights in self.weight_files.items():
            with reading(checkpoint / file, DAMAGED):
                stored = load_file(checkpoint / file)
                if names := set(weights) ^ set(stored):
                    raise InputError(
                        f"{checkpoint}: found the weights of another model, expected those of this run; the first "
                        f"name that only one of them has is {min(names)}"
                    )
                _copy(stored, weights)
        with reading(checkpoint / "optimizer.pt", DAMAGED):
            device = self.args.device
            state = torch.load(checkpoint / "optimizer.pt", map_location=device, weights_only=True)
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    """Copy tensors by name, in place, because the optimizer and the wrapped module hold the tensors of `target`."""
    for name, tensor in source.items():
        target[name].copy_(tensor)


def mean_over_processes(accelerator: Accelerator, metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the mean of every metric over the processes, by name."""
    if accelerator.num_processes == 1 or not metrics:
        return dict(metrics)
    values = torch.tensor(list(metrics.values()), device=accelerator.device)
    return dict(zip(metrics, accelerator.reduce(values, "mean").tolist(), strict=True))


class LoopTrainer:
    """The base class of trainers that run their own loop and generate their data.

    A subclass calls `set_up` in its constructor and runs the loop in `train`, one iteration (playing and learning)
    after another. Random numbers must depend only on the seed and the iteration, so that training resumes exactly.

    Args:
      args: the settings.
      processing_class: the tokenizer.
      policy: the model that plays. If it was trained before, its run metadata decide how dialogues become tokens.
      find_unused_parameters: True if some losses do not reach all parameters; DistributedDataParallel needs to know.

    Attributes:
      counts: description of a fault of the data -> number of cases.
      totals: costs of the run so far by name.
      iteration: number of iterations so far.
      state: what else the next iteration depends on, as values that JSON can hold.
    """

    algorithm = ""
    regime = "environment"
    next_commands: tuple[str, ...] = commands_after("evaluate play {run} --environment NAME")
    signals: Signals | None = None  # training stops at these, after writing a checkpoint
    outcome: Mapping[str, float] = MappingProxyType({})  # measurements at the end of training; there are none

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
        self.display = TrainingDisplay(shown=args.should_save and not args.disable_tqdm)
        self.data: dict[str, dict[str, Any]] = {}  # for the model card
        self.counts: Counter[str] = Counter()
        self.totals: Counter[str] = Counter()
        self.iteration, self.total_steps = 0, args.max_steps
        self.state: dict[str, Any] = {}
        if args.push_to_hub and args.should_save:
            create_repository(args)

    def set_up(self, module: nn.Module, policy: nn.Module, ema: float) -> None:
        """Set the model and make its learner.

        Args:
          module: contains all trained parameters.
          policy: the part of `module` that is saved as the run's model; `module` may also hold V, for example.
          ema: decay per optimizer step of averaged weights, which are saved instead of the trained ones; 0 = none.
        """
        self.model, self.learner = policy, Learner(self.accelerator, module, self.args, ema)

    # Metrics and costs.

    def spend(self, costs: Mapping[str, int]) -> None:
        """Add what this process and all others spent to the totals of the run."""
        for name, count in costs.items():
            self.totals[name] += int(self.accelerator.reduce(torch.tensor(count, device=self.args.device), "sum"))

    def costs(self) -> dict[str, int]:
        """Return the number of iterations so far as `steps`, and the totals of the run by name, for complete.json."""
        return {"steps": self.iteration} | dict(self.totals)

    def log(self, metrics: Mapping[str, float]) -> None:
        """Append a row to metrics.jsonl: the iteration as `step`, and the metrics.

        A number that is not finite is written as null, such as the explained variance of returns that do not vary.
        """
        if self.args.should_save:
            known = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
            append_metrics(self.args.output_dir, {"step": self.iteration, **known})
            self.display.show(self.iteration, known)

    # Resuming and stopping.

    def last_checkpoint(self) -> Path | None:
        """Return the newest complete checkpoint of the run; None if there is none."""
        return last_complete(self.args.output_dir, self.lacking)

    def lacking(self, checkpoint: Path) -> list[str]:
        """Return the names of files that exact resuming needs and the checkpoint does not have."""
        return missing(checkpoint, [*self.learner.weight_files, "optimizer.pt", "loop.json"])

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
            shutil.rmtree(folder / STAGING, ignore_errors=True)
            keep_metrics_until(folder, self.iteration)
            rotate(folder, self.iteration, self.args.save_total_limit)
        self.accelerator.wait_for_everyone()

    def finish_iteration(self) -> None:
        """Save a checkpoint if one is due or a signal came.

        Raises: Stopped after a signal, to end training.
        """
        args, last = self.args, self.iteration == self.args.max_steps
        # With several processes this is a collective call, so all of them make it in every iteration.
        number = None if self.signals is None else self.signals.agreed(args.world_size)
        stops = number is not None and not last
        if stops or (args.save_strategy == "steps" and (last or self.iteration % int(args.save_steps) == 0)):
            self.save_checkpoint()
        if stops:
            raise stopped(number, args.output_dir, self.iteration, args.max_steps)

    # Saving.

    def save_checkpoint(self) -> None:
        """Save a checkpoint: everything that the next iteration depends on, and the policy as `save_model` writes it.

        The checkpoint is written in a staging folder and then renamed, so that it is complete or absent.
        """
        if self.args.should_save:
            folder, name = Path(self.args.output_dir), f"checkpoint-{self.iteration}"
            loop = {
                "iteration": self.iteration,
                "updates": self.learner.updates,
                "totals": self.totals,
                "counts": self.counts,
                "state": self.state,
                "processes": self.args.world_size,
            }
            with _staged(folder, folder / name) as staging:
                written = staging / name
                self._write_policy(written)
                self.learner.save(written)
                (written / "loop.json").write_text(json.dumps(loop), encoding="utf-8")
            # Old checkpoints are removed after the new one is published, so that a complete one always exists.
            publish(written, folder / name)
            rotate(folder, self.iteration, self.args.save_total_limit)
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def load(self, checkpoint: Path) -> None:
        """Restore what `save_checkpoint` saved.

        Raises: InputError if the checkpoint is incomplete or damaged, or if it has the weights of another model or was
          written by another number of processes.
        """
        if names := self.lacking(checkpoint):
            raise InputError(f"{checkpoint}: found no {', '.join(names)}, expected {DAMAGED}")
        found = current(read_object(checkpoint / "loop.json", DAMAGED))
        check_processes(checkpoint, found.get("processes", 1), self.args.world_size)
        self.learner.load(checkpoint)
        with reading(checkpoint / "loop.json", DAMAGED):
            self.iteration, self.learner.updates = found["iteration"], found["updates"]
            self.totals, self.counts = Counter(found["totals"]), Counter(found["counts"])
            self.state = {name: found["state"][name] for name in self.state}
            # `reading` turns this into the InputError of a damaged file.
            if self.iteration != step_of(checkpoint):
                raise ValueError(f"iteration {self.iteration}")

    def save_model(self, output_dir: str | None = None) -> None:
        """Save the policy alone, with averaged weights if there are any, as a plain model of its base class."""
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            with _staged(folder, folder) as staging:
                self._write_policy(staging)
                names = model_files(staging)
                move_into(staging, folder, CONFIG_FILES)
            if self.args.push_to_hub:
                message = f"Model after {self.iteration} iterations"
                upload(folder, names, self.args, self.args.hub_model_id, message)
            self.display.advise(folder, self.next_commands)
        self.accelerator.wait_for_everyone()

    def _write_policy(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with self.learner.averaged():
            self.model.save_pretrained(folder)
            if has_adapter(self.model):
                save_heads(self.model, folder)
        self.renderer.tokenizer.save_pretrained(folder)
        (folder / CARD).write_text(model_card(self), encoding="utf-8")


@contextlib.contextmanager
def _staged(folder: Path, target: Path) -> Iterator[Path]:
    """A context manager in whose body files are written into an empty staging folder in `folder`, which it yields.

    Args:
      folder: folder of the run.
      target: the final path, which the InputError names if writing fails.
    """
    staging = folder / STAGING
    shutil.rmtree(staging, ignore_errors=True)  # left half written by a killed process
    with filling(staging, target):
        yield staging
