"""The commands that score: relabel, select, evaluate on comparisons, generate with best-of-n."""

import gzip
import json
from collections import Counter

import pytest

from offline_lmrl.cli import main
from offline_lmrl.decoding.policy import LanguageSession
from offline_lmrl.logs.comparison import Comparison
from offline_lmrl.logs.io import read_comparisons, read_trajectories, write_comparisons, write_trajectories
from offline_lmrl.logs.trajectory import Trajectory, Turn
from offline_lmrl.models.loading import build_model
from offline_lmrl.tokens.tokenizers import train_tokenizer

ABSTAINED = "dropped: the agent abstained, so there is no reply"
LENGTH, UP = f"{__name__}:length", f"{__name__}:ups"
ASKED = (Turn("user", "say it"),)


def length(context, option):
    return len(option[-1].content)


def documents(history):
    """Each candidate reads a document of its own."""
    return [[Turn("system", "up up"), *history], [Turn("system", "left"), *history], list(history)]


def ups(context, option):
    return option[-1].content.count("up")


@pytest.fixture
def command(capsys):
    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def pairs(tmp_path):
    rows = [
        Comparison(ASKED, ((Turn("assistant", "up"),), (Turn("assistant", "left"),)), (1.0, 0.0), group="a"),
        Comparison(ASKED, ((Turn("assistant", "u"),), (Turn("assistant", "r"),)), (1.0, 0.0), group="b"),
    ]
    write_comparisons(tmp_path / "pairs.jsonl", rows)
    return tmp_path / "pairs.jsonl"


