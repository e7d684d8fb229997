"""Sums over the vocabulary that never hold one number per state and token."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def chunked_logsumexp(
    features: Tensor, weight: Tensor, bias: Tensor | None = None, *, max_elements: int = 2**24
) -> Tensor:
    """Compute log Σ_a exp(features · weight[a] + bias[a]) in chunks of rows, which the backward pass computes again.

    Only one chunk's table of scores exists at a time, in forward and in backward. The peak memory, beside the weights
    and their gradient, is therefore a few times `max_elements` numbers instead of H·N·V. If all rows fit into one
    chunk, nothing is computed twice.

    Args:
      features: (H,N,K) for H heads.
      weight: (H,V,K), or (1,V,K) if the heads share it.
      bias: (H,V) or None.
      max_elements: the most entries of a table of scores; a chunk has at least one row, however large V is.
    Returns: (H,N).
    """
    heads, rows, _ = features.shape
    chunk = max(1, max_elements // (heads * weight.shape[1]))
    if rows <= chunk:
        return _logsumexp(features, weight, bias)
    parts = [  # nothing in a chunk is random, so the state of the random number generators need not be saved
        checkpoint(_logsumexp, part, weight, bias, use_reentrant=False, preserve_rng_state=False)
        for part in features.split(chunk, dim=1)
    ]
    return torch.cat(parts, dim=1)


def _logsumexp(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    scores = torch.einsum("hnk,hvk->hnv", features, weight)
    return (scores if bias is None else scores + bias.unsqueeze(1)).logsumexp(-1)
