"""Warpers, terms and their sum against tables worked out by hand, and against the formula spelt out."""

import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from offline_lmrl.decoding.distribution import (
    Form,
    ModelOutputs,
    ReturnTerm,
    ValueTerm,
    condition_shift,
    filter_policy,
    lookup_in,
    next_token,
    reduce_q,
    support_filter,
)
from offline_lmrl.ops.decoding import sample_from

PROB = torch.tensor([[0.5, 0.25, 0.125, 0.1, 0.025]])
LOGITS = PROB.log() + 3.0  # unnormalised: the constant must not matter


def warped(**options):
    return filter_policy(LOGITS, Form(**options)).softmax(-1)


def test_no_warper_gives_the_policy():
    assert_close(warped(), PROB)


def test_temperature_two_takes_the_square_root():
    root = [0.70711, 0.5, 0.35355, 0.31623, 0.15811]  # square roots; their sum is 2.03500
    assert_close(warped(temperature=2.0), torch.tensor([[x / 2.03500 for x in root]]), atol=1e-4, rtol=0)


def test_temperature_zero_is_taken_as_one():
    assert_close(warped(temperature=0.0), PROB)


def test_top_k_keeps_k_and_renormalises():
    assert_close(warped(top_k=2), torch.tensor([[2 / 3, 1 / 3, 0, 0, 0]]))
    assert_close(warped(top_k=99), PROB)


@pytest.mark.parametrize("top_p, kept", [(0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3), (1e-9, 1), (5e-324, 1), (1.0, 5)])
def test_top_p_keeps_the_smallest_set_that_holds_the_mass(top_p, kept):
    # cumulative mass: .5 .75 .875 .975 1
    assert (warped(top_p=top_p) > 0).sum() == kept


def test_top_p_does_not_depend_on_the_order_of_tokens():
    order = torch.tensor([3, 0, 4, 2, 1])
    shuffled = filter_policy(LOGITS[:, order], Form(top_p=0.8)).softmax(-1)
    assert_close(shuffled, warped(top_p=0.8)[:, order])


def test_min_p_is_a_share_of_the_best_after_temperature():
    # shares of the best: 1 .5 .25 .2 .05; at temperature ½ they are squared: 1 .25 .0625 .04 .0025
    assert_close(warped(min_p=0.22), torch.tensor([[4 / 7, 2 / 7, 1 / 7, 0, 0]]))
    assert (warped(min_p=0.22, temperature=0.5) > 0).sum() == 2


def test_support_is_a_share_of_the_best_before_temperature():
    assert (warped(support=0.22) > 0).sum() == 3
    assert (warped(support=0.22, temperature=0.5) > 0).sum() == 3
    assert (warped(support=1.0) > 0).sum() == 1


def test_support_filter_leaves_the_survivors_as_they_are():
    kept = support_filter(LOGITS, 0.3)
    assert_close(kept, torch.tensor([[3 + math.log(0.5), 3 + math.log(0.25), -math.inf, -math.inf, -math.inf]]))


def test_filters_apply_after_one_another():
    # top-k 3 renormalises to 4/7 2/7 1/7; top-p .8 of that keeps two (.571 .857)
    assert_close(warped(top_k=3, top_p=0.8), torch.tensor([[2 / 3, 1 / 3, 0, 0, 0]]))


def test_forbidden_tokens_stay_forbidden():
    logits = LOGITS.clone()
    logits[0, 0] = -math.inf
    assert_close(filter_policy(logits, Form(top_k=2)).softmax(-1), torch.tensor([[0, 2 / 3, 1 / 3, 0, 0]]))


Q = torch.tensor([[[1.0, 4.0, 2.0]], [[3.0, 0.0, 2.0]]])  # (H 2, B 1, V 3)


@pytest.mark.parametrize("how, expected", [("min", [1, 0, 2]), ("mean", [2, 2, 2]), ("first", [1, 4, 2])])
def test_q_heads_are_reduced(how, expected):
    assert_close(reduce_q(Q, how), torch.tensor([expected], dtype=torch.float32))


