"""Proximal policy optimisation (Schulman et al. 2017) for language, as RLHF runs it (Ziegler et al. 2019).

The only algorithm here that makes its own data. One iteration is `iterate`, top to bottom: the sampler plays
episodes, these become the packed steps of the offline algorithms (token ids as sampled, nothing is tokenised again),
one pass reads log-probabilities and V of all steps, and K epochs of minibatches follow. Over the agent's N tokens:

    r_t = score on the token that closes a turn − β · (log π − log π_ref)          A: GAE of r and V, beyond env. text
    L   = max(−A ρ, −A clip(ρ, 1 ± ε)) + c_v · ½ max((V − G)², (V_clipped − G)²) − c_e · H  [+ γ · −log π(log)]

π_ref is the model at the start: a frozen copy, or under a fresh adapter the same model with the adapter off. ρ is
taken against log-probabilities that the learner itself reads before the first step, at the sampler's temperature and
under its filters; the sampler's own must agree with them, and π with π_ref, or the run stops before it has learnt.

Deviations from the papers and from OpenAI's code, each a setting: an episode may have many turns, each with its
reward; what the environment cuts bootstraps V, what it ends does not; advantages are whitened per iteration and
process; the reward keeps its unit unless `scale_scores`; AdamW's ε is 1e-5, PyTorch's way unless `tensorflow_eps`.
"""

import contextlib
import copy
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from accelerate.utils import gather_object, send_to_device
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from offline_lmrl.data.batching import TokenBatch, WindowDataset, encode_trajectories
from offline_lmrl.data.episodes import EpisodeEncoder, StepRule
from offline_lmrl.data.errors import InputError, shown
from offline_lmrl.data.experience import Experience
from offline_lmrl.data.io import write_trajectories
from offline_lmrl.data.protocols import Environment, VectorEnvironment
from offline_lmrl.data.scale import RewardScale
from offline_lmrl.data.trajectory import Trajectory, Turn
from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.decoding.probe import check_plays, check_trains
from offline_lmrl.decoding.sampler import SamplingConfig
from offline_lmrl.environments.rollouts import rollout
from offline_lmrl.models.actor_critic import ActorCritic
from offline_lmrl.models.adapters import settings
from offline_lmrl.models.guided import attach, detach, load_model
from offline_lmrl.models.renderers import rendering_block
from offline_lmrl.models.reward_model import is_reward_model, load_reward_model
from offline_lmrl.models.unreached import freeze_unreached
from offline_lmrl.ops.decoding import warp_log_probs
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
from offline_lmrl.training import (
    OfflineConfig,
    OfflineTrainer,
    check_model,
    check_range,
    tokenizer_beside,
    with_adapter,
)
from offline_lmrl.training_loop import LoopTrainer

KL_ESTIMATORS = {"k1": kl_k1, "k3": kl_k3}
OVERSHOOT = 1.5  # an update stops where its approx_kl is beyond so many times `stop_kl`
SAMPLER_GAP = {False: 1e-3, True: 0.05}  # nats per token between sampler and learner, by bf16
SUMS = ("episodes", "environment_steps", "reward_queries", "generated_tokens", "training_tokens")


