"""What people see of a training: a table on a terminal, lines elsewhere, a summary; nothing on other processes."""

import io

import pytest
from rich.console import Console

from offline_lmrl.logs import terminal
from offline_lmrl.training.display import TrainingDisplay, brief
from offline_lmrl.training.metrics import append_metrics
from tests.training.test_trainer import logs, trainer


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (7.2444, "7.24"), (-0.0177, "-.0177"), (-1.2345e-4, "-1.2e-4"), (123456.0, "1.23e5"), (10.0, "10"),
     (None, ""), (float("nan"), "nan"), (-float("inf"), "-inf"), (0.5, ".5")],
)  # fmt: skip
def test_numbers_are_short(value, text):
    assert brief(value) == text and len(brief(value)) <= 7


def display(width=80, is_terminal=True):
    shown = TrainingDisplay(shown=True)
    shown.console = Console(file=io.StringIO(), width=width, force_terminal=is_terminal, color_system=None)
    return shown


ROWS = [
    (2, {"loss": 7.0, "loss/q": 0.5, "loss/conservative": 2.0, "learning_rate": 1e-3, "epoch": 1.0}),
    (4, {"eval_loss": 6.0, "eval_loss/q": 0.25, "eval_runtime": 1.0, "epoch": 1.0}),
    (4, {"environment/score": 0.5}),
    (4, {"train_runtime": 3.0, "train_loss": 1.0}),
]


def test_a_terminal_gets_a_table_with_held_out_rows_in_the_same_columns():
    shown = display()
    for step, row in ROWS:
        shown.show(step, row)
    assert [line.split() for line in shown.console.file.getvalue().splitlines()] == [
        ["loss", "loss", "loss"],
        ["step", "q", "conservative"],
        ["2", "7", ".5", "2"],
        ["4", "eval", "6", ".25"],
        ["4:", "environment/score", ".5"],
    ]


def test_what_does_not_fit_is_left_out_and_every_line_fits():
    shown = display(width=26)
    shown.show(*ROWS[0])
    lines = shown.console.file.getvalue().splitlines()
    assert "7" in lines[-1].split() and max(map(len, lines)) <= 26


def test_a_pipe_gets_a_line_per_row_with_every_metric():
    shown = display(is_terminal=False)
    shown.steps = 4
    for step, row in ROWS:
        shown.show(step, row)
    assert shown.console.file.getvalue().splitlines() == [
        "step 2 of 4: loss 7, loss/q .5, loss/conservative 2",
        "step 4 of 4 (held-out data): loss 6, loss/q .25",
        "step 4 of 4: environment/score .5",
    ]


def test_the_summary_is_that_of_the_whole_run(tmp_path):
    for step, loss in ((2, 7.0), (4, 3.5)):
        append_metrics(tmp_path, {"step": step, "loss": loss})
        append_metrics(tmp_path, {"step": step, "eval_loss": loss / 2})
    append_metrics(tmp_path, {"step": 4, "train_runtime": 1.0, "train_loss": 5.0})
    shown = display()
    shown.summarise(tmp_path)
    text = shown.console.file.getvalue()
    assert text.splitlines()[-1].split() == ["loss", "7", "→", "3.5", "3.5", "→", "1.75"]


def test_one_bar_is_shown_below_the_other(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    console = Console(file=io.StringIO(), force_terminal=True)
    with terminal.progress_bar("outer", 2, console), terminal.progress_bar("inner", 3) as inner:
        (bar,) = terminal._live
        inner(1, 3)
        assert [(task.description, task.completed) for task in bar.tasks] == [("outer", 0), ("inner", 1)]
    assert terminal._live == [] and list(terminal.tracked(iter("abc"), "letters", 3)) == ["a", "b", "c"]


def test_other_processes_show_nothing(capsys, tmp_path):
    append_metrics(tmp_path, {"step": 1, "loss": 1.0})
    shown = TrainingDisplay(shown=False)
    with shown.training(0, 1):
        shown.show(1, {"loss": 1.0})
    shown.summarise(tmp_path)
    shown.advise(tmp_path, ["generate {run}"])
    assert capsys.readouterr() == ("", "")


def test_python_shows_what_the_command_line_shows(tmp_path, capsys):
    run = trainer(tmp_path, logging_steps=3, disable_tqdm=False, held_out=logs(3))
    run.train()
    run.save_model()
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(": loss ")[0] for line in lines[:3]] == [
        "step 3 of 6", "step 6 of 6", "step 6 of 6 (held-out data)"
    ]  # fmt: skip
    assert f"{tmp_path}: the model is saved; next:" in lines
    assert lines[-1] == f"  offline-lmrl plot {tmp_path}"
