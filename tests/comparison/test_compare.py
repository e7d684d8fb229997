import fcntl
import json
import os
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from offline_lmrl.cli.main import main
from offline_lmrl.comparison import compare, measure, resolve, runs, schedule, storage
from offline_lmrl.comparison.config import CompareConfig
from offline_lmrl.comparison.report import table
from offline_lmrl.comparison.rows import read_results
from offline_lmrl.decoding.sampler import DecodingConfig
from offline_lmrl.errors import Failed, InputError
from offline_lmrl.evaluation.choices import Choice
from offline_lmrl.evaluation.offline_report import OfflineReport
from offline_lmrl.logs.comparison import Comparison
from offline_lmrl.logs.io import write_comparisons, write_trajectories
from offline_lmrl.logs.protocols import Reply
from offline_lmrl.logs.trajectory import Turn
from offline_lmrl.tasks.gamble import Gamble
from offline_lmrl.training.metrics import read_metrics

KL = {1.0: 0.05, 2.0: 0.1, 4.0: 0.2, 8.0: 0.9}


@dataclass
class Gambler:
    """A stand-in for a trained policy: the larger β, the safer; too large spoils the text. Greedy is safe."""

    model: SimpleNamespace
    renderer: None
    decoding: DecodingConfig
    asked = set()
    played = []  # (run, temperature, β, seeds) of every batch of episodes

    @classmethod
    def load(cls, run, **decoding):
        return cls(SimpleNamespace(run=Path(run).name), None, DecodingConfig(**decoding))

    def with_decoding(self, **changes):
        return replace(self, decoding=replace(self.decoding, **changes))

    def start(self, seeds):
        Gambler.asked.add(self.decoding.ask)
        Gambler.played.append((self.model.run, self.decoding.temperature, self.decoding.beta, list(seeds)))
        self.seeds = seeds
        return self

    def reply(self, rows, histories, options=None):
        def text(seed):
            if self.decoding.beta > 4:
                return "sa fe"
            return "safe" if self.decoding.temperature == 0 or seed % 3 < self.decoding.beta else "gamble"

        return [Reply(text(self.seeds[row]), (5, 2), (-0.1, -0.1), (-0.1, -0.1)) for row in rows]


