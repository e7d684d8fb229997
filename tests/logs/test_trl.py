"""Rows for TRL: values by hand, what is dropped is counted, they read back, and TRL's trainers take them."""

import json
from collections import Counter

import pytest

from offline_lmrl.cli import main
from offline_lmrl.errors import InputError
from offline_lmrl.logs.io import read_comparisons, read_trajectories, write_rows, write_trajectories
from offline_lmrl.logs.preferences import to_trajectories
from offline_lmrl.logs.trajectory import Trajectory, Turn
from offline_lmrl.logs.trl import TrlForm, label_rows, preference_rows, sft_rows
from tests.logs.test_preferences import CONTEXT, FOUR, PAIR, SOFT, TIE

USER = Turn("user", "hi")


def reply(text, reward, before=(USER,)):
    return Trajectory((*before, Turn("assistant", text, reward=reward)), group="g")


THUMBS = (
    reply("yes", 1.0),
    reply("no", -1.0),
    reply("well", None),
    Trajectory(
        (USER, Turn("assistant", "yes", reward=1.0), Turn("user", "and?"), Turn("assistant", "so", reward=0.5))
    ),
)


def convert(rows, to, **settings):
    counts = Counter()
    made = TrlForm(to=to, **settings).convert({"train": rows}, counts)["train"]
    return made, {reason: n for reason, n in counts.items() if n}


def texts(row):
    return {name: value if isinstance(value, bool) else value and value[-1]["content"] for name, value in row.items()}


def test_rows_for_trl_are_prompts_and_messages(tmp_path):
    user, earlier, also = ({"role": turn.role, "content": turn.content} for turn in CONTEXT)
    a, b = ({"role": "assistant", "content": text} for text in "ab")
    counts = Counter()
    assert list(preference_rows([SOFT, TIE], counts)) == [
        {"prompt": [user, earlier, also], "chosen": [b], "rejected": [a]}
    ]
    assert counts == {"dropped: tie": 1}
    assert len(list(preference_rows([FOUR]))) == 5
    scored = to_trajectories([PAIR, TIE])
    counts = Counter()
    assert list(label_rows(scored, counts=counts)) == [
        {"prompt": [user, earlier, also], "completion": [a], "label": True},
        {"prompt": [user, earlier, also], "completion": [b], "label": False},
    ]
    assert counts == {"dropped: return equal to the threshold": 2}
    assert list(sft_rows(scored, minimum=1)) == [{"prompt": [user, earlier, also], "completion": [a], "reward": 1.0}]
    write_rows(tmp_path / "sft.jsonl", sft_rows(scored))
    assert [json.loads(line)["completion"] for line in (tmp_path / "sft.jsonl").open()] == [[a], [b], [a], [b]]


def test_sft_rows_hold_one_agent_turn_each_and_labels_none_of_others():
    episode = Trajectory(
        (
            Turn("environment", "go"),
            Turn("assistant", "up", reward=1.0),
            Turn("environment", "ok"),
            Turn("assistant", "down"),
        )
    )
    rows = list(sft_rows([episode]))
    assert [[message["content"] for message in row["prompt"]] for row in rows] == [["go"], ["go", "up", "ok"]]
    assert rows[0]["prompt"][0]["role"] == "user"
    counts = Counter()
    assert list(label_rows([episode], counts=counts)) == []
    assert counts == {"dropped: turns of others inside a completion": 1}


def test_preferences_pair_replies_to_the_same_turns_with_unequal_rewards():
    rows, counts = convert(THUMBS, "preferences")
    assert [texts(row) for row in rows] == [{"prompt": "hi", "chosen": "yes", "rejected": "no"}]
    assert counts == {"dropped: no reward": 1, "dropped: no other reply to the same context": 1}
    rows, counts = convert([PAIR, TIE], "preferences")
    assert len(rows) == 1 and counts == {"dropped: tie": 1}
    with pytest.raises(InputError, match="^to: found nothing that preferences can express .*no reward': 1"):
        convert(THUMBS[2:3], "preferences")


def test_labels_are_made_of_each_scored_reply_above_and_below_the_mean_or_a_threshold():
    rows, counts = convert(THUMBS, "kto")  # the mean of 1, −1, 1 and .5 is .375
    assert [(row["completion"][0]["content"], row["label"]) for row in rows] == [
        ("yes", True),
        ("no", False),
        ("yes", True),
        ("so", True),
    ]
    assert [message["content"] for message in rows[3]["prompt"]] == ["hi", "yes", "and?"]
    assert counts == {"dropped: no reward": 1}
    rows, counts = convert(THUMBS, "kto", threshold=0.5)
    assert [row["label"] for row in rows] == [True, False, True]
    assert counts == {"dropped: no reward": 1, "dropped: return equal to the threshold": 1}
    logged = [reply("a", 1.0), reply("b", 0.0)]  # true and false, as reading makes them
    assert [row["label"] for row in convert(logged, "kto")[0]] == [True, False]
    rows, counts = convert([PAIR, TIE], "kto")
    assert [(row["completion"][0]["content"], row["label"]) for row in rows] == [("a", True), ("b", False)]
    assert counts == {"dropped: return equal to the threshold": 2}


