"""The text of a reply while it grows token by token."""

from collections.abc import Sequence

from offline_lmrl.tokens.rendering import Renderer

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what an incomplete UTF-8 sequence decodes to


class TextStream:
    """The text of a reply, in pieces that no later token changes.

    The latest tokens alone are decoded, together with those before them on which their text depends (a space at the
    start, for example). Text is held back while it ends in an incomplete UTF-8 sequence, and while a stop text, or
    a text that the template prints around a reply, may have begun. The pieces of a reply join to its text.

    Args:
      renderer: decodes the ids of a reply.
      stop: the texts that end a reply; its text is cut before the first of them.
    Attributes:
      text: the text that is final.
      stopped: True once a stop text was found.
    """

    def __init__(self, renderer: Renderer, stop: Sequence[str] = ()):
        self.decode, self.byte_ids, self.stop = renderer.decode, renderer.byte_ids, stop
        self.lead, closing = renderer.reply_frame
        self.marks = (*stop, closing) if closing else tuple(stop)
        self.tokens: list[int] = []
        self.text, self.pending, self.stopped = "", "", False
        self.start = self.read = 0  # tokens from `start` on are decoded; those before `read` are in text and pending

    def add(self, token: int, last: bool = False) -> str:
        """Add a token; return the text that became final.

        Args:
          token: its id.
          last: True: the reply ends with this token, so nothing is held back.
        """
        self.tokens.append(token)
        before, now = (self.decode(self.tokens[self.start : end]) for end in (self.read, None))
        new = now[len(before) :] if now.startswith(before) else ""
        if self.stop and self._stops(new):
            return self._settle(self._cut(self.decode(self.tokens)))
        if last:
            return self._settle(self.decode(self.tokens))
        begins = self.read == 0 and self.lead.startswith(now)
        if new and not begins and not now.endswith(INCOMPLETE) and token not in self.byte_ids:
            self.pending += new
            self.start, self.read = self.read, len(self.tokens)
        return self._settle(self.text + self.pending[: len(self.pending) - self._begun(self.pending)])

    def _settle(self, text: str) -> str:
        """Make `text`, which starts with the final text, the final text; return what that adds to it."""
        piece = text[len(self.text) :]
        self.text, self.pending = self.text + piece, self.pending[len(piece) :]
        return piece

    def _stops(self, new: str) -> bool:
        """True if the reply has a stop text once `new` is added to it; `stopped` is set to it."""
        ending = self.pending + new
        # Only where the end of the text has one the whole text, which costs more, is decoded to see where.
        self.stopped = any(mark in ending for mark in self.stop) and self._first(self.decode(self.tokens)) is not None
        return self.stopped

    def _first(self, text: str) -> int | None:
        """Return where the first stop text in a text starts; None if there is none."""
        return min((text.index(mark) for mark in self.stop if mark in text), default=None)

    def _cut(self, text: str) -> str:
        return text[: self._first(text)]

    def _begun(self, text: str) -> int:
        """Return the length of the longest end of a text with which a mark begins."""
        longest = min(len(text), max(map(len, self.marks), default=0))
        return next((n for n in range(longest, 0, -1) if any(mark.startswith(text[-n:]) for mark in self.marks)), 0)
