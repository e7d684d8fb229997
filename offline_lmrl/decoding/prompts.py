"""Running a causal LM on prompts in batches, from where their caches end.

A row is one prompt with what the model adds to it. With two streams each row passes through the model twice, in one
batch and one cache: once with its requested returns, and once with the null condition (no requested return) in their
place. Cache and outputs then have 2 · B rows; those under the null condition come last.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel

from offline_lmrl.decoding.cache import CacheMemory, cache_argument, is_kept_per_token, joined_cache, new_cache
from offline_lmrl.decoding.distribution import Form
from offline_lmrl.decoding.one_token import Step, one_token_step
from offline_lmrl.models.adapters import part_of
from offline_lmrl.models.value_heads import forward_with_q, logits_and_q

MOST_TOKENS = 32_768  # limit on rows × (prompt + longest reply) in one batch
MOST_LOGITS = 2**25  # limit on rows × vocabulary in one batch
ENOUGH_ROWS = 64  # a batch with this many rows is closed at the first prompt with less than half as much to read


class LastOutputs(NamedTuple):
    """What a model computed after the last token of R rows.

    logits: (R, V), fp32.
    hidden: hidden states, (R, d); None = not asked for.
    q: Q of all tokens, (H, R, V); None = not asked for.
    """

    logits: Tensor
    hidden: Tensor | None = None
    q: Tensor | None = None

    def select(self, rows: Tensor | slice) -> "LastOutputs":
        """Return the outputs of only these rows."""
        hidden, q = self.hidden, self.q
        return LastOutputs(
            self.logits[rows], None if hidden is None else hidden[rows], None if q is None else q[:, rows]
        )

    def followed_by(self, other: "LastOutputs") -> "LastOutputs":
        """Return the outputs of these rows and then of others, for which the same was asked for."""
        hidden = None if self.hidden is None else torch.cat([self.hidden, other.hidden])
        q = None if self.q is None else torch.cat([self.q, other.q], dim=1)
        return LastOutputs(torch.cat([self.logits, other.logits]), hidden, q)


@dataclass
class Rows:
    """A batch of B rows in the model's cache. All tensors are on the model's device.

    Args:
      length: (B,) long, number of tokens of each row that the model has read.
      last: (B,) long, the last position of each row; rows that are finished but still in the batch stay there.
      mask: (B, width + the most tokens to come) bool, False at padding.
      cache: keys and values of streams · B rows.
      width: number of columns of the cache, padding included.
      padded: True if any row has padding.
      streams: 1 or 2.
    """

    length: Tensor
    last: Tensor
    mask: Tensor
    cache: DynamicCache
    width: int
    padded: bool
    streams: int

    def in_cache(self, rows: Tensor) -> Tensor:
        """Return the cache rows (streams · R,) of R batch rows (R,): all of stream 0, then all of stream 1, if any."""
        return torch.cat([rows + stream * len(self.length) for stream in range(self.streams)])

    def select(self, rows: Tensor) -> "Rows":
        """Return a batch of only these rows, (R,) indices; the cache is changed in place.

        Columns at the start that are padding in all of them are dropped, if the cache has columns.
        """
        first, mask, in_cache = 0, self.mask[rows], self.in_cache(rows)
        if is_kept_per_token(self.cache):
            first = _first_needed(mask[:, : self.width]) if self.padded else 0
            for layer in self.cache.layers:
                if layer.is_initialized:  # others use the keys and values of another one
                    layer.keep(in_cache, first)
        else:
            self.cache.reorder_cache(in_cache)  # recurrent layers lack batch_select_indices, but have this
        mask, width = mask[:, first:], self.width - first
        padded = self.padded and not bool(mask[:, :width].all())
        return Rows(self.length[rows], self.last[rows], mask, self.cache, width, padded, self.streams)

    def joined_by(self, rows: Tensor, others: "Rows", reserve: int) -> "Rows":
        """Return a batch of these rows, (R,) indices, and then of all rows of another batch, right-aligned.

        Both are kept per token, in one stream.
        """
        everyone = len(rows) == len(self.length)  # then their caches are copied once and not twice
        return _joined([(self, None if everyone else rows), (others, None)], reserve)


def _first_needed(mask: Tensor) -> int:
    """Return the first column of a mask (B, L) that holds a token of some row."""
    return int(mask.any(0).int().argmax())


def _joined(parts: Sequence[tuple[Rows, Tensor | None]], reserve: int) -> Rows:
    """Return a batch of the rows (R,) of each part, None = all; see `Rows.joined_by`."""
    everything = slice(None)
    lengths, lasts, masks, taken = [], [], [], []
    for rows, chosen in parts:
        own = everything if chosen is None else chosen
        mask = rows.mask[own, : rows.width]
        first = _first_needed(mask) if rows.padded else 0
        lengths.append(rows.length[own])
        lasts.append(rows.last[own])
        masks.append(mask[:, first:])
        taken.append((rows.cache, None if chosen is None else rows.in_cache(chosen), first))
    width = max(mask.shape[1] for mask in masks)
    mask = torch.cat([torch.nn.functional.pad(mask, (width - mask.shape[1], 0), value=False) for mask in masks])
    return Rows(
        length=torch.cat(lengths),
        last=torch.cat(lasts),
        mask=torch.nn.functional.pad(mask, (0, reserve), value=True),
        cache=joined_cache(taken, width, reserve),
        width=width,
        padded=not bool(mask.all()),
        streams=parts[0][0].streams,
    )


class CachedModel:
    """A causal LM that runs on tokens which follow cached ones.

    Args:
      model: any causal LM of transformers; hidden states and Q need a guided model.
    Attributes:
      null: the id of the null condition, which comes after the vocabulary and before the ids of the return bins; None
        for a model without returns.
      vocabulary: the number of tokens.
      keeps_tokens: True if the cache has an entry per token, so that caches can be reused in part, and joined.
      step: the one-token step of the decoder; None = its own forward.

    Raises: InputError if the model takes no cache.
    """

    def __init__(self, model: PreTrainedModel):
        self.model, self.cache_argument = model, cache_argument(model)
        conditioned = part_of(model, "return_embedding") is not None
        self.null = model.get_input_embeddings().weight.shape[0] if conditioned else None
        self.vocabulary = model.config.get_text_config().vocab_size
        self.keeps_tokens = is_kept_per_token(new_cache(model, 0))
        self.step: Step | None = None

    def fits(self, rows: int, columns: int, streams: int) -> bool:
        """True if a batch of so many rows and columns (prompt and longest reply) is within the limits."""
        within = rows * streams <= MOST_LOGITS // self.vocabulary and rows * columns * streams <= MOST_TOKENS
        return rows == 1 or within

    def forward(
        self, ids: Tensor, mask: Tensor | None, position: Tensor, cache: DynamicCache, reads: frozenset[str]
    ) -> LastOutputs:
        """Run the model on T tokens per row, which follow the cached ones.

        Args:
          ids: (B, T) token ids.
          mask: (B, cached + T) bool, True at real tokens; None = no padding anywhere.
          position: (B, T) position ids.
          cache: the cache of the B rows, which is extended in place.
          reads: what to compute beside the logits: "hidden states", or "all of Q", which includes them.
        Returns: the outputs after the last token.
        """
        if self.cache_argument == "cache_params" and mask is not None:
            mask = mask[:, -ids.shape[1] :]  # a recurrent state has no columns, so there is no padding left to mask
        if ids.shape[1] == 1 and self.step is not None:
            mask = None if mask is None else mask[:, None, None]
            return self._after(self.step(self._embedded(ids), mask, position, cache), reads)
        inputs = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": position,
            self.cache_argument: cache,
            "use_cache": True,
            "logits_to_keep": 1,
        }
        if "all of Q" in reads:
            outputs, hidden, q = forward_with_q(self.model, **inputs)
            return LastOutputs(outputs.logits[:, -1].float(), hidden[:, -1], q[:, :, -1])
        if "hidden states" in reads:
            outputs, hidden = self.model.forward_with_hidden(**inputs)
            return LastOutputs(outputs.logits[:, -1].float(), hidden[:, -1])
        return LastOutputs(self.model(**inputs).logits[:, -1].float())

    def _embedded(self, ids: Tensor) -> Tensor:
        """Return the embeddings (B, T, d) of ids, those of requested returns included."""
        embedding, returns = self.model.get_input_embeddings(), part_of(self.model, "return_embedding")
        return embedding(ids) if returns is None else returns(ids, embedding)

    def _after(self, hidden: Tensor, reads: frozenset[str]) -> LastOutputs:
        """Return the outputs at the decoder's last hidden states (B, 1, d) of a model with a one-token step."""
        if "all of Q" in reads:
            logits, q = logits_and_q(self.model, hidden)
            return LastOutputs(logits[:, -1].float(), hidden[:, -1], q[:, :, -1])
        logits = self.model.get_output_embeddings()(hidden)[:, -1].float()
        return LastOutputs(logits, hidden[:, -1] if "hidden states" in reads else None)

    def next(self, rows: Rows, tokens: Tensor, reads: frozenset[str]) -> LastOutputs:
        """Run the model on the token that was drawn for each row; `rows` is changed in place.

        Args:
          rows: the batch.
          tokens: (B,) the drawn tokens.
          reads: as in `forward`.
        """
        # Columns count the padding of the batch; positions do not, so they start from each row's own length.
        rows.width = rows.width + 1
        position = torch.minimum(rows.length, rows.last).unsqueeze(-1)
        rows.length = rows.length + 1
        ids, mask = tokens.unsqueeze(-1), rows.mask[:, : rows.width] if rows.padded else None
        if rows.streams > 1:
            ids, position = ids.repeat(rows.streams, 1), position.repeat(rows.streams, 1)
            mask = None if mask is None else mask.repeat(rows.streams, 1)
        return self.forward(ids, mask, position, rows.cache, reads)

    def streams(self, form: Form, prompt: Sequence[int]) -> int:
        """Return the number of passes that a prompt needs: 2 if a term of the form compares it with no request."""
        if self.null is None or not any("null stream" in term.reads for term in form.terms()):
            return 1
        # Without a requested return both streams would be equal, so one is enough.
        return 2 if any(token > self.null for token in prompt) else 1

    def streams_of(
        self, keys: Sequence[int], ids: Sequence[list[int]], streams: int
    ) -> tuple[list[int], list[list[int]]]:
        """Return the keys of caches and the ids of stream 0, followed by those of stream 1 if there is one.

        In stream 1, whose keys are ~key (bitwise not), the null condition replaces the requested returns.
        """
        if streams == 1:
            return list(keys), list(ids)
        # All ids above `null` are returns, so the minimum replaces each return by the null condition.
        return [*keys, *(~key for key in keys)], [*ids, *([min(t, self.null) for t in own] for own in ids)]

    def store(
        self,
        memory: CacheMemory,
        rows: Rows,
        leaving: Sequence[int],
        keys: Sequence[int],
        ids: Sequence[list[int]],
        unused: Sequence[int],
    ) -> None:
        """Store the caches of R rows of a batch.

        Args:
          memory: where they are stored.
          rows: the batch.
          leaving: indices of the R rows in it.
          keys: the key of each.
          ids: the ids of each that its cache holds.
          unused: the number of columns at the end of the cache that do not belong to each.
        """
        device = rows.mask.device
        chosen, unused = torch.tensor(leaving, device=device), torch.tensor(unused, device=device)
        own = torch.arange(rows.width, device=device) < rows.width - unused.unsqueeze(-1)
        mask = rows.mask[chosen, : rows.width] & own
        keys, ids = self.streams_of(keys, ids, rows.streams)
        memory.store_cache(keys, ids, rows.cache, rows.in_cache(chosen), mask.repeat(rows.streams, 1))


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """A context manager that puts a model in eval mode and restores each module's mode afterwards."""
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@dataclass
class Prompts:
    """The prompts of one call, with what is cached of them. Lists have one entry per prompt.

    Args:
      model: the model.
      ids: token ids, with return ids if a return is requested; at least one id each.
      keys: key of each prompt in `memory`. The cache of its second stream has the key ~key (bitwise not).
      memory: the stored caches; None = no reuse. Sliding windows and recurrent states cannot be cut to the first
        tokens of a prompt, so a model that has these reuses none.
      streams: number of passes of each prompt through the model, 1 or 2.
      reserve: most tokens that will be added to each prompt.
    """

    model: CachedModel
    ids: list[list[int]]
    keys: list[int]
    memory: CacheMemory | None
    streams: int
    reserve: list[int]

    def _cached(self, which: Sequence[int]) -> list[int]:
        """Return, for each of these prompts, the number of tokens from its start that are cached for each stream."""
        if self.memory is None or not self.model.keeps_tokens:
            return [0] * len(which)
        keys, ids = [self.keys[i] for i in which], [self.ids[i] for i in which]
        held = list(map(self.memory.reusable, *self.model.streams_of(keys, ids, self.streams)))
        # `held` lists stream 0 of all prompts, then stream 1: entries i, i + n belong to prompt i.
        return [min(held[i :: len(which)]) for i in range(len(which))]

    def chunks(self) -> Iterator[list[int]]:
        """Yield the indices of the prompts in batches within MOST_TOKENS and MOST_LOGITS.

        Prompts are sorted by the number of their tokens that are not cached, most first, with equal prompts together.
        """
        unread = [len(ids) - n for ids, n in zip(self.ids, self._cached(range(len(self.ids))), strict=True)]
        chunk: list[int] = []
        columns = 0
        for i in sorted(range(len(self.ids)), key=lambda i: (-unread[i], self.ids[i])):
            own = len(self.ids[i]) + self.reserve[i]
            columns = max(columns, own)
            full = not self.model.fits(len(chunk) + 1, columns, self.streams)
            if chunk and (full or len(chunk) >= ENOUGH_ROWS and 2 * unread[i] < unread[chunk[0]]):
                yield chunk
                chunk, columns = [], own
            chunk.append(i)
        if chunk:
            yield chunk

    def read(self, chunk: list[int], reads: frozenset[str]) -> tuple[Rows, LastOutputs]:
        """Run the model on the tokens of these prompts that are not cached; equal prompts are run once.

        Returns: the rows, and the outputs after each prompt.
        """
        device, reserve = self.model.model.device, max(self.reserve[i] for i in chunk)
        self.model.step = one_token_step(self.model.model)  # anew, as hooks and adapters may have come or gone
        distinct: dict[tuple[int, ...], int] = {}
        for i in chunk:
            distinct.setdefault(tuple(self.ids[i]), i)
        first = list(distinct.values())
        keys, prompts = self.model.streams_of(
            [self.keys[i] for i in first], [self.ids[i] for i in first], self.streams
        )
        cached = self._cached(first) * self.streams  # anew, as the chunks before may have taken its place in memory
        cache = new_cache(self.model.model, reserve)
        mask = torch.zeros(len(keys), 0, dtype=torch.bool, device=device)
        if any(cached):
            mask = self.memory.gather(keys, cached, cache)
        unread = [torch.tensor(ids[known:]) for ids, known in zip(prompts, cached, strict=True)]
        ids = pad_sequence(unread, batch_first=True, padding_side="left").to(device)
        real = pad_sequence([torch.ones_like(new) for new in unread], batch_first=True, padding_side="left").to(device)
        # Both parts are padded on the left, so a row may also have padding between its cached and its new tokens.
        mask = torch.cat([mask, real.bool()], dim=1)
        padded = any(len(self.ids[i]) < mask.shape[1] for i in first)
        position = (mask.cumsum(-1) - 1).clamp(min=0)  # padding does not count; the clamp is for padding itself
        # The cumulative sum needed the cached columns; the model gets the positions of the new ones only.
        position = position[:, -ids.shape[1] :]
        outputs = self.model.forward(ids, mask if padded else None, position, cache, reads)

        # Copy what was computed once per distinct prompt to all rows that share the prompt.
        place = {prompt: n for n, prompt in enumerate(distinct)}
        own = torch.tensor([place[tuple(self.ids[i])] for i in chunk], device=device)
        all_streams = torch.cat([own + stream * len(first) for stream in range(self.streams)])
        if len(first) < len(chunk):
            cache.reorder_cache(all_streams)
        length = position[own, -1] + 1  # rows end in the last column; `own` indexes stream 0, which comes first
        rows = Rows(
            length=length,
            last=length + torch.tensor([self.reserve[i] - 1 for i in chunk], device=device),
            mask=torch.nn.functional.pad(mask[own], (0, reserve), value=True),
            cache=cache,
            width=mask.shape[1],
            padded=padded,
            streams=self.streams,
        )
        return rows, outputs.select(all_streams)
