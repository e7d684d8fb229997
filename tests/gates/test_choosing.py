"""How much of the gain of choosing by play the rule of choice keeps. `pytest -m gates -s tests/gates/test_choosing.py`

The task `-k walk` is one of those on which the rule was fixed, on other seeds; the others judge it. Every test trains
five seeds with a shipped recipe: minutes of a core for walk and pref_gold, an hour for wordle and support, and some
three hours for negotiation, whose data have to be prepared first (the first lines of its config say how).
"""

from pathlib import Path

import pytest

from offline_lmrl.cli.data import prepare_from_settings
from offline_lmrl.comparison.compare import run_compare
from offline_lmrl.comparison.config import CompareConfig
from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.logs.io import holds_comparisons, read_comparisons, read_trajectories
from offline_lmrl.logs.preferences import to_trajectories
from offline_lmrl.logs.yaml_text import read_yaml
from offline_lmrl.settings import build
from offline_lmrl.shipped import config_path
from offline_lmrl.tasks import make_environment
from tests.gates.choosing import ASKS, BETAS, gains, kept, measure, write

CELLS = {"ilql": "ilql", "return_conditioned": "return_conditioned", "dt": "return_conditioned"}  # method -> algorithm
NEEDED = {"reward_model", "bc", *CELLS}


def comparison(name, folder):
    """A shipped comparison, reduced to the methods of the cells, that plays next to nothing itself; its selection."""
    raw = read_yaml(config_path(name), "settings")
    raw["methods"] = {key: value for key, value in raw["methods"].items() if key in NEEDED}
    raw |= {"output": str(folder / "runs"), "workers": 1, "reference": {}}
    if "prepare" in raw:
        raw["prepare"]["output"] = str(folder / "data")
        raw["data"] = {split: str(folder / "data" / f"{split}.jsonl") for split in ("train", "validation")}
    elif not Path(raw["data"]["train"]).exists():
        pytest.skip(f"{raw['data']['train']} is missing: the first lines of {name}.yaml say how to prepare it")
    raw["evaluation"] |= {"episodes": 4, "betas": [4], "offline_rows": 4}
    selection = build(CompareConfig, raw).evaluation.selection
    raw["evaluation"]["selection"] = None
    return build(CompareConfig, raw), selection


def held_out(path):
    if not holds_comparisons(path):
        return read_trajectories(path)
    return to_trajectories(read_comparisons(path), reward="sign")


def played(config, selection):
    """The environment and the episodes by purpose; scenarios on which a comparison chooses β are not reported."""
    players = {}
    if config.partner is not None:
        folder = Path(config.output) / "runs" / f"partner-{config.partner.seed}"
        players[config.partner.argument] = LanguagePolicy.load(folder, **config.partner.decoding)
    chosen_on = config.environment | (selection.environment if selection else {})
    return {
        "selection": (make_environment(**chosen_on, **players), range(10**6, 10**6 + 200)),
        "report": (make_environment(**config.environment, **players), range(5000, 5400)),
    }


TASKS = ["walk/compare", "preferences/pref_gold", "wordle/two_piece", "support/compare", "negotiation/compare"]


@pytest.mark.gates
@pytest.mark.parametrize("name", TASKS)
def test_the_rule_keeps_most_of_the_gain(name, tmp_path):
    config, selection = comparison(name, tmp_path)
    run_compare(config, prepare=prepare_from_settings)
    logs = held_out(config.data["validation"])[:400]
    rows = []
    games = played(config, selection)
    for method in filter(CELLS.__contains__, config.methods):
        for seed in config.seeds:
            folder = tmp_path / "runs" / "runs" / f"{method}-{seed}"
            policy = LanguagePolicy.load(folder, **config.evaluation.decoding, beta=0.0, ask=None)
            cell = {"task": config.environment["name"], "method": CELLS[method], "seed": seed}
            rows += measure(cell, policy, games, logs, BETAS if method == "ilql" else ASKS)
    write(tmp_path / "rows.jsonl", rows)
    cells = gains(rows)
    for cell in cells:
        print(cell)
    share, low, high = kept(cells)
    print(f"{name}: kept {share:.2f} [{low:.2f}, {high:.2f}], rows in {tmp_path / 'rows.jsonl'}")
    assert share >= 0.8


def row(task, seed, beta, score, selection, chosen):
    return {
        **{"task": task, "method": "ilql", "seed": seed, "beta": beta, "ask": None, "chosen": chosen},
        **{"report": score, "selection": selection, "sd": 2.0, "kl_logged": beta / 20},
    }


def test_kept_gain_by_hand():
    rows = [
        # the rule gains (3 − 1) / 2 = 1, choosing by returns (4 − 1) / 2 = 1.5
        *(row("a", 0, 0.0, 1.0, 0.0, False), row("a", 0, 4.0, 3.0, 1.0, True), row("a", 0, 8.0, 4.0, 2.0, False)),
        # the rule loses 0.5; the plain policy is the best by returns, and gains 0
        *(row("b", 0, 0.0, 1.0, 9.0, False), row("b", 0, 4.0, 0.0, 1.0, True)),
    ]
    cells = gains(rows)
    assert [(c["rule_gain"], c["returns_gain"]) for c in cells] == [(1.0, 1.5), (-0.5, 0.0)]
    assert [c["before_gain"] for c in cells] == [1.0, -0.5]  # KL .2 at β 4, .4 at β 8
    assert [(c["rule"], c["returns"]) for c in cells] == [("β 4", "β 8"), ("β 4", "β 0")]
    assert kept(cells[:1]) == pytest.approx((2 / 3, 2 / 3, 2 / 3))
    assert kept(cells, draws=50)[0] == pytest.approx(0.5 / 1.5)
