"""Convert best-of-four samples in token ids (Ziegler et al. 2019; openai/lm-human-preferences) to comparisons.

A row is a `query` and four continuations, `sample0` to `sample3`, all as GPT-2 token ids, and `best`, the index of the
best one. How rows are read:
- Padding at both ends is removed first, because its id is outside the vocabulary. The given tokenizer decodes the
  rest.
- Texts were cut at a number of tokens, so their last character may be incomplete; it is removed. A row whose ids do
  not decode to text elsewhere is dropped.
- Samples with the same words are one option. A row with fewer than two different samples is dropped. Only the best is
  known, so the target is one-hot over the options, and there is no ranking.
- The group is the query.
"""

from collections import Counter
from collections.abc import Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from data_prep.comparisons import import_rows, publish
from data_prep.fields import items, whole
from offline_lmrl.errors import InputError
from offline_lmrl.logs.comparison import Comparison
from offline_lmrl.logs.forms import Drop
from offline_lmrl.logs.preference_forms import root_group
from offline_lmrl.logs.trajectory import Turn, shown
from offline_lmrl.tokens.tokenizers import load_tokenizer

SAMPLES = ("sample0", "sample1", "sample2", "sample3")
PAD = 50259
_NO_TEXT = "\N{REPLACEMENT CHARACTER}"


def prepare(
    input: str | Path,
    output: str | Path,
    *,
    tokenizer: str,
    pad: int = PAD,
    validation: float = 0.1,
    group: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Read best-of-four labels and write train.jsonl, validation.jsonl and report.json.

    Args:
      input: a file of labels, a folder of them or a hub name.
      output: folder to write to; created if needed.
      tokenizer: folder or hub name of the tokenizer that made the ids; GPT-2's for the public files.
      pad: the id used as padding of queries and samples.
      validation: share of the queries that goes to validation.
      group: column by which rows are kept together in one split, such as a customer; null = the query.
      seed: random seed of the split.
    Returns: the content of report.json: counts of rows, repairs and drops, and facts about the data.
    Raises: InputError if nothing can be read or the output cannot be written.
    """
    loaded = load_tokenizer(tokenizer)

    def read(row: Mapping, where: str, counts: Counter[str]) -> Comparison:
        return read_samples(row, where, counts, loaded, pad)

    made, report = import_rows(input, read, group)
    return publish(made, output, report, validation, seed)


def read_samples(
    row: Mapping, where: str, counts: Counter[str], tokenizer: PreTrainedTokenizerBase, pad: int = PAD
) -> Comparison:
    """Return the comparison of one row.

    Args:
      where: "file:row", the start of error messages.
      counts: incremented for each repair, under a key that describes it.
      tokenizer: the tokenizer that made the ids.
      pad: the id used as padding.

    Raises: Drop if the row cannot be used, InputError for values of the wrong type.
    """
    query, *samples = (_decoded(row, name, where, counts, tokenizer, pad) for name in ("query", *SAMPLES))
    best = whole(row, "best", where)
    if best not in range(len(samples)):
        raise InputError(f"{where}: best: found {best}, expected 0 to {len(samples) - 1}")
    if not query.strip():
        raise Drop("empty query")
    if not samples[best].strip():
        raise Drop("the best sample is empty")
    places: dict[tuple[str, ...], int] = {}  # words of an option -> the first sample with these words
    for place, sample in enumerate(samples):
        if not sample.strip():
            counts["repaired: empty sample left out"] += 1
        elif places.setdefault(tuple(sample.split()), place) != place:
            counts["repaired: samples of the same words merged"] += 1
    if len(places) < 2:
        raise Drop("fewer than two different samples")
    chosen = places[tuple(samples[best].split())]
    context = (Turn("user", query),)
    return Comparison(
        context,
        tuple((Turn("assistant", samples[place]),) for place in places.values()),
        tuple(float(place == chosen) for place in places.values()),
        group=root_group(context),
        source="best-of-4",
        labels={"options": [{"sample": place} for place in places.values()]},
    )


def _decoded(
    row: Mapping, name: str, where: str, counts: Counter[str], tokenizer: PreTrainedTokenizerBase, pad: int
) -> str:
    ids = list(items(row, name, where))
    while ids and ids[-1] == pad:
        ids.pop()
    while ids and ids[0] == pad:
        del ids[0]
    for value in ids:
        if isinstance(value, bool) or not isinstance(value, Integral) or not 0 <= value < len(tokenizer):
            raise InputError(f"{where}: {name}: found {shown(value)}, expected ids of the tokenizer")
    if ids and ids[-1] == tokenizer.eos_token_id:
        counts["repaired: end token removed"] += 1
        ids.pop()
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    if text != text.strip(_NO_TEXT):
        counts["repaired: part of a character removed at the end of a text"] += 1
        text = text.strip(_NO_TEXT)
    if _NO_TEXT in text:
        raise Drop("token ids that do not decode to text")
    return text
