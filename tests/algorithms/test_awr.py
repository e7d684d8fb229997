"""IQL's extraction: weights by hand, a critic that reads the same windows, a plain model in the end."""

import json

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from offline_lmrl import run
from offline_lmrl.algorithms.awr import AWRConfig, AWRTrainer, awr_loss
from offline_lmrl.algorithms.behaviour_cloning import BCConfig, BCTrainer
from offline_lmrl.algorithms.ilql import ILQLConfig, ILQLTrainer
from offline_lmrl.comparison.measure import training_cost
from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.errors import InputError
from offline_lmrl.evaluation.offline import measure_logs
from offline_lmrl.logs.io import write_trajectories
from offline_lmrl.logs.trajectory import Trajectory, Turn
from offline_lmrl.models.loading import build_model, load_model
from offline_lmrl.run import DataConfig, ModelConfig
from offline_lmrl.tokens.few_shot import FewShotConfig
from offline_lmrl.tokens.tokenizers import train_tokenizer

TOKENIZER = train_tokenizer(["left right up down", "you are at 1 2 3 4 5 6 7 8 9"], 300)
SPEC = {
    "model_type": "gpt2",
    "n_layer": 1,
    "n_embd": 16,
    "n_head": 2,
    "n_positions": 64,
    "initializer_range": 0.2,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}


def logs(n=8):
    """Two agent turns each; every third log is cut."""
    return [
        Trajectory(
            (
                Turn("user", f"at {i % 5}"),
                Turn("assistant", ("left", "right up")[i % 2], reward=float(i % 3)),
                Turn("user", f"at {i % 7}"),
                Turn("assistant", "down", reward=float(i % 2)),
            ),
            terminated=bool(i % 3),
        )
        for i in range(n)
    ]


def settings(folder, **values):
    values = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "max_length": 64,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **values,
    }
    return values | {"output_dir": str(folder), "use_cpu": True}


@pytest.fixture
def critic(tmp_path):
    """A saved run whose value heads are far from constant; target and online heads differ."""
    torch.manual_seed(0)
    args = ILQLConfig(**settings(tmp_path / "critic", context=2, reward_scale=5.0, discount_per_turn=0.9))
    made = ILQLTrainer(build_model(SPEC, TOKENIZER), args, logs(), None, TOKENIZER)
    for parameter in made.model.value_heads.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    made.save_model()
    return tmp_path / "critic"


def trainer(critic, folder, model=None, data=None, held_out=None, tokenizer=TOKENIZER, **values):
    torch.manual_seed(1)
    args = AWRConfig(value_model=str(critic), **settings(folder, **{"context": 2, **values}))
    return AWRTrainer(model or build_model(SPEC, TOKENIZER), args, data or logs(), held_out, tokenizer)


def test_the_loss_is_weighted_by_the_exponential_of_the_advantage_up_to_the_clip(tmp_path):
    config = AWRConfig(value_model="x", **settings(tmp_path, inverse_temperature=2.0, weight_clip=3.0))
    log_prob = torch.tensor([-0.5, -1.0, -2.0, -4.0], requires_grad=True)
    steps = {"advantage": torch.tensor([0.0, 0.5, 0.6, -1.0])}
    loss, weight = awr_loss({"log_prob": log_prob}, steps, config)
    # e⁰ = 1, e¹ = 2.71828, e^1.2 = 3.32 is clipped to 3, e⁻² = .135335
    assert_close(weight, torch.tensor([1.0, 2.7182817, 3.0, 0.1353353]))
    assert_close(loss, torch.tensor([0.5, 2.7182817, 6.0, 0.5413411]))
    loss.sum().backward()
    assert_close(log_prob.grad, -weight)


def test_the_defaults_are_the_papers(tmp_path):
    config = AWRConfig(value_model="x", **settings(tmp_path))
    advantage = torch.tensor([0.1, 9.0])
    _, weight = awr_loss({"log_prob": torch.zeros(2)}, {"advantage": advantage}, config)
    assert_close(weight, torch.tensor([1.3498588, 100.0]))  # e^.3 and the clip


def test_advantages_are_the_critics_in_scaled_units_at_every_token(tmp_path, critic):
    made = trainer(critic, tmp_path / "run", per_device_eval_batch_size=3)
    judge = LanguagePolicy.load(critic, q_reduce="min", device="cpu")
    steps = measure_logs(judge, logs())  # in reward units
    found = made.train_dataset.column("advantage")
    assert_close(torch.from_numpy(found), torch.from_numpy(steps.q - steps.v) / 5.0, atol=1e-5, rtol=0)
    assert found.std() > 0.05
    batch = made.train_dataset.batch([3, 1])
    ((start, stop), (first, last)) = (made.train_dataset.step_offsets[i : i + 2] for i in (3, 1))
    expected = torch.from_numpy(found[[*range(start, stop), *range(first, last)]])
    assert torch.equal(batch["steps"]["advantage"], expected)


