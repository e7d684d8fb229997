"""What all importers of preferences share: totals that add up whatever a file holds, splits that share no group."""

import itertools
import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import comparisons, oasst
from data_prep.alpaca_eval import AlpacaEval
from data_prep.best_of_4 import BestOf4
from data_prep.helpsteer import HelpSteer
from data_prep.hh_rlhf import HhRlhf
from data_prep.kto import Kto
from data_prep.nectar import Nectar
from data_prep.oasst import Oasst
from data_prep.preferences import Preferences
from data_prep.shp import Shp
from data_prep.stack_exchange import StackExchange
from data_prep.summarize import SummarizeComparisons
from data_prep.ultrafeedback import ASPECTS, UltraFeedback
from data_prep.webgpt import WebGpt
from offline_lmrl.errors import InputError
from offline_lmrl.logs.io import read_comparisons
from offline_lmrl.logs.preference_forms import read_comparison
from offline_lmrl.logs.record import Drop
from offline_lmrl.logs.trajectory import Turn, messages_of
from tests.comparisons import RENDERER, check_invariants, check_other_files_are_refused, mutated_lines, read_one
from tests.data_prep import (
    test_best_of_4,
    test_helpsteer,
    test_nectar,
    test_oasst,
    test_shp,
    test_summarize_comparisons,
    test_ultrafeedback,
    test_webgpt,
)
from tests.data_prep.test_hh_rlhf import normalise, transcripts

TALK = "\n\nHuman: {}?\n\nAssistant: one\n\nHuman: go on\n\nAssistant:"
REPLY = [{"role": "assistant", "content": "a"}]
ROWS = {
    HhRlhf: [{"chosen": TALK.format(i) + f" yes {i}", "rejected": TALK.format(i) + " no"} for i in range(9)],
    AlpacaEval: [
        {"instruction": f"q{i // 3}", "output_1": "ref", "generator_1": "r", "output_2": f"out {i}",
         "generator_2": "m", "preference": 1.3, "annotator": "judge"} for i in range(9)],
    Preferences: [
        {"prompt": "q", "chosen": "a", "rejected": "b", "margin": 1.0},
        {"prompt": "", "chosen": "a b", "rejected": "a c", "weight": 2.0},
        {"prompt": [{"role": "user", "content": "q3"}], "chosen": REPLY, "rejected": [{**REPLY[0], "content": "b"}]},
        {"chosen": [{"role": "user", "content": "q4"}, *REPLY], "rejected": [
            {"role": "user", "content": "q4"}, {"role": "assistant", "content": [{"type": "text", "text": "b"}]}]},
        {"chosen": TALK.format("x") + " yes", "rejected": TALK.format("x") + " no"},
        {"prompt": "q5", "responses": ["a", "b", "c"], "ranks": [1, 0, None], "labeler": "w"},
        {"context": [{"role": "user", "content": "q6"}], "options": [REPLY, [{"role": "assistant", "content": "c"}]],
         "target": [0.25, 0.75], "ranking": [[1], [0]], "weight": 1.5, "group": "g", "labels": "{}"}],
    StackExchange: [
        {"qid": 1, "question": "<p>q</p>", "metadata": ["m"], "answers": [
            {"answer_id": 1, "text": "<p>a</p>", "pm_score": 2, "selected": True}, {"text": "b", "pm_score": 0}]},
        {"question_id": 2, "title": "t", "body": "<p>q</p>", "answers": [
            {"body": "<p>a</p>", "score": 4, "is_accepted": False}, {"body": "<p>b</p>", "score": -1}]}],
    UltraFeedback: [
        {"source": "flan", "instruction": f"q{i}", "models": ["m"], "completions": [
            {"model": "m", "response": f"reply {j}", "overall_score": 10 - j, "annotations": {
                aspect: {"Rating": str(5 - j)} for aspect in ASPECTS}} for j in range(3)]}
        for i in range(3)],
    Oasst: [*test_oasst.MESSAGES, test_oasst.tree(test_oasst.MESSAGES, "q9")],
    SummarizeComparisons: test_summarize_comparisons.KEPT,
    BestOf4: test_best_of_4.KEPT,
    WebGpt: test_webgpt.KEPT,
    Shp: test_shp.KEPT,
    HelpSteer: [
        *(test_helpsteer.preferred(i - 2, prompt=f"q{i}") for i in range(4)),
        *(test_helpsteer.third(i - 2, context=[{"role": "user", "content": f"r{i}"}]) for i in range(4)),
        *({**row, "prompt": "p"} for row in test_helpsteer.KEPT)],
    Nectar: test_nectar.KEPT,
}  # fmt: skip
IMPORTERS = pytest.mark.parametrize("importer", ROWS, ids=lambda importer: importer.__name__)


