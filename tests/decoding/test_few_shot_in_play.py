"""A policy that reads demonstrations first: what stands where, per row and for all, with returns and without."""

import pytest
import torch
from torch.testing import assert_close

from offline_lmrl.errors import InputError
from offline_lmrl.logs.trajectory import Trajectory, Turn
from offline_lmrl.tokens.few_shot import FewShotConfig, few_shot_ids
from tests.decoding.test_conditioned_play import HISTORIES, MODEL, RENDERER, conditioned, play, policy, prompts_of

DEMONSTRATION = Trajectory(  # returns to go 3 and 2, whose return_tokens show as 4 and 3
    (
        Turn("user", "move"),
        Turn("assistant", "left", reward=1.0),
        Turn("user", "at"),
        Turn("assistant", "go", reward=2.0),
    )
)
OTHER = Trajectory((Turn("user", "at"), Turn("assistant", "right", reward=0.0)))


def shown(monkeypatch, player, *start):
    """What the sampler is given for the first turn of two rows."""
    given = []
    monkeypatch.setattr(player.sampler, "sample", lambda prompts, *args: given.extend(prompts) or [])
    session = player.start([5, 6], *start)
    with pytest.raises(ValueError, match="zip"):  # as the sampler that was put in gives no replies
        session.reply([0, 1], HISTORIES)
    return given


def ids_of(*demonstrations, return_tokens=None):
    return list(few_shot_ids([FewShotConfig().cut(one, None) for one in demonstrations], RENDERER, return_tokens))


def test_all_rows_read_the_demonstrations_behind_the_preamble(monkeypatch):
    plain = shown(monkeypatch, policy(ask=4.0))
    player = policy(window={"few_shot": [DEMONSTRATION, OTHER]}, ask=4.0)
    ids, n = ids_of(DEMONSTRATION, OTHER, return_tokens=player.return_tokens.of_log), len(RENDERER.preamble_of(()))
    assert shown(monkeypatch, player) == [[*row[:n], *ids, *row[n:]] for row in plain]


def test_rows_read_demonstrations_of_their_own(monkeypatch):
    player = policy(window={"few_shot": [OTHER]}, ask=4.0)
    plain = shown(monkeypatch, policy(ask=4.0))
    given = shown(monkeypatch, player, None, [[DEMONSTRATION], None])
    n = len(RENDERER.preamble_of(()))
    assert given[0] == [
        *plain[0][:n],
        *ids_of(DEMONSTRATION, return_tokens=player.return_tokens.of_log),
        *plain[0][n:],
    ]
    assert given[1] == plain[1]


def test_demonstrations_keep_their_own_returns_whatever_is_asked(monkeypatch):
    player = policy(window={"few_shot": [DEMONSTRATION]}, ask=4.0)
    told = prompts_of(monkeypatch, player)
    play(player, [1.0, 0.0])
    assert [turn[0] for turn in told] == [[4, 3, 5], [4, 3, 5, 4]]


def test_to_a_row_that_is_asked_for_nothing_they_tell_nothing(monkeypatch):
    player = policy(window={"few_shot": [DEMONSTRATION]}, ask=4.0)
    told = prompts_of(monkeypatch, player)
    play(player, [1.0], asked=[None, 1.0])
    assert told == [[[0, 0, 0], [4, 3, 2]]]


def test_values_are_read_behind_demonstrations_without_returns(monkeypatch):
    player = policy(window={"few_shot": [DEMONSTRATION]}, ask="auto")
    prompts, read = [], player.sampler.apply_head
    monkeypatch.setattr(
        player.sampler, "apply_head", lambda head, ids, *args: prompts.extend(ids) or read(head, ids, *args)
    )
    play(player, [1.0])
    ids = ids_of(DEMONSTRATION, return_tokens=player.return_tokens.nulls)
    n = len(RENDERER.preamble_of(()))
    assert all(row[n : n + len(ids)] == ids for row in prompts) and len(prompts) == 2


def test_a_planner_reads_them_without_returns():
    plain, player = policy().null_window(HISTORIES[0], 5), policy(window={"few_shot": [DEMONSTRATION]}, ask=4.0)
    ids, n = ids_of(DEMONSTRATION, return_tokens=player.return_tokens.nulls), len(RENDERER.preamble_of(()))
    assert player.null_window(HISTORIES[0], 5) == [*plain[:n], *ids, *plain[n:]]


@pytest.mark.parametrize("form", [{}, {"condition_scale": 1.0}], ids=str)
@pytest.mark.parametrize("window", [{}, {"context": 2}], ids=str)
def test_caches_change_nothing_behind_a_prompt(form, window):
    player = policy(window={"few_shot": [DEMONSTRATION]} | window, ask=4.0, **form)
    fresh = play(player, [1.0, 0.0, 2.0], fresh=True)
    for cached, uncached in zip(play(player, [1.0, 0.0, 2.0]), fresh, strict=True):
        assert cached.token_ids == uncached.token_ids
        assert_close(torch.tensor(cached.log_prob), torch.tensor(uncached.log_prob), atol=1e-4, rtol=0)
    plain = play(policy(window=window, ask=4.0, **form), [1.0, 0.0, 2.0])
    assert [reply.log_prob for reply in plain] != [reply.log_prob for reply in fresh]


def test_the_part_that_was_trained_behind_is_shown(monkeypatch):
    model = conditioned()
    model.config.offline_lmrl = model.config.offline_lmrl | {"few_shot": {"part": "last", "turns": 1}}
    player = policy(model, {"few_shot": [DEMONSTRATION]}, ask=4.0)
    told = prompts_of(monkeypatch, player)
    play(player, [1.0])
    assert told == [[[3, 5], [3, 5]]]


def test_another_sampling_form_keeps_the_prompt():
    player = policy(window={"few_shot": [DEMONSTRATION]}, ask=4.0)
    assert player.with_decoding(ask=1.0).shared_few_shot == player.shared_few_shot != policy().shared_few_shot


@pytest.mark.parametrize(
    "prompt, message",
    [
        ([], "few_shot: found an empty list, expected a list of demonstrations, or None"),
        (DEMONSTRATION, "few_shot: found one trajectory, expected a list"),
        ([DEMONSTRATION] * 9, r"few_shot: found \d+ tokens, expected at most \d+, as max_length \(128\) also has to"),
    ],
)
def test_prompts_that_cannot_be_read_are_refused(prompt, message):
    with pytest.raises(InputError, match=message):
        policy(MODEL, {"few_shot": prompt})
    with pytest.raises(InputError, match=message):
        policy().start([0], None, [prompt])


def test_a_prompt_is_needed_for_every_row():
    with pytest.raises(InputError, match="few_shot: found 1, expected one for each of 2 rows"):
        policy().start([0, 1], None, [[DEMONSTRATION]])
