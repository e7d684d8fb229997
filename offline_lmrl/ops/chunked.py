"""Sums over the vocabulary without a table of one number per state and token in memory."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def chunked_logsumexp(
    features: Tensor, weight: Tensor, bias: Tensor | None = None, *, max_elements: int = 2**24
) -> Tensor:
    """Compute log Σ_a exp(features · weight[a] + bias[a]) over the vocabulary, in chunks of states.

    Only one chunk's table of scores, (H, states of the chunk, V), exists at a time; the backward pass computes it
    again. The peak memory, beside the weights and their gradient, is therefore a few times `max_elements` numbers
    instead of H·N·V. If all states fit into one chunk, nothing is computed twice.

    Args:
      features: (H,N,K), K features of N states for each of H heads.
      weight: (H,V,K), or (1,V,K) if the heads share it; V is the size of the vocabulary.
      bias: (H,V) or None.
      max_elements: largest number of entries in a table of scores; a chunk has at least one state, however large V is.
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
