"""Rows for reserved ids: how a causal LM is told the return that is asked of it, without a larger vocabulary.

With R rows in the model's own embedding, id R is null (no return is asked for) and R+1.. are the bins. The rows are
put into `inputs_embeds` for such ids; the LM head has R rows as before, so no reserved id can be emitted.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from offline_lmrl.models.value_heads import Head


class ReturnEmbedding(Head):
    """One row for null and one for each bin. fp32.

    Bins are ordinal: e_b = base + Σ_{i≤b} δ_i, so neighbours share what they learn and rare bins borrow. The δ start
    small: over all bins they add up to about the spread of the model's own embeddings.

    Args:
      bins: at least 2. width: of the model's embeddings.
    """

    def __init__(self, bins: int, width: int):
        super().__init__()
        self.null = nn.Parameter(torch.empty(width, dtype=torch.float32))
        self.base = nn.Parameter(torch.empty(width, dtype=torch.float32))
        self.delta = nn.Parameter(torch.empty(bins - 1, width, dtype=torch.float32))

    @torch.no_grad()
    def reset(self, embedding: nn.Module) -> None:
        """Fresh rows: null and base are the mean of the model's embeddings, as they come out of its module, because
        some families scale them there."""
        device = next(embedding.parameters()).device
        rows = embedding(torch.arange(embedding.weight.shape[0], device=device)).float()
        mean = rows.mean(0).to(self.base.device)
        init.copy_(self.null, mean)
        init.copy_(self.base, mean)
        init.normal_(self.delta, std=rows.std(0).mean().item() * len(self.delta) ** -0.5)

    def rows(self) -> Tensor:
        """(1 + bins, width), null first."""
        bins = torch.cat([self.base.unsqueeze(0), self.delta]).cumsum(0)
        return torch.cat([self.null.unsqueeze(0), bins])

    def forward(self, input_ids: Tensor, embedding: nn.Module) -> Tensor:
        """Embeddings of ids (B,T), own and reserved ones: (B,T,width) in the dtype of the model's embedding."""
        reserved = input_ids - embedding.weight.shape[0]
        known = reserved < 0
        own = embedding(input_ids.masked_fill(~known, 0))
        rows = F.embedding(reserved.clamp(min=0), self.rows()).to(own.dtype)
        return torch.where(known.unsqueeze(-1), own, rows)
