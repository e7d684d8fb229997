"""Twin Q heads, their targets and V, read from the hidden states of a causal LM (Snell et al. 2023, ILQL).

A Q head is linear in its features: Q_i(s,a) = z_i(s) · row_i[a] + bias_i[a] + offset_i(s), for heads i = 1..H that are
computed together. What the three kinds choose:

    kind     features z_i(s)            row_i[a]                    bias_i[a]   offset_i(s)
    tied     c · M_i h          (d)     E[a], the LM head's row     none        w_i · h + b_i
    linear   h                  (d)     W_i[a]                      none        one stored constant
    mlp      relu(A_i h + a_i)  (2d)    W_i[a]                      learnt      0

tied and linear are linear in h and fold into the LM head (tied as β·c·E·M); mlp is the papers'. All start at
`initial_value`: w and the rows of mlp are 0; M and the rows of linear are so small (TIE_BREAK) that Q lies within
about 1e-3 of it where h has unit variance. At 0 the twins would be equal and get equal gradients for ever, so that
the minimum of both would be either. How far twins of a kind that is linear in h drift apart is another matter: what
the data fix they learn alike; the first layers of mlp differ from the start.

tied reads the live E without gradient: the policy's loss moves it, Q's never does. Its target averages M, w and b
only, a deviation from a full target copy. The number c = 1 / (root mean square length of E's rows) is there because
an Adam step changes Q in proportion to that length, which is .02·√d in a fresh model and anything in a trained one.
Fitted to noisy values of four tokens per state at widths 64, 128 and 768, unit rows followed the learning curve of a
linear head; rows as they are were 4 to 10 times slower at width 64 when fresh, and diverged at width 768 once ten
times longer. c is stored and follows E at every target update: in forward it would cost a pass over E per token.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import initialization as init

from offline_lmrl.data.errors import InputError, shown
from offline_lmrl.ops.chunked import chunked_logsumexp

TIE_BREAK = 2e-4  # standard deviation of fresh Q values of one head around initial_value, h of unit variance


def _in_fp32(method: Callable) -> Callable:
    """Casts the hidden states and leaves autocast: advantages are small differences of large values.

    Raises: InputError for hidden states of another width than the LM head's, by which heads are sized.
    """

    @functools.wraps(method)
    def run(self, hidden, *args, **kwargs):
        if hidden.shape[-1] != self.width:
            raise InputError(
                f"model: found a decoder that gives {hidden.shape[-1]} numbers per token before an LM "
                f"head that reads {self.width}, expected as many: no values can be learnt there"
            )
        with torch.autocast(hidden.device.type, enabled=False):
            return method(self, hidden.float(), *args, **kwargs)

    return run


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, dtype=torch.float32))


def _pick(table: Tensor, candidates: Tensor) -> Tensor:
    """(H,V,...) at token ids (N,C) -> (H,N,C,...); several times faster in backward than plain indexing."""
    return table.index_select(1, candidates.flatten()).unflatten(1, candidates.shape)


class Head(nn.Module):
    """Stays fp32 in a model that is cast, because Polyak steps of .005 are lost in bf16.

    Subclasses define `reset()`: fresh parameters. It fills through transformers' initialisers, which leave alone what
    was read from disk.
    """

    def _apply(self, fn, recurse=True):
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)


class TwoLayers(Head):
    """The first layer that mlp Q heads and scalar heads have in common, d -> 2d for each of the heads."""

    def __init__(self, heads: int, width: int):
        super().__init__()
        self.width = width
        self.hidden_weight = _parameter(heads, 2 * width, width)
        self.hidden_bias = _parameter(heads, 2 * width)

    def reset(self) -> None:
        init.normal_(self.hidden_weight, std=self.hidden_weight.shape[-1] ** -0.5)
        init.zeros_(self.hidden_bias)

    def features(self, hidden: Tensor) -> Tensor:
        inner = torch.einsum("nd,hkd->hnk", hidden, self.hidden_weight)
        return (inner + self.hidden_bias.unsqueeze(1)).relu()


class ScalarHead(TwoLayers):
    """One number per state, d -> 2d -> 1: V, and Q and V of whole turns."""

    def __init__(self, heads: int, width: int, initial_value: float):
        super().__init__(heads, width)
        self.initial_value = initial_value
        self.weight = _parameter(heads, 2 * width)
        self.bias = _parameter(heads)

    def reset(self) -> None:
        super().reset()
        init.zeros_(self.weight)
        init.constant_(self.bias, self.initial_value)

    @torch.no_grad()
    def start_at(self, weight: Tensor, bias: float) -> None:
        """Start a single head at w · h + b, exactly: relu(w · h) − relu(−w · h) by its first two hidden units. The
        others keep their first layer and count for nothing yet, as in a fresh head.

        Args:
          weight: w, (d,).
        """
        self.hidden_weight[0, :2] = torch.stack([weight, -weight])
        self.weight[0, :2] = torch.tensor([1.0, -1.0])
        self.bias.fill_(bias)

    @_in_fp32
    def forward(self, hidden: Tensor) -> Tensor:
        """hidden (N,d) -> (H,N)."""
        return torch.einsum("hnk,hk->hn", self.features(hidden), self.weight) + self.bias.unsqueeze(1)


class QHead:
    """H heads over the vocabulary, from the parts in the module's table, which the three kinds below supply:

    features(hidden (N,d)) -> (H,N,K); offset(hidden) -> broadcasts against (H,N); rows(matrix) -> (H or 1,V,K), and of
    candidates (N,C) -> (H or 1,N,C,K); `bias`: (H,V) or None. `matrix` is the LM head's (V,d); only tied reads it.
    """

    @_in_fp32
    def forward(self, hidden: Tensor, matrix: Tensor, candidates: Tensor | None = None) -> Tensor:
        """hidden (N,d) -> (H,N,V); with candidates (N,C), token ids per state, only those: (H,N,C)."""
        if candidates is None:
            q = torch.einsum("hnk,hvk->hnv", self.features(hidden), self.rows(matrix))
            bias = None if self.bias is None else self.bias.unsqueeze(1)
        else:
            q = (self.features(hidden).unsqueeze(2) * self.rows(matrix, candidates)).sum(-1)
            bias = None if self.bias is None else _pick(self.bias, candidates)
        return (q if bias is None else q + bias) + self.offset(hidden).unsqueeze(-1)

    @_in_fp32
    def logsumexp(self, hidden: Tensor, matrix: Tensor) -> Tensor:
        """log Σ_a exp Q_i(s,a): (N,d) -> (H,N), without a table of all Q."""
        return chunked_logsumexp(self.features(hidden), self.rows(matrix), self.bias) + self.offset(hidden)


class TiedQ(QHead, Head):
    def __init__(self, heads: int, width: int, vocabulary: int, initial_value: float):
        super().__init__()
        self.width = width
        self.initial_value = initial_value
        self.map = _parameter(heads, width, width)
        self.state_weight = _parameter(heads, width)
        self.state_bias = _parameter(heads)
        self.register_buffer("row_scale", torch.empty((), dtype=torch.float32))
        self.bias = None

    def reset(self) -> None:
        init.normal_(self.map, std=TIE_BREAK * self.map.shape[-1] ** -0.5)
        init.zeros_(self.state_weight)
        init.constant_(self.state_bias, self.initial_value)
        init.ones_(self.row_scale)

    @torch.no_grad()
    def follow(self, matrix: Tensor) -> None:
        """Sets c from the present LM head."""
        length = torch.linalg.vector_norm(matrix, dtype=torch.float32) / matrix.shape[0] ** 0.5
        self.row_scale.copy_(1 / length.clamp(min=1e-6))

    def features(self, hidden: Tensor) -> Tensor:
        return self.row_scale * torch.einsum("nd,hkd->hnk", hidden, self.map)

    def offset(self, hidden: Tensor) -> Tensor:
        return torch.einsum("nd,hd->hn", hidden, self.state_weight) + self.state_bias.unsqueeze(1)

    def rows(self, matrix: Tensor, candidates: Tensor | None = None) -> Tensor:
        matrix = matrix.detach().unsqueeze(0)
        return (matrix if candidates is None else _pick(matrix, candidates)).float()


class OwnRows(QHead):
    """Rows that are parameters of the head, hence sized by the vocabulary."""

    def rows(self, matrix: Tensor, candidates: Tensor | None = None) -> Tensor:
        return self.weight if candidates is None else _pick(self.weight, candidates)

    @torch.no_grad()
    def resize(self, vocabulary: int) -> None:
        """Follows a resized LM head: rows beyond the new size go, new ones answer `initial_value`."""
        kept = min(vocabulary, self.weight.shape[1])
        weight = self.weight.new_zeros(self.weight.shape[0], vocabulary, self.weight.shape[2])
        weight[:, :kept] = self.weight[:, :kept]
        self.weight = nn.Parameter(weight, self.weight.requires_grad)
        if self.bias is not None:
            bias = self.bias.new_full((self.bias.shape[0], vocabulary), self.initial_value)
            bias[:, :kept] = self.bias[:, :kept]
            self.bias = nn.Parameter(bias, self.bias.requires_grad)


class LinearQ(OwnRows, Head):
    def __init__(self, heads: int, width: int, vocabulary: int, initial_value: float):
        super().__init__()
        self.width = width
        self.initial_value = initial_value
        self.weight = _parameter(heads, vocabulary, width)
        self.register_buffer("constant", torch.empty((), dtype=torch.float32))
        self.bias = None

    def reset(self) -> None:
        init.normal_(self.weight, std=TIE_BREAK * self.weight.shape[-1] ** -0.5)
        init.constant_(self.constant, self.initial_value)

    def features(self, hidden: Tensor) -> Tensor:
        return hidden.expand(self.weight.shape[0], -1, -1)

    def offset(self, hidden: Tensor) -> Tensor:
        return self.constant.view(1, 1)


class MLPQ(OwnRows, TwoLayers):
    def __init__(self, heads: int, width: int, vocabulary: int, initial_value: float):
        super().__init__(heads, width)
        self.initial_value = initial_value
        self.weight = _parameter(heads, vocabulary, 2 * width)
        self.bias = _parameter(heads, vocabulary)

    def reset(self) -> None:
        super().reset()
        init.zeros_(self.weight)
        init.constant_(self.bias, self.initial_value)

    def offset(self, hidden: Tensor) -> Tensor:
        return hidden.new_zeros(1, 1)


Q_HEADS = {"tied": TiedQ, "linear": LinearQ, "mlp": MLPQ}


@dataclass(frozen=True)
class ValueHeadsConfig:
    """Which heads a guided model carries.

    Args:
      kind: "tied", "linear" or "mlp" (see the module).
      heads: H, the online Q heads; there are as many targets. 2 is the papers' double Q.
      initial_value: what Q and V answer before training, in scaled reward units; best the data's mean return-to-go.
      utterance: whether Q and V of whole turns come along.
    """

    kind: str = "tied"
    heads: int = 2
    initial_value: float = 0.0
    utterance: bool = False

    def __post_init__(self):
        if self.kind not in Q_HEADS:
            raise InputError(f"value_heads.kind: found {shown(self.kind)}, expected one of {', '.join(Q_HEADS)}")
        if self.heads < 1:
            raise InputError(f"value_heads.heads: found {self.heads}, expected at least 1")


class ValueHeads(nn.Module):
    """All heads of a model: q, target_q, v, and with `utterance` also utterance_q, utterance_target_q, utterance_v."""

    def __init__(self, config: ValueHeadsConfig, vocabulary: int, width: int):
        super().__init__()
        q_head = functools.partial(Q_HEADS[config.kind], config.heads, width, vocabulary, config.initial_value)
        self.q, self.target_q = q_head(), q_head()
        self.v = ScalarHead(1, width, config.initial_value)
        if config.utterance:
            self.utterance_q = ScalarHead(config.heads, width, config.initial_value)
            self.utterance_target_q = ScalarHead(config.heads, width, config.initial_value)
            self.utterance_v = ScalarHead(1, width, config.initial_value)

    def online(self) -> list[Head]:
        return [head for name, head in self.named_children() if "target" not in name]

    def targets(self) -> list[Head]:
        return [head for name, head in self.named_children() if "target" in name]

    def follow(self, matrix: Tensor) -> None:
        """Keeps up with the LM head (V,d): its size, and its scale for tied heads."""
        for head in (self.q, self.target_q):
            if isinstance(head, TiedQ):
                head.follow(matrix)
            elif head.weight.shape[1] != matrix.shape[0]:
                head.resize(matrix.shape[0])

    @torch.no_grad()
    def update_targets(self, rate: float) -> None:
        """target ← rate · online + (1 − rate) · target; a rate of 1 copies."""
        pairs = [(self.q, self.target_q)]
        if hasattr(self, "utterance_q"):
            pairs.append((self.utterance_q, self.utterance_target_q))
        for online, target in pairs:
            torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), rate)
