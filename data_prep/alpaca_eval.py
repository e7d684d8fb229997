"""Convert judge annotations in the form of AlpacaEval (Li et al. 2023; tatsu-lab/alpaca_eval) to comparisons.

A row has an `instruction`, two outputs, and `preference`, from 1 to 2: preference − 1 is the probability that a
judging model prefers `output_2` to `output_1`; 0 is a tie, null a failed annotation. If one output, the reference, is
in all rows of an instruction, these rows become one comparison of all outputs. If the judging model prefers an output
to the reference with probability p, the output's target is proportional to its odds p / (1 − p), and the reference's
target to 1 (Luce's choice rule, which reproduces every p). Other rows stay pairs.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from data_prep import fields
from data_prep.comparisons import import_rows, publish
from offline_lmrl.errors import InputError
from offline_lmrl.logs.comparison import Comparison
from offline_lmrl.logs.forms import Drop
from offline_lmrl.logs.preference_forms import root_group
from offline_lmrl.logs.trajectory import Turn

KEPT = ("annotator", "dataset")  # columns that go to the labels; several values of one comparison are joined
_CERTAIN = 1e-9  # bound on p and 1 - p: at 0 or 1 the odds would be 0 or infinite


class Judged(NamedTuple):
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


def prepare(
    input: str | Path,
    output: str | Path,
    *,
    reference: bool = True,
    min_gap: float | None = None,
    validation: float = 0.1,
    group: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Read judge annotations and write train.jsonl, validation.jsonl and report.json.

    Args:
      input: a .jsonl, .jsonl.gz or .parquet file of annotations, a folder of such files or a hub name.
      output: folder to write to; created if needed.
      reference: keep the reference, the output that all others were judged against, as an option.
      min_gap: write only pairs of outputs, of which one is preferred to the reference with a probability that is at
        least this much higher than for the other; null = write comparisons of all outputs.
      validation: share of the instructions that goes to validation.
      group: column by which rows are kept together in one split; null = the instruction.
      seed: random seed of the split.
    Returns: the content of report.json. Its `assembled` counts every instruction and every output
      once, so that imported rows = outputs other than references + rows averaged with another.
    Raises: InputError for a min_gap below 0, if nothing can be read, nothing is left or the output cannot be written.
    """
    if min_gap is not None and not min_gap >= 0:
        raise InputError(f"min_gap: found {min_gap}, expected a number from 0 up, or null")

    def read(row: Mapping, where: str, counts: Counter[str]) -> Judged:
        return read_judged(row, where, counts, group)

    made, report = import_rows(input, read)
    counts: Counter[str] = Counter()
    comparisons = {}
    for split, rows in made.items():
        together = defaultdict(list)
        for row in rows:
            together[row.group, row.instruction].append(row)
        comparisons[split] = [
            comparison for same in together.values() for comparison in assemble(same, reference, min_gap, counts)
        ]
    if not any(comparisons.values()):
        raise InputError(
            f"{input}: found nothing left to compare ({dict(+counts)}), expected two options of one instruction "
            "(with min_gap: that differ by it)"
        )
    mean = _mean_preferences(row for rows in made.values() for row in rows)
    report = {**report, "assembled": dict(+counts)}
    return publish(
        comparisons,
        output,
        report,
        validation,
        seed,
        features={
            "the reply of the author that is preferred more often over the reference": lambda row, i: mean.get(
                row.labels["options"][i]["generator"], 0.5
            )
        },
    )


def read_judged(row: Mapping, where: str, counts: Counter[str], group: str | None = None) -> Judged:
    """Return the content of one row.

    Args:
      row: has `instruction`, `output_1`, `output_2` and `preference`.
      where: "file:row", the start of error messages.
      counts: incremented for each repair, under a key that describes it.
      group: the column that holds the group; None = no group.
    Raises: Drop if the row cannot be used, InputError for values of the wrong type.
    """
    instruction, *outputs = (fields.text(row, name, where) for name in ("instruction", "output_1", "output_2"))
    generators = (fields.text(row, name, where) if name in row else "" for name in ("generator_1", "generator_2"))
    preference = _preference(row, where, counts)
    if not instruction.strip() or not all(output.strip() for output in outputs):
        raise Drop("empty instruction or output")
    if outputs[0].split() == outputs[1].split():
        raise Drop("identical outputs")
    labels = {name: row[name] for name in KEPT if isinstance(row.get(name), str)}
    named = "" if group is None else fields.group(row, group, where)
    return Judged(instruction, tuple(outputs), tuple(generators), preference, labels, named)


