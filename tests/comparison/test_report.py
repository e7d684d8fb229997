import json

import pytest
from rich.console import Console

from offline_lmrl.comparison.report import table, terminal_table
from offline_lmrl.errors import InputError

COMPARISON = {"kind": "comparison", "baseline": "bc", "labels": None}


def run(method, seed, cells, decode="sampled", beta=0.0, chosen=None, **changes):
    total, count = sum(cell[1] for cell in cells), sum(cell[2] for cell in cells)
    row = {
        "kind": "run",
        "method": method,
        "seed": seed,
        "decode": decode,
        "beta": beta,
        "beta_chosen": chosen,
        "score": total / count,
        "n": count,
        "normalised": None,
        "labels": {},
        "turns": 2.0,
        "tokens": 10.0,
        "invalid_rate": 0.0,
        "regime": "labels only",
        "cells": cells,
        "config": {},
        "cost": {"training_tokens": 1_234_567, "training_seconds": 60.0, "generated_tokens": 900},
    }
    return row | changes


def columns(text):
    """Table lines as dicts by column name."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def test_a_method_is_one_line_over_its_seeds():
    rows = [COMPARISON, run("bc", 0, [["a", 1.0, 1], ["b", 3.0, 1]]), run("bc", 1, [["a", 3.0, 1], ["b", 5.0, 1]])]
    (line,) = columns(table(rows))
    assert line["method"] == "bc" and line["decoding"] == "sampled" and line["episodes"] == "4"
    assert line["score [95%]"].startswith("3.00 [") and line["per seed"] == "2.00 4.00"
    assert line["training tokens"] == "1.23M" and line["generated"] == "900"


def test_every_seeds_value_is_printed_below_five_seeds_only():
    rows = [COMPARISON, *(run("bc", seed, [["a", 1.0 * seed, 1]]) for seed in range(5))]
    assert "per seed" not in table(rows)
    assert columns(table(rows[:-1]))[0]["per seed"] == "0.00 1.00 2.00 3.00"


def test_the_difference_is_paired_and_starred_where_it_excludes_zero():
    noisy = [[str(i), 10.0 * (-1) ** i, 1] for i in range(20)]
    better = [[name, score + 1.0, 1] for name, score, _ in noisy]
    mixed = [[name, score + (-1) ** (i // 2), 1] for i, (name, score, _) in enumerate(noisy)]
    scores = {"bc": noisy, "ilql": better, "other": mixed}
    rows = [COMPARISON, *(run(method, seed, cells) for method, cells in scores.items() for seed in (0, 1))]
    bc, ilql, other = columns(table(rows))
    assert bc["minus bc"] == "" and ilql["minus bc"] == "1.00 [1.00, 1.00]*"
    assert other["minus bc"].startswith("0.00 [-") and not other["minus bc"].endswith("*")


def test_one_seed_is_a_run_and_calls_no_method_better():
    cells = {"bc": [["a", 1.0, 1], ["b", 2.0, 1]], "ilql": [["a", 5.0, 1], ["b", 6.0, 1]]}
    line = columns(table([COMPARISON, *(run(method, 0, cells[method]) for method in cells)]))[-1]
    # t of two clusters: 5.5 ± 12.706 · .5
    assert line["score [95%]"] == "5.50 [-0.85, 11.85] of this run"
    assert line["minus bc"] == "4.00 [4.00, 4.00] of this run"


def test_greedy_play_is_compared_with_greedy_play():
    cells = {("bc", "sampled"): 1.0, ("bc", "greedy"): 4.0, ("ilql", "greedy"): 5.0}
    rows = [COMPARISON]
    for (method, decode), score in cells.items():
        beta = (8.0, "offline") if method == "ilql" else ()
        rows += [run(method, seed, [["a", score, 1], ["b", score, 1]], decode, *beta) for seed in (0, 1)]
    line = columns(table(rows))[-1]
    assert line["beta"] == "8 (offline)" and line["minus bc"] == "1.00 [1.00, 1.00]*"


def test_betas_that_differ_between_seeds_are_all_shown_and_marked():
    rows = [
        COMPARISON,
        run("ilql", 0, [["a", 1.0, 1]], beta=4.0, chosen="returns"),
        run("ilql", 1, [["a", 1.0, 1]], beta=16.0, chosen="returns"),
    ]
    assert columns(table(rows))[0]["beta"] == "4/16 (returns)"


def test_behaviour_optimum_and_published_rows_stand_around_the_methods():
    rows = [
        COMPARISON | {"labels": ["agreement"]},
        {
            "kind": "behaviour",
            "method": "behaviour",
            "score": 5.0,
            "interval": [4.0, 6.0],
            "labels": {"agreement": 0.8},
        },
        {"kind": "optimum", "method": "optimum", "score": 9.0, "labels": {}},
        run("bc", 0, [["a", 5.0, 1]], labels={"agreement": 0.75, "side": 0.5}),
        {"kind": "published", "method": "RL", "score": 7.1, "labels": {"agreement": 0.899}},
    ]
    text = table(rows)
    assert [line["method"] for line in columns(text)] == ["behaviour", "optimum", "bc", "RL (published)"]
    assert [line["agreement"] for line in columns(text)] == ["0.8", "", "0.75", "0.899"]
    assert columns(text)[0]["score [95%]"] == "5.00 [4.00, 6.00]" and "side" not in text


def printed(rows, width=100):
    """Lines of the table as a terminal of this width shows them."""
    console = Console(width=width)
    with console.capture() as captured:
        console.print(terminal_table(rows))
    return [line.rstrip() for line in captured.get().splitlines()]


def test_the_table_of_the_terminal_has_the_columns_that_decide():
    cost = {"training_tokens": 1_234_567, "training_seconds": 60.0, "generated_tokens": 900, "environment_steps": 500}
    rows = [
        COMPARISON,
        {"kind": "behaviour", "method": "behaviour", "score": 0.5, "interval": [0.25, 0.75], "labels": {"side": 0.3}},
        *(run("bc", seed, [["a", 1.0, 1], ["b", 1.0, 1]]) for seed in (0, 1)),
        *(run("ilql", seed, [["a", 3.0, 1], ["b", 3.0, 1]], beta=4.0, chosen="offline", cost=cost) for seed in (0, 1)),
        {"kind": "published", "method": "RL", "score": 7.1, "labels": {}},
        {"kind": "published", "method": "of labels alone", "labels": {"side": 0.5}},
    ]
    assert printed(rows) == [
        "method          decoding  β            score [95%]        minus bc            cost",
        "behaviour                              0.50 [0.25, 0.75]",
        "bc              sampled                1.00 [1.00, 1.00]                      1.23M",
        "ilql            sampled   4 (offline)  3.00 [3.00, 3.00]  2.00 [2.00, 2.00]*  1.23M + 500",
        "RL (published)                         7.10",
        "Cost: tokens read in training + environment steps. All columns: table.md and report.",
    ]


def test_the_table_of_the_terminal_fits_and_cuts_no_text():
    cells = [["a", -50.0, 1], ["b", -120.0, 1]]
    name, wide = "return_conditioned_from_ilql_with_a_long_name", "a name wider than a terminal " * 4
    rows = [
        COMPARISON,
        {"kind": "behaviour", "method": "behaviour (85% of the logs are cut)", "score": -44.2, "labels": {}},
        run("bc", 0, cells),
        *(run(method, 0, cells, beta=16.0, chosen="returns") for method in (name, wide, "\x1b[2J[bold]")),
    ]
    for width in (100, 80):
        lines = printed(rows, width)
        assert max(map(len, lines)) <= width
        column = lines[0].index("decoding")
        methods = "".join(line[:column].strip() for line in lines[1:])
        for text in (name, wide.replace(" ", ""), "behaviour(85%ofthelogsarecut)", "\\u001b[2J[bold]"):
            assert text in methods.replace(" ", "")
    assert "-85.0 [-529.7, 359.7]" in " ".join(printed(rows, 200))  # t of two clusters: 12.706 · 35; one decimal
    assert printed(rows, 200)[-1].endswith("With one training seed, an interval describes that run.")


def test_the_table_is_drawn_from_the_file_alone(tmp_path):
    rows = [COMPARISON, run("bc", 0, [["a", 1.0, 1]], normalised=50.0)]
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert table(path) == table(rows)
    assert columns(table(path))[0]["normalised"] == "50.0"
    assert len({len(line) for line in table(path).splitlines()}) == 1  # aligned


def test_a_broken_results_file_names_the_line(tmp_path):
    (tmp_path / "results.jsonl").write_text('{"kind": "comparison"}\n{"kind": ')
    with pytest.raises(InputError, match="results.jsonl:2: found"):
        table(tmp_path / "results.jsonl")


@pytest.mark.parametrize("line", ["[]", '"no"', "{}", '{"kind": "run"}', '{"kind": ["run"]}', "{", "\xff"])
def test_a_damaged_row_of_results_is_one_line(tmp_path, line):
    path = tmp_path / "results.jsonl"
    path.write_bytes((json.dumps(COMPARISON) + "\n" + line).encode("latin-1"))
    with pytest.raises(InputError, match="results.jsonl(:2)?: .*found .*, expected "):
        table(path)
