"""Rows with anything in them: read, dropped for a counted reason, or refused in one line, and what is written can be
read."""

import json
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest

from data_prep.preferences import Preferences
from offline_lmrl.cli.data import SOURCES
from offline_lmrl.errors import InputError
from offline_lmrl.logs import comparison, trajectory
from offline_lmrl.logs.forms import read_row
from offline_lmrl.logs.io import (
    parsed,
    read_comparisons,
    read_trajectories,
    write_comparisons,
    write_trajectories,
)
from offline_lmrl.logs.preference_forms import read_comparison
from tests import fuzzing
from tests.comparisons import RENDERER
from tests.data_prep import test_comparisons, test_deal_or_no_deal, test_kto, test_stepwise, test_trajectories
from tests.fuzzing import mutated_lines, run_command, time_limit

CASES = pytest.mark.parametrize(
    ("seed", "n"), [(0, 60), *(pytest.param(seed, 1000, marks=pytest.mark.slow) for seed in (1, 2))]
)
ROWS = {
    next(name for name, (_, source) in SOURCES.items() if source == importer.__name__): rows
    for importer, rows in {**test_comparisons.ROWS, **test_trajectories.ROWS}.items()
}
ROWS["kto"] = [*ROWS["kto"], *test_kto.KEPT]
ROWS["stepwise"] = [*ROWS["stepwise"], *test_stepwise.KEPT]
SCORED = [
    {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"},
                  {"role": "assistant", "content": "a", "reward": 1.0, "token_ids": [3, 4],
                   "behaviour_log_prob": [-0.5, -1.0]}], "terminated": False, "group": "g", "task": "t",
     "source": "s", "labels": '{"a": 1}'},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]},
                  {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
                  {"role": "tool", "content": "4"}, {"role": "assistant", "content": "a", "trainable": True}],
     "extra": {"a": [1, None]}},
    {"prompt": "q", "completion": "a", "reward": 0.5},
    {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}],
     "label": True, "labels": {"options": [1, 2]}},
]  # fmt: skip


def test_every_source_that_reads_a_file_is_tried():
    no_file = {"maze", "toys", "wordle", "pref-gold", "support"}
    assert set(ROWS) | {"deal-or-no-deal"} | no_file == set(SOURCES)


def read_back(folder: Path, report: dict) -> int:
    """Rows of the written splits, which have to be those of the report, and none dropped."""
    rows = 0
    for name, split in report["splits"].items():
        read = read_comparisons if "comparisons" in split else read_trajectories
        counts: Counter[str] = Counter()
        rows += len(read(folder / f"{name}.jsonl", counts=counts))
        assert not counts
        with time_limit(60):
            assert run_command("check", folder / f"{name}.jsonl")[0] == 0
    assert rows == sum(split.get("comparisons", split.get("rows")) for split in report["splits"].values())
    return rows


@CASES
@pytest.mark.parametrize("source", ROWS)
def test_every_importer_counts_every_row_and_writes_what_can_be_read(tmp_path, source, seed, n):
    lines = [*(json.dumps(row).encode() for row in ROWS[source]), *mutated_lines(ROWS[source], n, seed)]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    settings = []
    if source == "best-of-4":
        RENDERER.tokenizer.save_pretrained(tmp_path / "tokenizer")
        settings = ["--tokenizer", tmp_path / "tokenizer"]
    code, out, err = run_command(
        "prepare", source, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out", *settings
    )
    assert code == 0, err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    there = sum(bool(line.strip()) for line in lines)
    assert report["rows"] == there == report["imported"] + sum(report["dropped"].values())
    assert sum(report["dropped"].values()) > 0 and len(report["dropped"]) < 100
    assert max(map(len, report["dropped"])) < 300
    written = read_back(tmp_path / "out", report)
    away = report["removed, their group is in a later split"]
    if source in ("oasst", "oasst-ratings"):
        return  # rows are messages; tests/data_prep/test_oasst.py counts them
    merged = sum(n for name, n in report.get("merged", {}).items() if name.startswith("the same replies"))
    if source not in ("alpaca-eval", "helpsteer"):  # of which several rows make one comparison
        assert report["imported"] == written + away + merged