def test_unknown_reduction_names_the_choices():
    with pytest.raises(ValueError, match="max.*min, mean, first"):
        reduce_q(Q, "max")


def test_a_condition_is_amplified_away_from_null():
    told, null = torch.tensor([0.6, 0.3, 0.1]).log(), torch.tensor([0.2, 0.3, 0.5]).log()
    # w = 1: .6² / .2, .3² / .3, .1² / .5 are 1.8, .3, .02
    expected = torch.tensor([1.8, 0.3, 0.02]) / 2.12
    assert_close((null + condition_shift(told + 5, null - 2, 1.0)).softmax(-1), expected)
    assert_close(null + condition_shift(told, null, 0.0), told)
    # at temperature 1/2, w = 0: the square of what the condition gives
    cold = (2 * null + condition_shift(told, null, 0.0, 0.5)).softmax(-1)
    assert_close(cold, torch.tensor([0.36, 0.09, 0.01]) / 0.46)
    assert_close(condition_shift(told, null, 1.0, 0.0), condition_shift(told, null, 1.0))


def outputs_of(q=Q, v=0.5):
    """The functions of a model whose Q (H, B, V) is a table, and whose V is the same in all states."""
    return ModelOutputs(
        q=lambda ids: q if ids is None else q.gather(-1, ids.expand(len(q), *ids.shape)),
        v=lambda: torch.full(q.shape[1:-1], v),
    )


def test_guidance_adds_beta_times_the_advantage():
    # min Q = 1 0 2, at tokens 2 and 0: 2 1
    assert_close(ValueTerm(2.0)(outputs_of(), None), torch.tensor([[2.0, 0.0, 4.0]]))
    assert_close(ValueTerm(2.0)(outputs_of(), torch.tensor([[2, 0]])), torch.tensor([[4.0, 2.0]]))


def test_clip_zero_only_punishes():
    # min Q − V = .5 -.5 1.5, capped at 0: 0 -.5 0
    assert_close(ValueTerm(2.0, clip=0.0)(outputs_of(), None), torch.tensor([[0.0, -1.0, 0.0]]))
    with pytest.raises(ValueError, match="v is None"):
        ValueTerm(2.0, clip=0.0)(ModelOutputs(q=outputs_of().q), None)


def test_beta_may_differ_per_row():
    term = ValueTerm(torch.tensor([[0.0], [1.0]]), q_reduce="first")
    assert_close(term(outputs_of(Q.expand(2, 2, 3)), None), torch.tensor([[0.0, 0.0, 0.0], [1.0, 4.0, 2.0]]))


def test_a_return_term_is_the_shift_at_the_candidates_and_0_without_a_request():
    conditional, null = torch.tensor([[0.6, 0.3, 0.1]]).log(), torch.tensor([[0.2, 0.3, 0.5]]).log()
    # w = 1, T = ½: 4 · (log .1 − log .5), 4 · (log .6 − log .2)
    expected = torch.tensor([[4 * math.log(0.2), 4 * math.log(3)]])
    outputs = ModelOutputs(conditional=conditional + 5, null=null - 2)
    assert_close(ReturnTerm(1.0, 0.5)(outputs, torch.tensor([[2, 0]])), expected)
    assert ReturnTerm(1.0)(ModelOutputs(), None) == 0.0


# The formula


def test_settings_switch_terms_on():
    assert Form(candidates=2, clip=0.0).terms() == []
    assert Form(beta=2.0, clip=0.0, temperature=0.5).terms() == [ReturnTerm(0.0, 0.5), ValueTerm(2.0, "min", 0.0)]
    assert Form(condition_scale=1.0).terms() == [ReturnTerm(1.0)]
    assert len(Form(beta=torch.zeros(2, 1)).terms()) == 2


