"""One training run as a folder: resolved config, metrics, checkpoints, and the final model at its top.

The command line and `compare` call `train`; it is the same path as building a trainer in Python.
"""

import copy
import hashlib
import json
import logging
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_args

import transformers
import yaml
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from offline_lmrl.algorithms import load_algorithm
from offline_lmrl.data.checks import score_columns
from offline_lmrl.data.comparison import Comparison
from offline_lmrl.data.errors import InputError, shown
from offline_lmrl.data.files import differences, locked, read_object, reading, say_differences, sweep
from offline_lmrl.data.forms import reward_hint
from offline_lmrl.data.io import (
    fingerprint,
    in_one_group,
    read_comparisons,
    read_trajectories,
    shared_groups,
    write_text,
)
from offline_lmrl.data.preferences import RewardKind, to_trajectories
from offline_lmrl.data.terminal import visible
from offline_lmrl.data.tokenizers import load_tokenizer, train_tokenizer
from offline_lmrl.data.trajectory import Trajectory, Turn
from offline_lmrl.decoding.scorers import fitting, load_scorer
from offline_lmrl.environments import make_environment
from offline_lmrl.models.adapters import require_peft
from offline_lmrl.training import BaseConfig, BaseTrainer
from offline_lmrl.training_checkpoint import checkpoints, noted_signals, step_of

log = logging.getLogger(__name__)

Rows = Sequence[Trajectory] | Sequence[Comparison]
SPEED = ("processes",)  # changes no result, and is no part of what a run is
LENGTH = ("args.max_steps", "args.num_train_epochs")  # in which a run may grow
COMPLETE = "complete.json"  # what a run writes last
PREFERENCE = ("reward", "place", "normalise")  # settings of `to_trajectories`


@dataclass
class ModelConfig:
    """Where the model comes from: exactly one of `path` and `scratch`.

    path: folder or hub name of a causal LM, or a run of this project (its heads come along); for a reward model its
      trunk.
    scratch: a small model with fresh weights: `model_type` and the fields of that family's config.
    tokenizer: folder or hub name; None = the one at `path`, or one trained on the training data (scratch).
    vocab_size: size of a tokenizer trained here.
    lora: fields of peft.LoraConfig: trains an adapter (and the heads) instead of the trunk of the model at `path`.
    trust_remote_code: whether code that lies with the model may run.
    """

    path: str | None = None
    scratch: dict[str, Any] | None = None
    tokenizer: str | None = None
    vocab_size: int = 512
    lora: dict[str, Any] | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if (self.path is None) == (self.scratch is None):
            raise InputError(
                f"model: found path {self.path!r} and scratch {self.scratch!r}, expected exactly one of them"
            )
        if self.scratch is not None and self.lora is not None:
            raise InputError(
                "model.lora: found it beside model.scratch, expected model.path: an adapter is saved "
                "without its base, which has to lie somewhere"
            )


@dataclass
class DataConfig:
    """Scored trajectories, for a reward model comparisons: a file, a folder or a hub name.

    train: what is learnt from; None where an environment is all there is (ppo).
    validation: what eval_loss is measured on; None = nothing.
    preference: makes scored trajectories of comparisons: `reward` (sign, prob, strength, rank, bt, rating, or a scorer
      as `relabel` takes it), `place` and `normalise` of `to_trajectories`; None = the data are what is learnt from.
    reward: the column that holds the score of a row; None = `reward`, or `label` beside a prompt.
    """

    train: str | None = None
    validation: str | None = None
    preference: dict[str, Any] | None = None
    reward: str | None = None

    def __post_init__(self) -> None:
        if self.reward is not None and self.preference is not None:
            raise InputError("data.reward: found it beside data.preference, expected one of them")
        for name in self.preference or {}:
            if name not in PREFERENCE:
                raise InputError(f"data.preference: found {shown(name)}, expected {', '.join(PREFERENCE)}")


def build_tokenizer(config: ModelConfig, rows: Rows) -> PreTrainedTokenizerBase:
    """The tokenizer that the model config names, or one trained on the text of the data."""
    if config.tokenizer is not None or config.path is not None:
        name = config.tokenizer or config.path
        return load_tokenizer(name, trust_remote_code=config.trust_remote_code)
    return train_tokenizer((turn.content for row in rows for turn in _turns(row)), config.vocab_size)


