"""Return conditioning: a Decision Transformer for text (Chen et al. 2021), on any causal LM.

    L = −log π(a | s, R̂)          R̂_k = r_k + γ R̂_{k+1}, the return-to-go at the start of the agent's turn k

averaged over the agent's action tokens. R̂ is binned and placed before the opening (the first tokens, such as a role
header) of every agent turn, as one reserved id with an embedding row of its own (models/return_embedding.py) or as
plain text. In play the requested return takes the place of R̂ and is updated with every reward received,
R̂ ← (R̂ − r) / γ (decoding/asks.py). Preference labels are the case of two bins: rewards +1 and −1 give a "good" and a
"bad" control token.

Deviations from the paper, all for text and pretrained models:
- There is one id per turn, in ordinal bins, instead of an embedded number per step. The LM and its vocabulary stay as
  they are.
- In a share of the windows (rows of training tokens) the condition is null: a reserved id for "no return requested"
  replaces each return. The same weights are therefore also the plain policy, and guidance between both is possible (Ho
  and Salimans 2022, Classifier-Free Diffusion Guidance).
- The loss is the LM's own cross-entropy over the agent's tokens.

With a `value_model` the algorithm is the Q-learning Decision Transformer (QDT: Yamagata, Khalil, Santos-Rodriguez
2023): before training, the value model's V or Q replaces logged returns R̂ (`relabel` in decoding/value_model.py; by
default where V is above the logged return). That restores stitching: good parts of different episodes are combined.

With `return_weight` the model also learns the outcomes of turns (models/return_heads.py), and with
`environment_weight` the environment's replies. Together they are the Trajectory Transformer (Janner, Li, Levine 2021)
for text, with which decoding/planner.py plans. The return heads learn only in windows without a condition, because
R̂_k and R̂_{k+1} together reveal r_k, and always from the returns as logged.

Value heads that the model already has are kept and frozen. They fit the trunk on which they were trained, and this
training changes the trunk. To fit them again afterwards, start `algorithm: ilql` from this run with policy_weight 0,
value_grad_scale 0 and weight_decay 0: the policy stays as it is, and values are learnt under the null condition.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from offline_lmrl.decoding.config import DecodingConfig
from offline_lmrl.decoding.policy import load_value_model
from offline_lmrl.decoding.value_model import relabel
from offline_lmrl.errors import require, shown
from offline_lmrl.logs.scale import RewardScale
from offline_lmrl.logs.trajectory import Trajectory
from offline_lmrl.models.adapters import run_metadata
from offline_lmrl.models.guided import add_return_heads, add_returns
from offline_lmrl.models.return_heads import fit_heads
from offline_lmrl.settings import setting
from offline_lmrl.tokens.conditioning import ReturnScale, ReturnTokens, check_binning
from offline_lmrl.tokens.episodes import StepRule
from offline_lmrl.training.config import GuidedConfig, check_range
from offline_lmrl.training.trainer import KNOWN_TURN, Encoding, Logs, OfflineTrainer, require_targets

TABLE_RATE = 10.0  # learning rate of the return table, as a multiple of the model's: its rows are not pretrained


@dataclass
class ReturnConditionedConfig(GuidedConfig):
    """The settings of return conditioning; square brackets hold the paper's value.

    A model that was already trained with returns keeps its return bins and its way of encoding returns. The settings
    `bins`, `binning`, `per`, `discount_per_turn`, `condition` and `text` then have no effect on either.
    """

    bins: int = setting(32, "Largest number of bins of the returns; 2 to 8 suit small data.")
    binning: Literal["auto", "unique", "linear", "quantile"] = setting(
        "auto",
        "unique, linear, quantile or auto (tokens/conditioning.py). auto = unique if there are at most `bins` "
        "distinct returns, else linear.",
    )
    per: Literal["global", "task"] = setting(
        "global",
        "global = one scale of returns for all data; task = one for each task.",
    )
    discount_per_turn: float = setting(1.0, "γ of the returns, between two agent turns, above 0 and at most 1 [1].")
    value_model: str | None = setting(
        None,
        "Folder or hub name of a run with value heads, whose values replace the logged returns of the data and of "
        "few-shot demonstrations. null = returns as logged.",
    )
    relabel: Literal["max", "q"] = setting(
        "max",
        "max = use the value model's V where it is above the logged return; q = use its Q (decoding/value_model.py).",
    )
    condition: Literal["embedding", "text"] = setting(
        "embedding",
        "embedding = one reserved id per bin; text = the setting `text`.",
    )
    text: str = setting(
        "quality: {bin}/{bins}\n",
        "Text placed before each agent turn with condition: text. {bin} and {bins} are replaced by the number of the "
        "bin and by the number of bins.",
    )
    condition_dropout: float = setting(
        0.15,
        "Share of windows that are trained under the null condition, 0 to 1. Unused with condition: text, which has "
        "no null.",
    )
    return_weight: float = setting(
        0.0,
        "Weight of the cross-entropies of the return heads, per turn of a window without a condition; 0 = no return "
        "heads. With condition_dropout 1 the result is a plain policy with return heads.",
    )
    environment_weight: float = setting(
        0.0,
        "Weight of the cross-entropy of each token that the environment replies to the agent's turn, given that turn "
        "and all that the agent saw; 0 = none. Above 0, windows also hold these replies and are longer by their "
        "tokens.",
    )
    decoding: DecodingConfig = setting(
        lambda: DecodingConfig(ask="p90"), "How the run chooses tokens when it plays; saved with the run."
    )

    always_saved: ClassVar = ("ask", "condition_scale", "beta", "q_reduce", "support", "candidates", "clip")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_binning(self.binning, self.bins, self.per)
        check_range(
            self,
            condition_dropout=(0, 1),
            discount_per_turn=(1e-6, 1),
            return_weight=(0, 1e6),
            environment_weight=(0, 1e6),
        )
        require(
            self.condition in ("embedding", "text"),
            f"condition: found {shown(self.condition)}, expected embedding or text",
        )
        require(self.relabel in ("max", "q"), f"relabel: found {shown(self.relabel)}, expected max or q")
        require(
            self.return_weight == 0 or (self.condition != "text" and self.condition_dropout != 0),
            f"return_weight: found {self.return_weight}, expected 0: return heads learn from windows without a "
            "requested return; to have these, set condition: embedding and condition_dropout above 0",
        )

    @property
    def named_run(self) -> str | None:
        return self.value_model


class ReturnConditionedTrainer(OfflineTrainer):
    """The trainer that fits a policy that is conditioned on the requested return.

    It takes the arguments of `OfflineTrainer`: model, settings, training data, held-out data, tokenizer, peft config.
    """

    algorithm = "return_conditioned"

    def choose(self, logs: Logs) -> Logs:
        """Return the trajectories with the value model's labels, if there is one; bins are fitted to these."""
        args = self.args
        if args.value_model is None:
            return logs
        value_model = load_value_model(args.value_model, device=args.device)
        return Logs(*(rows and relabel(rows, value_model, args.relabel, args.discount_per_turn) for rows in logs))

    def encoding(self, model, train) -> Encoding:
        args, stored = self.args, run_metadata(model.config)
        rule = StepRule(discount_per_turn=args.discount_per_turn)
        scale = RewardScale.fit(train, args.reward_scale, discounted=rule.discounted)
        if "reward_scale" in stored and (model.value_heads is not None or model.return_heads is not None):
            # The outputs of heads are in the stored unit. The returns on which the model is conditioned do not depend
            # on it: they are in the units of the logged rewards.
            scale = RewardScale(**stored["reward_scale"])
        self.returns = stored.get("returns") or self._fitted_returns(train)
        rows = model.get_input_embeddings().weight.shape[0]
        dropout = args.condition_dropout if self.returns["condition"] == "embedding" else 0.0
        return Encoding(
            scale,
            rule,
            return_ids_for=ReturnTokens.from_block(self.returns, rows, self.renderer).of_log,
            replies=args.environment_weight > 0,
            request={"condition_dropout": dropout},
        )

    def _fitted_returns(self, train: Sequence[Trajectory]) -> dict[str, Any]:
        """Return the entry `returns` of the run metadata: bins fitted to the data, and how they are encoded."""
        args = self.args
        scale = ReturnScale.fit(train, args.binning, args.bins, args.per, args.discount_per_turn)
        return {
            "condition": args.condition,
            "text": args.text,
            "bins": scale.bins,
            "opening": list(self.renderer.agent_opening),
            "past_opening": list(self.renderer.past_opening),
            "discount_per_turn": args.discount_per_turn,
            "scale": scale.to_dict(),
        }

    def prepare_model(self, model, windows):
        args = self.args
        replies, ends = windows.reply_tokens, windows.closing_steps
        require_targets("environment_weight", args.environment_weight, replies, "a reply of the environment")
        require_targets("return_weight", args.return_weight, ends, KNOWN_TURN)
        there = run_metadata(model.config)
        if "returns" not in there:
            add_returns(model, self.returns)
        block = there.get("return_heads")
        discount = args.discount_per_turn if block is None else block["discount_per_turn"]
        require(
            discount == args.discount_per_turn,
            f"discount_per_turn: found {args.discount_per_turn:g}, expected {discount:g} as in the model's "
            "return heads",
        )
        require(
            args.return_weight == 0 or self.returns["condition"] != "text",
            f"return_weight: found {args.return_weight:g}, expected 0, as the model reads returns as "
            "text: no window is without a requested return, and return heads learn from such windows only",
        )
        require(
            args.return_weight == 0 or self.renderer.closing_stays,
            "return_weight: found a chat template that drops the token that closes a turn from the history, "
            "expected one that keeps it, as return heads read there; set return_weight: 0, or template: plain",
        )
        if args.return_weight > 0 and block is None:
            add_return_heads(model, fit_heads(windows.closing_columns(), args.bins, args.discount_per_turn))
        return model

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        """Create Trainer's optimizer with an extra group of parameters for the embedding of returns.

        This group has TABLE_RATE times the learning rate and no weight decay.
        """
        # A second call returns the optimizer that exists; conditions as text have no table.
        if self.optimizer is not None or self.model.return_embedding is None:
            return super().create_optimizer(*args, **kwargs)
        optimizer, table = super().create_optimizer(*args, **kwargs), list(self.model.return_embedding.parameters())
        ours = set(map(id, table))
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in ours]
        optimizer.add_param_group({"params": table, "lr": TABLE_RATE * self.args.learning_rate, "weight_decay": 0.0})
        return optimizer

    def losses(self, outputs, batch):
        args, loss = self.args, -outputs["log_prob"]
        logged = {"loss/policy": loss}
        if args.return_weight > 0:
            # False for turns without a target, and where the context holds returns, which the heads could copy.
            counts = outputs["outcome_mask"]
            place = batch["steps"]["closes_turn"].nonzero()[:, 0][counts]
            logged["loss/returns"] = -outputs["outcome_log_prob"][counts]
            loss = loss.index_add(0, place, args.return_weight * logged["loss/returns"])
        if args.environment_weight > 0:
            logged["loss/environment"] = -outputs["environment_log_prob"]
            # Tokens of replies are no action tokens: their summed loss is spread evenly over the N action tokens.
            loss = loss + args.environment_weight * logged["loss/environment"].sum() / max(len(loss), 1)
        return loss, logged
