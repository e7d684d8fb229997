"""The support chats: what counts as asking back, what a reply earns, and how the thumbs follow from it."""

import numpy as np
import pytest

from offline_lmrl.environments.rollouts import rollout
from offline_lmrl.environments.scripted import ScriptedPolicy
from offline_lmrl.tasks import make_environment
from offline_lmrl.tasks.support import HELD_OUT_ITEMS, ITEMS, PROBLEMS, PUSHES, VAGUE, Support, asks_back


@pytest.mark.parametrize(
    "text, asked",
    [
        ("Could you send me the order number?", True),
        ("I see. Which colour is it now? Thank you.", True),
        ("I see.\nWhat is your name?", True),
        ("Really? You can check. Why not?", False),  # no question of four words
        ("I wonder what you ordered.", False),
        ("We do not know this ?", True),  # white space before the mark
        ("one two three ?", False),
        ("could you tell me " * 4 + "?", False),  # a loop
        ("could you tell me " * 3 + "?", True),
        ("What is your order number. Thanks", False),
        ("? ? ? ?", False),
        ("", False),
    ],
)
def test_a_reply_asks_back_with_a_question_of_four_words(text, asked):
    assert asks_back(text) is asked


def test_every_question_of_the_logs_asks_back_and_no_vague_text_does():
    for problem in PROBLEMS:
        assert len(problem.openings) == len(problem.questions) == len(problem.answers) == 3
        assert all(asks_back(question) for question in problem.questions)
    assert not any(asks_back(text) for text in VAGUE)
    assert not set(ITEMS) & set(HELD_OUT_ITEMS)


class Says(ScriptedPolicy):
    def __init__(self, *texts):
        self.texts = texts

    def write(self, history, rng):
        return self.texts[sum(turn.role == "assistant" for turn in history)]


def test_each_reply_earns_its_own_thumb_and_decides_what_the_customer_says_next():
    episodes = rollout(Says("Which one do you mean?", "Please be patient."), make_environment("support"), range(20))
    assert all([t.reward for t in e.turns if t.role == "assistant"] == [1.0, -1.0] for e in episodes)
    assert all(e.terminated and e.labels["asks_back"] == 0.5 and len(e.turns) == 4 for e in episodes)
    answers = {answer for problem in PROBLEMS for answer in problem.answers}
    assert {e.turns[2].content for e in episodes} <= answers
    assert len({e.turns[0].content for e in episodes}) > 10
    vague = rollout(Says("Please be patient.", "Please be patient."), make_environment("support"), range(5))
    assert all(e.turns[2].content in PUSHES and e.total_return == -2 for e in vague)


def test_a_known_question_gets_its_own_answer():
    chat = Support()
    chat.reset(3)
    place = 1
    result = chat.step("I see. " + chat.problem.questions[place].format(item=chat.item))
    assert result.turns[0].content == chat.problem.answers[place]


def test_logged_thumbs_agree_with_the_rule_but_for_the_wrong_ones():
    chats = Support(held_out=False).chats(1500, 0)
    assert chats[:3] == Support(held_out=False).chats(3, 0) != Support(held_out=False).chats(3, 1)
    thumbs = [(chat["messages"][r["turn"]]["content"], r["value"]) for chat in chats for r in chat["reactions"]]
    agree = [(value == 1) == asks_back(text) for text, value in thumbs]
    replies = [m["content"] for chat in chats for m in chat["messages"] if m["role"] == "assistant"]
    assert np.mean(agree) == pytest.approx(0.95, abs=0.02)
    assert np.mean([asks_back(text) for text in replies]) == pytest.approx(0.25, abs=0.03)
    # Each of two replies has a thumb with probability .8; of chats without one (.04), the last reply has one.
    assert len(thumbs) / len(replies) == pytest.approx(0.82, abs=0.02)
    assert all(chat["reactions"] and len(chat["messages"]) == 4 for chat in chats)
    assert len(set(replies)) > 1000
