"""log π of an action and log Σ_a exp Q(s,a), over a vocabulary, with gradients and without a table of all scores.

Both are made of the scores  s[n,a] = post(z[n] · W[a] + b[a])  of V tokens at N states. A table of them would be the
largest tensor of a training step by far, and autograd would keep several. Here a chunk of states at a time is scored
in one workspace, which the softmax then overwrites, and which is multiplied at once into the gradients:

    ∂ log Σ exp s / ∂s = p        ∂ log π(a) / ∂s = onehot(a) − p        p = softmax(s)

So the gradient with respect to z is known, per state, before the upstream gradient is: it is only multiplied by a
number per state afterwards. That of W sums over states. It is formed at once for a loss that weighs all states alike
(`alike`); if the upstream gradient turns out otherwise, the chunks are scored a second time. In matrix products over
the vocabulary this makes 2 for a constant W and 3 for a trained one, which is what a dense table needs.

Scores have the dtype of `table`, W in autocast's dtype; sums over the vocabulary and the results are fp32 (float64 for
float64). Wijmans et al. 2024 (Cut Your Losses) and Hsu et al. 2024 (Liger) do this for the cross-entropy on GPUs.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from offline_lmrl.ops.inputs import at_least_float32, check_shapes

CHUNK = 2**25  # entries of the workspace for scores
BLOCK = 2**20  # entries that pass through the softmax together on a CPU, so that they stay in its cache
_workspaces: dict[tuple, Tensor] = {}


class Post(NamedTuple):
    """What a model does to the products of its LM head: x becomes cap · tanh(scale · x / cap), or scale · x.

    scale: the factor.
    cap: the soft cap; None = none.
    """

    scale: float = 1.0
    cap: float | None = None


class OutputHead(NamedTuple):
    """The map from features z to scores.

    weight: W, (V,K).
    bias: b, (V,) or None.
    post: what follows products and bias.
    table: W without gradient in the dtype of the scores; None = W in its own.
    """

    weight: Tensor
    bias: Tensor | None = None
    post: Post = Post()
    table: Tensor | None = None


def action_log_prob(features: Tensor, action: Tensor, head: OutputHead, *, alike: bool = True) -> Tensor:
    """Compute log π(a|s) = s[a] − log Σ exp s of the N actions.

    Args:
      features: z, what the head reads at N states, (N,K).
      action: (N,) long.
      head: the map to scores.
      alike: True if the loss is expected to weigh all states alike. It changes the time, not the result.
    Returns: (N,), in nats.
    """
    weight, bias, post, table = head
    check_shapes("n k, v k, n", features, weight, action)
    table = weight.detach() if table is None else table
    bias = None if bias is None else bias.unsqueeze(0)
    rest = action, table.unsqueeze(0), post, alike
    return _OverVocabulary.apply(features.unsqueeze(0), weight.unsqueeze(0), bias, rest)[0]


def logsumexp_scores(
    features: Tensor, weight: Tensor, bias: Tensor | None = None, *, table: Tensor | None = None
) -> Tensor:
    """Compute log Σ_a exp(z[n] · W[a] + b[a]) for each of H heads.

    Args:
      features: z, (H,N,K).
      weight: W, (H,V,K), or (1,V,K) if the heads share it.
      bias: b, (H,V) or None.
      table: W without gradient in the dtype of the scores; None = W in its own.
    Returns: (H,N).
    """
    table = weight.detach() if table is None else table
    if len(table) < len(features) and bias is None:  # what is shared is read once for the states of all heads
        together = features.flatten(0, 1).unsqueeze(0)
        return _OverVocabulary.apply(together, weight, None, (None, table, Post(), True)).view(features.shape[:2])
    return _OverVocabulary.apply(features, weight, bias, (None, table, Post(), True))


class _OverVocabulary(torch.autograd.Function):
    """log Σ exp s, (H,N), or with actions s[a] − log Σ exp s, from z (H,N,K), W and b of H heads."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, bias: Tensor | None, rest: tuple) -> Tensor:
        action, table, post, alike = rest
        needs_z, *needs_sums = ctx.needs_input_grad[:3]
        z, bias = features.to(table.dtype), None if bias is None else bias.detach()
        scores = _Scores(z, table, bias, action, post)
        result = torch.empty(z.shape[:2], dtype=at_least_float32(z[:0]).dtype, device=z.device)
        grad_z = torch.empty_like(z) if needs_z else None
        sums = _Sums(scores) if any(needs_sums) and alike else None
        for head, rows, gradient in scores.chunks(result, gradient=any(ctx.needs_input_grad[:3])):
            if grad_z is not None:
                torch.mm(gradient, table[head % len(table)], out=grad_z[head, rows])
            if sums is not None:
                sums.add(head, gradient, z[head, rows])
        ctx.scores, ctx.sums, ctx.grad_z, ctx.dtypes = scores, sums, grad_z, (features.dtype, weight.dtype)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple:
        needs_z, *needs_sums = ctx.needs_input_grad[:3]
        grads: list[Tensor | None] = [None] * 4
        if needs_z:
            grads[0] = (ctx.grad_z * upstream.unsqueeze(-1)).to(ctx.dtypes[0])
        if any(needs_sums):
            first = upstream[:, :1] if upstream.shape[1] else upstream.new_zeros(len(upstream), 1)
            sums = ctx.sums
            if sums is None or not bool((upstream == first).all()):
                sums, first = _Sums(ctx.scores), torch.ones_like(first)
                for head, rows, gradient in ctx.scores.chunks(torch.empty_like(upstream)):
                    weighted = gradient.mul_(upstream[head, rows, None])
                    sums.add(head, weighted, ctx.scores.z[head, rows])
            if needs_sums[0]:
                grads[1] = (sums.weight * first.unsqueeze(-1)).to(ctx.dtypes[1])
            if needs_sums[1]:
                grads[2] = sums.bias * first
        return tuple(grads)


