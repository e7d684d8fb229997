"""The sampler: draw replies by log π(a|s) + (1+w)·Δ_R + β·clip(reduce(Q) − V), in batches, with caches across turns.

Filters act on π first. Guidance acts on the tokens that survive them, because Q is only trained where there is data
(Snell et al. 2023, ILQL; the official code also filters before guidance). β, the reduction of the Q heads and the
clip are the settings `beta`, `q_reduce` and `clip`; w is `condition_scale`. With `candidates`, guidance is computed
only for the policy's k most probable tokens. A row is one prompt with its reply. The token loop is in
decoding/loop.py, and what happens in one of its batches in decoding/batch.py.

With a requested return R, Δ_R = log π(a|s,R) − log π(a|s). At w = β = 0 the sum is log π(a|s,R): one forward pass
conditioned on R is enough, and the filters act on π(a|s,R). Otherwise each row passes through the model in two
streams, in one batch and one cache: once with its returns and once with the null condition (no requested return) in
their place. The second stream gives π(a|s), on which the filters then act, and Q and V, which were trained under the
null condition.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from offline_lmrl.decoding.batch import Request
from offline_lmrl.decoding.cache import CacheMemory
from offline_lmrl.decoding.config import DecodingConfig
from offline_lmrl.decoding.constraints import OptionIds
from offline_lmrl.decoding.loop import SamplingLoop
from offline_lmrl.decoding.prompts import CachedModel, Prompts, evaluating
from offline_lmrl.errors import InputError
from offline_lmrl.logs.protocols import Reply
from offline_lmrl.models.adapters import part_of
from offline_lmrl.tokens.rendering import Renderer

CACHE_BYTES = 2**31  # limit on the caches that a session keeps between turns


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
        self.cached_model = CachedModel(model)
        self.checked(config)
        self.close_ids = renderer.close_ids if close_id is None else frozenset({close_id})
        self.ends = torch.tensor(sorted(self.close_ids), device=model.device)
        self.options = OptionIds(renderer)

    def checked(self, config: DecodingConfig) -> DecodingConfig:
        """Return the settings as rows use them: a top_k that keeps all tokens is none.

        Raises: InputError if the model lacks what they need.
        """
        name = type(self.model).__name__
        if config.beta != 0.0 and part_of(self.model, "value_heads") is None:
            raise InputError(f"beta: found {config.beta}, expected 0, as {name} has no value heads to guide it")
        if config.condition_scale != 0.0 and self.cached_model.null is None:
            raise InputError(
                f"condition_scale: found {config.condition_scale}, expected 0, as {name} has no null condition; train "
                "one with algorithm: return_conditioned and condition: embedding"
            )
        return config if (config.top_k or 0) < self.cached_model.vocabulary else replace(config, top_k=None)

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
        config, keys = self.config, list(rows or range(len(prompts)))
        counters, options = counters or [0] * len(prompts), options or [None] * len(prompts)
        requests = [
            Request(prompt, seed, config, counter, options=texts)
            for prompt, seed, counter, texts in zip(prompts, seeds, counters, options, strict=True)
        ]
        streams = max((self.cached_model.streams(config, prompt) for prompt in prompts), default=1)
        places, replies = {key: i for i, key in enumerate(keys)}, [None] * len(prompts)
        loop = SamplingLoop(self, memory, join_every=None)
        with evaluating(self.model):
            for chunk in self._prompts(prompts, memory, keys, streams).chunks():
                loop.add([requests[i] for i in chunk], [keys[i] for i in chunk])
                for key, reply in loop.replies():
                    replies[places[key]] = reply
        return replies

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
        model, keys = self.cached_model, list(rows or range(len(prompts)))
        given, found = self._prompts(prompts, memory, keys, streams=1), [None] * len(prompts)
        with evaluating(self.model):
            for chunk in given.chunks():
                read, outputs = given.read(chunk, frozenset({"hidden states"}))
                for i, value in zip(chunk, head(outputs.hidden, outputs.logits).tolist(), strict=True):
                    found[i] = value
                if memory is not None and model.keeps_tokens:
                    ids = [given.ids[i] for i in chunk]
                    model.store(memory, read, range(len(chunk)), [keys[i] for i in chunk], ids, [0] * len(chunk))
        return found

    def _prompts(
        self, prompts: Sequence[Sequence[int]], memory: CacheMemory | None, keys: Sequence[int], streams: int
    ) -> Prompts:
        """Return the prompts with what is cached of them; the caches of rows without a prompt are dropped."""
        if memory is not None:
            memory.keep_only([*keys, *(~key for key in keys)])
        reserve = [self.config.max_new_tokens] * len(prompts)
        return Prompts(self.cached_model, [list(prompt) for prompt in prompts], keys, memory, streams, reserve)
