"""What the heads compute, by hand and against slow loops."""

import pytest
import torch
from torch.testing import assert_close

from offline_lmrl.errors import InputError
from offline_lmrl.models.value_heads import ValueHeads, ValueHeadsConfig

HEADS, VOCABULARY, WIDTH, N = 2, 7, 4, 5
KINDS = ["tied", "linear", "mlp"]


def make(kind, seed=0, initial_value=0.5):
    """Heads with random parameters, and an LM head's matrix."""
    torch.manual_seed(seed)
    heads = ValueHeads(ValueHeadsConfig(kind, HEADS, initial_value, utterance=True), VOCABULARY, WIDTH)
    for part in heads.children():
        part.reset()
        for parameter in part.parameters():
            torch.nn.init.normal_(parameter)
    matrix = torch.randn(VOCABULARY, WIDTH)
    heads.follow(matrix)
    return heads, matrix


@torch.no_grad()
def slow_q(head, kind, hidden, matrix, i, a):
    """Q of head i, one state, one token, by the table in the module."""
    if kind == "tied":
        scale = 1 / matrix.square().sum(1).mean().sqrt()
        return scale * matrix[a] @ (head.map[i] @ hidden) + head.state_weight[i] @ hidden + head.state_bias[i]
    if kind == "linear":
        return head.weight[i, a] @ hidden + head.constant
    inner = (head.hidden_weight[i] @ hidden + head.hidden_bias[i]).clamp(min=0)
    return head.weight[i, a] @ inner + head.bias[i, a]


