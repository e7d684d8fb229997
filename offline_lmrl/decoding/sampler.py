"""The token loop: draw tokens by log π(a|s) + (1+w)·Δ_R + β·clip(reduce(Q) − V), in batches, with caches across turns.

Filters act on π first. Guidance acts on the tokens that survive them, because Q is only trained where there is data
(Snell et al. 2023, ILQL; the official code also filters before guidance). β, the reduction of the Q heads and the
clip are the settings `beta`, `q_reduce` and `clip`; w is `condition_scale`. With `candidates`, guidance is computed
only for the policy's k most probable tokens. A row is one prompt with its reply. The random numbers of a row are a
hash of its seed and of the number of tokens drawn so far, so its sample does not depend on the batch it is in.

With a requested return R, Δ_R = log π(a|s,R) − log π(a|s). At w = β = 0 the sum is log π(a|s,R): one forward pass
conditioned on R is enough, and the filters act on π(a|s,R). Otherwise each row passes through the model in two
streams, in one batch and one cache: once with its returns and once with the null condition (no requested return) in
their place. The second stream gives π(a|s), on which the filters then act, and Q and V, which were trained under the
null condition.
"""

import bisect
import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel

from offline_lmrl.decoding.cache import CacheMemory, cache_argument, is_kept_per_token, new_cache
from offline_lmrl.decoding.constraints import TokenTrie
from offline_lmrl.decoding.distribution import Q_REDUCTIONS, Form, ModelOutputs, next_token
from offline_lmrl.errors import InputError, shown
from offline_lmrl.logs.protocols import Reply
from offline_lmrl.logs.trajectory import Turn
from offline_lmrl.ops.decoding import sample_from, uniform
from offline_lmrl.settings import setting
from offline_lmrl.tokens.conditioning import check_ask
from offline_lmrl.tokens.rendering import Renderer

FINISHED_SHARE = 0.25  # finished rows are removed from the batch once they make up this share of it
MOST_TOKENS = 32_768  # limit on rows × (prompt + longest reply) in one batch
MOST_LOGITS = 2**25  # limit on rows × vocabulary in one batch
ENOUGH_ROWS = 64  # a batch with this many rows is closed at the first prompt with less than half as much to read
CACHE_BYTES = 2**31  # limit on the caches that a session keeps between turns


def sync_every(device: torch.device) -> int:
    """Return the number of tokens that are drawn between two checks for finished rows.

    On a GPU each check waits until the GPU has finished its queued work; on a CPU it costs nothing.
    """
    return 1 if device.type == "cpu" else 8


