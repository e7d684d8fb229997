"""Proximal policy optimisation (Schulman et al. 2017) for language, as RLHF runs it (Ziegler et al. 2019).

PPO is the only algorithm here that generates its own data. `iterate` is one iteration, top to bottom: the sampler
plays episodes; they are encoded, as in the offline algorithms, as windows (rows of tokens) with packed steps, one for
each token that the agent wrote (the sampled token ids are kept, nothing is tokenised again); one pass computes
log-probabilities and V of all steps; K epochs of minibatches follow. Over the agent's N tokens:

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
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from accelerate.utils import gather_object, send_to_device
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from offline_lmrl.decoding.distribution import filter_policy
from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.decoding.probe import check_plays, check_trains
from offline_lmrl.decoding.sampler import DecodingConfig
from offline_lmrl.environments.rollouts import rollout
from offline_lmrl.errors import InputError, shown
from offline_lmrl.logs.io import write_trajectories
from offline_lmrl.logs.protocols import Environment, VectorEnvironment
from offline_lmrl.logs.scale import RewardScale
from offline_lmrl.logs.trajectory import Trajectory, Turn
from offline_lmrl.models.actor_critic import ActorCritic
from offline_lmrl.models.adapters import run_metadata
from offline_lmrl.models.guided import as_guided, remove_heads
from offline_lmrl.models.loading import load_model
from offline_lmrl.models.renderers import rendering_block
from offline_lmrl.models.reward_model import is_reward_model, load_reward_model
from offline_lmrl.models.step_outputs import packed_logits
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
from offline_lmrl.tokens.batching import TokenBatch, WindowDataset, encode_trajectories
from offline_lmrl.tokens.episodes import EpisodeEncoder, StepRule
from offline_lmrl.tokens.experience import Experience
from offline_lmrl.training.config import OfflineConfig, check_range
from offline_lmrl.training.loop import LoopTrainer
from offline_lmrl.training.trainer import OfflineTrainer, check_model, tokenizer_beside, with_adapter

KL_ESTIMATORS = {"k1": kl_k1, "k3": kl_k3}
OVERSHOOT = 1.5  # an update stops when its approx_kl exceeds this multiple of `stop_kl`
SAMPLER_GAP = {False: 1e-3, True: 0.05}  # largest mean gap of sampler and learner, nats per token, by bf16
SUMS = ("episodes", "environment_steps", "reward_queries", "generated_tokens", "training_tokens")


@dataclass
class PPOConfig(OfflineConfig):
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
    decoding: dict[str, Any] = setting(dict, "DecodingConfig fields for the rollouts, saved with the run.")
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
        check_range(self, **{n: (1e-12, math.inf) for n in optional if getattr(self, n) is not None})
        if self.kl_estimator not in KL_ESTIMATORS:
            raise InputError(
                f"kl_estimator: found {shown(self.kl_estimator)}, expected one of {', '.join(KL_ESTIMATORS)}"
            )
        decoding = DecodingConfig.from_dict(self.decoding)
        for name, expected in (("beta", 0.0), ("condition_scale", 0.0), ("ask", None), ("stop", ())):
            if getattr(decoding, name) != expected:
                raise InputError(
                    f"decoding.{name}: found {shown(getattr(decoding, name))}, expected the default: PPO learns "
                    "from the policy's own samples, up to their closing token"
                )
        if decoding.temperature == 0:
            raise InputError("decoding.temperature: found 0, expected above 0: greedy play explores nothing")
        super().__post_init__()

    @property
    def named_run(self) -> str | None:
        return None if self.value_model in ("shared", "copy") else self.value_model

    @property
    def play(self) -> DecodingConfig:
        return DecodingConfig.from_dict(self.decoding)


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
    # Logged data and models are opened as in the offline algorithms.
    read_rows = staticmethod(OfflineTrainer.read_rows)
    new_model = staticmethod(OfflineTrainer.new_model)
    open_model = staticmethod(OfflineTrainer.open_model)

    def __init__(
        self,
        model: PreTrainedModel | str,
        args: PPOConfig,
        environment: VectorEnvironment | Callable[[], Environment],
        ptx_dataset: Sequence[Trajectory] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
    ):
        if args.ptx_weight > 0 and ptx_dataset is None:
            raise InputError(f"ptx_weight: found {args.ptx_weight}, but no logged data; set data.train, or use 0")
        if args.episodes < args.world_size:
            raise InputError(
                f"episodes: found {args.episodes}, expected at least one for each of {args.world_size} processes"
            )
        if processing_class is None:
            processing_class = tokenizer_beside(model)
        policy = as_guided(load_model(model) if isinstance(model, str) else model)
        super().__init__(args, processing_class, policy, find_unused_parameters=args.value_warmup > 0)
        check_model(policy, self.renderer, args.max_length)
        check_trains(policy, self.renderer)
        check_plays(policy, self.renderer)
        policy = remove_heads(policy).to(self.device)
        rule, self.scale = StepRule(args.discount_per_token, args.discount_per_turn), args.reward_scale or 1.0
        self.encoder = EpisodeEncoder(self.renderer, args.window, rule, RewardScale(scale=self.scale))
        policy.config.offline_lmrl = run_metadata(policy.config) | {
            "algorithm": self.algorithm,
            **rendering_block(self.renderer),
            "window": asdict(args.window),
            "step_rule": asdict(rule),
            "decoding": dict(args.decoding),
        }
        value_model = None
        if args.value_model != "shared":
            value_model = copy.deepcopy(policy) if args.value_model == "copy" else self._open_value_model()
            value_model = value_model.to(self.device).requires_grad_(True)
        self.reference = None  # None = the policy with its adapter off
        if peft_config is None:
            self.reference = copy.deepcopy(policy).eval().requires_grad_(False)
        else:
            policy = with_adapter(policy, peft_config)
        transformers.set_seed(args.seed)  # ActorCritic draws the value head's first layer
        module = ActorCritic(policy, value_model, self.scale)
        self._freeze_unreached(module)
        self.set_up(module, policy, average=args.ema > 0)
        self.environment = environment
        self.counts.update(getattr(environment, "counts", {}))
        self.player = LanguagePolicy(policy, self.renderer, args.play, **asdict(args.window))
        self.vocabulary = policy.get_output_embeddings().weight.shape[0]
        self.ptx = None
        if args.ptx_weight > 0:
            columns = encode_trajectories(ptx_dataset, self.encoder, self.counts)
            self.ptx = WindowDataset(columns, self.renderer.close_id, next_rows=False, end_rows=False)
        self.kl_weight, self.moments = args.kl_weight, Moments()
        self.totals.update(dict.fromkeys(SUMS, 0))
        self.tokens_read = 0  # by this process since the last row of metrics

    def _open_value_model(self) -> PreTrainedModel:
        """Load the model that the setting `value_model` names.

        Raises: InputError if its tokens differ from the policy's, or if it is a reward model whose score cannot be the
          initial V.
        """
        args, name = self.args, self.args.value_model
        is_reward = is_reward_model(name)
        model = load_reward_model(name) if is_reward else load_model(name)
        try:
            check_model(model, self.renderer, args.max_length)
        except InputError as error:
            raise InputError(f"value_model: {name}: {error}") from error
        if not is_reward:
            return model
        block = run_metadata(model.config)
        if (head := block["reward"]["head"]) == "token":
            raise InputError(
                f"value_model: {name}: found a reward model with head: {head}, whose score is a sum over "
                "tokens, expected head: terminal or turn, which V can read at one token"
            )
        context = block.get("window", {}).get("context")
        if context not in (None, args.context):
            raise InputError(
                f"value_model: {name}: found a reward model with context: {context}, expected this run's "
                f"context, {args.context}, as V reads what the policy sees"
            )
        if args.scale_scores:
            raise InputError(
                f"scale_scores: found true with the reward model {name} as value_model, expected only one of "
                "them: V would start in another unit than the scaled scores"
            )
        return model.merge_and_unload() if hasattr(model, "peft_config") else model

    def _freeze_unreached(self, module: ActorCritic) -> None:
        """Freeze the parameters that get no gradient from the policy's logits or from V.

        They are found by one forward pass on a made-up dialogue. It is long, because some parts of a model are used
        for long texts only.

        Args:
          module: policy and V, on the training device.
        """
        long = "a " * (self.args.max_length // 4)
        dialogue = Trajectory((Turn("user", long), Turn("assistant", "b", reward=0.0)))
        columns = encode_trajectories([dialogue], self.encoder, Counter())
        windows = WindowDataset(columns, self.renderer.close_id, next_rows=False, end_rows=False)
        outputs = module(send_to_device(windows.batch(np.arange(1)), self.device))
        if freeze_unreached(module, outputs["logits"].sum() + outputs["v"].sum()):
            self.accelerator.ddp_handler.find_unused_parameters = True

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
        self.remove_rollouts_from(self.iteration)
        started = time.monotonic()
        with tqdm(total=args.max_steps, initial=self.iteration, desc="ppo", disable=self.is_quiet, leave=False) as bar:
            while self.iteration < args.max_steps:
                self.iterate(bar)
                bar.update()
        self.log({"train_runtime": time.monotonic() - started})

    def iterate(self, bar: tqdm) -> None:
        """Run one iteration: play episodes, learn from them, and log a row of metrics; `bar` shows the progress."""
        args, at = self.args, time.monotonic()
        trajectories = self.play(bar)
        played = time.monotonic()
        experience = self.observe(self.scored(trajectories))
        if self.iteration == 0:
            self.check_start(experience)
        metrics = self.credit(experience)
        metrics |= self.update(experience)
        self.scheduler.step()
        self.iteration += 1
        seconds = {"rollout_seconds": played - at, "update_seconds": time.monotonic() - played}
        metrics = self.episode_metrics(trajectories) | metrics | dict(self.totals) | seconds
        self.log(metrics)
        if args.kl_target is not None:
            self.kl_weight = adaptive_kl_weight(
                self.kl_weight, metrics["kl"], args.kl_target, args.episodes, args.kl_horizon
            )
        if args.max_kl is not None and metrics["kl"] > args.max_kl:
            raise InputError(
                f"max_kl: found a KL of {metrics['kl']:.3g} nats per episode in iteration "
                f"{self.iteration}, expected at most {args.max_kl:g}: the policy has collapsed; "
                "raise kl_weight, lower learning_rate or set stop_kl"
            )
        bar.set_postfix(score=f"{metrics['score']:.3g}", kl=f"{metrics['kl']:.3g}")
        self.finish_iteration()

    # Acting.

    def play(self, bar: tqdm | None = None) -> list[Trajectory]:
        """Play this process's share of the iteration's episodes; no seed is used twice in a run.

        Args:
          bar: shows the number of episodes played; None = no progress bar.
        Returns: one trajectory per episode, with the environment's rewards.
        """
        args = self.args
        # Iterations, and runs that differ in their seed alone, get disjoint ranges of episode seeds.
        first = args.first_seed + (args.seed * args.max_steps + self.iteration) * args.episodes
        seeds = list(range(first, first + args.episodes))[args.process_index :: args.world_size]
        show = None if bar is None else lambda done, total: bar.set_postfix(played=f"{done}/{total}")
        with self.accelerator.autocast():
            trajectories = rollout(self.player, self.environment, seeds, max_turns=args.max_turns, progress=show)
        if args.save_rollouts:
            part = f"-{args.process_index}" if args.world_size > 1 else ""
            file = Path(args.output_dir) / "rollouts" / f"iteration-{self.iteration:05d}{part}.jsonl"
            write_trajectories(file, trajectories)
        return trajectories

    def remove_rollouts_from(self, iteration: int) -> None:
        """Delete the stored episodes of this iteration and later ones, which a resumed run plays again."""
        for file in sorted(Path(self.args.output_dir).glob("rollouts/iteration-*.jsonl")):
            if self.args.should_save and int(file.stem.split("-")[1]) >= iteration:
                file.unlink()

    def scored(self, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
        """Return the trajectories with each agent turn's reward replaced by the score that PPO learns from.

        The changes are made in this order: `unfinished_score` and `unfinished_penalty`, then `scale_scores`, then
        `clip_scores`.
        """
        args, ends = self.args, self.renderer.close_ids
        turns = [turn for t in trajectories for turn in t.turns if turn.is_trainable]
        score = torch.tensor([turn.reward or 0.0 for turn in turns], dtype=torch.float64)
        closed = torch.tensor([bool(ends & {*turn.token_ids[-1:]}) for turn in turns])
        if args.unfinished_score is not None:
            score = replace_unfinished(score, closed, args.unfinished_score)
        score = penalize_unfinished(score, closed, args.unfinished_penalty)
        std = 1.0
        if args.scale_scores:
            self.moments = self.moments.updated(torch.tensor(gather_object(score.tolist()), dtype=torch.float64))
            std = self.moments.std
        score = iter(scale_scores(score, std, args.clip_scores or math.inf).tolist())

        def with_score(turn: Turn) -> Turn:
            return replace(turn, reward=next(score)) if turn.is_trainable else turn

        return [replace(t, turns=tuple(map(with_score, t.turns))) for t in trajectories]

    # Reading.

    @torch.no_grad()
    def observe(self, trajectories: Sequence[Trajectory]) -> Experience:
        """Encode episodes and compute the model's outputs at all N steps (agent tokens) before the first update.

        Returns: the encoded episodes with further columns, (N,) each: "behaviour_log_prob" (log π_old), "ref_log_prob"
          (log π_ref), "sampled_log_prob" (as the sampler reported it), "behaviour_v" (V of the state), "next_v" (V of
          the next state), "entropy", and "place" (the index of the step).
        """
        args, play = self.args, self.args.play
        experience = Experience.of(trajectories, self.encoder, self.counts, self.renderer.close_id)
        windows, allowed = experience.windows, self._allowed(trajectories, experience)
        filtered = (play.top_k, play.top_p, play.min_p, play.support) != (None, None, None, 0.0)
        found = {
            name: np.zeros(len(experience.episode), dtype=np.float32)
            for name in ("behaviour_log_prob", "ref_log_prob", "behaviour_v", "next_v", "entropy")
        }
        order = np.argsort(-windows.lengths, kind="stable")  # windows of similar length share a batch: less padding
        size = args.per_device_train_batch_size
        for index in (order[start : start + size] for start in range(0, len(order), size)):
            batch, places = self._batch(windows, index), experience.places(index)
            with self.accelerator.autocast():
                outputs = self.module(batch, next_v=True)
                reference = self._reference_logits(batch)
            logits, kept = outputs["logits"].float(), None
            if allowed is not None:
                logits = logits.masked_fill(~self._mask([allowed[i] for i in places]), -torch.inf)
            if filtered or allowed is not None:
                # Updates normalise over the same tokens as the sampler did, so that ρ is 1 before the first step.
                kept = filter_policy(logits, play) > -torch.inf
                experience.keep(places, kept)
            log_probs = log_distribution(logits, play.temperature, kept)
            action = batch["steps"]["action"].unsqueeze(-1)
            values = {
                "behaviour_log_prob": log_probs.gather(-1, action)[:, 0],
                "ref_log_prob": log_distribution(reference, play.temperature, kept).gather(-1, action)[:, 0],
                "behaviour_v": outputs["v"],
                "next_v": outputs["next_v"],
                "entropy": entropy(log_probs),
            }
            for name, value in values.items():
                found[name][places] = value.float().cpu().numpy()
        sampled = [trajectories[episode].turns[turn].behaviour_log_prob[k] for episode, turn, k in experience.tokens()]
        found["sampled_log_prob"] = np.asarray(sampled, dtype=np.float32)
        experience.add(**found, place=np.arange(len(experience.episode)))
        # next_v is stored now, so updates need no rows for next states.
        experience.windows = replace(experience.windows, next_rows=False)
        return experience

    def _reference_logits(self, batch: TokenBatch) -> Tensor:
        steps, windows = batch["steps"], batch["windows"]
        inputs = {"input_ids": batch["input_ids"][:windows], "attention_mask": batch["attention_mask"][:windows]}
        self.tokens_read += int(inputs["attention_mask"].sum())
        with self.policy.disable_adapter() if self.reference is None else contextlib.nullcontext():
            model = self.reference or self.policy
            return packed_logits(model, steps["row"], steps["state"], **inputs)[0]

    def _allowed(self, trajectories: Sequence[Trajectory], experience: Experience) -> list[set[int] | None] | None:
        """Return, per step, the token ids that the environment's options (the only texts allowed in a turn) left open.

        None for a step = all tokens; None instead of a list = no episode has options.
        """
        if not any(t.labels.get("options") for t in trajectories):
            return None
        ids_of_option = self.player.sampler.options.ids_of
        found = []
        for episode, turn, k in experience.tokens():
            sampled = trajectories[episode].turns[turn].token_ids
            options = trajectories[episode].labels.get("options", {}).get(str(turn))
            ids = options and [ids_of_option[text] for text in options]
            # Allowed next tokens are those of the options that start with the k tokens sampled so far.
            found.append(ids and {option[k] for option in ids if option[:k] == sampled[:k] and len(option) > k})
        return found

    def _mask(self, allowed: Sequence[set[int] | None]) -> Tensor:
        """Return the allowed tokens of n steps as a bool mask (n, V)."""
        mask = torch.zeros(len(allowed), self.vocabulary, dtype=torch.bool)
        for row, tokens in zip(mask, allowed, strict=True):
            row[slice(None) if tokens is None else sorted(tokens)] = True
        return mask.to(self.args.device)

    def check_start(self, experience: Experience) -> None:
        """Check, before the first update, that the policy equals its reference and that sampler and learner agree.

        Args:
          experience: the result of `observe`.
        Raises: InputError that names the check that failed.
        """
        log_prob = experience.column("behaviour_log_prob")
        kl = (log_prob - experience.column("ref_log_prob")).abs().max().item()
        if kl > 1e-6:
            raise InputError(
                f"KL at step 0: found policy and reference {kl:.3g} nats apart on a token, expected 0: "
                "the reference is not the model that the run starts from"
            )
        gap = (log_prob - experience.column("sampled_log_prob")).abs().mean().item()
        if not gap <= SAMPLER_GAP[self.args.bf16]:
            raise InputError(
                f"KL at step 0: found sampler and learner {gap:.3g} nats per token apart, expected 0: "
                "they differ in temperature, filters or dropout, or in the part of an episode that they see "
                "(max_length must hold whole dialogues, or context must bound them)"
            )

    # Crediting.

    def credit(self, experience: Experience) -> dict[str, float]:
        """Add the columns "advantage" and "returns" (N,) to the encoded episodes, in place.

        Args:
          experience: the result of `observe`.
        Returns: metrics of the iteration before its update, by name, averaged over the processes.
        """
        args = self.args
        column, known = experience.column, experience.column("has_target").bool()
        log_prob, ref_log_prob = column("behaviour_log_prob"), column("ref_log_prob")
        kl = KL_ESTIMATORS[args.kl_estimator](log_prob, ref_log_prob)
        reward = kl_shaped_reward(column("reward"), kl, self.kl_weight)[known]
        if args.whiten_rewards:
            reward = whiten(reward, keep_mean=True)
        v, discount = column("behaviour_v"), column("discount")
        target = td_target(reward, column("next_v")[known], column("bootstrap")[known], discount[known])
        episode = torch.from_numpy(experience.episode)[known]
        advantage, returns = generalized_advantage(target, v[known], discount[known], episode, args.gae_lambda)
        explained = value_statistics(v[known], v[known], returns, math.inf)["explained_variance"].item()
        # Steps without a target have no advantage: they are left out above and get zeros here.
        full = torch.zeros(2, len(known))
        full[:, known] = torch.stack([whiten(advantage) if args.whiten_advantages else advantage, returns])
        experience.add(advantage=full[0].numpy(), returns=full[1].numpy())
        gap = (log_prob - column("sampled_log_prob")).abs().max().item()
        return self.mean(
            {
                "kl": kl.sum().item() / experience.n,
                "kl_per_token": kl.mean().item(),
                "entropy": column("entropy").mean().item(),
                "explained_variance": explained,
                "value": v.mean().item(),
                "sampler_gap": gap,
            }
        ) | {"kl_weight": self.kl_weight}

    # Learning.

    def update(self, experience: Experience) -> dict[str, float]:
        """Run K epochs of minibatches over shuffled windows (rows of tokens); return mean statistics by name.

        Args:
          experience: the encoded episodes, with advantages and returns.
        Raises: InputError if there are fewer windows than minibatches.
        """
        args, rows = self.args, []
        dice = np.random.default_rng([args.seed, self.iteration, args.process_index])
        if len(experience.windows) < args.minibatches:
            raise InputError(
                f"minibatches: found {args.minibatches}, expected at most {len(experience.windows)}, the number of "
                "windows in this iteration"
            )
        shuffled = (dice.permutation(len(experience.windows)) for _ in range(args.epochs))
        for index in (index for order in shuffled for index in np.array_split(order, args.minibatches)):
            statistics = self.minibatch(experience, index, dice)
            if statistics is None:
                break
            rows.append(statistics)
        means = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]} if rows else {}
        if rows:
            means["ratio_max"] = max(row["ratio_max"] for row in rows)
        return self.mean(means) | {"minibatches": len(rows), "learning_rate": self.scheduler.get_last_lr()[0]}

    def minibatch(
        self, experience: Experience, index: np.ndarray, dice: np.random.Generator
    ) -> dict[str, float] | None:
        """Take one optimizer step on some windows.

        Args:
          experience: the encoded episodes.
          index: indices of the windows in `experience`.
          dice: the random generator that draws the logged windows for `ptx_weight`.
        Returns: statistics of the step by name; None, without a step, if `stop_kl` is exceeded.
        """
        args, size = self.args, self.args.per_device_train_batch_size
        warming = self.iteration < args.value_warmup
        chunks = [(experience, index[start : start + size]) for start in range(0, len(index), size)]
        known = experience.column("has_target")[experience.places(index)].sum()
        counts = [known, known.new_zeros(())]
        if self.ptx is not None and not warming:
            logged = dice.integers(len(self.ptx), size=max(1, round(args.ptx_examples * len(index))))
            chunks += [(None, logged[start : start + size]) for start in range(0, len(logged), size)]
            offsets = self.ptx.flat["state"][1]
            counts[1] = known.new_tensor((offsets[logged + 1] - offsets[logged]).sum())
        # The divisors of the two losses over all processes: steps with a target, and logged action tokens.
        counts = self.accelerator.reduce(torch.stack(counts).to(args.device), "sum").clamp(min=1)
        read: list[dict[str, Tensor]] = []
        losses: Counter[str] = Counter()
        for number, (source, chunk) in enumerate(chunks):
            last = number == len(chunks) - 1  # gradients are averaged over processes once, with the last chunk
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                if source is None:
                    terms = self.ptx_terms(chunk)
                else:
                    terms, outputs = self.ppo_terms(experience, chunk, warming)
                    read.append(outputs)
                terms = {name: term.sum() / counts[int(source is None)] for name, term in terms.items()}
                losses.update({name: term.detach() for name, term in terms.items()})
                # DDP averages gradients over ranks, the counts are global: multiply once by the world size.
                self.accelerator.backward(sum(terms.values()) * args.world_size)
        outputs = {name: torch.cat([part[name] for part in read]) for name in read[0]}
        clip = args.value_clip_range or math.inf
        statistics = policy_statistics(outputs["log_prob"], outputs["behaviour_log_prob"], args.clip_range)
        statistics |= value_statistics(outputs["v"], outputs["behaviour_v"], outputs["returns"], clip)
        del statistics["explained_variance"]  # `credit` logs it over the whole iteration
        if args.stop_kl is not None:
            approx_kl = self.accelerator.reduce(statistics["approx_kl"], "mean")
            if approx_kl > OVERSHOOT * args.stop_kl:
                self.optimizer.zero_grad()
                return None
        statistics |= {f"loss/{name}": value for name, value in losses.items()}
        return {name: float(value) for name, value in statistics.items()} | {"grad_norm": self.step()}

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
        args, batch = self.args, self._batch(experience.windows, index)
        steps, known = batch["steps"], batch["steps"]["has_target"]
        kept = experience.kept_at(steps["place"].cpu().numpy(), self.vocabulary)
        kept = kept if kept is None else kept.to(args.device)
        with self.accelerator.autocast():
            outputs = self.wrapped(batch, value_only=warming)
        log_probs = log_distribution(outputs["logits"], args.play.temperature, kept)
        compared = {"log_prob": log_probs.gather(-1, steps["action"].unsqueeze(-1))[:, 0], "v": outputs["v"]}
        learnt = {"v": compared["v"]} if warming else dict(compared)
        if args.entropy_weight > 0 and not warming:
            learnt["entropy"] = entropy(log_probs)
        compared |= {name: steps[name] for name in ("behaviour_log_prob", "behaviour_v", "returns")}
        losses = ppo_losses(learnt, steps, args)
        return losses, {name: value.detach()[known] for name, value in compared.items()}

    def ptx_terms(self, index: np.ndarray) -> dict[str, Tensor]:
        """Return the loss on logged data, "ptx" -> (N,): ptx_weight · −log π of the N agent tokens in its windows.

        Args:
          index: indices of logged windows.
        """
        batch = self._batch(self.ptx, index)
        with self.accelerator.autocast():
            logits = self.wrapped(batch)["logits"].float()
        return {
            "ptx": self.args.ptx_weight
            * nn.functional.cross_entropy(logits, batch["steps"]["action"], reduction="none")
        }

    def step(self) -> float:
        """Take an optimizer step on the accumulated gradients, then update the averaged weights.

        Returns: the gradient norm before clipping.
        Raises: InputError if that norm is not finite.
        """
        args = self.args
        norm = self.accelerator.clip_grad_norm_(list(self.trained.values()), args.max_grad_norm or math.inf)
        if not math.isfinite(norm := float(norm)):
            raise InputError(
                f"loss: found a gradient of norm {norm} in iteration {self.iteration + 1}, expected a "
                "finite one; lower learning_rate"
            )
        self.updates += 1
        if args.tensorflow_eps:
            for group in self.optimizer.param_groups:
                group["eps"] = tensorflow_adam_eps(args.adam_epsilon, args.adam_beta2, self.updates)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            torch._foreach_lerp_(
                list(self.average.values()), [p.detach() for p in self.trained.values()], 1 - args.ema
            )
        return norm

    def _batch(self, windows: WindowDataset, index: np.ndarray) -> TokenBatch:
        batch = windows.batch(index)
        self.tokens_read += int(batch["attention_mask"].sum())
        device = self.args.device
        moved = {name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)}
        return batch | moved | {"steps": {name: value.to(device) for name, value in batch["steps"].items()}}

    # Accounting.

    def episode_metrics(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """Return means over the episodes, by name, and add the numbers in SUMS to the run's totals.

        Args:
          trajectories: the episodes of this process, with the environment's rewards.
        """
        turns = [turn for t in trajectories for turn in t.turns if turn.is_trainable]
        tokens = sum(len(turn.token_ids) for turn in turns)
        scored = sum(turn.reward is not None for turn in turns)
        sums = [len(trajectories), len(turns), scored, tokens, self.tokens_read]
        self.tokens_read = 0
        for name, count in zip(SUMS, sums, strict=True):
            self.totals[name] += int(self.accelerator.reduce(torch.tensor(count, device=self.args.device), "sum"))
        n = len(trajectories)
        return self.mean(
            {
                "score": sum(t.total_return for t in trajectories) / n,
                "tokens": tokens / n,
                "turns": len(turns) / n,
                "terminated": sum(t.terminated for t in trajectories) / n,
                "closed": sum(bool(self.renderer.close_ids & {*turn.token_ids[-1:]}) for turn in turns) / len(turns),
            }
        )

    def plan(self) -> dict[str, int]:
        """Return the numbers of iterations, episodes and optimizer steps that `train` would run, by name."""
        args = self.args
        return {
            "iterations": args.max_steps,
            "episodes": args.max_steps * args.episodes,
            "optimizer steps": args.max_steps * args.epochs * args.minibatches,
        }

    def state_dict(self) -> dict[str, Any]:
        return {"kl_weight": self.kl_weight, "moments": list(self.moments)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.kl_weight, self.moments = state["kl_weight"], Moments(*state["moments"])