def _turns(row: Trajectory | Comparison) -> Iterator[Turn]:
    return chain(row.turns) if isinstance(row, Trajectory) else chain(row.context, *row.options)


def read_data(algorithm: str, data: DataConfig, args: BaseConfig, counts: Counter[str]) -> tuple[Rows, Rows | None]:
    """The training and the validation data; nothing where an algorithm that plays is given none.

    args: says by how many processes, where an algorithm has such a setting.
    counts: gets what was repaired and left out by reason, and what is wrong with the groups.
    """
    trainer_class = load_algorithm(algorithm)[1]
    if data.train is None:
        if not trainer_class.plays:
            raise InputError("data.train: missing, expected a file, folder or hub name of the data to learn from")
        return [], None

    def rows(source: str, counts: Counter[str]) -> Rows:
        if data.preference is not None:
            return scored(source, data.preference, counts)
        return trainer_class.read(args, source, counts, data.reward)

    train, held_out, left_out = rows(data.train, counts), None, Counter()
    if data.validation:
        held_out = rows(data.validation, left_out)
        counts.update({f"validation: {reason}": n for reason, n in left_out.items()})
        if shared := len(shared_groups(train, held_out)):
            counts["groups that are in train and validation, so one does not test the other"] = shared
    if isinstance(train[0], Trajectory) and not any(turn.reward is not None for row in train for turn in row.turns):
        counts[f"rows, none of which has a reward{reward_hint(score_columns(train))}"] = len(train)
    if in_one_group(train):
        counts["rows that are all in one group, so none can be held back to test on"] = len(train)
    return train, held_out


def scored(source: str, preference: Mapping[str, Any], counts: Counter[str]) -> list[Trajectory]:
    """The comparisons of a source as scored trajectories; see `DataConfig.preference`."""
    rows, settings = read_comparisons(source, counts=counts), dict(preference)
    if settings.get("reward", "sign") not in get_args(RewardKind):
        settings["reward"] = load_scorer(settings["reward"])
        rows = fitting(rows, settings["reward"], counts)
    return to_trajectories(rows, **settings, counts=counts)


def scorer_runs(preference: Mapping[str, Any] | None) -> list[str]:
    """What may be folders of runs in the scorer that makes rewards."""

    def texts(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping | list):
            yield from chain.from_iterable(map(texts, value.values() if isinstance(value, Mapping) else value))

    return list(texts((preference or {}).get("reward")))


def build_trainer(
    algorithm: str,
    model: ModelConfig,
    rows: Rows,
    validation: Rows | None,
    args: BaseConfig,
    environment: Any = None,
) -> BaseTrainer:
    """Builds tokenizer and model, and wires the trainer. environment: what `open_environment` returns."""
    trainer_class = load_algorithm(algorithm)[1]
    transformers.set_seed(args.seed)  # fresh weights and heads follow the run's seed
    tokenizer = build_tokenizer(model, rows)
    network: PreTrainedModel
    if model.scratch is not None:
        network = trainer_class.new_model(args, model.scratch, tokenizer)
    else:
        network = trainer_class.open_model(args, model.path, model.trust_remote_code)
    peft_config = None
    if model.lora is not None:
        peft = require_peft()
        try:
            peft_config = peft.LoraConfig(**{"target_modules": "all-linear", **model.lora})
        except (TypeError, ValueError) as error:
            raise InputError(f"model.lora: found {model.lora}, expected fields of peft.LoraConfig: {error}") from error
    sources = (environment, rows or None) if trainer_class.plays else (rows, validation)
    return trainer_class(network, args, *sources, tokenizer, peft_config)


def open_environment(algorithm: str, environment: Mapping[str, Any] | None, players: Mapping[str, Any]) -> Any:
    """What the algorithm plays in; None for one that learns from data. Raises: InputError where that does not fit."""
    if not load_algorithm(algorithm)[1].plays:
        if environment is not None:
            raise InputError(
                f"environment: found {shown(environment)}, expected none, as {algorithm} learns from data"
            )
        return None
    if "name" not in (environment or {}):
        raise InputError(f"environment.name: missing, expected the environment that {algorithm} plays in")
    return make_environment(**environment, **players)