@pytest.mark.parametrize("kind", KINDS)
def test_q_equals_its_formula_for_all_tokens_and_for_candidates(kind):
    heads, matrix = make(kind)
    hidden, candidates = torch.randn(N, WIDTH), torch.randint(VOCABULARY, (N, 3))
    expected = torch.tensor(
        [[[slow_q(heads.q, kind, h, matrix, i, a) for a in range(VOCABULARY)] for h in hidden] for i in range(HEADS)]
    )
    assert_close(heads.q(hidden, matrix), expected)
    picked = expected.gather(-1, candidates.expand(HEADS, -1, -1))
    assert_close(heads.q(hidden, matrix, candidates), picked)
    action, counted = torch.randint(VOCABULARY, (N,)), torch.tensor([2, 0])
    q, logsumexp = heads.q.logged(hidden, matrix, action, counted, matrix)
    assert_close(q, expected[:, torch.arange(N), action])
    assert_close(logsumexp, expected.logsumexp(-1)[:, counted])
    assert heads.q.logged(hidden, matrix, action, None, matrix)[1] is None


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_heads_answer_the_initial_value_everywhere(kind):
    heads, matrix = make(kind, initial_value=-1.5)
    for part in heads.children():
        part.reset()
    hidden = torch.randn(N, WIDTH)
    heads.follow(matrix)
    assert_close(heads.q(hidden, matrix), torch.full((HEADS, N, VOCABULARY), -1.5), atol=1e-3, rtol=0)
    for scalar, count in ((heads.v, 1), (heads.utterance_q, HEADS), (heads.utterance_v, 1)):
        assert_close(scalar(hidden), torch.full((count, N), -1.5))


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_twins_that_are_fitted_to_the_same_targets_do_not_stay_equal(kind):
    heads, matrix = make(kind)
    heads.q.reset()
    heads.follow(matrix)
    hidden, action, target = torch.randn(N, WIDTH), torch.randint(VOCABULARY, (N, 1)), torch.randn(N)
    optimizer = torch.optim.Adam(heads.q.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        (heads.q(hidden, matrix, action).squeeze(-1) - target).square().sum().backward()
        optimizer.step()
    first, second = heads.q(hidden, matrix)
    assert (first != second).any(1).all()


def test_a_scalar_head_by_hand():
    heads, _ = make("tied")
    head = heads.v
    with torch.no_grad():
        head.hidden_weight.zero_()
        head.hidden_weight[0, 0, 0], head.hidden_weight[0, 1, 0] = 2.0, -1.0
        head.hidden_bias.zero_()
        head.weight.fill_(3.0)
        head.bias.fill_(0.25)
    # h = (1, ...): relu(2) and relu(−1) are 2 and 0, the rest 0: 3·2 + .25; h = (−1, ...): 0 and 1: 3·1 + .25
    hidden = torch.tensor([[1.0, 9.0, 9.0, 9.0], [-1.0, 9.0, 9.0, 9.0]])
    assert_close(head(hidden), torch.tensor([[6.25, 3.25]]))


@pytest.mark.parametrize("factor", [0.02, 50.0])
def test_a_tied_head_does_not_depend_on_the_scale_of_the_lm_head(factor):
    heads, matrix = make("tied")
    hidden = torch.randn(N, WIDTH)
    before = heads.q(hidden, matrix)
    heads.follow(factor * matrix)
    assert_close(heads.q(hidden, factor * matrix), before)


def test_a_tied_head_gives_no_gradient_to_the_lm_head():
    heads, matrix = make("tied")
    matrix.requires_grad_()
    hidden = torch.randn(N, WIDTH, requires_grad=True)
    action = torch.arange(N)
    q, logsumexp = heads.q.logged(hidden, matrix, action, action, matrix.detach())
    (heads.q(hidden, matrix).sum() + q.sum() + logsumexp.sum()).backward()
    assert matrix.grad is None
    assert hidden.grad.abs().min() > 0 and heads.q.map.grad.abs().min() > 0


@pytest.mark.parametrize("kind", ["tied", "linear"])
def test_a_linear_head_folds_into_the_lm_head(kind):
    heads, matrix = make(kind)
    hidden, beta = torch.randn(N, WIDTH), 1.7
    rows = heads.q.row_scale * matrix @ heads.q.map[0] if kind == "tied" else heads.q.weight[0]
    folded = hidden @ (matrix + beta * rows).T
    guided = hidden @ matrix.T + beta * heads.q(hidden, matrix)[0]
    assert_close(folded.log_softmax(-1), guided.log_softmax(-1))


@pytest.mark.parametrize("kind", KINDS)
def test_targets_approach_constant_online_heads_geometrically(kind):
    heads, _ = make(kind)
    pairs = [(heads.q, heads.target_q), (heads.utterance_q, heads.utterance_target_q)]
    gap = [
        [o - t.clone() for o, t in zip(online.parameters(), target.parameters(), strict=True)]
        for online, target in pairs
    ]
    for _ in range(3):
        heads.update_targets(0.1)
    for (online, target), before in zip(pairs, gap, strict=True):  # error (1 − .1)³ = .729
        for o, t, distance in zip(online.parameters(), target.parameters(), before, strict=True):
            assert_close(o - t, 0.729 * distance)
    heads.update_targets(1.0)
    for online, target in pairs:
        for o, t in zip(online.parameters(), target.parameters(), strict=True):
            assert torch.equal(o, t)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double().bfloat16()])
def test_heads_stay_fp32_and_exact_under_casts(kind, cast):
    heads, matrix = make(kind)
    before = {name: tensor.clone() for name, tensor in heads.state_dict().items()}
    cast(heads)
    for name, tensor in heads.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, before[name]), name
    with torch.autocast("cpu", torch.bfloat16):
        assert heads.q(torch.randn(N, WIDTH).bfloat16(), matrix.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_bigger_vocabulary_keeps_old_values_and_starts_new_ones(kind):
    heads, matrix = make(kind, initial_value=0.5)
    hidden = torch.randn(N, WIDTH)
    before = heads.q(hidden, matrix)
    heads.target_q.requires_grad_(False)
    heads.follow(torch.zeros(VOCABULARY + 2, WIDTH))
    after = heads.q(hidden, matrix)
    assert_close(after[..., :VOCABULARY], before)
    assert_close(after[..., VOCABULARY:], torch.full((HEADS, N, 2), 0.5))
    assert heads.q.weight.requires_grad and not heads.target_q.weight.requires_grad
    heads.follow(torch.zeros(3, WIDTH))
    assert_close(heads.q(hidden, matrix), before[..., :3])


@pytest.mark.parametrize("wrong", [{"kind": "deep"}, {"heads": 0}])
def test_a_wrong_setting_names_its_key(wrong):
    with pytest.raises(InputError, match=f"value_heads.{next(iter(wrong))}: found"):
        ValueHeadsConfig(**wrong)
