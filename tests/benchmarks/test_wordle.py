"""Games per second of CPU time of scripted Wordle players and what they earn: printed, never asserted.

Run with `pytest -m benchmarks -s`.
"""

import functools
import statistics
import time

import pytest

from offline_lmrl.environments.rollouts import rollout
from offline_lmrl.tasks.wordle import LISTS, PLAYERS, Scripted, Wordle, lexicon

pytestmark = pytest.mark.benchmarks

GAMES = {name: 4096 for name in PLAYERS if name != "user"} | {
    "monte_carlo": 512
}  # which imagines hundreds for each guess


@pytest.mark.parametrize("words", LISTS)
@pytest.mark.parametrize("duplicates", ["real", "simplified"])
def test_games_per_second_and_mean_returns(words, duplicates):
    lexicon.cache_clear()
    started = time.process_time()
    game = functools.partial(Wordle, words, duplicates)
    known = game().lexicon
    print(f"\n{len(known.words)} words, {duplicates} rule; table made in {time.process_time() - started:.2f} s")
    for name, games in GAMES.items():
        policy, started = Scripted(PLAYERS[name], game()), time.process_time()
        played = rollout(policy, game, range(games))
        rate = games / (time.process_time() - started)
        returns = [episode.total_return for episode in played]
        won = statistics.fmean(episode.labels["won"] for episode in played)
        print(
            f"  {name:15} mean {statistics.fmean(returns):.3f}, s.d. {statistics.pstdev(returns):.2f}, "
            f"won {won:.3f}, {games} games, {rate:.0f} games/s"
        )
