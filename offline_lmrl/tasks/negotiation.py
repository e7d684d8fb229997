"""Deal or no deal (Lewis et al. 2017): two sides divide books, hats and balls by talking.

The pool is the set of items to divide. Both sides know the number of items of each kind; the values of the items
differ between the sides and are private, and every pool is worth 10 to each side. Either side ends the talk with the
turn `<selection>`; then each side writes its division, the numbers of items that it takes. If what both take adds up
to the pool, each side earns the value of what it takes; otherwise both earn 0. In play the two sides are the agent,
which is trained or evaluated, and its partner. The functions in this file make the texts of the turns for logs, agent
and partner alike.
"""

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from offline_lmrl.errors import InputError, require, shown
from offline_lmrl.logs.protocols import Policy, Reply, StepResult
from offline_lmrl.logs.trajectory import Turn, parse_json

ITEMS = ("books", "hats", "balls")
SELECTION = "<selection>"
NO_AGREEMENT = "no agreement"
DIVIDE = Turn("environment", "divide")
# Added to an episode's seed for the partner, so that an agent with the same seed draws other random numbers.
PARTNER_SEEDS = 2**32

Triple = tuple[int, int, int]  # a number for each of ITEMS


@dataclass(frozen=True)
class Scenario:
    """A pool to divide, with its values.

    Args:
      counts: number of items of each of the kinds ITEMS.
      values: for side 0 and for side 1, what one item of each kind is worth.
    """

    counts: Triple
    values: tuple[Triple, Triple]

    @property
    def key(self) -> str:
        """The name of the scenario, used as the group of all its dialogues; it does not depend on the sides' order."""
        sides = sorted(" ".join(map(str, values)) for values in self.values)
        return f"{' '.join(map(str, self.counts))} / {' / '.join(sides)}"


def scenario_turn(counts: Triple, values: Triple) -> Turn:
    """Return a side's first turn, its counts and values: "books 1 worth 0, hats 4 worth 2, balls 1 worth 2"."""
    return Turn(
        "user",
        ", ".join(f"{item} {count} worth {value}" for item, count, value in zip(ITEMS, counts, values, strict=True)),
    )


def division_text(division: Triple | None) -> str:
    """Return the text of a division: "take books 0, hats 4, balls 1"; "no agreement" for None.

    Each number follows the name of its item, as in the opening turn, so that a model can look both up by name.
    """
    if division is None:
        return NO_AGREEMENT
    return "take " + ", ".join(f"{item} {number}" for item, number in zip(ITEMS, division, strict=True))


def divisions(counts: Triple) -> dict[str, Triple | None]:
    """Return {text: division} for all texts by which a side may divide the pool; None means no agreement."""
    choices: list[Triple | None] = list(itertools.product(*(range(count + 1) for count in counts)))
    return {division_text(division): division for division in [*choices, None]}


def worth(division: Triple, values: Triple) -> int:
    """Return the value of a side's division to this side: Σ number · value over the kinds of items."""
    return sum(number * value for number, value in zip(division, values, strict=True))


def fits(counts: Triple, first: Triple | None, second: Triple | None) -> bool:
    """True if what two sides take, `first` and `second`, adds up to `counts`; False if one of them is None."""
    return None not in (first, second) and all(a + b == n for a, b, n in zip(first, second, counts, strict=True))


def is_pareto_optimal(scenario: Scenario, scores: tuple[int, int]) -> bool:
    """True if no division of the pool gives one side more than in `scores` and the other side no less.

    Args:
      scores: of side 0 and of side 1.
    """
    for first in itertools.product(*(range(count + 1) for count in scenario.counts)):
        second = tuple(count - number for count, number in zip(scenario.counts, first, strict=True))
        other = worth(first, scenario.values[0]), worth(second, scenario.values[1])
        if other != scores and all(new >= old for new, old in zip(other, scores, strict=True)):
            return False
    return True


def read_scenarios(path: str | Path) -> list[Scenario]:
    """Read scenarios from a JSON file: `[{"counts": [1, 4, 1], "values": [[0, 2, 2], [4, 1, 2]]}, ...]`.

    Raises: InputError that names the file, or the wrong entry as "file:number of the entry, from 1".
    """
    try:
        entries = parse_json(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}, expected a JSON file of scenarios") from error
    except ValueError as error:
        raise InputError(f"{path}: found text that is not JSON ({error}), expected a list of scenarios") from error
    require(isinstance(entries, list) and len(entries) > 0, f"{path}: found no scenario, expected a JSON list of them")
    return [_scenario(entry, f"{path}:{number}") for number, entry in enumerate(entries, start=1)]


def scenario_entry(scenario: Scenario) -> dict[str, Any]:
    """Return the scenario as an entry of the JSON file that `read_scenarios` reads."""
    return {"counts": list(scenario.counts), "values": [list(values) for values in scenario.values]}


