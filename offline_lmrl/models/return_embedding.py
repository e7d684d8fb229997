"""An embedding of reserved ids, which conditions a causal LM on a requested return without a larger vocabulary.

If the model's own embedding has R rows, id R is null (no return is requested) and R+1, R+2, ... are the bins into
which returns are divided, lowest first (tokens/conditioning.py). Rows of reserved ids are inserted into
`inputs_embeds`. The LM head keeps its R rows, so no reserved id can be emitted.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers import initialization as init

from offline_lmrl.models.value_heads import Head
from offline_lmrl.tokens.conditioning import ReturnTokens, check_ask, with_return_ids


class ReturnEmbedding(Head):
    """An embedding with one row for null and one for each bin, fp32.

    Bins are ordinal: e_b = base + Σ_{i≤b} δ_i, so that neighbours share what they learn and rare bins profit from
    others. The δ start small: their sum over all bins is about the spread of the model's own embeddings.

    Args:
      bins: the number of bins, at least 2.
      width: the width of the model's embedding.
    """

    def __init__(self, bins: int, width: int):
        super().__init__()
        self.null = nn.Parameter(torch.empty(width, dtype=torch.float32))
        self.base = nn.Parameter(torch.empty(width, dtype=torch.float32))
        self.delta = nn.Parameter(torch.empty(bins - 1, width, dtype=torch.float32))

    @torch.no_grad()
    def reset(self, embedding: nn.Module) -> None:
        """Fill in fresh rows: null and base become the mean of the embeddings of ordinary tokens.

        Args:
          embedding: the model's own embedding module. Its outputs are averaged, not its stored rows, because in some
            families the module scales the rows.
        """
        device = next(embedding.parameters()).device
        rows = embedding(torch.arange(embedding.weight.shape[0], device=device)).float()
        mean = rows.mean(0).to(self.base.device)
        init.copy_(self.null, mean)
        init.copy_(self.base, mean)
        init.normal_(self.delta, std=rows.std(0).mean().item() * len(self.delta) ** -0.5)

    def rows(self) -> Tensor:
        """Return all rows, (1 + bins, width), null first."""
        bins = torch.cat([self.base.unsqueeze(0), self.delta]).cumsum(0)
        return torch.cat([self.null.unsqueeze(0), bins])

    def forward(self, input_ids: Tensor, embedding: nn.Module) -> Tensor:
        """Embed ordinary and reserved ids.

        Args:
          input_ids: (B,T) long.
          embedding: the model's own embedding module, for ordinary ids.
        Returns: (B,T,width), in the dtype of the outputs of `embedding`.
        """
        # Both lookups run at all positions; ids of the other kind are set to a valid one there, and not used.
        reserved = input_ids - embedding.weight.shape[0]
        known = reserved < 0
        own = embedding(input_ids.masked_fill(~known, 0))
        rows = F.embedding(reserved.clamp(min=0), self.rows()).to(own.dtype)
        return torch.where(known.unsqueeze(-1), own, rows)


def asked_inputs(
    model: PreTrainedModel,
    block: Mapping[str, Any],
    ids: Tensor,
    mask: Tensor | None,
    ask: float | str | Sequence[float | str],
) -> tuple[Tensor, Tensor]:
    """Insert the requested return before every opening of the agent, and embed the prompts.

    Args:
      model: a guided model with a return embedding.
      block: the entry `returns` of its run metadata.
      ids: prompts, (B,S).
      mask: (B,S), 0 for padding; None = no padding.
      ask: one requested return for all rows, or one per row.
    Returns: embeddings (B,T,width) and mask (B,T), padded on the left.
    Raises: InputError if a request or prompt cannot be used.
    """
    own = model.get_input_embeddings()
    return_tokens = ReturnTokens.from_block(block, own.weight.shape[0], None)
    asks = [ask] * len(ids) if isinstance(ask, int | float | str) else list(ask)
    real = torch.ones_like(ids) if mask is None else mask
    rows = []
    for row, kept, asked in zip(ids, real.bool(), asks, strict=True):
        check_ask(asked)
        value = return_tokens.scale.value_of(asked)
        prompt, past = row[kept].tolist(), block.get("past_opening")
        rows.append(ids.new_tensor(with_return_ids(prompt, block["opening"], return_tokens.ids(value), past)))
    # Padded on the left, because generate continues after the last column; the mask hides the padding id 0.
    padded = pad_sequence(rows, batch_first=True, padding_side="left")
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    return model.return_embedding(padded, own), mask
