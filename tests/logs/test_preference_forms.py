"""Preference rows as they are: the context is found by turn, and nothing is changed or left out without a count."""

import json
from collections import Counter

import pytest

from offline_lmrl.errors import InputError
from offline_lmrl.logs.preference_forms import read_comparison, root_group
from offline_lmrl.logs.trajectory import Turn


def read(row, **settings):
    counts = Counter()
    return read_comparison(row, "f:1", counts, **settings), dict(counts)


def said(turns):
    return [(turn.role, turn.content) for turn in turns]


def user(text):
    return {"role": "user", "content": text}


def agent(text, **fields):
    return {"role": "assistant", "content": text, **fields}


def test_explicit_text_is_a_question_and_two_replies():
    row, counts = read({"prompt": "Sky?", "chosen": "Blue.", "rejected": "Blue, or not.", "margin": 0.5, "who": "w1"})
    assert said(row.context) == [("user", "Sky?")]
    assert row.options == ((Turn("assistant", "Blue."),), (Turn("assistant", "Blue, or not."),))
    assert (row.target, row.ranking, row.labels) == ((1.0, 0.0), ((0,), (1,)), {"strength": 0.5, "who": "w1"})
    assert counts == {}


def test_a_common_beginning_of_two_replies_is_no_context():
    row, counts = read({"chosen": "The sky is blue", "rejected": "The sky is black"})
    assert row.context == () and [said(option) for option in row.options] == [
        [("assistant", "The sky is blue")],
        [("assistant", "The sky is black")],
    ]
    assert counts == {"repaired: text without turns read as the agent's reply, without a context": 1}


def test_implicit_messages_share_the_turns_that_are_equal():
    start = [{"role": "system", "content": "s"}, user("q"), agent("earlier"), user("and?")]
    row, _ = read({"chosen": [*start, agent("The sky is blue")], "rejected": [*start, agent("The sky is black")]})
    assert said(row.context) == [("system", "s"), ("user", "q"), ("assistant", "earlier"), ("user", "and?")]
    assert not any(turn.is_trainable for turn in row.context)
    assert [said(option) for option in row.options] == [
        [("assistant", "The sky is blue")],
        [("assistant", "The sky is black")],
    ]


def test_sharegpt_pairs_have_their_prompt_in_a_dialogue_and_sides_of_one_message():
    row, _ = read(
        {
            "conversations": [{"from": "human", "value": "Sky?"}],
            "chosen": {"from": "gpt", "value": "Blue."},
            "rejected": {"from": "gpt", "value": "Green."},
        }
    )
    assert said(row.context) == [("user", "Sky?")]
    assert [said(option) for option in row.options] == [[("assistant", "Blue.")], [("assistant", "Green.")]]
    assert row.labels == {}


def test_lists_numbers_and_groups_of_a_table_are_read():
    row, counts = read(
        {"prompt": "Sky?", "responses": '["Blue.", "Green."]', "ranks": "[1, 2]", "weight": "2", "group": "7"}
    )
    assert (row.target, row.weight, row.group) == ((1.0, 0.0), 2.0, "7")
    assert counts == {"repaired: list written as JSON text": 2, "repaired: weight written as text": 1}


def test_options_may_have_several_turns():
    row, _ = read(
        {
            "prompt": [user("6*7?")],
            "chosen": [agent("call"), {"role": "tool", "content": "42"}, agent("42")],
            "rejected": [agent("41")],
        }
    )
    assert [turn.is_trainable for turn in row.options[0]] == [True, False, True]


