"""The settings that all algorithms share, and the checks of their ranges before training starts."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.trainer_utils import HubStrategy, IntervalStrategy, SaveStrategy

from offline_lmrl.decoding.config import DecodingConfig
from offline_lmrl.errors import InputError, require, shown
from offline_lmrl.logs.io import store_trajectories
from offline_lmrl.models.loading import build_model, load_model
from offline_lmrl.settings import build_inner, setting
from offline_lmrl.tokens.few_shot import FewShotConfig
from offline_lmrl.tokens.rendering import TEMPLATES
from offline_lmrl.tokens.windows import WindowRule


@dataclass
class BaseConfig(TrainingArguments):
    """The settings of every algorithm, in addition to the fields of `transformers.TrainingArguments`.

    A window is one row of training tokens: the turns of a dialogue that the policy sees at once (tokens/windows.py).

    Raises: InputError if a setting is outside its range.
    """

    context: int | None = setting(
        None,
        "The most turns that the policy sees before its own; null = all. With 1, a fully observed game is Markov.",
    )
    stride: int = setting(1, "The number of turns by which that window moves at a time (tokens/windows.py).")
    max_length: int = setting(
        1024,
        "The most tokens of a window; whole turns are dropped, oldest first, but never the reply.",
    )
    template: str = setting(
        "auto",
        "How dialogues become text. `auto`: as the tokenizer's chat template prints them, or as `plain` if it has "
        "none. `assembled`: the template's texts around turns, but earlier text never changes; this is faster if the "
        "template rewrites earlier turns, and then differs from what other engines print. `plain`: one line per turn, "
        "with the speaker's name.",
    )
    processes: int = setting(
        1,
        "Number of processes that read and render the data; results do not depend on it.",
    )

    learning_rate: float = setting(1e-5, "Highest learning rate of AdamW.")
    weight_decay: float = setting(0.01, "Decoupled weight decay of AdamW; 0 = none.")
    adam_beta2: float = setting(0.95, "AdamW's decay of the mean of squared gradients.")
    warmup_steps: float = setting(
        0.05, "Optimizer steps in which the learning rate rises from 0; below 1 = a share of all steps."
    )
    lr_scheduler_type: str = setting(
        "cosine_with_min_lr", "Schedule of the learning rate after the warm-up, by its name in transformers."
    )
    lr_scheduler_kwargs: dict | str | None = setting(
        lambda: {"min_lr_rate": 0.1},
        "Further arguments of that schedule; null = none. min_lr_rate is the last learning rate as a share of the "
        "highest.",
    )
    eval_strategy: IntervalStrategy | str | None = setting(
        None,
        "When validation data are evaluated: no, steps (every eval_steps) or epoch; null = whenever a checkpoint is "
        "saved, and at the end.",
    )
    save_total_limit: int | None = setting(2, "Checkpoints that are kept, the newest and the best; null = all.")
    logging_steps: float = setting(50, "Optimizer steps between rows of metrics; below 1 = a share of all steps.")
    # The filter would cost a host sync per step.
    logging_nan_inf_filter: bool = setting(False, "Replace losses that are no finite number in the logs.")
    # A batch holds packed steps, which forward does not name.
    remove_unused_columns: bool = setting(False, "Drop columns that the model's forward does not name; keep it off.")
    ddp_find_unused_parameters: bool | None = setting(
        False, "Let DistributedDataParallel look for parameters without a gradient; null = let transformers decide."
    )

    def __post_init__(self) -> None:
        build_inner(self)
        WindowRule(self.context, self.stride, self.max_length)  # made only for its range checks
        require(
            self.template in TEMPLATES,
            f"template: found {shown(self.template)}, expected one of {', '.join(TEMPLATES)}",
        )
        self.evaluates_by_default = self.eval_strategy is None
        if self.evaluates_by_default:
            by_epoch = self.save_strategy == SaveStrategy.EPOCH
            # transformers also evaluates after the last step, the only time without checkpoints.
            self.eval_strategy = IntervalStrategy.EPOCH if by_epoch else IntervalStrategy.STEPS
            self.eval_steps = 10**9 if self.save_strategy == SaveStrategy.NO else self.save_steps
        try:
            super().__post_init__()
        except InputError:
            raise
        except Exception as error:  # the settings are the only input, so any error is about them
            raise InputError(f"args: {' '.join(str(error).split()) or type(error).__name__}") from error
        # torch would warn on every pass.
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.accelerator.is_available()
        check_range(
            self,
            seed=(0, 2**32 - 1),
            per_device_train_batch_size=(1, 2**31),
            per_device_eval_batch_size=(1, 2**31),
            gradient_accumulation_steps=(1, 2**31),
            learning_rate=(0, 1e6),
            weight_decay=(0, 1e6),
            adam_beta1=(0, 0.999999),
            adam_beta2=(0, 0.9999999),
            adam_epsilon=(0, 1e6),
            dataloader_num_workers=(0, 10**6),
            processes=(1, 10**6),
            **({} if self.max_grad_norm is None else {"max_grad_norm": (0, math.inf)}),
        )
        check_schedule(self)
        check_trackers(self)
        require(
            self.hub_strategy in (HubStrategy.END, HubStrategy.EVERY_SAVE),
            f"hub_strategy: found {self.hub_strategy.value}, expected end or every_save: what resuming needs is not "
            "uploaded",
        )

    @property
    def window(self) -> WindowRule:
        return WindowRule(self.context, self.stride, self.max_length)

    @property
    def named_data(self) -> dict[str, str]:
        """The data that these settings name besides training and validation data: name -> file, folder or hub name."""
        return {}

    @property
    def named_run(self) -> str | None:
        """The folder or hub name of the run whose values this one learns from or starts from; None = there is none."""
        return None

    # How runs of these settings get their inputs: here scored trajectories, and a causal LM with optional heads.

    def read_rows(
        self, source: str | Path, counts: Counter[str] | None = None, reward: str | None = None
    ) -> Sequence[Any]:
        """Read the rows of data.

        Args:
          source: a path or hub name.
          counts: is incremented for each repaired or dropped row, under the reason; None = they are not counted.
          reward: the column that holds a row's score; None = `reward` or `label`, as for `store_trajectories`.
        """
        return store_trajectories(source, counts=counts, reward=reward, processes=self.processes)

    def new_model(self, spec: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        """Build a model with fresh weights.

        Args:
          spec: `model_type` and config fields, as for `build_model` in models/loading.py.
          tokenizer: decides the vocabulary size.
        """
        return build_model(spec, tokenizer)

    def open_model(self, path: str, trust_remote_code: bool = False) -> PreTrainedModel:
        """Load the model of a folder or hub name."""
        return load_model(path, trust_remote_code=trust_remote_code)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, as TrainingArguments does; a dataclass in a field becomes a dict.

        TrainingArguments hides every field whose name ends in _token. Here only texts, such as hub_token, stay hidden.
        """
        shown = {name: value for name, value in vars(self).items() if isinstance(value, float | int)}
        values = super().to_dict()
        values |= {name: shown[name] for name in values if name.endswith("_token") and name in shown}
        return {name: asdict(value) if is_dataclass(value) else value for name, value in values.items()}


