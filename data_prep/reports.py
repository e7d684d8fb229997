"""JSON beside prepared data: counts that add up, and what play needs to know."""

import json
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from offline_lmrl.data.errors import InputError
from offline_lmrl.data.files import locked, staging, writing
from offline_lmrl.data.io import REPORT, write_text


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON; the file is there whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


@contextmanager
def prepared(output: str | Path) -> Iterator[Path]:
    """Give a folder to write a data set and its report to, which then move into `output`, the report last.

    An error before that leaves what was in `output`, and a kill during the move a folder without a report, which is
    not finished. Raises: InputError where `output` cannot be written, or another process is at work there.
    """
    output = Path(output)
    with locked(output), writing(output), staging(output / REPORT) as folder:
        try:
            yield folder
        except InputError as error:  # about a file that was to come into `output`
            raise InputError(str(error).replace(str(folder), str(output))) from error
        (output / REPORT).unlink(missing_ok=True)
        for path in sorted(folder.iterdir(), key=lambda path: path.name == REPORT):
            os.replace(path, output / path.name)


def require_no_other_splits(output: str | Path, splits: Collection[str]) -> None:
    """Raises InputError where the folder holds splits of an earlier run: their groups may be in the new ones too."""
    others = sorted(path.name for path in Path(output).glob("*.jsonl") if path.stem not in splits)
    if others:
        raise InputError(
            f"{output}: found {', '.join(others)} of another run, expected an empty folder or no splits "
            f"but {', '.join(splits)}"
        )
