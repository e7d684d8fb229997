"""The base trainer's promises: losses that do not depend on how a batch was split, exact resume, whole checkpoints."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from transformers.trainer_utils import EvalLoopOutput, get_last_checkpoint

from offline_lmrl.algorithms import load_algorithm
from offline_lmrl.algorithms.behaviour_cloning import BCConfig, BCTrainer
from offline_lmrl.errors import InputError, Stopped
from offline_lmrl.logs import files
from offline_lmrl.logs.io import write_trajectories
from offline_lmrl.logs.trajectory import Trajectory, Turn
from offline_lmrl.models.guided import add_value_heads
from offline_lmrl.models.loading import build_model, load_model
from offline_lmrl.models.value_heads import ValueHeadsConfig
from offline_lmrl.tokens.episodes import RE_ENCODED
from offline_lmrl.tokens.tokenizers import train_tokenizer
from offline_lmrl.training import checkpoint as checkpoint_module
from offline_lmrl.training import loading
from offline_lmrl.training.checkpoint import Signals, noted_signals, rotate
from offline_lmrl.training.loading import LengthGroupedSampler
from tests.ranks import run_ranks
from tests.tiny import TOKENIZERS

TOKENIZER = train_tokenizer(["left right up down", "you are at 1 2 3 4 5 6 7 8 9"], 300)
SPEC = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 64}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def logs(n=24, change=lambda reward: reward):
    """Ragged dialogues of one to three agent turns, every third one cut behind an observation."""
    episodes = []
    for i in range(n):
        turns = []
        for k in range(1 + i % 3):
            turns += [
                Turn("user", f"you are at {i % 7}{k}"),
                Turn("assistant", ("left", "right up")[(i + k) % 2], reward=change(float((i * 7 + k) % 5))),
            ]
        cut = i % 3 == 0
        episodes.append(
            Trajectory((*turns, Turn("user", "you are at 9")) if cut else tuple(turns), terminated=not cut)
        )
    return episodes


def trainer(
    folder,
    *,
    algorithm="ilql",
    data=None,
    held_out=None,
    model=None,
    tokenizer=TOKENIZER,
    lora=None,
    dropout=False,
    spec=SPEC,
    seed=0,
    **settings,
):
    torch.manual_seed(seed)
    config, cls = load_algorithm(algorithm)
    settings = {
        "max_steps": 6,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "report_to": "none",
        "save_strategy": "no",
        "save_total_limit": None,
        "disable_tqdm": True,
        "max_length": 64,
        "context": 2,
        **settings,
    }
    if algorithm == "ilql":
        settings = {"monte_carlo": 0.3, "target_rate": 0.1, **settings}
    if algorithm == "awr" and "value_model" not in settings:
        settings["value_model"] = critic(Path(folder) / "critic")
    model = model or build_model(spec if dropout else spec | NO_DROPOUT, TOKENIZER)
    args = config(output_dir=str(folder), use_cpu=True, **settings)
    return cls(model, args, data or logs(), held_out, tokenizer, lora)


def critic(folder):
    """A saved run with value heads whose advantages are far from constant."""
    run = trainer(folder)
    for parameter in run.model.value_heads.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    run.save_model()
    return str(folder)


def parameters(run):
    return torch.cat([p.detach().flatten() for p in run.model.state_dict().values() if p.is_floating_point()])


@pytest.mark.parametrize("algorithm", ["bc", "mc_awbc", "ilql", "awr", "return_conditioned"])
def test_micro_batches_give_the_step_of_the_whole_batch(tmp_path, algorithm):
    # Adam divides by the size of a gradient: where that is near its rounding error, only the latter would be compared.
    settings = {"algorithm": algorithm, "adam_epsilon": 1e-6}
    if algorithm == "return_conditioned":
        settings["condition_dropout"] = 0.0  # drawn per micro-batch
    whole = trainer(tmp_path / "a", **settings)
    split = trainer(tmp_path / "b", per_device_train_batch_size=2, gradient_accumulation_steps=4, **settings)
    whole.train()
    split.train()
    torch.testing.assert_close(parameters(split), parameters(whole), atol=1e-5, rtol=0)


def test_targets_move_once_per_optimizer_step_under_accumulation(tmp_path):
    run = trainer(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=3, max_steps=4)
    run.train()
    assert run.target_updates.count == run.state.global_step == 4


def test_targets_stay_where_the_loss_scaler_skips_the_step(tmp_path, monkeypatch):
    run = trainer(tmp_path, max_steps=2)
    monkeypatch.setattr(AcceleratedOptimizer, "step_was_skipped", property(lambda self: True))
    run.train()
    assert run.state.global_step == 2 and run.target_updates.count == 0


@pytest.mark.parametrize("algorithm", ["mc_awbc", "ilql", "awr", "return_conditioned"])
def test_resuming_equals_the_uninterrupted_run_to_the_bit(tmp_path, algorithm):
    settings = {
        "algorithm": algorithm,
        "dropout": True,
        "train_sampling_strategy": "group_by_length",
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "max_steps": 14,
        "save_strategy": "steps",
        "save_steps": 4,
    }
    straight = trainer(tmp_path / "run", **settings)
    straight.train()
    assert straight.state.epoch > 1  # the interruption below falls into the second epoch
    resumed = trainer(tmp_path / "run", seed=99, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-8"))
    assert torch.equal(parameters(resumed), parameters(straight))


def test_targets_are_saved_and_resumed_not_copied_from_the_online_heads(tmp_path):
    run = trainer(tmp_path, save_strategy="steps", save_steps=3)
    run.train()
    again = trainer(tmp_path, seed=1, save_strategy="no", max_steps=6)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    heads, saved = again.model.value_heads, run.model.value_heads
    for (name, value), (_, expected) in zip(heads.named_parameters(), saved.named_parameters(), strict=True):
        assert torch.equal(value, expected), name
    assert not any(p.requires_grad for p in heads.target_q.parameters())


def test_a_checkpoint_that_lacks_weights_is_an_error(tmp_path):
    plain = trainer(tmp_path / "bc", algorithm="bc", save_strategy="steps", save_steps=6)
    plain.train()
    with pytest.raises(InputError, match="lacks .* weights of this model"):
        trainer(tmp_path / "x").train(resume_from_checkpoint=str(tmp_path / "bc" / "checkpoint-6"))


SAVES = {"save_strategy": "steps", "save_steps": 3, "logging_steps": 4, "max_steps": 8}
EVALUATES = {"eval_strategy": "epoch"}


def rows(folder):
    """The rows of metrics without what a clock says."""
    found = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in row.items() if "runtime" not in key and "per_second" not in key} for row in found
    ]


@pytest.mark.parametrize("algorithm", ["ilql", "return_conditioned"])
@pytest.mark.parametrize("step", [3, 8])
def test_a_run_that_goes_on_writes_the_rows_and_weights_of_one_that_never_stopped(tmp_path, algorithm, step):
    settings = {"algorithm": algorithm, "held_out": logs(3), "dropout": True, **SAVES, **EVALUATES}
    straight = trainer(tmp_path / "run", **settings)
    expected_loss = straight.train().training_loss
    assert straight.state.global_step == 8 and not straight.state.epoch.is_integer()  # else no step is left to take
    expected = rows(tmp_path / "run")
    assert [row["step"] for row in expected if "loss" in row] == [4, 8] and "train_loss" in expected[-1]
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "lo')  # as a kill leaves it
    again = trainer(tmp_path / "run", seed=9, **settings)
    output = again.train(resume_from_checkpoint=tmp_path / "run" / f"checkpoint-{step}")
    assert torch.equal(parameters(again), parameters(straight))
    assert rows(tmp_path / "run") == expected
    assert output.training_loss == expected_loss == expected[-1]["train_loss"]


def test_a_fresh_start_writes_fresh_rows(tmp_path):
    for _ in range(2):
        trainer(tmp_path, **SAVES).train()
    assert [row["step"] for row in rows(tmp_path)] == [4, 8, 8]


def test_a_checkpoint_is_the_last_that_is_written_at_a_step(tmp_path, monkeypatch):
    written, metrics = {}, tmp_path / "metrics.jsonl"

    def publish(folder, checkpoint):
        written[int(checkpoint.name.partition("-")[2])] = len(rows(tmp_path)) if metrics.exists() else 0
        os.replace(folder, checkpoint)

    monkeypatch.setattr(checkpoint_module, "publish", publish)
    run = trainer(tmp_path, held_out=logs(3), **SAVES | {"save_steps": 1, "logging_strategy": "epoch"}, **EVALUATES)
    run.train()
    assert run.state.epoch > 1 and sorted(written) == list(range(1, 9))
    for step, count in written.items():
        assert all(row["step"] > step or "train_loss" in row for row in rows(tmp_path)[count:])


def test_only_a_checkpoint_that_holds_all_that_resuming_reads_is_taken(tmp_path, caplog):
    run = trainer(tmp_path, **SAVES)
    run.train()
    assert run.last_checkpoint() == tmp_path / "checkpoint-8"
    for name, step in (("optimizer.pt", 8), ("rng_state.pth", 6), ("scheduler.pt", 3)):
        (tmp_path / f"checkpoint-{step}" / name).unlink()
        taken = run.last_checkpoint()
        assert taken == {8: tmp_path / "checkpoint-6", 6: tmp_path / "checkpoint-3", 3: None}[step]
    assert [message.partition(": found ")[2] for message in caplog.messages] == [
        "no optimizer.pt, which exact resuming needs; training continues from checkpoint-6",
        "no optimizer.pt, which exact resuming needs; training continues from checkpoint-3",
        "no optimizer.pt, which exact resuming needs; no checkpoint is complete, so training starts from the "
        "beginning",
    ]
    with pytest.raises(InputError, match="checkpoint-6: found no rng_state.pth, expected a complete checkpoint"):
        run.train(resume_from_checkpoint=tmp_path / "checkpoint-6")


def test_weights_alone_are_no_checkpoint_to_go_on_from(tmp_path):
    run = trainer(tmp_path, **SAVES, save_only_model=True)
    run.train()
    assert (tmp_path / "checkpoint-8" / "model.safetensors").exists() and run.last_checkpoint() is None
    with pytest.raises(InputError, match="found no complete checkpoint, expected one to continue from"):
        run.train(resume_from_checkpoint=True)


def test_a_checkpoint_of_another_number_of_processes_is_refused(tmp_path):
    trainer(tmp_path, **SAVES).train()
    checkpoint = tmp_path / "checkpoint-8"
    found = json.loads((checkpoint / "averages-0.json").read_text())
    for rank in range(2):
        (checkpoint / f"averages-{rank}.json").write_text(json.dumps({**found, "processes": 2}))
        shutil.copy(checkpoint / "rng_state.pth", checkpoint / f"rng_state_{rank}.pth")
    run = trainer(tmp_path, **SAVES)
    for take in (run.last_checkpoint, lambda: run.train(resume_from_checkpoint=checkpoint)):
        with pytest.raises(InputError, match=r"found a checkpoint of a run by 2 process\(es\), expected one by 1"):
            take()


def test_a_damaged_file_of_a_checkpoint_is_named(tmp_path):
    run = trainer(tmp_path, **SAVES)
    run.train()
    for name in (
        "model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
        "averages-0.json",
    ):
        file = tmp_path / "checkpoint-6" / name
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        named = f"checkpoint-6/{name.removesuffix('.pth')}: found a damaged file .*; remove its folder to continue"
        with pytest.raises(InputError, match=named):
            run.train(resume_from_checkpoint=tmp_path / "checkpoint-6")
        file.write_bytes(whole)


@pytest.mark.parametrize("saving", ["only_model", "here"])
def test_a_signal_stops_behind_a_complete_checkpoint_of_the_step(tmp_path, saving):
    settings = SAVES | {"only_model": {"save_only_model": True}, "here": {"save_steps": 5}}[saving]
    straight = trainer(tmp_path / "straight", **settings)
    straight.train()
    run = trainer(tmp_path / "run", **settings)
    run.signals = Signals()
    take = run.training_step

    def training_step(*args):
        if run.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return take(*args)

    run.training_step = training_step
    with noted_signals() as run.signals:
        with pytest.raises(Stopped, match="run: stopped by SIGTERM at step 5 of 8; the same command continues from"):
            run.train()
    assert signal.getsignal(signal.SIGTERM) is not run.signals.note
    again = trainer(tmp_path / "run", seed=9, **settings)
    assert again.last_checkpoint() == tmp_path / "run" / "checkpoint-5"
    again.train(resume_from_checkpoint=True)
    assert torch.equal(parameters(again), parameters(straight))
    assert rows(tmp_path / "run") == rows(tmp_path / "straight")


def test_a_second_interrupt_does_not_wait(tmp_path):
    with noted_signals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_oldest_checkpoints_go_first_and_one_of_a_later_step_is_not_counted(tmp_path):
    for step in (2, 4, 6, 8, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    rotate(tmp_path, newest=8, limit=2, best=str(tmp_path / "checkpoint-4"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-4", "checkpoint-8"]


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from offline_lmrl.training import checkpoint
from test_trainer import trainer
run = trainer({folder!r}, save_strategy="steps", save_steps=2, max_steps=6)
def die_in_the_second_save(function, when):
    def wrapped(*args, **kwargs):
        if run.state.global_step == 4 and when(*args):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return wrapped
if {moment!r} == "weights are written":
    run._save_optimizer_and_scheduler = die_in_the_second_save(run._save_optimizer_and_scheduler, lambda folder: True)
else:
    checkpoint.publish = die_in_the_second_save(checkpoint.publish, lambda written, final: True)
run.train()
"""


