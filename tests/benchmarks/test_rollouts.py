"""What playing in batches is worth, as ratios of paired repeats in one run: printed, never asserted.

Run with `pytest -m benchmarks -s tests/benchmarks/test_rollouts.py`.
"""

import pytest

from offline_lmrl.algorithms.ppo import PPOConfig, PPOTrainer
from offline_lmrl.decoding.config import DecodingConfig
from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.environments.prompts import PromptEnvironment
from offline_lmrl.environments.rollouts import rollout
from offline_lmrl.logs.trajectory import Turn
from offline_lmrl.models.loading import build_model
from offline_lmrl.tasks.maze import Maze
from offline_lmrl.tokens.rendering import Renderer
from offline_lmrl.tokens.tokenizers import train_tokenizer
from tests.benchmarks.test_cost import paired, report

pytestmark = pytest.mark.benchmarks

BATCH, ALONE, TURNS = 256, 8, 10
SPEC = {"model_type": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 4, "n_positions": 128}


def test_steps_per_second_of_a_batch_of_games_over_one_at_a_time():
    texts = [turn.content for seed in range(25) for turn in Maze().reset(seed)]
    tokenizer = train_tokenizer([*texts, "move left move right move up move down"], 400)
    model = build_model(SPEC, tokenizer)
    policy = LanguagePolicy(model, Renderer(tokenizer), DecodingConfig(max_new_tokens=4), context=1)

    def play(games, batch_size):
        return lambda: rollout(policy, Maze, range(games), batch_size=batch_size, max_turns=TURNS)

    # An untrained model never arrives, so every game has TURNS steps.
    ratio = paired(play(ALONE, 1), play(BATCH, BATCH))
    report(f"steps per second of {BATCH} games at once over one at a time", [r * BATCH / ALONE for r in ratio])


def test_tokens_per_second_of_ppo_rollouts_over_the_sampler_alone(tmp_path):
    prompts = ["tell me of the way " * n for n in (1, 2, 3, 4)]
    tokenizer = train_tokenizer(prompts, 300)
    environment = PromptEnvironment(prompts, lambda contexts, texts, labels: [float(len(text)) for text in texts])
    args = PPOConfig(
        output_dir=str(tmp_path),
        max_steps=1,
        episodes=64,
        save_strategy="no",
        disable_tqdm=True,
        save_rollouts=False,
        max_length=128,
        use_cpu=True,
        decoding=DecodingConfig(max_new_tokens=32),
    )
    run = PPOTrainer(build_model(SPEC, tokenizer), args, environment, None, tokenizer)
    seeds = list(range(64))
    histories = [[Turn("user", prompts[seed % len(prompts)])] for seed in seeds]

    def alone():
        run.rollouts.player.start(seeds).reply(seeds, histories)

    # Untrained, it hardly ever ends a reply: both draw 64 times 32 tokens.
    report(
        "tokens per second of PPO's rollout phase over the sampler alone", paired(alone, lambda: run.rollouts.play(0))
    )
