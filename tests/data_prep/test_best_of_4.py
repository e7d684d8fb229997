"""The best of four samples: padding, cut characters, samples that say the same."""

import json

import pytest

from data_prep.best_of_4 import PAD, BestOf4
from offline_lmrl.errors import InputError
from offline_lmrl.logs.io import read_comparisons
from tests.comparisons import RENDERER, check_invariants

TOKENIZER = RENDERER.tokenizer
WORDS = (" fine", " how are you", " 2, 1", " hello")


def ids(text, length=0, left=False):
    tokens = TOKENIZER(text).input_ids
    padding = [PAD] * (length - len(tokens))
    return padding + tokens if left else tokens + padding


def row(asked="hello there", samples=WORDS, best=1, **fields):
    return (
        {"query": ids(asked, 20, left=True), "best": best}
        | {f"sample{i}": ids(text, 24) for i, text in enumerate(samples)}
        | fields
    )


CUT = TOKENIZER("é").input_ids  # two bytes, a token each
KEPT = [
    row(),
    row("or 1", (" you", " you", " are", ""), best=1),
    row("or 2", sample3=ids(" Fine") + CUT[:1], query=CUT[1:] + ids("or 2")),
    row("or é", (" é", "", " you ", " you"), best=3, sample1=ids(" 1") + [TOKENIZER.eos_token_id, PAD]),
]
DROPPED = {
    "fewer than two different samples": [row(samples=(" you",) * 4), row(samples=("", " you", "", ""))],
    "the best sample is empty": [row(samples=(" you", " ", " are", " 1"))],
    "empty query": [row(" "), row(query=[PAD] * 3)],
    "token ids that do not decode to text": [row(sample0=[*CUT[:1], *ids(" you")] * 2)],
    "sample0: expected ids of the tokenizer": [
        row(sample0=[PAD - 1]),
        row(sample0=[1, PAD, 1]),
        row(sample0=["a"]),
        row(sample0=[True]),
        row(sample0=[-1]),
    ],
    "sample3: expected a list": [row(sample3=None)],
    "query: expected a list": [row(query="hello")],
    "best: expected 0 to 3": [row(best=4), row(best=-1)],
    "best: expected a whole number": [row(best=0.5)],
    "best: expected a number": [row(best=None)],
}


@pytest.fixture
def run(tmp_path):
    TOKENIZER.save_pretrained(tmp_path / "tokenizer")

    def run(rows):
        (tmp_path / "offline_5k.json").write_text(json.dumps(rows))
        report = BestOf4(
            input=tmp_path / "offline_5k.json",
            output=tmp_path / "out",
            tokenizer=str(tmp_path / "tokenizer"),
            validation=0,
        ).prepare()
        return report, read_comparisons(tmp_path / "out" / "train.jsonl")

    return run


def test_every_row_of_the_list_is_imported_or_dropped_for_a_reason(run):
    rows = KEPT + [one for some in DROPPED.values() for one in some]
    report, made = run(rows)
    assert (report["rows"], report["imported"], len(made)) == (len(rows), len(KEPT), len(KEPT))
    assert report["dropped"] == {reason: len(some) for reason, some in DROPPED.items()}
    assert report["repaired"] == {
        "part of a character removed at the end of a text": 2,
        "samples of the same words merged": 2,
        "empty sample left out": 1,
        "end token removed": 1,
    }
    assert report["by number of options"] == {"2": 1, "3": 1, "4": 2}


def test_the_best_is_known_and_nothing_of_the_others(run):
    _, made = run(KEPT)
    assert [option[0].content for option in made[0].options] == list(WORDS)
    assert made[0].target == (0, 1, 0, 0) and made[0].ranking is None and made[0].ranks == (1, 0, 1, 1)
    assert [turn.content for turn in made[0].context] == ["hello there"]
    assert ([option[0].content for option in made[1].options], made[1].target) == ([" you", " are"], (1, 0))
    assert made[2].context[0].content == "or 2" and made[2].options[3][0].content == " Fine"
    # samples 2 and 3 differ in white space only, and the best is one of them
    assert ([option[0].content for option in made[3].options], made[3].target) == ([" é", " 1", " you "], (0, 0, 1))
    assert made[3].labels["options"] == [{"sample": 0}, {"sample": 1}, {"sample": 2}]


def test_an_unknown_tokenizer_is_a_one_line_error(tmp_path):
    with pytest.raises(InputError, match="none: found no such folder, expected the folder or hub name of a tokenizer"):
        BestOf4(input=tmp_path / "in.json", output=tmp_path / "out", tokenizer=str(tmp_path / "none")).prepare()


def test_the_invariants_of_an_importer_hold(run):
    _, made = run(KEPT)
    texts = [
        TOKENIZER.decode([token for token in one[f"sample{i}"] if token not in (PAD, TOKENIZER.eos_token_id)])
        for one in KEPT
        for i in range(4)
    ]
    check_invariants(
        made,
        lambda one: [option[0].content for option in one.options],
        texts,
        lambda text: text.strip("\N{REPLACEMENT CHARACTER}"),
    )