def evaluate_offline(_, logs, betas, asks, progress):
    by_beta = [{"beta": beta, "kl": KL[beta], "changed": 0.0} for beta in betas]
    return OfflineReport(len(logs), 0, {}, None, calibration=[], by_beta=by_beta, chosen=Choice(2.0))


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A comparison file on the gamble, and stand-ins for training and the model; `trained` and `critics` list the
    calls."""
    logs = Gamble().logs(60, seed=0)
    write_trajectories(tmp_path / "train.jsonl", logs[:40])
    write_trajectories(tmp_path / "validation.jsonl", logs[40:])
    trained, critics = [], []

    def train(config, players=None):
        args = config.args
        folder = Path(args.output_dir)
        if not (folder / "complete.json").exists():
            trained.append((folder.name, config.algorithm, config.model.path, args.seed))
            critics.append(getattr(args, "value_model", None))
            folder.mkdir()
            (folder / "complete.json").write_text(json.dumps({"training_tokens": 1000}))
            (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 1, "train_runtime": 2.5}\n')
        return folder

    Gambler.played, Gambler.asked = [], set()
    monkeypatch.setattr(runs, "train", train)
    for module in (measure, schedule):
        monkeypatch.setattr(module, "LanguagePolicy", Gambler)
    monkeypatch.setattr(measure, "evaluate_offline", evaluate_offline)
    monkeypatch.setattr(compare, "write_report", lambda folder: folder / "report")  # figures would take a second each
    settings = {
        "environment": {"name": "gamble"},
        "data": {"train": str(tmp_path / "train.jsonl"), "validation": str(tmp_path / "validation.jsonl")},
        "output": str(tmp_path / "out"),
        "seeds": [0],
        "model": {"scratch": {"model_type": "gpt2"}, "vocab_size": 300},
        "args": {"use_cpu": True},
        "methods": {
            "bc": {"algorithm": "bc"},
            "ilql": {"algorithm": "ilql", "from": "bc", "args": {"expectile": 0.5}},
        },
        "evaluation": {
            "episodes": 30,
            "betas": [1, 2, 4, 8],
            "score": {"min": -1, "mean": 3, "max": 6},
            "selection": {"episodes": 12, "first_seed": 500},
        },
        "reference": {"PPO": {"score": 5.0}},
    }
    paths = {"out": tmp_path / "out", "path": tmp_path / "compare.yaml"}
    return SimpleNamespace(settings=settings, trained=trained, critics=critics, **paths)


def run(world, prepare=None, **overrides):
    world.path.write_text(json.dumps(world.settings))  # JSON is YAML
    config = CompareConfig.read(world.path, {key.replace("__", "."): value for key, value in overrides.items()})
    return compare.run_compare(config, prepare=prepare, console=Console(quiet=True))


def run_rows(world):
    return [row for row in read_results(world.out / "results.jsonl") if row["kind"] == "run"]


def test_every_method_and_seed_is_trained_once_and_starts_where_it_says(world):
    run(world, seeds=[0, 1])
    bc, ilql, bc_1, ilql_1 = world.trained
    assert bc == ("bc-0", "bc", None, 0) and bc_1[3] == 1
    assert ilql == ("ilql-0", "ilql", str(world.out / "runs" / "bc-0"), 0) and ilql_1[2].endswith("bc-1")


AWR = {"algorithm": "awr", "from": "bc", "value_model": "ilql"}


def test_a_critic_is_another_methods_run_of_the_same_seed(world):
    world.settings["methods"] = {"awr": AWR, **world.settings["methods"]}
    run(world, seeds=[0, 1])
    runs_of = [f"{name}-{seed}" for seed in (0, 1) for name in ("bc", "ilql", "awr")]  # each before what needs it
    assert [call[0] for call in world.trained] == runs_of
    folder = world.out / "runs"
    assert world.critics == [None, None, str(folder / "ilql-0"), None, None, str(folder / "ilql-1")]
    assert world.trained[2][2] == str(folder / "bc-0")


def test_results_behind_another_critic_are_refused_and_those_without_one_stay(world):
    run(world)
    first = run_rows(world)
    world.settings["methods"]["awr"] = AWR
    run(world)
    assert run_rows(world)[: len(first)] == first
    with pytest.raises(InputError, match="awr: method.0.value_model.0.args.expectile: found 0.5, expected 0.7"):
        world.settings["methods"]["other"] = {**world.settings["methods"]["ilql"], "args": {"expectile": 0.7}}
        run(world, methods__awr__value_model="other")
    with pytest.raises(InputError, match="awr: method.0.args.inverse_temperature: found None, expected 5"):
        run(world, methods__awr__args={"inverse_temperature": 5})


def test_results_hold_a_row_per_method_seed_and_setting(world):
    run(world, seeds=[0, 1])
    rows = run_rows(world)
    assert len(rows) == 2 * (2 + 4)
    assert {row["beta_chosen"] for row in rows if row["method"] == "bc"} == {None}
    greedy = next(row for row in rows if row["method"] == "bc" and row["decode"] == "greedy")
    assert greedy["score"] == 5.0 and greedy["interval"] == [5.0, 5.0] and greedy["n"] == 30  # always the safe arm
    assert greedy["normalised"] == pytest.approx(50 + 50 * 2 / 3) and (greedy["turns"], greedy["tokens"]) == (1.0, 2.0)
    assert greedy["cost"]["training_tokens"] == 1000 and greedy["cost"]["training_seconds"] == 2.5
    assert greedy["cost"]["generated_tokens"] == 60
    episodes = [json.loads(line) for line in (world.out / greedy["episodes"]).read_text().splitlines()]
    assert [row["seed"] for row in episodes] == list(range(30)) and episodes[0]["labels"]["choice"] == "safe"


def test_beta_is_chosen_offline_and_by_returns_on_other_episodes(world):
    run(world)
    rows = [
        row for row in run_rows(world) if row["method"] == "ilql" and row["decode"] == "sampled" and row["seed"] == 0
    ]
    offline, returns = rows
    assert (offline["beta_chosen"], offline["beta"]) == ("offline", 2.0)
    assert (returns["beta_chosen"], returns["beta"]) == ("returns", 4.0)  # 8 spoils the text; 4 is never a gamble
    assert [entry["beta"] for entry in returns["betas_tried"]] == [1, 2, 4, 8] and returns["cost"]["selection_tokens"]
    for _, _, beta, seeds in Gambler.played:
        assert seeds in (list(range(30)), list(range(500, 512)))
        assert beta != 8.0 or seeds[0] == 500  # what was only tried never saw the reported episodes


def test_an_unstated_selection_leaves_the_choice_by_returns_out(world):
    run(world, evaluation__selection=None)
    assert {row["beta_chosen"] for row in run_rows(world)} == {None, "offline"}


def test_rows_hold_what_the_report_shows(world):
    run(world, seeds=[3, 1])
    rows = run_rows(world)
    first = rows[0]
    assert [len(scores) for scores in first["scores"]] == [n for *_, n in first["cells"]]
    assert sum(map(sum, first["scores"])) == pytest.approx(first["score"] * first["n"])
    assert {row["seed"] for row in rows if row["samples"]} == {3}  # texts of the first seed alone
    seeds = [sample["seed"] for sample in first["samples"]]
    assert len(seeds) == 10 and all([s["seed"] for s in row["samples"]] == seeds for row in rows if row["samples"])
    assert first["samples"][0]["turns"][1] == ["assistant", "gamble"]
    assert first["made"]["versions"]["offline_lmrl"] and first["curve"] == []
    assert [row["calibration"] for row in rows if row["beta_chosen"] != "offline"] == [None] * 8
    shown = read_results(world.out / "results.jsonl")[0]
    assert shown["config"]["methods"]["ilql"]["args"] == {"expectile": 0.5} and shown["config"]["seeds"] == [3, 1]


def test_the_curve_of_a_run_that_played_is_kept_thinned(tmp_path):
    rows = [
        {"step": i, "environment_steps": 10 * i, "reward_queries": i, "score": 0.5, "kl": None, "loss": 1.0}
        for i in range(120)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"train_runtime": 1}]))
    curve = measure.learning_curve(read_metrics(tmp_path))
    assert [row["environment_steps"] for row in curve] == list(range(0, 1200, 30))
    assert curve[1] == {"environment_steps": 30, "reward_queries": 3, "score": 0.5, "kl": None}


def test_a_report_of_another_comparison_is_refused_by_name(world):
    run(world)
    (world.out / "report").mkdir()
    shutil.move(world.out / "results.jsonl", world.out / "report")
    with pytest.raises(InputError, match="report/results.jsonl: bc: evaluation.episodes: found 30, expected 31"):
        run(world, evaluation__episodes=31)
    assert not (world.out / "results.jsonl").exists()


def test_samples_are_the_same_ten_episodes_for_every_method(world):
    run(world)
    heads = []
    for path in sorted((world.out / "samples").iterdir()):
        heads.append([line.split(",")[0] for line in path.read_text().splitlines() if line.startswith("episode ")])
    assert len(heads) == 2 + 4 and len(heads[0]) == 10 and all(head == heads[0] for head in heads)


def test_a_finished_comparison_measures_nothing_again(world):
    run(world)
    before = (world.out / "results.jsonl").read_bytes()
    world.trained.clear()
    Gambler.played.clear()
    run(world)
    assert not world.trained and not Gambler.played and (world.out / "results.jsonl").read_bytes() == before


def test_an_interrupted_comparison_goes_on_where_it_stopped(world, monkeypatch):
    run(world)
    whole = run_rows(world)
    shutil.rmtree(world.out)
    original, calls = measure.evaluate_policy, []

    def stopped(*args, **keywords):
        calls.append(1)
        if len(calls) == 8:  # β 8 of the selection for greedy play, say
            raise KeyboardInterrupt
        return original(*args, **keywords)

    monkeypatch.setattr(measure, "evaluate_policy", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(world)
    kept = run_rows(world)
    assert 0 < len(kept) < len(whole)
    monkeypatch.setattr(measure, "evaluate_policy", original)
    run(world)

    def facts(rows):
        return [{k: v for k, v in row.items() if k != "cost"} for row in rows]

    assert facts(run_rows(world)) == facts(whole) and run_rows(world)[: len(kept)] == kept


def test_more_seeds_and_methods_are_added_to_what_is_there(world):
    run(world, seeds=[0])
    first = run_rows(world)
    world.settings["methods"]["again"] = {"algorithm": "bc", "args": {"keep_share": 0.5}}
    run(world, seeds=[0, 7])
    rows = run_rows(world)
    assert rows[: len(first)] == first and {row["seed"] for row in rows} == {0, 7}
    assert {row["method"] for row in rows} == {"bc", "ilql", "again"}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("methods__ilql__args__expectile", 0.9, "ilql: method.0.args.expectile: found 0.5, expected 0.9"),
        ("methods__bc__args", {"keep_share": 0.2}, r"bc: method.0.args.keep_share: found None, expected 0.2"),
        ("evaluation__episodes", 31, "evaluation.episodes: found 30, expected 31"),
        ("environment__name", "corridor", "environment.name: found 'gamble', expected 'corridor'"),
    ],
)
def test_results_of_other_settings_are_refused_by_name(world, key, value, message):
    run(world)
    before = (world.out / "results.jsonl").read_bytes()
    with pytest.raises(InputError, match=message):
        run(world, **{key: value})
    assert (world.out / "results.jsonl").read_bytes() == before


def test_results_on_other_data_are_refused(world):
    run(world)
    write_trajectories(world.settings["data"]["train"], Gamble().logs(40, seed=1))
    with pytest.raises(InputError, match="data.train: found .* remove results.jsonl, report/ and runs/"):
        run(world)


def test_what_only_shows_may_change(world):
    run(world)
    run(world, evaluation__labels=["lucky"], evaluation__batch_size=7, baseline="ilql", reference={})
    assert "PPO" not in (world.out / "table.md").read_text()


def test_the_table_is_written_and_redrawn_from_the_results_and_its_main_columns_printed(world, capsys):
    run(world)
    printed = capsys.readouterr().out.splitlines()
    assert max(map(len, printed)) <= 100 and printed[0].split()[:2] == ["method", "decoding"]
    assert "minus bc" in printed[0] and "cost" in printed[0] and "episodes" not in printed[0]
    written = (world.out / "table.md").read_text()
    assert written == table(world.out / "results.jsonl") + "\n"
    lines = written.splitlines()
    assert lines[2].startswith("| behaviour") and lines[3].startswith("| optimum") and "PPO (published)" in lines[-1]
    assert "minus bc" in lines[0] and "4 (returns)" in written and "2 (offline)" in written


def test_repeats_are_for_sampled_play_only(world):
    run(world, evaluation__repeats=2)
    assert {(row["decode"], row["n"]) for row in run_rows(world)} == {("sampled", 60), ("greedy", 30)}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("methods__ilql__args", {"expectil": 0.5}, "methods.ilql.args.expectil: found .*did you mean '.*expectile'"),
        ("methods__ilql__args", {"expectile": 2.0}, "^methods.ilql: expectile: found 2.0, expected 0.5 to"),
        ("methods__ilql__args", {"seed": 3}, "methods.ilql.args.seed: found a value, expected none"),
        ("methods__ilql__algorithm", "illql", "algorithm: found 'illql'"),
        (
            "methods__ilql__value_model",
            "bc",
            "methods.ilql.value_model: found 'bc', expected none: ilql takes no value model",
        ),
        ("methods__bc__planner", {"wide": 3}, "methods.bc.planner.wide: found .*did you mean '.*width'"),
        ("methods__bc__planner", {"depth": 0}, "depth: found 0, expected a whole number from 1"),
        (
            "methods__bc__decoding",
            {"temprature": 1},
            "^methods.bc: decoding.temprature: found .*did you mean 'temperature'",
        ),
        ("methods__bc__decoding", {"ask": "best"}, "ask: found 'best', expected a finite number"),
        ("methods__bc__planner", {"scorer": "bc"}, "methods.bc.planner.scorer: found 'bc', which has no value heads"),
        (
            "methods__bc",
            {"algorithm": "return_conditioned", "decoding": {"ask": "auto:bc"}},
            "methods.bc.decoding.ask: found 'bc', which has no value heads",
        ),
        ("evaluation__decoding", {"top_p": 2}, "top_p: found 2"),
        (
            "partner",
            {"algorithm": "bc", "decoding": {"topp": 1}},
            "^partner: decoding.topp: found .*did you mean 'top_p'",
        ),
        ("model__scrach", {}, "methods.bc.model.scrach: found a setting that does not exist; did you mean '.*scratch"),
        ("data__validation", None, "data.validation: missing"),
    ],
)
def test_a_slip_anywhere_surfaces_before_anything_is_trained(world, key, value, message):
    with pytest.raises(InputError, match=message):
        run(world, **{key: value})
    assert not world.trained and not world.out.exists()


def test_missing_data_are_prepared_first(world):
    made = []

    def prepare(settings):
        made.append(settings)
        write_trajectories(world.settings["data"]["train"], Gamble().logs(20, seed=0))

    world.settings["data"]["train"] += ".new.jsonl"
    world.settings["prepare"] = {"command": "gamble", "output": "x"}
    run(world, prepare)
    run(world, prepare)
    assert made == [{"command": "gamble", "output": "x"}]


def test_data_that_a_kill_left_unfinished_are_prepared_again(world, tmp_path):
    made, folder = [], tmp_path / "data"

    def prepare(settings):
        made.append(settings)
        for name in ("train", "validation"):
            write_trajectories(folder / f"{name}.jsonl", Gamble().logs(20, seed=0))
        (folder / "report.json").write_text("{}")

    write_trajectories(folder / "train.jsonl", Gamble().logs(20, seed=0))
    world.settings["data"] = {name: str(folder / f"{name}.jsonl") for name in ("train", "validation")}
    world.settings["prepare"] = {"command": "gamble", "output": str(folder)}
    run(world, prepare)
    run(world, prepare)
    assert len(made) == 1


def test_a_folder_where_another_comparison_runs_is_refused(world):
    world.settings["output"] += "/taken"
    folder = world.path.parent / "out" / "taken"
    folder.mkdir(parents=True)
    held = os.open(folder, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)  # each opening of a folder has a lock of its own
    with pytest.raises(InputError, match="taken: found another command at work in this folder"):
        run(world)
    os.close(held)
    assert not world.trained and not list(folder.iterdir())


class Duel(Gamble):
    """The gamble beside a partner, who is asked for nothing but has to be there."""

    def __init__(self, partner):
        assert partner.decoding.temperature == 0.5
        self.partner = partner


def test_a_partner_is_trained_once_and_handed_to_the_environment(world):
    world.settings["environment"] = {"name": f"{__name__}:Duel"}
    world.settings["partner"] = {"algorithm": "bc", "seed": 9, "decoding": {"temperature": 0.5}}
    sys.modules.setdefault(__name__, SimpleNamespace(Duel=Duel, __file__=__file__))
    run(world)
    assert [call for call in world.trained if call[0].startswith("partner")] == [("partner-9", "bc", None, 9)]


def test_what_learns_by_playing_may_play_elsewhere_than_is_reported(world, monkeypatch):
    learnt, played, stand_in = [], [], runs.train

    def train(config, players=None):
        learnt.append(config.environment)
        return stand_in(config)

    def make(**settings):
        played.append(settings)
        return Gamble

    monkeypatch.setattr(runs, "train", train)
    for module in (measure, resolve, storage):
        monkeypatch.setattr(module, "make_environment", make)
    world.settings["environment"] = {"name": "gamble", "strip": "last"}
    world.settings["methods"] = {"bc": {"algorithm": "bc"}, "ppo": {"algorithm": "ppo", "from": "bc"}}
    run(world, training_environment={"strip": "first"})
    assert learnt == [None, {"name": "gamble", "strip": "first"}]
    assert [settings["strip"] for settings in played].count("first") == 1 and played[-1]["strip"] == "last"  # a check
    run(world, training_environment={"strip": "first"})
    with pytest.raises(InputError, match="ppo: method.0.training_environment.strip: found 'first', expected 'second'"):
        run(world, training_environment={"strip": "second"})
    del world.settings["methods"]["ppo"]
    with pytest.raises(InputError, match="training_environment: found .'strip'., expected a method that learns"):
        run(world, training_environment={"strip": "first"})


def test_a_folder_that_cannot_be_written_is_an_input_error(world, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="out: found .* expected a path that can be written"):
        run(world, output=str(tmp_path / "file" / "out"))


def test_the_real_trainer_and_policy_fit_together(world, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # a report of tables
    tiny = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 1, "n_positions": 32}
    world.settings |= {
        "model": {"scratch": tiny, "vocab_size": 270},
        "args": {"max_steps": 1, "use_cpu": True, "max_length": 32, "save_strategy": "no", "disable_tqdm": True},
    }
    selection = {"episodes": 2, "first_seed": 500}
    world.settings["methods"]["awr"] = AWR
    run(world, evaluation={"episodes": 3, "betas": [1], "decoding": {"max_new_tokens": 2}, "selection": selection})
    rows = run_rows(world)
    assert [(row["method"], row["beta_chosen"]) for row in rows] == [
        ("bc", None),
        ("bc", None),
        *[("ilql", "offline"), ("ilql", "returns")] * 2,
        ("awr", None),
        ("awr", None),
    ]
    cost = {row["method"]: row["cost"]["training_tokens"] for row in rows}
    assert cost["awr"] == pytest.approx(cost["ilql"] + cost["bc"], rel=0.1)  # itself, the critic, and bc once
    assert all(row["cost"]["training_tokens"] > 0 and row["cost"]["training_seconds"] > 0 for row in rows)
    # Value heads start as a constant, so guidance moves nothing yet
    assert rows[2]["betas_tried"][0]["kl"] == pytest.approx(0.0, abs=1e-3) and rows[2]["beta"] == 0.0
    assert rows[3]["betas_tried"][0]["kl"] == pytest.approx(0.0, abs=1e-3)  # the same, sampled
    assert rows[2]["calibration"] and {row["decode"] for row in rows if row["kl"] is not None} == {"sampled"}
    assert "ilql, sampled, β offline" in (world.out / "report" / "report.md").read_text()


def test_a_method_may_play_anothers_run_in_its_own_way(world):
    world.settings["methods"]["cold"] = {"run_of": "ilql", "decoding": {"temperature": 0.5}, "betas": []}
    run(world)
    assert [call[0] for call in world.trained] == ["bc-0", "ilql-0"]
    cold = [row for row in run_rows(world) if row["method"] == "cold"]
    assert [(row["decode"], row["beta"], row["beta_chosen"]) for row in cold] == [
        ("sampled", 0, None),
        ("greedy", 0, None),
    ]
    assert all(row["run"].endswith("ilql-0") and row["algorithm"] == "ilql" for row in cold)
    assert ("ilql-0", 0.5, 0.0) in [played[:3] for played in Gambler.played]
    with pytest.raises(InputError, match="cold: method.0.decoding.temperature: found 0.5, expected 0.7"):
        run(world, methods__cold__decoding={"temperature": 0.7})


def test_rewards_are_the_labels_or_another_methods_run_of_the_same_seed(world, tmp_path, monkeypatch):
    asked, said = (Turn("user", "safe or gamble?"),), [(Turn("assistant", text),) for text in ("safe", "gamble")]
    for name in ("train", "validation"):
        write_comparisons(tmp_path / f"{name}.jsonl", [Comparison(asked, said, (1.0, 0.0), group=name)])
    preferences, train = [], runs.train

    def noted(config, players=None):
        preferences.append((config.args.output_dir.rpartition("/")[2], config.data.preference))
        return train(config)

    monkeypatch.setattr(runs, "train", noted)
    world.settings["methods"] = {
        "bc": {"algorithm": "bc", "preference": {"reward": "sign"}},
        "ilql": {"algorithm": "ilql", "reward_model": "reward_model", "preference": {"normalise": "none"}},
        "reward_model": {"algorithm": "reward_model", "evaluate": False},
    }
    run(world, seeds=[0, 1])
    judges = [str(world.out / "runs" / f"reward_model-{seed}") for seed in (0, 1)]
    assert preferences == [
        (f"{name}-{seed}", made)
        for seed in (0, 1)
        for name, made in (
            ("bc", {"reward": "sign"}),
            ("reward_model", None),
            ("ilql", {"normalise": "none", "reward": judges[seed]}),
        )
    ]
    assert {row["kind"] for row in read_results(world.out / "results.jsonl")} == {
        "comparison",
        "optimum",
        "published",
        "run",
    }
    run(world, seeds=[0, 1], methods__reward_model__args={"processes": 2})  # what only makes it faster may change
    with pytest.raises(InputError, match="ilql: method.0.preference.normalise: found 'none', expected 'group'"):
        run(world, methods__ilql__preference={"normalise": "group"})
    with pytest.raises(InputError, match="methods.ilql.preference.reward: found beside `reward_model`"):
        run(world, methods__ilql__preference={"reward": "sign"})


def test_what_is_asked_for_may_be_anothers_v(world):
    methods = world.settings["methods"]
    told = {"algorithm": "return_conditioned", "decoding": {"ask": "auto:ilql"}}
    world.settings["methods"] = {"told": told} | methods
    run(world)
    assert sorted(call[0] for call in world.trained) == ["bc-0", "ilql-0", "told-0"]
    told = next(row for row in run_rows(world) if row["method"] == "told")
    assert told["cost"]["training_tokens"] == 2000 and told["beta_chosen"] is None
    assert Gambler.asked == {None, f"auto:{world.out / 'runs' / 'ilql-0'}"}
    with pytest.raises(InputError, match="told: method.0.*: found"):
        world.settings["methods"]["other"] = {**methods["ilql"], "args": {"expectile": 0.7}}
        run(world, methods__told__decoding={"ask": "auto:other"})


def test_a_planned_row_stands_beside_the_others_and_its_scorer_is_the_same_seeds_run(world, monkeypatch):
    monkeypatch.undo()
    tiny = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 1, "n_positions": 32}
    planned = {"width": 1, "expand": 2, "scorer": "ilql"}
    world.settings |= {
        "model": {"scratch": tiny, "vocab_size": 270},
        "args": {"max_steps": 1, "use_cpu": True, "max_length": 32, "save_strategy": "no", "disable_tqdm": True},
        "methods": {
            "bc": {"algorithm": "bc", "planner": planned},
            "ilql": {"algorithm": "ilql", "evaluate": False, "args": {"expectile": 0.5}},
        },
        "evaluation": {"episodes": 3, "decoding": {"max_new_tokens": 2}},
    }
    run(world)
    rows = run_rows(world)
    assert [(row["decode"], row["beta_chosen"]) for row in rows] == [
        ("sampled", None),
        ("greedy", None),
        ("planned", None),
    ]
    assert rows[2]["labels"]["planned_tokens"] > 0 and rows[2]["config"]["planner"]["expand"] == 2
    assert rows[2]["cost"]["generated_tokens"] == pytest.approx(3 * rows[2]["labels"]["planned_tokens"])  # 3 episodes
    assert rows[2]["cost"]["training_tokens"] == 2 * rows[0]["cost"]["training_tokens"]  # that of its scorer too
    with pytest.raises(InputError, match="bc: planner.width: found 1, expected 2"):
        run(world, methods__bc__planner__width=2)
    with pytest.raises(InputError, match="bc: planner.scorer.0.args.expectile: found 0.5, expected 0.7"):
        run(world, methods__ilql__args__expectile=0.7)
    world.settings["methods"]["bc"]["planner"] = None  # other rows do not hang on the plans
    run(world)
    assert run_rows(world) == rows


def test_workers_give_the_rows_that_one_process_gives(world, tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    tiny = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 1, "n_positions": 32}
    world.settings |= {
        "seeds": [1, 0],
        "methods": {"bc": {"algorithm": "bc"}},
        "model": {"scratch": tiny, "vocab_size": 270},
        "args": {"max_steps": 1, "use_cpu": True, "max_length": 32, "save_strategy": "no", "disable_tqdm": True},
        "evaluation": {"episodes": 3, "decoding": {"max_new_tokens": 2}},
    }
    measured = []
    for workers in (1, 2):
        run(world, workers=workers, output=str(tmp_path / f"out{workers}"))
        rows = [row for row in read_results(tmp_path / f"out{workers}" / "results.jsonl") if row["kind"] == "run"]
        measured.append([(row["seed"], row["decode"], row["score"], row["cells"]) for row in rows])
    assert measured[0] == measured[1]
    assert [row[:2] for row in measured[1]] == [(1, "sampled"), (1, "greedy"), (0, "sampled"), (0, "greedy")]


# How long a reply may be


def test_what_learns_by_playing_gives_replies_as_long_as_it_is_measured_by(world, monkeypatch):
    lengths, stand_in = {}, runs.train

    def train(config, players=None):
        lengths[Path(config.args.output_dir).name] = getattr(config.args, "decoding", None)
        return stand_in(config)

    def train_in_rounds(config, collect, *world):
        lengths["rounds-0"] = collect.decoding
        return stand_in(config)

    monkeypatch.setattr(runs, "train", train)
    monkeypatch.setattr(runs, "train_in_rounds", train_in_rounds)
    world.settings["evaluation"]["decoding"] = {"max_new_tokens": 5, "temperature": 0.7}
    world.settings["methods"] = {
        "ppo": {"algorithm": "ppo"},
        "hot": {"algorithm": "ppo", "args": {"decoding": {"temperature": 2.0}}},
        "long": {"algorithm": "ppo", "args": {"decoding": {"max_new_tokens": 9}}},
        "short": {"algorithm": "ppo", "decoding": {"max_new_tokens": 3}},
        "rounds": {"algorithm": "bc", "collect": {"rounds": 1, "decoding": {"support": 0.1}}},
        "bc": {"algorithm": "bc"},
    }
    run(world)
    assert lengths == {
        "ppo-0": DecodingConfig(max_new_tokens=5),
        "hot-0": DecodingConfig(max_new_tokens=5, temperature=2.0),
        "long-0": DecodingConfig(max_new_tokens=9),
        "short-0": DecodingConfig(max_new_tokens=3),
        "rounds-0": {"max_new_tokens": 5, "support": 0.1},
        "bc-0": None,
    }
    (ppo, *_) = [row for row in run_rows(world) if row["method"] == "ppo"]
    assert ppo["config"]["method"][0]["args"]["decoding"] == {"max_new_tokens": 5}
    del world.settings["evaluation"]["decoding"]
    world.settings["output"] += "_without"
    world.settings["methods"] = {name: world.settings["methods"][name] for name in ("ppo", "rounds")}
    run(world)
    assert lengths["ppo-0"] == DecodingConfig() and lengths["rounds-0"] == {"support": 0.1}


@pytest.mark.parametrize(
    ("key", "entry"),
    [
        ("methods.ppo.args.decoding", {"algorithm": "ppo", "args": {"decoding": {"max_new_tokens": 40}}}),
        ("methods.ppo.decoding", {"algorithm": "ppo", "decoding": {"max_new_tokens": 40}}),
        ("methods.ppo.collect.decoding", {"algorithm": "bc", "collect": {"decoding": {"max_new_tokens": 40}}}),
        ("evaluation.decoding", {"algorithm": "bc"}),
    ],
)
def test_a_reply_longer_than_the_window_is_refused_by_the_setting_that_says_so(world, key, entry):
    world.settings["methods"] = {"ppo": entry}
    world.settings["args"] |= {"max_length": 32}
    world.settings["evaluation"]["decoding"] = {"max_new_tokens": 40 if key == "evaluation.decoding" else 4}
    with pytest.raises(InputError, match=f"^{key}.max_new_tokens: found 40, expected at most .* of ppo, 32, which"):
        run(world)
    assert not world.trained


# Methods that fail


def failing(world, monkeypatch, **errors):
    """Trainings of these methods raise these errors."""
    stand_in = runs.train

    def train(config, players=None):
        name = Path(config.args.output_dir).name.rpartition("-")[0]
        if name in errors:
            raise errors[name]
        return stand_in(config)

    monkeypatch.setattr(runs, "train", train)


def test_a_method_that_fails_takes_those_with_it_that_need_it_and_no_other(world, monkeypatch):
    ilql = {"algorithm": "ilql", "from": "bc"}
    world.settings["methods"] = {
        "broken": {"algorithm": "ilql"},
        "from": ilql | {"from": "broken"},
        "after": {"algorithm": "bc", "from": "from"},
        "critic": {"algorithm": "awr", "value_model": "broken"},
        "again": {"run_of": "broken", "betas": []},
        "told": {"algorithm": "return_conditioned", "decoding": {"ask": "auto:broken"}},
        "planned": {"algorithm": "bc", "planner": {"scorer": "broken"}},
        "bc": {"algorithm": "bc"},
        "ilql": ilql,
    }
    with monkeypatch.context() as patch:
        failing(world, patch, broken=InputError("max_length: found 8, expected more for max_new_tokens (5)"))
        with pytest.raises(InputError) as raised:
            run(world)
    assert str(raised.value) == (
        "broken-0 failed: max_length: found 8, expected more for evaluation.decoding.max_new_tokens (5); "
        "from-0, after-0, critic-0, again-0 skipped because of broken; "
        "told-0, planned-0 rows skipped because of broken; "
        f"`offline-lmrl compare {world.out}` reports on the rest, and the same command tries the missing runs again"
    )
    assert {call[0] for call in world.trained} == {"told-0", "planned-0", "bc-0", "ilql-0"}
    measured = {(row["method"], row["decode"]) for row in run_rows(world)}
    assert measured == {(name, decode) for name in ("planned", "bc", "ilql") for decode in ("sampled", "greedy")}
    drawn = {line.split()[1] for line in (world.out / "table.md").read_text().splitlines()[2:]}
    assert drawn == {"behaviour", "optimum", "PPO", "planned", "bc", "ilql"}
    del world.settings["methods"]["planned"]  # whose plans need a real model
    world.trained.clear()
    run(world)
    assert {call[0] for call in world.trained} == {"broken-0", "from-0", "after-0", "critic-0"}
    assert {row["method"] for row in run_rows(world)} == {*world.settings["methods"], "planned"}


def test_a_method_that_fails_in_play_keeps_the_rows_it_has_and_its_run_serves_others(world, monkeypatch):
    right = Gambler.reply

    def reply(policy, *args):
        if policy.model.run == "bc-0" and policy.decoding.temperature == 0:
            raise RuntimeError("out of\nmemory")
        return right(policy, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Gambler, "reply", reply)
        with pytest.raises(Failed, match="^bc-0 failed: RuntimeError: out of memory; `offline-lmrl compare"):
            run(world)
    assert [(row["method"], row["decode"]) for row in run_rows(world)] == [
        ("bc", "sampled"),
        *[("ilql", decode) for decode in ("sampled", "greedy") for _ in ("offline", "returns")],
    ]
    run(world)
    assert [row["decode"] for row in run_rows(world) if row["method"] == "bc"] == ["sampled", "greedy"]


def test_results_that_cannot_be_saved_and_signals_stop_everything(world, monkeypatch):
    with monkeypatch.context() as patch:
        failing(world, patch, bc=KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run(world)
    assert not world.trained
    monkeypatch.setattr(storage.Storage, "add", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        run(world)
    assert len(Gambler.played) == 1


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("data: found x, expected y"), 2, "error: ilql-0 failed: data: found x, expected y; "),
        (RuntimeError("no\nroom"), 1, "error: ilql-0 failed: RuntimeError: no room; "),
    ],
)
def test_the_command_names_the_method_that_failed_behind_the_table(world, monkeypatch, capsys, error, code, line):
    failing(world, monkeypatch, ilql=error)
    world.path.write_text(json.dumps(world.settings))
    assert main(["compare", str(world.path)]) == code
    out, err = capsys.readouterr()
    assert "\nbc  " in out and err.splitlines()[-1].startswith(line)
    assert ("Traceback" in err) == (code == 1)


def test_a_table_of_which_every_method_failed_is_drawn(world, monkeypatch):
    monkeypatch.undo()  # the report is drawn
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(runs, "train", lambda *entry: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(Failed, match="^bc-0 failed: MemoryError; ilql-0 skipped because of bc; "):
        run(world)
    assert "optimum" in (world.out / "report" / "report.md").read_text()


FRAGILE = """
from pathlib import Path

