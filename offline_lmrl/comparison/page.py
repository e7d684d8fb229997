"""The report of a comparison: one page as Markdown and as HTML, its figures, and a manifest of its origin.

Everything is made from the rows of results.jsonl, which is copied into the report; the same rows give the same bytes.
A page is a list of blocks, (kind, content), such as ("p", text) or ("table", lines), from which one renderer makes
Markdown and another one HTML. A setting is a way of decoding together with the way in which β, the weight of value
guidance, was chosen; a `Key` (report.py) is a method in one setting.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from offline_lmrl.comparison.figures import INK, PAPER, Drawing, draw
from offline_lmrl.comparison.report import (
    FEW_SEEDS,
    Key,
    Line,
    Results,
    Row,
    columns_of,
    markdown,
    read_results,
    table_lines,
)
from offline_lmrl.errors import InputError
from offline_lmrl.evaluation.metrics import Estimate
from offline_lmrl.logs.files import say_differences
from offline_lmrl.logs.io import atomic_output
from offline_lmrl.logs.terminal import visible

COSTS = (
    "training tokens",
    "training s",
    "environment steps",
    "reward queries",
    "played tokens",
    "selection tokens",
    "generated",
    "agent tokens",
)
EVERYWHERE = ("score [95%]", "beta", "seeds", "regime")
PARTS = {
    "starts from": "start_from",
    "value model": "value_model",
    "reward model": "reward_model",
    "plays the runs of": "run_of",
}
OWN = ("model", "args", "decoding", "planner", "betas", "preference")
WINS = "Share of episodes in which the setting of the row scores higher than that of the column; a tie counts half."
NO_FIGURES = {
    "All figures": "matplotlib is not installed; run `pip install 'offline_lmrl[plots]'`, then "
    "`offline-lmrl compare FOLDER` with the folder of results.jsonl"
}
HEAD, TAIL = 12, 4  # numbers of turns shown from the start and from the end of a longer dialogue

Block = tuple[str, Any]


def write_report(folder: str | Path) -> Path:
    """Write the report of a comparison from results.jsonl.

    The report consists of report.md, report.html (with all figures inside), figures/ (SVG and PNG; none without
    matplotlib), manifest.json (config, data hashes, seeds, and the code, machine and command that made the rows) and
    a copy of results.jsonl.

    Args:
      folder: folder of a comparison, in which the subfolder report/ is written; or the folder of an existing report,
        which is written again from its copy of the rows.
    Returns: the report's folder.
    Raises: InputError if there is no results.jsonl, or if its rows, or those of an existing report, belong to
      different comparisons.
    """
    folder = Path(folder)
    source = folder / "results.jsonl"
    if not source.is_file():
        raise InputError(f"{source}: found no such file, expected the results of a comparison")
    report = folder if (folder / "manifest.json").exists() else folder / "report"
    rows = read_results(source)
    earlier = report / source.name
    refuse_mixed([*rows, *(read_results(earlier) if earlier != source and earlier.exists() else ())], source)
    results = Results(rows)
    try:
        drawings, missing = draw(results)
    except ModuleNotFoundError:
        drawings, missing = [], NO_FIGURES
    page = build_report(results, drawings, missing)
    files: dict[str, str | bytes] = {"results.jsonl": source.read_bytes()}
    for drawing in drawings:
        files |= {f"figures/{drawing.name}.svg": drawing.svg, f"figures/{drawing.name}.png": drawing.png}
    files["manifest.json"] = json.dumps(manifest(results, files["results.jsonl"]), indent=1, ensure_ascii=False) + "\n"
    files |= {"report.md": visible(as_markdown(page)), "report.html": visible(as_html(page))}
    shutil.rmtree(report / "figures", ignore_errors=True)  # figures that these rows no longer give would remain
    for name, content in files.items():
        with atomic_output(report / name) as temporary:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    return report


def refuse_mixed(rows: Sequence[Row], source: Path) -> None:
    """Check that all rows of kind "run" can belong to one comparison.

    They must agree in environment, data, partner and evaluation; and those of one method and way of decoding must have
    equal configs.

    Args:
      rows: rows of results, of any kind.
      source: path of their file, for the error message.
    Raises: InputError that names the settings which differ.
    """
    shared: dict[str, Any] | None = None
    own: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        if row["kind"] != "run":
            continue
        every = {name: row["config"][name] for name in ("environment", "data", "partner", "evaluation")}
        shared = shared or every
        mine = own.setdefault((row["method"], row["decode"]), row["config"])
        difference = say_differences(every, shared) or say_differences(row["config"], mine)
        if difference:
            raise InputError(
                f"{source}: {row['method']}: {difference}; the folder holds results or a report "
                "of another comparison: move them away"
            )


def manifest(results: Results, source: bytes) -> dict[str, Any]:
    """Return the origin of the rows, the contents of manifest.json.

    Args:
      results: the rows.
      source: bytes of results.jsonl, whose sha256 is stored.
    Returns: `results`, the sha256 and number of all rows; `config` of the comparison; `data`, hashes of training and
      validation data (None without runs); `seeds`, the training seeds; and `made`, a list of commands with commit,
      machine and library versions, and the number of rows that each made.
    """
    runs = results.of("run")
    made: dict[str, dict[str, Any]] = {}
    for run in runs:
        if "made" in run:  # rows of the first versions do not have it
            entry = made.setdefault(json.dumps(run["made"], sort_keys=True), {"rows": 0, **run["made"]})
            entry["rows"] += 1
    return {
        "results": {"sha256": hashlib.sha256(source).hexdigest(), "rows": len(results.rows)},
        "config": results.shown["config"],
        "data": runs[0]["config"]["data"] if runs else None,
        "seeds": sorted({run["seed"] for run in runs}),
        "made": list(made.values()),
    }


# The contents of the page.


def build_report(results: Results, drawings: Sequence[Drawing], missing: Mapping[str, str]) -> list[Block]:
    lines = _settings(results)
    drawn = {drawing.name: ("figure", drawing) for drawing in drawings}
    page = [
        ("h1", f"Comparison on {results.shown['config']['environment']['name']}"),
        ("list", glance(results)),
        *filter(None, [drawn.pop("score", None)]),
        ("h2", "Results"),
        (
            "p",
            "A score is the mean undiscounted return over training seeds and episodes, with its 95% interval "
            "(Student's t, from the variances of training seeds and of clusters of episodes). With one training "
            "seed, the interval describes that run over episodes. “behaviour” is the mean return of the training "
            "data, “optimum” the best possible mean score; published results were not measured here. β is the weight "
            "of value guidance: “β offline” is the largest one within a KL budget on held-out logs, “β by returns” "
            "the best on other episodes, which needs an environment. The column “minus …” is the difference from the "
            "method named there, paired by seed and episode; * marks an interval over several seeds that excludes 0, "
            "and only such a method is called better or worse. “regime” is the data that a method learnt from; "
            "“invalid” is the share of agent turns that the environment refused.",
        ),
        ("table", [_results_of(line, f"minus {results.shown['baseline']}") for line in lines]),
        ("h2", "Cost"),
        (
            "p",
            "Means over training seeds. “training tokens” include those of the runs that a method starts from or "
            "learns from; “training s” is wall time in seconds; “generated” is the number of tokens generated in this "
            "evaluation; “agent tokens” are per episode.",
        ),
        ("table", [_only(line, ("method", *EVERYWHERE, *COSTS)) for line in lines if "regime" in line]),
    ]
    if chosen := _choices(results):
        page += [
            ("h2", "β chosen offline against β chosen by returns"),
            ("p", "The difference is the cost of choosing β without an environment. The β columns list one per seed."),
            ("table", chosen),
        ]
    if drawn:
        page += [("h2", "Figures"), ("figures", [drawing for _, drawing in drawn.values()])]
    for name, found in results.wins.items():
        if found:
            page += [("h3", f"Win rates, {name}"), ("p", WINS), ("table", _matrix(found))]
    page += [("h2", "Figures not drawn"), ("list", [f"{title}: {reason}." for title, reason in missing.items()])]
    if dialogues := _dialogues(results):
        page += [
            ("h2", "Ten fixed dialogues"),
            (
                "p",
                "The same episodes for every method, chosen at random before any play; the runs are those of the "
                "first training seed. No dialogue is omitted, but the middle of a long one is cut.",
            ),
            ("dialogues", dialogues),
        ]
    return [*page, ("h2", "Configuration"), *_configuration(results)]


def glance(results: Results) -> list[str]:
    """Return the sentences at the top of the page.

    They name the method with the highest score, its cost, the data that it learnt from, and whether its lead is larger
    than chance. Settings whose β was chosen by returns are left out, because that choice needs an environment; the
    best of them is named separately.
    """
    keys = [key for key in results.groups if key.chosen != "returns"]
    if not keys:
        return ["No method has been measured yet."]
    best = max(keys, key=lambda key: results.estimates[key].mean)
    runs = results.groups[best]
    line = next(line for line in _settings(results) if line["method"] == str(best))
    spent = [f"{line[name]} {name}" for name in COSTS[:5] if name in line]
    sentences = [
        f"Highest score without a β chosen by returns: {best}: {_with_n(results.estimates[best])} episodes, "
        f"{len(runs)} training seed{'s'[: len(runs) != 1]}.",
        f"Its training data: {runs[0]['regime']}. Its cost: {', '.join(spent)}.",
    ]
    baseline = results.shown["baseline"]
    same = next((key for key in keys if key.method == baseline and key.decode == best.decode), None)
    if same and same != best and (difference := results.difference(best, same)):
        sentences.append(f"Its difference from {same}: {difference}, {_verdict(difference)}.")
    rivals = {key: results.difference(best, key) for key in keys if key != best and key.decode == best.decode}
    close = [str(key) for key, difference in rivals.items() if difference and difference.low <= 0 <= difference.high]
    if close:
        sentences.append(f"Not distinguishable from it (the paired interval includes 0): {'; '.join(close)}.")
    guided = [key for key in results.groups if key.chosen == "returns"]
    if guided:
        top = max(guided, key=lambda key: results.estimates[key].mean)
        sentences.append(f"Highest score with β chosen by returns on other episodes: {top}: {results.estimates[top]}.")
    if len(runs) < FEW_SEEDS:
        several = f"Fewer than {FEW_SEEDS} training seeds: intervals are wide, so the table lists every seed."
        one = "One training seed: intervals describe this run over episodes, and no method is called better."
        sentences.append(several if len(runs) > 1 else one)
    return sentences


def _with_n(estimate: Estimate) -> str:
    return f"{estimate} over {estimate.n}"


def _verdict(difference: Estimate) -> str:
    if difference.low <= 0 <= difference.high:
        return "not distinguishable: the paired interval includes 0"
    if not difference.sure:
        return f"{'higher' if difference.low > 0 else 'lower'} in this run; one training seed cannot rank methods"
    return f"{'better' if difference.low > 0 else 'worse'}: the paired interval excludes 0"


def _only(line: Line, names: Sequence[str]) -> Line:
    return {name: line[name] for name in names if name in line}


def _settings(results: Results) -> list[Line]:
    """Return the lines of the table, with decoding and choice of β added to the method in the first column.

    They are then next to the score on a narrow screen.
    """
    lines = table_lines(results)
    first = len(results.of("behaviour", "optimum"))
    for line, key in zip(lines[first:], results.groups, strict=False):  # published rows come last
        line["method"] = str(key)
        del line["decoding"]
    return lines


def _results_of(line: Line, minus: str) -> Line:
    """Return a table line without the columns of COSTS, and with the columns of labels last.

    Args:
      line: a line of the table.
      minus: name of the column that shows the difference from the baseline.
    """
    first = _only(line, ("method", *EVERYWHERE[:2], "per seed", "normalised", minus, *EVERYWHERE[2:]))
    return first | {name: cell for name, cell in line.items() if name not in COSTS}


def _choices(results: Results) -> list[Line]:
    """Return a table line for each method and way of decoding that was measured with both choices of β."""
    lines = []
    for key in results.groups:
        other = key._replace(chosen="returns")
        if key.chosen != "offline" or other not in results.groups:
            continue
        line = {"method": f"{key.method}, {key.decode}"}
        for name, one in (("offline", key), ("by returns", other)):
            line[f"score, β {name} [95%]"] = str(results.estimates[one])
            line[f"β {name}"] = " ".join(f"{run['beta']:g}" for run in results.groups[one])
        difference = results.difference(other, key)
        runs = results.groups[key]
        line |= {
            "by returns minus offline [95%]": str(difference) if difference else "",
            "seeds": " ".join(str(run["seed"]) for run in runs),
            "regime": runs[0]["regime"],
        }
        lines.append(line)
    return lines


def _matrix(found: Mapping[tuple[Key, Key], Estimate]) -> list[Line]:
    keys = list(dict.fromkeys(key for pair in found for key in pair))
    return [{"": str(a), **{str(b): str(found[a, b]) if (a, b) in found else "" for b in keys}} for a in keys]


def _dialogues(results: Results) -> list[tuple[int, list[Row], list[tuple[Key, Row]]]]:
    """Return the dialogues that the page shows, one tuple per episode.

    Returns: (episode seed, turns before the agent's first that all methods share, [(method in a setting, its sample of
      this episode: a mapping with `seed`, `score` and `turns`)]).
    """
    dialogues: dict[int, list[tuple[Key, Row]]] = {}
    for key, runs in results.groups.items():
        for sample in next((run["samples"] for run in runs if run.get("samples")), ()):
            dialogues.setdefault(sample["seed"], []).append((key, sample))
    return [(seed, _shared([sample["turns"] for _, sample in given]), given) for seed, given in dialogues.items()]


def _shared(dialogues: Sequence[Sequence[Sequence[str]]]) -> list[Sequence[str]]:
    """Return the turns, (role, text) each, with which all dialogues begin, without the agent's turns."""
    shared = []
    for turns in zip(*dialogues, strict=False):
        if any(turn != turns[0] for turn in turns) or turns[0][0] == "assistant":
            break
        shared.append(turns[0])
    return shared


