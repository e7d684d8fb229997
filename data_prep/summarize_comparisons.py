"""Convert comparisons of two summaries (Stiennon et al. 2020; openai/summarize-from-feedback, folder `comparisons`).

A row is `info`, two `summaries`, and the `choice` of a worker. How rows are read:
- The text to summarise is a forum post or an article of a site; the fields present determine which, not the batch
  name.
- White space at the ends of a summary is removed: in some batches it reveals the author.
- The worker's confidence is one number for both summaries (the paper's appendix C), from 1 (surely the first summary)
  to 9 (surely the second), as in the repository's example. It is kept in the labels; `soft` makes the target from it.
  If it contradicts the choice, the choice is used, and the row is counted.
- valid1 was used to choose models and becomes the validation split; valid2 was used for final figures and becomes the
  test split.
- The group is the post: all rows with one id or with the same words.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.comparisons import import_rows, publish
from data_prep.fields import inner, known_values, number, objects, text, whole
from data_prep.groups import join_groups
from offline_lmrl.errors import InputError
from offline_lmrl.logs.comparison import Comparison
from offline_lmrl.logs.forms import Drop
from offline_lmrl.logs.io import Row
from offline_lmrl.logs.trajectory import Turn, shown

SPLITS = {"train": "train", "valid1": "validation", "valid2": "test", "test": "test"}
_PARTS = {"subreddit": "SUBREDDIT: r/", "title": "TITLE: ", "post": "POST: ", "article": "ARTICLE: "}
_SCALE = 9


def prepare(
    input: str | Path,
    output: str | Path,
    *,
    soft: bool = False,
    validation: float = 0.1,
    group: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Read comparisons of summaries and write train.jsonl, validation.jsonl, test.jsonl and report.json.

    Args:
      input: a file with a batch, a folder of such files or a hub name.
      output: folder to write to; created if needed.
      soft: make the target from the worker's confidence if it is known: P(the second summary is better) =
        (confidence − 1) / 8.
      validation: share of the posts that goes to validation if no row is of the validation split.
      group: column by which rows are kept together in one split, such as a customer; null = the post.
      seed: random seed of the split.
    Returns: the content of report.json: counts of rows, repairs and drops, and facts about the data.
    Raises: InputError if nothing can be read or the output cannot be written.
    """

    def read(row: Mapping, where: str, counts: Counter[str]) -> tuple[str, Comparison]:
        return read_choice(row, where, counts, soft)

    found, report = import_rows(input, read, group)
    made = join_groups(by_own_split(found)) if group is None else by_own_split(found)
    wins = win_rates([row for rows in made.values() for row in rows])
    return publish(
        made,
        output,
        report,
        validation,
        seed,
        features={
            "the summary that a person wrote": lambda row, i: row.labels["options"][i].get("policy") == "ref",
            "the summary of the policy that is preferred more often": lambda row, i: wins[
                row.labels["options"][i].get("policy")
            ],
        },
    )


def read_choice(row: Mapping, where: str, counts: Counter[str], soft: bool = False) -> tuple[str, Comparison]:
    """Return the split that one row names, and the comparison of its two summaries.

    Args:
      row: has `info`, `summaries`, `choice` and `split`.
      where: "file:row", the start of error messages.
      counts: incremented for each repair, under a key that describes it.
      soft: make the target from the worker's confidence, see `prepare`.

    Raises: Drop if the row cannot be used, InputError for values of the wrong type.
    """
    context, known = read_info(row, where)
    summaries = objects(row, "summaries", where)
    if len(summaries) != 2:
        raise InputError(f"{where}: summaries: found {len(summaries)}, expected 2")
    texts = [read_summary(summary, f"{where}: summaries[{i}]", counts) for i, summary in enumerate(summaries)]
    if texts[0].split() == texts[1].split():
        raise Drop("identical summaries")
    choice = whole(row, "choice", where)
    if choice not in (0, 1):
        raise InputError(f"{where}: choice: found {choice}, expected 0 or 1")
    labels = {**known, "options": [known_values(summary, ("policy", "note")) for summary in summaries]}
    second = float(choice)
    confidence = _confidence(row, where)
    if confidence is not None:
        labels["confidence"] = confidence
        given = (confidence - 1) / (_SCALE - 1)
        if (given > 0.5) != choice and given != 0.5:
            counts["kept: the confidence favours the summary that was not chosen"] += 1
        elif soft:
            second = given
    elif soft:
        counts["kept: no confidence, so the target is the choice"] += 1
    return read_split(row, where), Comparison(
        context,
        tuple((Turn("assistant", words),) for words in texts),
        (1 - second, second),
        group=known["id"],
        source="summarize-comparisons",
        labels=labels,
    )