def test_texts_are_agent_turns_of_the_best_share_or_the_preferred_replies():
    rows, counts = convert(THUMBS, "sft")
    assert [(row["completion"][0]["content"], row["reward"]) for row in rows] == [
        ("yes", 1.0),
        ("no", -1.0),
        ("well", None),
        ("yes", 1.0),
        ("so", 0.5),
    ]
    assert counts == {}
    rows, counts = convert(THUMBS, "sft", keep_share=0.5)  # returns 1.5 and 1
    assert [row["completion"][0]["content"] for row in rows] == ["yes", "yes", "so"]
    assert counts == {"dropped: return below that of the rows kept": 2}
    rows, _ = convert([PAIR, TIE], "sft")
    assert [row["completion"][0]["content"] for row in rows] == ["a"]


def test_settings_of_another_form_are_refused():
    for settings in ({"to": "sft", "threshold": 1.0}, {"to": "kto", "keep_share": 0.5}, {"threshold": 0.0}):
        with pytest.raises(InputError, match="expected it only with"):
            TrlForm(**settings)
    with pytest.raises(InputError, match="^keep_share: found 0.5 for comparisons, expected none"):
        convert([PAIR, TIE], "sft", keep_share=0.5)
    with pytest.raises(InputError, match="^keep_share: found 0.0, expected above 0"):
        TrlForm(to="sft", keep_share=0.0)


@pytest.mark.parametrize("to", ["preferences", "kto", "sft"])
def test_rows_read_back_as_what_they_were_made_of(tmp_path, to):
    rows, _ = convert(THUMBS, to)
    write_rows(tmp_path / "rows.jsonl", rows)
    if to == "preferences":
        (row,) = read_comparisons(tmp_path / "rows.jsonl")
        assert [option[0].content for option in row.options] == ["yes", "no"] and row.target == (1.0, 0.0)
        return
    read = read_trajectories(tmp_path / "rows.jsonl")
    assert [row.turns[-1].content for row in read] == [row["completion"][0]["content"] for row in rows]
    score = "label" if to == "kto" else "reward"
    assert [row.turns[-1].reward for row in read] == [row[score] for row in rows]
    assert sum(turn.is_trainable for row in read for turn in row.turns) == len(rows)


def test_prepare_and_relabel_write_rows(tmp_path, capsys):
    source = [{"prompt": f"p{i}", "completion": "yes" if i % 2 else "no", "label": bool(i % 2)} for i in range(40)]
    (tmp_path / "kto.jsonl").write_text("".join(json.dumps(row) + "\n" for row in source))
    out = tmp_path / "out"
    arguments = ["prepare", "kto", "--input", str(tmp_path / "kto.jsonl"), "--output", str(out), "--to"]
    assert main([*arguments, "kto"]) == 0
    rows = [json.loads(line) for line in (out / "train.jsonl").open()]
    assert "rows for kto:" in capsys.readouterr().out
    assert all(row["label"] == (row["completion"][0]["content"] == "yes") for row in rows)
    assert sorted(path.name for path in out.iterdir()) == ["report.json", "train.jsonl", "validation.jsonl"]
    assert json.loads((out / "report.json").read_text())["rows for kto"]["train"] == len(rows)
    before = (out / "train.jsonl").read_bytes()
    assert main([*arguments, "preferences"]) == 2  # each prompt has one reply
    assert "nothing that preferences can express" in capsys.readouterr().err
    assert (out / "train.jsonl").read_bytes() == before
    write_trajectories(tmp_path / "logs.jsonl", [reply("yes", 1.0), reply("no, never", -1.0)])
    arguments = ["relabel", str(tmp_path / "logs.jsonl"), "--scorer", f"{__name__}:length", "--to", "preferences"]
    assert main([*arguments, "--output", str(tmp_path / "pairs.jsonl")]) == 0
    assert texts(json.loads((tmp_path / "pairs.jsonl").read_text()))["chosen"] == "no, never"
    assert main([*arguments, "--output", str(tmp_path / "pairs.parquet")]) == 2
    assert "expected a .jsonl or .jsonl.gz file" in capsys.readouterr().err


def length(context, option):
    return len(option[-1].content)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("to", "names"),
    [("preferences", ("DPO", "Reward")), ("kto", ("KTO",)), ("sft", ("SFT",))],
)
def test_trainers_of_trl_take_two_steps_on_the_rows(tmp_path, to, names):
    trl = pytest.importorskip("trl")
    from datasets import load_dataset

    from offline_lmrl.models.loading import build_model
    from tests.tiny import CHATML, byte_level

    logs = [reply(text, reward, (Turn("user", f"hi {i}"),)) for i in range(4) for text, reward in (("a", 1), ("b", 0))]
    rows, _ = convert(logs, to)
    write_rows(tmp_path / "rows.jsonl", rows)
    tokenizer = byte_level(CHATML)
    tokenizer.save_pretrained(tmp_path / "model")
    spec = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 1, "n_positions": 128}
    build_model(spec, tokenizer).save_pretrained(tmp_path / "model")
    for name in names:
        args = getattr(trl, f"{name}Config")(
            output_dir=str(tmp_path / name),
            max_steps=2,
            per_device_train_batch_size=4,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = getattr(trl, f"{name}Trainer")(
            model=str(tmp_path / "model"),
            args=args,
            train_dataset=load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), split="train"),
            processing_class=tokenizer,
        )
        trainer.train()
        assert trainer.state.global_step == 2
