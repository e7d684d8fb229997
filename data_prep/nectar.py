"""Convert Nectar (Zhu et al. 2023; berkeley-nest/Nectar) to comparisons of seven replies ranked by a model.

A row is `prompt`, a transcript that ends with an open "Assistant:", and `answers`, objects with `answer`, `model` and
`rank` (1 = best). All answers make one comparison. The labels hold the `model` that wrote each answer, `source` (the
list of origins of the prompt) and `good_natured`.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_prep import fields
from data_prep.comparisons import convert
from offline_lmrl.logs.comparison import Comparison
from offline_lmrl.logs.forms import extra_columns
from offline_lmrl.logs.preference_forms import read_comparison


def prepare(
    input: str | Path,
    output: str | Path,
    *,
    validation: float = 0.1,
    group: str | None = None,
    seed: int = 0,
    processes: int = 1,
) -> dict[str, Any]:
    """Read prompts with ranked answers and write train.jsonl, validation.jsonl and report.json.

    Args:
      input: a .parquet, .jsonl or .jsonl.gz file, a folder of such files, a datasets folder or a hub name.
      output: folder to write to; created if needed.
      validation: share of the groups (first user turns) that goes to validation if the source has no validation split.
      group: column by which rows are kept together in one split, such as a customer; null = the first user turn.
      seed: random seed of the split.
      processes: number of processes that read rows.
    Returns: the content of report.json: counts of rows, repairs and drops, and facts about the data.
    Raises: InputError if nothing can be read or the output cannot be written.
    """
    return convert(input, read_ranked, output, validation, seed, processes, group)


def read_ranked(row: Mapping, where: str, counts: Counter[str]) -> Comparison | None:
    """Return the comparison of one row, or None if the row is dropped.

    Args:
      row: has `prompt` and `answers`.
      where: "file:row", the start of error messages.
      counts: incremented for each repair, or once for a dropped row, under a key that describes it.
    """
    prompt, answers = fields.text(row, "prompt", where), fields.objects(row, "answers", where)
    here = [f"{where}: answers[{i}]" for i in range(len(answers))]
    replies = [fields.text(answer, "answer", place) for answer, place in zip(answers, here, strict=True)]
    ranks = [
        None if answer.get("rank") is None else fields.number(answer, "rank", place)
        for answer, place in zip(answers, here, strict=True)
    ]
    labels = extra_columns(row, {name for name in row if row[name] is not None} - {"prompt", "answers"}, counts)
    labels["options"] = [extra_columns(answer, {"model"} & answer.keys(), counts) for answer in answers]
    return read_comparison(
        {"prompt": prompt, "responses": replies, "ranks": ranks, "source": "nectar", "labels": labels}, where, counts
    )
