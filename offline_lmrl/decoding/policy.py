"""A language model as a policy: the window it sees of a dialogue, its decoding, and its caches between turns.

A window is the part of a dialogue that fits into the limits of training, as token ids (tokens/windows.py). A run is
the folder of a trained model. Under the null condition, a return-conditioned model gets no requested return.
"""

import copy
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from offline_lmrl.decoding.asks import ReturnRequests
from offline_lmrl.decoding.batch import FAILED, Request
from offline_lmrl.decoding.cache import CacheMemory
from offline_lmrl.decoding.config import DecodingConfig
from offline_lmrl.decoding.distribution import reduce_q, support_filter
from offline_lmrl.decoding.loop import SamplingLoop
from offline_lmrl.decoding.probe import check_plays
from offline_lmrl.decoding.sampler import CACHE_BYTES, Sampler
from offline_lmrl.errors import InputError, reading_pretrained, require, shown
from offline_lmrl.logs.messages import read_dialogue
from offline_lmrl.logs.protocols import Policy, Reply
from offline_lmrl.logs.scale import RewardScale
from offline_lmrl.logs.trajectory import Trajectory, Turn
from offline_lmrl.models.adapters import most_positions, part_of, run_metadata
from offline_lmrl.models.guided import return_tokens_of
from offline_lmrl.models.loading import find_device, load_model
from offline_lmrl.models.renderers import renderer_of
from offline_lmrl.tokens.episodes import StepRule
from offline_lmrl.tokens.few_shot import FewShotConfig, few_shot_ids
from offline_lmrl.tokens.rendering import Renderer
from offline_lmrl.tokens.tokenizers import load_tokenizer
from offline_lmrl.tokens.windows import EncodedDialogue, Ids, WindowRule, policy_window, reply_window

ASK_SUPPORT = 0.02  # the best Q ignores first tokens with less than this share of the largest probability
SAMPLE_STRIDE = 2**32  # difference between the seeds of one history's samples: larger than any range of seeds


class FewShotIds(NamedTuple):
    """Few-shot demonstrations as token ids, in two versions, which are equal for a model without returns.

    with_returns: with the ids of the demonstrated episodes' returns.
    without_returns: with the null condition's ids in the place of these returns.
    """

    with_returns: Ids
    without_returns: Ids


NO_FEW_SHOT = FewShotIds((), ())


# Requests that need a part of the model: their start, the part, its name in words, and what else may be requested.
NEEDED_PARTS = (
    (
        "auto$",
        "value_heads",
        "value heads",
        "a number, max, p90, or auto:RUN with a run of algorithm: ilql",
    ),
    (
        "expert",
        "return_heads",
        "return heads",
        "a number, max, or p90, or a model that was trained with return_weight above 0",
    ),
)


