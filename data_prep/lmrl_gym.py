"""Convert the published logs of LMRL-Gym (Abdulhai et al. 2023) to scored games.

A row's fields determine its layout:
- A list of objects with `state, action, reward, done`, one per move: Maze fully observed, Chess Endgames. In a variant
  (Chess), each row is one such object, with the state in `from_state`: the rows up to the next `done`, or to an empty
  line, are one game, and boards and moves are spelt letter by letter, as in the published game.
- `text_history, rewards, dones`: Maze partially observed, Text-Nav. Every second text is an action; there is a reward
  for each text or for each action.
- `sequence, reward, done`: Wordle, and logs converted from other tasks. The sequence is pairs of a text and whether it
  is an action. There is one reward per text; the first may be missing.
- `lines, correct, word`: Twenty Questions and Guess My City. A line is a question and its answer. A question earns −1;
  the last one earns 0 if it is correct. Twenty questions, or a correct one, end the game; other games are cut.
- `buyer_info, lines, output`: Car Dealer. The agent is the dealer, whose last turn earns a reward that is computed
  from `output`; if a row has no `output`, the dialogue was cut.

Line breaks at the end of texts are removed, since a turn has its own end. Consecutive texts of the agent are one turn.
`done` is taken as logged. Text-Nav and Maze also log it for games that were only cut; `max_steps` corrects that (15
and 100).
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from data_prep.source import Found, Report, Splits
from data_prep.trajectories import TrajectoryImporter
from offline_lmrl.errors import InputError, require, shown
from offline_lmrl.logs.io import content_key
from offline_lmrl.logs.record import Record, drop_if, thumb
from offline_lmrl.logs.trajectory import Trajectory, Turn
from offline_lmrl.settings import setting

SPLITS = {"eval": "validation", "val": "validation"}
QUESTIONS = 20
_DEALER = ("Dealer", "Seller")
_USED = {"text_history", "rewards", "dones", "sequence", "reward", "done", "lines"}
_QUESTION = re.compile(r"(?P<question>.*\?) (?P<answer>.*)", re.DOTALL)
_LAYOUTS = (
    "a list of objects with state, action, reward and done; or from_state, action, reward and done; or text_history, "
    "rewards and dones; or sequence, reward and done; or lines with correct or buyer_info"
)

Part = tuple[str, bool, float]  # a text of a game, True if it is an action of the agent, and its reward


@dataclass(frozen=True)
class Move:
    """One action of a game whose moves are separate rows or items of a list.

    Attributes:
      state: the text before the action.
      reward: the reward of the action.
      done: True if the game ended with the action.
      line: number of the row in its file, or of the move in its list; moves of one game have consecutive numbers.
      group: the game's group if the user named a column for it, else "".
    """

    state: str
    action: str
    reward: float
    done: bool
    line: int
    group: str = ""


@dataclass(frozen=True, kw_only=True)
class LmrlGym(TrajectoryImporter):
    """Read games and write train.jsonl, validation.jsonl and report.json.

    The entry `games` of the report counts moves, games joined from them, and games cut.
    """

    reward: Literal["fancy", "revenue"] = setting(
        "fancy",
        "the reward in Car Dealer: fancy (the price over the mean of budget and list price) or revenue (the price / "
        "1000)",
    )
    max_steps: int | None = setting(
        None,
        "number of actions after which a game was cut, whatever its `done` is. A game whose last action earned more "
        "than any other ended by itself. null = `done` decides",
    )

    def check(self) -> None:
        """Check the settings."""
        require(
            self.max_steps is None or self.max_steps >= 1,
            f"max_steps: found {self.max_steps}, expected a number from 1 up, or null",
        )

    def read_value(self, row: Any, where: str, repairs: Counter[str]) -> Trajectory | Move:
        """Return the game of a row that is a list of moves or, see `read`, an object."""
        if not isinstance(row, list):
            return super().read_value(row, where, repairs)
        moves = Record({f"moves[{i}]": move for i, move in enumerate(row)}, where, repairs)
        drop_if(not moves, "a game without a move")
        expected = "an object with state, action, reward and done"
        return _moves([_move(moves.inner(name, expected), i) for i, name in enumerate(moves)])

    def read(self, row: Record) -> Trajectory | Move:
        """Return the game of one row, or, if the row is only one move, this move."""
        if row.get("action") is not None:
            return _move(row, int(row.where.rpartition(":")[2]))
        for (field, *others), layout in _READERS.items():
            if row.get(field) is not None and row.keys() >= set(others):
                parts, done = layout(row, self.reward)
                break
        else:
            raise InputError(f"{row.where}: fields: found {shown(list(row))}, expected {_LAYOUTS}")
        drop_if(done is None, "a game without a value of done")
        return _game(parts, done, row.others(_USED))

    def assemble(self, found: Found, report: Report) -> Splits:
        """Join moves to games, and mark the games that were cut."""
        counts: Counter[str] = Counter()
        made: dict[str, list[Trajectory]] = {}
        for split, rows in found.items():
            games = [row for row in rows if isinstance(row, Trajectory)]
            games += join((row for row in rows if isinstance(row, Move)), counts)
            made.setdefault(SPLITS.get(split, split), []).extend(_cut(game, self.max_steps, counts) for game in games)
        report["games"] = dict(counts)
        return made


def join(moves: Iterable[Move], counts: Counter[str]) -> Iterator[Trajectory]:
    """Join consecutive moves to games, and yield the games.

    A game ends with a move that is done, at a gap between lines, or where the group changes.

    Args:
      counts: incremented under "moves" for each move, and under "games of moves" for each game.
    """
    game: list[Move] = []
    for move in moves:
        if game and (game[-1].done or move.line != game[-1].line + 1 or move.group != game[-1].group):
            yield _moves(game)
            game = []
        counts["moves"] += 1
        counts["games of moves"] += not game
        game.append(move)
    if game:
        yield _moves(game)


def _move(record: Record, line: int) -> Move:
    spelt = record.get("state") is None
    state, action = map(record.text, ("from_state" if spelt else "state", "action"))
    if spelt:
        state, action = " ".join(state), " ".join(action)
    done = _quietly(record).thumb("done")
    require(done is not None, f"{record.where}: done: found none, expected true or false")
    return Move(state, action, record.number("reward"), done, line)


def _quietly(record: Record) -> Record:
    """Return the record with a counter of its own, for values of which every game has many."""
    return Record(record, record.where, Counter())


def _moves(moves: Sequence[Move]) -> Trajectory:
    parts = [part for move in moves for part in ((move.state, False, 0.0), (move.action, True, move.reward))]
    return replace(_game(parts, moves[-1].done, {}), group=moves[0].group)


def _history(row: Record, reward: str) -> tuple[list[Part], bool]:
    texts, rewards = row.texts("text_history"), row.numbers("rewards")
    if len(rewards) == len(texts) // 2:  # one reward per action
        rewards = [0.0 if i % 2 == 0 else rewards[i // 2] for i in range(len(texts))]
    parts = _parts(row, "rewards", texts, [i % 2 == 1 for i in range(len(texts))], rewards)
    dones = row.each("dones")
    return parts, any([thumb(value, "dones", row.where, Counter()) for value in dones.values()])


def _sequence(row: Record, reward: str) -> tuple[list[Part], bool | None]:
    texts, acts = [], []
    for name, part in row.each("sequence").items():
        require(
            isinstance(part, list | tuple) and len(part) == 2,
            f"{row.where}: {name}: found {shown(part)}, expected a text and whether it is an action",
        )
        texts.append(Record({name: part[0]}, row.where, row.repairs).text(name))
        acts.append(thumb(part[1], name, row.where, Counter()))
    rewards = row.numbers("reward")
    # Some logs have no reward for the first text.
    parts = _parts(row, "reward", texts, acts, [0.0] * (len(texts) - len(rewards) == 1) + rewards)
    return parts, row.thumb("done")


def _parts(
    row: Record, name: str, texts: Sequence[str], acts: Sequence[bool | None], rewards: Sequence[float]
) -> list[Part]:
    """Return the parts of a game.

    Args:
      name: the field that holds the rewards, for error messages.
    """
    require(
        len(rewards) == len(texts),
        f"{row.where}: {name}: found {len(rewards)} for {len(texts)} texts, expected one for each text",
    )
    require(
        not any(reward and not act for act, reward in zip(acts, rewards, strict=True)),
        f"{row.where}: {name}: found a reward on a text that is not an action, expected 0 there",
    )
    return list(zip(texts, map(bool, acts), rewards, strict=True))


def _questions(row: Record, reward: str) -> tuple[list[Part], bool]:
    correct, parts, lines = row.thumb("correct"), [("Questions:", False, 0.0)], row.texts("lines")
    for i, line in enumerate(lines):
        match = _QUESTION.fullmatch(line)
        require(match is not None, f"{row.where}: lines[{i}]: found {shown(line)}, expected a question and its answer")
        earned = 0.0 if correct and i == len(lines) - 1 else -1.0
        parts += [(match["question"], True, earned), (match["answer"], False, 0.0)]
    return parts, correct or len(lines) >= QUESTIONS


def _sale(row: Record, reward: str) -> tuple[list[Part], bool]:
    parts = [("Beginning of Conversation", False, 0.0)]
    for line in row.objects("lines"):
        role = line.choice("role", ("Buyer", *_DEALER))
        parts.append((line.text("text"), role in _DEALER, 0.0))
    sold = row.get("output") is not None
    if sold:
        last = max((i for i, (_, act, _) in enumerate(parts) if act), default=0)
        parts[last] = (*parts[last][:2], _earned(row, reward))
    return parts, sold


def _earned(row: Record, kind: str) -> float:
    """Return the dealer's reward for a dialogue of Car Dealer, by the kind "fancy" or "revenue".

    "fancy": the price / ((budget + list price) / 2); without a sale −(budget − list price) / list price. "revenue":
    the price / 1000.
    """
    output, buyer = row.inner("output"), row.inner("buyer_info")
    bought = _quietly(output).thumb("car_bought")
    price = output.number("buy_price") if bought and output.get("buy_price") is not None else None
    if kind == "revenue":
        return 0.0 if price is None else price / 1000
    listed, budget = output.number("msrp"), buyer.number("budget")
    require(listed > 0, f"{output.where}: msrp: found {listed:g}, expected a number above 0")
    if not bought:
        return (listed - budget) / listed
    return 0.0 if price is None else price / ((budget + listed) / 2)


# The fields that a layout has (the first not null) -> function (row, reward of Car Dealer) that returns the parts of
# the game, and whether it ended by itself.
_READERS: dict[tuple[str, ...], Callable[[Record, str], tuple[list[Part], bool | None]]] = {
    ("text_history",): _history,
    ("sequence",): _sequence,
    ("buyer_info",): _sale,
    ("lines", "correct"): _questions,
}


def _game(parts: Iterable[Part], done: bool, labels: Mapping[str, Any]) -> Trajectory:
    """Build a game from its texts; consecutive actions become one turn.

    Args:
      parts: for each text, (text, True if it is an action of the agent, its reward).
      done: True if the game ended by itself; False if it was cut.
    """
    turns: list[Turn] = []
    for text, act, reward in parts:
        text = text.rstrip("\n")
        if act and turns and turns[-1].role == "assistant":
            joined = f"{turns[-1].content} {text}"
            turns[-1] = replace(turns[-1], content=joined, reward=turns[-1].reward + reward)
        else:
            turns.append(Turn("assistant", text, reward=reward) if act else Turn("user", text))
    agent = [turn for turn in turns if turn.role == "assistant"]
    drop_if(not agent or not all(turn.content for turn in agent), "a game without an action, or with an empty one")
    return Trajectory(tuple(turns), terminated=done, source="lmrl-gym", labels=labels)


def _cut(game: Trajectory, max_steps: int | None, counts: Counter[str]) -> Trajectory:
    """Return the game with a group, and marked as not terminated if it was cut at max_steps.

    A game without a group gets a hash of its content as group. A game of at least `max_steps` actions was cut, unless
    its last action earned more than any other.

    Args:
      max_steps: number of actions after which games were cut; None = the logged `done` decides.
      counts: incremented for each game that was logged as done but was cut.
    """
    game = replace(game, group=game.group or content_key(game)[:16])
    *before, last = (turn.reward for turn in game.turns if turn.reward is not None)
    if not game.terminated or max_steps is None or len(before) + 1 < max_steps or last > max(before, default=0):
        return game
    counts["done, but cut at max_steps"] += 1
    return replace(game, terminated=False)