@pytest.mark.parametrize("moment", ["weights are written", "all is written"])
def test_signal_9_while_saving_leaves_only_whole_checkpoints(tmp_path, moment):
    code = KILLED.format(tests=str(Path(__file__).parent), folder=str(tmp_path), moment=moment)
    threads = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums differ in the last bit otherwise
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=threads)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-500:]
    left = {path.name for path in (tmp_path / ".saving" / "checkpoint-4").iterdir()}
    assert "model.safetensors" in left and ("optimizer.pt" in left) == (moment == "all is written")
    assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-2")
    straight = trainer(tmp_path / "straight")
    straight.train()
    resumed = trainer(tmp_path, save_strategy="steps", save_steps=2)
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(parameters(resumed), parameters(straight))


def test_what_a_kill_left_half_written_is_never_published(tmp_path):
    half = tmp_path / ".saving" / "checkpoint-4"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")
    trainer(tmp_path).save_model(str(tmp_path))
    assert not (tmp_path / "checkpoint-4").exists() and not (tmp_path / ".saving").exists()
    load_model(tmp_path)


@pytest.fixture
def lora(tmp_path):
    """The `model` and `lora` of a trainer: a saved base and the settings of an adapter for it."""
    peft = pytest.importorskip("peft")
    build_model(SPEC | NO_DROPOUT, TOKENIZER).save_pretrained(tmp_path / "base")
    adapter = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    return {"model": str(tmp_path / "base"), "lora": adapter}


