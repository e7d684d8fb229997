"""Hand-written tables of steps. One character is one token; ids: 1 preamble, 2/3 open and close a user turn, 4/5 an
agent turn, 6/7 a system turn; letters are their code points."""

from collections import Counter

import pytest
import torch

from offline_lmrl.errors import InputError
from offline_lmrl.logs.scale import RewardScale
from offline_lmrl.logs.trajectory import Trajectory, Turn
from offline_lmrl.ops.returns import return_to_go
from offline_lmrl.tokens.batching import WindowDataset, encode_trajectories
from offline_lmrl.tokens.conditioning import returns_to_go
from offline_lmrl.tokens.episodes import EpisodeEncoder, StepRule
from offline_lmrl.tokens.rendering import Renderer
from offline_lmrl.tokens.windows import EncodedDialogue, WindowRule, policy_window, reply_window
from tests.tiny import TOKENIZERS, OneByOne, byte_level, one_form

DEFAULT_WINDOWS, DEFAULT_STEPS = WindowRule(), StepRule()
CLOSED_TWICE = (
    "{%- for m in messages -%}{{ '<' + m['role'] + '>' + m['content'] }}"
    "{{- '<return>' if loop.last and m['role'] == 'assistant' else '<end>' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<assistant>' }}{%- endif -%}"
)
VIEWS = {**TOKENIZERS, "closed twice": lambda: byte_level(CLOSED_TWICE, ["<end>", "<return>"])}


class LetterRenderer(OneByOne):
    preamble, agent_opening, close_id, fingerprint = (1,), (4,), 5, "letters"

    def encode_turn(self, turn):
        start, stop = {"user": (2, 3), "assistant": (4, 5), "system": (6, 7)}[turn.role]
        if turn.token_ids is not None:
            closed = turn.token_ids[-1] == self.close_id
            return one_form((start, *turn.token_ids), 1, turn.token_ids, closed)
        ids = (start, *map(ord, turn.content), stop)
        return one_form(ids, 1, ids[1:])


def user(text):
    return Turn("user", text)


def agent(text, reward=None, **more):
    return Turn("assistant", text, reward=reward, **more)


def batch_of(trajectories, rule=DEFAULT_WINDOWS, steps=DEFAULT_STEPS, counts=None, ends=True):
    encoder = EpisodeEncoder(LetterRenderer(), rule, steps, RewardScale())
    encoded = encode_trajectories(trajectories, encoder, Counter() if counts is None else counts)
    dataset = WindowDataset(encoded, 0, next_rows=True, end_rows=ends)
    return dataset.batch(range(len(dataset)))


def table(batch):
    """(row, state, action, reward, next_row, next_state, bootstrap) of every step that has a target."""
    names = ("row", "state", "action", "reward", "next_row", "next_state", "bootstrap")
    steps = batch["steps"]
    rows = zip(*(steps[name].tolist() for name in names), strict=True)
    return [row for row, known in zip(rows, steps["has_target"].tolist(), strict=True) if known]


DIALOGUE = (user("a"), agent("xy", 1.0), user("b"), agent("z", 2.0))
# 0 preamble | 1 open 2 a 3 close | 4 open 5 x 6 y 7 close | 8 open 9 b 10 close | 11 open 12 z 13 close
X, Y, Z, CLOSE = ord("x"), ord("y"), ord("z"), 5


def test_dialogue_steps_skip_the_environment_and_end_at_the_terminal_action():
    batch = batch_of([Trajectory(DIALOGUE)])
    assert table(batch) == [
        (0, 4, X, 0.0, 0, 5, 1.0),
        (0, 5, Y, 0.0, 0, 6, 1.0),
        (0, 6, CLOSE, 1.0, 0, 11, 1.0),
        (0, 11, Z, 0.0, 0, 12, 1.0),
        (0, 12, CLOSE, 2.0, 0, 0, 0.0),
    ]
    assert batch["action_mask"][0].nonzero()[:, 0].tolist() == [5, 6, 7, 12, 13]
    assert batch["steps"]["closes_turn"].tolist() == [False, False, True, False, True]
    assert batch["steps"]["turn"].tolist() == [1, 1, 1, 3, 3]
    assert batch["steps"]["open_state"].tolist() == [4, 4, 4, 11, 11]