class _Scores:
    """The scores of H heads at N states, a chunk at a time.

    Args:
      z: (H,N,K).
      table: W in the dtype of the scores, (H,V,K), or (1,V,K) if the heads share it.
      bias: (H,V) or None.
      action: (N,) or None.
      post: what follows products and bias.
    """

    def __init__(self, z: Tensor, table: Tensor, bias: Tensor | None, action: Tensor | None, post: Post):
        self.z, self.table, self.bias, self.action, self.post = z, table, bias, action, post
        self.rows = max(1, min(z.shape[1], CHUNK // table.shape[1]))

    def chunks(self, result: Tensor, gradient: bool = True) -> Iterator[tuple[int, slice, Tensor]]:
        """Yield the head and the states of each chunk, and the gradient of its results with respect to its scores.

        Args:
          result: (H,N), which is filled in.
          gradient: False: yield scores in place of the gradient, which nobody needs.
        """
        heads, count, _ = self.z.shape
        workspace = _workspace("scores", self.rows, self.table)
        for head in range(heads):
            for start in range(0, count, self.rows):
                rows = slice(start, min(count, start + self.rows))
                scores = workspace[: rows.stop - start]
                torch.mm(self.z[head, rows], self.table[head % len(self.table)].T, out=scores)
                block = max(1, BLOCK // scores.shape[1]) if scores.device.type == "cpu" else len(scores)
                for i in range(0, len(scores), block):
                    part = slice(i, min(len(scores), i + block))
                    states = slice(start + i, start + part.stop)
                    self._reduce(head, states, scores[part], result, gradient)
                yield head, rows, scores

    def _reduce(self, head: int, states: slice, products: Tensor, result: Tensor, gradient: bool) -> None:
        """Compute the results of some states from their products (n,V), and overwrite these with the gradient."""
        wide = products
        if products.dtype != result.dtype:
            wide = _workspace("wide", max(1, len(products)), result, products.shape[1])[: len(products)].copy_(
                products
            )
        if self.bias is not None:
            wide.add_(self.bias[head])
        scale, cap = self.post
        if scale != 1:
            wide.mul_(scale)
        bent = None
        if cap is not None:
            wide.div_(cap).tanh_()
            bent = (1 - wide.square()) * scale
            wide.mul_(cap)
        action = None if self.action is None else self.action[states].unsqueeze(-1)
        chosen = 0.0 if action is None else wide.gather(-1, action)
        largest = wide.amax(-1, keepdim=True)
        total = wide.sub_(largest).exp_().sum(-1, keepdim=True)
        log_sum = largest + total.log()
        result[head, states] = (log_sum if action is None else chosen - log_sum).squeeze(-1)
        if not gradient:
            return
        if action is None:
            wide.div_(total)
        else:
            wide.div_(-total).scatter_add_(-1, action, torch.ones_like(largest))
        if bent is not None:
            wide.mul_(bent)
        elif scale != 1:
            wide.mul_(scale)
        if wide is not products:
            products.copy_(wide)


class _Sums:
    """The sums over states of the gradients with respect to W, (H,V,K), and b, (H,V); `bias` is None without b."""

    def __init__(self, scores: _Scores):
        heads, count, _ = scores.z.shape
        exact = at_least_float32(scores.table[:0]).dtype
        # Sums of several chunks in half precision would lose digits.
        dtype = scores.table.dtype if count <= scores.rows else exact
        make = torch.empty if count else torch.zeros
        self.weight = make(heads, *scores.table.shape[1:], dtype=dtype, device=scores.table.device)
        self.begun = [False] * heads
        self.bias = None if scores.bias is None else torch.zeros_like(scores.bias, dtype=exact)

    def add(self, head: int, gradient: Tensor, z: Tensor) -> None:
        """Add n states of a head: the gradient with respect to their scores, (n,V), and z, (n,K)."""
        if self.bias is not None:
            self.bias[head] += gradient.sum(0, dtype=self.bias.dtype)
        if self.weight.dtype == z.dtype:
            self.weight[head].addmm_(gradient.T, z, beta=float(self.begun[head]))
        elif self.begun[head]:
            self.weight[head] += gradient.T @ z
        else:
            self.weight[head] = gradient.T @ z
        self.begun[head] = True


def _workspace(name: str, rows: int, like: Tensor, columns: int | None = None) -> Tensor:
    """Return memory of at least (rows,V) that is kept from call to call: fresh memory costs more than its use."""
    columns = like.shape[1] if columns is None else columns
    key = name, like.dtype, like.device
    kept = _workspaces.get(key)
    if kept is None or len(kept) < rows * columns:
        kept = _workspaces[key] = torch.empty(rows * columns, dtype=like.dtype, device=like.device)
    return kept[: rows * columns].view(rows, columns)
