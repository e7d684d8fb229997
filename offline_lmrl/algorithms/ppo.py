"""Proximal policy optimisation (Schulman et al. 2017) for language, as RLHF runs it (Ziegler et al. 2019).

PPO is the only algorithm here that generates its own data. `PPOTrainer.iterate` is one iteration: `Rollouts` plays
episodes; `shape_scores` makes the scores to learn from; `Observer` encodes the episodes, as in the offline
algorithms, as windows (rows of tokens) with packed steps, one for each token that the agent wrote (the sampled token
ids are kept, nothing is tokenised again), and computes log-probabilities and V of all steps; `credit` computes
advantages; `Update` runs K epochs of minibatches. Over the agent's N tokens:

    r_t = score on the token that closes a turn − β · (log π − log π_ref)          A: GAE of r and V, across env. text
    L   = max(−A ρ, −A clip(ρ, 1 ± ε)) + c_v · ½ max((V − G)², (V_clipped − G)²) − c_e · H  [+ γ · −log π(log)]

G is A + V before the update, and "log" marks logged data (`ptx_weight`). π_ref is the model at the start: a frozen
copy or, when a fresh adapter is trained, the same model with the adapter off. The ratio is ρ = π / π_old, where π_old
is computed by the learner (the model in training), before the first optimizer step of the iteration, at the sampler's
temperature and under its filters. In the first iteration π_old must agree with the log-probabilities that the sampler
reported, and π with π_ref; otherwise the run stops before anything is learnt.

Deviations from the papers and from OpenAI's code, each a setting:
- An episode may have many turns, each with its own reward.
- An episode that is cut off bootstraps V at its end; one that the environment ends does not.
- Advantages are whitened per iteration and process.
- The reward keeps its unit unless `scale_scores` is set.
- AdamW's ε is 1e-5 and is applied as in PyTorch unless `tensorflow_eps` is set.
"""

import contextlib
import copy
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from offline_lmrl.decoding.config import DecodingConfig
from offline_lmrl.decoding.distribution import filter_policy
from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.environments.rollouts import rollout
from offline_lmrl.errors import InputError, require, shown
from offline_lmrl.logs.io import write_trajectories
from offline_lmrl.logs.protocols import Environment, VectorEnvironment, optional
from offline_lmrl.logs.scale import RewardScale
from offline_lmrl.logs.trajectory import Trajectory, Turn
from offline_lmrl.models.actor_critic import ActorCritic
from offline_lmrl.models.adapters import has_adapter, run_metadata
from offline_lmrl.models.guided import as_guided, remove_heads
from offline_lmrl.models.lm_head import packed_logits
from offline_lmrl.models.loading import load_model
from offline_lmrl.models.renderers import rendering_block
from offline_lmrl.models.reward_model import is_reward_model, load_reward_model
from offline_lmrl.models.step_outputs import collect_outputs
from offline_lmrl.models.unreached import freeze_unreached
from offline_lmrl.ops.policy_gradient import (
    Moments,
    adaptive_kl_weight,
    entropy,
    generalized_advantage,
    kl_k1,
    kl_k3,
    kl_shaped_reward,
    penalize_unfinished,
    policy_loss,
    policy_statistics,
    replace_unfinished,
    scale_scores,
    tensorflow_adam_eps,
    value_loss,
    value_statistics,
    whiten,
)
from offline_lmrl.ops.value_learning import td_target
from offline_lmrl.settings import setting
from offline_lmrl.tokens.batching import TokenBatch, WindowDataset, encode_trajectories, places_of
from offline_lmrl.tokens.episodes import EpisodeEncoder, StepRule
from offline_lmrl.tokens.experience import Experience
from offline_lmrl.tokens.rendering import Renderer
from offline_lmrl.training.config import GuidedConfig, check_range
from offline_lmrl.training.loop import Learner, LoopTrainer, mean_over_processes
from offline_lmrl.training.starting_model import check_model, check_policy, tokenizer_beside, with_adapter

KL_ESTIMATORS = {"k1": kl_k1, "k3": kl_k3}
OVERSHOOT = 1.5  # an update stops when its approx_kl exceeds this multiple of `stop_kl`
SAMPLER_GAP = {False: 1e-3, True: 0.05}  # largest mean gap of sampler and learner, nats per token, by bf16


