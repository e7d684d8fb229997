"""What holds for the comparisons of every importer, and random ones to try it on."""

import copy
import gzip
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from data_prep.source import Importer
from offline_lmrl.errors import InputError
from offline_lmrl.logs.comparison import Comparison
from offline_lmrl.logs.io import split_by_group
from offline_lmrl.logs.preferences import to_trajectories
from offline_lmrl.logs.record import Record
from offline_lmrl.logs.trajectory import Turn
from offline_lmrl.tokens.comparison_batching import encode_comparisons
from offline_lmrl.tokens.rendering import Renderer
from offline_lmrl.tokens.tokenizers import train_tokenizer
from offline_lmrl.tokens.windows import WindowRule

RENDERER = Renderer(train_tokenizer(["hello there, how are you? Fine, 1 or 2"] * 3, 290))
TEXTS = st.text(st.characters(codec="utf-8"), max_size=12)


def read_one(importer: type[Importer], row: Any, counts: Counter | None = None, **settings: Any) -> Any:
    """Return what an importer with these settings makes of one row."""
    made = importer(input="in.jsonl", output="out", **settings)
    return made.read(Record(row, "f:1", Counter() if counts is None else counts))


@st.composite
def comparisons(draw) -> Comparison:
    """Any comparison: several turns, soft targets, ties, rankings, per-option labels."""
    size = draw(st.integers(2, 5))
    context = draw(
        st.lists(st.builds(Turn, st.sampled_from(("system", "user", "assistant", "tool")), TEXTS), max_size=3)
    )
    turn = st.builds(Turn, st.sampled_from(("user", "assistant", "environment")), TEXTS)
    options = [(*draw(st.lists(turn, max_size=1)), Turn("assistant", f"{i}{draw(TEXTS)}")) for i in range(size)]
    votes = draw(st.lists(st.integers(0, 3), min_size=size, max_size=size))
    votes = votes if any(votes) else [1] * size
    levels = sorted(set(votes), reverse=True)
    ranking = [tuple(i for i, vote in enumerate(votes) if vote == level) for level in levels]
    return Comparison(
        tuple(context),
        tuple(options),
        tuple(vote / sum(votes) for vote in votes),
        tuple(ranking) if draw(st.booleans()) else None,
        draw(st.floats(0.1, 10)),
        group=draw(st.sampled_from(("", "g", "h"))),
        source=draw(TEXTS),
        labels={"options": [{"votes": vote} for vote in votes], "note": draw(TEXTS)},
    )


def check_invariants(
    made: Sequence[Comparison],
    texts: Callable[[Comparison], Sequence[str]],
    source_texts: Sequence[str],
    normalise: Callable[[str], str],
) -> None:
    """The invariants of an importer.

    Args:
      made: its comparisons.
      texts: a comparison as the source wrote it: one text per option, context included.
      source_texts: all texts of the source.
      normalise: what the importer declares to change.
    """
    known = {normalise(text) for text in source_texts}
    for comparison in made:
        assert {normalise(text) for text in texts(comparison)} <= known
        check_one(comparison)
    splits = split_by_group(made, {"train": 0.5, "validation": 0.5}, seed=0)
    groups = [{row.group for row in rows} for rows in splits.values()]
    assert all(groups[0]) and all(groups[1]) and not groups[0] & groups[1]


def check_one(comparison: Comparison) -> None:
    """Only the options' agent turns are actions, all options share the context, and their order does not matter."""
    counts: Counter[str] = Counter()
    data = encode_comparisons([comparison], RENDERER, WindowRule(max_length=10**6), counts)
    assert len(data) == 1 and not counts
    batch = data.batch([0])
    context = [RENDERER.encode_turn(turn).ids for turn in comparison.context]
    before = [*RENDERER.preamble_of(()), *(token for ids in context for token in ids)]
    assert all(row[: len(before)].tolist() == before for row in batch["input_ids"])
    for row, option in enumerate(comparison.options):
        acted = batch["input_ids"][row][batch["action_mask"][row]].tolist()
        assert acted == [token for turn in option if turn.is_trainable for token in _chosen(turn)]
    order = list(range(len(comparison.options)))[::-1]
    turned = comparison.select(order)
    assert (turned.context, turned.weight, turned.group) == (comparison.context, comparison.weight, comparison.group)
    assert turned.options == comparison.options[::-1] and turned.target == comparison.target[::-1]
    assert turned.select(order) == comparison
    other = encode_comparisons([turned], RENDERER, WindowRule(max_length=10**6), counts).batch([0])
    assert other["input_ids"].flip(0).equal(batch["input_ids"]) and other["target"].flip(0).equal(batch["target"])
    for kind in ("sign", "prob", "rank"):
        rewards, turned_rewards = (_rewards(either, kind) for either in (comparison, turned))
        assert rewards.keys() == turned_rewards.keys()
        assert all(math.isclose(rewards[said], turned_rewards[said], abs_tol=1e-12) for said in rewards)


def _rewards(comparison: Comparison, kind: str) -> dict[tuple, float]:
    """What was said -> reward; empty replies are left out, and refused where nothing else is there."""
    if all(any(turn.is_trainable and not turn.content for turn in option) for option in comparison.options):
        with pytest.raises(InputError, match="found only empty replies"):
            to_trajectories([comparison], reward=kind)
        return {}
    return {
        tuple((turn.role, turn.content) for turn in row.turns): row.total_return
        for row in to_trajectories([comparison], reward=kind)
    }


def _chosen(turn: Turn) -> tuple[int, ...]:
    encoded = RENDERER.encode_turn(turn)
    return encoded.actions


def check_other_files_are_refused(tmp_path: Path, row: Any, prepare: Callable[[str], object]) -> None:
    """`prepare` of a name in the folder: a pointer, a cut file, other rows and no file are one line each, and nothing
    is written."""
    (tmp_path / "pointer.jsonl.gz").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(json.dumps(row).encode() * 99)[:-9])
    (tmp_path / "other.jsonl").write_text('{"text": "x"}\n' * 3)
    expected = {
        "pointer.jsonl.gz": "found a git-LFS pointer",
        "cut.jsonl.gz": "found Compressed file ended",
        "other.jsonl": "found no row to use",
        "none.jsonl": "found no such file",
    }
    for name, message in expected.items():
        with pytest.raises(InputError) as error:
            prepare(name)
        assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def mutated_lines(rows: Sequence[dict[str, Any]], n: int, seed: int) -> list[bytes]:
    """n valid rows, each with one thing broken: a key dropped, a null, a wrong type, nesting, bytes, half a line."""
    rng = random.Random(seed)
    wrong = (None, 3, -1.5, True, "", "x", [], {}, [None], [[]], {"role": 1}, float("nan"), "\ud83d", [{"role": "a"}])
    lines = []
    for _ in range(n):
        row = copy.deepcopy(rng.choice(rows))
        kind = rng.randrange(6)
        if kind < 4:
            places = list(_places(row))
            parent, key = rng.choice(places)
            if kind == 0:
                del parent[key]
            elif kind == 1:
                parent[key] = rng.choice(wrong)
            elif kind == 2:
                parent[key] = [parent[key]]
            else:
                parent[key] = {"text": parent[key]}
        line = json.dumps(row).encode()
        if kind == 4:
            at = rng.randrange(1, len(line))
            line = line[:at] + b"\xff" + line[at:]
        elif kind == 5:
            line = line[: rng.randrange(1, len(line))]
        lines.append(line)
    return lines


def _places(value: Any):
    """(container, key) of everything inside a JSON value."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])
