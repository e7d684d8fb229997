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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from offline_lmrl.decoding.cache import CacheMemory
from offline_lmrl.decoding.config import DecodingConfig
from offline_lmrl.decoding.constraints import OptionIds, TokenTrie
from offline_lmrl.decoding.distribution import ModelOutputs, lookup_in, next_token
from offline_lmrl.decoding.prompts import CachedModel, LastOutputs, Prompts, Rows
from offline_lmrl.errors import InputError
from offline_lmrl.logs.protocols import Reply
from offline_lmrl.models.adapters import part_of
from offline_lmrl.ops.decoding import sample_from, uniform
from offline_lmrl.tokens.rendering import Renderer

FINISHED_SHARE = 0.25  # finished rows are removed from the batch once they make up this share of it
CACHE_BYTES = 2**31  # limit on the caches that a session keeps between turns


def sync_every(device: torch.device) -> int:
    """Return the number of tokens that are drawn between two checks for finished rows.

    On a GPU each check waits until the GPU has finished its queued work; on a CPU it costs nothing.
    """
    return 1 if device.type == "cpu" else 8


class Sampler:
    """A sampler that draws replies from a model.

    Args:
      model: any causal LM of transformers; guidance (beta other than 0) needs a guided model.
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
        self.model, self.renderer, self.config = model, renderer, config
        name = type(model).__name__
        if config.beta != 0.0 and part_of(model, "value_heads") is None:
            raise InputError(f"beta: found {config.beta}, expected 0, as {name} has no value heads to guide it")
        self.cached_model = CachedModel(model)
        if config.condition_scale != 0.0 and self.cached_model.null is None:
            raise InputError(
                f"condition_scale: found {config.condition_scale}, expected 0, as {name} has no null condition; train "
                "one with algorithm: return_conditioned and condition: embedding"
            )
        self.close_ids = renderer.close_ids if close_id is None else frozenset({close_id})
        self.ends = torch.tensor(sorted(self.close_ids), device=model.device)
        self.options = OptionIds(renderer, config.max_new_tokens)

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
        reads = frozenset().union(*(term.reads for term in self.config.terms()))
        if self.config.reads_all_of_q(self.model.device):
            reads |= {"all of Q"}
        # Without a requested return in any prompt, both streams would be equal, so one is enough.
        null = self.cached_model.null
        with_returns = null is not None and any(token > null for prompt in prompts for token in prompt)
        streams = 2 if with_returns and "null stream" in reads else 1
        given = self._prompts(prompts, memory, rows, streams)
        counters = counters or [0] * len(prompts)
        ids_of_options = [self.options.encode(texts) for texts in options or [None] * len(prompts)]
        replies: list[Reply | None] = [None] * len(prompts)
        with evaluating(self.model):
            for chunk, batch, outputs in given.batches(reads):
                trie = TokenTrie([ids_of_options[i] for i in chunk], self.model.device)
                u = self._random_numbers([seeds[i] for i in chunk], [counters[i] for i in chunk])
                decoding = _Decoding(self, given, trie, reads)
                for i, reply in decoding.replies(_Batch.start(batch, trie.start, u), outputs):
                    # The ids of an option need not decode to its very text.
                    exact = options is not None and options[i] is not None and reply.token_ids is not None
                    replies[i] = replace(reply, text=self.options.text_of[reply.token_ids]) if exact else reply
        return replies

    def _random_numbers(self, seeds: Sequence[int], counters: Sequence[int]) -> Tensor:
        """Return the uniform random numbers of all tokens of B replies, (B, max_new_tokens)."""
        device = self.model.device
        seed, counter = (torch.tensor(numbers, device=device).unsqueeze(-1) for numbers in (seeds, counters))
        return uniform(seed, counter + torch.arange(self.config.max_new_tokens, device=device))

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
        given = self._prompts(prompts, memory, rows, streams=1)
        found: list[Any] = [None] * len(prompts)
        with evaluating(self.model):
            for chunk, batch, outputs in given.batches(frozenset({"hidden states"})):
                for i, value in zip(chunk, head(outputs.hidden, outputs.logits).tolist(), strict=True):
                    found[i] = value
                given.store(batch, torch.arange(len(chunk), device=batch.index.device), [[]] * len(chunk), 0)
        return found

    def _prompts(
        self, prompts: Sequence[Sequence[int]], memory: CacheMemory | None, rows: Sequence[int] | None, streams: int
    ) -> Prompts:
        keys = list(rows or range(len(prompts)))
        reserve = self.config.max_new_tokens
        return Prompts(self.cached_model, [list(prompt) for prompt in prompts], keys, memory, streams, reserve)

    def draw(self, outputs: LastOutputs, u: Tensor, trie: TokenTrie, node: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Choose the next token of each row.

        Args:
          outputs: of S·B rows. S = 2 if each row also passes through the model under the null condition (no requested
            return), else 1; the rows under the null condition come last.
          u: (B,) uniform random numbers in [0, 1).
          trie: the allowed replies.
          node: (B,) each row's node in the trie.
        Returns: three tensors (B,): token ids; their log-probabilities in nats under the distribution that they are
          drawn from; and their log-probabilities in nats under the unguided policy (conditioned on the requested
          return, if any).
        """
        config, rows, two_streams = self.config, len(u), len(outputs.logits) > len(u)
        # Q and V were trained under the null condition; with one stream both are the same rows.
        logits, null = outputs.logits[:rows], outputs.select(slice(-rows, None))
        read = ModelOutputs(
            q=lookup_in(null.q)
            if null.q is not None
            else lambda ids: self.model.q_values(null.hidden, candidates=ids),
            v=lambda: self.model.v_values(null.hidden),
            conditional=logits if two_streams else None,
            null=null.logits,
        )
        log_prob, ids = next_token(trie.mask(null.logits, node), config, read)
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

    def reply(self, tokens: list[int], log_prob: list[float], policy_log_prob: list[float]) -> Reply:
        """Return the reply of these tokens, cut before a stop text, with the log-probabilities of each in nats."""
        stop = self.stop_at(tokens)
        count = len(tokens) if stop is None else stop[0]
        numbers = tuple(log_prob[:count]), tuple(policy_log_prob[:count])
        if stop is not None:
            return Reply(stop[1], None, *numbers)
        ids = tuple(tokens)
        return Reply(self.renderer.decode(tokens), ids, *numbers, closed=tokens[-1] in self.close_ids)


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
class _Batch(Rows):
    """B rows that are decoded together. All tensors are on the model's device, long if not named otherwise.

    Args: those of `Rows`, and
      node: (B,) current node of each row in the trie of allowed replies (`TokenTrie`).
      u: (B, max_new_tokens) fp64, the random number by which each token is drawn.
      drawn: (B,) number of tokens of the reply so far.
      finished: (B,) bool, True once the reply has ended.
      tokens: (B, max_new_tokens) ids drawn.
      log_prob: (B, max_new_tokens) fp32, log π of each token in the distribution that it was drawn from, in nats.
      policy_log_prob: (B, max_new_tokens) fp32, log π of each token under the unguided policy, in nats.
    """

    node: Tensor
    u: Tensor
    drawn: Tensor
    finished: Tensor
    tokens: Tensor
    log_prob: Tensor
    policy_log_prob: Tensor

    @classmethod
    def start(cls, rows: Rows, node: Tensor, u: Tensor) -> "_Batch":
        """Return the batch before its first token; arguments as for the class."""
        drawn, log_prob = torch.zeros_like(rows.index), torch.zeros_like(u, dtype=torch.float32)
        return cls(
            **vars(rows),
            node=node,
            u=u,
            drawn=drawn,
            finished=torch.zeros_like(drawn, dtype=torch.bool),
            tokens=torch.zeros_like(u, dtype=torch.long),
            log_prob=log_prob,
            policy_log_prob=torch.zeros_like(log_prob),
        )


