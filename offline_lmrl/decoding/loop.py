"""The token loop as an object: rows are added at any time, each step draws one token for every row, and rows leave.

Rows with different settings share a batch where they can (`Form.kind`). New rows are read by themselves; their caches
are then joined to those of the running batch, right-aligned, at most every few steps, because all caches are copied
then. Finished rows leave the batch when others join, or once the steps that they take in vain cost as much time as
leaving (LEAVING_COST): the last rows then move to their places, and no other row is copied. Columns of the cache that
no row needs any more are no longer read; their memory is freed when others join, or with the batch. Models whose
caches cannot be joined (sliding windows, recurrent states), rows with options, and rows in two streams (a requested
return with guidance) run in whole batches: others of their kind wait until it is finished.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from offline_lmrl.decoding.batch import Batch, Request, Row, form_and_reads
from offline_lmrl.decoding.cache import CacheMemory
from offline_lmrl.decoding.constraints import TokenTrie
from offline_lmrl.decoding.prompts import Prompts, evaluating
from offline_lmrl.decoding.texts import TextStream
from offline_lmrl.errors import require
from offline_lmrl.logs.protocols import Reply

if TYPE_CHECKING:
    from offline_lmrl.decoding.sampler import Sampler

# Time that it takes to remove rows from a batch, in steps. Measured for 32 rows: .22 with two layers of width 64, .02
# with GPT-2 small. With any number from 0 to .5, tokens per second of either model differ by less than a tenth.
LEAVING_COST = 1 / 16
JOIN_EVERY = 4  # steps of a running batch after which rows may join it again


def sync_every(device: torch.device) -> int:
    """Return the number of tokens that are drawn between two checks for finished rows.

    On a GPU each check waits until the GPU has finished its queued work; on a CPU it costs nothing.
    """
    return 1 if device.type == "cpu" else 8


class TokenEvent(NamedTuple):
    """One token of a row.

    row: the key of the row.
    token: the id.
    log_prob: its log-probability in the distribution that it was drawn from, in nats.
    policy_log_prob: that under the unguided policy at the row's temperature, in nats.
    text: the text that became final with it. Text is held back while a UTF-8 sequence is incomplete, or a stop text
      may have begun; the pieces of a row join to its reply's text, which a stop text is no part of.
    finished: "stop" if a closing token or a stop text ended the reply, "length" if max_new_tokens did, "failed" if
      log_prob is not a number, so that token and text mean nothing; None = it goes on.
    top: the ids and log-probabilities of the `Request.top` most probable tokens there, best first.
    """

    row: int
    token: int
    log_prob: float
    policy_log_prob: float
    text: str
    finished: str | None
    top: list[tuple[int, float]]


class SamplingLoop:
    """A loop that draws replies token by token, for one thread at a time.

    Args:
      sampler: the model, the renderer and what ends a reply; the settings of a reply are those of its request.
      memory: the caches of earlier replies. A new prompt is read from where the one that holds most of it ends. None =
        every prompt is read from its start.
      join_every: number of steps of a running batch after which new rows may join it; None = never: they wait until it
        is finished.
      most_rows: limit on the rows of one batch; None = only the limits on its tokens and logits.
    """

    def __init__(
        self,
        sampler: "Sampler",
        memory: CacheMemory | None = None,
        *,
        join_every: int | None = JOIN_EVERY,
        most_rows: int | None = None,
    ):
        self.sampler, self.model = sampler, sampler.cached_model
        self.memory = memory if self.model.keeps_tokens else None
        self.join_every, self.most_rows = join_every, most_rows
        self.waiting: dict[Any, list[Row]] = {}  # kind -> rows in the order of arrival
        self.batches: dict[Any, Batch] = {}  # kind -> the running batch
        self.left: list[Row] = []  # finished rows that were not handed over yet
        self.next_key = 0

    def __len__(self) -> int:
        """Return the number of rows that are waiting or not finished."""
        return sum(map(len, self.waiting.values())) + sum(len(batch.live) for batch in self.batches.values())

    def add(self, requests: Sequence[Request], keys: Sequence[int] | None = None) -> list[int]:
        """Add rows, which wait until they fit into a batch.

        Args:
          requests: what to reply to.
          keys: the keys of the rows, under which their caches are in the memory; None = new ones.
        Returns: the key of each row.
        Raises: InputError if a prompt is empty, if the model lacks what a request's settings need, or if an option
          cannot be a reply; no row is added then.
        """
        sampler, rows = self.sampler, []
        for i, request in enumerate(requests):
            require(len(request.prompt) > 0, "prompt: found no token, expected at least one")
            options = sampler.options.encode(request.options, request.config.max_new_tokens)
            text = TextStream(sampler.renderer, request.config.stop)
            key = self.next_key + i if keys is None else keys[i]
            source = None if keys is None else key
            rows.append(Row(key, request, sampler.checked(request.config), text, options, source))
        if keys is None:
            self.next_key += len(rows)
        for row in rows:
            self.waiting.setdefault(self._kind(row), []).append(row)
        return [row.key for row in rows]

    @torch.inference_mode()
    def cancel(self, rows: Sequence[int]) -> None:
        """Stop drawing these rows; keys of rows that have finished are ignored."""
        unwanted = set(rows)
        for kind, waiting in list(self.waiting.items()):
            self.waiting[kind] = [row for row in waiting if row.key not in unwanted]
        for kind, batch in list(self.batches.items()):
            for i in batch.live:
                if batch.rows[i].key in unwanted:
                    batch.rows[i].finished, batch.rows[i].count = "cancelled", len(batch.rows[i].tokens)
            self._leave(kind, batch)

    @torch.inference_mode()
    def step(self, tokens: int = 1) -> list[TokenEvent]:
        """Draw the next token of every row that is in a batch, after rows that fit have joined.

        Args:
          tokens: how many to draw for each row. On a GPU more than one saves waiting for it.
        Returns: the new tokens, in order within each row.
        """
        events = []
        with evaluating(self.sampler.model):
            for batch in self._draw(tokens, follow=True):
                events += [event for row in batch.rows for event in _events(row)]
        self.left = []
        return events

    @torch.inference_mode()
    def replies(self) -> Iterator[tuple[int, Reply]]:
        """Draw until no row is left, with a model in eval mode; yield the key and the reply of each row that leaves.

        Raises: InputError at a row whose probabilities are not numbers.
        """
        every = sync_every(self.sampler.model.device)
        while len(self):
            for _ in self._draw(every, follow=False):
                pass
            for row in self.left:
                yield row.key, row.reply(self.sampler)
            self.left = []

    def _kind(self, row: Row) -> tuple:
        """Return what two rows need to have in common to run in one batch: form, streams, and if they have options."""
        return row.form.kind, self.model.streams(row.form, row.request.prompt), row.options is not None

    def _draw(self, tokens: int, follow: bool) -> Iterator[Batch]:
        """Advance every batch by so many tokens; yield it before finished rows leave it."""
        for kind in list(self.waiting | self.batches):
            batch, rows = self.batches.get(kind), self._newcomers(kind)
            if rows:
                batch = self.batches[kind] = self._admit(kind, rows)
            if batch is None:
                continue
            for _ in range(min(tokens, batch.most_left)):
                batch.draw()
            batch.check(follow)
            yield batch
            self._leave(kind, batch)

    def _newcomers(self, kind: tuple) -> list[Row]:
        """Take the rows from the queue of a kind that join its batch now."""
        waiting, batch, chosen = self.waiting.get(kind, []), self.batches.get(kind), []
        if batch is not None:
            joins = self.join_every is not None and self.model.keeps_tokens and kind[1:] == (1, False)
            if not joins or batch.drawn < self.join_every:
                return []
        live = [] if batch is None else [batch.rows[i] for i in batch.live]
        width = max((len(row.request.prompt) + row.before + batch.drawn for row in live), default=0)
        left = max((row.request.config.max_new_tokens - row.before - batch.drawn for row in live), default=0)
        for row in waiting:
            width, left = max(width, len(row.request.prompt)), max(left, row.request.config.max_new_tokens)
            count = len(live) + len(chosen) + 1
            if count > (self.most_rows or count) or not self.model.fits(count, width + left, streams=kind[1]):
                break
            chosen.append(row)
        self.waiting[kind] = waiting[len(chosen) :]
        if not self.waiting[kind]:
            del self.waiting[kind]
        return chosen

    def _admit(self, kind: tuple, rows: list[Row]) -> Batch:
        """Read the prompts of new rows; return their batch, joined to the running one of their kind, if any."""
        batch, streams = self.batches.get(kind), kind[1]
        if batch is not None:
            self._hand_over(batch, [i for i, row in enumerate(batch.rows) if row.finished is not None])
        for row in rows:
            if row.source is None and self.memory is not None:
                row.source = self.memory.longest(row.request.prompt)
        device = self.sampler.model.device
        everyone = rows if batch is None else [*(batch.rows[i] for i in batch.live), *rows]
        _, reads = form_and_reads(everyone, device)
        prompts = Prompts(
            self.model,
            [list(row.request.prompt) for row in rows],
            [row.key if row.source is None else row.source for row in rows],
            self.memory,
            streams,
            [row.request.config.max_new_tokens for row in rows],
        )
        read, outputs = prompts.read(list(range(len(rows))), reads)
        if batch is None:
            trie = TokenTrie([row.options for row in rows], device) if kind[2] else None
            return Batch(self.sampler, rows, read, outputs, trie)
        batch.read_last(reads)
        return batch.joined_by(rows, read, outputs)

    def _leave(self, kind: tuple, batch: Batch) -> None:
        """Remove the finished rows of a batch before their idle steps cost as much as it costs to remove them."""
        finished, count = [i for i, row in enumerate(batch.rows) if row.finished is not None], len(batch.rows)
        if not finished or len(finished) < count and batch.idle + len(finished) < LEAVING_COST * count:
            return
        self._hand_over(batch, finished)
        if batch.live:
            batch.keep_live()
        else:
            del self.batches[kind]

    def _hand_over(self, batch: Batch, which: Sequence[int]) -> None:
        """Store the caches of finished rows and hand over their replies; cancelled rows are dropped."""
        which = [i for i in which if batch.rows[i].finished != "cancelled"]
        if not which:
            return
        batch.report(which)
        self.left += [batch.rows[i] for i in which]
        if self.memory is None:
            return
        batch.store(self.memory, which)
        for row in (batch.rows[i] for i in which):
            # The new cache holds all of the one that it continued.
            if row.source not in (None, row.key) and row.source in self.memory.rows:
                if self.memory.is_continued(row.source, [*row.request.prompt, *row.tokens]):
                    self.memory.drop([row.source, ~row.source])


def _events(row: Row) -> list[TokenEvent]:
    """Return the events of the tokens of a row that were decoded since the last call."""
    events, first = [], len(row.tokens) - len(row.pieces)
    for place, piece in enumerate(row.pieces, first):
        finished = row.finished if place + 1 == row.count else None
        numbers = row.tokens[place], row.log_prob[place], row.policy_log_prob[place]
        events.append(TokenEvent(row.key, *numbers, piece, finished, row.top[place] if row.request.top else []))
    row.pieces = []
    return events
