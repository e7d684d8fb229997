"""LMRL-Gym's published files: every layout becomes a game whose actions are scored."""

import json

import pytest

from data_prep.lmrl_gym import LmrlGym
from offline_lmrl.errors import InputError
from offline_lmrl.logs.io import read_trajectories

BUYER = {
    "personality": "polite",
    "preferred_brands": "a Ford",
    "preferred_type": "SUV",
    "preferred_features": ["sunroof"],
    "budget": 20000,
}
SALE = {
    "buyer_info": BUYER,
    "lines": [
        {"role": "Dealer", "text": "Hello."},
        {"role": "Buyer", "text": "Hi."},
        {"role": "Dealer", "text": "18,000?"},
        {"role": "Dealer", "text": "A deal."},
        {"role": "Buyer", "text": "Bought."},
    ],
    "output": {"car_bought": True, "msrp": 16000, "buy_price": 18000},
}
WORDLE = {
    "sequence": [
        ["Wordle:\n", 0.0],
        ["c r a n e\n", 1.0],
        ["b y b b g\n", 0.0],
        ["s l a t e\n", 1.0],
        ["g g g g g\n", 0.0],
    ],
    "reward": [-1.0, 0.0, 0.0, 0.0],
    "done": True,
}
QUIZ = {"lines": ["Is it alive? No.", "Really? Is it a car? Yes."], "correct": True, "word": ["Car"]}
NAV = {
    "text_history": ["You are in a hall.", "go west", "A kitchen.", "open fridge", "Done."],
    "rewards": [0, 1],
    "dones": [False, True],
}
PARTIAL = {
    "text_history": ["wall\n", "move up\n", "hall\n", "move left\n"],
    "rewards": [0, -1, 0, -1],
    "dones": [0, 0, 0, 0],
}


def move(state, action, reward=-1, done=False, name="state"):
    return {name: state, "action": action, "reward": reward, "done": done}


MAZE = [move("You are at 1, 1.\n", "move left\n"), move("You are at 1, 2.\n", "move down\n", 0, True)]
KEPT = {  # row -> texts, rewards, terminated
    "maze": (MAZE, ["You are at 1, 1.", "move left", "You are at 1, 2.", "move down"], [-1, 0], True),
    "partial maze": (PARTIAL, ["wall", "move up", "hall", "move left"], [-1, -1], False),
    "text-nav": (NAV, NAV["text_history"], [0, 1], True),
    "wordle": (WORDLE, ["Wordle:", "c r a n e", "b y b b g", "s l a t e", "g g g g g"], [-1, 0], True),
    "wordle with a reward of the first text": ({**WORDLE, "reward": [0.0, *WORDLE["reward"]]}, None, [-1, 0], True),
    "quiz": (QUIZ, ["Questions:", "Is it alive?", "No.", "Really? Is it a car?", "Yes."], [-1, 0], True),
    "quiz that was cut": ({**QUIZ, "correct": False}, None, [-1, -1], False),
    "quiz of twenty": ({**QUIZ, "lines": ["Is it? No."] * 20, "correct": False}, None, [-1] * 20, True),
    "sale": (SALE, ["Beginning of Conversation", "Hello.", "Hi.", "18,000? A deal.", "Bought."], [0, 1.0], True),
    "no sale": ({**SALE, "output": {"car_bought": False, "msrp": 16000, "buy_price": None}}, None, [0, -0.25], True),
    "talk that was cut": ({**SALE, "output": None}, None, [0, 0], False),
}
DROPPED = {
    "a game without a move": [[]],
    "a game without an action, or with an empty one": [
        {**NAV, "text_history": ["x"], "rewards": [0]},
        [move("s", "\n")],
    ],
    "a game without a value of done": [{**WORDLE, "done": None}],
    "rewards: expected one for each text": [{**NAV, "rewards": [0, 1, 0]}],
    "rewards: expected 0 there": [{**PARTIAL, "rewards": [1, 0, 0, 0]}],
    "sequence: expected a text and whether it is an action": [{**WORDLE, "sequence": [["a"]]}],
    "lines: expected a question and its answer": [{**QUIZ, "lines": ["It is."]}],
    "lines: role: expected one of Buyer, Dealer, Seller": [{**SALE, "lines": [{"role": "Bank", "text": "x"}]}],
    "output: msrp: expected a number above 0": [{**SALE, "output": {**SALE["output"], "msrp": 0}}],
    "moves: reward: expected a number": [[move("s", "a", None)]],
}


