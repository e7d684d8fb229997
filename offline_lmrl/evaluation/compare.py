"""Train and evaluate several methods over seeds: one results file, one table, resumable at every row.

Every method plays the same episodes, sampled and greedy, and planned where it has a `planner`. Value-guided methods
are measured at two values of β: the one that logs alone suggest (a KL budget) and the one that play on other episodes
prefers; never at one chosen on the reported episodes. What is already in results.jsonl is not measured again.
"""

import json
import math
import os
import random
import re
import signal
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from offline_lmrl.algorithms import load_algorithm
from offline_lmrl.algorithms.run import SPEED, DataConfig, ModelConfig, read_report, runs_before, train
from offline_lmrl.data.errors import Failed, InputError, Stopped, shown
from offline_lmrl.data.files import locked, say_differences, writing
from offline_lmrl.data.io import (
    fingerprint,
    holds_comparisons,
    is_prepared,
    read_comparisons,
    read_trajectories,
    write_text,
)
from offline_lmrl.data.parallel import end_with_parent
from offline_lmrl.data.preferences import to_trajectories
from offline_lmrl.data.terminal import visible
from offline_lmrl.data.trajectory import Trajectory
from offline_lmrl.decoding.planner import Planner, PlannerConfig
from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.decoding.sampler import SamplingConfig
from offline_lmrl.environments import make_environment
from offline_lmrl.evaluation.config import ELSEWHERE, CollectConfig, CompareConfig, MethodConfig, build
from offline_lmrl.evaluation.metrics import Estimate, label_means, mean_interval
from offline_lmrl.evaluation.offline import OfflineReport, evaluate_offline
from offline_lmrl.evaluation.page import write_report
from offline_lmrl.evaluation.play import EvaluationResult, evaluate_policy
from offline_lmrl.evaluation.provenance import provenance
from offline_lmrl.evaluation.report import read_results, table
from offline_lmrl.evaluation.rounds import train_in_rounds
from offline_lmrl.training_checkpoint import read_metrics

SAMPLES = 10
SCHEME = 2  # of what a row means beside its settings: rises where the same settings come to train or play otherwise
CURVE = ("environment_steps", "reward_queries", "score", "kl")  # kept of the metrics of a run that played
CURVE_POINTS = 50
TEMPERATURES = {"sampled": {}, "greedy": {"temperature": 0.0}}
PLANNED = "planned"

Row = dict[str, Any]


