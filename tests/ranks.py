"""Several processes on one machine, run by torchrun."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

MAIN = """
from pathlib import Path
from offline_lmrl.cli.train import leave_together


def main():
{body}


main()
leave_together()
names = [file.read_text() for file in Path("/proc/self/task").glob("*/comm")]
assert not any(name.startswith("pt_gloo") for name in names), "a thread that can abort the process at its exit"
"""


def run_ranks(script: str, ranks: int, folder: Path) -> None:
    """Runs the lines of a script as a function in several processes, without network; fails where one fails or hangs.

    Args:
      script: the lines.
      ranks: the number of processes.
      folder: where script.py is written.
    """
    file = folder / "script.py"
    file.write_text(MAIN.format(body=textwrap.indent(script.strip(), "    ")))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(ranks),
        str(file),
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment, start_new_session=True) as process:
        try:
            errors = process.communicate(timeout=180)[1]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail("the ranks wait for each other")
    assert process.returncode == 0, errors.decode()[-20000:]
