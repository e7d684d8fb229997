"""What playing in batches is worth, as ratios of paired repeats in one run: printed, never asserted.

Run with `pytest -m benchmarks -s tests/benchmarks/test_rollouts.py`.
"""

import pytest

from offline_lmrl.data.rendering import Renderer
from offline_lmrl.data.tokenizers import train_tokenizer
from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.decoding.sampler import SamplingConfig
from offline_lmrl.environments.maze import Maze
from offline_lmrl.environments.rollouts import rollout
from offline_lmrl.models.guided import build_model
from tests.benchmarks.test_cost import paired, report

pytestmark = pytest.mark.benchmarks

BATCH, ALONE, TURNS = 256, 8, 10
SPEC = {"model_type": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 4, "n_positions": 128}


def test_steps_per_second_of_a_batch_of_games_over_one_at_a_time():
    texts = [turn.content for seed in range(25) for turn in Maze().reset(seed)]
    tokenizer = train_tokenizer([*texts, "move left move right move up move down"], 400)
    model = build_model(SPEC, tokenizer)
    policy = LanguagePolicy(model, Renderer(tokenizer), SamplingConfig(max_new_tokens=4), context=1)

    def play(games, batch_size):
        return lambda: rollout(policy, Maze, range(games), batch_size=batch_size, max_turns=TURNS)

    # An untrained model never arrives, so every game has TURNS steps.
    ratio = paired(play(ALONE, 1), play(BATCH, BATCH))
    report(f"steps per second of {BATCH} games at once over one at a time", [r * BATCH / ALONE for r in ratio])
