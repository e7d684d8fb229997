"""Write the output folder of an importer: its data files and the report on them."""

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
    """Write indented JSON, in one step: an interrupted call leaves the old file, or none, at `path`."""
    write_text(path, json.dumps(content, indent=2) + "\n")


@contextmanager
def prepared(output: str | Path) -> Iterator[Path]:
    """Context manager: yield a temporary folder, and afterwards move its files into `output`, the report last.

    The caller writes a data set and its report to the temporary folder. If an error occurs before the move, `output`
    stays as it was. If the process is killed during the move, `output` has no report, which counts as not finished.

    Raises: InputError if `output` cannot be written, or another process has locked it.
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
    """Check that the folder has no split files of an earlier call besides those that will be replaced.

    Their groups may be in the new splits too.

    Args:
      output: the folder; it need not exist.
      splits: names of the new splits.
    Raises: InputError if the folder has other splits.
    """
    others = sorted(path.name for path in Path(output).glob("*.jsonl") if path.stem not in splits)
    if others:
        raise InputError(
            f"{output}: found {', '.join(others)} of another run, expected an empty folder or no splits "
            f"other than {', '.join(splits)}"
        )
