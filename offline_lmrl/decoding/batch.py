"""Rows that are decoded together: the draws on the model's device, and what is known of each row on the CPU.

The random numbers of a row are a hash of its seed and of the number of tokens drawn so far, and its settings are its
own, so that its sample does not depend on the batch it is in.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from offline_lmrl.decoding.cache import CacheMemory
from offline_lmrl.decoding.config import DecodingConfig
from offline_lmrl.decoding.constraints import TokenTrie
from offline_lmrl.decoding.distribution import Form, ModelOutputs, divisor, lookup_in, next_token
from offline_lmrl.decoding.prompts import LastOutputs, Rows
from offline_lmrl.decoding.texts import TextStream
from offline_lmrl.errors import InputError
from offline_lmrl.logs.protocols import Reply
from offline_lmrl.ops.decoding import sample_from, uniform

if TYPE_CHECKING:
    from offline_lmrl.decoding.sampler import Sampler

FAILED = (
    "decoding: found probabilities that are not numbers, expected finite ones; a setting such as beta or temperature "
    "is too large or too small, or the model's weights are not finite"
)


@dataclass(frozen=True)
class Request:
    """A prompt that asks for one reply.

    Args:
      prompt: token ids up to and including the opening of the turn to draw (such as a role header), at least one.
      seed: the seed of the reply's random numbers.
      config: how the reply is decoded.
      counter: number of tokens already drawn from the seed, which is where its random numbers continue.
      top: number of the most probable tokens that are reported with each token.
      options: the only texts allowed as the reply; None = any text.
    """

    prompt: Sequence[int]
    seed: int
    config: DecodingConfig
    counter: int = 0
    top: int = 0
    options: Sequence[str] | None = None


@dataclass
class Row:
    """One reply that is drawn, as known on the CPU.

    Args:
      key: the key of the row.
      request: what it replies to.
      form: the settings of its distribution.
      text: its text, as far as it was followed.
      options: token ids of each allowed reply; None = any.
      source: the key of the cache that its prompt continues; None = the one that holds most of the prompt.
    Attributes:
      tokens: the ids that were reported so far.
      log_prob: log π of each in the distribution that it was drawn from, in nats.
      policy_log_prob: log π of each under the unguided policy, in nats.
      top: ids and log π of the most probable tokens at each.
      pieces: the text that became final with each token since the last event.
      before: number of tokens that were drawn before the row joined its batch.
      count: number of tokens of the reply; None = not finished.
      finished: why it ended: "stop", "length", "failed" (the last probability is not a number), or "cancelled" (its
        rest is not wanted); None = not finished.
    """

    key: int
    request: Request
    form: Form
    text: TextStream
    options: list[tuple[int, ...]] | None
    source: int | None
    tokens: list[int] = field(default_factory=list)
    log_prob: list[float] = field(default_factory=list)
    policy_log_prob: list[float] = field(default_factory=list)
    top: list[list[tuple[int, float]]] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    before: int = 0
    count: int | None = None
    finished: str | None = None

    def add(self, tokens: list[int], log_prob: list[float], policy_log_prob: list[float]) -> None:
        """Add tokens with their log π, up to the end of the reply, or up to one whose log π is not a number."""
        end = None if self.count is None else max(0, self.count - len(self.tokens))
        broken = next((place for place, value in enumerate(log_prob[:end], 1) if math.isnan(value)), None)
        if broken is not None:
            self.finished, self.count, end = "failed", len(self.tokens) + broken, broken
        self.tokens += tokens[:end]
        self.log_prob += log_prob[:end]
        self.policy_log_prob += policy_log_prob[:end]

    def follow(self) -> None:
        """Decode the tokens that were added, and end the reply at a stop text."""
        for place in range(len(self.text.tokens), len(self.tokens)):
            self.pieces.append(self.text.add(self.tokens[place], last=place + 1 == self.count))
            if self.text.stopped and self.finished != "failed":
                self.finished, self.count = "stop", place + 1
                for numbers in (self.tokens, self.log_prob, self.policy_log_prob):
                    del numbers[self.count :]
                return

    def reply(self, sampler: "Sampler") -> Reply:
        """Return the finished reply; after a stop text it has no token_ids, as these decode to more than its text.

        Raises: InputError if it has failed.
        """
        if self.finished == "failed":
            raise InputError(FAILED)
        numbers = tuple(self.log_prob), tuple(self.policy_log_prob)
        if self.text.stopped:
            return Reply(self.text.text, None, *numbers)
        ids = tuple(self.tokens)
        # The ids of an option need not decode to its very text.
        text = sampler.renderer.decode(ids) if self.options is None else sampler.options.text_of[ids]
        return Reply(text, ids, *numbers, closed=ids[-1] in sampler.close_ids)


class Batch:
    """B rows that are decoded together. All tensors are on the model's device.

    Args:
      sampler: the sampler.
      rows: the rows.
      read: their place in the model's cache.
      outputs: what the model computed after the last token of each.
      trie: the allowed replies; None = any.
    Attributes:
      form: the settings of the rows.
      reads: what the model computes beside the logits.
      most_top: the largest `Request.top`.
      drawn: number of tokens that were drawn for each row in this batch; `reported` of them were added to the rows.
      u: (B, most) fp64, the random numbers by which the tokens are drawn.
      tokens: (B, most) long, the drawn ids.
      log_prob: (B, most) fp32, log π of each in the distribution that it was drawn from, in nats.
      policy_log_prob: (B, most) fp32, log π of each under the unguided policy, in nats.
      counted: (B,) long, number of tokens drawn, up to a closing one.
      closed: (B,) bool, True after a closing token.
      node: (B,) long, current node of each row in the trie; None without a trie.
    """

    def __init__(
        self, sampler: "Sampler", rows: list[Row], read: Rows, outputs: LastOutputs, trie: TokenTrie | None = None
    ):
        self.sampler, self.rows, self.read, self.trie = sampler, rows, read, trie
        self.outputs: LastOutputs | None = outputs
        self.form, self.reads = form_and_reads(rows, read.mask.device)
        self.drawn = self.reported = 0
        for row in rows:
            row.before = len(row.tokens)
        device = read.mask.device
        seed = torch.tensor([row.request.seed for row in rows], device=device).unsqueeze(-1)
        counter = torch.tensor([row.request.counter + row.before for row in rows], device=device).unsqueeze(-1)
        self.u = uniform(seed, counter + torch.arange(self.most_left, device=device))
        self.tokens = torch.zeros_like(self.u, dtype=torch.long)
        self.log_prob = torch.zeros_like(self.u, dtype=torch.float32)
        self.policy_log_prob = torch.zeros_like(self.log_prob)
        self.counted = torch.zeros_like(read.length)
        self.closed = torch.zeros_like(read.length, dtype=torch.bool)
        self.node = None if trie is None else trie.start
        self.most_top = max(row.request.top for row in rows)
        self.top: list[tuple[list[list[int]], list[list[float]]]] = []  # per token not reported, ids and log π

    @property
    def live(self) -> list[int]:
        """The indices of the rows that are not finished."""
        return [i for i, row in enumerate(self.rows) if row.finished is None]

    @property
    def idle(self) -> int:
        """The number of tokens that were drawn for finished rows which are still in the batch."""
        return sum(row.before + self.drawn - row.count for row in self.rows if row.finished is not None)

    @property
    def most_left(self) -> int:
        """The most tokens that may still be drawn for a row that is not finished."""
        return max(
            row.request.config.max_new_tokens - row.before - self.drawn for row in self.rows if not row.finished
        )

    def read_last(self, reads: frozenset[str]) -> LastOutputs:
        """Return what the model computes after the latest token, which it reads if it has not."""
        if self.outputs is None:
            self.outputs = self.sampler.cached_model.next(self.read, self.tokens[:, self.drawn - 1], reads)
        return self.outputs

    def draw(self) -> None:
        """Draw the next token of every row; those of finished rows are not used."""
        at = self.drawn
        token, log_prob, policy_log_prob = self._choose(self.read_last(self.reads), self.u[:, at])
        self.outputs = None
        self.tokens[:, at] = token
        self.log_prob[:, at] = log_prob
        self.policy_log_prob[:, at] = policy_log_prob
        if self.trie is not None:
            self.node = self.trie.step(self.node, token)
        # Counted before `closed` is updated, so that the closing token counts too.
        self.counted += ~self.closed
        self.closed |= torch.isin(token, self.sampler.ends)
        self.drawn += 1

    def _choose(self, outputs: LastOutputs, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Choose the next token of each row.

        Args:
          outputs: of S·B rows. S = 2 if each row also passes through the model under the null condition (no requested
            return), else 1; the rows under the null condition come last.
          u: (B,) uniform random numbers in [0, 1).
        Returns: three tensors (B,): token ids; their log-probabilities in nats under the distribution that they are
          drawn from; and their log-probabilities in nats under the unguided policy (conditioned on the requested
          return, if any).
        """
        form, count, model = self.form, len(u), self.sampler.model
        # Q and V were trained under the null condition; with one stream both are the same rows.
        logits, null = outputs.logits[:count], outputs.select(slice(-count, None))
        read = ModelOutputs(
            q=lookup_in(null.q) if null.q is not None else lambda ids: model.q_values(null.hidden, candidates=ids),
            v=lambda: model.v_values(null.hidden),
            conditional=logits if self.read.streams == 2 else None,
            null=null.logits,
        )
        allowed = null.logits if self.trie is None else self.trie.mask(null.logits, self.node)
        guided = bool(form.terms())
        scores, ids = next_token(allowed, form, read, normalised=guided)
        column, total = _drawn_column(scores, form.temperature, u)
        token = column if ids is None else ids.gather(-1, column)
        if self.most_top:
            values, best = scores.topk(min(self.most_top, scores.shape[-1]), dim=-1)
            best = best if ids is None else ids.gather(-1, best)
            self.top.append((best.tolist(), (values - total).float().tolist()))
        log_prob = (scores.gather(-1, column) - total).squeeze(-1)
        if form.keeps_all and not guided and self.trie is None:
            return token.squeeze(-1), log_prob, log_prob  # drawn from the policy itself
        policy = logits / divisor(form.temperature)
        policy_log_prob = policy.gather(-1, token).squeeze(-1) - policy.logsumexp(-1)
        return token.squeeze(-1), log_prob, policy_log_prob

    def check(self, follow: bool) -> None:
        """Find the rows that have finished.

        Args:
          follow: True: add the new tokens to the rows and decode them. False: do so only where a stop text may end a
            reply.
        """
        if not follow:
            self.top = []  # only events hold them
        closed, counted = self.closed.tolist(), self.counted.tolist()
        for row, is_closed, count in zip(self.rows, closed, counted, strict=True):
            most = row.request.config.max_new_tokens
            if row.finished is None and is_closed and row.before + count <= most:
                row.finished, row.count = "stop", row.before + count
            elif row.finished is None and row.before + self.drawn >= most:
                row.finished, row.count = "length", most
        followed = [row for row in self.rows if follow or row.request.config.stop]
        if followed:
            self.report(range(len(self.rows)))
        for row in followed:
            row.follow()

    def report(self, which: Sequence[int]) -> None:
        """Add the tokens that were drawn to all rows, or to those that are leaving the batch."""
        new, rows = slice(self.reported, self.drawn), torch.tensor(which, device=self.tokens.device)
        found = [numbers[rows, new].tolist() for numbers in (self.tokens, self.log_prob, self.policy_log_prob)]
        for i, *numbers in zip(which, *found, strict=True):
            for ids, values in self.top:
                best = [pair for pair in zip(ids[i], values[i], strict=True) if pair[1] > -torch.inf]
                self.rows[i].top.append(best[: self.rows[i].request.top])
            self.rows[i].add(*numbers)
        if len(which) == len(self.rows):
            self.reported, self.top = self.drawn, []

    def store(self, memory: CacheMemory, which: Sequence[int]) -> None:
        """Store the caches of rows, with the prompt and as much of the reply as the model has read."""
        known, unused = [], []
        for row in (self.rows[i] for i in which):
            # The model has not read the token that was drawn last.
            read = row.before + self.drawn - 1
            known.append([*row.request.prompt, *row.tokens[:read]])
            unused.append(max(0, read - row.count))
        keys = [self.rows[i].key for i in which]
        self.sampler.cached_model.store(memory, self.read, which, keys, known, unused)

    def keep_live(self) -> None:
        """Keep only the rows that are not finished; the last ones take the places of those that leave."""
        live = self.live
        last = live[sum(i < len(live) for i in live) :]
        order = [i if self.rows[i].finished is None else last.pop() for i in range(len(live))]
        chosen = torch.tensor(order, device=self.tokens.device)
        self.rows = [self.rows[i] for i in order]
        self.read = self.read.select(chosen)
        self.u, self.tokens = self.u[chosen], self.tokens[chosen]
        self.log_prob, self.policy_log_prob = self.log_prob[chosen], self.policy_log_prob[chosen]
        self.counted, self.closed = self.counted[chosen], self.closed[chosen]
        self.node = None if self.node is None else self.node[chosen]
        self.form, self.reads = form_and_reads(self.rows, chosen.device)
        self.most_top = max(row.request.top for row in self.rows)

    def joined_by(self, rows: list[Row], read: Rows, outputs: LastOutputs) -> "Batch":
        """Return a batch of the live rows and of new ones; the tokens drawn so far are reported.

        Args:
          rows: the new rows.
          read: their place in a cache of their own.
          outputs: what the model computed after the prompt of each.
        """
        self.report(range(len(self.rows)))
        chosen, live = torch.tensor(self.live, device=self.tokens.device), [self.rows[i] for i in self.live]
        outputs = self.outputs.select(chosen).followed_by(outputs)
        left = [row.request.config.max_new_tokens - len(row.tokens) for row in [*live, *rows]]
        return Batch(self.sampler, [*live, *rows], self.read.joined_by(chosen, read, max(left)), outputs)