@CASES
def test_negotiation_lines_are_counted_and_what_is_written_can_be_read(tmp_path, seed, n):
    rng = random.Random(seed)
    good = [test_deal_or_no_deal.plain(), test_deal_or_no_deal.tagged(), test_deal_or_no_deal.plain(own="1 1 2 2 1 5")]
    lines = [line.encode() for line in good]
    lines += [fuzzing.damaged_bytes(rng.choice(good).encode(), rng).replace(b"\n", b" ") for _ in range(n)]
    lines = [line for line in lines if _is_text(line)]  # a file of bytes that are no text is refused whole
    (tmp_path / "data.txt").write_bytes(b"\n".join(lines))
    code, _, err = run_command(
        "prepare",
        "deal-or-no-deal",
        "--input",
        tmp_path / "data.txt",
        "--output",
        tmp_path / "out",
        "--held_out_scenarios",
        1,
        "--permute_items",
        "true",
    )
    assert code == 0, err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    (counts,) = report["files"].values()
    assert counts["lines"] == counts["kept"] + sum(counts["dropped"].values())
    for name, split in report["splits"].items():
        assert len(read_trajectories(tmp_path / "out" / f"{name}.jsonl")) == split["rows"]


def _is_text(line: bytes) -> bool:
    try:
        return len(line.decode().splitlines()) == 1
    except UnicodeDecodeError:
        return False


READERS = {
    "trajectories": (SCORED, read_row, trajectory, write_trajectories, read_trajectories),
    "comparisons": (
        test_comparisons.ROWS[Preferences],
        read_comparison,
        comparison,
        write_comparisons,
        read_comparisons,
    ),
}


@pytest.mark.parametrize(("seed", "n"), [(0, 400), *(pytest.param(s, 4000, marks=pytest.mark.slow) for s in (1, 2))])
@pytest.mark.parametrize("form", READERS)
def test_every_row_is_kept_dropped_for_a_reason_or_refused_and_what_is_kept_survives(tmp_path, form, seed, n):
    rows, read, module, write, read_file = READERS[form]
    kept, outcomes = [], Counter()
    for line in mutated_lines(rows, n, seed):
        counts: Counter[str] = Counter()
        with time_limit(5):
            try:
                row = read(parsed(line.strip(), "f:1"), "f:1", counts)
            except InputError as error:
                assert str(error).startswith("f:1: ") and len(str(error)) < 500
                outcomes["refused"] += 1
                continue
        assert max(map(len, counts), default=0) < 200
        dropped = [reason for reason in counts if reason.startswith("dropped: ")]
        assert len(dropped) == (row is None)
        outcomes["dropped" if row is None else "kept"] += 1
        kept += [] if row is None else [row]
    assert min(outcomes[name] for name in ("refused", "dropped", "kept")) > n / 100, outcomes
    for suffix in (".jsonl", ".jsonl.gz", ".parquet", ""):
        write(tmp_path / f"rows{suffix}", kept)
        counts = Counter()
        again = read_file(tmp_path / f"rows{suffix}", counts=counts)
        assert not counts
        assert list(map(module.to_record, again)) == list(map(module.to_record, kept))
    assert run_command("check", tmp_path / "rows.jsonl")[0] == 0


@pytest.mark.parametrize(("seed", "n"), [(0, 20), *(pytest.param(s, 300, marks=pytest.mark.slow) for s in (1, 2))])
@pytest.mark.parametrize("form", READERS)
def test_check_answers_whatever_a_file_holds(tmp_path, form, seed, n):
    rows = READERS[form][0]

    def check(rng: random.Random) -> None:
        lines = [json.dumps(row).encode() for row in rows]
        lines[rng.randrange(len(lines))] = mutated_lines(rows, 1, rng.randrange(2**32))[0]
        (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
        run_command("check", tmp_path / "rows.jsonl", seconds=10)

    fuzzing.each(n, check, seed)


@pytest.mark.parametrize(("seed", "n"), [(0, 40), pytest.param(1, 1500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.parquet", "rows"])
def test_a_damaged_file_is_read_or_refused_in_one_line(tmp_path, name, seed, n):
    made = [read_row(SCORED[0] | {"group": str(i)}, "f:1", Counter()) for i in range(30)]
    write_trajectories(tmp_path / name, made)
    whole = tmp_path / "whole"
    (tmp_path / name).rename(whole)

    def check(rng: random.Random) -> None:
        copy = tmp_path / name
        if whole.is_dir():
            shutil.copytree(whole, copy)
            file = rng.choice(sorted(copy.iterdir()))
            content = file.read_bytes()
        else:
            file, content = copy, whole.read_bytes()
        kind = rng.randrange(10)
        if kind == 0:
            content = b""
        elif kind == 1 and file.suffix == ".json":
            content = json.dumps(fuzzing.mutated(json.loads(content), rng)).encode()
        else:
            for _ in range(rng.choice((1, 1, 4))):
                content = fuzzing.damaged_bytes(content, rng)
        file.write_bytes(content)
        with time_limit(10):
            try:
                read_trajectories(copy)
            except InputError as error:
                assert str(error).startswith(f"{copy}") and "\n" not in str(error)
        shutil.rmtree(copy) if whole.is_dir() else copy.unlink()

    fuzzing.each(n, check, seed)
