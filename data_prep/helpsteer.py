"""Convert HelpSteer2 and HelpSteer3 (Wang et al. 2024, 2025; nvidia/HelpSteer2, nvidia/HelpSteer3) to comparisons.

Three of their layouts are read; the columns determine which one a row has:
- `prompt, response, helpfulness, correctness, coherence, complexity, verbosity` (HelpSteer2 and HelpSteer): a row is
  one response with five ratings from 0 to 4. All responses to a prompt make one comparison, ranked by one of the five
  ratings, where equal ratings tie. The labels hold all five, and again the one by which the options are ranked, under
  the name `rating`.
- `prompt, response_1, response_2, preference_strength, split` (preferences of HelpSteer2): the row names its split.
- `context, response1, response2, overall_preference` (preferences of HelpSteer3): the context is messages.

A preference is from −3 (the first response is much better) to 3 (the second is); 0 is a tie, and its absolute value is
the strength. A prompt of several turns has `<extra_id_1>Assistant` and `<extra_id_1>User` between them. Responses
whose prompt has no other response are left out. The lists of single annotators (disagreements) are not read.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from data_prep.comparisons import ComparisonImporter
from data_prep.source import Found, Report, Splits
from offline_lmrl.errors import InputError, require, shown
from offline_lmrl.logs.comparison import Comparison
from offline_lmrl.logs.messages import read_turns
from offline_lmrl.logs.preference_forms import read_comparison
from offline_lmrl.logs.record import Record, drop_if
from offline_lmrl.logs.trajectory import Turn, messages_of
from offline_lmrl.settings import setting

RATINGS = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
SPLITS = {"train": "train", "val": "validation", "validation": "validation"}
_TAG = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")
_ROLES = {"User": "user", "Assistant": "assistant"}
_PAIRS = (
    ("prompt", "response_1", "response_2", "preference_strength"),
    ("context", "response1", "response2", "overall_preference"),
)


@dataclass(frozen=True)
class Rated:
    """One response to a prompt, and its five ratings, name -> 0 to 4."""

    prompt: tuple[Turn, ...]
    response: str
    ratings: Mapping[str, float]
    group: str = ""


@dataclass(frozen=True, kw_only=True)
class HelpSteer(ComparisonImporter):
    """Read ratings or preferences and write train.jsonl, validation.jsonl and report.json.

    The entry `assembled` of the report counts every rated response once.
    """

    rating: Literal[RATINGS] = setting("helpfulness", "the rating by which responses are ranked")

    def read(self, row: Record) -> Rated | tuple[str, Comparison] | None:
        """Return a rated response; or a comparison, after the split that the row names ("" = none); see `Importer`."""
        for names in _PAIRS:
            if set(names) <= row.keys():
                return _pair(row, names)
        if not {"prompt", "response", *RATINGS} <= row.keys():
            expected = ", or ".join(", ".join(names) for names in (*_PAIRS, ("prompt", "response", *RATINGS)))
            raise InputError(f"{row.where}: fields: found {shown(list(row))}, expected {expected}")
        ratings = {name: row.number(name) for name in RATINGS}
        return Rated(_prompt(row.text("prompt")), row.words("response", "empty response"), ratings)

    def assemble(self, found: Found, report: Report) -> Splits:
        """Make one comparison of all rated responses to a prompt; divide the rows into the splits that they name."""
        made: dict[str, list[Comparison]] = defaultdict(list)
        counts: Counter[str] = Counter()
        for split, rows in found.items():
            for own, row in (row for row in rows if isinstance(row, tuple)):
                made[own or split].append(row)
            made[split] += compare((row for row in rows if isinstance(row, Rated)), self.rating, counts)
        made = {split: rows for split, rows in made.items() if rows}
        if "all" in made and len(made) > 1:
            made["train"] = [*made.get("train", ()), *made.pop("all")]
        require(made, f"{self.input}: found nothing to compare ({dict(counts)}), expected two responses to one prompt")
        report["assembled"] = dict(counts)
        return made


def compare(rows: Iterable[Rated], rating: str, counts: Counter[str]) -> Iterator[Comparison]:
    """Yield, for each prompt, one comparison of all responses to it.

    Args:
      rows: responses to any prompts, in any order.
      rating: the name of the rating by which responses are ranked.
      counts: incremented for each response (compared or not), and for each repaired or dropped set of responses.
    """
    together: dict[tuple, list[Rated]] = defaultdict(list)
    for row in rows:
        together[row.group, row.prompt].append(row)
    for (group, prompt), same in together.items():
        options = [{**row.ratings, "rating": row.ratings[rating]} for row in same]
        parts = {
            "prompt": messages_of(prompt),
            "responses": [row.response for row in same],
            "source": "helpsteer",
            "ranks": [-option["rating"] for option in options],
            "group": group or None,
            "labels": {"options": options},
        }
        mine: Counter[str] = Counter()
        made = read_comparison(parts, "", mine)
        compared = len(made.options) if made else 0
        counts["responses compared"] += compared
        counts["responses not compared"] += len(same) - compared
        counts.update({f"sets of responses {name}": n for name, n in mine.items()})
        if made:
            yield made


def _pair(row: Record, names: tuple[str, ...]) -> tuple[str, Comparison] | None:
    before, *responses, preferred = names
    preference = row.number(preferred)
    require(-3 <= preference <= 3, f"{row.where}: {preferred}: found {preference:g}, expected -3 to 3")
    split = row.get("split")
    if split is not None and (not isinstance(split, str) or split not in SPLITS):
        raise row.error("split", f"one of {', '.join(SPLITS)}")
    if before == "context":
        prompt = read_turns(row, "context", allow_empty=True)
    else:
        prompt = _prompt(row.text(before))
    parts = {
        "labels": {**row.others({*names, "split"}), "strength": abs(preference)},
        "prompt": messages_of(prompt),
        "responses": [row.text(name) for name in responses],
        "ranks": [int(preference > 0), int(preference < 0)],
        "source": "helpsteer",
    }
    made = read_comparison(parts, row.where, row.repairs)
    return made and ("" if split is None else SPLITS[split], made)


def _prompt(text: str) -> tuple[Turn, ...]:
    first, *rest = _TAG.split(text)
    drop_if(not first.strip(), "empty prompt")
    parts = zip(rest[::2], rest[1::2], strict=True)
    return Turn("user", first), *(Turn(_ROLES[speaker], words) for speaker, words in parts)
