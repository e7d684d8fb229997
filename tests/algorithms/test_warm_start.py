"""What a run starts from: values in the unit of its rewards, and what an earlier run left in the model."""

import pytest
import torch
from torch.testing import assert_close

from offline_lmrl.algorithms.ilql import ILQLConfig, ILQLTrainer
from offline_lmrl.data.tokenizers import train_tokenizer
from offline_lmrl.data.trajectory import Trajectory, Turn
from offline_lmrl.models.guided import build_model

TOKENIZER = train_tokenizer(["left right up down", "you are at 1 2 3"], 280)
SPEC = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 64}


def episode(*rewards):
    turns = (turn for r in rewards for turn in (Turn("user", "at 1"), Turn("assistant", "up", reward=r)))
    return Trajectory(tuple(turns))


LOGS = [episode(1.0, 2.0), episode(5.0, 8.0)]  # mean reward 4, returns 3 and 13


def trainer(kind, folder, model=None, logs=LOGS, peft_config=None, **settings):
    torch.manual_seed(0)
    config = {ILQLTrainer: ILQLConfig}[kind]
    args = config(output_dir=str(folder), max_steps=1, per_device_train_batch_size=2, save_strategy="no",
                  report_to="none", disable_tqdm=True, use_cpu=True, max_length=64, **settings)  # fmt: skip
    model = build_model(SPEC, TOKENIZER) if model is None else model
    return kind(model, args, logs, None, TOKENIZER, peft_config)


@pytest.mark.parametrize("discount, start", [(1.0, 0.5), (0.9, 1.3)])
def test_the_initial_value_is_a_logged_return_in_the_scaled_unit(tmp_path, discount, start):
    # undiscounted, each of two rewards is shifted by 4: (13 − 8) / 10; discounted, nothing is: 13 / 10
    run = trainer(ILQLTrainer, tmp_path, initial_value=13.0, discount_per_turn=discount)
    value = run.model.v_values(torch.randn(3, 16))
    assert_close(value, torch.full((3,), start))


def test_the_shift_of_rewards_is_left_out_where_they_are_discounted(tmp_path):
    assert trainer(ILQLTrainer, tmp_path, discount_per_turn=1.0).scale.shift == 4.0
    assert trainer(ILQLTrainer, tmp_path, discount_per_turn=0.99).scale.shift == 0.0
    assert trainer(ILQLTrainer, tmp_path, discount_per_turn=1.0, discount_per_token=0.99).scale.shift == 0.0
