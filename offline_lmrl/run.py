"""One training run as a folder: resolved config, metrics, checkpoints, and the final model at the top of the folder.

The command line and `compare` call `train`, which builds the same trainer as a Python program would.
"""

import copy
import json
import logging
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_args

import transformers
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from offline_lmrl.algorithms import ALGORITHMS, load_algorithm
from offline_lmrl.errors import InputError, require, shown
from offline_lmrl.evaluation.while_training import Watch, WatchConfig
from offline_lmrl.logs.comparison import Comparison
from offline_lmrl.logs.files import sweep
from offline_lmrl.logs.forms import reward_hint
from offline_lmrl.logs.io import (
    data_hash,
    in_one_group,
    read_comparisons,
    read_trajectories,
    shared_groups,
    write_text,
)
from offline_lmrl.logs.preferences import RewardKind, to_trajectories
from offline_lmrl.logs.terminal import visible
from offline_lmrl.logs.trajectory import Trajectory, Turn
from offline_lmrl.models.adapters import require_peft
from offline_lmrl.run_folder import COMPLETE, hold, regime, run_there, runs_before, weights_hash
from offline_lmrl.settings import setting
from offline_lmrl.tasks import make_environment
from offline_lmrl.tokens.tokenizers import load_tokenizer, train_tokenizer
from offline_lmrl.training.checkpoint import noted_signals, step_of
from offline_lmrl.training.config import BaseConfig
from offline_lmrl.training.frozen import freeze_trunk, largest_size
from offline_lmrl.training.trainer import BaseTrainer

log = logging.getLogger(__name__)

Rows = Sequence[Trajectory] | Sequence[Comparison]
SPEED = ("processes",)  # settings that change no result and are left out of the resolved config
PREFERENCE = ("reward", "reward_at", "normalise")  # settings of `to_trajectories`


@dataclass
class ModelConfig:
    """The origin of the model: exactly one of `path` and `scratch`."""

    path: str | None = setting(
        None,
        "Folder or hub name of a causal LM, or a run of this project, whose heads are loaded too. A reward model "
        "takes its trunk from it.",
    )
    scratch: dict[str, Any] | None = setting(
        None,
        "`model_type` and config fields of a small model with fresh weights.",
    )
    tokenizer: str | None = setting(
        None,
        "Folder or hub name of a tokenizer; null = the one at `path` or, with scratch, one trained on the training "
        "data.",
    )
    vocab_size: int = setting(512, "Vocabulary size of a tokenizer trained here, in tokens.")
    lora: dict[str, Any] | None = setting(
        None,
        "Fields of peft.LoraConfig, to train an adapter (and the heads) instead of the trunk of the model at `path`; "
        "null = train the trunk.",
    )
    freeze: Literal["trunk"] | None = setting(
        None,
        "trunk: train only the value heads of ilql, on hidden states that are computed once and kept on disk; the "
        "policy stays that of the model. null = train the trunk too.",
    )
    trust_remote_code: bool = setting(False, "Allow code that is stored with the model to run.")

    def __post_init__(self) -> None:
        require(
            (self.path is None) != (self.scratch is None),
            f"model: found path {self.path!r} and scratch {self.scratch!r}, expected exactly one of them",
        )
        require(
            self.scratch is None or self.lora is None,
            "model.lora: found settings together with model.scratch, expected model.path: an adapter is saved "
            "without its base model, which has to be in a folder or on the hub",
        )


