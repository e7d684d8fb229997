"""Commands that use a run (the folder with a trained model that `train` wrote): evaluate, generate, export."""

import json
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offline_lmrl.cli.data import check_output, check_output_file, print_report
from offline_lmrl.cli.parser import Parser
from offline_lmrl.errors import InputError
from offline_lmrl.logs.messages import DIALOGUES, read_request
from offline_lmrl.logs.record import Record
from offline_lmrl.logs.terminal import visible
from offline_lmrl.logs.trajectory import (
    Trajectory,
    Turn,
    as_context,
    parse_json,
    shown,
    to_record,
)

if TYPE_CHECKING:
    from offline_lmrl.decoding.planner import PlannerConfig
    from offline_lmrl.decoding.policy import LanguagePolicy
    from offline_lmrl.evaluation.play import EvaluationResult
    from offline_lmrl.logs.protocols import Policy, Reply

PROMPTS_AT_ONCE = 256  # prompts per call of the sampler; the progress bar moves once for each call


def evaluate(argv: Sequence[str]) -> None:
    """Run `evaluate RUN (--environment NAME | --data HELDOUT)`, which measures a run by play or on held-out data."""
    _call("evaluate RUN (--environment NAME | --data HELDOUT) [--key value ...]", _evaluate, argv)


def generate(argv: Sequence[str]) -> None:
    """Run `generate RUN [--prompts FILE] [--chat]`, which replies to prompts or talks turn by turn."""
    flags = {"chat": "talk with the run turn by turn on stdin and stdout, until the input ends"}
    _call("generate RUN [--prompts FILE] [--output FILE] [--chat] [--key value ...]", _generate, argv, flags)


def export(argv: Sequence[str]) -> None:
    """Run `export RUN --output DIR`, which writes a checkpoint that other inference engines can serve."""
    _call("export RUN --output DIR [--key value ...]", _export, argv, without=("ask", "max_new_tokens", "stop"))


def _call(
    usage: str,
    function: Callable[..., None],
    argv: Sequence[str],
    flags: Mapping[str, str] | None = None,
    without: Collection[str] = (),
) -> None:
    """Call a command's function with arguments from the command line.

    The fields of DecodingConfig are accepted as further options; those that are given are passed as `decoding`.

    Args:
      usage: the command line without the program's name, for help and errors.
      function: the command's function; its parameters except `decoding` become options.
      argv: the command line after the command.
      flags: parameters that take no value on the command line, name -> help text; None = none.
      without: names of fields of DecodingConfig that the command does not accept.
    Raises: InputError that names the setting which cannot be used.
    """
    from offline_lmrl.decoding.sampler import DecodingConfig

    parser = Parser(usage)
    for name, text in (flags or {}).items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    parser.add_function_arguments(function, as_positional=True, skip={"decoding", *(flags or {})})
    parser.add_overrides(DecodingConfig, "Decoding (default: the value saved with the run)", without)
    values = parser.parse(argv).as_dict()
    decoding = {field.name: values.pop(field.name) for field in fields(DecodingConfig) if field.name in values}
    DecodingConfig(**decoding)  # reports a number out of range before the model is loaded
    function(**values, decoding=decoding)


