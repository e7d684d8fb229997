import datetime
import decimal
import gzip
import json
import multiprocessing
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from offline_lmrl.errors import InputError
from offline_lmrl.logs import io
from offline_lmrl.logs.forms import read_row
from offline_lmrl.logs.io import (
    atomic_output,
    data_hash,
    read_comparisons,
    read_splits,
    read_trajectories,
    split_by_group,
    store_comparisons,
    write_trajectories,
)
from offline_lmrl.logs.trajectory import Trajectory, Turn

EPISODES = [
    Trajectory(
        (
            Turn("user", "q"),
            Turn("assistant", "né\u2028", reward=0.0),
            Turn("environment", ""),
            Turn("assistant", "", None, None, (5, 2), (-0.5, -1e-3)),
            Turn("assistant", "x", trainable=False),
        ),
        terminated=False,
        group="g",
        task="t",
        source="s",
        labels={"a": [1, None], "é": "ü"},
    ),
    Trajectory((Turn("assistant", "only", trainable=True, reward=-1.5, token_ids=()),)),
]


@pytest.fixture(autouse=True)
def no_progress_bars():
    datasets.disable_progress_bars()


def lines(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def agent(text="a", **fields):
    return {"role": "assistant", "content": text, **fields}


def scored(text="a", **fields):
    return {"messages": [{"role": "user", "content": "q"}, agent(text, **fields)]}


def read(tmp_path, *rows, counts=None):
    return read_trajectories(lines(tmp_path / "logs.jsonl", *rows), counts=counts)


def message_of(call, *args, **kwargs):
    with pytest.raises(InputError) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "folder"])
def test_every_format_gives_back_what_was_written_and_can_be_replaced(tmp_path, name):
    write_trajectories(tmp_path / "new" / name, EPISODES[:1])
    write_trajectories(tmp_path / "new" / name, EPISODES)
    assert read_trajectories(tmp_path / "new" / name) == EPISODES
    assert [path.name for path in (tmp_path / "new").iterdir()] == [name]


def test_written_files_are_read_by_datasets(tmp_path):
    for name, reader in (("a.jsonl", "json"), ("a.parquet", "parquet")):
        write_trajectories(tmp_path / name, EPISODES)
        rows = datasets.load_dataset(reader, data_files=str(tmp_path / name), split="train", cache_dir=tmp_path)
        rows.save_to_disk(tmp_path / reader)
        assert read_trajectories(tmp_path / reader) == EPISODES


def test_prompt_and_completion_text_become_a_user_and_a_scored_agent_turn(tmp_path):
    (row,) = read(tmp_path, {"prompt": "2+2?", "completion": "4", "reward": 1})
    assert row.turns == (Turn("user", "2+2?"), Turn("assistant", "4", reward=1.0))
    assert row.terminated and row.labels == {}


def test_rows_of_one_prompt_share_a_group_that_the_row_may_override(tmp_path):
    rows = read(
        tmp_path,
        {"prompt": "p", "completion": "a", "reward": 0},
        {"prompt": "p", "completion": "b", "reward": 1},
        {"prompt": "r", "completion": "a", "reward": 0},
        {"prompt": "p", "completion": "a", "reward": 0, "group": "mine"},
    )
    assert rows[0].group == rows[1].group != rows[2].group
    assert rows[3].group == "mine"


def test_a_label_is_a_reward_of_one_or_zero_and_is_kept(tmp_path):
    rows = read(tmp_path, *({"prompt": "", "completion": "a", "label": label} for label in (True, False, None)))
    assert [row.turns for row in rows] == [(Turn("assistant", "a", reward=reward),) for reward in (1.0, 0.0, None)]
    assert [row.labels for row in rows] == [{"label": True}, {"label": False}, {}]


def test_conversational_sides_score_the_last_agent_turn_and_the_prompt_is_context(tmp_path):
    (row,) = read(
        tmp_path,
        {
            "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, agent("earlier")],
            "completion": [agent("call"), {"role": "tool", "content": "42"}, agent("it is 42")],
            "reward": -0.5,
        },
    )
    assert row.turns == (
        Turn("system", "s"),
        Turn("user", "q"),
        Turn("assistant", "earlier", trainable=False),
        Turn("assistant", "call"),
        Turn("tool", "42"),
        Turn("assistant", "it is 42", reward=-0.5),
    )


