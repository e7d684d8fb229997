"""A frozen trunk: hidden states are computed once, heads are trained on them, and π stays what it was."""

import shutil

import pytest
import torch
from torch.testing import assert_close

from offline_lmrl.algorithms.ilql import ILQLConfig, ILQLTrainer
from offline_lmrl.errors import InputError
from offline_lmrl.logs.io import write_trajectories
from offline_lmrl.models.loading import load_model
from offline_lmrl.run import DataConfig, ModelConfig, RunConfig, dry_run, train
from offline_lmrl.training import frozen
from tests.ranks import run_ranks
from tests.training.test_trainer import NO_DROPOUT, SPEC, TOKENIZER, build_model, logs, parameters, trainer


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "offline_lmrl" / "hidden_states"


def frozen_trainer(folder, data=None, seed=0, **settings):
    torch.manual_seed(seed)
    given = {"max_steps": 6, "learning_rate": 1e-2, "target_rate": 0.1, "monte_carlo": 0.3, "max_length": 64,
             "context": 2, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}  # fmt: skip
    args = ILQLConfig(output_dir=str(folder), use_cpu=True, **given | settings)
    model = build_model(SPEC | NO_DROPOUT, TOKENIZER)
    return ILQLTrainer(model, args, data or logs(), None, TOKENIZER, frozen_trunk=True)


def test_batches_hold_what_the_trunk_computes_at_each_place(tmp_path):
    run, index = frozen_trainer(tmp_path), [5, 0, 17]
    whole, mine = run.train_dataset.windows.batch(index), run.train_dataset.batch(index)
    hidden = run.model.hidden_states(input_ids=whole["input_ids"], attention_mask=whole["attention_mask"])
    for place in ("", "next_", "end_"):
        row, state = whole["steps"][f"{place}row"], whole["steps"][f"{place}state"]
        column = mine["steps"][f"{place}state"]
        assert not mine["steps"][f"{place}row"].any()
        # bf16 has eight digits; batches of another shape round in other places
        assert_close(mine["hidden"][0, column].float(), hidden[row, state].bfloat16().float(), atol=1e-2, rtol=1e-2)
    for name in whole["steps"].keys() - {
        f"{place}{what}" for place in ("", "next_", "end_") for what in ("row", "state")
    }:
        assert torch.equal(whole["steps"][name], mine["steps"][name]), name


def test_losses_are_those_of_a_trunk_that_is_read_each_time(tmp_path):
    run = frozen_trainer(tmp_path / "a")
    for head in run.model.value_heads.parameters():
        torch.nn.init.normal_(head, std=0.3)
    whole, mine = run.train_dataset.windows.batch(range(8)), run.train_dataset.batch(range(8))
    (expected, _), (found, _) = (run.losses(run.outputs(run.model, batch), batch) for batch in (whole, mine))
    assert_close(found, expected, atol=0.05, rtol=0.02)


def test_only_the_heads_are_trained_and_the_run_opens_as_any_other(tmp_path):
    run = frozen_trainer(tmp_path / "run")
    before = {name: weight.clone() for name, weight in run.model.state_dict().items()}
    run.train()
    run.save_model()
    saved = load_model(tmp_path / "run")
    for name, weight in saved.state_dict().items():
        if frozen.in_value_heads(name):
            assert "v." not in name or not torch.equal(weight, before[name]), name
        else:
            assert torch.equal(weight, before[name]), name
    assert not torch.equal(saved.value_heads.q.map, before["value_heads.q.map"])


def test_hidden_states_are_read_again_for_the_same_tokens_and_weights_only(tmp_path, cache, monkeypatch):
    frozen_trainer(tmp_path / "a")
    assert len(list(cache.iterdir())) == 1
    frozen_trainer(tmp_path / "c", seed=1)  # other weights
    frozen_trainer(tmp_path / "d", data=logs(23))
    frozen_trainer(tmp_path / "e", context=1)
    frozen_trainer(tmp_path / "f", monte_carlo=0.0)  # V at the end of a cut log is not read
    assert len(list(cache.iterdir())) == 5
    monkeypatch.setattr(frozen, "_compute", None)
    frozen_trainer(tmp_path / "b", expectile=0.7, learning_rate=1.0)


