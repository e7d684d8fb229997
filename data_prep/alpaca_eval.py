"""Convert judge annotations in the form of AlpacaEval (Li et al. 2023; tatsu-lab/alpaca_eval) to comparisons.

A row has an `instruction`, two outputs, and `preference`, from 1 to 2: preference − 1 is the probability that a
judging model prefers `output_2` to `output_1`; 0 is a tie, null a failed annotation. If one output, the reference, is
in all rows of an instruction, these rows become one comparison of all outputs. If the judging model prefers an output
to the reference with probability p, the output's target is proportional to its odds p / (1 − p), and the reference's
target to 1 (Luce's choice rule, which reproduces every p). Other rows stay pairs.
"""

import math
import operator
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from data_prep.comparisons import ComparisonImporter
from data_prep.source import Found, Report, Splits
from offline_lmrl.errors import require
from offline_lmrl.logs.comparison import Comparison
from offline_lmrl.logs.comparison_checks import Feature
from offline_lmrl.logs.preference_forms import root_group
from offline_lmrl.logs.record import Record, drop_if
from offline_lmrl.logs.trajectory import Turn
from offline_lmrl.settings import setting

KEPT = ("annotator", "dataset")  # columns that go to the labels; several values of one comparison are joined
_CERTAIN = 1e-9  # bound on p and 1 - p: at 0 or 1 the odds would be 0 or infinite


@dataclass(frozen=True)
class Judged:
    """One row of the source.

    Attributes:
      outputs: two replies to the instruction.
      generators: the models that wrote them; "" = unknown.
      preference: P(the second output is better), in [0, 1].
      labels: the columns KEPT, as far as the row has them.
      group: the row's group if the user named a column for it, else "".
    """

    instruction: str
    outputs: tuple[str, str]
    generators: tuple[str, str]
    preference: float
    labels: Mapping[str, str]
    group: str = ""


@dataclass(frozen=True, kw_only=True)
class AlpacaEval(ComparisonImporter):
    """Read annotations by a judging model and write train.jsonl, validation.jsonl and report.json.

    The entry `assembled` of the report counts every instruction and every output once, so that imported rows = outputs
    other than references + rows averaged with another.
    """

    reference: bool = setting(True, "keep the reference, the output that all others were compared with, as an option")
    min_gap: float | None = setting(
        None,
        "write only pairs of outputs, of which one is preferred to the reference with a probability that is at least "
        "this much higher than for the other; null = write comparisons of all outputs",
    )

    def check(self) -> None:
        """Check the settings."""
        require(
            self.min_gap is None or self.min_gap >= 0,
            f"min_gap: found {self.min_gap}, expected a number from 0 up, or null",
        )

    def read(self, row: Record) -> Judged:
        """Return the content of one row."""
        instruction, *outputs = map(row.text, ("instruction", "output_1", "output_2"))
        generators = (row.text(name) if name in row else "" for name in ("generator_1", "generator_2"))
        preference = _preference(row)
        drop_if(
            not instruction.strip() or not all(output.strip() for output in outputs), "empty instruction or output"
        )
        drop_if(outputs[0].split() == outputs[1].split(), "identical outputs")
        labels = {name: row[name] for name in KEPT if isinstance(row.get(name), str)}
        return Judged(instruction, tuple(outputs), tuple(generators), preference, labels)

    def assemble(self, found: Found, report: Report) -> Splits:
        """Compare all outputs of an instruction."""
        counts: Counter[str] = Counter()
        comparisons: dict[str, list[Comparison]] = {}
        for split, rows in found.items():
            together = defaultdict(list)
            for row in rows:
                together[row.group, row.instruction].append(row)
            comparisons[split] = [one for same in together.values() for one in self.compare(same, counts)]
        require(
            any(comparisons.values()),
            f"{self.input}: found nothing left to compare ({dict(+counts)}), expected two options of one "
            "instruction (with min_gap: that differ by it)",
        )
        report["assembled"] = dict(+counts)
        return comparisons

    def features(self, found: Found) -> Mapping[str, Feature]:
        """Count how often the reply wins whose author is preferred more often over the reference."""
        values = defaultdict(list)
        for row in (row for rows in found.values() for row in rows):
            values[row.generators[1]].append(row.preference)
        mean = {name: math.fsum(some) / len(some) for name, some in values.items()}
        return {
            "the reply of the author that is preferred more often over the reference": lambda row, i: mean.get(
                row.labels["options"][i]["generator"], 0.5
            )
        }

    def compare(self, rows: Sequence[Judged], counts: Counter[str]) -> list[Comparison]:
        """Return the comparisons of one instruction.

        Args:
          rows: all rows of the instruction.
          counts: incremented for each instruction and output, and again under the reason for each that is left out.
        """
        common = set(rows[0].outputs).intersection(*(row.outputs for row in rows))
        counts["instructions"] += 1
        counts["instructions without a common reference, kept as pairs"] += not common
        stars = [rows] if common else [[row] for row in rows]
        made = []
        for star in stars:
            whole = _star(star, next(text for text in star[0].outputs if not common or text in common), counts)
            kept = range(len(whole.options)) if self.reference else range(1, len(whole.options))
            if self.min_gap is None:
                compared = [tuple(kept)] if len(kept) > 1 else []
            else:
                preferred = [option["preference"] for option in whole.labels["options"]]
                pairs = combinations(kept, 2)
                compared = [(i, j) for i, j in pairs if abs(preferred[i] - preferred[j]) >= self.min_gap]
            made += [whole.select(places) for places in compared]
            counts["outputs"] += len(whole.options)
            counts["outputs left out: references"] += len(whole.options) - len(kept)
            lonely = "outputs left out: no other to compare with" + " that differs by min_gap" * (
                self.min_gap is not None
            )
            counts[lonely] += len(kept) - len({place for places in compared for place in places})
        counts["instructions left out: no two outputs to compare"] += not made
        return made


