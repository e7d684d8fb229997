"""Train and evaluate several methods over several seeds. The result is one file of rows and one table; an interrupted
comparison resumes after the last row that it wrote.

A method is an algorithm with its settings; it is trained once per seed, which gives one run (a folder with the trained
model). Every run plays the same episodes: sampled, greedily, and with its planner if it has one. Value-guided methods
are measured at up to two values of β, the weight of guidance: one chosen from held-out logs alone (by a KL budget),
and one chosen by its score on other episodes. β is never chosen on the reported episodes. A setting is a way of
decoding together with the way in which β was chosen, and each method, seed and setting gives one row of results.jsonl.
Rows that the file already has are not measured again.

A partner is a further model, trained once for the whole comparison, that plays the other side inside the environment.
"""

import json
import os
import random
import re
import shutil
import signal
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from offline_lmrl.algorithms import ALGORITHMS, load_algorithm
from offline_lmrl.comparison.config import ELSEWHERE, CollectConfig, CompareConfig, MethodConfig, build
from offline_lmrl.comparison.page import write_report
from offline_lmrl.comparison.provenance import provenance
from offline_lmrl.comparison.report import read_results, table, terminal_table
from offline_lmrl.comparison.rounds import train_in_rounds
from offline_lmrl.decoding.planner import Planner, PlannerConfig
from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.decoding.sampler import DecodingConfig
from offline_lmrl.errors import Failed, InputError, Stopped, shown
from offline_lmrl.evaluation.metrics import Estimate, label_means, mean_interval
from offline_lmrl.evaluation.offline import OfflineReport, evaluate_offline
from offline_lmrl.evaluation.play import EvaluationResult, evaluate_policy
from offline_lmrl.logs.files import locked, say_differences, writing
from offline_lmrl.logs.io import (
    data_hash,
    holds_comparisons,
    is_prepared,
    read_comparisons,
    read_trajectories,
    write_text,
)
from offline_lmrl.logs.parallel import end_with_parent
from offline_lmrl.logs.preferences import to_trajectories
from offline_lmrl.logs.terminal import visible
from offline_lmrl.logs.trajectory import Trajectory
from offline_lmrl.run import SPEED, DataConfig, ModelConfig, read_report, runs_before, train
from offline_lmrl.tasks import make_environment
from offline_lmrl.training.metrics import read_metrics

SAMPLES = 10
# Version of the rows. Increase it when a code change makes the same settings train or play differently: rows of the
# old version are then refused instead of being mixed with new ones.
SCHEME = 2
CURVE = ("environment_steps", "reward_queries", "score", "kl")  # metrics of a run that played, copied into its rows
CURVE_POINTS = 50
TEMPERATURES = {"sampled": {}, "greedy": {"temperature": 0.0}}
PLANNED = "planned"
TABLE_WIDTH = 100  # columns of the printed table, at most; a file that output is redirected to has no width of its own

Row = dict[str, Any]


def run_compare(
    config: CompareConfig,
    *,
    prepare: Callable[[Mapping[str, Any]], object] | None = None,
    console: Console | None = None,
) -> Path:
    """Train and measure all that a comparison still lacks, then write its report and print a table.

    The table on the terminal has the most important columns; table.md and the report have all. The folder
    `config.output` then holds results.jsonl (report.py describes its rows), table.md, config.json, episodes/ (files
    with one row per episode), samples/ (ten dialogues per setting, from the same episodes for every method), runs/
    (the trained models) and report/ (page.py describes its files).

    Args:
      config: the comparison.
      prepare: function that makes the data from the settings in `config.prepare`. It is called with them if the
        training data are missing or unfinished; None = never.
      console: receives the progress messages; None = stderr. The table goes to stdout.
    Returns: path of report/report.html.
    Raises: InputError if the settings are wrong, the folder holds results of other settings, or another process is
      writing to the folder; Stopped if the process is interrupted. If a method fails, the others are still trained,
      measured and reported; afterwards InputError is raised if bad input caused every failure, else Failed.
    """
    comparison = _Comparison(config, console or Console(stderr=True))
    comparison.check_settings()
    with locked(config.output):
        if config.prepare is not None and prepare is not None:
            source = config.data["train"]
            if not is_prepared(source, config.prepare.get("output") or Path(source).parent):
                comparison.say(f"preparing {source}")
                prepare(config.prepare)
        try:
            return _compare(comparison)
        except KeyboardInterrupt as stop:
            if isinstance(stop, Stopped) and stop.line:
                comparison.say(stop.line)
            number = getattr(stop, "number", signal.SIGINT)
            raise Stopped(f"{config.output}: stopped; the same command does the rest", number) from stop


def _compare(comparison: "_Comparison") -> Path:
    config = comparison.config
    comparison.open_results()
    if config.workers > 1:
        comparison.train_side_by_side()
        comparison.measure_side_by_side()
    else:
        comparison.measure_one_by_one()
    write_text(comparison.folder / "table.md", visible(table(comparison.rows)) + "\n")
    width = min(TABLE_WIDTH, shutil.get_terminal_size((TABLE_WIDTH, 24)).columns)
    Console(width=width).print(terminal_table(comparison.rows))
    page = write_report(comparison.folder) / "report.html"
    comparison.raise_failures()
    return page


def _begin_worker(threads: int) -> None:
    end_with_parent()
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class _Failure:
    """The reason why a method has no run, or lacks some of its rows, for one seed.

    line: the error message, in one line.
    unusable: True if an input or a setting was wrong, False if the program failed.
    cause: for a method that was skipped, the name of the failed method whose run it needs; None for a method that
      failed.
    """

    line: str
    unusable: bool
    cause: str | None = None


Failures = dict[tuple[str, int], _Failure]  # (name of a method, training seed) -> failure


