"""A set of prompts with a reward for replies, as an environment of one turn, so that RLHF and games share all code."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from offline_lmrl.errors import InputError, require, shown
from offline_lmrl.logs.io import parsed, raw_splits
from offline_lmrl.logs.messages import read_dialogue
from offline_lmrl.logs.preferences import score_rows
from offline_lmrl.logs.protocols import Scorer, StepResult, import_object
from offline_lmrl.logs.trajectory import Turn, finite

SLOW = 2.0  # seconds of scoring after which a progress bar appears

Prompt = tuple[tuple[Turn, ...], Mapping[str, Any]]  # the turns of a prompt, and the further columns of its row
# Maps three lists (the turns before each reply; the replies; the further columns of each prompt's row) to rewards.
RewardFunction = Callable[[list[tuple[Turn, ...]], list[str], list[Mapping[str, Any]]], Sequence[float]]


class PromptEnvironment:
    """An environment with one prompt, one reply and one reward per episode; implements VectorEnvironment.

    Seeds 0 to n − 1 give each of the n prompts once, in a shuffled order; the next n seeds give them in another order.

    Args:
      prompts: a file or folder of rows with `prompt` (a text, or messages) or `messages` (of which those before the
        agent's last turn are the prompt), and any further columns; or the prompts themselves, as texts or turns.
      reward: a Scorer; or a function (contexts, texts, labels) -> one number per reply; or the name of such a function
        or of a Scorer class as package.module:name, which may be in the working folder. The arguments of the function
        are three lists with one entry per reply: the turns before the reply (a tuple of Turn), the reply (text), and
        the further columns of the prompt's row (a dict).
      batch_size: number of replies that are scored at once.
      seed: random seed of the shuffled order.

    Attributes:
      prompts: the n different prompts, each as (turns, further columns of its row).
      counts: reason -> number of prompts that were left out.

    Raises: InputError if the prompts cannot be read, or, during play, if the reward is not one finite number per
      reply.
    """

    def __init__(
        self,
        prompts: str | Path | Sequence[str | Sequence[Turn]],
        reward: Scorer | RewardFunction | str,
        batch_size: int = 64,
        seed: int = 0,
    ):
        require(batch_size >= 1, f"batch_size: found {batch_size}, expected at least 1")
        self.batch_size, self.seed, self.reward = batch_size, seed, _reward_function(reward)
        rows = (
            _read(prompts)
            if isinstance(prompts, str | Path)
            else [(read_dialogue(prompt, "prompts"), {}) for prompt in prompts]
        )
        # Reversed, so that the first of equal prompts is kept.
        unique = {context: labels for context, labels in reversed(rows)}
        self.prompts = list(reversed(unique.items()))
        self.counts = Counter({"prompts dropped: seen before": len(rows) - len(unique)})
        require(len(self.prompts) > 0, f"prompts: found none in {shown(prompts)}, expected at least one")

    def reset(self, seeds: Sequence[int]) -> list[Sequence[Turn]]:
        orders = {
            epoch: np.random.default_rng([self.seed, epoch]).permutation(len(self.prompts))
            for epoch in {seed // len(self.prompts) for seed in seeds}
        }
        self.chosen = [self.prompts[orders[seed // len(self.prompts)][seed % len(self.prompts)]] for seed in seeds]
        return [context for context, _ in self.chosen]

    def step(self, rows: Sequence[int], texts: Sequence[str]) -> list[StepResult]:
        rewards: list[float] = []
        with tqdm(total=len(rows), desc="scoring", delay=SLOW, leave=False) as bar:
            for start in range(0, len(rows), self.batch_size):
                part = slice(start, start + self.batch_size)
                rewards += self._score([self.chosen[row] for row in rows[part]], list(texts[part]))
                bar.update(len(rewards) - bar.n)
        return [StepResult((), reward, True, False) for reward in rewards]

    def labels(self, row: int) -> dict[str, Any]:
        return dict(self.chosen[row][1])

    def _score(self, prompts: Sequence[Prompt], texts: list[str]) -> list[float]:
        """Return the rewards of the replies `texts` to the prompts."""
        contexts, labels = map(list, zip(*prompts, strict=True))
        try:
            found = self.reward(contexts, texts, labels)
        except InputError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"reward: raised {type(error).__name__}: {reason}, expected {len(texts)} numbers; the "
                f"first reply is {shown(texts[0])}"
            ) from error
        try:
            values = list(found)
        except TypeError as error:
            raise InputError(f"reward: found {shown(found)}, expected a list of {len(texts)} numbers") from error
        require(
            len(values) == len(texts),
            f"reward: found {len(values)} numbers, expected one for each of {len(texts)} replies",
        )
        return [_number(value, text) for value, text in zip(values, texts, strict=True)]


def _reward_function(reward: Scorer | RewardFunction | str) -> RewardFunction:
    """Return `reward`, or what a name of package.module:name imports, as a function; a class makes its own Scorer."""
    found = import_object(reward, "reward") if isinstance(reward, str) else reward
    if isinstance(reward, str) and isinstance(found, type):
        found = found()
    if isinstance(found, Scorer):
        return lambda contexts, texts, labels: [
            scores[0]
            for scores in score_rows(
                [(context, [(Turn("assistant", text),)]) for context, text in zip(contexts, texts, strict=True)], found
            )
        ]
    require(callable(found), f"reward: found {shown(reward)}, expected a function or a Scorer")
    return found


def _number(value: Any, text: str) -> float:
    try:
        return finite("reward", value.item() if isinstance(value, torch.Tensor | np.ndarray | np.generic) else value)
    except InputError as error:
        raise InputError(f"{error}, for the reply {shown(text)}") from error


def _read(source: str | Path) -> list[Prompt]:
    """Read the prompts of a file or folder; return (turns of the prompt, further columns of its row) for each row."""
    parts = raw_splits(source)
    require(len(parts) == 1, f"{source}: found the splits {', '.join(parts)}, expected one of them: give its file")
    (rows,) = parts.values()
    found = []
    for where, raw in rows:
        row = parsed(raw, where)
        key = next((name for name in ("prompt", "messages") if isinstance(row, Mapping) and name in row), None)
        if key is None:
            raise InputError(f"{where}: found {shown(row)}, expected a row with `prompt` or `messages`")
        turns = read_dialogue(row[key], where, key)
        agent = [i for i, turn in enumerate(turns) if turn.is_trainable]
        if key == "messages" and agent:
            turns = turns[: agent[-1]]
        require(len(turns) > 0, f"{where}: messages: found no turn before the agent's, expected a prompt")
        found.append((turns, {name: value for name, value in row.items() if name != key and value is not None}))
    return found