def test_an_adapter_that_is_half_replaced_is_no_model(tmp_path, lora, monkeypatch):
    run = trainer(tmp_path / "run", **lora)
    run.save_model(str(tmp_path / "run"))
    assert (tmp_path / "run" / "adapter_config.json").exists()

    def stop(path):
        if path.name == "adapter_model.safetensors":
            raise KeyboardInterrupt

    monkeypatch.setattr(files, "sync", stop)
    with pytest.raises(KeyboardInterrupt):
        run.save_model(str(tmp_path / "run"))
    with pytest.raises(InputError):
        load_model(tmp_path / "run")


@pytest.mark.parametrize("adapter", [False, True], ids=["whole model", "adapter"])
def test_the_best_checkpoint_is_kept_and_loaded_at_the_end(tmp_path, adapter, request):
    start = request.getfixturevalue("lora") if adapter else {}
    steps = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    run = trainer(
        tmp_path,
        held_out=logs(3),
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        save_total_limit=1,
        **steps,
        **start,
    )
    measured, at_best = iter([1.0, 3.0, 2.0]), []

    def evaluation_loop(*args, **kwargs):
        if run.state.global_step == 2:
            at_best.append(parameters(run))
        return EvalLoopOutput(None, None, {"eval_loss": next(measured)}, 3)

    run.evaluation_loop = evaluation_loop
    run.train()
    assert torch.equal(parameters(run), at_best[0])
    best = str(tmp_path / "checkpoint-2")
    assert run.state.best_model_checkpoint == best and Path(best).is_dir()
    saved = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert saved["best_model_checkpoint"] == best