@dataclass
class PPOConfig(OfflineConfig):
    """Settings of PPO. Numbers in brackets are OpenAI's (Ziegler et al. 2019).

    Of the inherited settings PPO reads those of windows and rewards (context, stride, max_length, template,
    reward_scale: a plain divisor, 1 where it is not given), output_dir, seed, max_steps, per_device_train_batch_size,
    learning_rate, lr_scheduler_type, lr_scheduler_kwargs, warmup_steps, weight_decay, adam_beta1, adam_beta2,
    adam_epsilon, max_grad_norm, save_strategy, save_steps, save_total_limit, bf16, use_cpu and disable_tqdm.

    max_steps: iterations, each a rollout and its update; learning rate, warm-up and saving count in them.
    episodes: episodes of an iteration, over all processes [512].
    epochs: passes over an iteration's windows [4]. minibatches: optimizer steps of a pass [1].
    per_device_train_batch_size: windows that are read at once; it changes no gradient.
    clip_range: ε of the ratio [.2]. value_clip_range: of V, in scaled reward units; null = no clipping [.2].
    value_weight: c_v [.1]. entropy_weight: c_e [0].
    gae_lambda: λ [.95]. discount_per_token: γ of every step [1]. discount_per_turn: γ between two agent turns.
    whiten_advantages: mean 0 and variance 1 over an iteration. whiten_rewards: variance 1, mean kept, of the rewards
      with their KL; where lengths differ that pays for length [true].
    kl_weight: β, the first one where it adapts [.15]. kl_estimator: k1 or k3 [k1].
    kl_target: nats per episode that β is steered to; null = β is fixed [6]. kl_horizon: in episodes [10,000].
    stop_kl: an update stops where its approx_kl per token is above 1.5 of this; null = never.
    max_kl: the run stops where the KL of an iteration's episodes to the reference is above this, in nats per episode:
      the policy has left the language it started from; null = never.
    scale_scores: divides scores by their running standard deviation. clip_scores: cap of their size behind that;
      null = none.
    unfinished_score: what a turn without its closing token earns instead of its score; null = its score [-1].
    unfinished_penalty: what such a turn loses.
    value_model: what V reads: shared (the policy's hidden states), copy (a copy of the policy's trunk, trained for V
      alone), or the folder or hub name of a model whose trunk is trained for V. V starts at 0, but from a reward model
      with head terminal or turn at its score / reward_scale (Stiennon et al. 2020, Ouyang et al. 2022): once a turn's
      closing token is read V is the score of that turn; before, what the model says of a turn so far.
    value_warmup: first iterations in which only the value head learns.
    ema: decay per optimizer step of averaged weights, which are then the ones that are saved; 0 = none.
    ptx_weight: γ of the language model's loss on logged data, PPO-ptx of Ouyang et al. 2022; 0 = none.
    ptx_examples: logged windows for every window of a minibatch.
    tensorflow_eps: scales adam_epsilon to what TensorFlow's Adam makes of it.
    sampling: SamplingConfig fields for the play, saved with the run.
    max_turns: agent turns after which an episode is cut, whatever its environment thinks.
    first_seed: episode seeds count on from here; those of evaluation and selection lie below.
    save_rollouts: keeps every episode in rollouts/, data that `train` reads.
    """

    max_steps: int = 200
    learning_rate: float = 1e-5
    weight_decay: float = 0.0
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-5
    warmup_steps: float = 0
    lr_scheduler_type: str = "linear"
    lr_scheduler_kwargs: dict | str | None = None
    save_steps: float = 50

    episodes: int = 64
    epochs: int = 4
    minibatches: int = 1
    clip_range: float = 0.2
    value_clip_range: float | None = 0.2
    value_weight: float = 0.1
    entropy_weight: float = 0.0
    gae_lambda: float = 0.95
    discount_per_token: float = 1.0
    discount_per_turn: float = 1.0
    whiten_advantages: bool = True
    whiten_rewards: bool = False
    kl_weight: float = 0.05
    kl_estimator: Literal["k1", "k3"] = "k1"
    kl_target: float | None = None
    kl_horizon: int = 10_000
    stop_kl: float | None = None
    max_kl: float | None = None
    scale_scores: bool = False
    clip_scores: float | None = None
    unfinished_score: float | None = None
    unfinished_penalty: float = 0.0
    value_model: str = "shared"
    value_warmup: int = 0
    ema: float = 0.0
    ptx_weight: float = 0.0
    ptx_examples: float = 1.0
    tensorflow_eps: bool = False
    sampling: dict[str, Any] = field(default_factory=dict)
    max_turns: int = 256
    first_seed: int = 10_000_000
    save_rollouts: bool = True

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
        form = SamplingConfig.from_dict(self.sampling)
        for name, expected in (("beta", 0.0), ("condition_scale", 0.0), ("ask", None), ("stop", ())):
            if getattr(form, name) != expected:
                raise InputError(
                    f"sampling.{name}: found {shown(getattr(form, name))}, expected none: PPO learns "
                    "from what the policy itself says, up to its closing token"
                )
        if form.temperature == 0:
            raise InputError("sampling.temperature: found 0, expected more: greedy play explores nothing")
        super().__post_init__()

    @property
    def play(self) -> SamplingConfig:
        return SamplingConfig.from_dict(self.sampling)


