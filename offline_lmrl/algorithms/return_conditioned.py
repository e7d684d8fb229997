"""Return conditioning: a Decision Transformer for text (Chen et al. 2021), on any causal LM.

    L = −log π(a | s, R̂)          R̂_k = r_k + γ R̂_{k+1}, the return-to-go at the start of the agent's turn k

averaged over the agent's action tokens. R̂ stands before the opening of every agent turn, binned: as one reserved id
with a row of its own (models/return_embedding.py) or as plain text. In play the asked return takes its place and is
updated with every reward that comes in, R̂ ← (R̂ − r) / γ (decoding/asks.py). Labels of preference are the case of two
bins: rewards +1 and −1 give a "good" and a "bad" control token.

Deviations from the paper, all for text and pretrained models:
- one id per turn instead of an embedded number per step, in ordinal bins; the LM and its vocabulary stay as they are;
- in a share of the rows the condition is null, so the same weights are the plain policy too, and guidance between both
  is possible (Ho and Salimans 2022, Classifier-Free Diffusion Guidance);
- the loss is the LM's own cross-entropy over the agent's tokens.

With a `critic` it is the Q-learning Decision Transformer (QDT: Yamagata, Khalil, Santos-Rodriguez 2023): before
training, the critic's V or Q rewrites R̂ where it knows of something better than what was logged (`relabel` in
decoding/critic.py). That restores stitching.

With `return_weight` the model also learns what turns earn (models/return_heads.py), and with `environment_weight` what
the environment replies: the Trajectory Transformer (Janner, Li, Levine 2021) for text, which decoding/planner.py plans
with. Its heads learn on the rows without a condition alone, as R̂_k and R̂_{k+1} together tell r_k, and always from the
returns as they were logged.

A model that brings value heads keeps them, frozen. They answer for the trunk they were trained on, and this training
moves it: fit them again behind it, with `algorithm: ilql` from this run and policy_weight 0, value_grad_scale 0,
weight_decay 0, which leaves the policy as it is and reads values where no return is asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from offline_lmrl.data.batching import WindowDataset
from offline_lmrl.data.conditioning import ReturnScale, Slots, check_binning
from offline_lmrl.data.episodes import Step, StepRule
from offline_lmrl.data.errors import InputError, shown
from offline_lmrl.data.scale import RewardScale
from offline_lmrl.data.trajectory import Trajectory
from offline_lmrl.decoding.critic import relabel
from offline_lmrl.decoding.policy import load_critic
from offline_lmrl.decoding.sampler import SamplingConfig
from offline_lmrl.models.adapters import settings
from offline_lmrl.models.guided import attach_return_heads, attach_returns
from offline_lmrl.models.return_heads import fit_heads
from offline_lmrl.training import KNOWN_TURN, OfflineConfig, OfflineTrainer, check_range, require_targets

TABLE_RATE = 10.0  # learning rate of the return table, as a multiple of the model's: its rows start from nothing


@dataclass
class ReturnConditionedConfig(OfflineConfig):
    """Settings of return conditioning.

    bins: most bins of the returns; 2 to 8 suit small data.
    binning: unique, linear, quantile, or auto: unique where there are at most `bins` distinct returns, else linear
      (data/conditioning.py). per: one scale for all data (global), or one per task.
    discount_per_turn: γ of the returns, between two agent turns [1].
    critic: folder or hub name of a run with value heads that relabels the returns, those of a prompt's demonstrations
      too; None = as logged. relabel: max, its V where that is above the logged return, or q, its Q
      (decoding/critic.py).
    condition: embedding (reserved ids), or text: `text` in front of the agent's turn, filled with `bin` and `bins`.
    condition_dropout: share of windows that are trained without a condition; with text there is no null, hence none.
    return_weight: of the cross-entropies of the return heads, per turn of a window without a condition; 0 leaves the
      heads out. With condition_dropout 1 it is a plain policy that has them.
    environment_weight: of the cross-entropy of each token of what the environment replies to the agent's turn, read
      after the turn and all that the agent saw; windows then hold these replies too, which costs their tokens.
    ask: the return that is asked for in play. Once, and then less what was earned: a number, p90 or max of the
      training returns, or auto (the best Q at the start; decoding/asks.py has what each earned). Before every turn:
      expert:κ (`ReturnHeads.expert`). condition_scale: w of return guidance in play.
      beta, q_reduce, support, candidates, clip: of value guidance, for a model with value heads. All are the decoding
      form saved with the run (decoding/sampler.py).

    A model that was trained with returns before goes on with its bins; bins, binning, per, discount_per_turn,
    condition and text are then unused.
    """

    bins: int = 32
    binning: Literal["auto", "unique", "linear", "quantile"] = "auto"
    per: Literal["global", "task"] = "global"
    discount_per_turn: float = 1.0
    critic: str | None = None
    relabel: Literal["max", "q"] = "max"
    condition: Literal["embedding", "text"] = "embedding"
    text: str = "quality: {bin}/{bins}\n"
    condition_dropout: float = 0.15
    return_weight: float = 0.0
    environment_weight: float = 0.0
    ask: float | str | None = "p90"
    condition_scale: float = 0.0
    beta: float = 0.0
    q_reduce: Literal["min", "mean", "first"] = "min"
    support: float = 0.0
    candidates: int | None = None
    clip: float | None = None

    def __post_init__(self) -> None:
        check_binning(self.binning, self.bins, self.per)
        check_range(
            self,
            condition_dropout=(0, 1),
            discount_per_turn=(1e-6, 1),
            return_weight=(0, 1e6),
            environment_weight=(0, 1e6),
        )
        if self.condition not in ("embedding", "text"):
            raise InputError(f"condition: found {shown(self.condition)}, expected embedding or text")
        if self.relabel not in ("max", "q"):
            raise InputError(f"relabel: found {shown(self.relabel)}, expected max or q")
        if self.return_weight > 0 and (self.condition == "text" or self.condition_dropout == 0):
            raise InputError(
                f"return_weight: found {self.return_weight}, expected 0 where no window is without a "
                "condition; take condition: embedding and a condition_dropout above 0"
            )
        SamplingConfig(**sampling_form(self))  # checks the ranges
        super().__post_init__()


def sampling_form(config: ReturnConditionedConfig) -> dict[str, Any]:
    """The decoding form that is saved with the run."""
    names = ("ask", "condition_scale", "beta", "q_reduce", "support", "candidates", "clip")
    return {name: getattr(config, name) for name in names}


class ReturnConditionedTrainer(OfflineTrainer):
    """Trains a policy that is told the return to go for; see `OfflineTrainer` for the arguments."""

    algorithm = "return_conditioned"

    def __init__(
        self, model, args: ReturnConditionedConfig, train_dataset, eval_dataset=None, *positional, **keywords
    ):
        self.shown: Sequence[Trajectory] | None = None  # demonstrations with the critic's labels
        if args.critic is not None:
            critic = load_critic(args.critic, device=args.device)
            train_dataset, eval_dataset, self.shown = (
                logs and relabel(logs, critic, args.relabel, args.discount_per_turn)
                for logs in (train_dataset, eval_dataset, args.prompt and args.prompt.demonstrations)
            )
        super().__init__(model, args, train_dataset, eval_dataset, *positional, **keywords)

    def demonstrations(self, source):
        return super().demonstrations(source) if self.shown is None else self.shown

    def step_rule(self, args: ReturnConditionedConfig) -> StepRule:
        return StepRule(discount_per_turn=args.discount_per_turn)

    def fit_scale(self, model, train, args: ReturnConditionedConfig) -> RewardScale:
        """That of the heads which came along, if any, because they answer in its unit; returns are in logged units."""
        stored = settings(model.config).get("reward_scale")
        heads = (getattr(model, name, None) for name in ("value_heads", "return_heads"))
        if stored is None or all(part is None for part in heads):
            return super().fit_scale(model, train, args)
        return RewardScale(**stored)

    def slots(self, model, train: Sequence[Trajectory], args: ReturnConditionedConfig):
        self.returns = settings(model.config).get("returns")
        if self.returns is None:
            scale = ReturnScale.fit(train, args.binning, args.bins, args.per, args.discount_per_turn)
            self.returns = {
                "condition": args.condition,
                "text": args.text,
                "bins": scale.bins,
                "opening": list(self.renderer.agent_opening),
                "past_opening": list(self.renderer.past_opening),
                "discount_per_turn": args.discount_per_turn,
                "scale": scale.to_dict(),
            }
        rows = model.get_input_embeddings().weight.shape[0]
        return Slots.from_block(self.returns, rows, self.renderer).of_log

    def prepare_model(self, model, args: ReturnConditionedConfig, windows: WindowDataset):
        model = super().prepare_model(model, args, windows)
        replies, ends = len(windows.flat["environment"][0]), int(windows.closing_steps.sum())
        require_targets("environment_weight", args.environment_weight, replies, "a reply of the environment")
        require_targets("return_weight", args.return_weight, ends, KNOWN_TURN)
        there = settings(model.config)
        if "returns" not in there:
            attach_returns(model, self.returns)
        block = there.get("return_heads")
        if block is not None and block["discount_per_turn"] != args.discount_per_turn:
            raise InputError(
                f"discount_per_turn: found {args.discount_per_turn:g}, expected that of the model's "
                f"return heads, {block['discount_per_turn']:g}"
            )
        if args.return_weight > 0 and self.returns["condition"] == "text":
            raise InputError(
                f"return_weight: found {args.return_weight:g}, expected 0, as the model reads returns as "
                "text, and then no window is without a condition"
            )
        if args.return_weight > 0 and not self.renderer.closing_stays:
            raise InputError(
                "return_weight: found a chat template whose history does not hold the token that "
                "closes a turn, where return heads read; expected return_weight: 0, or template: plain"
            )
        if args.return_weight > 0 and block is None:
            closing = {name: windows.flat[name][0][windows.closing_steps] for name in Step._fields}
            attach_return_heads(model, fit_heads(closing, args.bins, args.discount_per_turn))
        return model

    def learns_replies(self, args: ReturnConditionedConfig) -> bool:
        return args.environment_weight > 0

    def stored_blocks(self, args: ReturnConditionedConfig):
        return {"sampling": sampling_form(args)}

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        """As Trainer's, with a group of its own for the table of returns: TABLE_RATE times the rate, no decay."""
        if self.optimizer is not None or self.model.return_embedding is None:
            return super().create_optimizer(*args, **kwargs)
        optimizer, table = super().create_optimizer(*args, **kwargs), list(self.model.return_embedding.parameters())
        ours = set(map(id, table))
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in ours]
        optimizer.add_param_group({"params": table, "lr": TABLE_RATE * self.args.learning_rate, "weight_decay": 0.0})
        return optimizer

    def forward_options(self):
        return {"condition_dropout": 0.0 if self.model.return_embedding is None else self.args.condition_dropout}

    def loss_terms(self, outputs, steps):
        args, loss = self.args, -outputs["log_prob"]
        logged = {"loss/policy": loss}
        if args.return_weight > 0:
            counts = outputs["outcome_counts"]
            place = steps["closes_turn"].nonzero()[:, 0][counts]
            logged["loss/returns"] = -outputs["outcome_log_prob"][counts]
            loss = loss.index_add(0, place, args.return_weight * logged["loss/returns"])
        if args.environment_weight > 0:
            logged["loss/environment"] = -outputs["environment_log_prob"]
            loss = loss + args.environment_weight * logged["loss/environment"].sum() / max(len(loss), 1)
        return loss, logged
