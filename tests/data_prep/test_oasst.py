"""Conversation trees in their three forms, and every reason to leave a message out."""

import json
import time

import pytest

from data_prep.oasst import Oasst, OasstRatings
from offline_lmrl.errors import InputError
from offline_lmrl.logs.io import read_comparisons, read_trajectories
from tests.comparisons import check_invariants


def message(name, parent=None, rank=None, role=None, **fields):
    """A message that says its id; ids of prompters start with q."""
    role = role or ("prompter" if name.startswith("q") else "assistant")
    return {
        "message_id": name,
        "parent_id": parent,
        "text": f"text {name}",
        "role": role,
        "lang": "en",
        "rank": rank,
        "deleted": False,
        "review_result": True,
        "tree_state": "ready_for_export",
        **fields,
    }


HUB = {
    "labels": {"name": ["quality", "spam", "humor"], "value": [0.75, 0.0, None], "count": [3, 3, 0]},
    "emojis": {"name": ["+1", "_skip_reply", "-1"], "count": [3, 1, 1]},
}
EXPORT = {"labels": {"quality": {"value": 0.25, "count": 2}}, "emojis": {"-1": 2}, "synthetic": True}
MESSAGES = [
    message("b", "q1", 1.0, **EXPORT),
    message("q1", text="Hello?"),
    message("a", "q1", 0.0, **HUB),
    message("c", "q1", 2, lang="de"),
    message("d", "q1"),
    message("q2", "a"),
    message("e", "q2", 0),
    message("f", "q2", 0),
    message("g", "q2", 1, text="text f"),
    message("h", "q2", 0, text="text e"),
    message("q3", "b"),
    message("i", "q3", 0),
    message("q9", text="Hello"),
    message("z", "q9", 1),
    message("y", "q9", 0),
]
LEFT_OUT = {
    "deleted": [message("x1", "q1", 0, deleted=True)],
    "failed its review": [message("x2", "q1", 0, review_result=False)],
    "its tree is not ready": [message("qx", tree_state="growing")],
    "no text": [message("x3", "q1", 0, text=" \n")],
    "repeated": [message("a", "q1", 5, text="other")],
    "the message that they reply to is missing or left out": [
        message("qa", "x1"),
        message("x4", "qa", 0),
        message("x5", "nobody", 0),
        message("x6", "x7"),
        message("x7", "x6"),
        message("x8", "x8"),
    ],
}


def tree(messages, root):
    """The rows of a tree as the export nests them."""

    def node(one):
        replies = [node(other) for other in messages if other["parent_id"] == one["message_id"]]
        return {name: value for name, value in one.items() if name not in ("parent_id", "tree_state")} | {
            "replies": replies
        }

    return {
        "message_tree_id": root,
        "tree_state": "ready_for_export",
        "prompt": node(next(one for one in messages if one["message_id"] == root)),
    }


def run(tmp_path, rows, importer=Oasst, read=read_comparisons, **settings):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = importer(input=tmp_path / "in.jsonl", output=tmp_path / "out", validation=0, **settings).prepare()
    return read(tmp_path / "out" / "train.jsonl"), report


def words(comparison):
    return [" / ".join(turn.content for turn in (*comparison.context, *option)) for option in comparison.options]


def test_ranked_replies_to_one_message_are_one_comparison(tmp_path):
    made, _ = run(tmp_path, MESSAGES)
    assert [words(one) for one in made] == [
        ["Hello? / text b", "Hello? / text a", "Hello? / text c"],
        ["Hello / text z", "Hello / text y"],
    ]
    assert made[0].ranking == ((1,), (0,), (2,)) and made[0].group == made[1].group
    assert made[0].labels["options"][1] == {
        "message_id": "a",
        "lang": "en",
        "rank": 0.0,
        "labels": {"quality": 0.75, "spam": 0.0},
        "emojis": {"+1": 3, "_skip_reply": 1, "-1": 1},
    }


def test_every_message_is_used_or_left_out_for_a_reason(tmp_path):
    rows = MESSAGES + [row for rows in LEFT_OUT.values() for row in rows]
    made, report = run(tmp_path, rows)
    assert report["rows"] == report["imported"] == len(rows) and len(made) == 2
    assert report["assembled"] == {
        **{f"messages left out: {reason}": len(rows) for reason, rows in LEFT_OUT.items()},
        "messages of prompters": 4,
        "replies compared": 5,
        "replies not compared": 6,
        "sets of replies repaired: response without a rank left out": 1,
        "sets of replies dropped: one text with two ranks": 1,
        "sets of replies dropped: fewer than two ranked responses": 1,
    }
    once = [n for name, n in report["assembled"].items() if not name.startswith("sets of replies ")]
    assert sum(once) == len(rows)