@dataclass
class PPOConfig(GuidedConfig):
    """The settings of PPO; square brackets hold OpenAI's value (Ziegler et al. 2019).

    Of the inherited settings, PPO uses context, stride, max_length, template, reward_scale (a plain divisor, 1 if not
    given), output_dir, seed, max_steps, per_device_train_batch_size, learning_rate, lr_scheduler_type,
    lr_scheduler_kwargs, warmup_steps, weight_decay, adam_beta1, adam_beta2, adam_epsilon, max_grad_norm,
    save_strategy, save_steps, save_total_limit, bf16, use_cpu and disable_tqdm. per_device_train_batch_size is the
    number of windows per forward pass and changes no gradient.
    """

    max_steps: int = setting(
        200,
        "Number of iterations, each a rollout and its update. Learning rate, warm-up and saving are scheduled in "
        "iterations.",
    )
    learning_rate: float = setting(1e-5, "Highest learning rate of AdamW.")
    weight_decay: float = setting(0.0, "Decoupled weight decay of AdamW; 0 = none.")
    adam_beta2: float = setting(0.999, "AdamW's decay of the mean of squared gradients.")
    adam_epsilon: float = setting(1e-5, "AdamW's ε, added to the root of the mean of squared gradients.")
    warmup_steps: float = setting(
        0, "Iterations in which the learning rate rises from 0; below 1 = a share of max_steps."
    )
    lr_scheduler_type: str = setting(
        "linear", "Schedule of the learning rate after the warm-up, by its name in transformers."
    )
    lr_scheduler_kwargs: dict | str | None = setting(None, "Further arguments of that schedule; null = none.")
    save_steps: float = setting(50, "Iterations between checkpoints; below 1 = a share of max_steps.")

    episodes: int = setting(64, "Episodes per iteration, over all processes [512].")
    epochs: int = setting(4, "Passes over the windows of an iteration [4].")
    minibatches: int = setting(1, "Optimizer steps per pass over an iteration's windows [1].")
    clip_range: float = setting(0.2, "ε; the ratio of new to old probability is clipped to 1 ± ε [.2].")
    value_clip_range: float | None = setting(
        0.2,
        "The value loss clips V to within this distance, in scaled reward units, of V at the rollout; null = no "
        "clipping [.2].",
    )
    value_weight: float = setting(0.1, "c_v, weight of the value loss [.1].")
    entropy_weight: float = setting(0.0, "c_e, weight of the entropy bonus [0].")
    gae_lambda: float = setting(0.95, "λ of generalised advantage estimation, 0 to 1 [.95].")
    discount_per_token: float = setting(1.0, "γ of every step, 0 to 1 [1].")
    discount_per_turn: float = setting(1.0, "γ between two agent turns, 0 to 1.")
    whiten_advantages: bool = setting(True, "Normalise the advantages of an iteration to mean 0 and variance 1.")
    whiten_rewards: bool = setting(
        False,
        "Scale the rewards, KL included, to variance 1 and keep their mean. If lengths differ, this rewards or "
        "penalises length [true].",
    )
    kl_weight: float = setting(
        0.05,
        "β, weight of the KL to the reference; its starting value if kl_target is set [.15].",
    )
    kl_estimator: Literal["k1", "k3"] = setting(
        "k1",
        "Estimator of the KL per token, k1 or k3 (`kl_k1`, `kl_k3`) [k1].",
    )
    kl_target: float | None = setting(
        None,
        "KL in nats per episode towards which β is adapted; null = β stays fixed [6].",
    )
    kl_horizon: int = setting(10_000, "Number of episodes over which β adapts [10,000].")
    stop_kl: float | None = setting(
        None,
        "An update stops when its approx_kl, in nats per token, exceeds 1.5 times this; null = never.",
    )
    max_kl: float | None = setting(
        None,
        "The run stops with an error when an iteration's KL to the reference exceeds this, in nats per episode, "
        "because the policy has then left the language from which it started; null = never.",
    )
    scale_scores: bool = setting(False, "Divide scores by their running standard deviation.")
    clip_scores: float | None = setting(
        None,
        "Largest absolute value of a score, applied after scale_scores; null = no clipping.",
    )
    unfinished_score: float | None = setting(
        None,
        "Score of a turn that lacks its closing token; null = the score that it was given [-1].",
    )
    unfinished_penalty: float = setting(
        0.0,
        "Amount subtracted from the score of a turn that lacks its closing token.",
    )
    value_model: str = setting(
        "shared",
        "Model from whose hidden states V is computed: shared (the policy), copy (a copy of the policy's trunk, "
        "trained for V alone), or the folder or hub name of a model whose trunk is trained for V. V starts at 0, or, "
        "from a reward model with head terminal or turn, at its score / reward_scale (Stiennon et al. 2020, Ouyang et "
        "al. 2022): at a turn's closing token V is then the score of that turn, and before it the model's score of "
        "the turn so far.",
    )
    value_warmup: int = setting(0, "Number of first iterations in which only the value head learns.")
    ema: float = setting(
        0.0,
        "Decay per optimizer step of averaged weights, which are saved instead of the last ones; 0 = no average.",
    )
    ptx_weight: float = setting(
        0.0,
        "γ, weight of the language-model loss on logged data (PPO-ptx, Ouyang et al. 2022); 0 = none.",
    )
    ptx_examples: float = setting(1.0, "Logged windows per window of a minibatch.")
    tensorflow_eps: bool = setting(False, "Rescale adam_epsilon at every step to its effect in TensorFlow's Adam.")
    decoding: DecodingConfig = setting(DecodingConfig, "How the rollouts choose tokens; saved with the run.")
    max_turns: int = setting(
        256,
        "Number of agent turns after which an episode is cut off, even if the environment would continue.",
    )
    first_seed: int = setting(
        10_000_000,
        "First episode seed of training; the seeds of evaluation and selection are below it.",
    )
    save_rollouts: bool = setting(True, "Write every episode to rollouts/, as data that `train` can read.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(
            self,
            episodes=(1, 1e9),
            epochs=(1, 1e6),
            minibatches=(1, 1e6),
            clip_range=(0, math.inf),
            value_weight=(0, 1e6),
            entropy_weight=(0, 1e6),
            gae_lambda=(0, 1),
            discount_per_token=(0, 1),
            discount_per_turn=(0, 1),
            kl_weight=(0, 1e6),
            kl_horizon=(1, 1e12),
            value_warmup=(0, 1e9),
            ema=(0, 0.99999),
            ptx_weight=(0, 1e6),
            ptx_examples=(0, 1e6),
            max_turns=(1, 1e9),
            first_seed=(0, 2**40),
            max_steps=(1, 1e9),
            unfinished_penalty=(0, 1e9),
        )
        optional = ("value_clip_range", "kl_target", "stop_kl", "max_kl", "clip_scores")
        check_range(self, **{name: (1e-12, math.inf) for name in optional if vars(self)[name] is not None})
        require(
            self.kl_estimator in KL_ESTIMATORS,
            f"kl_estimator: found {shown(self.kl_estimator)}, expected one of {', '.join(KL_ESTIMATORS)}",
        )
        for name, expected in (("beta", 0.0), ("condition_scale", 0.0), ("ask", None), ("stop", ())):
            if (found := vars(self.decoding)[name]) != expected:
                raise InputError(
                    f"decoding.{name}: found {shown(found)}, expected the default: PPO learns "
                    "from the policy's own samples, up to their closing token"
                )
        require(
            self.decoding.temperature != 0,
            "decoding.temperature: found 0, expected above 0: greedy play explores nothing",
        )

    @property
    def named_run(self) -> str | None:
        return None if self.value_model in ("shared", "copy") else self.value_model


