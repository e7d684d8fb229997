"""Batches of comparisons: rows of options, what of them is the agent's, and what is left out where room is short."""

import tempfile
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from offline_lmrl.errors import InputError
from offline_lmrl.logs.comparison import Comparison
from offline_lmrl.logs.trajectory import Trajectory, Turn
from offline_lmrl.tokens import comparison_batching
from offline_lmrl.tokens.comparison_batching import encode_comparisons
from offline_lmrl.tokens.windows import WindowRule
from tests.comparisons import RENDERER

PAIR = Comparison(
    (Turn("system", "be brief"), Turn("user", "how are you?"), Turn("assistant", "Fine"), Turn("user", "1 or 2")),
    ((Turn("assistant", "1"),), (Turn("assistant", "2, I would say"),)),
    (1.0, 0.0),
    weight=2.0,
    labels={"strength": 0.5},
)
TOOL = (Turn("assistant", "call"), Turn("tool", "42"), Turn("assistant", "so 42"))
RANKED = Comparison((), ((Turn("assistant", "a"),), TOOL, (Turn("assistant", "c"),)), (0.0, 0.5, 0.5), ((1, 2), (0,)))


def encode(rows, max_length=1000, counts=None):
    counts = Counter() if counts is None else counts
    return encode_comparisons(rows, RENDERER, WindowRule(max_length=max_length), counts)


def test_a_batch_holds_every_option_of_its_comparisons_in_order():
    batch = encode([PAIR, RANKED]).batch([1, 0])
    assert batch["comparison"].tolist() == [0, 0, 0, 1, 1]
    assert batch["target"].tolist() == [0.0, 0.5, 0.5, 1.0, 0.0]
    assert batch["rank"].tolist() == [1, 0, 0, 0, 1]
    assert (batch["weight"].tolist(), batch["strength"].tolist()) == ([1.0, 2.0], [0.0, 0.5])
    texts = [
        RENDERER.tokenizer.decode(row[mask])
        for row, mask in zip(batch["input_ids"], batch["action_mask"], strict=True)
    ]
    end = RENDERER.tokenizer.decode([RENDERER.close_id])
    assert texts == ["a" + end, "call" + end + "so 42" + end, "c" + end, "1" + end, "2, I would say" + end]


def test_a_scored_reply_is_a_comparison_of_one_with_its_return_as_target():
    scored = Trajectory((*PAIR.context, Turn("assistant", "1", reward=2.5)))
    several = Trajectory((Turn("assistant", "call", reward=1.0), TOOL[1], Turn("assistant", "so 42", reward=3.0)))
    counts = Counter()
    data = encode_comparisons(
        [scored, several, Trajectory((Turn("assistant", "x" * 99, reward=1.0),))],
        RENDERER,
        WindowRule(max_length=60),
        counts,
    )
    batch = data.batch([0, 1])
    assert batch["target"].tolist() == [2.5, 4.0] and batch["comparison"].tolist() == [0, 1]
    assert counts == {"comparisons dropped: an option longer than max_length": 1} and len(data) == 2
    pair = encode([PAIR]).batch([0])
    for name in ("input_ids", "action_mask", "closing_mask"):
        alone = pair[name][0][pair["attention_mask"][0]]
        assert batch[name][0][batch["attention_mask"][0]].equal(alone)
    assert batch["closing_mask"].sum(1).tolist() == [1, 2]
    with pytest.raises(InputError, match="found one without an agent turn"):
        encode_comparisons([Trajectory((Turn("user", "hi"),))], RENDERER, WindowRule(), Counter())


def test_heads_are_read_at_the_closing_tokens_and_at_the_last():
    batch = encode([RANKED]).batch([0])
    assert batch["closing_mask"].sum(1).tolist() == [1, 2, 1]
    assert (batch["input_ids"][batch["closing_mask"]] == RENDERER.close_id).all()
    last = torch.arange(3), batch["last"]
    assert batch["closing_mask"][last].all() and not (batch["action_mask"].cumsum(1) > 0)[:, 0].any()
    assert batch["action_mask"].sum(1).equal(batch["action_mask"].cumsum(1)[last])


def test_more_padding_and_other_neighbours_change_nothing():
    data = encode([PAIR, RANKED])
    alone, together = data.batch([1]), data.batch([0, 1])
    width = alone["input_ids"].shape[1]
    for name in ("input_ids", "action_mask", "closing_mask", "attention_mask"):
        assert (
            together[name][2:, :width]
            .masked_fill(~alone["attention_mask"], 0)
            .equal(alone[name].masked_fill(~alone["attention_mask"], 0))
        )
        if name != "input_ids":
            assert not together[name][2:, width:].any()
    assert together["last"][2:].equal(alone["last"])
    assert data.lengths.tolist() == [batch["attention_mask"].sum(1).max() for batch in (data.batch([0]), alone)]


