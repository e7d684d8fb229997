import json
from collections import Counter

import numpy as np
import pytest

from offline_lmrl.errors import InputError
from offline_lmrl.logs.forms import read_row
from offline_lmrl.logs.trajectory import Trajectory, Turn, to_record, with_own_token_ids


def from_record(row, where):
    return read_row(row, where, Counter())


def record(*messages, **fields):
    return {"messages": list(messages), **fields}


def test_only_assistant_turns_are_trainable_unless_said_otherwise():
    assert Turn("assistant", "hi").is_trainable
    assert not Turn("user", "hi").is_trainable
    assert not Turn("assistant", "hi", trainable=False).is_trainable
    assert Turn("user", "hi", trainable=True).is_trainable


def test_return_is_the_sum_of_rewards_and_unscored_turns_count_as_zero():
    turns = (Turn("assistant", "a", reward=-1), Turn("assistant", "b"), Turn("assistant", "c", reward=0.25))
    assert Trajectory(turns).total_return == -0.75


def test_numbers_of_numpy_become_plain_ones():
    turn = Turn("assistant", "a", reward=np.float32(0.5), token_ids=tuple(np.array([3, 4])))
    assert type(turn.reward) is float and turn.reward == 0.5
    assert [type(token) for token in turn.token_ids] == [int, int]


def test_record_and_back_loses_nothing():
    trajectory = Trajectory(
        turns=(
            Turn("system", "be kind"),
            Turn("user", ""),
            Turn("assistant", "né\u2028\n", reward=0.0),
            Turn("assistant", "", token_ids=(2,), behaviour_log_prob=(-0.1,)),
            Turn("assistant", "x", trainable=False),
            Turn("assistant", "y", trainable=True, token_ids=()),
        ),
        terminated=False,
        group="g",
        task="t",
        source="s",
        labels={"thumb": None, "axes": {"kind": 1.5}, "é": [True]},
    )
    written = json.loads(json.dumps(to_record(trajectory)))
    assert from_record(written, "f:1") == trajectory


def test_record_leaves_out_what_is_not_known_and_keeps_a_reward_of_zero():
    written = to_record(Trajectory((Turn("user", "q"), Turn("assistant", "a", reward=0))))
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reward": 0.0}]
    assert written == {"messages": messages, "terminated": True, "group": "", "task": "", "source": "", "labels": "{}"}


def test_nulls_and_absent_fields_take_the_defaults():
    agent = {"role": "assistant", "content": "a", "reward": None, "trainable": None, "token_ids": None}
    row = record(agent, terminated=None, group=None, labels=None)
    assert from_record(row, "f:1") == Trajectory((Turn("assistant", "a"),))


@pytest.mark.parametrize(
    "messages, expected",
    [
        (
            [{"role": "user", "content": "q", "reward": 1.0}, {"role": "assistant", "content": "a"}],
            "f:3: messages[0].reward: found 1.0 on a turn of role 'user', "
            "expected rewards only on the agent turn that earned them",
        ),
        (
            [{"role": "assistant", "content": "a", "reward": float("nan")}],
            "f:3: messages[0].reward: found nan, expected a finite number",
        ),
        (
            [{"role": "assistant", "content": "a", "reward": 10**400}],
            "f:3: messages[0].reward: found inf, expected a finite number",
        ),
        (
            [{"role": "assistant", "content": "a", "reward": "high"}],
            "f:3: messages[0].reward: found 'high', expected a number",
        ),
        (
            [{"role": "assistant", "content": "a", "reward": True}],
            "f:3: messages[0].reward: found True, expected a number",
        ),
        (
            [{"role": "user", "content": "q"}, {"role": "robot", "content": "a"}],
            "f:3: messages[1].role: found 'robot', expected one of system, user, assistant, tool, environment",
        ),
        ([{"role": "assistant", "content": 5}], "f:3: messages[0].content: found 5, expected text"),
        (
            [{"role": "assistant", "content": ""}],
            "f:3: messages[0].content: found empty text, expected the text of the agent's turn",
        ),
        (
            [{"role": "user", "content": "q"}],
            "f:3: messages: found only untrained turns (user), expected at least one agent turn",
        ),
        ([], "f:3: turns: found none, expected at least one"),
        (["hello"], "f:3: messages[0]: found 'hello', expected an object with role and content"),
        (
            [{"role": "assistant", "content": "a", "token_ids": [1, -2]}],
            "f:3: messages[0].token_ids: found -2, expected integers from 0 to 2³¹ − 1",
        ),
        (
            [{"role": "assistant", "content": "a", "token_ids": [1, 2], "behaviour_log_prob": [-1.0]}],
            "f:3: messages[0].behaviour_log_prob: found 1 for 2 token_ids, expected one for each token id",
        ),
        (
            [{"role": "assistant", "content": "a", "trainable": "yes"}],
            "f:3: messages[0].trainable: found 'yes', expected true, false or null",
        ),
    ],
)
def test_a_bad_turn_is_named_with_row_and_field(messages, expected):
    with pytest.raises(InputError) as error:
        from_record(record(*messages), "f:3")
    assert str(error.value) == expected


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"terminated": "no"}, "f:3: terminated: found 'no', expected true, false or null"),
        ({"group": [7]}, "f:3: group: found [7], expected text"),
        ({"labels": [1]}, "f:3: labels: found [1], expected an object"),
        ({"labels": "[1]"}, "f:3: labels: found [1], expected an object"),
        ({"labels": "{"}, "f:3: labels: found text that is not JSON "),
    ],
)
def test_a_bad_field_of_the_row_is_named(fields, expected):
    with pytest.raises(InputError) as error:
        from_record(record({"role": "assistant", "content": "a"}, **fields), "f:3")
    assert str(error.value).startswith(expected)


def test_values_of_another_type_are_refused_however_they_come():
    with pytest.raises(InputError, match="^content: found half a surrogate pair at character 0, expected text$"):
        Turn("assistant", "\ud83d")
    with pytest.raises(InputError, match="^terminated: found 'no', expected true or false$"):
        Trajectory((Turn("assistant", "a"),), terminated="no")
    with pytest.raises(InputError, match="^group: found 7, expected text$"):
        Trajectory((Turn("assistant", "a"),), group=7)


def test_labels_that_json_cannot_hold_are_refused_when_written():
    with pytest.raises(InputError, match="labels: found Object of type set is not JSON serializable"):
        to_record(Trajectory((Turn("assistant", "a"),), labels={"x": {1}}))


def test_token_ids_are_kept_only_for_the_tokenizer_that_sampled_them():
    turn = Turn("assistant", "a", reward=1.0, token_ids=(1, 2), behaviour_log_prob=(-1.0, -2.0))
    own = Trajectory((turn,), labels={"tokenizer": "abc"})
    assert with_own_token_ids(own, "abc") is own
    assert with_own_token_ids(own, "other").turns == (Turn("assistant", "a", reward=1.0),)
    assert with_own_token_ids(Trajectory((turn,)), "abc").turns == (Turn("assistant", "a", reward=1.0),)


def test_numbers_that_training_cannot_add_up_are_refused():
    with pytest.raises(InputError, match=r"messages\[0\].reward: found 1e\+31, expected a number up to 1e\+30"):
        from_record(record({"role": "assistant", "content": "a", "reward": 10**31}), "f:3")
    rewards = [{"role": "assistant", "content": "a", "reward": 1e30}] * 1000
    assert from_record(record(*rewards), "f:3").total_return == pytest.approx(1e33)
