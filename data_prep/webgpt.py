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
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_prep.comparisons import import_rows, publish
from data_prep.fields import inner, items, known_values, number, text
from data_prep.groups import join_groups
from offline_lmrl.errors import InputError
from offline_lmrl.logs.comparison import Comparison
from offline_lmrl.logs.forms import Drop
from offline_lmrl.logs.trajectory import Turn

_MARK = re.compile(r"[^\S\n]*\[\d+(?:, ?\d+)*\]")


def prepare(
    input: str | Path,
    output: str | Path,
    *,
    quotes: bool = False,
    validation: float = 0.1,
    group: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Read comparisons of answers and write train.jsonl, validation.jsonl and report.json.

    Args:
      input: the public file, a folder with it or a hub name.
      output: folder to write to; created if needed.
      quotes: put the quotes of an answer before it, and keep the marks that cite them.
      validation: share of the questions that goes to validation.
      group: column by which rows are kept together in one split, such as a customer; null = the question.
      seed: random seed of the split.
    Returns: the content of report.json: counts of rows, repairs and drops, and facts about the data.
    Raises: InputError if nothing can be read or the output cannot be written.
    """

    def read(row: Mapping, where: str, counts: Counter[str]) -> Comparison:
        return read_answers(row, where, counts, quotes)

    made, report = import_rows(input, read, group)
    return publish(join_groups(made) if group is None else made, output, report, validation, seed)


def read_answers(row: Mapping, where: str, counts: Counter[str], quotes: bool = False) -> Comparison:
    """Return the comparison of the two answers in one row.

    Args:
      row: has `question`, the answers, their scores and their quotes, under the names of the public data.
      where: "file:row", the start of error messages.
      counts: incremented for each repair, under a key that describes it.
      quotes: put the quotes of an answer before it, see `prepare`.

    Raises: Drop if the row cannot be used, InputError for values of the wrong type.
    """
    question = inner(row, "question", where)
    asked = text(question, "full_text", f"{where}: question")
    if not asked.strip():
        raise Drop("empty question")
    scores = [number(row, f"score_{i}", where) for i in (0, 1)]
    for i, score in enumerate(scores):
        if abs(score) > 1:
            raise InputError(f"{where}: score_{i}: found {score}, expected −1 to 1")
    if abs(sum(scores)) > 1e-6:
        raise Drop("scores that do not sum to 0")
    answers = [_answer(row, i, where, quotes, counts) for i in (0, 1)]
    if answers[0][-1].content.split() == answers[1][-1].content.split():
        raise Drop("identical answers")
    if not scores[0]:
        counts["kept: tie"] += 1
    first = (1 + scores[0]) / 2
    group = text(question, "id", f"{where}: question")
    return Comparison(
        (Turn("user", asked),),
        tuple(answers),
        (first, 1 - first),
        group=group,
        source="webgpt",
        labels={**known_values(question, ("id", "dataset")), "options": [{"score": score} for score in scores]},
    )


def _answer(row: Mapping, i: int, where: str, quotes: bool, counts: Counter[str]) -> tuple[Turn, ...]:
    answer = text(row, f"answer_{i}", where)
    if not quotes and _MARK.search(answer):
        counts["repaired: citation marks removed from an answer"] += 1
        answer = _MARK.sub("", answer).strip()
    if not answer.strip():
        raise Drop("empty answer")
    cited = _quotes(row, f"quotes_{i}", where) if quotes else ""
    return (Turn("tool", cited), Turn("assistant", answer)) if cited else (Turn("assistant", answer),)


def _quotes(row: Mapping, name: str, where: str) -> str:
    """Return the quotes of an answer as one text, each with the number by which the answer cites it; "" = no quotes.

    Args:
      name: the column with the quotes.
    """
    if row.get(name) is None:
        return ""
    place = f"{where}: {name}"
    columns = [items(inner(row, name, where), part, place) for part in ("title", "extract")]
    if len(columns[0]) != len(columns[1]):
        raise InputError(f"{place}: found {len(columns[0])} titles, expected one for each extract")
    pairs = [{"title": title, "extract": extract} for title, extract in zip(*columns, strict=True)]
    return "\n\n".join(
        f"[{number}] {text(pair, 'title', place)}\n{text(pair, 'extract', place)}"
        for number, pair in enumerate(pairs, 1)
    )
