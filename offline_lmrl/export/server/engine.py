"""The token loop in a thread of its own, between the requests that asyncio handles.

One thread owns the model, the tokenizer and the loop: it renders prompts, lets rows join, and runs the steps. Requests
reach it through a queue, and its tokens come back once per step, in one call of the event loop, so that no token waits
for a lock. A row is one reply that is being written.
"""

import asyncio
import logging
import queue
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from functools import cache, partial
from itertools import islice
from typing import Any, NamedTuple

from offline_lmrl.decoding.batch import FAILED, Request
from offline_lmrl.decoding.loop import SamplingLoop, TokenEvent
from offline_lmrl.errors import InputError

log = logging.getLogger(__name__)


class Full(Exception):
    """Raised for a request that would have to wait behind too many others."""


class Draining(Exception):
    """Raised for a request while the server ends, and for one that is cut off at its end."""


class Written(NamedTuple):
    """A token of a job.

    reply: index of the reply among those of the job.
    event: the token.
    texts: the text of the token and of each of its alternatives; () if the job does not ask for them.
    """

    reply: int
    event: TokenEvent
    texts: tuple[str, ...] = ()


class Job:
    """The replies that one request asks for.

    Args:
      make: returns the loop's requests, one per reply; called in the engine's thread. `started` raises its errors.
      replies: their number.
      named: True: return the text of every token, too.
    Attributes:
      requests: the loop's requests, once the prompts are read; [] before.
    """

    def __init__(self, make: Callable[[], Sequence[Request]], replies: int, named: bool = False):
        self.make, self.replies, self.named = make, replies, named
        self.requests: Sequence[Request] = []
        self._ready: asyncio.Future[Sequence[Request]] = asyncio.get_running_loop().create_future()
        self._events: asyncio.Queue[Written | Exception] = asyncio.Queue()
        self._left = replies  # replies that are not finished

    async def started(self) -> None:
        """Wait until the prompts are read.

        Raises: InputError if they cannot be.
        """
        self.requests = await self._ready

    async def tokens(self) -> AsyncIterator[Written]:
        """Yield the tokens of all replies as they are drawn, until every reply is finished.

        Raises: Draining if the server cuts the job off; InputError if a probability is not a number; RuntimeError if
          the model fails.
        """
        while self._left:
            found = await self._events.get()
            if isinstance(found, Exception):
                raise found
            self._left -= found.event.finished is not None
            yield found

    def put(self, found: Any) -> None:
        """Receive, in the event loop's thread, what the engine has found: the requests, a token, or an error."""
        if self._ready.cancelled():  # the client is gone
            return
        if self._ready.done():
            self._events.put_nowait(found)
        elif isinstance(found, Exception):
            self._ready.set_exception(found)
            self._ready.exception()  # marks it as seen, for a client that goes away before `started` is awaited
        else:
            self._ready.set_result(found)


Message = tuple[str, Job | None]  # "open" or "close" and the job, or "stop"


class Engine:
    """The thread that runs a SamplingLoop, as the event loop's thread sees it.

    Args:
      new_loop: makes an empty loop; called again after a failure of the model, which leaves a loop half done.
      text_of: returns the text of a token.
      together: most rows that are decoded at once.
      waiting: most rows that wait for their start.
    Attributes:
      open_rows: rows of all open jobs, running or waiting.
      draining: True: new jobs are refused.
      worker: the side of the thread; only to look on.
    """

    def __init__(
        self, new_loop: Callable[[], SamplingLoop], text_of: Callable[[int], str], together: int, waiting: int
    ):
        self.most_rows = together + waiting
        self.open_rows, self.draining, self.jobs = 0, False, set[Job]()
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        events = asyncio.get_running_loop()
        self.worker = _Worker(self._inbox, partial(events.call_soon_threadsafe, _put_all), new_loop, text_of, together)
        self._thread = threading.Thread(target=self.worker.work, name="sampling loop", daemon=True)
        self._thread.start()

    def open(self, make: Callable[[], Sequence[Request]], replies: int, named: bool = False) -> Job:
        """Start a job, which has to be closed.

        Args: those of `Job`.
        Raises: Full if too many rows wait already; Draining while the server ends.
        """
        if self.draining:
            raise Draining
        if self.open_rows + replies > self.most_rows:
            raise Full
        job = Job(make, replies, named)
        self.open_rows += replies
        self.jobs.add(job)
        self._inbox.put(("open", job))
        return job

    def close(self, job: Job) -> None:
        """End a job; replies that are not finished are given up. A second call does nothing."""
        if job in self.jobs:
            self.jobs.remove(job)
            self.open_rows -= job.replies
            self._inbox.put(("close", job))

    def cut_off(self) -> int:
        """End all jobs with the error Draining; return their number."""
        for job in self.jobs:
            job.put(Draining())
        return len(self.jobs)

    def stop(self) -> None:
        """End the thread, and wait for it."""
        self._inbox.put(("stop", None))
        self._thread.join()


