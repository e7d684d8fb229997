"""What `evaluate` measures: a run by play or on held-out logs, and a scorer on held-out comparisons."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from offline_lmrl.cli.output import check_output, print_counts, print_report
from offline_lmrl.cli.play import OpenedRun
from offline_lmrl.decoding.config import PlannerConfig
from offline_lmrl.errors import InputError, shown
from offline_lmrl.logs.terminal import progress_bar, visible
from offline_lmrl.logs.trajectory import Trajectory
from offline_lmrl.settings import REQUIRED, setting


@dataclass(kw_only=True)
class PlayConfig(OpenedRun):
    """Play a run in an environment and print its score, with an interval."""

    environment: str = setting(
        REQUIRED,
        "maze, wordle, negotiation, corridor, gamble, count, count1, talk, talk_trap, hidden_rule, walk, pref_gold, "
        "support, prompts (a prompt set with a scorer), or your own as package.module:Class (its code runs).",
    )
    settings: dict[str, Any] = setting(
        dict, "Arguments of the environment, such as --settings.observed partial; the others keep their defaults."
    )
    episodes: int = setting(100, "Number of episodes to play.")
    seed: int = setting(0, "Seed of the first episode; the following ones count up from it.")
    repeats: int = setting(
        1, "Number of times that every episode is played, each with other random numbers in decoding."
    )
    cluster: str | None = setting(
        None,
        "Name of a label, such as start, that is equal in episodes that depend on each other; the interval treats "
        "these as one cluster. null = every episode seed is a cluster.",
    )
    batch_size: int = setting(1024, "Number of episodes played in parallel.")
    output: Path | None = setting(
        None,
        "File (.jsonl, .jsonl.gz, .parquet) for the played episodes, which can be trained on; or a folder of results "
        "for `report`, to which those of this run are added. With asks, a JSON Lines file for the results of each "
        "requested return. null = no output.",
    )
    asks: tuple[float | str, ...] | None = setting(
        None,
        "Returns to request one after the other, such as [0, p50, max]; prints the return that each achieves. With "
        "the extra `plots`, the curve is also drawn, beside the output or as asks.png in the run's folder. null = "
        "play once, with the run's own decoding.",
    )
    planner: PlannerConfig | None = setting(
        None,
        "Choose every reply by a search over imagined dialogues, with no requested return; null = no planner.",
    )
    demonstrations: str | None = setting(
        None,
        "Trajectories that serve as few-shot demonstrations of the same task, as many as in training, before each "
        "episode; null = none.",
    )

    def __post_init__(self) -> None:
        from offline_lmrl.tokens.conditioning import check_ask

        super().__post_init__()
        if self.episodes < 1:
            raise InputError(f"episodes: found {self.episodes}, expected at least 1")
        ask, planned = self.decoding.get("ask"), self.planner is not None
        if ask is not None and (self.asks is not None or planned):
            other = "--planner" if self.asks is None else "--asks"
            raise InputError(f"ask: found {shown(ask)} with {other}, expected only one of them")
        if planned and self.asks is not None:
            raise InputError("planner: found it with --asks, expected only one of them: plans request no return")
        if planned and self.demonstrations is not None:
            raise InputError("planner: found it with --demonstrations, expected only one of them")
        if self.asks == ():
            raise InputError("asks: found none, expected a list of returns to request")
        for ask in self.asks or ():
            check_ask(ask)
        if self.asks is not None and self.output is not None and self.output.suffix == ".png":
            raise InputError(
                f"output: found {self.output} with --asks, expected a JSON Lines file, such as "
                f"{self.output.with_suffix('.jsonl')}: the figure is saved beside it"
            )


def evaluate_play(config: PlayConfig) -> None:
    """Play a run in an environment, print the measures, and write the episodes if an output is named."""
    from offline_lmrl.evaluation.play import evaluate_policy
    from offline_lmrl.logs.io import read_trajectories, write_trajectories
    from offline_lmrl.tasks import make_environment, task_of
    from offline_lmrl.tokens.few_shot import few_shot_of_task

    shown_first = None if config.demonstrations is None else read_trajectories(config.demonstrations)
    environment = make_environment(config.environment, **config.settings)
    task_of_seed = None if shown_first is None else task_of(environment)
    if config.output is not None:
        check_output(config.output, config.demonstrations, is_file=config.asks is not None)
    policy = config.open()
    player = policy if config.planner is None else config.planner.planner(policy)
    single = None
    if config.output is not None and not config.output.suffix and config.asks is None:
        from offline_lmrl.comparison.config import EvaluationConfig
        from offline_lmrl.comparison.gather import SinglePlay

        where = {"name": config.environment, **config.settings}
        made = EvaluationConfig(config.episodes, config.seed, config.repeats, cluster=config.cluster)
        single = SinglePlay(config.output, config.run, player, where, made, _own_settings(config, shown_first))
        single.rows(None)  # before minutes of play
    seeds = range(config.seed, config.seed + config.episodes)
    play: dict[str, Any] = {
        "repeats": config.repeats,
        "cluster": config.cluster,
        "batch_size": config.batch_size,
    }
    if task_of_seed is not None:
        play["few_shot"] = few_shot_of_task(policy.spec, shown_first, task_of_seed)
    with progress_bar("playing", len(config.asks or (None,)) * config.episodes * config.repeats) as play["progress"]:
        if config.asks is None:
            result = evaluate_policy(player, environment, seeds, **play)
        else:
            from offline_lmrl.evaluation.asks import ask_curve

            points = ask_curve(policy, environment, config.asks, seeds, **play)
    if config.asks is not None:
        _report_asks(points, config)
        return
    if single is not None:
        single.save(result)
    elif config.output is not None:
        write_trajectories(config.output, result.trajectories)
    summary = result.summary()
    labels = summary.pop("labels")
    print(f"score: {result.score()}")
    print_report({**summary, **labels})


def _own_settings(config: PlayConfig, demonstrations: Sequence[Trajectory] | None) -> dict[str, Any]:
    """Return what changes the play besides decoding and episodes, and is given: its row of results has the same."""
    from offline_lmrl.logs.io import data_hash

    found = {"task": config.task, "planner": config.planner and asdict(config.planner)}
    found["demonstrations"] = demonstrations and data_hash(demonstrations)
    return {name: value for name, value in found.items() if value}


def _report_asks(points: Sequence[Any], config: PlayConfig) -> None:
    """Print, write and draw the points of the curve of requested and achieved returns (`AskPoint`)."""
    from offline_lmrl.evaluation.asks import ask_rows, ask_table, draw_asks
    from offline_lmrl.logs.io import write_text

    print(ask_table(points))
    picture = Path(config.run) / "asks.png"
    if config.output is not None:
        write_text(config.output, "".join(json.dumps(row) + "\n" for row in ask_rows(points)))
        picture = config.output.with_suffix(".png")
    if find_spec("matplotlib") is not None and picture.parent.is_dir():
        draw_asks(points, picture)
        print(f"drawn: {picture}")


@dataclass(kw_only=True)
class LogsConfig(OpenedRun):
    """Measure a run on held-out logs: likelihood, Q against returns, and what each β or requested return does."""

    data: str = setting(REQUIRED, "Held-out trajectories.")
    split: str | None = setting(None, "Name of the split of the data to read; null = the only one.")
    reward: str | None = setting(
        None, "Column that holds the score of a row; null = `reward`, or `label` in rows with a prompt."
    )
    betas: tuple[float, ...] = setting(
        (1.0, 2.0, 4.0, 8.0, 16.0, 32.0),
        "Weights of value guidance to try; 0, none, is always among them. One is chosen: the smallest within 5% of "
        "the largest realised advantage less half its standard error (what the logs earned more where it would have "
        "acted alike), among those of whose replies at most 5 in 100 more are repeated, unfinished or empty than with "
        "β 0; β 0 if none is above 0.",
    )
    asks: tuple[float | str, ...] | None = setting(
        None,
        "Returns to request, such as [0, p50, max], each with a row in the same table; null = p50, p75, p90 and max "
        "for a model that was trained with returns.",
    )
    prompts: int = setting(
        50,
        "Number of contexts of these logs to which every β and requested return replies, with equal seeds; 0 = print "
        "only what the logged tokens show.",
    )
    fqe: int = setting(
        0,
        "Optimizer steps of each of the three fits of fitted Q evaluation, which estimates the run's score from the "
        "logs; 0 = no estimate.",
    )
    show: int | None = setting(
        None, "Number, from 1, of a row that is printed token by token in place of the measures; null = the measures."
    )
    demonstrations: str | None = setting(
        None,
        "Trajectories that serve as few-shot demonstrations of the same task, as many as in training, before each "
        "log; null = those of training.",
    )
    output: Path | None = setting(
        None,
        "JSON file (.json) for all measures, beside which a page with the same name is written; or a folder for "
        "choices.json and choices.html. The page draws expected gain against text quality (extra `plots`) and shows "
        "replies side by side. null = no output.",
    )

    def __post_init__(self) -> None:
        from offline_lmrl.tokens.conditioning import check_ask

        super().__post_init__()
        if self.prompts < 0:
            raise InputError(f"prompts: found {self.prompts}, expected 0 (no replies) or more")
        for ask in self.asks or ():
            check_ask(ask)
        if self.output is not None and self.output.suffix not in ("", ".json"):
            raise InputError(f"output: found {self.output}, expected a folder or a file that ends in .json")
        if self.output is not None and self.show is not None:
            raise InputError("output: found it with --show, expected only one of them")


def evaluate_logs(config: LogsConfig) -> None:
    """Measure a run on held-out logs and print the measures, or one log token by token."""
    from offline_lmrl.evaluation.offline import show
    from offline_lmrl.evaluation.offline_report import evaluate_offline
    from offline_lmrl.logs.io import holds_comparisons, read_trajectories

    if holds_comparisons(config.data):
        raise InputError(
            f"data: found comparisons in {config.data}, expected trajectories; `evaluate scorer` takes comparisons"
        )
    if config.output is not None:
        check_output(config.output, config.data, config.demonstrations, is_file=bool(config.output.suffix))
    counts: Counter[str] = Counter()
    trajectories = read_trajectories(config.data, split=config.split, counts=counts, reward=config.reward)
    print_counts(config.data, counts)
    shown_first = None if config.demonstrations is None else read_trajectories(config.demonstrations)
    if config.show is not None and not 1 <= config.show <= len(trajectories):
        raise InputError(f"show: found {config.show}, expected 1 to {len(trajectories)}")
    policy = config.open()
    if config.show is not None:
        print(visible(show(policy, trajectories[config.show - 1], shown_first)))
        return
    given = {name: getattr(config, name) for name in ("betas", "asks", "prompts")}
    with progress_bar("replying", config.prompts) as progress:
        report = evaluate_offline(policy, trajectories, demonstrations=shown_first, progress=progress, **given)
    print(visible(str(report)))
    if config.output is not None:
        from offline_lmrl.comparison.choice_page import write_choices

        origin = {"run": config.run, "data": config.data, "decoding": policy.decoding.to_dict()}
        print(f"written: {write_choices(report, config.output, origin)}")

    from offline_lmrl.evaluation.off_policy import FitConfig, fitted_q_evaluation, importance_sampling

    print("estimates of its score from these logs alone (they cannot replace play):")
    try:
        print(f"  weighted importance sampling: {importance_sampling(policy, trajectories)}")
    except InputError as error:
        print(visible(f"  weighted importance sampling: not computed, {error}"))
    if config.fqe != 0:
        with progress_bar("fitting", config.fqe) as progress:
            found = fitted_q_evaluation(policy, trajectories, FitConfig(config.fqe), progress)
        print(f"  fitted Q evaluation: {found}")


@dataclass(kw_only=True)
class ScorerConfig:
    """Measure how often a scorer agrees with held-out comparisons, and how well its probabilities are calibrated."""

    scorer: str = setting(
        REQUIRED,
        "Folder or hub name of a reward model, package.module:function (its code runs), or a mapping such as "
        '"{kind: ensemble, scorers: [runs/a, runs/b], k: 1}", also as a YAML file.',
    )
    data: str = setting(REQUIRED, "Held-out comparisons.")
    split: str | None = setting(None, "Name of the split of the data to read; null = the only one.")
    output: Path | None = setting(None, "JSON file for the printed report; null = no file.")


def evaluate_scorer(config: ScorerConfig) -> None:
    """Measure a scorer on held-out comparisons, print the report, and write it if an output is named."""
    from data_prep.source import write_json
    from offline_lmrl.decoding.scorers import load_scorer
    from offline_lmrl.evaluation import preferences
    from offline_lmrl.logs.io import read_comparisons

    if config.output is not None:
        check_output(config.output, config.data, is_file=True)
    counts: Counter[str] = Counter()
    comparisons = read_comparisons(config.data, split=config.split, counts=counts)
    print_counts(config.data, counts)
    found = preferences.evaluate_scorer(load_scorer(config.scorer), comparisons)
    print_report(found)
    if config.output is not None:
        write_json(config.output, found)