def _star(rows: Sequence[Judged], reference: str, counts: Counter[str]) -> Comparison:
    """Return one comparison. Its first option is the reference; the others are the outputs compared with it.

    Args:
      rows: rows that each have the reference as one of their two outputs.
      reference: the text of the reference.
      counts: incremented for each row that is averaged with another, and for each preference of 0 or 1, which is moved
        inward by _CERTAIN.
    """
    preferences: dict[str, list[float]] = defaultdict(list)
    authors: dict[str, dict[str, None]] = defaultdict(dict)  # the models that wrote a text, each once
    for row in rows:
        other = row.outputs[0] if row.outputs[1] == reference else row.outputs[1]
        preferences[other].append(row.preference if row.outputs[1] == other else 1 - row.preference)
        for text, generator in zip(row.outputs, row.generators, strict=True):
            authors[text][generator] = None
    mean = {text: math.fsum(values) / len(values) for text, values in preferences.items()}
    bounded = [min(max(preference, _CERTAIN), 1 - _CERTAIN) for preference in mean.values()]
    repairs = {
        "rows averaged with another on the same two outputs": len(rows) - len(preferences),
        f"preferences of 0 or 1 moved inward by {_CERTAIN:g}": sum(map(operator.ne, bounded, mean.values())),
    }
    counts.update(+Counter(repairs))
    odds = [1.0, *(preference / (1 - preference) for preference in bounded)]
    total = math.fsum(odds)
    context = (Turn("user", rows[0].instruction),)
    texts = [reference, *mean]
    values_of = {name: dict.fromkeys(row.labels[name] for row in rows if name in row.labels) for name in KEPT}
    labels: dict[str, Any] = {name: ", ".join(values) for name, values in values_of.items() if values}
    labels["options"] = [{"generator": ", ".join(authors[text]), "preference": mean.get(text, 0.5)} for text in texts]
    return Comparison(
        context,
        tuple((Turn("assistant", text),) for text in texts),
        tuple(value / total for value in odds),
        group=rows[0].group or root_group(context),
        source="alpaca-eval",
        labels=labels,
    )


def _preference(row: Record) -> float:
    drop_if(row.get("preference") is None, "no preference")
    value = row.number("preference")
    if value == 0:
        row.count("repaired: preference 0 read as a tie")
        return 0.5
    drop_if(not 1 <= value <= 2, "preference that is neither 0 nor from 1 to 2")
    return value - 1
