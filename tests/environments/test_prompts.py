"""A prompt set with a reward is an environment of one turn, and a reward that is not one is one clear error."""

import json

import numpy as np
import pytest

from offline_lmrl.environments.prompts import PromptEnvironment
from offline_lmrl.environments.rollouts import rollout
from offline_lmrl.errors import InputError
from offline_lmrl.logs.protocols import Reply
from offline_lmrl.logs.trajectory import Turn
from offline_lmrl.tasks import make_environment


def lengths(contexts, texts, labels):
    return [float(len(text)) for text in texts]


class Echo:
    """A policy that repeats the prompt; its session needs no tokenizer."""

    def start(self, seeds):
        return self

    def reply(self, rows, histories, options=None):
        return [Reply(history[-1].content) for history in histories]


def test_every_prompt_comes_once_before_any_comes_again():
    environment = PromptEnvironment(["a", "bb", "ccc", "dddd"], lengths)
    first, second = (environment.reset(range(start, start + 4)) for start in (0, 4))
    assert sorted(turns[0].content for turns in first) == ["a", "bb", "ccc", "dddd"]
    assert {turns[0] for turns in first} == {turns[0] for turns in second}
    assert environment.reset([6]) == [second[2]]  # a function of the seed alone


def test_turns_given_as_such_stay_as_they_are():
    named, earlier = Turn("user", "hi", name="ann"), Turn("assistant", "a", None, 0.5, (1, 2), (-0.1, -0.2))
    prompts = [(named, earlier, named), [named, {"role": "user", "content": "bb"}]]
    environment = PromptEnvironment(prompts, lengths)
    assert [turns for turns, _ in environment.prompts] == [prompts[0], (named, Turn("user", "bb"))]


def test_an_episode_is_one_turn_with_the_score_of_its_reply():
    played = rollout(Echo(), PromptEnvironment(["a", "bb", "ccc"], lengths, batch_size=2), range(3))
    assert sorted(t.total_return for t in played) == [1.0, 2.0, 3.0]
    assert all(t.terminated and len(t.turns) == 2 for t in played)


def test_a_function_sees_contexts_replies_and_the_other_columns(tmp_path):
    rows = [{"prompt": "2 + 2", "answer": "4"}, {"prompt": [{"role": "user", "content": "1 + 1"}], "answer": "2"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen = []

    def right(contexts, texts, labels):
        seen.extend(zip((c[-1].content for c in contexts), texts, (known["answer"] for known in labels), strict=True))
        return np.array([text == known["answer"] for text, known in zip(texts, labels, strict=True)], dtype=np.float32)

    environment = PromptEnvironment(tmp_path / "p.jsonl", right)
    environment.reset([0, 1])
    results = environment.step([0, 1], ["4", "4"])
    assert sorted(seen) == [("1 + 1", "4", "2"), ("2 + 2", "4", "4")]
    assert sorted(result.reward for result in results) == [0.0, 1.0]


def test_a_scorer_scores_each_reply_in_its_context():
    class Overlap:
        def score(self, context, options):
            return np.array([float(context[-1].content == option[0].content) for option in options])

    played = rollout(Echo(), PromptEnvironment([(Turn("system", "be brief"), Turn("user", "hi"))], Overlap()), [0])
    assert played[0].total_return == 1.0 and played[0].turns[0].role == "system"


def test_logged_dialogues_give_the_turns_before_the_last_reply(tmp_path):
    messages = [
        {"role": r, "content": c}
        for r, c in (("user", "q"), ("assistant", "a"), ("user", "again"), ("assistant", "last"))
    ]
    (tmp_path / "log.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    (turns,) = PromptEnvironment(tmp_path / "log.jsonl", lengths).reset([0])
    assert [turn.content for turn in turns] == ["q", "a", "again"]
    (tmp_path / "log.jsonl").write_text('{"prompt": "q"}\n{"prompt": \n')
    with pytest.raises(InputError, match=r"log.jsonl:2: JSON: found a line that does not parse"):
        PromptEnvironment(tmp_path / "log.jsonl", lengths)


def test_duplicates_are_dropped_and_counted():
    environment = PromptEnvironment(["a", "b", "a", "a"], lengths)
    assert len(environment.prompts) == 2 and environment.counts["prompts dropped: seen before"] == 2


def boom(contexts, texts, labels):
    raise KeyError("answer")


@pytest.mark.parametrize(
    "reward, message",
    [
        (lambda c, t, k: [1.0], "found 1 numbers, expected one for each of 2 replies"),
        (lambda c, t, k: [1.0, float("nan")], "reward: found nan, expected a finite number, for the reply 'y'"),
        (lambda c, t, k: [1.0, "much"], "reward: found 'much', expected a number, for the reply 'y'"),
        (lambda c, t, k: 1.0, "reward: found 1.0, expected a list of 2 numbers"),
        (boom, "reward: raised KeyError: 'answer', expected 2 numbers; the first reply is 'x'"),
    ],
)
def test_a_reward_that_is_not_one_number_per_reply_is_one_line(reward, message):
    environment = PromptEnvironment(["a", "b"], reward)
    environment.reset([0, 1])
    with pytest.raises(InputError) as error:
        environment.step([0, 1], ["x", "y"])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_slow_scoring_shows_its_progress(capsys, monkeypatch):
    monkeypatch.setattr("offline_lmrl.environments.prompts.SLOW", 0.0)
    environment = PromptEnvironment(["a", "b"], lengths, batch_size=1)
    environment.reset([0, 1])
    environment.step([0, 1], ["x", "y"])
    assert "scoring" in capsys.readouterr().err


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"prompts": [], "reward": lengths}, "prompts: found none"),
        ({"prompts": ["a"], "reward": "nowhere:reward"}, "cannot be imported"),
        ({"prompts": ["a"], "reward": "lengths"}, "expected package.module:function"),
        ({"prompts": ["a"], "reward": 3}, "expected a function or a Scorer"),
        ({"prompts": ["a"], "reward": lengths, "batch_size": 0}, "batch_size: found 0"),
        ({"prompts": [5], "reward": lengths}, "found 5, expected text or a list of messages"),
    ],
)
def test_a_prompt_set_that_cannot_be_used_says_why(settings, message):
    with pytest.raises(InputError, match=message):
        PromptEnvironment(**settings)


def test_it_is_an_environment_by_name():
    environment = make_environment("prompts", prompts=["a"], reward="os.path:split")
    assert isinstance(environment, PromptEnvironment)
