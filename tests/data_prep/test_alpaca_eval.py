"""Judge annotations: stars around a reference become one comparison that gives every preference back."""

import json

import pytest

from data_prep.alpaca_eval import AlpacaEval
from offline_lmrl.errors import InputError
from offline_lmrl.logs.io import read_comparisons


def row(output, preference, reference="Dogs bark.", question="Do dogs bark?", **fields):
    return {
        "instruction": question,
        "output_1": reference,
        "generator_1": "ref",
        "output_2": output,
        "generator_2": f"m{len(str(output))}",
        "preference": preference,
        "annotator": "judge",
        **fields,
    }


def run(tmp_path, rows, **settings):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = AlpacaEval(input=tmp_path / "in.jsonl", output=tmp_path / "out", validation=0, **settings).prepare()
    return read_comparisons(tmp_path / "out" / "train.jsonl"), report


STAR = [row("Yes.", 1.25), row("No, cats do.", 1.1), row("Often", 1.5)]


def test_a_star_is_one_comparison_in_proportion_to_the_odds(tmp_path):
    (made,), report = run(tmp_path, STAR)
    assert [option[0].content for option in made.options] == ["Dogs bark.", "Yes.", "No, cats do.", "Often"]
    assert [made.preference(i, 0) for i in (1, 2, 3)] == pytest.approx([0.25, 0.1, 0.5])
    # odds 1, 1/3, 1/9 and 1 sum to 22/9
    assert made.target == pytest.approx([9 / 22, 3 / 22, 1 / 22, 9 / 22])
    assert made.labels["options"][1] == {"generator": "m4", "preference": 0.25}
    assert (made.labels["annotator"], made.source) == ("judge", "alpaca-eval")
    assert [turn.content for turn in made.context] == ["Do dogs bark?"]
    assert report["by number of options"] == {"4": 1}


def test_the_order_of_the_two_outputs_and_of_the_rows_changes_nothing(tmp_path):
    turned = [
        {
            **one,
            "output_1": one["output_2"],
            "output_2": one["output_1"],
            "generator_1": one["generator_2"],
            "generator_2": "ref",
            "preference": 3 - one["preference"],
        }
        for one in STAR
    ]
    for rows, order in ((turned, [0, 1, 2, 3]), (STAR[::-1], [0, 3, 2, 1])):
        (made,), _ = run(tmp_path, rows)
        expected = run(tmp_path, STAR)[0][0].select(order)
        assert (made.options, made.labels) == (expected.options, expected.labels | {"options": made.labels["options"]})
        assert made.target == pytest.approx(expected.target)
        assert [one["generator"] for one in made.labels["options"]] == [
            one["generator"] for one in expected.labels["options"]
        ]


def test_without_the_reference_and_as_pairs(tmp_path):
    (made,), _ = run(tmp_path, STAR, reference=False)
    assert made.target == pytest.approx([3 / 13, 1 / 13, 9 / 13])
    pairs, _ = run(tmp_path, STAR, reference=False, min_gap=0.2)
    assert [[option[0].content for option in pair.options] for pair in pairs] == [
        ["Yes.", "Often"],
        ["No, cats do.", "Often"],
    ]
    assert pairs[0].target == pytest.approx([0.25, 0.75])
    with pytest.raises(InputError, match="found nothing left to compare"):
        run(tmp_path, STAR[:1], reference=False)


def test_rows_that_are_no_annotation_are_dropped_and_repairs_are_counted(tmp_path):
    rows = [
        *STAR,
        row("Yes.", 1.75),
        row("Maybe", 0),
        row("Sure", 2),
        row("Dogs  bark.", 1),
        row(" ", 1),
        row("x", None),
        row("x", 2.5),
        row("x", "1"),
        row(3, 1),
        {"instruction": "q"},
        7,
        row("x", 1, question=" "),
    ]
    (made,), report = run(tmp_path, rows)
    assert report["dropped"] == {
        "empty instruction or output": 2,
        "identical outputs": 1,
        "no preference": 1,
        "preference that is neither 0 nor from 1 to 2": 1,
        "preference: expected a number": 1,
        "output_1: expected text": 1,
        "output_2: expected text": 1,
        "row: expected an object": 1,
    }
    assert (report["rows"], report["imported"]) == (len(rows), 6)
    assert report["repaired"] == {"preference 0 read as a tie": 1}
    assert report["assembled"] == {
        "instructions": 1,
        "outputs": 6,
        "rows averaged with another on the same two outputs": 1,
        "preferences of 0 or 1 moved inward by 1e-09": 1,
    }
    assert made.preference(1, 0) == pytest.approx(0.5)  # 0.25 and 0.75
    assert made.ranks[-1] == 0 and made.target[-1] > 0.999


def test_rows_without_a_common_reference_stay_pairs(tmp_path):
    made, report = run(tmp_path, [row("a", 1.25), row("b", 1.5, reference="c")])
    assert [len(one.options) for one in made] == [2, 2] and made[0].group == made[1].group
    assert report["assembled"] == {
        "instructions": 1,
        "outputs": 4,
        "instructions without a common reference, kept as pairs": 1,
    }


def test_what_reference_and_min_gap_leave_out_is_counted(tmp_path):
    rows = [*STAR, row("a", 1.2, question="close?"), row("b", 1.3, question="close?"), row("a", 1.2, question="one?")]
    made, report = run(tmp_path, rows, reference=False)
    assert [len(one.options) for one in made] == [3, 2]
    assert report["assembled"] == {
        "instructions": 3,
        "instructions left out: no two outputs to compare": 1,
        "outputs": 9,
        "outputs left out: references": 3,
        "outputs left out: no other to compare with": 1,
    }
    made, report = run(tmp_path, [*rows, row("far", 1.95, question="one?")], reference=False, min_gap=0.26)
    assert [[option[0].content for option in one.options] for one in made] == [["No, cats do.", "Often"], ["a", "far"]]
    assert report["assembled"] == {
        "instructions": 3,
        "instructions left out: no two outputs to compare": 1,
        "outputs": 10,
        "outputs left out: references": 3,
        "outputs left out: no other to compare with that differs by min_gap": 3,
    }
    assert report["imported"] == 7


def test_a_gap_below_0_is_refused(tmp_path):
    with pytest.raises(InputError, match="^min_gap: found -0.2, expected a number from 0 up, or null$"):
        run(tmp_path, STAR, min_gap=-0.2)