class LanguagePolicy:
    """A causal LM with its renderer, window and decoding; implements Policy.

    Args:
      model: the causal LM.
      renderer: turns a dialogue into token ids.
      decoding: how replies are decoded; None = the defaults of DecodingConfig.
      task: name of the played task, for a model that was trained with returns per task.
      few_shot: few-shot demonstrations (tokens/few_shot.py), which come before the window of every row, in the given
        order; None = none. Each is cut to the part that the training settings name, or kept whole if the model was
        trained without demonstrations.
      window: fields of WindowRule (tokens/windows.py), as in training. `max_length` holds window and reply together,
        and max_new_tokens of it stay free for the reply; None = the most positions of the model, or 1024 if its config
        names none.
    Attributes:
      value_models: RUN -> its policy, for the requests "auto:RUN" (the best Q of that run), once it is loaded.

    Raises: InputError if the settings need something that the model lacks.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        renderer: Renderer,
        decoding: DecodingConfig | None = None,
        *,
        task: str = "",
        few_shot: Sequence[Trajectory] | None = None,
        **window: Any,
    ):
        self.model, self.renderer, self.task, self.few_shot = model, renderer, task, few_shot
        window["max_length"] = window.get("max_length") or most_positions(model.config) or 1024
        self.window = WindowRule(**window)
        self.return_tokens = return_tokens_of(model, renderer)
        self.spec = FewShotConfig(**(run_metadata(model.config).get("few_shot") or {}))
        self.value_models: dict[str, LanguagePolicy] = {}
        self._set_decoding(decoding or DecodingConfig())

    def _set_decoding(self, decoding: DecodingConfig) -> None:
        self.decoding, self.sampler = decoding, Sampler(self.model, self.renderer, decoding)
        self.return_requests([decoding.ask])  # raises now if the model cannot be given this request
        self.shared_few_shot = few_shot_ids_of(self, self.few_shot)

    @classmethod
    def load(
        cls,
        run: str | Path,
        *,
        device: str | torch.device | None = None,
        task: str = "",
        few_shot: Sequence[Trajectory] | None = None,
        **decoding: Any,
    ) -> "LanguagePolicy":
        """Load the policy of a run, or of any causal LM.

        Args:
          run: a run directory, or the folder or hub name of a causal LM.
          device: where the model is put; None = the first GPU, else the CPU.
          task: as for `LanguagePolicy`.
          few_shot: as for `LanguagePolicy`.
          decoding: fields of DecodingConfig that replace those saved with the run.

        Raises: InputError if there is no model or tokenizer, or if the model was trained with another tokenizer.
        """
        device = find_device(device)
        model = load_model(run).to(device)
        saved = run_metadata(model.config)
        renderer = renderer_of(load_tokenizer(run), model, run)
        check_plays(model, renderer)
        with reading_pretrained(run, "run"):
            decoding = DecodingConfig.from_dict({**(saved.get("decoding") or {}), **decoding})
            return cls(model, renderer, decoding, **(saved.get("window") or {}), task=task, few_shot=few_shot)

    def with_decoding(self, **changes: Any) -> "LanguagePolicy":
        """Return a policy with the same model, and with these fields of its DecodingConfig changed.

        Raises: InputError if a value is outside its range, or needs something that the model lacks.
        """
        other = copy.copy(self)
        other._set_decoding(replace(self.decoding, **changes))
        return other

    def start(
        self,
        seeds: Sequence[int],
        asks: Sequence[float | str | None] | None = None,
        few_shot: Sequence[Sequence[Trajectory] | None] | None = None,
    ) -> "LanguageSession":
        """Start a session, which plays one dialogue (row) per seed.

        Args:
          seeds: the seed of each row's random numbers.
          asks: the requested return of each row; None = that of the DecodingConfig for all rows.
          few_shot: the few-shot demonstrations of each row, None for a row without any; None = the demonstrations of
            the policy for all rows.

        Raises: InputError if the model cannot serve a request (`return_requests`), if demonstrations do not fit
          (`few_shot_ids_of`), or if the lengths of `few_shot` and `seeds` differ.
        """
        if few_shot is not None and len(few_shot) != len(seeds):
            raise InputError(f"few_shot: found {len(few_shot)}, expected one for each of {len(seeds)} rows")
        asks = [self.decoding.ask] * len(seeds) if asks is None else asks
        read = (
            [self.shared_few_shot] * len(seeds)
            if few_shot is None
            else [few_shot_ids_of(self, own) for own in few_shot]
        )
        return LanguageSession(self, seeds, asks, read)

    def request(self, dialogue: str | Sequence[Turn | Mapping[str, Any]], seed: int = 0, **changes: Any) -> Request:
        """Return the request for the reply to a dialogue, which a `SamplingLoop` of this policy's sampler draws.

        Args:
          dialogue: the turns so far: a list of messages, such as {"role": "user", "content": "Hi"}, or of turns; or
            one text of the user.
          seed: the seed of the reply's random numbers.
          changes: fields of DecodingConfig that differ for this reply.
        Raises: InputError if this is no dialogue, or as `with_decoding` does.
        """
        policy = self.with_decoding(**changes) if changes else self
        (prompt,) = policy.start([seed]).prompts([0], [read_dialogue(dialogue, "dialogue", "messages")])
        return Request(prompt, seed, policy.decoding)

    def stream(
        self, dialogue: str | Sequence[Turn | Mapping[str, Any]], seed: int = 0, **changes: Any
    ) -> Iterator[str]:
        """Yield the reply to a dialogue in pieces of text, as soon as each is final; arguments as for `request`.

        Raises: InputError as `request` does, and if a probability is not a number.
        """
        loop = SamplingLoop(self.sampler)
        loop.add([self.request(dialogue, seed, **changes)])
        while len(loop):
            for event in loop.step():
                require(event.finished != "failed", FAILED)
                if event.text:
                    yield event.text

    def chat(self, dialogue: str | Sequence[Turn | Mapping[str, Any]], seed: int = 0, **changes: Any) -> str:
        """Return the reply to a dialogue; arguments as for `request`."""
        return "".join(self.stream(dialogue, seed, **changes))

    def null_window(self, turns: Sequence[Turn], reserve: int, few_shot: Ids | None = None) -> list[int]:
        """Return the ids that the policy sees before its next turn, under the null condition (no requested return).

        Args:
          turns: the dialogue so far.
          reserve: tokens to keep free for the next turn.
          few_shot: ids of few-shot demonstrations; None = the policy's own, with the null condition.
        """
        few_shot = self.shared_few_shot.without_returns if few_shot is None else few_shot
        return policy_window(
            turns, self.renderer, self.window, reserve, self._null_return_ids(turns, coming=1), few_shot
        )

    def null_reply_window(self, turns: Sequence[Turn], role: str, reserve: int) -> list[int] | None:
        """Return the ids that the policy sees before the environment's next turn, without a requested return.

        The policy's own few-shot demonstrations come first.

        Args:
          turns: the dialogue so far, which ends with an agent turn.
          role: the role of the environment's turn.
          reserve: tokens to keep free for that turn.
        Returns: the ids; None if they and that turn do not fit into max_length.
        """
        return_ids, few_shot = self._null_return_ids(turns), self.shared_few_shot.without_returns
        dialogue = EncodedDialogue([*turns, Turn(role, "")], self.renderer, return_ids, few_shot)
        return reply_window(dialogue, self.window, reserve)

    def _null_return_ids(self, turns: Sequence[Turn], coming: int = 0) -> list[Ids] | None:
        """Return the null ids of each agent turn in `turns` and of `coming` more; None for a model without returns."""
        if self.return_tokens is None:
            return None
        return [self.return_tokens.null] * (coming + sum(turn.is_trainable for turn in turns))

    def return_requests(self, asks: Sequence[float | str | None]) -> ReturnRequests | None:
        """Return the object that tracks the requested return of each row; None for a model without returns.

        Args:
          asks: the requested return of each row.
        Raises: InputError if a model without returns gets a request, if a request is unknown, or if it needs heads
          that the model lacks.
        """
        for start, part, what, other in NEEDED_PARTS:
            ask = next((ask for ask in asks if isinstance(ask, str) and re.match(start, ask)), None)
            if ask is not None and part_of(self.model, part) is None:
                raise InputError(f"ask: found {shown(ask)}, but this model has no {what}; expected {other}")
        if self.return_tokens is not None:
            for run in sorted(run for ask in asks if (run := run_named_in_ask(ask))):
                RequestValues(self).value_model(run)
            return ReturnRequests(self.return_tokens, self.task, asks)
        ask = next((ask for ask in asks if ask is not None), None)
        if ask is not None:
            raise InputError(
                f"ask: found {shown(ask)}, expected null, as this model was not trained with returns "
                "(algorithm: return_conditioned)"
            )
        return None


def few_shot_ids_of(policy: LanguagePolicy, demonstrations: Sequence[Trajectory] | None) -> FewShotIds:
    """Return the token ids of these few-shot demonstrations; None gives no ids.

    If random parts of demonstrations are shown (`FewShotConfig.part`), the same list always gives the same parts.

    Raises: InputError if this is not a list of demonstrations, if it is empty, or if it leaves no space for a
      reply.
    """
    if demonstrations is None:
        return NO_FEW_SHOT
    if isinstance(demonstrations, Trajectory) or not demonstrations:
        found = "one trajectory" if isinstance(demonstrations, Trajectory) else "an empty list"
        raise InputError(f"few_shot: found {found}, expected a list of demonstrations, or None for none")
    rng = np.random.default_rng(policy.spec.seed)
    shown = [policy.spec.cut(demonstration, rng) for demonstration in demonstrations]
    tokens = policy.return_tokens
    kinds = (None, None) if tokens is None else (tokens.of_log, tokens.nulls)
    with_returns, without_returns = (few_shot_ids(shown, policy.renderer, kind) for kind in kinds)
    rule, reply = policy.window, policy.decoding.max_new_tokens
    free = rule.max_length - len(policy.renderer.preamble_of(())) - len(policy.renderer.agent_opening) - reply
    if len(with_returns) > free:
        raise InputError(
            f"few_shot: found {len(with_returns)} tokens, expected at most {free}, as max_length "
            f"({rule.max_length}) also has to hold a reply of max_new_tokens ({reply})"
        )
    return FewShotIds(with_returns, without_returns)


class RequestValues:
    """The requested returns that are computed from the dialogue: "auto", "auto:RUN" and "expert:κ".

    Args:
      policy: the policy whose replies are conditioned on them.
    """

    def __init__(self, policy: LanguagePolicy):
        self.policy = policy

    def value_model(self, run: str) -> "LanguagePolicy":
        """Load the policy of a run with value heads on this model's device; a second call returns the same object.

        Log a warning if the discount per turn of its Q differs from that of this model's returns.

        Args:
          run: a run directory or hub name.
        Raises: InputError if the run has no value heads or was trained with few-shot demonstrations.
        """
        known = self.policy.value_models
        if run not in known:
            value_model = known[run] = require_no_few_shot(load_value_model(run, device=self.policy.model.device))
            found = StepRule(**run_metadata(value_model.model.config).get("step_rule", {})).discount_per_turn
            expected = self.policy.return_tokens.discount_per_turn
            if found != expected:
                logging.getLogger(__name__).warning(
                    f"ask: found discount_per_turn {found:g} in the run {run}, expected the model's "
                    f"{expected:g}: Q of that run is discounted otherwise than "
                    "the model's returns"
                )
        return known[run]

    def head_of(self, ask: str) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the function that computes the requested return `ask`.

        The function maps hidden states (N, d) and logits (N, V) before an agent turn to returns (N,), in scaled reward
        units. For "auto" and "auto:RUN" they are max_a min over heads of Q(s, a), with a the first token of the turn.
        Tokens to which π gives too little probability (ASK_SUPPORT) are left out, because Q is not trained on them.
        """
        if run := run_named_in_ask(ask):
            return RequestValues(self.value_model(run)).head_of("auto")
        model = self.policy.model
        if ask.startswith("expert"):
            inverse_temperature = float(ask.partition(":")[2])
            return lambda hidden, _: model.return_heads.expert(hidden, inverse_temperature)

        def best_q(hidden: Tensor, logits: Tensor) -> Tensor:
            q = reduce_q(model.q_values(hidden), "min")
            return q.masked_fill(support_filter(logits, ASK_SUPPORT) == -torch.inf, -torch.inf).amax(-1)

        return best_q

    def compute(
        self,
        ask: str,
        reading: Sequence[tuple[int, Sequence[Turn]]],
        few_shot: Sequence[Ids],
        memory: CacheMemory | None,
    ) -> dict[int, float]:
        """Compute a requested return before the next agent turn, under the null condition.

        Args:
          ask: the request.
          reading: the rows of a session that have this request, each with its history.
          few_shot: the ids of their few-shot demonstrations, without returns.
          memory: the caches of the session; None = no reuse.
        Returns: row -> the return in reward units.
        """
        reader, reserve = self.policy, self.policy.decoding.max_new_tokens
        histories = [history for _, history in reading]
        if run := run_named_in_ask(ask):
            reader = self.value_model(run)
            few_shot = [reader.shared_few_shot.without_returns] * len(histories)
            if reader.renderer.fingerprint != self.policy.renderer.fingerprint:
                # Ids sampled with another tokenizer mean something else to this one.
                histories = [[replace(turn, token_ids=None) for turn in history] for history in histories]
        windows = [
            reader.null_window(history, reserve, shown) for history, shown in zip(histories, few_shot, strict=True)
        ]
        memory = memory if ask.startswith("expert") else None  # "auto" is computed once per row
        keys = [~row for row, _ in reading]  # under these keys the sampler keeps caches under the null condition
        values = reader.sampler.apply_head(self.head_of(ask), windows, memory, keys)
        scale = RewardScale(**run_metadata(reader.model.config).get("reward_scale", {}))
        scored = [sum(turn.is_trainable and turn.reward is not None for turn in history) for history in histories]
        return {row: scale.invert_return(*each) for (row, _), *each in zip(reading, values, scored, strict=True)}