def log_distribution(logits: Tensor, temperature: float, kept: Tensor | None) -> Tensor:
    """Return log π over the vocabulary, at the temperature of the rollout and over the tokens that its filters kept.

    Args:
      logits: (N, V).
      temperature: temperature of the rollout, above 0.
      kept: (N, V) bool, False for tokens that were filtered out; None = all are kept.
    Returns: (N, V) fp32, −inf for tokens that are not kept.
    """
    scores = logits.float() / temperature
    return (scores if kept is None else scores.masked_fill(~kept, -torch.inf)).log_softmax(-1)


def ppo_losses(outputs: Mapping[str, Tensor], steps: Mapping[str, Tensor], config: PPOConfig) -> dict[str, Tensor]:
    """Compute the value, policy and entropy terms of L, times their weights, for each of N agent tokens.

    Args:
      outputs: "v" (N,); "log_prob" (N,) of the token, unless only V learns; "entropy" (N,) if its weight is above 0.
      steps: `ActionSteps` (tokens/batching.py) with the further entries behaviour_log_prob and behaviour_v (log π and
        V before the update), advantage and returns, each (N,).
      config: the settings.
    Returns: "value" and, if `outputs` has their inputs, "policy" and "entropy", each (N,); 0 at steps without a
      target.
    """
    known, clip = steps["has_target"], config.value_clip_range or math.inf
    loss = value_loss(outputs["v"], steps["behaviour_v"], steps["returns"], clip)
    losses = {"value": config.value_weight * loss * known}
    if "log_prob" in outputs:
        log_prob, behaviour = outputs["log_prob"], steps["behaviour_log_prob"]
        losses["policy"] = policy_loss(log_prob, behaviour, steps["advantage"], config.clip_range) * known
        if "entropy" in outputs:
            losses["entropy"] = -config.entropy_weight * outputs["entropy"] * known
    return losses


class Rollouts:
    """The episodes of each iteration: played here, and written to the folder rollouts/ of the run.

    Args:
      config: the settings.
      player: the policy in training, with its decoding.
      environment: the environment.
      accelerator: autocasts the policy as in training.
    """

    def __init__(self, config: PPOConfig, player: LanguagePolicy, environment: Any, accelerator: Accelerator):
        self.config, self.player, self.environment, self.accelerator = config, player, environment, accelerator

    def seeds(self, iteration: int) -> range:
        """Return the seeds of this process's share of an iteration's episodes; no seed is used twice in a run.

        Args:
          iteration: number of the iteration, from 0.
        """
        config = self.config
        # Iterations, and runs that differ in their seed alone, get disjoint ranges of episode seeds.
        first = config.first_seed + (config.seed * config.max_steps + iteration) * config.episodes
        return range(first, first + config.episodes)[config.process_index :: config.world_size]

    def play(self, iteration: int, progress: Callable[[int, int], None] | None = None) -> list[Trajectory]:
        """Play this process's share of an iteration's episodes.

        Args:
          iteration: number of the iteration, from 0.
          progress: called with the numbers of episodes (played, in all); None = not called.
        Returns: one trajectory per episode, with the environment's rewards.
        """
        config, seeds = self.config, self.seeds(iteration)
        with self.accelerator.autocast():
            episodes = rollout(self.player, self.environment, seeds, max_turns=config.max_turns, progress=progress)
        if config.save_rollouts:
            part = f"-{config.process_index}" if config.world_size > 1 else ""
            file = Path(config.output_dir) / "rollouts" / f"iteration-{iteration:05d}{part}.jsonl"
            write_trajectories(file, episodes)
        return episodes

    def remove_from(self, iteration: int) -> None:
        """Delete the stored episodes of this iteration and later ones, which a resumed run plays again."""
        for file in sorted(Path(self.config.output_dir).glob("rollouts/iteration-*.jsonl")):
            if self.config.should_save and int(file.stem.split("-")[1]) >= iteration:
                file.unlink()


def agent_turns(trajectories: Sequence[Trajectory]) -> list[Turn]:
    """Return the agent's turns of all episodes, in order."""
    return [turn for trajectory in trajectories for turn in trajectory.turns if turn.is_trainable]


def is_closed(turn: Turn, close_ids: frozenset[int]) -> bool:
    """True if the turn, as sampled, ends with one of the ids that close a turn."""
    return bool(close_ids & {*turn.token_ids[-1:]})


