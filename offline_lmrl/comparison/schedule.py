"""The order of work of a comparison: what is due, in this process or in workers, and what failed on the way.

Every run is trained once, after those that it needs; every entry is measured once its runs are complete. A failure is
noted and stops only what needs the failed run.
"""

import os
import re
import traceback
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from multiprocessing import active_children, get_context
from pathlib import Path

import torch
from rich.console import Console

from offline_lmrl.comparison.config import CompareConfig
from offline_lmrl.comparison.measure import Arena, Measurement, Setting, result_row
from offline_lmrl.comparison.resolve import resolve
from offline_lmrl.comparison.rows import Row
from offline_lmrl.comparison.runs import PLANNED, Entry, Run
from offline_lmrl.comparison.storage import Storage
from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.errors import Failed, InputError, Stopped
from offline_lmrl.evaluation.metrics import Estimate
from offline_lmrl.logs.parallel import end_with_parent
from offline_lmrl.logs.terminal import visible
from offline_lmrl.run_folder import COMPLETE

TRAINED, MEASURED = "trained", "measured"


@dataclass(frozen=True)
class Failure:
    """The reason why a run is not trained, or an entry lacks some of its rows.

    line: the error message, in one line.
    unusable: True if an input or a setting was wrong, False if the program failed.
    cause: for work that was skipped, the name of the failed method that it needs; None for work that failed.
    skipped: what was skipped, for the message.
    """

    line: str
    unusable: bool
    cause: str | None = None
    skipped: str = "skipped"

    @property
    def title(self) -> str:
        return f"failed: {self.line}" if self.cause is None else f"{self.skipped} because of {self.cause}"


Failures = dict[tuple[str, str], Failure]  # (label of a run or an entry, TRAINED or MEASURED) -> failure


