"""Commands about data and files: prepare, check, config."""

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from offline_lmrl.cli.output import print_report
from offline_lmrl.cli.parser import ready
from offline_lmrl.errors import InputError, shown
from offline_lmrl.logs.terminal import visible
from offline_lmrl.settings import build, nearest
from offline_lmrl.shipped import shipped_config, shipped_configs

if TYPE_CHECKING:
    from offline_lmrl.tokens.rendering import Renderer

# name of a source in `prepare SOURCE` -> module and dataclass; modules are imported when they are used
SOURCES = {
    "maze": ("data_prep.maze", "MazeLogs"),
    "toys": ("data_prep.toys", "Toys"),
    "wordle": ("data_prep.wordle", "WordleLogs"),
    "deal-or-no-deal": ("data_prep.deal_or_no_deal", "DealOrNoDeal"),
    "pref-gold": ("data_prep.pref_gold", "PrefGoldPairs"),
    "support": ("data_prep.support", "SupportLogs"),
    "scored": ("data_prep.scored", "Scored"),
    "hh-rlhf": ("data_prep.hh_rlhf", "HhRlhf"),
    "alpaca-eval": ("data_prep.alpaca_eval", "AlpacaEval"),
    "preferences": ("data_prep.preferences", "Preferences"),
    "stack-exchange": ("data_prep.stack_exchange", "StackExchange"),
    "ultrafeedback": ("data_prep.ultrafeedback", "UltraFeedback"),
    "oasst": ("data_prep.oasst", "Oasst"),
    "oasst-ratings": ("data_prep.oasst", "OasstRatings"),
    "kto": ("data_prep.kto", "Kto"),
    "stepwise": ("data_prep.stepwise", "Stepwise"),
    "chat-thumbs": ("data_prep.chat_thumbs", "ChatThumbs"),
    "red-team": ("data_prep.red_team", "RedTeam"),
    "summarize-comparisons": ("data_prep.summarize", "SummarizeComparisons"),
    "summarize-axes": ("data_prep.summarize", "SummarizeAxes"),
    "best-of-4": ("data_prep.best_of_4", "BestOf4"),
    "webgpt": ("data_prep.webgpt", "WebGpt"),
    "shp": ("data_prep.shp", "Shp"),
    "helpsteer": ("data_prep.helpsteer", "HelpSteer"),
    "nectar": ("data_prep.nectar", "Nectar"),
    "lmrl-gym": ("data_prep.lmrl_gym", "LmrlGym"),
}
PREPARE_HELP = f"""usage: offline-lmrl prepare SOURCE --output DIR [--key value ...]

Convert logs of a known source to scored trajectories or comparisons. Sources: {", ".join(SOURCES)}.
`offline-lmrl prepare SOURCE --help` lists the settings of a source."""


def prepare(argv: Sequence[str]) -> None:
    """Run the command `prepare SOURCE --output DIR`, which converts the logs of a known source.

    The settings are the fields of the dataclass for SOURCE (SOURCES).

    Args:
      argv: the command line after `prepare`.
    Raises: InputError if the source is unknown or a setting cannot be used.
    """
    if not argv or argv[0] in ("-h", "--help", "--help_all"):
        print(PREPARE_HELP)
        return
    source = _source(argv[0])
    report = ready(f"prepare {argv[0]}", source, argv[1:])().prepare()
    # Facts of the data come first; splits and removed rows come last, so that they do not scroll away.
    names = list(report)
    splits = names.index("splits") if "splits" in names else len(names)
    print_report({name: report[name] for name in names[splits + 1 :] + names[splits : splits + 1] + names[:splits]})


def prepare_from_settings(settings: Mapping[str, Any]) -> None:
    """Run `prepare` with settings from a config file instead of the command line; nothing is printed.

    Args:
      settings: the `prepare` block of the config: `command`, the name of a source, and the source's settings.
    Raises: InputError if the source is unknown, or a setting is missing or cannot be used.
    """
    settings = dict(settings)
    source = _source(settings.pop("command"))
    build(source, settings, "prepare").prepare()


def _source(name: str) -> type:
    """Return the dataclass of a source: a public data set, another form of logs, or a task that generates its logs.

    Args:
      name: name of the source, a key of SOURCES.
    Raises: InputError if the source is unknown.
    """
    if name not in SOURCES:
        raise InputError(f"source: found {shown(name)}, expected one of {', '.join(SOURCES)}{nearest(name, SOURCES)}")
    module, source = SOURCES[name]
    return vars(import_module(module))[source]