def _shortened(turns: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    """Return the turns, (role, text) each. In a long dialogue, one entry with the role "" replaces the middle."""
    if len(turns) <= HEAD + TAIL:
        return list(turns)
    left_out = f"… {len(turns) - HEAD - TAIL} turns …"
    return [*turns[:HEAD], ("", left_out), *turns[-TAIL:]]


def _configuration(results: Results) -> list[Block]:
    config = results.shown["config"]
    runs = results.of("run")
    regimes = {run["method"]: run["regime"] for run in runs}
    fixed = {
        "environment": config["environment"],
        "model settings of all methods": config["model"],
        "algorithm settings of all methods": config["args"],
        "partner": config["partner"],
        "evaluation": config["evaluation"],
        "data": config["data"],
        "data, sha256": runs[0]["config"]["data"] if runs else None,
    }
    methods = [
        {
            "method": name,
            "algorithm": method["algorithm"],
            **{title: method[key] for title, key in PARTS.items() if method.get(key)},
            "regime": regimes.get(name, "not evaluated"),
            "seeds": " ".join(dict.fromkeys(str(run["seed"]) for run in runs if run["method"] == name)),
            "its own settings": as_text({name: method.get(name) for name in OWN}),
        }
        for name, method in config["methods"].items()
    ]
    made = [
        {
            "rows": str(entry["rows"]),
            "command": entry["command"],
            "commit": entry["commit"] or "none",
            "machine": as_text(entry["machine"]),
            "versions": as_text(entry["versions"]),
        }
        for entry in manifest(results, b"")["made"]
    ]
    return [
        ("table", methods),
        ("list", [f"{name}: {as_text(value)}" for name, value in fixed.items() if value]),
        *([("h3", "Made by"), ("table", made)] if made else []),
        (
            "p",
            "manifest.json holds the complete settings. This page is made from results.jsonl alone; `offline-lmrl "
            "compare FOLDER`, with the folder of that file, makes it again.",
        ),
    ]


def as_text(value: Any) -> str:
    """Return nested mappings, lists and values as one line of text; entries that are None or empty are left out."""
    if isinstance(value, Mapping):
        return ", ".join(
            f"{name} {as_text(v) if not isinstance(v, Mapping) else '(' + as_text(v) + ')'}"
            for name, v in value.items()
            if v not in (None, {}, [])
        )
    return " ".join(map(as_text, value)) if isinstance(value, list) else str(value)


# The two renderers.


def as_markdown(page: Sequence[Block]) -> str:
    return "\n\n".join(MARKDOWN[kind](content) for kind, content in page) + "\n"


def _figure_markdown(drawing: Drawing) -> str:
    title, caption = _text(drawing.title), _text(drawing.caption)
    return f"![{title}](figures/{drawing.name}.svg)\n\n{title}. {caption}"


def _dialogues_markdown(dialogues: Sequence[tuple[int, list, list]]) -> str:
    parts = []
    for seed, shared, given in dialogues:
        parts.append(f"### Episode {seed}")
        parts += [f"> {_quoted(role)}: {_quoted(text)}" for role, text in shared]
        for key, sample in given:
            turns = _shortened(sample["turns"][len(shared) :])
            lines = [f"- {_quoted(role)}: {_quoted(text)}" if role else f"- {text}" for role, text in turns]
            parts.append("\n".join([f"{_text(str(key))}, score {sample['score']:g}", "", *lines]))
    return "\n\n".join(parts)


def _text(text: str) -> str:
    """Escape titles, names and values as one line of Markdown, so that none acts as a tag, a link or a cell's end."""
    return re.sub(r"\||\](?=[(\[:])", r"\\\g<0>", escape(" ".join(text.split()), quote=False))


def _quoted(text: str) -> str:
    """Escape the text of a dialogue as one line of Markdown that shows this text literally."""
    return re.sub(r"[][\\`*_~|#$]", r"\\\g<0>", escape(" ".join(text.split()), quote=False))


def _table_markdown(lines: Sequence[Line]) -> str:
    return markdown([{_text(name): _text(text) for name, text in line.items()} for line in lines])


MARKDOWN = {
    **{f"h{level}": lambda text, level=level: f"{'#' * level} {_text(text)}" for level in (1, 2, 3)},
    "p": _text,
    "list": lambda items: "\n".join(f"- {_text(item)}" for item in items),
    "table": _table_markdown,
    "figure": _figure_markdown,
    "figures": lambda drawings: "\n\n".join(map(_figure_markdown, drawings)),
    "dialogues": _dialogues_markdown,
}


def as_html(page: Sequence[Block]) -> str:
    """Render the page as one HTML file that contains its styles and figures and loads nothing else; no scripts."""
    body = "\n".join(HTML[kind](content) for kind, content in page)
    title = escape(next(content for kind, content in page if kind == "h1"))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{title}</title>\n<style>{CSS}</style>\n</head>\n'
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _inline(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _table_html(lines: Sequence[Line]) -> str:
    names = columns_of(lines)
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    body = "".join(
        "<tr>"
        + "".join(
            f'<th scope="row">{escape(line.get(name, ""))}</th>'
            if name == names[0]
            else f"<td{_wide(line.get(name, ''))}>{escape(line.get(name, ''))}</td>"
            for name in names
        )
        + "</tr>\n"
        for line in lines
    )
    return (
        f'<div class="scroll" tabindex="0"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}</tbody>\n</table></div>"
    )


def _wide(cell: str) -> str:
    return ' class="text"' if len(cell) > 40 else ""


def _figure_html(drawing: Drawing) -> str:
    """Return a figure as HTML that contains the SVG, in the page's text colour.

    Ids inside the SVG get the drawing's name as a prefix, because all drawings are in one document.
    """
    svg = drawing.svg[drawing.svg.index("<svg") :]
    svg = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{drawing.name}-", svg)
    svg = svg.replace(INK, "currentColor").replace(PAPER, "none")
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(drawing.title)}" ', 1)
    caption = f"<b>{escape(drawing.title)}.</b> {_inline(drawing.caption)}"
    return f"<figure>\n{svg}<figcaption>{caption}</figcaption>\n</figure>"


def _dialogues_html(dialogues: Sequence[tuple[int, list, list]]) -> str:
    parts = []
    for place, (seed, shared, given) in enumerate(dialogues):
        columns = "".join(
            f"<section><h4>{escape(str(key))}<br>score {sample['score']:g}</h4>\n"
            f"{_turns_html(_shortened(sample['turns'][len(shared) :]))}</section>\n"
            for key, sample in given
        )
        opened = " open" if place == 0 else ""
        side = f'<div class="scroll side" tabindex="0">\n{columns}</div>'
        parts.append(f"<details{opened}><summary>Episode {seed}</summary>\n{_turns_html(shared)}{side}</details>")
    return "\n".join(parts)


def _turns_html(turns: Sequence[Sequence[str]]) -> str:
    return "".join(
        f'<p class="{"agent" if role == "assistant" else "other"}">'
        f"{f'<b>{escape(role)}</b> ' if role else ''}{escape(text)}</p>\n"
        for role, text in turns
    )


HTML = {
    **{f"h{level}": lambda text, level=level: f"<h{level}>{escape(text)}</h{level}>" for level in (1, 2, 3)},
    "p": lambda text: f"<p>{_inline(text)}</p>",
    "list": lambda items: "<ul>\n" + "".join(f"<li>{_inline(item)}</li>\n" for item in items) + "</ul>",
    "table": _table_html,
    "figure": _figure_html,
    "figures": lambda drawings: '<div class="figures">\n' + "\n".join(map(_figure_html, drawings)) + "\n</div>",
    "dialogues": _dialogues_html,
}

CSS = """
:root { color-scheme: light dark; --ink: #1f2328; --paper: #fff; --line: #d0d7de; --quiet: #59636e; --soft: #f3f5f8;
  --agent: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --paper: #15181c; --line: #3a4149; --quiet: #9aa4af;
  --soft: #1e2329; --agent: #6cb8e8; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 1rem 1rem 4rem; }
h1, h2, h3 { line-height: 1.25; } h2 { margin-top: 2.5rem; } h4 { margin: 0 0 .5rem; font-size: .85rem; }
p, li { max-width: 46rem; overflow-wrap: anywhere; }
code { background: var(--soft); padding: .1em .3em; border-radius: 3px; font-size: .9em; }
.scroll { overflow-x: auto; max-width: 100%; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .7rem; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--line);
  vertical-align: top; }
tbody tr:last-child > * { border-bottom: 0; }
thead th { color: var(--quiet); font-weight: 600; }
th:first-child { position: sticky; left: 0; background: var(--paper); border-right: 1px solid var(--line); }
td.text { white-space: normal; min-width: 22rem; overflow-wrap: anywhere; }
figure { margin: 1.5rem 0; } figure svg { width: 100%; max-width: 34rem; height: auto; display: block; }
figure svg text { font-family: inherit !important; }
figcaption { color: var(--quiet); font-size: .9rem; max-width: 34rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 0 2rem; }
details { margin: .8rem 0; } summary { cursor: pointer; font-weight: 600; }
.side { display: flex; } .side section { flex: 1 0 15rem; padding: .8rem; border-right: 1px solid var(--line); }
.side section:last-child { border-right: 0; }
details p { margin: .3rem 0; font-size: .85rem; padding-left: .6rem; border-left: 3px solid transparent; }
details p.agent { border-left-color: var(--agent); } details p.other { color: var(--quiet); }
@media (max-width: 30rem) { h1 { font-size: 1.5rem; }
  .scroll th:first-child { white-space: normal; max-width: 11rem; overflow-wrap: break-word; } }
"""