class Schedule:
    """The work of a comparison in one process.

    failures: what failed or was skipped so far.

    Args:
      config: the comparison.
      entries: its entries.
      storage: its results so far.
      console: receives the progress messages.
    """

    def __init__(self, config: CompareConfig, entries: Sequence[Entry], storage: Storage, console: Console):
        self.config, self.entries, self.storage, self.console = config, entries, storage, console
        self.failures: Failures = {}
        self._complete: set[str] = set()
        self.arena = Arena(
            config.environment,
            config.evaluation,
            self._players,
            lambda: storage.validation_data,
            console,
        )

    def say(self, text: str) -> None:
        self.console.print(visible(text), markup=False, highlight=False, soft_wrap=True)

    @cached_property
    def _partner(self) -> LanguagePolicy:
        return LanguagePolicy.load(self.entries[0].partner.folder, **self.config.partner.decoding)

    def _players(self) -> dict[str, LanguagePolicy]:
        return {} if self.config.partner is None else {self.config.partner.argument: self._partner}

    # Training.

    def train(self, run: Run) -> bool:
        """Train a run and, before it, those that it needs; return True if all are complete.

        A failure is stored. What failed before is not tried again.
        """
        if run.label in self._complete:
            return True
        for need in run.needs:
            if (run.label, TRAINED) not in self.failures and not self.train(need):
                self.failures[run.label, TRAINED] = self._because_of(need)
        if (run.label, TRAINED) in self.failures:
            return False
        if run.settings is not None:
            with self._noting((run.label, TRAINED), run.length_key):
                if not (Path(run.folder) / COMPLETE).exists():
                    self.say(f"training {run.label}")
                run.train(self._players() if run.settings["environment"] is not None else {})
        if (run.label, TRAINED) in self.failures:
            return False
        self._complete.add(run.label)
        return True

    def _because_of(self, run: Run, skipped: str = "skipped") -> Failure:
        """Return the failure of work that cannot go on because `run`, which it needs, failed or was skipped."""
        failure = self.failures[run.label, TRAINED]
        return replace(failure, cause=failure.cause or run.name, skipped=skipped)

    @contextmanager
    def _noting(self, work: tuple[str, str], length_key: str) -> Iterator[None]:
        """Context manager: catch an exception, print it at once and store it for `raise_failures`.

        Args:
          work: key of the failure.
          length_key: dotted name of the setting that decides max_new_tokens in this work.
        """
        try:
            yield
        except Exception as error:
            unusable = isinstance(error, InputError | OSError)  # the same two as on the command line
            line = " ".join((str(error) if unusable else "".join(traceback.format_exception_only(error))).split())
            # Errors from training and play name only the field; print its dotted name in the compare file.
            line = re.sub(r"(?<![\w.])max_new_tokens", length_key, line)
            self.failures[work] = Failure(line, unusable)
            if not unusable:
                self.say("".join(traceback.format_exception(error)).rstrip())
            self.say(f"{work[0]} failed: {line}")

    # Measuring.

    def measure(self, entry: Entry, settings: Sequence[Setting]) -> Iterator[Row]:
        """Measure the settings of an entry in order and yield each row at once; stop at the first failure.

        Runs that are needed and not complete are trained first. If the entry's own run, or the run whose Q gives its
        requested return, cannot be trained, nothing is yielded. If the run that rates its plans cannot be trained,
        only planned play is skipped.
        """
        if not self.train(entry.run):
            if entry.label != entry.run.label:
                self.failures[entry.label, TRAINED] = self._because_of(entry.run)
            return
        if self._lacks(entry, entry.partner) or self._lacks(entry, entry.asks):
            return
        with self._noting((entry.label, MEASURED), entry.length_key):
            measurement = Measurement(self.arena, entry)
            for setting in settings:
                if setting.decode == PLANNED and self._lacks(entry, entry.scorer):
                    continue
                row = result_row(self.storage.folder, self.config.evaluation, entry, measurement.play(setting))
                beta = "" if row["beta_chosen"] is None else f" at β {row['beta']:g} ({row['beta_chosen']})"
                score = Estimate.stored(row["score"], row["interval"], row["n"])
                self.say(f"{entry.method} seed {row['seed']} {row['decode']}{beta}: {score}")
                yield row

    def _lacks(self, entry: Entry, helper: Run | None) -> bool:
        """True if an entry cannot be measured because the run of `helper` is missing; the failure is then stored."""
        if helper is None or self.train(helper):
            return False
        self.failures[entry.label, MEASURED] = self._because_of(helper, "rows skipped")
        return True

    # All that is due.

    def in_order(self) -> None:
        """Do all that is due in this process, each row after the training that it needs."""
        due = {entry.label: settings for entry in self.entries if (settings := self.storage.missing(entry))}
        for entry in self.entries:
            if entry.label not in due:
                continue
            for row in self.measure(entry, due[entry.label]):
                self.storage.add(entry, row)

    def in_workers(self) -> None:
        """Do all that is due in `config.workers` processes.

        First each process trains the runs of one seed. Then each measures one entry; if this process is killed, only
        the measurements in progress are lost. The partner is trained before, in this process.
        """
        if self.entries[0].partner is not None:
            self.train(self.entries[0].partner)
        with self._workers() as pool:
            waiting = [pool.submit(_train_seed, self.config, self.failures, seed) for seed in self.config.seeds]
            for done in as_completed(waiting):
                self.failures |= done.result()
        with self._workers() as pool:
            due = {
                pool.submit(_measure, self.config, self.failures, entry.label, settings): entry
                for entry in self.entries
                if (settings := self.storage.missing(entry))
            }
            for done in as_completed(due):
                rows, failures = done.result()
                self.failures |= failures
                for row in rows:
                    self.storage.add(due[done], row)

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

    def raise_failures(self) -> None:
        """Raise one error that lists all failures; do nothing if there are none.

        Raises: InputError if bad input caused all of them, else Failed.
        """
        if not self.failures:
            return
        lacking: dict[str, list[str]] = defaultdict(list)
        for (label, _), failure in self.failures.items():
            lacking[failure.title].append(label)
        kind = InputError if all(failure.unusable for failure in self.failures.values()) else Failed
        lines = "; ".join(f"{', '.join(labels)} {title}" for title, labels in lacking.items())
        raise kind(
            f"{lines}; `offline-lmrl compare {self.config.output}` reports on the rest, and the same command "
            "tries the missing runs again"
        )


# The work of a worker process, which resolves the settings anew.


def _begin_worker(threads: int) -> None:
    end_with_parent()
    torch.set_num_threads(threads)


def _in_worker(config: CompareConfig, failures: Mapping[tuple[str, str], Failure]) -> Schedule:
    entries = resolve(config)
    # Lines but no progress bars, which would overwrite one another.
    schedule = Schedule(config, entries, Storage(config, entries), Console(stderr=True, force_terminal=False))
    schedule.failures = dict(failures)
    return schedule


def _train_seed(config: CompareConfig, failures: Failures, seed: int) -> Failures:
    """Train all runs that the entries of one seed need, and return the failures, with those of before."""
    schedule = _in_worker(config, failures)
    try:
        for entry in schedule.entries:
            if entry.seeds == (seed,):
                for run in entry.runs():
                    schedule.train(run)
    except Stopped as stop:
        schedule.say(stop.line)  # here, because the parent receives the exception of one worker at most
        raise Stopped("", stop.number) from stop
    return schedule.failures


def _measure(
    config: CompareConfig, failures: Failures, label: str, settings: Sequence[Setting]
) -> tuple[list[Row], Failures]:
    """Measure the entry with a label in some settings.

    Returns: the new rows; and the failures, with those of before.
    """
    schedule = _in_worker(config, failures)
    (entry,) = (entry for entry in schedule.entries if entry.label == label)
    return list(schedule.measure(entry, settings)), schedule.failures
