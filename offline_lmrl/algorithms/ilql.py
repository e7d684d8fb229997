"""Implicit Language Q-Learning (Snell, Kostrikov, Su, Yang, Levine 2022), after IQL (Kostrikov, Nair, Levine 2021).

The state s_t is the prefix of tokens 0..t, and the action a_t is token t+1. Over the agent's N action tokens, with
twin heads Q_i, their target copies Q̄_i and V:

    y   = r + γ · b · V(s′)                                      b = 0 after a terminal action
    L_Q = Σ_i (Q_i(s,a) − y)²          L_V = |τ − 1{u<0}| · u²,  u = min_i Q̄_i(s,a) − V(s)
    L_C = Σ_i (logsumexp_a Q_i(s,a) − Q_i(s,a_data))             L_π = −log π(a|s) · min(exp(β_w (min Q̄ − V)), 100)

Decoding: log π(a|s) + β · (min Q̄(s,a) − V(s)) on tokens that π supports (decoding/distribution.py).

Deviations from the paper, each a number or a default of the config:
- One trunk serves π, Q and V. The targets are averaged heads on that live trunk (the paper's code keeps three trunks).
- `bootstrap_from_turn` credits a turn's reward to each of its tokens and bootstraps from the agent's next turn: an
  n-step target that crosses long turns in one update. It is off by default, because Q of the first tokens then
  averages over the logged rest of the turn: where alternatives share their first token ("move left", "move up"), V at
  the start of the turn would not improve on the behaviour policy.
- The discount is 1 inside a turn and γ between turns, so that long answers are not penalised (the paper: .99 per
  token).
- A Monte-Carlo share mixes the return-to-go into y (the paper's code can replace V's target with it).
- Rewards are scaled by a fitted scale, and the heads start at the mean return of the training data.
- L_π is averaged over action tokens, as all terms are (the paper's code divides it by all tokens).
`expectile: 0.5` gives SARSA, and `monte_carlo: 1` gives values of the behaviour policy (one step of improvement).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from accelerate.utils import extract_model_from_parallel
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from offline_lmrl.decoding.config import DecodingConfig
from offline_lmrl.errors import require
from offline_lmrl.logs.scale import RewardScale
from offline_lmrl.models.adapters import run_metadata
from offline_lmrl.models.guided import add_value_heads, return_tokens_of
from offline_lmrl.models.loading import check_same_heads
from offline_lmrl.models.value_heads import ValueHeadsConfig
from offline_lmrl.ops.returns import monte_carlo_mixture
from offline_lmrl.ops.value_learning import awr_weight, conservative_loss, expectile_loss, q_loss, td_target
from offline_lmrl.settings import setting
from offline_lmrl.tokens.episodes import StepRule
from offline_lmrl.training.config import GuidedConfig, check_range
from offline_lmrl.training.frozen import freeze_trunk, hidden_windows
from offline_lmrl.training.trainer import KNOWN_TURN, Encoding, OfflineTrainer, require_targets


@dataclass
class ILQLConfig(GuidedConfig):
    """The settings of ILQL; square brackets hold the value in the paper's code."""

    value_heads: Literal["tied", "linear", "mlp"] = setting(
        "tied",
        "Form of the heads for Q and V: tied, linear or mlp [mlp] (models/value_heads.py). A model that already has "
        "heads keeps them and the scale of their rewards; their form must then equal this setting, and initial_value "
        "is unused.",
    )
    initial_value: float | None = setting(
        None,
        "Value that Q and V predict before training, given as the return of a whole episode in units of the logged "
        "rewards (the heads start at its scaled value). null = the mean scaled return-to-go of the training data. The "
        "best possible return suits tasks in which every step costs: values then sink to the truth everywhere at "
        "once, whereas low values would have to rise from the few episodes that reached the goal.",
    )
    expectile: float = setting(0.8, "τ of V in [0.5, 1) [.7 to .9]; .5 evaluates the behaviour policy (SARSA).")
    discount_per_token: float = setting(1.0, "γ of every step between action tokens, 0 to 1 [.99].")
    discount_per_turn: float = setting(
        0.99,
        "γ between two agent turns, 0 to 1. The step that closes a turn is discounted by the product of "
        "discount_per_token and discount_per_turn.",
    )
    bootstrap_from_turn: bool = setting(
        False,
        "The state from which a token's target bootstraps. False = the state at the next token; True = the start of "
        "the agent's next turn [false].",
    )
    monte_carlo: float = setting(
        0.0,
        "Share of the return-to-go in Q's target, 0 to 1; 1 = Q of the behaviour policy, so one step of policy "
        "improvement [0].",
    )
    target_rate: float = setting(
        0.005,
        "Polyak step of the target heads per optimizer step [.005]. Raise it for a short run, in which target_rate × "
        "steps would be below 5.",
    )
    conservative_weight: float = setting(0.1, "Weight of the conservative loss L_C; 0 = none [1e-4 to 1].")
    conservative_share: float = setting(
        1.0,
        "Share of the tokens for which L_C is computed, drawn anew in each step, above 0 to 1. Their weight is "
        "1/share, so the expected loss is the same. With a large vocabulary L_C is most of what values cost [1].",
    )
    value_weight: float = setting(1.0, "Weight of the value losses L_Q and L_V [1].")
    policy_weight: float = setting(1.0, "Weight of the policy loss L_π [1].")
    inverse_temperature: float = setting(0.0, "β_w in the weights of L_π [0: plain behaviour cloning].")
    value_grad_scale: float = setting(1.0, "Share of the value losses' gradient that enters the trunk, 0 to 1 [1].")
    utterance_weight: float = setting(
        0.0,
        "Weight of the losses of the heads that score whole replies (for reranking); 0 = no such heads.",
    )
    decoding: DecodingConfig = setting(
        lambda: DecodingConfig(beta=4.0, support=0.02),
        "How the run chooses tokens when it plays; saved with the run. A mapping of some of its keys keeps the "
        "other defaults of ILQL; DecodingConfig() in Python has its own.",
    )

    always_saved: ClassVar = ("beta", "q_reduce", "support", "candidates", "clip")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(
            self,
            expectile=(0.5, 0.999),
            discount_per_token=(0, 1),
            discount_per_turn=(0, 1),
            monte_carlo=(0, 1),
            target_rate=(0, 1),
            conservative_weight=(0, 1e6),
            conservative_share=(1e-6, 1),
            value_weight=(0, 1e6),
            policy_weight=(0, 1e6),
            value_grad_scale=(0, 1),
            utterance_weight=(0, 1e6),
            inverse_temperature=(0, 1e6),
            learning_rate=(0, 1e6),
        )
        check_range(self.decoding, beta=(0, 1e9))


