"""No command passes on what a terminal would obey: text of logs, of models and of files is printed visibly."""

import json
import re

import pytest
import transformers

from offline_lmrl.cli import main
from offline_lmrl.logs.terminal import visible
from tests.export.test_plain import valued_run

SAID = "\x1b[2J\x1b]0;title\x07 \x9b31m \u202eright to left\u2028 \x7f\r$"
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def test_control_characters_are_spelt_as_json_spells_them():
    assert visible("a\x1b[2J\x9b\u202e\r\ud800") == r"a\u001b[2J\u009b\u202e\u000d\ud800"
    plain = "Zeile\n\ttab, ünïcode, 你好, שלום, 👩‍👧"
    assert visible(plain) == plain
    text = json.dumps([SAID, plain], ensure_ascii=False)
    assert json.loads(visible(text)) == [SAID, plain] and not OBEYED.search(visible(text))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    transformers.logging.disable_progress_bar()  # as a shell without a terminal has it
    return str(valued_run(tmp_path_factory.mktemp("run") / "run", beta=0.0))


@pytest.fixture
def logs(tmp_path):
    messages = [{"role": "user", "content": SAID}, {"role": "assistant", "content": SAID, "reward": 1.0}]
    rows = [{"messages": messages, "group": SAID}, {"messages": [{**messages[0], "content": [{"type": SAID}]}]}]
    (tmp_path / "logs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "logs.jsonl")


def printed(capsys, *arguments, rc=0):
    assert main([*arguments]) == rc
    out, err = capsys.readouterr()
    assert not OBEYED.search(out) and not OBEYED.search(err)
    return out + err


def test_check_and_show_print_logs_visibly(run, logs, capsys):
    assert "u001b" in printed(capsys, "check", logs, "--tokenizer", run)
    assert r"user: \u001b[2J\u001b]0;title\u0007 \u009b31m \u202eright" in printed(
        capsys, "evaluate", "logs", run, "--data", logs, "--show", "1"
    )
    printed(capsys, "evaluate", "logs", run, "--data", logs)


def test_check_prints_comparisons_visibly(tmp_path, capsys):
    row = {"prompt": SAID, "chosen": SAID, "rejected": "b", "source": SAID}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    printed(capsys, "check", str(tmp_path / "pairs.jsonl"))


def test_generate_prints_rows_that_say_the_same_as_its_file(run, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text(f"{SAID.strip()}\nhello\n".replace("\r", ""))
    arguments = ["generate", run, "--prompts", str(tmp_path / "prompts.txt"), "--n", "8"]
    assert main([*arguments, "--output", str(tmp_path / "out.jsonl")]) == 0
    capsys.readouterr()
    assert main(arguments) == 0
    out = capsys.readouterr().out
    written = (tmp_path / "out.jsonl").read_text().strip("\n").split("\n")
    assert not OBEYED.search(out)
    assert list(map(json.loads, out.splitlines())) == list(map(json.loads, written))
    assert "\\u009b" in out


def test_errors_and_talk_are_visible(run, capsys, monkeypatch):
    assert r"\u001b[2J" in printed(capsys, "check", "x\x1b[2J\x9b.jsonl", rc=2)
    asked = iter(["hello", SAID, "you"])

    def ask(prompt):
        try:
            return next(asked)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", ask)
    printed(capsys, "generate", run, "--chat", "--max_new_tokens", "64")
