"""Rows of results: one line of a results.jsonl, which `compare` and `evaluate play` write. Its `kind` is one of:

    comparison    the config, and the baseline and label columns that tables show
    behaviour     the training data
    optimum       the best possible mean score, if the environment knows it
    published     a result that is quoted, never measured here
    run           the result of one method, training seed and setting

A setting is a way of decoding ("sampled", "greedy" or "planned") together with the way in which β, the weight of value
guidance, was chosen. A row of kind run, called a run here, stores the outcome of its episodes as `cells`, a list of
[cluster, sum of scores, number of episodes], from which means, intervals and paired differences over seeds are
computed; a cluster is a set of episodes that depend on each other. `scores` lists the single episode scores of each
cell, in the same order for every method.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from offline_lmrl.errors import InputError, shown
from offline_lmrl.logs.files import reading
from offline_lmrl.renamed import current

# kind of row -> fields that `read_results` requires, with their types
NEEDED = {
    "comparison": {},
    "behaviour": {"method": str},
    "optimum": {"method": str},
    "published": {"method": str},
    "run": {"method": str, "decode": str, "seed": int, "cells": list, "config": dict},
}

# Version of the rows. Increase it when a code change makes the same settings train or play differently: rows of the
# old version are then refused instead of being mixed with new ones.
SCHEME = 3

Row = Mapping[str, Any]


def as_lines(rows: Iterable[Row]) -> str:
    """Return rows as the text of a results.jsonl."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def plain(value: Any) -> Any:
    """Return a value as JSON would give it back: with lists for tuples and texts for keys."""
    return json.loads(json.dumps(value))


def _current_row(row: Any) -> Any:
    """Return a row of results with its algorithm and config under their current names; the rest holds none."""
    if not isinstance(row, dict):
        return row
    return row | current({name: row[name] for name in ("algorithm", "config") if name in row})


def read_results(path: str | Path) -> list[dict[str, Any]]:
    """Read the rows of a results.jsonl.

    Raises: InputError "file:row: ..." for the first row that `compare` cannot have written.
    """
    with reading(path, "rows of results as JSON"):
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(_current_row(json.loads(line)))
        except ValueError as error:
            raise InputError(f"{path}:{number}: found {error}, expected one row of results as JSON") from error
        _check_row(rows[-1], f"{path}:{number}")
    return rows


def _check_row(row: Any, where: str) -> None:
    """Check the fields of a row that NEEDED requires, and the form of its `cells`.

    Args:
      row: the parsed row.
      where: "file:row", the start of the error message.
    Raises: InputError that names the field.
    """
    kind = row.get("kind") if isinstance(row, dict) else None
    if not isinstance(kind, str) or kind not in NEEDED:
        raise InputError(f"{where}: kind: found {shown(kind)}, expected one of {', '.join(NEEDED)}")
    for name, type_ in NEEDED[kind].items():
        if not isinstance(row.get(name), type_):
            raise InputError(f"{where}: {name}: found {shown(row.get(name))}, expected what `compare` writes")
    for cell in row["cells"] if kind == "run" else ():
        if not (isinstance(cell, list) and len(cell) == 3 and all(isinstance(n, int | float) for n in cell[1:])):
            raise InputError(f"{where}: cells: found {shown(cell)}, expected [cluster, sum of scores, episodes]")
