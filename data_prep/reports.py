"""JSON beside prepared data: counts that add up, and what play needs to know."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from offline_lmrl.data.errors import InputError
from offline_lmrl.data.io import atomic_output


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON; the file is there whole or not at all."""
    with atomic_output(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def require_no_other_splits(output: str | Path, splits: Collection[str]) -> None:
    """Raises InputError where the folder holds splits of an earlier run: their groups may be in the new ones too."""
    others = sorted(path.name for path in Path(output).glob("*.jsonl") if path.stem not in splits)
    if others:
        raise InputError(f"{output}: found {', '.join(others)} of another run, expected an empty folder or no splits "
                         f"but {', '.join(splits)}")  # fmt: skip