def test_bootstrapping_from_the_turn_brings_its_reward_forward():
    rule = StepRule(discount_per_token=0.5, discount_per_turn=0.1, bootstrap_from_turn=True)
    batch = batch_of([Trajectory(DIALOGUE)], steps=rule)
    assert table(batch) == [
        (0, 4, X, 0.25, 0, 11, 1.0),  # two tokens before the closing one: γ² · 1
        (0, 5, Y, 0.5, 0, 11, 1.0),
        (0, 6, CLOSE, 1.0, 0, 11, 1.0),
        (0, 11, Z, 1.0, 0, 0, 0.0),  # γ · 2
        (0, 12, CLOSE, 2.0, 0, 0, 0.0),
    ]
    torch.testing.assert_close(batch["steps"]["discount"][:3], torch.tensor([0.0125, 0.025, 0.05]))
    # return-to-go: turn 3 is 1 at z, 2 at close; close of turn 1: 1 + .5·.1·1 = 1.05, then halved per token
    torch.testing.assert_close(batch["steps"]["return_to_go"], torch.tensor([0.2625, 0.525, 1.05, 1.0, 2.0]))
    assert batch["steps"]["end_discount"].tolist() == [0.0] * 5


def test_markov_game_reads_the_next_state_in_the_next_window():
    turns = (user("a"), agent("x", -1.0), user("b"), agent("y", 0.0))
    batch = batch_of([Trajectory(turns)], WindowRule(context=1))
    # windows: row 0 = 1 2 a 3 4 x 5, row 1 = 1 2 b 3 4 y 5; row 2 = the opening of the second window
    assert batch["input_ids"][2, :5].tolist() == [1, 2, ord("b"), 3, 4]
    assert batch["attention_mask"].sum(1).tolist() == [7, 7, 5]
    assert table(batch) == [
        (0, 4, X, 0.0, 0, 5, 1.0),
        (0, 5, CLOSE, -1.0, 2, 4, 1.0),
        (1, 4, Y, 0.0, 1, 5, 1.0),
        (1, 5, CLOSE, 0.0, 1, 0, 0.0),  # bootstrap 0: the place is not read
    ]
    assert not batch["action_mask"][2].any()


def test_log_cut_behind_an_observation_bootstraps_at_the_agents_opening():
    turns = (user("a"), agent("x", -1.0), user("b"))
    batch = batch_of([Trajectory(turns, terminated=False)])
    # 0 | 1 2 3 | 4 open 5 x 6 close | 7 8 b 9 | 10 open
    assert batch["input_ids"][0].tolist() == [1, 2, ord("a"), 3, 4, X, 5, 2, ord("b"), 3, 4]
    assert table(batch) == [(0, 4, X, 0.0, 0, 5, 1.0), (0, 5, CLOSE, -1.0, 0, 10, 1.0)]
    assert batch["steps"]["end_discount"].tolist() == [1.0, 1.0]
    assert batch["steps"]["end_state"].tolist() == [10, 10]


def test_log_cut_behind_an_observation_of_a_markov_game_reads_one_more_row():
    turns = (user("a"), agent("x", -1.0), user("b"), agent("y", -1.0), user("c"))
    batch = batch_of([Trajectory(turns, terminated=False)], WindowRule(context=1))
    # rows: two windows, openings of b and c (next rows), and c again as the end row of the first window
    assert [row[2].item() for row in batch["input_ids"]] == [ord(c) for c in "abbcc"]
    assert table(batch)[-1] == (1, 5, CLOSE, -1.0, 3, 4, 1.0)
    steps = batch["steps"]
    assert (
        list(zip(steps["end_row"].tolist(), steps["end_state"].tolist(), strict=True)) == [(4, 4)] * 2 + [(3, 4)] * 2
    )
    assert steps["return_to_go"].tolist() == [-2.0, -2.0, -1.0, -1.0]


def test_log_cut_behind_a_finished_turn_has_no_target_for_its_last_action():
    counts = Counter()
    batch = batch_of([Trajectory((user("a"), agent("xy", 3.0)), terminated=False)], counts=counts)
    assert table(batch) == [(0, 4, X, 0.0, 0, 5, 1.0), (0, 5, Y, 0.0, 0, 6, 1.0)]
    assert counts["last actions without a target: the log was cut after a finished agent turn"] == 1
    assert batch["steps"]["has_target"].tolist() == [True, True, False]
    # the last known V is at state 6, so returns end there and the unbootstrapped reward stays out
    assert batch["steps"]["return_to_go"].tolist() == [0.0, 0.0, 0.0]
    assert batch["steps"]["end_discount"].tolist() == [1.0, 1.0, 0.0]
    assert batch["steps"]["end_state"].tolist()[:2] == [6, 6]


