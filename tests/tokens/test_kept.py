"""Encoded trajectories: the same from any number of processes, kept on disk whole or not at all, and read again."""

import tempfile
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from offline_lmrl.errors import InputError
from offline_lmrl.logs import io
from offline_lmrl.logs.io import store, write_trajectories
from offline_lmrl.logs.scale import RewardScale
from offline_lmrl.logs.trajectory import Trajectory, Turn
from offline_lmrl.tokens import batching
from offline_lmrl.tokens.batching import LISTS, encode_trajectories
from offline_lmrl.tokens.conditioning import ReturnScale, ReturnTokens
from offline_lmrl.tokens.episodes import EpisodeEncoder, StepRule
from offline_lmrl.tokens.rendering import Renderer
from offline_lmrl.tokens.tokenizers import train_tokenizer
from offline_lmrl.tokens.windows import WindowRule
from offline_lmrl.training import trainer as trainer_module
from tests.ranks import run_ranks
from tests.training.test_trainer import logs, parameters, trainer

TOKENIZER = train_tokenizer(["ask left right 1 2 3"], 300)


def rows(n=40):
    """Dialogues of one to three agent turns, of which every fifth is cut and every seventh fits no window."""
    return [
        Trajectory(
            tuple(
                Turn(role, f"{'left' * (1 + 30 * (i % 7 == 6))} {i}", reward=i / 7 if role == "assistant" else None)
                for role in ["user", "assistant"] * (1 + i % 3)
            ),
            terminated=i % 5 > 0,
        )
        for i in range(n)
    ]


def encoder(**settings):
    made = {"window": WindowRule(context=2, max_length=40), "step_rule": StepRule(0.9), "scale": RewardScale()}
    return EpisodeEncoder(Renderer(TOKENIZER), **made | settings)


def same(one, two):
    return one.step_rule == two.step_rule and all(
        np.array_equal(one.lists[name][part], two.lists[name][part]) for name in LISTS for part in (0, 1)
    )


def test_two_processes_encode_what_one_encodes(monkeypatch):
    data, counts, shown = rows(), (Counter(), Counter()), [(7, 8) * (i % 2) for i in range(40)]
    one = encode_trajectories(data, encoder(), counts[0], shown)  # as one chunk
    monkeypatch.setattr(batching, "_CHUNK", 7)
    two = encode_trajectories(store(data), encoder(), counts[1], iter(shown), 2)
    assert same(one, two) and counts[0] == counts[1]
    assert counts[0]["agent turns dropped: longer than max_length"] > 5
    assert len(one.lists["next_ids"][0]) > 0 and len(one.lists["replies"][0]) == 0


def test_kept_data_are_read_again_with_their_counts(tmp_path, monkeypatch):
    counts = Counter(), Counter()
    first = encode_trajectories(rows(), encoder(), counts[0], kept=tmp_path / "cache" / "one")
    monkeypatch.setattr(EpisodeEncoder, "encode", None)
    again = encode_trajectories(rows(), encoder(), counts[1], kept=tmp_path / "cache" / "one")
    assert same(first, again) and counts[0] == counts[1]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["one"]


def test_an_error_keeps_nothing(tmp_path):
    with pytest.raises(InputError, match="data: found no agent turn that fits into max_length"):
        encode_trajectories([Trajectory((Turn("user", "hi"),))], encoder(), Counter(), kept=tmp_path / "one")
    assert not list(tmp_path.iterdir())


def test_damaged_files_are_one_line(tmp_path):
    encode_trajectories(rows(), encoder(), Counter(), kept=tmp_path / "one")
    with open(tmp_path / "one" / "input_ids", "r+b") as file:
        file.truncate(40)
    with pytest.raises(InputError, match="one: found a damaged file .*, expected encoded data as they were written"):
        encode_trajectories(rows(), encoder(), Counter(), kept=tmp_path / "one")


def test_two_runs_may_keep_the_same_data_at_once(tmp_path, monkeypatch):
    encode = EpisodeEncoder.encode

    def slow(self, trajectory, counts, few_shot=()):
        if not (tmp_path / "one").exists():  # the other run ends first
            monkeypatch.setattr(EpisodeEncoder, "encode", encode)
            encode_trajectories(rows(), encoder(), Counter(), kept=tmp_path / "one")
        yield from encode(self, trajectory, counts, few_shot)

    monkeypatch.setattr(EpisodeEncoder, "encode", slow)
    found, counts = encode_trajectories(rows(), encoder(), Counter(), kept=tmp_path / "one"), Counter()
    assert same(found, encode_trajectories(rows(), encoder(), counts))
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_a_full_temporary_folder_is_one_line(monkeypatch):
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda: open("/dev/full", "r+b"))
    with pytest.raises(InputError, match="found No space left on device, expected enough space for the data"):
        encode_trajectories(rows(), encoder(), Counter())


