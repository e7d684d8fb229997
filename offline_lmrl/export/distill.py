"""Distil a run whose guidance does not fold into weights: train plain weights toward the guided distribution.

A copy of the policy, without heads and with its adapter merged, is trained on

    L = mean over states of KL(p ‖ q),    p = the run's distribution (decoding/distribution.py),    q = softmax(z / T)

where z are the logits of the copy and T is the run's temperature (1 in place of 0), by which engines divide as well.
At the optimum z = T · log p + a constant: the copy at T is the run at T, and its greedy replies are the run's. This is
the forward KL: tokens that the run's filters drop have p = 0 and need no logarithm. The states are those of logged
replies and of replies that are drawn anew every few steps, first by the run and then by the copy itself (on-policy
distillation: Agarwal et al. 2024, GKD), because the copy will be read after its own tokens.

Only the last layers and the final norm are trained: the values are functions of the hidden states that they compute,
and a backward pass through all layers costs several times as much. What the layers below compute, and what the run
would say, does not change, so the run reads a reply once, and many steps can learn from it, each at the cost of a pass
through the last layers. The LM head stays as it is, so a model whose LM head is its embedding keeps it so, and only
changes of π that the LM head can express are learnt.
"""

import copy
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from offline_lmrl.decoding.config import DecodingConfig
from offline_lmrl.decoding.distribution import ModelOutputs, divisor, next_token, reduce_q
from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.decoding.sampler import Sampler
from offline_lmrl.errors import require
from offline_lmrl.evaluation.metrics import mean_interval
from offline_lmrl.export.beside import IDENTICAL, LOG_PROB, Q_PER_TOKEN, REWARD, Row
from offline_lmrl.export.playing import GeneratePlayer
from offline_lmrl.export.prompts import encode_prompts
from offline_lmrl.logs.comparison import Comparison
from offline_lmrl.logs.terminal import progress_bar
from offline_lmrl.logs.trajectory import Trajectory, Turn
from offline_lmrl.models.guided import as_guided
from offline_lmrl.models.lm_head import head_inputs, logits_of, packed_logits
from offline_lmrl.models.plain import plain
from offline_lmrl.models.step_outputs import CHUNK, States, split_rows
from offline_lmrl.ops.policy_gradient import kl_exact
from offline_lmrl.settings import setting
from offline_lmrl.tokens.batching import TokenBatch, reply_rows, token_batches

READ_AT_ONCE = 4096  # tokens, padding included
WARM_UP = 0.05  # share of the steps in which the learning rate rises; it then falls linearly to a tenth
MEASURED = 200  # own replies on which the bounds are measured
LARGEST_KL = 0.02  # nats per token
LARGEST_SHIFT = 0.05  # of the standard deviation of Q per token over replies

Item = TypeVar("Item")
Text = tuple[Sequence[int], Sequence[int]]  # token ids of a prompt and of the reply to it


class Lesson(NamedTuple):
    """A reply, and what the run has computed for it, unless it is computed anew in every step.

    text: prompt and reply.
    lower: what the first trained layer reads at the T tokens of both, (T,d).
    features: what the run's LM head reads at the N states of the reply, (N,d).
    hidden: the run's last hidden states there, (N,d), which its values read.
    """

    text: Text
    lower: Tensor | None = None
    features: Tensor | None = None
    hidden: Tensor | None = None


@dataclass(frozen=True)
class Distillation:
    """Settings of distillation, which have no effect where guidance folds exactly."""

    steps: int = setting(300, "Distillation: number of optimizer steps.")
    batch_size: int = setting(8, "Distillation: replies per step, half of them logged.")
    learning_rate: float = setting(3e-4, "Distillation: highest learning rate of AdamW.")
    layers: int | None = setting(10, "Distillation: number of last layers that are trained; null = all.")
    rounds: int = setting(3, "Distillation: how often replies are drawn, first by the run, then by the export itself.")
    prompts: int = setting(200, "Distillation: number of logged prompts that are replied to in each round.")

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "rounds", "prompts"):
            require(vars(self)[name] >= 1, f"form.{name}: found {vars(self)[name]}, expected at least 1")
        require(self.learning_rate > 0, f"form.learning_rate: found {self.learning_rate}, expected a number above 0")
        require(
            self.layers is None or self.layers >= 1, f"form.layers: found {self.layers}, expected at least 1, or null"
        )