from offline_lmrl.tasks.gamble import Gamble


class Fragile(Gamble):
    def __init__(self, fragile=""):
        self.fragile = fragile

    def step(self, text):
        if len(text) > 40 and Path("fragile").exists() or self.fragile and Path(self.fragile).exists():
            raise RuntimeError("the machine is full")
        return super().step(text)
"""


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_failures_of_training_and_of_play_are_the_same_in_one_process_and_in_several(
    world, tmp_path, monkeypatch, workers
):
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fragile_world.py").write_text(FRAGILE)
    (tmp_path / "fragile").touch()
    tiny = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 1, "n_positions": 128}
    world.settings |= {
        "environment": {"name": "fragile_world:Fragile"},
        "training_environment": {"fragile": "fragile"},
        "model": {"scratch": tiny, "vocab_size": 270},
        "args": {"max_steps": 1, "use_cpu": True, "max_length": 128, "save_strategy": "no", "disable_tqdm": True},
        "methods": {
            "bc": {"algorithm": "bc"},
            "ppo": {"algorithm": "ppo", "from": "bc", "args": {"episodes": 2}},
            "after": {"algorithm": "bc", "from": "ppo"},
            "long": {"run_of": "bc", "decoding": {"max_new_tokens": 100}},
        },
        "evaluation": {"episodes": 3, "decoding": {"max_new_tokens": 1}},
    }
    with pytest.raises(Failed) as raised:
        run(world, workers=workers)
    assert str(raised.value).startswith(
        "ppo-0, long-0 failed: RuntimeError: the machine is full; "
        "after-0 skipped because of ppo; `offline-lmrl compare"
    )
    assert [(row["method"], row["decode"]) for row in run_rows(world)] == [("bc", "sampled"), ("bc", "greedy")]
    assert "bc, sampled" in (world.out / "report" / "report.md").read_text()
    (tmp_path / "fragile").unlink()
    run(world, workers=workers)
    assert {row["method"] for row in run_rows(world)} == {"bc", "ppo", "after", "long"}


# Models made elsewhere, and train files


def made_elsewhere(folder, weights=b"weights"):
    """A folder as another library leaves it; the stand-in of a policy loads it by its name."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    (folder / "model.safetensors").write_bytes(weights)
    return str(folder)


