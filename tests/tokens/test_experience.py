from collections import Counter

import numpy as np
import pytest
import torch

from offline_lmrl.logs.scale import RewardScale
from offline_lmrl.logs.trajectory import Trajectory, Turn
from offline_lmrl.tokens.episodes import EpisodeEncoder, StepRule
from offline_lmrl.tokens.experience import Experience
from offline_lmrl.tokens.rendering import Renderer
from offline_lmrl.tokens.tokenizers import train_tokenizer
from offline_lmrl.tokens.windows import WindowRule

RENDERER = Renderer(train_tokenizer(["ask left right"], 290))


@pytest.fixture
def experience():
    """Two episodes in windows of one turn: agent turns at 1 and 3, and at 1."""
    encoder = EpisodeEncoder(RENDERER, WindowRule(context=1, max_length=64), StepRule(), RewardScale())
    ask, said = Turn("user", "ask"), Turn("assistant", "left", reward=1.0)
    told = [Trajectory((ask, said, ask, said)), Trajectory((ask, said))]
    return Experience.of(told, encoder, Counter(), RENDERER.close_id)


def test_every_token_knows_its_episode_turn_and_place(experience):
    said = len(RENDERER.encode_content("left")) + 1  # with the token that closes the turn
    expected = [(episode, turn, k) for episode, turn in ((0, 1), (0, 3), (1, 1)) for k in range(said)]
    assert list(experience.tokens()) == expected and experience.n == 2
    assert experience.places(np.array([2, 0])).tolist() == [*range(2 * said, 3 * said), *range(said)]


def test_what_is_added_comes_along_in_a_batch(experience):
    column, before = torch.arange(len(experience.episode), dtype=torch.float32), experience.windows
    experience.add(advantage=column)
    assert "advantage" not in before.batch([1])["steps"]  # data sets stay as they were made
    assert torch.equal(experience.column("advantage"), column)
    steps = experience.windows.batch([1])["steps"]
    assert torch.equal(steps["advantage"], column[experience.places(np.array([1]))])