def resolved_config(
    algorithm: str, model: ModelConfig, data: DataConfig, args: BaseConfig, environment: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Everything that decides the run, as plain values."""
    played = {} if environment is None else {"environment": dict(environment)}
    values = {
        name: value
        for name, value in args.to_dict().items()
        if isinstance(value, str | int | float | dict | list | None) and name not in SPEED
    }
    return json.loads(
        json.dumps({"algorithm": algorithm, "model": asdict(model), "data": asdict(data), **played, "args": values})
    )


def contents(
    model: ModelConfig,
    rows: Rows,
    validation: Rows | None,
    critic: str | None = None,
    demonstrations: str | None = None,
    reference: str | None = None,
    value_model: str | None = None,
) -> dict[str, str | None]:
    """sha256 of what lies behind the paths of a run: data, demonstrations, replies of reference, and the weights of
    local folders that it starts from or learns from."""
    found = {
        "train": fingerprint(rows),
        "validation": None if validation is None else fingerprint(validation),
        "start_weights": weights_hash(model.path),
    }
    for name, source in (("demonstrations", demonstrations), ("reference", reference)):
        if source is not None:
            found[name] = fingerprint(read_trajectories(source))
    runs = {"critic_weights": critic, "value_weights": value_model}
    return found | {name: weights_hash(folder) for name, folder in runs.items() if folder is not None}


def weights_hash(folder: str | None) -> str | None:
    """sha256 of the weights in a local folder, None where there are none."""
    files = sorted(Path(folder).glob("*.safetensors")) if folder else []
    if not files:
        return None
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def critic_of(args: BaseConfig) -> str | None:
    """The run whose values this one learns from; None where the algorithm takes none."""
    return getattr(args, "critic", None)


def value_model_of(args: BaseConfig) -> str | None:
    """The run from which PPO's V starts; None where the algorithm has none, or V starts from the policy."""
    name = getattr(args, "value_model", None)
    return None if name in ("shared", "copy") else name


def demonstrations_of(args: BaseConfig) -> str | None:
    """Where the prompts of this run come from; None where there are none, or the data are their own."""
    prompt = getattr(args, "prompt", None)
    return prompt and prompt.demonstrations


def run_there(folder: Path, config: dict[str, Any]) -> Literal["none", "same", "shorter"]:
    """What the folder holds: no run yet, this run, or this run with fewer steps, which it can be extended to.

    A run that died before its first checkpoint is none. Raises: InputError that names all settings in which the run
    there is another one.
    """
    file = folder / "config.yaml"
    if not file.exists():
        return "none"
    with reading(file, "the settings of a run; take another output_dir, or remove this one"):
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise TypeError("no mapping")
    other = differences(found, config)
    if all(_is_longer(name, *values) for name, values in other.items()):
        return "shorter" if other else "same"
    if not (folder / COMPLETE).exists() and not checkpoints(folder):
        return "none"
    raise InputError(f"{file}: {say_differences(found, config)}: take another output_dir, or remove this one")


def _is_longer(name: str, there: Any, here: Any) -> bool:
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (there, here))
    return name in LENGTH and numbers and 0 < there < here


def _hold(folder: Path, args: BaseConfig, held: ExitStack) -> None:
    """Holds the folder for this run, by the process that writes there; all of them are refused together."""
    refused: list[InputError | None] = [None]
    if args.should_save:
        try:
            held.enter_context(locked(folder))
        except InputError as error:
            refused = [error]
    if args.world_size > 1:
        broadcast_object_list(refused)
    if refused[0] is not None:
        raise refused[0]