DECLARED = {"regime": "labels only", "cost": {"training_tokens": 640, "reward_queries": 7}}


def test_a_checkpoint_is_measured_once_counts_for_every_seed_and_is_printed_as_declared(world, tmp_path):
    dpo = made_elsewhere(tmp_path / "dpo")
    world.settings["methods"] = {"bc": {"algorithm": "bc"}, "dpo": {"checkpoint": dpo, **DECLARED}}
    run(world, seeds=[0, 1])
    assert [call[0] for call in world.trained] == ["bc-0", "bc-1"]
    assert [played[0] for played in Gambler.played].count("dpo") == 2  # sampled and greedy
    rows = [row for row in run_rows(world) if row["method"] == "dpo"]
    assert [(row["seed"], row["decode"]) for row in rows] == [
        (seed, decode) for seed in (0, 1) for decode in ("sampled", "greedy")
    ]
    assert rows[0]["scores"] == rows[2]["scores"] and rows[0]["samples"] and not rows[2]["samples"]
    assert rows[0]["algorithm"] == "checkpoint" and rows[0]["cost"]["training_tokens"] == 640
    assert rows[0]["cost"]["reward_queries"] == 7 and "training_seconds" not in rows[0]["cost"]
    (line, _) = [line for line in (world.out / "table.md").read_text().splitlines() if line.startswith("| dpo")]
    assert "labels only (declared, and its cost)" in line and "0 1 (one model)" in line and "| 640 " in line
    assert line.split("|")[6].strip() == "0.00 [0.00, 0.00]"  # paired with bc, which plays the same stand-in
    first = len(Gambler.played)
    run(world, seeds=[0, 1])
    assert len(Gambler.played) == first
    Path(dpo, "model.safetensors").write_bytes(b"others")
    with pytest.raises(InputError, match="dpo: weights: found '.*, expected '.*; choose another `output`"):
        run(world, seeds=[0, 1])


