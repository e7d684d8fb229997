import pytest

from data_prep.source import prepared, write_json
from offline_lmrl.errors import InputError
from offline_lmrl.logs.io import is_prepared


def write(folder, text):
    (folder / "train.jsonl").write_text(text)
    (folder / "validation.jsonl").write_text(text)
    write_json(folder / "report.json", {})


def test_a_data_set_comes_whole_with_its_report_last(tmp_path):
    for text in ("old", "new"):
        with prepared(tmp_path / "out") as folder:
            write(folder, text)
        assert (tmp_path / "out" / "validation.jsonl").read_text() == text
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "report.json",
        "train.jsonl",
        "validation.jsonl",
    ]


def test_an_error_leaves_what_was_there(tmp_path):
    with prepared(tmp_path) as folder:
        write(folder, "old")
    with pytest.raises(InputError, match="out: found X"), prepared(tmp_path / "out") as folder:
        raise InputError(f"{folder}: found X")  # a file on its way is called by where it was to go
    with pytest.raises(ValueError), prepared(tmp_path) as folder:
        (folder / "train.jsonl").write_text("half")
        raise ValueError
    assert (tmp_path / "train.jsonl").read_text() == "old" and is_prepared(tmp_path / "train.jsonl", tmp_path)


def test_a_folder_without_its_report_is_not_finished(tmp_path):
    data, elsewhere = tmp_path / "out" / "train.jsonl", tmp_path / "mine.jsonl"
    assert not is_prepared(data, tmp_path / "out")
    data.parent.mkdir()
    data.write_text("")
    elsewhere.write_text("")
    assert not is_prepared(data, tmp_path / "out") and is_prepared(elsewhere, tmp_path / "out")
    (tmp_path / "out" / "report.json").write_text("{}")
    assert is_prepared(data, tmp_path / "out") and is_prepared(tmp_path / "out", tmp_path / "out")