def check(
    data: list[str],
    reward: str | None = None,
    tokenizer: str | None = None,
    template: Literal["auto", "assembled", "plain"] = "auto",
    max_length: int | None = None,
    row: int = 1,
) -> None:
    """Report the contents of a data set and the faults that will make learning from it fail.

    Args:
      data: files, folders or hub names of scored trajectories or of comparisons; several are read as the splits of one
        data set.
      reward: column that holds the score of a row; null = `reward`, or `label` in rows with a prompt.
      tokenizer: folder or hub name of a tokenizer. It adds to the report token counts, a comparison with the chat
        template, and one row printed token by token; null = nothing is tokenized.
      template: how dialogues become text: auto (by the chat template; plain if the tokenizer has none), assembled (the
        chat template's texts around turns, so that later turns only append) or plain (one line per turn).
      max_length: length in tokens above which a row is counted as too long; needs a tokenizer. null = no count.
      row: number, from 1, of the row of the first split that is printed token by token; scored trajectories only.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    from offline_lmrl.logs.io import holds_comparisons, read_splits
    from offline_lmrl.tokens import checks

    if max_length is not None and tokenizer is None:
        raise InputError("max_length: found a length in tokens without a tokenizer, expected --tokenizer too")
    kinds = {source: holds_comparisons(source) for source in data}
    if len(set(kinds.values())) > 1:
        pairs, others = (next(source for source in data if kinds[source] is kind) for kind in (True, False))
        raise InputError(f"data: found comparisons in {pairs} and none in {others}, expected data of one kind")
    if kinds[data[0]]:
        if reward is not None:
            raise InputError(f"reward: found {shown(reward)}, expected it only for scored trajectories")
        _check_comparisons(data, None if tokenizer is None else _renderer(tokenizer, template), max_length)
        return
    counts: Counter[str] = Counter()
    splits = _splits(data, partial(read_splits, counts=counts, reward=reward))
    name, rows = next(iter(splits.items()))
    if not 1 <= row <= len(rows):
        raise InputError(f"row: found {row}, expected 1 to {len(rows)}")
    renderer = None if tokenizer is None else _renderer(tokenizer, template)
    console = Console()
    checks.check(splits, renderer, max_length, counts).print(console)
    if renderer is not None:
        title = Text(visible(f"{name}: row {row}"))
        table = Table("", "token", "role", "agent's", "reward", title=title, title_justify="left")
        for token in checks.token_table(rows[row - 1], renderer):
            reward = "" if token.reward is None else f"{token.reward:g}"
            table.add_row(str(token.index), escape(repr(token.text)), token.role, "x" if token.action else "", reward)
        console.print(table)


def _splits(data: Sequence[str], read: Callable[[str], dict[str, list[Any]]]) -> dict[str, list[Any]]:
    """Read the splits of all sources; here a source is a file, folder or hub name.

    Args:
      data: the sources.
      read: function that reads one source and returns its splits, name -> rows.
    Returns: name -> rows of all splits. With several sources, the name of a split contains that of its source: the
      last component of the source's path or, if two sources have the same last component, the whole path.
    """
    found = {source: read(source) for source in data}
    if len(found) == 1:
        return found[data[0]]
    short = {source: Path(source).name for source in found}
    names = short if len(set(short.values())) == len(short) else {source: source for source in found}
    return {
        names[source] if list(splits) == ["all"] else f"{names[source]} ({name})": rows
        for source, splits in found.items()
        for name, rows in splits.items()
    }


def _check_comparisons(data: Sequence[str], renderer: "Renderer | None", max_length: int | None) -> None:
    from offline_lmrl.logs.comparison_checks import describe
    from offline_lmrl.logs.io import group_key, in_one_group, read_comparison_splits
    from offline_lmrl.tokens.comparison_batching import encode_comparisons
    from offline_lmrl.tokens.windows import WindowRule

    counts: Counter[str] = Counter()
    splits = _splits(data, partial(read_comparison_splits, counts=counts))
    for name, rows in splits.items():
        report = describe(rows)
        if renderer is not None:
            fits: Counter[str] = Counter()
            encoded = encode_comparisons(rows, renderer, WindowRule(max_length=max_length or sys.maxsize), fits)
            report |= {"tokens of the longest row": int(encoded.lengths.max()), **fits}
        print(visible(f"{name}:"))
        print_report(report, "  ")
    groups = {name: {group_key(row) for row in rows} for name, rows in splits.items()}
    shared = {f"{a}, {b}": len(groups[a] & groups[b]) for a, b in combinations(groups, 2) if groups[a] & groups[b]}
    alone = {name: len(rows) for name, rows in splits.items() if in_one_group(rows)}
    print_report(
        {"repairs and drops": counts, "groups in two splits": shared}
        | ({"splits with all rows in one group, so that none can be held out": alone} if alone else {})
    )


def _renderer(tokenizer: str, template: str):
    from offline_lmrl.tokens.rendering import Renderer
    from offline_lmrl.tokens.tokenizers import load_tokenizer

    return Renderer(load_tokenizer(tokenizer), template)


def config(name: str | None = None) -> None:
    """List the shipped configs, or print one.

    Args:
      name: name of a shipped config, to print it; null = list all.
    """
    text = "\n".join(shipped_configs()) if name is None else shipped_config(name).read_text(encoding="utf-8")
    print(text.rstrip("\n"))