def prepare(importer, tmp_path, name, **settings):
    if importer is BestOf4:
        RENDERER.tokenizer.save_pretrained(tmp_path / "tokenizer")
        settings["tokenizer"] = str(tmp_path / "tokenizer")
    return importer(input=tmp_path / name, output=tmp_path / "out", **settings).prepare()


def adds_up(report):
    return (
        report["rows"] == report["imported"] + sum(report["dropped"].values())
        and sum(split["comparisons"] for split in report["splits"].values()) == report["comparisons"]
    )


@IMPORTERS
def test_a_thousand_broken_rows_are_imported_or_dropped_for_a_reason(tmp_path, importer):
    lines = [*(json.dumps(row).encode() for row in ROWS[importer]), *mutated_lines(ROWS[importer], 1000, seed=0)]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    report = prepare(importer, tmp_path, "in.jsonl")
    assert report["rows"] == len(lines) and adds_up(report)
    assert sum(report["dropped"].values()) > 300 and len(report["dropped"]) < 60
    assert report["dropped"]["text: expected UTF-8"] > 50
    if importer not in (AlpacaEval, HelpSteer, Oasst):  # of which several rows make one comparison
        assert report["imported"] == report["comparisons"] + report["removed, their group is in a later split"] + (
            report["merged"].get("the same replies compared again", 0)
        )


@IMPORTERS
def test_a_column_says_what_stays_in_one_split_and_rows_without_it_are_dropped(tmp_path, importer):
    rows = [{**row, "customer": f"c{i % 4}"} for i, row in enumerate(ROWS[importer])]
    text = "".join(json.dumps(row) + "\n" for row in (*rows, {**rows[0], "customer": None}))
    (tmp_path / "in.jsonl").write_text(text)
    report = prepare(importer, tmp_path, "in.jsonl", validation=0.5, group="customer")
    assert report["dropped"] == {"customer: expected a group: text or a whole number": 1}
    made = [read_comparisons(tmp_path / "out" / f"{split}.jsonl") for split in report["splits"]]
    found = [{row.group for row in split} for split in made]
    assert all(not one & other for one, other in itertools.combinations(found, 2))
    expected = {row["customer"] for row in rows}
    several = importer in (HelpSteer, Oasst)  # rows make one comparison, of the same group
    assert set().union(*found) == expected or several and set().union(*found) <= expected


def test_what_two_customers_compared_stays_apart_where_they_are_the_groups(tmp_path):
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b", "customer": name} for name in "ABCA"]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = Preferences(
        input=tmp_path / "in.jsonl", output=tmp_path / "out", validation=0, group="customer"
    ).prepare()
    made = read_comparisons(tmp_path / "out" / "train.jsonl")
    assert [(row.group, row.weight) for row in made] == [("A", 2.0), ("B", 1.0), ("C", 1.0)]
    assert report["merged"]["the same replies compared again"] == 1


