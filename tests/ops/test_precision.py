"""Every function that widens half precision keeps float64: numbers by hand, to digits that fp32 does not have."""

import math

import pytest
import torch
from torch.testing import assert_close

from offline_lmrl.decoding.distribution import Form, condition_shift, next_token
from offline_lmrl.ops.decoding import sample_from
from offline_lmrl.ops.policy_gradient import entropy
from offline_lmrl.ops.preferences import plackett_luce_loss
from offline_lmrl.ops.value_learning import expectile_loss

ODDS = torch.tensor([[1.0, 3.0]], dtype=torch.float64).log()  # probabilities ¼, ¾
TIED = (torch.zeros(3, dtype=torch.long), torch.zeros(3, dtype=torch.long))  # rank and comparison of three equals


def log_prob(logits):
    return next_token(logits, Form()).scores


BY_HAND = {
    # u = 3: .7 · 9; u = −2: .3 · 4
    "expectile": (lambda zero: expectile_loss(zero, zero + torch.tensor([3.0, -2.0]), 0.7), [6.3, 1.2]),
    # a group of three tied options counts twice, each time chosen from three: 3 · (1 − ⅓) · ln 3
    "Plackett-Luce": (lambda zero: plackett_luce_loss(zero[:1].expand(3), *TIED), [2 * math.log(3)]),
    "warped": (lambda zero: log_prob(zero + ODDS), [[-math.log(4), math.log(0.75)]]),
    # w = 1: 2 · (ln ¼ − ln ½), 2 · (ln ¾ − ln ½)
    "condition": (lambda zero: condition_shift(zero + ODDS, zero[None], 1.0), [[-2 * math.log(2), 2 * math.log(1.5)]]),
    # ¼ ln 4 + ¾ ln 4/3
    "entropy": (lambda zero: entropy(zero + ODDS), [math.log(4) - 0.75 * math.log(3)]),
}


@pytest.mark.parametrize("compute, expected", BY_HAND.values(), ids=BY_HAND)
def test_float64_stays_float64(compute, expected):
    found = compute(torch.zeros(2, dtype=torch.float64))
    assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_to_fp32(half):
    # bf16 has 8 bits: 3.015625 would be 3.015625² = 9.0939... -> 9.125 in it
    v, target = torch.zeros(1, dtype=half), torch.tensor([3.015625], dtype=half)
    assert_close(expectile_loss(v, target, 0.5), torch.tensor([0.5 * 3.015625**2]))
    zeros = torch.zeros(1, 2, dtype=half)
    tied = plackett_luce_loss(zeros.new_zeros(3), *TIED)
    for found in (log_prob(zeros), condition_shift(zeros, zeros, 1.0), entropy(zeros), tied):
        assert found.dtype == torch.float32


def test_draws_tell_probabilities_apart_that_fp32_does_not():
    # σ(4e-10) = ½ + 1e-10: the first token has ½ − 1e-10, and u lies between that and ½
    scores = torch.tensor([[0.0, 4e-10]], dtype=torch.float64)
    assert sample_from(scores, torch.tensor([0.5 - 5e-11], dtype=torch.float64))[0].tolist() == [1]