def test_text_parts_are_joined():
    counts = Counter()
    row = {"messages": [{"role": "user", "content": [{"type": "text", "text": "1+"}, "2"]}, agent("3")]}
    assert read_row(row, "logs:1", counts).turns[0] == Turn("user", "1+2")
    assert counts == {"repaired: text parts joined": 1}


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_tool_calls_thoughts_and_tools_are_kept_apart_and_come_back(name, tmp_path):
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"y": 2, "x": 1, "absent": None}}}
    text = '[{"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"y": 2, "x": 1}}}]'
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    counts = Counter()
    row = {
        "messages": [
            {"role": "user", "content": "1+2"},
            {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "a sum"},
            {"role": "tool", "content": "3", "name": "add", "tool_call_id": "c1"},
            agent("3", reward=1.0),
        ],
        "tools": tools,
    }
    trajectory = read_row(row, "logs:1", counts)
    assert trajectory.turns == (
        Turn("system", "", tools=json.dumps(tools)),
        Turn("user", "1+2"),
        Turn("assistant", "", thinking="a sum", tool_calls=text),
        Turn("tool", "3", name="add", tool_call_id="c1"),
        Turn("assistant", "3", reward=1.0),
    )
    assert not counts and "absent" not in trajectory.turns[2].tool_calls
    write_trajectories(tmp_path / name, [trajectory])
    assert list(read_trajectories(tmp_path / name)) == [trajectory]


def test_faulty_tool_calls_and_thoughts_are_one_line():
    faults = [
        ({"tool_calls": [{"function": {}}]}, r"logs:1: messages\[0\].tool_calls: found .* an object with"),
        ({"tool_calls": "["}, "tool_calls: found text that is not JSON"),
        ({"thinking": 5}, "thinking: found 5, expected text"),
        ({"reasoning_content": ["a"]}, r"thinking: found \['a'\], expected text"),
        ({"thinking": "a", "reasoning_content": "b"}, "thinking: found a text that differs from reasoning_content"),
    ]
    for fields, message in faults:
        with pytest.raises(InputError, match=message):
            read_row({"messages": [{"role": "assistant", "content": "x", **fields}]}, "logs:1", Counter())


def test_rows_with_content_that_is_not_text_are_dropped_and_counted(tmp_path):
    image = {"type": "image_url", "image_url": {"url": "u"}}
    counts = Counter()
    path = lines(
        tmp_path / "logs.jsonl",
        scored(),
        scored([{"type": "text", "text": "x"}, image]),
        scored(None),
        scored({"text": "x"}),
    )
    path.write_text(path.read_text() + '{"messages": [{"role": "assistant", "content": "\\ud83d"}]}\n')
    assert len(read_trajectories(path, counts=counts)) == 1
    assert counts == {
        "dropped: content part of type 'image_url'": 1,
        "dropped: message without content": 1,
        "dropped: content that is not text": 1,
        "dropped: text with half a surrogate pair": 1,
    }


def test_a_reward_on_an_untrained_agent_turn_is_removed_and_counted(tmp_path):
    counts = Counter()
    row = {"messages": [agent("a", trainable=False, reward=1.0), agent("b", reward=2.0)]}
    assert [turn.reward for turn in read(tmp_path, row, counts=counts)[0].turns] == [None, 2.0]
    assert counts == {"repaired: reward removed from an untrained turn": 1}


def test_other_columns_are_kept_as_labels_and_other_message_fields_counted(tmp_path):
    counts = Counter()
    row = {"messages": [agent("a", mood="glad", name="Ann")], "rating": 4, "user": "u1", "labels": {"user": "u2"}}
    assert read(tmp_path, row, counts=counts)[0].labels == {"rating": 4, "user": "u2"}
    assert counts == {"repaired: message field 'mood' left out": 1, "repaired: message field 'name' left out": 1}


def user(text="q"):
    return {"role": "user", "content": text}


@pytest.mark.parametrize(
    "reward, repairs",
    [
        (0.5, {}),
        ("0.5", {"repaired: reward written as text": 1}),
        (None, {}),
        (True, {"repaired: reward true or false taken as 1 or 0": 1}),
    ],
)
def test_one_reward_of_a_conversation_lies_on_its_last_agent_turn_and_is_counted(tmp_path, reward, repairs):
    counts = Counter()
    row = {"messages": [user(), agent("a"), user("and?"), agent("b"), agent("not mine", weight=0), user("thanks")]}
    (read_back,) = read(tmp_path, {**row, "reward": reward}, counts=counts)
    expected = None if reward is None else float(reward)
    assert [turn.reward for turn in read_back.turns] == [None, None, None, expected, None, None]
    assert [turn.is_trainable for turn in read_back.turns] == [False, True, False, True, False, False]
    once = {} if reward is None else {"repaired: reward of the row put on its last agent turn": 1}
    assert counts == {"repaired: weight 0 read as trainable: false": 1, **once, **repairs} and read_back.labels == {}


