"""log π and logsumexp over a vocabulary: values by hand, gradients as of the plain formula, and no table of scores."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from offline_lmrl.ops import vocabulary
from offline_lmrl.ops.vocabulary import OutputHead, Post, action_log_prob, logsumexp_scores

HEADS, N, V, K = 2, 5, 11, 3
POSTS = [Post(), Post(scale=0.3), Post(cap=2.0), Post(scale=1.7, cap=1.5)]


class LargestTensor(TorchDispatchMode):
    """Records the entries of the largest tensor that any operation returns."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.entries = max(self.entries, tensor.numel())
        return result


@pytest.fixture
def small_chunks(monkeypatch):
    """A function that lets chunks have so many states, and blocks half as many."""

    def set_to(states):
        monkeypatch.setattr(vocabulary, "CHUNK", states * V)
        monkeypatch.setattr(vocabulary, "BLOCK", max(1, states // 2) * V)

    return set_to


def made(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def after(products, post):
    products = products * post.scale
    return products if post.cap is None else post.cap * torch.tanh(products / post.cap)


ACTION = torch.tensor([3, 0, 10, 3, 7])
WEIGHTS = {"alike": torch.full((N,), 0.7), "unlike": torch.tensor([1.0, 0.0, 2.5, -1.0, 0.1])}


def test_two_tokens_by_hand():
    # scores of the one state: 1·2 + .5 = 2.5 and 1·0 − .5 = −.5; log(e^2.5 + e^−.5) = 2.5 + log(1 + e^−3) = 2.548587
    features, weight, bias = torch.ones(1, 1, 1), torch.tensor([[[2.0], [0.0]]]), torch.tensor([[0.5, -0.5]])
    assert_close(logsumexp_scores(features, weight, bias), torch.tensor([[2.548587]]))
    log_prob = action_log_prob(features[0], torch.tensor([1]), OutputHead(weight[0], bias[0]))
    assert_close(log_prob, torch.tensor([-0.5 - 2.548587]))
    # with the scale 2 and the cap 3: 3·tanh(5/3) = 2.793329 and 3·tanh(−1/3) = −.964538
    capped = action_log_prob(features[0], torch.tensor([0]), OutputHead(weight[0], bias[0], Post(2.0, 3.0)))
    assert_close(capped, torch.tensor([-0.023065]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("states", [1, 2, N, N + 1])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("post", POSTS)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("alike", [True, False])
def test_log_prob_equals_the_plain_formula(small_chunks, states, weights, post, with_bias, alike):
    small_chunks(states)
    shapes = [(N, K), (V, K)] + [(V,)] * with_bias
    ours, plain = made(*shapes), made(*shapes)
    expected = after(F.linear(*plain), post).log_softmax(-1).gather(-1, ACTION[:, None])[:, 0]
    result = action_log_prob(ours[0], ACTION, OutputHead(ours[1], *(ours[2:] or [None]), post), alike=alike)
    assert_close(result, expected, atol=1e-12, rtol=0)
    for loss in (result, expected):
        (loss * WEIGHTS[weights]).sum().backward()
    for left, right in zip(ours, plain, strict=True):
        assert_close(left.grad, right.grad, atol=1e-12, rtol=0)


@pytest.mark.parametrize("states", [1, 2, N])
@pytest.mark.parametrize("shared, with_bias", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_logsumexp_equals_the_plain_formula(small_chunks, states, shared, with_bias, weights):
    small_chunks(states)
    shapes = [(HEADS, N, K), (1 if shared else HEADS, V, K)] + [(HEADS, V)] * with_bias
    ours, plain = made(*shapes), made(*shapes)
    if shared:  # as tied heads read the LM head, which their loss does not change
        ours[1].requires_grad_(False)
    scores = torch.einsum("hnk,hvk->hnv", plain[0], plain[1].expand(HEADS, -1, -1))
    expected = (scores + plain[2].unsqueeze(1) if with_bias else scores).logsumexp(-1)
    result = logsumexp_scores(*ours)
    assert_close(result, expected, atol=1e-12, rtol=0)
    for loss in (result, expected):
        (loss * WEIGHTS[weights] * torch.tensor([[1.0], [3.0]])).sum().backward()
    for left, right in zip(ours, plain, strict=True):
        if left.requires_grad:
            assert_close(left.grad, right.grad, atol=1e-12, rtol=0)


def test_numeric_gradients(small_chunks):
    small_chunks(2)
    features, weight, bias = made((N, K), (V, K), (V,))

    def log_prob(features, weight, bias):
        return action_log_prob(features, ACTION, OutputHead(weight, bias, POSTS[3]))

    assert torch.autograd.gradcheck(log_prob, (features, weight, bias))
    assert torch.autograd.gradcheck(logsumexp_scores, made((HEADS, N, K), (HEADS, V, K), (HEADS, V)))


@pytest.mark.parametrize("states", [2, N])
def test_scores_in_half_precision_give_results_in_fp32(small_chunks, states):
    small_chunks(states)
    exact = made((N, K), (V, K))
    half = [part.detach().float().requires_grad_() for part in exact]
    expected = F.linear(*exact).log_softmax(-1).gather(-1, ACTION[:, None])[:, 0]
    result = action_log_prob(half[0], ACTION, OutputHead(half[1], table=half[1].detach().bfloat16()))
    assert result.dtype == torch.float32
    for loss in (result, expected):
        loss.sum().backward()
    assert_close(result, expected.float(), atol=5e-2, rtol=0)
    for left, right in zip(half, exact, strict=True):
        assert left.grad.dtype == torch.float32
        assert_close(left.grad, right.grad.float(), atol=5e-2, rtol=5e-2)


def test_two_backward_passes_add_up():
    features, weight = made((N, K), (V, K))
    loss = action_log_prob(features, ACTION, OutputHead(weight)).sum()
    loss.backward(retain_graph=True)
    once = [features.grad.clone(), weight.grad.clone()]
    loss.backward()
    assert_close([features.grad, weight.grad], [2 * grad for grad in once])


def test_no_table_of_all_scores_exists_forward_or_backward(monkeypatch):
    monkeypatch.setattr(vocabulary, "CHUNK", 1000)
    monkeypatch.setattr(vocabulary, "_workspaces", {})
    states, tokens = 64, 100
    features, weight, action = *made((states, K), (tokens, K)), torch.zeros(states, dtype=torch.long)
    with LargestTensor() as largest:
        action_log_prob(features, action, OutputHead(weight)).sum().backward()
        logsumexp_scores(features.unsqueeze(0), weight.unsqueeze(0)).square().sum().backward()
    assert largest.entries <= 1000
    with LargestTensor() as largest:
        F.linear(features, weight).logsumexp(-1).sum().backward()
    assert largest.entries == states * tokens  # the witness sees the table where there is one


def test_no_states_give_no_values():
    features, weight = made((0, K), (V, K))
    result = action_log_prob(features, torch.zeros(0, dtype=torch.long), OutputHead(weight))
    result.sum().backward()
    assert result.shape == (0,) and not weight.grad.any()
    assert logsumexp_scores(torch.zeros(2, 0, K), torch.zeros(2, V, K)).shape == (2, 0)
