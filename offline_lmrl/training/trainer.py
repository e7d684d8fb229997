"""The base of all offline trainers, built on transformers' Trainer.

It adds packed batches, exact counts, checkpoints that are either complete or absent (training/checkpoint.py), and
losses that do not depend on how a batch is split over micro-batches and ranks.

A data set consists of rows of tokens, such as windows (parts of a dialogue, tokens/windows.py) or comparisons of
replies. Packed: a batch also lists the steps, which are the tokens that the agent wrote; outputs and losses are
computed at these only. An item is what the loss is averaged over: a step, or a comparison.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.data_loader import BatchSamplerShard
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import DataLoader, SequentialSampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import EvalLoopOutput, IntervalStrategy

from offline_lmrl.decoding.config import DecodingConfig
from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.decoding.probe import probing
from offline_lmrl.errors import InputError, require
from offline_lmrl.logs.files import cache_folder
from offline_lmrl.logs.io import data_hash, read_trajectories
from offline_lmrl.logs.scale import RewardScale
from offline_lmrl.logs.terminal import tracked
from offline_lmrl.logs.trajectory import Trajectory, Turn
from offline_lmrl.models.adapters import run_metadata
from offline_lmrl.models.guided import as_guided, remove_heads
from offline_lmrl.models.renderers import rendering_block, training_renderer
from offline_lmrl.models.step_outputs import StepRequest
from offline_lmrl.models.unreached import freeze_unreached
from offline_lmrl.tokens.batching import PackedDataset, WindowDataset, encode_trajectories
from offline_lmrl.tokens.episodes import EpisodeEncoder, ReturnIdsFor, StepRule
from offline_lmrl.tokens.few_shot import encode_few_shot
from offline_lmrl.training.checkpoint import CheckpointedTrainer
from offline_lmrl.training.completions import LogCompletions, prompts_of
from offline_lmrl.training.config import BaseConfig, GuidedConfig, OfflineConfig
from offline_lmrl.training.display import commands_after
from offline_lmrl.training.loading import EvenBatches, LengthGroupedSampler, collate_even
from offline_lmrl.training.metrics import Averages, LastStep, MetricsFile, batch_moments, ratio_interval
from offline_lmrl.training.publishing import model_card, sources
from offline_lmrl.training.starting_model import check_policy, check_template, tokenizer_beside, with_adapter

KEPT_FROM = 5000  # trajectories, fewer of which are encoded again in seconds
KNOWN_TURN = "a finished agent turn after which the log continues or ends"  # its reward is a training target


def require_targets(name: str, weight: float, targets: int, what: str) -> None:
    """Check that a loss with a weight above 0 has targets in the training data.

    Args:
      name: name of the setting with the weight, for the error message.
      weight: weight of the loss.
      targets: number of targets of the loss in the training data.
      what: description of a target, for the error message.
    Raises: InputError if the weight is above 0 and there are no targets.
    """
    require(
        weight == 0 or targets > 0,
        f"{name}: found {weight:g}, expected 0, as no window of the training data holds {what}",
    )


class BaseTrainer(CheckpointedTrainer):
    """A trainer on encoded data: each batch is one dict of tensors and gives one loss per item.

    An item is a token that the agent wrote, or a comparison of replies. How data are read and models are made is part
    of the config (`BaseConfig`). The rest of an algorithm are these methods:

    - `prepare`: the model with all its parts, and the encoded data;
    - `outputs`: what the model computes for a batch;
    - `losses`: the loss of each item from these outputs.

    `OfflineTrainer` defines the first two for scored trajectories; an algorithm there may define

    - `choose`: the trajectories to train on, and their labels;
    - `encoding`: how trajectories become windows, and what is computed at their steps;
    - `prepare_model`: the parts that the model needs.

    Args:
      model: a model, or the folder or hub name of one.
      args: the settings.
      train_dataset: rows of data (such as trajectories), or a path or hub name of them.
      eval_dataset: the same for held-out data; None = no evaluation.
      processing_class: the tokenizer; None = the one saved with the model.
      peft_config: a config of peft, such as LoraConfig, for an adapter that is trained instead of the trunk; None =
        train the trunk.
      kwargs: further arguments of transformers.Trainer.
    Attributes:
      renderer: converts dialogues to tokens.
      counts: reason -> number of rows of the training data that were dropped or repaired.
      data: what the model card says of the data (`Trained` in training/publishing.py).
      regime: the information that the run learns from, for its card.
      outcome: measurements made at the end of training, name -> number, for complete.json.
    Raises: InputError if one process has several GPUs, or if model, data and settings do not fit together.
    """

    next_commands: tuple[str, ...] = commands_after("evaluate logs {run} --data HELD_OUT.jsonl")
    regime = "labels only"
    loss_is_scaled_for_ga = True  # compute_loss divides by the items of all micro-batches, so Trainer must not
    algorithm = ""

    def __init__(
        self,
        model: PreTrainedModel | str,
        args: BaseConfig,
        train_dataset: Sequence[Any] | str | Path,
        eval_dataset: Sequence[Any] | str | Path | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        **kwargs: Any,
    ):
        if args.n_gpu > 1:
            command = f"torchrun --nproc_per_node {args.n_gpu} --no-python offline-lmrl train FILE.yaml"
            raise InputError(f"found {args.n_gpu} GPUs in one process, expected one process per GPU: run `{command}`")
        if processing_class is None:
            processing_class = tokenizer_beside(model)
        if isinstance(model, str):
            model = args.open_model(model)
        self.args, self.peft_config = args, peft_config
        self.renderer = training_renderer(processing_class, model, args.template, args.output_dir)
        self.counts: Counter[str] = Counter()
        self.outcome: dict[str, float] = {}
        train, held_out = (
            args.read_rows(rows, counts) if isinstance(rows, str | Path) else rows
            for rows, counts in ((train_dataset, self.counts), (eval_dataset, None))
        )
        if held_out is None:
            require(
                args.evaluates_by_default or args.eval_strategy == IntervalStrategy.NO,
                f"eval_strategy: found {args.eval_strategy.value}, expected no, as there are no validation data",
            )
            args.eval_strategy, args.do_eval = IntervalStrategy.NO, False
        self.data = sources(training=(train_dataset, train), validation=(eval_dataset, held_out))
        model, train, held_out = self.prepare(model, train, held_out)
        if self.peft_config is not None:
            model = with_adapter(model, self.peft_config)
        super().__init__(
            model,
            args,
            data_collator=collate_even,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=processing_class,
            **kwargs,
        )
        self.can_return_loss, self.label_names = True, []
        self.add_callback(MetricsFile())
        self.add_callback(self.display)  # after the file, from which it reads the summary
        self.add_callback(LastStep())
        _freeze_unreached(self)

    # Methods for algorithms to define.

    def prepare(
        self, model: PreTrainedModel, train: Sequence[Any], held_out: Sequence[Any] | None
    ) -> tuple[PreTrainedModel, PackedDataset, PackedDataset | None]:
        """Return the model with all its parts and its run metadata, and the encoded training and held-out data.

        `self.counts` is incremented for each dropped row, under the reason. `self.peft_config` may be completed.
        """
        raise NotImplementedError

    def outputs(self, model: torch.nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return what the model, perhaps wrapped for several processes, computes for a batch."""
        raise NotImplementedError

    def losses(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of each of the batch's N items, (N,), and values to log.

        The values are name -> tensor of one axis, of any length; the mean over its entries is logged.
        """
        raise NotImplementedError

    # Shared by all algorithms.

    def costs(self) -> dict[str, int]:
        """Return `steps`, the optimizer steps so far, and `training_tokens`, the tokens read so far.

        A token that was read in three epochs counts three times.
        """
        return {
            "steps": self.state.global_step,
            "training_tokens": round(self.state.epoch * self.train_dataset.tokens),
        }

    def plan(self) -> dict[str, int]:
        """Return, by name, the size of the training data and the number of optimizer steps, without training."""
        return {**self.train_dataset.summary(), "optimizer steps": self.total_steps}

    @property
    def total_steps(self) -> int:
        """The number of optimizer steps of the whole run."""
        args = self.args
        if args.max_steps > 0:
            return args.max_steps
        rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return math.ceil(-(-len(self.train_dataset) // rows) * args.num_train_epochs)

    def get_train_dataloader(self) -> DataLoader:
        """Return Trainer's loader, changed so that each row goes to exactly one rank."""
        loader = super().get_train_dataloader()
        shard = loader.batch_sampler
        if isinstance(shard, BatchSamplerShard) and not shard.drop_last:
            ranks = 1 if shard.split_batches else shard.num_processes
            shard.sampler = shard.batch_sampler.sampler  # where a resumed loader looks for set_epoch
            shard.batch_sampler = EvenBatches(shard.sampler, shard.batch_size, ranks, surplus=len(loader.dataset))
        return loader

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy == "group_by_length":
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            return LengthGroupedSampler(dataset.lengths, self.args.train_batch_size * self.args.world_size, seed)
        return super()._get_train_sampler(train_dataset)

    def _get_eval_sampler(self, eval_dataset):
        # Independent of the training order, because evaluation_loop makes its own batches.
        return SequentialSampler(eval_dataset)

    def _get_num_items_in_batch(self, batch_samples, device):
        """Return the number of items of the optimizer step, over all micro-batches and all ranks."""
        count = torch.tensor([sum(map(self.train_dataset.items_in, batch_samples))], device=device)
        return self.accelerator.gather(count).sum()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        per_item, logged = self.losses(self.outputs(model, inputs), inputs)
        self.averages.add(logged)
        # DDP averages gradients over ranks, but the count is a sum over ranks: multiply once by the world size.
        loss = per_item.sum() * self.args.world_size / num_items_in_batch
        return (loss, logged) if return_outputs else loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as `StoredTrainer` does, and print what can be done with it."""
        super().save_model(output_dir, _internal_call)
        if not _internal_call:
            self.display.advise(output_dir or self.args.output_dir, self.next_commands)

    def model_card(self) -> str:
        return model_card(self)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "train_loss" in logs:  # Trainer divides by the steps since a resume
            logs["train_loss"] = self._total_loss_scalar / max(1, self.state.global_step)
        super().log(logs | self.averages.take(self.accelerator) if "loss" in logs else logs, start_time)

    @torch.no_grad()
    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Measure the whole data set (`_held_out_metrics`)."""
        dataset = dataloader.dataset
        metrics = _held_out_metrics(self, dataset, description.lower(), f"{metric_key_prefix}_")
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(dataset))


