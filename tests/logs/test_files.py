"""Outputs are whole or absent, folders are held by one process, and what a kill left is removed or put back."""

import fcntl
import os
import signal

import pytest
import torch
from safetensors.torch import save_file

from offline_lmrl.errors import InputError
from offline_lmrl.logs.files import differences, locked, reading, say_differences, staging, sweep, writing
from offline_lmrl.logs.io import atomic_output
from offline_lmrl.tokens.tokenizers import train_tokenizer


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def in_child(work):
    """Runs `work` in a forked process, which then waits to be killed; its id, once `work` is done."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            work(lambda: (os.write(writer, b"."), signal.pause()))
        finally:
            os._exit(1)
    assert os.read(reader, 1) == b"."
    return child


def kill(child):
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path):
    def hold(wait):
        with locked(tmp_path / "run"):
            wait()

    child = in_child(hold)
    with pytest.raises(
        InputError, match="run: found another command at work in this folder, expected only one at a time"
    ):
        with locked(tmp_path / "run"):
            pass
    kill(child)
    with locked(tmp_path / "run"), locked(tmp_path / "run"):  # this process may take it twice
        assert not names(tmp_path / "run")


def test_a_forked_child_does_not_keep_the_folder_of_a_killed_parent(tmp_path):
    with locked(tmp_path / "run"):
        child = in_child(lambda wait: wait())
    with locked(tmp_path / "run"):
        kill(child)


def test_a_folder_made_for_nothing_is_gone(tmp_path):
    with pytest.raises(ValueError), locked(tmp_path / "a" / "b"):
        raise ValueError
    assert not names(tmp_path)


def test_what_a_killed_write_left_is_removed_by_the_next_one_there(tmp_path):
    def write(wait):
        with atomic_output(tmp_path / "rows.jsonl") as temporary:
            temporary.write_text("half")
            wait()

    child = in_child(write)
    (tmp_path / "rows.jsonl").write_text("old")
    with atomic_output(tmp_path / "rows.jsonl") as temporary:  # the other one is still at work
        temporary.write_text("mine")
    assert len(names(tmp_path)) == 2
    kill(child)
    with atomic_output(tmp_path / "rows") as temporary:  # another output
        temporary.write_text("mine")
    assert len(names(tmp_path)) == 3
    with atomic_output(tmp_path / "rows.jsonl") as temporary:
        temporary.write_text("new")
    assert names(tmp_path) == ["rows", "rows.jsonl"] and (tmp_path / "rows.jsonl").read_text() == "new"


@pytest.mark.parametrize("there", [True, False])
def test_what_was_moved_aside_is_put_back_where_nothing_took_its_place(tmp_path, there):
    for left in (".ds.12.old", ".other.abcd_123.tmp/replaced"):
        (tmp_path / left).mkdir(parents=True)
        (tmp_path / left / "rows").write_text("the only copy")
    if there:
        (tmp_path / "ds").mkdir()
        (tmp_path / "other").mkdir()
    (tmp_path / ".notes.old").write_text("of somebody else")
    sweep(tmp_path)
    assert names(tmp_path) == [".notes.old", "ds", "other"]
    assert [(tmp_path / name / "rows").exists() for name in ("ds", "other")] == [not there] * 2


def test_a_staging_folder_is_held_and_then_gone(tmp_path):
    with staging(tmp_path / "out") as folder:
        sweep(tmp_path)
        assert folder.exists()
    assert not names(tmp_path)


WRITERS = {
    "python": lambda: open("/dev/full", "w").write("x" * 10**5),
    "torch": lambda: torch.save(torch.zeros(10**5), "/dev/full"),
    "safetensors": lambda: save_file({"x": torch.zeros(8)}, "/nowhere/x.safetensors"),
    "tokenizers": lambda: train_tokenizer(["a b"], 270).backend_tokenizer.save("/dev/full"),
}


@pytest.mark.parametrize("library", WRITERS)
def test_whatever_a_library_says_of_a_full_disk_is_one_line_with_the_path(library):
    with pytest.raises(InputError, match="^out: found [^\n]*, expected a path that can be written$") as caught:
        with writing("out"):
            WRITERS[library]()
    assert ("No space left on device" in str(caught.value)) == (library in ("python", "tokenizers"))


def test_an_error_of_another_kind_is_not_one_of_writing():
    with pytest.raises(RuntimeError, match="shapes"), writing("out"):
        raise RuntimeError("shapes differ")


def test_a_damaged_file_is_one_line_that_names_it():
    with pytest.raises(InputError, match=r"^x.pt: found a damaged file \(EOFError\), expected another one$"):
        with reading("x.pt", "another one"):
            raise EOFError


def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, caplog):
    def flock(descriptor, how):
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", flock)
    (tmp_path / ".rows.1.tmp").mkdir()
    with locked(tmp_path), atomic_output(tmp_path / "rows") as temporary:
        temporary.write_text("mine")
    assert names(tmp_path) == [".rows.1.tmp", "rows"]  # it may be somebody's
    assert (
        "this folder or file cannot be locked (Bad file descriptor); run only one command at a time there"
        in caplog.text
    )


def test_all_differences_are_named():
    found = {"a": {"x": 1, "y": [1, 2]}, "more": 1}
    expected = {"a": {"x": 2, "y": [1, 3], "z": None}, "b": "new"}
    assert differences(found, expected) == {"a.x": (1, 2), "a.y.1": (2, 3), "b": (None, "new")}
    assert say_differences({"a": 1}, {"a": 2, "b": 3}) == "a: found 1, expected 2; b: found None, expected 3"
