"""The one reader of logged steps: its values by hand, in the order of the rows, whatever the batches."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from offline_lmrl.decoding.distribution import Form
from offline_lmrl.models import step_outputs
from offline_lmrl.models.step_outputs import collect_outputs, compute_step_outputs
from offline_lmrl.tokens.batching import token_batches, token_rows
from tests.tiny_models import FAMILIES, guided_model

ROWS = [[4, 9, 30, 7], [5, 6], [8, 3, 20, 21, 22, 40, 11]]
STATES = [[1, 2], [0], [2, 5, 6]]  # the last has no next token: its action counts as 0
FORM = Form(temperature=0.5, support=0.1, beta=2.0)
WANT = ("log_prob", "target_q", "v", "utterance_q")


def by_hand(model, form=FORM):
    """Each row alone, each number by the plain methods of the model."""
    found = {name: [] for name in (*WANT, "scores")}
    for row, states in zip(ROWS, STATES, strict=True):
        outputs, hidden = model.forward_with_hidden(input_ids=torch.tensor([row]))
        for state in states:
            action = [*row[1:], 0][state]
            policy, q = outputs.logits[0, state].log_softmax(-1), model.q_values(hidden[0, state])
            found["log_prob"].append(policy[action])
            found["target_q"].append(q[:, action].min())
            found["v"].append(model.v_values(hidden[0, state]))
            after = hidden[0, min(state + 1, len(row) - 1)]
            found["utterance_q"].append(model.value_heads.utterance_target_q(after.unsqueeze(0)).min())
            kept = policy.exp() >= form.support * policy.exp().max()
            scores = policy / form.temperature + form.beta * q.min(0).values
            found["scores"].append(scores.masked_fill(~kept, -torch.inf).log_softmax(-1))
    return {name: torch.stack(values).detach().numpy() for name, values in found.items()}


@pytest.mark.parametrize("budget", [1, 8, 4096])
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_are_those_by_hand_in_the_order_of_the_rows_in_any_batches(family, budget, monkeypatch):
    monkeypatch.setattr(step_outputs, "CHUNK", 2 * 50)  # two states at a time
    model = guided_model(family, utterance=True)
    states = [places[:-1] if row is ROWS[2] else places for row, places in zip(ROWS, STATES, strict=True)]
    found = compute_step_outputs(
        model,
        token_rows(ROWS, states),
        WANT,
        lambda states: {"scores": states.distribution(FORM)},
        token_budget=budget,
    )
    for name, expected in by_hand(model).items():
        values = found.measured["scores"] if name == "scores" else getattr(found, name)
        np.testing.assert_allclose(values, expected[:5], atol=1e-5, rtol=1e-5, err_msg=name)
    assert found.next_v is None and not model.training


def test_a_step_at_the_end_of_a_row_has_action_0():
    found = compute_step_outputs(guided_model(utterance=True), token_rows(ROWS, STATES), ["log_prob", "target_q"])
    for name in ("log_prob", "target_q"):
        np.testing.assert_allclose(getattr(found, name), by_hand(guided_model(utterance=True))[name], atol=1e-5)


def test_values_alone_need_no_pass_through_the_lm_head():
    model, seen = guided_model(), []
    model.lm_head.register_forward_hook(lambda *_: seen.append(1))
    compute_step_outputs(model, token_rows(ROWS, STATES), ["v", "target_q"])
    assert not seen
    compute_step_outputs(model, token_rows(ROWS, STATES), ["v", "log_prob"])
    assert seen == [1]


def test_a_model_without_heads_has_its_log_probs():
    model = guided_model()
    expected = by_hand(guided_model(utterance=True))["log_prob"]
    model.value_heads = None
    np.testing.assert_allclose(
        compute_step_outputs(model, token_rows(ROWS, STATES), ["log_prob"]).log_prob, expected, atol=1e-5
    )


def test_v_of_next_states_needs_the_rows_that_hold_them():
    with pytest.raises(ValueError, match="next_v needs a data set with next_rows"):
        compute_step_outputs(guided_model(), token_rows(ROWS, STATES), ["v", "next_v"])


def test_shares_add_up_and_one_without_a_batch_is_zero():
    model, data = guided_model(), token_rows(ROWS, STATES)
    whole = compute_step_outputs(model, data, ["v"]).v
    parts = [compute_step_outputs(model, data, ["v"], token_budget=1, share=(i, 4)).v for i in range(4)]
    np.testing.assert_allclose(sum(parts), whole, atol=1e-6)
    assert [np.flatnonzero(part).tolist() for part in parts] == [[3, 4, 5], [0, 1], [2], []]


def test_batches_hold_rows_of_similar_length_within_the_budget():
    lengths = np.array([3, 9, 4, 4, 1, 20])
    batches = [batch.tolist() for batch in token_batches(lengths, 12)]
    assert batches == [[5], [1], [2, 3, 0], [4]]  # 20 is over the budget, 4 · 3 within it
    assert [batch.tolist() for batch in token_batches(lengths, 1)] == [[5], [1], [2], [3], [0], [4]]


def test_a_function_of_batches_gets_all_steps_and_keeps_whole_numbers_whole():
    data = token_rows(ROWS, STATES)
    found = collect_outputs(
        data,
        lambda batch: {
            "action": batch["steps"]["action"],
            "pair": torch.stack([batch["steps"]["state"] + 0.5] * 2, 1).bfloat16(),
        },
        torch.device("cpu"),
        token_batches(data.lengths, 1),
    )
    assert found["action"].tolist() == [30, 7, 6, 21, 11, 0] and found["action"].dtype == np.int64
    assert_close(torch.from_numpy(found["pair"])[:, 1], torch.tensor([1.5, 2.5, 0.5, 2.5, 5.5, 6.5]))