def train(
    algorithm: str,
    model: ModelConfig,
    data: DataConfig,
    args: BaseConfig,
    environment: Mapping[str, Any] | None = None,
    players: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    costs: Mapping[str, int] | None = None,
) -> Path:
    """Runs, resumes from the newest complete checkpoint, or returns at once where the run is complete.

    What is left out of the data is logged before anything is learnt, and kept in `complete.json`.

    Args:
      environment: `name` and settings of `make_environment`, for an algorithm that plays.
      players: further settings of it that are no plain values, such as a partner's policy.
      settings, costs: what led to its data, for its config, and what that took, for its costs.
    Returns: the run directory; it opens with `LanguagePolicy.load`, or as a reward model with `load_scorer`, and with
    transformers.
    """
    folder = Path(args.output_dir)
    counts: Counter[str] = Counter()
    rows, validation = read_data(algorithm, data, args, counts)
    config = resolved_config(algorithm, model, data, args, environment) | dict(settings or {})
    reference, value_model = getattr(args, "reference", None), value_model_of(args)
    config["contents"] = contents(
        model, rows, validation, critic_of(args), demonstrations_of(args), reference, value_model
    )
    if run_there(folder, config) == "same" and (folder / COMPLETE).exists():
        if args.should_save:
            sweep(folder)  # whoever was killed had written the last file
        return folder
    with ExitStack() as held:
        _hold(folder, args, held)
        there = run_there(folder, config)
        world = open_environment(algorithm, environment, players or {})
        trainer = build_trainer(algorithm, model, rows, validation, args, world)
        checkpoint = None if there == "none" else trainer.last_checkpoint()
        if there == "shorter" and checkpoint is None and (folder / COMPLETE).exists():
            raise InputError(
                f"{folder}: found no complete checkpoint, expected one to extend the run from: take "
                "another output_dir, or save_strategy: steps from the start"
            )
        trainer.accelerator.wait_for_everyone()  # whoever reads the folder has read it
        if trainer.args.should_save:
            (folder / COMPLETE).unlink(missing_ok=True)  # of the shorter run
            write_text(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))
            _say_start(trainer, folder, checkpoint, there == "shorter")
            for reason, n in (+counts + trainer.counts).items():
                log.warning("%s: %s: %d", folder, visible(reason), n)
        trainer.accelerator.wait_for_everyone()
        with noted_signals() as trainer.signals:
            trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model(str(folder))
        if trainer.args.should_save:
            before = runs_before(model.path, critic_of(args), value_model, *scorer_runs(data.preference))
            report = {
                **trainer.costs(),
                **trainer.outcome(),
                **(costs or {}),
                "start_tokens": sum(before.values()),
                "before": before,
                "counts": dict(+counts + trainer.counts),
            }
            write_text(folder / COMPLETE, json.dumps(report))
        trainer.accelerator.wait_for_everyone()
    return folder


def _say_start(trainer: BaseTrainer, folder: Path, checkpoint: Path | None, extended: bool) -> None:
    """One line on where training goes on, and where the run is extended one on its schedule."""
    if checkpoint is None:
        return
    step, steps = step_of(checkpoint), trainer.total_steps
    log.warning("%s: goes on at step %d of %d", folder, step, steps)
    if extended and trainer.args.lr_scheduler_type != "constant":
        log.warning(
            "%s: is extended to %d steps: from here on the learning rate follows a schedule of that length, "
            "the steps before followed a shorter one, so this is not quite one run of %d steps",
            folder,
            steps,
            steps,
        )


def read_report(folder: str | Path) -> dict[str, Any]:
    """The complete.json of a run. Raises: InputError where it is damaged."""
    file = Path(folder) / COMPLETE
    advice = "what a finished run writes; remove it, and train again to finish the run"
    report = read_object(file, advice)
    with reading(file, advice):
        tokens = [report["training_tokens"], *report.get("before", {}).values()]
        if not all(isinstance(count, int | float) for count in tokens):
            raise TypeError("tokens that are no numbers")
    return report


def runs_before(*folders: str | None) -> dict[str, int]:
    """Tokens read in training by the runs that lie in these folders and by those before them, by folder: a run that
    several ways lead to is there once."""
    found: dict[str, int] = {}
    for folder in filter(None, folders):
        if (Path(folder) / COMPLETE).exists():
            report = read_report(folder)
            found |= report.get("before", {}) | {str(Path(folder).resolve()): report["training_tokens"]}
    return found


def dry_run(
    algorithm: str,
    model: ModelConfig,
    data: DataConfig,
    args: BaseConfig,
    environment: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Builds everything and says what would run: rows, tokens, steps, parameters, memory (bytes; fp32, AdamW)."""
    args, counts = copy.copy(args), Counter()
    with tempfile.TemporaryDirectory() as args.output_dir:  # Trainer makes this folder
        world = open_environment(algorithm, environment, {})
        trainer = build_trainer(algorithm, model, *read_data(algorithm, data, args, counts), args, world)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    return {
        **trainer.plan(),
        "parameters": parameters,
        "trained parameters": trained,
        "memory for weights, gradients and optimizer": 4 * (parameters + 3 * trained),
        **(+counts + trainer.counts),
    }