def run_compare(
    config: CompareConfig,
    *,
    prepare: Callable[[Mapping[str, Any]], object] | None = None,
    console: Console | None = None,
) -> Path:
    """Runs what is missing of a comparison and prints its table.

    Args:
      prepare: called with `config.prepare` where the data are missing or not finished, to make them.
      console: where progress goes; stderr by default. The table goes to stdout.
    Returns: the page in report/ (page.py says what else lies there), in `config.output`, which then also holds
      results.jsonl (report.py says what its rows are), table.md, config.json, episodes/ (a row per episode), samples/
      (ten dialogues per setting, the same episodes for all) and runs/.
    Raises: InputError where the settings are wrong, the folder holds results of other settings, or another process is
      at work there. Where a method fails the others are trained, measured and reported first: then InputError if all
      that failed found something it cannot use, else Failed.
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
            raise Stopped(f"{config.output}: stopped; the same command goes on with what is missing", number) from stop


def _compare(comparison: "_Comparison") -> Path:
    config = comparison.config
    comparison.open_results()
    if config.workers > 1:
        comparison.train_side_by_side()
        comparison.measure_side_by_side()
    else:
        comparison.measure_one_by_one()
    drawn = table(comparison.rows)
    write_text(comparison.folder / "table.md", visible(drawn) + "\n")
    Console().print(visible(drawn), markup=False, highlight=False, soft_wrap=True)
    page = write_report(comparison.folder) / "report.html"
    comparison.raise_failures()
    return page


def _begin_worker(threads: int) -> None:
    end_with_parent()
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class _Failure:
    """Why a method has no run, or not all rows, of a seed.

    line: what was found. unusable: True if that is an input or a setting, False if the program failed. cause: the
    method that failed, for one that was skipped because it needs that one's run; else None.
    """

    line: str
    unusable: bool
    cause: str | None = None


Failures = dict[tuple[str, int], _Failure]  # by method and seed


def _train_seed(config: CompareConfig, seed: int | None) -> Failures:
    """In a process of its own: what the comparison needs of one seed; None is the partner."""
    comparison = _Comparison(config, _quiet())
    try:
        if seed is None:
            comparison.train_partner()
        else:
            for name in config.trained:
                comparison.is_trained(name, seed)
    except Stopped as stop:
        comparison.say(stop.line)  # the parent hears of one process at most
        raise Stopped("", stop.number) from stop
    return comparison.untrained


@dataclass(frozen=True)
class _Setting:
    """One way of decoding. chosen: None, "offline" or "returns": what chose β."""

    decode: str
    chosen: str | None


def _measure(
    config: CompareConfig, untrained: Failures, name: str, seed: int, settings: Sequence[_Setting]
) -> tuple[list[Row], Failures, Failures]:
    """In a process of its own: the rows of a method and seed, and why there are no more: the runs that are not there,
    and what failed in play.

    untrained: the runs that are not there before.
    """
    comparison = _Comparison(config, _quiet())
    comparison.untrained = untrained
    rows = list(comparison.measure(name, seed, settings))
    return rows, comparison.untrained, comparison.unmeasured


def _quiet() -> Console:
    """For processes side by side: lines, but no bars, which would overwrite one another."""
    return Console(stderr=True, force_terminal=False)


class _Comparison:
    """The state of one `run_compare` call."""

    def __init__(self, config: CompareConfig, console: Console):
        self.config, self.console = config, console
        self.folder = Path(config.output)
        self.rows: list[Row] = []
        self.runs: dict[tuple[str, int], Path] = {}
        self.untrained: Failures = {}
        self.unmeasured: Failures = {}

    def say(self, text: str) -> None:
        self.console.print(visible(text), markup=False, highlight=False, soft_wrap=True)

    # Settings and results that exist.

    def check_settings(self) -> None:
        """Builds what every run will be given, so that a slip in the last method does not surface after hours."""
        for name, method in self.config.methods.items():
            *_, args = self._entry(f"methods.{name}", method, self.config.seeds[0], Path())
            self._planner(name)
            self._check_judges(name)
            self._check_reply_lengths(name, args)
            if method.evaluate and self.betas(name) and not self.config.data.get("validation"):
                raise InputError(f"data.validation: missing, expected held-out trajectories to choose β of {name} on")
        if self.config.partner is not None:
            self._entry("partner", self.config.partner, self.config.partner.seed, Path())
            SamplingConfig.from_dict(self.config.partner.sampling)
        if elsewhere := self.config.training_environment:
            if not any(_plays(method) for method in self.config.methods.values()):
                raise InputError(
                    f"training_environment: found {sorted(elsewhere)}, expected a method that learns by "
                    "playing, or none"
                )
            if self.config.partner is None:  # who is trained later
                make_environment(**self.config.environment | elsewhere)

    def _check_judges(self, name: str) -> None:
        """What a method takes V or Q from has them: it trains them, or starts from what does."""
        method = self.config.methods[name]
        judges = {"critic": method.critic, "planner.scorer": method.scorer, "sampling.ask": method.asks}
        for key, judge in judges.items():
            start = judge
            while start is not None and "value_heads" not in _fields(self.config.methods[start].algorithm):
                start = self.config.methods[start].start_from
            if judge is not None and start is None:
                where = f"methods.{name}.{key}"
                raise InputError(
                    f"{where}: found {shown(judge)}, without value heads, expected a method that has them"
                )

    def _check_reply_lengths(self, name: str, args: Any) -> None:
        """The window of a method holds its longest reply, in the play that it learns from and is measured by."""
        method, saved = self.config.methods[name], getattr(args, "sampling", {})
        measured, forms = SamplingConfig.from_dict({**saved, **self._play(method)}), {}
        if _plays(method):
            learning = self._collect(method).sampling if _collects(method) else saved
            forms[self._reply_length_key(name, learning=True)] = SamplingConfig.from_dict(learning)
        if method.evaluate:
            forms[self._reply_length_key(name, learning=False)] = measured
        for key, form in forms.items():
            if form.max_new_tokens > args.max_length:
                raise InputError(
                    f"{key}: found {form.max_new_tokens}, expected at most the max_length of {name}, "
                    f"{args.max_length}, which has to hold the reply"
                )

    def _play(self, method: Any) -> dict[str, Any]:
        """SamplingConfig fields with which a method (or the partner) is measured."""
        return {**(self.config.evaluation.sampling if isinstance(method, MethodConfig) else {}), **method.sampling}

    def _reply_length_key(self, name: str, learning: bool) -> str:
        """The setting that decides max_new_tokens in the play that a method learns from, or is measured by."""
        method, own = self.config.methods[name], f"methods.{name}."
        places = {f"{own}sampling": method.sampling}
        if learning and _collects(method):
            places = {f"{own}collect.sampling": method.collect.sampling} | places
        elif learning:
            where, args = (own, method.args) if "sampling" in method.args else ("", self.config.args)
            places = {f"{where}args.sampling": args.get("sampling") or {}} | places
        found = [place for place, sampling in places.items() if "max_new_tokens" in sampling]
        return f"{found[0] if found else 'evaluation.sampling'}.max_new_tokens"

    def open_results(self) -> None:
        """Reads results.jsonl where there is one, and writes its rows that are not measured anew."""
        self._runs_in(self.folder / "report" / "results.jsonl")  # which the new report would replace
        kept = self._runs_in(self.folder / "results.jsonl")
        for name in ("episodes", "samples", "runs"):
            with writing(self.folder / name):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.rows = [*self._fixed_rows(), *kept]
        self._save()
        write_text(self.folder / "config.json", json.dumps(_plain(asdict(self.config)), indent=1) + "\n")

    def _runs_in(self, path: Path) -> list[Row]:
        """The runs of a results file, none where there is no such file; all of them of these settings."""
        runs = [row for row in read_results(path) if row["kind"] == "run"] if path.exists() else []
        for row in runs:
            difference = say_differences(row["config"], _plain(self.identity(row["method"], row["decode"])))
            if difference:
                raise InputError(
                    f"{path}: {row['method']}: {difference}; take another `output`, or remove "
                    "results.jsonl, report/ and runs/ there"
                )
        return runs

    def _save(self) -> None:
        """The whole file, renamed into place: a kill leaves the rows of before or after, never half a row."""
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows)
        write_text(self.folder / "results.jsonl", "".join(lines))

    def _fixed_rows(self) -> Iterator[Row]:
        config, scale = self.config, self.config.evaluation.score
        shown = {"baseline": config.baseline, "labels": config.evaluation.labels}
        yield {"kind": "comparison", **shown, "config": _plain(asdict(config))}
        if not holds_comparisons(config.data["train"]):  # what people prefer is no return
            yield self._behaviour()
        # A partner is trained later; play against one has no known optimum.
        optimum = None if config.partner else _optimum(make_environment(**config.environment))
        if optimum is not None:
            normalised = scale and scale.normalise(optimum)
            yield {"kind": "optimum", "method": "optimum", "score": optimum, "normalised": normalised, "labels": {}}
        for name, columns in config.reference.items():
            known = {key: columns[key] for key in ("score", "normalised") if key in columns}
            labels = {key: value for key, value in columns.items() if key not in known}
            yield {"kind": "published", "method": name, **known, "labels": labels}

    def _behaviour(self) -> Row:
        """What the logs earned."""
        scale = self.config.evaluation.score
        returns = [t.total_return for t in self.train_data]
        behaviour = mean_interval(returns, [t.group or i for i, t in enumerate(self.train_data)])
        cut = sum(not t.terminated for t in self.train_data) / len(self.train_data)
        title = f"behaviour ({cut:.0%} of the logs are cut)" if cut else "behaviour"  # then their returns are partial
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
        for name in ("batch_size", "labels"):  # they change no number
            del evaluation[name]
        return {
            "rows": SCHEME,
            "environment": self.config.environment,
            "data": {"train": fingerprint(self.train_data), "validation": fingerprint(self.validation_data)},
            "partner": self.config.partner and asdict(self.config.partner),
            "evaluation": evaluation,
        }

    def identity(self, name: str, decode: str) -> dict[str, Any]:
        """Everything that decides a row of this method; of a method that is no longer listed, what all rows share."""
        chain, planner = self._chain(name), self._planner(name) if decode == PLANNED else None
        if planner is not None:
            scorer = self._chain(self.config.methods[name].scorer) or planner.scorer
            return self._shared_identity | {"method": chain, "planner": asdict(planner) | {"scorer": scorer}}
        return self._shared_identity | ({"method": chain} if chain else {})

    def _planner(self, name: str) -> PlannerConfig | None:
        """How a method plans, its scorer by name; None where it does not."""
        planner = self.config.methods[name].planner if name in self.config.methods else None
        return None if planner is None else build(PlannerConfig, planner, f"methods.{name}.planner.")

    def _chain(self, name: str | None) -> list[dict[str, Any]]:
        """The settings of a method and of those it starts from, each with the chain of its critic."""
        if name not in self.config.methods:
            return []
        method = self.config.methods[name]
        merged = self._merged(method)
        args = {key: value for key, value in merged["args"].items() if key not in SPEED}
        link = {"algorithm": method.algorithm, **merged, "args": args, "sampling": dict(method.sampling)}
        if method.betas is not None:
            link["betas"] = list(method.betas)
        if method.collect is not None:
            link["collect"] = asdict(self._collect(method))
        if self.config.training_environment and _plays(method):
            link["training_environment"] = self.config.training_environment
        if method.critic is not None:
            link["critic"] = self._chain(method.critic)
        if method.preference is not None or method.judge is not None:
            link |= {"preference": method.preference, "judge": self._chain(method.judge)}
        if method.asks is not None:
            link["asks"] = self._chain(method.asks)
        return [link, *self._chain(method.start_from)]

    # Training.

    def _merged(self, method: Any) -> dict[str, Any]:
        model = dict(self.config.model)
        if getattr(method, "start_from", None) is not None:
            model = {key: value for key, value in model.items() if key not in ELSEWHERE}
        args = self.config.args | dict(method.args)
        sampling = args.get("sampling") or {}
        if load_algorithm(method.algorithm)[1].plays and isinstance(sampling, Mapping):
            same = self._same_reply_length(method, sampling)
            args |= {"sampling": same} if same else {}
        return {"model": model | dict(method.model), "args": args}

    def _same_reply_length(self, method: Any, sampling: Mapping[str, Any]) -> dict[str, Any]:
        """SamplingConfig fields for the play that a method learns from: max_new_tokens as in the play that it is
        measured by, where nothing else is said."""
        measured = {key: value for key, value in self._play(method).items() if key == "max_new_tokens"}
        return {**measured, **sampling}

    def _collect(self, method: Any) -> CollectConfig:
        """How a method that learns in rounds plays in them."""
        return replace(method.collect, sampling=self._same_reply_length(method, method.collect.sampling))

    def _entry(
        self,
        where: str,
        method: Any,
        seed: int,
        folder: Path,
        start: Path | None = None,
        critic: Path | None = None,
        judge: Path | None = None,
    ) -> tuple:
        """What `train` takes for a method (or the partner)."""
        merged = self._merged(method)
        for key in ("output_dir", "seed"):
            if key in merged["args"]:
                raise InputError(f"{where}.args.{key}: found a value, expected none: `seeds` and `output` decide it")
        if getattr(method, "start_from", None) is not None:
            merged["model"]["path"] = str(start)
        model = build(ModelConfig, merged["model"], f"{where}.model.")
        args = {**merged["args"], "output_dir": str(folder), "seed": seed}
        if getattr(method, "critic", None) is not None:
            if "critic" not in _fields(method.algorithm):
                raise InputError(
                    f"{where}.critic: found {shown(method.critic)}, but {method.algorithm} takes no critic"
                )
            args["critic"] = str(critic)
        args = build(load_algorithm(method.algorithm)[0], args, f"{where}.args.")
        preference = getattr(method, "preference", None)
        if getattr(method, "judge", None) is not None:
            preference = {**(preference or {}), "reward": str(judge)}
        return method.algorithm, model, DataConfig(**self.config.data, preference=preference), args

    def betas(self, name: str) -> tuple[float, ...]:
        """The values of β that a method is tried with; none where its training makes no value heads."""
        method = self.config.methods[name]
        if "value_heads" not in _fields(method.algorithm):
            return ()
        return self.config.evaluation.betas if method.betas is None else method.betas

    def trained(self, name: str, seed: int) -> Path:
        """The run of a method and seed, trained now or earlier, after the runs it starts from and learns from."""
        if (name, seed) not in self.runs:
            method, folder = self.config.methods[name], self.folder / "runs" / f"{name}-{seed}"
            if method.run_of is not None:
                return self.trained(method.run_of, seed)
            others = [
                None if other is None else self.trained(other, seed)
                for other in (method.start_from, method.critic, method.judge)
            ]
            self.runs[name, seed] = self._train(f"methods.{name}", method, seed, folder, *others)
        return self.runs[name, seed]

    def is_trained(self, name: str, seed: int) -> bool:
        """Train a method after those it needs; return False if one of them fails now or failed before, which is
        noted."""
        method, run = self.config.methods[name], (name, seed)
        before = (method.start_from, method.critic, method.judge) if method.run_of is None else (method.run_of,)
        for other in filter(None, before):
            if run not in self.untrained and not self.is_trained(other, seed):
                self.untrained[run] = self._because_of(other, seed)
        if run not in self.untrained:
            with self._noting(self.untrained, name, seed, learning=True):
                self.trained(name, seed)
        return run not in self.untrained

    def _because_of(self, other: str, seed: int) -> _Failure:
        """The failure of what needs a method that failed, or that was skipped because of another."""
        failure = self.untrained[other, seed]
        return replace(failure, cause=failure.cause or other)

    @contextmanager
    def _noting(self, failures: Failures, name: str, seed: int, learning: bool) -> Iterator[None]:
        """Go on after whatever fails inside, and say at once what it was; `raise_failures` says it again."""
        try:
            yield
        except Exception as error:
            unusable = isinstance(error, InputError | OSError)  # as on the command line
            line = " ".join((str(error) if unusable else "".join(traceback.format_exception_only(error))).split())
            line = re.sub(r"(?<![\w.])max_new_tokens", self._reply_length_key(name, learning), line)
            failures[name, seed] = _Failure(line, unusable)
            if not unusable:
                self.say("".join(traceback.format_exception(error)).rstrip())
            self.say(f"{name}-{seed} failed: {line}")

    def raise_failures(self) -> None:
        """Raises: InputError or Failed, in one line, where a method failed."""
        said: dict[str, list[str]] = defaultdict(list)
        for failures, skipped in ((self.untrained, "skipped"), (self.unmeasured, "rows skipped")):
            for (name, seed), failure in failures.items():
                title = f"failed: {failure.line}" if failure.cause is None else f"{skipped} because of {failure.cause}"
                said[title].append(f"{name}-{seed}")
        if not said:
            return
        failed = [failure for failures in (self.untrained, self.unmeasured) for failure in failures.values()]
        kind = InputError if all(failure.unusable for failure in failed) else Failed
        lines = "; ".join(f"{', '.join(runs)} {title}" for title, runs in said.items())
        raise kind(
            f"{lines}; `offline-lmrl compare {self.folder}` draws the rest, and the same command tries again "
            "what is missing"
        )

    def _train(self, where: str, method: Any, seed: int, folder: Path, *others: Path | None) -> Path:
        """others: the runs it starts from and learns from."""
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
        """`workers` processes, each with its share of the cores: small models use two cores better as two processes
        than as one with two threads. Where one fails, or this process is stopped, all stop behind a checkpoint."""
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
                        "workers: found a process that was killed, expected all of them to come to their "
                        "end; the same command goes on"
                    ) from error
                raise

    def train_side_by_side(self) -> None:
        """Trains every seed in a process of its own, and the partner before those that play against it."""
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
        return LanguagePolicy.load(self.train_partner(), **self.config.partner.sampling)

    def _partner(self) -> dict[str, LanguagePolicy]:
        return {} if self.config.partner is None else {self.config.partner.argument: self._partner_policy}

    def scorer(self, name: str, seed: int) -> Path | None:
        """The run that rates a method's plans, if one does."""
        other = self.config.methods[name].scorer
        return None if other is None else self.trained(other, seed)

    def planned(self, name: str, seed: int, policy: LanguagePolicy) -> Planner:
        """The policy of a method and seed behind the method's planning."""
        planner, scorer = self._planner(name), self.scorer(name, seed)
        return (planner if scorer is None else replace(planner, scorer=str(scorer))).planner(policy)

    # Evaluation.

    def missing(self, name: str, seed: int) -> list[_Setting]:
        """The settings of a method and seed that have no row."""
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
        """A row per setting, as soon as it is measured, up to where one fails; none where a run is not there."""
        method = self.config.methods[name]
        if not settings or not self.is_trained(name, seed) or self._lacks(name, seed, method.asks):
            return
        with self._noting(self.unmeasured, name, seed, learning=False):
            run = _Run(self, name, seed, self.trained(name, seed))
            for setting in settings:
                if setting.decode == PLANNED and self._lacks(name, seed, method.scorer):
                    continue
                row = run.row(setting)
                beta = "" if row["beta_chosen"] is None else f" at β {row['beta']:g} ({row['beta_chosen']})"
                low, high = row["interval"] or (-math.inf, math.inf)
                self.say(f"{name} seed {seed} {row['decode']}{beta}: {Estimate(row['score'], low, high, row['n'])}")
                yield row

    def _lacks(self, name: str, seed: int, judge: str | None) -> bool:
        """True if the run that rates a method's plans, or says what it is asked for, is not there; which is noted."""
        if judge is None or self.is_trained(judge, seed):
            return False
        self.unmeasured[name, seed] = self._because_of(judge, seed)
        return True

    def measure_one_by_one(self) -> None:
        missing = {
            (name, seed): settings
            for seed in self.config.seeds
            for name in self.config.evaluated
            if (settings := self.missing(name, seed))
        }
        if missing and self.config.partner is not None:
            self.train_partner()  # without whom nothing can be measured
        for (name, seed), settings in missing.items():
            for row in self.measure(name, seed, settings):
                self.add(row)

    def add(self, row: Row) -> None:
        """Keeps a row, with what decided it, in the order of seeds and methods, whichever was measured first."""
        self.rows.append({**row, "made": provenance(), "config": _plain(self.identity(row["method"], row["decode"]))})
        runs = ((seed, method) for seed in self.config.seeds for method in self.config.evaluated)
        order = {run: place for place, run in enumerate(runs)}
        # Rows of no listed run come first; the sort leaves them, and the settings of each run, in their order.
        self.rows.sort(key=lambda row: order.get((row["seed"], row["method"]), -1) if row["kind"] == "run" else -1)
        self._save()

    def measure_side_by_side(self) -> None:
        """Measures methods and seeds in processes of their own; a kill loses what these are at."""
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
        """The reported episodes, or those on which settings are chosen."""
        settings = self.config.evaluation
        environment, seeds = self.config.environment, settings.seeds
        if selecting:
            environment = environment | settings.selection.environment
            seeds = range(settings.selection.first_seed, settings.selection.first_seed + settings.selection.episodes)
        # Greedy play is a function of the episode seed: a second decoding seed would repeat it word for word.
        repeats = 1 if selecting or policy.sampling.temperature == 0 else settings.repeats
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


