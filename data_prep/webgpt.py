"""Convert comparisons of two answers with sources (Nakano et al. 2021; openai/webgpt_comparisons).

A row is a `question` and two answers, each with the quotes from which it was written and a score from −1 to 1, by how
much it is preferred to the other answer. How rows are read:
- P(the first is better) = (1 + score_0) / 2, so a score of 0 is a tie, which is kept. The target contains the strength
  of the preference, so the labels do not repeat it; `labels["options"]` holds the raw scores.
- An answer cites its quotes as [1], [2]. By default the quotes are left out, and so are the citation marks, which mean
  nothing without them. With `quotes`, the marks stay, and before each answer there is a tool turn with its quotes,
  which is not trained on.
- The group is the question: all rows with one id or with the same words. The token ids repeat the texts and are not
  read.
"""

import re
from dataclasses import dataclass

from data_prep.comparisons import ComparisonImporter
from data_prep.source import Found, Report, Splits
from offline_lmrl.errors import require
from offline_lmrl.logs.comparison import Comparison
from offline_lmrl.logs.record import Record, drop_if
from offline_lmrl.logs.trajectory import Turn
from offline_lmrl.settings import setting

_MARK = re.compile(r"[^\S\n]*\[\d+(?:, ?\d+)*\]")


@dataclass(frozen=True, kw_only=True)
class WebGpt(ComparisonImporter):
    """Read comparisons of answers and write train.jsonl, validation.jsonl and report.json."""

    quotes: bool = setting(False, "put the quotes of an answer before it, and keep the marks that cite them")

    def read(self, row: Record) -> Comparison:
        """Return the comparison of the two answers in one row."""
        question = row.inner("question")
        asked = question.words("full_text", "empty question")
        scores = [row.number(f"score_{i}") for i in (0, 1)]
        for i, score in enumerate(scores):
            require(abs(score) <= 1, f"{row.where}: score_{i}: found {score}, expected −1 to 1")
        drop_if(abs(sum(scores)) > 1e-6, "scores that do not sum to 0")
        answers = [self._answer(row, i) for i in (0, 1)]
        drop_if(answers[0][-1].content.split() == answers[1][-1].content.split(), "identical answers")
        row.count("kept: tie", not scores[0])
        first = (1 + scores[0]) / 2
        return Comparison(
            (Turn("user", asked),),
            tuple(answers),
            (first, 1 - first),
            group=question.text("id"),
            source="webgpt",
            labels={**question.known("id", "dataset"), "options": [{"score": score} for score in scores]},
        )

    def assemble(self, found: Found, report: Report) -> Splits:
        """Join the groups of a question."""
        return self.joined(found)

    def _answer(self, row: Record, i: int) -> tuple[Turn, ...]:
        answer = row.text(f"answer_{i}")
        if not self.quotes and _MARK.search(answer):
            row.count("repaired: citation marks removed from an answer")
            answer = _MARK.sub("", answer).strip()
        drop_if(not answer.strip(), "empty answer")
        cited = _quotes(row, f"quotes_{i}") if self.quotes else ""
        return (*([Turn("tool", cited)] if cited else []), Turn("assistant", answer))


def _quotes(row: Record, name: str) -> str:
    """Return the quotes of an answer as one text, each with the number by which the answer cites it; "" = no quotes.

    Args:
      name: the column with the quotes.
    """
    if row.get(name) is None:
        return ""
    quotes = row.inner(name)
    columns = [quotes.items_of(part) for part in ("title", "extract")]
    require(
        len(columns[0]) == len(columns[1]),
        f"{quotes.where}: found {len(columns[0])} titles, expected one for each extract",
    )
    pairs = [
        Record({"title": title, "extract": text}, quotes.where, quotes.repairs)
        for title, text in zip(*columns, strict=True)
    ]
    return "\n\n".join(f"[{i}] {pair.text('title')}\n{pair.text('extract')}" for i, pair in enumerate(pairs, 1))
