"""Every shipped config builds: known keys, values in range, algorithms, environments and data sources that exist."""

from dataclasses import replace

import pytest
from transformers import AutoConfig

from offline_lmrl.algorithms import load_algorithm
from offline_lmrl.cli.data import _source
from offline_lmrl.cli.train import train_settings
from offline_lmrl.comparison.config import CompareConfig
from offline_lmrl.comparison.resolve import resolve
from offline_lmrl.decoding.sampler import DecodingConfig
from offline_lmrl.errors import InputError
from offline_lmrl.logs.yaml_text import read_yaml
from offline_lmrl.settings import build
from offline_lmrl.shipped import config_path, shipped_configs
from offline_lmrl.tasks import ENVIRONMENTS

CONFIGS = shipped_configs()
COMPARISONS = [name for name, path in CONFIGS.items() if "methods" in read_yaml(path, "settings")]


def scratch_specs(settings):
    """Every model of fresh weights that a config names: its own, a method's or a partner's."""
    if isinstance(settings, dict):
        yield from ([settings["scratch"]] if settings.get("scratch") else [])
        for value in settings.values():
            yield from scratch_specs(value)


SCRATCH = {
    f"{name} {i}": spec
    for name, path in CONFIGS.items()
    for i, spec in enumerate(scratch_specs(read_yaml(path, "settings")))
    for name, path in CONFIGS.items()
    for i, spec in enumerate(scratch_specs(read_yaml(path, "settings")))
}


def test_there_are_configs_of_both_kinds():
    assert COMPARISONS and set(CONFIGS) - set(COMPARISONS)


@pytest.mark.parametrize("name", sorted(set(CONFIGS) - set(COMPARISONS)))
def test_training_config_builds(name):
    values = train_settings([name, "--args.use_cpu", "true"])
    assert values.args.output_dir == read_yaml(CONFIGS[name], "settings")["args"]["output_dir"]


@pytest.mark.parametrize("name", [name for name in CONFIGS if "prepare" in read_yaml(CONFIGS[name], "settings")])
def test_what_a_config_prepares_is_what_it_reads(name):
    settings = read_yaml(CONFIGS[name], "settings")
    made = dict(settings["prepare"])
    build(_source(made.pop("command")), made)
    assert settings["data"]["train"].startswith(made["output"])


@pytest.mark.parametrize("name", COMPARISONS)
def test_comparison_builds_what_every_run_is_given(name):
    config = CompareConfig.read(config_path(name), {"args.use_cpu": True})
    resolve(config)
    assert config.environment["name"] in ENVIRONMENTS


@pytest.mark.parametrize("name", sorted(set(COMPARISONS) - {"maze/quickstart"}))  # which is for a first look
def test_a_comparison_that_reports_has_five_seeds(name):
    assert len(CompareConfig.read(config_path(name)).seeds) >= 5


@pytest.mark.parametrize("spec", SCRATCH.values(), ids=SCRATCH)
def test_models_from_scratch_train_without_dropout(spec):
    config = AutoConfig.for_model(**spec).to_dict()
    # `summary_` fields are of a classifier's head, which no causal LM has.
    dropout = {name: p for name, p in config.items() if "drop" in name and not name.startswith("summary_")}
    assert not any(dropout.values()), dropout


def test_part_of_a_methods_decoding_keeps_its_other_defaults():
    flags = ["--args.use_cpu", "true", "--args.decoding.clip", "1"]
    values = train_settings(["maze/ilql", *flags])  # the file has decoding: {beta: 64}
    assert values.args.decoding == DecodingConfig(beta=64.0, clip=1.0, support=0.02)


@pytest.mark.parametrize("algorithm", ["ilql", "return_conditioned", "ppo"])
def test_a_mapping_in_python_means_what_it_means_in_a_file(algorithm, tmp_path):
    config, _ = load_algorithm(algorithm)
    ours = {"output_dir": str(tmp_path), "report_to": "none"}
    plain = {"decoding": {"top_k": "5"}, "few_shot": {"max_tokens": 9}}
    assert config(**ours, **plain).to_dict() == build(config, ours | plain).to_dict()
    assert config(**ours, decoding={"top_k": 5}).decoding == replace(config(**ours).decoding, top_k=5)
    assert config(**ours, decoding=None).decoding == config(**ours).decoding
    with pytest.raises(InputError, match="^decoding.betta: .*did you mean 'decoding.beta'"):
        config(**ours, decoding={"betta": 4})
    with pytest.raises(InputError, match="^few_shot: found 3, expected a mapping of settings or null$"):
        config(**ours, few_shot=3)


@pytest.mark.parametrize("beta", [None, [1]])
def test_a_wrong_beta_is_named_with_its_mapping(beta, tmp_path):
    config, _ = load_algorithm("ilql")
    with pytest.raises(InputError, match="^args.decoding.beta: found .*, expected a finite number$"):
        build(config, {"output_dir": str(tmp_path), "decoding": {"beta": beta}}, "args")