@pytest.fixture
def run(tmp_path):
    tokenizer = train_tokenizer(["up left", "say it"], 280)
    model = build_model({"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 1, "n_positions": 64}, tokenizer)
    model.save_pretrained(tmp_path / "run")
    tokenizer.save_pretrained(tmp_path / "run")
    return tmp_path / "run"


def test_relabel_scores_trajectories(command, tmp_path):
    write_trajectories(tmp_path / "logs.jsonl", [Trajectory((*ASKED, Turn("assistant", "left", reward=-1.0)))])
    code, out, _ = command("relabel", tmp_path / "logs.jsonl", "--scorer", LENGTH, "--output", tmp_path / "new.jsonl")
    assert (code, out) == (0, "all: read: 1\nall: written: 1\n")
    assert read_trajectories(tmp_path / "new.jsonl")[0].total_return == 4.0


def test_relabel_gives_comparisons_new_targets_or_makes_rewards_of_them(command, pairs, tmp_path):
    settings = ("--scorer", f"{{kind: sum, scorers: [{LENGTH}, {UP}], weights: [-1, 2]}}")
    assert command("relabel", pairs, *settings, "--output", tmp_path / "new.jsonl")[0] == 0
    first = read_comparisons(tmp_path / "new.jsonl")[0]
    assert first.labels["scores"] == [0.0, -4.0] and first.target[0] == pytest.approx(0.982, abs=1e-3)
    code, _, _ = command("relabel", pairs, *settings, "--make", "rewards", "--output", tmp_path / "scored.jsonl")
    assert code == 0
    scored = read_trajectories(tmp_path / "scored.jsonl")
    assert [row.total_return for row in scored] == [0.0, -4.0, -1.0, -1.0]
    origin = {"kind": "sum", "scorers": [LENGTH, UP], "weights": [-1, 2]}
    assert first.labels["scorer"] == scored[0].labels["preference"]["reward"] == origin


@pytest.mark.parametrize(
    ("data", "more", "message"),
    [
        ("pairs", ("--reward_at", "turn"), "reward_at: found turn, expected none for comparisons"),
        (
            "pairs",
            ("--normalise", "rank"),
            "normalise: found rank, expected none for comparisons without --make rewards",
        ),
        ("logs", ("--make", "rewards"), "make: found rewards, expected none for trajectories"),
        ("logs", ("--normalise", "none"), "normalise: found none, expected none for trajectories"),
    ],
)
def test_relabel_refuses_what_the_data_have_no_use_for(command, pairs, tmp_path, data, more, message):
    write_trajectories(tmp_path / "logs.jsonl", [Trajectory((*ASKED, Turn("assistant", "left", reward=-1.0)))])
    settings = ("--scorer", LENGTH, "--output", tmp_path / "new.jsonl")
    code, _, err = command("relabel", tmp_path / f"{data}.jsonl", *settings, *more)
    assert (code, err) == (2, f"error: {message}\n") and not (tmp_path / "new.jsonl").exists()


def test_the_data_are_not_written_over(command, pairs, tmp_path):
    before = pairs.read_bytes()
    ensemble = f"{{kind: ensemble, scorers: [{LENGTH}, {UP}]}}"
    for name, more in (
        ("relabel", (pairs, "--scorer", LENGTH)),
        ("select", (pairs, "--scorer", ensemble)),
        ("relabel", (tmp_path, "--scorer", LENGTH)),
        ("evaluate scorer", (LENGTH, "--data", pairs)),
        ("generate", ("run", "--prompts", pairs)),
    ):
        code, _, err = command(*name.split(), *more, "--output", tmp_path / "x" / ".." / pairs.name)
        assert code == 2 and "which is or is in the input " in err and pairs.read_bytes() == before
    (tmp_path / "there").mkdir()
    code, _, err = command("evaluate", "scorer", LENGTH, "--data", pairs, "--output", tmp_path / "there")
    assert code == 2 and err.startswith("error: output: found the folder ")


def test_several_splits_become_several_files(command, pairs, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_bytes(pairs.read_bytes())
    code, out, _ = command("relabel", folder, "--scorer", LENGTH, "--output", tmp_path / "new")
    assert code == 0 and out == "".join(f"{name}: read: 2\n{name}: written: 2\n" for name in ("train", "validation"))
    assert len(read_comparisons(tmp_path / "new" / "validation.jsonl")) == 2
    code, _, err = command("relabel", folder, "--scorer", LENGTH, "--output", tmp_path / "new.jsonl")
    assert code == 2 and err.endswith("new.jsonl for the splits train, validation, expected a folder\n")
    ensemble = ("--scorer", f"{{kind: ensemble, scorers: [{LENGTH}, {UP}]}}", "--output", tmp_path / "ask.jsonl")
    assert command("select", folder, *ensemble, "--split", "train")[1].startswith("pairs: 2\n")
    _, out, _ = command("evaluate", "scorer", UP, "--data", folder, "--split", "validation")
    assert out.startswith("comparisons: 2\n")
    assert "split: found none chosen, expected one of train, validation" in command("select", folder, *ensemble)[2]


def test_select_writes_what_the_ensemble_disputes(command, pairs, tmp_path):
    ensemble = f"{{kind: ensemble, scorers: [{LENGTH}, {UP}]}}"
    code, out, _ = command("select", pairs, "--scorer", ensemble, "--n", 1, "--output", tmp_path / "ask.jsonl")
    assert code == 0 and out.startswith("pairs: 1\nlargest disagreement: 0.30")  # σ(−2) against σ(1): half of .612
    assert read_comparisons(tmp_path / "ask.jsonl")[0].group == "a"
    code, _, err = command("select", pairs, "--scorer", LENGTH, "--output", tmp_path / "no.jsonl")
    assert code == 2 and "expected an ensemble" in err


def test_evaluate_says_how_often_a_scorer_agrees(command, pairs, tmp_path):
    code, out, _ = command("evaluate", "scorer", UP, "--data", pairs)
    assert code == 0 and "accuracy: 0.750 [" in out and "  the longer reply: 0.250 [" in out
    assert command("evaluate", "scorer", UP, "--data", pairs, "--output", tmp_path / "facts.json")[1] == out
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["pairs"] == 2 and f"accuracy: {facts['accuracy']}" in out
    for more in (("--beta", 4), ("--fqe", 5), ("--environment", "maze")):
        code, _, err = command("evaluate", "scorer", UP, "--data", pairs, *more)
        expected = "found a setting that does not exist, expected one of scorer, data"
        assert code == 2 and err.startswith(f"error: {more[0][2:]}: {expected}")


def test_generate_gives_the_best_of_several_replies_or_abstains(command, run, tmp_path):
    (tmp_path / "prompts.txt").write_text("say it\nsay it\n")
    settings = ("--prompts", tmp_path / "prompts.txt", "--max_new_tokens", 5, "--device", "cpu")

    def replies(*more):
        code, out, err = command("generate", run, *settings, *more)
        assert code == 0, err
        return [json.loads(line)["messages"][-1]["content"] for line in out.splitlines()]

    one, best = replies(), replies("--scorer", LENGTH, "--best_of", 6)
    assert replies("--scorer", LENGTH, "--best_of", 1) == one
    assert sum(map(len, best)) > sum(map(len, one))
    assert replies("--scorer", LENGTH, "--threshold", 1000, "--abstention", "pass") == ["pass", "pass"]
    share = ("--coverage", 0.5, "--held_out", tmp_path / "prompts.txt")
    code, _, err = command("generate", run, *settings, "--scorer", LENGTH, "--abstention", "pass")
    assert code == 2 and err == "error: abstention: found 'pass' alone, expected --threshold or --coverage too\n"
    half = replies("--scorer", LENGTH, "--best_of", 6, "--abstention", "pass", *share)
    # the longer of the two is answered, and both where they are equally long
    assert half == [reply if len(reply) == max(map(len, best)) else "pass" for reply in best]
    for alone in (("--best_of", 4), ("--contexts", f"{__name__}:documents")):
        code, _, err = command("generate", run, *settings, *alone)
        assert code == 2 and err.startswith("error: scorer: missing")
    for more in ((), ("--scorer", LENGTH)):
        code, _, err = command("generate", run, *settings, "--best_of", 0, *more)
        assert (code, err) == (2, "error: best_of: found 0, expected at least 1\n")
    code, _, err = command("generate", run, *settings, "--scorer", LENGTH, *share[:2])
    assert code == 2 and err.startswith("error: coverage: found 0.5 with held_out None")


def test_generate_says_what_was_answered_and_a_reply_that_was_held_back_is_not_read(command, run, tmp_path):
    earlier = [{"role": "user", "content": "say"}, {"role": "assistant", "content": "it"}]
    messages = json.dumps({"messages": [*earlier, {"role": "user", "content": "say it"}]})
    (tmp_path / "prompts.txt").write_text(f"say it\n{messages}\n")
    settings = (
        "--prompts",
        tmp_path / "prompts.txt",
        "--max_new_tokens",
        5,
        "--device",
        "cpu",
        "--scorer",
        LENGTH,
        "--best_of",
        3,
        "--output",
        tmp_path / "replies.jsonl",
    )
    assert "answered" not in command("generate", run, *settings)[2]
    rows = [json.loads(line) for line in (tmp_path / "replies.jsonl").read_text().splitlines()]
    scores = [len(row["messages"][-1]["content"]) for row in rows]
    labels = [json.loads(row["labels"]) for row in rows]
    known = [{name: label[name] for name in ("score", "n", "abstained")} for label in labels]
    assert known == [{"score": score, "n": 3, "abstained": False} for score in scores]
    assert [[turn.is_trainable for turn in row.turns] for row in read_trajectories(tmp_path / "replies.jsonl")] == [
        [False, True],
        [False, False, False, True],
    ]
    code, out, err = command("generate", run, *settings, "--threshold", max(scores))
    answered = scores.count(max(scores))
    assert (code, out) == (0, "") and err.splitlines()[-1] == f"answered {answered} of 2"
    counts = Counter()
    assert len(read_trajectories(tmp_path / "replies.jsonl", counts=counts)) == answered
    assert counts == Counter({ABSTAINED: 2 - answered})
    assert command("generate", run, *settings, "--threshold", 1000)[2].endswith("answered 0 of 2\n")
    code, _, err = command("check", tmp_path / "replies.jsonl")
    assert code == 2 and err.endswith(f"found no row to use ({ABSTAINED}: 2), expected at least one\n")


def test_candidates_read_the_contexts_in_turn_and_the_prompt_stays_as_it_is(command, run, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("say it\n")
    settings = ("--prompts", tmp_path / "prompts.txt", "--max_new_tokens", 3, "--device", "cpu", "--scorer", LENGTH)
    read, reply = [], LanguageSession.reply

    def watched(self, rows, histories, options=None):
        read.extend(" ".join(turn.content for turn in history) for history in histories)
        return reply(self, rows, histories, options)

    monkeypatch.setattr(LanguageSession, "reply", watched)
    contexts = ("--contexts", f"{__name__}:documents")
    code, out, _ = command("generate", run, *settings, "--best_of", 4, *contexts)
    assert code == 0 and read == ["up up say it", "left say it", "say it", "up up say it"]
    assert [turn["content"] for turn in json.loads(out)["messages"][:-1]] == ["say it"]
    code, _, err = command("generate", run, *settings, "--best_of", 2, *contexts)
    assert code == 2 and "error: contexts: found 3, expected 1 to n (2)" in err
    code, _, err = command("generate", run, *settings, "--contexts", f"{__name__}:nothing")
    assert code == 2 and "error: contexts: found " in err and "expected package.module:function" in err


def test_one_command_goes_from_a_folder_of_pairs_to_a_run(command, tmp_path):
    turns = "\n\nHuman: say it {}\n\nAssistant: {}"
    rows = [{"chosen": turns.format(i, "up"), "rejected": turns.format(i, "left")} for i in range(30)]
    source = tmp_path / "harmless-base"
    source.mkdir()
    with gzip.open(source / "train.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    scratch = "{model_type: gpt2, n_layer: 1, n_embd: 8, n_head: 1, n_positions: 96}"
    small = (
        "--model.path",
        "null",
        "--model.lora",
        "null",
        "--model.scratch",
        scratch,
        "--args.max_length",
        96,
        "--args.max_steps",
        1,
        "--args.use_cpu",
        "true",
        "--args.save_strategy",
        "no",
    )
    made = tmp_path / "hh"
    data = (
        "--prepare.input",
        source,
        "--prepare.output",
        made,
        "--data.train",
        made / "train.jsonl",
        "--data.validation",
        made / "validation.jsonl",
    )
    for name in ("reward_model", "ilql", "return_conditioned"):
        code, out, err = command("train", f"preferences/{name}", *data, *small, "--args.output_dir", tmp_path / name)
        assert code == 0, err
        assert out.splitlines()[-1] == str(tmp_path / name)
        again = f"{made / 'train.jsonl'} exists and is not prepared again\n"
        assert (again in err) == (name != "reward_model")
    (tmp_path / "prompts.txt").write_text("say it\n")
    for name in ("ilql", "return_conditioned"):
        best = ("--scorer", tmp_path / "reward_model", "--best_of", 2, "--max_new_tokens", 3, "--device", "cpu")
        code, out, err = command("generate", tmp_path / name, "--prompts", tmp_path / "prompts.txt", *best)
        assert code == 0, err
        assert len(out.splitlines()) == 1