def shape_scores(
    trajectories: Sequence[Trajectory], close_ids: frozenset[int], config: PPOConfig, moments: Moments
) -> tuple[list[Trajectory], Moments]:
    """Replace each agent turn's reward by the score that PPO learns from.

    The changes are made in this order: `unfinished_score` and `unfinished_penalty`, then `scale_scores`, then
    `clip_scores`.

    Args:
      trajectories: the episodes of this process, with the environment's rewards.
      close_ids: the ids that close a turn.
      config: the settings.
      moments: the moments of all earlier scores.
    Returns: the episodes, and the moments of all scores so far, which change only with `scale_scores`.
    """
    turns = agent_turns(trajectories)
    score = torch.tensor([turn.reward or 0.0 for turn in turns], dtype=torch.float64)
    closed = torch.tensor([is_closed(turn, close_ids) for turn in turns])
    if config.unfinished_score is not None:
        score = replace_unfinished(score, closed, config.unfinished_score)
    score = penalize_unfinished(score, closed, config.unfinished_penalty)
    if config.scale_scores:
        moments = moments.updated(torch.tensor(gather_object(score.tolist()), dtype=torch.float64))
    shaped = iter(scale_scores(score, moments.std, config.clip_scores or math.inf).tolist())

    def with_score(turn: Turn) -> Turn:
        return replace(turn, reward=next(shaped)) if turn.is_trainable else turn

    return [replace(t, turns=tuple(map(with_score, t.turns))) for t in trajectories], moments


class Passes:
    """Forward passes over windows: their batches on the training device, and the logits of the reference.

    Args:
      learner: the policy and V in training.
      reference: the model π_ref; None = the policy with its adapter off.

    Attributes:
      tokens: number of tokens that models have read in this iteration.
    """

    def __init__(self, learner: Learner, reference: nn.Module | None):
        self.learner, self.reference, self.tokens = learner, reference, 0

    def batch(self, windows: WindowDataset, index: np.ndarray) -> TokenBatch:
        """Return the windows with these indices as a batch on the training device."""
        batch = windows.batch(index)
        self.tokens += int(batch["attention_mask"].sum())
        return send_to_device(batch, self.learner.args.device)

    def reference_logits(self, batch: TokenBatch) -> Tensor:
        """Return the logits of π_ref at the N steps of a batch, (N, V)."""
        steps, policy = batch["steps"], self.learner.module.policy
        inputs = {name: batch[name][: batch["windows"]] for name in ("input_ids", "attention_mask")}
        self.tokens += int(inputs["attention_mask"].sum())
        with policy.disable_adapter() if self.reference is None else contextlib.nullcontext():
            return packed_logits(self.reference or policy, steps["row"], steps["state"], **inputs)[0]


class Observer:
    """What the model computes at the N steps (agent tokens) of played episodes, before the first update.

    Args:
      passes: the model and its reference.
      player: the sampler, whose filters are applied here as well.
      encoder: cuts episodes into windows.
      config: the settings.
    """

    def __init__(self, passes: Passes, player: LanguagePolicy, encoder: EpisodeEncoder, config: PPOConfig):
        self.passes, self.player, self.encoder, self.config = passes, player, encoder, config

    @torch.no_grad()
    def observe(self, trajectories: Sequence[Trajectory], counts: Counter[str]) -> Experience:
        """Encode episodes and compute the model's outputs at all steps.

        Args:
          trajectories: the episodes, with the scores to learn from.
          counts: updated in place: message -> number of dropped turns or other faults.
        Returns: the encoded episodes with further columns, (N,) each: "place" (the index of the step),
          "behaviour_log_prob" (log π_old), "ref_log_prob" (log π_ref), "sampled_log_prob" (as the sampler reported
          it), "behaviour_v" (V of the state), "next_v" (V of the next state) and "entropy". If tokens were filtered,
          also "kept" (N, ⌈V/8⌉): the tokens of the vocabulary that the sampler's filters and the environment's options
          kept, one bit per token.
        """
        experience = Experience.of(trajectories, self.encoder, counts, self.player.renderer.close_id)
        experience.add(place=np.arange(len(experience.episode)))
        compute = partial(self._outputs, allowed=self._allowed(trajectories, experience))
        # Windows of similar length share a batch: less padding.
        order = np.argsort(-experience.windows.lengths, kind="stable")
        batches = _chunks(order, self.config.per_device_train_batch_size)
        found = collect_outputs(experience.windows, compute, self.config.device, batches)
        sampled = [trajectories[episode].turns[turn].behaviour_log_prob[k] for episode, turn, k in experience.tokens()]
        experience.add(**found, sampled_log_prob=np.asarray(sampled, dtype=np.float32))
        # next_v is stored now, so updates need no rows for next states.
        experience.windows = replace(experience.windows, next_rows=False)
        return experience

    def _outputs(self, batch: TokenBatch, allowed: Sequence[list[int] | None] | None) -> dict[str, Tensor]:
        """Compute the columns of `observe` for one batch; `allowed` is the result of `_allowed`."""
        play, learner, steps = self.config.decoding, self.passes.learner, batch["steps"]
        self.passes.tokens += int(batch["attention_mask"].sum())
        with learner.accelerator.autocast():
            outputs = learner.module(batch, next_v=True)
            reference = self.passes.reference_logits(batch)
        logits, kept, packed = outputs["logits"].float(), None, {}
        if allowed is not None:
            logits = logits.masked_fill(~_mask([allowed[i] for i in steps["place"].tolist()], logits), -torch.inf)
        if allowed is not None or (play.top_k, play.top_p, play.min_p, play.support) != (None, None, None, 0.0):
            # Updates normalise over the same tokens as the sampler did, so that ρ is 1 before the first step.
            kept = filter_policy(logits, play) > -torch.inf
            packed = {"kept": torch.from_numpy(np.packbits(kept.cpu().numpy(), axis=1))}
        log_probs, action = log_distribution(logits, play.temperature, kept), steps["action"].unsqueeze(-1)
        return packed | {
            "behaviour_log_prob": log_probs.gather(-1, action)[:, 0],
            "ref_log_prob": log_distribution(reference, play.temperature, kept).gather(-1, action)[:, 0],
            "behaviour_v": outputs["v"],
            "next_v": outputs["next_v"],
            "entropy": entropy(log_probs),
        }

    def _allowed(self, trajectories: Sequence[Trajectory], experience: Experience) -> list[list[int] | None] | None:
        """Return, per step, the token ids that the environment's options (the only texts allowed in a turn) left open.

        None for a step = all tokens; None instead of a list = no episode has options.
        """
        found = []
        for episode, turn, k in experience.tokens():
            options = trajectories[episode].labels.get("options", {}).get(str(turn))
            ids = [self.player.sampler.options.ids_of[text] for text in options or ()]
            # Allowed next tokens are those of the options that start with the k tokens sampled so far.
            sampled = trajectories[episode].turns[turn].token_ids[:k]
            allowed = [option[k] for option in ids if option[:k] == sampled and len(option) > k]
            found.append(allowed if options else None)
        return found if any(found) else None