class _Run:
    """A trained method and seed, measured setting by setting; what settings share is computed once."""

    def __init__(self, comparison: _Comparison, name: str, seed: int, folder: Path):
        self.comparison, self.name, self.seed, self.folder = comparison, name, seed, folder
        self.played: dict[tuple[str, float], EvaluationResult] = {}
        method, settings = comparison.config.methods[name], comparison.config.evaluation
        self.asks = None if method.asks is None else comparison.trained(method.asks, seed)
        ask = {} if self.asks is None else {"ask": f"auto:{self.asks}"}
        self.loaded = LanguagePolicy.load(folder, **{**settings.sampling, **method.sampling, **ask, "beta": 0.0})

    def player(self, decode: str, beta: float) -> LanguagePolicy | Planner:
        if decode == PLANNED:
            return self.comparison.planned(self.name, self.seed, self.loaded)
        return self.loaded.with_sampling(**TEMPERATURES[decode], beta=beta)

    @cached_property
    def logged(self) -> OfflineReport:
        """What a fixed sample of the held-out logs says of every β, and of Q."""
        settings, logs = self.comparison.config.evaluation, self.comparison.validation_data
        logs = random.Random(0).sample(logs, min(settings.offline_rows, len(logs)))
        policy = self.player("sampled", 0.0)
        return evaluate_offline(policy, logs, betas=self.comparison.betas(self.name), kl_budget=settings.kl_budget)

    def by_returns(self, decode: str) -> tuple[list[dict[str, Any]], int]:
        """Score and KL of each β on the selection episodes, and the tokens generated for that."""
        tried, tokens = [], 0
        for beta in self.comparison.betas(self.name):
            title = f"{self.name} seed {self.seed} {decode}: trying β {beta:g}"
            result = self.comparison.play(self.player(decode, beta), title, selecting=True)
            score, kl = result.score(), self.kl(decode, result)
            tried.append({"beta": beta, "score": score.mean, "interval": score.interval, "kl": kl})
            tokens += sum(row["tokens"] for row in result.episodes)
        return tried, tokens

    def kl(self, decode: str, result: EvaluationResult) -> float | None:
        """KL of sampled play; other play does not draw from the distribution it notes."""
        return result.kl() if decode == "sampled" and self.loaded.sampling.temperature > 0 else None

    def row(self, setting: _Setting) -> Row:
        """Plays one setting, writes its episodes and samples, and returns its row of results.jsonl, less `config`."""
        config = self.comparison.config
        beta, tried, selection_tokens = 0.0, None, 0
        if setting.chosen == "offline":
            tried, beta = self.logged.by_beta, self.logged.beta
        elif setting.chosen == "returns":
            tried, selection_tokens = self.by_returns(setting.decode)
            beta = max(tried, key=lambda entry: (entry["score"], -entry["beta"]))["beta"]
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
            # The texts of one seed show what a method says; the files in samples/ have all.
            "samples": dialogues(result, config.evaluation.seeds) if self.seed == config.seeds[0] else [],
        }


