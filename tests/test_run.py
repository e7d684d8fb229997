"""A run folder is one run: of these settings, these data and this start, written once and counted in full."""

import fcntl
import json
import os
import shutil
from collections import Counter
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from offline_lmrl import run
from offline_lmrl.algorithms.behaviour_cloning import BCConfig
from offline_lmrl.algorithms.ilql import ILQLConfig
from offline_lmrl.algorithms.reward_model import RewardModelConfig
from offline_lmrl.comparison.measure import training_cost
from offline_lmrl.decoding.scorers import TOO_LONG
from offline_lmrl.errors import InputError
from offline_lmrl.logs.comparison import Comparison
from offline_lmrl.logs.io import write_comparisons, write_trajectories
from offline_lmrl.logs.trajectory import Trajectory, Turn
from offline_lmrl.run import DataConfig, ModelConfig, RunConfig
from offline_lmrl.tokens.few_shot import FewShotConfig
from offline_lmrl.training.config import OfflineConfig
from offline_lmrl.training.trainer import OfflineTrainer

SCRATCH = {"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 1, "n_positions": 64}


def logs(n, words=("left", "right")):
    """Cut behind an observation, so that values read rows of their own at the end."""
    return [
        Trajectory(
            (Turn("user", "go"), Turn("assistant", words[i % 2], reward=1.0 - i % 2), Turn("user", "on")),
            terminated=False,
        )
        for i in range(n)
    ]


@pytest.fixture
def data(tmp_path):
    write_trajectories(tmp_path / "train.jsonl", logs(4))
    write_trajectories(tmp_path / "validation.jsonl", logs(2))
    return DataConfig(str(tmp_path / "train.jsonl"), str(tmp_path / "validation.jsonl"))


def settings(folder, config=BCConfig, **values):
    values = {
        "num_train_epochs": 1,
        "per_device_train_batch_size": 2,
        "max_length": 64,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **values,
    }
    return config(output_dir=str(folder), **values)


def scratch(**values):
    return ModelConfig(scratch=SCRATCH, vocab_size=280, **values)


def cloned(folder, data, **values):
    return run.train(RunConfig("bc", scratch(), data, settings(folder, **values)))


@pytest.mark.parametrize("part", ["train", "validation"])
def test_other_data_under_the_same_path_are_another_run(tmp_path, data, part):
    done = cloned(tmp_path / "run", data)
    before = (done / "complete.json").read_text()
    assert cloned(tmp_path / "run", data) == done
    write_trajectories(getattr(data, part), logs(4, ("up", "down")))
    with pytest.raises(InputError, match=f"config.yaml: input_hashes.{part}: found .*, expected .*another output_dir"):
        cloned(tmp_path / "run", data)
    assert (done / "complete.json").read_text() == before


def test_other_weights_under_the_same_path_are_another_start(tmp_path, data):
    start = cloned(tmp_path / "start", data)
    model = ModelConfig(path=str(start))
    done = run.train(RunConfig("bc", model, data, settings(tmp_path / "run")))
    assert run.train(RunConfig("bc", model, data, settings(tmp_path / "run"))) == done
    weights = load_file(start / "model.safetensors")
    save_file({name: torch.zeros_like(value) for name, value in weights.items()}, start / "model.safetensors")
    with pytest.raises(InputError, match="input_hashes.start_weights: found "):
        run.train(RunConfig("bc", model, data, settings(tmp_path / "run")))


def test_only_the_main_process_writes(tmp_path, data, monkeypatch):
    monkeypatch.setattr(OfflineConfig, "should_save", property(lambda self: False))
    cloned(tmp_path / "run", data)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_every_token_that_is_read_counts_and_those_of_the_runs_before(tmp_path, data, monkeypatch):
    read = []

    def compute_loss(self, model, inputs, **kwargs):
        read.append(int(inputs["attention_mask"].sum()))
        return original(self, model, inputs, **kwargs)

    original = OfflineTrainer.compute_loss
    monkeypatch.setattr(OfflineTrainer, "compute_loss", compute_loss)
    totals = []
    start = scratch()
    for name in ("first", "second", "third"):
        if name == "first":
            done = run.train(RunConfig("bc", start, data, settings(tmp_path / name, context=1)))
        else:
            done = run.train(
                RunConfig("ilql", start, data, settings(tmp_path / name, ILQLConfig, context=1, monte_carlo=0.5))
            )
        report = json.loads((done / "complete.json").read_text())
        assert report["training_tokens"] == sum(read)
        assert report["start_tokens"] == sum(totals)
        totals.append(sum(read))
        assert training_cost(done)["training_tokens"] == sum(totals)
        read.clear()
        start = ModelConfig(path=str(done))
    assert totals[1] > 1.4 * totals[0]  # the rows that only values read


def test_a_resumed_run_counts_all_its_tokens(tmp_path, data):
    straight = cloned(tmp_path / "straight", data, num_train_epochs=3)
    stopped = cloned(tmp_path / "run", data, num_train_epochs=3, save_strategy="epoch")
    (stopped / "complete.json").unlink()
    resumed = cloned(tmp_path / "run", data, num_train_epochs=3, save_strategy="epoch")
    assert (resumed / "complete.json").read_text() == (straight / "complete.json").read_text()


def test_settings_that_change_no_result_may_differ(tmp_path, data):
    done = cloned(tmp_path / "run", data)
    assert cloned(tmp_path / "run", data, save_total_limit=7, eval_strategy="epoch", run_name="other") == done
    with pytest.raises(InputError, match="args.seed: found 42, expected 1"):
        cloned(tmp_path / "run", data, seed=1)


def test_a_setting_whose_name_ends_in_token_is_stored_and_noticed(tmp_path, data):
    def train(**values):
        args = settings(tmp_path / "run", ILQLConfig, max_steps=1, hub_token="secret", **values)
        return run.train(RunConfig("ilql", scratch(), data, args))

    file = train(discount_per_token=0.9) / "config.yaml"
    assert yaml.safe_load(file.read_text())["args"]["discount_per_token"] == 0.9 and "secret" not in file.read_text()
    with pytest.raises(InputError, match="args.discount_per_token: found 0.9, expected 0.8"):
        train(discount_per_token=0.8)
    # An older run has hidden the number, which is then not compared.
    file.write_text(file.read_text().replace("discount_per_token: 0.9", "discount_per_token: <DISCOUNT_PER_TOKEN>"))
    assert train(discount_per_token=0.8) == file.parent


def test_a_dry_run_leaves_nothing_behind(tmp_path, data):
    before = sorted(tmp_path.iterdir())
    args = settings(tmp_path / "runs" / "new")
    facts = run.dry_run(RunConfig("bc", scratch(), data, args))
    assert facts["windows"] == 4 and facts["optimizer steps"] == 2
    assert sorted(tmp_path.iterdir()) == before and args.output_dir == str(tmp_path / "runs" / "new")


def test_an_adapter_of_a_model_from_scratch_is_refused_up_front():
    with pytest.raises(InputError, match="model.lora: found settings together with model.scratch"):
        scratch(lora={"r": 2})


@pytest.mark.parametrize("lora", [{"rank": 2}, {"r": 0}, {"r": 2, "target_modules": ["nowhere"]}])
def test_bad_fields_of_an_adapter_name_model_lora(tmp_path, data, lora):
    pytest.importorskip("peft")
    start = cloned(tmp_path / "start", data)
    with pytest.raises(InputError, match="model.lora: "):
        run.train(RunConfig("bc", ModelConfig(path=str(start), lora=lora), data, settings(tmp_path / "run")))
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_the_resolved_settings_lie_in_the_folder(tmp_path, data):
    found = yaml.safe_load((cloned(tmp_path / "run", data) / "config.yaml").read_text())
    assert found["algorithm"] == "bc" and found["data"]["train"] == data.train
    assert found["input_hashes"]["start_weights"] is None and len(found["input_hashes"]["train"]) == 64


def test_a_null_setting_may_be_absent_from_an_older_run(tmp_path):
    (tmp_path / "config.yaml").write_text("args: {seed: 1}\n")
    (tmp_path / "complete.json").write_text("{}")
    assert run.run_there(tmp_path, {"args": {"seed": 1, "few_shot": None}}) == "same"
    with pytest.raises(InputError, match="args.few_shot: found None, expected {'n': 1}; take another output_dir"):
        run.run_there(tmp_path, {"args": {"seed": 1, "few_shot": {"n": 1}}})


def test_other_demonstrations_under_the_same_path_are_another_run(tmp_path):
    path, found = str(tmp_path / "shown.jsonl"), []
    args = BCConfig(output_dir=str(tmp_path), few_shot=FewShotConfig(demonstrations=path), use_cpu=True)
    for n in (1, 2):
        write_trajectories(path, logs(n))
        found.append(run.input_hashes(ModelConfig(scratch=SCRATCH), logs(2), None, args))
    assert found[0].pop("demonstrations") != found[1].pop("demonstrations") and found[0] == found[1]
    assert BCConfig(output_dir=str(tmp_path), use_cpu=True).named_data == {}


PAIRS = [
    Comparison(
        (Turn("user", "go"),), ((Turn("assistant", "left"),), (Turn("assistant", right),)), (1.0, 0.0), group=right
    )
    for right in ("right", "up", "".join(map(chr, range(33, 120))))
]


def lefts(context, option):
    return 4.0 * (option[-1].content == "left")


def test_comparisons_are_scored_as_the_config_says(tmp_path):
    write_comparisons(tmp_path / "pairs.jsonl", PAIRS)
    data = DataConfig(str(tmp_path / "pairs.jsonl"), str(tmp_path / "pairs.jsonl"), {"reward": "sign"})
    args = ILQLConfig(output_dir=str(tmp_path), use_cpu=True)
    train, validation = run.read_data(RunConfig("ilql", scratch(), data, args), Counter())
    assert [row.total_return for row in train] == [1.0, -1.0] * 3 and validation == train
    data = replace(data, preference={"reward": f"{__name__}:lefts", "normalise": "none"})
    assert [row.total_return for row in run.read_data(RunConfig("ilql", scratch(), data, args), Counter())[0]] == [
        4.0,
        0.0,
    ] * 3
    with pytest.raises(
        InputError, match="data.preference: found 'rewards', expected one of reward, reward_at, normalise"
    ):
        DataConfig("x", preference={"rewards": "sign"})
    remedy = "set data.preference, or call to_trajectories, to turn comparisons into scored rows"
    with pytest.raises(InputError, match=remedy):
        run.read_data(RunConfig("bc", scratch(), DataConfig(data.train), args), Counter())


def test_repairs_of_the_reader_and_faults_of_the_groups_are_counted(tmp_path):
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    for name, groups in (("train", "ggg"), ("validation", "ghg")):
        rows = [{"messages": said, "stars": str(i), "group": group} for i, group in enumerate(groups)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args, counts = ILQLConfig(output_dir=str(tmp_path), use_cpu=True), Counter()
    data = DataConfig(str(tmp_path / "train.jsonl"), str(tmp_path / "validation.jsonl"), reward="stars")
    train, validation = run.read_data(RunConfig("ilql", scratch(), data, args), counts)
    assert [row.total_return for row in train] == [row.total_return for row in validation] == [0.0, 1.0, 2.0]
    read = {"repaired: stars written as text": 3, "repaired: reward of the row put on its last agent turn": 3}
    assert counts == {
        **read,
        **{f"validation: {reason}": n for reason, n in read.items()},
        "groups that are in both train and validation, so that validation is no test of new groups": 1,
        "rows that are all in one group, so that none can be held out for validation": 3,
    }
    unscored: Counter[str] = Counter()
    run.read_data(RunConfig("ilql", scratch(), DataConfig(str(tmp_path / "validation.jsonl")), args), unscored)
    assert unscored == {
        "rows without any reward; column 'stars' may hold the score: use --data.reward 'stars', or "
        "--reward 'stars' for check and evaluate": 3
    }
    both = "data.reward: found a column together with data.preference, expected only one of them"
    with pytest.raises(InputError, match=both):
        DataConfig("x", preference={}, reward="stars")
    write_comparisons(tmp_path / "pairs.jsonl", PAIRS)
    with pytest.raises(InputError, match="data.reward: found 'stars' for the comparisons of"):
        data = DataConfig(str(tmp_path / "pairs.jsonl"), reward="stars")
        args = RewardModelConfig(output_dir=str(tmp_path), use_cpu=True)
        run.read_data(RunConfig("reward_model", scratch(), data, args), Counter())


def test_what_a_reward_model_read_and_left_out_is_counted_in_the_run_that_learns_from_it(tmp_path, caplog):
    write_comparisons(tmp_path / "pairs.jsonl", PAIRS)
    data = DataConfig(str(tmp_path / "pairs.jsonl"))
    judge = run.train(RunConfig("reward_model", scratch(), data, settings(tmp_path / "judge", RewardModelConfig)))
    cost = json.loads((judge / "complete.json").read_text())["training_tokens"]
    done = run.train(
        RunConfig("bc", scratch(), replace(data, preference={"reward": str(judge)}), settings(tmp_path / "run"))
    )
    report = json.loads((done / "complete.json").read_text())
    assert report["start_tokens"] == cost and report["before"] == {str(judge.resolve()): cost}
    assert report["counts"][TOO_LONG] == 1
    assert f"{tmp_path / 'run'}: {TOO_LONG}: 1" in caplog.messages


SAVES = {"max_steps": 3, "num_train_epochs": 3, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1}


def steps_of(folder):
    """The steps of the rows of metrics, without evaluations, of which a run that is extended has one more."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if "eval_loss" not in row]


def test_a_run_is_extended_from_its_last_checkpoint(tmp_path, data, caplog):
    constant = SAVES | {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": None, "warmup_steps": 0}
    straight = cloned(tmp_path / "straight", data, **constant | {"max_steps": 5})
    for steps in (3, 5):
        done = cloned(tmp_path / "run", data, **constant | {"max_steps": steps})
    assert [text for text in caplog.messages if f"{done}: continues" in text] == [f"{done}: continues at step 3 of 5"]
    weights = [load_file(folder / "model.safetensors") for folder in (straight, done)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert steps_of(done) == steps_of(straight) == [1, 2, 3, 4, 5, 5]
    assert (done / "complete.json").read_text() == (straight / "complete.json").read_text()
    with pytest.raises(InputError, match="args.max_steps: found 5, expected 3; take another output_dir"):
        cloned(tmp_path / "run", data, **constant)


def test_an_extended_run_says_what_becomes_of_its_schedule(tmp_path, data, caplog):
    for epochs in (1, 2):
        done = cloned(tmp_path / "run", data, num_train_epochs=epochs, save_strategy="epoch")
    assert [text for text in caplog.messages if f"{done}: is extended" in text][-1] == (
        f"{done}: is extended to 4 steps: from here on, the learning rate follows a schedule of that length; earlier "
        "steps followed a shorter one, so the result differs from that of a single run of 4 steps"
    )


def test_a_run_without_checkpoints_is_not_extended_and_stays(tmp_path, data):
    done = cloned(tmp_path / "run", data, max_steps=1)
    missing = "run: found no complete checkpoint, expected one from which to extend the run"
    with pytest.raises(InputError, match=missing):
        cloned(tmp_path / "run", data, max_steps=2)
    assert cloned(tmp_path / "run", data, max_steps=1) == done and (done / "complete.json").exists()


def test_all_settings_that_differ_are_named(tmp_path, data):
    cloned(tmp_path / "run", data)
    with pytest.raises(InputError, match="model.vocab_size: found 280, expected 281; args.seed: found 42, exp"):
        run.train(
            RunConfig("bc", ModelConfig(scratch=SCRATCH, vocab_size=281), data, settings(tmp_path / "run", seed=5))
        )


def test_a_folder_whose_run_died_before_a_checkpoint_takes_other_settings(tmp_path, data):
    done = cloned(tmp_path / "run", data, **SAVES)
    (done / "complete.json").unlink()
    with pytest.raises(InputError, match="args.seed"):
        cloned(tmp_path / "run", data, **SAVES, seed=5)
    for checkpoint in done.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    again = cloned(tmp_path / "run", data, **SAVES, seed=5)
    assert yaml.safe_load((again / "config.yaml").read_text())["args"]["seed"] == 5
    assert steps_of(again) == [1, 2, 3, 3]


def test_what_was_killed_behind_its_last_checkpoint_takes_no_step_more(tmp_path, data, monkeypatch):
    write_comparisons(tmp_path / "pairs.jsonl", PAIRS[:2] * 6)
    pairs = DataConfig(str(tmp_path / "pairs.jsonl"))
    for algorithm, config, source in (("ilql", ILQLConfig, data), ("reward_model", RewardModelConfig, pairs)):
        args = settings(tmp_path / algorithm, config, **SAVES)
        done = run.train(RunConfig(algorithm, scratch(), source, args))
        expected, rows = load_file(done / "model.safetensors"), steps_of(done)
        (done / "complete.json").unlink()
        (done / "model.safetensors").unlink()
        run.train(RunConfig(algorithm, scratch(), source, settings(tmp_path / algorithm, config, **SAVES)))
        found = load_file(done / "model.safetensors")
        assert all(torch.equal(value, found[name]) for name, value in expected.items()) and steps_of(done) == rows


def test_a_folder_where_another_process_trains_is_refused(tmp_path, data):
    (tmp_path / "run").mkdir()
    held = os.open(tmp_path / "run", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)  # each opening of a folder has a lock of its own
    with pytest.raises(InputError, match="run: found another command at work in this folder"):
        cloned(tmp_path / "run", data)
    os.close(held)
    cloned(tmp_path / "run", data)


@pytest.mark.parametrize("content", ["", "[1]", '{"training_tokens": "x"}', '{"training_tokens": 1, "before": 2}'])
def test_a_damaged_report_of_a_run_is_named(tmp_path, content):
    (tmp_path / "complete.json").write_text(content)
    with pytest.raises(InputError, match="complete.json: found a damaged file .* train again, which finishes the run"):
        run.runs_before(str(tmp_path))


@pytest.mark.parametrize("content", ["- 1", "{", "\0"])
def test_damaged_settings_of_a_run_are_named(tmp_path, content):
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(InputError, match="config.yaml: found a damaged file .* take another output_dir, or remove"):
        run.run_there(tmp_path, {"args": {}})