def _evaluate(
    run: str,
    environment: str | None = None,
    settings: dict[str, Any] | None = None,
    episodes: int = 100,
    seed: int = 0,
    repeats: int = 1,
    cluster: str | None = None,
    batch_size: int = 1024,
    output: Path | None = None,
    data: str | None = None,
    reward: str | None = None,
    betas: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0),
    kl_budget: float = 0.3,
    fqe: int = 0,
    show: int | None = None,
    asks: tuple[float | str, ...] | None = None,
    planner: "PlannerConfig | None" = None,
    demonstrations: str | None = None,
    task: str = "",
    device: str | None = None,
    split: str | None = None,
    *,
    decoding: Mapping[str, Any],
) -> None:
    """Measure a run in an environment, on held-out logs, or both; a reward model on held-out comparisons.

    Args:
      run: a run directory, or a folder or hub name of a causal LM; for comparisons, a scorer as in `relabel`.
      environment: maze, wordle, negotiation, corridor, gamble, count, count1, talk, talk_trap, hidden_rule, walk,
        pref_gold, prompts, or your own as package.module:Class (its code runs); null = no play.
      settings: arguments of the environment, such as --settings.observed partial; null = its defaults.
      episodes: number of episodes to play.
      seed: seed of the first episode; the following ones count up from it.
      repeats: number of times that every episode is played, each with other random numbers in decoding.
      cluster: name of a label, such as start, that is equal in episodes that depend on each other; the interval treats
        these as one cluster. null = every episode seed is a cluster.
      batch_size: number of episodes played in parallel.
      output: file for the played episodes, which can be trained on. With asks, a JSON Lines file for the results of
        each requested return. For comparisons, a JSON file for the printed report. null = no file.
      data: held-out trajectories, for the measures that need only logs; or held-out comparisons, to measure how often
        the scorer agrees with them. null = play only.
      reward: column of --data that holds the score of a row; null = `reward`, or `label` in rows with a prompt.
      betas: weights of value guidance to try on the logs.
      kl_budget: limit on the KL from the unguided policy, in nats per token; the largest of betas within it is
        recommended.
      fqe: optimizer steps of each of the three fits of fitted Q evaluation, which estimates the run's score from the
        logs; 0 = no estimate.
      show: number, from 1, of a row of --data that is printed token by token in place of the measures on logs; null =
        the measures.
      asks: returns to request one after the other, such as [0, p50, max]; prints the return that each achieves. With
        the extra `plots`, the curve is also drawn, beside the output or as asks.png in the run's folder. null = play
        once, with the run's own decoding.
      planner: choose every reply by a search over imagined dialogues, with no requested return; --planner.help lists
        its settings. null = no planner.
      demonstrations: trajectories that serve as few-shot demonstrations of the same task, as many as in training,
        before each played episode and each log. null = in play none; for logs those of training.
      task: name of the task that is played, for a run that was trained with returns per task; "" for other runs.
      device: device of the model, such as cpu or cuda:0; null = the first accelerator, else the CPU.
      split: name of the split of --data to read; null = the only one.
    """
    given = dict(locals())
    from offline_lmrl.decoding.policy import LanguagePolicy
    from offline_lmrl.evaluation import offline
    from offline_lmrl.evaluation.play import evaluate_policy
    from offline_lmrl.logs.io import holds_comparisons, read_trajectories, write_trajectories
    from offline_lmrl.tasks import make_environment, task_of
    from offline_lmrl.tokens.few_shot import few_shot_of_task

    _check_measures(**given)
    if data is not None and holds_comparisons(data):
        _evaluate_scorer(**given)
        return
    counts: Counter[str] = Counter()
    trajectories = [] if data is None else read_trajectories(data, split=split, counts=counts, reward=reward)
    _say(data, counts)
    shown_first = None if demonstrations is None else read_trajectories(demonstrations)
    if show is not None and not 1 <= show <= len(trajectories):
        raise InputError(f"show: found {show}, expected 1 to {len(trajectories)}")
    made = None if environment is None else make_environment(environment, **(settings or {}))
    task_of_seed = None if made is None or shown_first is None else task_of(made)
    if output is not None:
        (check_output_file if asks else check_output)(output, data, demonstrations)
    policy = LanguagePolicy.load(run, device=device, task=task, **decoding)
    seeds, play = range(seed, seed + episodes), {"repeats": repeats, "cluster": cluster, "batch_size": batch_size}
    if task_of_seed is not None:
        play["few_shot"] = few_shot_of_task(policy.spec, shown_first, task_of_seed)
    if asks:
        _print_asks(policy, made, asks, seeds, Path(run), output, play)
    elif made is not None:
        with _progress("playing", episodes) as progress:
            player = policy if planner is None else planner.planner(policy)
            result = evaluate_policy(player, made, seeds, progress=progress, **play)
        if output is not None:
            write_trajectories(output, result.trajectories)
        _print_result(result)
    if show is not None:
        print(visible(offline.show(policy, trajectories[show - 1], shown_first)))
    elif trajectories:
        logs = {"betas": betas, "kl_budget": kl_budget, "demonstrations": shown_first}
        print(visible(str(offline.evaluate_offline(policy, trajectories, **logs))))
        _print_off_policy(policy, trajectories, fqe)


def _say(data: str | None, counts: Mapping[str, int]) -> None:
    """Print to stderr how many rows were repaired and dropped while reading, by reason.

    Args:
      data: path of the data, the start of each line.
      counts: reason -> number of rows.
    """
    for reason, n in counts.items():
        print(f"{data}: {reason}: {n}", file=sys.stderr)