def test_terms_are_added_to_the_survivors_at_the_temperature():
    # squares of .5 .25 .125 over the support .2: 16 4 1; min Q = 1 0 2; β = ln 2 doubles per unit: 32 4 4
    logits, form = torch.tensor([[0.5, 0.25, 0.125]]).log() + 3, Form(0.5, support=0.2, beta=math.log(2))
    expected = torch.tensor([[0.8, 0.1, 0.1]])
    assert_close(next_token(logits, form, outputs_of()).over_vocabulary(3).exp(), expected)
    # of two candidates: 32 4; with the support ½ as well
    for change in ({"candidates": 2}, {"top_k": 2}, {"support": 0.5}):
        found = next_token(logits, replace(form, **change), outputs_of()).over_vocabulary(3)
        assert_close(found.exp(), torch.tensor([[8 / 9, 1 / 9, 0.0]]))
    raw = next_token(logits, replace(form, candidates=2), outputs_of(), normalised=False).over_vocabulary(3)
    two = math.log(2)
    assert_close(raw, torch.tensor([[6 - 2 * two + two, 6 - 4 * two, -math.inf]]))


def test_candidates_have_no_effect_without_terms():
    assert_close(next_token(LOGITS, Form(candidates=1)).scores.exp(), PROB)


SHARES = torch.full((2, 64), 0.001)  # π relative to the best token of two states; at .1 three and one survive
SHARES[0, [63, 3, 40]] = torch.tensor([1.0, 0.5, 0.3])
SHARES[1, 7] = 1.0
MANY_Q = torch.randn(2, 2, 64, generator=torch.Generator().manual_seed(0))


def asked_for(logits, form, q=MANY_Q):
    """The distribution, and the ids for which it asked for Q."""
    asked = []
    outputs = ModelOutputs(q=lambda ids: asked.append(ids) or outputs_of(q).q(ids))
    found = next_token(logits, form, outputs).over_vocabulary(64)
    assert len(asked) == 1
    return found, asked[0]


def test_terms_are_computed_for_the_survivors_only():
    form = Form(beta=2.0, support=0.1)
    expected = (SHARES.log() + 2 * MANY_Q.amin(0)).masked_fill(SHARES < 0.1, -math.inf).log_softmax(-1)
    # three survivors, rounded up to four columns, which the last survivor fills up
    found, ids = asked_for(SHARES.log() - 9, form)
    assert ids.tolist() == [[3, 40, 63, 63], [7, 7, 7, 7]]
    assert_close(found, expected)
    found, ids = asked_for(SHARES.log()[None], form, MANY_Q[:, None])
    assert ids.shape == (1, 2, 4)
    assert_close(found, expected[None])
    # one survivor in the only state; top-p .8 keeps 1 and .5, which have .806 of the sum 1.861
    assert asked_for(SHARES[1:].log(), form, MANY_Q[:, 1:])[1].tolist() == [[7]]
    assert asked_for(SHARES[:1].log(), Form(beta=2.0, top_p=0.8), MANY_Q[:, :1])[1].tolist() == [[3, 63]]


def test_candidates_that_do_not_survive_get_no_column():
    found, ids = asked_for(SHARES.log(), Form(beta=2.0, support=0.1, candidates=16))
    assert ids.shape == (2, 4) and ids[0, :3].tolist() == [63, 3, 40] and ids[1, 0] == 7
    assert (found > -math.inf).sum(-1).tolist() == [3, 1]


@pytest.mark.parametrize("candidates", [None, 2])
def test_the_scores_of_a_model_that_has_diverged_are_nan(candidates):
    outputs = ModelOutputs(q=lookup_in(torch.zeros(2, 1, 50)))
    form = Form(beta=1.0, support=0.3, candidates=candidates)
    assert next_token(torch.full((1, 50), torch.nan), form, outputs).scores.isnan().all()


def test_where_most_tokens_survive_q_is_computed_for_all():
    _, ids = asked_for(SHARES.log(), Form(beta=2.0, support=1e-6))
    assert ids is None
    assert asked_for(SHARES.log(), Form(beta=2.0))[1] is None


