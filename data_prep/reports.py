"""JSON beside prepared data: counts that add up, and what play needs to know."""

import json
from pathlib import Path
from typing import Any

from offline_lmrl.data.io import atomic_output


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON; the file is there whole or not at all."""
    with atomic_output(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
