"""Which demonstrations a row gets, which part of them, and the windows that stand behind them. One character is one
token, as in test_episodes.py: 1 preamble, 2/3 open and close a user turn, 4/5 an agent turn, 6/7 a system turn."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch

from offline_lmrl.errors import InputError
from offline_lmrl.logs.scale import RewardScale
from offline_lmrl.logs.trajectory import Trajectory, Turn
from offline_lmrl.tokens.batching import WindowDataset, encode_trajectories
from offline_lmrl.tokens.conditioning import returns_to_go
from offline_lmrl.tokens.episodes import EpisodeEncoder, StepRule
from offline_lmrl.tokens.few_shot import FewShotConfig, draw_few_shot, encode_few_shot, few_shot_ids, few_shot_of_task
from offline_lmrl.tokens.windows import WindowRule, policy_window
from tests.tokens.test_episodes import LetterRenderer, agent, table, user

RENDERER = LetterRenderer()
SHOWN = Trajectory((user("p"), agent("q", 3.0)), task="t")  # 2 p 3 4 q 5
P, Q = ord("p"), ord("q")
LONG = Trajectory(
    (
        Turn("system", "s"),
        user("a"),
        agent("a", 1.0),
        user("b"),
        agent("b", 5.0),
        user("c"),
        agent("c", 4.0),
        user("d"),
    )
)


def return_ids(trajectory):
    return [(200 + int(value),) for value in returns_to_go(trajectory)] + [(100,)]


def batch_of(trajectories, prompts, rule=None, return_ids=None, counts=None):
    encoder = EpisodeEncoder(RENDERER, rule or WindowRule(), StepRule(), RewardScale(), return_ids)
    encoded = encode_trajectories(trajectories, encoder, Counter() if counts is None else counts, prompts)
    dataset = WindowDataset(encoded, 0, next_rows=True, end_rows=True)
    return dataset.batch(range(len(dataset)))


def shown(part, turns=1, seed=0):
    cut = FewShotConfig(part=part, turns=turns).cut(LONG, np.random.default_rng(seed))
    return "".join(turn.content for turn in LONG.turns[cut.first : cut.stop])


@pytest.mark.parametrize(
    "part, turns, text",
    [
        ("whole", 1, "saabbccd"),
        ("first", 1, "saa"),
        ("first", 2, "saabb"),
        ("last", 1, "cc"),
        ("last", 2, "bbcc"),
        ("best", 1, "bb"),
        ("best", 2, "bbcc"),
        ("last", 3, "saabbcc"),
        ("last", 4, "saabbccd"),
    ],
)
def test_a_part_is_agent_turns_with_what_was_said_before_each(part, turns, text):
    assert shown(part, turns) == text


def test_of_equally_good_turns_the_earliest_are_best():
    cut = FewShotConfig(part="best").cut(Trajectory((agent("a", 1.0), agent("b", 1.0))), np.random.default_rng(0))
    assert (cut.first, cut.stop) == (0, 1)


def test_random_turns_are_all_of_them_over_time_and_the_same_for_a_seed():
    assert {shown("random", seed=seed) for seed in range(20)} == {"saa", "bb", "cc"}
    assert shown("random", seed=3) == shown("random", seed=3)


def numbered(task, n):
    return [Trajectory((user(str(i)), agent("x", 1.0)), task=task) for i in range(n)]


def drawn(spec, rows, pool=None):
    return [[one.trajectory.turns[0].content for one in prompt] for prompt in draw_few_shot(spec, rows, pool)]


def test_demonstrations_are_different_and_of_the_task_and_never_the_row_itself():
    rows = [row for pair in zip(numbered("a", 4), numbered("b", 4), strict=True) for row in pair]
    seen = set()
    for seed in range(20):
        for row, prompt in zip(rows, draw_few_shot(FewShotConfig(n=2, seed=seed), rows), strict=True):
            assert all(one.trajectory.task == row.task and one.trajectory is not row for one in prompt)
            assert prompt[0].trajectory is not prompt[1].trajectory
            seen |= {(row.task, row.turns[0].content, one.trajectory.turns[0].content) for one in prompt}
    assert len(seen) == 2 * 4 * 3  # every other row is somebody's demonstration


def test_a_row_may_be_its_own_demonstration_where_that_is_asked_for():
    assert drawn(FewShotConfig(exclude_self=False), numbered("a", 1)) == [["0"]]


def test_draws_depend_on_seed_and_row_alone():
    rows = numbered("a", 30)
    once = drawn(FewShotConfig(seed=1), rows)
    assert drawn(FewShotConfig(seed=1), rows) == once != drawn(FewShotConfig(seed=2), rows)
    assert (
        list(islice(draw_few_shot(FewShotConfig(seed=1), rows), 3))
        == list(draw_few_shot(FewShotConfig(seed=1), rows))[:3]
    )


def test_a_share_of_the_rows_has_no_prompt():
    prompts = drawn(FewShotConfig(drop=0.25), numbered("a", 400))
    assert 70 < sum(not prompt for prompt in prompts) < 130
    assert drawn(FewShotConfig(drop=1.0), numbered("a", 2)) == [[], []]


def test_demonstrations_from_elsewhere_are_drawn_for_rows_of_their_task():
    pool = [SHOWN, *numbered("u", 1)]
    assert drawn(
        FewShotConfig(), [Trajectory((agent("x"),), task="u"), Trajectory((agent("x"),), task="t")], pool
    ) == [
        ["0"],
        ["p"],
    ]


def test_an_episode_is_played_behind_demonstrations_of_its_task_by_its_seed_alone():
    pool = [row for pair in zip(numbered("a", 4), numbered("b", 4), strict=True) for row in pair]
    prompt = few_shot_of_task(FewShotConfig(n=2), pool, lambda seed: "ab"[seed % 2])
    for seed in range(10):
        one, other = prompt(seed)
        assert one is not other and one.task == other.task == "ab"[seed % 2]
        assert prompt(seed) == [one, other]
    assert len({prompt(seed)[0].turns[0].content for seed in range(0, 40, 2)}) == 4
    with pytest.raises(InputError, match="demonstrations: found 4 of task 'b', expected at least 5"):
        few_shot_of_task(FewShotConfig(n=5), pool, lambda seed: "b")(0)


def test_steps_stand_behind_the_prompt_and_none_in_it():
    row = Trajectory((user("a"), agent("x", 1.0)))
    prompt = few_shot_ids([FewShotConfig().cut(SHOWN, None)], RENDERER)
    assert prompt == (2, P, 3, 4, Q, 5)
    batch = batch_of([row], [prompt])
    assert batch["input_ids"].tolist() == [[1, *prompt, 2, ord("a"), 3, 4, ord("x"), 5]]
    assert table(batch) == [(0, 10, ord("x"), 0.0, 0, 11, 1.0), (0, 11, 5, 1.0, 0, 0, 0.0)]
    assert batch["action_mask"].nonzero().tolist() == [[0, 11], [0, 12]]


def test_a_prompt_has_the_returns_that_its_own_episode_had():
    cut = FewShotConfig(part="last").cut(Trajectory((*SHOWN.turns, user("r"), agent("z", 2.0))), None)
    assert few_shot_ids([cut], RENDERER, return_ids) == (2, ord("r"), 3, 202, 4, ord("z"), 5)
    whole = FewShotConfig().cut(SHOWN, None)
    batch = batch_of(
        [Trajectory((user("a"), agent("x", 1.0)))],
        [few_shot_ids([whole], RENDERER, return_ids)],
        return_ids=return_ids,
    )
    assert batch["input_ids"].tolist() == [[1, 2, P, 3, 203, 4, Q, 5, 2, ord("a"), 3, 201, 4, ord("x"), 5]]


def test_no_prompt_leaves_every_array_as_it_was():
    rows = [LONG, SHOWN]
    plain, empty = batch_of(rows, None), batch_of(rows, [(), ()])
    assert torch.equal(plain["input_ids"], empty["input_ids"]) and table(plain) == table(empty)


TURNS = tuple(turn for c in "abcde" for turn in (user(c), agent("x", 1.0)))
RULES = [WindowRule(), WindowRule(1), WindowRule(4, 2), WindowRule(None, 1, 21)]


@pytest.mark.parametrize("rule", RULES)
def test_the_prompt_stays_whole_while_the_window_is_cropped(rule):
    prompt = few_shot_ids([FewShotConfig().cut(SHOWN, None)], RENDERER)
    cut = Trajectory((*TURNS, user("f")), terminated=False)  # brings rows that only serve V
    batch = batch_of([cut], [prompt], rule)
    for row in batch["input_ids"].tolist():
        assert tuple(row[:7]) == (1, *prompt)
    assert batch["input_ids"].shape[1] <= rule.max_length
    assert sorted(set(batch["steps"]["turn"].tolist())) == [1, 3, 5, 7, 9]


@pytest.mark.parametrize("rule", RULES)
def test_training_windows_with_prompts_equal_what_the_policy_sees_live(rule):
    prompt = few_shot_ids([FewShotConfig().cut(SHOWN, None)], RENDERER)
    batch = batch_of([Trajectory(TURNS)], [prompt], rule)
    steps = batch["steps"]
    for index in range(1, len(TURNS), 2):
        chosen = (steps["turn"] == index).nonzero()[0, 0]
        row, opening = steps["row"][chosen], steps["state"][chosen]
        live = policy_window(TURNS[:index], RENDERER, rule, reserve=2, few_shot=prompt)
        assert batch["input_ids"][row, : opening + 1].tolist() == live


def test_turns_that_no_longer_fit_behind_the_prompt_are_counted():
    counts, prompt = Counter(), few_shot_ids([FewShotConfig().cut(SHOWN, None)], RENDERER)
    rows = [Trajectory((user("a"), agent("x" * 9, 1.0), user("b"), agent("x", 1.0)))]
    batch = batch_of(rows, [prompt], WindowRule(max_length=16), counts=counts)
    assert counts["agent turns dropped: longer than max_length"] == 1
    assert set(batch["steps"]["turn"].tolist()) == {3}


@pytest.mark.parametrize(
    "spec, rows, pool, message",
    [
        ({}, [Trajectory((agent("x"),))], None, "row 1: task: found none"),
        (
            {},
            numbered("a", 1),
            None,
            r"row 1: few_shot.n: found 0 demonstrations of task 'a' other than the row itself",
        ),
        ({"n": 2}, numbered("t", 3), [SHOWN], "row 1: few_shot.n: found 1 demonstrations of task 't', expected at l"),
        ({}, numbered("u", 1), [SHOWN], "found 0 demonstrations of task 'u', expected at least 1"),
        (
            {"max_tokens": 5},
            numbered("t", 1),
            [SHOWN],
            "row 1: few_shot.max_tokens: found demonstrations of 6 tokens, exp",
        ),
    ],
)
def test_prompts_that_cannot_be_made_are_refused(spec, rows, pool, message):
    with pytest.raises(InputError, match=message):
        list(encode_few_shot(FewShotConfig(**spec), rows, pool, RENDERER, None))


@pytest.mark.parametrize(
    "settings", [{"n": 0}, {"part": "middle"}, {"turns": 0}, {"max_tokens": 0}, {"drop": 1.5}, {"seed": -1}], ids=str
)
def test_settings_out_of_range_are_refused_by_name(settings):
    with pytest.raises(InputError, match=f"few_shot.{next(iter(settings))}: found"):
        FewShotConfig(**settings)