def _mask(allowed: Sequence[list[int] | None], logits: Tensor) -> Tensor:
    """Return the allowed tokens of n steps as a bool mask (n, V), on the device of the logits (n, V)."""
    mask = torch.zeros(logits.shape, dtype=torch.bool)
    for row, tokens in zip(mask, allowed, strict=True):
        row[slice(None) if tokens is None else tokens] = True
    return mask.to(logits.device)


def _unpacked(steps: Mapping[str, Tensor], logits: Tensor) -> Tensor | None:
    """Return the tokens that were kept at n steps as a bool mask (n, V), for logits (n, V); None = all."""
    if "kept" not in steps:
        return None
    bits = np.unpackbits(steps["kept"].cpu().numpy().astype(np.uint8), axis=1, count=logits.shape[1])
    return torch.from_numpy(bits).bool().to(logits.device)


def check_start(experience: Experience, bf16: bool) -> None:
    """Check, before the first update, that the policy equals its reference and that sampler and learner agree.

    Args:
      experience: the result of `Observer.observe`.
      bf16: True if the model computes in bf16, whose rounding is allowed.
    Raises: InputError that names the check that failed.
    """
    log_prob = experience.column("behaviour_log_prob")
    kl = (log_prob - experience.column("ref_log_prob")).abs().max().item()
    require(
        kl <= 1e-6,
        f"KL at step 0: found policy and reference {kl:.3g} nats apart on a token, expected 0: "
        "the reference is not the model that the run starts from",
    )
    gap = (log_prob - experience.column("sampled_log_prob")).abs().mean().item()
    require(
        gap <= SAMPLER_GAP[bf16],
        f"KL at step 0: found sampler and learner {gap:.3g} nats per token apart, expected 0: "
        "they differ in temperature, filters or dropout, or in the part of an episode that they see "
        "(max_length must hold whole dialogues, or context must bound them)",
    )


def credit(experience: Experience, config: PPOConfig, kl_weight: float) -> dict[str, float]:
    """Add the columns "advantage" and "returns" (N,) to the encoded episodes, in place.

    Args:
      experience: the result of `Observer.observe`.
      config: the settings.
      kl_weight: β.
    Returns: metrics of the iteration before its update, by name.
    """
    column, known = experience.column, experience.column("has_target").bool()
    log_prob, v, discount = column("behaviour_log_prob"), column("behaviour_v"), column("discount")
    kl = KL_ESTIMATORS[config.kl_estimator](log_prob, column("ref_log_prob"))
    reward = kl_shaped_reward(column("reward"), kl, kl_weight)[known]
    if config.whiten_rewards:
        reward = whiten(reward, keep_mean=True)
    target = td_target(reward, column("next_v")[known], column("bootstrap")[known], discount[known])
    episode = torch.from_numpy(experience.episode)[known]
    advantage, returns = generalized_advantage(target, v[known], discount[known], episode, config.gae_lambda)
    # Steps without a target have no advantage: they are left out above and get zeros here.
    full = torch.zeros(2, len(known))
    full[:, known] = torch.stack([whiten(advantage) if config.whiten_advantages else advantage, returns])
    experience.add(advantage=full[0].numpy(), returns=full[1].numpy())
    return {
        "kl": kl.sum().item() / experience.n,
        "kl_per_token": kl.mean().item(),
        "entropy": column("entropy").mean().item(),
        "explained_variance": value_statistics(v[known], v[known], returns, math.inf)["explained_variance"].item(),
        "value": v.mean().item(),
        "sampler_gap": (log_prob - column("sampled_log_prob")).abs().max().item(),
    }


