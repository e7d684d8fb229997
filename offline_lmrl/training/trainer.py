"""The base of all offline trainers, built on transformers' Trainer.

It adds packed batches, exact counts, updates of target heads, checkpoints that are either complete or absent, and
losses that do not depend on how a batch is split over micro-batches and ranks.

A data set consists of rows of tokens, such as windows (parts of a dialogue, tokens/windows.py) or comparisons of
replies. Packed: a batch also lists the steps, which are the tokens that the agent wrote; outputs and losses are
computed at these only. An item is what the loss is averaged over: a step, or a comparison.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from accelerate.utils import send_to_device
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import EvalLoopOutput

from offline_lmrl.decoding.probe import check_plays, check_trains, probing
from offline_lmrl.errors import InputError
from offline_lmrl.logs.io import data_hash, read_trajectories
from offline_lmrl.logs.scale import RewardScale
from offline_lmrl.logs.trajectory import Trajectory, Turn
from offline_lmrl.models.adapters import (
    has_adapter,
    require_peft,
    run_metadata,
    unfreeze_heads,
)
from offline_lmrl.models.guided import as_guided
from offline_lmrl.models.loading import build_model, load_model
from offline_lmrl.models.renderers import rendering_block, scheme_of, training_renderer
from offline_lmrl.models.step_outputs import StepRequest
from offline_lmrl.models.unreached import freeze_unreached
from offline_lmrl.tokens.batching import WindowDataset, encode_trajectories
from offline_lmrl.tokens.comparison_batching import ComparisonDataset
from offline_lmrl.tokens.episodes import EpisodeEncoder, ReturnIdsFor, StepRule
from offline_lmrl.tokens.few_shot import encode_few_shot
from offline_lmrl.tokens.rendering import SCHEME, Renderer
from offline_lmrl.tokens.template_check import MISMATCH, TEMPLATE_ROWS
from offline_lmrl.tokens.tokenizers import load_tokenizer
from offline_lmrl.training.checkpoint import CheckpointedTrainer
from offline_lmrl.training.config import BaseConfig, OfflineConfig
from offline_lmrl.training.loading import EvenBatches, LengthGroupedSampler, collate_even
from offline_lmrl.training.metrics import Averages, LossBar, MetricsFile

Dataset = WindowDataset | ComparisonDataset
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
    if weight > 0 and not targets:
        raise InputError(f"{name}: found {weight:g}, expected 0, as no window of the training data holds {what}")


class TargetUpdates(TrainerCallback):
    """A callback that updates the target heads of Q after every optimizer step.

    The update (a Polyak step) is target ← rate · online + (1 − rate) · target. Optimizer steps that the loss scaler
    skipped are left out.

    Args:
      rate: share of the online heads, in [0, 1].
    Attributes:
      count: number of updates so far.
    """

    def __init__(self, rate: float):
        self.rate, self.count = rate, 0

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        if getattr(optimizer, "step_was_skipped", False):  # set by accelerate; Trainer calls this method in both cases
            return
        getattr(model, "module", model).update_targets(self.rate)
        self.count += 1


class BaseTrainer(CheckpointedTrainer):
    """A trainer on encoded data: each batch is one dict of tensors and gives one loss per item.

    An item is a token that the agent wrote, or a comparison of replies. A subclass defines how data and model are
    prepared (`prepare`), the loss (`losses`) and the number of items over which the loss is averaged (`items_in`). For
    `run.train`, it also defines how data are read (`read_rows`) and how models are made (`new_model`, `open_model`).

    Args:
      model: a model, or the folder or hub name of one.
      args: the settings.
      train_dataset: rows of data (such as trajectories), or a path or hub name of them.
      eval_dataset: the same for held-out data; None = no evaluation.
      processing_class: the tokenizer; None = the one saved with the model.
      peft_config: a config of peft, such as LoraConfig, for an adapter that is trained instead of the trunk; None =
        train the trunk.
      kwargs: further arguments of transformers.Trainer.

    Raises: InputError if one process has several GPUs, or if model, data and settings do not fit together.
    """

    loss_is_scaled_for_ga = True  # compute_loss divides by the items of all micro-batches, so Trainer must not
    algorithm = ""
    plays = False  # whether training plays in an environment
    regime = "labels only"

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
            model = self.open_model(args, model, trust_remote_code=False)
        self.renderer = training_renderer(processing_class, model, args.template, args.output_dir)
        self.counts: Counter[str] = Counter()
        model, train, held_out = self.prepare(model, args, train_dataset, eval_dataset, peft_config)
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
        self.remove_callback(PrinterCallback)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(LossBar())
        self._freeze_unreached()

    # Methods for subclasses to define.

    @staticmethod
    def read_rows(
        args: BaseConfig,
        source: Sequence[Any] | str | Path,
        counts: Counter[str] | None = None,
        reward: str | None = None,
    ) -> Sequence[Any]:
        """Read the rows of data at a path or hub name; return a sequence of rows as it is.

        Args:
          args: the settings, of which some may choose how data are read.
          source: a path, a hub name, or rows.
          counts: is incremented for each repaired or dropped row, under the reason; None = they are not counted.
          reward: the column that holds a row's score; None = `reward` or `label`, as for `read_trajectories`.
        """
        raise TypeError("this trainer does not define `read_rows`")

    @staticmethod
    def new_model(args: BaseConfig, spec: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        """Build a model with fresh weights.

        Args:
          args: the settings.
          spec: `model_type` and config fields, as for `build_model` in models/loading.py.
          tokenizer: decides the vocabulary size.
        """
        raise TypeError("this trainer does not define `new_model`")

    @staticmethod
    def open_model(args: BaseConfig, path: str, trust_remote_code: bool) -> PreTrainedModel:
        """Load the model of a folder or hub name."""
        raise TypeError("this trainer does not define `open_model`")

    def prepare(
        self, model: PreTrainedModel | str, args: BaseConfig, train: Any, held_out: Any, peft_config: Any
    ) -> tuple[torch.nn.Module, Dataset, Dataset | None]:
        """Return the model with all its parts, the encoded training data, and the encoded held-out data or None.

        `self.counts` is incremented for each dropped row, under the reason.

        Args:
          model: the model.
          args: the settings.
          train: rows, or a path or hub name of them.
          held_out: the same for evaluation; None = no evaluation.
          peft_config: a config of peft for an adapter; None = train the trunk.
        """
        raise TypeError(f"{type(self).__name__} does not define `prepare`")

    def losses(self, model: torch.nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of each of the batch's N items, (N,), and values to log.

        The values are name -> tensor of one axis, of any length; the mean over its entries is logged.
        """
        raise TypeError(f"{type(self).__name__} does not define `losses`")

    def items_in(self, batch: Mapping[str, Any]) -> int:
        """Return the number of items (such as agent tokens) in a batch; the loss is averaged over items."""
        raise TypeError(f"{type(self).__name__} does not define `items_in`")

    def costs(self) -> dict[str, int]:
        """Return `steps`, the optimizer steps so far, and `training_tokens`, the tokens read so far.

        A token that was read in three epochs counts three times.
        """
        return {
            "steps": self.state.global_step,
            "training_tokens": round(self.state.epoch * self.train_dataset.tokens),
        }

    def outcome(self) -> dict[str, float]:
        """Return measurements made at the end of training, name -> number, for complete.json."""
        return {}

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

    # Shared by all subclasses.

    def check_model(self, model: PreTrainedModel, args: BaseConfig) -> None:
        """Check that the model can read the data as they are encoded. Raises: InputError if it cannot."""
        check_model(model, self.renderer, args.max_length)

    def _freeze_unreached(self) -> None:
        """Freeze parameters that get no gradient from the loss.

        They are found by one forward pass on the longest row, because some parts of a model are used for long texts
        only.
        """
        batch = self.train_dataset.batch([int(self.train_dataset.lengths.argmax())])
        batch = send_to_device(batch, self.model.device)
        with probing(self.model), torch.random.fork_rng():
            loss = self.losses(self.model, batch)[0].sum()
        if freeze_unreached(self.model, loss) and self.accelerator.ddp_handler is not None:
            self.accelerator.ddp_handler.find_unused_parameters = True

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
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
        return torch.utils.data.SequentialSampler(eval_dataset)

    def _get_num_items_in_batch(self, batch_samples, device):
        """Return the number of items of the optimizer step, over all micro-batches and all ranks."""
        count = torch.tensor([sum(map(self.items_in, batch_samples))], device=device)
        return self.accelerator.gather(count).sum()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        per_item, logged = self.losses(model, inputs)
        self.averages.add(logged)
        # DDP averages gradients over ranks, but the count is a sum over ranks: multiply once by the world size.
        loss = per_item.sum() * self.args.world_size / num_items_in_batch
        return (loss, logged) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "train_loss" in logs:  # Trainer divides by the steps since a resume
            logs["train_loss"] = self._total_loss_scalar / max(1, self.state.global_step)
        super().log(logs | self.averages.take(self.accelerator) if "loss" in logs else logs, start_time)

    @torch.no_grad()
    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Compute the mean loss and metrics of the whole data set, independent of batch size and number of ranks."""
        training, self.averages = self.averages, Averages()
        dataset, size = dataloader.dataset, self.args.eval_batch_size
        model = self._wrap_model(self.model, training=False).eval()
        starts = range(0, len(dataset), size)
        for turn in range(-(-len(starts) // self.args.world_size)):
            number = turn * self.args.world_size + self.args.process_index
            # Sharded models need every rank to run forward equally often; a surplus pass is not counted.
            start = starts[number % len(starts)]
            batch = self._prepare_inputs(dataset.batch(range(start, min(start + size, len(dataset)))))
            with self.compute_loss_context_manager():
                per_item, logged = self.losses(model, batch)
            self.averages.add({"loss": per_item, **logged}, count=number < len(starts))
        metrics = self.averages.take(self.accelerator, f"{metric_key_prefix}_")
        self.averages = training
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(dataset))

    def compare_with_template(self, dialogues: Sequence[Sequence[Turn]]) -> None:
        """Check that some dialogues are rendered as the tokenizer's own chat template prints them.

        If one is not, `self.counts` is incremented under a line that describes the difference.

        Args:
          dialogues: the turns of each dialogue, such as the first rows of the data.
        Raises: InputError with `template: auto`, if `self.counts` holds such a difference, found here or while the
          data were encoded.
        """
        if (difference := self.renderer.check.first_difference(dialogues)) is not None:
            self.counts[difference] += 1
        for line, n in self.counts.items():
            if line.startswith(MISMATCH) and self.renderer.template == "auto":
                raise InputError(
                    f"template: found {n} {line}, expected template: assembled to train on them all the same, or plain"
                )


class OfflineTrainer(BaseTrainer):
    """A trainer of a guided model (a causal LM with optional value heads: `guided_class`) on scored trajectories.

    A subclass defines the loss (`loss_terms`), the outputs of the forward pass that the loss needs
    (`forward_options`), how rewards are distributed over tokens (`step_rule`) and the parts that the model needs
    (`prepare_model`).

    Args:
      model: a causal LM, or the folder or hub name of one.
      args: the settings.
      train_dataset: trajectories, or a path or hub name for `read_trajectories`.
      eval_dataset: the same for held-out data; None = no evaluation.
      processing_class: the tokenizer; None = the one saved with the model.
      peft_config: a config of peft, such as LoraConfig, for an adapter that is trained instead of the trunk; heads are
        trained and saved in full beside it. None = train the trunk.
    """

    rows_for_next_v = False

    def prepare(self, model, args: OfflineConfig, train, held_out, peft_config):
        train = self.select(self.read_rows(args, train, self.counts), args)
        model = as_guided(model)
        self.check_model(model, args)
        self.scale = self.fit_scale(model, train, args)
        return_ids_for = self.return_ids(model, train, args)
        self.encoder = EpisodeEncoder(
            self.renderer,
            args.window,
            self.step_rule(args),
            self.scale,
            return_ids_for,
            replies=self.learns_replies(args),
        )
        windows = self._windows(train, args, self.counts)
        self.compare_with_template([row.turns for row in islice(train, TEMPLATE_ROWS)])
        model = self.prepare_model(model, args, windows)
        model.config.offline_lmrl = (
            run_metadata(model.config)
            | {
                "algorithm": self.algorithm,
                **rendering_block(self.renderer),
                "window": asdict(args.window),
                "step_rule": asdict(self.step_rule(args)),
                "reward_scale": self.scale.to_dict(),
                "few_shot": args.few_shot and asdict(args.few_shot),
                "data": data_hash(train),
            }
            | self.stored_blocks(args)
        )
        if peft_config is not None:
            model = with_adapter(model, peft_config)
        if held_out is not None:
            held_out = self._windows(self.read_rows(args, held_out), args, Counter())
        return model, windows, held_out

    def check_model(self, model, args: OfflineConfig) -> None:
        super().check_model(model, args)
        check_trains(model, self.renderer)
        check_plays(model, self.renderer)

    @staticmethod
    def read_rows(
        args: OfflineConfig,
        source: Sequence[Trajectory] | str | Path,
        counts: Counter[str] | None = None,
        reward: str | None = None,
    ) -> Sequence[Trajectory]:
        is_path = isinstance(source, str | Path)
        return read_trajectories(source, counts=counts, reward=reward) if is_path else source

    @staticmethod
    def new_model(args: OfflineConfig, spec, tokenizer) -> PreTrainedModel:
        return build_model(spec, tokenizer)

    @staticmethod
    def open_model(args: OfflineConfig, path: str, trust_remote_code: bool) -> PreTrainedModel:
        return load_model(path, trust_remote_code=trust_remote_code)

    # Methods for algorithms to define.

    def select(self, trajectories: Sequence[Trajectory], args: OfflineConfig) -> Sequence[Trajectory]:
        """Return the trajectories to train on."""
        return trajectories

    def step_rule(self, args: OfflineConfig) -> StepRule:
        return StepRule()

    def fit_scale(self, model: PreTrainedModel, train: Sequence[Trajectory], args: OfflineConfig) -> RewardScale:
        """Return the transform of rewards to scaled units; it is fitted before any trajectory is encoded."""
        return RewardScale.fit(train, args.reward_scale, discounted=self.step_rule(args).discounted)

    def return_ids(
        self, model: PreTrainedModel, train: Sequence[Trajectory], args: OfflineConfig
    ) -> ReturnIdsFor | None:
        """Return the function that maps a trajectory to the return ids before its agent turns; None = no return ids.

        Return ids encode requested returns (tokens/conditioning.py).
        """
        return None

    def prepare_model(self, model: PreTrainedModel, args: OfflineConfig, windows: WindowDataset) -> PreTrainedModel:
        """Return the guided model with the parts that this algorithm needs.

        Args:
          model: a guided model.
          args: the settings.
          windows: the encoded training data.
        """
        return as_guided(model)

    def stored_blocks(self, args: OfflineConfig) -> Mapping[str, Any]:
        """Return further entries for the run metadata, the `offline_lmrl` block of config.json."""
        return {}

    def forward_options(self) -> Mapping[str, Any]:
        """Return the fields of `StepRequest` that differ from their defaults."""
        return {}

    def loss_terms(
        self, outputs: Mapping[str, Tensor], steps: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of each of the batch's N action tokens (the tokens that the agent wrote).

        Args:
          outputs: packed outputs of the guided model's forward pass (`StepRequest` in models/step_outputs.py).
          steps: `ActionSteps` (tokens/batching.py), (N,) each.
        Returns: the loss (N,), and values to log: name -> tensor of one axis, whose mean is logged.
        """
        raise TypeError(f"{type(self).__name__} does not define `loss_terms`")

    # Shared by all algorithms.

    def _windows(self, trajectories: Sequence[Trajectory], args: OfflineConfig, counts: Counter[str]) -> WindowDataset:
        few_shot = None
        if args.few_shot is not None:
            shown = self.demonstrations(args.few_shot.demonstrations)
            few_shot = encode_few_shot(args.few_shot, trajectories, shown, self.renderer, self.encoder.return_ids_for)
        columns = encode_trajectories(trajectories, self.encoder, counts, few_shot)
        pad_id = self.renderer.close_id  # any id will do, because padding is defined by the attention mask
        return WindowDataset(
            columns,
            pad_id,
            next_rows=self.rows_for_next_v,
            end_rows=self.rows_for_end_v(args),
            replies=self.encoder.replies,
        )

    def demonstrations(self, source: str | None) -> Sequence[Trajectory] | None:
        """Return the trajectories from which few-shot demonstrations are drawn.

        Args:
          source: file, folder or hub name of the trajectories; None = the training rows themselves.
        Returns: the trajectories; None for the training rows.
        """
        return None if source is None else read_trajectories(source)

    def rows_for_end_v(self, args: OfflineConfig) -> bool:
        return False

    def learns_replies(self, args: OfflineConfig) -> bool:
        """True if windows also hold the environment's replies, as targets."""
        return False

    def items_in(self, batch: Mapping[str, Any]) -> int:
        """Return the number of action tokens of a batch."""
        return len(batch["steps"]["row"])

    def losses(self, model: torch.nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.loss_terms(self._forward(model, batch), batch["steps"])

    def _forward(self, model: torch.nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        request = StepRequest.of(batch, **self.forward_options())
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], request=request)