@dataclass
class _Decoding:
    """The token loop over one batch.

    Args:
      sampler: the sampler.
      prompts: all prompts of the call.
      trie: the allowed replies of the batch.
      reads: what the model computes beside the logits.
    """

    sampler: Sampler
    prompts: Prompts
    trie: TokenTrie
    reads: frozenset[str]

    def replies(self, batch: _Batch, outputs: LastOutputs) -> Iterator[tuple[int, Reply]]:
        """Draw the replies, token by token; yield the index of the prompt and the reply of rows that have finished.

        Between two checks for finished rows, finished rows keep drawing tokens, which are discarded.
        """
        sampler, most = self.sampler, self.sampler.config.max_new_tokens
        every = sync_every(outputs.logits.device)
        for step in range(most):
            token, log_prob, policy_log_prob = sampler.draw(outputs, batch.u[:, step], self.trie, batch.node)
            batch.tokens[:, step] = token
            batch.log_prob[:, step] = log_prob
            batch.policy_log_prob[:, step] = policy_log_prob
            batch.node = self.trie.step(batch.node, token)
            # Counted before `finished` is updated, so that the closing token counts too.
            batch.drawn += ~batch.finished
            batch.finished |= torch.isin(token, sampler.ends)
            last = step + 1 == most
            if last or (step + 1) % every == 0:
                leaving, staying = self._parted(batch, step, last)
                if leaving:
                    yield from self._finish(batch, leaving, step)
                    if not staying:
                        return
                    batch = batch.select(torch.tensor(staying, device=token.device))
            outputs = sampler.cached_model.next(batch, batch.tokens[:, step], step, self.reads)

    def _parted(self, batch: _Batch, step: int, last: bool) -> tuple[list[int], list[int]]:
        """Return the rows that leave the batch and those that stay.

        Finished rows leave once they are FINISHED_SHARE of the batch.

        Args:
          batch: the batch.
          step: index of the last token drawn, from 0.
          last: True: all rows leave, finished or not, because max_new_tokens is reached.
        """
        if self.sampler.config.stop:
            stopped = [self.sampler.stop_at(tokens) is not None for tokens in batch.tokens[:, : step + 1].tolist()]
            batch.finished |= torch.tensor(stopped, device=batch.finished.device)
        finished = batch.finished.tolist()
        if last:
            return list(range(len(finished))), []
        if sum(finished) < FINISHED_SHARE * len(finished):
            return [], list(range(len(finished)))
        return [i for i, done in enumerate(finished) if done], [i for i, done in enumerate(finished) if not done]

    def _finish(self, batch: _Batch, leaving: list[int], step: int) -> Iterator[tuple[int, Reply]]:
        """Yield the replies of the rows that leave the batch, and store their caches.

        A cache lacks the token that was drawn last, because the model has not read it yet.

        Args:
          batch: the batch.
          leaving: indices of these rows in the batch.
          step: index of the last token drawn, from 0.
        """
        rows = torch.tensor(leaving, device=batch.finished.device)
        drawn = batch.drawn[rows].tolist()
        tokens = [row[:n] for row, n in zip(batch.tokens[rows].tolist(), drawn, strict=True)]
        numbers = batch.log_prob[rows].tolist(), batch.policy_log_prob[rows].tolist()
        for i, *reply in zip(batch.index[rows].tolist(), tokens, *numbers, strict=True):
            yield i, self.sampler.reply(*reply)
        self.prompts.store(batch, rows, tokens, step)
