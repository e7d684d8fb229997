"""The log of requests: whole lines only, whatever ended the server before."""

import errno
import json
import os

import pytest

from offline_lmrl.decoding.loop import TokenEvent
from offline_lmrl.errors import InputError
from offline_lmrl.export.server import request_log
from offline_lmrl.export.server.answers import Answer
from offline_lmrl.export.server.engine import Written
from offline_lmrl.export.server.request_log import RequestLog, reply_row
from offline_lmrl.logs.io import read_trajectories
from offline_lmrl.logs.trajectory import Turn


def test_lines_are_appended(tmp_path):
    path = tmp_path / "log.jsonl"
    for i in range(2):
        with RequestLog(str(path)) as log:
            log.write({"i": i, "text": "é\n"})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"i": i, "text": "é\n"} for i in range(2)]


@pytest.mark.parametrize("block", [3, 2**16])
@pytest.mark.parametrize("whole", ["", '{"a": 1}\n', '{"a": 1}\n{"b": 2}\n'])
@pytest.mark.parametrize("torn", ["{", '{"c": "half a te', "x" * 10])
def test_a_torn_last_line_is_removed(tmp_path, monkeypatch, caplog, block, whole, torn):
    monkeypatch.setattr(request_log, "_BLOCK", block)
    path = tmp_path / "log.jsonl"
    path.write_text(whole + torn)
    with RequestLog(str(path)) as log:
        log.write({"d": 4})
    assert path.read_text() == whole + '{"d": 4}\n'
    assert f"removed {len(torn)} bytes of a last line that was not finished" in caplog.text


def test_one_server_writes_a_log(tmp_path):
    with (
        RequestLog(str(tmp_path / "log")),
        pytest.raises(InputError, match="log: found .*, which another server writes"),
    ):
        RequestLog(str(tmp_path / "log"))


def test_a_log_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(InputError, match="expected a path that can be written"):
        RequestLog(str(tmp_path / "missing" / "log"))


def test_a_full_disk_leaves_whole_lines_and_is_said_once(tmp_path, monkeypatch, caplog):
    path = tmp_path / "log.jsonl"
    write = os.write
    with RequestLog(str(path)) as log:
        log.write({"a": 1})
        monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:3]))
        log.write({"b": 2})

        def full(file, data):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "write", full)
        log.write({"c": 3})
        monkeypatch.undo()
        log.write({"d": 4})
    assert path.read_text() == '{"a": 1}\n{"d": 4}\n'
    assert caplog.text.count("requests are answered without it") == 1


@pytest.mark.parametrize(
    "pieces, finished, ids",
    [
        (["a", "b"], "length", [1, 2]),
        (["a", ""], "stop", None),  # by a stop text
        (["a", ""], None, None),  # given up while text was held back
        (["", ""], "stop", None),
        (["", ""], None, None),
    ],
)
def test_every_row_can_be_read_and_has_no_ids_beyond_its_text(tmp_path, pieces, finished, ids):
    ends = [None, finished]
    events = [
        TokenEvent(0, i, -1.0, -1.0, text, end, []) for i, (text, end) in enumerate(zip(pieces, ends, strict=True), 1)
    ]
    answer = Answer([Written(0, event) for event in events])
    row = reply_row([Turn("user", "hi")], answer, {9}, {"id": "x", "served": {"status": 200}}, True)
    path = tmp_path / "served.jsonl"
    path.write_text(json.dumps(row) + "\n")
    if "".join(pieces):
        (read,) = read_trajectories(path)
        assert read.turns[-1].token_ids == (None if ids is None else tuple(ids))
    else:
        assert row == {"id": "x", "served": {"status": 200}}