SHARDED = """
import torch
from tests.training.test_trainer import SPLIT, logs, trainer, parameters
settings = dict(data=logs({episodes}), per_device_train_batch_size=4, **{settings!r}, **SPLIT)
run = trainer({folder!r}, save_strategy="steps", save_steps=1, **settings)
run.train()
again = trainer({folder!r}, seed=9, **settings)
again.train(resume_from_checkpoint={folder!r} + "/checkpoint-" + str(run.state.max_steps - 1))
assert torch.equal(parameters(again), parameters(run))
if run.args.process_index == 0:
    torch.save((parameters(run), [row["loss"] for row in run.state.log_history if "loss" in row]), {out!r})
"""
SPLIT = {"max_steps": -1, "num_train_epochs": 2, "logging_steps": 1, "learning_rate": 3e-3}


@pytest.mark.parametrize(
    ("algorithm", "episodes", "strategy", "rest"),
    [
        ("ilql", 23, "random", 5),
        ("ilql", 22, "group_by_length", 3),
        ("mc_awbc", 23, "random", 5),
        ("awr", 23, "random", 5),
        ("return_conditioned", 23, "random", 5),
    ],
)
def test_two_processes_give_the_loss_and_parameters_of_one(tmp_path, algorithm, episodes, strategy, rest):
    settings = {"algorithm": algorithm, "train_sampling_strategy": strategy}
    if algorithm == "awr":
        settings |= {
            "value_model": critic(tmp_path / "critic"),
            "per_device_eval_batch_size": 4,
        }  # several per process
    if algorithm == "return_conditioned":  # all rows without a condition: which are is drawn in each process
        settings |= {"condition_dropout": 1.0, "return_weight": 1.0, "environment_weight": 0.5}
    one = trainer(tmp_path / "one", data=logs(episodes), per_device_train_batch_size=8, **settings, **SPLIT)
    assert len(one.train_dataset) % 8 == rest  # up to 4: the second process is left without a row
    out, folder = tmp_path / "out.pt", str(tmp_path / "two")
    run_ranks(SHARDED.format(folder=folder, out=str(out), episodes=episodes, settings=settings), 2, tmp_path)
    sharded, losses = torch.load(out)
    one.train()
    assert losses == pytest.approx([row["loss"] for row in one.state.log_history if "loss" in row], abs=1e-5)
    torch.testing.assert_close(sharded, parameters(one), atol=1e-5, rtol=0)


