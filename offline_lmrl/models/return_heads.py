"""Heads that predict a turn's reward and the return before and after it.

Each head predicts a distribution over bins (Janner et al. 2021, Trajectory Transformer), whose mean is the prediction.

    head      state                               predicted number
    returns   before the agent's first token      R_t, the return from this turn on
    reward    after the turn's closing token      r_t, the reward of the turn
    after     after the turn's closing token      R_{t+1}, the return from the next turn on
    ended     after the turn's closing token      1 if the turn ended the episode, else 0

The heads are trained and used under the null condition only: no return is requested in the context
(tokens/conditioning.py). With a requested return R̂_t in the context, R_t would be known, and with R̂_{t+1} also r_t.
All numbers are in scaled reward units. d is the width of the hidden states.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from offline_lmrl.models.value_heads import TwoLayers
from offline_lmrl.tokens.conditioning import distinct, fit_edges

HEADS = ("returns", "reward", "after", "ended")


def fit_heads(steps: Mapping[str, np.ndarray], most: int, discount_per_turn: float) -> dict[str, Any]:
    """Fit the bins of all heads to the training data.

    Args:
      steps: columns of the action steps (`ActionSteps` in tokens/batching.py) that close turns and have a target, (M,)
        each; at least one step.
      most: maximum number of bins of a head.
      discount_per_turn: γ of the returns, which is stored with the bins.
    Returns: the entry `return_heads` of a model's run metadata: name of the head -> its bins (`fit_bins`), and
      `discount_per_turn`.
    """
    earned = outcomes(steps)
    return {name: fit_bins(earned[name], most) for name in HEADS} | {"discount_per_turn": discount_per_turn}


def fit_bins(values: np.ndarray, most: int) -> dict[str, list[float]]:
    """Fit bins to values.

    If there are at most `most` distinct values, each gets a bin. Otherwise there are `most` bins of equal width,
    without the empty ones.

    Args:
      values: (N,).
      most: maximum number of bins.
    Returns: `edges`, the K − 1 rising borders between bins, and `means`, the mean of the values in each of the K bins.
    """
    edges = fit_edges(values, "unique" if len(distinct(values)[0]) <= most else "linear", most)
    bins = np.searchsorted(edges, values, side="right")
    return {"edges": edges.tolist(), "means": [float(values[bins == b].mean()) for b in range(len(edges) + 1)]}


class BinHead(TwoLayers):
    """A head that gives logits of K bins: two layers, d -> 2d -> K. All bins are equally likely before training.

    Args:
      bins: `edges` and `means`, as `fit_bins` returns them.
      width: d.
    """

    def __init__(self, bins: Mapping[str, list[float]], width: int):
        super().__init__(1, width)
        self.edges, self.means = bins["edges"], bins["means"]
        self.weight = nn.Parameter(torch.empty(len(self.means), 2 * width, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(len(self.means), dtype=torch.float32))

    def reset(self) -> None:
        super().reset()
        init.zeros_(self.weight)
        init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map hidden states (N,d) to logits (N,K), fp32."""
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(self.features(hidden.float())[0], self.weight, self.bias)

    def mean(self, hidden: Tensor) -> Tensor:
        """Return the mean of the predicted distribution, (N,d) -> (N,)."""
        probability = self(hidden).softmax(-1)
        return probability @ probability.new_tensor(self.means)

    def log_prob(self, hidden: Tensor, values: Tensor) -> Tensor:
        """Return the log-probability of the bins that contain the values.

        Args:
          hidden: hidden states, (N,d).
          values: the true numbers, (N,).
        Returns: (N,), nats.
        """
        bins = torch.bucketize(values.float(), values.new_tensor(self.edges, dtype=torch.float32), right=True)
        return -F.cross_entropy(self(hidden), bins, reduction="none")


class ReturnHeads(nn.Module):
    """The four heads, as submodules with the names in HEADS.

    Args:
      block: name of the head -> its bins: the entry `return_heads` of a model's run metadata (`fit_heads`).
      width: d.
    """

    def __init__(self, block: Mapping[str, Any], width: int):
        super().__init__()
        for name in HEADS:
            self.add_module(name, BinHead(block[name], width))

    def log_prob(self, opening: Tensor, closing: Tensor, outcome: Mapping[str, Tensor]) -> Tensor:
        """Return the log-probability of the outcomes of M turns, summed over the heads.

        Args:
          opening: hidden states before the first token of each turn, (M,d).
          closing: hidden states after the closing token of each turn, (M,d).
          outcome: name of the head -> the true numbers, (M,) each (`outcomes`).
        Returns: (M,), nats.
        """
        total = self.returns.log_prob(opening, outcome["returns"])
        return total + sum(self.get_submodule(name).log_prob(closing, outcome[name]) for name in HEADS[1:])

    def expert(self, opening: Tensor, inverse_temperature: float) -> Tensor:
        """Return the mean of R_t under the distribution proportional to p(R_t|s) · exp(κ · R_t).

        κ = 0 gives the expected return of the data, a large κ the best return.
        Deviation: Multi-Game Decision Transformers (Lee et al. 2022) draw R_t from this distribution instead.

        Args:
          opening: hidden states before the first token of the turns, (N,d).
          inverse_temperature: κ, per scaled reward unit.
        Returns: (N,), in scaled reward units.
        """
        logits = self.returns(opening)
        means = logits.new_tensor(self.returns.means)
        return (logits + inverse_temperature * means).softmax(-1) @ means

    def outcome(self, closing: Tensor) -> Tensor:
        """Predict the outcome of turns.

        Args:
          closing: hidden states after the closing tokens of the turns, (N,d).
        Returns: (N,3): expected reward of the turn, expected return after it (both in scaled reward units), and
          probability that it ended the episode.
        """
        return torch.stack([self.get_submodule(name).mean(closing) for name in HEADS[1:]], dim=-1)


def outcomes(steps: Mapping[str, Any]) -> dict[str, Any]:
    """Compute the number that each head should predict.

    Args:
      steps: the packed action steps that close turns (`ActionSteps` in tokens/batching.py), (M,) each. The
        `return_to_go` of such a step is R_t of the whole turn.
    Returns: name of the head -> the true numbers, (M,).
    """
    return {
        "returns": steps["return_to_go"],
        "reward": steps["reward"],
        "after": (steps["return_to_go"] - steps["reward"]) / steps["discount"],
        "ended": 1.0 - steps["bootstrap"],
    }