@pytest.mark.parametrize(
    "prompt, chosen, rejected",
    [
        ("Sky?", "Sky? Blue", "Sky? Red"),
        ("Sky?", [user("Sky?"), agent(" Blue")], [user("Sky?"), agent(" Red")]),
        ([user("Sky?")], [user("Sky?"), agent(" Blue")], [user("Sky?"), agent(" Red")]),
    ],
)
def test_a_prompt_that_the_replies_repeat_is_removed_and_counted(prompt, chosen, rejected):
    row, counts = read({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    assert said(row.context) == [("user", "Sky?")]
    assert [said(option) for option in row.options] == [[("assistant", " Blue")], [("assistant", " Red")]]
    assert counts == {"repaired: prompt removed from the start of a reply": 2}


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": "Hello there", "rejected": "Hi"},
        {"responses": ["Hello there", "Hi", ""], "ranks": [0, 1, 2]},
    ],
)
def test_one_reply_that_starts_with_the_words_of_the_prompt_is_whole(row):
    row, counts = read({"prompt": "Hello", **row})
    assert [said(option) for option in row.options] == [[("assistant", "Hello there")], [("assistant", "Hi")]]
    assert "repaired: prompt removed from the start of a reply" not in counts


def test_end_tokens_are_removed_and_counted():
    row, counts = read({"prompt": "Sky?", "chosen": "Blue</s>", "rejected": "Red"})
    assert said(row.options[0]) == [("assistant", "Blue")]
    assert counts == {"repaired: end token removed from a reply": 1}


TALK = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Sky?\n\nAssistant:"


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": TALK + " Blue.", "rejected": TALK + " Black."},
        {"prompt": TALK, "chosen": " Blue.", "rejected": " Black."},
        {"prompt": TALK, "chosen": TALK + " Blue.", "rejected": TALK + " Black."},
    ],
)
def test_transcripts_are_read_turn_by_turn(row):
    row, counts = read(row)
    assert said(row.context) == [("user", "Hi"), ("assistant", "Hello."), ("user", "Sky?")]
    assert [said(option) for option in row.options] == [[("assistant", "Blue.")], [("assistant", "Black.")]]
    assert counts == {}


def test_turns_of_one_speaker_in_a_row_are_merged_and_inner_tags_stay_text():
    row, counts = read({"chosen": TALK + " Blue.\n\nAssistant: Human: is it?", "rejected": TALK + " No.\nHuman: why"})
    assert [said(option) for option in row.options] == [
        [("assistant", "Blue.\n\nHuman: is it?")],
        [("assistant", "No.\nHuman: why")],
    ]
    assert counts == {"repaired: consecutive Assistant turns merged": 1}


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"chosen": TALK + " a", "rejected": TALK + " a "}, "identical replies"),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "identical replies"),
        ({"prompt": "p", "chosen": "", "rejected": "a"}, "empty reply"),
        ({"chosen": TALK + " ", "rejected": TALK + " a"}, "empty reply"),
        (
            {"chosen": TALK + " a", "rejected": TALK + " b\n\nHuman: x\n\nAssistant: y"},
            "the sides differ before the last reply",
        ),
        (
            {"chosen": TALK + " a", "rejected": TALK + " a\n\nHuman: x\n\nAssistant: y"},
            "one side continues where the other ends",
        ),
        (
            {"chosen": TALK + " a", "rejected": TALK.replace("Hi", "Ho") + " a"},
            "the sides differ before the agent's reply",
        ),
        ({"chosen": [user("q")], "rejected": [user("q")]}, "identical replies"),
        (
            {"chosen": [user("q"), agent("a"), user("x")], "rejected": [user("q"), agent("b")]},
            "a side that does not end with the agent",
        ),
        ({"prompt": "p", "chosen": [agent(None)], "rejected": [agent("b")]}, "message without content"),
        ({"prompt": "p", "responses": ["a"], "ranks": [0]}, "fewer than two ranked responses"),
        ({"prompt": "p", "responses": ["a", "a"], "ranks": [0, 1]}, "one text with two ranks"),
    ],
)
def test_rows_that_compare_nothing_are_dropped_for_a_reason(row, reason):
    assert read(row) == (None, {f"dropped: {reason}": 1})


def test_an_empty_reply_is_kept_where_that_is_allowed():
    row, _ = read({"chosen": TALK + " ", "rejected": TALK + " a"}, allow_empty=True)
    assert said(row.options[0]) == [("assistant", "")]


