"""A language model as a player: what it sees of a dialogue, how it decodes, and what it keeps between turns."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from offline_lmrl.data.conditioning import Ids
from offline_lmrl.data.demonstrations import PromptSpec, prompt_ids
from offline_lmrl.data.episodes import StepRule
from offline_lmrl.data.errors import InputError, opening, shown
from offline_lmrl.data.protocols import Policy, Reply
from offline_lmrl.data.rendering import Renderer
from offline_lmrl.data.scale import RewardScale
from offline_lmrl.data.tokenizers import load_tokenizer
from offline_lmrl.data.trajectory import Trajectory, Turn
from offline_lmrl.data.windows import WindowRule, policy_window, reply_window
from offline_lmrl.decoding.asks import Asks
from offline_lmrl.decoding.cache import CacheMemory
from offline_lmrl.decoding.probe import check_plays
from offline_lmrl.decoding.sampler import CACHE_BYTES, Sampler, SamplingConfig
from offline_lmrl.models.guided import find_device, load_model, settings, slots_of
from offline_lmrl.models.renderers import renderer_of
from offline_lmrl.ops.decoding import reduce_q, support_filter

ASK_SUPPORT = 0.02  # of the best first token's probability: less likely ones are no candidates for the best Q
SAMPLE_STRIDE = 2**32  # between the seeds of one history's samples: more than any range of seeds


class PromptIds(NamedTuple):
    """A demonstration prompt as tokens: with the returns of its own episodes, and with none; equal without slots."""

    told: Ids
    null: Ids


NO_PROMPT = PromptIds((), ())


class LanguagePolicy:
    """A causal LM with its renderer, window and decoding; implements Policy.

    Args:
      context, stride, max_length: the window of data/windows.py, as in training; max_length None takes the model's
        number of positions, or 1024 where it names none. The reply's max_new_tokens are kept free in it.
      task: what is played, for a model that was trained with returns per task.
      prompt: demonstrations of what is played, which all rows read before everything else (data/demonstrations.py), in
        the order given; None = no prompt. Of each the part is shown that the model was trained behind, else all of it.
      critics: where runs are kept whose Q is asked for, by their names; None = nowhere yet.

    Raises InputError where the settings ask for what the model does not have.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        renderer: Renderer,
        sampling: SamplingConfig | None = None,
        *,
        context: int | None = None,
        stride: int = 1,
        max_length: int | None = None,
        task: str = "",
        prompt: Sequence[Trajectory] | None = None,
        critics: "dict[str, LanguagePolicy] | None" = None,
    ):
        self.model, self.renderer = model, renderer
        self.sampling = sampling or SamplingConfig()
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1024
        self.window = WindowRule(context, stride, max_length or positions)
        self.sampler = Sampler(model, renderer, self.sampling)
        self.slots, self.task = slots_of(model, renderer), task
        self.critics = {} if critics is None else critics
        self.asks([self.sampling.ask])  # what cannot be asked for shows here
        self.spec = PromptSpec(**(settings(model.config).get("prompt") or {}))
        self.prompt, self.shared_prompt = prompt, self.read_prompt(prompt)

    @classmethod
    def load(
        cls,
        run: str | Path,
        *,
        device: str | torch.device | None = None,
        task: str = "",
        prompt: Sequence[Trajectory] | None = None,
        **sampling: Any,
    ) -> "LanguagePolicy":
        """The policy of a run directory, or of any causal LM folder or hub name.

        Args:
          device: None = the first accelerator, else the CPU. task, prompt: as in the class.
          sampling: settings that replace those saved with the run.

        Raises InputError where there is no model or tokenizer, or not the tokenizer that the model was trained with.
        """
        device = find_device(device)
        model = load_model(run).to(device)
        saved = settings(model.config)
        renderer = renderer_of(load_tokenizer(run), model, run)
        check_plays(model, renderer)
        with opening(run, "run"):
            form = SamplingConfig.from_dict({**(saved.get("sampling") or {}), **sampling})
            return cls(model, renderer, form, **(saved.get("window") or {}), task=task, prompt=prompt)

    def with_sampling(self, **changes: Any) -> "LanguagePolicy":
        """The same model with other fields of its sampling form."""
        sampling = replace(self.sampling, **changes)
        same = {**asdict(self.window), "task": self.task, "prompt": self.prompt, "critics": self.critics}
        return LanguagePolicy(self.model, self.renderer, sampling, **same)

    def start(
        self,
        seeds: Sequence[int],
        asks: Sequence[float | str | None] | None = None,
        prompts: Sequence[Sequence[Trajectory] | None] | None = None,
    ) -> "LanguageSession":
        """A session with one row per seed.

        asks: the return asked of each row; None = that of the sampling form for all.
        prompts: the demonstrations of each row, None for a row without any; None = the policy's own prompt for all.

        Raises: InputError as `asks` and `read_prompt`.
        """
        if prompts is not None and len(prompts) != len(seeds):
            raise InputError(f"prompts: found {len(prompts)}, expected one for each of {len(seeds)} rows")
        asks = [self.sampling.ask] * len(seeds) if asks is None else asks
        read = [self.shared_prompt] * len(seeds) if prompts is None else list(map(self.read_prompt, prompts))
        return LanguageSession(self, seeds, asks, read)

    def read_prompt(self, demonstrations: Sequence[Trajectory] | None) -> PromptIds:
        """The prompt of these demonstrations. Random parts of the same demonstrations are always the same.

        Raises: InputError for what is no list of demonstrations, and where no room is left for a reply.
        """
        if demonstrations is None:
            return NO_PROMPT
        if isinstance(demonstrations, Trajectory) or not demonstrations:
            found = "one trajectory" if isinstance(demonstrations, Trajectory) else "an empty list"
            raise InputError(f"prompt: found {found}, expected a list of demonstrations, or None for no prompt")
        rng = np.random.default_rng(self.spec.seed)
        shown = [self.spec.cut(demonstration, rng) for demonstration in demonstrations]
        slots = (None, None) if self.slots is None else (self.slots.of_log, self.slots.nulls)
        told, null = (prompt_ids(shown, self.renderer, kind) for kind in slots)
        rule, reply = self.window, self.sampling.max_new_tokens
        room = rule.max_length - len(self.renderer.preamble_of(())) - len(self.renderer.agent_opening) - reply
        if len(told) > room:
            raise InputError(
                f"prompt: found {len(told)} tokens, expected at most {room}, as max_length "
                f"({rule.max_length}) also holds a reply of max_new_tokens ({reply})"
            )
        return PromptIds(told, null)

    def null_window(self, turns: Sequence[Turn], reserve: int, prompt: Ids | None = None) -> list[int]:
        """What it sees before its coming turn where no return is asked for, behind this prompt, or its own; `reserve`
        tokens are kept free for that turn."""
        prompt = self.shared_prompt.null if prompt is None else prompt
        return policy_window(turns, self.renderer, self.window, reserve, self._null_slots(turns, coming=1), prompt)

    def null_reply_window(self, turns: Sequence[Turn], role: str, reserve: int) -> list[int] | None:
        """Ids that it reads before the environment speaks in this role after the agent's last turn, where no return is
        asked for, after its own prompt; `reserve` tokens are kept free for the reply. None where they do not fit."""
        slots, prompt = self._null_slots(turns), self.shared_prompt.null
        return reply_window(turns, role, self.renderer, self.window, reserve, slots, prompt)

    def _null_slots(self, turns: Sequence[Turn], coming: int = 0) -> list[Ids] | None:
        """The null slot for every agent turn among these, and for the coming ones."""
        if self.slots is None:
            return None
        return [self.slots.null] * (coming + sum(turn.is_trainable for turn in turns))

    def critic(self, run: str) -> "LanguagePolicy":
        """A run with value heads that reads without a prompt, on this model's device; loaded once. Where its Q counts
        later turns otherwise than this model's returns do, that is said then."""
        if run not in self.critics:
            critic = self.critics[run] = require_no_prompt(load_critic(run, device=self.model.device))
            found = StepRule(**settings(critic.model.config).get("step_rule", {})).discount_per_turn
            if found != self.slots.discount_per_turn:
                logging.getLogger(__name__).warning(
                    f"ask: found discount_per_turn {found:g} in the critic {run}, expected the model's "
                    f"{self.slots.discount_per_turn:g}: its Q is another sum than the returns this model was told"
                )
        return self.critics[run]

    def head_of(self, ask: str) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the function that maps hidden states (N, d) and logits (N, V) before an agent turn to the return that
        "auto" or "expert:κ" asks for there, (N,), in scaled units."""
        if ask.startswith("auto"):
            return self._best_q
        inverse_temperature = float(ask.partition(":")[2])
        return lambda hidden, _: self.model.return_heads.expert(hidden, inverse_temperature)

    def _best_q(self, hidden: Tensor, logits: Tensor) -> Tensor:
        """max_a of the smaller Q, (N,), over the first tokens of the turn that π supports: elsewhere Q saw no data."""
        q = reduce_q(self.model.q_values(hidden), "min")
        return q.masked_fill(support_filter(logits, ASK_SUPPORT) == -torch.inf, -torch.inf).amax(-1)

    def asks(self, asks: Sequence[float | str | None]) -> Asks | None:
        """Keeps account of these asks, one per row; None for a model that knows nothing of returns.

        Raises: InputError where such a model is asked for one, and for asks that this model cannot understand.
        """
        if "auto" in asks and getattr(self.model, "value_heads", None) is None:
            raise InputError(
                "ask: found 'auto', which needs value heads; expected a number, max, p90, or auto:RUN "
                "with a run of algorithm: ilql"
            )
        expert = next((ask for ask in asks if isinstance(ask, str) and ask.startswith("expert")), None)
        if expert is not None and getattr(self.model, "return_heads", None) is None:
            raise InputError(
                f"ask: found {shown(expert)}, which needs return heads; expected a number, max, or p90, "
                "or a model that was trained with return_weight above 0"
            )
        if self.slots is not None:
            for run in sorted(run for ask in asks if (run := critic_of(ask))):
                self.critic(run)
            return Asks(self.slots, self.task, asks)
        if any(ask is not None for ask in asks):
            ask = next(ask for ask in asks if ask is not None)
            raise InputError(
                f"ask: found {shown(ask)}, expected none, as this model was not trained with returns "
                "(algorithm: return_conditioned)"
            )
        return None


def load_critic(run: str | Path, *, device: str | torch.device | None = None) -> LanguagePolicy:
    """A run with value heads, as `LanguagePolicy.load`, asked for nothing. Raises: InputError where it has none."""
    critic = LanguagePolicy.load(run, device=device, ask=None)
    if getattr(critic.model, "value_heads", None) is None:
        raise InputError(f"critic: {run}: found a model without value heads, expected one that has them (an ILQL run)")
    return critic


def require_no_prompt(critic: LanguagePolicy) -> LanguagePolicy:
    """The critic itself. Raises: InputError for one trained behind demonstrations, where it is to read without any."""
    if settings(critic.model.config).get("prompt") is not None:
        raise InputError(
            "critic: found a model trained behind demonstrations, expected one trained without a prompt: "
            "it reads the dialogue alone"
        )
    return critic


class LanguageSession:
    """Rows of one batch of dialogues; implements Session. Caches live here while the windows of a row grow.

    fingerprint: of the tokenizer and template that the replies' token_ids belong to.
    """

    def __init__(
        self,
        policy: LanguagePolicy,
        seeds: Sequence[int],
        asks: Sequence[float | str | None],
        prompts: Sequence[PromptIds],
    ):
        self.policy, self.seeds, self.asks = policy, list(seeds), policy.asks(asks)
        # To a row that is asked for nothing no demonstration tells its return either.
        self.prompts = [p.null if ask is None else p.told for p, ask in zip(prompts, asks, strict=True)]
        self.null_prompts = [prompt.null for prompt in prompts]
        self.fingerprint = policy.renderer.fingerprint
        self.drawn = [0] * len(self.seeds)  # tokens so far: no draw of a row's seed is used twice
        self.memory = _memory(policy)

    def reply(
        self,
        rows: Sequence[int],
        histories: Sequence[Sequence[Turn]],
        options: Sequence[Sequence[str] | None] | None = None,
    ) -> list[Reply]:
        """The next agent turn of each of these rows. Rows that are not asked lose their cache, not their dialogue."""
        slots: list[list[Ids] | None] = [None] * len(rows)
        if self.asks is not None:
            slots = list(map(self.asks.before_reply, rows, histories, self._values(rows, histories)))
        policy, prompts = self.policy, [self.prompts[row] for row in rows]
        replies = policy.sampler.sample(
            [
                policy_window(history, policy.renderer, policy.window, policy.sampling.max_new_tokens, own, prompt)
                for history, own, prompt in zip(histories, slots, prompts, strict=True)
            ],
            [self.seeds[row] for row in rows],
            [self.drawn[row] for row in rows],
            options,
            self.memory,
            rows,
        )
        for row, reply in zip(rows, replies, strict=True):
            self.drawn[row] += len(reply.log_prob)
        return replies

    def _values(self, rows: Sequence[int], histories: Sequence[Sequence[Turn]]) -> list[float | None]:
        """For rows whose ask is read from heads before this turn: the best Q ("auto", "auto:RUN") or the return of an
        expert ("expert:κ"), read where no return is asked for, in reward units; None for the others."""
        reading: dict[str, list[tuple[int, Sequence[Turn]]]] = {}
        for row, history in zip(rows, histories, strict=True):
            if self.asks.is_read(row, history):
                reading.setdefault(self.asks.asks[row], []).append((row, history))
        found: dict[int, float] = {}
        for kind in sorted(reading):
            found |= self._values_of(kind, reading[kind])
        return [found.get(row) for row in rows]

    def _values_of(self, kind: str, reading: Sequence[tuple[int, Sequence[Turn]]]) -> dict[int, float]:
        past = [[turn for turn in history if turn.is_trainable] for _, history in reading]
        reserve = self.policy.sampling.max_new_tokens
        if run := critic_of(kind):
            reader = self.policy.critic(run)
            other = reader.renderer.fingerprint != self.fingerprint  # then ids that were sampled mean nothing to it
            told = [[replace(t, token_ids=None) for t in history] if other else history for _, history in reading]
            windows = [reader.null_window(history, reserve) for history in told]
        else:
            reader = self.policy
            windows = [reader.null_window(history, reserve, self.null_prompts[row]) for row, history in reading]
        memory = self.memory if kind.startswith("expert") else None  # the others are read once
        keys = [~row for row, _ in reading]  # where the sampler keeps what it read with null returns
        values = reader.sampler.read(reader.head_of(kind), windows, memory, keys)
        scale = RewardScale(**settings(reader.model.config).get("reward_scale", {}))
        return {
            row: scale.invert_return(value, sum(turn.reward is not None for turn in agent))
            for (row, _), agent, value in zip(reading, past, values, strict=True)
        }

    def labels(self, row: int) -> dict[str, Any]:
        """Of a row that a return was asked of: `ask`, the `bin` that stood for it at the first reply, and whether it
        was `clipped`, that is, outside the training data."""
        return {} if self.asks is None else dict(self.asks.first.get(row, {}))


def critic_of(ask: float | str | None) -> str | None:
    """The run whose Q is asked for, if one is named: auto:RUN."""
    return ask.removeprefix("auto:") if isinstance(ask, str) and ask.startswith("auto:") else None


def _memory(policy: LanguagePolicy) -> CacheMemory | None:
    """Where a session keeps caches; None for windows of one turn, which never grow."""
    return None if policy.window.context == 1 else CacheMemory(CACHE_BYTES)


def generate_texts(
    policy: Policy, histories: Sequence[Sequence[Turn]], n: int = 1, seeds: Sequence[int] | None = None
) -> list[list[Reply]]:
    """n independent replies to each history; sample j does not depend on n.

    Args:
      seeds: one per history, from 0 to 2³²; None numbers the histories.
    """
    if n < 1:
        raise InputError(f"n: found {n}, expected at least 1")
    seeds = range(len(histories)) if seeds is None else seeds
    session = policy.start([seed + j * SAMPLE_STRIDE for seed in seeds for j in range(n)])
    replies = session.reply(range(len(histories) * n), [history for history in histories for _ in range(n)])
    return [replies[i * n : (i + 1) * n] for i in range(len(histories))]
