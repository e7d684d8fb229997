"""Sums over the vocabulary that never hold one number per state and token."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def chunked_logsumexp(
    features: Tensor, weight: Tensor, bias: Tensor | None = None, *, max_elements: int = 2**24
) -> Tensor:
    """log Σ_a exp(features · weight[a] + bias[a]), in chunks of rows that the backward pass computes again.

    Only one chunk's table of scores exists at a time, forward and backward, so the peak beside the weights and their
    gradient is a few times `max_elements` instead of H·N·V numbers. What fits at once is computed at once.

    Args:
      features: (H,N,K) for H heads. weight: (H,V,K), or (1,V,K) where the heads share it. bias: (H,V) or None.
      max_elements: entries of the largest table of scores; one row is always allowed.
    Returns: (H,N).
    """
    heads, rows, _ = features.shape
    chunk = max(1, max_elements // (heads * weight.shape[1]))
    if rows <= chunk:
        return _logsumexp(features, weight, bias)
    parts = [
        checkpoint(_logsumexp, part, weight, bias, use_reentrant=False, preserve_rng_state=False)
        for part in features.split(chunk, dim=1)
    ]
    return torch.cat(parts, dim=1)


def _logsumexp(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    scores = torch.einsum("hnk,hvk->hnv", features, weight)
    return (scores if bias is None else scores + bias.unsqueeze(1)).logsumexp(-1)
