"""Steps that are expanded from trained turns equal those made one by one, to the last bit."""

import random
from itertools import chain

import numpy as np
import pytest

from offline_lmrl.tokens.batching import EncodedWindows, WindowDataset, flatten
from offline_lmrl.tokens.episodes import RowKind, StepRule, TrainedTurn, TurnEnd, Window
from offline_lmrl.tokens.steps import TURN, expand


def one_by_one(turn, actions, rule):
    """The definition of the columns, in Python's floats."""
    finished, gamma = turn.end == TurnEnd.FINISHED, rule.discount_per_token
    reward = 0.0 if finished else turn.reward
    closing = 1.0 if finished or turn.end == TurnEnd.UNFINISHED else rule.discount_per_turn
    for k, action in enumerate(actions):
        left = turn.actions - finished - k
        paid = total = after = 0.0
        discount, place, bootstrap = gamma, (RowKind.OWN, turn.open_state + k + 1), 1.0
        if left > 0:
            total = gamma ** (left - 1) * reward + gamma**left * closing * turn.return_after
            after = gamma**left * closing * turn.discount_after
            if left == 1 or rule.bootstrap_from_turn:
                paid, discount = gamma ** (left - 1) * reward, gamma**left * closing
                place, bootstrap = (turn.next_row_kind, turn.next_state), float(turn.end != TurnEnd.TERMINATED)
        yield {
            "state": turn.open_state + k,
            "action": action,
            "reward": paid,
            "discount": discount,
            "next_row_kind": place[0],
            "next_state": place[1],
            "bootstrap": bootstrap,
            "has_target": left > 0,
            "closes_turn": k == turn.actions - 1 and turn.end != TurnEnd.UNFINISHED,
            "turn": turn.turn,
            "open_state": turn.open_state,
            "return_to_go": total,
            "end_row_kind": turn.end_row_kind,
            "end_state": turn.end_state,
            "end_discount": after,
        }


def random_window(dice):
    """A window of up to three turns, and the actions of each."""
    row, turns, spoken, apart = [dice.randrange(90)], [], [], []
    for number in range(dice.randint(0, 3)):
        actions = [dice.randrange(90) for _ in range(dice.randint(0, 5))]
        opening, in_row = len(row) - 1, dice.random() < 0.8
        row += actions[: len(actions) - dice.randint(0, 1)] if in_row else [99] * len(actions)
        in_row = row[opening + 1 : opening + len(actions)] == actions[:-1]
        apart += [] if in_row else actions
        places = dice.randrange(3), dice.randrange(40), dice.randrange(3), dice.randrange(40)
        turns.append(
            TrainedTurn(number, opening, len(actions), in_row, actions[-1] if actions else 0, dice.gauss(0, 2),
                        dice.choice(list(TurnEnd)), *places, dice.gauss(0, 2), dice.random())
        )  # fmt: skip
        spoken.append(actions)
        row += [dice.randrange(90)]
    replies = [(dice.randrange(len(row)), dice.randint(0, 3)) for _ in range(dice.randint(0, 2))]
    return Window(row, [], [], replies, turns, apart), spoken


RULES = [StepRule(), StepRule(0.93, 0.7), StepRule(0.97, 0.5, True), StepRule(0.0, 0.9)]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_steps_of_a_batch_are_those_made_one_by_one(rule):
    dice = random.Random(0)
    windows, spoken = zip(*(random_window(dice) for _ in range(60)), strict=True)
    lists = {
        name: (values, np.concatenate([[0], lengths.cumsum()])) for name, (values, lengths) in flatten(windows).items()
    }
    data = WindowDataset(EncodedWindows(lists, rule), 0, next_rows=False, end_rows=False)
    made = [
        list(chain.from_iterable(one_by_one(t, a, rule) for t, a in zip(window.turns, actions, strict=True)))
        for window, actions in zip(windows, spoken, strict=True)
    ]
    order = [7, 3, 59, 0, 3]
    expected = list(chain.from_iterable(made[i] for i in order))
    found, rows = data._steps(np.array(order), _rows(data, order))
    assert rows.tolist() == [place for place, i in enumerate(order) for _ in made[i]]
    for name in expected[0]:
        column = np.array([step[name] for step in expected])
        kept = column.astype(np.float32) if column.dtype == np.float64 else column
        assert found[name].tobytes() == kept.astype(found[name].dtype).tobytes(), name
        assert np.array_equal(found[name], kept), name
    every = [step for steps in made for step in steps]
    assert data.action_tokens == len(every)
    assert data.column("action").tolist() == [step["action"] for step in every]
    assert data.mean_return == pytest.approx(np.mean([step["return_to_go"] for step in every]), rel=1e-5)
    assert data.closing_steps == sum(step["closes_turn"] and step["has_target"] for step in every)
    assert data.closing_columns()["turn"].tolist() == [
        step["turn"] for step in every if step["closes_turn"] and step["has_target"]
    ]
    ends = np.cumsum([len(actions) for actions in chain.from_iterable(spoken) if actions]) - 1
    assert data.last_steps.tolist() == ends.tolist()
    assert data.reply_tokens == sum(n for window in windows for _, n in window.replies)


def _rows(data, order):
    lists = [data.encoded.lists["input_ids"][0][slice(*data.encoded.lists["input_ids"][1][i : i + 2])] for i in order]
    return np.concatenate(lists), np.array(list(map(len, lists)))


def test_further_columns_follow_their_steps():
    dice = random.Random(1)
    windows = [random_window(dice)[0] for _ in range(9)]
    lists = {name: (v, np.concatenate([[0], n.cumsum()])) for name, (v, n) in flatten(windows).items()}
    plain = WindowDataset(EncodedWindows(lists, StepRule()), 0, next_rows=False, end_rows=False)
    data = plain.with_columns(advantage=np.arange(plain.action_tokens, dtype=np.float32))
    places = [*range(*data.step_offsets[5:7]), *range(*data.step_offsets[2:4])]
    assert data.batch([5, 2])["steps"]["advantage"].tolist() == places
    assert data.step_columns([5, 2])["advantage"].tolist() == places
    assert "advantage" not in plain.batch([5])["steps"]


def test_no_turns_have_no_steps():
    steps = expand(np.zeros(0, TURN), np.zeros(0, np.int64), np.array([1]), np.zeros(0, np.int32), StepRule())
    assert {len(values) for values in steps.values()} == {0}


def test_a_trained_turn_takes_sixty_bytes_at_most():
    assert TURN.itemsize <= 60
