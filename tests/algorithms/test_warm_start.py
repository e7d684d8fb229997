"""What a run starts from: values in the unit of its rewards, and what an earlier run left in the model."""

import pytest
import torch
from torch.testing import assert_close

from offline_lmrl.algorithms.behaviour_cloning import BCConfig, BCTrainer
from offline_lmrl.algorithms.ilql import ILQLConfig, ILQLTrainer
from offline_lmrl.decoding.sampler import DecodingConfig
from offline_lmrl.errors import InputError
from offline_lmrl.logs.trajectory import Trajectory, Turn
from offline_lmrl.models.loading import build_model, load_model
from offline_lmrl.tokens.tokenizers import train_tokenizer

TOKENIZER = train_tokenizer(["left right up down", "you are at 1 2 3"], 280)
SPEC = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 64}


def episode(*rewards):
    turns = (turn for r in rewards for turn in (Turn("user", "at 1"), Turn("assistant", "up", reward=r)))
    return Trajectory(tuple(turns))


LOGS = [episode(1.0, 2.0), episode(5.0, 8.0)]  # mean reward 4, returns 3 and 13


def trainer(kind, folder, model=None, logs=LOGS, peft_config=None, **settings):
    torch.manual_seed(0)
    config = {ILQLTrainer: ILQLConfig, BCTrainer: BCConfig}[kind]
    args = config(
        output_dir=str(folder),
        max_steps=1,
        per_device_train_batch_size=2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        max_length=64,
        **settings,
    )
    model = build_model(SPEC, TOKENIZER) if model is None else model
    return kind(model, args, logs, None, TOKENIZER, peft_config)


@pytest.mark.parametrize("discount, start", [(1.0, 0.5), (0.9, 1.3)])
def test_the_initial_value_is_a_logged_return_in_the_scaled_unit(tmp_path, discount, start):
    # undiscounted, each of two rewards is shifted by 4: (13 − 8) / 10; discounted, nothing is: 13 / 10
    run = trainer(ILQLTrainer, tmp_path, initial_value=13.0, discount_per_turn=discount)
    value = run.model.v_values(torch.randn(3, 16))
    assert_close(value, torch.full((3,), start))


def test_the_shift_of_rewards_is_left_out_where_they_are_discounted(tmp_path):
    assert trainer(ILQLTrainer, tmp_path, discount_per_turn=1.0).encoder.scale.shift == 4.0
    assert trainer(ILQLTrainer, tmp_path, discount_per_turn=0.99).encoder.scale.shift == 0.0
    assert trainer(ILQLTrainer, tmp_path, discount_per_turn=1.0, discount_per_token=0.99).encoder.scale.shift == 0.0


def saved(run, folder):
    run.save_model(str(folder))
    return load_model(folder)


def test_values_go_on_in_the_unit_of_the_run_they_come_from(tmp_path):
    first = trainer(ILQLTrainer, tmp_path / "1", reward_scale=20.0)
    model = saved(first, tmp_path / "first")
    run = trainer(ILQLTrainer, tmp_path / "2", model)
    assert (
        run.encoder.scale == first.encoder.scale and run.train_dataset.mean_return == first.train_dataset.mean_return
    )
    assert run.model.config.offline_lmrl["reward_scale"]["scale"] == 20.0
    assert trainer(ILQLTrainer, tmp_path / "3", model, reward_scale=20.0).encoder.scale == first.encoder.scale
    with pytest.raises(InputError, match="reward_scale: found 5.0, expected 20, the scale of the model's value heads"):
        trainer(ILQLTrainer, tmp_path / "4", model, reward_scale=5.0)


def test_values_of_shifted_rewards_are_refused_where_the_shift_would_change_the_task(tmp_path):
    model = saved(trainer(ILQLTrainer, tmp_path / "1", discount_per_turn=1.0), tmp_path / "first")
    assert trainer(ILQLTrainer, tmp_path / "2", model, discount_per_turn=1.0).encoder.scale.shift == 4.0
    longer = [*LOGS, episode(1.0, 2.0, 3.0)]
    for settings in ({"discount_per_turn": 0.99}, {"discount_per_turn": 1.0, "logs": longer}):
        with pytest.raises(InputError, match="trained on rewards shifted by 4"):
            trainer(ILQLTrainer, tmp_path / "3", model, **settings)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"value_heads": "mlp"}, "value_heads.kind: found 'mlp', but the model has heads with 'tied'"),
        ({"utterance_weight": 1.0}, "value_heads.utterance: found True, but the model has heads with False"),
    ],
)
def test_heads_of_another_form_than_asked_for_are_refused(tmp_path, settings, message):
    model = trainer(ILQLTrainer, tmp_path / "1").model
    with pytest.raises(InputError, match=message):
        trainer(ILQLTrainer, tmp_path / "2", model, **settings)


def test_behaviour_cloning_of_a_guided_run_leaves_a_plain_policy(tmp_path):
    model = saved(trainer(ILQLTrainer, tmp_path / "1", reward_scale=20.0), tmp_path / "guided")
    plain = saved(trainer(BCTrainer, tmp_path / "2", model), tmp_path / "plain")
    assert plain.value_heads is None
    block = plain.config.offline_lmrl
    assert "value_heads" not in block and "decoding" not in block
    assert block["algorithm"] == "bc" and block["reward_scale"]["scale"] == 10.0


def test_values_are_learnt_on_the_adapter_of_a_cloned_policy(tmp_path):
    peft = pytest.importorskip("peft")
    lora = {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}
    build_model(SPEC, TOKENIZER).save_pretrained(tmp_path / "base")
    base = load_model(tmp_path / "base")
    cloned = saved(trainer(BCTrainer, tmp_path / "1", base, peft_config=peft.LoraConfig(**lora)), tmp_path / "cloned")
    run = trainer(ILQLTrainer, tmp_path / "2", cloned)
    run.train()
    guided = saved(run, tmp_path / "guided")
    assert isinstance(guided, peft.PeftModel) and guided.value_heads is not None
    expected = run.model.state_dict()
    for name, value in guided.state_dict().items():
        assert torch.equal(value, expected[name]), name
    trainer(ILQLTrainer, tmp_path / "3", guided).train()  # and on from there
    assert saved(trainer(BCTrainer, tmp_path / "4", guided), tmp_path / "plain").value_heads is None
    with pytest.raises(InputError, match="lora: found a model with an adapter already"):
        trainer(ILQLTrainer, tmp_path / "5", cloned, peft_config=peft.LoraConfig(**lora))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"decoding": DecodingConfig(beta=-1.0)}, "beta: found -1.0, expected 0 to"),
        ({"learning_rate": -1e-3}, "learning_rate: found -0.001"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        ILQLConfig(output_dir=str(tmp_path), **settings)