def test_the_critics_scale_and_discounts_are_saved_and_the_model_is_plain(tmp_path, critic):
    made = trainer(critic, tmp_path / "run", load_model(critic), held_out=logs(3))  # even where it starts from heads
    made.train()
    made.save_model()
    block = load_model(tmp_path / "run").config.offline_lmrl
    assert block["reward_scale"]["scale"] == 5.0 and block["step_rule"]["discount_per_turn"] == 0.9
    assert block["algorithm"] == "awr" and "value_heads" not in block and "decoding" not in block
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / "run", output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    ids = torch.tensor([[1, 4, 70, 71, 2, 5]])
    assert_close(plain(ids).logits, load_model(tmp_path / "run")(ids).logits)
    assert set(made.evaluate()) >= {"eval_loss", "eval_weight", "eval_weight/clipped", "eval_value/advantage"}
    assert not hasattr(made, "value_model")


def test_no_temperature_is_behaviour_cloning(tmp_path, critic):
    cloned = BCTrainer(load_model(critic), BCConfig(**settings(tmp_path / "bc", context=2)), logs(), None, TOKENIZER)
    extracted = trainer(critic, tmp_path / "awr", load_model(critic), inverse_temperature=0.0)
    weighted = trainer(critic, tmp_path / "weighted", load_model(critic))
    parameters = []
    for made in (cloned, extracted, weighted):
        made.train()
        parameters.append(torch.cat([p.detach().flatten() for p in made.model.parameters()]))
    assert torch.equal(parameters[0], parameters[1])
    assert not torch.allclose(parameters[0], parameters[2])


@pytest.mark.parametrize(
    "values, message",
    [
        ({"context": 1}, "context: found 1, expected the value model's 2: both use the same windows"),
        ({"stride": 2}, "stride: found 2, expected the value model's 1"),
        ({"max_length": 32}, "max_length: found 32, expected the value model's 64"),
        (
            {"few_shot": FewShotConfig(max_tokens=20)},
            "few_shot: found .*'max_tokens': 20.*, expected the value model's None",
        ),
        (
            {"template": "plain", "tokenizer": train_tokenizer(["else"] * 9, 280)},
            "tokenizer: found fingerprint .*, expected the value model's",
        ),
        ({"reward_scale": 2.0}, "reward_scale: found 2.0, expected the value model's 5"),
        ({"inverse_temperature": -1.0}, "inverse_temperature: found -1.0, expected 0 to"),
        ({"weight_clip": 0.0}, "weight_clip: found 0.0, expected"),
    ],
)
def test_a_critic_that_reads_something_else_is_refused(tmp_path, critic, values, message):
    with pytest.raises(InputError, match=message):
        trainer(critic, tmp_path / "run", **values)


def test_a_missing_critic_and_one_without_heads_are_refused(tmp_path, critic):
    with pytest.raises(InputError, match="value_model: missing, expected the folder or hub name"):
        AWRConfig(**settings(tmp_path))
    trainer(critic, tmp_path / "plain").save_model()
    with pytest.raises(InputError, match="value_model: .*plain: found a model without value heads"):
        trainer(tmp_path / "plain", tmp_path / "run")


def test_another_critic_under_the_same_path_is_another_run_and_all_tokens_count_once(tmp_path):
    write_trajectories(tmp_path / "train.jsonl", logs())
    data = DataConfig(str(tmp_path / "train.jsonl"))

    def train(name, algorithm, config, model, **values):
        args = config(**settings(tmp_path / name, **{"max_length": 48, "max_steps": 2, **values}))
        return run.train(run.RunConfig(algorithm, model, data, args))

    spec = ModelConfig(scratch=SPEC, vocab_size=280)
    cloned = train("bc", "bc", BCConfig, spec)
    start = ModelConfig(path=str(cloned))
    valued = train("ilql", "ilql", ILQLConfig, start)

    def extract():
        return train("awr", "awr", AWRConfig, start, value_model=str(valued))

    reports = [json.loads((folder / "complete.json").read_text()) for folder in (cloned, valued, extract())]
    tokens = [report["training_tokens"] for report in reports]
    assert reports[2]["start_tokens"] == tokens[0] + tokens[1]  # the clone that both start from: once
    assert training_cost(tmp_path / "awr")["training_tokens"] == sum(tokens)
    extract()
    load_model(cloned).save_pretrained(valued)
    with pytest.raises(InputError, match="input_hashes.value_weights: found "):
        extract()