def test_data_reward_names_the_column_or_label_of_the_score(tmp_path):
    counts = Counter()
    path = lines(
        tmp_path / "logs.jsonl",
        {"messages": [user(), agent()], "rating": 4, "reward": 9},
        {"prompt": "p", "completion": "a", "rating": False},
        {"prompt": "p", "response": "a", "rating": None},
        {"messages": [user(), agent()], "labels": {"rating": "2"}},
        {"messages": [user(), agent()]},
    )
    rows = read_trajectories(path, counts=counts, reward="rating")
    assert [row.turns[-1].reward for row in rows] == [4.0, 0.0, None, 2.0, None]
    assert rows[0].labels == {"rating": 4, "reward": 9}
    assert counts["kept: no 'rating' in the row, so it is not scored"] == 1
    assert message_of(read_trajectories, path, reward="ratings") == (
        f"{path}: ratings: found no row with this column, expected the name of the column that holds the scores"
    )
    path = lines(tmp_path / "logs.jsonl", {"prompt": "p", "completion": "a", "rating": "good"})
    assert message_of(read_trajectories, path, reward="rating") == (
        f"{path}:1: rating: found 'good', expected a number"
    )


def test_what_was_prepared_with_the_name_of_the_score_is_read_with_it_too(tmp_path):
    path = lines(tmp_path / "logs.jsonl", {"messages": [user(), agent(), agent()], "rating": 4})
    rows = read_trajectories(path, reward="rating")
    write_trajectories(tmp_path / "prepared.jsonl", rows)
    assert read_trajectories(tmp_path / "prepared.jsonl", reward="rating") == rows
    assert read_trajectories(tmp_path / "prepared.jsonl") == rows


def test_sharegpt_is_read_with_its_names_of_roles(tmp_path):
    said = [("human", "q"), ("gpt", "call"), ("function_call", "{}"), ("observation", "42"), ("GPT", "42!")]
    counts = Counter()
    conversations = [{"from": who, "value": text} for who, text in said]
    (row,) = read(tmp_path, {"conversations": conversations, "system": "Be kind.", "reward": 1}, counts=counts)
    assert [(turn.role, turn.content) for turn in row.turns] == [
        ("system", "Be kind."),
        ("user", "q"),
        ("assistant", "call"),
        ("assistant", "{}"),
        ("tool", "42"),
        ("assistant", "42!"),
    ]
    assert row.turns[-1].reward == 1.0 and row.labels == {}
    assert counts == {
        "repaired: from read as role": 5,
        "repaired: value read as content": 5,
        "repaired: role 'human' read as 'user'": 1,
        "repaired: role 'gpt' read as 'assistant'": 1,
        "repaired: role 'function_call' read as 'assistant'": 1,
        "repaired: role 'observation' read as 'tool'": 1,
        "repaired: role 'GPT' read as 'assistant'": 1,
        "repaired: column 'system' read as the first turn": 1,
        "repaired: reward of the row put on its last agent turn": 1,
    }


def test_a_developer_speaks_as_the_system(tmp_path):
    (row,) = read(tmp_path, {"messages": [{"role": "developer", "content": "s"}, user(), agent()]})
    assert [turn.role for turn in row.turns] == ["system", "user", "assistant"]


def test_json_keys_that_are_there_twice_are_counted_in_lines_and_lists(tmp_path):
    text = '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "content": "b"}]'
    first, second = text + "}", text + ', "labels": {"x": 1, "x": 2, "x": 3}}'
    for name, whole in (("a.jsonl", f"{first}\n{second}\n"), ("b.json", f"[{first} ,\n {second}]\n")):
        counts = Counter()
        (tmp_path / name).write_text(whole)
        rows = read_trajectories(tmp_path / name, counts=counts)
        assert [row.turns[1].content for row in rows] == ["b", "b"] and rows[1].labels == {"x": 3}
        assert counts == {"repaired: JSON key given twice, its last value used": 4}


TABLE = [
    ["prompt", "completion", "reward", "group", "note"],
    ["2+2?", "4", "1", "17", ""],
    ['Say, "hi"\nplease', "true", "-0.5", "é", "odd"],
    ["q", "null", "", "17", ""],
]


@pytest.mark.parametrize(
    "name, mark", [("a.csv", ","), ("a.csv", ";"), ("a.tsv", "\t"), ("a.csv.gz", ","), ("a.tsv.gz", "\t")]
)
def test_a_table_is_rows_of_text_in_which_an_empty_cell_is_null(tmp_path, name, mark):
    text = (
        "\ufeff"
        + "\r\n\r\n".join(
            mark.join('"' + cell.replace('"', '""') + '"' if set(cell) & set('",\n') else cell for cell in row)
            for row in TABLE
        )
        + "\r\n"
    )
    (tmp_path / name).write_bytes((gzip.compress if name.endswith("gz") else bytes)(text.encode()))
    counts = Counter()
    rows = read_trajectories(tmp_path / name, counts=counts)
    assert [
        (row.turns[0].content, row.turns[1].content, row.turns[1].reward, row.group, dict(row.labels)) for row in rows
    ] == [
        ("2+2?", "4", 1.0, "17", {}),
        ('Say, "hi"\nplease', "true", -0.5, "é", {"note": "odd"}),
        ("q", "null", None, "17", {}),
    ]
    assert counts == {"repaired: reward written as text": 2}


