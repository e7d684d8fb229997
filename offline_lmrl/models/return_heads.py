"""Heads that say what a turn earns and what follows, each as a distribution over bins (Janner et al. 2021, Trajectory
Transformer): the mean of that distribution is the number.

    returns   before the agent's first token      R_t, what is still to come
    reward    behind the turn's closing token     r_t, what the turn paid
    after     behind the turn's closing token     R_{t+1}, what comes after it
    ended     behind the turn's closing token     1 where the turn ended the episode, else 0

They are trained and read where no return is asked for: elsewhere R̂_t is in their context, which tells R_t and, with
R̂_{t+1}, also r_t. All numbers are in scaled reward units.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from offline_lmrl.data.conditioning import distinct, fit_edges
from offline_lmrl.models.value_heads import TwoLayers

HEADS = ("returns", "reward", "after", "ended")


def fit_heads(steps: Mapping[str, np.ndarray], most: int, discount_per_turn: float) -> dict[str, Any]:
    """The block of heads for turns like these, at most so many bins.

    steps: columns of the action steps (data/batching.py) that close turns and have a target; at least one.
    """
    earned = outcomes(steps)
    return {name: fit_bins(earned[name], most) for name in HEADS} | {"discount_per_turn": discount_per_turn}


def fit_bins(values: np.ndarray, most: int) -> dict[str, list[float]]:
    """The `edges` between bins, rising, and the `means` of the values in each of them.

    A bin per distinct value where there are at most `most`, else as many of equal width, less those that are empty.
    """
    edges = fit_edges(values, "unique" if len(distinct(values)[0]) <= most else "linear", most)
    bins = np.searchsorted(edges, values, side="right")
    return {"edges": edges.tolist(), "means": [float(values[bins == b].mean()) for b in range(len(edges) + 1)]}


class BinHead(TwoLayers):
    """Logits of the bins, d -> 2d -> K. All bins are equally likely before training.

    bins: as `fit_bins` gives them.
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
        """hidden (N,d) -> (N,K) in fp32."""
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(self.features(hidden.float())[0], self.weight, self.bias)

    def mean(self, hidden: Tensor) -> Tensor:
        """The expected number, (N,d) -> (N,)."""
        probability = self(hidden).softmax(-1)
        return probability @ probability.new_tensor(self.means)

    def log_prob(self, hidden: Tensor, values: Tensor) -> Tensor:
        """Of the bins that values (N,) lie in: (N,)."""
        bins = torch.bucketize(values.float(), values.new_tensor(self.edges, dtype=torch.float32), right=True)
        return -F.cross_entropy(self(hidden), bins, reduction="none")


class ReturnHeads(nn.Module):
    """The heads of HEADS as submodules of these names.

    block: their bins by name, and the discount_per_turn of their returns (`fit_heads`); it is the block `return_heads`
      of a model's settings.
    """

    def __init__(self, block: Mapping[str, Any], width: int):
        super().__init__()
        for name in HEADS:
            self.add_module(name, BinHead(block[name], width))

    def log_prob(self, opening: Tensor, closing: Tensor, outcome: Mapping[str, Tensor]) -> Tensor:
        """Of what turns earned, the sum over heads: states (M,d) before and behind them, numbers (M,) -> (M,)."""
        total = self.returns.log_prob(opening, outcome["returns"])
        return total + sum(getattr(self, name).log_prob(closing, outcome[name]) for name in HEADS[1:])

    def expert(self, opening: Tensor, inverse_temperature: float) -> Tensor:
        """The mean of R_t under p(R_t|s) · exp(κ · R_t), (N,d) -> (N,): κ = 0 gives what is usual, a large κ the best.

        Multi-Game Decision Transformers (Lee et al. 2022) draw R_t from it instead.
        """
        logits = self.returns(opening)
        means = logits.new_tensor(self.returns.means)
        return (logits + inverse_temperature * means).softmax(-1) @ means

    def outcome(self, closing: Tensor) -> Tensor:
        """Expected reward of the turn, return after it, and probability that it ended the episode: (N,d) -> (N,3)."""
        return torch.stack([getattr(self, name).mean(closing) for name in HEADS[1:]], dim=-1)


def outcomes(steps: Mapping[str, Any]) -> dict[str, Any]:
    """What the turns that these steps close earned, by name of the head; steps of one turn have its whole return."""
    return {
        "returns": steps["return_to_go"],
        "reward": steps["reward"],
        "after": (steps["return_to_go"] - steps["reward"]) / steps["discount"],
        "ended": 1.0 - steps["bootstrap"],
    }
