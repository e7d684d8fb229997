"""The held-out prompts that an export is played on beside its run, as dialogues and as token ids."""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.errors import InputError
from offline_lmrl.logs.comparison import Comparison
from offline_lmrl.logs.io import holds_comparisons, read_comparisons, read_trajectories
from offline_lmrl.logs.prompts import read_prompts
from offline_lmrl.logs.trajectory import Trajectory, Turn
from offline_lmrl.logs.yaml_text import read_yaml
from offline_lmrl.tokens.conditioning import STATE_ASKS
from offline_lmrl.tokens.windows import Ids, policy_window

REMEDY = "give --prompts FILE, with one prompt per line"


@dataclass(frozen=True)
class HeldOut:
    """What an export is played on beside its run.

    prompts: a file of prompts, as for `generate`, or dialogues (lists of turns); None = contexts of the validation
      data that the run's config names, else of its training data.
    scorer: specification of a scorer, as for `relabel`, that rewards the replies; None = no rewards.
    n: largest number of prompts; more are thinned out at random.
    """

    prompts: str | Path | Sequence[Sequence[Turn]] | None = None
    scorer: Any = None
    n: int = 50


class Prompts(NamedTuple):
    """Prompts and where they are from.

    source: a file or data set, in words.
    histories: the turns before each reply. No turn has a reward, so that a requested return is the same in each.
    """

    source: str
    histories: list[list[Turn]]


class PromptIds(NamedTuple):
    """A prompt in the run's token ids.

    asked: with the requested return before each agent turn, if the run is conditioned on returns.
    null: under the null condition (no requested return); the same ids if the run is not conditioned on returns.
    """

    asked: list[int]
    null: list[int]


def find_prompts(run: str | Path, held_out: HeldOut) -> Prompts:
    """Read the prompts of an export.

    Raises: InputError that names --prompts if there are none.
    """
    if held_out.prompts is None:
        source, contexts = _of_config(Path(run))
    elif isinstance(held_out.prompts, str | Path):
        source = str(held_out.prompts)
        if source != "-" and not Path(source).is_file():
            raise InputError(f"prompts: found no file {source}, expected one; {REMEDY}")
        contexts = read_prompts(source)
    else:
        source, contexts = "prompts of the caller", held_out.prompts
    chosen = _chosen(contexts, held_out.n)
    if not chosen:
        raise InputError(f"prompts: found none in {source}; {REMEDY}")
    return Prompts(source, chosen)


def _of_config(run: Path) -> tuple[str, Iterable[Sequence[Turn]]]:
    """Return the contexts of a run's validation data, or of its training data, and the name of these data."""
    source, rows = data_of_run(run, ("validation", "train"))
    return source, map(before_reply, rows)


def data_of_run(run: Path, names: Sequence[str]) -> tuple[str, Sequence[Trajectory | Comparison]]:
    """Read data that a run's config names.

    Args:
      run: the run directory.
      names: "validation" and "train", in the order of preference.
    Returns: the name of the first of these data that the config has, in words, and its rows.
    Raises: InputError if there are none, or they cannot be read.
    """
    config = read_yaml(run / "config.yaml", "the settings of a run") if (run / "config.yaml").is_file() else {}
    data = config.get("data")
    data = data if isinstance(data, Mapping) else {}
    name = next((name for name in names if data.get(name)), names[-1])
    source = data.get(name)
    if not isinstance(source, str):
        raise InputError(f"prompts: missing, as the config of {run} names no data to take prompts from; {REMEDY}")
    try:
        compares = holds_comparisons(source)
        rows = read_comparisons(source) if compares else read_trajectories(source, reward=data.get("reward"))
    except InputError as error:
        raise InputError(f"prompts: the run's data.{name} cannot be read ({error}); {REMEDY}") from error
    return f"the run's {'validation' if name == 'validation' else 'training'} data {source}", rows


def before_reply(row: Trajectory | Comparison) -> Sequence[Turn]:
    """Return the turns before the last agent turn of a trajectory, or the context of a comparison."""
    if isinstance(row, Comparison):
        return row.context
    return row.turns[: max((i for i, turn in enumerate(row.turns) if turn.is_trainable), default=len(row.turns))]


def _chosen(contexts: Iterable[Sequence[Turn]], n: int) -> list[list[Turn]]:
    """Return at most n different contexts, drawn at random with a fixed seed, in their order."""
    without = ([replace(turn, reward=None) for turn in turns] for turns in contexts)
    different = list({tuple((turn.role, turn.content) for turn in turns): turns for turns in without}.values())
    chosen = sorted(random.Random(0).sample(range(len(different)), min(n, len(different))))
    return [different[i] for i in chosen]


def encode_prompts(
    policy: LanguagePolicy, histories: Sequence[Sequence[Turn]], ask: float | str | None
) -> list[PromptIds]:
    """Encode prompts as the run does.

    Args:
      policy: the run.
      histories: the turns before each reply.
      ask: the requested return, which is the same at each agent turn; None = the null condition. For one that depends
        on the dialogue ("auto", "expert:κ") or on the task, the highest bin is requested.
    """
    tokens, few_shot, found = policy.return_tokens, policy.shared_few_shot, []
    asked: Ids = () if tokens is None else requested_ids(policy, ask)
    for history in histories:
        kinds = []
        for ids, shown in ((asked, few_shot.with_returns), (tokens and tokens.null, few_shot.without_returns)):
            turns = 1 + sum(turn.is_trainable for turn in history)
            returns = None if tokens is None else [ids] * turns
            reserve = policy.decoding.max_new_tokens
            kinds.append(policy_window(history, policy.renderer, policy.window, reserve, returns, shown))
        found.append(PromptIds(*kinds))
    return found


def requested_ids(policy: LanguagePolicy, ask: float | str | None) -> Ids:
    """Return the ids of a requested return, or those of the highest bin (see `encode_prompts`)."""
    tokens = policy.return_tokens
    if ask is not None and (tokens.scale.per == "task" or STATE_ASKS.fullmatch(str(ask))):
        return tokens.bins[-1]
    return tokens.ids(tokens.scale.value_of(ask))
