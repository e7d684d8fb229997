"""forward(request=...): what each packed output is, where gradients go and where they do not."""

import copy
import inspect

import pytest
import torch
from torch.testing import assert_close

from tests.tiny_models import FAMILIES, guided_model, packed_of, tiny_batch, tiny_model

KINDS = ["tied", "linear", "mlp"]


def dense_log_prob(model, batch):
    """(N,) from the plain forward of the base class over all positions."""
    steps = batch["steps"]
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits.log_softmax(-1)[steps["row"], steps["state"], steps["action"]]


def trunk_gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if "value_heads" not in name and p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_log_prob_and_its_gradient_equal_the_plain_forwards(family):
    # Environment tokens and padding have no part in the plain sum either, so their logits get no gradient.
    plain, batch = tiny_model(family), tiny_batch()
    guided = guided_model(family)
    expected = dense_log_prob(plain, batch)
    packed = packed_of(guided, batch)["log_prob"]
    assert_close(packed, expected)
    expected.sum().backward()
    packed.sum().backward()
    plain_gradients, guided_gradients = trunk_gradients(plain), trunk_gradients(guided)
    assert plain_gradients.keys() == guided_gradients.keys()
    for name, gradient in plain_gradients.items():
        assert_close(guided_gradients[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_values_are_read_at_the_states_that_the_steps_name(family):
    model, batch = guided_model(family, "mlp", utterance=True), tiny_batch()
    steps, heads = batch["steps"], model.value_heads
    _, hidden = model.forward_with_hidden(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    packed = packed_of(model, batch, conservative=True)

    def at(row, state):
        return torch.stack([hidden[r, s] for r, s in zip(steps[row].tolist(), steps[state].tolist(), strict=True)])

    q, target_q = model.q_values(at("row", "state"), target=False), model.q_values(at("row", "state"))
    taken = steps["action"].tolist()
    assert_close(packed["q"], torch.stack([q[:, n, a] for n, a in enumerate(taken)], dim=1))
    assert_close(packed["target_q"], torch.stack([target_q[:, n, a].min() for n, a in enumerate(taken)]))
    assert_close(packed["logsumexp_q"], q.logsumexp(-1))
    assert_close(packed["v"], model.v_values(at("row", "state")))
    assert_close(packed["next_v"], model.v_values(at("next_row", "next_state")))
    assert_close(packed["end_v"], model.v_values(at("end_row", "end_state")))
    # turns close with steps 1, 3 and 6: tokens (0,3), (0,7), (1,5); they open in states (0,1), (0,5), (1,2)
    closed, opened = hidden[[0, 0, 1], [3, 7, 5]], hidden[[0, 0, 1], [1, 5, 2]]
    assert_close(packed["utterance_q"], heads.utterance_q(closed))
    assert_close(packed["utterance_target_q"], heads.utterance_target_q(closed).min(0).values)
    assert_close(packed["utterance_v"], heads.utterance_v(opened)[0])
    assert_close(packed["utterance_next_v"], heads.utterance_v(hidden[[0, 0, 1], [5, 7, 5]])[0])


def test_logsumexp_is_only_computed_when_asked_for():
    model, batch = guided_model(), tiny_batch()
    assert set(packed_of(model, batch)) == {"log_prob", "q", "target_q", "v", "next_v", "end_v"}
    more = set(packed_of(model, batch, conservative=True)) - set(packed_of(model, batch))
    assert more == {"counted", "logsumexp_q"}
    assert set(packed_of(model, batch)) - set(packed_of(model, batch, ends=False)) == {"end_v"}


def test_a_share_of_the_steps_with_a_target_is_counted_in_training_and_all_in_evaluation():
    model, batch = guided_model(), tiny_batch()
    batch["steps"]["has_target"][3] = False
    whole = packed_of(model, batch, conservative=1.0)
    assert whole["counted"].tolist() == [0, 1, 2, 4, 5, 6]
    assert_close(packed_of(model, batch, conservative=0.5)["logsumexp_q"], whole["logsumexp_q"])
    model.train()
    seen = set()
    for _ in range(40):
        part = packed_of(model, batch, conservative=0.5)
        assert len(part["counted"]) == 3
        places = [[0, 1, 2, 4, 5, 6].index(place) for place in part["counted"].tolist()]
        assert_close(part["logsumexp_q"], whole["logsumexp_q"][:, places])
        seen |= set(places)
    assert seen == set(range(6))


def test_a_model_without_heads_gives_log_probs_only():
    model, batch = guided_model(), tiny_batch()
    model.value_heads = None
    assert set(packed_of(model, batch)) == {"log_prob"}


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_reaches_targets_or_what_is_marked_so(kind):
    model, batch = guided_model(kind=kind, utterance=True), tiny_batch()
    packed = packed_of(model, batch, conservative=True)
    for name, values in packed.items():
        assert values.requires_grad == (
            name not in ("target_q", "next_v", "end_v", "counted") and "_target" not in name and "_next" not in name
        ), name
    sum(values.sum() for values in packed.values() if values.requires_grad).backward()
    for name, parameter in model.value_heads.named_parameters():
        assert (parameter.grad is None) == ("target" in name), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [0.0, 0.25, 1.0])
def test_value_grad_scale_is_the_share_that_reaches_the_trunk(kind, scale):
    def gradients(value_grad_scale):
        model, batch = guided_model(kind=kind, utterance=True), tiny_batch()
        packed = packed_of(model, batch, conservative=True, value_grad_scale=value_grad_scale)
        sum(packed[name].sum() for name in ("q", "v", "logsumexp_q", "utterance_q", "utterance_v")).backward()
        heads = {name: p.grad for name, p in model.value_heads.named_parameters() if p.grad is not None}
        return trunk_gradients(model), heads

    (trunk, heads), (full_trunk, full_heads) = gradients(scale), gradients(1.0)
    assert any(gradient.abs().max() > 0 for gradient in full_trunk.values())
    for name, gradient in full_trunk.items():
        if scale == 0:
            assert name not in trunk or not trunk[name].any()
        else:
            assert_close(trunk[name], scale * gradient, atol=1e-5, rtol=1e-3)
    for name, gradient in full_heads.items():
        assert_close(heads[name], gradient)
        assert gradient.abs().max() > 0, name


@pytest.mark.parametrize("family", FAMILIES)
def test_more_padding_and_another_order_of_rows_change_nothing(family):
    model = guided_model(family)
    batch, padded = tiny_batch(), tiny_batch(padding=5)
    turned = copy.deepcopy(batch)
    for name in ("input_ids", "attention_mask"):
        turned[name] = turned[name].flip(0)
    for name in ("row", "next_row", "end_row"):
        turned["steps"][name] = 1 - turned["steps"][name]
    expected = packed_of(model, batch)
    for other in (padded, turned):
        for name, values in packed_of(model, other).items():
            assert_close(values, expected[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_fp32_under_autocast(kind):
    model, batch = guided_model(kind=kind), tiny_batch()
    with torch.autocast("cpu", torch.bfloat16):
        packed = packed_of(model, batch, conservative=True)
    assert {values.dtype for name, values in packed.items() if name != "counted"} == {torch.float32}
    sum(values.sum() for values in packed.values() if values.requires_grad).backward()
    online = [parameter for head in model.value_heads.online() for parameter in head.parameters()]
    assert {parameter.grad.dtype for parameter in online} == {torch.float32}


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_behind_the_windows_serve_next_values_only(family):
    model, batch = guided_model(family, utterance=True), tiny_batch()
    steps = batch["steps"]
    for name in ("input_ids", "attention_mask"):  # a third row, which is the second turned round
        batch[name] = torch.cat([batch[name], batch[name][1:].flip(1)])
    batch["attention_mask"][2] = True
    steps["next_row"], steps["end_row"] = steps["row"].clone(), steps["row"].clone()
    steps["next_row"][3] = steps["end_row"][:4] = 2
    together, apart = packed_of(model, batch, conservative=True), packed_of(model, batch, windows=2, conservative=True)
    for name, values in apart.items():
        assert_close(values, together[name], atol=1e-5, rtol=1e-4, msg=name)
    alone = tiny_batch()
    alone["steps"]["next_row"] = alone["steps"]["end_row"] = alone["steps"]["row"]
    trained = [name for name, values in apart.items() if values.requires_grad]
    gradients = []
    for packed in (apart, packed_of(model, alone, windows=2, conservative=True)):  # as many windows as rows
        model.zero_grad()
        sum(packed[name].sum() for name in trained).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[1].items():
        assert_close(gradients[0][name], gradient, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("ranks, rows", [(None, [2]), (1, [2]), (2, [1, 2])])
def test_among_several_ranks_the_decoder_runs_twice_even_without_rows_behind_the_windows(monkeypatch, ranks, rows):
    model, batch = guided_model(), tiny_batch()
    expected = packed_of(model, batch)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: ranks is not None)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: ranks)
    seen = []
    model.get_decoder().register_forward_hook(lambda module, args, output: seen.append(len(output[0])))
    for name, values in packed_of(model, batch, windows=2).items():
        assert torch.equal(values, expected[name]), name
    assert seen == rows
    seen.clear()
    model.value_heads = None
    packed_of(model, batch, windows=2)
    assert seen == [2]


def test_no_steps_give_empty_outputs():
    model, batch = guided_model(utterance=True), tiny_batch()
    batch["steps"] = {name: index[:0] for name, index in batch["steps"].items()}
    packed = packed_of(model, batch, conservative=True)
    assert {values.numel() for values in packed.values()} == {0}
    sum(values.sum() for values in packed.values()).backward()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_signature_is_the_bases_with_our_keywords(family):
    base = inspect.signature(type(tiny_model(family)).forward).parameters
    ours = inspect.signature(guided_model(family).forward).parameters
    assert [name for name in ours if name not in base] == ["beta", "request"]
    assert [name for name in base if name not in ours] == ["self"]


def test_the_lm_head_makes_no_logits_where_none_are_needed_and_is_left_as_it_was():
    model, batch = guided_model(), tiny_batch()
    packed_of(model, batch)  # what follows the LM head is measured in the first call
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    packed_of(model, batch)
    model(input_ids=batch["input_ids"])
    assert seen == [(1, 0, 50), (2, 9, 50)]
    assert not model.lm_head._forward_pre_hooks
