"""Commands that score logs: relabel, select."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from offline_lmrl.cli_parser import call
from offline_lmrl.data.errors import InputError


def relabel(argv: Sequence[str]) -> None:
    """`relabel DATA --scorer SCORER --output PATH`."""
    call("relabel DATA --scorer SCORER --output PATH [--key value ...]", _relabel, argv)


def select(argv: Sequence[str]) -> None:
    """`select DATA --scorer ENSEMBLE --output PATH`."""
    call("select DATA --scorer ENSEMBLE --output PATH [--key value ...]", _select, argv)


def _relabel(
    data: str,
    *,
    scorer: str,
    output: Path,
    place: Literal["terminal", "turn"] = "terminal",
    make: Literal["targets", "rewards"] = "targets",
    normalise: Literal["none", "global", "group", "rank"] = "none",
) -> None:
    """Score logs: trajectories get rewards, comparisons get targets or become trajectories with rewards.

    Args:
      data: a file, folder or hub name of trajectories or of comparisons.
      scorer: folder or hub name of a reward model, package.module:function, a YAML file, or a mapping such as
        "{kind: ensemble, scorers: [runs/a, runs/b], k: 1}".
      output: file (.jsonl, .jsonl.gz, .parquet) or datasets folder; for data with several splits a folder.
      place: of trajectories' rewards: on the last agent turn, or each agent turn scored by itself.
      make: what comparisons become.
      normalise: rewards of comparisons: as scored, or put on one scale over all, per group, or as a rank in the group.
    """
    from offline_lmrl.data.io import (
        holds_comparisons,
        read_comparison_splits,
        read_splits,
        write_comparisons,
        write_trajectories,
    )
    from offline_lmrl.data.preferences import to_trajectories
    from offline_lmrl.decoding.scorers import fitting, load_scorer, relabel_comparisons, relabel_trajectories

    counts: Counter[str] = Counter()
    judge = load_scorer(scorer)
    if not holds_comparisons(data):
        splits = read_splits(data, counts=counts)
        made = {name: relabel_trajectories(rows, judge, place, counts) for name, rows in splits.items()}
        _write_splits(output, made, write_trajectories)
    else:
        splits = read_comparison_splits(data, counts=counts)
        read = {name: fitting(rows, judge, counts) for name, rows in splits.items()}
        if make == "targets":
            made = {name: relabel_comparisons(rows, judge) for name, rows in read.items()}
            _write_splits(output, made, write_comparisons)
        else:
            made = {name: to_trajectories(rows, judge, "terminal", normalise, counts) for name, rows in read.items()}
            _write_splits(output, made, write_trajectories)
    _print_counts({f"{name}: rows": len(rows) for name, rows in splits.items()} | +counts)


def _select(data: str, *, scorer: str, output: Path, n: int = 100) -> None:
    """Write the pairs of replies that an ensemble of reward models disagrees on most: what to label next.

    Args:
      data: a file, folder or hub name of comparisons; their targets are not looked at.
      scorer: an ensemble, as a YAML file or a mapping: "{kind: ensemble, scorers: [runs/a, runs/b]}".
      output: file or datasets folder.
      n: how many pairs, at most one of each comparison.
    """
    from offline_lmrl.data.io import read_comparisons, write_comparisons
    from offline_lmrl.decoding.scorers import Ensemble, fitting, load_scorer, most_disputed

    if n < 1:
        raise InputError(f"n: found {n}, expected at least 1")
    ensemble = load_scorer(scorer)
    if not isinstance(ensemble, Ensemble):
        raise InputError(f"scorer: found {scorer!r}, expected an ensemble, whose members can disagree")
    counts: Counter[str] = Counter()
    chosen = most_disputed(fitting(read_comparisons(data, counts=counts), ensemble, counts), ensemble, n)
    write_comparisons(output, chosen)
    _print_counts({"pairs": len(chosen), "largest disagreement": chosen[0].labels["disagreement"]} | +counts)


def _write_splits(output: Path, splits: dict[str, list[Any]], write: Callable[[Path, list[Any]], None]) -> None:
    if len(splits) == 1:
        write(output, *splits.values())
        return
    for name, rows in splits.items():
        write(output / f"{name}.jsonl", rows)


def _print_counts(counts: dict[str, float]) -> None:
    for name, value in counts.items():
        print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
