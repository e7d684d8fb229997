"""Scorers by hand and against the models they read; relabelling; the pairs an ensemble disputes."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml

from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.decoding.scorers import (
    KINDS,
    TOO_LONG,
    Ensemble,
    FunctionScorer,
    LikelihoodScorer,
    RewardModel,
    RuleScorer,
    ValueHeadsScorer,
    drop_too_long,
    fits,
    load_scorer,
    most_disputed,
    regex_rule,
    relabel_comparisons,
    relabel_trajectories,
    sparrow,
    veto,
    weighted_sum,
)
from offline_lmrl.errors import InputError
from offline_lmrl.evaluation.offline import measure_logs
from offline_lmrl.logs.comparison import Comparison
from offline_lmrl.logs.preferences import to_trajectories
from offline_lmrl.logs.protocols import Scorer
from offline_lmrl.logs.trajectory import Trajectory, Turn
from offline_lmrl.models.guided import add_value_heads
from offline_lmrl.models.loading import build_model
from offline_lmrl.models.renderers import rendering_block
from offline_lmrl.models.reward_model import build_reward_model, head_of, rescale_head
from offline_lmrl.models.value_heads import ValueHeadsConfig
from offline_lmrl.tokens.rendering import Renderer
from offline_lmrl.tokens.tokenizers import train_tokenizer
from offline_lmrl.tokens.windows import WindowRule

RENDERER = Renderer(train_tokenizer(["say it", "left right up"], 290))
SPEC = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 64, "initializer_range": 0.2}
ASKED = (Turn("user", "say it"),)


def said(*texts):
    return [(Turn("assistant", text),) for text in texts]


def length(context, option):
    """A scorer in Python."""
    return len(option[-1].content)


ASKED_UP = (ASKED, said("up"))
TWO = {"scorers": [f"{__name__}:length"] * 2}


def fixed(*values):
    """A scorer that says these numbers, one after the other, for the options of each row."""
    return FunctionScorer(lambda context, option: values[int(option[-1].content)])


def reward_model(head="terminal", seed=0):
    torch.manual_seed(seed)
    model = build_reward_model(SPEC, RENDERER.tokenizer, head)
    rescale_head(model, 2.0, 0.5)
    return model


def test_rules_and_functions_give_one_number_per_option():
    with_user = (Turn("assistant", "so"), Turn("user", "http://y"), Turn("assistant", "ok"))
    options = [*said("see http://x", "no"), with_user]
    assert regex_rule("https?://").score(ASKED, options).tolist() == [0.0, 1.0, 1.0]  # what others say breaks no rule
    assert regex_rule("https?://", must=True).score(ASKED, options).tolist() == [1.0, 0.0, 0.0]
    assert load_scorer(f"{__name__}:length").score(ASKED, options).tolist() == [12.0, 2.0, 2.0]


def test_an_ensemble_is_the_mean_less_k_standard_deviations():
    members = [fixed(1.0, 4.0), fixed(3.0, 4.0)]
    assert Ensemble(members).score(ASKED, said("0", "1")).tolist() == [2.0, 4.0]
    assert Ensemble(members, k=0.5).score(ASKED, said("0", "1")).tolist() == [1.5, 4.0]
    with pytest.raises(InputError, match="scorers: found 1"):
        Ensemble(members[:1])


def test_sums_vetoes_and_the_sparrow_formula_by_hand():
    preference, rule, other = fixed(math.log(3), 0.0, 5.0), fixed(1.0, 0.49, 0.0), fixed(0.25, 1.0, 1.0)
    options = said("0", "1", "2")
    total = weighted_sum([preference, rule], [2.0, -1.0]).score(ASKED, options)
    assert total == pytest.approx([2 * math.log(3) - 1, -0.49, 10.0])
    assert veto(preference, [rule], floor=-9.0).score(ASKED, options) == pytest.approx([math.log(3), -9.0, -9.0])
    # ¾ · √(1 · ¼), ½ · √(.49 · 1), and a rule that is surely broken
    assert sparrow(preference, [rule, other]).score(ASKED, options) == pytest.approx([0.375, 0.35, 0.0])
    shifted = sparrow(weighted_sum([preference, fixed(7.0, 7.0, 7.0)]), [rule, other], average=7.0)
    assert shifted.score(ASKED, options) == pytest.approx([0.375, 0.35, 0.0])
    with pytest.raises(InputError, match="rules: found scores from -1 to 1, expected probabilities"):
        sparrow(preference, [fixed(1.0, -1.0, 0.0)]).score(ASKED, options)


def test_a_rule_that_is_read_stands_before_the_dialogue():
    def forbidden(context, option):
        return -math.log(3) if context[0].content.removeprefix("never say ") in option[-1].content else 1000.0

    rule = RuleScorer(FunctionScorer(forbidden), "never say up")
    assert rule.score(ASKED, said("up", "left")) == pytest.approx([0.25, 1.0])
    spec = {
        "kind": "sparrow",
        "preference": f"{__name__}:nought",
        "rules": [{"kind": "rule", "scorer": f"{__name__}:nought", "text": "be brief"}],
    }
    assert load_scorer(spec).score(ASKED, said("up")) == pytest.approx([0.25])


def nought(context, option):
    return 0.0


@pytest.mark.parametrize("head", ["terminal", "turn", "token"])
def test_a_reward_model_scores_what_its_head_reads_and_adds_its_bias_once(head):
    model = reward_model(head)
    scorer = RewardModel(model, RENDERER, WindowRule(max_length=64))
    two_turns = (Turn("assistant", "left"), Turn("user", "say it"), Turn("assistant", "up"))
    found = scorer.score(ASKED, [*said("left"), two_turns])

    def per_token(option):
        parts = [RENDERER.encode_turn(turn) for turn in (*ASKED, *option)]
        ids = [*RENDERER.preamble_of(()), *(token for part in parts for token in part.ids)]
        with torch.no_grad():
            values = head_of(model)(model.base_model(torch.tensor([ids]))[0])[0, :, 0].tolist()
        ends = np.cumsum([len(RENDERER.preamble_of(())), *(len(part.ids) for part in parts)])
        turns = [
            values[start + part.action_start : start + part.action_stop]
            for start, part, turn in zip(ends, parts, (*ASKED, *option), strict=False)
            if turn.role == "assistant"
        ]
        return {"terminal": turns[-1][-1], "turn": sum(turn[-1] for turn in turns), "token": sum(map(sum, turns))}

    assert found == pytest.approx([per_token(option)[head] + 0.5 for option in (said("left")[0], two_turns)], abs=1e-5)
    many = scorer.score_each([(ASKED, said("left right up" * 2, "up")), ((), said("left")), (ASKED, [two_turns])])
    assert [len(scores) for scores in many] == [2, 1, 1] and many[2][0] == pytest.approx(found[1], abs=1e-5)
    with pytest.raises(InputError, match="max_length: found 64, expected enough for each scored reply"):
        scorer.score(ASKED, said("x" * 80))


def test_a_saved_reward_model_is_opened_by_its_folder(tmp_path):
    model = reward_model()
    model.config.offline_lmrl |= {**rendering_block(RENDERER), "window": {"context": None, "max_length": 40}}
    model.save_pretrained(tmp_path)
    RENDERER.tokenizer.save_pretrained(tmp_path)
    scorer = load_scorer({"kind": "reward_model", "run": str(tmp_path), "device": "cpu"})
    expected = RewardModel(model, RENDERER, WindowRule(max_length=40)).score(ASKED, said("left", "up"))
    assert scorer.window.max_length == 40 and scorer.score(ASKED, said("left", "up")) == pytest.approx(expected)
    train_tokenizer(["something else"], 290).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="trained with another tokenizer"):
        load_scorer(str(tmp_path))
    for file in tmp_path.glob("*tok*"):
        file.unlink()
    with pytest.raises(InputError, match=f"{tmp_path}: found no tokenizer files"):
        load_scorer(str(tmp_path))


def judge(utterance=False):
    torch.manual_seed(0)
    model = add_value_heads(build_model(SPEC, RENDERER.tokenizer), ValueHeadsConfig("linear", utterance=utterance))
    for parameter in model.value_heads.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.config.offline_lmrl |= {"reward_scale": {"shift": 0.0, "scale": 4.0, "scored_turns": 0}}
    return LanguagePolicy(model.eval(), RENDERER)


def test_likelihood_and_advantages_are_those_of_the_logs():
    policy = judge()
    options = said("left", "up and right")
    steps = measure_logs(policy, [Trajectory((*ASKED, *option)) for option in options])
    of = [steps.trajectory == i for i in range(2)]
    expected = [steps.log_prob[mine].sum() for mine in of]
    assert LikelihoodScorer(policy).score(ASKED, options) == pytest.approx(expected, abs=1e-4)
    expected = [steps.log_prob[mine].mean() for mine in of]
    assert LikelihoodScorer(policy, mean=True).score(ASKED, options) == pytest.approx(expected, abs=1e-4)
    expected = [(steps.q - steps.v)[mine].sum() for mine in of]
    assert abs(expected[0] - expected[1]) > 0.1
    assert ValueHeadsScorer(policy).score(ASKED, options) == pytest.approx(expected, abs=1e-4)
    with pytest.raises(InputError, match="utterance_weight"):
        ValueHeadsScorer(policy, "utterance")
    policy.model.value_heads = None
    for of in ("advantage", "utterance"):
        with pytest.raises(InputError, match="without value heads"):
            ValueHeadsScorer(policy, of)


def test_the_utterance_head_is_read_behind_the_closing_token():
    policy = judge(utterance=True)
    ids = [
        *RENDERER.preamble_of(()),
        *(token for turn in (*ASKED, Turn("assistant", "up")) for token in RENDERER.encode_turn(turn).ids),
    ]
    assert ids[-1] == RENDERER.close_id
    with torch.no_grad():
        _, hidden = policy.model.forward_with_hidden(input_ids=torch.tensor([ids]))
        q = policy.model.value_heads.utterance_target_q(hidden[:, -1]).min().item()
    assert ValueHeadsScorer(policy, "utterance").score(ASKED, said("up", "left"))[0] == pytest.approx(
        4.0 * q, abs=1e-4
    )
    with pytest.raises(InputError, match="no turn of the agent"):
        ValueHeadsScorer(policy, "utterance").score(ASKED, [[Turn("user", "up")], *said("left")])


def test_scorers_are_made_from_nested_mappings_and_from_files(tmp_path):
    rules = [{"kind": "regex", "pattern": "up"}]
    spec = {"kind": "veto", "preference": f"{__name__}:length", "rules": rules, "floor": -1.0}
    (tmp_path / "scorer.yaml").write_text(yaml.safe_dump(spec))
    assert load_scorer(tmp_path / "scorer.yaml").score(ASKED, said("up", "left")).tolist() == [-1.0, 4.0]
    both = load_scorer({"kind": "sum", "scorers": [spec, f"{__name__}:length"], "weights": [1.0, 0.5]})
    assert both.score(ASKED, said("up", "left")).tolist() == [0.0, 6.0]


def test_a_file_that_names_itself_is_refused(tmp_path):
    file = tmp_path / "scorer.yaml"
    file.write_text(json.dumps({"kind": "ensemble", "scorers": [str(file), str(file)]}))
    with pytest.raises(InputError, match="scorer.yaml: found a scorer that contains itself"):
        load_scorer(file)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"kind": "regexp", "pattern": "x"}, "scorer.kind: found 'regexp', expected one of reward_model, "),
        ({"kind": "regex", "pattern": "("}, "pattern: found .*expected a regular expression"),
        (
            {"kind": "regex", "pattern": "x", "most": True},
            "scorer.most: found a setting that does not exist; did you mean 'scorer.must'",
        ),
        ({"kind": "veto", "rules": []}, "scorer.preference: missing"),
        ("tests.decoding.test_scorers:nothing", "scorer.function: .*expected package.module:function"),
        ("nowhere.yaml", "^scorer: nowhere.yaml: found No such file or directory, expected a YAML file of a scorer"),
        ("{kind: [regex]}", "scorer.kind: found .'regex'., expected one of reward_model, "),
        ("{kind: regex, pattern: 5}", "scorer.pattern: found 5, expected text"),
        ("{kind: regex, pattern: x, must: maybe}", "scorer.must: found 'maybe', expected true or false"),
        ("{kind: python, function: 3}", "scorer.function: found 3, expected text"),
        ("{kind: reward_model, run: null}", "scorer.run: found null, expected text"),
        ("{kind: ensemble, scorers: runs/a}", "scorer.scorers: found 'runs/a', expected a list"),
        ({**TWO, "kind": "ensemble", "k": "nan"}, "scorer.k: found 'nan', expected a finite number"),
        ({**TWO, "kind": "ensemble", "k": math.nan}, "scorer.k: found nan, expected a finite number"),
        ({**TWO, "kind": "sum", "weights": ["a", "b"]}, r"scorer.weights\[0\]: found 'a', expected a finite number"),
        ({**TWO, "kind": "sum", "weights": [1]}, "weights: found 1 for 2 scorers"),
        ({**TWO, "kind": "sum", "weights": 3}, "scorer.weights: found 3, expected a list"),
        ("os:environ", "os:environ: found _Environ, expected a function of .context, option"),
        (
            "{kind: reward_model, run: runs/a, device: gpu}",
            "device: found 'gpu' .*, expected a device of torch, such as",
        ),
    ],
)
def test_a_scorer_that_cannot_be_made_is_an_error_in_one_line(spec, message):
    with pytest.raises(InputError, match=message):
        load_scorer(spec)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            "math:sqrt",
            "math:sqrt: raised TypeError: .*2 given.*, expected a number for .context, option., here for 'up'",
        ),
        (f"{__name__}:nothing_said", "nothing_said: found None, expected a number"),
        (f"{__name__}:praise", "praise: found '3.5', expected a number"),
    ],
)
def test_a_function_that_gives_no_number_is_an_error_in_one_line(function, message):
    with pytest.raises(InputError, match=message):
        load_scorer(function).score(ASKED, said("up"))


def nothing_said(context, option):
    pass


def praise(context, option):
    return "3.5"


def test_numbers_of_other_libraries_and_truth_values_are_scores():
    for value in (torch.tensor(1.0), np.float32(1), np.bool_(True), True, 1):
        assert FunctionScorer(lambda context, option, value=value: value).score(ASKED, said("up")).tolist() == [1.0]


def test_comparisons_get_the_scorers_target_and_keep_the_old_one():
    row = Comparison(ASKED, tuple(said("0", "1", "2")), (1.0, 0.0, 0.0), labels={"strength": 2.0, "note": "x"})
    (made,) = relabel_comparisons([row], fixed(0.0, math.log(2), 0.0))
    assert made.target == pytest.approx((0.25, 0.5, 0.25)) and made.ranking == ((1,), (0, 2))
    scores = [0.0, math.log(2), 0.0]
    assert made.labels == {"note": "x", "scores": scores, "scorer": "FunctionScorer", "target": [1.0, 0.0, 0.0]}
    assert (made.options, made.context) == (row.options, row.context)


def test_trajectories_get_scores_as_rewards_and_keep_what_was_logged():
    turns = (*ASKED, Turn("assistant", "left", reward=1.0), Turn("user", "on"), Turn("assistant", "up"))
    context = FunctionScorer(lambda context, option: 100 * len(context) + sum(len(turn.content) for turn in option))
    (whole,) = relabel_trajectories([Trajectory(turns, group="g")], context)
    assert [turn.reward for turn in whole.turns] == [None, None, None, 108.0]  # "left", "on", "up" behind one turn
    assert whole.labels["rewards"] == [1.0, None] and whole.group == "g"
    (dense,) = relabel_trajectories([Trajectory(turns)], context, "turn")
    assert [turn.reward for turn in dense.turns] == [None, 104.0, None, 4.0]  # what "on" and "up" add
    assert [turn.content for turn in dense.turns] == [turn.content for turn in turns]


def test_rows_keep_what_their_scorer_was_made_from(tmp_path):
    one = {"kind": "sum", "scorers": [f"{__name__}:length"] * 2, "weights": [1.0, 0.5]}
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(one))
    row = Comparison(ASKED, tuple(said("up", "left")), (1.0, 0.0))
    for given, origin in (
        (f"{__name__}:length",) * 2,
        (one, one),
        (yaml.safe_dump(one, default_flow_style=True), one),
        (tmp_path / "one.yaml", one),
        (
            {"kind": "sum", "scorers": [tmp_path / "one.yaml"] * 2},
            {"kind": "sum", "scorers": [str(tmp_path / "one.yaml")] * 2},
        ),
    ):
        scorer = load_scorer(given)
        rows = [
            *relabel_comparisons([row], scorer),
            *relabel_trajectories([Trajectory(row.context + row.options[0])], scorer),
        ]
        assert [made.labels["scorer"] for made in rows] == [origin] * 2
        assert {json.dumps(made.labels["preference"]["reward"]) for made in to_trajectories([row], scorer)} == {
            json.dumps(origin)
        }


def test_what_is_longer_than_the_window_is_left_out_and_counted():
    scorer = RewardModel(reward_model(), RENDERER, WindowRule(max_length=16))
    short, long = (Trajectory((*ASKED, *option)) for option in said("up", "left right up " * 9))
    counts = Counter()
    made = relabel_trajectories([long, short], scorer, counts=counts)
    assert [row.turns[-1].content for row in made] == ["up"] and counts == {TOO_LONG: 1}
    pair = Comparison(ASKED, tuple(said("up", "left right up " * 9)), (1.0, 0.0))
    other = Comparison(ASKED, tuple(said("up", "left")), (1.0, 0.0))
    joint = weighted_sum([Ensemble([scorer, fixed(1.0)]), RuleScorer(scorer, "a")])
    for judge in (scorer, joint):
        assert drop_too_long([pair, other], judge, counts) == [other]
    assert counts == {TOO_LONG: 3} and fits(fixed(1.0), pair.context, pair.options)
    assert fits(scorer, *ASKED_UP) and not fits(RuleScorer(scorer, "left right up " * 9), *ASKED_UP)
    with pytest.raises(InputError, match="found none that fits into the scorer's window"):
        drop_too_long([pair], scorer, counts)


def test_the_pairs_that_an_ensemble_disputes_come_first():
    agreed = Comparison(ASKED, tuple(said("0", "1")), (1.0, 0.0), group="agreed")
    disputed = Comparison(ASKED, tuple(said("2", "3", "4")), (1.0, 0.0, 0.0), group="disputed")
    members = Ensemble([fixed(0.0, 1.0, 0.0, 0.0, 1.0), fixed(0.0, 1.0, 0.0, 3.0, 1.0)])
    first, second = most_disputed([agreed, disputed], members, 5)
    # between options 3 and 4 one says σ(−1) = .2689, the other σ(2) = .8808; half the difference
    assert [turn[0].content for turn in first.options] == ["3", "4"]
    assert first.labels["disagreement"] == pytest.approx((0.8808 - 0.2689) / 2, abs=1e-4)
    assert second.group == "agreed" and second.labels["disagreement"] == 0.0
    assert most_disputed([agreed, disputed], members, 1) == [first]


def random_trajectories(n, seed):
    """One to five agent turns, some in a row, behind no prompt or one that may hold a reply that is not to be scored;
    some end with a reply to the agent."""
    rng, made = np.random.default_rng(seed), []
    for _ in range(n):
        roles = list(rng.choice(["system", "user"], rng.integers(3)))
        if rng.random() < 0.5:
            roles += ["assistant", "user"]
        prompt = [Turn(role, str(rng.choice(["say it", "on and on"])), trainable=False) for role in roles]
        turns = []
        for _ in range(rng.integers(1, 6)):
            turns += [Turn("assistant", str(rng.choice(["up", "left", "right up", ""]))), Turn("user", "on")]
            turns = turns[: len(turns) - rng.integers(2)]
        made.append(Trajectory((*prompt, *turns)))
    return made


def placed(head, normalise, context=None):
    """A reward model with the scores of some random replies normalised, in a window that drops turns of prompts."""
    model = build_reward_model(SPEC, RENDERER.tokenizer, head)
    scorer = RewardModel(model, RENDERER, WindowRule(context, max_length=40))
    raw = [row.total_return for row in relabel_trajectories(random_trajectories(40, seed=100), scorer)]
    if normalise != "none":
        gain = 1.0 / np.std(raw) if normalise == "standard" else 1.0
        rescale_head(model, gain, -gain * float(np.mean(raw)))
    return scorer


@pytest.mark.parametrize("normalise", ["none", "centre", "standard"])
@pytest.mark.parametrize(
    ("head", "context"), [("terminal", None), ("turn", None), ("token", None), ("turn", 1), ("token", 2)]
)
def test_rewards_of_turns_add_up_to_the_score_of_the_whole(head, context, normalise):
    torch.manual_seed(0)
    scorer, counts = placed(head, normalise, context), [Counter(), Counter()]
    trajectories = random_trajectories(60, seed=1)
    whole = relabel_trajectories(trajectories, scorer, "end", counts[0])
    dense = relabel_trajectories(trajectories, scorer, "turn", counts[1])
    assert counts[0] == counts[1] and len(whole) == len(dense) > 40
    roomy = RewardModel(scorer.model, RENDERER, WindowRule(context, max_length=64))
    again = relabel_trajectories([replace(row, labels={}) for row in whole], roomy)
    lost = [abs(one.total_return - other.total_return) > 1e-3 for one, other in zip(whole, again, strict=True)]
    assert any(lost) == (context is None)  # turns of prompts; behind two turns at most all of them fit
    for one, many in zip(whole, dense, strict=True):
        assert many.total_return == pytest.approx(one.total_return, abs=1e-5)
        assert all((turn.reward is not None) == turn.is_trainable for turn in many.turns)


def test_rewards_of_turns_add_up_for_every_combination_of_scorers():
    torch.manual_seed(0)
    heads = [placed(head, "standard") for head in ("terminal", "turn", "token")]
    policy = judge()
    values = ValueHeadsScorer(LanguagePolicy(policy.model, RENDERER, max_length=40))
    rules = [regex_rule("right"), RuleScorer(heads[0], "be brief")]
    trajectories = random_trajectories(20, seed=2)
    for scorer in (
        Ensemble(heads, k=0.7),
        Ensemble([weighted_sum(heads[:2]), heads[2]]),
        values,
        LikelihoodScorer(policy),
        weighted_sum([*heads, values], [1.0, -2.0, 0.5, 3.0]),
        veto(heads[1], rules[:1], floor=-4.0),
        sparrow(heads[2], rules),
        FunctionScorer(lambda context, option: len(option) ** 2),
    ):
        whole, dense = (relabel_trajectories(trajectories, scorer, place) for place in ("end", "turn"))
        assert [row.total_return for row in dense] == pytest.approx([row.total_return for row in whole], abs=1e-5)


def test_the_shift_of_normalisation_is_earned_once_in_equal_parts():
    torch.manual_seed(0)
    scorer, trajectories = placed("token", "centre"), random_trajectories(20, seed=3)
    both = weighted_sum([scorer, Ensemble([scorer, FunctionScorer(lambda context, option: 0.0)])], [2.0, 4.0])
    kept = veto(scorer, [FunctionScorer(lambda context, option: 1.0)], floor=0.0)
    found = [relabel_trajectories(trajectories, one, "turn") for one in (scorer, both, kept)]
    assert [[turn.reward for turn in row.turns] for row in found[2]] == [
        [turn.reward for turn in row.turns] for row in found[0]
    ]
    bias = scorer.model.config.offline_lmrl["reward"]["bias"]
    rescale_head(scorer.model, 1.0, 0.0)
    both = weighted_sum([scorer, Ensemble([scorer, FunctionScorer(lambda context, option: 0.0)])], [2.0, 4.0])
    for made, one, shift in zip(found[:2], (scorer, both), (bias, 4 * bias), strict=True):
        for shifted, bare in zip(made, relabel_trajectories(trajectories, one, "turn"), strict=True):
            parts = [a.reward - b.reward for a, b in zip(shifted.turns, bare.turns, strict=True) if a.is_trainable]
            assert parts == pytest.approx([shift / len(parts)] * len(parts), abs=1e-5) and abs(bias) > 0.1


def test_what_is_no_sum_over_turns_is_earned_where_it_is_added():
    turns = [Turn("user", "say it"), Turn("assistant", "up"), Turn("user", "on"), Turn("assistant", "up")]
    (made,) = relabel_trajectories([Trajectory(tuple(turns))], FunctionScorer(lambda context, option: -1.5), "turn")
    assert [turn.reward for turn in made.turns if turn.is_trainable] == [-1.5, 0.0]


def long_enough(words: int, scorers: Sequence[Scorer], names: Sequence[str] = ()) -> FunctionScorer:
    return FunctionScorer(lambda context, option: float(len(option[-1].content.split()) >= words))


def test_a_new_kind_is_typed_by_its_annotations(monkeypatch):
    monkeypatch.setitem(KINDS, "long_enough", long_enough)
    inner = [{"kind": "regex", "pattern": "x"}]
    scorer = load_scorer({"kind": "long_enough", "words": 2, "scorers": inner, "names": ["a"]})
    assert scorer.score(ASKED, said("up", "up and left")).tolist() == [0.0, 1.0]
    for wrong, message in (
        ({"words": "two", "scorers": inner}, "scorer.words: found 'two', expected a whole number"),
        ({"words": True, "scorers": inner}, "scorer.words: found True, expected a whole number"),
        ({"words": 2, "scorers": [3]}, "scorer.kind: found 3"),
        ({"words": 2, "scorers": inner, "names": [4]}, r"scorer.names\[0\]: found 4, expected text"),
    ):
        with pytest.raises(InputError, match=message):
            load_scorer({"kind": "long_enough", **wrong})