def test_a_discount_of_zero_per_token_needs_no_target_behind_a_finished_turn():
    log = Trajectory((user("a"), agent("xy", 3.0)), terminated=False)
    batch = batch_of([log], steps=StepRule(discount_per_token=0.0, bootstrap_from_turn=True))
    assert batch["steps"]["has_target"].tolist() == [True, True, False]
    assert batch["steps"]["discount"].tolist()[:2] == [0.0, 0.0]


UNFINISHED = agent("zz", 3.0, token_ids=(ord("z"), ord("z")))
ENDS = {
    "terminated": (Trajectory(DIALOGUE), 0.0),
    "observation": (Trajectory((*DIALOGUE, user("c")), terminated=False), 7.0),
    "finished": (Trajectory((*DIALOGUE, user("c"), agent("xx", 5.0)), terminated=False), 7.0),
    "unfinished": (Trajectory((*DIALOGUE, UNFINISHED), terminated=False, labels={"tokenizer": "letters"}), 7.0),
}


@pytest.mark.parametrize("end", ENDS)
def test_returns_of_one_window_equal_the_backward_recursion_over_its_steps(end):
    trajectory, end_value = ENDS[end]
    batch = batch_of([trajectory], steps=StepRule(discount_per_token=0.9, discount_per_turn=0.5))
    assert len(batch["input_ids"]) == 1
    steps = {name: values[batch["steps"]["has_target"]] for name, values in batch["steps"].items()}
    found = steps["return_to_go"] + steps["end_discount"] * end_value
    discount = steps["discount"] * steps["bootstrap"]
    expected = return_to_go(steps["reward"][None], discount[None], torch.tensor([end_value]))
    torch.testing.assert_close(found, expected[0])


def test_log_cut_inside_a_turn_bootstraps_there():
    turns = (user("a"), agent("xy", 3.0, token_ids=(X, Y)))
    batch = batch_of([Trajectory(turns, terminated=False, labels={"tokenizer": "letters"})])
    assert table(batch) == [(0, 4, X, 0.0, 0, 5, 1.0), (0, 5, Y, 3.0, 0, 6, 1.0)]
    assert batch["steps"]["closes_turn"].tolist() == [False, False]
    assert batch["steps"]["end_state"].tolist() == [6, 6]


def test_ids_of_another_tokenizer_are_encoded_again():
    turns = (user("a"), agent("x", 1.0, token_ids=(99, 5)))
    assert batch_of([Trajectory(turns, labels={"tokenizer": "other"})])["steps"]["action"].tolist() == [X, CLOSE]
    assert batch_of([Trajectory(turns, labels={"tokenizer": "letters"})])["steps"]["action"].tolist() == [99, CLOSE]


def test_consecutive_agent_turns_follow_each_other():
    batch = batch_of([Trajectory((user("a"), agent("x", 1.0), agent("y", 2.0)))])
    # 4 open 5 x 6 close 7 open 8 y 9 close
    assert table(batch) == [
        (0, 4, X, 0.0, 0, 5, 1.0),
        (0, 5, CLOSE, 1.0, 0, 7, 1.0),
        (0, 7, Y, 0.0, 0, 8, 1.0),
        (0, 8, CLOSE, 2.0, 0, 0, 0.0),
    ]


def test_agent_text_that_is_not_credited_is_context_only():
    turns = (user("a"), Turn("assistant", "x", trainable=False), user("b"), agent("y", 1.0))
    assert [row[2] for row in table(batch_of([Trajectory(turns)]))] == [Y, CLOSE]


def test_truncation_drops_oldest_turns_and_keeps_the_scored_reply_and_the_system_turn():
    turns = (Turn("system", "s"), user("aaaa"), agent("x"), user("b"), agent("y", 1.0))
    counts = Counter()
    batch = batch_of([Trajectory(turns)], WindowRule(max_length=14), counts=counts)
    # system 3 + preamble 1; first window a,x: 4 + 6 + 3 = 13; second window drops the oldest turns: 4 + (x) 3 + 3 + 3
    assert batch["input_ids"][1, :13].tolist() == [1, 6, ord("s"), 7, 4, X, 5, 2, ord("b"), 3, 4, Y, 5]
    assert counts["windows that lost old turns to max_length"] == 1
    assert table(batch)[-1][:4] == (1, 11, CLOSE, 1.0)


