"""The comparison of an export with its run: its prompts, measures and bounds, with values worked by hand."""

import json
from dataclasses import replace

import pytest
import yaml

from offline_lmrl.decoding.config import DecodingConfig
from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.errors import InputError
from offline_lmrl.export import beside
from offline_lmrl.export.beside import Beside, Replies, Row, Trial
from offline_lmrl.export.forms import FORMS, make_form, samples_alike
from offline_lmrl.export.plain import Plain
from offline_lmrl.export.playing import GeneratePlayer, until_end
from offline_lmrl.export.prompts import HeldOut, Prompts, encode_prompts, find_prompts
from offline_lmrl.export.run import _require_bounds, export_run
from offline_lmrl.models.step_outputs import compute_step_outputs
from offline_lmrl.tokens.batching import token_rows
from tests.export.test_plain import HISTORY, PROMPTS, told_run, valued_run


def texts(prompts):
    return [[turn.content for turn in turns] for turns in prompts.histories]


def test_prompts_are_the_contexts_of_the_validation_data_else_of_the_training_data(tmp_path):
    def write(name, *rows):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    user, agent = ({"role": role, "content": role} for role in ("user", "assistant"))
    train = write(
        "train.jsonl", {"messages": [user, agent | {"reward": 2.0}, {"role": "user", "content": "b"}, agent]}
    )
    held_out = write("held.jsonl", *[{"prompt": f"p{i % 3}", "chosen": "c", "rejected": "r"} for i in range(9)])
    config = {"data": {"train": train, "validation": held_out}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    found = find_prompts(tmp_path, HeldOut())
    assert texts(found) == [["p0"], ["p1"], ["p2"]]  # each context once
    assert found.source == f"the run's validation data {held_out}"
    assert len(find_prompts(tmp_path, HeldOut(n=2)).histories) == 2
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": {"train": train, "validation": None}}))
    found = find_prompts(tmp_path, HeldOut())
    assert texts(found) == [["user", "assistant", "b"]] and found.source == f"the run's training data {train}"
    assert all(turn.reward is None for turn in found.histories[0])
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    assert texts(find_prompts(tmp_path, HeldOut(str(tmp_path / "prompts.txt")))) == [["one"], ["two"]]


@pytest.mark.parametrize(
    "config, prompts, said",
    [
        (None, None, "prompts: missing, as the config of .* names no data .*; give --prompts FILE"),
        ({"data": {"train": None}}, None, "prompts: missing, .* give --prompts FILE"),
        ({"data": 3}, None, "prompts: missing, .* give --prompts FILE"),
        (
            {"data": {"train": "gone.jsonl"}},
            None,
            r"prompts: the run's data.train cannot be read .*give --prompts FILE",
        ),
        (None, [], "prompts: found none in prompts of the caller; give --prompts FILE"),
        (None, "gone.txt", "prompts: found no file gone.txt, expected one; give --prompts FILE"),
    ],
)
def test_no_prompts_is_one_line_that_names_the_setting(tmp_path, config, prompts, said):
    if config:
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(InputError, match=said):
        find_prompts(tmp_path, HeldOut(prompts))


def test_a_reply_ends_with_the_first_id_that_ends_one():
    assert until_end([5, 2, 0, 0], [2]) == [5, 2] and until_end([5, 5], [2]) == [5, 5]


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    run = valued_run(tmp_path_factory.mktemp("run") / "run")
    policy = LanguagePolicy.load(run, device="cpu", max_new_tokens=5)
    ids = encode_prompts(policy, PROMPTS, None)
    greedy = Plain().greedy(policy.decoding)
    return Trial(policy, Prompts("tests", PROMPTS), ids, greedy, policy.decoding)


def test_equal_replies_are_identical_and_others_are_judged_by_the_first_difference(trial, monkeypatch):
    (best,) = beside.RunPlayer(trial.policy).play([trial.ids[0].asked], trial.greedy, 0)
    rest = [[3], [4]]
    same = trial.identical([best, *rest], [best, *rest])
    assert (same.export, same.met) == (1.0, True)
    other = trial.identical([best, *rest], [[best[0], best[1] + 1], *rest])
    assert other.export == pytest.approx(2 / 3) and other.met is False and "found up to" in other.bound
    shorter = trial.identical([best, *rest], [best[:1], *rest])
    assert shorter.met is False and "up to inf" in shorter.bound
    monkeypatch.setattr(beside, "LARGEST_GAP", 1e9)
    assert trial.identical([best, *rest], [[best[0], best[1] + 1], *rest]).met  # rounding may choose the second best


def test_a_reply_that_parts_at_a_near_tie_has_to_take_one_of_the_near_tokens(trial, monkeypatch):
    ids, greedy = trial.ids[0].asked, trial.greedy
    found = compute_step_outputs(
        trial.policy.model,
        token_rows([ids], [[len(ids) - 1]]),
        measure=lambda states: {"log_prob": states.distribution(greedy)},
    )
    log_prob = found.measured["log_prob"][0]
    best, second, third = log_prob.argsort()[::-1][:3].tolist()
    monkeypatch.setattr(beside, "LARGEST_GAP", float(log_prob[best] - log_prob[[second, third]].mean()))
    rest = [[3], [4]]
    assert trial.identical([[best], *rest], [[second], *rest]).met
    assert trial.identical([[best], *rest], [[third], *rest]).met is False


def test_a_bound_that_too_few_prompts_judge_needs_force_or_more_of_them():
    undecided = Row(beside.REWARD, 0.5, 0.6, (0.1, -0.2, 0.4), 1.0, 50, "difference within ± 0.05")
    free = replace(undecided, bound="")
    found = (
        r"^export: found reward with export − run \+0.1 \[-0.2, \+0.4\], expected difference within ± 0.05: nothing "
    )
    with pytest.raises(InputError, match=found + "is written; give more prompts .*--n NUMBER.*; --force"):
        _require_bounds(Beside("prompts", 50, [free, undecided]), force=False)
    _require_bounds(Beside("prompts", 50, [free, undecided]), force=True)
    _require_bounds(Beside("prompts", 50, [free, replace(undecided, met=True)]), force=False)


def test_measures_are_means_over_prompts_of_what_the_run_says(trial):
    policy, decoding = trial.policy, trial.decoding
    drawn = beside.RunPlayer(policy).play([prompt.asked for prompt in trial.ids], decoding, 1)
    found = trial._measured(drawn)
    for i, reply in enumerate(policy.sampler.sample([prompt.asked for prompt in trial.ids], range(1, 4))):
        assert list(reply.token_ids) == drawn[i]
        assert found[beside.LOG_PROB][i] == pytest.approx(sum(reply.log_prob) / len(reply.log_prob), abs=1e-4)
        assert found[beside.LENGTH][i] == len(drawn[i]) and found[beside.UNFINISHED][i] == (not reply.closed)
    stopped = trial.policy.renderer.tokenizer.encode("left right", add_special_tokens=False)
    form = DecodingConfig(stop=("right",))
    text = Trial(policy, trial.prompts, trial.ids, trial.greedy, form)
    measured = text._measured([stopped] * 3)
    assert measured[beside.UNFINISHED].tolist() == [0, 0, 0]  # a stop text ends a reply


def test_replies_are_compared_up_to_a_stop_text_at_which_only_some_exports_end_them(trial):
    tokens = [trial.policy.renderer.tokenizer.encode(text, add_special_tokens=False) for text in ("left", " right")]
    stopped = replace(trial, decoding=replace(trial.decoding, stop=("left",)))
    longer, ended = Replies([sum(tokens, [])] * 3, []), Replies([tokens[0]] * 3, [])
    longer, ended = (replace(one, drawn=one.greedy) for one in (longer, ended))
    for one, keep in ((stopped, True), (trial, False)):
        row = one.compare(longer, ended, lambda row: row).rows[0]
        assert (row.export, row.met) == (float(keep), keep)


def test_only_a_difference_far_outside_chance_misses_the_bound_of_sampled_replies():
    def judged(mean, half, n=50):
        return samples_alike(Row(beside.LOG_PROB, -1.0, -1.0 + mean, (mean, mean - half, mean + half), 1.0, n)).met

    assert judged(0.19, 0.1) is True and judged(0.21, 0.1) is False and judged(float("-inf"), float("nan")) is False
    assert judged(0.3, 0.1, n=3) is None
    assert samples_alike(Row(beside.LENGTH, 1.0, 9.0, (8.0, 7.0, 9.0), 1.0, 50)).met is None


def test_an_export_that_plays_otherwise_is_written_by_force_alone(tmp_path, monkeypatch):
    run = valued_run(tmp_path / "run", temperature=0.0)
    honest = GeneratePlayer.play

    def other(self, prompts, decoding, seed):
        return [[reply[0] + 1, *reply[1:]] for reply in honest(self, prompts, decoding, seed)]

    monkeypatch.setattr(GeneratePlayer, "play", other)
    settings = {"held_out": HeldOut(PROMPTS), "max_new_tokens": 4}
    with pytest.raises(InputError, match="^export: found identical greedy replies 0, expected 1, or .*--force"):
        export_run(run, tmp_path / "plain", **settings)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    report = export_run(run, tmp_path / "plain", force=True, **settings)
    assert "NOT MET" in str(report) and "by force" in (tmp_path / "plain" / "README.md").read_text()
    stored = json.loads((tmp_path / "plain" / "export.json").read_text())
    assert stored["rows"][0] | {"bound": ""} == {
        "name": "identical greedy replies", "run": None, "export": 0.0, "difference": None, "spread": None, "n": 3,
        "bound": "", "met": False,
    }  # fmt: skip
    assert stored["prompts"] == 3 and stored["source"] == "prompts of the caller"


def test_a_scorer_rewards_the_replies_of_both(tmp_path, monkeypatch):
    (tmp_path / "rewards.py").write_text(
        "def length(context, reply):\n    return len(context) + len(reply[-1].content)\n"
    )
    monkeypatch.chdir(tmp_path)
    run = valued_run(tmp_path / "run", temperature=0.0)
    report = export_run(run, tmp_path / "plain", held_out=HeldOut(PROMPTS, "rewards:length"), max_new_tokens=4)
    (row,) = [row for row in report.beside.rows if row.name == beside.REWARD]
    policy = LanguagePolicy.load(run, max_new_tokens=4)
    replies = policy.start(range(3)).reply(range(3), PROMPTS)
    expected = sum(len(history) + len(reply.text) for history, reply in zip(PROMPTS, replies, strict=True)) / 3
    assert row.run == row.export == pytest.approx(expected) and row.difference == (0.0, 0.0, 0.0)


def test_prompts_of_a_run_with_returns_request_one_or_none(tmp_path):
    policy = LanguagePolicy.load(told_run(tmp_path / "run"), device="cpu", ask=None)
    tokens = policy.return_tokens
    for ask, ids in ((None, tokens.null), (3.0, tokens.ids(3.0)), ("max", tokens.bins[-1]), ("auto", tokens.bins[-1])):
        (found,) = encode_prompts(policy, [HISTORY], ask)
        place = [i for i, pair in enumerate(zip(found.asked, found.null, strict=True)) if pair[0] != pair[1]]
        assert [found.asked[i] for i in place] == ([] if ask is None else list(ids)) and tokens.null[0] in found.null


def test_a_form_and_its_settings_are_named():
    assert make_form("plain") == Plain() and set(FORMS) >= {"plain"}
    with pytest.raises(InputError, match="^to: found 'plane', expected one of plain.*plain"):
        make_form("plane")
    with pytest.raises(InputError, match="^form.python"):
        make_form("plain", {"python": "x"})