def log_distribution(logits: Tensor, temperature: float, kept: Tensor | None) -> Tensor:
    """log π at the temperature of the rollout, of the tokens that its filters kept. fp32.

    Args:
      logits: (N,V). kept: (N,V) bool; None = all. Returns: (N,V), −inf where not kept.
    """
    scores = logits.float() / temperature
    return (scores if kept is None else scores.masked_fill(~kept, -torch.inf)).log_softmax(-1)


def ppo_losses(outputs: Mapping[str, Tensor], steps: Mapping[str, Tensor], config: PPOConfig) -> dict[str, Tensor]:
    """The terms of L per agent token, each (N,), with their weights; 0 where a step has no target.

    Args:
      outputs: v (N,); log_prob (N,) where the policy learns too, and entropy (N,) where that has a weight.
      steps: `ActionSteps` with behaviour_log_prob, behaviour_v, advantage and returns, each (N,).
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
    """Trains a policy by playing.

    Args:
      model: a causal LM, or a folder or hub name of one. Value heads and a table of returns are taken off.
      environment: whatever `rollout` takes; a prompt set with a scorer is one (environments/prompts.py).
      ptx_dataset: logged trajectories for `ptx_weight`.
      processing_class: the tokenizer; by default the one that lies with the model.
      peft_config: trains an adapter instead of the trunk; the reference is then the model without it.
    """

    algorithm = "ppo"
    # Logged data and models are those of the offline algorithms.
    read = staticmethod(OfflineTrainer.read)
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
            raise InputError(f"ptx_weight: found {args.ptx_weight}, but no logged data (data.train), expected both")
        if args.episodes < args.world_size:
            raise InputError(
                f"episodes: found {args.episodes}, expected at least one for each of {args.world_size} processes"
            )
        if processing_class is None:
            processing_class = tokenizer_beside(model)
        policy = attach(load_model(model) if isinstance(model, str) else model, None)
        super().__init__(args, processing_class, policy, find_unused_parameters=args.value_warmup > 0)
        check_model(policy, self.renderer, args.max_length)
        check_trains(policy, self.renderer)
        check_plays(policy, self.renderer)
        policy = detach(policy).to(self.device)
        rule, self.scale = StepRule(args.discount_per_token, args.discount_per_turn), args.reward_scale or 1.0
        self.encoder = EpisodeEncoder(self.renderer, args.window, rule, RewardScale(scale=self.scale))
        policy.config.offline_lmrl = settings(policy.config) | {
            "algorithm": self.algorithm,
            **rendering_block(self.renderer),
            "window": asdict(args.window),
            "step_rule": asdict(rule),
            "sampling": dict(args.sampling),
        }
        value_model = None
        if args.value_model != "shared":
            value_model = copy.deepcopy(policy) if args.value_model == "copy" else self._open_value_model()
            value_model = value_model.to(self.device).requires_grad_(True)
        self.reference = None  # the policy with its adapter off
        if peft_config is None:
            self.reference = copy.deepcopy(policy).eval().requires_grad_(False)
        else:
            policy = with_adapter(policy, peft_config)
        transformers.set_seed(args.seed)  # the value head's first layer
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
        """The model that `value_model` names. Raises: InputError where it reads other tokens than the policy, or is a
        reward model at whose score no V can start."""
        args, name = self.args, self.args.value_model
        is_reward = is_reward_model(name)
        model = load_reward_model(name) if is_reward else load_model(name)
        try:
            check_model(model, self.renderer, args.max_length)
        except InputError as error:
            raise InputError(f"value_model: {name}: {error}") from error
        if not is_reward:
            return model
        block = settings(model.config)
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
                f"scale_scores: found it with the reward model {name} as value_model, expected one of "
                "them: V would start in another unit than that of the scaled scores"
            )
        return model.merge_and_unload() if hasattr(model, "peft_config") else model

    def _freeze_unreached(self, module: ActorCritic) -> None:
        """Freezes what neither policy nor V reaches: of a long made-up dialogue, as some parts are for long texts."""
        long = "a " * (self.args.max_length // 4)
        dialogue = Trajectory((Turn("user", long), Turn("assistant", "b", reward=0.0)))
        columns = encode_trajectories([dialogue], self.encoder, Counter())
        windows = WindowDataset(columns, self.renderer.close_id, next_rows=False, end_rows=False)
        outputs = module(send_to_device(windows.batch(np.arange(1)), self.device))
        if freeze_unreached(module, outputs["logits"].sum() + outputs["v"].sum()):
            self.accelerator.ddp_handler.find_unused_parameters = True

    def train(self, resume_from_checkpoint: str | None = None) -> None:
        """All iterations, from the checkpoint on if one is given; metrics and checkpoints go to output_dir."""
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
        """One iteration: play, learn, and a row of metrics."""
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
        """This process's share of the iteration's episodes, as played: each seed once in a run."""
        args = self.args
        first = args.first_seed + (args.seed * args.max_steps + self.iteration) * args.episodes
        seeds = list(range(first, first + args.episodes))[args.process_index :: args.world_size]
        told = None if bar is None else lambda done, total: bar.set_postfix(played=f"{done}/{total}")
        with self.accelerator.autocast():
            trajectories = rollout(self.player, self.environment, seeds, max_turns=args.max_turns, progress=told)
        if args.save_rollouts:
            part = f"-{args.process_index}" if args.world_size > 1 else ""
            file = Path(args.output_dir) / "rollouts" / f"iteration-{self.iteration:05d}{part}.jsonl"
            write_trajectories(file, trajectories)
        return trajectories

    def remove_rollouts_from(self, iteration: int) -> None:
        """Drops the episodes that the run plays again."""
        for file in sorted(Path(self.args.output_dir).glob("rollouts/iteration-*.jsonl")):
            if self.args.should_save and int(file.stem.split("-")[1]) >= iteration:
                file.unlink()

    def scored(self, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
        """The trajectories with scores as they are learnt from: unfinished turns, then scale, then clip."""
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
        """Encodes episodes and reads, per step, log-probabilities of policy and reference, V, and V behind it."""
        args, play = self.args, self.args.play
        experience = Experience.of(trajectories, self.encoder, self.counts, self.renderer.close_id)
        windows, allowed = experience.windows, self._allowed(trajectories, experience)
        filtered = (play.top_k, play.top_p, play.min_p, play.support) != (None, None, None, 0.0)
        found = {
            name: np.zeros(len(experience.episode), dtype=np.float32)
            for name in ("behaviour_log_prob", "ref_log_prob", "behaviour_v", "next_v", "entropy")
        }
        order = np.argsort(-windows.lengths, kind="stable")  # like lengths together: little padding
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
                kept = warp_log_probs(logits, play.temperature, play.top_k, play.top_p, play.min_p, play.support)
                kept = kept > -torch.inf
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
        windows.next_rows = False  # what lies behind has been read
        return experience

    def _reference_logits(self, batch: TokenBatch) -> Tensor:
        steps, windows = batch["steps"], batch["windows"]
        inputs = {"input_ids": batch["input_ids"][:windows], "attention_mask": batch["attention_mask"][:windows]}
        self.tokens_read += int(inputs["attention_mask"].sum())
        with self.policy.disable_adapter() if self.reference is None else contextlib.nullcontext():
            return (self.reference or self.policy).packed_logits(steps["row"], steps["state"], **inputs)[0]

    def _allowed(self, trajectories: Sequence[Trajectory], experience: Experience) -> list[set[int] | None] | None:
        """Per step, the tokens that the environment's options left; None = all, or no options anywhere."""
        if not any(t.labels.get("options") for t in trajectories):
            return None
        ids_of_option = self.player.sampler.ids_of_option
        found = []
        for episode, turn, k in experience.tokens():
            said = trajectories[episode].turns[turn].token_ids
            options = trajectories[episode].labels.get("options", {}).get(str(turn))
            ids = options and [ids_of_option[text] for text in options]
            found.append(ids and {option[k] for option in ids if option[:k] == said[:k] and len(option) > k})
        return found

    def _mask(self, allowed: Sequence[set[int] | None]) -> Tensor:
        """(n, V)"""
        mask = torch.zeros(len(allowed), self.vocabulary, dtype=torch.bool)
        for row, tokens in zip(mask, allowed, strict=True):
            row[slice(None) if tokens is None else sorted(tokens)] = True
        return mask.to(self.args.device)

    def check_start(self, experience: Experience) -> None:
        """Before anything is learnt the policy is its own reference, and says what the sampler said of it.

        Raises: InputError that names which of the two is not so.
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
                "they differ in temperature, filters, dropout or in what they see of an episode "
                "(max_length must hold whole dialogues, or context must bound them)"
            )

    # Crediting.

    def credit(self, experience: Experience) -> dict[str, float]:
        """Adds advantages and returns; what the iteration was like before its update."""
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
        """K epochs of minibatches over shuffled windows; a window is never taken apart."""
        args, rows = self.args, []
        dice = np.random.default_rng([args.seed, self.iteration, args.process_index])
        if len(experience.windows) < args.minibatches:
            raise InputError(
                f"minibatches: found {args.minibatches}, expected at most the {len(experience.windows)} "
                "windows that an iteration brought"
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
        """One optimizer step on these windows; None, and no step, where the policy is too far for `stop_kl`."""
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
        counts = self.accelerator.reduce(torch.stack(counts).to(args.device), "sum").clamp(min=1)
        read: list[dict[str, Tensor]] = []
        losses: Counter[str] = Counter()
        for number, (source, chunk) in enumerate(chunks):
            last = number == len(chunks) - 1
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
        del statistics["explained_variance"]  # that of the whole iteration says more
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
        """The weighted terms of L per step, each (N,), and what was compared, (N,) of the steps with a target."""
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
        """γ · −log π of the agent's logged tokens, (N,)."""
        batch = self._batch(self.ptx, index)
        with self.accelerator.autocast():
            logits = self.wrapped(batch)["logits"].float()
        return {
            "ptx": self.args.ptx_weight
            * nn.functional.cross_entropy(logits, batch["steps"]["action"], reduction="none")
        }

    def step(self) -> float:
        """One optimizer step on the gradients at hand, and the average behind it; the norm before clipping."""
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

    # Accounts.

    def episode_metrics(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """Means of the episodes as the environment scored them, and what they add to the totals."""
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
        """What `train` would do."""
        args = self.args
        return {
            "iterations": args.max_steps,
            "episodes": args.max_steps * args.episodes,
            "optimizer steps": args.max_steps * args.epochs * args.minibatches,
        }

    def memory(self) -> dict[str, Any]:
        return {"kl_weight": self.kl_weight, "moments": list(self.moments)}

    def remember(self, memory: Mapping[str, Any]) -> None:
        self.kl_weight, self.moments = memory["kl_weight"], Moments(*memory["moments"])