def test_old_turns_go_for_all_options_alike_and_no_reply_is_cut():
    whole = int(encode([PAIR]).lengths[0])
    counts = Counter()
    short = encode([PAIR], whole - 1, counts).batch([0])
    texts = [
        RENDERER.tokenizer.decode(row[mask])
        for row, mask in zip(short["input_ids"], short["attention_mask"], strict=True)
    ]
    assert all("be brief" in text and "how are you?" not in text and "1 or 2" in text for text in texts)
    assert texts[1].removesuffix(RENDERER.tokenizer.decode([RENDERER.close_id])).endswith("2, I would say")
    assert counts == {"comparisons that lost old turns of the context": 1}


def test_an_option_that_does_not_fit_takes_its_comparison_along():
    bare = replace(PAIR, context=())
    limit = int(encode([bare]).lengths[0]) - 1
    counts = Counter()
    short = replace(RANKED, options=((Turn("assistant", "a"),), (Turn("assistant", "b"),), (Turn("assistant", "c"),)))
    data = encode([bare, short], limit, counts)
    assert len(data) == 1 and data.batch([0])["comparison"].tolist() == [0, 0, 0]
    assert counts == {"comparisons dropped: an option longer than max_length": 1}
    with pytest.raises(InputError, match="found none that fits into max_length, expected at least one"):
        encode([bare], 4)


def test_sampled_ids_are_used_where_they_are_this_tokenizers():
    ids = (*RENDERER.encode_content("hi"), RENDERER.close_id)
    ids = (ids[0], *ids)  # not what the text encodes to
    option = (Turn("assistant", "hi", token_ids=ids),)
    row = Comparison((), (option, (Turn("assistant", "x"),)), (1.0, 0.0), labels={"tokenizer": RENDERER.fingerprint})
    batch = encode([row]).batch([0])
    assert tuple(batch["input_ids"][0][batch["action_mask"][0]].tolist()) == ids
    foreign = encode([replace(row, labels={})]).batch([0])
    assert tuple(foreign["input_ids"][0][foreign["action_mask"][0]].tolist()) == ids[1:]


@pytest.mark.parametrize("kind", [Comparison, Trajectory])
def test_two_processes_render_what_one_renders(monkeypatch, kind):
    if kind is Comparison:
        rows = [replace((PAIR, RANKED)[i % 2], weight=(i + 1) / 3, labels={"strength": i / 7}) for i in range(60)]
    else:
        rows = [Trajectory((*PAIR.context, Turn("assistant", "x" * i, reward=i / 7))) for i in range(1, 60)]
    counts, short = (Counter(), Counter()), WindowRule(max_length=int(encode([PAIR]).lengths[0]) - 1)
    one = encode_comparisons(rows, RENDERER, short, counts[0])  # as one chunk
    monkeypatch.setattr(comparison_batching, "_CHUNK", 7)
    two = encode_comparisons(rows, RENDERER, short, counts[1], 2)
    assert counts[0] == counts[1] and sum(counts[0].values()) > 20  # some lose turns or are dropped
    for name, expected in vars(one).items():
        np.testing.assert_array_equal(vars(two)[name], expected, strict=True)


def test_a_full_temporary_folder_is_one_line(monkeypatch):
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda: open("/dev/full", "r+b"))
    with pytest.raises(InputError, match="found No space left on device, expected enough space for the data"):
        encode([PAIR])


def test_what_goes_wrong_in_another_process_is_the_same_error():
    with pytest.raises(InputError, match="found one without an agent turn"):
        encode_comparisons([Trajectory((Turn("user", "hi"),))], RENDERER, WindowRule(), Counter(), 2)
    with pytest.raises(InputError, match="found none that fits into max_length"):
        encode_comparisons([], RENDERER, WindowRule(), Counter(), 2)


def test_a_shuffled_data_set_gives_each_comparison_its_own_rows():
    rows = [
        Comparison(
            (), tuple((Turn("assistant", f"{i} {j}"),) for j in range(2 + i % 3)), tuple(np.eye(2 + i % 3)[i % 2])
        )
        for i in range(20)
    ]
    data = encode(rows)
    order = np.random.default_rng(0).permutation(20)
    batch = data.batch(order)
    texts = [
        RENDERER.decode(row[mask].tolist()) for row, mask in zip(batch["input_ids"], batch["action_mask"], strict=True)
    ]
    assert texts == [option[0].content for i in order for option in rows[i].options]
    assert batch["target"].tolist() == [value for i in order for value in rows[i].target]