def _logs(source: str, reward: str | None) -> list[Trajectory]:
    """The logged replies; of comparisons with the labels as rewards, whatever a method makes of them."""
    if holds_comparisons(source):
        return to_trajectories(read_comparisons(source))
    return read_trajectories(source, reward=reward)


def _fields(algorithm: str) -> set[str]:
    """The settings of an algorithm."""
    return {field.name for field in fields(load_algorithm(algorithm)[0])}


def _collects(method: Any) -> bool:
    return getattr(method, "collect", None) is not None


def _plays(method: Any) -> bool:
    """Whether a method (or the partner) learns in the environment."""
    return _collects(method) or load_algorithm(method.algorithm)[1].plays


def divergence(run: Path) -> dict[str, float]:
    """Of a run of PPO: `training_kl`, nats per episode between its last episodes' policy and the start, and
    `ratio_max`, the largest ratio of any update."""
    rows = [row for row in read_metrics(run) if "ratio_max" in row]
    return {"training_kl": rows[-1]["kl"], "ratio_max": max(row["ratio_max"] for row in rows)} if rows else {}


def training_cost(run: Path, *judges: Path | None) -> dict[str, float]:
    """Tokens read in training, as often as they were read and with those of the runs it started or learnt from and of
    what rates its plans or says what it is asked for, and wall seconds of its last training process; for a run that
    played, also its agent turns, scored replies and sampled tokens."""
    report = read_report(run)
    seconds = [row["train_runtime"] for row in read_metrics(run) if "train_runtime" in row]
    played = {name: report[name] for name in ("environment_steps", "reward_queries") if name in report}
    if "generated_tokens" in report:
        played["played_tokens"] = report["generated_tokens"]
    tokens = sum(runs_before(str(run), *(judge and str(judge) for judge in judges)).values())
    return {"training_tokens": tokens, "training_seconds": seconds[-1] if seconds else 0.0, **played}


