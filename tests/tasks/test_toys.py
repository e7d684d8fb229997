"""What holds for every toy task: logs belong to their seed, replay to the logged rewards, and use single tokens."""

import pytest

from offline_lmrl.errors import InputError
from offline_lmrl.tasks.corridor import Corridor
from offline_lmrl.tasks.count import Count, Count1, Talk
from offline_lmrl.tasks.gamble import Gamble
from offline_lmrl.tasks.hidden_rule import HiddenRule
from offline_lmrl.tasks.talk_trap import TalkTrap
from offline_lmrl.tasks.walk import Walk
from offline_lmrl.tokens.tokenizers import train_tokenizer
from tests.tasks.playing import play

TOYS = [Corridor, Gamble, Count, Count1, Talk, TalkTrap, HiddenRule, Walk]


@pytest.mark.parametrize("toy", TOYS)
def test_logs_belong_to_their_seed(toy):
    logs = toy().logs(50, seed=1)
    assert logs == toy().logs(50, seed=1) != toy().logs(50, seed=2)
    assert len({log.group for log in logs}) == len(logs) == 50


@pytest.mark.parametrize("toy", [Count, Count1, Talk, TalkTrap, Walk])
def test_replayed_logs_give_the_logged_rewards_and_observations(toy):
    environment = toy()
    openings = {environment.reset(seed)[0].content: seed for seed in range(20)}
    for log in environment.logs(40, seed=3):
        agent = [turn for turn in log.turns if turn.is_trainable]
        first, results = play(environment, openings[log.turns[0].content], [turn.content for turn in agent])
        assert [turn.reward for turn in agent] == [result.reward for result in results]
        replies = [turn for result in results for turn in result.turns]
        assert [*first, *replies] == [turn for turn in log.turns if not turn.is_trainable]
        assert [result.terminated or result.truncated for result in results] == [False] * (len(agent) - 1) + [True]
        assert log.terminated == results[-1].terminated


@pytest.mark.parametrize("toy", [Count, Count1, Talk, TalkTrap, HiddenRule, Walk])
def test_words_are_single_tokens(toy):
    tokens = 8 if toy in (Count1, Talk) else 1
    logs = toy().logs(500, seed=0)
    tokenizer = train_tokenizer((turn.content for log in logs for turn in log.turns), 320)
    for turn in {turn for log in logs for turn in log.turns}:
        assert len(tokenizer(turn.content).input_ids) == (tokens if turn.is_trainable else 1)


@pytest.mark.parametrize("toy", TOYS)
def test_no_episodes_is_an_input_error(toy):
    with pytest.raises(InputError, match="episodes: found 0"):
        toy().logs(0, seed=0)
