"""The return that a whole reply would earn, estimated from held-out logs alone: a ridge regression; numpy only.

    Q̂(s, reply) = mean return + θ · x(s, reply),    θ = argmin Σ_i (G_i − Q̂_i)² + λ |θ|²

G is the logged return from a reply on, and x are features of the reply that the caller gives. The heads that guide
the policy have no part in Q̂, nor has the data that they were fitted on: guidance chooses what its own heads rate
highest, so these would promise more than it earns. Groups of rows are dealt into FOLDS parts, and a reply to a prompt
of some group is rated by the fit without that group's part. λ is the one of PENALTIES with the least squared error on
the parts left out; where the features predict nothing, that is a large one, and Q̂ is nearly constant.

The mean difference between two sets of replies is linear in the returns, Σ_i w_i G_i. Its interval adds two variances:
that of the differences between groups of prompts, and that of the fit, Σ_g (Σ_{i in g} w_i e_i)², where e are the
errors on the parts left out (the cluster-robust sandwich). What ridge shrinks away is not in it: a true difference is
larger rather than smaller.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from offline_lmrl.evaluation.metrics import Estimate, mean_interval
from offline_lmrl.ops.intervals import student_t

FOLDS = 5
PENALTIES = 10.0 ** np.arange(-2, 5)  # λ, in units of the mean squared norm of the features
LIMIT = 4.0  # standard deviations to which features are cut, so as not to extrapolate to replies unlike any logged one
CONSTANT = 1e-6  # features with a smaller standard deviation are not used


@dataclass(frozen=True)
class _Fold:
    """The fit without the rows of one fold.

    rows: (m,) indices of the rows that it is fitted on.
    features: (m, F) their features minus the mean.
    inverse: (m, m), (features · featuresᵀ + λ)⁻¹.
    """

    rows: np.ndarray
    features: np.ndarray
    inverse: np.ndarray


@dataclass(frozen=True)
class HeldOutQ:
    """A ridge regression of returns on features of replies, made by `fit`.

    mean, spread: (F,) mean and standard deviation of the logged features.
    groups: group of each of the n logged replies.
    returns: (n,) their returns.
    predicted: (n,) each one's Q̂ by the fit without its fold.
    fold_of: group -> index of its fold.
    folds: the fits.
    """

    mean: np.ndarray
    spread: np.ndarray
    groups: Sequence[Hashable]
    returns: np.ndarray
    predicted: np.ndarray
    fold_of: dict[Hashable, int]
    folds: list[_Fold]

    @classmethod
    def fit(cls, features: np.ndarray, returns: np.ndarray, groups: Sequence[Hashable]) -> "HeldOutQ | None":
        """Fit Q̂ to logged replies.

        Args:
          features: (n, F).
          returns: (n,) the return from each reply on.
          groups: the group of each reply; replies of one group may depend on each other.
        Returns: the fit; None if there are fewer than two groups or all returns are equal.
        """
        different = list(dict.fromkeys(groups))
        if len(different) < 2 or np.ptp(returns) == 0:
            return None
        order, count = np.random.default_rng(0).permutation(len(different)), min(FOLDS, len(different))
        fold_of = {different[i]: place % count for place, i in enumerate(order)}
        fold = np.array([fold_of[group] for group in groups])
        mean, spread = features.mean(0), features.std(0)
        x = _standardised(features, mean, spread)
        penalties = PENALTIES * np.square(x).sum(1).mean()
        parts, errors = [], np.zeros((len(penalties), len(x)))
        for number in range(count):
            rows, out = np.flatnonzero(fold != number), np.flatnonzero(fold == number)
            centre, level = x[rows].mean(0), returns[rows].mean()
            own = x[rows] - centre
            values, vectors = np.linalg.eigh(own @ own.T)
            parts.append((rows, own, values.clip(min=0.0), vectors))
            across, target = (x[out] - centre) @ own.T @ vectors, vectors.T @ (returns[rows] - level)
            for i, penalty in enumerate(penalties):
                errors[i, out] = returns[out] - level - across @ (target / (parts[-1][2] + penalty))
        best = int(np.square(errors).sum(1).argmin())
        folds = [
            _Fold(rows, own, vectors / (values + penalties[best]) @ vectors.T) for rows, own, values, vectors in parts
        ]
        return cls(mean, spread, list(groups), returns, returns - errors[best], fold_of, folds)

    def difference(self, features: np.ndarray, others: np.ndarray, groups: Sequence[Hashable]) -> Estimate:
        """Return the mean of Q̂(s, reply) − Q̂(s, other reply) over prompts, with its 95% interval.

        Args:
          features: (P, F), features of the replies.
          others: (P, F), features of the replies that they are compared with, to the same prompts.
          groups: the group of each prompt. A group that no fit used may be rated by any of them.
        """
        change = _standardised(features, self.mean, self.spread) - _standardised(others, self.mean, self.spread)
        fold = np.array([self.fold_of.get(group, place % len(self.folds)) for place, group in enumerate(groups)])
        gains, weight = np.zeros(len(change)), np.zeros(len(self.returns))
        for number, part in enumerate(self.folds):
            of_rows = part.inverse @ part.features @ change[fold == number].T  # (m, prompts of this fold)
            of_rows -= of_rows.mean(0)  # the level of the returns cancels in a difference
            gains[fold == number] = self.returns[part.rows] @ of_rows
            weight[part.rows] += of_rows.sum(1) / len(change)
        by_group: dict[Hashable, float] = {}
        for group, share in zip(self.groups, weight * (self.returns - self.predicted), strict=True):
            by_group[group] = by_group.get(group, 0.0) + share
        found = mean_interval(gains.tolist(), groups)
        fit = student_t(len(by_group) - 1) * math.sqrt(sum(share**2 for share in by_group.values()))
        half = math.hypot((found.high - found.low) / 2, fit)
        return found._replace(low=found.mean - half, high=found.mean + half)


def _standardised(features: np.ndarray, mean: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """Return features with mean 0 and standard deviation 1, cut to ±LIMIT; constant ones are 0."""
    used = spread > CONSTANT
    return np.where(used, ((features - mean) / np.where(used, spread, 1.0)).clip(-LIMIT, LIMIT), 0.0)