@pytest.mark.parametrize("levels", [201, 981, 984, 100_000])
@pytest.mark.parametrize("processes", [1, 2])
def test_rows_that_nest_too_deep_are_dropped_for_that(tmp_path, levels, processes):
    deep = "[" * levels + "]" * levels
    lines = [
        '{"prompt": "q", "chosen": "a", "rejected": "b"}',
        deep,
        f'{{"prompt": "q", "chosen": {deep}, "rejected": "b"}}',
        f'{{"prompt": "q", "chosen": "a", "rejected": "b", "extra": {deep}}}',
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    report = Preferences(input=tmp_path / "in.jsonl", output=tmp_path / "out", processes=processes).prepare()
    assert report["imported"] == 1 and report["dropped"] == {"JSON: expected less nesting": 3}


@IMPORTERS
def test_files_of_another_kind_are_one_line_errors(tmp_path, importer):
    check_other_files_are_refused(tmp_path, ROWS[importer][0], lambda name: prepare(importer, tmp_path, name))


@pytest.mark.parametrize("importer", [Preferences, Kto])
def test_a_folder_with_a_split_of_another_run_is_refused(tmp_path, importer):
    rows = [
        {"prompt": f"q{i}", "chosen": "a", "rejected": "b"}
        if importer is Preferences
        else {"prompt": f"q{i}", "completion": "a", "label": i % 2 == 0}
        for i in range(20)
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for _ in range(2):  # the same splits again are fine
        importer(input=tmp_path / "in.jsonl", output=tmp_path / "out", validation=0.3).prepare()
    before = (tmp_path / "out" / "train.jsonl").read_bytes()
    with pytest.raises(
        InputError, match="found validation.jsonl of another run, expected .* no splits other than train"
    ):
        importer(input=tmp_path / "in.jsonl", output=tmp_path / "out", validation=0).prepare()
    assert (tmp_path / "out" / "train.jsonl").read_bytes() == before


def test_a_failure_leaves_no_folder_behind(tmp_path):
    (tmp_path / "in.jsonl").write_text("{}\n")
    for output in (tmp_path / "new" / "er" / "out", tmp_path / "in.jsonl" / "new" / "out"):
        with pytest.raises(InputError):
            Preferences(input=tmp_path / "in.jsonl", output=output).prepare()
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_every_common_form_keeps_the_invariants(tmp_path):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[Preferences]))
    Preferences(input=tmp_path / "in.jsonl", output=tmp_path / "out", validation=0).prepare()
    made = read_comparisons(tmp_path / "out" / "train.jsonl")
    assert len(made) == len(ROWS[Preferences])
    words = [
        "q a",
        "q b",
        "a b",
        "a c",
        "q3 a",
        "q3 b",
        "q4 a",
        "q4 b",
        "x? one go on yes",
        "x? one go on no",
        "q5 a",
        "q5 b",
        "q6 a",
        "q6 c",
    ]
    check_invariants(
        [row for row in made if row.context],
        lambda row: [" ".join(turn.content for turn in (*row.context, *option)) for option in row.options],
        words,
        str,
    )


WORDS = st.text(st.characters(codec="utf-8"), max_size=8)


@settings(max_examples=30, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=5), WORDS, WORDS)
def test_any_pair_of_transcripts_keeps_the_invariants_or_is_dropped_once(said, first, second):
    before = "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {text}" for i, text in enumerate(said))
    before += "\n\nHuman: x" * (len(said) % 2 == 0) + "\n\nAssistant:"
    row = {"chosen": before + f" {first}", "rejected": before + f" {second}"}
    counts = Counter()
    made = read_one(HhRlhf, row, counts)
    dropped = [reason for reason in counts if reason.startswith("dropped: ")]
    assert len(dropped) == (made is None)
    if made is not None:
        check_invariants([made], transcripts, list(row.values()), normalise)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(("system", "user", "assistant")), WORDS), max_size=4),
    WORDS,
    WORDS,
    st.booleans(),
)
def test_any_pair_of_messages_keeps_the_invariants_or_is_dropped_once(said, first, second, explicit):
    before = [{"role": "user", "content": "x"}, *({"role": role, "content": text} for role, text in said)]
    sides = [[{"role": "assistant", "content": text}] for text in (first, second)]
    row = (
        {"prompt": before, "chosen": sides[0], "rejected": sides[1]}
        if explicit
        else {"chosen": before + sides[0], "rejected": before + sides[1]}
    )
    counts = Counter()
    made = read_comparison(row, "f:1", counts)
    assert sum(reason.startswith("dropped: ") for reason in counts) == (made is None)
    if made is not None:

        def shown(turns):
            return str([(turn["role"], turn["content"]) for turn in turns])

        check_invariants(
            [made],
            lambda row: [shown(messages_of((*row.context, *option))) for option in row.options],
            [shown(before + side) for side in sides],
            str,
        )


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(WORDS.filter(str.strip), st.floats(1, 2)),
        min_size=1,
        max_size=4,
        unique_by=lambda pair: tuple(pair[0].split()),
    )
)
def test_any_star_of_judgements_keeps_the_invariants(judged):
    rows = [
        read_one(
            AlpacaEval,
            {"instruction": "q", "output_1": "the ref", "output_2": f"{i} {text}", "preference": preference},
        )
        for i, (text, preference) in enumerate(judged)
    ]
    (made,) = AlpacaEval(input="in.jsonl", output="out").compare(rows, Counter())
    check_invariants(
        [made],
        lambda row: [option[0].content for option in row.options],
        [text for row in rows for text in row.outputs],
        str,
    )
    for i, (_, preference) in enumerate(judged, 1):
        assert made.preference(i, 0) == pytest.approx(preference - 1, abs=2e-9)


PAIRS = {  # the row of two replies, and what reads it
    SummarizeComparisons: (
        test_summarize_comparisons.row,
        lambda row: read_one(SummarizeComparisons, row)[1],
    ),
    WebGpt: (test_webgpt.row, lambda row: read_one(WebGpt, row, quotes=True)),
    Shp: (test_shp.row, lambda row: read_one(Shp, row)),
}


