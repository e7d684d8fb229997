"""Commands that learn, and the report on what was learnt: train, compare, report."""

import argparse
import gc
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from offline_lmrl.cli.data import prepare_from_settings
from offline_lmrl.cli.parser import Command, asks_help, split_file
from offline_lmrl.errors import InputError, Stopped, shown
from offline_lmrl.logs.terminal import visible
from offline_lmrl.logs.yaml_text import read_yaml
from offline_lmrl.renamed import current
from offline_lmrl.settings import Parameter, parameters_of
from offline_lmrl.shipped import config_path

TRAIN_HELP = """Train one algorithm on scored trajectories or comparisons, or by play. FILE.yaml, or the name of a
shipped config, sets `algorithm`, `model`, `data` and `args`; for ppo also `environment`; and `prepare` if the data
have to be made first. The settings below are those of one algorithm, chosen with --algorithm NAME (default: that of
the file, else ilql). If a run was stopped, the same command continues from its last complete checkpoint; with a
larger max_steps or num_train_epochs, it also extends a finished run. --help_all adds the settings of
transformers.TrainingArguments (output_dir, max_steps, seed, ...)."""

COMPARE_HELP = """Train and evaluate the methods of FILE.yaml, or of a shipped config, over several seeds. Print one
table and write report/ (report.html, its figures, and the rows that they are drawn from). If a comparison was stopped,
the same command continues it. A method that fails does not stop the others: it is named at the end, and the same
command tries it again. `compare FOLDER` draws the report again from FOLDER/results.jsonl and trains nothing."""


def train(argv: Sequence[str]) -> None:
    """Run the command `train FILE.yaml`, which trains one algorithm, and print the run directory.

    Args:
      argv: the command line after `train`.
    """
    values = train_settings(argv)

    from accelerate import PartialState

    from offline_lmrl import run
    from offline_lmrl.logs.io import is_prepared

    if values.prepare is not None and values.data.train is not None:
        with values.args.main_process_first(local=False, desc="preparing the data"):
            if not is_prepared(values.data.train, values.prepare.get("output") or Path(values.data.train).parent):
                prepare_from_settings(values.prepare)
            elif PartialState().is_main_process:
                print(f"{values.data.train} exists and is not prepared again", file=sys.stderr)
    config = run.RunConfig(
        values.algorithm, values.model, values.data, values.args, values.environment, values.evaluation
    )
    if values.dry_run:
        for name, value in run.dry_run(config).items():
            print(visible(f"{name}: {value:,}"))
    else:
        stopped = None
        try:
            folder = run.train(config)
        except Stopped as stop:
            stopped = stop.with_traceback(None)  # its frames would keep the trainer
        leave_together()
        if PartialState().is_main_process:  # only this process reports the end
            if stopped:
                raise stopped
            print(folder)
        elif stopped:
            sys.exit(128 + stopped.number)


def leave_together() -> None:
    """Wait for all ranks, then close their connections; a rank that exits earlier would make the others fail.

    A trainer that is still referenced keeps the connections' threads, and such a thread can abort the process at its
    exit, because it frees a tensor that Python no longer can.
    """
    from accelerate import PartialState

    ranks = PartialState()
    ranks.wait_for_everyone()
    gc.collect()
    ranks.destroy_process_group()


