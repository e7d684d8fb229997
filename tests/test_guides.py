"""What README and guides point to is there, and is shipped."""

import re
from pathlib import Path

import pytest

from offline_lmrl.cli_data import shipped_configs

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
