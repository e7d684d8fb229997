"""The folder of a run during training: checkpoints that are complete or absent, exact resuming, and stopping.

A run is one training, with all its files in one folder. A checkpoint is a subfolder checkpoint-STEP; it is complete if
it holds everything that training needs to resume bit for bit. Checkpoints are added and removed by a rename, so a
killed process leaves no half-written checkpoint: its unfinished files are in the folder `.saving` (STAGING).
"""

import json
import logging
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerState
from transformers.trainer_utils import HubStrategy, TrainOutput

from offline_lmrl.errors import InputError, Stopped, require
from offline_lmrl.logs.files import move_into, read_object, reading, staging, sync, sync_entry, writing
from offline_lmrl.models.adapters import METADATA_FILE, has_adapter, heads_of, load_heads, save_heads
from offline_lmrl.training.display import TrainingDisplay
from offline_lmrl.training.metrics import Averages, keep_metrics_until
from offline_lmrl.training.publishing import CARD, create_repository, model_files, start_upload, upload

STAGING = ".saving"
CONFIG_FILES = ("config.json", "adapter_config.json")  # a folder without them is no model
DAMAGED = "a complete checkpoint; remove its folder to continue from the one before it, or from the beginning"

log = logging.getLogger(__name__)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def checkpoints(folder: str | Path) -> list[Path]:
    """Return the checkpoints in a run's folder, complete or not, in the order of their steps."""
    found = [path for path in Path(folder).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in found if path.is_dir()), key=step_of)


def last_complete(folder: str | Path, lacking: Callable[[Path], Sequence[str]]) -> Path | None:
    """Return the newest complete checkpoint, and log why newer ones are not used; None if none is complete.

    Args:
      folder: folder of the run.
      lacking: maps a checkpoint to the names of files that resuming needs and the checkpoint does not have.
    """
    refused = ""
    for checkpoint in reversed(checkpoints(folder)):
        names = lacking(checkpoint)
        if not names:
            if refused:
                log.warning("%s; training continues from %s", refused, checkpoint.name)
            return checkpoint
        refused = refused or f"{checkpoint}: found no {', '.join(names)}, which exact resuming needs"
    if refused:
        log.warning("%s; no checkpoint is complete, so training starts from the beginning", refused)
    return None


def missing(checkpoint: Path, patterns: Sequence[str]) -> list[str]:
    """Return the glob patterns that match no file in the checkpoint, and the names of missing shards of weights.

    Raises: InputError if an index of shards is damaged.
    """
    found = [pattern for pattern in patterns if not any(checkpoint.glob(pattern))]
    for index in checkpoint.glob("*.safetensors.index.json"):
        with reading(index, DAMAGED):
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        found += sorted(name for name in shards if not (checkpoint / name).exists())
    return found


