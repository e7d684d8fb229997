"""`plot` draws every metric of every run, in training and of held-out data."""

import pytest

from offline_lmrl.cli import main
from offline_lmrl.comparison.curves import curves_of, draw_curves
from offline_lmrl.comparison.measure import training_curve
from offline_lmrl.training.metrics import append_metrics

ROWS = [
    {"step": 2, "loss": 7.0, "loss/policy": 6.0, "learning_rate": 1e-3, "epoch": 0.5},
    {"step": 2, "eval_loss": 6.5, "eval_loss/policy": 5.5, "eval_runtime": 1.0},
    {"step": 4, "loss": float("nan"), "loss/policy": 5.0},
    {"step": 4, "environment/score": 0.5, "environment/score_low": 0.2, "environment/score_high": 0.8},
    {"step": 4, "train_runtime": 3.0, "train_loss": 1.0},
]


def test_curves_are_those_of_the_rows():
    assert curves_of(ROWS) == {
        "loss": {False: [(2, 7.0)], True: [(2, 6.5)]},
        "loss/policy": {False: [(2, 6.0), (4, 5.0)], True: [(2, 5.5)]},
        "environment/score": {False: [(4, 0.5)]},
        "environment/score_low": {False: [(4, 0.2)]},
        "environment/score_high": {False: [(4, 0.8)]},
    }


def test_every_metric_has_a_panel_and_every_run_a_colour():
    figure = draw_curves({"a": ROWS, "b": ROWS[:1]})
    assert [axes.get_title() for axes in figure.axes] == ["loss", "loss/policy", "environment/score"]
    lines = {axes.get_title(): [line.get_xydata().tolist() for line in axes.lines] for axes in figure.axes}
    assert lines["loss/policy"] == [[[2, 6], [4, 5]], [[2, 5.5]], [[2, 6]]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b", "held-out data"]


def test_the_command_writes_beside_the_run_or_where_it_is_told(tmp_path, capsys):
    for name in "ab":
        for row in ROWS:
            append_metrics(tmp_path / name, row)
    assert main(["plot", str(tmp_path / "a")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'a' / 'curves.png'}\n"
    assert (tmp_path / "a" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert main(["plot", *(str(tmp_path / name) for name in "ab"), "--output", str(tmp_path / "both.svg")]) == 0
    assert "<svg" in (tmp_path / "both.svg").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a", "b"], "output: missing, expected the file for the curves of 2 runs"),
        (["a", "--output", "a.pdf"], "output: found a.pdf, expected a file that ends in .png or .svg"),
        (["nowhere"], "nowhere: found no metrics.jsonl, expected the folder of a run"),
        (["empty"], "empty: found no metrics of training steps, expected some; train longer"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    append_metrics("a", ROWS[0])
    append_metrics("b", ROWS[0])
    append_metrics("empty", ROWS[-1])
    assert main(["plot", *words]) == 2
    assert capsys.readouterr().err == f"error: {said}\n"


def test_the_report_gets_the_loss_of_agent_tokens():
    assert training_curve(ROWS) == [
        {"step": 2, "loss": 6.0}, {"step": 2, "held_out": 5.5}, {"step": 4, "loss": 5.0}
    ]  # fmt: skip
    assert training_curve([{"step": 1, "loss": 2.0}, {"step": 1, "eval_loss": 3.0}]) == [
        {"step": 1, "loss": 2.0}, {"step": 1, "held_out": 3.0}
    ]  # fmt: skip
    assert training_curve([{"step": 1, "loss": 2.0, "environment_steps": 5}]) == []
