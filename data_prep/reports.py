"""Write the JSON files beside prepared data."""

import json
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from offline_lmrl.errors import InputError
from offline_lmrl.logs.files import locked, staging, writing
from offline_lmrl.logs.io import REPORT, write_text


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON to a file that exists whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


@contextmanager
def prepared(output: str | Path) -> Iterator[Path]:
    """Yield a folder for a data set and its report, and move its files into `output` afterwards, the report last.

    If an error occurs before the move, `output` stays as it was. A kill during the move leaves a folder without a
    report, which counts as not finished.

    Raises: InputError if `output` cannot be written, or another process holds it.
    """
    output = Path(output)
    with locked(output), writing(output), staging(output / REPORT) as folder:
        try:
            yield folder
        except InputError as error:  # name the user's folder instead of the staging folder
            raise InputError(str(error).replace(str(folder), str(output))) from error
        (output / REPORT).unlink(missing_ok=True)
        for path in sorted(folder.iterdir(), key=lambda path: path.name == REPORT):
            os.replace(path, output / path.name)


def require_no_other_splits(output: str | Path, splits: Collection[str]) -> None:
    """Check that the folder holds no splits of an earlier run, whose groups may be in the new splits too.

    Raises: InputError if it does.
    """
    others = sorted(path.name for path in Path(output).glob("*.jsonl") if path.stem not in splits)
    if others:
        raise InputError(
            f"{output}: found {', '.join(others)} of another run, expected an empty folder or no splits "
            f"other than {', '.join(splits)}"
        )