def test_tables_hold_messages_and_truth_values_as_text(tmp_path):
    row = json.dumps([user(), agent()]).replace('"', '""')
    (tmp_path / "a.csv").write_text(f'messages,reward,terminated\n"{row}",1,False\n"{row}",0,true\n')
    counts = Counter()
    rows = read_trajectories(tmp_path / "a.csv", counts=counts)
    assert [(row.turns[1].reward, row.terminated) for row in rows] == [(1.0, False), (0.0, True)]
    assert counts == {
        "repaired: list written as JSON text": 2,
        "repaired: terminated written as a word": 2,
        "repaired: reward written as text": 2,
        "repaired: reward of the row put on its last agent turn": 2,
    }


@pytest.mark.parametrize(
    "text, expected",
    [
        ('prompt,completion,reward\n"a\nb",c,1\nd,e\n', "4: row: found 2 cells, expected 3 as in the header"),
        ('prompt,completion,reward\na,b,1\n"c', "3: CSV: found a row that does not parse (unexpected end of data)"),
        ('prompt,completion,reward\na,b,1\na,"b"c,1\n', "3: CSV: found a row that does not parse ("),
        ("prompt,completion,prompt\na,b,1\n", "1: header: found 'prompt' twice, expected different names"),
        ("prompt,completion,reward\na,b,1\na,b\udcff,1\n", "3: text: found bytes that are not UTF-8, expected UTF-8"),
    ],
)
def test_bad_tables_are_named_by_the_line_that_a_row_begins_in(tmp_path, text, expected):
    path = tmp_path / "a.csv"
    path.write_bytes(text.encode(errors="surrogateescape"))
    assert message_of(read_trajectories, path).startswith(f"{path}:{expected}")


@pytest.mark.parametrize("group", [17, 17.0])
def test_groups_that_are_numbers_are_text_and_counted(tmp_path, group):
    counts = Counter()
    (row,) = read(tmp_path, {**scored(), "group": group}, counts=counts)
    assert row.group == "17" and counts == {"repaired: group given as a number, read as text": 1}


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "chosen: found a comparison, expected a scored row"),
        ({"chosen": [agent()], "rejected": [agent()]}, "chosen: found a comparison, expected a scored row"),
        (
            {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 2]},
            "responses: found a comparison, expected a scored",
        ),
        (
            {"context": [], "options": [[agent()], [agent()]], "target": [1, 0]},
            "options: found a comparison, expected a",
        ),
        ({"text": "hello"}, "fields: found text, expected messages, or prompt and completion with a reward or label"),
        ({"prompt": "p", "completion": "a"}, "reward: found neither reward nor label, expected one of them"),
        (
            {"prompt": "1", "completion": "2", "stars": 4},
            "reward: found neither reward nor label, expected one of them "
            "(null = not scored); column 'stars' may hold the score: use --data.reward 'stars', or --reward 'stars' "
            "for check and evaluate",
        ),
        ({"prompt": "p", "completion": "a", "label": 2}, "label: found 2, expected true, false or null"),
        ({"prompt": "p", "completion": "a", "reward": "one"}, "reward: found 'one', expected a number"),
        ({"prompt": "p", "completion": "a", "reward": "1e999"}, "reward: found inf, expected a finite number"),
        (
            {"prompt": "p", "completion": "", "reward": 1},
            "completion: found empty text, expected the text of the agent's",
        ),
        ({"prompt": "p", "completion": [{"role": "user", "content": "x"}], "reward": 1}, "completion: found no agent"),
        (
            {"prompt": "p", "completion": [agent(reward=1)], "reward": 1},
            "reward: found one for the row and another in completion[0], expected only one",
        ),
        (
            {"prompt": [{"role": "narrator", "content": "x"}], "completion": "a", "reward": 1},
            "prompt[0].role: found 'narrator'",
        ),
        ({"prompt": 3, "completion": "a", "reward": 1}, "prompt: found 3, expected a list of messages"),
        (
            {**scored(reward=1), "reward": 1.0},
            "reward: found one for the row and another in messages[1], expected only one",
        ),
        (
            scored(weight=0, trainable=True),
            "messages[1].weight: found 0 together with trainable: true, expected only one of them",
        ),
        ({"messages": "hello"}, "messages: found 'hello', expected a list of messages"),
        ({"messages": [{"role": "user", "content": "q"}]}, "messages: found only untrained turns (user)"),
        (
            {"messages": [{"role": "user", "content": "q"}], "labels": {"abstained": 0}},
            "messages: found only untrained",
        ),
        ({"messages": [{"role": "user", "content": "q"}], "labels": "{"}, "labels: found text that is not JSON"),
        (scored(5), "messages[1].content: found 5, expected text"),
        (scored(reward=float("nan")), "messages[1].reward: found nan, expected a finite number"),
        ({"messages": [{"role": "user", "content": "q", "reward": 1}, agent()]}, "messages[0].reward: found 1.0 on a"),
        (scored(""), "messages[1].content: found empty text"),
        ([1, 2], "row: found [1, 2], expected an object"),
    ],
)
def test_bad_rows_are_named_by_file_row_and_field(tmp_path, row, expected):
    path = lines(tmp_path / "logs.jsonl", scored(), row)
    assert message_of(read_trajectories, path).startswith(f"{path}:2: {expected}")


