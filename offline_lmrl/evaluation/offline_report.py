"""Evaluation of a policy from logs alone: no environment, and no rewards but the logged ones.

It measures the likelihood of held-out agent tokens; the calibration of Q against realised returns, and how well Q and
Σ(Q − V) order turns, rows and the trajectories of a group (those with the same `Trajectory.group`, such as replies to
one prompt) as their returns do; and what each β, the weight of value guidance, and each requested return does to
replies (choices.py), from which one is chosen without play.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import numpy as np

from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.errors import InputError, require
from offline_lmrl.evaluation.choice_rule import RULE, choose
from offline_lmrl.evaluation.choice_text import as_json, choice_lines
from offline_lmrl.evaluation.choices import PLAIN, PROMPTS, Choice, ChoiceTable, Progress, measure_choices
from offline_lmrl.evaluation.metrics import Cells, Estimate
from offline_lmrl.evaluation.offline import LoggedTokens, guidance_by_beta, measure_logs
from offline_lmrl.evaluation.ranking import RankAgreement, rank_agreement
from offline_lmrl.logs.trajectory import Trajectory

BETAS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
ASKS = ("p50", "p75", "p90", "max")  # requested returns of a model that was trained with returns


def calibration(steps: LoggedTokens, bins: int = 10) -> list[dict[str, float]]:
    """Compare Q with realised returns: sort the agent tokens by Q and cut them into equally large bins.

    Tokens of logs that were cut are left out, because their return is unknown.

    Args:
      steps: measurements at the agent tokens, with Q.
      bins: number of bins.
    Returns: one mapping per bin: `q` and `return_to_go`, the means over its tokens in reward units, and `n`, the
      number of its tokens; empty if no log is complete.
    """
    known = np.flatnonzero(~np.isnan(steps.return_to_go))
    ordered = known[np.argsort(steps.q[known], kind="stable")]
    return [
        {"q": float(steps.q[part].mean()), "return_to_go": float(steps.return_to_go[part].mean()), "n": len(part)}
        for part in np.array_split(ordered, min(bins, len(ordered)) or 1)
        if len(part)
    ]


def ranking_accuracy(steps: LoggedTokens, trajectories: Sequence[Trajectory]) -> Estimate | None:
    """Return the share of pairs of trajectories that Σ(Q − V) orders as their returns do.

    A pair is two finished trajectories of one group with unequal returns. The sum is over the agent's tokens; equal
    sums count half, so 0.5 is chance.

    Returns: the share, with a 95% interval that treats the pairs of a group as dependent; its n is the number of
      pairs. None if there is no pair.
    """
    score = np.bincount(steps.trajectory, steps.q - steps.v, minlength=len(trajectories))
    seen = np.bincount(steps.trajectory, minlength=len(trajectories)) > 0
    groups: dict[str, list[int]] = {}
    for index, trajectory in enumerate(trajectories):
        if trajectory.group and trajectory.terminated and seen[index]:
            groups.setdefault(trajectory.group, []).append(index)
    pairs = []
    for group, members in groups.items():
        for a, b in combinations(members, 2):
            difference = trajectories[a].total_return - trajectories[b].total_return
            if difference:
                pairs.append((0, group, 0.5 + 0.5 * float(np.sign(difference) * np.sign(score[a] - score[b]))))
    return Cells.of(pairs).share() if pairs else None


def value_ranking(steps: LoggedTokens, trajectories: Sequence[Trajectory]) -> dict[str, RankAgreement | None]:
    """Return how well Q and Σ(Q − V) order turns, and whole rows, as their returns do; one reply per prompt suffices.

    A turn has Q of its last token, Σ(Q − V) over its tokens, and the discounted return that followed its last token,
    this token's reward included. A row has the mean of its turns' Q, Σ(Q − V) over all its tokens, and its
    undiscounted return. Logs that were cut are left out.

    Returns: name -> agreement; None if all returns are equal, or all scores.
    """
    known = ~np.isnan(steps.return_to_go)
    row, turn, q = steps.trajectory[known], steps.turn[known], steps.q[known]
    first = np.flatnonzero(np.diff(np.stack([row, turn]), prepend=-1).any(0))
    if not len(first):
        return {}
    last = np.append(first[1:], len(row)) - 1
    advantage, q, of_turn = np.add.reduceat(q - steps.v[known], first), q[last], row[first]
    start = np.flatnonzero(np.diff(of_turn, prepend=-1))
    rows, count = of_turn[start], np.diff(np.append(start, len(of_turn)))
    group = [trajectories[i].group or int(i) for i in of_turn]
    returns = steps.return_to_go[known][last]
    earned, row_group = [trajectories[i].total_return for i in rows], [group[i] for i in start]
    return {
        "Q of a turn": rank_agreement(q, returns, group),
        "Σ(Q − V) of a turn": rank_agreement(advantage, returns, group),
        "Q of a row": rank_agreement(np.add.reduceat(q, start) / count, earned, row_group),
        "Σ(Q − V) of a row": rank_agreement(np.add.reduceat(advantage, start), earned, row_group),
    }


@dataclass(frozen=True)
class OfflineSettings:
    """The settings of `evaluate_offline`.

    betas: candidates for β; ignored without value heads.
    asks: candidates for the requested return; None = ASKS for a model that was trained with returns, else none.
    prompts: largest number of contexts of the logs to which every candidate replies; 0 = no replies.
    """

    betas: Sequence[float] = BETAS
    asks: Sequence[float | str] | None = None
    prompts: int = PROMPTS

    def __post_init__(self) -> None:
        require(self.prompts >= 0, f"prompts: found {self.prompts}, expected 0 (no replies) or more")

    def choices(self, policy: LanguagePolicy) -> list[Choice]:
        """Return the candidates for this policy: β 0 first, then the other βs, then the requested returns."""
        betas = self.betas if policy.model.value_heads is not None else ()
        asks = self.asks if self.asks is not None else ASKS if policy.return_tokens is not None else ()
        return list(dict.fromkeys([PLAIN, *map(Choice, map(float, betas)), *(Choice(ask=ask) for ask in asks)]))


@dataclass(frozen=True)
class OfflineReport:
    """The evaluation of a policy on held-out logs; `str` formats it.

    trajectories: number of logs.
    agent_tokens: number of agent tokens evaluated.
    counts: description of a fault -> number of cases, for example of agent turns that do not fit into a window.
    log_prob: mean log π per agent token, in nats, with a 95% interval that treats the tokens of a group as dependent.
    calibration: result of `calibration`; None without value heads.
    ranking: result of `ranking_accuracy`; None without value heads, or if no pair can be ranked.
    agreement: result of `value_ranking`; empty without value heads.
    by_beta: result of `guidance_by_beta`; None without value heads.
    choices: what every candidate does to replies; None if none were generated.
    no_replies: why none could be generated, such as a window without space for one; None if nothing prevented it.
    chosen: what `choose` (choice_rule.py) chooses; None without replies, or if there is nothing to choose.
    """

    trajectories: int
    agent_tokens: int
    counts: dict[str, int]
    log_prob: Estimate
    calibration: list[dict[str, float]] | None = None
    ranking: Estimate | None = None
    agreement: dict[str, RankAgreement | None] = field(default_factory=dict)
    by_beta: list[dict[str, float]] | None = None
    choices: ChoiceTable | None = None
    no_replies: str | None = None
    chosen: Choice | None = None

    def tried(self) -> list[dict[str, Any]]:
        """Return one mapping per β, as values that JSON can hold.

        It has `beta`, `kl` and `changed` (`guidance_by_beta`) and, if there are replies, `chosen` (True for the one
        chosen) and the fields of `ChoiceRow` but its texts.
        """
        if self.choices is None:
            return self.by_beta
        rows = {row.choice.beta: row for row in self.choices.rows if row.choice.ask is None}
        return [
            as_json(replace(rows[one["beta"]], texts=())) | one | {"chosen": rows[one["beta"]].choice == self.chosen}
            for one in self.by_beta
        ]

    def __str__(self) -> str:
        lines = [f"{self.trajectories} trajectories, {self.agent_tokens} agent tokens"]
        lines += [f"  {reason}: {count}" for reason, count in self.counts.items()]
        lines.append(f"log π per agent token (nats): {self.log_prob}")
        if self.calibration is not None:
            lines += self._value_lines()
        if self.choices is not None:
            lines += choice_lines(self.choices, self.chosen)
        elif self.by_beta is not None:
            lines.append("guidance:   beta   KL(guided ‖ π) per token   choices changed")
            lines += [f"  {row['beta']:14g} {row['kl']:16.4f} {row['changed']:23.1%}" for row in self.by_beta]
        return "\n".join([*lines, *self.closing_lines()])

    def closing_lines(self) -> list[str]:
        """Return the lines that name what was chosen, and why there are no replies."""
        lines = [] if self.no_replies is None else [f"no replies were generated: {self.no_replies}"]
        if self.chosen is not None:
            lines.append(f"chosen offline: {self.chosen} ({RULE})")
        return lines

    def _value_lines(self) -> list[str]:
        lines = ["mean Q and mean realised return-to-go of agent tokens, by bins of Q:"]
        lines += [f"  {row['q']:10.3f} {row['return_to_go']:10.3f}   n={row['n']}" for row in self.calibration]
        ranked = "no group has different returns" if self.ranking is None else f"{self.ranking} n={self.ranking.n}"
        lines.append(f"share of pairs in a group that Σ(Q − V) orders as their returns do (0.5 is chance): {ranked}")
        lines.append("order by realised returns (rank correlation: 0 is chance; AUC: 0.5 is chance):")
        for name, found in self.agreement.items():
            lines.append(f"  {name:<20} {'all equal' if found is None else found}")
        return lines


def evaluate_offline(
    policy: LanguagePolicy,
    trajectories: Sequence[Trajectory],
    *,
    demonstrations: Sequence[Trajectory] | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> OfflineReport:
    """Evaluate a policy on held-out logs: likelihood, replies, and with value heads calibration, ranking and guidance.

    Args:
      policy: the policy; a return-conditioned one is measured at logged tokens with no return requested.
      trajectories: the logs.
      demonstrations: trajectories from which few-shot demonstrations are drawn; None = those of the policy, see
        `measure_logs`.
      progress: called with (replies drawn, replies in all); None = not called.
      settings: fields of `OfflineSettings`: betas, asks and prompts.
    Raises: InputError if no agent turn fits into a window, the task of a log has too few demonstrations, or a
      candidate needs something that the model lacks.
    """
    given = OfflineSettings(**settings)
    guided, candidates = policy.model.value_heads is not None, given.choices(policy)
    for ask in {one.ask for one in candidates} - {None}:
        policy.with_decoding(ask=ask)  # raises now if the model cannot be given this request
    betas = list(dict.fromkeys(one.beta for one in candidates)) if guided else []
    steps = measure_logs(policy, trajectories, betas, demonstrations)
    clusters = [trajectories[i].group or int(i) for i in steps.trajectory]
    log_prob = Cells.of((0, *pair) for pair in zip(clusters, steps.log_prob.tolist(), strict=True)).estimate()
    values: dict[str, Any] = {}
    if guided:
        by_beta = guidance_by_beta(steps, betas)
        values = {
            "calibration": calibration(steps),
            "ranking": ranking_accuracy(steps, trajectories),
            "agreement": value_ranking(steps, trajectories),
            "by_beta": by_beta,
        }
    if given.prompts:
        try:
            table = measure_choices(policy, trajectories, candidates, given.prompts, steps, progress)
            values |= {"choices": table, "chosen": choose(table.rows).choice if len(table.rows) > 1 else None}
        except InputError as error:
            values["no_replies"] = str(error)
    return OfflineReport(len(trajectories), len(steps.token), dict(steps.counts), log_prob, **values)