def test_items_behind_the_end_of_the_data_count_for_nothing(tmp_path):
    run = trainer(tmp_path)
    data = run.train_dataset
    surplus = data[len(data)]
    batch = loading.collate_even([surplus, surplus])
    assert data.items_in(batch) == 0 and not batch["action_mask"].any() and len(batch["input_ids"]) >= 1
    assert run.losses(run.outputs(run.model, batch), batch)[0].sum() == 0.0
    assert data.items_in(loading.collate_even([data[1], surplus])) == data.items_in(data.batch([1]))


@pytest.mark.parametrize("change", [lambda r: r - 1, lambda r: 10 * r], ids=["r - 1", "10 r"])
def test_shifted_and_scaled_rewards_give_the_same_policy(tmp_path, change):
    two_turns = [t for t in logs(36) if len(t.turns) == 4]  # equally many scored turns, none cut
    changed = [t for t in logs(36, change) if len(t.turns) == 4]
    settings = {"max_steps": 10, "discount_per_turn": 1.0}
    first = trainer(tmp_path / "a", data=two_turns, **settings)
    second = trainer(tmp_path / "b", data=changed, **settings)
    first.train()
    second.train()
    ids = torch.tensor([first.renderer.encode_turn(two_turns[0].turns[0]).ids])
    logits = [run.model.eval()(ids, beta=3.0).logits for run in (first, second)]
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=1e-4)
    moved = trainer(tmp_path / "c", data=two_turns, **settings).model.eval()(ids, beta=3.0).logits
    assert (moved - logits[0]).abs().max() > 1e-2  # training did change the policy