@pytest.mark.parametrize("form", [{"support": 0.1}, {"top_p": 0.9, "candidates": 16}, {"top_k": 5}, {"min_p": 0.1}])
def test_off_the_cpu_no_number_is_waited_for(form):
    """A tensor on the device "meta" has no numbers, so that reading one on the host is an error."""
    form = Form(beta=2.0, **form)
    assert form.reads_all_of_q(torch.device("cuda")) and not form.reads_all_of_q(torch.device("cpu"))
    outputs = ModelOutputs(q=lookup_in(MANY_Q.to("meta")))
    found, ids = next_token(SHARES.to("meta"), form, outputs)
    assert sample_from(found, torch.rand(2, device="meta"))[0].shape == (2,)
    assert ids is None or ids.shape == found.shape


def test_without_a_filter_all_of_q_is_read_anywhere():
    assert Form(0.5, beta=2.0, clip=0.0).reads_all_of_q(torch.device("cpu"))
    assert not Form(condition_scale=1.0).reads_all_of_q(torch.device("cpu"))


def test_all_of_q_gives_the_distribution_of_q_of_the_tokens_left():
    for form in (Form(beta=2.0, support=0.1), Form(beta=2.0, candidates=9), Form(beta=-1.0, top_p=0.8)):
        read, ids = asked_for(SHARES.log(), form)
        assert ids is not None
        found = next_token(SHARES.log(), form, ModelOutputs(q=lookup_in(MANY_Q))).over_vocabulary(64)
        assert torch.equal(found, read)


def old_log_prob(logits, form, outputs):
    """The formula as the sampler computed it before it was in one place, for the whole vocabulary."""
    log_prob = support_filter(logits, form.support) / (form.temperature or 1.0)
    dropped = torch.zeros_like(log_prob, dtype=torch.bool)
    order = log_prob.argsort(-1, descending=True)
    if form.top_k is not None:
        dropped |= torch.ones_like(dropped).scatter(-1, order[..., : form.top_k], False)
    if form.top_p is not None:
        share = log_prob.masked_fill(dropped, -math.inf).softmax(-1).gather(-1, order)
        dropped |= torch.zeros_like(dropped).scatter(-1, order, share.cumsum(-1) - share >= form.top_p)
    if form.min_p is not None:
        dropped |= (log_prob - log_prob.amax(-1, keepdim=True)).exp() < form.min_p
    if form.guided and form.candidates is not None:
        dropped |= torch.ones_like(dropped).scatter(-1, order[..., : form.candidates], False)
    log_prob = log_prob.masked_fill(dropped, -math.inf)
    if outputs.conditional is not None:
        log_prob = log_prob + condition_shift(
            outputs.conditional, outputs.null, form.condition_scale, form.temperature
        )
    advantage = reduce_q(outputs.q(None), form.q_reduce)
    if form.clip is not None:
        advantage = (advantage - outputs.v().unsqueeze(-1)).clamp(max=form.clip)
    return (log_prob + form.beta * advantage).log_softmax(-1)


FORMS = [
    Form(),
    Form(beta=2.0),
    Form(beta=2.0, support=0.02),
    Form(0.0, beta=2.0, support=0.02, clip=0.0),
    Form(0.7, beta=-1.0, top_k=20, q_reduce="mean"),
    Form(1.3, beta=1.0, candidates=9, min_p=0.05, q_reduce="first"),
    Form(beta=1.0, support=0.1, condition_scale=0.5),
    Form(0.5, top_p=0.9, beta=1.0, candidates=30, condition_scale=1.0, clip=0.1),
]


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("form", FORMS, ids=range(len(FORMS)))
def test_the_formula_gives_the_values_and_draws_of_the_old_one(form, asked):
    generator = torch.Generator().manual_seed(0)
    logits, conditional = (2 * torch.randn(64, 200, generator=generator) for _ in range(2))
    outputs = outputs_of(torch.randn(2, 64, 200, generator=generator))
    if asked and form.guided:
        outputs = replace(outputs, conditional=conditional, null=logits)
    old, new = old_log_prob(logits, form, outputs), next_token(logits, form, outputs)
    assert_close(new.over_vocabulary(200), old, atol=1e-5, rtol=0)
    assert torch.equal(new.over_vocabulary(200).argmax(-1), old.argmax(-1))
    if new.ids is None:  # candidates in another order are drawn by other random numbers
        u = torch.rand(64, dtype=torch.float64, generator=generator)
        assert torch.equal(sample_from(new.scores, u)[0], sample_from(old, u)[0])