def distil(policy: LanguagePolicy, logged: Sequence[Text], settings: Distillation) -> PreTrainedModel:
    """Train plain weights toward the distribution of a guided run.

    Args:
      policy: the run, which stays as it is.
      logged: logged replies; their prompts are replied to as well.
      settings: the settings of the training.
    Returns: a plain model of the base class, in the run's precision and in eval mode.
    """
    dtype = policy.model.dtype
    student = as_guided(plain(copy.deepcopy(policy.model)).float()).eval()
    pupil = _Pupil(student, settings.layers)
    pupil.try_skipping(policy, logged[:2])
    optimizer = torch.optim.AdamW(pupil.weights, lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    rng, per_round = random.Random(0), -(-settings.steps // settings.rounds)
    of_logs, own = _endless(pupil.read(policy.model, logged), rng), -(-settings.batch_size // 2)
    lessons: list[Lesson] = []
    with progress_bar("distilling", settings.steps) as progress:
        for step in range(settings.steps):
            if step % per_round == 0:
                prompts = [prompt for prompt, _ in rng.sample(logged, min(settings.prompts, len(logged)))]
                texts = _replies(policy, None if step == 0 else student, prompts, seed=step)
                lessons += pupil.read(policy.model, texts)
                drawn = _endless(lessons, rng)
            chosen = [next(drawn if i < own else of_logs) for i in range(settings.batch_size)]
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * _schedule(step, settings.steps)
            pupil.learn(policy, chosen)
            nn.utils.clip_grad_norm_(pupil.weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            progress(step + 1, settings.steps)
    return plain(student.to(dtype)).requires_grad_(True)


def logged_texts(policy: LanguagePolicy, rows: Sequence[Trajectory | Comparison], most: int) -> list[Text]:
    """Return replies of the data with their prompts, as the run reads them, at most `most` of them, drawn at random.

    A reply is cut to max_new_tokens, as those of the run are.
    """
    pairs: list[tuple[Sequence[Turn], Turn]] = []
    for row in rows:
        if isinstance(row, Comparison):
            pairs += [(row.context, option[0]) for option in row.options if option[0].is_trainable]
        else:
            pairs += [(row.turns[:i], turn) for i, turn in enumerate(row.turns) if turn.is_trainable]
    chosen = random.Random(0).sample(pairs, min(most, len(pairs)))
    prompts = encode_prompts(policy, [[replace(turn, reward=None) for turn in turns] for turns, _ in chosen], None)
    # Sampled ids may be those of another tokenizer.
    turns = [replace(turn, token_ids=None, behaviour_log_prob=None) for _, turn in chosen]
    replies = [policy.renderer.encode_turn(turn).actions[: policy.decoding.max_new_tokens] for turn in turns]
    return [(prompt.asked, reply) for prompt, reply in zip(prompts, replies, strict=True)]


def divergence(
    teacher: nn.Module, student: PreTrainedModel, decoding: DecodingConfig, batch: TokenBatch
) -> tuple[Tensor, States, Tensor, Tensor]:
    """Compute KL(p ‖ q) at the N states of a batch.

    Args:
      teacher: the guided model.
      student: a guided model without heads.
      decoding: the run's settings: the distribution p of `teacher`, and the temperature of q.
      batch: rows with steps.
    Returns: the KL in nats, (N,); the states of `teacher`; and log p and log q, (N,V). The KL and log q have the
      gradient of `student`.
    """
    steps, (own, _) = batch["steps"], split_rows(batch)
    where = steps["row"], steps["state"]
    with torch.no_grad():
        logits, hidden = packed_logits(teacher, *where, **own)
        states = States(teacher, batch["input_ids"], hidden, steps, logits.float())
        log_p = states.distribution(decoding)
    logits, _ = packed_logits(student, *where, **own)
    log_q = _log_q(logits, decoding)
    return kl_exact(log_p, log_q), states, log_p, log_q


def measure(policy: LanguagePolicy, exported: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> list[Row]:
    """Measure the distance of an export from its run at the states of the export's own replies.

    Both distributions are known at each state, so that their difference has no sampling noise but that of the states.

    Args:
      policy: the run.
      exported: the model that engines load, in eval mode; it becomes a guided model without heads.
      prompts: prompts in token ids, which are repeated until there are MEASURED replies, unless these are greedy.
    Returns: the KL per token, and the shift of the expected Q per token, each with its bound.
    """
    count = MEASURED if policy.decoding.temperature > 0 else len(prompts)
    chosen = [prompts[i % len(prompts)] for i in range(count)]
    replies = GeneratePlayer(exported, list).play(chosen, policy.decoding, seed=2)
    exported, found = as_guided(exported), []
    with torch.no_grad():
        for text in zip(chosen, replies, strict=True):
            kl, states, log_p, log_q = divergence(
                policy.model, exported, policy.decoding, _batch([text], policy.model.device)
            )
            q = reduce_q(states.q(), policy.decoding.q_reduce)
            # Q of tokens that the run never chooses is not known to anybody, so q is taken within the others.
            within = log_q.masked_fill(log_p == -torch.inf, -torch.inf).softmax(-1)
            found.append((kl, ((within - log_p.exp()) * q).sum(-1), states.of_action(q)))
    kl, shift, q = ([values.double().cpu().numpy() for values in column] for column in zip(*found, strict=True))
    groups = [i % len(prompts) for i in range(count)]
    per_token = float(np.concatenate(kl).mean())
    spread = float(np.std([one.mean() for one in q]))
    moved, most = mean_interval([one.mean() for one in shift], groups), LARGEST_SHIFT * spread
    apart = (moved.mean, moved.low, moved.high)
    return [
        Row(
            "KL(run ‖ export) per token",
            None,
            per_token,
            n=count,
            bound=f"at most {LARGEST_KL} nats, over {count} own replies",
            met=per_token <= LARGEST_KL,
        ),
        Row(
            "expected Q per token",
            None,
            moved.mean,
            apart,
            spread,
            count,
            f"difference within ± {most:.2g}, {LARGEST_SHIFT} of the standard deviation over own replies",
            -most <= moved.low and moved.high <= most,
        ),
    ]


def bounded_distilled(row: Row) -> Row | None:
    """Return a measure of the comparison of a distilled export with its bound; None = it does not apply.

    The difference of sampled rewards has to be within LARGEST_SHIFT standard deviations of the run. It misses the
    bound if its interval is outside; where the interval is only too wide, the row says how many prompts would do. The
    same holds for sampled Q, but there too wide an interval decides nothing: `measure` has Q without that noise.
    """
    if row.name == LOG_PROB:  # −inf after a single token that the run's filters drop
        return None
    if row.name == IDENTICAL:
        return replace(row, bound="", met=None)
    if row.name not in (Q_PER_TOKEN, REWARD):
        return row
    _, low, high = row.difference
    most = LARGEST_SHIFT * row.spread
    met = True if -most <= low and high <= most else False if low > most or high < -most else None
    if met is None and row.name == Q_PER_TOKEN:
        return row
    bound = f"difference within ± {most:.2g}, {LARGEST_SHIFT} of the run's standard deviation"
    if met is None and most > 0 and math.isfinite(high - low):
        bound += f"; to tell takes about {math.ceil(row.n * ((high - low) / 2 / most) ** 2):,} prompts"
    return replace(row, bound=bound, met=met)


def _replies(
    policy: LanguagePolicy, student: PreTrainedModel | None, prompts: Sequence[Sequence[int]], seed: int
) -> list[Text]:
    """Draw a reply to each prompt, from the run, or from the student as an engine plays it."""
    decoding, model = replace(policy.decoding, stop=()), policy.model
    if student is not None:
        model = student
        decoding = replace(plain_decoding(decoding), beta=0.0)
    found = Sampler(model, policy.renderer, decoding).sample(prompts, range(seed, seed + len(prompts)))
    return [(prompt, reply.token_ids) for prompt, reply in zip(prompts, found, strict=True)]


def plain_decoding(decoding: DecodingConfig) -> DecodingConfig:
    """Return the settings with which an engine draws from distilled weights: the run's without filters."""
    return replace(decoding, top_k=None, top_p=None, min_p=None, support=0.0)


def _log_q(logits: Tensor, decoding: DecodingConfig) -> Tensor:
    return (logits.float() / divisor(decoding.temperature)).log_softmax(-1)


def _batch(texts: Sequence[Text], device: torch.device) -> TokenBatch:
    return send_to_device(reply_rows(texts).batch(range(len(texts))), device)


def _endless(items: Sequence[Item], rng: random.Random) -> Iterator[Item]:
    """Yield the items again and again, each time in another order."""
    while True:
        yield from rng.sample(items, len(items))


def _schedule(step: int, steps: int) -> float:
    """Return the factor on the learning rate."""
    return min(1.0, (step + 1) / max(1.0, WARM_UP * steps)) * (1 - 0.9 * step / steps)


class _Pupil:
    """A copy of the policy whose last layers, and the norm after them, are trained; all other weights are frozen.

    weights: what is trained.
    skips: True: what the frozen layers compute is kept. It is not where layers read more than the one below them,
      share weights with a frozen one, or are not in one list; then every step runs the whole run and the whole copy.

    Args:
      student: the copy: a guided model without heads.
      layers: number of last layers; None, or more than there are = all.
    """

    def __init__(self, student: PreTrainedModel, layers: int | None):
        self.student, self.skips = student, False
        stack = _stack(student)
        self.first = len(stack) - min(layers or len(stack), len(stack))
        student.requires_grad_(False)
        tables = [module.weight for module in student.modules() if isinstance(module, nn.Embedding)]
        others = {*stack.parameters(), *student.get_output_embeddings().parameters(), *tables}
        norms = [weight for weight in student.get_decoder().parameters() if weight not in others]
        self.weights = [*stack[self.first :].parameters(), *norms]
        for weight in self.weights:
            weight.requires_grad_(True)

    def try_skipping(self, policy: LanguagePolicy, texts: Sequence[Text]) -> None:
        """Find out from some replies whether the frozen layers can be skipped, and set `skips`.

        They can if what they compute does not depend on what is trained, and the loss is the same without them. A norm
        below them, such as that of the embedding, is frozen.
        """
        with torch.no_grad():
            expected = self.divergence(policy, self.read(policy.model, texts))
        try:
            below = self._below(texts)
            if below & {*_stack(self.student)[self.first :].parameters()}:
                return
            self.skips = True
            with torch.no_grad():
                found = self.divergence(policy, self.read(policy.model, texts))
            self.skips = torch.allclose(found, expected, rtol=1e-3, atol=1e-4)
        except Exception:  # whatever a model's own code makes of skipped layers
            self.skips = False
        if self.skips:
            self.weights = [weight for weight in self.weights if weight not in below]
            for weight in below:
                weight.requires_grad_(False)

    def _below(self, texts: Sequence[Text]) -> set[nn.Parameter]:
        """Return the trained weights on which the input of the first trained layer depends."""
        own, _ = split_rows(_batch(texts, self.student.device))
        with _inputs_of(_stack(self.student)[self.first]) as lower:
            self.student.hidden_states(**own)
        if not lower[0].requires_grad:
            return set()
        found = torch.autograd.grad(lower[0].sum(), self.weights, allow_unused=True)
        return {weight for weight, gradient in zip(self.weights, found, strict=True) if gradient is not None}

    @torch.no_grad()
    def read(self, teacher: nn.Module, texts: Sequence[Text]) -> list[Lesson]:
        """Let the run read some replies.

        Args:
          teacher: the run's guided model, of which the student is a copy.
          texts: the replies.
        """
        if not self.skips:
            return [Lesson(text) for text in texts]
        found: list[Lesson | None] = [None] * len(texts)
        with _inputs_of(_stack(teacher)[self.first]) as lower:
            for chosen in token_batches(np.array([len(prompt) + len(reply) for prompt, reply in texts]), READ_AT_ONCE):
                batch = _batch([texts[i] for i in chosen], self.student.device)
                steps, (own, _) = batch["steps"], split_rows(batch)
                features, hidden = head_inputs(teacher, steps["row"], steps["state"], **own)
                states = lower.pop()
                for place, i in enumerate(chosen):
                    mine, seen = steps["row"] == place, own["attention_mask"][place].bool()
                    at_states = hidden[place, steps["state"][mine]]
                    found[i] = Lesson(texts[i], states[place, seen], features[mine], at_states)
        return found

    def learn(self, policy: LanguagePolicy, lessons: Sequence[Lesson]) -> None:
        """Add the gradient of the mean KL over the states of some replies, for a few replies at a time.

        So many are computed at once that one table over states and vocabulary has at most CHUNK entries.
        """
        total = sum(len(lesson.text[1]) for lesson in lessons)
        vocabulary = self.student.get_output_embeddings().weight.shape[0]
        # Similar lengths need little padding.
        lessons = sorted(lessons, key=lambda lesson: len(lesson.text[0]) + len(lesson.text[1]))
        at_once = max(1, CHUNK // (vocabulary * max(len(lesson.text[1]) for lesson in lessons)))
        for start in range(0, len(lessons), at_once):
            (self.divergence(policy, lessons[start : start + at_once]).sum() / total).backward()

    def divergence(self, policy: LanguagePolicy, lessons: Sequence[Lesson]) -> Tensor:
        """Compute KL(p ‖ q) at the states of some replies, (N,), in nats, with the gradient of the student."""
        batch, teacher = _batch([lesson.text for lesson in lessons], self.student.device), policy.model
        if not self.skips:
            return divergence(teacher, self.student, policy.decoding, batch)[0]
        features, hidden = (torch.cat(parts) for parts in zip(*(lesson[2:] for lesson in lessons), strict=True))
        with torch.no_grad():
            logits = logits_of(teacher, features).float()
            read = ModelOutputs(q=lambda ids: teacher.q_values(hidden, ids), v=lambda: teacher.v_values(hidden))
            log_p = next_token(logits, policy.decoding, read).over_vocabulary(logits.shape[-1])
        steps, (own, _) = batch["steps"], split_rows(batch)
        lower = features.new_zeros(*own["input_ids"].shape, features.shape[-1])
        lower[own["attention_mask"].bool()] = torch.cat([lesson.lower for lesson in lessons])
        with _skipping(_stack(self.student)[: self.first], lower.float()):
            logits, _ = packed_logits(self.student, steps["row"], steps["state"], **own)
        return kl_exact(log_p, _log_q(logits, policy.decoding))


def _stack(model: nn.Module) -> nn.ModuleList:
    """Return the layers of a guided model; an empty list if they are not one list."""
    count = model.config.get_text_config().num_hidden_layers
    lists = (module for module in model.get_decoder().modules() if isinstance(module, nn.ModuleList))
    return next((module for module in lists if len(module) == count), nn.ModuleList())


@contextmanager
def _inputs_of(layer: nn.Module) -> Iterator[list[Tensor]]:
    """A context manager that yields a list, to which the hidden states are added that a layer reads, (B,T,d)."""
    found: list[Tensor] = []

    def keep(_, args: tuple, keywords: dict[str, Any]) -> None:
        found.append(args[0] if args else keywords["hidden_states"])

    hook = layer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield found
    finally:
        hook.remove()


@contextmanager
def _skipping(layers: Sequence[nn.Module], states: Tensor) -> Iterator[None]:
    """A context manager in which each of these layers returns the given states, (B,T,d), and computes nothing."""
    for layer in layers:
        layer.forward = lambda *_, **__: states
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