def _put_all(found: Sequence[tuple[Job, Any]]) -> None:
    for job, one in found:
        job.put(one)


class _Worker:
    """The engine in its own thread.

    Args:
      inbox: brings jobs to open and to close.
      deliver: takes what is found to the event loop's thread.
      new_loop, text_of, together: as for `Engine`.
    Attributes:
      waiting: rows that wait for their start: job, index of the reply in it, and request.
      rows: row of the loop -> its job and the index of the reply there.
    """

    def __init__(
        self,
        inbox: "queue.SimpleQueue[Message]",
        deliver: Callable[[Sequence[tuple[Job, Any]]], Any],
        new_loop: Callable[[], SamplingLoop],
        text_of: Callable[[int], str],
        together: int,
    ):
        self.inbox, self.deliver, self.new_loop, self.loop = inbox, deliver, new_loop, new_loop()
        self.text_of, self.together = cache(text_of), together
        self.waiting: deque[tuple[Job, int, Request]] = deque()
        self.rows: dict[int, tuple[Job, int]] = {}

    def work(self) -> None:
        """Run until the engine stops."""
        while True:
            try:
                if not self._receive(wait=not (self.rows or self.waiting)):
                    return
                self._admit()
                if self.rows:
                    self._step()
            except Exception:
                log.exception("the model failed; running requests end with an error, and the server goes on")
                failed = {job for job, *_ in (*self.rows.values(), *self.waiting)}
                self.rows, self.loop = {}, self.new_loop()
                self.waiting.clear()
                self.deliver([(job, RuntimeError("the model failed")) for job in failed])

    def _receive(self, wait: bool) -> bool:
        """Take all jobs that have arrived, and at least one if `wait`; return False if the engine stops."""
        while wait or not self.inbox.empty():
            what, job = self.inbox.get()
            if what == "stop":
                return False
            if what == "open":
                self._prepare(job)
            else:
                self._give_up(job)
            wait = False
        return True

    def _prepare(self, job: Job) -> None:
        """Read the prompts of a new job; its rows then wait."""
        try:
            requests = job.make()
        except Exception as error:  # about this request alone; an InputError if the sender can mend it
            self.deliver([(job, error)])
            return
        self.waiting.extend((job, i, request) for i, request in enumerate(requests))
        self.deliver([(job, requests)])

    def _give_up(self, job: Job) -> None:
        self.waiting = deque(one for one in self.waiting if one[0] is not job)
        rows = [row for row, (other, _) in self.rows.items() if other is job]
        if rows:
            self.loop.cancel(rows)
            for row in rows:
                del self.rows[row]

    def _admit(self) -> None:
        """Let waiting rows join the loop, first come, first served."""
        free = min(self.together - len(self.rows), len(self.waiting))
        if free > 0:
            joining = list(islice(self.waiting, free))
            rows = self.loop.add([request for _, _, request in joining])
            for row, (job, i, _) in zip(rows, joining, strict=True):
                self.rows[row] = (job, i)
                self.waiting.popleft()

    def _step(self) -> None:
        found = []
        for event in self.loop.step():
            if event.row not in self.rows:  # given up, but not yet out of its batch
                continue
            job, i = self.rows[event.row]
            if event.finished is not None:
                del self.rows[event.row]
            if event.finished == "failed":
                found.append((job, InputError(FAILED)))
                continue
            tokens = [event.token, *(token for token, _ in event.top)] if job.named else []
            found.append((job, Written(i, event, tuple(map(self.text_of, tokens)))))
        self.deliver(found)