@dataclass
class OfflineConfig(BaseConfig):
    """The settings of every algorithm that learns from scored trajectories."""

    reward_scale: float | None = setting(None, "The divisor of rewards; null = the range of the training returns.")
    few_shot: FewShotConfig | None = setting(
        None,
        "Few-shot demonstrations of the same task before every window (tokens/few_shot.py); null = no demonstrations.",
    )

    log_completions: int = setting(
        0,
        "The number of held-out prompts to which the policy replies at every evaluation; the replies are in "
        "completions.jsonl of the run, on a terminal, and in trackers that take texts. 0 = none.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, log_completions=(0, 10**6))
        require(
            self.reward_scale is None or self.reward_scale > 0,
            f"reward_scale: found {self.reward_scale}, expected a number above 0",
        )
        if self.few_shot is not None:
            require(
                self.few_shot.max_tokens < self.max_length,
                f"few_shot.max_tokens: found {self.few_shot.max_tokens}, expected below max_length "
                f"({self.max_length}), which holds the demonstrations and the window after them",
            )

    @property
    def named_data(self) -> dict[str, str]:
        shown = self.few_shot and self.few_shot.demonstrations  # None = those of the training data
        return super().named_data | ({"demonstrations": shown} if shown else {})


@dataclass
class GuidedConfig(OfflineConfig):
    """The settings of an algorithm that saves with the run how its policy chooses tokens in play."""

    decoding: DecodingConfig = setting(DecodingConfig, "How the run chooses tokens when it plays; saved with the run.")

    always_saved: ClassVar[tuple[str, ...]] = ()  # fields of `decoding` that are saved even at their default

    @property
    def saved_decoding(self) -> dict[str, Any]:
        """The part of `decoding` that is saved with the run: name -> plain value."""
        plain, own = asdict(DecodingConfig()), asdict(self.decoding)
        return {name: own[name] for name in own if name in self.always_saved or own[name] != plain[name]}

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values; of `decoding`, only the part that is saved with the run."""
        return super().to_dict() | {"decoding": self.saved_decoding}


def check_schedule(args: TrainingArguments) -> None:
    """Check that a learning rate schedule can be built from the settings, before training starts.

    Raises: InputError if it cannot.
    """
    try:
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
        get_scheduler(args.lr_scheduler_type, optimizer, 0, 2, args.lr_scheduler_kwargs)
    except Exception as error:  # these settings are the only input, so any error is about them
        raise InputError(
            f"lr_scheduler_kwargs: found {shown(args.lr_scheduler_kwargs)} ({error}), expected arguments of "
            f"the schedule {args.lr_scheduler_type}"
        ) from error


def check_trackers(args: TrainingArguments) -> None:
    """Check that the experiment trackers in `report_to` are known and installed, before training starts.

    Raises: InputError if a tracker is unknown or not installed.
    """
    for name in args.report_to or ():
        require(
            name in INTEGRATION_TO_CALLBACK,
            f"report_to: found {shown(name)}, expected none, or some of {', '.join(INTEGRATION_TO_CALLBACK)}",
        )
        if name not in get_available_reporting_integrations():
            try:
                INTEGRATION_TO_CALLBACK[name]()
            except Exception as error:
                raise InputError(
                    f"report_to: found {name}, which cannot be used here ({error}), expected a tracker "
                    "that is installed"
                ) from error


def check_range(config: object, **bounds: tuple[float, float]) -> None:
    """Check that fields of `config` are numbers in closed ranges.

    Args:
      config: any object with these fields.
      bounds: name of a field -> (lowest, highest allowed value).
    Raises: InputError that names the first field that is None or outside its range.
    """
    for name, (low, high) in bounds.items():
        value = getattr(config, name)
        require(value is not None and low <= value <= high, f"{name}: found {value}, expected {low} to {high}")
