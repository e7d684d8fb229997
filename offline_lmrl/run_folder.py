"""The folder of a run: which run is in it, who may write there, and the report of a run that is complete."""

import hashlib
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import yaml
from accelerate.utils import broadcast_object_list

from offline_lmrl.algorithms import ALGORITHMS
from offline_lmrl.errors import InputError
from offline_lmrl.evaluation.while_training import WATCHED
from offline_lmrl.logs.files import differences, locked, read_object, reading, say_differences
from offline_lmrl.renamed import current
from offline_lmrl.training.checkpoint import checkpoints
from offline_lmrl.training.config import BaseConfig

COMPLETE = "complete.json"  # written last, so it marks a complete run
# Settings that change no result, so that a run may be continued with others.
INCIDENTAL = ("dataloader_pin_memory", "disable_tqdm", "log_completions", "report_to", "run_name", "save_total_limit")
EVALUATION = ("do_eval", "eval_steps", "eval_strategy")  # these do, if evaluation decides what is learnt
LENGTH = ("args.max_steps", "args.num_train_epochs")  # settings that may be larger when a run is extended


def run_there(folder: Path, config: dict[str, Any]) -> Literal["none", "same", "shorter"]:
    """Compare the run in a folder with a config.

    Args:
      folder: the folder.
      config: the resolved config of the run that is asked for.
    Returns: "same" = the folder holds this run; "shorter" = it holds this run with fewer steps or epochs, which can be
      extended; "none" = it holds no run, or another run that ended before its first checkpoint.
    Raises: InputError if the folder holds another run; the message names all settings that differ.
    """
    file = folder / "config.yaml"
    if not file.exists():
        return "none"
    with reading(file, "the settings of a run; take another output_dir, or remove this one"):
        found = current(yaml.safe_load(file.read_text(encoding="utf-8")))
        if not isinstance(found, dict) or not isinstance(found.get("args") or {}, dict):
            raise TypeError("no mapping")
    args = found.get("args") or {}
    hidden = {name for name, value in args.items() if value == f"<{name.upper()}>"}  # numbers in runs of version 0.1
    found = {**found, "args": args | {name: config["args"].get(name) for name in hidden}}
    found, config = _without_incidental(found), _without_incidental(config)
    other = differences(found, config)
    if all(_is_longer(name, *values) for name, values in other.items()):
        return "shorter" if other else "same"
    if not (folder / COMPLETE).exists() and not checkpoints(folder):
        return "none"
    raise InputError(f"{file}: {say_differences(found, config)}; take another output_dir, or remove this one")


def _without_incidental(config: Mapping[str, Any]) -> dict[str, Any]:
    args = config.get("args") or {}
    decides = args.get("load_best_model_at_end") or args.get("lr_scheduler_type") == "reduce_lr_on_plateau"
    skipped = INCIDENTAL if decides else INCIDENTAL + EVALUATION
    return {**config, "args": {name: value for name, value in args.items() if name not in skipped}}


def _is_longer(name: str, there: Any, here: Any) -> bool:
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (there, here))
    return name in LENGTH and numbers and 0 < there < here


def hold(folder: Path, args: BaseConfig, held: ExitStack) -> None:
    """Lock the folder in the process that writes there, until `held` is closed; if that fails, raise in all processes.

    Raises: InputError if another command holds the lock.
    """
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


def read_report(folder: str | Path) -> dict[str, Any]:
    """Return the contents of complete.json, the report that a run writes when it ends.

    Args:
      folder: the run directory.
    Returns: costs, such as `steps` and `training_tokens`, and measurements, such as those at the end of training, by
      name; and three further entries:
      before: folder of each run that this run builds on -> its training tokens.
      start_tokens: the sum of these training tokens.
      counts: description of a fault of the data -> number of cases.
    Raises: InputError if the file is missing or damaged.
    """
    file = Path(folder) / COMPLETE
    advice = "the report of a finished run; remove this file and train again, which finishes the run"
    report = read_object(file, advice)
    with reading(file, advice):
        tokens = [report["training_tokens"], *report.get("before", {}).values()]
        if not all(isinstance(count, int | float) for count in tokens):
            raise TypeError("training tokens that are not numbers")
    return report


def runs_before(*folders: str | None) -> dict[str, int]:
    """Return the training tokens of the runs in these folders and of all runs that they build on, by folder.

    A run on which several others build is in the result once.

    Args:
      folders: run directories; None and folders without a complete run are skipped.
    Returns: folder of the run -> its training tokens.
    """
    found: dict[str, int] = {}
    for folder in filter(None, folders):
        if (Path(folder) / COMPLETE).exists():
            report = read_report(folder)
            found |= report.get("before", {}) | {str(Path(folder).resolve()): report["training_tokens"]}
    return found


def weights_hash(folder: str | None) -> str | None:
    """Return the sha256 of the *.safetensors files in a local folder; None if there are none."""
    files = sorted(Path(folder).glob("*.safetensors")) if folder else []
    if not files:
        return None
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def regime(algorithm: str, settings: Mapping[str, Any]) -> str:
    """Return the information that a run learns from, as reports name it.

    Args:
      algorithm: name of its algorithm.
      settings: its resolved config.
    """
    own, watched = ALGORITHMS[algorithm].regime, (settings.get("evaluation") or {}).get("environment")
    return f"{own}, {WATCHED}" if watched else own
