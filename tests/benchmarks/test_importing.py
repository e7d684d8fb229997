"""What importing and rendering preferences costs: rows/s with 1 and 2 processes, memory against the number of rows.

Run with `pytest -m benchmarks -s tests/benchmarks/test_importing.py`; OFFLINE_LMRL_ROWS=100000 asks for fewer rows.
Wanted on two free cores: at least 1.6 times the rows per second from 1 to 2 processes, and at a million pairs at most
1.2 times the peak memory of a tenth of them. To render, rows are read first; both are timed.
"""

import json
import os
import random
import subprocess
import sys

import pytest

pytestmark = pytest.mark.benchmarks

ROWS = int(os.environ.get("OFFLINE_LMRL_ROWS", 1_000_000))
WORDS = [f"word{i}" for i in range(500)]
IMPORT = """
import resource, sys, time
from data_prep.hh_rlhf import HhRlhf

if __name__ == "__main__":
    start = time.perf_counter()
    HhRlhf(input=sys.argv[1], output=sys.argv[2], processes=int(sys.argv[3])).prepare()
    seconds = time.perf_counter() - start
    peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(seconds, max(peaks) / 1024)
"""
RENDER = """
import resource, sys, time
from collections import Counter
from offline_lmrl.tokens.comparison_batching import encode_comparisons
from offline_lmrl.logs.io import store_comparisons
from offline_lmrl.tokens.rendering import Renderer
from offline_lmrl.tokens.tokenizers import train_tokenizer
from offline_lmrl.tokens.windows import WindowRule

start = time.perf_counter()
rows = store_comparisons(sys.argv[1], processes=int(sys.argv[2]))
read = time.perf_counter() - start
renderer = Renderer(train_tokenizer([turn.content for row in rows[:100] for turn in row.context], 600))
start = time.perf_counter()
encode_comparisons(rows, renderer, WindowRule(max_length=512), Counter(), int(sys.argv[2]))
seconds = time.perf_counter() - start
peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
print(seconds, max(peaks) / 1024, read)
"""


def write_pairs(path, rows):
    """Transcripts of two questions with replies of 25 words; every first question is asked ten times."""
    rng = random.Random(0)

    def said(words):
        return " ".join(rng.choices(WORDS, k=words))

    with path.open("w") as file:
        for i in range(rows):
            before = f"\n\nHuman: what about {i // 10}?\n\nAssistant: {said(20)}\n\nHuman: {said(8)}\n\nAssistant:"
            file.write(json.dumps({side: f"{before} {said(25)}" for side in ("chosen", "rejected")}) + "\n")


def measured(script, *arguments):
    """Seconds and peak MB of the largest process, and what else it prints, in a process of its own."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [float(number) for number in done.stdout.split()]


def test_importing_and_rendering_preferences(tmp_path):
    seconds, peaks = {}, {}
    for rows in (ROWS // 10, ROWS):
        write_pairs(tmp_path / f"{rows}.jsonl", rows)
        for processes in (1, 2):
            done = measured(IMPORT, tmp_path / f"{rows}.jsonl", tmp_path / f"out{rows}", processes)
            seconds["import", processes], peaks["import", rows, processes] = done
            done = measured(RENDER, tmp_path / f"out{rows}" / "train.jsonl", processes)
            seconds["render", processes], peaks["render", rows, processes], seconds["read", processes] = done
            for work, share in (("import", 1.0), ("read", 0.9), ("render", 0.9)):  # a tenth is kept for validation
                peak = f", peak {peaks[work, rows, processes]:.0f} MB" if work != "read" else ""
                print(
                    f"\n{work} {rows * share:>9,.0f} pairs, {processes} processes: "
                    f"{rows * share / seconds[work, processes]:>7,.0f} rows/s{peak}",
                    end="",
                )
    for processes in (1, 2):
        seconds["both", processes] = seconds["read", processes] + seconds["render", processes]
    print()
    for work in ("import", "read", "render", "both"):
        print(f"{work}: speed of 2 processes over 1: {seconds[work, 1] / seconds[work, 2]:.2f} (wanted 1.6)")
    for work in ("import", "render"):
        for processes in (1, 2):
            ratio = peaks[work, ROWS, processes] / peaks[work, ROWS // 10, processes]
            print(
                f"{work}: peak at {ROWS:,} over {ROWS // 10:,}, {processes} processes: {ratio:.2f} "
                "(wanted at most 1.2)"
            )
