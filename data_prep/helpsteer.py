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
from pathlib import Path
from typing import Any, Literal

from data_prep import fields
from data_prep.comparisons import import_rows, publish
from offline_lmrl.errors import InputError
from offline_lmrl.logs.comparison import Comparison
from offline_lmrl.logs.forms import Drop, extra_columns, read_messages, read_text
from offline_lmrl.logs.preference_forms import read_comparison
from offline_lmrl.logs.trajectory import Turn, messages_of, shown

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


def prepare(
    input: str | Path,
    output: str | Path,
    *,
    rating: Literal[RATINGS] = "helpfulness",
    validation: float = 0.1,
    group: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Read ratings or preferences and write train.jsonl, validation.jsonl and report.json.

    Args:
      input: a .jsonl, .jsonl.gz or .parquet file, a folder of such files, a datasets folder or a hub name.
      output: folder to write to; created if needed.
      rating: the rating by which responses are ranked.
      validation: share of the groups (first user turns) that goes to validation if the source has no validation split.
      group: column by which rows are kept together in one split, such as a customer; null = the first user turn.
      seed: random seed of the split.
    Returns: the content of report.json. Its `assembled` counts every rated response once.
    Raises: InputError if nothing can be read, nothing is left or the output cannot be written.
    """
    found, report = import_rows(input, read_row, group)
    made: dict[str, list[Comparison]] = defaultdict(list)
    counts: Counter[str] = Counter()
    for split, rows in found.items():
        for own, row in (row for row in rows if isinstance(row, tuple)):
            made[own or split].append(row)
        made[split] += compare((row for row in rows if isinstance(row, Rated)), rating, counts)
    made = {split: rows for split, rows in made.items() if rows}
    if "all" in made and len(made) > 1:
        made["train"] = [*made.get("train", ()), *made.pop("all")]
    if not made:
        raise InputError(f"{input}: found nothing to compare ({dict(counts)}), expected two responses to one prompt")
    return publish(made, output, {**report, "assembled": dict(counts)}, validation, seed)


def read_row(row: Mapping, where: str, counts: Counter[str]) -> Rated | tuple[str, Comparison] | None:
    """Return what one row holds: a rated response; or a comparison, together with the split that the row names.

    Args:
      where: "file:row", the start of error messages.
      counts: incremented for each repair, or once for a dropped row, under a key that describes it.
    Returns: a Rated; or (split, comparison), where split is "" if the row names none; or None if the row is dropped.
    Raises: Drop if the row cannot be used, InputError for values of the wrong type.
    """
    for names in _PAIRS:
        if set(names) <= row.keys():
            return _pair(row, names, where, counts)
    if not {"prompt", "response", *RATINGS} <= row.keys():
        expected = ", or ".join(", ".join(names) for names in (*_PAIRS, ("prompt", "response", *RATINGS)))
        raise InputError(f"{where}: fields: found {shown(list(row))}, expected {expected}")
    ratings = {name: fields.number(row, name, where) for name in RATINGS}
    prompt, response = _prompt(fields.text(row, "prompt", where)), fields.text(row, "response", where)
    if not response.strip():
        raise Drop("empty response")
    return Rated(prompt, response, ratings)


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
        mine: Counter[str] = Counter()
        made = read_comparison(
            {
                "prompt": messages_of(prompt),
                "responses": [row.response for row in same],
                "source": "helpsteer",
                "ranks": [-option["rating"] for option in options],
                "group": group or None,
                "labels": {"options": options},
            },
            "",
            mine,
        )
        counts["responses compared"] += len(made.options) if made else 0
        counts["responses not compared"] += len(same) - (len(made.options) if made else 0)
        counts.update({f"sets of responses {name}": n for name, n in mine.items()})
        if made:
            yield made


def _pair(row: Mapping, names: tuple[str, ...], where: str, counts: Counter[str]) -> tuple[str, Comparison] | None:
    before, first, second, preferred = names
    preference = fields.number(row, preferred, where)
    if not -3 <= preference <= 3:
        raise InputError(f"{where}: {preferred}: found {preference:g}, expected -3 to 3")
    split = row.get("split")
    if split is not None and (not isinstance(split, str) or split not in SPLITS):
        raise InputError(f"{where}: split: found {shown(split)}, expected one of {', '.join(SPLITS)}")
    if before == "context":
        prompt = read_messages(row["context"], where, "context", counts, allow_empty=True)
    else:
        prompt = _prompt(fields.text(row, before, where))
    kept = {name for name in row if row[name] is not None} - {*names, "split"}
    labels = {**extra_columns(row, kept, counts), "strength": abs(preference)}
    made = read_comparison(
        {
            "prompt": messages_of(prompt),
            "responses": [fields.text(row, name, where) for name in (first, second)],
            "ranks": [int(preference > 0), int(preference < 0)],
            "source": "helpsteer",
            "labels": labels,
        },
        where,
        counts,
    )
    return made and ("" if split is None else SPLITS[split], made)


def _prompt(text: str) -> tuple[Turn, ...]:
    first, *rest = _TAG.split(read_text(text))
    if not first.strip():
        raise Drop("empty prompt")
    parts = zip(rest[::2], rest[1::2], strict=True)
    return Turn("user", first), *(Turn(_ROLES[speaker], words) for speaker, words in parts)