def test_broken_json_is_named_by_its_line_and_blank_lines_count(tmp_path):
    path = tmp_path / "logs.jsonl"
    path.write_text(json.dumps(scored()) + "\n\n{'messages': 1}\n")
    assert message_of(read_trajectories, path).startswith(f"{path}:3: JSON: found a line that does not parse")


def test_bytes_that_are_no_text_are_named_by_their_line(tmp_path):
    path = tmp_path / "logs.jsonl"
    path.write_bytes(json.dumps(scored()).encode() + b"\n\xff\xfe\n")
    assert message_of(read_trajectories, path) == f"{path}:2: text: found bytes that are not UTF-8, expected UTF-8"


def test_files_that_are_missing_empty_or_of_another_kind_are_one_line_errors(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "bad.parquet").write_text("x")
    (tmp_path / "bad.jsonl.gz").write_bytes(gzip.compress(b"{}")[:-4])
    (tmp_path / "void").mkdir()
    found = {
        name: message_of(read_trajectories, tmp_path / name).removeprefix(f"{tmp_path}/")
        for name in ("none.jsonl", "empty.jsonl", "a.txt", "bad.parquet", "bad.jsonl.gz", "void")
    }
    assert found["none.jsonl"].startswith("none.jsonl: found no such file, folder or hub name, expected a .jsonl")
    assert found["empty.jsonl"] == "empty.jsonl: found no row to use (no rows), expected at least one"
    assert found["a.txt"] == (
        "a.txt: found suffix '.txt', expected one of .jsonl, .jsonl.gz, .json, .json.gz, "
        ".parquet, .csv, .csv.gz, .tsv, .tsv.gz"
    )
    assert found["bad.parquet"].startswith("bad.parquet:1: found a Parquet file that cannot be read")
    assert found["bad.jsonl.gz"].startswith("bad.jsonl.gz:1: found Compressed file ended")
    assert found["void"].startswith("void: found no data files, expected .jsonl, .jsonl.gz, .json, .json.gz, ")


def test_json_files_hold_one_list_or_a_row_per_line_whatever_their_suffix(tmp_path):
    rows = [scored("é"), scored("b")]
    expected = [row["messages"][1]["content"] for row in rows]
    for name in ("a.json", "a.jsonl", "a.json.gz", "a.jsonl.gz"):
        for text in (json.dumps(rows, indent=1), "\ufeff" + json.dumps(rows), "\n".join(map(json.dumps, rows))):
            whole = text.encode()
            (tmp_path / name).write_bytes(gzip.compress(whole) if name.endswith("gz") else whole)
            assert [row.turns[1].content for row in read_trajectories(tmp_path / name)] == expected
    lines(tmp_path / "b.jsonl", [1], rows[0])  # no list as a whole, so the first line is a row that is a list
    assert message_of(read_trajectories, tmp_path / "b.jsonl").startswith(f"{tmp_path}/b.jsonl:1: row: found [1]")


@pytest.mark.parametrize("levels", [201, 900, 981, 990, 100_000])  # at 981 it parses, and nothing else works
def test_nesting_that_nothing_can_walk_through_is_named_by_its_line(tmp_path, levels):
    path, deep = tmp_path / "logs.jsonl", "[" * levels + "]" * levels
    row = json.dumps(scored(reward=1.0))
    field = ', "labels": {"a": ' + deep + "}}"
    too_deep = f"{path}:2: JSON: found nesting deeper than 200 levels, expected less nesting"
    for line in (deep, row[:-1] + field, row.replace('"a"', deep)):
        path.write_text(f"{row}\n{line}\n")
        assert message_of(read_trajectories, path) == too_deep
    if levels < 980:  # as a whole the list can be parsed
        path.write_text(f"[{row}, {deep}]")
        assert message_of(read_trajectories, path) == too_deep
    assert "labels: found text that is not JSON (nested " in message_of(read, tmp_path, {**scored(), "labels": deep})


def test_nesting_up_to_the_limit_is_kept(tmp_path):
    deep = json.loads("[" * 198 + "]" * 198)  # in the row and its labels
    (row,) = read(tmp_path, {**scored(reward=1.0), "labels": {"a": deep}})
    write_trajectories(tmp_path / "new.jsonl", [row])
    assert read_trajectories(tmp_path / "new.jsonl") == [row] and row.labels == {"a": deep}