def ilql_losses(outputs: Mapping[str, Tensor], steps: Mapping[str, Tensor], config: ILQLConfig) -> dict[str, Tensor]:
    """Compute the loss terms of each of N action tokens, not yet multiplied by their weights in the total loss.

    Args:
      outputs: outputs of the guided model's forward pass (`StepRequest` in models/step_outputs.py): log_prob, v,
        target_q, next_v and, if monte_carlo is above 0, end_v, each (N,); q, (2, N) for twin heads; if
        conservative_weight is above 0, counted, (C,) places among the N, and logsumexp_q, (2, C).
      steps: `ActionSteps` (tokens/batching.py), (N,) each.
      config: the settings.
    Returns: "q", "v", "policy" and, if its weight is above 0, "conservative", each (N,). "q", "v" and "conservative"
      are 0 where `steps["has_target"]` is False: at the last action of a log that was cut right after it, because the
      reward and the next state are not known.
    """
    target = td_target(steps["reward"], outputs["next_v"], steps["bootstrap"], steps["discount"])
    if config.monte_carlo > 0:
        realised = steps["return_to_go"] + steps["end_discount"] * outputs["end_v"]
        target = monte_carlo_mixture(target, realised, config.monte_carlo)
    known = steps["has_target"]
    losses = {
        "q": q_loss(outputs["q"], target) * known,
        "v": expectile_loss(outputs["v"], outputs["target_q"], config.expectile) * known,
        "policy": -outputs["log_prob"],
    }
    if config.inverse_temperature > 0:
        advantage = outputs["target_q"] - outputs["v"]
        losses["policy"] = losses["policy"] * awr_weight(advantage, config.inverse_temperature)
    if config.conservative_weight > 0:
        counted, loss = outputs["counted"], outputs["q"].new_zeros(len(known))
        # A random share of the steps with a target stands for all of them.
        weight = known.sum() / max(1, len(counted))
        losses["conservative"] = loss.index_copy(
            0, counted, weight * conservative_loss(outputs["logsumexp_q"], outputs["q"][:, counted])
        )
    return losses


