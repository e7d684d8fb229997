"""Run two checkouts side by side on this machine and say where they differ: `compare.py BEFORE AFTER [FOLDER]`.

Each runs the commands of `record.py`, in a process of its own with one thread. Bits differ between processors, so
nothing is committed and nothing of this runs in CI. Prints each thing that is different or missing and ends with exit
code 1; 0 where all is equal. `--without help,stdout,stderr` leaves out what an issue means to change. FOLDER keeps
what both wrote; by default it is temporary.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from offline_lmrl.renamed import current


def record(checkout: Path, folder: Path) -> dict[str, Any]:
    folder.mkdir(parents=True)
    environment = os.environ | {
        "PYTHONPATH": str(checkout),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "COLUMNS": "120",
        "PYTHONHASHSEED": "0",
    }
    script = Path(__file__).with_name("record.py")
    subprocess.run([sys.executable, script, folder], env=environment, cwd=checkout, check=True)
    return json.loads((folder / "record.json").read_text())


def first_difference(before: Any, after: Any, way: str = "") -> str:
    """Where two values begin to differ, in a line."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in [*before, *after]:
            if before.get(key) != after.get(key):
                return first_difference(before.get(key), after.get(key), f"{way}.{key}")
    if isinstance(before, list) and isinstance(after, list):
        for place, (one, other) in enumerate(zip(before, after, strict=False)):
            if one != other:
                return first_difference(one, other, f"{way}[{place}]")
        return f"{way}: {len(before)} before, {len(after)} after"
    return f"{way}: {str(before)[:150]!r} before, {str(after)[:150]!r} after"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--without", default="", help="parts of names that are left out, with commas between")
    given = parser.parse_args()
    left_out = [part for part in given.without.split(",") if part]
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        # What an earlier version wrote is compared under the names of settings of today.
        before = {name: current(value) for name, value in record(given.before.resolve(), folder / "before").items()}
        after = record(given.after.resolve(), folder / "after")
    names = [name for name in {**before, **after} if not any(part in name for part in left_out)]
    different = [name for name in names if name not in before or name not in after or before[name] != after[name]]
    for name in different:
        print(f"{name}{first_difference(before.get(name), after.get(name))}")
    print(f"{len(names)} recorded, {len(different)} different")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