def test_eval_loss_is_token_weighted_whatever_the_batch_size(tmp_path):
    means = []
    for size in (1, 5, 24):
        run = trainer(tmp_path / str(size), per_device_eval_batch_size=size, train_sampling_strategy="group_by_length")
        run.eval_dataset = run.train_dataset
        means.append(run.evaluate())
    for metrics in means[1:]:
        for name in ("eval_loss", "eval_loss/q", "eval_loss/policy"):
            assert metrics[name] == pytest.approx(means[0][name], rel=1e-5)


@pytest.mark.parametrize("quiet", [True, False])
def test_training_leaves_stdout_to_the_command(tmp_path, capsys, quiet):
    trainer(tmp_path, logging_steps=2, disable_tqdm=quiet).train()
    printed = capsys.readouterr()
    assert printed.out == ""
    assert ("step 2 of 6: loss " in printed.err) is not quiet


def test_metrics_are_averages_per_action_token_and_reach_the_file(tmp_path):
    run = trainer(tmp_path, logging_steps=2)
    run.train()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6, 6]
    first = rows[0]
    parts = first["loss/policy"] + first["loss/q"] + first["loss/v"] + 0.1 * first["loss/conservative"]
    assert parts == pytest.approx(first["loss"], rel=0.05)  # the printed loss averages two steps of unequal counts


def test_saved_run_opens_as_guided_and_as_plain_model(tmp_path):
    from transformers import AutoModelForCausalLM

    run = trainer(tmp_path)
    run.train()
    run.save_model(str(tmp_path))
    ids = torch.tensor([[1, 4, 70, 71, 2, 5]])
    guided, plain = load_model(str(tmp_path)), AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(guided(ids).logits, plain(ids).logits)
    block = guided.config.offline_lmrl
    assert block["algorithm"] == "ilql"
    assert block["window"] == {"context": 2, "stride": 1, "max_length": 64}
    assert block["tokenizer"] == run.renderer.fingerprint
    assert not (tmp_path / ".saving").exists()


def test_window_longer_than_the_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="max_length: found 128, expected at most the model's 64 positions"):
        trainer(tmp_path, max_length=128)


def test_a_tokenizer_that_is_not_the_models_is_refused(tmp_path):
    model = trainer(tmp_path).model
    other = train_tokenizer(["something else entirely"] * 9, 280)
    with pytest.raises(InputError, match="tokenizer: found fingerprint .*, expected .*another tokenizer"):
        trainer(tmp_path, model=model, tokenizer=other)
    small = build_model(SPEC | {"vocab_size": 100}, TOKENIZER)
    expected = f"tokenizer: found {len(TOKENIZER)} tokens, expected at most the model's 100 embeddings"
    with pytest.raises(InputError, match=expected):
        trainer(tmp_path, model=small)


def test_length_grouping_keeps_every_row_and_changes_with_the_epoch():
    lengths = torch.randint(5, 50, (203,), generator=torch.Generator().manual_seed(0))
    sampler = LengthGroupedSampler(lengths, batch_size=4, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(203))
    assert list(sampler) == first
    spread = [lengths[first[i : i + 4]].float().std().item() for i in range(0, 200, 4)]
    assert sum(spread) / len(spread) < 3  # ungrouped: about 13
    sampler.set_epoch(1)
    assert list(sampler) != first


def told(rows):
    """The logs with a system turn in front, which a template may not know."""
    return [Trajectory((Turn("system", "play"), *row.turns), row.terminated) for row in rows]


def test_dialogues_that_the_template_prints_otherwise_are_refused_unless_that_is_asked_for(tmp_path):
    strict = TOKENIZERS["stripping"]()  # its template refuses a system turn
    model = build_model(SPEC | NO_DROPOUT, strict)
    with pytest.raises(
        InputError, match=r"template: found 24 dialogues that are rendered differently from .*System role"
    ):
        trainer(tmp_path / "a", algorithm="bc", data=told(logs()), model=model, tokenizer=strict, max_steps=1)
    for template in ("assembled", "plain"):
        run = trainer(
            tmp_path / template,
            algorithm="bc",
            data=told(logs()),
            model=build_model(SPEC, strict),
            tokenizer=strict,
            template=template,
            max_steps=1,
        )
        assert any("rendered differently" in line for line in run.counts) == (template == "assembled")
    alone = trainer(tmp_path / "b", algorithm="bc", model=model, tokenizer=strict, max_steps=1)
    assert not any("rendered differently" in line for line in alone.counts)


