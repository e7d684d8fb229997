import json
import re
import shutil
import sys
from html.parser import HTMLParser

import pytest

from offline_lmrl.cli.main import main
from offline_lmrl.comparison.compare import print_table
from offline_lmrl.comparison.page import write_report
from offline_lmrl.errors import InputError

METHODS = {"bc": None, "ilql": "bc", "asked": "bc", "ppo": "bc"}
METHOD = {
    "algorithm": "bc",
    "model": {},
    "args": {},
    "decoding": {},
    "planner": None,
    "betas": None,
    "value_model": None,
    "run_of": None,
}
CONFIG = {
    "environment": {"name": "gamble"},
    "data": {"train": "train.jsonl", "validation": None},
    "model": {"vocab_size": 9},
    "args": {"learning_rate": 0.25},
    "partner": None,
    "evaluation": {"episodes": 4},
    "seeds": [0, 1],
    "methods": {name: METHOD | {"start_from": start, "args": {"max_steps": 7}} for name, start in METHODS.items()},
}
MADE = {"command": "offline-lmrl compare gamble", "commit": None, "versions": {"torch": "2.7"}}
MADE["machine"] = {"cores": 2}
# What every episode of a seed scores: all alike, so that every interval is a point.
SCORES = {"bc": 1.0, "ilql": 3.0, "asked": 1.5, "ppo": 3.0}
READ = {"bc": 615_000, "ilql": 1_230_000, "asked": 1_845_000, "ppo": 1_230_000}  # training tokens
TURNS = [["user", "safe or <gamble>?"], ["assistant", "safe & sound"], ["environment", "over"]]


def run(method, seed, decode="sampled", chosen=None, **changes):
    score = SCORES[method] + 0.25 * (chosen == "returns")
    play = {"environment_steps": 500, "reward_queries": 400, "played_tokens": 900} if method == "ppo" else {}
    tried = [{"beta": b, "score": score, "interval": [score, score], "kl": b / 4} for b in (1.0, 4.0)]
    row = {
        "kind": "run", "method": method, "algorithm": "bc", "seed": seed, "decode": decode, "beta": 4.0,
        "beta_chosen": chosen, "betas_tried": tried if chosen == "returns" else None, "score": score, "n": 4,
        "normalised": None, "turns": 2.0, "tokens": 12.0 if method == "ilql" else 10.0,
        "labels": {"ask": {"sampled": 2.0, "greedy": 1.0}[decode]} if method == "asked" else {},
        "invalid_rate": 0.0, "regime": "environment" if method == "ppo" else "labels only",
        "cells": [["a", 2 * score, 2], ["b", 2 * score, 2]], "scores": [[score] * 2, [score] * 2],
        "kl": 0.5 if decode == "sampled" else None,
        "calibration": [{"q": q, "return_to_go": 2 * q, "n": 5} for q in (1.0, 2.0)] if chosen == "offline" else None,
        "curve": [{"environment_steps": s, "reward_queries": s, "score": 2.0, "kl": 1.0} for s in (0, 100, 500)]
        if method == "ppo" else [],
        "samples": [{"seed": 77, "score": score, "turns": TURNS}] if seed == 0 else [],
        "cost": {"training_tokens": READ[method], "training_seconds": 61.0, "generated_tokens": 40,
                 "selection_tokens": 0, **play},
        "made": MADE,
        "config": {"environment": CONFIG["environment"], "data": {"train": "12ab"}, "partner": None,
                   "evaluation": CONFIG["evaluation"], "method": [{"algorithm": "bc", "args": {"max_steps": 7}}]},
    }  # fmt: skip
    return row | changes


def results():
    runs = []
    for seed in (0, 1):
        for decode in ("sampled", "greedy"):
            runs += [
                run("bc", seed, decode),
                run("ilql", seed, decode, "offline"),
                run("ilql", seed, decode, "returns"),
                run("asked", seed, decode),
            ]
        runs.append(run("ppo", seed))
    return [
        {"kind": "comparison", "baseline": "bc", "labels": None, "config": CONFIG},
        {"kind": "behaviour", "method": "behaviour", "score": 0.5, "interval": [0.25, 0.75], "labels": {}},
        {"kind": "optimum", "method": "optimum", "score": 5.0, "labels": {}},
        *runs,
        {"kind": "published", "method": "PPO", "score": 4.0, "labels": {}},
    ]