@pytest.mark.parametrize("importer", PAIRS, ids=lambda importer: importer.__name__)
@settings(max_examples=20, deadline=None)
@given(WORDS, WORDS)
def test_any_two_replies_keep_the_invariants_or_are_dropped_for_what_they_say(importer, first, second):
    build, read = PAIRS[importer]
    if not first.strip() or not second.strip() or first.split() == second.split():
        with pytest.raises(Drop):
            read(build(first, second))
    else:
        check_invariants(
            [read(build(first, second))],
            lambda row: [option[-1].content for option in row.options],
            [first, second],
            str.strip,
        )


RANKINGS = {  # the comparison of replies with scores from 1 to 5
    StackExchange: lambda scored, counts: read_one(
        StackExchange,
        {"question": "q", "answers": [{"text": text, "pm_score": score} for text, score in scored]},
        counts,
    ),
    UltraFeedback: lambda scored, counts: read_one(
        UltraFeedback,
        test_ultrafeedback.row(*(test_ultrafeedback.completion(text, *[str(score)] * 4) for text, score in scored)),
        counts,
    ),
    Oasst: lambda scored, counts: next(
        oasst.compare(
            [
                (
                    oasst.Thread(Turn("user", "q"), None),
                    oasst.Message(f"{i}", "q", Turn("assistant", text), -score, {}, ""),
                )
                for i, (text, score) in enumerate(scored)
            ],
            counts,
        ),
        None,
    ),
}


