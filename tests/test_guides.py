"""What README and guides point to is there, and is shipped."""

import json
import re
from pathlib import Path

import pytest

import offline_lmrl
from offline_lmrl.algorithms import ALGORITHMS
from offline_lmrl.models.loading import build_model
from offline_lmrl.shipped import shipped_configs
from offline_lmrl.tasks.walk import Walk
from offline_lmrl.tokens.tokenizers import train_tokenizer

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "configs").glob("*/*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_to_a_file(page):
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_config_that_a_page_runs_is_shipped(page):
    names = re.findall(
        r"offline-lmrl (?:train|compare|config) ([a-z_]+/[a-z_0-9]+)(?=[ `\n])", page.read_text(encoding="utf-8")
    )
    assert set(names) <= set(shipped_configs())


def test_the_readme_is_read_in_a_few_minutes():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1500


@pytest.fixture(scope="module")
def examples():
    """The names that the examples of the guide on extensions define, and what they print."""
    text = (ROOT / "configs" / "guides" / "extending.md").read_text(encoding="utf-8")
    scope: dict = {"__name__": "extending"}
    for block in re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        exec(block, scope)
    return scope


def test_the_scorer_of_the_guide_scores(examples):
    assert examples["scored"].total_return == -14.0


def test_the_importer_of_the_guide_imports(examples, tmp_path):
    rows = [{"question": f"q{i}", "answer": "a", "solved": i % 2} for i in range(20)]
    (tmp_path / "tickets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = examples["Tickets"](input=tmp_path / "tickets.jsonl", output=tmp_path / "out").prepare()
    assert report["imported"] == 20
    made = offline_lmrl.read_trajectories(tmp_path / "out" / "train.jsonl")
    assert {one.total_return for one in made} == {0.0, 1.0}


def test_the_algorithm_of_the_guide_learns(examples, tmp_path):
    logs = Walk().logs(20, seed=0)
    tokenizer = train_tokenizer([turn.content for log in logs for turn in log.turns], 280)
    spec = {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 64, "resid_pdrop": 0.0}
    args = examples["ReturnWeightedConfig"](
        str(tmp_path),
        max_steps=3,
        max_length=64,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = examples["ReturnWeightedTrainer"](build_model(spec, tokenizer), args, logs, None, tokenizer)
    assert trainer.train().global_step == 3


def test_every_algorithm_and_what_pages_name_is_importable_from_the_package():
    names = {name for algorithm in ALGORITHMS.values() for name in (algorithm.config, algorithm.trainer)}
    names |= {
        "make_environment",
        "relabel_trajectories",
        "evaluate_policy",
        "run_compare",
        "preference_rows",
        "export_run",
    }
    for page in PAGES:
        for line in re.findall(r"from offline_lmrl import (.+)", page.read_text(encoding="utf-8")):
            names |= {name.strip() for name in line.split(",")}
    assert names <= set(offline_lmrl.__all__)
    assert all(getattr(offline_lmrl, name) is not None for name in names)
