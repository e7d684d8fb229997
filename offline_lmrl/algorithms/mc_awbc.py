"""Advantage-weighted behaviour cloning by Monte-Carlo returns.

    L = −min(exp(β_w · (R − b) / σ), c) · log π(a|s)            over the agent's N action tokens

R is the logged return from the token's turn on, b the mean of R over the training data, and σ the standard deviation
of R − b there. No values are learnt: it is the soft form of filtered BC, which gives weight 1 to the best trajectories
and 0 to all others, and a baseline to beat. The optimum is π(a|s) ∝ μ(a|s) · exp(β_w R / σ), where μ wrote the logs.

Reward-weighted regression (Peters & Schaal 2007) has no b; MARWIL (Wang et al. 2018) and AWR (Peng et al. 2019) learn
V(s) for it. Dividing by the spread of the advantages is MARWIL's, the clip c = 20 is AWR's.

Deviations from these papers:
- b is one number instead of V(s). It then leaves the optimum unchanged but for the clip; situations in which all
  returns are high get more weight than others. Where several replies to each prompt are logged, subtract the mean of
  each group from the rewards (`data.normalise: group` for comparisons); where V(s) matters, use `algorithm: awr`.
- After a log that was cut, b takes the place of the unknown rest. If every log was cut, nothing follows the cut.
`inverse_temperature: 0` makes all weights 1, which is behaviour cloning.
"""

from dataclasses import dataclass

import numpy as np

from offline_lmrl.errors import require
from offline_lmrl.logs.scale import RewardScale
from offline_lmrl.models.guided import remove_heads
from offline_lmrl.ops.value_learning import awr_weight
from offline_lmrl.settings import setting
from offline_lmrl.tokens.episodes import StepRule
from offline_lmrl.training.config import OfflineConfig, check_range
from offline_lmrl.training.trainer import Encoding, OfflineTrainer

NO_SPREAD = 1e-6  # in scaled units, in which the training returns span 1


@dataclass
class MCAWBCConfig(OfflineConfig):
    """The settings of advantage-weighted behaviour cloning by Monte-Carlo returns."""

    inverse_temperature: float = setting(
        1.0,
        "β_w, per standard deviation of the returns; a larger value puts weight on fewer replies; 0 = behaviour "
        "cloning.",
    )
    weight_clip: float = setting(20.0, "c, the largest weight of a token.")
    discount_per_turn: float = setting(1.0, "γ of the returns, between two agent turns, 0 to 1.")

    def __post_init__(self) -> None:
        check_range(self, inverse_temperature=(0, 1e6), weight_clip=(1e-6, 1e6), discount_per_turn=(0, 1))
        super().__post_init__()


class MCAWBCTrainer(OfflineTrainer):
    """The trainer that fits a plain policy (no value heads) by cloning weighted by Monte-Carlo returns.

    It takes the arguments of `OfflineTrainer`: model, settings, training data, held-out data, tokenizer, peft config.

    Attributes:
      baseline: b, in scaled reward units.
      spread: σ, in scaled reward units.
    """

    algorithm = "mc_awbc"

    def encoding(self, model, train) -> Encoding:
        rule = StepRule(discount_per_turn=self.args.discount_per_turn)
        scale = RewardScale.fit(train, self.args.reward_scale, discounted=rule.discounted)
        return Encoding(scale, rule, request={"alike": self.args.inverse_temperature == 0})

    def prepare_model(self, model, windows):
        returns, after_cut = windows.columns("return_to_go", "end_discount").values()
        known = after_cut == 0
        self.continues = bool(known.any())
        self.baseline = float(np.mean(returns[known] if self.continues else returns))
        self.spread = float(np.std(self._advantage(returns, after_cut)))
        require(
            self.spread > NO_SPREAD,
            "data: found the same return at every step, expected returns that differ; use algorithm bc",
        )
        return remove_heads(model)

    def _advantage(self, returns, after_cut):
        """Return R − b at each step; `after_cut` is the discount from the step to the end of a cut log, else 0."""
        return returns + self.continues * after_cut * self.baseline - self.baseline

    def losses(self, outputs, batch):
        steps, args = batch["steps"], self.args
        advantage = self._advantage(steps["return_to_go"], steps["end_discount"]) / self.spread
        weight = awr_weight(advantage, args.inverse_temperature, args.weight_clip)
        loss = -weight * outputs["log_prob"]
        clipped = (weight == args.weight_clip).float()
        return loss, {"loss/policy": loss, "weight": weight, "weight/clipped": clipped, "value/advantage": advantage}