def test_a_run_in_progress_of_another_rendering_scheme_is_refused_by_name(tmp_path):
    run = trainer(tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    run.train()
    config = tmp_path / "checkpoint-2" / "config.json"
    block = json.loads(config.read_text())
    assert block["offline_lmrl"]["tokenizer"].startswith("2-")
    del block["offline_lmrl"]["template_text"]
    config.write_text(json.dumps(block))
    with pytest.raises(InputError, match="checkpoint-2: found a run in progress under rendering scheme 1, expected 2"):
        trainer(tmp_path, max_steps=4)


def test_a_run_goes_on_with_the_date_that_its_template_was_derived_on(tmp_path):
    dated = TOKENIZERS["role tokens"]()
    dated.chat_template = "{{ strftime_now('%Y-%m-%d') }}" + dated.chat_template
    run = trainer(
        tmp_path, model=build_model(SPEC, dated), tokenizer=dated, save_strategy="steps", save_steps=2, max_steps=2
    )
    run.train()
    config = tmp_path / "checkpoint-2" / "config.json"
    block = json.loads(config.read_text())
    text = block["offline_lmrl"]["template_text"]
    today = text["date"]
    assert text["preamble"]["default"].startswith(today)
    block["offline_lmrl"]["template_text"] = json.loads(json.dumps(text).replace(today, "2020-02-03"))
    config.write_text(json.dumps(block))
    again = trainer(tmp_path, model=build_model(SPEC, dated), tokenizer=dated, max_steps=4)
    ids = again.train_dataset.batch([0])["input_ids"][0].tolist()
    assert dated.decode(ids).startswith("2020-02-03") and again.renderer.fingerprint != run.renderer.fingerprint


def test_ids_that_another_renderer_sampled_are_encoded_anew_and_counted(tmp_path):
    rows = [
        Trajectory(
            (Turn("user", "you"), Turn("assistant", "left", reward=float(i), token_ids=(9, 2))),
            labels={"tokenizer": "0123456789abcdef"},
        )
        for i in range(4)
    ]
    run = trainer(tmp_path, algorithm="bc", data=rows, max_steps=1)
    assert run.counts[RE_ENCODED] == 4 and 9 not in run.train_dataset.batch([0])["steps"]["action"]


class CountingConfig(BCConfig):
    def read_rows(self, source, counts=None, reward=None):
        self.read = [*vars(self).get("read", []), Path(source).name]
        return super().read_rows(source, counts, reward)


def test_data_are_read_once_and_values_are_dropped_by_an_algorithm_that_does_not_keep_them(tmp_path):
    write_trajectories(tmp_path / "logs.jsonl", logs(8))
    args = CountingConfig(output_dir=str(tmp_path / "run"), use_cpu=True, max_steps=1, max_length=64, report_to="none")
    model = add_value_heads(build_model(SPEC, TOKENIZER), ValueHeadsConfig())
    run = BCTrainer(model, args, str(tmp_path / "logs.jsonl"), tmp_path / "logs.jsonl", TOKENIZER)
    assert args.read == ["logs.jsonl", "logs.jsonl"]
    assert run.model.value_heads is None and len(run.eval_dataset) == len(run.train_dataset)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"save_strategy": "no"}, [5]),
        ({"save_strategy": "steps", "save_steps": 2}, [2, 4, 5]),
        ({"save_strategy": "epoch"}, [5]),
        ({"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 3}, [3, 5]),
        ({"save_strategy": "steps", "save_steps": 2, "eval_strategy": "no"}, []),
        ({"save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True}, [2, 4, 5]),
    ],
)
def test_held_out_data_are_evaluated_at_each_save_and_at_the_end(tmp_path, settings, steps):
    run = trainer(tmp_path, held_out=logs(3), max_steps=5, **settings)
    run.train()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "eval_loss" in row] == steps


def test_evaluation_that_is_asked_for_needs_data(tmp_path):
    with pytest.raises(InputError, match="eval_strategy: found steps, expected no, as there are no validation data"):
        trainer(tmp_path, eval_strategy="steps", eval_steps=2)
