"""Every shipped config builds: known keys, values in range, algorithms, environments and data sources that exist."""

import inspect

import pytest
from rich.console import Console

from offline_lmrl.cli_data import _source, config_path, shipped_configs
from offline_lmrl.cli_parser import read_settings
from offline_lmrl.cli_run import train_settings
from offline_lmrl.environments import ENVIRONMENTS
from offline_lmrl.evaluation.compare import _Comparison
from offline_lmrl.evaluation.config import CompareConfig

CONFIGS = shipped_configs()
COMPARISONS = [name for name, path in CONFIGS.items() if "methods" in read_settings(path)]
PREPARING = [name for name in COMPARISONS if "prepare" in read_settings(CONFIGS[name])]


def test_there_are_configs_of_both_kinds():
    assert COMPARISONS and set(CONFIGS) - set(COMPARISONS)


@pytest.mark.parametrize("name", sorted(set(CONFIGS) - set(COMPARISONS)))
def test_training_config_builds(name):
    values = train_settings([name, "--args.use_cpu", "true"])
    assert values.args.output_dir == read_settings(CONFIGS[name])["args"]["output_dir"]


@pytest.mark.parametrize("name", COMPARISONS)
def test_comparison_builds_what_every_run_is_given(name):
    config = CompareConfig.read(config_path(name), {"args.use_cpu": True})
    _Comparison(config, Console()).check_settings()
    assert config.environment["name"] in ENVIRONMENTS


@pytest.mark.parametrize("name", PREPARING)
def test_comparison_prepares_the_data_it_reads(name):
    config = CompareConfig.read(config_path(name))
    command, settings = config.prepare["command"], {k: v for k, v in config.prepare.items() if k != "command"}
    inspect.signature(_source(command)).bind(**settings)
    assert config.data["train"].startswith(config.prepare["output"])