def utterance_losses(outputs: Mapping[str, Tensor], steps: Mapping[str, Tensor], config: ILQLConfig) -> Tensor:
    """Compute the loss of Q and V of whole replies for each of the batch's M agent turns.

    It is the sum of L_Q and L_V in the module docstring with a whole reply as the action (Snell et al. 2022, the
    per-utterance variant).

    Args:
      outputs: packed outputs of the guided model's forward pass: utterance_q (2, M) for twin heads; utterance_v,
        utterance_target_q and utterance_next_v, each (M,).
      steps: `ActionSteps` (tokens/batching.py), (N,) each.
      config: the settings.
    Returns: (M,); 0 for a turn if `steps["has_target"]` is False at the action that closes it.
    """
    close = steps["closes_turn"]
    bootstrap = steps["bootstrap"][close]
    target = td_target(steps["reward"][close], outputs["utterance_next_v"], bootstrap, config.discount_per_turn)
    loss = q_loss(outputs["utterance_q"], target)
    loss = loss + expectile_loss(outputs["utterance_v"], outputs["utterance_target_q"], config.expectile)
    return loss * steps["has_target"][close]


class TargetUpdates(TrainerCallback):
    """A callback that updates the target heads of Q after every optimizer step.

    The update (a Polyak step) is target ← rate · online + (1 − rate) · target. Optimizer steps that the loss scaler
    skipped are left out.

    Args:
      rate: share of the online heads, in [0, 1].
    Attributes:
      count: number of updates so far.
    """

    def __init__(self, rate: float):
        self.rate, self.count = rate, 0

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        if not optimizer.step_was_skipped:  # Trainer calls this method in both cases
            extract_model_from_parallel(model).update_targets(self.rate)
            self.count += 1