def _check_measures(
    environment: str | None,
    data: str | None,
    reward: str | None,
    show: int | None,
    asks: tuple[float | str, ...] | None,
    planner: "PlannerConfig | None",
    demonstrations: str | None,
    output: Path | None,
    episodes: int,
    decoding: Mapping[str, Any],
    **_: Any,
) -> None:
    """Check that the settings of `_evaluate` can be combined.

    Args: as in `_evaluate`; `_` receives the others, which are not checked.
    Raises: InputError if they cannot be combined.
    """
    from offline_lmrl.tokens.conditioning import check_ask

    if environment is None and data is None:
        raise InputError("environment, data: found neither, expected at least one of them")
    if reward is not None and data is None:
        raise InputError(f"reward: found {shown(reward)} without --data, expected the data that have this column")
    if show is not None and data is None:
        raise InputError("show: found the number of a row, but no --data, expected both")
    if asks is not None and (environment is None or not asks):
        found = "none" if not asks else "some without --environment"
        raise InputError(f"asks: found {found}, expected a list of returns to request, and an environment to play")
    if decoding.get("ask") is not None and (asks is not None or planner is not None):
        other = "--planner" if asks is None else "--asks"
        raise InputError(f"ask: found {shown(decoding['ask'])} with {other}, expected only one of them")
    if planner is not None and (environment is None or asks is not None):
        found = "--asks" if asks is not None else "no --environment"
        raise InputError(f"planner: found it with {found}, expected --environment alone: plans request no return")
    if planner is not None and demonstrations is not None:
        raise InputError("planner: found it with --demonstrations, expected only one of them")
    for ask in asks or ():
        check_ask(ask)
    if asks is not None and output is not None and output.suffix == ".png":
        raise InputError(
            f"output: found {output} with --asks, expected a JSON Lines file, such as "
            f"{output.with_suffix('.jsonl')}: the figure is saved beside it"
        )
    if episodes < 1:
        raise InputError(f"episodes: found {episodes}, expected at least 1")


def _evaluate_scorer(
    run: str, data: str, split: str | None, output: Path | None, decoding: Mapping[str, Any], **rest: Any
) -> None:
    from data_prep.source import write_json
    from offline_lmrl.decoding.scorers import load_scorer
    from offline_lmrl.evaluation.preferences import evaluate_scorer
    from offline_lmrl.logs.io import read_comparisons

    defaults = signature(_evaluate).parameters
    for name, value in {**rest, **decoding}.items():
        if name in decoding or value != defaults[name].default:
            raise InputError(f"{name}: found {shown(value)}, expected none where a scorer is measured on comparisons")
    if output is not None:
        check_output_file(output, data)
    counts: Counter[str] = Counter()
    comparisons = read_comparisons(data, split=split, counts=counts)
    _say(data, counts)
    found = evaluate_scorer(load_scorer(run), comparisons)
    print_report(found)
    if output is not None:
        write_json(output, found)


def _print_asks(
    policy: "LanguagePolicy",
    environment: Any,
    asks: Sequence[float | str],
    seeds: Sequence[int],
    run: Path,
    output: Path | None,
    play: Mapping[str, Any],
) -> None:
    from importlib.util import find_spec

    from offline_lmrl.evaluation.asks import ask_curve, ask_rows, ask_table, draw_asks
    from offline_lmrl.logs.io import atomic_output

    with _progress("playing", len(asks) * len(seeds) * play["repeats"]) as progress:
        points = ask_curve(policy, environment, asks, seeds, progress=progress, **play)
    print(ask_table(points))
    if output is not None:
        with atomic_output(output) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in ask_rows(points)), encoding="utf-8")
    picture = run / "asks.png" if output is None else output.with_suffix(".png")
    if find_spec("matplotlib") is not None and picture.parent.is_dir():
        draw_asks(points, picture)
        print(f"drawn: {picture}")


def _print_off_policy(policy: "LanguagePolicy", trajectories: Sequence[Trajectory], fqe: int) -> None:
    from offline_lmrl.evaluation.off_policy import fitted_q_evaluation, importance_sampling

    print("estimates of its score from these logs alone (they cannot replace play):")
    try:
        print(f"  weighted importance sampling: {importance_sampling(policy, trajectories)}")
    except InputError as error:
        print(visible(f"  weighted importance sampling: not computed, {error}"))
    if fqe != 0:
        with _progress("fitting", fqe) as progress:
            found = fitted_q_evaluation(policy, trajectories, fqe, progress=progress)
        print(f"  fitted Q evaluation: {found}")


def _print_result(result: "EvaluationResult") -> None:
    summary = result.summary()
    labels = summary.pop("labels")
    print(f"score: {result.score()}")
    for name, value in {**summary, **labels}.items():
        print(visible(f"{name}: {value:.4g}"))


