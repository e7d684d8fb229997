"""Twin Q heads, their target heads and V, computed from the hidden states of a causal LM (Snell et al. 2023, ILQL).

A state s is a position in a row of tokens, with the hidden state h (d numbers) of the decoder there; an action a is
the next token, one of V. N is the number of states, C that of candidate tokens per state. Online heads are the trained
ones; target heads are slow averages of online Q heads.

A Q head is linear in its features: Q_i(s,a) = z_i(s) · row_i[a] + bias_i[a] + offset_i(s), for heads i = 1..H that are
computed together. There are three kinds:

    kind     features z_i(s)            row_i[a]                    bias_i[a]   offset_i(s)
    tied     c · M_i h          (d)     E[a], the LM head's row     none        w_i · h + b_i
    linear   h                  (d)     W_i[a]                      none        one stored constant
    mlp      relu(A_i h + a_i)  (2d)    W_i[a]                      learnt      0

tied and linear are linear in h, so that they can be added to the LM head (tied as β·c·E·M). mlp is the papers' kind.

Initialisation. All heads start at `initial_value`: w and the rows of mlp are 0. M and the rows of linear are random,
but so small (TIE_BREAK) that Q differs from `initial_value` by only about 1e-3 if h has unit variance. With zeros
instead, the twins would be equal and get equal gradients for ever, so that the minimum of both would be either one.
The small difference does not make the twins of tied and linear drift far apart: where the data determine Q, both learn
the same. The twins of mlp have different first layers from the start.

tied reads the live E without gradient: the policy's loss changes E, the loss of Q never does. Its target averages M, w
and b only, a deviation from a full target copy.

The number c = 1 / (root mean square length of E's rows) is needed because an Adam step changes Q in proportion to that
length, which is .02·√d in a fresh model and can be any number in a trained one. This was measured by fitting noisy
values of four tokens per state at widths 64, 128 and 768. With rows scaled to unit length, learning curves were those
of a linear head. With unscaled rows, learning was 4 to 10 times slower for fresh rows at width 64, and diverged for
rows ten times longer at width 768. c is stored, and computed anew at every target update: in forward, it would cost a
pass over E per token.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init

from offline_lmrl.errors import InputError, shown
from offline_lmrl.ops.vocabulary import logsumexp_scores

TIE_BREAK = 2e-4  # standard deviation of a fresh head's Q around initial_value, for h of unit variance


def _checked(method: Callable) -> Callable:
    """A decorator for methods of heads that checks the width of their hidden states and casts these to fp32.

    Under autocast the first maps of a head then run in its dtype. What follows them is in fp32 (`_fp32`): advantages
    are small differences of large values, for which half precision does not suffice.

    Raises: InputError, when the method is called, if the width of the hidden states is not that of the LM head.
    """

    @functools.wraps(method)
    def run(self, hidden, *args, **kwargs):
        if hidden.shape[-1] != self.width:
            raise InputError(
                f"model: found a decoder with hidden states of width {hidden.shape[-1]} before an LM head of width "
                f"{self.width}, expected equal widths, which value heads need"
            )
        return method(self, hidden.float(), *args, **kwargs)

    return run


def _fp32(hidden: Tensor) -> torch.autocast:
    """Return a context manager without autocast on the device of a tensor."""
    return torch.autocast(hidden.device.type, enabled=False)


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, dtype=torch.float32))


def _pick(table: Tensor, candidates: Tensor) -> Tensor:
    """Look up token ids (N,C) in a table (H,V,...); return (H,N,C,...).

    The backward pass is several times faster than that of plain indexing.
    """
    return table.index_select(1, candidates.flatten()).unflatten(1, candidates.shape)


class Head(nn.Module):
    """The base class of heads, which stay in fp32 when the model is cast: bf16 would lose Polyak steps of .005.

    Subclasses define `reset()`, which fills in fresh parameters. It uses transformers' initialisers, because these
    skip parameters that were loaded from disk.
    """

    def _apply(self, fn, recurse=True):
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            # Follow a move to another device, but not a cast to another dtype.
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)


class TwoLayers(Head):
    """The first layer of Q heads of the kind "mlp", scalar heads and bin heads, d -> 2d for each of the H heads.

    Args:
      heads: H.
      width: d.
    """

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
    """H heads that give one number per state, by two layers d -> 2d -> 1: for V, and for Q and V of whole turns.

    Args:
      heads: H.
      width: d.
      initial_value: the output before training, in scaled reward units.
    """

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
        """Set a single head (H = 1) to w · h + b, exactly.

        Its first two hidden units compute relu(w · h) − relu(−w · h) = w · h. The others keep their first layer and
        have output weight 0, as in a fresh head.

        Args:
          weight: w, (d,).
          bias: b.
        """
        self.hidden_weight[0, :2] = torch.stack([weight, -weight])
        self.weight[0, :2] = torch.tensor([1.0, -1.0])
        self.bias.fill_(bias)

    @_checked
    def forward(self, hidden: Tensor) -> Tensor:
        """Map hidden states (N,d) to values (H,N)."""
        features = self.features(hidden)
        with _fp32(hidden):
            return torch.einsum("hnk,hk->hn", features.float(), self.weight) + self.bias.unsqueeze(1)


class QHead:
    """The forward pass of H Q heads over the vocabulary:  Q = z · row + bias + offset.

    The table at the top of this module gives the parts for each kind of head. The three classes below compute them;
    `matrix` (V,d) is the LM head's weight, which only tied heads use:

        features(hidden (N,d))               z, (H,N,K)
        rows(matrix)                         row, (H,V,K) or (1,V,K) if the heads share it
        rows(matrix, candidates (N,C))       the same for some token ids per state, (H,N,C,K) or (1,N,C,K)
        bias                                 (H,V) or None
        offset(hidden (N,d))                 broadcasts against (H,N)
    """

    @_checked
    def forward(self, hidden: Tensor, matrix: Tensor | None, candidates: Tensor | None = None) -> Tensor:
        """Compute Q of all tokens, or of some.

        Args:
          hidden: hidden states, (N,d).
          matrix: the weight of the LM head, (V,d); heads that are not tied also take None, as in fitted Q evaluation,
            which has no LM head.
          candidates: token ids (N,C), C per state; None = the whole vocabulary.
        Returns: (H,N,V) or (H,N,C), fp32.
        """
        features = self.features(hidden)
        with _fp32(hidden):
            return self._q(features.float(), hidden, matrix, candidates)

    def _q(self, features: Tensor, hidden: Tensor, matrix: Tensor | None, candidates: Tensor | None) -> Tensor:
        if candidates is None:
            q = torch.einsum("hnk,hvk->hnv", features, self.rows(matrix))
            bias = None if self.bias is None else self.bias.unsqueeze(1)
        else:
            q = self._looked_up(features, matrix, candidates)
            bias = None if self.bias is None else _pick(self.bias, candidates)
        return (q if bias is None else q + bias) + self.offset(hidden).unsqueeze(-1)

    def _looked_up(self, features: Tensor, matrix: Tensor | None, candidates: Tensor) -> Tensor:
        """Multiply features (H,N,K) by the rows of candidates (N,C), without a bias; return (H,N,C)."""
        if candidates.shape[1] == 1:
            return (features.unsqueeze(2) * self.rows(matrix, candidates)).sum(-1)
        if matrix is not None and candidates.numel() < matrix.shape[0]:
            # Few states: only the rows of each are read. They fit into the processor's cache and are multiplied there.
            # Neighbouring candidates that are equal fill up the columns of a state (`next_token`).
            q = features.new_empty(len(features), *candidates.shape)
            for n, ids in enumerate(candidates):
                tokens, column = ids.unique_consecutive(return_inverse=True)
                rows = self.rows(matrix, tokens.unsqueeze(0)).squeeze(1)
                q[:, n] = torch.einsum("hk,hck->hc", features[:, n], rows)[:, column]
            return q
        # Many states share most of their candidates, so it is cheaper to look up and widen each row once for all.
        tokens, column = candidates.unique(return_inverse=True)
        q = torch.einsum("hnk,hvk->hnv", features, self.rows(matrix, tokens.unsqueeze(0)).squeeze(1))
        return q.gather(-1, column.expand(len(q), -1, -1))

    @_checked
    def logged(
        self, hidden: Tensor, matrix: Tensor, action: Tensor, counted: Tensor | None, table: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Compute Q of logged actions, and log Σ_a exp Q(s,a) at some states without Q of all tokens in memory.

        Args:
          hidden: hidden states, (N,d).
          matrix: the weight of the LM head, (V,d).
          action: (N,) long.
          counted: the C states of which the sum is wanted, (C,) long; None = none.
          table: `matrix` without gradient in the dtype of the products that are summed; unused without `counted`.
        Returns: Q, (H,N), fp32; the logarithms of the sums, (H,C), fp32, or None.
        """
        features = self.features(hidden)
        with _fp32(hidden):
            q = self._q(features.float(), hidden, matrix, action.unsqueeze(1)).squeeze(-1)
            if counted is None:
                return q, None
            some = slice(None) if len(counted) == len(action) else counted
            rows, table = self.scored(matrix, table)
            logsumexp = logsumexp_scores(features[:, some], rows, self.bias, table=table)
            return q, logsumexp + self.offset(hidden[some])

    def scored(self, matrix: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """Return `rows(matrix)`, and the same without gradient in the dtype of `table`, which is that of `matrix`."""
        rows = self.rows(matrix)
        return rows, rows.detach().to(table.dtype)

    def uses_weight_of(self, lm_head: nn.Module) -> bool:
        """True if Q of all tokens can be computed in the pass that the LM head makes for the logits (`TiedQ`)."""
        return False


# Q_i(s,a) = c · M_i h · E[a] + w_i · h + b_i, where E is the live LM head.
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
        """Set c from the present weight of the LM head, (V,d)."""
        length = torch.linalg.vector_norm(matrix, dtype=torch.float32) / matrix.shape[0] ** 0.5
        self.row_scale.copy_(1 / length.clamp(min=1e-6))

    def features(self, hidden: Tensor) -> Tensor:
        return self.row_scale * torch.einsum("nd,hkd->hnk", hidden, self.map)

    def offset(self, hidden: Tensor) -> Tensor:
        return torch.einsum("nd,hd->hn", hidden, self.state_weight) + self.state_bias.unsqueeze(1)

    @_checked
    def _features_and_offset(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        with _fp32(hidden):
            return self.features(hidden), self.offset(hidden)

    def rows(self, matrix: Tensor, candidates: Tensor | None = None) -> Tensor:
        matrix = matrix.detach().unsqueeze(0)  # the loss of Q must not change the LM head
        return (matrix if candidates is None else _pick(matrix, candidates)).float()

    def scored(self, matrix: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        return table.unsqueeze(0), table.unsqueeze(0)

    def uses_weight_of(self, lm_head: nn.Module) -> bool:
        # A bias, or what a subclass adds (an adapter, a quantised weight), is not part of Q.
        return type(lm_head) is nn.Linear and lm_head.bias is None

    @contextmanager
    def beside_logits(self, lm_head: nn.Linear, hidden: Callable[[], Tensor]) -> Iterator[list[Tensor]]:
        """A context manager in which the LM head's pass for the logits also computes Q of all tokens.

        Reading the LM head's weight takes a large part of the time of a token, and is so done once. The features z
        are rounded to the weight's dtype. Soft cap and scale, which the model applies after the LM head, do not act
        on Q.

        Args:
          lm_head: a head of which `uses_weight_of` is true; it reads the last n positions of the hidden states.
          hidden: a function that gives the hidden states, (B,T,d), when the LM head is called.
        Yields: a list, which holds Q (H,B,n,V), fp32, after that call.
        """
        offsets: list[Tensor] = []
        found: list[Tensor] = []

        def add_features(_, inputs: tuple[Tensor]) -> tuple[Tensor]:
            rows, columns, _ = inputs[0].shape
            z, offset = self._features_and_offset(hidden()[:, -columns:].flatten(0, 1))
            offsets.append(offset.view(-1, rows, columns, 1))
            return (torch.cat([inputs[0], z.reshape(-1, columns, z.shape[-1]).to(inputs[0].dtype)]),)

        def take_out(_, inputs: tuple[Tensor], products: Tensor) -> Tensor:
            offset = offsets.pop()
            rows = offset.shape[1]
            found.append(products[rows:].unflatten(0, (-1, rows)).float() + offset)
            return products[:rows]

        hooks = lm_head.register_forward_pre_hook(add_features), lm_head.register_forward_hook(take_out)
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()


class OwnRows(QHead):
    """A Q head whose rows are its own parameters, and must be resized if the vocabulary's size changes."""

    def rows(self, matrix: Tensor, candidates: Tensor | None = None) -> Tensor:
        return self.weight if candidates is None else _pick(self.weight, candidates)

    @torch.no_grad()
    def resize(self, vocabulary: int) -> None:
        """Change the vocabulary size: drop rows beyond it, or add rows whose Q is `initial_value`."""
        kept = min(vocabulary, self.weight.shape[1])
        weight = self.weight.new_zeros(self.weight.shape[0], vocabulary, self.weight.shape[2])
        weight[:, :kept] = self.weight[:, :kept]
        self.weight = nn.Parameter(weight, self.weight.requires_grad)
        if self.bias is not None:
            bias = self.bias.new_full((self.bias.shape[0], vocabulary), self.initial_value)
            bias[:, :kept] = self.bias[:, :kept]
            self.bias = nn.Parameter(bias, self.bias.requires_grad)


# Q_i(s,a) = W_i[a] · h + a constant.
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


# Q_i(s,a) = W_i[a] · relu(A_i h + a_i) + bias_i[a].
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
    """The value heads of a guided model.

    Args:
      kind: "tied", "linear" or "mlp", as described at the top of models/value_heads.py.
      heads: H, the number of online Q heads, and of target heads; 2 is the papers' double Q.
      initial_value: the output of Q and V before training, in scaled reward units; the mean return-to-go of the data
        is best.
      utterance: True: also make heads for Q and V of whole turns.
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
    """The value heads of a model: the submodules q, target_q and v.

    With `utterance` there are also utterance_q, utterance_target_q and utterance_v, for whole turns. `utterance` is an
    attribute too.

    Args:
      config: the kind and number of the heads.
      vocabulary: V, the number of rows of the LM head's weight.
      width: d, the number of its columns.
    """

    def __init__(self, config: ValueHeadsConfig, vocabulary: int, width: int):
        super().__init__()
        q_head = functools.partial(Q_HEADS[config.kind], config.heads, width, vocabulary, config.initial_value)
        self.q, self.target_q = q_head(), q_head()
        self.v = ScalarHead(1, width, config.initial_value)
        self.utterance = config.utterance
        if self.utterance:
            self.utterance_q = ScalarHead(config.heads, width, config.initial_value)
            self.utterance_target_q = ScalarHead(config.heads, width, config.initial_value)
            self.utterance_v = ScalarHead(1, width, config.initial_value)

    def online(self) -> list[Head]:
        return [head for name, head in self.named_children() if "target" not in name]

    def targets(self) -> list[Head]:
        return [head for name, head in self.named_children() if "target" in name]

    def follow(self, matrix: Tensor) -> None:
        """Adapt the heads to a changed weight (V,d) of the LM head: tied heads to its scale, others to its size."""
        for head in (self.q, self.target_q):
            if isinstance(head, TiedQ):
                head.follow(matrix)
            elif head.weight.shape[1] != matrix.shape[0]:
                head.resize(matrix.shape[0])

    @torch.no_grad()
    def update_targets(self, rate: float) -> None:
        """Set target ← rate · online + (1 − rate) · target; a rate of 1 copies."""
        pairs = [(self.q, self.target_q)]
        if self.utterance:
            pairs.append((self.utterance_q, self.utterance_target_q))
        for online, target in pairs:
            torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), rate)


def forward_with_q(model: PreTrainedModel, *args, **kwargs) -> tuple[Any, Tensor, Tensor]:
    """Run a guided model and compute Q of all tokens, in the same pass of the LM head if the heads are tied.

    Args:
      model: the model, or a PeftModel around it.
      args, kwargs: arguments of the forward of its base class, whose LM head reads the last n positions.
    Returns: the outputs of that forward; the decoder's last hidden states (B,T,d); and Q by the target heads at the
      last n of these, (H,B,n,V), fp32, in scaled reward units.
    """
    head, lm_head = model.value_heads.target_q, model.get_output_embeddings()
    # Hooks cannot be added while a graph is traced for a compiler.
    if torch.compiler.is_compiling() or not head.uses_weight_of(lm_head):
        outputs, hidden = model.forward_with_hidden(*args, **kwargs)
        return outputs, hidden, model.q_values(hidden[:, -outputs.logits.shape[1] :])
    with head.beside_logits(lm_head, lambda: model.get_decoder().last_hidden) as q:
        outputs, hidden = model.forward_with_hidden(*args, **kwargs)
    return outputs, hidden, q[0]


def logits_and_q(model: PreTrainedModel, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Run the LM head of a guided model alone, and compute Q of all tokens as `forward_with_q` does.

    Args:
      model: the model; its forward does nothing after the LM head.
      hidden: the decoder's last hidden states, (B,n,d).
    Returns: logits (B,n,V), and Q by the target heads, (H,B,n,V), fp32, in scaled reward units.
    """
    head, lm_head = model.value_heads.target_q, model.get_output_embeddings()
    if not head.uses_weight_of(lm_head):
        return lm_head(hidden), model.q_values(hidden)
    with head.beside_logits(lm_head, lambda: hidden) as q:
        logits = lm_head(hidden)
    return logits, q[0]