def test_a_fingerprint_stands_for_all_that_windows_depend_on():
    scale = ReturnScale.fit(rows(), "linear", 3)
    returns = ReturnTokens(scale, (300,), ((301,), (302,), (303,)))
    other = replace(returns, discount_per_turn=0.5)
    different = [
        encoder(),
        encoder(window=WindowRule(context=3, max_length=40)),
        encoder(step_rule=StepRule(0.9, 0.5)),
        encoder(scale=RewardScale(0.1)),
        encoder(replies=True),
        replace(encoder(), renderer=Renderer(TOKENIZER, "plain")),
        replace(encoder(), renderer=Renderer(TOKENIZER, ends=(5,))),
        *(encoder(return_ids_for=ids) for ids in (returns.of_log, returns.nulls, other.of_log)),
    ]
    assert len({one.fingerprint for one in different}) == len(different)
    assert encoder().fingerprint == different[0].fingerprint
    again = ReturnTokens(ReturnScale.from_dict(scale.to_dict()), (300,), ((301,), (302,), (303,)))
    assert encoder(return_ids_for=again.of_log).fingerprint == encoder(return_ids_for=returns.of_log).fingerprint


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(trainer_module, "KEPT_FROM", 24)
    return tmp_path / "cache" / "offline_lmrl" / "encoded"


def test_a_second_start_on_the_same_data_encodes_nothing(tmp_path, cache, monkeypatch):
    write_trajectories(tmp_path / "logs.jsonl", logs())
    first = trainer(tmp_path / "a", data=str(tmp_path / "logs.jsonl"), held_out=logs(5), processes=2)
    assert len(list(cache.iterdir())) == 1  # five rows are encoded again sooner than they are read
    trainer(tmp_path / "b", max_length=48)
    trainer(tmp_path / "c", reward_scale=9.0)
    trainer(tmp_path / "d", data=logs(25))
    assert len(list(cache.iterdir())) == 4
    monkeypatch.setattr(EpisodeEncoder, "encode", None)
    again = trainer(tmp_path / "e", data=str(tmp_path / "logs.jsonl"), learning_rate=1.0)
    assert same(first.train_dataset.encoded, again.train_dataset.encoded) and first.counts == again.counts


RANKS = """
import torch
from offline_lmrl.training import trainer as trainer_module
from tests.training.test_trainer import parameters, trainer
trainer_module.KEPT_FROM = 24
run = trainer({folder!r}, per_device_train_batch_size=4, max_steps=2)
run.train()
if run.args.process_index == 0:
    torch.save(parameters(run), {out!r})
"""


def test_two_ranks_read_one_copy(tmp_path, cache):
    one = trainer(tmp_path / "one", per_device_train_batch_size=8, max_steps=2)
    one.train()
    (written,) = cache.iterdir()
    for path in written.iterdir():
        path.unlink()
    written.rmdir()
    out = tmp_path / "out.pt"
    run_ranks(RANKS.format(folder=str(tmp_path / "two"), out=str(out)), 2, tmp_path)
    assert [path.name for path in cache.iterdir()] == [written.name]
    assert_close(torch.load(out), parameters(one), atol=1e-4, rtol=0)


def test_trajectories_are_stored_as_they_are_read(tmp_path, monkeypatch):
    write_trajectories(tmp_path / "logs.jsonl", rows())
    monkeypatch.setattr(io, "_CHUNK", 7)
    counts = Counter(), Counter(), Counter()
    listed = io.read_trajectories(tmp_path / "logs.jsonl", counts=counts[0])
    for processes in (1, 2):
        stored = io.store_trajectories(tmp_path / "logs.jsonl", counts=counts[processes], processes=processes)
        assert list(stored) == listed == rows() and counts[processes] == counts[0]
    with pytest.raises(InputError, match="logs.jsonl: score: found no row with this column"):
        io.store_trajectories(tmp_path / "logs.jsonl", reward="score")
