"""Return conditioning on a critic's labels: what it says is told to the model, and the bins are fitted on it."""

from dataclasses import replace

import pytest
import torch

from offline_lmrl.algorithms.awr import AWRConfig, AWRTrainer
from offline_lmrl.algorithms.ilql import ILQLConfig, ILQLTrainer
from offline_lmrl.algorithms.return_conditioned import ReturnConditionedConfig, ReturnConditionedTrainer
from offline_lmrl.decoding.value_model import relabel
from offline_lmrl.errors import InputError
from offline_lmrl.logs.io import write_trajectories
from offline_lmrl.logs.trajectory import Trajectory, Turn
from offline_lmrl.models.loading import build_model, load_model
from offline_lmrl.tokens.conditioning import ReturnScale, ReturnTokens
from offline_lmrl.tokens.few_shot import FewShotConfig, draw_few_shot, few_shot_ids
from offline_lmrl.tokens.tokenizers import train_tokenizer

TOKENIZER = train_tokenizer(["left right up down", "you are at 1 2 3 4 5 6 7 8 9"], 300)
SPEC = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 64, "initializer_range": 0.2}
LOGS = [
    Trajectory(
        (
            Turn("user", f"at {i}"),
            Turn("assistant", "left", reward=float(i % 2)),
            Turn("user", "at 1"),
            Turn("assistant", "up", reward=float(i % 3)),
        ),
        terminated=i != 4,
    )
    for i in range(5)
]


def settings(folder, **values):
    return {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "max_length": 64,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **values,
    }


def valued(folder, model=None):
    """Saves a run whose value heads are far from constant."""
    torch.manual_seed(0)
    run = ILQLTrainer(model or build_model(SPEC, TOKENIZER), ILQLConfig(**settings(folder)), LOGS, None, TOKENIZER)
    for parameter in run.model.value_heads.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    run.save_model()
    return folder


def conditioned(folder, held_out=None, logs=LOGS, **values):
    args = ReturnConditionedConfig(**settings(folder, **values))
    return ReturnConditionedTrainer(build_model(SPEC, TOKENIZER), args, logs, held_out, TOKENIZER)


@pytest.mark.parametrize("label, discount", [("max", 1.0), ("max", 0.5), ("q", 1.0)])
def test_the_critics_labels_are_binned_and_told_to_the_model(tmp_path, label, discount):
    critic = valued(tmp_path / "critic")
    write_trajectories(tmp_path / "held_out.jsonl", LOGS[:2])
    run = conditioned(
        tmp_path / "run",
        str(tmp_path / "held_out.jsonl"),
        value_model=str(critic),
        relabel=label,
        discount_per_turn=discount,
        binning="linear",
        bins=4,
    )
    labelled = relabel(LOGS, critic, label, discount)
    scale = ReturnScale.fit(labelled, "linear", 4)
    assert run.returns["scale"] == scale.to_dict()
    return_tokens = ReturnTokens.from_block(run.returns, len(TOKENIZER), run.renderer)
    told = [ids[0] for t in labelled for ids in return_tokens.of_log(t)[:-1]]
    ids = run.train_dataset.encoded.lists["input_ids"][0]
    assert ids[ids >= len(TOKENIZER)].tolist() == told and len(set(told)) > 2
    held_out = run.eval_dataset.encoded.lists["input_ids"][0]
    assert held_out[held_out >= len(TOKENIZER)].tolist() == told[:4]
    plain = conditioned(tmp_path / "plain", binning="linear", bins=4)
    assert plain.returns["scale"] != run.returns["scale"]
    run.train()


def test_demonstrations_from_a_file_have_the_critics_labels_too(tmp_path):
    critic, logs = valued(tmp_path / "critic"), [replace(log, task="walk") for log in LOGS]
    write_trajectories(tmp_path / "shown.jsonl", logs)
    prompt = FewShotConfig(max_tokens=40, demonstrations=str(tmp_path / "shown.jsonl"))
    run = conditioned(tmp_path / "run", logs=logs, value_model=str(critic), binning="linear", few_shot=prompt)
    return_tokens, labelled = ReturnTokens.from_block(run.returns, len(TOKENIZER), run.renderer), relabel(logs, critic)
    assert [return_tokens.of_log(log) for log in labelled] != [return_tokens.of_log(log) for log in logs]
    behind = len(run.renderer.preamble_of(()))
    for row, shown in enumerate(draw_few_shot(prompt, logs, labelled)):
        ids = list(few_shot_ids(shown, run.renderer, return_tokens.of_log))
        assert run.train_dataset.batch([row])["input_ids"][0].tolist()[behind : behind + len(ids)] == ids


def test_a_conditioned_model_judges_as_if_nothing_were_asked_for(tmp_path):
    run = conditioned(tmp_path / "run")
    run.save_model()
    critic = valued(tmp_path / "critic", load_model(tmp_path / "run"))
    told = [Trajectory(t.turns, t.terminated, labels={"return_to_go": [9.0, 9.0]}) for t in LOGS]
    assert relabel(told, critic) == relabel(LOGS, critic)  # labels of before do not reach it
    args = AWRConfig(value_model=str(critic), **settings(tmp_path / "awr"))
    with pytest.raises(InputError, match="value_model: found a model that is conditioned on returns"):
        AWRTrainer(build_model(SPEC, TOKENIZER), args, LOGS, None, TOKENIZER)


def test_an_unknown_label_is_refused(tmp_path):
    with pytest.raises(InputError, match="relabel: found 'mean', expected max or q"):
        ReturnConditionedConfig(**settings(tmp_path, relabel="mean"))
