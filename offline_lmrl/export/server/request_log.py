"""The log of a server: one line of JSON per reply, which is a row of a log for `check` and `train` if it has texts.

A line is written in one piece. A line that a crash or a full disk has left unfinished is removed, when the log is
opened again or at once, so that every line of the file can be read.
"""

import fcntl
import hashlib
import json
import logging
import os
import stat
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from offline_lmrl.errors import InputError
from offline_lmrl.export.server.answers import Answer
from offline_lmrl.logs.files import writing
from offline_lmrl.logs.terminal import visible
from offline_lmrl.logs.trajectory import Trajectory, Turn, as_context, leading_system_turns, to_record

log = logging.getLogger(__name__)
_BLOCK = 2**16


class RequestLog:
    """A log that lines are appended to; a context manager, which closes it.

    Args:
      path: the file, which is created if it does not exist; "-" = stdout.

    Raises: InputError if the file cannot be written, or another server writes it.
    """

    def __init__(self, path: str):
        self.path, self._file, self._failed = path, None, False
        if path == "-":
            return
        with writing(path):
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            if not stat.S_ISREG(os.fstat(self._file).st_mode):  # such as /dev/null, which has no lines to keep whole
                return
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(f"log: found {path}, which another server writes, expected another file") from error
            self._remove_torn_line()

    def __enter__(self) -> "RequestLog":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            os.close(self._file)

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line. If that fails, a warning says so once, and the server goes on."""
        text = json.dumps(line, ensure_ascii=False) + "\n"
        try:
            if self._file is None:
                sys.stdout.write(visible(text))
                sys.stdout.flush()
                return
            data, before = text.encode(), os.fstat(self._file).st_size
            if os.write(self._file, data) != len(data):
                os.ftruncate(self._file, before)
                raise OSError("no space for the whole line")
        except OSError as error:
            if not self._failed:
                log.warning("log: %s: found %s; requests are answered without it", self.path, error)
            self._failed = True

    def _remove_torn_line(self) -> None:
        """Cut the file after its last line break."""
        size = end = os.fstat(self._file).st_size
        keep = found = -1
        while end and found < 0:
            start = max(0, end - _BLOCK)
            found = os.pread(self._file, end - start, start).rfind(b"\n")
            keep, end = start + found + 1, start
        if 0 <= keep < size:
            os.ftruncate(self._file, keep)
            log.warning("log: %s: removed %d bytes of a last line that was not finished", self.path, size - keep)


def reply_row(
    history: Sequence[Turn], answer: Answer, close_ids: Collection[int], facts: Mapping[str, Any], sampled: bool
) -> dict[str, Any]:
    """Return a reply as a row of a log: the messages, and the facts as further columns.

    Token ids are kept where they are exact: not for a reply that a stop text ended, or that was given up, as they may
    hold more than its text. If such a reply has no text either, there are no messages.

    Args:
      history: the turns before the reply.
      answer: the reply; one that is not finished becomes a dialogue that was cut off.
      close_ids: tokens that end a reply.
      facts: the further columns, which `check` and `train` keep as labels.
      sampled: True: the reply is the one that was drawn, so that its log-probabilities are those of the reply; False:
        a scorer chose it.
    """
    events = answer.events
    closed = bool(events) and events[-1].token in close_ids
    exact = closed or answer.finished == "length"
    if not exact and not answer.text:
        return dict(facts)
    ids = tuple(event.token for event in events) if exact else None
    log_prob = tuple(event.log_prob for event in events) if exact and sampled else None
    turn = Turn("assistant", answer.text, token_ids=ids, behaviour_log_prob=log_prob)
    # All turns of one conversation have its first turns in common, and so one group, which no split parts.
    head = list(as_context(history[: leading_system_turns(history) + 1]))
    group = hashlib.sha256(json.dumps([one.spoken for one in head]).encode()).hexdigest()[:16]
    row = to_record(Trajectory((*as_context(history), turn), terminated=answer.finished == "stop", group=group))
    policy = {"policy_log_prob": [[event.policy_log_prob for event in events]]} if exact else {}
    return {name: row[name] for name in ("messages", "terminated", "group")} | policy | facts