def write(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def contents(report):
    return {str(path.relative_to(report)): path.read_bytes() for path in report.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return write_report(write(tmp_path_factory.mktemp("drawn"), results()))


@pytest.fixture
def plain(monkeypatch):
    """No matplotlib, as without the extra: most of a report needs none."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def test_a_report_drawn_again_from_the_rows_alone_is_the_same_byte_for_byte(drawn, tmp_path):
    before = contents(drawn)
    assert {"report.md", "report.html", "manifest.json", "results.jsonl", "figures/score.svg"} <= set(before)
    shutil.copytree(drawn, tmp_path / "sent")  # a report that was sent to someone is drawn where it lies
    (tmp_path / "sent" / "report.html").unlink()
    (tmp_path / "sent" / "figures" / "of_rows_that_have_gone.svg").write_text("")
    assert write_report(tmp_path / "sent") == tmp_path / "sent"
    assert contents(tmp_path / "sent") == before


def test_every_figure_that_the_rows_give_is_drawn_twice_and_the_rest_named(drawn):
    names = {
        "score",
        "kl",
        "environment_steps",
        "reward_queries",
        "training_tokens",
        "generated_tokens",
        "asked",
        "calibration",
        "wins",
        "wins_greedy",
    }
    files = {f"{name}.{end}" for name in names for end in ("svg", "png")}
    assert {path.name for path in (drawn / "figures").iterdir()} == files
    text, page = (drawn / "report.md").read_text(), (drawn / "report.html").read_text()
    not_drawn = text.partition("Figures not drawn")[2].partition("##")[0]
    assert re.findall(r"- ([^:]+):", not_drawn) == [
        "Loss in training",
        "Proxy and gold score against √KL",
        "Data quality × method",
        "Accuracy and calibration of a reward model",
        "Accuracy against coverage",
    ]
    for name in names:
        assert f"(figures/{name}.svg)" in text and f'id="{name}-figure_1"' in page


class Page(HTMLParser):
    """Checks that elements close in order; keeps what refers to something, and ids."""

    def __init__(self):
        super().__init__()
        self.open, self.references, self.ids, self.tags = [], [], [], set()

    def handle_starttag(self, tag, attributes, closed=False):
        self.tags.add(tag)
        if not closed and tag not in ("meta", "br"):
            self.open.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "srcset", "action"):
                self.references.append(value)
            if name == "id":
                self.ids.append(value)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes, closed=True)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_parses_and_refers_to_nothing_outside_itself(drawn):
    text, page = (drawn / "report.html").read_text(), Page()
    page.feed(text)
    assert page.open == [] and {"main", "figure", "table", "details", "svg"} <= page.tags
    assert not {"script", "link", "img", "iframe", "object"} & page.tags and "@import" not in text
    inside = [*page.references, *re.findall(r"url\(([^)]*)\)", text)]
    assert inside and all(value.startswith("#") and value[1:] in page.ids for value in inside)
    assert len(page.ids) == len(set(page.ids))
    assert 'name="viewport"' in text and "prefers-color-scheme: dark" in text
    assert "safe or &lt;gamble&gt;?" in text and "<gamble>" not in text


def lines_of(text, heading):
    """Lines of the first table below a heading, as dicts."""
    table = re.search(r"(?:^\|.*\n)+", text.partition(f"# {heading}")[2], re.MULTILINE)[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return [dict(zip(cells[0], line, strict=True)) for line in cells[2:]]


def test_numbers_are_those_of_the_rows(drawn):
    text = (drawn / "report.md").read_text()
    found = {line["method"]: line for line in lines_of(text, "Results")}
    assert found["ilql, greedy, β offline"] == {
        "method": "ilql, greedy, β offline",
        "score [95%]": "3.00 [3.00, 3.00]",
        "beta": "4 (offline)",
        "per seed": "3.00 3.00",
        "minus bc": "2.00 [2.00, 2.00]*",
        "seeds": "0 1",
        "regime": "labels only",
        "agent turns": "2.0",
        "invalid": "0.0%",
        "episodes": "8",
        "ask": "",
    }
    assert found["ilql, sampled, β by returns"]["score [95%]"] == "3.25 [3.25, 3.25]"
    assert found["behaviour"]["score [95%]"] == "0.50 [0.25, 0.75]"
    assert found["PPO (published)"]["score [95%]"] == "4.00"
    cost = {line["method"]: line for line in lines_of(text, "Cost")}
    assert set(cost) == set(found) - {"behaviour", "optimum", "PPO (published)"}
    ppo = cost["ppo, sampled"]
    assert (ppo["training tokens"], ppo["training s"], ppo["environment steps"], ppo["reward queries"]) == (
        "1.23M",
        "61",
        "500",
        "400",
    )
    assert (ppo["seeds"], ppo["regime"], ppo["generated"], ppo["played tokens"]) == ("0 1", "environment", "40", "900")
    (sampled, _) = lines_of(text, "β chosen offline against")
    assert sampled["by returns minus offline [95%]"] == "0.25 [0.25, 0.25]" and sampled["β by returns"] == "4 4"
    wins = {line[""]: line for line in lines_of(text, "Win rates, sampled")}
    # all alike: Wilson of two clusters, from 2 / (2 + 3.8415)
    assert wins["ilql, sampled, β offline"]["bc, sampled"] == "1.00 [0.34, 1.00]"
    assert wins["ppo, sampled"]["ilql, sampled, β offline"].startswith("0.50 [0.01, 0.99")  # ties; t of 1 is 12.7
    assert wins["ppo, sampled"]["ilql, sampled, β by returns"] == "0.00 [0.00, 0.66]"


def test_the_first_lines_say_which_method_at_what_cost_and_how_sure(drawn):
    text = (drawn / "report.md").read_text().partition("![")[0]
    assert "without a β chosen by returns: ilql, sampled, β offline: 3.00 [3.00, 3.00] over 8 episodes, 2 tr" in text
    assert "Its training data: labels only. Its cost: 1.23M training tokens, 61 training s." in text
    assert "Its difference from bc, sampled: 2.00 [2.00, 2.00], better: the paired interval excludes 0." in text
    assert "Not distinguishable from it (the paired interval includes 0): ppo, sampled." in text
    assert "β chosen by returns on other episodes: ilql, sampled, β by returns: 3.25 [3.25, 3.25]." in text
    assert "Fewer than 5 training seeds" in text


def test_methods_without_results_are_named(tmp_path, plain):
    shown, *rows = results()
    rows = [row for row in rows if row.get("method") not in ("bc", "ppo")]
    page = contents(write_report(write(tmp_path, [shown, *rows])))
    sentence = "There are no results of bc, ppo; without those of the baseline, no differences are shown."
    assert sentence.encode() in page["report.md"]


def test_text_of_logs_is_shown_as_it_is_and_commands_no_terminal(tmp_path, plain):
    said = "\x1b[2J<script>x</script> ![p](http://a/b.png) [l](c) *b* `c` | d \x9b1m \u202eleft\r\n# no heading"
    rows = results()
    for row in rows:
        if row.get("samples"):
            row["samples"] = [{"seed": 77, "score": 1.0, "turns": [["user", said], ["assistant", said]]}]
        if row["kind"] == "run":
            row["labels"] = {"a|<b>\x1b[1m": 1.0}
    report = write_report(write(tmp_path, rows))
    for name in ("report.md", "report.html"):
        text = (report / name).read_text()
        assert not set("\x1b\x9b\r\u202e") & set(text) and "\\u001b[2J" in text.replace("\\[", "[")
        assert "<script>" not in text and "<b>" + chr(92) not in text
    text = (report / "report.md").read_text()
    assert r"!\[p\](http://a/b.png) \[l\](c) \*b\* \`c\` \| d" in text and "\n# no heading" not in text
    assert r" a\|&lt;b&gt;\u001b[1m " in text


def test_no_value_of_the_rows_acts_as_markup_or_as_part_of_a_template(tmp_path, plain):
    mark = "<script>x</script>{{ 7 * 7 }}{% raw %}"
    text = json.dumps(results())
    for name in ("gamble", "ilql", "labels only", "max_steps", "offline-lmrl compare", "2.7", "12ab", "user", "over"):
        text = text.replace(name, name + mark)
    report = write_report(write(tmp_path, json.loads(text)))
    page = Page()
    page.feed((report / "report.html").read_text())
    assert page.open == [] and "script" not in page.tags
    for name in ("report.md", "report.html"):
        text = (report / name).read_text().replace("\\*", "*")
        shown = text.count("&lt;script&gt;x&lt;/script&gt;{{ 7 * 7 }}{% raw %}")
        assert "<script" not in text and shown == text.count("{{") and shown > 50


def test_dialogues_stand_side_by_side_behind_the_turns_they_share(drawn):
    text = (drawn / "report.md").read_text().partition("# Ten fixed dialogues")[2]
    episode = text.partition("### Episode 77")[2].partition("## Configuration")[0]
    assert episode.count("> user: safe or &lt;gamble&gt;?") == 1
    assert episode.count("- assistant: safe &amp; sound") == 9  # 7 settings twice, less PPO's greedy one and the like
    assert "ilql, greedy, β by returns, score 3.25" in episode


def test_the_middle_of_a_long_dialogue_is_left_out_and_counted(tmp_path, plain):
    turns = [[role, f"turn {i}"] for i in range(0, 60, 2) for role in ("user", "assistant")]
    row = run("bc", 0, samples=[{"seed": 1, "score": 0.0, "turns": turns}])
    text = (write_report(write(tmp_path, [results()[0], row])) / "report.md").read_text()
    assert "- … 43 turns …" in text and "- assistant: turn 58" in text  # 59 after the opening, 16 of them shown
    assert "turn 30" not in text


def test_the_manifest_says_what_the_rows_were_made_of(drawn):
    found = json.loads((drawn / "manifest.json").read_text())
    assert found["config"] == CONFIG and found["data"] == {"train": "12ab"} and found["seeds"] == [0, 1]
    assert found["made"] == [{"rows": 18, **MADE}] and found["results"]["rows"] == 22


def test_without_matplotlib_the_report_has_tables_and_says_how_to_get_figures(tmp_path, plain, drawn):
    report = write_report(write(tmp_path, results()))
    text = (report / "report.md").read_text()
    assert "pip install 'offline_lmrl[plots]'" in text and not (report / "figures").exists()
    assert lines_of(text, "Results") == lines_of((drawn / "report.md").read_text(), "Results")


def test_rows_without_the_numbers_of_a_figure_leave_it_out_with_the_reason(tmp_path):
    gone = {"kl": None, "calibration": None, "curve": [], "labels": {}, "samples": []}
    rows = [
        results()[0],
        *(
            {k: v for k, v in row.items() if k not in ("scores", "made")} | gone
            for row in (run("bc", 0), run("ilql", 0, chosen="offline"))
        ),
    ]
    report = write_report(write(tmp_path, rows))
    drawn = {path.stem for path in (report / "figures").iterdir()}
    assert drawn == {"score", "training_tokens", "generated_tokens"}
    text = (report / "report.md").read_text()
    for reason in (
        "no row has a KL",
        "no row has Q and realised",
        "no method here has a requested",
        "no method here played or queried",
        "fewer than two settings have the score",
    ):
        assert reason in text
    assert "Ten fixed dialogues" not in text and "Made by" not in text


def reasons(text):
    """Title -> reason of the figures that a page in Markdown says were not drawn."""
    below = text.partition("## Figures not drawn")[2].partition("\n## ")[0]
    return dict(line.removeprefix("- ").split(": ", 1) for line in below.strip().splitlines())


def spread(low, high):
    """Rows of BC and ILQL that generate `low` and `high` tokens per answer, and whose other numbers differ plainly."""
    rows = [run("bc", 0), run("ilql", 0, chosen="offline")]
    return [results()[0], *(row | {"turns": 1.0, "tokens": n} for row, n in zip(rows, (low, high), strict=True))]


@pytest.mark.parametrize(
    ("low", "high", "reason"),
    [
        (7.0, 7.0, "“generated tokens per answer” is 7 everywhere."),
        (7.0, 7.0 + 1e-9, "“generated tokens per answer” is 7 everywhere."),
        (6.995, 7.003, "“generated tokens per answer” is nearly the same everywhere: from 6.995 to 7.003."),
        (6.9, 7.0, None),
    ],
)
def test_a_figure_whose_axis_has_nearly_equal_values_is_not_drawn(low, high, reason, tmp_path):
    report = write_report(write(tmp_path, spread(low, high)))
    assert reasons((report / "report.md").read_text()).get("Return against generated tokens per answer") == reason
    assert (report / "figures" / "generated_tokens.svg").exists() == (reason is None)
    assert (report / "figures" / "training_tokens.svg").exists()


def test_a_figure_with_a_single_point_is_not_drawn(tmp_path):
    bins = [{"q": 1.0, "return_to_go": 2.0, "n": 5}]
    report = write_report(write(tmp_path, [*results()[:3], run("ilql", 0, chosen="offline", calibration=bins)]))
    found = reasons((report / "report.md").read_text())
    titles = [title for title, reason in found.items() if reason == "it would show a single point."]
    assert titles == [
        "Score per method",
        "Return against √KL",
        "Return against training tokens",
        "Return against generated tokens per answer",
        "Calibration of Q",
    ]
    assert not (report / "figures").exists()


def test_a_requested_return_that_all_settings_share_is_drawn_against_what_they_achieved(tmp_path):
    less = {"labels": {"ask": 2.0}, "score": 1.0, "cells": [["a", 2.0, 2], ["b", 2.0, 2]]}
    rows = [run("asked", 0), run("asked", 0, "greedy", **less)]
    report = write_report(write(tmp_path, [results()[0], *rows]))
    assert (report / "figures" / "asked.svg").exists()  # its axes have the same limits, which are wide enough


def test_rounding_errors_of_a_kl_give_no_axis(tmp_path):
    rows = [run("bc", 0, kl=1e-9), run("ilql", 0, kl=3e-8)]
    found = reasons((write_report(write(tmp_path, [results()[0], *rows])) / "report.md").read_text())
    assert found["Return against √KL"].endswith("“√KL(decoding ‖ policy), √nats per episode” is 0 everywhere.")


def test_play_that_all_methods_had_alike_gives_no_axis_of_play(tmp_path):
    played = [run("ppo", 0, curve=[]) for _ in range(2)]
    played[1] |= {"method": "rloo", "score": 1.0, "cells": [["a", 2.0, 2], ["b", 2.0, 2]]}
    report = write_report(write(tmp_path, [results()[0], *played]))
    found = reasons((report / "report.md").read_text())
    assert found["Return against environment steps"] == "“environment steps” is 500 everywhere."
    assert found["Return against reward queries"] == "“reward queries” is 400 everywhere."


def changed(row, **config):
    return row | {"config": row["config"] | config}


def test_rows_of_another_comparison_are_refused_by_the_setting_that_differs(tmp_path, plain, capsys):
    rows = [results()[0], run("bc", 0), changed(run("bc", 1), evaluation={"episodes": 5})]
    with pytest.raises(InputError, match="results.jsonl: bc: evaluation.episodes: found 5, expected 4; "):
        write_report(write(tmp_path, rows))
    rows[-1] = changed(run("bc", 1), method=[{"algorithm": "bc", "args": {"max_steps": 8}}])
    assert main(["compare", str(write(tmp_path, rows))]) == 2
    assert "bc: method.0.args.max_steps: found 8, expected 7" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


def test_a_report_of_another_comparison_is_not_written_over(tmp_path, plain):
    report = write_report(write(tmp_path, [results()[0], run("bc", 0)]))
    before = contents(report)
    write(tmp_path, [results()[0], changed(run("bc", 0), environment={"name": "corridor"})])
    with pytest.raises(InputError, match="environment.name: found 'gamble', expected 'corridor'"):
        write_report(tmp_path)
    assert contents(report) == before


def test_the_command_draws_a_folder_again(tmp_path, plain, capsys):
    write(tmp_path, [results()[0], run("bc", 0)])
    assert main(["compare", str(tmp_path)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("method") and printed[-1] == str(tmp_path / "report" / "report.html")
    assert main(["compare", str(tmp_path), "--seeds", "[1]"]) == 2
    assert "--seeds: found a setting, expected none" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["compare", str(tmp_path / "empty")]) == 2
    assert "results.jsonl: found no such file" in capsys.readouterr().err


ESTIMATE = {"mean": 0.3, "interval": [0.1, 0.5], "n": 50}
TRIED = {
    "choice": {"beta": 4.0, "ask": None}, "advantage": ESTIMATE, "realised": ESTIMATE, "kl_token": ESTIMATE,
    "kl_reply": ESTIMATE, "log_prob": ESTIMATE, "tokens": ESTIMATE, "kl_logged": 0.2, "changed": 0.1, "unlikely": 0.0,
    "repeated": 0.0, "unfinished": 0.0, "empty": 0.0, "broken": 0.04, "distinct_1": 0.5, "distinct_2": 0.9,
    "texts": [], "beta": 4.0, "kl": 0.2, "chosen": True,
}  # fmt: skip


def test_what_each_beta_does_to_replies_is_a_table_of_the_page_and_of_the_terminal(tmp_path, capsys):
    rows = results()
    for row in rows:
        if row.get("beta_chosen") == "offline":
            row["betas_tried"] = [TRIED | {"choice": {"beta": 0.0, "ask": None}, "beta": 0.0, "chosen": False}, TRIED]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = (write_report(tmp_path) / "report.md").read_text()
    assert "## What each β does to replies" in page and page.count("β 4 (chosen)") == 1
    print_table(rows)
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if line.startswith("β 4 (chosen)")]
    assert "+0.30 [+0.10, +0.50]" in line and line.endswith("4%") and max(map(len, printed.splitlines())) <= 100
    assert "ilql, seed 0: replies to held-out prompts, by β" in printed