def _generate(
    run: str,
    prompts: str = "-",
    output: str = "-",
    n: int = 1,
    seed: int = 0,
    scorer: str | None = None,
    best_of: int = 1,
    threshold: float | None = None,
    coverage: float | None = None,
    held_out: str | None = None,
    abstention: str | None = None,
    contexts: str | None = None,
    task: str = "",
    device: str | None = None,
    chat: bool = False,
    *,
    decoding: Mapping[str, Any],
) -> None:
    """Reply to prompts, or talk turn by turn (--chat).

    Args:
      run: a run directory, or a folder or hub name of a causal LM.
      prompts: file, or - for stdin: one prompt per line, plain text or JSON with `prompt` or `messages`.
      output: file, or - for stdout: JSON Lines with the messages and the reply's token ids and log-probabilities. If a
        scorer chose the reply, its labels hold the score, the number of replies compared, and whether it abstained.
      n: number of replies to each prompt.
      seed: seed of the first prompt; the following ones count up from it.
      scorer: scorer that chooses the best of several replies, as in `relabel`; null = no choice.
      best_of: number of replies from which the scorer chooses one.
      threshold: lowest score at which a reply is given; below it, the run abstains. null = always reply.
      coverage: share of the prompts in held_out that are to be answered, 0 to 1; sets the threshold. null = use
        `threshold`.
      held_out: file of prompts for coverage, in the form of `prompts`; null = none.
      abstention: text given in place of a reply whose score is below the threshold; null = "I don't know.". Such rows
        are not trained on: reading drops and counts them.
      contexts: package.module:function (its code runs) that maps the turns so far to several dialogues (lists of
        turns), such as one per document to answer from. Replies are sampled from these in turn; the scorer scores them
        after the turns so far. null = sample from the turns so far.
      task: name of the task of the prompts, for a run that was trained with returns per task; "" for other runs.
      device: device of the model, such as cpu or cuda:0; null = the first accelerator, else the CPU.
    """
    from offline_lmrl.decoding.policy import LanguagePolicy
    from offline_lmrl.decoding.reranking import BestOfN, calibrated_threshold
    from offline_lmrl.decoding.scorers import load_scorer
    from offline_lmrl.logs.io import atomic_output
    from offline_lmrl.logs.protocols import import_object

    if best_of < 1:
        raise InputError(f"best_of: found {best_of}, expected at least 1")
    if scorer is None and (best_of > 1 or any(x is not None for x in (threshold, coverage, contexts))):
        raise InputError("scorer: missing, expected one: best_of, threshold, coverage and contexts need it")
    if (coverage is None) != (held_out is None) or (coverage is not None and threshold is not None):
        raise InputError(
            f"coverage: found {coverage} with held_out {held_out} and threshold {threshold}, "
            "expected coverage and held_out together, or a threshold"
        )
    if abstention is not None and threshold is None and coverage is None:
        raise InputError(f"abstention: found {shown(abstention)} alone, expected --threshold or --coverage too")
    if output != "-":
        check_output_file(Path(output), prompts, held_out)
    histories = [] if chat else read_prompts(prompts)
    player = policy = LanguagePolicy.load(run, device=device, task=task, **decoding)
    if scorer is not None:
        reads = None if contexts is None else import_object(contexts, "contexts")
        instead = {} if abstention is None else {"abstention": abstention}
        player = BestOfN(policy, load_scorer(scorer), best_of, threshold, contexts=reads, **instead)
        if coverage is not None:
            player.threshold = calibrated_threshold(player, read_prompts(held_out), coverage)
            print(f"threshold: {player.threshold:.6g}", file=sys.stderr)
    if chat:
        _chat(player, seed)
        return
    replies = list(_replies(player, policy.renderer.fingerprint, histories, n, seed))
    rows = [json.dumps(to_record(row), ensure_ascii=False) + "\n" for row in replies]
    if output == "-":
        sys.stdout.writelines(map(visible, rows))  # escapes terminal control characters; the JSON keeps its meaning
    else:
        with atomic_output(output) as temporary:
            temporary.write_text("".join(rows), encoding="utf-8")
    if threshold is not None or coverage is not None:
        answered = sum(not row.labels["abstained"] for row in replies)
        print(f"answered {answered} of {len(replies)}", file=sys.stderr)