def _scenario(entry: Any, where: str) -> Scenario:
    counts, values = (entry.get("counts"), entry.get("values")) if isinstance(entry, Mapping) else (None, None)
    triples = [counts, *values] if isinstance(values, list) and len(values) == 2 else []
    if not triples or not all(_is_triple(triple) for triple in triples):
        raise InputError(
            f"{where}: found {shown(entry)}, expected counts (3 whole numbers from 0) and values (2 lists of 3 such)"
        )
    return Scenario(tuple(counts), (tuple(values[0]), tuple(values[1])))


def _is_triple(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(type(number) is int and number >= 0 for number in value)


@dataclass
class _Dialogue:
    """The state of one episode; the agent plays `side`, and the partner plays the other side."""

    scenario: Scenario
    side: int
    order: str  # the side that speaks first: "agent" or "partner"
    partner_history: list[Turn]  # the dialogue as the partner sees it, with its own turns in the role of assistant
    dividing: bool = False  # True after the selection
    agent_text: str = ""  # the agent's last turn
    turns: int = 0  # number of turns of both sides, up to and including the selection
    agent_words: int = 0
    invalid: int = 0  # number of the agent's empty turns, and 1 if its division is not a possible one
    scores: tuple[int, int] = (0, 0)  # agent, partner
    agreement: bool = False

    @functools.cached_property
    def options(self) -> dict[str, Triple | None]:
        return divisions(self.scenario.counts)

    def hear_agent(self, text: str) -> bool:
        """Add the agent's turn; return True if the partner has to reply, False if the agent selected."""
        self.agent_text = text
        if self.dividing:
            return True
        self.turns += 1
        self.partner_history.append(Turn("user", text))
        if text == SELECTION:
            self._close()
            return False
        self.agent_words += len(text.split())
        self.invalid += not text
        return True

    def hear_partner(self, reply: Reply) -> list[Turn]:
        """Add the partner's turn to the dialogue, and return the turns that the agent sees.

        These are the partner's turn and, if it is the selection, the turn "divide", which asks for a division.
        """
        self.turns += 1
        text = reply.text.strip()
        # If the length limit ended the turn, its ids lack the closing token. It is then encoded anew from its text,
        # with that token, because all turns in the partner's training data have it.
        token_ids = reply.token_ids if reply.closed else None
        self.partner_history.append(Turn("assistant", reply.text, token_ids=token_ids))
        if text == SELECTION:
            self._close()
            return [Turn("user", text), DIVIDE]
        return [Turn("user", text)]

    def answer(self, reply: Reply | None, max_turns: int) -> StepResult:
        """Return the environment's answer to the agent's last turn.

        Args:
          reply: the partner's reply; None if the agent selected.
          max_turns: number of turns of both sides after which a dialogue without a selection is cut.
        """
        if reply is None:
            return StepResult((DIVIDE,), 0.0, False, False)
        if self.dividing:
            self.settle(self.agent_text, reply.text.strip())
            return StepResult((), float(self.scores[0]), True, False)
        heard = tuple(self.hear_partner(reply))
        return StepResult(heard, 0.0, False, self.turns >= max_turns and not self.dividing)

    def settle(self, agent_text: str, partner_text: str) -> None:
        """Score the divisions of agent and partner; a text that is no possible division means no agreement."""
        self.invalid += agent_text not in self.options
        agent, partner = self.options.get(agent_text), self.options.get(partner_text)
        self.agreement = fits(self.scenario.counts, agent, partner)
        if self.agreement:
            own, other = self.scenario.values[self.side], self.scenario.values[1 - self.side]
            self.scores = worth(agent, own), worth(partner, other)

    def _close(self) -> None:
        self.dividing = True
        self.partner_history.append(DIVIDE)


class Negotiation:
    """A negotiation in which the agent plays one side and a frozen partner the other; implements VectorEnvironment.

    The seed determines the episode. With n scenarios and both orders, seeds 0..4n−1 are every scenario from both sides
    in both orders: seed % n is the scenario, seed // n % 2 the agent's side, and seed // 2n % 2 who speaks first.
    Seeds from 4n on repeat these with other random numbers for the partner.

    Args:
      scenarios: a file for `read_scenarios`, or scenarios.
      partner: the run directory of a trained policy, which is loaded on the first reset, or any Policy. It is never
        trained here.
      first: who speaks first: "agent", "partner", or "both" (one or the other, by the seed).
      max_turns: number of turns of both sides, selection included, after which a dialogue is cut with score 0.
      partner_sampling: fields of DecodingConfig by name, which replace those saved in the partner's run directory;
        None = replace none.
    """

    def __init__(
        self,
        scenarios: str | Path | Sequence[Scenario],
        partner: str | Path | Policy,
        *,
        first: Literal["both", "agent", "partner"] = "both",
        max_turns: int = 20,
        partner_sampling: Mapping[str, Any] | None = None,
    ):
        require(
            first in ("both", "agent", "partner"),
            f"first: found {shown(first)}, expected 'both', 'agent' or 'partner'",
        )
        require(max_turns >= 2, f"max_turns: found {max_turns}, expected at least 2")
        self.scenarios = read_scenarios(scenarios) if isinstance(scenarios, str | Path) else list(scenarios)
        require(len(self.scenarios) > 0, "scenarios: found none, expected at least one")
        self.partner = partner
        self.partner_sampling = dict(partner_sampling or {})
        self.orders = ("agent", "partner") if first == "both" else (first,)
        self.max_turns = max_turns

    @property
    def episodes(self) -> int:
        """The number of different episodes: scenarios × 2 sides × (2 if `first` is "both", else 1)."""
        return len(self.scenarios) * 2 * len(self.orders)

    def reset(self, seeds: Sequence[int]) -> list[Sequence[Turn]]:
        """Start one episode per seed; return the turns before the agent's first turn, for each episode.

        These are the agent's counts and values, and the partner's first turn if the partner speaks first.
        """
        if isinstance(self.partner, str | Path):
            # Imported here, because it imports the model libraries, which rules and logs do not need.
            from offline_lmrl.decoding.policy import LanguagePolicy

            self.partner = LanguagePolicy.load(self.partner, **self.partner_sampling)
        self.session = self.partner.start([seed + PARTNER_SEEDS for seed in seeds])
        self.dialogues = [self._dialogue(seed) for seed in seeds]
        openings = [[scenario_turn(d.scenario.counts, d.scenario.values[d.side])] for d in self.dialogues]
        waiting = [row for row, dialogue in enumerate(self.dialogues) if dialogue.order == "partner"]
        for row, reply in self._ask_partner(waiting).items():
            openings[row] += self.dialogues[row].hear_partner(reply)
        return openings

    def step(self, rows: Sequence[int], texts: Sequence[str]) -> list[StepResult]:
        """Play one agent turn in each of these rows.

        Args:
          rows: indices of episodes, in the order of the seeds that `reset` was given.
          texts: the agent's turn in each row: a message or `<selection>`; but if the environment's last turn was
            "divide", a division, such as "take books 0, hats 4, balls 1".
        Returns: one result per row. An episode ends with the division, for which the agent earns its score.
        """
        waiting = [row for row, text in zip(rows, texts, strict=True) if self.dialogues[row].hear_agent(text.strip())]
        replies = self._ask_partner(waiting)
        return [self.dialogues[row].answer(replies.get(row), self.max_turns) for row in rows]

    def options(self, row: int) -> list[str] | None:
        """Return the texts of the possible divisions if the agent's next turn has to be a division, else None."""
        dialogue = self.dialogues[row]
        return list(dialogue.options) if dialogue.dividing else None

    def labels(self, row: int) -> dict[str, Any]:
        """Return facts about an episode.

        Returns:
          score, partner_score: rewards of agent and partner.
          agreement: whether the divisions add up to the pool.
          score_when_agreed: the agent's score, or None without an agreement.
          pareto: whether no division would give one of them more and the other no less.
          turns: number of turns of both, up to and including the selection.
          agent_words: number of words in the agent's turns before the selection.
          scenario, side, order: the scenario's key, the agent's side (0 or 1), and who spoke first.
          invalid: number of the agent's empty turns, plus 1 if its division is not a possible one.
        """
        dialogue = self.dialogues[row]
        in_order = dialogue.scores if dialogue.side == 0 else dialogue.scores[::-1]
        return {
            "score": dialogue.scores[0],
            "partner_score": dialogue.scores[1],
            "agreement": dialogue.agreement,
            "score_when_agreed": dialogue.scores[0] if dialogue.agreement else None,
            "pareto": dialogue.agreement and is_pareto_optimal(dialogue.scenario, in_order),
            "turns": dialogue.turns,
            "agent_words": dialogue.agent_words,
            "scenario": dialogue.scenario.key,
            "side": dialogue.side,
            "order": dialogue.order,
            "invalid": dialogue.invalid,
        }

    def _dialogue(self, seed: int) -> _Dialogue:
        index, rest = seed % len(self.scenarios), seed // len(self.scenarios)
        side, order = rest % 2, self.orders[rest // 2 % len(self.orders)]
        scenario = self.scenarios[index]
        return _Dialogue(scenario, side, order, [scenario_turn(scenario.counts, scenario.values[1 - side])])

    def _ask_partner(self, rows: Sequence[int]) -> dict[int, Reply]:
        """Return {row: the partner's next turn}; a turn that has to be a division is one of the possible ones."""
        if not rows:
            return {}
        histories = [self.dialogues[row].partner_history for row in rows]
        replies = self.session.reply(rows, histories, [self.options(row) for row in rows])
        return dict(zip(rows, replies, strict=True))