def test_turn_that_cannot_fit_is_dropped_and_counted_and_its_reward_stays_in_the_return():
    turns = (user("a"), agent("x", 1.0), user("b"), agent("y" * 20, 5.0))
    counts = Counter()
    batch = batch_of([Trajectory(turns)], WindowRule(max_length=12), counts=counts)
    assert counts["agent turns dropped: longer than max_length"] == 1
    assert table(batch)[-1] == (0, 5, CLOSE, 1.0, 0, 10, 1.0)  # V is read at the opening of the turn that did not fit
    assert batch["steps"]["return_to_go"].tolist() == [6.0, 6.0]


def test_stride_lets_agent_turns_share_a_window():
    turns = tuple(turn for i in range(6) for turn in (user("a"), agent("x", 1.0)))
    rule = WindowRule(context=4, stride=2)
    batch = batch_of([Trajectory(turns)], rule)
    firsts = batch["steps"]["row"].tolist()[::2]
    # turns 1, 3 see from 0; turn 5 (5 turns of history) would, so it starts at 2; each later turn moves by 2
    assert firsts == [0, 0, 1, 2, 3, 4]


def test_where_max_length_binds_live_play_keeps_room_for_the_longest_reply():
    turns, rule = (user("a"), agent("x"), user("b"), agent("y", 1.0)), WindowRule(max_length=14)
    batch = batch_of([Trajectory(turns)], rule)
    assert batch["input_ids"].tolist()[0] == [1, 2, ord("a"), 3, 4, X, 5, 2, ord("b"), 3, 4, Y, 5]  # 13 tokens
    assert policy_window(turns[:3], LetterRenderer(), rule, reserve=2) == batch["input_ids"][0, :11].tolist()
    assert policy_window(turns[:3], LetterRenderer(), rule, reserve=4) == [1, 4, X, 5, 2, ord("b"), 3, 4]


@pytest.mark.parametrize(
    "rule", [WindowRule(), WindowRule(1), WindowRule(4, 2), WindowRule(3), WindowRule(None, 1, 14)]
)
def test_training_windows_equal_what_the_policy_sees_live(rule):
    turns = tuple(turn for c in "abcde" for turn in (user(c), agent("x", 1.0)))
    batch = batch_of([Trajectory(turns)], rule)
    steps = batch["steps"]
    for index in range(1, len(turns), 2):
        chosen = (steps["turn"] == index).nonzero()[0, 0]
        row, opening = steps["row"][chosen], steps["state"][chosen]
        live = policy_window(turns[:index], LetterRenderer(), rule, reserve=2)
        assert batch["input_ids"][row, : opening + 1].tolist() == live


# ReturnTokens: one id per return to go, 200 and up; 100 where none is known


def return_ids(trajectory):
    return [(200 + int(value),) for value in returns_to_go(trajectory)] + [(100,)]


def with_return_ids(trajectories, rule=DEFAULT_WINDOWS, return_ids=return_ids):
    encoder = EpisodeEncoder(LetterRenderer(), rule, DEFAULT_STEPS, RewardScale(), return_ids)
    encoded = encode_trajectories(trajectories, encoder, Counter())
    dataset = WindowDataset(encoded, 0, next_rows=True, end_rows=True)
    return dataset.batch(range(len(dataset)))


def test_return_ids_come_before_every_agent_opening_and_shifts_the_steps():
    batch = with_return_ids([Trajectory(DIALOGUE)])
    a, b = ord("a"), ord("b")
    assert batch["input_ids"].tolist() == [[1, 2, a, 3, 203, 4, X, Y, 5, 2, b, 3, 202, 4, Z, 5]]
    assert table(batch) == [
        (0, 5, X, 0.0, 0, 6, 1.0),
        (0, 6, Y, 0.0, 0, 7, 1.0),
        (0, 7, CLOSE, 1.0, 0, 13, 1.0),
        (0, 13, Z, 0.0, 0, 14, 1.0),
        (0, 14, CLOSE, 2.0, 0, 0, 0.0),
    ]
    assert batch["steps"]["open_state"].tolist() == [5, 5, 5, 13, 13]


def test_rows_that_serve_v_have_return_ids_too():
    cut = Trajectory((*DIALOGUE, user("c")), terminated=False)
    rows = with_return_ids([cut], WindowRule(context=1))["input_ids"].tolist()
    assert [[token for token in row if token >= ord("a")] for row in rows] == [
        [ord("a"), 203, X, Y],  # first window
        [ord("b"), 202, Z],
        [ord("b"), 202],  # the next state of the first window: the opening of the second
        [ord("c"), 100],
        [ord("c"), 100],  # where V closes the log
    ]