@dataclass
class DataConfig:
    """The data, each a file, a folder or a hub name.

    They are scored trajectories; for a reward model they are comparisons of replies, but scored trajectories with
    `loss: regression`.
    """

    train: str | None = setting(None, "Data to learn from; null = no logs, for ppo, which plays in an environment.")
    validation: str | None = setting(None, "Data on which eval_loss is measured; null = no validation.")
    preference: dict[str, Any] | None = setting(
        None,
        "Settings that turn comparisons into scored trajectories: `reward` (sign, prob, strength, rank, bt, rating, "
        "or a scorer as in `relabel`), `reward_at` and `normalise` of `to_trajectories`. null = learn from the "
        "data without change.",
    )
    reward: str | None = setting(
        None,
        "Column that holds the score of a row; null = `reward`, or `label` in rows with a prompt.",
    )

    def __post_init__(self) -> None:
        require(
            self.reward is None or self.preference is None,
            "data.reward: found a column together with data.preference, expected only one of them",
        )
        for name in self.preference or {}:
            require(
                name in PREFERENCE,
                f"data.preference: found {shown(name)}, expected one of {', '.join(PREFERENCE)}",
            )


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run, as `train` takes them.

    algorithm: name of the algorithm, a key of ALGORITHMS.
    model: the origin of the model.
    data: the training and validation data.
    args: the algorithm's settings; `output_dir` is the run's folder.
    environment: arguments of `make_environment`: `name` and the environment's settings, for an algorithm that plays;
      None = no environment.
    evaluation: how the policy is measured while it trains; None = on validation data alone.
    """

    algorithm: str
    model: ModelConfig
    data: DataConfig
    args: BaseConfig
    environment: Mapping[str, Any] | None = None
    evaluation: WatchConfig | None = None

    def resolved(self) -> dict[str, Any]:
        """Return all settings that determine the run's result, as plain values: the main part of config.yaml."""
        played = {} if self.environment is None else {"environment": dict(self.environment)}
        values = {
            name: value
            for name, value in self.args.to_dict().items()
            if isinstance(value, str | int | float | dict | list | None) and name not in SPEED
        }
        sources = {"algorithm": self.algorithm, "model": asdict(self.model), "data": asdict(self.data)}
        # Through JSON, so that tuples are lists as in the config.yaml with which this is compared.
        watched = {"evaluation": self.evaluation and asdict(self.evaluation)}
        return json.loads(json.dumps({**sources, **played, **watched, "args": values}))


def build_tokenizer(config: ModelConfig, rows: Rows) -> PreTrainedTokenizerBase:
    """Load the tokenizer that `config` names, or train one on the text of the data `rows`."""
    if config.tokenizer is not None or config.path is not None:
        name = config.tokenizer or config.path
        return load_tokenizer(name, trust_remote_code=config.trust_remote_code)
    return train_tokenizer((turn.content for row in rows for turn in _turns(row)), config.vocab_size)


def _turns(row: Trajectory | Comparison) -> Iterator[Turn]:
    return chain(row.turns) if isinstance(row, Trajectory) else chain(row.context, *row.options)


def read_data(config: RunConfig, counts: Counter[str]) -> tuple[Rows, Rows | None]:
    """Read the training and the validation data.

    Args:
      config: the settings of the run; `args.processes` processes read the data.
      counts: is incremented for each repaired or dropped row, under the reason, and for other faults of the data, for
        example for each group (rows of one root prompt or conversation) that is in both training and validation data.
    Returns: training rows, and validation rows or None; ([], None) for an algorithm that plays and has no data.train.
    Raises: InputError if data cannot be read, or if an algorithm that learns from data has no data.train.
    """
    algorithm, data = config.algorithm, config.data
    if data.train is None:
        require(
            ALGORITHMS[algorithm].plays,
            "data.train: missing, expected a file, folder or hub name of the data to learn from",
        )
        return [], None

    def rows(source: str, counts: Counter[str]) -> Rows:
        if data.preference is not None:
            return scored(source, data.preference, counts)
        return config.args.read_rows(source, counts, data.reward)

    train, held_out, left_out = rows(data.train, counts), None, Counter()
    if data.validation:
        held_out = rows(data.validation, left_out)
        counts.update({f"validation: {reason}": n for reason, n in left_out.items()})
        if shared := len(shared_groups(train, held_out)):
            counts["groups that are in both train and validation, so that validation is no test of new groups"] = (
                shared
            )
    if isinstance(train[0], Trajectory) and not any(turn.reward is not None for row in train for turn in row.turns):
        from offline_lmrl.tokens.checks import score_columns

        counts[f"rows without any reward{reward_hint(score_columns(train))}"] = len(train)
    if in_one_group(train):
        counts["rows that are all in one group, so that none can be held out for validation"] = len(train)
    return train, held_out


def scored(source: str, preference: Mapping[str, Any], counts: Counter[str]) -> list[Trajectory]:
    """Read comparisons and turn them into scored trajectories.

    Args:
      source: file, folder or hub name of the comparisons.
      preference: the setting `DataConfig.preference`.
      counts: is incremented for each repaired or dropped row, under the reason.
    """
    rows, settings = read_comparisons(source, counts=counts), dict(preference)
    if settings.get("reward", "sign") not in get_args(RewardKind):
        from offline_lmrl.decoding.scorers import drop_too_long, load_scorer  # most runs need no scorer

        settings["reward"] = load_scorer(settings["reward"])
        rows = drop_too_long(rows, settings["reward"], counts)
    return to_trajectories(rows, **settings, counts=counts)