@pytest.mark.parametrize("processes", [1, 2])
def test_stored_comparisons_are_those_that_are_read(tmp_path, monkeypatch, processes):
    monkeypatch.setattr(io, "_CHUNK", 3)
    rows = [{"prompt": f"q{i}", "chosen": "é" * i + "a", "rejected": "b"} for i in range(9)] + [
        {"prompt": "x", "chosen": [{"role": "assistant", "content": None}], "rejected": "b"}
    ]
    path, counts = lines(tmp_path / "pairs.jsonl", *rows), (Counter(), Counter())
    expected, stored = (
        read_comparisons(path, counts=counts[0]),
        store_comparisons(path, counts=counts[1], processes=processes),
    )
    assert list(stored) == expected and len(stored) == 9 and counts[0] == counts[1] != Counter()
    assert stored[-1] == expected[-1] and stored[2:7:2] == expected[2:7:2]
    assert data_hash(stored) == data_hash(expected)
    with pytest.raises(IndexError):
        stored[9]
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork"), hold.append, (stored,)) as pool:
        assert pool.submit(last_held).result() == expected[-1]  # and its reading moves nobody's place
        assert stored[0] == expected[0]
    assert message_of(store_comparisons, lines(path, rows[-1]), processes=processes).endswith(
        "found no row to use (dropped: message without content: 1), expected at least one"
    )
    path.write_text(path.read_text() + json.dumps(rows[0]) + '\n{"prompt": 1, "chosen": 2, "rejected": 3}\n[\n')
    error = message_of(store_comparisons, path, processes=processes)
    assert error == message_of(read_comparisons, path) and error.startswith(f"{path}:3: ")


def test_a_full_temporary_folder_is_one_line(tmp_path, monkeypatch):
    path = lines(tmp_path / "pairs.jsonl", {"prompt": "q", "chosen": "a", "rejected": "b"})
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda: open("/dev/full", "r+b"))
    assert message_of(store_comparisons, path).startswith(f"{tempfile.gettempdir()}: found No space left on device, ")


hold = []


def last_held():
    return hold[-1][-1]


def test_a_folder_of_json_files_is_read_where_they_lie_beside_no_other_data(tmp_path):
    for name in ("train", "validation"):
        lines(tmp_path / f"{name}.json", scored(name))
    assert {name: len(rows) for name, rows in read_splits(tmp_path).items()} == {"train": 1, "validation": 1}


def test_a_file_where_every_row_is_dropped_says_why(tmp_path):
    message = message_of(read, tmp_path, scored(None), scored(None))
    assert message.endswith("found no row to use (dropped: message without content: 2), expected at least one")


def test_a_folder_with_a_train_file_is_a_folder_of_splits(tmp_path):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation"):
        lines(tmp_path / f"{name}.jsonl", scored(name))
    (tmp_path / "report.json").write_text("{}")
    assert [row.turns[1].content for row in read_trajectories(tmp_path, split="train")] == [
        "train-00000-of-00002",
        "train-00001-of-00002",
    ]
    assert {name: len(rows) for name, rows in read_splits(tmp_path).items()} == {"train": 2, "validation": 1}
    assert message_of(read_trajectories, tmp_path) == (
        f"{tmp_path}: split: found none chosen, expected one of train, validation"
    )
    assert message_of(read_trajectories, tmp_path, split="test") == (
        f"{tmp_path}: split: found 'test', expected one of train, validation"
    )


def test_a_folder_of_other_names_is_one_data_set(tmp_path):
    lines(tmp_path / "monday.jsonl", scored("m"))
    lines(tmp_path / "tuesday.jsonl", scored("t"))
    assert [row.turns[1].content for row in read_trajectories(tmp_path)] == ["m", "t"]
    assert list(read_splits(tmp_path)) == ["all"]


def test_saved_dataset_dicts_are_read_by_split(tmp_path):
    rows = datasets.Dataset.from_list([{"prompt": "p", "completion": "a", "label": True}])
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "saved")
    (row,) = read_trajectories(tmp_path / "saved", split="test")
    assert row.turns == (Turn("user", "p"), Turn("assistant", "a", reward=1.0))
    assert "expected one of train, test" in message_of(read_trajectories, tmp_path / "saved")


def test_hub_names_go_through_load_dataset(tmp_path, monkeypatch):
    rows = datasets.Dataset.from_list([scored(reward=2.0)])
    asked = []

    def load_dataset(name, split=None):
        asked.append((name, split))
        return rows if split else datasets.DatasetDict({"train": rows})

    monkeypatch.setattr(io, "ask_hub", lambda *_: None)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    expected = (Turn("user", "q"), Turn("assistant", "a", reward=2.0))
    assert read_trajectories("some-one/logs")[0].turns == expected
    assert read_trajectories("some-one/logs", split="train")[0].turns == expected
    assert asked == [("some-one/logs", None), ("some-one/logs", "train")]