class ILQLTrainer(OfflineTrainer):
    """The trainer that fits policy, Q and V together to scored trajectories.

    It takes the arguments of `OfflineTrainer`: model, settings, training data, held-out data, tokenizer, peft config.

    Args:
      frozen_trunk: True: train the heads alone, on hidden states that are computed once (training/frozen.py); π stays
        that of the model.
    """

    algorithm = "ilql"

    def __init__(self, model, args: ILQLConfig, *positional, frozen_trunk: bool = False, **keywords):
        self.frozen_trunk = frozen_trunk
        super().__init__(model, args, *positional, **keywords)
        self.target_updates = TargetUpdates(args.target_rate)
        self.add_callback(self.target_updates)

    def encoding(self, model, train) -> Encoding:
        args = self.args
        rule = StepRule(args.discount_per_token, args.discount_per_turn, args.bootstrap_from_turn)
        # A return-conditioned model learns values under the null condition: a return in the context would leak the
        # outcome.
        tokens = return_tokens_of(model, self.renderer)
        return Encoding(
            self._scale(model, RewardScale.fit(train, args.reward_scale, discounted=rule.discounted)),
            rule,
            return_ids_for=tokens and tokens.nulls,
            next_rows=True,
            end_rows=args.monte_carlo > 0,
            request={
                "value_grad_scale": args.value_grad_scale,
                "conservative": args.conservative_share if args.conservative_weight > 0 else 0.0,
                "ends": args.monte_carlo > 0,
                "alike": args.inverse_temperature == 0,
            },
        )

    def _scale(self, model: PreTrainedModel, fitted: RewardScale) -> RewardScale:
        """Return the reward scale stored with the model's value heads, whose outputs are in that unit; else `fitted`.

        Raises: InputError if the setting `reward_scale` differs from the stored scale, or if the stored shift of
          rewards would change this task (see `RewardScale`).
        """
        stored = run_metadata(model.config).get("reward_scale")
        if model.value_heads is None or stored is None:
            return fitted
        found = RewardScale(**stored)
        require(
            self.args.reward_scale in (None, found.scale),
            f"reward_scale: found {self.args.reward_scale}, expected {found.scale:g}, the scale of the model's "
            "value heads; leave it out, or start from a model without value heads",
        )
        require(
            found.shift == 0 or found.scored_turns == fitted.scored_turns,
            f"model: found value heads trained on rewards shifted by {found.shift:g}, expected no shift: it would "
            f"change this task (a discount below 1, or episodes that do not all have {found.scored_turns} scored "
            "turns); start from a model without value heads",
        )
        return found

    def prepare_model(self, model, windows):
        args, scale = self.args, self.encoder.scale
        utterance, ends = args.utterance_weight > 0, windows.closing_steps
        require_targets("utterance_weight", args.utterance_weight, ends, KNOWN_TURN)
        if model.value_heads is not None:  # keep training existing heads
            there = run_metadata(model.config)["value_heads"]
            check_same_heads("the model", there | {"kind": args.value_heads, "utterance": utterance}, there)
            return model
        start = windows.mean_return if args.initial_value is None else scale.apply_to_return(args.initial_value)
        heads = ValueHeadsConfig(kind=args.value_heads, initial_value=start, utterance=utterance)
        return add_value_heads(model, heads)

    def prepare(self, model, train, held_out):
        model, train, held_out = super().prepare(model, train, held_out)
        if self.frozen_trunk:
            require(self.peft_config is None, "model.freeze: found trunk beside model.lora, expected one of them")
            require(
                self.args.utterance_weight == 0,
                f"utterance_weight: found {self.args.utterance_weight:g} together with model.freeze, expected 0",
            )
            freeze_trunk(model)
            model.to(self.args.device)
            with self.args.main_process_first():  # the other processes read what it has written
                train = hidden_windows(model, train)
                held_out = held_out and hidden_windows(model, held_out)
        return model, train, held_out

    def losses(self, outputs, batch):
        args, steps = self.args, batch["steps"]
        losses = ilql_losses(outputs, steps, args)
        total = args.policy_weight * losses["policy"] + args.value_weight * (losses["q"] + losses["v"])
        if "conservative" in losses:
            total = total + args.conservative_weight * losses["conservative"]
        logged = {f"loss/{name}": values for name, values in losses.items()}
        if args.utterance_weight > 0:
            losses_of_replies = utterance_losses(outputs, steps, args)
            # (M,) losses of replies are added at the tokens that close their turns.
            total = total.index_add(0, steps["closes_turn"].nonzero()[:, 0], args.utterance_weight * losses_of_replies)
            logged["loss/utterance"] = losses_of_replies
        logged["value/q"] = outputs["q"].mean(0)
        logged["value/v"] = outputs["v"]
        logged["value/advantage"] = outputs["target_q"] - outputs["v"]
        logged["value/return_to_go"] = steps["return_to_go"]  # the mean that Q of the data's own policy would have
        return total, logged
