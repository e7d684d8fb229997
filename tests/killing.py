"""Command lines in processes that are killed by signal 9: at a file event, or at a time.

A server imports the package once and forks a process for each command, so that a kill costs no start of Python.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")  # audited, before they happen


class Commands:
    """Runs command lines, one at a time, in processes forked from a server."""

    def __init__(self, log: Path):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.log = log
        self.server = subprocess.Popen(
            [sys.executable, __file__, str(log)],
            stdin=subprocess.PIPE,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
        )

    def run(self, *argv: Any, watched: Path | None = None, event: int = 0, seconds: float = 0.0) -> dict[str, Any]:
        """rc (−9 where it was killed), what it printed, its seconds and file events.

        Args:
          watched: folder in which file events count. event: which of them kills, before it happens; 0 = none.
          seconds: after which it is killed; 0 = never.
        """
        request = {"argv": list(map(str, argv)), "watched": str(watched), "event": event, "seconds": seconds}
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        found = json.loads(self.server.stdout.readline())
        return found | {"text": self.log.read_text(errors="replace")}

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait()


def _serve(log: str) -> None:
    import time

    import torch

    import offline_lmrl.cli.play
    import offline_lmrl.comparison.compare
    import offline_lmrl.export.plain
    import offline_lmrl.export.run
    import offline_lmrl.run  # noqa: F401

    torch.set_num_threads(1)
    events = Path(f"{log}.events")
    for line in sys.stdin:
        request = json.loads(line)
        start = time.monotonic()
        events.write_text("0")
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            _command(request, log, str(events))
        timer = threading.Timer(request["seconds"], os.kill, (child, signal.SIGKILL))
        if request["seconds"]:
            timer.start()
        rc = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        timer.cancel()
        found = {"rc": rc, "seconds": time.monotonic() - start, "events": int(events.read_text() or 0)}
        print(json.dumps(found), flush=True)


def _command(request: dict[str, Any], log: str, events: str) -> None:
    from offline_lmrl.cli.main import main

    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    count = 0

    def audit(name: str, args: tuple) -> None:
        nonlocal count
        if name in EVENTS and str(args[0]).startswith(request["watched"]):
            if name == "open" and not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
            count += 1
            if count == request["event"]:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)
    try:
        rc = main(request["argv"])
    except BaseException:
        import traceback

        traceback.print_exc()
        rc = 1
    sys.stdout.flush()
    Path(events).write_text(str(count))
    os._exit(rc)


if __name__ == "__main__":
    _serve(sys.argv[1])
