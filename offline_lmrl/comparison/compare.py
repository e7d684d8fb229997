"""Train and evaluate several methods over several seeds. The result is one file of rows and one table; an interrupted
comparison resumes after the last row that it wrote.

The settings (config.py, methods.py) are resolved to a list of entries and runs (resolve.py, runs.py). schedule.py
trains the runs and lets measure.py measure the entries; every run plays the same episodes: sampled, greedily, and with
its planner if it has one. storage.py keeps the rows, one per method, seed and setting, and page.py draws the report.

A partner is a further model, trained once for the whole comparison, that plays the other side inside the environment.
"""

import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from offline_lmrl.comparison.config import CompareConfig
from offline_lmrl.comparison.contents import beta_lines
from offline_lmrl.comparison.page import write_report
from offline_lmrl.comparison.report import Results, table, terminal_table
from offline_lmrl.comparison.resolve import resolve
from offline_lmrl.comparison.rows import Row
from offline_lmrl.comparison.schedule import Schedule
from offline_lmrl.comparison.storage import Storage
from offline_lmrl.errors import Stopped
from offline_lmrl.evaluation.choice_text import GAIN, aligned
from offline_lmrl.logs.files import locked
from offline_lmrl.logs.io import is_prepared, write_text
from offline_lmrl.logs.terminal import visible

TABLE_WIDTH = 100  # columns of the printed table, at most; a file that output is redirected to has no width of its own


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
    entries = resolve(config)
    storage = Storage(config, entries)
    schedule = Schedule(config, entries, storage, console or Console(stderr=True))
    with locked(config.output):
        if config.prepare is not None and prepare is not None:
            source = config.data["train"]
            if not is_prepared(source, config.prepare.get("output") or Path(source).parent):
                schedule.say(f"preparing {source}")
                prepare(config.prepare)
        try:
            storage.open()
            if config.workers > 1:
                schedule.in_workers()
            else:
                schedule.in_order()
            page = _report(storage)
        except KeyboardInterrupt as stop:
            if isinstance(stop, Stopped) and stop.line:
                schedule.say(stop.line)
            number = stop.number if isinstance(stop, Stopped) else signal.SIGINT
            raise Stopped(f"{config.output}: stopped; the same command does the rest", number) from stop
    schedule.raise_failures()
    return page


def _report(storage: Storage) -> Path:
    write_text(storage.folder / "table.md", visible(table(storage.rows)) + "\n")
    print_table(storage.rows)
    return write_report(storage.folder) / "report.html"


def print_table(rows: Sequence[Row]) -> None:
    """Print the table of results to stdout, at most TABLE_WIDTH columns wide, and what each β does to replies."""
    width = min(TABLE_WIDTH, shutil.get_terminal_size((TABLE_WIDTH, 24)).columns)
    Console(width=width).print(terminal_table(rows))
    for method, lines in beta_lines(Results(rows)).items():
        print(visible(f"\n{method}, seed {_first_seed(rows, method)}: replies to held-out prompts, by β"))
        print("\n".join(aligned(lines, ["choice", *GAIN])))


def _first_seed(rows: Sequence[Row], method: str) -> int:
    return next(row["seed"] for row in rows if row["kind"] == "run" and row["method"] == method)
