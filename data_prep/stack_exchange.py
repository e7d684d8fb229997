"""Convert Stack Exchange questions to comparisons of their answers, ordered by votes.

Two forms are read: that of the public preference data (`question, answers[{text, pm_score, selected}]`) and that of
the Stack Exchange API (`title, body, answers[{body, score, is_accepted}]`). How rows are read:
- Votes become the score of Askell et al. 2021 (`vote_score`). A `pm_score` already is that score and contains the
  bonus for the accepted answer, so the bonus is not added again. Equal scores tie; an answer without a score is left
  out.
- HTML becomes text: paragraphs, lists and line breaks stay, code is fenced or in backticks, and links keep their
  words.
- Ids, authors and raw votes of the answers are in `labels["options"]`, since the licence asks for attribution.
"""

import html
import math
import re
from dataclasses import dataclass
from html.parser import HTMLParser

from data_prep.comparisons import StreamingImporter
from offline_lmrl.logs.comparison import Comparison
from offline_lmrl.logs.preference_forms import read_comparison
from offline_lmrl.logs.record import Drop, Record, drop_if

_BLOCKS = ("p", "div", "blockquote", "ul", "ol", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "table", "tr")
_MARKS = {
    **dict.fromkeys(_BLOCKS, "\n\n"),
    "li": "\n- ",
    "br": "\n",
    "code": "`",
    "<pre>": "\n\n```\n",
    "</pre>": "\n```\n\n",
}
_TAG = re.compile(rf"</?({'|'.join(_BLOCKS)}|li|br|code|pre|a|em|strong|img)\b[^<>]*>", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class StackExchange(StreamingImporter):
    """Read questions with answers and votes and write train.jsonl, validation.jsonl and report.json."""

    def read(self, row: Record) -> Comparison | None:
        """Return the comparison of the answers to one question, in one of the two forms that the module describes."""
        if row.get("question") is None and row.get("title") is not None:
            title = html.unescape(row.text("title"))  # titles are escaped, but have no tags
            question = f"{title}\n\n{_plain(row, 'body')}"
        else:
            question = _plain(row, "question")
        drop_if(not question.strip(), "empty question")
        answers = [(answer, "text" if answer.get("text") is not None else "body") for answer in row.objects("answers")]
        read = [
            (_plain(answer, name), _rank(answer), answer.columns(set(answer) - {name})) for answer, name in answers
        ]
        parts = {
            "prompt": [{"role": "user", "content": question}],
            "responses": [response for response, _, _ in read],
            "ranks": [rank for _, rank, _ in read],
            "source": "stack-exchange",
            "labels": row.others({"question", "body", "answers"}) | {"options": [option for _, _, option in read]},
        }
        return read_comparison(parts, row.where, row.repairs)


def vote_score(votes: int, accepted: bool) -> int:
    """Return the score of an answer: log2(1 + votes), rounded, + 1 if the answer is accepted; −1 below 0 votes.

    Askell et al. 2021, section 4.1.

    Args:
      votes: upvotes minus downvotes.
    """
    return -1 if votes < 0 else round(math.log2(1 + votes)) + accepted


def plain_text(text: str) -> str:
    """Convert HTML to plain text; return a text without an HTML tag unchanged.

    Raises: Drop if the HTML cannot be read.
    """
    if not _TAG.search(text):
        return text
    reader = _Reader()
    try:
        reader.feed(text)
        reader.close()
    except AssertionError as error:  # html.parser raises it for an unknown declaration
        raise Drop("HTML that cannot be read") from error
    return re.sub(r"\n{3,}", "\n\n", "".join(reader.parts)).strip()


class _Reader(HTMLParser):
    """An HTML parser that collects the pieces of the plain text in `parts`."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.in_pre = False

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self._mark("<pre>" if tag == "pre" else tag)

    def handle_endtag(self, tag: str) -> None:
        self._mark("</pre>" if tag == "pre" else "" if tag == "li" else tag)

    def handle_data(self, data: str) -> None:
        if not self.in_pre:
            data = re.sub(r"\s+", " ", data)
            data = data.lstrip() if self._last.endswith(("\n", "- ")) else data
        self.parts += [data] if data else []

    @property
    def _last(self) -> str:
        return self.parts[-1] if self.parts else "\n"

    def _mark(self, tag: str) -> None:
        if self.in_pre != (tag == "</pre>"):  # inside <pre> only </pre> is a mark; outside, </pre> is none
            return
        self.in_pre = tag == "<pre>"
        mark = _MARKS.get(tag, "")
        if mark == "`":
            self.parts.append(mark)
        elif mark and not self._last.endswith("- "):  # many list items start with <p>, which needs no line break
            self.parts += [self.parts.pop().rstrip() if self.parts else "", mark]


def _plain(record: Record, name: str) -> str:
    text = record.text(name)
    made = plain_text(text)
    record.count("repaired: HTML made text", made != text)
    return made


def _rank(answer: Record) -> int | None:
    """Return the rank of an answer, lowest = best: minus its score. None = it has no score."""
    if answer.get("pm_score") is not None:
        return -answer.whole("pm_score")
    if answer.get("score") is None:
        return None
    return -vote_score(answer.whole("score"), answer.get("is_accepted") is True)
