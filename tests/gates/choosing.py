"""The cells on which the rule of choice is judged: a task, a method and a training seed, with every candidate played.

`measure` plays a run with every candidate and lets the rule choose from held-out logs; `kept` adds the gains up. The
shipped rows are configs/support/results.jsonl; `pytest -m gates -s tests/gates/test_choosing.py` trains and
measures a task again.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.evaluation.choice_rule import choose
from offline_lmrl.evaluation.choices import PLAIN, Choice, measure_choices
from offline_lmrl.evaluation.play import evaluate_policy
from offline_lmrl.logs.trajectory import Trajectory

BETAS = tuple(Choice(beta) for beta in (2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0))
ASKS = tuple(Choice(ask=ask) for ask in ("p25", "p50", "p75", "p90", "max"))

Row = dict[str, Any]


def measure(
    cell: Mapping[str, Any],
    policy: LanguagePolicy,
    played: Mapping[str, tuple[Any, range]],
    logs: Sequence[Trajectory],
    choices: Sequence[Choice],
) -> list[Row]:
    """Return one row per candidate of a cell, the plain policy first.

    Args:
      cell: `task`, `method` and `seed`, which every row repeats.
      policy: the trained policy, with β 0 and no requested return.
      played: a result of `make_environment` and the seeds of its episodes, by purpose: "selection", on which the best
        choice by returns is found, and "report".
      logs: held-out logs, from which the rule chooses.
      choices: the candidates.
    """
    table = measure_choices(policy, logs, choices)
    chosen = choose(table.rows).choice
    rows = []
    for row in table.rows:
        player = policy.with_decoding(beta=row.choice.beta, ask=row.choice.ask)
        scores = {}
        for purpose, (environment, episodes) in played.items():
            scores[purpose] = [one["score"] for one in evaluate_policy(player, environment, episodes).episodes]
        rows.append(
            {
                **cell,
                "beta": row.choice.beta,
                "ask": row.choice.ask,
                "chosen": row.choice == chosen,
                **{purpose: float(np.mean(found)) for purpose, found in scores.items()},
                "sd": float(np.std(scores["report"], ddof=1)),
                "episodes": len(scores["report"]),
                "realised": None if row.realised is None else list(row.realised[:3]),
                "advantage": None if row.advantage is None else list(row.advantage[:3]),
                **{name: getattr(row, name) for name in ("broken", "repeated", "unfinished", "empty")},
                "kl_token": row.kl_token and row.kl_token.mean,
                "kl_logged": row.kl_logged,
                "log_prob": row.log_prob and row.log_prob.mean,
            }
        )
    return rows


def gains(rows: Sequence[Row]) -> list[Row]:
    """Return, per cell, the gains of the rule and of choosing by returns, in deviations of the plain policy's score.

    A gain is the score on the reported episodes minus the plain policy's. Choosing by returns takes the candidate, the
    plain policy included, with the best score on the selection episodes. `before_gain` is that of what was chosen
    before this rule: the largest β with KL(guided ‖ π) of at most .3 nats per logged token, or the request p90.
    """
    cells: dict[tuple, list[Row]] = {}
    for row in rows:
        cells.setdefault((row["task"], row["method"], row["seed"]), []).append(row)
    found = []
    for (task, method, seed), group in cells.items():
        plain = next(row for row in group if row["beta"] == PLAIN.beta and row["ask"] is None)
        best = max(group, key=lambda row: row["selection"])
        rule = next(row for row in group if row["chosen"])
        before = _before(group, plain)
        found.append(
            {
                **{"task": task, "method": method, "seed": seed, "plain": plain["report"]},
                **{"rule": _name(rule), "returns": _name(best)},
                "rule_gain": (rule["report"] - plain["report"]) / plain["sd"],
                "returns_gain": (best["report"] - plain["report"]) / plain["sd"],
                "before_gain": (before["report"] - plain["report"]) / plain["sd"],
            }
        )
    return found


def _before(group: Sequence[Row], plain: Row) -> Row:
    asked = [row for row in group if row["ask"] == "p90"]
    within = [row for row in group if (row["kl_logged"] or 0.0) <= 0.3 and row["ask"] is None]
    return asked[0] if asked else max(within, key=lambda row: row["beta"], default=plain)


def kept(cells: Sequence[Row], draws: int = 2000, gain: str = "rule_gain") -> tuple[float, float, float]:
    """Return Σ gains of the rule (or `gain`) / Σ gains of choosing by returns, with a 95 % interval.

    The interval is a percentile bootstrap: tasks are drawn with replacement, and of each drawn task its training seeds
    with all their methods. With few tasks it describes these tasks rather than tasks in general.
    """
    by_task: dict[str, dict[int, list[Row]]] = {}
    for cell in cells:
        by_task.setdefault(cell["task"], {}).setdefault(cell["seed"], []).append(cell)
    rng, tasks, ratios = np.random.default_rng(0), list(by_task.values()), []
    for _ in range(draws):
        drawn = []
        for place in rng.integers(len(tasks), size=len(tasks)):
            seeds = list(tasks[place].values())
            drawn += [cell for seed in rng.integers(len(seeds), size=len(seeds)) for cell in seeds[seed]]
        ratios.append(_ratio(drawn, gain))
    low, high = np.nanquantile(ratios, [0.025, 0.975])
    return _ratio(cells, gain), float(low), float(high)


def _ratio(cells: Sequence[Row], gain: str) -> float:
    found, returns = (sum(cell[name] for cell in cells) for name in (gain, "returns_gain"))
    return found / returns if returns else float("nan")  # a draw without any gain to keep


def _name(row: Row) -> str:
    return str(Choice(row["beta"], row["ask"]))


def write(path: Path, rows: Sequence[Row]) -> None:
    """Append rows to a JSON Lines file."""
    with open(path, "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
