"""Compare the replies of an export with those of its run, to the same held-out prompts.

Greedy replies show whether both are the same policy: they are equal token for token, or the two tokens at the first
difference have nearly the same score. Replies that are sampled as the run samples show the rest: how long they are,
how many are unfinished or repeat themselves, what the run's own Q and its own distribution say of them, and the
rewards of a scorer. For these, the table has the difference, export − run, with its 95 % interval over prompts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from offline_lmrl.decoding.config import DecodingConfig
from offline_lmrl.decoding.distribution import reduce_q
from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.decoding.sampler import Sampler
from offline_lmrl.decoding.scorers import load_scorer
from offline_lmrl.decoding.texts import TextStream
from offline_lmrl.evaluation.metrics import mean_interval
from offline_lmrl.export.prompts import PromptIds, Prompts
from offline_lmrl.logs.preferences import score_rows
from offline_lmrl.logs.replies import repeats
from offline_lmrl.logs.trajectory import Turn
from offline_lmrl.models.adapters import part_of
from offline_lmrl.models.step_outputs import States, compute_step_outputs
from offline_lmrl.tokens.batching import reply_rows, token_rows

IDENTICAL = "identical greedy replies"
LENGTH = "tokens per reply"
UNFINISHED = "unfinished replies"
REPEATING = "replies with a 4-gram four times"
Q_PER_TOKEN = "Q per token"
LOG_PROB = "log-probability per token under the run"
REWARD = "reward"
LARGEST_GAP = 1e-3  # nats between the two best tokens of the run, up to which rounding may choose the other one


class Player(Protocol):
    """Something that replies to prompts, such as an export in an engine."""

    def play(self, prompts: Sequence[Sequence[int]], decoding: DecodingConfig, seed: int) -> list[list[int]]:
        """Reply to each prompt once.

        Args:
          prompts: token ids of the run, with the ids of a requested return, if there is one.
          decoding: the settings; temperature 0 is greedy. Stop texts are left to the caller.
          seed: seed of the random numbers.
        Returns: the token ids of each reply, with the one that ends it, at most max_new_tokens.
        """


@dataclass(frozen=True)
class Row:
    """One measure of run and export.

    run: the run's mean over prompts; None = the measure is one of both together.
    export: the export's mean, or the value of the measure.
    difference: mean of export − run, and the ends of its 95 % interval; None = not measured.
    spread: the run's standard deviation over prompts.
    n: number of prompts.
    bound: what is expected of the measure, in words; "" = nothing.
    met: True if the bound is met; None without a bound, and with one if the prompts are too few to tell.
    """

    name: str
    run: float | None
    export: float
    difference: tuple[float, float, float] | None = None
    spread: float | None = None
    n: int = 0
    bound: str = ""
    met: bool | None = None

    @property
    def apart(self) -> str:
        return "{:+.3g} [{:+.3g}, {:+.3g}]".format(*self.difference) if self.difference else ""

    @property
    def found(self) -> str:
        """The measure and its value, or the difference from the run, for messages."""
        return f"{self.name} {f'with export − run {self.apart}' if self.difference else f'{self.export:.4g}'}"

    def cells(self) -> list[str]:
        number = "{:.4g}".format
        run = "" if self.run is None else number(self.run)
        verdict = {None: self.bound and "UNDECIDED", True: "met", False: "NOT MET"}[self.met]
        return [self.name, run, number(self.export), self.apart, self.bound, verdict]


@dataclass(frozen=True)
class Replies:
    """Replies of one player, in token ids, one per prompt.

    greedy: decoded greedily.
    drawn: decoded as the run decodes; the same as `greedy` if that is greedy.
    """

    greedy: list[list[int]]
    drawn: list[list[int]]


@dataclass(frozen=True)
class Beside:
    """The comparison of an export with its run.

    source: where the prompts are from.
    prompts: number of prompts.
    rows: the measures.
    """

    source: str
    prompts: int
    rows: Sequence[Row]

    @classmethod
    def unplayed(cls) -> "Beside":
        """Return the comparison with an export that was not played."""
        return cls("", 0, [])

    def plus(self, rows: Sequence[Row]) -> "Beside":
        """Return the comparison with further measures."""
        return replace(self, rows=[*self.rows, *rows])

    @property
    def unmet(self) -> list[Row]:
        """The measures that miss their bound, or of which the prompts are too few to tell."""
        return [row for row in self.rows if row.bound and not row.met]

    @property
    def title(self) -> str:
        if self.prompts == 0:
            return "The export was not played beside the run"
        return f"{self.prompts} prompt{'s' * (self.prompts != 1)} from {self.source}, replied to by run and export"

    def __str__(self) -> str:
        if not self.rows:
            return self.title
        table = Table("measure", "run", "export", "export − run [95 %]", "bound", "", title=self.title, box=None)
        for row in self.rows:
            table.add_row(*row.cells())
        console = Console(width=160)
        with console.capture() as captured:
            console.print(table, highlight=False, markup=False)
        return "\n".join(line.rstrip() for line in captured.get().splitlines())

    def markdown(self) -> list[str]:
        """Return the lines of a table in Markdown."""
        lines = ["| measure | run | export | export − run [95 %] | bound | |", "|---|---|---|---|---|---|"]
        return [f"{self.title}.", "", *lines, *(f"| {' | '.join(row.cells())} |" for row in self.rows)]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, which has no number that is not finite: such a difference is null."""
        finite = [one if one.difference is None or np.isfinite(one.difference).all() else None for one in self.rows]
        rows = [asdict(kept or replace(row, difference=None)) for kept, row in zip(finite, self.rows, strict=True)]
        return {"source": self.source, "prompts": self.prompts, "rows": rows}