def check_model(model: PreTrainedModel, renderer: Renderer, max_length: int) -> None:
    """Check that the model can read rows of `max_length` tokens that `renderer` makes.

    Raises: InputError if the model has too few positions or embeddings, or was trained with another tokenizer or
      template.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and max_length > limit:
        raise InputError(f"max_length: found {max_length}, expected at most the model's {limit} positions")
    block = run_metadata(model.config)
    found, expected = renderer.fingerprint, block.get("tokenizer")
    if expected != found and scheme_of(block) == SCHEME:
        raise InputError(
            f"tokenizer: found fingerprint {found}, expected {expected}: "
            "the model was trained with another tokenizer or chat template"
        )
    tokens, rows = len(renderer.tokenizer), model.get_input_embeddings().weight.shape[0]
    if tokens > rows:
        raise InputError(f"tokenizer: found {tokens} tokens, expected at most the model's {rows} embeddings")


def with_adapter(model: PreTrainedModel, peft_config: Any) -> torch.nn.Module:
    """Return the model inside a trainable adapter; heads stay trainable in full.

    Args:
      model: the model.
      peft_config: a config of peft for the adapter, such as LoraConfig.
    Raises: InputError if the model has an adapter already, or cannot take this one.
    """
    if has_adapter(model):
        raise InputError("lora: found a model with an adapter already; leave lora out to train that one, or merge it")
    peft = require_peft()
    routers = _linear_layers_with_several_outputs(model)
    if peft_config.target_modules == "all-linear":
        peft_config = replace(peft_config, exclude_modules=[*(peft_config.exclude_modules or ()), *routers])
    try:
        model = peft.get_peft_model(model, peft_config)
    except (TypeError, ValueError) as error:
        raise InputError(f"model.lora: {error}") from error
    inner = model.get_base_model()
    for name in routers:
        if hasattr(inner.get_submodule(name), "base_layer"):
            raise InputError(
                f"model.lora.target_modules: found {name}, a layer with several outputs, expected layers "
                "with one, which is what an adapter adds to"
            )
    unfreeze_heads(model)
    return model


@torch.no_grad()
def _linear_layers_with_several_outputs(model: PreTrainedModel) -> list[str]:
    """Return the names of linear layers that return more than one tensor, such as routers of mixtures of experts."""
    found: list[str] = []
    handles = [
        module.register_forward_hook(
            lambda module, args, output, name=name: None if isinstance(output, Tensor) else found.append(name)
        )
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    with probing(model):
        ids = torch.ones(1, 2, dtype=torch.long, device=model.device)
        model(input_ids=ids, attention_mask=ids)
    for handle in handles:
        handle.remove()
    return found


def tokenizer_beside(model: PreTrainedModel | str) -> PreTrainedTokenizerBase:
    """Return the tokenizer saved with a model (the model, or its folder or hub name).

    Raises: InputError if there is none.
    """
    return load_tokenizer(model if isinstance(model, str) else model.config._name_or_path)