def test_no_return_ids_leave_every_array_as_it_was():
    plain, empty = (
        batch_of([Trajectory(DIALOGUE)]),
        with_return_ids([Trajectory(DIALOGUE)], return_ids=lambda t: [()] * 3),
    )
    assert torch.equal(plain["input_ids"], empty["input_ids"]) and table(plain) == table(empty)


@pytest.mark.parametrize("rule", [WindowRule(), WindowRule(1), WindowRule(4, 2), WindowRule(None, 1, 16)])
def test_training_windows_with_return_ids_equal_what_the_policy_sees_live(rule):
    turns = tuple(turn for c in "abcde" for turn in (user(c), agent("x", 1.0)))
    batch = with_return_ids([Trajectory(turns)], rule)
    steps = batch["steps"]
    for n, index in enumerate(range(1, len(turns), 2)):
        chosen = (steps["turn"] == index).nonzero()[0, 0]
        row, opening = steps["row"][chosen], steps["state"][chosen]
        told = return_ids(Trajectory(turns))[: n + 1]
        live = policy_window(turns[:index], LetterRenderer(), rule, reserve=2, return_ids=told)
        assert batch["input_ids"][row, : opening + 1].tolist() == live


def test_every_window_gives_the_same_steps_alone_and_in_a_batch():
    episodes = [Trajectory(DIALOGUE), Trajectory((user("aaa"), agent("x", 1.0), user("b")), terminated=False)]
    encoder = EpisodeEncoder(LetterRenderer(), WindowRule(context=1), StepRule(), RewardScale())
    dataset = WindowDataset(encode_trajectories(episodes, encoder, Counter()), 0, next_rows=True, end_rows=True)
    together = dataset.batch(range(len(dataset)))["steps"]
    alone = [dataset.batch([i])["steps"] for i in range(len(dataset))]
    for name in ("action", "reward", "discount", "next_state", "end_state", "return_to_go", "bootstrap"):
        assert together[name].tolist() == [value for steps in alone for value in steps[name].tolist()]


def test_rows_that_nobody_reads_are_left_out():
    turns = (user("a"), agent("x", -1.0), user("b"), agent("y", 0.0))
    encoder = EpisodeEncoder(LetterRenderer(), WindowRule(context=1), StepRule(), RewardScale())
    encoded = encode_trajectories([Trajectory(turns)], encoder, Counter())
    batch = WindowDataset(encoded, 0, next_rows=False, end_rows=False).batch([0, 1])
    assert len(batch["input_ids"]) == 2
    assert batch["steps"]["next_row"].max() < 2


def test_data_without_a_turn_that_fits_is_an_error():
    with pytest.raises(InputError, match="no agent turn that fits into max_length"):
        batch_of([Trajectory((user("a"), agent("x" * 30)))], WindowRule(max_length=10))


def test_lengths_and_flat_storage_agree():
    dataset = WindowDataset(
        encode_trajectories(
            [Trajectory(DIALOGUE)],
            EpisodeEncoder(LetterRenderer(), WindowRule(), StepRule(), RewardScale()),
            Counter(),
        ),
        0,
        next_rows=False,
        end_rows=False,
    )
    assert dataset.lengths.tolist() == [14]
    assert dataset.action_tokens == 5
    assert dataset.mean_return == pytest.approx(2.6)  # (3 + 3 + 3 + 2 + 2) / 5, undiscounted


def windows_of(view, trajectory, rule=DEFAULT_WINDOWS, replies=False, counts=None, return_ids=None, prompt=()):
    encoder = EpisodeEncoder(view, rule, DEFAULT_STEPS, RewardScale(), return_ids, replies=replies)
    encoded = encode_trajectories([trajectory], encoder, Counter() if counts is None else counts, [prompt])
    dataset = WindowDataset(encoded, 0, next_rows=True, end_rows=True, replies=replies)
    assert not replies or all(len(index) == 0 for index in dataset.surplus_batch()["environment"].values())
    return dataset.batch(range(len(dataset)))


def test_a_log_without_an_agent_turn_has_no_window_with_or_without_replies():
    for replies in (False, True):
        with pytest.raises(InputError, match="found no agent turn that fits"):
            windows_of(LetterRenderer(), Trajectory((user("a"), user("b"))), replies=replies)


