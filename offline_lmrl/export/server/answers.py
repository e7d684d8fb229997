"""The replies to one request, as far as they are written, and their form in OpenAI's API."""

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from offline_lmrl.decoding.loop import TokenEvent
from offline_lmrl.export.server.bodies import Asked
from offline_lmrl.export.server.engine import Job, Written

LEAST_LOG_PROB = -9999.0  # what OpenAI's API gives for a token of probability 0, as JSON has no infinity


@dataclass
class Answer:
    """One reply.

    Attributes:
      written: its tokens so far.
      labels: facts about how it was chosen.
    """

    written: list[Written] = field(default_factory=list)
    labels: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        return "".join(one.event.text for one in self.written)

    @property
    def events(self) -> list[TokenEvent]:
        return [one.event for one in self.written]

    @property
    def finished(self) -> str | None:
        """Return the reason of its end, "stop" or "length"; None = it has not ended."""
        return self.written[-1].event.finished if self.written else None


class Piece(NamedTuple):
    """A part of a reply that is sent at once.

    choice: index of the reply in the answer.
    text: its new text; may be empty.
    written: its new tokens.
    finished: "stop" or "length" if the reply ends here; None = it goes on.
    """

    choice: int
    text: str
    written: Sequence[Written]
    finished: str | None


class Answers:
    """The replies to one request.

    Args:
      asked: the request.
      job: writes the replies.
      choose: returns the index of the best of several finished replies to the prompt of this index, with labels.
    Attributes:
      start: time at which the request arrived, in seconds of time.monotonic.
      first_token: seconds until the first token; None = there is none yet.
    """

    def __init__(
        self,
        asked: Asked,
        job: Job,
        choose: Callable[[int, Sequence[Answer]], Awaitable[tuple[int, Mapping[str, Any]]]],
    ):
        self.asked, self.job, self.choose = asked, job, choose
        self.drawn = [Answer() for _ in range(asked.replies)]
        self.chosen: dict[int, Answer] = {}  # choice -> the reply that is given, once it is known
        self.start, self.first_token = time.monotonic(), None

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yield the replies piece by piece; with best_of, each reply is one piece, once it is chosen."""
        best_of = self.asked.best_of
        async for one in self.job.tokens():
            self.first_token = self.first_token or time.monotonic() - self.start
            answer, choice = self.drawn[one.reply], one.reply // best_of
            answer.written.append(one)
            if best_of == 1:
                self.chosen[choice] = answer
                yield Piece(choice, one.event.text, [one], one.event.finished)
                continue
            group = self.drawn[choice * best_of : (choice + 1) * best_of]
            if all(other.finished for other in group):
                best, labels = await self.choose(choice // self.asked.n, group)
                self.chosen[choice] = answer = group[best]
                answer.labels = dict(labels)
                yield Piece(choice, answer.text, answer.written, answer.finished)

    def usage(self) -> dict[str, int]:
        """Return the numbers of tokens; those of replies that were not chosen count too."""
        prompts = sum(len(one.prompt) for one in self.job.requests[:: self.asked.n * self.asked.best_of])
        completion = sum(len(answer.written) for answer in self.drawn)
        return {"prompt_tokens": prompts, "completion_tokens": completion, "total_tokens": prompts + completion}


class Shapes:
    """The JSON of answers in OpenAI's API.

    Args:
      asked: the request.
      identity: id, time and name of the model, which every part of the answer repeats.
      close_ids: tokens that end a reply and have no text.
    """

    def __init__(self, asked: Asked, identity: Mapping[str, Any], close_ids: Collection[int]):
        self.asked, self.identity, self.close_ids = asked, dict(identity), close_ids
        self._length = {}  # choice -> characters of the text so far, for text_offset

    def whole(self, answers: Answers) -> dict[str, Any]:
        """Return the answer to a request without `stream`."""
        choices = []
        for index in sorted(answers.chosen):
            answer = answers.chosen[index]
            piece = Piece(index, answer.text, answer.written, answer.finished)
            content = {"role": "assistant", "content": piece.text, "refusal": None}
            choices.append(self._choice(piece, {"message": content} if self.asked.chat else {"text": piece.text}))
        name = "chat.completion" if self.asked.chat else "text_completion"
        return {**self.identity, "object": name, "choices": choices, "usage": answers.usage()}

    def opening(self, choice: int) -> dict[str, Any]:
        """Return the first part of a streamed chat reply, which names the speaker."""
        return self._part([self._choice(Piece(choice, "", [], None), {"delta": {"role": "assistant", "content": ""}})])

    def part(self, piece: Piece) -> dict[str, Any]:
        """Return a part of a streamed reply."""
        delta = {"content": piece.text} if piece.text else {}
        return self._part([self._choice(piece, {"delta": delta} if self.asked.chat else {"text": piece.text})])

    def last(self, answers: Answers) -> dict[str, Any]:
        """Return the last part of a stream with `include_usage`."""
        return self._part([]) | {"usage": answers.usage()}

    def is_empty(self, piece: Piece) -> bool:
        """True for a piece that a stream need not send: a token whose text is not complete yet."""
        return not piece.text and piece.finished is None and self.asked.top is None

    def _part(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        name = "chat.completion.chunk" if self.asked.chat else "text_completion"
        usage = {"usage": None} if self.asked.include_usage else {}
        return {**self.identity, "object": name, "choices": choices, **usage}

    def _choice(self, piece: Piece, content: Mapping[str, Any]) -> dict[str, Any]:
        logprobs = None if self.asked.top is None else self._log_probs(piece)
        return {"index": piece.choice, **content, "logprobs": logprobs, "finish_reason": piece.finished}

    def _log_probs(self, piece: Piece) -> dict[str, Any]:
        shown = [one for one in piece.written if one.event.token not in self.close_ids]
        if self.asked.chat:
            return {"content": [_named(one) for one in shown], "refusal": None}
        offset, offsets = self._length.get(piece.choice, 0), []
        for one in shown:
            offsets.append(offset)
            offset += len(one.event.text)
        self._length[piece.choice] = offset
        return {
            "tokens": [one.texts[0] for one in shown],
            "token_logprobs": [_at_least(one.event.log_prob) for one in shown],
            "top_logprobs": [{text: _at_least(value) for text, value in _alternatives(one)} for one in shown],
            "text_offset": offsets,
        }


def _named(one: Written) -> dict[str, Any]:
    return _token(one.texts[0], one.event.log_prob) | {
        "top_logprobs": [_token(text, value) for text, value in _alternatives(one)]
    }


def _alternatives(one: Written) -> list[tuple[str, float]]:
    return [(text, value) for text, (_, value) in zip(one.texts[1:], one.event.top, strict=True)]


def _token(text: str, log_prob: float) -> dict[str, Any]:
    # A token that is a part of a character has no text of its own.
    return {
        "token": text,
        "logprob": _at_least(log_prob),
        "bytes": None if "\ufffd" in text else list(text.encode()),
    }


def _at_least(log_prob: float) -> float:
    return max(log_prob, LEAST_LOG_PROB)