def scorer_runs(preference: Mapping[str, Any] | None) -> list[str]:
    """Return all texts in the specification of the scorer that makes rewards; each may be the folder of a run.

    Args:
      preference: the setting `DataConfig.preference`, whose `reward` may specify a scorer; None = no scorer.
    """

    def texts(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping | list):
            yield from chain.from_iterable(map(texts, value.values() if isinstance(value, Mapping) else value))

    return list(texts((preference or {}).get("reward")))


def build_trainer(config: RunConfig, rows: Rows, validation: Rows | None, environment: Any = None) -> BaseTrainer:
    """Build the tokenizer, the model and the trainer, and return the trainer.

    Args:
      config: the settings of the run.
      rows: the training data.
      validation: the validation data; None = no validation.
      environment: the result of `open_environment`; None for an algorithm that learns from data.
    Raises: InputError if model, data and settings do not fit together.
    """
    model, args = config.model, config.args
    transformers.set_seed(args.seed)  # fresh weights and heads follow the run's seed
    tokenizer = build_tokenizer(model, rows)
    network: PreTrainedModel
    if model.scratch is not None:
        network = args.new_model(model.scratch, tokenizer)
    else:
        network = args.open_model(model.path, model.trust_remote_code)
    peft_config = None
    if model.lora is not None:
        peft = require_peft()
        try:
            peft_config = peft.LoraConfig(**{"target_modules": "all-linear", **model.lora})
        except (TypeError, ValueError) as error:
            raise InputError(f"model.lora: found {model.lora}, expected fields of peft.LoraConfig: {error}") from error
    algorithm = ALGORITHMS[config.algorithm]
    require(
        model.freeze is None or (algorithm.trains_values and not algorithm.plays),
        f"model.freeze: found {model.freeze} with {config.algorithm}, expected null: only the value heads of ilql can "
        "be trained without the trunk",
    )
    frozen = {} if model.freeze is None else {"frozen_trunk": True}
    sources = (environment, rows or None) if algorithm.plays else (rows, validation)
    return load_algorithm(config.algorithm)[1](network, args, *sources, tokenizer, peft_config, **frozen)


def open_environment(config: RunConfig, players: Mapping[str, Any]) -> Any:
    """Make the environment that the algorithm plays in.

    Args:
      config: the settings of the run.
      players: further arguments of `make_environment` that are objects, such as the policy of a partner (the model
        that plays the other side).
    Returns: the environment or a factory of it, as `rollout` takes it; None for an algorithm that learns from data.
    Raises: InputError if an environment is missing, or given to an algorithm that learns from data.
    """
    algorithm, environment = config.algorithm, config.environment
    if not ALGORITHMS[algorithm].plays:
        require(
            environment is None,
            f"environment: found {shown(environment)}, expected none, as {algorithm} learns from data",
        )
        return None
    require(
        "name" in (environment or {}),
        f"environment.name: missing, expected the environment that {algorithm} plays in",
    )
    return make_environment(**environment, **players)


def input_hashes(model: ModelConfig, rows: Rows, validation: Rows | None, args: BaseConfig) -> dict[str, str | None]:
    """Hash the inputs that a run names by path, so that a changed input is noticed when the run is resumed.

    Args:
      model: the origin of the model.
      rows: the training data.
      validation: the validation data; None = no validation.
      args: the algorithm's settings, which may name further data and a run (`named_data`, `named_run`).
    Returns: input -> sha256, with the keys "train", "validation" and "start_weights", the names of further data, and
      "value_weights" if the settings name a run. None = no validation data, or no weights in a local folder.
    """
    found = {
        "train": data_hash(rows),
        "validation": None if validation is None else data_hash(validation),
        "start_weights": weights_hash(model.path),
    }
    found |= {name: data_hash(read_trajectories(source)) for name, source in args.named_data.items()}
    return found if args.named_run is None else found | {"value_weights": weights_hash(args.named_run)}