def test_an_unknown_hub_name_is_a_one_line_error(monkeypatch):
    def load_dataset(name, split=None):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'no/thing' doesn't exist\non the Hub")

    monkeypatch.setattr(io, "ask_hub", lambda *_: None)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert message_of(read_trajectories, "no/thing").startswith(
        "no/thing: found no file or folder, and no dataset of that name on the hub (Dataset 'no/thing' doesn't exist)"
    )


def test_a_missing_path_in_a_folder_that_exists_is_not_looked_up(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(io, "_hub_parts", None)
    (tmp_path / "logs").mkdir()
    assert message_of(read_trajectories, "logs/maze").startswith("logs/maze: found no such file")


def test_a_path_that_cannot_be_written_is_a_one_line_error(tmp_path):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("kept")
    for name in ("file/a.jsonl", "folder.jsonl", "full"):
        assert "expected a path that can be written" in message_of(write_trajectories, tmp_path / name, EPISODES)
    assert (tmp_path / "full" / "notes.txt").read_text() == (tmp_path / "file").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.jsonl", "full"]


@pytest.mark.parametrize("path", [".", "", "/"])
def test_a_path_without_a_name_is_a_one_line_error(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ": found a path without a file name, expected one that" in message_of(write_trajectories, path, EPISODES)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_leaves_the_old_file_and_no_other(tmp_path):
    target = tmp_path / "a.jsonl"
    target.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_output(target) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_nothing_is_not_written(tmp_path):
    assert "found no trajectories to write" in message_of(write_trajectories, tmp_path / "a.jsonl", [])
    assert list(tmp_path.iterdir()) == []


def games(n, group="g{}"):
    return [Trajectory((Turn("assistant", f"move {i}"),), group=group.format(i)) for i in range(n)]


def test_no_group_is_in_two_splits_and_shares_are_near_what_was_asked():
    rows = games(2000, group="g{}") + games(2000, group="g{}")
    splits = split_by_group(rows, {"train": 0.8, "validation": 0.2}, seed=1)
    groups = {name: {row.group for row in part} for name, part in splits.items()}
    assert not groups["train"] & groups["validation"]
    assert len(splits["train"]) + len(splits["validation"]) == 4000
    assert abs(len(groups["validation"]) - 400) < 4 * 18  # 4 s.d. of a binomial with n 2000, p 0.2


def test_more_rows_move_no_row_and_another_seed_does():
    shares = {"a": 0.5, "b": 0.5}
    few, many = split_by_group(games(50), shares, seed=0), split_by_group(games(100), shares, seed=0)
    assert set(row.group for row in few["a"]) <= set(row.group for row in many["a"])
    assert split_by_group(games(50), shares, seed=1) != few


def test_equal_rows_without_a_group_stay_together():
    rows = games(30, group="") * 2
    splits = split_by_group(rows, {"a": 0.5, "b": 0.5}, seed=3)
    moves = {name: {row.turns[0].content for row in part} for name, part in splits.items()}
    assert moves["a"] and moves["b"] and not moves["a"] & moves["b"]


@pytest.mark.parametrize("shares", [{"a": 0.5, "b": 0.4}, {"a": 1.5, "b": -0.5}, {}, {"a": float("nan")}])
def test_shares_that_are_no_distribution_are_refused(shares):
    assert "expected shares from 0 up that sum to 1" in message_of(split_by_group, games(3), shares, 0)


def test_data_hash_survives_a_round_trip_and_sees_every_change(tmp_path):
    write_trajectories(tmp_path / "a.parquet", EPISODES)
    assert data_hash(read_trajectories(tmp_path / "a.parquet")) == data_hash(EPISODES)
    assert data_hash(EPISODES) != data_hash(EPISODES[::-1])
    unscored, zero = ([Trajectory((Turn("assistant", "a", reward=reward),))] for reward in (None, 0.0))
    assert data_hash(unscored) != data_hash(zero)


def test_no_name_is_no_folder(tmp_path, monkeypatch):
    lines(tmp_path / "a.jsonl", scored())
    monkeypatch.chdir(tmp_path)
    assert message_of(read_trajectories, "").startswith("'': found no such file, folder or hub name, expected ")
    assert len(read_trajectories(".")) == 1


def test_an_empty_datasets_folder_is_one_line(tmp_path):
    datasets.Dataset.from_list([]).save_to_disk(tmp_path / "rows")
    assert "found a datasets folder that cannot be read" in message_of(read_trajectories, tmp_path / "rows")


def table(**columns):
    return pyarrow.table({"prompt": ["q"], "completion": ["a"], "reward": [1.0], **columns})


def test_parquet_of_any_columns_and_notes_is_read(tmp_path):
    facts = pyarrow.array([[("a", 1), ("b", 2)]], pyarrow.map_(pyarrow.string(), pyarrow.int64()))
    odd = {"when": [datetime.datetime(2026, 1, 1)], "price": [decimal.Decimal("1.5")], "raw": [b"\xff"]}
    pyarrow.parquet.write_table(
        table(facts=facts, word=pyarrow.array(["x"]).dictionary_encode(), **odd), tmp_path / "rows.parquet"
    )
    counts = Counter()
    (row,) = read_trajectories(tmp_path / "rows.parquet", counts=counts)
    assert row.labels == {"facts": {"a": 1, "b": 2}, "word": "x"}
    assert counts == {f"repaired: column {name!r} left out, because JSON cannot hold it": 1 for name in odd}
    for note in (b"{", b"3", b'{"info": {"features": {"prompt": {"_type": "Nothing"}}}}'):
        noted = table().replace_schema_metadata({b"huggingface": note, b"pandas": note})
        pyarrow.parquet.write_table(noted, tmp_path / "rows.parquet")
        assert len(read_trajectories(tmp_path / "rows.parquet")) == 1


@pytest.mark.parametrize(
    "columns",
    [
        {"when": pyarrow.array([2**52], pyarrow.timestamp("s"))},  # which Python has no date for
        {"facts": pyarrow.array([[("a", 1), ("a", 2)]], pyarrow.map_(pyarrow.string(), pyarrow.int64()))},
        {
            "text": pyarrow.StringArray.from_buffers(
                1, pyarrow.py_buffer(bytes([0, 0, 0, 0, 1, 0, 0, 0])), pyarrow.py_buffer(b"\xff")
            )
        },
    ],
    ids=["date", "name twice", "no text"],
)
def test_parquet_rows_that_python_cannot_hold_are_one_line(tmp_path, columns):
    pyarrow.parquet.write_table(table(**columns), tmp_path / "rows.parquet")
    said = message_of(read_trajectories, tmp_path / "rows.parquet")
    assert said.startswith(f"{tmp_path / 'rows.parquet'}:1: found a Parquet file that cannot be read (")


@pytest.mark.parametrize(
    "damage",
    [
        "{",
        "3",
        "null",
        "{}",
        '{"_data_files": 3}',
        '{"_data_files": [{"filename": 1}]}',
        '{"features": 3}',
        '{"features": {"messages": {"_type": "Nothing"}}}',
    ],
)
@pytest.mark.parametrize("name", ["state.json", "dataset_info.json"])
def test_a_damaged_datasets_folder_is_one_line_or_whole(tmp_path, name, damage):
    write_trajectories(tmp_path / "rows", EPISODES)
    (tmp_path / "rows" / name).write_text(damage)
    try:
        assert read_trajectories(tmp_path / "rows") == EPISODES  # the data say themselves what they are
    except InputError as error:
        assert str(error).startswith(f"{tmp_path / 'rows'}") and "\n" not in str(error)


def test_a_cut_off_arrow_file_is_one_line(tmp_path):
    write_trajectories(tmp_path / "rows", EPISODES)
    (file,) = (tmp_path / "rows").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:-500])
    assert "found a datasets folder that cannot be read" in message_of(read_trajectories, tmp_path / "rows")