@pytest.mark.parametrize("listed", [True, False])
def test_a_checkpoint_may_have_a_folder_for_every_seed(world, tmp_path, listed):
    folders = [made_elsewhere(tmp_path / f"kto-{seed}") for seed in (3, 1)]
    checkpoint = folders if listed else str(tmp_path / "kto-{seed}")
    world.settings["methods"]["kto"] = {"checkpoint": checkpoint, **DECLARED}
    run(world, seeds=[3, 1])
    assert [Path(row["run"]).name for row in run_rows(world) if row["method"] == "kto"] == ["kto-3"] * 2 + [
        "kto-1"
    ] * 2


def test_a_checkpoint_may_be_a_run_and_the_start_of_another(world, tmp_path):
    earlier = Path(made_elsewhere(tmp_path / "earlier"))
    (earlier / "complete.json").write_text(json.dumps({"training_tokens": 50}))
    (earlier / "metrics.jsonl").write_text("")
    (earlier / "config.yaml").write_text("algorithm: ilql\n")
    dpo = made_elsewhere(tmp_path / "dpo")
    world.settings["methods"] = {
        "earlier": {"checkpoint": str(earlier)},
        "dpo": {"checkpoint": dpo, **DECLARED},
        "tuned": {"algorithm": "bc", "from": "dpo"},
    }
    run(world)
    rows = {(row["method"], row["beta_chosen"]): row for row in run_rows(world)}
    assert rows["earlier", "offline"]["algorithm"] == "ilql" and rows["earlier", "offline"]["beta"] == 2.0
    assert rows["earlier", "offline"]["cost"]["training_tokens"] == 50 and "declared" not in rows["earlier", "offline"]
    assert world.trained == [("tuned-0", "bc", dpo, 0)]
    assert rows["tuned", None]["cost"]["training_tokens"] == 1000 + 640


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"checkpoint": "dpo", "args": {}}, "methods.x.args: found beside `checkpoint`, which sets it"),
        (
            {"checkpoint": "dpo", "algorithm": "bc"},
            "methods.x: found algorithm and checkpoint, expected exactly one of",
        ),
        ({"checkpoint": "dpo", "cost": {}}, "methods.x.regime: missing, expected a text for the data"),
        ({"checkpoint": "dpo", "regime": "labels only"}, "methods.x.cost: missing, expected the cost of training"),
        (
            {"checkpoint": "dpo", **DECLARED, "cost": {"tokens": 3}},
            "methods.x.cost.tokens: found a setting that does not",
        ),
        ({"checkpoint": ["a", "b"], **DECLARED}, "methods.x.checkpoint: found 2 folders, expected one for each of 1"),
        ({"checkpoint": "./no/where", **DECLARED}, "methods.x.checkpoint: ./no/where: found no such folder"),
        (
            {"checkpoint": "no/where", **DECLARED},
            "methods.x.checkpoint: no/where: found no such folder, and no model of",
        ),
        ({"algorithm": "bc", "cost": {}}, "methods.x.cost: found it without `checkpoint`, expected none"),
        (
            {"checkpoint": "dpo", **DECLARED, "planner": {"scorer": "x"}},
            "x.planner.scorer: found 'x', which has no value",
        ),
    ],
)
def test_a_wrong_checkpoint_surfaces_before_anything_is_trained(world, entry, message):
    world.settings["methods"]["x"] = entry
    with pytest.raises(InputError, match=message):
        run(world)
    assert not world.trained


