"""Commands that score logs: relabel, select."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from offline_lmrl.cli.output import check_output, print_report
from offline_lmrl.errors import InputError, shown
from offline_lmrl.logs.trl import TrlForm
from offline_lmrl.settings import REQUIRED, setting


@dataclass(frozen=True, kw_only=True)
class RelabelConfig(TrlForm):
    """Score logs: trajectories get rewards, comparisons get targets or become trajectories with rewards."""

    data: str = setting(REQUIRED, "A file, folder or hub name of trajectories or of comparisons.")
    scorer: str = setting(
        REQUIRED,
        "Folder or hub name of a reward model, package.module:function (its code runs), or a mapping such as "
        '"{kind: ensemble, scorers: [runs/a, runs/b], k: 1}", also as a YAML file.',
    )
    output: Path = setting(
        REQUIRED,
        "File (.jsonl, .jsonl.gz, .parquet) or datasets folder to write; for data with several splits, a folder. "
        "With --to, a file (.jsonl, .jsonl.gz) or, for several splits, a folder.",
    )
    reward_at: Literal["end", "turn"] | None = setting(
        None,
        "For trajectories, the agent turns that get rewards. end = the last one gets the whole score; turn = each "
        "gets the change of the score since the agent turn before it, and an equal part of the shift of a normalised "
        "reward model. The sum is the same. null = end.",
    )
    make: Literal["targets", "rewards"] | None = setting(
        None,
        "For comparisons, the result: targets (comparisons with new targets, the probability that each option is the "
        "best) or rewards (trajectories with rewards); null = targets.",
    )
    normalise: Literal["none", "global", "group", "rank"] | None = setting(
        None,
        "For comparisons with --make rewards, the scale of the rewards: none (as scored), global (mean 0 and standard "
        "deviation 1 over all options), group (minus the mean of the group) or rank (the share of the group's other "
        "options that score lower, 0 to 1, ties counted half); null = none.",
    )

    def check_kind(self, of_comparisons: bool) -> None:
        """Check that the settings fit the kind of the data.

        Raises: InputError for a setting that the data have no use for.
        """
        if not of_comparisons:
            _require_none("trajectories", make=self.make, normalise=self.normalise)
        else:
            _require_none("comparisons", reward_at=self.reward_at)
            if self.make != "rewards":
                _require_none("comparisons without --make rewards", normalise=self.normalise)


def relabel(config: RelabelConfig) -> None:
    """Score logs and write them, or rows for TRL made of them."""
    from offline_lmrl.decoding.scorers import drop_too_long, load_scorer, relabel_comparisons, relabel_trajectories
    from offline_lmrl.logs.io import (
        holds_comparisons,
        read_comparison_splits,
        read_splits,
        write_comparisons,
        write_rows,
        write_trajectories,
    )
    from offline_lmrl.logs.preferences import to_trajectories

    data, output = config.data, config.output
    check_output(output, data)
    of_comparisons = holds_comparisons(data)
    config.check_kind(of_comparisons)
    counts: Counter[str] = Counter()
    splits = (read_comparison_splits if of_comparisons else read_splits)(data, counts=counts)
    files = (".jsonl", ".jsonl.gz") if config.to else (".jsonl", ".jsonl.gz", ".parquet")
    if len(splits) > 1 and output.name.endswith(files):
        raise InputError(f"output: found {output} for the splits {', '.join(splits)}, expected a folder")
    if len(splits) == 1 and config.to and not output.name.endswith(files):
        raise InputError(f"output: found {output} for rows of {config.to}, expected a .jsonl or .jsonl.gz file")
    rater = load_scorer(config.scorer)
    fit = {name: drop_too_long(rows, rater, counts) for name, rows in splits.items()} if of_comparisons else splits
    made, write = {}, write_trajectories
    for name, rows in fit.items():
        if not of_comparisons:
            made[name] = relabel_trajectories(rows, rater, config.reward_at or "end", counts)
        elif config.make == "rewards":
            made[name] = to_trajectories(rows, rater, "end", config.normalise or "none", counts)
        else:
            made[name], write = relabel_comparisons(rows, rater), write_comparisons
    if config.to:
        made, write = config.convert(made, counts), write_rows
    _write_splits(output, made, write)
    parts = (("read", splits), ("written", made))
    print_report({f"{name}: {done}": len(part[name]) for name in made for done, part in parts} | +counts)


def select(data: str, scorer: str, output: Path, n: int = 100, split: str | None = None) -> None:
    """Write the pairs of replies on which an ensemble of scorers disagrees most, to label them next.

    Args:
      data: a file, folder or hub name of comparisons; their targets are not used.
      scorer: an ensemble, as a YAML file or a mapping: "{kind: ensemble, scorers: [runs/a, runs/b]}".
      output: file (.jsonl, .jsonl.gz, .parquet) or datasets folder to write.
      n: number of pairs, at most one from each comparison.
      split: name of the split to read; null = the only one.
    """
    from offline_lmrl.decoding.scorers import Ensemble, drop_too_long, load_scorer, most_disputed
    from offline_lmrl.logs.io import read_comparisons, write_comparisons

    if n < 1:
        raise InputError(f"n: found {n}, expected at least 1")
    check_output(output, data)
    ensemble = load_scorer(scorer)
    if not isinstance(ensemble, Ensemble):
        raise InputError(f"scorer: found {shown(scorer)}, expected an ensemble of scorers")
    counts: Counter[str] = Counter()
    comparisons = drop_too_long(read_comparisons(data, split=split, counts=counts), ensemble, counts)
    chosen = most_disputed(comparisons, ensemble, n)
    write_comparisons(output, chosen)
    print_report({"pairs": len(chosen), "largest disagreement": chosen[0].labels["disagreement"]} | +counts)


def _require_none(kind: str, **settings: str | None) -> None:
    for name, value in settings.items():
        if value is not None:
            raise InputError(f"{name}: found {value}, expected none for {kind}")


def _write_splits(output: Path, splits: dict[str, list[Any]], write: Callable[[Path, list[Any]], None]) -> None:
    if len(splits) == 1:
        write(output, *splits.values())
        return
    for name, rows in splits.items():
        write(output / f"{name}.jsonl", rows)
