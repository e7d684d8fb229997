"""A session asked for a log's own return tells what training told, whatever the arithmetic of the rewards."""

import numpy as np
import pytest

from offline_lmrl.decoding.asks import ReturnRequests
from offline_lmrl.logs.trajectory import Trajectory, Turn
from offline_lmrl.tokens.conditioning import ReturnScale, ReturnTokens, returns_to_go

TURNS = 12  # at most


def decimal_logs(seed, n=60):
    """Logs of two tasks whose rewards are decimals and differences of decimals, some missing; half of the logs are
    cut."""
    rng = np.random.default_rng(seed)

    def reward():
        if rng.random() < 0.2:
            return None
        plus, minus = rng.integers(0, 10, 2) / 10
        return float(plus) if rng.random() < 0.5 else float(plus - minus)

    def log():
        turns = [
            turn
            for _ in range(rng.integers(1, TURNS + 1))
            for turn in (Turn("user", "go"), Turn("assistant", "on", reward=reward()))
        ]
        return Trajectory(tuple(turns), terminated=bool(rng.random() < 0.5), task=str(rng.choice(["a", "b"])))

    return [log() for _ in range(n)]


def told_in_play(return_tokens, log, asked, sessions):
    """The return_tokens of each reply's prompt: in one session that remembers, or in a new one for every reply."""
    asks, prompts = ReturnRequests(return_tokens, log.task, [asked]), []
    for i, turn in enumerate(log.turns):
        if turn.is_trainable:
            asks = ReturnRequests(return_tokens, log.task, [asked]) if sessions == "many" else asks
            prompts.append(asks.before_reply(0, log.turns[:i]))
    return prompts


@pytest.mark.parametrize("sessions", ["one", "many"])
@pytest.mark.parametrize("discount", [1.0, 0.9, 0.5])
@pytest.mark.parametrize("per", ["global", "task"])
@pytest.mark.parametrize("kind", ["unique", "linear", "quantile"])
def test_play_asked_for_a_logs_own_return_tells_its_own_bins(kind, per, discount, sessions):
    turns = 0
    for seed in range(3):
        logs = decimal_logs(seed)
        bins = 60 * TURNS if kind == "unique" else 8
        scale = ReturnScale.fit(logs, kind, bins, per, discount)
        block = {"condition": "embedding", "bins": scale.bins, "discount_per_turn": discount, "scale": scale.to_dict()}
        return_tokens = ReturnTokens.from_block(block, 100, None)
        for log in logs:
            in_training = return_tokens.of_log(log)[:-1]
            prompts = told_in_play(return_tokens, log, returns_to_go(log, discount)[0], sessions)
            assert prompts == [in_training[: n + 1] for n in range(len(in_training))]
            turns += len(prompts)
    assert turns > 1000