def run(tmp_path, rows, **settings):
    lines = (row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
    (tmp_path / "in.jsonl").write_text("".join(lines))
    report = LmrlGym(input=tmp_path / "in.jsonl", output=tmp_path / "out", **{"validation": 0, **settings}).prepare()
    return read_trajectories(tmp_path / "out" / "train.jsonl"), report


def rewards(game):
    return [turn.reward for turn in game.turns if turn.is_trainable]


@pytest.mark.parametrize("row, texts, earned, terminated", KEPT.values(), ids=KEPT)
def test_a_layout_becomes_a_game_of_turns_and_rewards(tmp_path, row, texts, earned, terminated):
    (game, _), _ = run(tmp_path, [row, MAZE])
    assert texts is None or [turn.content for turn in game.turns] == texts
    assert rewards(game) == earned and game.terminated is terminated
    assert {turn.role for turn in game.turns} == {"user", "assistant"} and game.source == "lmrl-gym"


def test_what_else_a_row_says_stays_in_the_labels(tmp_path):
    made, _ = run(tmp_path, [QUIZ, SALE])
    assert made[0].labels == {"correct": True, "word": ["Car"]}
    assert made[1].labels == {"buyer_info": BUYER, "output": SALE["output"]}
    made, _ = run(tmp_path, [SALE], reward="revenue")
    assert rewards(made[0]) == [0, 18.0]


def test_moves_of_a_row_each_make_a_game_up_to_done_or_an_empty_line_and_are_spelt(tmp_path):
    moves = [move("8/8 w", "Kb1", 0, name="from_state"), move("7k w", "Qh7", 1, True, name="from_state")]
    made, report = run(tmp_path, [*moves, moves[0], "\n", moves[0], moves[0]])
    assert [(rewards(game), game.terminated) for game in made] == [([0, 1], True), ([0], False), ([0, 0], False)]
    assert [turn.content for turn in made[0].turns[:2]] == ["8 / 8   w", "K b 1"]
    assert report["games"] == {"moves": 5, "games of moves": 3} and report["imported"] == 5


def test_one_game_as_the_only_line_of_a_file_is_that_game(tmp_path):
    made, _ = run(tmp_path, [MAZE])
    assert [rewards(game) for game in made] == [[-1, 0]]


def test_games_of_max_steps_were_cut_unless_the_last_step_earned_most(tmp_path):
    lost = {**NAV, "rewards": [0, 0]}
    for max_steps, expected in ((2, [True, False, False]), (3, [True, True, False]), (None, [True, True, False])):
        made, report = run(tmp_path, [NAV, lost, PARTIAL], max_steps=max_steps)
        assert [game.terminated for game in made] == expected
        assert report["games"] == ({"done, but cut at max_steps": 1} if max_steps == 2 else {})
    with pytest.raises(InputError, match="max_steps: found 0, expected a number from 1 up, or null"):
        run(tmp_path, [NAV], max_steps=0)


def test_every_row_is_imported_or_dropped_for_a_reason(tmp_path):
    rows = [row for row, *_ in KEPT.values()] + [row for some in DROPPED.values() for row in some]
    made, report = run(tmp_path, rows)
    assert len(made) == len(KEPT) == report["imported"]
    assert report["dropped"] == {reason: len(some) for reason, some in DROPPED.items()}


def test_eval_is_validation_and_a_list_of_games_is_read(tmp_path):
    (tmp_path / "in").mkdir()
    for name, rows in (("train", [SALE, {**SALE, "lines": SALE["lines"][:3]}]), ("eval", [QUIZ])):
        (tmp_path / "in" / f"{name}.json").write_text(json.dumps(rows, indent=1))
    splits = LmrlGym(input=tmp_path / "in", output=tmp_path / "out").prepare()["splits"]
    assert {name: split["rows"] for name, split in splits.items()} == {"train": 2, "validation": 1}