def test_nothing_is_written_where_the_disk_would_fill_up(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(frozen, "LARGEST_SHARE", 1e-12)
    with pytest.raises(InputError, match="model.freeze: found hidden states of at most .* GB, expected at most 0%"):
        frozen_trainer(tmp_path)
    assert not list(cache.iterdir())


def config_of(tmp_path, algorithm="ilql", **model):
    base = trainer(tmp_path / "base", algorithm="bc")
    base.save_model()
    write_trajectories(tmp_path / "logs.jsonl", logs())
    args = ILQLConfig(output_dir=str(tmp_path / "run"), use_cpu=True, max_steps=2, report_to="none", max_length=64)
    return RunConfig(
        algorithm,
        ModelConfig(path=str(tmp_path / "base"), freeze="trunk", **model),
        DataConfig(train=str(tmp_path / "logs.jsonl")),
        args,
    )


def test_a_run_with_a_frozen_trunk_is_planned_and_trained_from_its_settings(tmp_path, cache):
    config = config_of(tmp_path)
    plan = dry_run(config)
    assert not cache.exists()
    assert plan["bytes of hidden states, at most"] == 2 * 16 * min(plan["tokens"], 3 * plan["action tokens"])
    model = load_model(train(config))
    heads = sum(p.numel() for name, p in model.named_parameters() if frozen.in_value_heads(name) and p.requires_grad)
    assert plan["trained parameters"] == heads
    base = load_model(tmp_path / "base").state_dict()
    assert all(torch.equal(weight, base[name]) for name, weight in model.state_dict().items() if name in base)


def test_heads_are_trained_on_the_frozen_trunk_of_a_run_with_an_adapter(tmp_path):
    peft = pytest.importorskip("peft")
    base = trainer(tmp_path / "base", algorithm="bc")
    base.save_model()
    lora = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    adapted = trainer(tmp_path / "adapted", algorithm="bc", model=str(tmp_path / "base"), lora=lora, max_steps=1)
    adapted.train()
    adapted.save_model()
    config = config_of(tmp_path / "other")
    config.model.path = str(tmp_path / "adapted")
    before, after = (load_model(folder).state_dict() for folder in (tmp_path / "adapted", train(config)))
    assert {name for name in after if not frozen.in_value_heads(name)} == set(before)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert any(after[name].any() for name in after if name.endswith("value_heads.q.map"))


def test_what_a_frozen_trunk_cannot_train_is_refused(tmp_path):
    with pytest.raises(InputError, match="model.freeze: found trunk beside model.lora"):
        train(config_of(tmp_path, lora={"r": 2}))
    with pytest.raises(InputError, match="model.freeze: found trunk with bc, expected null"):
        train(config_of(tmp_path, algorithm="bc"))
    with pytest.raises(InputError, match="utterance_weight: found 1 together with model.freeze, expected 0"):
        frozen_trainer(tmp_path, utterance_weight=1.0)


RANKS = """
import torch
from tests.training.test_frozen import frozen_trainer
from tests.training.test_trainer import parameters
run = frozen_trainer({folder!r}, per_device_train_batch_size=4)
run.train()
if run.args.process_index == 0:
    torch.save(parameters(run), {out!r})
"""


def test_two_processes_read_one_file_and_train_as_one(tmp_path, cache):
    one = frozen_trainer(tmp_path / "one", per_device_train_batch_size=8)
    one.train()
    (written,) = cache.iterdir()
    shutil.rmtree(written)
    out = tmp_path / "out.pt"
    run_ranks(RANKS.format(folder=str(tmp_path / "two"), out=str(out)), 2, tmp_path)
    assert [path.name for path in cache.iterdir()] == [written.name]
    assert_close(torch.load(out), parameters(one), atol=1e-4, rtol=0)
