import re

import pytest

from offline_lmrl.comparison.config import CompareConfig
from offline_lmrl.comparison.resolve import resolve
from offline_lmrl.errors import InputError
from offline_lmrl.shipped import config_path

FILE = """
environment: {name: maze, observed: full}
data: {train: logs/train.jsonl, validation: logs/validation.jsonl}
output: runs/maze
seeds: [0, 1]
evaluation:
  episodes: 50
  betas: [1, 2e0]
  score: {min: -101, mean: -83, max: -6.84}
  selection: {episodes: 10, first_seed: 100}
args: {learning_rate: 1e-3, save_strategy: "no"}
methods:
  start: {algorithm: bc, evaluate: false}
  bc: {algorithm: bc}
  ilql: {algorithm: ilql, from: start, regime: + reward model}
partner: {algorithm: bc, seed: 3}
reference:
  ILQL: {normalised: 99.9}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "compare.yaml"
    path.write_text(FILE)
    return path


@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "a/b", "..", ".", ".hidden", '""', "a\\b", "-x",
                                  "x" * 101, '"a\\0b"', '"a\\nb"', '"a\\e[2Jb"'])  # fmt: skip
def test_the_name_of_a_method_is_a_name(file, name):
    file.write_text(FILE.replace("  bc: {algorithm: bc}", f"  {name}: {{algorithm: bc}}"))
    with pytest.raises(InputError, match="methods: found the name .*, expected text of letters, digits"):
        CompareConfig.read(file)


@pytest.mark.parametrize("name", ["1", "null"])
def test_the_name_of_a_method_is_text(file, name):
    file.write_text(FILE.replace("  bc: {algorithm: bc}", f"  {name}: {{algorithm: bc}}"))
    with pytest.raises(InputError, match="the key (1|None), expected text: put it in quotes"):
        CompareConfig.read(file)


def test_a_method_does_not_take_the_runs_of_the_partner(file):
    file.write_text(FILE.replace("  bc: {algorithm: bc}", "  partner: {algorithm: bc}"))
    with pytest.raises(InputError, match="methods: found the name 'partner' beside a partner"):
        CompareConfig.read(file)


def test_a_file_becomes_typed_settings(file):
    config = CompareConfig.read(file)
    assert config.seeds == (0, 1) and config.evaluation.betas == (1.0, 2.0)
    assert config.evaluation.seeds == range(50) and config.evaluation.score.max == -6.84
    assert config.methods["ilql"].start_from == "start" and config.methods["ilql"].regime == "+ reward model"
    # 1e-3 is a number here, unlike in plain YAML 1.1, and a quoted text stays one
    assert config.args == {"learning_rate": 0.001, "save_strategy": "no"}
    assert config.partner.seed == 3 and config.reference == {"ILQL": {"normalised": 99.9}}


def test_the_baseline_is_the_first_evaluated_method(file):
    assert CompareConfig.read(file).baseline == "bc"


def test_null_is_the_default_where_a_setting_does_not_take_it(file):
    config = CompareConfig.read(file, {"seeds": None, "evaluation.cluster": None, "partner": None, "args": None})
    assert config.seeds == (0, 1, 2, 3, 4) and config.evaluation.cluster is None and config.partner is None
    assert config.args == {}


def test_overrides_win_over_the_file(file):
    config = CompareConfig.read(file, {"evaluation.episodes": 3, "methods.bc.args.max_steps": 7, "seeds": [5]})
    assert config.evaluation.episodes == 3 and config.evaluation.betas == (1.0, 2.0)
    assert config.methods["bc"].args == {"max_steps": 7} and config.seeds == (5,)


def test_selection_may_share_seeds_when_its_environment_is_another(file):
    overrides = {"evaluation.selection": {"first_seed": 0, "environment": {"observed": "partial"}}}
    assert CompareConfig.read(file, overrides).evaluation.selection.environment == {"observed": "partial"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"evaluation.episods": 3},
            "evaluation.episods: found a setting that does not exist; did you mean 'evaluation.episodes'",
        ),
        ({"sedes": [1]}, "sedes: found a setting that does not exist; did you mean 'seeds'"),
        ({"methods.bc.algoritm": "bc"}, "methods.bc: found 'algoritm', .*; did you mean 'algorithm'?"),
        (
            {"methods.bc": {"args": {}}},
            "methods.bc: found none of them, expected exactly one of algorithm, train",
        ),
        ({"methods.bc.run_of": "ilql"}, "methods.bc: found algorithm and run_of, expected exactly one of"),
        ({"methods.bc": {"run_of": "ilq"}}, "methods.bc.run_of: found 'ilq', .*; did you mean 'ilql'?"),
        ({"methods.bc": {"run_of": "ilql", "args": {}}}, "methods.bc.args: found beside `run_of`"),
        (
            {"methods.bc": {"run_of": "ilql", "reward_model": "start"}},
            "methods.bc.reward_model: found beside `run_of`",
        ),
        ({"methods.bc": {"run_of": "ilql", "preference": {}}}, "methods.bc.preference: found beside `run_of`"),
        ({"methods.ilql.betas": [-1]}, r"methods.ilql.betas: found \[-1.0\], expected a list of numbers"),
        ({"methods.bc": "bc"}, "methods.bc: found 'bc', expected a mapping"),
        ({"methods.bc.args": 3}, "methods.bc.args: found 3, expected a mapping"),
        ({"methods": {}}, "methods: found none to evaluate"),
        ({"methods.ilql.from": "bcc"}, "methods.ilql.from: found 'bcc', .*; did you mean 'bc'?"),
        ({"methods.start.from": "ilql"}, "methods.start: found the circle start <- ilql <- start"),
        ({"methods.ilql.value_model": "ilq"}, "methods.ilql.value_model: found 'ilq', .*; did you mean 'ilql'?"),
        ({"methods.start.value_model": "ilql"}, "methods.start: found the circle start <- ilql <- start"),
        ({"methods.bc.value_model": "bc"}, "methods.bc: found the circle bc <- bc"),
        (
            {"methods.bc": {"algorithm": "awr", "value_model": "ilql", "args": {"value_model": "x"}}},
            "methods.bc.args.value_model: found beside `value_model`",
        ),
        ({"methods.bc.planner": {"scorer": "ilq"}}, "methods.bc.planner.scorer: found 'ilq', .*did you mean 'ilql'?"),
        ({"methods.bc.decoding": {"ask": "auto:ilq"}}, "methods.bc.decoding.ask: found 'ilq', .*did you mean 'ilql'?"),
        ({"methods.bc.planner": 4}, "methods.bc.planner: found 4, expected a mapping"),
        ({"methods.ilql.model": {"path": "gpt2"}}, "methods.ilql.model.path: found beside `from`"),
        ({"baseline": "start"}, "baseline: found 'start', expected one of bc, ilql"),
        ({"seeds": []}, "seeds: found .*, expected at least one, and no seed twice"),
        ({"seeds": [1, 1]}, "seeds: found .*, expected at least one, and no seed twice"),
        ({"seeds": ["a"]}, r"seeds\[0\]: found 'a', expected a whole number"),
        ({"evaluation.episodes": 0}, "evaluation.episodes: found 0, expected at least 1"),
        ({"evaluation.episodes": 2.5}, "evaluation.episodes: found 2.5, expected a whole number"),
        ({"evaluation.betas": [-1]}, "evaluation.betas: found"),
        ({"evaluation.offline_rows": 0}, "evaluation.offline_rows: found 0"),
        ({"evaluation.decoding": {"beta": 2}}, "evaluation.decoding.beta: found a value"),
        ({"evaluation.score": {"min": 1}}, "evaluation.score.mean: missing, expected a finite number"),
        ({"evaluation.selection": {"first_seed": 49}}, "evaluation.selection.first_seed: found 1 episode seeds"),
        ({"evaluation.selection": {"first_seed": 40, "episodes": 2**40}}, "first_seed: found 10 episode seeds"),
        ({"evaluation.cluster": [1]}, r"evaluation.cluster: found \[1\], expected text or null"),
        ({"evaluation": 3}, "evaluation: found 3, expected a mapping"),
        ({"partner.seed": "x"}, "partner.seed: found 'x', expected a whole number"),
        ({"environment": {"observed": "full"}}, "environment.name: missing"),
        ({"data": {"train": None}}, "data.train: missing"),
        ({"data": {"train": "a", "test": "b"}}, "data: found 'test'"),
        ({"prepare": {"output": "x"}}, "prepare.command: missing"),
        ({"environment": None}, "environment: missing, expected a mapping"),
        ({"environment": "maze"}, "environment: found 'maze', expected a mapping"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_the_key(file, overrides, message):
    with pytest.raises(InputError) as error:
        CompareConfig.read(file, overrides)
    text = str(error.value)
    assert text.startswith(str(file)) and "\n" not in text and re.search(message, text), text


@pytest.mark.parametrize(("content", "message"), [("a: [1", "not YAML"), ("3", "expected a mapping")])
def test_a_file_that_is_no_mapping_is_an_input_error(tmp_path, content, message):
    (tmp_path / "x.yaml").write_text(content)
    with pytest.raises(InputError, match=message):
        CompareConfig.read(tmp_path / "x.yaml")


def test_a_missing_file_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="nowhere.yaml: found No such file"):
        CompareConfig.read(tmp_path / "nowhere.yaml")


def test_ppo_may_start_its_values_from_a_model_without_heads_but_nothing_learns_from_one():
    path = config_path("maze/quickstart")
    resolve(CompareConfig.read(path, {"methods.ppo.value_model": "bc"}))
    awr = {"methods.awr": {"algorithm": "awr", "from": "bc", "value_model": "bc"}}
    with pytest.raises(InputError, match="methods.awr.value_model: found 'bc', which has no value heads"):
        resolve(CompareConfig.read(path, awr))
    bc = {"methods.filtered_bc.value_model": "ilql"}
    with pytest.raises(
        InputError, match="filtered_bc.value_model: found 'ilql', expected none: bc takes no value model"
    ):
        resolve(CompareConfig.read(path, bc))