class Update:
    """K epochs of minibatches over the windows (rows of tokens) of an iteration.

    Args:
      passes: the model in training.
      ptx: windows of logged data for `ptx_weight`; None = no such data.
      config: the settings.
    """

    def __init__(self, passes: Passes, ptx: WindowDataset | None, config: PPOConfig):
        self.passes, self.learner, self.ptx, self.config = passes, passes.learner, ptx, config

    def run(self, experience: Experience, iteration: int) -> dict[str, float]:
        """Run the epochs over shuffled windows; return mean statistics by name.

        Args:
          experience: the encoded episodes, with advantages and returns.
          iteration: number of the iteration, from 0.
        Raises: InputError if there are fewer windows than minibatches.
        """
        config, windows, rows = self.config, len(experience.windows), []
        require(
            windows >= config.minibatches,
            f"minibatches: found {config.minibatches}, expected at most {windows}, the number of windows in this "
            "iteration",
        )
        dice = np.random.default_rng([config.seed, iteration, config.process_index])
        shuffled = (dice.permutation(windows) for _ in range(config.epochs))
        for index in (index for order in shuffled for index in np.array_split(order, config.minibatches)):
            statistics = self.minibatch(experience, index, dice, warming=iteration < config.value_warmup)
            if statistics is None:
                break
            rows.append(statistics)
        means = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]} if rows else {}
        if rows:
            means["ratio_max"] = max(row["ratio_max"] for row in rows)
        done = {"minibatches": len(rows), "learning_rate": self.learner.scheduler.get_last_lr()[0]}
        return mean_over_processes(self.learner.accelerator, means) | done

    def minibatch(
        self, experience: Experience, index: np.ndarray, dice: np.random.Generator, warming: bool
    ) -> dict[str, float] | None:
        """Take one optimizer step on some windows.

        Args:
          experience: the encoded episodes.
          index: indices of the windows in `experience`.
          dice: the random generator that draws the logged windows for `ptx_weight`.
          warming: True while only the value head learns (`value_warmup`).
        Returns: statistics of the step by name; None, without a step, if `stop_kl` is exceeded.
        """
        config, learner = self.config, self.learner
        compared, losses = self._backward(experience, index, self._logged_windows(len(index), dice, warming), warming)
        clip = config.value_clip_range or math.inf
        statistics = policy_statistics(compared["log_prob"], compared["behaviour_log_prob"], config.clip_range)
        statistics |= value_statistics(compared["v"], compared["behaviour_v"], compared["returns"], clip)
        del statistics["explained_variance"]  # `credit` computes it over the whole iteration
        if config.stop_kl is not None:
            approx_kl = learner.accelerator.reduce(statistics["approx_kl"], "mean")
            if approx_kl > OVERSHOOT * config.stop_kl:
                learner.optimizer.zero_grad()
                return None
        if config.tensorflow_eps:
            for group in learner.optimizer.param_groups:
                group["eps"] = tensorflow_adam_eps(config.adam_epsilon, config.adam_beta2, learner.updates + 1)
        return {name: float(value) for name, value in (statistics | losses).items()} | {"grad_norm": learner.step()}

    def _logged_windows(self, windows: int, dice: np.random.Generator, warming: bool) -> np.ndarray:
        """Draw the indices of the logged windows for a minibatch of so many windows."""
        if self.ptx is None or warming:
            return np.zeros(0, dtype=int)
        return dice.integers(len(self.ptx), size=max(1, round(self.config.ptx_examples * windows)))

    def _backward(
        self, experience: Experience, index: np.ndarray, logged: np.ndarray, warming: bool
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Add up the gradient of L over a minibatch, in chunks of the batch size.

        Args:
          experience: the encoded episodes.
          index: indices of the windows in `experience`.
          logged: indices of logged windows in `ptx`.
          warming: True while only the value head learns.
        Returns: the inputs of the statistics by name (see `ppo_terms`), and the mean of each term of L, as loss/NAME.
        """
        config, accelerator, size = self.config, self.learner.accelerator, self.config.per_device_train_batch_size
        # The divisors of the two losses over all processes: steps with a target, and logged action tokens.
        targets = int(experience.column("has_target")[experience.places(index)].sum())
        tokens = len(places_of(self.ptx.step_offsets, logged)[0]) if len(logged) else 0
        divisors = accelerator.reduce(torch.tensor([targets, tokens], device=config.device), "sum").clamp(min=1)
        chunks = [(partial(self.ppo_terms, experience, chunk, warming), divisors[0]) for chunk in _chunks(index, size)]
        chunks += [(partial(self.ptx_terms, chunk), divisors[1]) for chunk in _chunks(logged, size)]
        if accelerator.num_processes > 1:
            chunks.reverse()  # DDP averages gradients with the last chunk, and logged data give V no gradient
        compared: list[dict[str, Tensor]] = []
        losses: Counter[str] = Counter()
        for number, (terms_of_chunk, divisor) in enumerate(chunks, start=1):
            last = number == len(chunks)  # gradients are averaged over processes once, with the last chunk
            with contextlib.nullcontext() if last else accelerator.no_sync(self.learner.wrapped):
                terms, outputs = terms_of_chunk()
                terms = {f"loss/{name}": term.sum() / divisor for name, term in terms.items()}
                # DDP averages gradients over ranks, the divisors are global: multiply once by the world size.
                accelerator.backward(sum(terms.values()) * config.world_size)
            losses.update({name: term.detach() for name, term in terms.items()})
            compared += [outputs] if outputs else []
        return {name: torch.cat([part[name] for part in compared]) for name in compared[0]}, losses

    def ppo_terms(
        self, experience: Experience, index: np.ndarray, warming: bool
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Compute the terms of L, times their weights, on some windows.

        Args:
          experience: the encoded episodes.
          index: indices of the windows in `experience`.
          warming: True while only the value head learns (`value_warmup`).
        Returns: the terms by name, each (N,) for the N steps of the windows; and the inputs of the statistics by name,
          without gradient, one number per step with a target.
        """
        config, batch = self.config, self.passes.batch(experience.windows, index)
        steps = batch["steps"]
        with self.learner.accelerator.autocast():
            outputs = self.learner.wrapped(batch, value_only=warming)
        log_probs = log_distribution(
            outputs["logits"], config.decoding.temperature, _unpacked(steps, outputs["logits"])
        )
        learnt = {"v": outputs["v"]}
        compared = learnt | {"log_prob": log_probs.gather(-1, steps["action"].unsqueeze(-1))[:, 0]}
        if not warming:
            learnt = dict(compared)
            if config.entropy_weight > 0:
                learnt["entropy"] = entropy(log_probs)
        compared |= {name: steps[name] for name in ("behaviour_log_prob", "behaviour_v", "returns")}
        known = steps["has_target"]
        return ppo_losses(learnt, steps, config), {name: value.detach()[known] for name, value in compared.items()}

    def ptx_terms(self, index: np.ndarray) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Compute the loss on logged data, "ptx" -> (N,): ptx_weight · −log π of the N agent tokens in its windows.

        Args:
          index: indices of logged windows.
        Returns: the loss as `ppo_terms` returns its terms, without inputs of statistics.
        """
        batch = self.passes.batch(self.ptx, index)
        with self.learner.accelerator.autocast():
            logits = self.learner.wrapped(batch)["logits"].float()
        loss = nn.functional.cross_entropy(logits, batch["steps"]["action"], reduction="none")
        return {"ptx": self.config.ptx_weight * loss}, {}


def _chunks(index: np.ndarray, size: int) -> list[np.ndarray]:
    return [index[start : start + size] for start in range(0, len(index), size)]


class PPOTrainer(LoopTrainer):
    """A trainer of a policy that plays in an environment.

    Args:
      model: a causal LM, or the folder or hub name of one. Value heads and the embedding of returns are removed.
      args: the settings.
      environment: any environment that `rollout` takes, such as prompts with a scorer (environments/prompts.py).
      ptx_dataset: logged trajectories for `ptx_weight`; None = no such data.
      processing_class: the tokenizer; None = the one saved with the model.
      peft_config: a config of peft, such as LoraConfig, for an adapter that is trained instead of the trunk; the
        reference is then the model without the adapter. None = train the trunk.

    Raises: InputError if settings, model, data and environment do not fit together.
    """

    algorithm = "ppo"

    def __init__(
        self,
        model: PreTrainedModel | str,
        args: PPOConfig,
        environment: VectorEnvironment | Callable[[], Environment],
        ptx_dataset: Sequence[Trajectory] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
    ):
        require(
            args.ptx_weight == 0 or ptx_dataset is not None,
            f"ptx_weight: found {args.ptx_weight}, but no logged data; set data.train, or use 0",
        )
        require(
            args.episodes >= args.world_size,
            f"episodes: found {args.episodes}, expected at least one for each of {args.world_size} processes",
        )
        if processing_class is None:
            processing_class = tokenizer_beside(model)
        policy = as_guided(load_model(model) if isinstance(model, str) else model)
        super().__init__(args, processing_class, policy, find_unused_parameters=args.value_warmup > 0)
        check_policy(policy, self.renderer, args.max_length)
        policy = remove_heads(policy).to(self.device)
        rule, scale = StepRule(args.discount_per_token, args.discount_per_turn), args.reward_scale or 1.0
        encoder = EpisodeEncoder(self.renderer, args.window, rule, RewardScale(scale=scale))
        policy.config.offline_lmrl = run_metadata(policy.config) | {
            "algorithm": self.algorithm,
            **rendering_block(self.renderer),
            "window": asdict(args.window),
            "step_rule": asdict(rule),
            "decoding": args.saved_decoding,
        }
        value_model = open_value_model(policy, args, self.renderer)
        reference = None  # None = the policy with its adapter off
        if peft_config is None:
            reference = copy.deepcopy(policy).eval().requires_grad_(False)
        else:
            policy = with_adapter(policy, peft_config)
        transformers.set_seed(args.seed)  # ActorCritic draws the value head's first layer
        module = ActorCritic(policy, value_model, scale)
        if _freeze_unreached(module, encoder, args):
            self.accelerator.ddp_handler.find_unused_parameters = True
        self.set_up(module, policy, args.ema)
        self.counts.update(optional(environment, "counts"))
        player = LanguagePolicy(policy, self.renderer, args.decoding, **asdict(args.window))
        ptx = None
        if args.ptx_weight > 0:
            encoded = encode_trajectories(ptx_dataset, encoder, self.counts)
            ptx = WindowDataset(encoded, self.renderer.close_id, next_rows=False, end_rows=False)
        self.passes = Passes(self.learner, reference)
        self.rollouts = Rollouts(args, player, environment, self.accelerator)
        self.observer = Observer(self.passes, player, encoder, args)
        self.update = Update(self.passes, ptx, args)
        self.state = {"kl_weight": args.kl_weight, "moments": list(Moments())}

    def train(self, resume_from_checkpoint: str | None = None) -> None:
        """Run all iterations; write metrics and checkpoints to output_dir.

        Args:
          resume_from_checkpoint: folder of the checkpoint after which training continues; None = start anew.
        Raises: InputError if the checkpoint cannot be loaded, if the check before the first update (`check_start`)
          fails, if the KL of an iteration exceeds the setting `max_kl`, or if a gradient is not finite. Stopped if a
          signal ends training.
        """
        args = self.args
        self.begin(resume_from_checkpoint)
        self.rollouts.remove_from(self.iteration)
        started = time.monotonic()
        with self.display.training(self.iteration, args.max_steps):
            while self.iteration < args.max_steps:
                self.iterate()
                self.display.advance(self.iteration, args.max_steps)
                self.finish_iteration()
        self.log({"train_runtime": time.monotonic() - started})
        self.display.summarise(args.output_dir)

    def iterate(self) -> dict[str, float]:
        """Run one iteration: play episodes, learn from them, log and return metrics."""
        args, began = self.args, time.monotonic()
        with self.display.bar("playing", len(self.rollouts.seeds(self.iteration))) as progress:
            trajectories = self.rollouts.play(self.iteration, progress)
        played = time.monotonic()
        metrics = self.learn(trajectories)
        self.iteration += 1
        seconds = {"rollout_seconds": played - began, "update_seconds": time.monotonic() - played}
        metrics = self.episode_metrics(trajectories) | metrics | dict(self.totals) | seconds
        self.log(metrics)
        if args.kl_target is not None:
            self.state["kl_weight"] = adaptive_kl_weight(
                self.state["kl_weight"], metrics["kl"], args.kl_target, args.episodes, args.kl_horizon
            )
        if args.max_kl is not None and metrics["kl"] > args.max_kl:
            raise InputError(
                f"max_kl: found a KL of {metrics['kl']:.3g} nats per episode in iteration "
                f"{self.iteration}, expected at most {args.max_kl:g}: the policy has collapsed; "
                "raise kl_weight, lower learning_rate or set stop_kl"
            )
        return metrics

    def observe(self, trajectories: Sequence[Trajectory]) -> Experience:
        """Return the episodes, with scores shaped as the settings say, and the model's outputs at their steps."""
        moments = Moments(*self.state["moments"])
        scored, moments = shape_scores(trajectories, self.renderer.close_ids, self.args, moments)
        self.state["moments"] = list(moments)
        return self.observer.observe(scored, self.counts)

    def learn(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """Learn from the episodes of an iteration; return metrics by name."""
        experience, kl_weight = self.observe(trajectories), self.state["kl_weight"]
        if self.iteration == 0:
            check_start(experience, self.args.bf16)
        metrics = mean_over_processes(self.accelerator, credit(experience, self.args, kl_weight))
        metrics |= {"kl_weight": kl_weight} | self.update.run(experience, self.iteration)
        self.learner.scheduler.step()
        return metrics

    def episode_metrics(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """Add the costs of an iteration to the run's totals, and return means over its episodes by name.

        Args:
          trajectories: the episodes of this process, with the environment's rewards.
        """
        turns, n = agent_turns(trajectories), len(trajectories)
        tokens = sum(len(turn.token_ids) for turn in turns)
        tokens_read, self.passes.tokens = self.passes.tokens, 0
        self.spend(
            {
                "episodes": n,
                "environment_steps": len(turns),
                "reward_queries": sum(turn.reward is not None for turn in turns),
                "generated_tokens": tokens,
                "training_tokens": tokens_read,
            }
        )
        return mean_over_processes(
            self.accelerator,
            {
                "score": sum(t.total_return for t in trajectories) / n,
                "tokens": tokens / n,
                "turns": len(turns) / n,
                "terminated": sum(t.terminated for t in trajectories) / n,
                "closed": sum(is_closed(turn, self.renderer.close_ids) for turn in turns) / len(turns),
            },
        )

    def plan(self) -> dict[str, int]:
        """Return the numbers of iterations, episodes and optimizer steps that `train` would run, by name."""
        args = self.args
        return {
            "iterations": args.max_steps,
            "episodes": args.max_steps * args.episodes,
            "optimizer steps": args.max_steps * args.epochs * args.minibatches,
        }


def open_value_model(policy: PreTrainedModel, args: PPOConfig, renderer: Renderer) -> PreTrainedModel | None:
    """Return the model that the setting `value_model` names, to be trained on the device of the policy.

    Args:
      policy: the policy at the start.
      args: the settings.
      renderer: renders dialogues for the policy.
    Returns: the model; None = V shares the policy's trunk.
    Raises: InputError if its tokens differ from the policy's, or if it is a reward model whose score cannot be the
      initial V.
    """
    name = args.value_model
    if name == "shared":
        return None
    if name == "copy":
        return copy.deepcopy(policy).requires_grad_(True)
    is_reward = is_reward_model(name)
    model = load_reward_model(name) if is_reward else load_model(name)
    try:
        check_model(model, renderer, args.max_length)
    except InputError as error:
        raise InputError(f"value_model: {name}: {error}") from error
    if is_reward:
        check_score_starts_v(run_metadata(model.config), args)
        if has_adapter(model):
            model = model.merge_and_unload()
    return model.to(policy.device).requires_grad_(True)


def check_score_starts_v(block: Mapping[str, Any], args: PPOConfig) -> None:
    """Check that the score of the reward model in the setting `value_model` can be the initial V.

    Args:
      block: the run metadata of the reward model.
      args: the settings.
    Raises: InputError if it cannot.
    """
    name = args.value_model
    if (head := block["reward"]["head"]) == "token":
        raise InputError(
            f"value_model: {name}: found a reward model with head: {head}, whose score is a sum over "
            "tokens, expected head: terminal or turn, which V can read at one token"
        )
    context = block.get("window", {}).get("context")
    require(
        context in (None, args.context),
        f"value_model: {name}: found a reward model with context: {context}, expected this run's "
        f"context, {args.context}, as V reads what the policy sees",
    )
    require(
        not args.scale_scores,
        f"scale_scores: found true with the reward model {name} as value_model, expected only one of "
        "them: V would start in another unit than the scaled scores",
    )


def _freeze_unreached(module: ActorCritic, encoder: EpisodeEncoder, args: PPOConfig) -> bool:
    """Freeze the parameters that get no gradient from the policy's logits or from V.

    They are found by one forward pass on a made-up dialogue. It is long, because some parts of a model are used for
    long texts only.

    Returns: True if DistributedDataParallel must look for unused parameters in every step (`freeze_unreached`).
    """
    long = "a " * (args.max_length // 4)
    dialogue = Trajectory((Turn("user", long), Turn("assistant", "b", reward=0.0)))
    encoded = encode_trajectories([dialogue], encoder, Counter())
    windows = WindowDataset(encoded, encoder.renderer.close_id, next_rows=False, end_rows=False)
    outputs = module(send_to_device(windows.batch(np.arange(1)), args.device))
    return freeze_unreached(module, outputs["logits"].sum() + outputs["v"].sum())
