"""The values that a report page shows: sentences, tables and dialogues, computed from the rows of results.jsonl.

A setting is a way of decoding together with the way in which β, the weight of value guidance, was chosen; a `Key`
(report.py) is a method in one setting. A table is a list of lines that map the name of a column to text.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from offline_lmrl.comparison.figures import Drawing
from offline_lmrl.comparison.report import FEW_SEEDS, Key, Line, Results, table_lines
from offline_lmrl.comparison.rows import Row
from offline_lmrl.evaluation.choice_text import LEGEND, choice_cells
from offline_lmrl.evaluation.metrics import Estimate

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
    "checkpoint": "checkpoint",
    "train file": "train",
    "starts from": "start_from",
    "value model": "value_model",
    "reward model": "reward_model",
    "plays the runs of": "run_of",
}
OWN = ("model", "args", "decoding", "planner", "betas", "preference")
HEAD, TAIL = 12, 4  # numbers of turns shown from the start and from the end of a longer dialogue

Turn = Sequence[str]  # (role, text)


def page_contents(
    results: Results, drawings: Sequence[Drawing], missing: Mapping[str, str], origin: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the values that templates/page.j2 shows, by the names that it uses.

    Args:
      results: the rows.
      drawings: the drawn figures.
      missing: title -> reason for each figure that was not drawn.
      origin: the contents of manifest.json.
    """
    config = results.shown["config"]
    fixed = {
        "environment": config["environment"],
        "model settings of all methods": config["model"],
        "algorithm settings of all methods": config["args"],
        "partner": config["partner"],
        "evaluation": config["evaluation"],
        "data": config["data"],
        "data, sha256": origin["data"],
    }
    return {
        "contents": "page.j2",
        "title": f"Comparison on {config['environment']['name']}",
        "glance": glance(results),
        "drawings": {drawing.name: drawing for drawing in drawings},
        "scores": _score_lines(results),
        "costs": _cost_lines(results),
        "choices": _choice_lines(results),
        "betas": [{"method": name, **line} for name, lines in beta_lines(results).items() for line in lines],
        "legend": LEGEND,
        "wins": {name: _win_lines(found) for name, found in results.wins.items() if found},
        "missing": [f"{title}: {reason}." for title, reason in missing.items()],
        "samples": _dialogues(results),
        "methods": _method_lines(results),
        "fixed": [f"{name}: {as_text(value)}" for name, value in fixed.items() if value],
        "made": _made_lines(origin["made"]),
    }


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
    runs, top = results.groups[best], results.estimates[best]
    line = next(line for line in _setting_lines(results) if line["method"] == str(best))
    spent = [f"{line[name]} {name}" for name in COSTS[:5] if name in line]
    sentences = [
        f"Highest score without a β chosen by returns: {best}: {top} over {top.n} episodes, "
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
        other = max(guided, key=lambda key: results.estimates[key].mean)
        with_returns = f"{other}: {results.estimates[other]}"
        sentences.append(f"Highest score with β chosen by returns on other episodes: {with_returns}.")
    measured = {key.method for key in results.groups}
    lacking = [name for name, method in results.shown["config"]["methods"].items() if method.get("evaluate", True)]
    if lacking := [name for name in lacking if name not in measured]:
        without = "; without those of the baseline, no differences are shown" * (baseline in lacking)
        sentences.append(f"There are no results of {', '.join(lacking)}{without}.")
    if len(runs) < FEW_SEEDS:
        several = f"Fewer than {FEW_SEEDS} training seeds: intervals are wide, so the table lists every seed."
        one = "One training seed: intervals describe this run over episodes, and no method is called better."
        sentences.append(several if len(runs) > 1 else one)
    return sentences


def _verdict(difference: Estimate) -> str:
    if difference.low <= 0 <= difference.high:
        return "not distinguishable: the paired interval includes 0"
    if not difference.sure:
        return f"{'higher' if difference.low > 0 else 'lower'} in this run; one training seed cannot rank methods"
    return f"{'better' if difference.low > 0 else 'worse'}: the paired interval excludes 0"


def _only(line: Line, names: Sequence[str]) -> Line:
    return {name: line[name] for name in names if name in line}


def _setting_lines(results: Results) -> list[Line]:
    """Return the lines of the table, with decoding and choice of β added to the method in the first column.

    They are then next to the score on a narrow screen.
    """
    lines = table_lines(results)
    first = len(results.of("behaviour", "optimum"))
    for line, key in zip(lines[first:], results.groups, strict=False):  # published rows come last
        line["method"] = str(key)
        del line["decoding"]
    return lines


def _score_lines(results: Results) -> list[Line]:
    """Return the lines of the table of scores: all columns but those of COSTS, with the columns of labels last."""
    names = (
        "method",
        *EVERYWHERE[:2],
        "per seed",
        "normalised",
        f"minus {results.shown['baseline']}",
        *EVERYWHERE[2:],
    )
    lines = [_only(line, names) | line for line in _setting_lines(results)]
    return [{name: cell for name, cell in line.items() if name not in COSTS} for line in lines]


def _cost_lines(results: Results) -> list[Line]:
    """Return the lines of the table of costs, one for each method in one setting."""
    names = ("method", *EVERYWHERE, *COSTS)
    return [_only(line, names) for line in _setting_lines(results) if "regime" in line]


def _choice_lines(results: Results) -> list[Line]:
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


def beta_lines(results: Results) -> dict[str, list[Line]]:
    """Return, for each method whose β was chosen offline, a table line per β: what it does to replies.

    The replies are to contexts of held-out logs, and the lines are those of the first training seed in sampled play.
    Methods without such replies are left out.
    """
    found = {}
    for key, runs in results.groups.items():
        tried = [entry for entry in runs[0].get("betas_tried") or () if "broken" in entry]
        if key.chosen == "offline" and key.decode == "sampled" and tried:
            found[key.method] = [choice_cells(entry, entry["chosen"]) for entry in tried]
    return found


def _win_lines(found: Mapping[tuple[Key, Key], Estimate]) -> list[Line]:
    """Return the matrix of win rates, the share with which the setting of a line wins against that of a column.

    Args:
      found: (a, b) -> share of episodes in which a scores higher than b.
    """
    keys = list(dict.fromkeys(key for pair in found for key in pair))
    return [{"": str(a), **{str(b): str(found[a, b]) if (a, b) in found else "" for b in keys}} for a in keys]


def _method_lines(results: Results) -> list[Line]:
    """Return a table line with the settings of each method of the comparison, also of those without results."""
    runs = results.of("run")
    regimes = {run["method"]: run["regime"] for run in runs}
    return [
        {
            "method": name,
            "algorithm": method["algorithm"],
            **{title: as_text(method[key]) for title, key in PARTS.items() if method.get(key)},
            "regime": regimes.get(name, "no results" if method.get("evaluate", True) else "not evaluated"),
            "seeds": " ".join(dict.fromkeys(str(run["seed"]) for run in runs if run["method"] == name)),
            "its own settings": as_text({name: method.get(name) for name in OWN}),
        }
        for name, method in results.shown["config"]["methods"].items()
    ]


def _made_lines(made: Sequence[Mapping[str, Any]]) -> list[Line]:
    """Return a table line for each command that made rows.

    Args:
      made: the entry `made` of a manifest.
    """
    return [
        {
            "rows": str(entry["rows"]),
            "command": entry["command"],
            "commit": entry["commit"] or "none",
            "machine": as_text(entry["machine"]),
            "versions": as_text(entry["versions"]),
        }
        for entry in made
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


def _dialogues(results: Results) -> list[tuple[int, list[Turn], list[tuple[str, str, list[Turn]]]]]:
    """Return the dialogues that the page shows, one tuple per episode.

    Returns: (episode seed, turns before the agent's first that all methods share, [(method in a setting, score, its
      other turns, shortened)]).
    """
    samples: dict[int, list[tuple[str, Row]]] = {}
    for key, runs in results.groups.items():
        for sample in next((run["samples"] for run in runs if run.get("samples")), ()):
            samples.setdefault(sample["seed"], []).append((str(key), sample))
    dialogues = []
    for seed, given in samples.items():
        shared = _shared([sample["turns"] for _, sample in given])
        own = [(key, f"{sample['score']:g}", _shortened(sample["turns"][len(shared) :])) for key, sample in given]
        dialogues.append((seed, shared, own))
    return dialogues


def _shared(dialogues: Sequence[Sequence[Turn]]) -> list[Turn]:
    """Return the turns, (role, text) each, with which all dialogues begin, without the agent's turns."""
    shared = []
    for turns in zip(*dialogues, strict=False):
        if any(turn != turns[0] for turn in turns) or turns[0][0] == "assistant":
            break
        shared.append(turns[0])
    return shared


def _shortened(turns: Sequence[Turn]) -> list[Turn]:
    """Return the turns, (role, text) each. In a long dialogue, one entry with the role "" replaces the middle."""
    if len(turns) <= HEAD + TAIL:
        return list(turns)
    left_out = f"… {len(turns) - HEAD - TAIL} turns …"
    return [*turns[:HEAD], ("", left_out), *turns[-TAIL:]]
