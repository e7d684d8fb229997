"""Comparisons: what they refuse, what they keep on disk, and what any of them obeys."""

import gzip
import json

import datasets
import pytest
from hypothesis import given, settings

from offline_lmrl.errors import InputError
from offline_lmrl.logs.comparison import Comparison
from offline_lmrl.logs.io import content_key, data_hash, read_comparisons, split_by_group, write_comparisons
from offline_lmrl.logs.trajectory import Turn
from tests.comparisons import check_one, comparisons

CONTEXT = (Turn("user", "q"), Turn("assistant", "earlier"), Turn("user", "and?"))
A, B, C = ((Turn("assistant", text),) for text in "abc")
RANKED = Comparison(
    CONTEXT,
    (A, B, C),
    (0.5, 0.0, 0.5),
    ((0, 2), (1,)),
    2.0,
    "g",
    "s",
    {"options": ["x", {"y": 1}, None], "strength": 0.5, "é": "ü\u2028"},
)
SOFT = Comparison(
    (), ((Turn("assistant", "", token_ids=(5, 2)),), (Turn("assistant", ""), Turn("tool", "1"))), (0.25, 0.75)
)


@pytest.fixture(autouse=True)
def no_progress_bars():
    datasets.disable_progress_bars()


def test_an_agents_turn_in_the_context_is_never_trained():
    assert [turn.is_trainable for turn in RANKED.context] == [False, False, False]


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"options": (A,), "target": (1.0,)}, "options: found 1, expected at least 2"),
        ({"options": (A, (Turn("user", "x"),))}, "options[1]: found no agent turn, expected at least one"),
        ({"options": (A, (Turn("assistant", "x", reward=1),))}, "options[1]: found a reward of 1.0, expected none"),
        ({"context": (Turn("assistant", "x", trainable=True),)}, "context[0]: found a turn that is trainable or has"),
        ({"target": (0.5, 0.4)}, "target: found [0.5, 0.4] for 2 options, expected one probability for each option,"),
        ({"target": (1.5, -0.5)}, "target: found [1.5, -0.5] for 2 options"),
        ({"target": (1.0,)}, "target: found [1.0] for 2 options"),
        ({"target": (float("nan"), 1)}, "target: found nan, expected a finite number"),
        ({"ranking": ((0,), (0, 1))}, "ranking: found ((0,), (0, 1)) for 2 options, expected lists that together"),
        ({"ranking": ((1,), (0,))}, "target: found [1.0, 0.0] with the ranking ((1,), (0,)) (best first), expected"),
        ({"weight": 0}, "weight: found 0.0, expected a number above 0"),
        ({"group": None}, "group: found None, expected text"),
        ({"labels": {"options": [1]}}, "labels.options: found [1] for 2 options, expected a list with an entry"),
        ({"labels": {"strength": -1}}, "labels.strength: found -1, expected a number from 0 up"),
    ],
)
def test_what_is_no_comparison_is_refused(fields, expected):
    with pytest.raises(InputError) as error:
        Comparison(**{"context": CONTEXT, "options": (A, B), "target": (1.0, 0.0), **fields})
    assert str(error.value).startswith(expected) and "\n" not in str(error.value)


def test_preference_is_luces_choice_and_the_ranking_where_the_target_is_silent():
    soft = Comparison(CONTEXT, (A, B, C), (0.6, 0.2, 0.2))
    assert soft.preference(0, 1) == pytest.approx(0.75)
    assert soft.ranks == (0, 1, 1)
    ranked = Comparison(CONTEXT, (A, B, C), (1.0, 0.0, 0.0), ((0,), (2,), (1,)))
    assert [ranked.preference(*pair) for pair in ((0, 1), (1, 2), (2, 1))] == [1.0, 0.0, 1.0]
    best_of_three = Comparison(CONTEXT, (A, B, C), (1.0, 0.0, 0.0))
    assert best_of_three.preference(1, 2) == 0.5


def test_a_selection_takes_everything_of_its_options_along():
    turned = RANKED.select([2, 1, 0])
    assert (turned.options, turned.target, turned.ranking) == ((C, B, A), (0.5, 0.0, 0.5), ((0, 2), (1,)))
    assert turned.labels["options"] == [None, {"y": 1}, "x"]
    pair = RANKED.select([1, 2])
    assert (pair.target, pair.ranking) == ((0.0, 1.0), ((1,), (0,)))
    losers = Comparison(CONTEXT, (A, B, C), (1.0, 0.0, 0.0), ((0,), (2,), (1,))).select([1, 2])
    assert losers.target == (0.0, 1.0)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "folder"])
def test_every_format_gives_back_what_was_written(tmp_path, name):
    write_comparisons(tmp_path / name, [RANKED, SOFT])
    assert read_comparisons(tmp_path / name) == [RANKED, SOFT]
    assert data_hash(read_comparisons(tmp_path / name)) == data_hash([RANKED, SOFT]) != data_hash([SOFT, RANKED])


@settings(max_examples=25, deadline=None)
@given(comparison=comparisons())
def test_any_comparison_survives_disk_and_obeys_the_invariants(tmp_path_factory, comparison):
    path = tmp_path_factory.getbasetemp() / "one.jsonl"
    write_comparisons(path, [comparison])
    (read,) = read_comparisons(path)
    assert read == comparison
    check_one(comparison)


def test_no_group_is_in_two_splits_and_order_makes_no_difference():
    rows = [Comparison((Turn("user", f"{i}"),), (A, B), (1.0, 0.0), group=f"g{i % 50}") for i in range(200)]
    splits = split_by_group(rows, {"a": 0.5, "b": 0.5}, seed=0)
    groups = {name: {row.group for row in part} for name, part in splits.items()}
    assert groups["a"] and groups["b"] and not groups["a"] & groups["b"]
    assert content_key(RANKED) == content_key(RANKED.select([1, 0, 2])) != content_key(RANKED.select([0, 1]))


def test_pointers_and_wrong_files_are_one_line_errors(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"
    for name in ("a.jsonl", "a.jsonl.gz", "a.parquet"):
        (tmp_path / name).write_text(pointer)
        with pytest.raises(InputError, match="found a git-LFS pointer, expected the file itself; fetch it with git"):
            read_comparisons(tmp_path / name)
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": []}) + "\n")
    with pytest.raises(InputError, match="b.jsonl:1: fields: found messages, expected context, options and target"):
        read_comparisons(tmp_path / "b.jsonl")
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as lines:
        lines.write('{"chosen": "a", "rejected": "a"}\n')
    with pytest.raises(InputError, match=r"no row to use \(dropped: identical replies: 1\)"):
        read_comparisons(tmp_path / "c.jsonl.gz")