def with_replies(trajectory, rule=DEFAULT_WINDOWS, **more):
    """Per window its ids, and the ids that its environment states stand before."""
    batch = windows_of(LetterRenderer(), trajectory, rule, replies=True, **more)
    ids = [row[real].tolist() for row, real in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    targets = [[] for _ in range(batch["windows"])]
    for row, state in zip(*(batch["environment"][name].tolist() for name in ("row", "state")), strict=True):
        targets[row].append(ids[row][state + 1])
    return list(zip(ids[: batch["windows"]], targets, strict=True))


A, B, C, D = map(ord, "abcd")
FOUR = (user("a"), agent("x", 1.0), user("b"), agent("y", 2.0), user("cc"), agent("z", 3.0), user("d"))


def test_a_window_also_holds_what_the_environment_replies_to_its_last_turn():
    ended, cut = Trajectory(FOUR), Trajectory(FOUR, terminated=False)
    first = [1, 2, A, 3, 4, X, 5, 2, B, 3], [B, 3]
    second = [1, 2, B, 3, 4, Y, 5, 2, C, C, 3], [C, C, 3]
    third = [1, 2, C, C, 3, 4, Z, 5]
    # What an episode ends with is answered by nobody; a log that was cut goes on after it.
    assert with_replies(ended, WindowRule(context=1)) == [first, second, (third, [])]
    assert with_replies(cut, WindowRule(context=1)) == [first, second, ([*third, 2, D, 3], [D, 3])]


def test_the_same_turns_are_in_view_for_a_reply_as_for_the_turn_that_it_answers():
    ended = Trajectory(FOUR)
    x, y, z = [2, A, 3, 4, X, 5], [2, B, 3, 4, Y, 5], [2, C, C, 3, 4, Z, 5]
    assert with_replies(ended) == [([1, *x, *y, *z], [B, 3, C, C, 3])]
    assert with_replies(ended, WindowRule(context=2)) == [
        ([1, *x, 2, B, 3], [B, 3]),
        ([1, *x[3:], *y, 2, C, C, 3], [C, C, 3]),
        ([1, *y[3:], *z], []),
    ]
    # turns 1 and 3 share a window that begins with turn 0; turn 5 would see five turns
    assert with_replies(ended, WindowRule(context=4, stride=2)) == [
        ([1, *x, *y, 2, C, C, 3], [B, 3, C, C, 3]),
        ([1, *y, *z], []),
    ]


def test_replies_of_a_log_that_was_cut_are_targets_where_its_row_goes_on_to_the_next_opening():
    cut = Trajectory(DIALOGUE[:3], terminated=False)
    assert with_replies(cut) == [([1, 2, A, 3, 4, X, Y, 5, 2, B, 3, 4], [B, 3])]


def test_a_reply_of_several_turns_ends_where_an_agent_speaks_whoever_is_credited():
    turns = (
        user("a"),
        agent("x"),
        user("b"),
        Turn("system", "s"),
        Turn("assistant", "w", trainable=False),
        user("c"),
        agent("y"),
        user("d"),
        Turn("assistant", "w", trainable=False),
    )
    rows = with_replies(Trajectory(turns, terminated=False), WindowRule(context=1))
    assert rows == [
        ([1, 2, A, 3, 4, X, 5, 2, B, 3, 6, ord("s"), 7], [B, 3, ord("s"), 7]),
        ([1, 2, C, 3, 4, Y, 5, 2, D, 3], [D, 3]),
    ]
    opens = with_replies(Trajectory((agent("x"), user("a"), agent("y"))), WindowRule(context=1))
    assert opens == [([1, 4, X, 5, 2, A, 3], [A, 3]), ([1, 2, A, 3, 4, Y, 5], [])]


def test_windows_with_replies_keep_prompt_system_turn_and_return_ids():
    turns = (Turn("system", "s"), *FOUR[:4])
    rows = with_replies(Trajectory(turns), WindowRule(context=1), return_ids=return_ids, prompt=(90, 91))
    system = [6, ord("s"), 7]
    assert rows == [
        ([1, 90, 91, *system, 2, A, 3, 203, 4, X, 5, 2, B, 3], [B, 3]),
        ([1, 90, 91, *system, 2, B, 3, 202, 4, Y, 5], []),
    ]


def test_replies_leave_every_step_as_it_was():
    rules = WindowRule(), WindowRule(1), WindowRule(2), WindowRule(4, 2), WindowRule(None, 1, 60)
    for rule, terminated in [(rule, ended) for rule in rules for ended in (True, False)]:
        trajectory = Trajectory(FOUR, terminated=terminated)
        without, held = (windows_of(LetterRenderer(), trajectory, rule, replies) for replies in (False, True))
        assert "environment" not in without
        for name in without["steps"]:
            assert torch.equal(without["steps"][name], held["steps"][name]), (rule, name)
        pairs = zip(without["input_ids"], without["attention_mask"], held["input_ids"], strict=True)
        assert all(torch.equal(row[real], longer[: len(row)][real]) for row, real, longer in pairs)
        assert held["action_mask"].sum() == without["action_mask"].sum() == 6


def test_where_max_length_binds_oldest_turns_make_room_for_the_reply():
    ended = Trajectory(FOUR[:6])
    x, y, z = [2, A, 3, 4, X, 5], [2, B, 3, 4, Y, 5], [2, C, C, 3, 4, Z, 5]
    # turns 0 to 3 are 13 tokens with the preamble and fit; with the reply of 4 they are 17
    rows = with_replies(ended, WindowRule(max_length=16))
    assert rows == [([1, *x, 2, B, 3], [B, 3]), ([1, *x[3:], *y, 2, C, C, 3], [C, C, 3]), ([1, *y, *z], [])]
    assert max(len(ids) for ids, _ in rows) <= 16


def test_a_reply_that_does_not_fit_with_its_turn_is_left_out_and_counted():
    turns, counts = (user("a"), agent("x"), user("b" * 9), user("c"), agent("y")), Counter()
    rows = with_replies(Trajectory(turns), WindowRule(max_length=12), counts=counts)
    assert rows == [([1, 2, A, 3, 4, X, 5], []), ([1, 2, C, 3, 4, Y, 5], [])]
    assert counts["replies of the environment left out: longer than the space that max_length leaves"] == 1
    roomy = Counter()
    with_replies(Trajectory(turns), WindowRule(max_length=30), counts=roomy)
    assert roomy["replies of the environment left out: longer than the space that max_length leaves"] == 0


def test_history_that_the_template_rewrites_gives_every_agent_turn_a_row_of_its_own():
    view = Renderer(TOKENIZERS["thinking"]())
    turns = (user("a"), agent("<think>\nhm\n</think>\n\nxy", 1.0), user("b"), agent("z", 2.0))
    batch = windows_of(view, Trajectory(turns))
    steps, ids = batch["steps"], batch["input_ids"]
    assert batch["windows"] == 2 and len(ids) == 3
    for row, seen in enumerate((turns[:2], turns)):
        rendered = view.tokens(seen)
        assert ids[row, : len(rendered)].tolist() == rendered  # as the stock template prints it
        mine = steps["row"] == row
        assert view.tokenizer.decode(steps["action"][mine]) == (
            "<think>\nhm\n</think>\n\nxy<|im_end|>" if row == 0 else "<think>\n\n</think>\n\nz<|im_end|>"
        )
        assert torch.equal(steps["action"][mine], ids[row, steps["state"][mine] + 1])
    # After the first turn V is read where play reads it: behind the rewritten history, at the agent's opening.
    closing = int((steps["closes_turn"] & (steps["row"] == 0)).nonzero())
    asked = policy_window(turns[:3], view, DEFAULT_WINDOWS)
    assert steps["next_row"][closing] == 2 and steps["next_state"][closing] == len(asked) - 1
    assert ids[2, : len(asked)].tolist() == asked == view.tokens(turns[:3], prompt=True)
    assert steps["reward"][closing] == 1.0 and steps["return_to_go"][0] == 3.0
    # Where nothing is rewritten, the turns share a row.
    assert windows_of(Renderer(view.tokenizer, "assembled"), Trajectory(turns))["windows"] == 1


def test_closing_that_history_holds_otherwise_is_an_action_all_the_same():
    view = Renderer(VIEWS["closed twice"]())
    end, last = view.tokenizer.convert_tokens_to_ids(["<end>", "<return>"])
    batch = windows_of(view, Trajectory(DIALOGUE))
    steps, ids = batch["steps"], batch["input_ids"]
    assert batch["windows"] == len(ids) == 1 and ids[0].tolist() == view.tokens(DIALOGUE)
    held = ids[0, steps["state"] + 1]
    assert steps["action"][steps["closes_turn"]].tolist() == [last, last]
    assert held[steps["closes_turn"]].tolist() == [end, last]
    assert torch.equal(steps["action"][~steps["closes_turn"]], held[~steps["closes_turn"]])
    first = int(steps["closes_turn"].nonzero()[0])
    assert steps["next_state"][first] == len(view.tokens(DIALOGUE[:3], prompt=True)) - 1


def test_closing_that_no_history_holds_is_an_action_behind_the_text():
    template = (
        "{%- for m in messages -%}{{ '<' + m['role'] + '>' + m['content'] }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<assistant>' }}{%- endif -%}"
    )
    view = Renderer(byte_level(template))
    batch = windows_of(view, Trajectory(DIALOGUE))
    steps, ids = batch["steps"], batch["input_ids"]
    assert batch["windows"] == len(ids) == 1 and ids[0].tolist() == view.tokens(DIALOGUE)
    assert steps["action"].tolist()[-1] == view.close_id not in ids and int(steps["state"].max()) == ids.shape[1] - 1
    assert batch["action_mask"].sum() == len(steps["action"]) - 2
    prompt, columns = policy_window(DIALOGUE[:1], view, DEFAULT_WINDOWS), steps["state"]
    assert prompt == ids[0, : len(prompt)].tolist() and columns[0] == len(prompt) - 1


def test_after_a_turn_that_history_rewrites_the_reply_is_read_behind_the_turn_as_it_was_written():
    view = Renderer(TOKENIZERS["thinking"]())
    turns = (user("a"), agent("<think>\nhm\n</think>\n\nxy", 1.0), user("b"), agent("z", 2.0))
    batch = windows_of(view, Trajectory(turns), replies=True)
    plain = windows_of(view, Trajectory(turns))
    assert {name: values.tolist() for name, values in batch["steps"].items()} == {
        name: values.tolist() for name, values in plain["steps"].items()
    }
    first, second = (row[real] for row, real in zip(batch["input_ids"][:2], batch["attention_mask"], strict=False))
    written = view.tokens(turns[:2])  # with the thought, which the next window does not show
    assert first.tolist() == [*written, *view.encode_turn(turns[2]).ids]
    assert second.tolist() == view.tokens(turns)
    where = batch["environment"]
    assert where["row"].tolist() == [0] * len(where["row"])
    assert view.tokenizer.decode(first[where["state"] + 1]) == "b<|im_end|>\n"


def test_before_a_reply_a_turn_is_closed_as_history_closes_it():
    view = Renderer(VIEWS["closed twice"]())
    last = view.tokenizer.convert_tokens_to_ids("<return>")
    batch = windows_of(view, Trajectory(DIALOGUE), WindowRule(context=1), replies=True)
    first = batch["input_ids"][0][batch["attention_mask"][0]]
    assert view.tokenizer.decode(first) == "<user>a<end><assistant>xy<end><user>b<end>"
    steps, where = batch["steps"], batch["environment"]
    assert steps["action"][steps["closes_turn"]].tolist() == [last, last]
    assert view.tokenizer.decode(first[where["state"] + 1]) == "b<end>" and set(where["row"].tolist()) == {0}


@pytest.mark.parametrize("name", VIEWS)
def test_training_windows_hold_before_every_reply_what_is_read_live(name):
    view, told, prompt = Renderer(VIEWS[name]()), [(7,)] * 6, (5, 6)
    thought = "<think>\nhm\n</think>\n\n"
    turns = [
        turn
        for i, word in enumerate(["one", "three books", "2", "deal?", "no"])
        for turn in (user(word), agent(f"{thought * (i % 2)}y{i} z", 1.0))
    ]
    cut = Trajectory((*turns, user("end")), terminated=False)
    rules = [WindowRule(k) for k in (1, 2, 3, None)]
    rules += [WindowRule(4, 2), WindowRule(max_length=70), WindowRule(stride=3, max_length=90)]
    for rule in rules:
        batch = windows_of(view, cut, rule, replies=True, return_ids=lambda log: told, prompt=prompt)
        states = list(zip(*(batch["environment"][name].tolist() for name in ("row", "state")), strict=True))
        trained = [
            batch["input_ids"][row, : state + 1].tolist() for row, state in states if (row, state - 1) not in states
        ]
        for stop, ids in zip(range(2, 11, 2), trained, strict=True):
            reply = len(view.encode_turn(cut.turns[stop]).actions)
            seen = cut.turns[:stop]
            dialogue = EncodedDialogue([*seen, user("")], view, told[: stop // 2], prompt)
            assert ids == reply_window(dialogue, rule, reply), rule