def read_info(row: Mapping, where: str) -> tuple[tuple[Turn, ...], dict[str, Any]]:
    """Return the user turn with the text to summarise, as a tuple, and facts for the labels.

    Returns: the turn; and id and site of the text, worker, batch and split, by name, as far as they are known.
    Raises: Drop if the text is empty. InputError for values of the wrong type.
    """
    info, place = inner(row, "info", where), f"{where}: info"
    kinds = [name for name in ("post", "article") if info.get(name) is not None]
    if len(kinds) != 1:
        raise InputError(
            f"{place}: found {' and '.join(kinds) or 'neither'}, expected exactly one of post and article"
        )
    if not text(info, kinds[0], place).strip():
        raise Drop("empty post or article")
    parts = [start + text(info, name, place) for name, start in _PARTS.items() if info.get(name) is not None]
    about_row = known_values(row, ("worker", "batch", "split"))
    known = {"id": text(info, "id", place), **known_values(info, ("site",)), **about_row}
    return (Turn("user", "\n\n".join([*parts, "TL;DR:"])),), known


def read_summary(summary: Mapping, where: str, counts: Counter[str]) -> str:
    """Return the text of a summary without white space at its ends.

    Args:
      summary: an object with `text`.
      where: the start of error messages.
      counts: incremented if white space is removed.
    Raises: Drop if the text is empty.
    """
    words = text(summary, "text", where)
    if not words.strip():
        raise Drop("empty summary")
    if words != words.strip():
        counts["repaired: white space removed at the ends of a summary"] += 1
    return words.strip()


def read_split(row: Mapping, where: str) -> str:
    """Return the split (train, validation or test) for the name in the row's column `split`, a key of SPLITS."""
    split = text(row, "split", where)
    if split not in SPLITS:
        raise InputError(f"{where}: split: found {shown(split)}, expected one of {', '.join(SPLITS)}")
    return SPLITS[split]


def by_own_split(found: Mapping[str, Sequence[tuple[str, Row]]]) -> dict[str, list[Row]]:
    """Return rows by the split that each of them names, instead of by the file that they are from.

    Args:
      found: split of the source -> pairs of (split that the row names, row).
    Returns: split -> rows, without empty splits.
    """
    splits: dict[str, list[Row]] = {split: [] for split in SPLITS.values()}
    for rows in found.values():
        for split, row in rows:
            splits[split].append(row)
    return {split: rows for split, rows in splits.items() if rows}


def win_rates(rows: Sequence[Comparison]) -> dict[str | None, float]:
    """Return {policy: share of comparisons in which its summary is preferred}; None is the key of unknown policies."""
    wins = defaultdict(list)
    for row in rows:
        for option, probability in zip(row.labels["options"], row.target, strict=True):
            wins[option.get("policy")].append(probability)
    return {policy: math.fsum(some) / len(some) for policy, some in wins.items()}


def _confidence(row: Mapping, where: str) -> float | None:
    if row.get("extra") is None or inner(row, "extra", where).get("confidence") is None:
        return None
    value = number(inner(row, "extra", where), "confidence", f"{where}: extra")
    if not 1 <= value <= _SCALE:
        raise InputError(f"{where}: extra: confidence: found {value}, expected 1 to {_SCALE}")
    return value
