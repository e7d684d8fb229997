"""What a model does after its LM head is measured, and log π in chunks equals log π of the model's own logits."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from offline_lmrl.models.guided import as_guided
from offline_lmrl.models.lm_head import log_probs_at, post_of
from offline_lmrl.ops.vocabulary import Post
from tests.tiny_models import FAMILIES, tiny_batch, tiny_model

KNOWN = {"gemma2": Post(1.0, 1.0), "cohere": Post(0.25, None)}


def found_and_expected(model):
    batch = tiny_batch()
    inputs, steps = {name: batch[name] for name in ("input_ids", "attention_mask")}, batch["steps"]
    places = [(steps["row"], steps["state"], steps["action"])]
    (found,), _, _ = log_probs_at(model, places, True, **inputs)
    logits = model(**inputs).logits.float().log_softmax(-1)
    return found, logits[steps["row"], steps["state"], steps["action"]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_scale_and_soft_cap_are_measured(family, dtype):
    model = as_guided(tiny_model(family)).to(dtype)
    post, known = post_of(model), KNOWN.get(family, Post())
    assert post.scale == pytest.approx(known.scale, rel=1e-3 if dtype == torch.bfloat16 else 1e-6)
    assert (post.cap is None) == (known.cap is None)
    assert known.cap is None or post.cap == pytest.approx(known.cap, rel=1e-3)
    assert_close(*found_and_expected(model), atol=5e-2 if dtype == torch.bfloat16 else 1e-5, rtol=1e-5)


class Twice(nn.Linear):
    def forward(self, hidden):
        return 2 * super().forward(hidden)


def test_a_head_that_does_more_computes_its_own_logits():
    model = as_guided(tiny_model())
    assert post_of(model) == Post()
    own = model.lm_head
    model.lm_head = Twice(own.in_features, own.out_features, bias=False)
    model.lm_head.weight = own.weight
    assert post_of(model) is None  # although that of the former head is known
    assert_close(*found_and_expected(model))


def test_what_follows_the_head_and_is_neither_scale_nor_cap_is_left_to_the_model(monkeypatch):
    model = as_guided(tiny_model())
    base = type(model).__mro__[2]
    forward = base.forward

    def bent(self, *args, **kwargs):
        outputs = forward(self, *args, **kwargs)
        outputs.logits = outputs.logits + 0.1 * outputs.logits.square()
        return outputs

    monkeypatch.setattr(base, "forward", bent)
    assert post_of(model) is None
    assert_close(*found_and_expected(model))


def test_measuring_draws_no_random_number():
    model = as_guided(tiny_model()).train()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    post_of(model)
    assert torch.rand(1) == expected