def _train_seed(config: CompareConfig, seed: int | None) -> Failures:
    """Train all methods with one seed, in a worker process, and return the failures.

    Args:
      config: the comparison.
      seed: a training seed; None trains the partner instead.
    """
    comparison = _Comparison(config, _quiet())
    try:
        if seed is None:
            comparison.train_partner()
        else:
            for name in config.trained:
                comparison.is_trained(name, seed)
    except Stopped as stop:
        comparison.say(stop.line)  # here, because the parent receives the exception of one worker at most
        raise Stopped("", stop.number) from stop
    return comparison.untrained


@dataclass(frozen=True)
class _Setting:
    """A way of decoding a method, with the way in which β, the weight of value guidance, is chosen.

    decode: "sampled", "greedy" or "planned".
    chosen: "offline", β is chosen from held-out logs; "returns", by playing other episodes; None, no value guidance.
    """

    decode: str
    chosen: str | None


def _measure(
    config: CompareConfig, untrained: Failures, name: str, seed: int, settings: Sequence[_Setting]
) -> tuple[list[Row], Failures, Failures]:
    """Measure a method trained with one seed, in a worker process.

    Args:
      config: the comparison.
      untrained: failures of training so far; these runs are not tried again.
      name: name of the method.
      seed: its training seed.
      settings: the settings to measure.
    Returns: the new rows; `untrained` with the failures of training added; and the failures while measuring.
    """
    comparison = _Comparison(config, _quiet())
    comparison.untrained = untrained
    rows = list(comparison.measure(name, seed, settings))
    return rows, comparison.untrained, comparison.unmeasured


def _quiet() -> Console:
    """A console for worker processes. It prints lines but no progress bars, which would overwrite one another."""
    return Console(stderr=True, force_terminal=False)