def test_rows_that_are_no_messages_are_dropped(tmp_path):
    broken = {
        "fields: expected message_id, thread or prompt": [{"text": "x"}],
        "role: expected prompter or assistant": [message("x", role="system"), message("x", role=["assistant"])],
        "parent_id: expected text or null": [message("x", 3)],
        "deleted: expected true, false or null": [message("x", deleted="no")],
        "text: expected text": [message("x", text=None)],
        "rank: expected a number": [message("x", rank="0")],
        "labels: value: expected one for each name": [message("x", labels={"name": ["quality"], "value": []})],
        "labels: value: expected a number": [message("x", labels={"quality": {"value": "good"}})],
        "emojis: expected an object": [message("x", emojis=["+1"])],
        "prompt: replies: expected a list": [tree([message("q1")], "q1") | {"prompt": message("q1", replies="none")}],
        "thread: expected an object": [{"thread_id": "t", "thread": ["x"]}],
    }
    _, report = run(tmp_path, MESSAGES + [row for rows in broken.values() for row in rows])
    assert report["dropped"] == {reason: len(rows) for reason, rows in broken.items()}
    with pytest.raises(InputError, match="found no ranked replies to one message"):
        run(tmp_path, MESSAGES[:2])


def test_trees_and_threads_and_messages_in_any_order_are_the_same(tmp_path):
    made, _ = run(tmp_path, MESSAGES)
    trees, report = run(tmp_path, [tree(MESSAGES, "q1"), tree(MESSAGES, "q9")])
    assert trees == made and report["imported"] == 2
    turned, _ = run(tmp_path, MESSAGES[::-1])
    assert [one.select(range(len(one.options))[::-1]) for one in turned[::-1]] == made
    threads = [{"thread_id": row["message_id"], "thread": [MESSAGES[1], row]} for row in MESSAGES[:1] + MESSAGES[2:4]]
    made, report = run(tmp_path, threads)
    assert words(made[0]) == ["Hello? / text b", "Hello? / text a", "Hello? / text c"]
    assert report["assembled"]["messages left out: repeated"] == 2


def test_other_languages_are_left_out_where_some_are_named(tmp_path):
    made, report = run(tmp_path, MESSAGES, languages=["en"])
    assert words(made[0]) == ["Hello? / text b", "Hello? / text a"]
    assert report["assembled"]["messages left out: in another language"] == 1


def test_the_invariants_of_an_importer_hold(tmp_path):
    made, _ = run(tmp_path, MESSAGES)
    texts = {one["message_id"]: one["text"] for one in MESSAGES}
    known = [f"{texts[one['parent_id']]} / {one['text']}" for one in MESSAGES if one["parent_id"] in ("q1", "q9")]
    check_invariants(made, words, known, str)


def test_rated_replies_are_scored_and_what_came_before_is_context(tmp_path):
    rows = [*MESSAGES, message("j", "q2", **HUB)]
    made, report = run(tmp_path, rows, OasstRatings, read_trajectories)
    assert {row.turns[-1].content: row.turns[-1].reward for row in made} == {
        "text a": 0.75,
        "text b": 0.25,
        "text j": 0.75,
    }
    last = next(row for row in made if row.turns[-1].content == "text j")
    assert [(turn.role, turn.is_trainable, turn.reward) for turn in last.turns] == [
        ("user", False, None),
        ("assistant", False, None),
        ("user", False, None),
        ("assistant", True, 0.75),
    ]
    assert len({row.group for row in made}) == 1 and last.labels["message_id"] == "j"
    assert report["assembled"] == {"messages of prompters": 4, "replies scored": 3, "replies without quality": 9}


def test_thumbs_are_the_balance_of_up_and_down(tmp_path):
    made, report = run(tmp_path, MESSAGES, OasstRatings, read_trajectories, reward="thumbs")
    assert {row.turns[-1].content: row.turns[-1].reward for row in made} == {"text a": 0.5, "text b": -1.0}
    assert report["assembled"]["replies without thumbs"] == 9
    with pytest.raises(InputError, match="found no reply with thumbs"):
        run(tmp_path, MESSAGES[4:], OasstRatings, reward="thumbs")


def test_a_chain_takes_time_of_its_length(tmp_path):
    ids = [f"{'qa'[i % 2]}{i}" for i in range(4000)]
    chain = [message(name, parent, rank=0) for name, parent in zip(ids, [None, *ids], strict=False)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*chain, message("b", ids[-2], 1)]))
    start = time.perf_counter()
    report = Oasst(input=tmp_path / "in.jsonl", output=tmp_path / "out", validation=0).prepare()
    assert time.perf_counter() - start < 5  # of the square of its length: 15 s and more
    assert report["assembled"] == {
        "messages of prompters": 2000,
        "replies compared": 2,
        "replies not compared": 1999,
        "sets of replies dropped: fewer than two ranked responses": 1999,
    }
    (row,) = read_comparisons(tmp_path / "out" / "train.jsonl")
    assert [turn.content for turn in row.context] == [f"text {name}" for name in ids[:-1]]


def test_labels_that_could_not_be_read_back_are_dropped_with_their_set(tmp_path):
    deep = 0
    for _ in range(198):
        deep = [deep]
    rows = [
        message("q"),
        message("a", "q", 0),
        message("b", "q", 1, detoxify={"x": deep}),
        message("q1"),
        message("c", "q1", 0),
        message("d", "q1", 1),
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = Oasst(input=tmp_path / "in.jsonl", output=tmp_path / "out", validation=0).prepare()
    assert report["assembled"] == {
        "messages of prompters": 2,
        "replies compared": 2,
        "replies not compared": 2,
        "sets of replies dropped: JSON: expected less nesting": 1,
    }
    assert len(read_comparisons(tmp_path / "out" / "train.jsonl")) == 1
