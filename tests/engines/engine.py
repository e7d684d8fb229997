"""The environment with vLLM that `make engines` makes, and a way to play in it.

Decorate a test that needs it with `needs_engines`. ENGINES names another folder than .engines.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENGINES = ROOT / os.environ.get("ENGINES", ".engines")
PYTHON = ENGINES / "bin" / "python"
# In one process, so that an error of the engine is an error of the call; without a GPU, 1 GiB is enough for caches.
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": str(ROOT)}


def needs_engines(test):
    """Mark a test `engines`, and skip it where `make engines` has not been run."""
    missing = not (ENGINES / "installed").exists()
    return pytest.mark.engines(pytest.mark.skipif(missing, reason="run make engines first")(test))


def play(jobs, folder, **environment):
    """The answers to the jobs of tests/engines/player.py, and their seconds, by name; `folder`/log has messages."""
    (folder / "jobs").write_text(json.dumps(jobs))
    command = [PYTHON, "-m", "tests.engines.player", folder / "jobs", folder / "answers"]
    with open(folder / "log", "w") as log:
        done = subprocess.run(command, cwd=ROOT, env=os.environ | ENVIRONMENT | environment, stdout=log, stderr=log)
    assert done.returncode == 0, (folder / "log").read_text()[-2000:]
    answers = [json.loads(line) for line in (folder / "answers").read_text().splitlines()]
    return {name: replies for name, replies, _ in answers}, {name: seconds for name, _, seconds in answers}