@contextmanager
def filling(folder: Path, target: Path) -> Iterator[None]:
    """A context manager in whose body files are written into a staging folder.

    An error in writing becomes an InputError that names `target`, the final path. After any error the staging folder
    is removed, because the disk may be full.
    """
    try:
        with writing(target):
            yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def publish(written: Path, checkpoint: Path) -> None:
    """Rename the written folder to `checkpoint`, after its files are on the disk; replace an existing checkpoint."""
    with writing(checkpoint):
        sync(written)
        if checkpoint.exists():
            remove(checkpoint)
        os.replace(written, checkpoint)
        sync_entry(checkpoint.parent)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint, renaming it first, so that a kill while files are deleted leaves no partial checkpoint."""
    with staging(checkpoint) as folder:
        os.replace(checkpoint, folder / checkpoint.name)


def rotate(folder: str | Path, newest: int, limit: int | None, best: str | None = None) -> None:
    """Remove the oldest checkpoints of steps up to `newest`, so that at most `limit` of them are left.

    Checkpoints of later steps are neither counted nor removed: they are from before training resumed at an earlier
    step.

    Args:
      folder: folder of the run.
      newest: the current step. The newest checkpoint up to it is always kept.
      limit: number of checkpoints to keep; None or 0 = all.
      best: path of the best checkpoint, which counts towards `limit` and is always kept; None = there is none.
    """
    mine = [path for path in checkpoints(folder) if step_of(path) <= newest]
    if limit is None or limit < 1 or not mine:
        return
    kept = {mine[-1], *(path for path in mine if best is not None and path.name == Path(best).name)}
    older = [path for path in reversed(mine) if path not in kept]
    for checkpoint in older[max(0, limit - len(kept)) :]:
        remove(checkpoint)


# Stopping.


class Signals:
    """A record of the last SIGTERM or SIGINT that arrived; a second SIGINT raises KeyboardInterrupt at once.

    Attributes:
      number: number of that signal; None = none has arrived.
    """

    number: int | None = None

    def __init__(self):
        self.group: Any = None

    def note(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT == self.number:
            raise KeyboardInterrupt
        self.number = number

    def agreed(self, processes: int) -> int | None:
        """Return the number of a signal that any of the processes got, or None; all processes get the same answer.

        All processes must call this at the same steps.

        Args:
          processes: number of processes that train together.
        """
        if processes == 1:
            return self.number
        if self.group is None:
            self.group = torch.distributed.new_group(backend="gloo")  # on the CPU, to wait for no accelerator
        number = torch.tensor(self.number or 0)
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX, self.group)
        return int(number) or None


@contextmanager
def noted_signals() -> Iterator[Signals]:
    """A context manager in whose body SIGTERM and SIGINT are only recorded, so that training decides when to stop.

    Nothing is recorded in a thread other than the main one, because such a thread gets no signals.
    """
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {number: signal.signal(number, signals.note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stopped(number: int, folder: str | Path, step: int, steps: int) -> Stopped:
    """Return the exception that ends training at a signal, after a checkpoint is written.

    Args:
      number: number of the signal.
      folder: folder of the run.
      step: the current step.
      steps: number of steps of the whole run.
    """
    by = signal.Signals(number).name
    return Stopped(
        f"{folder}: stopped by {by} at step {step} of {steps}; the same command continues from there", number
    )


def check_processes(checkpoint: Path, found: int, here: int) -> None:
    """Check that a checkpoint was written by as many processes as run now.

    Another number of processes would put other rows into a step, because each process reads its share of the rows.

    Args:
      checkpoint: folder of the checkpoint, for the error message.
      found: number of processes that wrote the checkpoint.
      here: number of processes that run now.
    Raises: InputError if the numbers differ.
    """
    require(
        found == here,
        f"{checkpoint}: found a checkpoint of a run by {found} process(es), expected one by {here}, "
        f"as this command runs: start {found} (torchrun --nproc_per_node {found}), or take another "
        "output_dir",
    )


def _check_whole(model: PreTrainedModel, checkpoint: Path) -> None:
    """Check that the checkpoint has every weight of the model; of tied weights, one is enough.

    The checkpoint of a mixture of experts fails here, because Trainer would restore only some of its weights.

    Raises: InputError that names a missing weight.
    """
    stored: set[str] = set()
    for file in checkpoint.glob("*.safetensors"):
        with safetensors.safe_open(file, "pt") as content:
            stored.update(content.keys())
    weights = model.state_dict()
    pointers = {weights[name].data_ptr() for name in stored if name in weights}
    missing = [name for name, value in weights.items() if value.numel() and value.data_ptr() not in pointers]
    if missing:
        raise InputError(f"{checkpoint}: lacks {len(missing)} weights of this model, first {missing[0]}")


def processes_of(checkpoint: Path) -> int:
    """Return the number of processes that wrote a checkpoint of a `CheckpointedTrainer`."""
    file = checkpoint / "averages-0.json"
    with reading(file, DAMAGED):
        return int(read_object(file, DAMAGED)["processes"])


def rank_files(checkpoint: Path) -> list[str]:
    """Return the names of the files that each of the processes wrote into the checkpoint: random states, sums."""
    ranks = range(processes_of(checkpoint) if (checkpoint / "averages-0.json").exists() else 1)
    states = ["rng_state.pth"] if len(ranks) == 1 else [f"rng_state_{rank}.pth" for rank in ranks]
    return [*states, *(f"averages-{rank}.json" for rank in ranks)]


def state_of(checkpoint: Path) -> TrainerState:
    """Return the trainer state of a checkpoint. Raises: InputError if it is damaged, or that of another step."""
    file = checkpoint / TRAINER_STATE_NAME
    with reading(file, DAMAGED):
        state = TrainerState.load_from_json(str(file))
        if state.global_step != step_of(checkpoint):
            raise ValueError(f"step {state.global_step}")
    return state


class StoredTrainer(transformers.Trainer):
    """A Trainer whose models and checkpoints are complete or absent on the disk, and are read back whole.

    It takes the arguments of transformers.Trainer.
    """

    def _get_output_dir(self, trial) -> str:
        """Return the folder in which Trainer writes checkpoints: a staging folder, from which they are moved."""
        return os.path.join(super()._get_output_dir(trial), STAGING)

    def _save_checkpoint(self, model, trial) -> None:
        staging = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        self._remove_leftover(staging)
        with filling(staging, staging.parent / name):
            super()._save_checkpoint(model, trial)
        best = self.state.best_model_checkpoint
        if best is not None and Path(best).parent == staging:  # Trainer recorded the staging path
            self.state.best_model_checkpoint = str(staging.parent / Path(best).name)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            with filling(staging, staging.parent / name):
                self.state.save_to_json(str(staging / name / TRAINER_STATE_NAME))
            publish(staging / name, staging.parent / name)
            self._finish_current_push()  # the next line may remove what is being uploaded
            best = self.state.best_model_checkpoint
            rotate(staging.parent, self.state.global_step, self.args.save_total_limit, best)
            shutil.rmtree(staging, ignore_errors=True)
            if self._pushes() and self.args.hub_strategy == HubStrategy.EVERY_SAVE:
                checkpoint, message = staging.parent / name, f"Training in progress, step {self.state.global_step}"
                self.push_in_progress = start_upload(
                    checkpoint, model_files(checkpoint), self.args, self.hub_model_id, message
                )
        self.accelerator.wait_for_everyone()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Do nothing: Trainer calls this while the checkpoint is not complete; `_save_checkpoint` uploads it."""

    def push_to_hub(self, commit_message: str | None = "End of training", **kwargs) -> None:
        """Save the model in the run's folder, and upload it; other arguments of Trainer's method have no effect."""
        self.save_model()

    def init_hf_repo(self, token: str | None = None) -> None:
        if self.is_world_process_zero():
            self.hub_model_id, self.push_in_progress = create_repository(self.args), None

    def _pushes(self) -> bool:
        return self.args.push_to_hub and self.is_world_process_zero()

    def model_card(self) -> str:
        """Return the text of the file README.md that is saved with the model."""
        raise NotImplementedError

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model in a staging folder first, then move it into its folder (`move_into`)."""
        if _internal_call:  # part of a checkpoint, which is staged itself
            return super().save_model(output_dir, _internal_call=True)
        folder = Path(output_dir or self.args.output_dir)
        staging = folder / STAGING
        self._remove_leftover(staging)
        with filling(staging, folder):
            super().save_model(str(staging), _internal_call=True)
            if self.args.should_save:
                names = model_files(staging)
                move_into(staging, folder, CONFIG_FILES)
                self._finish_current_push()
                if self._pushes():
                    message = f"Model after {self.state.global_step} steps"
                    upload(folder, names, self.args, self.hub_model_id, message)
        self.accelerator.wait_for_everyone()

    def _remove_leftover(self, staging: Path) -> None:
        """Remove a staging folder that a killed process left half written."""
        if self.args.should_save and staging.exists():
            shutil.rmtree(staging)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir=None, state_dict=None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save and has_adapter(self.model):
            save_heads(self.model, output_dir or self.args.output_dir)
        if self.args.should_save:
            card = Path(output_dir or self.args.output_dir) / CARD
            card.write_text(self.model_card(), encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        """Load weights as Trainer does, and with an adapter the heads that are saved beside it.

        Raises: InputError if the checkpoint is damaged, or if weights are missing, where Trainer would only warn.
        """
        model, checkpoint = model or self.model, Path(resume_from_checkpoint)
        for file in checkpoint.glob("*.safetensors"):
            with reading(file, DAMAGED), safetensors.safe_open(file, "pt"):
                pass
        with reading(checkpoint, DAMAGED):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            if has_adapter(model):
                load_heads(model, resume_from_checkpoint)
            else:
                _check_whole(model, checkpoint)

    def _issue_warnings_after_load(self, load_result) -> None:
        """Warn of unexpected weights alone: `_check_whole` refuses missing ones, and a tied weight is stored once."""
        super()._issue_warnings_after_load(load_result._replace(missing_keys=[]))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:  # the schedule is read first, which is cheap, so that an error names the right file
            with reading(f"{checkpoint}/scheduler.pt", DAMAGED):
                torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True)
        with reading(f"{checkpoint}/optimizer.pt", DAMAGED):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading(f"{checkpoint}/rng_state", DAMAGED):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)  # Trainer's own method would not load heads


class RestoredSums(TrainerCallback):
    """A callback that restores the running sums of a resumed trainer before its first step."""

    def __init__(self, trainer: "CheckpointedTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.trainer.restore_sums()


class CheckpointedTrainer(StoredTrainer):
    """A Trainer that resumes exactly or not at all, and that stops at a signal after writing a checkpoint.

    It takes the arguments of transformers.Trainer.

    Attributes:
      averages: the running sums of metrics since the last row of metrics; checkpoints hold them too.
      display: prints what people see.
      signals: training stops at these, after writing a checkpoint; None = none are recorded.
    """

    signals: Signals | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.averages = Averages()
        self.remove_callback(PrinterCallback)
        wanted = self.pop_callback(ProgressCallback) is not None
        self.display = TrainingDisplay(shown=wanted and self.is_world_process_zero())
        self.add_callback(RestoredSums(self))
        self._resumed: Path | None = None
        self._held_at = -1  # the step whose checkpoint waits for the end of its epoch

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Train as Trainer does, but resume exactly.

        A resumed run has the same weights and metrics, bit for bit, as one that was never stopped.

        Args:
          resume_from_checkpoint: a checkpoint folder; True = the newest complete checkpoint; None or False = start
            anew.
          kwargs: further arguments of `Trainer.train`.
        Raises: InputError if the checkpoint is incomplete or damaged, if it was written by another number of
          processes, or if there is none for True.
        """
        checkpoint = self.last_checkpoint() if resume_from_checkpoint is True else resume_from_checkpoint or None
        require(
            resume_from_checkpoint is not True or checkpoint is not None,
            f"{self.args.output_dir}: found no complete checkpoint, expected one to continue from",
        )
        self._resumed, step, best = None if checkpoint is None else Path(checkpoint), 0, None
        if self._resumed is not None:
            if names := self.lacking(self._resumed):
                raise InputError(f"{self._resumed}: found no {', '.join(names)}, expected {DAMAGED}")
            check_processes(self._resumed, processes_of(self._resumed), self.args.world_size)
            state = state_of(self._resumed)
            step, best = state.global_step, state.best_model_checkpoint
            self.args.eval_on_start = False  # that evaluation was made at step 0
        self._remove_leftover(Path(self.args.output_dir) / STAGING)
        if self.args.should_save:
            keep_metrics_until(self.args.output_dir, step)
            rotate(self.args.output_dir, step, self.args.save_total_limit, best)
        self.accelerator.wait_for_everyone()
        try:
            output = super().train(checkpoint and str(checkpoint), **kwargs)
        finally:
            self.display.close()  # so that an error is printed below the bar
        return output._replace(training_loss=output.metrics["train_loss"])

    def last_checkpoint(self) -> Path | None:
        """Return the newest complete checkpoint of the run; None if there is none.

        Raises: InputError if it was written by another number of processes.
        """
        checkpoint = last_complete(self.args.output_dir, self.lacking)
        if checkpoint is not None:
            check_processes(checkpoint, processes_of(checkpoint), self.args.world_size)
        return checkpoint

    def lacking(self, checkpoint: Path) -> list[str]:
        """Return the names of files that exact resuming needs and the checkpoint does not have."""
        if has_adapter(self.model):
            heads = (f"{name}.safetensors" for name in heads_of(self.model))
            weights = ["adapter_model.safetensors", METADATA_FILE, *heads]
        else:
            weights = ["pytorch_model_fsdp*"] if self.is_fsdp_enabled else ["*.safetensors"]
        optimizer = "global_step*" if self.is_deepspeed_enabled else "optimizer*" if self.is_fsdp_enabled else None
        scaler = [] if self.accelerator.scaler is None else ["scaler.pt"]
        needed = [*weights, optimizer or "optimizer.pt", "scheduler.pt", TRAINER_STATE_NAME, *rank_files(checkpoint)]
        return missing(checkpoint, needed + scaler)

    def _run_epoch(self, *args, **kwargs) -> None:
        """Run an epoch as Trainer does, or stop if all steps are done.

        After resuming from the checkpoint of the last step, Trainer would take one more step.
        """
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:
        """Save the random state as Trainer does, and the sums of metrics and losses since the last row of metrics."""
        super()._save_rng_state(output_dir)
        sums = {name: pair.tolist() for name, pair in self.averages.sums.items()}
        found = {
            "processes": self.args.world_size,
            "logged_at": self._globalstep_last_logged,
            "sums": sums,
            "loss": self._tr_loss.item(),
            "total_loss": self._total_loss_scalar,
        }
        file = Path(output_dir) / f"averages-{self.args.process_index}.json"
        file.write_text(json.dumps(found), encoding="utf-8")

    def restore_sums(self) -> None:
        """Restore the running sums that `_save_rng_state` saved, if training resumed from a checkpoint."""
        self.averages.sums = {}
        if self._resumed is None:
            return
        file, device = self._resumed / f"averages-{self.args.process_index}.json", self.args.device
        with reading(file, DAMAGED):
            found = read_object(file, DAMAGED)
            self._tr_loss = torch.tensor(float(found["loss"]), device=device)
            self._total_loss_scalar = float(found["total_loss"])
            self._globalstep_last_logged = int(found["logged_at"])
            self.averages.sums = {name: torch.tensor(pair, device=device) for name, pair in found["sums"].items()}

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, model, trial, *args, **kwargs) -> None:
        """Log, save and evaluate as Trainer does, but write a step's checkpoint last, then stop if a signal came.

        After the last step of an epoch, Trainer calls this twice: once for the step and once for the epoch. The
        checkpoint of that step is therefore not written before the second call.

        Raises: Stopped after a signal, to end training.
        """
        step, due = self.state.global_step, self.control.should_save
        last = self.control.should_training_stop or float(self.state.epoch).is_integer()
        if last and self._held_at != step:
            self._held_at, self.control.should_save = step, False
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
            self.control.should_save = self.control.should_save or due
            return
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        number = None if self.signals is None else self.signals.agreed(self.args.world_size)
        if number is not None and step < self.state.max_steps:
            if not due or self.args.save_only_model:
                # A stopped run must be resumable, so save optimizer and schedule in any case.
                only, self.args.save_only_model = self.args.save_only_model, False
                self._save_checkpoint(model, trial)
                self.args.save_only_model = only
            raise stopped(number, self.args.output_dir, step, self.state.max_steps)
