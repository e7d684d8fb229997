"""Transcripts in the form of hh-rlhf: every malformed shape known of them, in dialogues of our own."""

import hashlib
import json
import os
import re
from pathlib import Path

import pytest

from data_prep.hh_rlhf import HhRlhf
from offline_lmrl.logs.io import read_comparisons
from tests.comparisons import check_invariants, read_one

TALK = "\n\nHuman: How do I keep tulips fresh?\n\nAssistant: Cut the stems."
ASK = TALK + "\n\nHuman: And then?\n\nAssistant:"


def pair(chosen, rejected, before=ASK):
    return {"chosen": before + chosen, "rejected": before + rejected}


KEPT = [
    pair(" Change the water “daily”.", " Dunno."),
    pair(" One turn only.", " Or none.", "\n\nHuman: One question?\n\nAssistant:"),
    pair(" First half.\n\nAssistant: Second half.", " Nothing."),
    {
        "chosen": TALK + "\n\nAssistant: Mind the leaves.\n\nHuman: And then?\n\nAssistant: Water.",
        "rejected": TALK + "\n\nAssistant: Mind the leaves.\n\nHuman: And then?\n\nAssistant: Sun.",
    },
    pair(" Sure. Human: thanks Assistant: welcome", " No. Human: why?"),
    pair(" Tag after one line:\nAssistant: still me", " Short."),
    pair(" Blank lines.\n\n\n", " Others.", "\n\nHuman: Triple?\n\n\nHuman: Again?\n\nAssistant:"),
    pair(" It's cold", " It's cold outside", "\n\nHuman: " + "long " * 400 + "?\n\nAssistant:"),
    pair(" Same words", " same words!"),
]
DROPPED = {
    "empty reply": [pair(" ", " Something."), pair(" Something else.", "")],
    "identical replies": [pair(" Same.", " Same. ")],
    "the sides differ before the agent's reply": [
        {"chosen": "\n\nHuman: a\n\nAssistant: x", "rejected": "\n\nHuman: b\n\nAssistant: x"}
    ],
    "the sides differ before the last reply": [
        {"chosen": ASK + " a", "rejected": ASK + " b\n\nHuman: so?\n\nAssistant: c"}
    ],
    "one side continues where the other ends": [
        {"chosen": ASK + " a", "rejected": ASK + " a\n\nHuman: go\n\nAssistant: b"}
    ],
    "a side that does not end with the agent": [{"chosen": ASK + " a\n\nHuman: bye", "rejected": ASK + " b"}],
    "chosen: expected a transcript of Human and Assistant": [
        {"chosen": "just text", "rejected": ASK + " a"},
        {"rejected": ASK + " a"},
        {"chosen": None, "rejected": "x"},
        {"chosen": "Assistant: I open\n\nHuman: no", "rejected": ASK},
    ],
    "rejected: expected a transcript of Human and Assistant": [{"chosen": ASK + " a", "rejected": [ASK + " b"]}],
    "row: expected an object": [[1]],
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def transcripts(comparison):
    """One text per option, as the source writes it."""
    tag = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}
    return [
        "".join(tag[turn.role] + turn.content for turn in (*comparison.context, *option))
        for option in comparison.options
    ]


def normalise(text):
    """What the importer declares: white space at the ends of turns, and tags that repeat the speaker, do not count."""
    pieces = re.split(r"\n\n(Human|Assistant):", text)
    kept = [
        pieces[i + 1] if i and pieces[i] == pieces[i - 2] else f"{pieces[i]}: {pieces[i + 1]}"
        for i in range(1, len(pieces), 2)
    ]
    return " ".join(" ".join(kept).split())


def test_every_row_is_imported_or_dropped_for_a_reason(tmp_path):
    rows = KEPT + [row for rows in DROPPED.values() for row in rows]
    report = HhRlhf(input=write(tmp_path / "in.jsonl", rows), output=tmp_path / "out", validation=0).prepare()
    assert (report["rows"], report["imported"]) == (len(rows), len(KEPT))
    assert report["dropped"] == {reason: len(rows) for reason, rows in DROPPED.items()}
    assert report["repaired"] == {"consecutive Assistant turns merged": 3, "consecutive Human turns merged": 2}
    assert report["kept as it is"] == {"row with a speaker tag inside a turn": 2}
    assert report["checks"]["replies equal up to case and punctuation"] == 1
    assert report["checks"]["replies lost if rows were cut on the right at 1024 characters"] == 2
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    assert len(read_comparisons(tmp_path / "out" / "train.jsonl")) == len(KEPT)


def test_the_invariants_of_an_importer_hold():
    made = [read_one(HhRlhf, row) for row in KEPT]
    check_invariants(made, transcripts, [row[side] for row in KEPT for side in row], normalise)
    assert all(len(option) == 1 for row in made for option in row.options)


def test_only_the_last_reply_is_trained_and_the_first_question_is_the_group():
    first, *_, other = [read_one(HhRlhf, row) for row in KEPT[:3]]
    assert [(turn.role, turn.is_trainable) for turn in (*first.context, *first.options[0])] == [
        ("user", False),
        ("assistant", False),
        ("user", False),
        ("assistant", True),
    ]
    shouted = pair(" a", " b", ASK.replace("How do I keep tulips fresh?", " how do I keep TULIPS fresh"))
    assert read_one(HhRlhf, shouted).group == first.group == other.group
    assert first.target == (1.0, 0.0) and first.source == "hh-rlhf"


def test_empty_replies_are_kept_where_that_is_allowed(tmp_path):
    source = write(tmp_path / "in.jsonl", [*DROPPED["empty reply"], KEPT[0]])
    report = HhRlhf(input=source, output=tmp_path / "out", validation=0, allow_empty=True).prepare()
    assert (report["imported"], report["dropped"]) == (3, {})


@pytest.mark.skipif("OFFLINE_LMRL_HH" not in os.environ, reason="set OFFLINE_LMRL_HH to a file of hh-rlhf")
def test_the_real_file_shares_an_identical_context_in_every_row(tmp_path):
    path = Path(os.environ["OFFLINE_LMRL_HH"])
    report = HhRlhf(input=path, output=tmp_path / "out").prepare()
    assert report["imported"] + sum(report["dropped"].values()) == report["rows"]
    if hashlib.sha256(path.read_bytes()).hexdigest().startswith("ebfaaed21162a4de"):  # harmless-base/test.jsonl.gz
        assert (report["rows"], report["dropped"]) == (2312, {"empty reply": 4})
    groups = [
        {row.group for row in read_comparisons(tmp_path / "out" / f"{split}.jsonl")}
        for split in ("train", "validation")
    ]
    assert groups[0] and groups[1] and not groups[0] & groups[1]
