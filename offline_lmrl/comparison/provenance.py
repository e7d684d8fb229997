"""The origin of results: the code, libraries, machine and command in every measured row; a report's manifest."""

import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from offline_lmrl import __version__
from offline_lmrl.comparison.report import Results

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


def manifest(results: Results, source: bytes) -> dict[str, Any]:
    """Return the origin of the rows, the contents of manifest.json.

    Args:
      results: the rows.
      source: bytes of results.jsonl, whose sha256 is stored.
    Returns: `results`, the sha256 and number of all rows; `config` of the comparison; `data`, hashes of training and
      validation data (None without runs), by method if they differ; `seeds`, the training seeds; and
      `made`, a list of commands with commit, machine and library versions, and the number of rows that each made.
    """
    runs = results.of("run")
    data = {run["method"]: run["config"]["data"] for run in runs}
    same = all(hashes == runs[0]["config"]["data"] for hashes in data.values())
    made: dict[str, dict[str, Any]] = {}
    for run in runs:
        if "made" in run:  # rows of the first versions do not have it
            entry = made.setdefault(json.dumps(run["made"], sort_keys=True), {"rows": 0, **run["made"]})
            entry["rows"] += 1
    return {
        "results": {"sha256": hashlib.sha256(source).hexdigest(), "rows": len(results.rows)},
        "config": results.shown["config"],
        "data": (runs[0]["config"]["data"] if runs else None) if same else data,
        "seeds": sorted({run["seed"] for run in runs}),
        "made": list(made.values()),
    }
