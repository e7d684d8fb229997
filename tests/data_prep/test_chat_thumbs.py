"""Chats with thumbs: the reply that got one is scored, wherever the log says that it is."""

import json

from data_prep.chat_thumbs import ChatThumbs
from offline_lmrl.logs.io import read_trajectories

SYSTEM = {"role": "system", "content": "Be brief."}
CHAT = [
    {"role": "user", "content": "Rain?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Snow?"},
    {"role": "assistant", "content": "No."},
    {"role": "user", "content": "Thanks"},
]


def chat(*reactions, messages=CHAT, **fields):
    return {"messages": messages, "reactions": list(reactions), **fields}


def comparia(turn, text, liked, disliked, **fields):
    return {
        "conversation_a": CHAT[:4],
        "conversation_b": [SYSTEM, *CHAT],
        "model_pos": "b",
        "msg_index": turn,
        "question_content": "Rain?",
        "response_content": text,
        "liked": liked,
        "disliked": disliked,
        "useful": liked,
        "incorrect": None,
        "comment": None,
        "visitor_id": "v",
        **fields,
    }


UP, DOWN = ({"turn": turn, "value": value} for turn, value in ((1, 1), (3, -1)))
KEPT = {  # row -> rewards of its turns
    "one": ({"messages": CHAT, "reaction": {**UP, "tags": ["useful"]}, "user": 7}, [None, 1.0]),
    "two": (chat(UP, DOWN), [None, 1.0, None, -1.0]),
    "as a table with both columns has it": (chat(UP, reaction=None), [None, 1.0]),
    "the later one only": (chat(DOWN, messages=CHAT[:4]), [None, None, None, -1.0]),
    "twice the same": (chat(UP, UP), [None, 1.0]),
    "counted without the system message": (chat(DOWN, messages=[SYSTEM, *CHAT]), [None, None, None, None, -1.0]),
    "counted with the system message": (chat({"turn": 2, "value": 1}, messages=[SYSTEM, *CHAT]), [None, None, 1.0]),
    "one of no use": (chat(UP, {"turn": 2, "value": 1}, {"turn": 3, "value": 0}), [None, 1.0]),
    "contradicted": (chat(UP, {"turn": 1, "value": -1}, {"turn": 1, "value": 1}, DOWN), [None, None, None, -1.0]),
    "by the text": (comparia(1, "Yes.", True, False), [None, None, 1.0]),
    "by the text alone": (comparia(0, " No.", False, True), [None, None, None, None, -1.0]),
    "first side": (comparia(1, "Yes.", False, True, model_pos="a"), [None, -1.0]),
}
DROPPED = {
    "no reaction": [chat()],
    "a reaction that is neither up nor down": [
        chat({"turn": 1, "value": 0}),
        chat({"turn": 1}),
        comparia(1, "Yes.", True, True),
    ],
    "a reaction that is not on a reply of the agent": [
        chat({"turn": 2, "value": 1}),
        chat({"turn": 9, "value": 1}),
        chat({"turn": -2, "value": 1}),
        comparia(2, "Other.", True, None),
        chat({"turn": 0, "value": 1}, messages=[{"role": "assistant", "content": " "}]),
    ],
    "contradictory reactions to one reply": [chat(UP, {"turn": 1, "value": -1})],
    "rewards in addition to reactions": [chat(UP, messages=[CHAT[0], {**CHAT[1], "reward": 2}])],
    "fields: expected messages and reaction {turn, value}, or messages and reactions, a list of those": [
        {"reaction": UP},
        {"messages": CHAT},
        {"messages": CHAT, "reaction": None, "thumb": 1},
    ],
    "messages: expected a list of messages": [chat(UP, messages="Rain?")],
    "reaction: expected an object": [{"messages": CHAT, "reaction": "up"}],
    "reactions: expected a list": [{"messages": CHAT, "reactions": UP}],
    "turn: expected a number": [chat({"turn": None, "value": 1})],
    "turn: expected a whole number": [chat({"turn": 0.5, "value": 1})],
    "value: expected a number": [chat({"turn": 1, "value": "up"})],
    "model_pos: expected a or b": [comparia(1, "Yes.", True, None, model_pos="c")],
    "messages.role: expected one of system, user, assistant, tool, environment": [
        chat(UP, messages=[{"role": "narrator", "content": "x"}])
    ],
}


def run(tmp_path, rows):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = ChatThumbs(input=tmp_path / "in.jsonl", output=tmp_path / "out", validation=0).prepare()
    return read_trajectories(tmp_path / "out" / "train.jsonl"), report


def test_every_row_is_imported_or_dropped_for_a_reason(tmp_path):
    rows = [row for row, _ in KEPT.values()] + [row for rows in DROPPED.values() for row in rows]
    made, report = run(tmp_path, rows)
    assert (report["rows"], report["imported"], len(made)) == (len(rows), len(KEPT), len(KEPT))
    assert report["dropped"] == {reason: len(rows) for reason, rows in DROPPED.items()}
    assert report["repaired"] == {
        "turn counted without the system message": 2,
        "reply found by its text": 1,
        "left out: a reaction that is not on a reply of the agent": 1,
        "left out: a reaction that is neither up nor down": 1,
        "left out: contradictory reactions to one reply": 1,
    }
    assert report["kept as it is"] == {"a chat that does not end with the agent": 10}
    assert report["replies"] == {"by the agent": 24, "thumbs up": 7, "thumbs down": 6}


def test_only_replies_with_a_thumb_are_credited(tmp_path):
    made, _ = run(tmp_path, [row for row, _ in KEPT.values()])
    for row, (name, (_, rewards)) in zip(made, KEPT.items(), strict=True):
        assert [turn.reward for turn in row.turns] == rewards, name
        assert [turn.is_trainable for turn in row.turns] == [reward is not None for reward in rewards], name
    assert len({row.group for row in made}) == 1 and made[0].source == "chat-thumbs"


def test_what_else_people_said_is_in_the_labels(tmp_path):
    made, _ = run(tmp_path, [KEPT[name][0] for name in ("one", "by the text")])
    assert made[0].labels == {"reactions": [{"turn": 1, "value": 1, "tags": ["useful"]}], "user": 7, "agent_turns": 2}
    reaction = {"turn": 1, "text": "Yes.", "liked": True, "disliked": False, "tags": ["useful"], "comment": None}
    assert made[1].labels == {"visitor_id": "v", "agent_turns": 2, "reactions": [reaction]}


def test_a_reaction_that_could_not_be_read_back_is_dropped_with_its_row(tmp_path):
    def row(levels):
        deep = 0
        for _ in range(levels):
            deep = [deep]
        return {"messages": CHAT, "reaction": {**UP, "comment": deep}}

    rows = [row(levels) for levels in (196, 197, 198, 199)]  # of which the last is too deep itself
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = ChatThumbs(input=tmp_path / "in.jsonl", output=tmp_path / "out", validation=0).prepare()
    assert report["imported"] == 2 and report["dropped"] == {
        "labels: expected less nesting": 1,
        "JSON: expected less nesting": 1,
    }
    assert len(read_trajectories(tmp_path / "out" / "train.jsonl")) == 2
