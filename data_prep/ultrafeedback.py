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
from collections.abc import Collection
from dataclasses import dataclass

from data_prep.comparisons import StreamingImporter
from offline_lmrl.errors import require, shown
from offline_lmrl.logs.comparison import Comparison
from offline_lmrl.logs.preference_forms import read_comparison
from offline_lmrl.logs.record import Record, drop_if
from offline_lmrl.settings import setting

ASPECTS = ("helpfulness", "honesty", "instruction_following", "truthfulness")
_KEPT = {"model", "principle", "custom_system_prompt", "critique", "overall_score"}
_USED = {"instruction", "completions", "models"}


@dataclass(frozen=True, kw_only=True)
class UltraFeedback(StreamingImporter):
    """Read instructions with rated completions and write train.jsonl, validation.jsonl and report.json."""

    truthful_qa: bool = setting(False, "keep the questions of TruthfulQA")

    def read(self, row: Record) -> Comparison | None:
        """Return the comparison of the completions of one instruction."""
        instruction = row.words("instruction", "empty instruction")
        drop_if(row.get("source") == "truthful_qa" and not self.truthful_qa, "a question of TruthfulQA, a benchmark")
        responses, rated, options = [], [], []
        for completion in row.objects("completions"):
            responses.append(completion.text("response"))
            rated.append(_ratings(completion))
            options.append({**completion.columns(_KEPT & completion.keys()), "ratings": rated[-1]})
            if options[-1].get("overall_score") == 10 and rated[-1] and _mean(rated[-1], rated[-1]) <= 2:
                row.count("repaired: overall_score 10 with a mean rating of at most 2 read as 1")
                options[-1]["overall_score"] = 1
        common = set(ASPECTS).intersection(*(ratings for ratings in rated if ratings))
        drop_if(not any(rated) or not common, "no aspect on which all rated completions have a rating")
        row.count(
            "repaired: aspects left out on which some rated completion has no rating",
            any(ratings and len(ratings) > len(common) for ratings in rated),
        )
        for option, ratings in zip(options, rated, strict=True):
            option["rating"] = _mean(ratings, common) if ratings else None
        parts = {
            "prompt": [{"role": "user", "content": instruction}],
            "responses": responses,
            "ranks": [None if option["rating"] is None else -option["rating"] for option in options],
            "source": "ultrafeedback",
            "labels": {**row.others(_USED), "options": options},
        }
        return read_comparison(parts, row.where, row.repairs)


def _ratings(completion: Record) -> dict[str, float]:
    """Return {aspect: rating from 1 to 5} for the ASPECTS for which the completion has a rating."""
    found = {}
    annotations = _inner(completion, "annotations")
    for aspect in ASPECTS:
        value = _inner(annotations, aspect).get("Rating")
        if value is None or (isinstance(value, str) and value.strip().upper() in ("", "N/A")):
            continue
        try:
            rating = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            rating = math.nan
        require(
            1 <= rating <= 5, f"{annotations.where}: {aspect}: Rating: found {shown(value)}, expected 1 to 5 or N/A"
        )
        found[aspect] = rating
    return found


def _inner(record: Record, name: str) -> Record:
    """Return a field that is an object; null is an empty one."""
    return (record if record.get(name) is not None else Record({name: {}}, record.where, record.repairs)).inner(name)


def _mean(ratings: dict[str, float], aspects: Collection[str]) -> float:
    return math.fsum(ratings[aspect] for aspect in aspects) / len(aspects)