# Rows with different settings in one batch


@pytest.mark.parametrize(
    "forms",
    [
        [Form(), Form(0.0), Form(0.5), Form(beta=2.0), Form(2.0, beta=-1.0)],
        [Form(beta=2.0, support=0.1), Form(0.7, beta=1.0, clip=0.1), Form(beta=3.0, top_p=0.8), Form(min_p=0.1)],
        [Form(0.7, top_k=3), Form(top_k=500), Form(0.3, top_k=1, min_p=0.2), Form(top_k=20, top_p=0.5)],
        [Form(beta=1.0, top_k=3), Form(beta=2.0, top_k=30, clip=0.0), Form(beta=-1.0, top_k=9, support=0.2)],
        [Form(beta=1.0, candidates=9), Form(beta=2.0, candidates=9, top_k=4), Form(0.5, beta=3.0, candidates=9)],
        [Form(0.5, condition_scale=1.0), Form(condition_scale=1.0, beta=1.0), Form(0.0, condition_scale=1.0)],
    ],
)
def test_one_form_for_rows_with_different_settings_gives_each_row_its_own_distribution(forms):
    assert len({form.kind for form in forms}) == 1
    generator = torch.Generator().manual_seed(0)
    logits, other = (2 * torch.randn(len(forms), 200, generator=generator) for _ in range(2))
    q = torch.randn(2, len(forms), 200, generator=generator)
    asked = {"conditional": other, "null": logits} if forms[0].condition_scale else {}
    u = torch.rand(len(forms), dtype=torch.float64, generator=generator)

    def drawn(form, rows):
        outputs = replace(outputs_of(q[:, rows]), **{name: value[rows] for name, value in asked.items()})
        found = next_token(logits[rows], form, outputs)
        column = sample_from(found.scores, u[rows])[0][:, None]
        return found.over_vocabulary(200), column if found.ids is None else found.ids.gather(-1, column)

    mixed, tokens = drawn(Form.of_rows(forms, logits.device), slice(None))
    for i, form in enumerate(forms):
        alone, token = drawn(form, slice(i, i + 1))
        assert_close(mixed[i : i + 1], alone, atol=1e-5, rtol=0)
        assert torch.equal(tokens[i : i + 1], token)


def test_rows_that_agree_on_a_setting_keep_it_as_a_number():
    form = Form.of_rows([Form(0.5, beta=2.0, support=0.1), Form(0.5, beta=1.0, support=0.1)], torch.device("cpu"))
    assert (form.temperature, form.support, form.clip) == (0.5, 0.1, None)
    assert form.beta.tolist() == [[2.0], [1.0]]
    plain = [Form(candidates=4), Form(0.5)]
    assert not Form.of_rows(plain, torch.device("cpu")).guided


@pytest.mark.parametrize(
    "one, other",
    [
        (Form(beta=1.0, candidates=4), Form(beta=1.0)),
        (Form(beta=1.0, q_reduce="mean"), Form(beta=1.0)),
        (Form(beta=1.0, top_k=4), Form(beta=1.0)),  # ordered by probability, or by the vocabulary
        (Form(beta=1.0, top_k=4), Form(top_k=4)),
        (Form(condition_scale=1.0), Form()),
    ],
)
def test_rows_whose_columns_are_in_another_order_are_of_another_kind(one, other):
    assert one.kind != other.kind


def test_a_row_without_guidance_fits_to_guided_rows():
    assert Form(0.3).kind == Form(beta=2.0, support=0.1).kind == Form(candidates=7, top_p=0.5).kind