def test_a_folder_without_a_model_and_a_reward_model_surface_before_anything_is_trained(world, tmp_path):
    empty = tmp_path / "runs"
    empty.mkdir()
    rewards = Path(made_elsewhere(tmp_path / "rewards"))
    metadata = {"version": 1, "reward": {"head": "last"}}
    (rewards / "config.json").write_text(json.dumps({"model_type": "gpt2", "offline_lmrl": metadata}))
    for folder, message in ((empty, "found a folder whose model cannot be read"), (rewards, "found a reward model")):
        world.settings["methods"]["x"] = {"checkpoint": str(folder), **DECLARED}
        with pytest.raises(InputError, match=f"methods.x.checkpoint: {folder}: {message}"):
            run(world)
    assert not world.trained and not world.out.exists()


def test_rows_of_a_method_that_started_from_another_checkpoint_are_refused(world, tmp_path):
    start = made_elsewhere(tmp_path / "start")
    world.settings["methods"] = {
        "start": {"checkpoint": start, **DECLARED, "evaluate": False},
        "tuned": {"algorithm": "bc", "from": "start"},
    }
    run(world)
    run(world)
    Path(start, "model.safetensors").write_bytes(b"others")
    with pytest.raises(InputError, match="tuned: other_weights.start: found '.*, expected '"):
        run(world)