def _freeze_unreached(trainer: BaseTrainer) -> None:
    """Freeze parameters that get no gradient from the loss.

    They are found by one forward pass on the longest row, because some parts of a model are used for long texts only.
    """
    batch = trainer.train_dataset.batch([int(trainer.train_dataset.lengths.argmax())])
    batch = send_to_device(batch, trainer.model.device)
    with probing(trainer.model), torch.random.fork_rng():
        loss = trainer.losses(trainer.outputs(trainer.model, batch), batch)[0].sum()
    if freeze_unreached(trainer.model, loss) and trainer.accelerator.ddp_handler is not None:
        trainer.accelerator.ddp_handler.find_unused_parameters = True


def _held_out_metrics(trainer: BaseTrainer, dataset: PackedDataset, title: str, prefix: str) -> dict[str, float]:
    """Compute the mean loss and metrics of a whole data set, independent of batch size and number of ranks.

    Args:
      trainer: computes the losses.
      dataset: the data.
      title: text before the progress bar.
      prefix: text before each name.
    Returns: the metrics, and with enough batches `loss_low` and `loss_high`, the 95 % interval of the loss.
    """
    averages, size, ranks = Averages(), trainer.args.eval_batch_size, trainer.args.world_size
    moments = torch.zeros(6, device=trainer.args.device)
    model = trainer._wrap_model(trainer.model, training=False).eval()
    starts = range(0, len(dataset), size)
    turns = -(-len(starts) // ranks)
    for turn in tracked(range(turns), title, turns):
        number = turn * ranks + trainer.args.process_index
        # Sharded models need every rank to run forward equally often; a surplus pass is not counted.
        start = starts[number % len(starts)]
        batch = trainer._prepare_inputs(dataset.batch(range(start, min(start + size, len(dataset)))))
        with trainer.compute_loss_context_manager():
            per_item, logged = trainer.losses(trainer.outputs(model, batch), batch)
        averages.add({"loss": per_item, **logged}, count=number < len(starts))
        moments += batch_moments(per_item) * (number < len(starts))
    metrics = averages.take(trainer.accelerator, prefix)
    interval = ratio_interval(*trainer.accelerator.reduce(moments, "sum").tolist())
    if interval is not None:
        metrics[f"{prefix}loss_low"], metrics[f"{prefix}loss_high"] = interval
    return metrics


class Logs(NamedTuple):
    """The trajectories of a training.

    train: trajectories to train on.
    held_out: trajectories for evaluation; None = no evaluation.
    demonstrations: trajectories from which few-shot demonstrations are drawn; None = those of the rows themselves.
    """

    train: Sequence[Trajectory]
    held_out: Sequence[Trajectory] | None
    demonstrations: Sequence[Trajectory] | None


@dataclass(frozen=True)
class Encoding:
    """How an algorithm encodes trajectories as windows, and what it computes at their steps.

    scale: the transform of rewards to scaled units, fitted before any trajectory is encoded.
    step_rule: the distribution of rewards over tokens, discounts, and the states from which values bootstrap.
    return_ids_for: maps a trajectory to the return ids before its agent turns, which encode requested returns
      (tokens/conditioning.py); None = no return ids.
    replies: True: windows also hold the environment's replies, as targets.
    next_rows: True: batches also hold the rows that only serve to compute V of the next state.
    end_rows: True: batches also hold the rows that only serve to compute V at the end of a cut log.
    columns: maps encoded windows to further columns for the losses: name -> one number per step, (N,); None = none.
    request: fields of `StepRequest` that are not at their defaults.
    """

    scale: RewardScale
    step_rule: StepRule = StepRule()
    return_ids_for: ReturnIdsFor | None = None
    replies: bool = False
    next_rows: bool = False
    end_rows: bool = False
    columns: Callable[[WindowDataset], Mapping[str, np.ndarray]] | None = None
    request: Mapping[str, Any] = field(default_factory=dict)


class OfflineTrainer(BaseTrainer):
    """A trainer of a guided model (a causal LM with optional value heads: `guided_class`) on scored trajectories.

    Args:
      model: a causal LM, or the folder or hub name of one.
      args: the settings.
      train_dataset: trajectories, or a path or hub name for `read_trajectories`.
      eval_dataset: the same for held-out data; None = no evaluation.
      processing_class: the tokenizer; None = the one saved with the model.
      peft_config: a config of peft, such as LoraConfig, for an adapter that is trained instead of the trunk; heads are
        trained and saved in full beside it. None = train the trunk.
    """

    args: OfflineConfig

    def __init__(self, *positional, **keywords):
        self.prompts: list[tuple[list[Turn], str]] = []
        super().__init__(*positional, **keywords)
        if self.args.log_completions > 0:
            require(
                self.args.eval_strategy != IntervalStrategy.NO,
                f"log_completions: found {self.args.log_completions} with eval_strategy no, expected 0: replies are "
                "drawn at evaluations",
            )
            require(
                bool(self.prompts),
                f"log_completions: found {self.args.log_completions}, expected 0, as no validation row has a turn "
                "before the agent's first",
            )
            self.add_callback(LogCompletions(self, self.prompts))

    # Methods for algorithms to define; `losses` gets the outputs that `StepRequest` describes.

    def choose(self, logs: Logs) -> Logs:
        """Return the trajectories to train on, with the labels that training needs."""
        return logs

    def encoding(self, model: PreTrainedModel, train: Sequence[Trajectory]) -> Encoding:
        """Return how trajectories are encoded.

        Args:
          model: the guided model from which training starts.
          train: the trajectories to train on.
        """
        return Encoding(RewardScale.fit(train, self.args.reward_scale, discounted=False))

    def prepare_model(self, model: PreTrainedModel, windows: WindowDataset) -> PreTrainedModel:
        """Return the guided model with the parts that this algorithm needs: none, unless it defines this method.

        Args:
          model: the guided model from which training starts. Its heads fit the trunk as it was before this training.
          windows: the encoded training data.
        """
        return remove_heads(model)

    # Shared by all algorithms.

    def prepare(self, model, train: Sequence[Trajectory], held_out: Sequence[Trajectory] | None):
        args = self.args
        shown = args.few_shot and args.few_shot.demonstrations
        logs = self.choose(Logs(train, held_out, shown and read_trajectories(shown)))
        model = as_guided(model)
        check_policy(model, self.renderer, args.max_length)
        encoding = self.encoding(model, logs.train)
        self.request = encoding.request
        self.encoder = EpisodeEncoder(
            self.renderer,
            args.window,
            encoding.step_rule,
            encoding.scale,
            encoding.return_ids_for,
            encoding.replies,
        )
        self.data["training"]["hash"] = data_hash(logs.train)
        windows = self._windows(encoding, logs, logs.train, self.counts)
        check_template(self.renderer, (row.turns for row in logs.train), self.counts)
        model = self.prepare_model(model, windows)
        model.config.offline_lmrl = run_metadata(model.config) | {
            "algorithm": self.algorithm,
            **rendering_block(self.renderer),
            "window": asdict(args.window),
            "step_rule": asdict(encoding.step_rule),
            "reward_scale": encoding.scale.to_dict(),
            "few_shot": args.few_shot and asdict(args.few_shot),
            "data": self.data["training"]["hash"],
            **({"decoding": args.saved_decoding} if isinstance(args, GuidedConfig) else {}),
        }
        require(
            args.log_completions == 0 or logs.held_out is not None,
            f"log_completions: found {args.log_completions}, expected 0, as there are no validation data",
        )
        if logs.held_out is not None:
            self.prompts = prompts_of(logs.held_out, args.log_completions)
            held_out = self._windows(encoding, logs, logs.held_out, Counter())
        return model, windows, held_out

    def policy(self) -> LanguagePolicy:
        """Return the policy in training, which plays as the run will."""
        decoding = DecodingConfig.from_dict(run_metadata(self.model.config).get("decoding") or {})
        return LanguagePolicy(self.model, self.renderer, decoding, **asdict(self.args.window))

    def _windows(
        self, encoding: Encoding, logs: Logs, rows: Sequence[Trajectory], counts: Counter[str]
    ) -> WindowDataset:
        """Return the windows of `rows`, which are the training or the held-out trajectories of `logs`."""
        args, few_shot, kept = self.args, None, None
        if args.few_shot is not None:
            few_shot = encode_few_shot(
                args.few_shot, rows, logs.demonstrations, self.renderer, encoding.return_ids_for
            )
        if len(rows) >= KEPT_FROM:
            shown = None if logs.demonstrations is None else data_hash(logs.demonstrations)
            parts = self.encoder.fingerprint, data_hash(rows), args.few_shot, shown
            kept = cache_folder("encoded") / hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
        with args.main_process_first():  # the other processes read what it has kept
            encoded = encode_trajectories(rows, self.encoder, counts, few_shot, args.processes, kept)
        windows = WindowDataset(
            encoded,
            self.renderer.close_id,  # any id will do for padding, which is defined by the attention mask
            next_rows=encoding.next_rows,
            end_rows=encoding.end_rows,
            replies=encoding.replies,
        )
        return windows if encoding.columns is None else windows.with_columns(**encoding.columns(windows))

    def outputs(self, model, batch):
        request = StepRequest.of(batch, **self.request)
        if "hidden" in batch:  # of a frozen trunk
            return model(hidden=batch["hidden"], request=request) | {"log_prob": batch["log_prob"]}
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], request=request)
