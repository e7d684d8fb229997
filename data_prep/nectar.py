"""Convert Nectar (Zhu et al. 2023; berkeley-nest/Nectar) to comparisons of seven replies ranked by a model.

A row is `prompt`, a transcript that ends with an open "Assistant:", and `answers`, objects with `answer`, `model` and
`rank` (1 = best). All answers make one comparison. The labels hold the `model` that wrote each answer, `source` (the
list of origins of the prompt) and `good_natured`.
"""

from dataclasses import dataclass

from data_prep.comparisons import StreamingImporter
from offline_lmrl.logs.comparison import Comparison
from offline_lmrl.logs.preference_forms import read_comparison
from offline_lmrl.logs.record import Record


@dataclass(frozen=True, kw_only=True)
class Nectar(StreamingImporter):
    """Read prompts with ranked answers and write train.jsonl, validation.jsonl and report.json."""

    def read(self, row: Record) -> Comparison | None:
        """Return the comparison of all answers to one prompt."""
        prompt, answers = row.text("prompt"), row.objects("answers")
        parts = {
            "prompt": prompt,
            "responses": [answer.text("answer") for answer in answers],
            "ranks": [None if answer.get("rank") is None else answer.number("rank") for answer in answers],
            "source": "nectar",
            "labels": row.others(("prompt", "answers"))
            | {"options": [answer.columns({"model"} & answer.keys()) for answer in answers]},
        }
        return read_comparison(parts, row.where, row.repairs)