def test_ranks_become_a_ranking_with_ties():
    row, counts = read(
        {"prompt": "p", "responses": ["d", "a", "b", "x", "c", "a", ""], "ranks": [3, 0, 0, None, 1, 0, 2]}
    )
    assert [said(option)[0][1] for option in row.options] == ["d", "a", "b", "c"]
    assert row.target == (0.0, 0.5, 0.5, 0.0) and row.ranking == ((1, 2), (3,), (0,))
    assert counts == {
        "repaired: response without a rank left out": 1,
        "repaired: empty response left out": 1,
        "repaired: equal responses of the same rank merged": 1,
    }


def test_ranked_replies_to_a_transcript_follow_its_turns():
    row, counts = read({"prompt": TALK, "responses": [" Blue.", TALK + " Black.", " Red.\n"], "rank": [0, 1, 2]})
    assert said(row.context) == [("user", "Hi"), ("assistant", "Hello."), ("user", "Sky?")]
    assert [said(option) for option in row.options] == [
        [("assistant", "Blue.")],
        [("assistant", "Black.")],
        [("assistant", "Red.")],
    ]
    assert counts == {"repaired: prompt removed from the start of a reply": 1}


def test_labels_of_responses_that_are_left_out_go_too():
    labels = {"options": ["m1", "m2", "m3"], "note": "n"}
    row, _ = read({"prompt": "p", "responses": ["a", "b", "c"], "ranks": [1, None, 0], "labels": labels})
    assert row.labels == {"options": ["m1", "m3"], "note": "n"}


def test_branches_of_one_conversation_share_a_group():
    first, _ = read({"chosen": TALK + " a", "rejected": TALK + " b"})
    second, _ = read({"chosen": "\n\nHuman:  hi!\n\nAssistant: x", "rejected": "\n\nHuman: hi!\n\nAssistant: y"})
    other, _ = read({"prompt": "Ho", "chosen": "x", "rejected": "y"})
    assert first.group == second.group == root_group([Turn("user", "HI")]) != other.group
    own, _ = read({"prompt": "Ho", "chosen": "x", "rejected": "y", "group": "mine", "weight": 2})
    assert (own.group, own.weight) == ("mine", 2.0)


@pytest.mark.parametrize(
    "row, expected",
    [
        ([1], "row: found [1], expected an object"),
        ({"text": "x"}, "fields: found text, expected context, options and target; or prompt, chosen and rejected"),
        ({"chosen": 3, "rejected": "a"}, "chosen: found 3, expected a list of messages"),
        ({"prompt": 3, "chosen": "b", "rejected": "a"}, "prompt: found 3, expected a list of messages"),
        ({"prompt": "p", "responses": "ab", "ranks": [0, 1]}, "responses: found 'ab', expected a list"),
        (
            {"prompt": "p", "responses": ["a"], "ranks": [0, 1]},
            "ranks: found 2 for 1 responses, expected one for each response",
        ),
        ({"prompt": "p", "responses": ["a", "b"], "ranks": [0, "1"]}, "ranks[1]: found '1', expected a number"),
        (
            {"prompt": "p", "chosen": [agent("a", reward=1)], "rejected": [agent("b")]},
            "options[0]: found a reward of 1.0",
        ),
        (
            {"prompt": "p", "chosen": "a", "rejected": "b", "margin": -1},
            "labels.strength: found -1, expected a number",
        ),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "weight": "x"}, "weight: found 'x', expected a number"),
    ],
)
def test_values_of_the_wrong_type_are_named(row, expected):
    with pytest.raises(InputError) as error:
        read(row)
    assert str(error.value).startswith(f"f:1: {expected}") and "\n" not in str(error.value)


def test_a_column_of_tools_goes_to_the_context():
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"x": 1}}}]}
    row = {
        "prompt": [{"role": "user", "content": "1+2"}],
        "chosen": [call],
        "rejected": [{"role": "assistant", "content": "4"}],
        "tools": tools,
    }
    comparison = read_comparison(row, "pairs:1", Counter())
    assert comparison.context == (Turn("system", "", trainable=None, tools=json.dumps(tools)), Turn("user", "1+2"))
    assert comparison.options[0][0].tool_calls == '[{"function": {"name": "add", "arguments": {"x": 1}}}]'
    assert "tools" not in comparison.labels
