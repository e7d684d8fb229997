"""Chunks change neither values nor gradients, and no table of all scores is ever made."""

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from offline_lmrl.ops.value_learning import chunked_logsumexp

HEADS, N, V, K = 2, 5, 11, 3


class LargestTensor(TorchDispatchMode):
    """Records the entries of the largest tensor that any operation returns."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.entries = max(self.entries, tensor.numel())
        return result


def parts(shared=False, bias=True, rows=N, vocabulary=V, dtype=torch.float32):
    torch.manual_seed(0)
    shapes = [(HEADS, rows, K), (1 if shared else HEADS, vocabulary, K)] + [(HEADS, vocabulary)] * bias
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def test_two_tokens_by_hand():
    # scores of the one state: 1·2 + .5 = 2.5 and 1·0 − .5 = −.5; log(e^2.5 + e^−.5) = 2.5 + log(1 + e^−3) = 2.548587
    result = chunked_logsumexp(torch.ones(1, 1, 1), torch.tensor([[[2.0], [0.0]]]), torch.tensor([[0.5, -0.5]]))
    assert_close(result, torch.tensor([[2.548587]]))


@pytest.mark.parametrize("chunk", [1, 2, N, N + 1])
@pytest.mark.parametrize("shared, bias", [(False, True), (True, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_equal_the_dense_form(chunk, shared, bias, dtype):
    chunked, dense = parts(shared, bias, dtype=dtype), parts(shared, bias, dtype=dtype)
    scores = dense[0] @ dense[1].transpose(1, 2) + (dense[2].unsqueeze(1) if bias else 0)
    expected = scores.logsumexp(-1)
    expected.square().sum().backward()
    result = chunked_logsumexp(*chunked, max_elements=chunk * HEADS * V)
    result.square().sum().backward()
    exact = dtype == torch.float32
    assert_close(result, expected, atol=1e-5 if exact else 5e-2, rtol=1e-5 if exact else 5e-2)
    for left, right in zip(chunked, dense, strict=True):
        assert_close(left.grad, right.grad, atol=1e-4 if exact else 0.2, rtol=1e-4 if exact else 0.1)


def test_no_table_of_all_scores_exists_forward_or_backward():
    rows, vocabulary = 64, 100
    tensors = parts(rows=rows, vocabulary=vocabulary)
    with LargestTensor() as largest:
        chunked_logsumexp(*tensors, max_elements=1000).sum().backward()
    assert largest.entries <= 1000
    with LargestTensor() as largest:
        chunked_logsumexp(*tensors).sum().backward()
    assert largest.entries == HEADS * rows * vocabulary  # the witness sees the table where there is one


def test_no_states_give_no_values():
    assert chunked_logsumexp(torch.zeros(2, 0, K), torch.zeros(2, V, K)).shape == (2, 0)
