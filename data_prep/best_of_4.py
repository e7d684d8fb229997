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

from dataclasses import MISSING, dataclass, field
from numbers import Integral

from transformers import PreTrainedTokenizerBase

from data_prep.comparisons import ComparisonImporter
from offline_lmrl.errors import InputError, require, shown
from offline_lmrl.logs.comparison import Comparison
from offline_lmrl.logs.preference_forms import root_group
from offline_lmrl.logs.record import Record, drop_if
from offline_lmrl.logs.trajectory import Turn
from offline_lmrl.settings import setting
from offline_lmrl.tokens.tokenizers import load_tokenizer

SAMPLES = ("sample0", "sample1", "sample2", "sample3")
PAD = 50259
_NO_TEXT = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True, kw_only=True)
class BestOf4(ComparisonImporter):
    """Read best-of-four labels and write train.jsonl, validation.jsonl and report.json."""

    tokenizer: str = setting(
        MISSING, "folder or hub name of the tokenizer that made the ids; GPT-2's for the public files"
    )
    pad: int = setting(PAD, "the id used as padding of queries and samples")

    loaded: PreTrainedTokenizerBase = field(init=False, repr=False)

    def check(self) -> None:
        """Check the settings."""
        object.__setattr__(self, "loaded", load_tokenizer(self.tokenizer))

    def read(self, row: Record) -> Comparison:
        """Return the comparison of the different samples of one query."""
        query, *samples = (self._decoded(row, name) for name in ("query", *SAMPLES))
        best = row.whole("best")
        require(best in range(len(samples)), f"{row.where}: best: found {best}, expected 0 to {len(samples) - 1}")
        drop_if(not query.strip(), "empty query")
        drop_if(not samples[best].strip(), "the best sample is empty")
        places: dict[tuple[str, ...], int] = {}  # words of an option -> the first sample with these words
        for place, sample in enumerate(samples):
            if not sample.strip():
                row.count("repaired: empty sample left out")
            elif places.setdefault(tuple(sample.split()), place) != place:
                row.count("repaired: samples of the same words merged")
        drop_if(len(places) < 2, "fewer than two different samples")
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

    def _decoded(self, row: Record, name: str) -> str:
        ids = list(row.items_of(name))
        while ids and ids[-1] == self.pad:
            ids.pop()
        while ids and ids[0] == self.pad:
            del ids[0]
        for value in ids:
            if isinstance(value, bool) or not isinstance(value, Integral) or not 0 <= value < len(self.loaded):
                raise InputError(f"{row.where}: {name}: found {shown(value)}, expected ids of the tokenizer")
        if ids and ids[-1] == self.loaded.eos_token_id:
            row.count("repaired: end token removed")
            ids.pop()
        text = self.loaded.decode(ids, clean_up_tokenization_spaces=False)
        if text != text.strip(_NO_TEXT):
            row.count("repaired: part of a character removed at the end of a text")
            text = text.strip(_NO_TEXT)
        drop_if(_NO_TEXT in text, "token ids that do not decode to text")
        return text
