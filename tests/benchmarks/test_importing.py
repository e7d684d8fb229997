"""What importing preferences costs: rows per second with 1 and 2 processes, and memory against the number of rows.

Run with `pytest -m benchmarks -s tests/benchmarks/test_importing.py`; OFFLINE_LMRL_ROWS=100000 asks for fewer rows.
Wanted on two free cores: at least 1.6 times the rows per second from 1 to 2 processes, and at a million pairs at most
1.2 times the peak memory of a tenth of them. Rendering is printed beside it: one process, all tokens held.
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
from data_prep import hh_rlhf

if __name__ == "__main__":
    start = time.perf_counter()
    hh_rlhf.prepare(sys.argv[1], sys.argv[2], processes=int(sys.argv[3]))
    seconds = time.perf_counter() - start
    peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(seconds, max(peaks) / 1024)
"""
RENDER = """
import resource, sys, time
from collections import Counter
from offline_lmrl.data.comparison_batching import encode_comparisons
from offline_lmrl.data.io import read_comparisons
from offline_lmrl.data.rendering import Renderer
from offline_lmrl.data.tokenizers import train_tokenizer
from offline_lmrl.data.windows import WindowRule

rows = read_comparisons(sys.argv[1])
renderer = Renderer(train_tokenizer([turn.content for row in rows[:100] for turn in row.context], 600))
start = time.perf_counter()
encode_comparisons(rows, renderer, WindowRule(max_length=512), Counter())
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
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
    """Seconds and peak MB of the largest process, in a process of its own."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [float(number) for number in done.stdout.split()]


def test_importing_preferences(tmp_path):
    peaks, seconds = {}, {}
    for rows in (ROWS // 10, ROWS):
        write_pairs(tmp_path / f"{rows}.jsonl", rows)
        for processes in (1, 2):
            seconds[processes], peaks[rows, processes] = measured(
                IMPORT, tmp_path / f"{rows}.jsonl", tmp_path / f"out{rows}", processes)
            print(f"\nimport {rows:>9,} pairs, {processes} processes: {rows / seconds[processes]:>7,.0f} rows/s, "
                  f"peak {peaks[rows, processes]:.0f} MB", end="")
    rendering, held = measured(RENDER, tmp_path / f"out{ROWS // 10}" / "train.jsonl")
    print(f"\nspeed of 2 processes over 1: {seconds[1] / seconds[2]:.2f} (wanted 1.6)")
    for processes in (1, 2):
        print(f"peak at {ROWS:,} over {ROWS // 10:,}, {processes} processes: "
              f"{peaks[ROWS, processes] / peaks[ROWS // 10, processes]:.2f} (wanted at most 1.2)")
    print(f"render {ROWS // 10:,} pairs, 1 process: {0.9 * ROWS / 10 / rendering:,.0f} rows/s, peak {held:.0f} MB")