@dataclass(frozen=True)
class DecodingConfig:
    """The settings by which the next token is chosen."""

    temperature: float = setting(1.0, "Divides log π; 0 is greedy (argmax of the guided scores).")
    top_k: int | None = setting(None, "Keep only the k most probable tokens of π, at that temperature; null = off.")
    top_p: float | None = setting(
        None,
        "Keep the smallest set of most probable tokens that holds this share of π, at that temperature; null = off.",
    )
    min_p: float | None = setting(
        None,
        "Drop tokens with less than min_p times the largest probability of π, at that temperature; null = off.",
    )
    support: float = setting(
        0.0,
        "Drop tokens with π(a|s) < support · max π(·|s), at temperature 1 (discrete BCQ); 0 = off.",
    )
    beta: float = setting(0.0, "Weight of value guidance; 0 = the plain policy.")
    q_reduce: str = setting("min", "How the Q heads are combined: min, mean or first.")
    candidates: int | None = setting(
        None,
        "Guide only the policy's k most probable tokens and drop the others; null = all. Unused without guidance.",
    )
    clip: float | None = setting(
        None,
        "Upper limit on the advantage Q − V; null = no limit (V then cancels and is not computed).",
    )
    ask: float | str | None = setting(
        None,
        "The requested return, for a model that was trained with returns. Requested at the agent's first turn, and "
        'then reduced by each reward it earns: a number in reward units, "p90" or "max" (of the training returns), '
        '"auto" (the best Q at the agent\'s first turn), or "auto:RUN" (the best Q of another run there). Computed '
        'anew before every turn: "expert:3" (the expected return after weighting each return R, in scaled units, by '
        "exp(3 · R): `ReturnHeads.expert`). null = no return is requested. The docstring of decoding/asks.py compares "
        "their results.",
    )
    condition_scale: float = setting(
        0.0,
        "w ≥ 0 of return guidance, (1 + w)·log π(·|ask) − w·log π(·); 0 = plain conditioning.",
    )
    max_new_tokens: int = setting(64, "Longest reply in tokens, closing token included.")
    stop: tuple[str, ...] = setting((), "Texts that end a reply; the reply's text is cut before the first of them.")

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        inf = float("inf")
        for name, low, high, meaning in (
            ("temperature", 0.0, inf, "0 (greedy) or more"),
            ("top_k", 1, inf, "a whole number from 1, or null"),
            ("top_p", 0.0, 1.0, "a share above 0 and up to 1, or null"),
            ("min_p", 0.0, 1.0, "a share from 0 to 1, or null"),
            ("support", 0.0, 1.0, "a share from 0 to 1"),
            ("beta", -inf, inf, "a finite number"),
            ("candidates", 1, inf, "a whole number from 1, or null"),
            ("clip", -inf, inf, "a finite number, or null"),
            ("condition_scale", 0.0, inf, "0 (no return guidance) or more"),
            ("max_new_tokens", 1, inf, "a whole number from 1"),
        ):
            value = getattr(self, name)
            whole = name in ("top_k", "candidates", "max_new_tokens")
            optional = name in ("top_k", "top_p", "min_p", "candidates", "clip")
            if value is None and optional:
                continue
            number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
            if not number or not low <= value <= high or abs(value) == inf or (name == "top_p" and value == 0):
                raise InputError(f"{name}: found {shown(value)}, expected {meaning}")
        check_ask(self.ask)
        if self.q_reduce not in Q_REDUCTIONS:
            raise InputError(f"q_reduce: found {shown(self.q_reduce)}, expected one of {', '.join(Q_REDUCTIONS)}")
        if not all(isinstance(text, str) and text for text in self.stop):
            raise InputError(f"stop: found {shown(self.stop)}, expected texts that are not empty")

    @cached_property  # it is read for every token
    def form(self) -> Form:
        """The settings of the formula, without those of requests and replies."""
        return Form(**{field.name: getattr(self, field.name) for field in fields(Form)})

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values for JSON."""
        return asdict(self) | {"stop": list(self.stop)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DecodingConfig":
        """Rebuild the settings from the output of `to_dict`; absent keys take their defaults.

        Raises: InputError if a key is unknown.
        """
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1, cutoff=0)
                raise InputError(f"decoding has no setting {shown(name)}; did you mean {near[0]!r}?")
        return cls(**values)


@dataclass
class _Batch:
    """A batch of B rows that are decoded together. All tensors are on the model's device, long if not named otherwise.

    Args:
      index: (B,) index of each row's prompt among the prompts of `Sampler.sample`.
      seed: (B,) seed of each row's random numbers.
      counter: (B,) number of tokens drawn from this seed in earlier calls.
      node: (B,) current node of each row in the trie of allowed replies (`TokenTrie`).
      length: (B,) number of tokens of the prompt, without padding.
      drawn: (B,) number of tokens of the reply so far.
      finished: (B,) bool, True once the reply has ended.
      mask: (B, width + max_new_tokens) bool, False at padding.
      tokens: (B, max_new_tokens) ids drawn.
      log_prob: (B, max_new_tokens) fp32, log π of each token in the distribution that it was drawn from, in nats.
      policy_log_prob: (B, max_new_tokens) fp32, log π of each token under the unguided policy, in nats.
      cache: keys and values of streams · B rows.
      width: number of columns of the prompts, padding included.
      padded: True if any prompt has padding in those columns.
      streams: 2 if each row also passes through the model under the null condition, else 1. Cache and logits have
        streams · B rows; the rows under the null condition come last.
    """

    index: Tensor
    seed: Tensor
    counter: Tensor
    node: Tensor
    length: Tensor
    drawn: Tensor
    finished: Tensor
    mask: Tensor
    tokens: Tensor
    log_prob: Tensor
    policy_log_prob: Tensor
    cache: DynamicCache
    width: int
    padded: bool
    streams: int

    def in_cache(self, rows: Tensor) -> Tensor:
        """Return the cache rows (streams · R,) of R batch rows (R,): all of stream 0, then all of stream 1, if any.

        A stream is one pass of every row through the model.
        """
        return torch.cat([rows + stream * len(self.index) for stream in range(self.streams)])

    def select(self, rows: Tensor) -> "_Batch":
        """Return a batch of only these rows, (R,) indices; the cache is changed in place."""
        self.cache.reorder_cache(self.in_cache(rows))  # recurrent layers lack batch_select_indices, but have this
        chosen = {name: value[rows] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **chosen)


class Sampler:
    """A sampler that draws replies from a model.

    Args:
      model: any causal LM of transformers. Guidance (beta other than 0) needs the methods `forward_with_hidden` and
        `q_values` of a guided model, and `v_values` if clip is set.
      renderer: holds the ids that close a reply, and decodes ids to text.
      config: how tokens are chosen.
      close_id: the id that ends a reply, for turns of another role than the agent; None = any of the ids that end
        the agent's turns.

    Raises: InputError if beta is not 0 and the model has no value heads, if condition_scale is not 0 and the model has
      no null condition, or if the model takes no cache.
    """

    def __init__(
        self, model: PreTrainedModel, renderer: Renderer, config: DecodingConfig, close_id: int | None = None
    ):
        name = type(model).__name__
        heads = hasattr(model, "q_values") and getattr(model, "value_heads", True) is not None
        if config.beta != 0.0 and not heads:
            raise InputError(f"beta: found {config.beta}, expected 0, as {name} has no value heads to guide it")
        conditioned = getattr(model, "return_embedding", None) is not None
        if config.condition_scale != 0.0 and not conditioned:
            raise InputError(
                f"condition_scale: found {config.condition_scale}, expected 0, as {name} has no null condition; train "
                "one with algorithm: return_conditioned and condition: embedding"
            )
        # A conditioned model has extra ids after the vocabulary: the null condition first, then one per return bin.
        self.null = model.get_input_embeddings().weight.shape[0] if conditioned else None
        self.cache_argument = cache_argument(model)
        self.model, self.renderer, self.config = model, renderer, config
        self.close_ids = renderer.close_ids if close_id is None else frozenset({close_id})
        self.ends = torch.tensor(sorted(self.close_ids), device=model.device)
        self.most_rows = max(1, MOST_LOGITS // model.config.get_text_config().vocab_size)
        self.ids_of_option: dict[str, tuple[int, ...]] = {}
        self.option_of_ids: dict[tuple[int, ...], str] = {}

    @torch.inference_mode()
    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        counters: Sequence[int] | None = None,
        options: Sequence[Sequence[str] | None] | None = None,
        memory: CacheMemory | None = None,
        rows: Sequence[int] | None = None,
    ) -> list[Reply]:
        """Draw one reply per prompt, with the model in eval mode; its mode is restored afterwards.

        A reply that a stop text ended has no token_ids: they would decode to more than its text.

        Args:
          prompts: token ids up to and including the opening of the turn to draw (such as a role header); at least one
            id each.
          seeds: the random seed of each prompt.
          counters: number of tokens already drawn from each seed, which is where its random numbers continue; None =
            0 for all.
          options: the only texts allowed as replies to each prompt; None = any text.
          memory: holds the caches of earlier turns; those of this turn are stored in it. None = no reuse.
          rows: the key of each prompt in `memory`, 0 or more; None = 0, 1, ...
        Returns: one reply per prompt.
        Raises: InputError if a list of options is empty, or if an option is longer than max_new_tokens.
        """
        reads = frozenset().union(*(term.reads for term in self.config.form.terms()))
        # Without a requested return in any prompt, both streams would be equal, so one is enough.
        with_returns = self.null is not None and any(token > self.null for prompt in prompts for token in prompt)
        run = _DecodingPass(
            sampler=self,
            prompts=[list(prompt) for prompt in prompts],
            seeds=list(seeds),
            counters=list(counters or [0] * len(prompts)),
            options=[self._option_ids(texts) for texts in options or [None] * len(prompts)],
            memory=self._usable(memory),
            rows=list(rows or range(len(prompts))),
            streams=2 if with_returns and "null stream" in reads else 1,
            with_hidden="hidden states" in reads,
        )
        with evaluating(self.model):
            return run.replies()

    @torch.inference_mode()
    def apply_head(
        self,
        head: Callable[[Tensor, Tensor], Tensor],
        prompts: Sequence[Sequence[int]],
        memory: CacheMemory | None = None,
        rows: Sequence[int] | None = None,
    ) -> list[Any]:
        """Apply a head to the model's output after the last token of each prompt.

        Args:
          head: maps hidden states (N, d) and logits (N, V) of N prompts to a tensor (N, ...).
          prompts: token ids, at least one each.
          memory: holds the caches of earlier calls; those of this call are stored in it. None = no reuse.
          rows: the key of each prompt in `memory`; None = 0, 1, ... For a prompt under the null condition (no return
            requested) it is ~row (bitwise not), the key under which `sample` stores the caches of that condition.
        Returns: one number or nested list per prompt.
        """
        run = _DecodingPass(
            sampler=self,
            prompts=[list(prompt) for prompt in prompts],
            seeds=[0] * len(prompts),
            counters=[0] * len(prompts),
            options=[None] * len(prompts),
            memory=self._usable(memory),
            rows=list(rows or range(len(prompts))),
            streams=1,
            with_hidden=True,
        )
        with evaluating(self.model):
            return run.apply_head(head)

    def _usable(self, memory: CacheMemory | None) -> CacheMemory | None:
        # Sliding windows and recurrent states cannot be cut to the first tokens of a prompt, so they are not reused.
        return memory if memory is not None and is_kept_per_token(new_cache(self.model, 0)) else None

    def _option_ids(self, texts: Sequence[str] | None) -> list[tuple[int, ...]] | None:
        """Return the ids of each allowed text, closing token included; None = any text is allowed.

        Raises: InputError if there are no texts, or if one is longer than max_new_tokens.
        """
        if texts is None:
            return None
        if not texts:
            raise InputError("options: found an empty list, expected at least one text, or null for any")
        for text in texts:
            if text not in self.ids_of_option:
                turn = self.renderer.encode_turn(Turn("assistant", text))
                ids = turn.actions
                if len(ids) > self.config.max_new_tokens:
                    raise InputError(
                        f"max_new_tokens: found {self.config.max_new_tokens}, expected at least {len(ids)}, "
                        f"the tokens of the option {text!r}"
                    )
                self.ids_of_option[text] = ids
                self.option_of_ids[ids] = text
        return [self.ids_of_option[text] for text in texts]

    def forward(
        self, ids: Tensor, mask: Tensor | None, position: Tensor, cache: DynamicCache, with_hidden: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Run the model on T tokens per row, which follow the cached ones.

        Args:
          ids: (B, T) token ids.
          mask: (B, cached + T) bool, True at real tokens; None = no padding anywhere.
          position: (B, T) position ids.
          cache: the cache of the B rows, which is extended in place.
          with_hidden: also return the hidden states.
        Returns: logits (B, V) fp32 and hidden states (B, d) after the last token; None instead of hidden states
          without `with_hidden`.
        """
        if self.cache_argument == "cache_params" and mask is not None:
            mask = mask[:, -ids.shape[1] :]  # a recurrent state has no columns, so there is no padding left to mask
        inputs = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": position,
            self.cache_argument: cache,
            "use_cache": True,
            "logits_to_keep": 1,
        }
        if not with_hidden:
            return self.model(**inputs).logits[:, -1].float(), None
        outputs, hidden = self.model.forward_with_hidden(**inputs)
        return outputs.logits[:, -1].float(), hidden[:, -1]

    def draw(
        self, logits: Tensor, hidden: Tensor | None, u: Tensor, trie: TokenTrie, node: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Choose the next token of each row.

        Args:
          logits: (S·B, V). S = 2 if each row also passes through the model under the null condition (no requested
            return), else 1; the rows under the null condition come last.
          hidden: (S·B, d) hidden states; used only if beta is not 0, else may be None.
          u: (B,) uniform random numbers in [0, 1).
          trie: the allowed replies.
          node: (B,) each row's node in the trie.
        Returns: three tensors (B,): token ids; their log-probabilities in nats under the distribution that they are
          drawn from; and their log-probabilities in nats under the unguided policy (conditioned on the requested
          return, if any).
        """
        config, rows, streams = self.config, len(u), len(logits) // len(u)
        null, logits = logits[-rows:], logits[:rows]  # the same rows if there is one stream
        # Q and V were trained under the null condition, whose rows come last.
        outputs = ModelOutputs(
            q=lambda ids: self.model.q_values(hidden[-rows:], candidates=ids),
            v=lambda: self.model.v_values(hidden[-rows:]),
            conditional=logits if streams == 2 else None,
            null=null,
        )
        log_prob, ids = next_token(trie.mask(null, node), config.form, outputs)
        column = (log_prob.argmax(-1) if config.temperature == 0.0 else sample_from(log_prob, u)).unsqueeze(-1)
        token = column if ids is None else ids.gather(-1, column)
        policy = logits / (config.temperature or 1.0)
        policy_log_prob = policy.gather(-1, token).squeeze(-1) - policy.logsumexp(-1)
        return token.squeeze(-1), log_prob.gather(-1, column).squeeze(-1), policy_log_prob

    def stop_at(self, tokens: list[int]) -> tuple[int, str] | None:
        """Find the first stop text in a reply's ids.

        Returns: the number of tokens up to its end, and the text before it; None if the reply has no stop text.
        """
        stop = self.config.stop

        def stopped(count: int) -> bool:
            text = self.renderer.decode(tokens[:count])
            return any(mark in text for mark in stop)

        if not stop or not stopped(len(tokens)):
            return None
        # If the first n tokens contain a stop text, so do the first n + 1: bisection finds the smallest such n.
        count = bisect.bisect_left(range(len(tokens)), True, key=stopped)
        text = self.renderer.decode(tokens[:count])
        return count, text[: min(text.index(mark) for mark in stop if mark in text)]


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """A context manager that puts a model in eval mode and restores each module's mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@dataclass
class _DecodingPass:
    """The state of one call of `Sampler.sample` or `Sampler.apply_head`. All lists have one entry per prompt.

    Args:
      sampler: the sampler.
      prompts: token ids, with return ids if a return is requested.
      seeds: random seeds.
      counters: number of tokens already drawn from each seed.
      options: token ids of the allowed replies; None = any reply.
      memory: the stored caches; None = no reuse.
      rows: key of each prompt in `memory`. The cache of its second stream, in which no return is requested, has the
        key ~row (bitwise not).
      streams: number of passes of each prompt through the model, 1 or 2.
      with_hidden: also compute hidden states.
    """

    sampler: Sampler
    prompts: list[list[int]]
    seeds: list[int]
    counters: list[int]
    options: list[list[tuple[int, ...]] | None]
    memory: CacheMemory | None
    rows: list[int]
    streams: int
    with_hidden: bool

    def replies(self) -> list[Reply]:
        """Decode all prompts and return the replies, in the order of the prompts."""
        self.done: list[Reply | None] = [None] * len(self.prompts)
        self.cached_tokens = self.cached()
        for chunk in self.chunks():
            self.decode(chunk)
        return self.done

    def apply_head(self, head: Callable[[Tensor, Tensor], Tensor]) -> list[Any]:
        """Apply a head to the model's output after the last token of each prompt.

        Args:
          head: maps hidden states (n, d) and logits (n, V) of n prompts to a tensor (n, ...).
        Returns: one number or nested list per prompt, in the order of the prompts.
        """
        found: list[Any] = [None] * len(self.prompts)
        self.cached_tokens = self.cached()
        for chunk in self.chunks():
            batch, logits, hidden = self.prefill(chunk, torch.zeros(len(chunk), dtype=torch.long))
            for i, value in zip(chunk, head(hidden, logits).tolist(), strict=True):
                found[i] = value
            self.store_cache(batch, list(range(len(chunk))), [[]] * len(chunk), 0)
        return found

    def cached(self) -> list[int]:
        """Return, per prompt, the number of tokens from its start that `memory` holds for each of its streams."""
        if self.memory is None:
            return [0] * len(self.prompts)
        self.memory.keep_only([*self.rows, *(~row for row in self.rows)])
        cached = list(map(self.memory.reusable, *self.streams_of(self.rows, self.prompts)))
        # `cached` lists stream 0 of all prompts, then stream 1: entries i, i + n belong to prompt i.
        return [min(cached[i :: len(self.prompts)]) for i in range(len(self.prompts))]

    def streams_of(self, rows: Sequence[int], prompts: Sequence[list[int]]) -> tuple[list[int], list[list[int]]]:
        """Return the keys in `memory` and the prompts of stream 0, followed by those of stream 1 if there is one.

        In stream 1, the null condition replaces the returns in the prompts.
        """
        if self.streams == 1:
            return list(rows), list(prompts)
        null = self.sampler.null
        # All ids above `null` are returns, so the minimum replaces each return by the null condition.
        return [*rows, *(~row for row in rows)], [*prompts, *([min(t, null) for t in ids] for ids in prompts)]

    def chunks(self) -> Iterator[list[int]]:
        """Yield the indices of the prompts in batches within MOST_TOKENS and MOST_LOGITS.

        Prompts are sorted by the number of their tokens that are not cached, most first, with equal prompts together.
        """
        most_rows, most_tokens = self.sampler.most_rows // self.streams or 1, MOST_TOKENS // self.streams
        unread = [len(prompt) - cached for prompt, cached in zip(self.prompts, self.cached_tokens, strict=True)]
        order = sorted(range(len(self.prompts)), key=lambda i: (-unread[i], self.prompts[i]))
        chunk: list[int] = []
        columns = 0
        for i in order:
            columns = max(columns, len(self.prompts[i]) + self.sampler.config.max_new_tokens)
            full = len(chunk) == most_rows or (len(chunk) + 1) * columns > most_tokens
            if chunk and (full or len(chunk) >= ENOUGH_ROWS and 2 * unread[i] < unread[chunk[0]]):
                yield chunk
                chunk, columns = [], len(self.prompts[i]) + self.sampler.config.max_new_tokens
            chunk.append(i)
        if chunk:
            yield chunk

    def prefill(self, chunk: list[int], node: Tensor) -> tuple[_Batch, Tensor, Tensor | None]:
        """Run the model on the tokens of each prompt that are not cached; equal prompts are run once.

        Args:
          chunk: indices of B prompts.
          node: (B,) each row's first node in the trie of allowed replies.
        Returns: the batch; the logits (S·B, V) and the hidden states (S·B, d) after each prompt, where S is the number
          of streams; None instead of hidden states if they are not computed.
        """
        device = self.sampler.model.device
        first: dict[tuple[int, ...], int] = {}
        for i in chunk:
            first.setdefault(tuple(self.prompts[i]), i)
        read = list(first.values())
        cached = [self.cached_tokens[i] for i in read] * self.streams
        keys, prompts = self.streams_of([self.rows[i] for i in read], [self.prompts[i] for i in read])
        cache = new_cache(self.sampler.model, self.sampler.config.max_new_tokens)
        mask = torch.zeros(len(keys), 0, dtype=torch.bool, device=device)
        if any(cached):
            mask = self.memory.gather(keys, cached, cache)
        unread = [torch.tensor(prompt[known:]) for prompt, known in zip(prompts, cached, strict=True)]
        ids = pad_sequence(unread, batch_first=True, padding_side="left").to(device)
        real = pad_sequence([torch.ones_like(new) for new in unread], batch_first=True, padding_side="left").to(device)
        # Both parts are padded on the left, so a row may also have padding between its cached and its new tokens.
        mask = torch.cat([mask, real.bool()], dim=1)
        padded = any(len(self.prompts[i]) < mask.shape[1] for i in read)
        position = (mask.cumsum(-1) - 1).clamp(min=0)  # padding does not count; the clamp is for padding itself
        # The cumulative sum needed the cached columns; the model gets the positions of the new ones only.
        position = position[:, -ids.shape[1] :]
        logits, hidden = self.sampler.forward(ids, mask if padded else None, position, cache, self.with_hidden)

        # Copy what was computed once per distinct prompt to all rows that share the prompt.
        place = {prompt: n for n, prompt in enumerate(first)}
        repeat = torch.tensor([place[tuple(self.prompts[i])] for i in chunk], device=device)
        all_streams = torch.cat([repeat + stream * len(read) for stream in range(self.streams)])
        if len(read) < len(chunk):
            cache.reorder_cache(all_streams)
        width, most = mask.shape[1], self.sampler.config.max_new_tokens
        drawn = torch.zeros(len(chunk), dtype=torch.long, device=device)
        log_prob = torch.zeros(len(chunk), most, device=device)
        batch = _Batch(
            index=torch.tensor(chunk, device=device),
            seed=torch.tensor([self.seeds[i] for i in chunk], device=device),
            counter=torch.tensor([self.counters[i] for i in chunk], device=device),
            node=node,
            # Rows end in the last column, which is never padding; `repeat` indexes stream 0, which comes first.
            length=position[repeat, -1] + 1,
            drawn=drawn,
            finished=torch.zeros_like(drawn, dtype=torch.bool),
            mask=torch.nn.functional.pad(mask[repeat], (0, most), value=True),
            tokens=torch.zeros_like(log_prob, dtype=torch.long),
            log_prob=log_prob,
            policy_log_prob=torch.zeros_like(log_prob),
            cache=cache,
            width=width,
            padded=padded,
            streams=self.streams,
        )
        return batch, logits[all_streams], None if hidden is None else hidden[all_streams]

    def decode(self, chunk: list[int]) -> None:
        """Draw the replies of these prompts, token by token.

        Between two checks for finished rows, finished rows keep drawing tokens, which are discarded.
        """
        sampler, most = self.sampler, self.sampler.config.max_new_tokens
        trie = TokenTrie([self.options[i] for i in chunk], sampler.model.device)
        batch, logits, hidden = self.prefill(chunk, trie.start)
        every = sync_every(logits.device)
        for step in range(most):
            u = uniform(batch.seed, batch.counter + step)
            token, log_prob, policy_log_prob = sampler.draw(logits, hidden, u, trie, batch.node)
            batch.tokens[:, step] = token
            batch.log_prob[:, step] = log_prob
            batch.policy_log_prob[:, step] = policy_log_prob
            batch.node = trie.step(batch.node, token)
            # Counted before `finished` is updated, so that the closing token counts too.
            batch.drawn += ~batch.finished
            batch.finished |= torch.isin(token, sampler.ends)
            if step + 1 == most or (step + 1) % every == 0:
                batch = self.without_finished(batch, step, everyone=step + 1 == most)
                if batch is None:
                    return
            # Columns count the padding of the batch; positions do not, so they start from each row's own length.
            columns, streams = batch.width + step + 1, batch.streams
            logits, hidden = sampler.forward(
                batch.tokens[:, step : step + 1].repeat(streams, 1),
                batch.mask[:, :columns].repeat(streams, 1) if batch.padded else None,
                (batch.length + step).unsqueeze(-1).repeat(streams, 1),
                batch.cache,
                self.with_hidden,
            )

    def without_finished(self, batch: _Batch, step: int, everyone: bool) -> _Batch | None:
        """Remove finished rows from the batch, if they are at least FINISHED_SHARE of it.

        Args:
          batch: the batch.
          step: index of the last token drawn, from 0.
          everyone: remove all rows, finished or not, because max_new_tokens is reached.
        Returns: the batch of the remaining rows; None if there are none.
        """
        if self.sampler.config.stop:
            stopped = [self.sampler.stop_at(tokens) is not None for tokens in batch.tokens[:, : step + 1].tolist()]
            batch.finished |= torch.tensor(stopped, device=batch.finished.device)
        finished = batch.finished.tolist()
        leaving = [i for i, row_finished in enumerate(finished) if row_finished or everyone]
        if len(leaving) < FINISHED_SHARE * len(finished) or not leaving:
            return batch
        self.finish_rows(batch, leaving, step)
        staying = [i for i, row_finished in enumerate(finished) if not (row_finished or everyone)]
        return batch.select(torch.tensor(staying, device=batch.finished.device)) if staying else None

    def finish_rows(self, batch: _Batch, leaving: list[int], step: int) -> None:
        """Store the replies and caches of the rows that leave the batch.

        A cache lacks the token that was drawn last, because the model has not read it yet.

        Args:
          batch: the batch.
          leaving: indices of these rows in the batch.
          step: index of the last token drawn, from 0.
        """
        rows = torch.tensor(leaving, device=batch.finished.device)
        places = batch.index[rows].tolist()
        drawn = batch.drawn[rows].tolist()
        tokens = [row[:n] for row, n in zip(batch.tokens[rows].tolist(), drawn, strict=True)]
        log_prob, policy_log_prob = batch.log_prob[rows].tolist(), batch.policy_log_prob[rows].tolist()
        for place, *reply in zip(places, tokens, log_prob, policy_log_prob, strict=True):
            self.done[place] = self.reply(place, *reply)
        self.store_cache(batch, leaving, tokens, step)

    def store_cache(self, batch: _Batch, leaving: list[int], tokens: list[list[int]], step: int) -> None:
        """Store the caches of these rows in `memory`, if there is one.

        Args:
          batch: the batch.
          leaving: indices of these rows in the batch.
          tokens: ids of each row's reply.
          step: number of columns after the prompt that the cache holds.
        """
        if self.memory is None:
            return
        rows = torch.tensor(leaving, device=batch.index.device)
        places = batch.index[rows].tolist()
        mask = batch.mask[rows, : batch.width + step]
        columns = torch.arange(step, device=rows.device)
        mask[:, batch.width :] = columns < batch.drawn[rows].unsqueeze(-1)  # hides what was drawn after the end
        # `step` and not step + 1: the model has not read the token that was drawn last.
        ids = [self.prompts[place] + row[:step] for place, row in zip(places, tokens, strict=True)]
        keys, ids = self.streams_of([self.rows[place] for place in places], ids)
        self.memory.store_cache(keys, ids, batch.cache, batch.in_cache(rows), mask.repeat(batch.streams, 1))

    def reply(self, place: int, tokens: list[int], log_prob: list[float], policy_log_prob: list[float]) -> Reply:
        stop = self.sampler.stop_at(tokens)
        count = len(tokens) if stop is None else stop[0]
        numbers = tuple(log_prob[:count]), tuple(policy_log_prob[:count])
        if stop is not None:
            return Reply(stop[1], None, *numbers)
        option = None if self.options[place] is None else self.sampler.option_of_ids[tuple(tokens)]
        text = self.sampler.renderer.decode(tokens) if option is None else option
        return Reply(text, tuple(tokens), *numbers, closed=tokens[-1] in self.sampler.close_ids)