def _export(run: str, *, output: Path, device: str | None = None, decoding: Mapping[str, Any]) -> None:
    """Write a run as a plain checkpoint of its base model, which inference engines can serve, with a README.md.

    A checkpoint that would play differently from the run is not written. Value guidance can be added exactly to the
    checkpoint's weights with q_reduce mean or first and without support, candidates, clip, top_k, top_p and min_p; a
    policy without guidance can always be exported.

    Args:
      run: a run directory.
      output: a folder that does not exist yet.
      device: device of the model, such as cpu or cuda:0; null = the first accelerator, else the CPU.
    """
    from offline_lmrl.export.plain import export_run
    from offline_lmrl.logs.files import sweep

    if output.parent.is_dir():
        sweep(output.parent, output.name)  # first, so that leftovers of a killed export go even if this one is refused
    print(export_run(run, output, device=device, **decoding))
    print(output)


def read_prompts(source: str) -> list[list[Turn]]:
    """Read the dialogues to reply to, one per line that is not blank.

    A line is a user turn as plain text, or a JSON object with the field `prompt` (text, or a list of messages) or
    `messages` (or another name that logs use for it, such as `conversations`).

    Args:
      source: path of the file; "-" = stdin.
    Returns: the turns of each dialogue.
    Raises: InputError "source:line: field: ..." if a line cannot be read or there is no prompt.
    """
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{source}: text: found bytes that are not UTF-8, expected UTF-8") from error
    name = "stdin" if source == "-" else source
    lines = enumerate(text.split("\n"), 1)
    histories = [_prompt(line.strip(), f"{name}:{number}") for number, line in lines if line.strip()]
    if not histories:
        raise InputError(f"{name}: found no prompt, expected one per line")
    return histories


def _prompt(line: str, where: str) -> list[Turn]:
    if not line.startswith("{"):
        return [Turn("user", line)]
    try:
        row = parse_json(line)
    except ValueError as error:
        raise InputError(f"{where}: JSON: found a line that does not parse: {error}") from error
    field = next((name for name in DIALOGUES if name in row), "prompt")
    return read_request(Record(row, where, Counter()), field)


def _replies(
    policy: "Policy", tokenizer: str, histories: Sequence[Sequence[Turn]], n: int, seed: int
) -> Iterator[Trajectory]:
    """Let the policy give `n` replies to each history and yield a trajectory for each.

    In the trajectory, only the reply is trainable; if the policy abstained, no turn is trainable.

    Args:
      policy: gives the replies.
      tokenizer: fingerprint of the policy's tokenizer and chat format, stored as the label "tokenizer".
      histories: the turns before each reply.
      n: number of replies to each history.
      seed: sampling seed of the first history; the following ones count up from it.
    """
    from offline_lmrl.decoding.policy import generate_texts

    with _progress("generating", len(histories)) as progress:
        for start in range(0, len(histories), PROMPTS_AT_ONCE):
            part = histories[start : start + PROMPTS_AT_ONCE]
            seeds = range(seed + start, seed + start + len(part))
            for history, own_seed, replies in zip(part, seeds, generate_texts(policy, part, n, seeds), strict=True):
                yield from (_answered(tokenizer, history, reply, own_seed) for reply in replies)
            progress(start + len(part), len(histories))


def _answered(tokenizer: str, history: Sequence[Turn], reply: "Reply", seed: int) -> Trajectory:
    trainable = False if reply.labels.get("abstained") else None
    turn = Turn("assistant", reply.text, trainable, token_ids=reply.token_ids, behaviour_log_prob=reply.log_prob)
    labels = {"seed": seed, "tokenizer": tokenizer, "policy_log_prob": [list(reply.policy_log_prob or ())]}
    return Trajectory((*as_context(history), turn), terminated=reply.closed, labels=labels | reply.labels)


def _chat(policy: "Policy", seed: int) -> None:
    session, turns = policy.start([seed]), []
    while (text := _ask()) is not None:
        turns.append(Turn("user", text))
        (reply,) = session.reply([0], [turns])
        turns.append(Turn("assistant", reply.text, token_ids=reply.token_ids))
        print(visible(reply.text), flush=True)


def _ask() -> str | None:
    """Read the next line of stdin that is not blank; None at the end of the input."""
    try:
        while not (text := input("> " if sys.stdin.isatty() else "").strip()):
            continue
    except EOFError:
        return None
    return text


@contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[[int, int], None]]:
    """Context manager: show a progress bar on stderr, if it is a terminal, and remove the bar at the end.

    Args:
      title: text before the bar.
      total: number of items in all.
    Yields: a function that updates the bar, called with the numbers of items (done, in all).
    """
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done, in_all: bar.update(task, completed=done, total=in_all)
