"""Checks of outputs, and reports, that the commands share."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from offline_lmrl.errors import InputError
from offline_lmrl.logs.terminal import visible


def check_output(output: Path, *read: str | None, is_file: bool = False) -> None:
    """Check, before any work is done, that the output can be written.

    Args:
      output: file or folder that will be written.
      read: paths or hub names of the inputs; None is skipped.
      is_file: the output cannot be a folder.
    Raises: InputError if the path cannot be written, equals an input, or is directly inside an input folder.
    """
    folder = output.parent
    while not folder.exists():
        folder = folder.parent
    if not output.name or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(f"output: found {output}, expected a path that can be written")
    for source in filter(None, read):
        inside = output.resolve().parent if Path(source).is_dir() else None
        if Path(source).resolve() in (output.resolve(), inside):
            raise InputError(f"output: found {output}, which is or is in the input {source}, expected another path")
    if is_file and output.is_dir():
        raise InputError(f"output: found the folder {output}, expected a file")


def print_counts(data: str, counts: Mapping[str, int]) -> None:
    """Print to stderr how many rows of `data` were repaired and dropped while reading, by reason."""
    for reason, n in counts.items():
        print(f"{data}: {reason}: {n}", file=sys.stderr)


def print_report(report: Mapping[str, Any], indent: str = "") -> None:
    """Print a report, one `name: value` per line.

    A report inside the report is printed indented under its name. From the second level down, a report that contains
    no further report is printed on one line.

    Args:
      report: name -> value, or name -> another report.
      indent: spaces before every line.
    """
    for name, value in report.items():
        if isinstance(value, Mapping) and value:
            print(visible(f"{indent}{name}:"))
            print_report({inner: _flat(one) for inner, one in value.items()}, indent + "  ")
        else:
            print(visible(f"{indent}{name}: {_plain(value)}"))


def _flat(value: Any) -> Any:
    if not isinstance(value, Mapping) or any(isinstance(one, Mapping) for one in value.values()):
        return value
    return ", ".join(f"{name}: {_plain(one)}" for name, one in value.items()) or "none"


def _plain(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value if value != {} else "none"