def test_half_a_surrogate_pair_in_a_name_is_named_by_its_line(tmp_path):
    row = json.dumps({**scored(), "extra": {"deep": [{"\ud800": 1}]}})
    (tmp_path / "rows.jsonl").write_text(f"{row}\n")
    said = message_of(read_trajectories, tmp_path / "rows.jsonl")
    assert said == (
        f"{tmp_path / 'rows.jsonl'}:1: JSON: a key: found half a surrogate pair at character 0, expected text"
    )
    (tmp_path / "rows.jsonl").write_text(f"[{row}]")
    assert said == message_of(read_trajectories, tmp_path / "rows.jsonl")


def test_numbers_of_any_length_are_one_line(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(scored())[:-1] + f', "n": {"1" * 5000}}}\n')
    said = message_of(read_trajectories, tmp_path / "rows.jsonl")
    assert said.startswith(f"{tmp_path / 'rows.jsonl'}:1: JSON: found a line that does not parse (Exceeds the limit ")
    lines(tmp_path / "rows.jsonl", {**scored(), "n": int("1" * 4000)})
    (row,) = read_trajectories(tmp_path / "rows.jsonl")
    write_trajectories(tmp_path / "again.parquet", [row])
    assert read_trajectories(tmp_path / "again.parquet") == [row]
    assert "token_ids: found 2147483648, expected" in message_of(read, tmp_path, scored(token_ids=[2**31]))
