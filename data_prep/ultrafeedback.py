"""Convert UltraFeedback (Cui et al. 2023; openbmb/UltraFeedback) to comparisons of all completions of an instruction.

How rows are read:
- A completion's score is the mean of its ratings for helpfulness, honesty, instruction following and truthfulness, as
  its authors advise. The completions are ranked by it, and equal scores tie. No rejected completion is drawn at
  random, so no seed decides what is compared. The labels hold the score as the option's `rating`, for rewards that
  measure the quality of each option.
- Ratings are text, and some are "N/A". Only aspects rated in every rated completion are averaged; a completion without
  any rating is left out.
- `overall_score` is not used. Some published versions have 10 where the annotating model meant 1; if the mean rating
  is at most 2, a 10 is therefore stored in the labels as 1.
- Questions of TruthfulQA, which is a benchmark, are dropped by default.
- Completions of one instruction were sampled with different system prompts, so these prompts are stored in the labels
  and are not context.
"""

import math
from collections import Counter
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from data_prep import fields
from data_prep.comparisons import convert
from offline_lmrl.errors import InputError
from offline_lmrl.logs.comparison import Comparison
from offline_lmrl.logs.forms import Drop, extra_columns
from offline_lmrl.logs.preference_forms import read_comparison
from offline_lmrl.logs.trajectory import shown

ASPECTS = ("helpfulness", "honesty", "instruction_following", "truthfulness")
_KEPT = {"model", "principle", "custom_system_prompt", "critique", "overall_score"}
_USED = {"instruction", "completions", "models"}


def prepare(
    input: str | Path,
    output: str | Path,
    *,
    truthful_qa: bool = False,
    validation: float = 0.1,
    group: str | None = None,
    seed: int = 0,
    processes: int = 1,
) -> dict[str, Any]:
    """Read instructions with rated completions and write train.jsonl, validation.jsonl and report.json.

    Args:
      input: a .jsonl, .jsonl.gz or .parquet file, a folder of such files or a hub name.
      output: folder to write to; created if needed.
      truthful_qa: keep the questions of TruthfulQA.
      validation: share of the groups (instructions) that goes to validation if the source has no validation split.
      group: column by which rows are kept together in one split, such as a customer; null = the instruction.
      seed: random seed of the split.
      processes: number of processes that read rows.
    Returns: the content of report.json: counts of rows, repairs and drops, and facts about the data.
    Raises: InputError if nothing can be read or the output cannot be written.
    """
    return convert(input, partial(read_rated, truthful_qa=truthful_qa), output, validation, seed, processes, group)


def read_rated(row: Mapping, where: str, counts: Counter[str], truthful_qa: bool = False) -> Comparison | None:
    """Return the comparison of the completions of one instruction, or None if the row is dropped.

    Args:
      row: has `instruction` and `completions`.
      where: "file:row", the start of error messages.
      counts: incremented for each repair, or once for a dropped row, under a key that describes it.
      truthful_qa: keep the questions of TruthfulQA.
    Raises: Drop if the row cannot be used, InputError for values of the wrong type.
    """
    instruction = fields.text(row, "instruction", where)
    if not instruction.strip():
        raise Drop("empty instruction")
    if row.get("source") == "truthful_qa" and not truthful_qa:
        raise Drop("a question of TruthfulQA, a benchmark")
    responses, rated, options = [], [], []
    for i, completion in enumerate(fields.objects(row, "completions", where)):
        here = f"{where}: completions[{i}]"
        responses.append(fields.text(completion, "response", here))
        rated.append(_ratings(completion, here))
        options.append({**extra_columns(completion, _KEPT & completion.keys(), counts), "ratings": rated[-1]})
        if options[-1].get("overall_score") == 10 and rated[-1] and _mean(rated[-1], rated[-1]) <= 2:
            counts["repaired: overall_score 10 with a mean rating of at most 2 read as 1"] += 1
            options[-1]["overall_score"] = 1
    common = set(ASPECTS).intersection(*(ratings for ratings in rated if ratings))
    if not any(rated) or not common:
        raise Drop("no aspect on which all rated completions have a rating")
    if any(ratings and len(ratings) > len(common) for ratings in rated):
        counts["repaired: aspects left out on which some rated completion has no rating"] += 1
    for option, ratings in zip(options, rated, strict=True):
        option["rating"] = _mean(ratings, common) if ratings else None
    ranks = [None if option["rating"] is None else -option["rating"] for option in options]
    labels = extra_columns(row, {name for name in row if row[name] is not None} - _USED, counts)
    return read_comparison(
        {
            "prompt": [{"role": "user", "content": instruction}],
            "responses": responses,
            "ranks": ranks,
            "source": "ultrafeedback",
            "labels": {**labels, "options": options},
        },
        where,
        counts,
    )


def _ratings(completion: Mapping, where: str) -> dict[str, float]:
    """Return {aspect: rating from 1 to 5} for the ASPECTS for which the completion has a rating."""
    found = {}
    annotations = _object(completion, "annotations", where)
    for aspect in ASPECTS:
        value = _object(annotations, aspect, f"{where}: annotations").get("Rating")
        if value is None or (isinstance(value, str) and value.strip().upper() in ("", "N/A")):
            continue
        try:
            rating = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            rating = math.nan
        if not 1 <= rating <= 5:
            raise InputError(f"{where}: annotations: {aspect}: Rating: found {shown(value)}, expected 1 to 5 or N/A")
        found[aspect] = rating
    return found


def _object(record: Mapping, name: str, where: str) -> Mapping:
    value = record.get(name)
    if not isinstance(value, Mapping | None):
        raise InputError(f"{where}: {name}: found {shown(value)}, expected an object")
    return value or {}


def _mean(ratings: Mapping[str, float], aspects: Collection[str]) -> float:
    return math.fsum(ratings[aspect] for aspect in aspects) / len(aspects)
