"""Questions with answers and votes: every shape of votes known, and HTML as the sites print it."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.stack_exchange import StackExchange, plain_text, vote_score
from offline_lmrl.logs.io import read_comparisons
from offline_lmrl.logs.record import Drop
from tests.comparisons import check_invariants, read_one


def answer(text, score, **fields):
    return {"answer_id": len(text), "author": "Ada", "text": text, "pm_score": score, **fields}


QUESTION = "<p>How do I <em>peel</em> an egg?</p>"
KEPT = [
    {"qid": 1, "question": QUESTION, "date": "2020/01/01", "metadata": ["a link"], "answers": [
        answer("<p>Roll it.</p>", 3, selected=True), answer("<p>Use a spoon.</p>\n\n<p>Then water.</p>", 3),
        answer("<p>Don't.</p>", -1), answer("<p>Unscored.</p>", None), answer(" ", 0)]},
    {"question_id": 2, "title": "Milk &amp; eggs?", "body": "<p>Which first?</p>", "tags": ["food"], "answers": [
        {"answer_id": 8, "body": "<p>Eggs</p>", "score": 0, "is_accepted": True, "owner": {"display_name": "Bo"}},
        {"answer_id": 9, "body": "<p>Milk</p>", "score": 2, "is_accepted": False},
        {"answer_id": 7, "body": "<p>Neither</p>", "score": -4, "is_accepted": True}]},
    {"qid": 3, "question": "Plain < text?", "answers": [answer("List<int>", 0), answer("no", 0.0)]},
    {"qid": 4, "question": "<p>Twice</p>", "answers": [answer("same", 1), answer("<p>same</p>", 1), answer("x", 0)]},
]  # fmt: skip
DROPPED = {
    "fewer than two ranked responses": [
        {"question": "q", "answers": []},
        {"question": "q", "answers": [answer("a", 1)]},
        {"question": "q", "answers": [answer("a", 1), answer("b", None)]},
    ],
    "one text with two ranks": [{"question": "q", "answers": [answer("a", 1), answer("<p>a</p>", 2)]}],
    "empty question": [{"question": "<p> </p>", "answers": [answer("a", 1), answer("b", 2)]}],
    "HTML that cannot be read": [{"question": "<p>q</p><![x[y]]>", "answers": [answer("a", 1), answer("b", 2)]}],
    "question: expected text": [{"answers": [answer("a", 1)]}, {"question": 3, "answers": [answer("a", 1)]}],
    "answers: expected a list": [{"question": "q"}, {"question": "q", "answers": "a"}],
    "answers: expected an object": [{"question": "q", "answers": ["a", "b"]}],
    "answers: body: expected text": [{"question": "q", "answers": [{"pm_score": 1}, answer("a", 1)]}],
    "answers: pm_score: expected a number": [{"question": "q", "answers": [answer("a", "1"), answer("b", 1)]}],
    "answers: pm_score: expected a whole number": [{"question": "q", "answers": [answer("a", 0.5), answer("b", 1)]}],
}


def words(comparison):
    return [" ".join(turn.content for turn in (*comparison.context, *option)) for option in comparison.options]


def test_every_row_is_imported_or_dropped_for_a_reason(tmp_path):
    rows = KEPT + [row for rows in DROPPED.values() for row in rows]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = StackExchange(input=tmp_path / "in.jsonl", output=tmp_path / "out", validation=0).prepare()
    assert (report["rows"], report["imported"]) == (len(rows), len(KEPT))
    assert report["dropped"] == {reason: len(rows) for reason, rows in DROPPED.items()}
    assert report["repaired"] == {
        "HTML made text": 11,
        "response without a rank left out": 1,
        "empty response left out": 1,
        "equal responses of the same rank merged": 1,
    }
    assert len(read_comparisons(tmp_path / "out" / "train.jsonl")) == len(KEPT)


def test_the_invariants_of_an_importer_hold():
    made = [read_one(StackExchange, row) for row in KEPT]
    known = [
        f"{plain_text(row.get('question') or 'Milk & eggs?' + chr(10) * 2 + 'Which first?')} "
        f"{plain_text(one.get('text') or one['body'])}"
        for row in KEPT
        for one in row["answers"]
    ]
    check_invariants(made, words, known, str)


def test_answers_are_ranked_by_score_with_ties_and_keep_their_authors():
    made, asked, tied, merged = [read_one(StackExchange, row) for row in KEPT]
    assert words(made)[:2] == ["How do I peel an egg? Roll it.", "How do I peel an egg? Use a spoon.\n\nThen water."]
    assert made.ranking == ((0, 1), (2,)) and made.target == (0.5, 0.5, 0.0)
    assert made.labels["options"][0] == {"answer_id": 15, "author": "Ada", "pm_score": 3, "selected": True}
    assert (made.labels["qid"], made.labels["metadata"], made.source) == (1, ["a link"], "stack-exchange")
    # scores of the second question: 0 votes and accepted 1, 2 votes log2(3) = 1.58 -> 2, below 0 -1 though accepted
    assert asked.context[0].content == "Milk & eggs?\n\nWhich first?" and asked.ranking == ((1,), (0,), (2,))
    assert asked.labels["options"][0]["owner"] == {"display_name": "Bo"} and asked.labels["tags"] == ["food"]
    assert tied.target == (0.5, 0.5) and words(tied)[0] == "Plain < text? List<int>"
    assert merged.ranking == ((0,), (1,))


@pytest.mark.parametrize(
    ("votes", "accepted", "score"),
    [
        (-1, False, -1),
        (-7, True, -1),
        (0, False, 0),
        (0, True, 1),
        (1, False, 1),
        (2, False, 2),
        (4, False, 2),
        (5, False, 3),
        (7, True, 4),
        (1000, False, 10),
    ],
)
def test_votes_become_scores_by_the_rule_of_askell(votes, accepted, score):
    assert vote_score(votes, accepted) == score


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            "<p>Use <code>a &lt; b</code> or\n  <a href='x'>this</a>.</p>\n\n<p>Next</p>",
            "Use `a < b` or this.\n\nNext",
        ),
        ("<p>So:</p>\n\n<pre><code>if a:\n    b\n</code></pre>\n\n<p>ok</p>", "So:\n\n```\nif a:\n    b\n```\n\nok"),
        ("<ul>\n<li>one</li>\n<li><p>two</p></li>\n</ul>\nend<br>line", "- one\n- two\n\nend\nline"),
        ("no <b>tag</b> &lt; of ours", "no <b>tag</b> &lt; of ours"),
        ("<p>cut <pre>a  b", "cut\n\n```\na  b"),
        ("a</pre> b", "a b"),
        ("<p></p><li>", "-"),
    ],
)
def test_html_is_read_as_text(source, expected):
    assert plain_text(source) == expected


PIECES = st.sampled_from(["<p>", "</p>", "<pre>", "</pre>", "<code>", "</code>", "<li>", "<br/>", "<a", "<!", "<![",
                          "]]>", "&lt;", "&#", "a", "  ", "\n", "<", ">"])  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.lists(PIECES, max_size=12))
def test_any_html_is_text_without_marks_of_html_or_dropped(pieces):
    try:
        made = plain_text("".join(pieces))
    except Drop:
        return
    assert "<pre>" not in made and "</p>" not in made and made == made.strip() or made == "".join(pieces)