def load_value_model(run: str | Path, *, device: str | torch.device | None = None) -> LanguagePolicy:
    """Load the policy of a run with value heads, to be used without a requested return.

    Args:
      run: a run directory or hub name.
      device: where the model is put; None = the first GPU, else the CPU.
    Raises: InputError if the run has no value heads.
    """
    value_model = LanguagePolicy.load(run, device=device, ask=None)
    if part_of(value_model.model, "value_heads") is None:
        raise InputError(
            f"value_model: {run}: found a model without value heads, expected one that has them (an ILQL run)"
        )
    return value_model


def require_no_few_shot(value_model: LanguagePolicy) -> LanguagePolicy:
    """Return the value model unchanged.

    Raises: InputError if it was trained with few-shot demonstrations, because a value model sees the dialogue alone.
    """
    if run_metadata(value_model.model.config).get("few_shot") is not None:
        raise InputError(
            "value_model: found a model trained with few-shot demonstrations, expected one trained without: a "
            "value model reads the dialogue alone"
        )
    return value_model


class LanguageSession:
    """A session of a language model over a batch of dialogues, one per row; implements Session.

    It keeps the cache of each row between turns and reuses it as far as the row's window starts with the same ids.

    Args:
      policy: draws the replies.
      seeds: the seed of each row's random numbers.
      asks: the requested return of each row; None = no requested return.
      few_shot: the ids of each row's few-shot demonstrations.
    Attributes:
      fingerprint: identifies the tokenizer and chat template that the replies' token_ids belong to.
    """

    def __init__(
        self,
        policy: LanguagePolicy,
        seeds: Sequence[int],
        asks: Sequence[float | str | None],
        few_shot: Sequence[FewShotIds],
    ):
        self.policy, self.seeds, self.requests = policy, list(seeds), policy.return_requests(asks)
        # In a row without a requested return, the demonstrations are under the null condition too.
        self.few_shot_ids = [
            p.without_returns if ask is None else p.with_returns for p, ask in zip(few_shot, asks, strict=True)
        ]
        self.few_shot_without_returns = [ids.without_returns for ids in few_shot]
        self.fingerprint = policy.renderer.fingerprint
        self.drawn = [0] * len(self.seeds)  # tokens drawn per row, so that no random number of its seed is used twice
        # Windows of one turn of history never grow, so that nothing of a cache could be reused.
        self.memory = None if policy.window.context == 1 else CacheMemory(CACHE_BYTES)

    def reply(
        self,
        rows: Sequence[int],
        histories: Sequence[Sequence[Turn]],
        options: Sequence[Sequence[str] | None] | None = None,
    ) -> list[Reply]:
        """Draw the next agent turn of each of these rows.

        Rows of the session that are not in `rows` lose their cache. They can be passed later; the model then runs on
        their whole window.

        Args:
          rows: rows of the session.
          histories: all turns so far of each row.
          options: the only texts allowed for each row's reply; None = any text.
        Returns: one reply per row.
        """
        replies = self.policy.sampler.sample(
            self.prompts(rows, histories),
            [self.seeds[row] for row in rows],
            [self.drawn[row] for row in rows],
            options,
            self.memory,
            rows,
        )
        for row, reply in zip(rows, replies, strict=True):
            self.drawn[row] += len(reply.log_prob)
        return replies

    def prompts(self, rows: Sequence[int], histories: Sequence[Sequence[Turn]]) -> list[list[int]]:
        """Return the ids that the policy sees before the next agent turn of each row, and record what is requested.

        Args:
          rows: rows of the session.
          histories: all turns so far of each row.
        """
        return_ids: list[list[Ids] | None] = [None] * len(rows)
        if self.requests is not None:
            return_ids = list(map(self.requests.before_reply, rows, histories, self._values(rows, histories)))
        policy, few_shot = self.policy, [self.few_shot_ids[row] for row in rows]
        return [
            policy_window(history, policy.renderer, policy.window, policy.decoding.max_new_tokens, own, shown)
            for history, own, shown in zip(histories, return_ids, few_shot, strict=True)
        ]

    def _values(self, rows: Sequence[int], histories: Sequence[Sequence[Turn]]) -> list[float | None]:
        """Compute the requested returns that depend on the dialogue before this turn, under the null condition.

        Returns: per row, in reward units, the best Q for "auto" and "auto:RUN", or the expert return for "expert:κ";
          None for a row whose request needs no new value here (`ReturnRequests.is_read`).
        """
        reading: dict[str, list[tuple[int, Sequence[Turn]]]] = {}
        for row, history in zip(rows, histories, strict=True):
            if self.requests.is_read(row, history):
                reading.setdefault(self.requests.asks[row], []).append((row, history))
        values, found = RequestValues(self.policy), {}
        for ask in sorted(reading):
            few_shot = [self.few_shot_without_returns[row] for row, _ in reading[ask]]
            found |= values.compute(ask, reading[ask], few_shot, self.memory)
        return [found.get(row) for row in rows]

    def labels(self, row: int) -> dict[str, Any]:
        """Return labels of a row: `ask`, `bin` and `clipped`, as of its first reply; {} without a requested return.

        `ask` is the return requested at the first agent turn, in reward units. `bin` is the index of the return bin
        that the model was given for the first reply, and `clipped` is True if the return requested there is outside
        the range of the training data.
        """
        return {} if self.requests is None else dict(self.requests.first.get(row, {}))


def run_named_in_ask(ask: float | str | None) -> str | None:
    """Return RUN if the requested return is "auto:RUN" (the best Q of that run), else None."""
    return ask.removeprefix("auto:") if isinstance(ask, str) and ask.startswith("auto:") else None


def generate_texts(
    policy: Policy, histories: Sequence[Sequence[Turn]], n: int = 1, seeds: Sequence[int] | None = None
) -> list[list[Reply]]:
    """Draw n independent replies to each history; reply j of a history does not depend on n.

    Args:
      policy: draws the replies.
      histories: the dialogues to reply to.
      n: replies per history, at least 1.
      seeds: the random seed of each history, from 0 to 2³²; None = 0, 1, ...
    Returns: per history, its n replies.
    Raises: InputError if n is below 1.
    """
    if n < 1:
        raise InputError(f"n: found {n}, expected at least 1")
    seeds = range(len(histories)) if seeds is None else seeds
    session = policy.start([seed + j * SAMPLE_STRIDE for seed in seeds for j in range(n)])
    replies = session.reply(range(len(histories) * n), [history for history in histories for _ in range(n)])
    return [replies[i * n : (i + 1) * n] for i in range(len(histories))]