def learning_curve(run: Path) -> list[Row]:
    """Of a run that played, a row per iteration (every k-th of many): its accounts so far, the mean score of its
    episodes and their KL from the start in nats per episode; nothing for one that learnt from logs."""
    rows = [{name: row[name] for name in CURVE} for row in read_metrics(run) if "environment_steps" in row]
    return rows[:: -(-len(rows) // CURVE_POINTS) or 1]


def _fixed_episodes(result: EvaluationResult, seeds: Sequence[int]) -> Iterator[tuple[Row, Trajectory]]:
    """Ten episodes. Which ones depends on the episode seeds alone, so all methods show the same."""
    chosen = set(random.Random(0).sample(list(seeds), min(SAMPLES, len(seeds))))
    for row, trajectory in zip(result.episodes, result.trajectories, strict=True):
        if row["seed"] in chosen and row["repeat"] == 0:
            yield row, trajectory


def transcripts(result: EvaluationResult, seeds: Sequence[int]) -> str:
    """Ten episodes as text."""
    blocks = []
    for row, trajectory in _fixed_episodes(result, seeds):
        head = f"episode {row['seed']}, score {row['score']:g}, {json.dumps(row['labels'], ensure_ascii=False)}"
        turns = [f"{turn.role}: {turn.content}" for turn in trajectory.turns]
        blocks.append("\n".join([head, *turns, ""]))
    return visible("\n".join(blocks))


def dialogues(result: EvaluationResult, seeds: Sequence[int]) -> list[Row]:
    """The same ten episodes as results.jsonl keeps them; `turns` are (role, text)."""
    return [
        {"seed": row["seed"], "score": row["score"], "turns": [(turn.role, turn.content) for turn in trajectory.turns]}
        for row, trajectory in _fixed_episodes(result, seeds)
    ]


def _optimum(environment: Any) -> float | None:
    """The best possible mean score, where the environment knows it."""
    environment = environment() if callable(environment) else environment
    return environment.optimum() if hasattr(environment, "optimum") else None


def _plain(value: Any) -> Any:
    """As it will be read back from JSON."""
    return json.loads(json.dumps(value))
