"""The origin of results: the code, libraries, machine and command in every measured row; a report's manifest."""

import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from offline_lmrl import __version__
from offline_lmrl.comparison.report import Results, Row
from offline_lmrl.errors import InputError
from offline_lmrl.logs.files import say_differences

PACKAGES = ("torch", "transformers", "datasets", "accelerate", "numpy")


@cache
def provenance() -> dict[str, Any]:
    """Return the origin of the results of this process, as values that JSON can hold.

    Returns: `command`, the command line; `commit` of the code, with "-dirty" appended if tracked files were changed,
      or None outside a git checkout; `versions`, package -> version; and `machine`: `system`, `cores` and
      `accelerator` (None without a GPU), but no host name.
    """
    import torch

    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": _commit(),
        "versions": {"offline_lmrl": __version__, "python": platform.python_version()}
        | {name: metadata.version(name) for name in PACKAGES},
        "machine": {
            "system": platform.platform(),
            "cores": os.cpu_count(),
            "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }


def _commit() -> str | None:
    """Return the commit of the git checkout that tracks this file; None if no checkout does.

    A repository whose folder merely contains the installed package, such as one with a virtual environment in it, does
    not count.
    """
    here = Path(__file__)
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:
        return None
    return _git(here.parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(folder: Path, *command: str) -> str | None:
    """Run git in a folder and return its output, without outer whitespace; None if it fails or is not installed."""
    try:
        done = subprocess.run(["git", "-C", folder, *command], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def refuse_mixed(rows: Sequence[Row], source: Path) -> None:
    """Check that all rows of kind "run" can belong to one comparison.

    They must agree in environment, data, partner and evaluation; and those of one method and way of decoding must have
    equal configs.

    Args:
      rows: rows of results, of any kind.
      source: path of their file, for the error message.
    Raises: InputError that names the settings which differ.
    """
    shared: dict[str, Any] | None = None
    own: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        if row["kind"] != "run":
            continue
        every = {name: row["config"][name] for name in ("environment", "data", "partner", "evaluation")}
        shared = shared or every
        mine = own.setdefault((row["method"], row["decode"]), row["config"])
        difference = say_differences(every, shared) or say_differences(row["config"], mine)
        if difference:
            raise InputError(
                f"{source}: {row['method']}: {difference}; the folder holds results or a report "
                "of another comparison: move them away"
            )


def manifest(results: Results, source: bytes) -> dict[str, Any]:
    """Return the origin of the rows, the contents of manifest.json.

    Args:
      results: the rows.
      source: bytes of results.jsonl, whose sha256 is stored.
    Returns: `results`, the sha256 and number of all rows; `config` of the comparison; `data`, hashes of training and
      validation data (None without runs); `seeds`, the training seeds; and `made`, a list of commands with commit,
      machine and library versions, and the number of rows that each made.
    """
    runs = results.of("run")
    made: dict[str, dict[str, Any]] = {}
    for run in runs:
        if "made" in run:  # rows of the first versions do not have it
            entry = made.setdefault(json.dumps(run["made"], sort_keys=True), {"rows": 0, **run["made"]})
            entry["rows"] += 1
    return {
        "results": {"sha256": hashlib.sha256(source).hexdigest(), "rows": len(results.rows)},
        "config": results.shown["config"],
        "data": runs[0]["config"]["data"] if runs else None,
        "seeds": sorted({run["seed"] for run in runs}),
        "made": list(made.values()),
    }