def form_and_reads(rows: Sequence[Row], device: torch.device) -> tuple[Form, frozenset[str]]:
    """Return the settings of rows as one form, and what the model computes beside the logits."""
    form = Form.of_rows([row.form for row in rows], device)
    reads = frozenset().union(*(term.reads for term in form.terms()))
    return form, reads | {"all of Q"} if form.reads_all_of_q(device) else reads


def _drawn_column(scores: Tensor, temperature: float | Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Draw a column for each row.

    Args:
      scores: (B, K) unnormalised log-probabilities.
      temperature: 0 = the best column; a number or a tensor (B, 1).
      u: (B,) uniform random numbers in [0, 1).
    Returns: the column (B, 1), which is any one in a row that is not a number; log Σ exp(scores), (B, 1).
    """
    if not isinstance(temperature, Tensor) and temperature == 0.0:
        return scores.argmax(-1, keepdim=True), scores.logsumexp(-1, keepdim=True)
    drawn, total = sample_from(scores, u)
    # Nothing is drawn from a row that is not a number; without the limit the index would be K.
    drawn = drawn.clamp(max=scores.shape[-1] - 1).unsqueeze(-1)
    if isinstance(temperature, Tensor):
        drawn = scores.argmax(-1, keepdim=True).where(temperature == 0.0, drawn)
    return drawn, total.unsqueeze(-1)