class _Comparison:
    """The state of one `run_compare` call.

    rows: the rows of results.jsonl so far.
    runs: (method, seed) -> run directory, of the runs that are trained.
    untrained: the failures of training, also of methods skipped because they need a failed one.
    unmeasured: the failures while measuring a trained run.

    Args:
      config: the comparison.
      console: receives the progress messages.
    """

    def __init__(self, config: CompareConfig, console: Console):
        self.config, self.console = config, console
        self.folder = Path(config.output)
        self.rows: list[Row] = []
        self.runs: dict[tuple[str, int], Path] = {}
        self.untrained: Failures = {}
        self.unmeasured: Failures = {}

    def say(self, text: str) -> None:
        self.console.print(visible(text), markup=False, highlight=False, soft_wrap=True)

    # Settings, and results of earlier calls.

    def check_settings(self) -> None:
        """Build the settings of every run now, so that a mistake in the last method is found before hours of training.

        Raises: InputError that names the setting.
        """
        for name, method in self.config.methods.items():
            *_, args = self._entry(f"methods.{name}", method, self.config.seeds[0], Path())
            self._planner(name)
            self._check_value_heads(name)
            self._check_reply_lengths(name, args)
            if method.evaluate and self.betas(name) and not self.config.data.get("validation"):
                raise InputError(f"data.validation: missing, expected held-out trajectories to choose β of {name} on")
        if self.config.partner is not None:
            self._entry("partner", self.config.partner, self.config.partner.seed, Path())
            DecodingConfig.from_dict(self.config.partner.decoding)
        if elsewhere := self.config.training_environment:
            if not any(_plays(method) for method in self.config.methods.values()):
                raise InputError(
                    f"training_environment: found {sorted(elsewhere)}, expected a method that learns by "
                    "playing, or no such setting"
                )
            if self.config.partner is None:  # with a partner, the environment cannot be built before it is trained
                make_environment(**self.config.environment | elsewhere)

    def _check_value_heads(self, name: str) -> None:
        """Check that every method from which `name` takes V or Q has value heads.

        A method has them if its algorithm trains some, or if it starts from a method that has them.

        Args:
          name: name of the method.
        Raises: InputError that names the setting.
        """
        method = self.config.methods[name]
        sources = {"value_model": method.value_model, "planner.scorer": method.scorer, "decoding.ask": method.asks}
        if method.run_of is None and ALGORITHMS[method.algorithm].value_model == "starts":
            del sources["value_model"]  # only the trunk is taken
        for key, source in sources.items():
            start = source
            while start is not None and not ALGORITHMS[self.config.methods[start].algorithm].trains_values:
                start = self.config.methods[start].start_from
            if source is not None and start is None:
                where = f"methods.{name}.{key}"
                raise InputError(
                    f"{where}: found {shown(source)}, which has no value heads, expected a method that has them"
                )

    def _check_reply_lengths(self, name: str, args: Any) -> None:
        """Check that the longest reply of a method, `max_new_tokens`, is not longer than its window, `max_length`.

        Both the play that the method learns from, if any, and the play that measures it are checked.

        Args:
          name: name of the method.
          args: the config of its algorithm.
        Raises: InputError that names the setting.
        """
        method, saved = self.config.methods[name], args.to_dict().get("decoding", {})
        measured, found = DecodingConfig.from_dict({**saved, **self._play(method)}), {}
        if _plays(method):
            learning = self._collect(method).decoding if _collects(method) else saved
            found[self._reply_length_key(name, learning=True)] = DecodingConfig.from_dict(learning)
        if method.evaluate:
            found[self._reply_length_key(name, learning=False)] = measured
        for key, decoding in found.items():
            if decoding.max_new_tokens > args.max_length:
                raise InputError(
                    f"{key}: found {decoding.max_new_tokens}, expected at most the max_length of {name}, "
                    f"{args.max_length}, which must hold the reply"
                )

    def _play(self, method: Any) -> dict[str, Any]:
        """Return the DecodingConfig fields for the play that measures a method, or for the partner's play.

        Args:
          method: a MethodConfig or the PartnerConfig.
        """
        return {**(self.config.evaluation.decoding if isinstance(method, MethodConfig) else {}), **method.decoding}

    def _reply_length_key(self, name: str, learning: bool) -> str:
        """Return the dotted name of the setting that decides max_new_tokens, for error messages.

        Args:
          name: name of the method.
          learning: True for the play that the method learns from, False for the play that measures it.
        """
        method, own = self.config.methods[name], f"methods.{name}."
        places = {f"{own}decoding": method.decoding}
        if learning and _collects(method):
            places = {f"{own}collect.decoding": method.collect.decoding} | places
        elif learning:
            where, args = (own, method.args) if "decoding" in method.args else ("", self.config.args)
            places = {f"{where}args.decoding": args.get("decoding") or {}} | places
        found = [place for place, decoding in places.items() if "max_new_tokens" in decoding]
        return f"{found[0] if found else 'evaluation.decoding'}.max_new_tokens"

    def open_results(self) -> None:
        """Start from the results.jsonl of an earlier call, if there is one, and write the first files of the folder.

        The rows of kind "run" in it are kept; all other rows are computed anew. Then results.jsonl, config.json and
        the folders episodes/, samples/ and runs/ are written.

        Raises: InputError if a row was made with other settings.
        """
        self._runs_in(self.folder / "report" / "results.jsonl")  # only checked: the new report overwrites this file
        kept = self._runs_in(self.folder / "results.jsonl")
        for name in ("episodes", "samples", "runs"):
            with writing(self.folder / name):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.rows = [*self._fixed_rows(), *kept]
        self._save()
        write_text(self.folder / "config.json", json.dumps(_plain(asdict(self.config)), indent=1) + "\n")

    def _runs_in(self, path: Path) -> list[Row]:
        """Return the rows of kind "run" in a results file; empty if there is no such file.

        Raises: InputError if one of these rows was made with other settings.
        """
        runs = [row for row in read_results(path) if row["kind"] == "run"] if path.exists() else []
        for row in runs:
            difference = say_differences(row["config"], _plain(self.identity(row["method"], row["decode"])))
            if difference:
                raise InputError(
                    f"{path}: {row['method']}: {difference}; choose another `output`, or remove "
                    "results.jsonl, report/ and runs/ there"
                )
        return runs

    def _save(self) -> None:
        """Write results.jsonl atomically: if the process is killed, the file has the old rows or all new ones."""
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows)
        write_text(self.folder / "results.jsonl", "".join(lines))

    def _fixed_rows(self) -> Iterator[Row]:
        config, scale = self.config, self.config.evaluation.score
        shown = {"baseline": config.baseline, "labels": config.evaluation.labels}
        yield {"kind": "comparison", **shown, "config": _plain(asdict(config))}
        if not holds_comparisons(config.data["train"]):  # a preference label is not a return
            yield self._behaviour()
        # A partner is trained only later, and no optimum is known for play against one.
        optimum = None if config.partner else _optimum(make_environment(**config.environment))
        if optimum is not None:
            normalised = scale and scale.normalise(optimum)
            yield {"kind": "optimum", "method": "optimum", "score": optimum, "normalised": normalised, "labels": {}}
        for name, columns in config.reference.items():
            known = {key: columns[key] for key in ("score", "normalised") if key in columns}
            labels = {key: value for key, value in columns.items() if key not in known}
            yield {"kind": "published", "method": name, **known, "labels": labels}

    def _behaviour(self) -> Row:
        """Return the row of the training data: their mean return, its interval over groups, and the label means."""
        scale = self.config.evaluation.score
        returns = [t.total_return for t in self.train_data]
        behaviour = mean_interval(returns, [t.group or i for i, t in enumerate(self.train_data)])
        cut = sum(not t.terminated for t in self.train_data) / len(self.train_data)
        # The return of a cut log is only partial, so the title shows how many are cut.
        title = f"behaviour ({cut:.0%} of the logs are cut)" if cut else "behaviour"
        labels = label_means(t.labels for t in self.train_data)
        return {
            "kind": "behaviour",
            "method": title,
            "score": behaviour.mean,
            "interval": behaviour.interval,
            "n": behaviour.n,
            "normalised": scale and scale.normalise(behaviour.mean),
            "labels": labels,
        }

    @cached_property
    def train_data(self) -> list[Trajectory]:
        return _logs(self.config.data["train"], self.config.data.get("reward"))

    @cached_property
    def validation_data(self) -> list[Trajectory]:
        path = self.config.data.get("validation")
        return _logs(path, self.config.data.get("reward")) if path else []

    @cached_property
    def _shared_identity(self) -> dict[str, Any]:
        evaluation = asdict(self.config.evaluation)
        for name in ("batch_size", "labels"):  # these change no number in a row
            del evaluation[name]
        return {
            "rows": SCHEME,
            "environment": self.config.environment,
            "data": {"train": data_hash(self.train_data), "validation": data_hash(self.validation_data)},
            "partner": self.config.partner and asdict(self.config.partner),
            "evaluation": evaluation,
        }

    def identity(self, name: str, decode: str) -> dict[str, Any]:
        """Return all settings and data hashes that determine the result rows of a method in one way of decoding.

        An existing row is kept only if its identity equals this one.

        Args:
          name: name of the method. If the config no longer lists it, only what all rows share is returned.
          decode: "sampled", "greedy" or "planned".
        """
        chain, planner = self._chain(name), self._planner(name) if decode == PLANNED else None
        if planner is not None:
            scorer = self._chain(self.config.methods[name].scorer) or planner.scorer
            return self._shared_identity | {"method": chain, "planner": asdict(planner) | {"scorer": scorer}}
        return self._shared_identity | ({"method": chain} if chain else {})

    def _planner(self, name: str) -> PlannerConfig | None:
        """Return a method's PlannerConfig, whose `scorer` still names a method (or "heads"); None without planner."""
        planner = self.config.methods[name].planner if name in self.config.methods else None
        return None if planner is None else build(PlannerConfig, planner, f"methods.{name}.planner")

    def _chain(self, name: str | None) -> list[dict[str, Any]]:
        """Return the settings that determine the runs of a method, as values that JSON can hold.

        Args:
          name: name of the method; None or an unknown name gives an empty list.
        Returns: the settings of the method, then those of the method that it starts from, and so on. The settings of
          each also hold, under `value_model`, `reward_model` and `asks`, the same list for its value model, for its
          reward model and for the method whose Q gives its requested return, if it has them.
        """
        if name not in self.config.methods:
            return []
        method = self.config.methods[name]
        merged = self._merged(method)
        args = {key: value for key, value in merged["args"].items() if key not in SPEED}
        link = {"algorithm": method.algorithm, **merged, "args": args, "decoding": dict(method.decoding)}
        if method.betas is not None:
            link["betas"] = list(method.betas)
        if method.collect is not None:
            link["collect"] = asdict(self._collect(method))
        if self.config.training_environment and _plays(method):
            link["training_environment"] = self.config.training_environment
        if method.value_model is not None:
            link["value_model"] = self._chain(method.value_model)
        if method.preference is not None or method.reward_model is not None:
            link |= {"preference": method.preference, "reward_model": self._chain(method.reward_model)}
        if method.asks is not None:
            link["asks"] = self._chain(method.asks)
        return [link, *self._chain(method.start_from)]

    # Training.

    def _merged(self, method: Any) -> dict[str, Any]:
        model = dict(self.config.model)
        if getattr(method, "start_from", None) is not None:
            model = {key: value for key, value in model.items() if key not in ELSEWHERE}
        args = self.config.args | dict(method.args)
        shared, own = (source.get("decoding") for source in (self.config.args, method.args))
        if isinstance(shared, Mapping) and isinstance(own, Mapping):
            args["decoding"] = {**shared, **own}
        decoding = args.get("decoding") or {}
        if load_algorithm(method.algorithm)[1].plays and isinstance(decoding, Mapping):
            same = self._same_reply_length(method, decoding)
            args |= {"decoding": same} if same else {}
        return {"model": model | dict(method.model), "args": args}

    def _same_reply_length(self, method: Any, decoding: Mapping[str, Any]) -> dict[str, Any]:
        """Return `decoding`, with max_new_tokens copied from the play that measures the method if it has none.

        Args:
          method: a MethodConfig or the PartnerConfig.
          decoding: DecodingConfig fields of the play that the method learns from.
        """
        measured = {key: value for key, value in self._play(method).items() if key == "max_new_tokens"}
        return {**measured, **decoding}

    def _collect(self, method: Any) -> CollectConfig:
        """Return `method.collect` with its max_new_tokens filled in by `_same_reply_length`."""
        return replace(method.collect, decoding=self._same_reply_length(method, method.collect.decoding))

    def _entry(
        self,
        where: str,
        method: Any,
        seed: int,
        folder: Path,
        start: Path | None = None,
        value_model: Path | None = None,
        reward_model: Path | None = None,
    ) -> tuple:
        """Build the first four arguments of `train` for a method or for the partner.

        Args:
          where: dotted name of its settings, for error messages: "methods.NAME" or "partner".
          method: its settings, a MethodConfig or the PartnerConfig.
          seed: training seed.
          folder: run directory to train in.
          start: run directory from which the weights are loaded, if the method has `start_from`.
          value_model: run directory that becomes `args.value_model`, if the method has `value_model`.
          reward_model: run directory that becomes `preference.reward`, if the method has `reward_model`.
        Returns: algorithm, ModelConfig, DataConfig, and the algorithm's config.
        Raises: InputError that names the setting.
        """
        merged = self._merged(method)
        for key in ("output_dir", "seed"):
            if key in merged["args"]:
                raise InputError(f"{where}.args.{key}: found a value, expected none: `seeds` and `output` set it")
        if getattr(method, "start_from", None) is not None:
            merged["model"]["path"] = str(start)
        model = build(ModelConfig, merged["model"], f"{where}.model")
        args = {**merged["args"], "output_dir": str(folder), "seed": seed}
        if getattr(method, "value_model", None) is not None:
            if ALGORITHMS[method.algorithm].value_model is None:
                raise InputError(
                    f"{where}.value_model: found {shown(method.value_model)}, expected none: "
                    f"{method.algorithm} takes no value model"
                )
            args["value_model"] = str(value_model)
        args = build(load_algorithm(method.algorithm)[0], args, f"{where}.args")
        preference = getattr(method, "preference", None)
        if getattr(method, "reward_model", None) is not None:
            preference = {**(preference or {}), "reward": str(reward_model)}
        return method.algorithm, model, DataConfig(**self.config.data, preference=preference), args

    def betas(self, name: str) -> tuple[float, ...]:
        """Return the candidates for β of a method; () if its algorithm trains no value heads."""
        method = self.config.methods[name]
        if not ALGORITHMS[method.algorithm].trains_values:
            return ()
        return self.config.evaluation.betas if method.betas is None else method.betas

    def trained(self, name: str, seed: int) -> Path:
        """Return the run directory of a method and seed, after training the run if it is not complete.

        The runs that it starts or learns from are completed before it.
        """
        if (name, seed) not in self.runs:
            method, folder = self.config.methods[name], self.folder / "runs" / f"{name}-{seed}"
            if method.run_of is not None:
                return self.trained(method.run_of, seed)
            others = [
                None if other is None else self.trained(other, seed)
                for other in (method.start_from, method.value_model, method.reward_model)
            ]
            self.runs[name, seed] = self._train(f"methods.{name}", method, seed, folder, *others)
        return self.runs[name, seed]

    def is_trained(self, name: str, seed: int) -> bool:
        """Train a method and, before it, the methods whose runs it needs; return True if all succeed.

        A failure is stored in `self.untrained`. A method that failed before is not tried again.
        """
        method, run = self.config.methods[name], (name, seed)
        before = (
            (method.start_from, method.value_model, method.reward_model) if method.run_of is None else (method.run_of,)
        )
        for other in filter(None, before):
            if run not in self.untrained and not self.is_trained(other, seed):
                self.untrained[run] = self._because_of(other, seed)
        if run not in self.untrained:
            with self._noting(self.untrained, name, seed, learning=True):
                self.trained(name, seed)
        return run not in self.untrained

    def _because_of(self, other: str, seed: int) -> _Failure:
        """Return the failure of a method that cannot go on because `other`, which it needs, failed or was skipped."""
        failure = self.untrained[other, seed]
        return replace(failure, cause=failure.cause or other)

    @contextmanager
    def _noting(self, failures: Failures, name: str, seed: int, learning: bool) -> Iterator[None]:
        """Context manager: catch an exception, print it at once and store it for `raise_failures`.

        Args:
          failures: receives the failure under (name, seed).
          name: name of the method that is trained or measured.
          seed: its training seed.
          learning: True while training, False while measuring.
        """
        try:
            yield
        except Exception as error:
            unusable = isinstance(error, InputError | OSError)  # the same two as on the command line
            line = " ".join((str(error) if unusable else "".join(traceback.format_exception_only(error))).split())
            # Errors from training and play name only the field; print its dotted name in the compare file.
            line = re.sub(r"(?<![\w.])max_new_tokens", self._reply_length_key(name, learning), line)
            failures[name, seed] = _Failure(line, unusable)
            if not unusable:
                self.say("".join(traceback.format_exception(error)).rstrip())
            self.say(f"{name}-{seed} failed: {line}")

    def raise_failures(self) -> None:
        """Raise one error that lists all failures; do nothing if there are none.

        Raises: InputError if bad input caused all of them, else Failed.
        """
        lacking: dict[str, list[str]] = defaultdict(list)
        for failures, skipped in ((self.untrained, "skipped"), (self.unmeasured, "rows skipped")):
            for (name, seed), failure in failures.items():
                title = f"failed: {failure.line}" if failure.cause is None else f"{skipped} because of {failure.cause}"
                lacking[title].append(f"{name}-{seed}")
        if not lacking:
            return
        failed = [failure for failures in (self.untrained, self.unmeasured) for failure in failures.values()]
        kind = InputError if all(failure.unusable for failure in failed) else Failed
        lines = "; ".join(f"{', '.join(runs)} {title}" for title, runs in lacking.items())
        raise kind(
            f"{lines}; `offline-lmrl compare {self.folder}` reports on the rest, and the same command "
            "tries the missing runs again"
        )

    def _train(self, where: str, method: Any, seed: int, folder: Path, *others: Path | None) -> Path:
        """Train a method or the partner and return its run directory; a complete run is not trained again.

        Args:
          where: dotted name of its settings, for error messages.
          method: its settings, a MethodConfig or the PartnerConfig.
          seed: training seed.
          folder: run directory to train in.
          others: run directories that it starts from, takes values from and takes rewards from, in this order (the
            last three arguments of `_entry`); None = no such run.
        """
        if not (folder / "complete.json").exists():
            self.say(f"training {folder.name}")
        entry = self._entry(where, method, seed, folder, *others)
        if not _plays(method):
            return train(*entry)
        environment = self.config.environment | self.config.training_environment
        if _collects(method):
            return train_in_rounds(*entry, environment, self._collect(method), self._partner())
        return train(*entry, environment=environment, players=self._partner())

    @contextmanager
    def _workers(self) -> Iterator[ProcessPoolExecutor]:
        """Context manager: a pool of `config.workers` processes, each with its share of the CPU cores.

        Small models use two cores better as two processes than as one process with two threads. If a worker fails or
        this process is stopped, all workers are terminated; those that train save a checkpoint first.

        Raises: InputError if a worker process was killed.
        """
        share = max(1, (os.cpu_count() or 1) // self.config.workers)
        with ProcessPoolExecutor(
            self.config.workers, get_context("spawn"), initializer=_begin_worker, initargs=(share,)
        ) as pool:
            try:
                yield pool
            except BaseException as error:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in active_children():
                    process.terminate()
                if isinstance(error, BrokenProcessPool):
                    raise InputError(
                        "workers: found a worker process that was killed, expected all to finish; the same "
                        "command continues the comparison"
                    ) from error
                raise

    def train_side_by_side(self) -> None:
        """Train all methods with each seed in a worker process per seed.

        The partner is trained first if a method learns by playing, because it plays against the partner; otherwise it
        is trained at the same time, in a worker process of its own.
        """
        waiting: list[int | None] = list(self.config.seeds)
        if self.config.partner is not None:
            if any(_plays(method) for method in self.config.methods.values()):
                self.train_partner()
            else:
                waiting.insert(0, None)
        with self._workers() as pool:
            for done in as_completed([pool.submit(_train_seed, self.config, seed) for seed in waiting]):
                self.untrained |= done.result()

    def train_partner(self) -> Path:
        partner = self.config.partner
        return self._train("partner", partner, partner.seed, self.folder / "runs" / f"partner-{partner.seed}")

    @cached_property
    def _partner_policy(self) -> LanguagePolicy:
        return LanguagePolicy.load(self.train_partner(), **self.config.partner.decoding)

    def _partner(self) -> dict[str, LanguagePolicy]:
        return {} if self.config.partner is None else {self.config.partner.argument: self._partner_policy}

    def scorer(self, name: str, seed: int) -> Path | None:
        """Return the run directory of the model whose value heads rate the candidate replies of a method's planner.

        Args:
          name: name of the method.
          seed: training seed of both runs.
        Returns: the directory; None if the method has no planner, or rates the replies by its own return heads.
        """
        other = self.config.methods[name].scorer
        return None if other is None else self.trained(other, seed)

    def planned(self, name: str, seed: int, policy: LanguagePolicy) -> Planner:
        """Wrap the policy in the planner of its method.

        Args:
          name: name of the method.
          seed: training seed of the run that rates the plans, if the planner uses one.
          policy: the method's trained policy.
        """
        planner, scorer = self._planner(name), self.scorer(name, seed)
        return (planner if scorer is None else replace(planner, scorer=str(scorer))).planner(policy)

    # Evaluation.

    def missing(self, name: str, seed: int) -> list[_Setting]:
        """Return the settings of a method and seed that have no row yet."""
        choices: list[str | None] = [None]
        if self.betas(name):
            choices = ["offline", "returns"] if self.config.evaluation.selection else ["offline"]
        done = {
            (row["decode"], row["beta_chosen"])
            for row in self.rows
            if row["kind"] == "run" and row["method"] == name and row["seed"] == seed
        }
        settings = [_Setting(decode, chosen) for decode in TEMPERATURES for chosen in choices]
        if self.config.methods[name].planner is not None:
            settings.append(_Setting(PLANNED, None))
        return [setting for setting in settings if (setting.decode, setting.chosen) not in done]

    def measure(self, name: str, seed: int, settings: Sequence[_Setting]) -> Iterator[Row]:
        """Measure the settings of a method in order and yield each row at once; stop at the first failure.

        Runs that are needed and not complete are trained first. If the method's own run, or the run whose Q gives its
        requested return, cannot be trained, nothing is yielded. If the run that rates its plans cannot be trained,
        only planned play is skipped.

        Args:
          name: name of the method.
          seed: its training seed.
          settings: the settings to measure.
        """
        method = self.config.methods[name]
        if not settings or not self.is_trained(name, seed) or self._lacks(name, seed, method.asks):
            return
        with self._noting(self.unmeasured, name, seed, learning=False):
            run = _MethodEvaluation(self, name, seed, self.trained(name, seed))
            for setting in settings:
                if setting.decode == PLANNED and self._lacks(name, seed, method.scorer):
                    continue
                row = run.row(setting)
                beta = "" if row["beta_chosen"] is None else f" at β {row['beta']:g} ({row['beta_chosen']})"
                score = Estimate.stored(row["score"], row["interval"], row["n"])
                self.say(f"{name} seed {seed} {row['decode']}{beta}: {score}")
                yield row

    def _lacks(self, name: str, seed: int, helper: str | None) -> bool:
        """True if a method cannot be measured because the run of `helper` is missing; the failure is then stored.

        Args:
          name: name of the method.
          seed: training seed of both runs.
          helper: name of the method that rates the plans or gives the requested return; None = none is needed.
        """
        if helper is None or self.is_trained(helper, seed):
            return False
        self.unmeasured[name, seed] = self._because_of(helper, seed)
        return True

    def measure_one_by_one(self) -> None:
        missing = {
            (name, seed): settings
            for seed in self.config.seeds
            for name in self.config.evaluated
            if (settings := self.missing(name, seed))
        }
        if missing and self.config.partner is not None:
            self.train_partner()  # first, because nothing can be measured without it
        for (name, seed), settings in missing.items():
            for row in self.measure(name, seed, settings):
                self.add(row)

    def add(self, row: Row) -> None:
        """Add a row to results.jsonl, with two fields that say how it was made.

        These are `config`, the settings and data hashes of `identity`, and `made`, the code, machine and command of
        `provenance`. The rows of the file are sorted by seed and method, not by time.

        Args:
          row: a row of kind "run", as `_MethodEvaluation.row` returns it.
        """
        self.rows.append({**row, "made": provenance(), "config": _plain(self.identity(row["method"], row["decode"]))})
        runs = ((seed, method) for seed in self.config.seeds for method in self.config.evaluated)
        order = {run: place for place, run in enumerate(runs)}
        # Fixed rows and runs of methods no longer listed come first (−1). The sort is stable: within a run the
        # settings keep their order.
        self.rows.sort(key=lambda row: order.get((row["seed"], row["method"]), -1) if row["kind"] == "run" else -1)
        self._save()

    def measure_side_by_side(self) -> None:
        """Measure each method and seed in a worker process.

        If this process is killed, only the measurements in progress are lost.
        """
        with self._workers() as pool:
            waiting = [
                pool.submit(_measure, self.config, self.untrained, method, seed, settings)
                for seed in self.config.seeds
                for method in self.config.evaluated
                if (settings := self.missing(method, seed))
            ]
            for done in as_completed(waiting):
                rows, untrained, unmeasured = done.result()
                self.untrained |= untrained
                self.unmeasured |= unmeasured
                for row in rows:
                    self.add(row)

    def play(self, policy: LanguagePolicy | Planner, title: str, selecting: bool = False) -> EvaluationResult:
        """Play the episodes on which every method is measured, with a progress bar.

        Args:
          policy: the player.
          title: label of the progress bar.
          selecting: True: play the episodes for choosing β (`evaluation.selection`) instead.
        """
        settings = self.config.evaluation
        environment, seeds = self.config.environment, settings.seeds
        if selecting:
            environment = environment | settings.selection.environment
            seeds = range(settings.selection.first_seed, settings.selection.first_seed + settings.selection.episodes)
        # Greedy play is a function of the episode seed: a second decoding seed would repeat it word for word.
        repeats = 1 if selecting or policy.decoding.temperature == 0 else settings.repeats
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        hidden = not self.console.is_terminal
        with Progress(*columns, console=self.console, transient=True, disable=hidden) as progress:
            task = progress.add_task(title, total=len(seeds) * repeats)
            return evaluate_policy(
                policy,
                make_environment(**environment, **self._partner()),
                seeds,
                repeats=repeats,
                cluster=settings.cluster,
                batch_size=settings.batch_size,
                progress=lambda done, total: progress.update(task, completed=done),
            )


class _MethodEvaluation:
    """One run of a method, loaded to be measured in several settings.

    The model is loaded once, the held-out logs are evaluated once, and play with the same decoding and β is not
    repeated.

    played: (decoding, β) -> the episodes played so far.
    asks: run directory whose Q gives the requested return; None = none.
    loaded: the policy, at β 0.

    Args:
      comparison: the comparison that the run belongs to.
      name: name of the method.
      seed: its training seed.
      folder: its run directory.
    """

    def __init__(self, comparison: _Comparison, name: str, seed: int, folder: Path):
        self.comparison, self.name, self.seed, self.folder = comparison, name, seed, folder
        self.played: dict[tuple[str, float], EvaluationResult] = {}
        method, settings = comparison.config.methods[name], comparison.config.evaluation
        self.asks = None if method.asks is None else comparison.trained(method.asks, seed)
        ask = {} if self.asks is None else {"ask": f"auto:{self.asks}"}
        self.loaded = LanguagePolicy.load(folder, **{**settings.decoding, **method.decoding, **ask, "beta": 0.0})

    def player(self, decode: str, beta: float) -> LanguagePolicy | Planner:
        if decode == PLANNED:  # proposals are sampled at β 0, which `loaded` has
            return self.comparison.planned(self.name, self.seed, self.loaded)
        return self.loaded.with_decoding(**TEMPERATURES[decode], beta=beta)

    @cached_property
    def logged(self) -> OfflineReport:
        """The evaluation on held-out logs, the same ones for every method: at most `evaluation.offline_rows`."""
        settings, logs = self.comparison.config.evaluation, self.comparison.validation_data
        logs = random.Random(0).sample(logs, min(settings.offline_rows, len(logs)))
        policy = self.player("sampled", 0.0)
        return evaluate_offline(policy, logs, betas=self.comparison.betas(self.name), kl_budget=settings.kl_budget)

    def by_returns(self, decode: str) -> tuple[list[dict[str, Any]], int]:
        """Play the episodes for choosing β at each candidate.

        Args:
          decode: "sampled" or "greedy".
        Returns: one mapping per candidate with `beta`, `score` (mean), `interval` and `kl` (as in `kl`); and the
          number of tokens generated in all of this play.
        """
        tried, tokens = [], 0
        for beta in self.comparison.betas(self.name):
            title = f"{self.name} seed {self.seed} {decode}: trying β {beta:g}"
            result = self.comparison.play(self.player(decode, beta), title, selecting=True)
            score, kl = result.score(), self.kl(decode, result)
            tried.append({"beta": beta, "score": score.mean, "interval": score.interval, "kl": kl})
            tokens += sum(row["tokens"] for row in result.episodes)
        return tried, tokens

    def kl(self, decode: str, result: EvaluationResult) -> float | None:
        """Return KL(sampling distribution ‖ policy) of sampled play in nats per episode (`EvaluationResult.kl`).

        It is None for greedy and planned play, because there the stored log-probabilities do not describe the
        distribution of the choice.
        """
        return result.kl() if decode == "sampled" and self.loaded.decoding.temperature > 0 else None

    def row(self, setting: _Setting) -> Row:
        """Play the reported episodes in one setting and write its files in episodes/ and samples/.

        Returns: the row for results.jsonl, without `config` and `made`, which `_Comparison.add` fills in.
        """
        config = self.comparison.config
        beta, tried, selection_tokens = 0.0, None, 0
        if setting.chosen == "offline":
            tried, beta = self.logged.by_beta, self.logged.beta
        elif setting.chosen == "returns":
            tried, selection_tokens = self.by_returns(setting.decode)
            beta = max(tried, key=lambda entry: (entry["score"], -entry["beta"]))["beta"]  # ties: the smaller β
        if (setting.decode, beta) not in self.played:
            title = f"{self.name} seed {self.seed} {setting.decode}"
            self.played[setting.decode, beta] = self.comparison.play(self.player(setting.decode, beta), title)
        result = self.played[setting.decode, beta]
        stem = f"{self.name}-{self.seed}-{setting.decode}" + (f"-beta{beta:g}" if setting.chosen else "")
        folder, scale, score = self.comparison.folder, config.evaluation.score, result.score()
        write_text(folder / "episodes" / f"{stem}.jsonl", "".join(json.dumps(row) + "\n" for row in result.episodes))
        write_text(folder / "samples" / f"{stem}.txt", transcripts(result, config.evaluation.seeds))
        method = config.methods[self.name]
        scorer = self.comparison.scorer(self.name, self.seed) if setting.decode == PLANNED else None
        return {
            "kind": "run",
            "method": self.name,
            "algorithm": method.algorithm,
            "seed": self.seed,
            "decode": setting.decode,
            "beta": beta,
            "beta_chosen": setting.chosen,
            "betas_tried": tried,
            "score": score.mean,
            "interval": score.interval,
            **result.summary(),
            "normalised": scale and scale.normalise(score.mean),
            "kl": self.kl(setting.decode, result),
            "calibration": self.logged.calibration if setting.chosen == "offline" else None,
            "regime": method.regime or load_algorithm(method.algorithm)[1].regime,
            "cost": {
                **training_cost(self.folder, scorer, self.asks),
                "generated_tokens": sum(row["labels"].get("planned_tokens", row["tokens"]) for row in result.episodes),
                "selection_tokens": selection_tokens,
                "evaluation_seconds": result.seconds,
            },
            **divergence(self.folder),
            "run": str(self.folder),
            "episodes": f"episodes/{stem}.jsonl",
            "cells": result.cells(),
            "scores": result.scores(),
            "curve": learning_curve(self.folder) if setting.decode == "sampled" else [],
            # The first seed is enough to show how a method replies; the files in samples/ hold all seeds.
            "samples": dialogues(result, config.evaluation.seeds) if self.seed == config.seeds[0] else [],
        }


def _logs(source: str, reward: str | None) -> list[Trajectory]:
    """Read logged trajectories, or read comparisons and make a trajectory of each option.

    The trajectory of an option has the default reward of `to_trajectories`, whatever reward a method learns from.

    Args:
      source: file or folder of trajectories or comparisons.
      reward: column that holds the score of a trajectory's row; None = the default column.
    """
    if holds_comparisons(source):
        return to_trajectories(read_comparisons(source))
    return read_trajectories(source, reward=reward)


def _collects(method: Any) -> bool:
    return getattr(method, "collect", None) is not None


def _plays(method: Any) -> bool:
    """True if a method (or the partner) learns from its own play in the environment."""
    return _collects(method) or load_algorithm(method.algorithm)[1].plays


def divergence(run: Path) -> dict[str, float]:
    """Return how far a PPO run moved from its start policy; empty for a run of another algorithm.

    Returns: `training_kl`, KL(policy ‖ start policy) in nats per episode, over the episodes of the last iteration; and
      `ratio_max`, the largest ratio of the new to the old probability of a token in any update.
    """
    rows = [row for row in read_metrics(run) if "ratio_max" in row]
    return {"training_kl": rows[-1]["kl"], "ratio_max": max(row["ratio_max"] for row in rows)} if rows else {}


def training_cost(run: Path, *helpers: Path | None) -> dict[str, float]:
    """Return the cost of training a run.

    Args:
      run: the run directory.
      helpers: directories of the runs that rate its plans or give its requested return; None is skipped.
    Returns: `training_tokens`, the tokens that training read, each counted as often as it was read, including the runs
      that this one starts or learns from, and the helpers; `training_seconds`, the wall time of its last training
      process; and, if it played to learn, `environment_steps` (agent turns), `reward_queries` (scored replies) and
      `played_tokens` (sampled tokens).
    """
    report = read_report(run)
    seconds = [row["train_runtime"] for row in read_metrics(run) if "train_runtime" in row]
    played = {name: report[name] for name in ("environment_steps", "reward_queries") if name in report}
    if "generated_tokens" in report:
        played["played_tokens"] = report["generated_tokens"]
    tokens = sum(runs_before(str(run), *(helper and str(helper) for helper in helpers)).values())
    return {"training_tokens": tokens, "training_seconds": seconds[-1] if seconds else 0.0, **played}


def learning_curve(run: Path) -> list[Row]:
    """Return the metrics of each training iteration of a run that played to learn; empty for other runs.

    Of a long run, only every k-th iteration is returned, at most CURVE_POINTS of them.

    Returns: one mapping per iteration: `environment_steps` and `reward_queries` so far; `score`, the mean over the
      iteration's episodes; and `kl`, their KL(policy ‖ start policy) in nats per episode.
    """
    rows = [{name: row[name] for name in CURVE} for row in read_metrics(run) if "environment_steps" in row]
    # k = ⌈len / CURVE_POINTS⌉, or 1 if there are no rows
    return rows[:: -(-len(rows) // CURVE_POINTS) or 1]


def _fixed_episodes(result: EvaluationResult, seeds: Sequence[int]) -> Iterator[tuple[Row, Trajectory]]:
    """Yield ten episodes of a result, each as (its mapping in `EvaluationResult.episodes`, its trajectory).

    They are drawn from the episode seeds only, so they are the same for every method. With fewer than ten seeds, there
    is one episode per seed.

    Args:
      result: the episodes of one setting.
      seeds: all episode seeds.
    """
    chosen = set(random.Random(0).sample(list(seeds), min(SAMPLES, len(seeds))))
    for row, trajectory in zip(result.episodes, result.trajectories, strict=True):
        if row["seed"] in chosen and row["repeat"] == 0:
            yield row, trajectory


def transcripts(result: EvaluationResult, seeds: Sequence[int]) -> str:
    """Return ten episodes of a result, those of `_fixed_episodes`, as text.

    Args:
      result: the episodes of one setting.
      seeds: all episode seeds.
    """
    blocks = []
    for row, trajectory in _fixed_episodes(result, seeds):
        head = f"episode {row['seed']}, score {row['score']:g}, {json.dumps(row['labels'], ensure_ascii=False)}"
        turns = [f"{turn.role}: {turn.content}" for turn in trajectory.turns]
        blocks.append("\n".join([head, *turns, ""]))
    return visible("\n".join(blocks))


def dialogues(result: EvaluationResult, seeds: Sequence[int]) -> list[Row]:
    """Return ten episodes of a result, those of `_fixed_episodes`, in the form that is stored in results.jsonl.

    Args:
      result: the episodes of one setting.
      seeds: all episode seeds.
    Returns: one mapping per episode: `seed`, `score` and `turns`, a list of (role, text).
    """
    return [
        {"seed": row["seed"], "score": row["score"], "turns": [(turn.role, turn.content) for turn in trajectory.turns]}
        for row, trajectory in _fixed_episodes(result, seeds)
    ]


def _optimum(environment: Any) -> float | None:
    """Return the best possible mean score; None if the environment has no method `optimum`.

    Args:
      environment: an environment, or a function that makes one.
    """
    environment = environment() if callable(environment) else environment
    return environment.optimum() if hasattr(environment, "optimum") else None


def _plain(value: Any) -> Any:
    """Return a value as JSON would give it back: with lists for tuples and texts for keys."""
    return json.loads(json.dumps(value))
