"""Every offline trainer behind demonstrations: its windows, what is saved, and what is refused."""

import json

import numpy as np
import pytest

from offline_lmrl.algorithms import load_algorithm
from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.errors import InputError
from offline_lmrl.logs.io import write_trajectories
from offline_lmrl.logs.trajectory import Trajectory, Turn
from offline_lmrl.models.loading import build_model, load_model
from offline_lmrl.tokens.few_shot import FewShotConfig
from offline_lmrl.tokens.tokenizers import train_tokenizer

TOKENIZER = train_tokenizer(["good bad fine say it\n"], 280)
SPEC = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 96}
ALGORITHMS = ["bc", "return_conditioned", "ilql"]


def episode(text, task):
    return Trajectory((Turn("user", "say it"), Turn("assistant", text, reward=float(text == "good"))), task=task)


LOGS = [episode(text, task) for task in "ab" for text in ("good", "bad", "bad")]


def trainer(folder, algorithm, prompt, logs=LOGS, held_out=None, **settings):
    config, cls = load_algorithm(algorithm)
    args = config(
        output_dir=str(folder),
        max_steps=1,
        per_device_train_batch_size=4,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        max_length=96,
        few_shot=prompt,
        **settings,
    )
    return cls(build_model(SPEC, TOKENIZER), args, logs, held_out, TOKENIZER)


def rows_of(dataset):
    batch = dataset.batch(range(len(dataset)))
    return [row[mask].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_windows_stand_behind_demonstrations_in_training_and_validation(tmp_path, algorithm):
    plain = trainer(tmp_path, algorithm, None, held_out=LOGS)
    run = trainer(tmp_path, algorithm, FewShotConfig(n=2, max_tokens=80), held_out=LOGS)
    preamble = list(run.renderer.preamble_of(()))
    for before, behind in ((plain.train_dataset, run.train_dataset), (plain.eval_dataset, run.eval_dataset)):
        assert behind.action_tokens == before.action_tokens
        for short, long in zip(rows_of(before), rows_of(behind), strict=True):
            body = short[len(preamble) :]
            assert long[: len(preamble)] == preamble and long[-len(body) :] == body
            assert long.count(run.renderer.close_id) > short.count(run.renderer.close_id)
    run.train()


def test_demonstrations_have_the_ids_that_the_algorithm_gives_its_logs(tmp_path):
    null = len(TOKENIZER)
    run = trainer(tmp_path, "return_conditioned", FewShotConfig(n=2, max_tokens=80))
    # of "good, bad, bad" every row is behind the two others: bins 1 and 0 of returns 1 and 0, 2 and 1 behind null
    ids = [[token - null for token in row if token >= null] for row in rows_of(run.train_dataset)]
    assert [(sorted(row[:2]), row[2]) for row in ids[:3]] == [([1, 1], 2), ([1, 2], 1), ([1, 2], 1)]


def test_the_same_setting_encodes_the_same_rows_again(tmp_path):
    spec = FewShotConfig(drop=0.5, part="random", max_tokens=80, seed=3)
    first, again = (trainer(tmp_path, "bc", spec, seed=seed).train_dataset.encoded.lists for seed in (0, 1))
    assert all(np.array_equal(first[name][0], again[name][0]) for name in first)


def test_demonstrations_come_from_a_file_for_both_data_sets(tmp_path):
    write_trajectories(tmp_path / "shown.jsonl", [episode("fine", "a"), episode("fine", "b")])
    spec = FewShotConfig(max_tokens=80, demonstrations=str(tmp_path / "shown.jsonl"))
    run = trainer(tmp_path, "bc", spec, held_out=LOGS[:1])
    fine = run.renderer.encode_content("fine")
    for row in rows_of(run.train_dataset) + rows_of(run.eval_dataset):
        assert any(row[i : i + len(fine)] == fine for i in range(len(row)))


def test_the_setting_is_saved_with_the_run_and_shows_in_its_config(tmp_path):
    run = trainer(tmp_path, "bc", FewShotConfig(part="best", max_tokens=80))
    assert json.loads(json.dumps(run.args.to_dict()))["few_shot"]["part"] == "best"
    run.save_model()
    assert FewShotConfig(**load_model(tmp_path).config.offline_lmrl["few_shot"]) == FewShotConfig(
        part="best", max_tokens=80
    )
    player = LanguagePolicy.load(tmp_path, device="cpu", max_new_tokens=4, few_shot=[LOGS[0]])
    assert player.spec.part == "best" and player.shared_few_shot.with_returns


def test_a_prompt_that_leaves_no_room_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(InputError, match=r"few_shot.max_tokens: found 512, expected below max_length \(96\)"):
        trainer(tmp_path, "bc", FewShotConfig())


def test_rows_without_a_task_are_refused(tmp_path):
    with pytest.raises(InputError, match="row 1: task: found none"):
        trainer(tmp_path, "bc", FewShotConfig(max_tokens=80), logs=[episode("good", "")])