def test_rows_of_another_model_on_the_hub_are_refused(world, monkeypatch):
    monkeypatch.setattr(resolve, "saved_model", lambda name: SimpleNamespace(metadata={}))
    world.settings["methods"]["x"] = {"checkpoint": "me/first", **DECLARED}
    run(world)
    world.settings["methods"]["x"]["checkpoint"] = "me/second"
    with pytest.raises(InputError, match="x: weights: found 'me/first', expected 'me/second'"):
        run(world)


def test_a_train_file_may_be_a_shipped_config(world):
    world.settings["methods"]["x"] = {"train": "maze/bc"}
    with pytest.raises(InputError, match="methods.x.train: maze/bc: data.train: found 'data/maze_full/train.jsonl'"):
        run(world)
    world.settings["methods"]["x"] = {"train": "maze/bcc"}
    with pytest.raises(InputError, match="methods.x.train: maze/bcc: found neither a file nor a shipped config"):
        run(world)
    world.settings["methods"]["x"] = {"train": "no.yaml"}
    with pytest.raises(InputError, match="methods.x.train: no.yaml: found No such file"):
        run(world)


def test_a_train_file_is_a_method_and_the_comparison_may_override_it(world, tmp_path, monkeypatch):
    seen, stand_in = [], runs.train

    def noted(config, players=None):
        seen.append((config.algorithm, config.model, config.data, config.args))
        return stand_in(config)

    monkeypatch.setattr(runs, "train", noted)
    file = tmp_path / "ilql.yaml"
    settings = {
        "algorithm": "ilql",
        "model": {"path": "gpt2"},
        "data": {"train": world.settings["data"]["train"]},
        "args": {"output_dir": "elsewhere", "seed": 4, "expectile": 0.6, "max_steps": 9, "use_cpu": True},
    }
    file.write_text(json.dumps(settings))
    world.settings["methods"]["ilql"] = {"train": str(file), "args": {"max_steps": 3}}
    run(world, args__learning_rate=0.5)
    algorithm, model, data, args = seen[1]
    assert (algorithm, model.path, model.scratch) == ("ilql", "gpt2", None) and data.train == settings["data"]["train"]
    assert (args.expectile, args.max_steps, args.seed) == (0.6, 3, 0) and args.learning_rate != 0.5
    assert args.output_dir == str(world.out / "runs" / "ilql-0")
    (row, *_) = [row for row in run_rows(world) if row["method"] == "ilql"]
    assert row["config"]["method"][0]["args"] == {"expectile": 0.6, "max_steps": 3, "use_cpu": True}
    for change, message in (
        (
            {"data": {"train": "other.jsonl"}},
            "ilql.yaml: data.train: found 'other.jsonl', expected '.* as in the comp",
        ),
        (
            {"environment": {"name": "maze"}},
            "ilql.yaml: environment: found {'name': 'maze'}, expected {'name': 'gamble'}",
        ),
        ({"algorithm": None}, "ilql.yaml: algorithm: found None, expected a name"),
        ({"methods": {}}, "methods.ilql.train: .*ilql.yaml: found 'methods', expected one of"),
        ({"args": 3}, "ilql.yaml: args: found 3, expected a mapping"),
    ):
        file.write_text(json.dumps(settings | change))
        with pytest.raises(InputError, match=message):
            run(world)