@pytest.mark.parametrize("importer", RANKINGS, ids=lambda importer: importer.__name__)
@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(WORDS, st.integers(1, 5)), min_size=1, max_size=5))
def test_any_ranked_replies_keep_the_invariants_or_are_dropped_once(importer, scored):
    counts = Counter()
    made = RANKINGS[importer](scored, counts)
    assert sum("dropped: " in reason for reason in counts) == (made is None)
    if made is not None:
        check_invariants(
            [made], lambda row: [option[0].content for option in row.options], [text for text, _ in scored], str
        )
        scores = [dict(scored)[option[0].content] for option in made.options]
        assert made.ranks == tuple(sorted(set(scores), reverse=True).index(score) for score in scores)
    else:
        texts = [text for text, _ in scored if text.strip()]
        assert len(texts) < 2 or len({tuple(text.split()) for text in texts}) < len(texts)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    """A saved tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    RENDERER.tokenizer.save_pretrained(folder)
    return str(folder)


SAMPLE = st.text(st.characters(codec="utf-8", exclude_characters="\N{REPLACEMENT CHARACTER}"), max_size=4)


@settings(max_examples=20, deadline=None)
@given(st.lists(SAMPLE, min_size=4, max_size=4), st.integers(0, 3))
def test_any_four_samples_keep_the_invariants_or_are_dropped_for_what_they_say(tokenizer, samples, best):
    row = test_best_of_4.row(samples=samples, best=best)
    if not samples[best].strip() or len({tuple(text.split()) for text in samples if text.strip()}) < 2:
        with pytest.raises(Drop):
            read_one(BestOf4, row, tokenizer=tokenizer)
    else:
        made = read_one(BestOf4, row, tokenizer=tokenizer)
        check_invariants([made], lambda row: [option[0].content for option in row.options], samples, str)
        assert made.options[made.ranks.index(0)][0].content.split() == samples[best].split()


def test_groups_of_the_test_file_leave_the_training_rows(tmp_path):
    rows = ROWS[HhRlhf]
    (tmp_path / "in").mkdir()
    for name, some in (("train", rows[:8]), ("test", rows[6:])):
        (tmp_path / "in" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    report = HhRlhf(input=tmp_path / "in", output=tmp_path / "out", validation=0.3).prepare()
    groups = {
        name: {row.group for row in read_comparisons(tmp_path / "out" / f"{name}.jsonl")} for name in report["splits"]
    }
    assert groups.keys() == {"train", "validation", "test"} and len(groups["test"]) == 3
    assert not any(groups[a] & groups[b] for a, b in itertools.combinations(groups, 2))
    assert report["removed, their group is in a later split"] == 2


def test_two_processes_write_the_same_files_in_the_order_of_the_source(tmp_path, monkeypatch):
    monkeypatch.setattr(comparisons, "_CHUNK", 4)
    rows = [*ROWS[HhRlhf][::-1], {"chosen": "neither", "rejected": "nor"}, *ROWS[HhRlhf]]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for processes in (1, 2):
        report = HhRlhf(
            input=tmp_path / "in.jsonl", output=tmp_path / f"{processes}", validation=0.5, processes=processes
        ).prepare()
    names = {path.name for path in (tmp_path / "1").iterdir()}
    assert (
        names
        == {"train.jsonl", "validation.jsonl", "report.json"}
        == {path.name for path in (tmp_path / "2").iterdir()}
    )
    assert all((tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes() for name in names)
    for split in ("train", "validation"):
        asked = [row.context[0].content for row in read_comparisons(tmp_path / "2" / f"{split}.jsonl")]
        assert len(asked) > 1 and asked == sorted(asked, reverse=True)
    assert (report["rows"], report["imported"], report["comparisons"]) == (19, 18, 9)
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "1", "2"}  # nothing else is left behind


def test_reasons_keep_the_numbers_of_a_rule_and_none_of_a_row(tmp_path):
    def native(size, **fields):
        options = [[{"role": "assistant", "content": f"{i}"}] for i in range(size)]
        return {"context": [], "options": options, "target": [1.0, *[0.0] * (size - 1)], **fields}

    wrong = {
        "options: expected at least 2": lambda n: native(1),
        "weight: expected a number above 0": lambda n: native(n, weight=-n),
        "target: expected one probability for each option, with a sum of 1": lambda n: native(n, target=[n] * n),
        "target: expected no higher probability for an option that is ranked lower": lambda n: native(
            n, ranking=[[i] for i in reversed(range(n))]
        ),
        "ranking: expected lists that together hold the index of each option, from 0, exactly once": lambda n: native(
            n, ranking=[[n]]
        ),
        "labels.options: expected a list with an entry for each option": lambda n: native(n, labels={"options": []}),
        "ranks: expected one for each response": lambda n: {"prompt": "q", "responses": ["a"] * n, "ranks": []},
    }
    rows = [native(2), *(make(n) for make in wrong.values() for n in range(2, 7))]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = Preferences(input=tmp_path / "in.jsonl", output=tmp_path / "out", validation=0).prepare()
    assert report["dropped"] == dict.fromkeys(wrong, 5)


def test_the_same_replies_compared_again_are_merged_and_contradictions_soft(tmp_path):
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "who": "x"}
    against = {"prompt": "q", "chosen": "b", "rejected": "a", "who": "y"}
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(one) + "\n" for one in (row, row, row, against)))
    report = Preferences(input=tmp_path / "in.jsonl", output=tmp_path / "out", validation=0).prepare()
    (made,) = read_comparisons(tmp_path / "out" / "train.jsonl")
    assert made.target == (0.75, 0.25) and made.weight == 4 and made.ranking is None
    assert [labels["who"] for labels in made.labels["merged"]] == ["x", "x", "y"]
    assert report["merged"] == {"the same replies compared again": 3, "of those, contradictions": 1}
    assert report["imported"] == 4 and report["comparisons"] == 1


def test_native_rows_go_through_the_checks_of_replies_that_other_forms_do(tmp_path):
    def native(first, second):
        options = [[{"role": "assistant", "content": text}] for text in (first, second)]
        return {"context": [{"role": "user", "content": "q"}], "options": options, "target": [1, 0]}

    rows = [native("a", "b"), native("a", " a"), native("a", " "), native(" ", "")]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = Preferences(input=tmp_path / "in.jsonl", output=tmp_path / "out", validation=0).prepare()
    assert (report["imported"], report["dropped"]) == (1, {"identical replies": 2, "empty reply": 1})
    report = Preferences(
        input=tmp_path / "in.jsonl", output=tmp_path / "out", validation=0, allow_empty=True
    ).prepare()
    assert (report["imported"], report["dropped"]) == (2, {"identical replies": 2})
    assert len(read_comparisons(tmp_path / "out" / "train.jsonl")) == 2  # what was kept is read as it was written


def test_labels_that_nest_too_deep_in_others_are_left_out_and_counted(tmp_path):
    deep = 0
    for _ in range(198):
        deep = [deep]
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    rows = [row, {**row, "extra": deep}, {**row, "extra": 1}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = Preferences(input=tmp_path / "in.jsonl", output=tmp_path / "out", validation=0).prepare()
    assert report["merged"]["labels left out, because they would nest too deep"] == 1
    (made,) = read_comparisons(tmp_path / "out" / "train.jsonl")
    assert made.labels["merged"] == [{"extra": 1}] and made.weight == 3