def assemble(rows: Sequence[Judged], reference: bool, min_gap: float | None, counts: Counter[str]) -> list[Comparison]:
    """Return the comparisons of one instruction.

    Args:
      rows: all rows of the instruction.
      reference: True: the reference, the output that is in all rows, stays as an option. False: it is left out.
      min_gap: return pairs of outputs whose preferences over the reference differ by at least this probability; None =
        return comparisons of all outputs.
      counts: incremented for each instruction and output, and again under the reason for each that is left out.
    """
    common = set(rows[0].outputs).intersection(*(row.outputs for row in rows))
    counts["instructions"] += 1
    counts["instructions without a common reference, kept as pairs"] += not common
    stars = [rows] if common else [[row] for row in rows]
    made = []
    for star in stars:
        whole = _compare(star, next(text for text in star[0].outputs if not common or text in common), counts)
        kept = range(len(whole.options)) if reference else range(1, len(whole.options))
        if min_gap is None:
            compared = [tuple(kept)] if len(kept) > 1 else []
        else:
            preferences = [option["preference"] for option in whole.labels["options"]]
            compared = [(i, j) for i, j in combinations(kept, 2) if abs(preferences[i] - preferences[j]) >= min_gap]
        made += [whole.select(places) for places in compared]
        counts["outputs"] += len(whole.options)
        counts["outputs left out: references"] += len(whole.options) - len(kept)
        counts["outputs left out: no other to compare with" + " that differs by min_gap" * (min_gap is not None)] += (
            len(kept) - len({place for places in compared for place in places})
        )
    counts["instructions left out: no two outputs to compare"] += not made
    return made


def _compare(rows: Sequence[Judged], reference: str, counts: Counter[str]) -> Comparison:
    """Return one comparison. Its first option is the reference; the others are the outputs compared with it.

    Args:
      rows: rows that each have the reference as one of their two outputs.
      reference: the text of the reference.
      counts: incremented for each row that is averaged with another, and for each preference of 0 or 1, which is moved
        inward by _CERTAIN.
    """
    preferences: dict[str, list[float]] = defaultdict(list)
    authors: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        other = row.outputs[0] if row.outputs[1] == reference else row.outputs[1]
        preferences[other].append(row.preference if row.outputs[1] == other else 1 - row.preference)
        for text, generator in zip(row.outputs, row.generators, strict=True):
            if generator not in authors[text]:
                authors[text].append(generator)
    repeats = len(rows) - len(preferences)
    if repeats:
        counts["rows averaged with another on the same two outputs"] += repeats
    mean = {text: math.fsum(values) / len(values) for text, values in preferences.items()}
    odds = [1.0]
    for preference in mean.values():
        bounded = min(max(preference, _CERTAIN), 1 - _CERTAIN)
        if bounded != preference:
            counts[f"preferences of 0 or 1 moved inward by {_CERTAIN:g}"] += 1
        odds.append(bounded / (1 - bounded))
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


def _preference(row: Mapping, where: str, counts: Counter[str]) -> float:
    if row.get("preference") is None:
        raise Drop("no preference")
    value = fields.number(row, "preference", where)
    if value == 0:
        counts["repaired: preference 0 read as a tie"] += 1
        return 0.5
    if not 1 <= value <= 2:
        raise Drop("preference that is neither 0 nor from 1 to 2")
    return value - 1


def _mean_preferences(rows: Iterable[Judged]) -> dict[str, float]:
    """Return {model: mean of `preference`, in [0, 1], over the rows in which `output_2` is by this model}."""
    values = defaultdict(list)
    for row in rows:
        values[row.generators[1]].append(row.preference)
    return {name: math.fsum(some) / len(some) for name, some in values.items()}