def train_settings(argv: Sequence[str]) -> SimpleNamespace:
    """Read and check the settings of the command `train`, from its file and from the command line.

    Args:
      argv: the command line after `train`: FILE.yaml or the name of a shipped config, then settings that override it.
    Returns: `algorithm`, its name; `model`, a ModelConfig; `data`, a DataConfig; `args`, the algorithm's config;
      `prepare` and `environment`, mappings or None; `evaluation`, a WatchConfig or None; and `dry_run`, a bool.
    Raises: InputError if the algorithm is missing, or a setting cannot be used.
    """
    file, rest = split_file(argv)
    settings = {} if file is None else current(read_yaml(config_path(file), "settings"), file)
    algorithm = _algorithm(rest, settings, file) or ("ilql" if asks_help(rest) else None)
    if algorithm is None:
        raise InputError("algorithm: missing, expected it in FILE.yaml or as --algorithm NAME")

    from transformers import TrainingArguments

    from offline_lmrl.algorithms import ALGORITHMS, load_algorithm
    from offline_lmrl.evaluation.while_training import WatchConfig
    from offline_lmrl.run import DataConfig, ModelConfig

    config_class, _ = load_algorithm(algorithm)
    parameters = {
        "dry_run": Parameter(bool, False, "Print counts of data, steps and parameters, and stop."),
        "algorithm": Parameter(Literal[tuple(ALGORITHMS)], algorithm, "The algorithm; it decides what args has."),
        "prepare": Parameter(
            dict[str, Any] | None,
            None,
            "How to make the data if data.train does not exist: `command`, the SOURCE of `offline-lmrl prepare`, and "
            "its settings; null = the data must exist.",
        ),
        "environment": Parameter(
            dict[str, Any] | None,
            None,
            "For ppo: `name`, a known environment or package.module:Class (its code runs), and its settings; null = "
            "none.",
        ),
        "evaluation": Parameter(
            WatchConfig | None,
            None,
            "How the policy is measured after each checkpoint and at the end, beside the validation data; null = not.",
        ),
        "model": Parameter(ModelConfig),
        "data": Parameter(DataConfig),
        "args": Parameter(config_class),
    }
    # A field that one of our classes declares again, for example to change its default, is ours.
    ours = config_class.__mro__[: config_class.__mro__.index(TrainingArguments)]
    own = {name for cls in ours for name in vars(cls).get("__annotations__", ())}
    inherited = {f"args.{one.name}" for one in fields(TrainingArguments)} - {f"args.{name}" for name in own}
    command = Command("train", parameters, TRAIN_HELP, inherited=inherited, takes_file=True)
    defaults = {
        name: parameters[name].default for name in ("dry_run", "algorithm", "prepare", "environment", "evaluation")
    }
    return SimpleNamespace(**defaults | command.read(rest, settings, file))


def _algorithm(argv: Sequence[str], settings: dict, file: str | None) -> str | None:
    """Find the name of the algorithm before parsing, because it determines which other settings exist.

    Args:
      argv: the settings of the command line; --algorithm there overrides the file.
      settings: the settings of the file.
      file: name of the file, for error messages.
    Returns: None if neither names an algorithm.
    Raises: InputError if the name is not text.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--algorithm", nargs="?")
    name = current({"algorithm": early.parse_known_args(argv)[0].algorithm or settings.get("algorithm")})["algorithm"]
    if not isinstance(name, str | None):
        raise InputError(f"{file}: algorithm: found {shown(name)}, expected a name")
    return name


def compare(argv: Sequence[str]) -> None:
    """Run the command `compare FILE.yaml`, which trains and measures methods over seeds and writes a report.

    `compare FOLDER` only writes the report, as `report FOLDER` does.

    Args:
      argv: the command line after `compare`.
    """
    file, rest = split_file(argv)
    if file is not None and Path(file).is_dir():
        if rest:
            raise InputError(f"{rest[0]}: found a setting, expected none: {file} is a folder of results")
        report([file])
        return

    from offline_lmrl.comparison.config import CompareConfig

    command = Command("compare", parameters_of(CompareConfig), COMPARE_HELP, takes_file=True)
    command.show_help(rest)
    if file is None:
        raise InputError(f"FILE.yaml: missing, expected `{command.usage}`")
    config = CompareConfig.read(config_path(file), command.words(rest))

    from offline_lmrl.comparison.compare import run_compare

    print(run_compare(config, prepare=prepare_from_settings))


def report(folders: Sequence[str], output: Path | None = None, baseline: str | None = None) -> None:
    """Draw the report of a comparison again, or one of all runs in several folders, and print the table.

    A folder is that of a comparison, of `evaluate play --output FOLDER`, or of an earlier report. Runs that did not
    play the same episodes with equally long replies are refused.

    Args:
      folders: folders with a results.jsonl.
      output: folder in which the report is written; null = the subfolder report/ of a single folder.
      baseline: method that the paired differences are taken against; null = that of the first folder.
    """
    if len(folders) > 1 and output is None:
        raise InputError(f"output: missing, expected the folder for a report of {len(folders)} folders")

    from offline_lmrl.comparison.compare import print_table
    from offline_lmrl.comparison.page import write_report
    from offline_lmrl.comparison.rows import read_results
    from offline_lmrl.logs.files import locked

    with locked(folders[0] if output is None else output):
        written = write_report(*folders, output=output, baseline=baseline)
        print_table(read_results(written / "results.jsonl"))
        print(written / "report.html")


def plot(runs: Sequence[str], output: Path | None = None) -> None:
    """Draw the metrics of one or several trainings against their steps, one panel per metric, and print the file.

    Args:
      runs: run directories; one that is still training, too.
      output: the file, a .png or .svg; null = curves.png in the directory of a single run.
    """
    from offline_lmrl.cli.output import check_output
    from offline_lmrl.comparison.curves import plot_runs

    if output is not None:
        check_output(output, is_file=True)
    print(plot_runs(runs, output))