class RunPlayer:
    """The run itself as a `Player`."""

    def __init__(self, policy: LanguagePolicy):
        self.policy = policy

    def play(self, prompts: Sequence[Sequence[int]], decoding: DecodingConfig, seed: int) -> list[list[int]]:
        sampler = Sampler(self.policy.model, self.policy.renderer, replace(decoding, stop=()))
        replies = sampler.sample(prompts, range(seed, seed + len(prompts)))
        return [list(reply.token_ids) for reply in replies]


def play(player: Player, prompts: Sequence[PromptIds], greedy: DecodingConfig, decoding: DecodingConfig) -> Replies:
    """Let a player reply to all prompts, greedily and as the run decodes.

    Args:
      player: the run or the export.
      prompts: the prompts.
      greedy: settings with temperature 0.
      decoding: the run's settings.
    """
    ids = [prompt.asked for prompt in prompts]
    best = player.play(ids, greedy, 0)
    return Replies(best, player.play(ids, decoding, 1) if decoding.temperature > 0 else best)


@dataclass(frozen=True)
class Trial:
    """What the replies of an export and of its run are compared by.

    policy: the run.
    prompts: the prompts as dialogues.
    ids: the prompts as token ids.
    greedy: settings of the greedy replies.
    decoding: the run's settings.
    scorer: specification of a scorer; None = no rewards.
    """

    policy: LanguagePolicy
    prompts: Prompts
    ids: Sequence[PromptIds]
    greedy: DecodingConfig
    decoding: DecodingConfig
    scorer: Any = None

    def compare(self, run: Replies, export: Replies, bounded: Callable[[Row], Row | None]) -> Beside:
        """Measure the replies of both.

        Args:
          run: the run's replies.
          export: the export's replies.
          bounded: function that adds to a measure what is expected of it; None leaves the measure out.
        """
        best = [[self._ended(reply).tokens for reply in replies.greedy] for replies in (run, export)]
        rows = [self.identical(*best)]
        measured = [self._measured(replies.drawn) for replies in (run, export)]
        for name, of_run in measured[0].items():
            with np.errstate(invalid="ignore"):  # −inf, of a token that the run never chooses
                apart = mean_interval((measured[1][name] - of_run).tolist())
            rows.append(
                Row(
                    name,
                    float(of_run.mean()),
                    float(measured[1][name].mean()),
                    (apart.mean, apart.low, apart.high),
                    float(of_run.std()),
                    len(of_run),
                )
            )
        return Beside(self.prompts.source, len(self.ids), [kept for row in rows if (kept := bounded(row)) is not None])

    def identical(self, run: Sequence[Sequence[int]], export: Sequence[Sequence[int]]) -> Row:
        """Return the share of identical greedy replies.

        The bound is that in each of the others, the two tokens at the first difference are less than LARGEST_GAP nats
        below the run's best one there.
        """
        same = [a == b for a, b in zip(run, export, strict=True)]
        largest = float(np.max(self._gaps(run, export), initial=0.0))  # nan if one is
        bound = f"1, or the two tokens at the first difference closer than {LARGEST_GAP:g} nats to the best"
        found = "" if all(same) else f" (found up to {largest:.2g})"
        met = largest < LARGEST_GAP
        return Row(IDENTICAL, None, sum(same) / len(same), n=len(same), bound=bound + found, met=met)

    def _gaps(self, run: Sequence[Sequence[int]], export: Sequence[Sequence[int]]) -> list[float]:
        """Return how far the two tokens at the first difference of each pair are below the run's best one, in nats."""
        rows = []
        for prompt, mine, other in zip(self.ids, run, export, strict=True):
            first = next((i for i, pair in enumerate(zip(mine, other, strict=False)) if pair[0] != pair[1]), None)
            if first is not None:
                rows += [[*prompt.asked, *mine[:first], reply[first]] for reply in (mine, other)]
            elif mine != other:  # one of them only ends earlier
                return [float("inf")]
        if not rows:
            return []
        if not self._one_stream:
            return [float("inf")]

        def measure(states: States) -> Mapping[str, torch.Tensor]:
            log_prob = states.distribution(self.greedy)
            return {"gap": log_prob.amax(-1) - states.of_action(log_prob)}

        data = token_rows(rows, [[len(row) - 2] for row in rows])
        return compute_step_outputs(self.policy.model, data, measure=measure).measured["gap"].tolist()

    @property
    def _one_stream(self) -> bool:
        """True if the run's distribution needs one pass of the model."""
        return self.policy.return_tokens is None or not self.decoding.guided

    def _measured(self, replies: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
        """Return the measures of replies, one number per prompt."""
        policy, streams = self.policy, list(map(self._ended, replies))
        ids, closing = [stream.tokens for stream in streams], policy.sampler.close_ids
        found: dict[str, list[Any]] = {
            LENGTH: [len(reply) for reply in ids],
            UNFINISHED: [not stream.stopped and stream.tokens[-1] not in closing for stream in streams],
            REPEATING: [repeats(reply) for reply in ids],
        }
        if part_of(policy.model, "value_heads") is not None:
            found[Q_PER_TOKEN] = self._per_token([prompt.null for prompt in self.ids], ids, self._q)
        if self._one_stream:
            found[LOG_PROB] = self._per_token([prompt.asked for prompt in self.ids], ids, self._log_prob)
        if self.scorer is not None:
            options = [[[Turn("assistant", stream.text)]] for stream in streams]
            scored = score_rows(list(zip(self.prompts.histories, options, strict=True)), load_scorer(self.scorer))
            found[REWARD] = [float(score[0]) for score in scored]
        return {name: np.array(values, dtype=float) for name, values in found.items()}

    def _ended(self, reply: Sequence[int]) -> TextStream:
        """Return a reply up to the first of the run's stop texts, which only some forms of export end it at."""
        stream = TextStream(self.policy.renderer, self.decoding.stop)
        for place, token in enumerate(reply, 1):
            stream.add(token, last=place == len(reply))
            if stream.stopped:
                break
        return stream

    def _q(self, states: States) -> torch.Tensor:
        return reduce_q(states.q_of_action(), self.decoding.q_reduce)

    def _log_prob(self, states: States) -> torch.Tensor:
        return states.of_action(states.distribution(self.decoding))

    def _per_token(
        self,
        prompts: Sequence[Sequence[int]],
        replies: Sequence[Sequence[int]],
        measure: Callable[[States], torch.Tensor],
    ) -> list[float]:
        """Return the mean over the tokens of each reply of what `measure` computes for them."""
        data = reply_rows(zip(prompts, replies, strict=True))
        found = compute_step_outputs(self.policy.model, data, measure=lambda s: {"value": measure(s)})
        parts = np.split(found.measured["value"], np.cumsum([len(reply) for reply in replies])[:-1])
        return [float(part.mean()) for part in parts]