def train(
    config: RunConfig,
    players: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    costs: Mapping[str, int] | None = None,
) -> Path:
    """Train a run, or resume it from its newest complete checkpoint; a complete run is returned at once.

    Counts of dropped data are logged before training starts, and stored in `complete.json`.

    Args:
      config: the settings of the run.
      players: further arguments of `make_environment` that are objects, such as the policy of a partner (the model
        that plays the other side).
      settings: settings with which the data were made, added to the run's config.yaml.
      costs: costs of making the data by name, added to those in `complete.json`.
    Returns: the run's folder. `LanguagePolicy.load` opens it, or `load_scorer` if it is a reward model; transformers
      opens it too.
    Raises: InputError if an input is wrong, or if the folder holds another run; Stopped after SIGTERM or SIGINT.
    """
    args = config.args
    folder = Path(args.output_dir)
    counts: Counter[str] = Counter()
    rows, validation = read_data(config, counts)
    resolved = config.resolved() | dict(settings or {})
    resolved["input_hashes"] = input_hashes(config.model, rows, validation, args)
    if run_there(folder, resolved) == "same" and (folder / COMPLETE).exists():
        if args.should_save:
            sweep(folder)  # a process that was killed after complete.json may have left temporary files
        return folder
    with ExitStack() as held:
        hold(folder, args, held)
        there = run_there(folder, resolved)  # again under the lock: another process may have trained meanwhile
        world = open_environment(config, players or {})
        trainer = build_trainer(config, rows, validation, world)
        if config.evaluation is not None:
            trainer.add_callback(Watch(trainer, config.evaluation, validation))
        trainer.regime = regime(config.algorithm, resolved)
        for name, one in trainer.data.items():
            field = "train" if name == "training" else name
            one |= {"path": asdict(config.data)[field], "hash": resolved["input_hashes"][field]}
        checkpoint = None if there == "none" else trainer.last_checkpoint()
        require(
            there != "shorter" or checkpoint is not None or not (folder / COMPLETE).exists(),
            f"{folder}: found no complete checkpoint, expected one from which to extend the run; take another "
            "output_dir, with save_strategy: steps if that run is to be extended later",
        )
        trainer.accelerator.wait_for_everyone()  # all processes have read the folder before it changes
        if trainer.args.should_save:
            (folder / COMPLETE).unlink(missing_ok=True)  # left by a shorter run that is now extended
            write_text(folder / "config.yaml", yaml.safe_dump(resolved, sort_keys=False))
            _say_start(trainer, folder, checkpoint, there == "shorter")
            for reason, n in (+counts + trainer.counts).items():
                log.warning("%s: %s: %d", folder, visible(reason), n)
        trainer.accelerator.wait_for_everyone()
        with noted_signals() as trainer.signals:
            trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model(str(folder))
        if trainer.args.should_save:
            before = runs_before(config.model.path, args.named_run, *scorer_runs(config.data.preference))
            report = {
                **trainer.costs(),
                **trainer.outcome,
                **(costs or {}),
                "regime": trainer.regime,
                "start_tokens": sum(before.values()),
                "before": before,
                "counts": dict(+counts + trainer.counts),
            }
            write_text(folder / COMPLETE, json.dumps(report))
        trainer.accelerator.wait_for_everyone()
    return folder


def _say_start(trainer: BaseTrainer, folder: Path, checkpoint: Path | None, extended: bool) -> None:
    """Log the step from which training resumes, and warn if the schedule changes because the run is extended."""
    if checkpoint is None:
        return
    step, steps = step_of(checkpoint), trainer.total_steps
    log.warning("%s: continues at step %d of %d", folder, step, steps)
    if extended and trainer.args.lr_scheduler_type != "constant":
        log.warning(
            "%s: is extended to %d steps: from here on, the learning rate follows a schedule of that length; earlier "
            "steps followed a shorter one, so the result differs from that of a single run of %d steps",
            folder,
            steps,
            steps,
        )


def dry_run(config: RunConfig) -> dict[str, Any]:
    """Build everything that `train` builds, but do not train.

    Returns: name -> number: the size of the training data, the number of optimizer steps, the numbers of parameters,
      memory in bytes (fp32, AdamW), and counts of dropped data.
    """
    args, counts = copy.copy(config.args), Counter()
    args.push_to_hub = False  # Trainer creates the repository
    frozen = config.model.freeze is not None
    config = replace(config, args=args, model=replace(config.model, freeze=None))  # hidden states are not computed
    with tempfile.TemporaryDirectory() as args.output_dir:  # Trainer creates output_dir
        world = open_environment(config, {})
        trainer = build_trainer(config, *read_data(config, counts), world)
    if frozen:
        freeze_trunk(trainer.model)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    kept = {"bytes of hidden states, at most": largest_size(trainer.train_dataset, trainer.model)} if frozen else {}
    return {
        **trainer.plan(),
        **kept,
        "parameters": parameters,
        "trained parameters": trained,
        "memory for weights, gradients and optimizer": 4 * (parameters + 3 * trained),
        **(+counts + trainer.counts),
    }
