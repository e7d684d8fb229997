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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from data_prep import fields, trajectories
from data_prep.comparisons import import_rows
from offline_lmrl.errors import InputError
from offline_lmrl.logs.forms import Drop, extra_columns, thumb
from offline_lmrl.logs.io import content_key
from offline_lmrl.logs.trajectory import Trajectory, Turn, shown

SPLITS = {"eval": "validation", "val": "validation"}
QUESTIONS = 20
_DEALER = ("Dealer", "Seller")
_USED = {"text_history", "rewards", "dones", "sequence", "reward", "done", "lines"}
_QUESTION = re.compile(r"(?P<question>.*\?) (?P<answer>.*)", re.DOTALL)
_LAYOUTS = (
    "a list of objects with state, action, reward and done; or from_state, action, reward and done; or text_history, "
    "rewards and dones; or sequence, reward and done; or lines with correct or buyer_info"
)


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


def prepare(
    input: str | Path,
    output: str | Path,
    *,
    reward: Literal["fancy", "revenue"] = "fancy",
    max_steps: int | None = None,
    validation: float = 0.1,
    group: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Read games and write train.jsonl, validation.jsonl and report.json.

    Args:
      input: a published file, or a folder with a train and an eval file.
      output: folder to write to; created if needed.
      reward: the reward in Car Dealer: fancy (the price over the mean of budget and list price) or revenue (the price
        / 1000).
      max_steps: number of actions after which a game was cut, whatever its `done` is. A game whose last action earned
        more than any other ended by itself. null = `done` decides.
      validation: share of the games that goes to validation if the source has no validation split.
      group: column by which rows are kept together in one split; null = each game is its own group.
      seed: random seed of the split.
    Returns: the content of report.json; `games` counts moves, games joined from them, and games cut.
    Raises: InputError for a max_steps below 1, if nothing can be read or the output cannot be written.
    """
    if max_steps is not None and max_steps < 1:
        raise InputError(f"max_steps: found {max_steps}, expected a number from 1 up, or null")

    def read(row: Mapping | list, where: str, counts: Counter[str]) -> Trajectory | Move:
        return read_game(row, where, counts, reward)

    found, report = import_rows(input, read, group, lists=True)
    counts: Counter[str] = Counter()
    made: dict[str, list[Trajectory]] = {}
    for split, rows in found.items():
        games = [row for row in rows if isinstance(row, Trajectory)]
        games += join((row for row in rows if isinstance(row, Move)), counts)
        made.setdefault(SPLITS.get(split, split), []).extend(_cut(game, max_steps, counts) for game in games)
    return trajectories.publish(made, output, {**report, "games": dict(counts)}, validation, seed)


def read_game(row: Mapping | list, where: str, counts: Counter[str], reward: str = "fancy") -> Trajectory | Move:
    """Return the game of one row, or, if the row is only one move, this move.

    Args:
      row: in one of the layouts that the module describes.
      where: "file:row", the start of error messages.
      counts: incremented for each repair, under a key that describes it.
      reward: the reward in Car Dealer, "fancy" or "revenue"; see `prepare`.
    Raises: Drop if the row cannot be used, InputError for values of the wrong type.
    """
    if isinstance(row, list):
        moves = [_move(move, f"{where}: moves[{i}]", i) for i, move in enumerate(row)]
        if not moves:
            raise Drop("a game without a move")
        return _moves(moves)
    if row.get("action") is not None:
        return _move(row, where, int(where.rpartition(":")[2]))
    if row.get("text_history") is not None:
        parts = _history(row, where)
        done = any([thumb(value, "dones", where, Counter()) for value in fields.items(row, "dones", where)])
    elif row.get("sequence") is not None:
        parts, done = _sequence(row, where), thumb(row.get("done"), "done", where, counts)
    elif row.get("buyer_info") is not None:
        parts, done = _sale(row, where, reward), row.get("output") is not None
    elif row.get("lines") is not None and "correct" in row:
        correct = thumb(row["correct"], "correct", where, counts)
        parts = _questions(row, correct, where)
        done = correct or len(parts) // 2 >= QUESTIONS
    else:
        raise InputError(f"{where}: fields: found {shown(list(row))}, expected {_LAYOUTS}")
    if done is None:
        raise Drop("a game without a value of done")
    labels = extra_columns(row, {name for name in row if row[name] is not None} - _USED, counts)
    return _game(parts, done, labels)


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


def _move(record: Any, where: str, line: int) -> Move:
    if not isinstance(record, Mapping):
        raise InputError(f"{where}: found {shown(record)}, expected an object with state, action, reward and done")
    spelt = record.get("state") is None
    state, action = (fields.text(record, name, where) for name in ("from_state" if spelt else "state", "action"))
    if spelt:
        state, action = " ".join(state), " ".join(action)
    done = thumb(record.get("done"), "done", where, Counter())
    if done is None:
        raise InputError(f"{where}: done: found none, expected true or false")
    return Move(state, action, fields.number(record, "reward", where), done, line)


def _moves(moves: Sequence[Move]) -> Trajectory:
    parts = [part for move in moves for part in ((move.state, False, 0.0), (move.action, True, move.reward))]
    return replace(_game(parts, moves[-1].done, {}), group=moves[0].group)


def _history(row: Mapping, where: str) -> list[tuple[str, bool, float]]:
    texts = _texts(row, "text_history", where)
    rewards = _numbers(row, "rewards", where)
    if len(rewards) == len(texts) // 2:  # one reward per action
        rewards = [0.0 if i % 2 == 0 else rewards[i // 2] for i in range(len(texts))]
    return _parts(texts, [i % 2 == 1 for i in range(len(texts))], rewards, "rewards", where)


def _sequence(row: Mapping, where: str) -> list[tuple[str, bool, float]]:
    texts, acts = [], []
    for i, part in enumerate(fields.items(row, "sequence", where)):
        here = f"sequence[{i}]"
        if not isinstance(part, list | tuple) or len(part) != 2:
            raise InputError(f"{where}: {here}: found {shown(part)}, expected a text and whether it is an action")
        texts.append(fields.text({here: part[0]}, here, where))
        acts.append(thumb(part[1], here, where, Counter()))
    rewards = _numbers(row, "reward", where)
    # Some logs have no reward for the first text.
    return _parts(texts, acts, [0.0] * (len(texts) - len(rewards) == 1) + rewards, "reward", where)


def _parts(
    texts: Sequence[str], acts: Sequence[bool | None], rewards: Sequence[float], name: str, where: str
) -> list[tuple[str, bool, float]]:
    if len(rewards) != len(texts):
        raise InputError(f"{where}: {name}: found {len(rewards)} for {len(texts)} texts, expected one for each text")
    if any(reward and not act for act, reward in zip(acts, rewards, strict=True)):
        raise InputError(f"{where}: {name}: found a reward on a text that is not an action, expected 0 there")
    return list(zip(texts, map(bool, acts), rewards, strict=True))


def _questions(row: Mapping, correct: bool | None, where: str) -> list[tuple[str, bool, float]]:
    parts = [("Questions:", False, 0.0)]
    lines = _texts(row, "lines", where)
    for i, line in enumerate(lines):
        match = _QUESTION.fullmatch(line)
        if match is None:
            raise InputError(f"{where}: lines[{i}]: found {shown(line)}, expected a question and its answer")
        earned = 0.0 if correct and i == len(lines) - 1 else -1.0
        parts += [(match["question"], True, earned), (match["answer"], False, 0.0)]
    return parts


def _sale(row: Mapping, where: str, kind: str) -> list[tuple[str, bool, float]]:
    parts = [("Beginning of Conversation", False, 0.0)]
    for i, line in enumerate(fields.objects(row, "lines", where)):
        here = f"{where}: lines[{i}]"
        role = fields.text(line, "role", here)
        if role not in ("Buyer", *_DEALER):
            raise InputError(f"{here}: role: found {shown(role)}, expected one of Buyer, {', '.join(_DEALER)}")
        parts.append((fields.text(line, "text", here), role in _DEALER, 0.0))
    if row.get("output") is not None:
        last = max((i for i, (_, act, _) in enumerate(parts) if act), default=0)
        parts[last] = (*parts[last][:2], _earned(row, where, kind))
    return parts


def _earned(row: Mapping, where: str, kind: str) -> float:
    """Return the dealer's reward for a dialogue of Car Dealer, by the kind "fancy" or "revenue".

    "fancy": the price / ((budget + list price) / 2); without a sale −(budget − list price) / list price. "revenue":
    the price / 1000.
    """
    output, buyer = fields.inner(row, "output", where), fields.inner(row, "buyer_info", where)
    here = f"{where}: output"
    bought = thumb(output.get("car_bought"), "car_bought", here, Counter())
    price = fields.number(output, "buy_price", here) if bought and output.get("buy_price") is not None else None
    if kind == "revenue":
        return 0.0 if price is None else price / 1000
    listed, budget = fields.number(output, "msrp", here), fields.number(buyer, "budget", f"{where}: buyer_info")
    if listed <= 0:
        raise InputError(f"{here}: msrp: found {listed:g}, expected a number above 0")
    if not bought:
        return (listed - budget) / listed
    return 0.0 if price is None else price / ((budget + listed) / 2)


def _game(parts: Iterable[tuple[str, bool, float]], done: bool, labels: Mapping[str, Any]) -> Trajectory:
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
    if not agent or not all(turn.content for turn in agent):
        raise Drop("a game without an action, or with an empty one")
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


def _texts(row: Mapping, name: str, where: str) -> list[str]:
    return [
        fields.text({f"{name}[{i}]": text}, f"{name}[{i}]", where)
        for i, text in enumerate(fields.items(row, name, where))
    ]


def _numbers(row: Mapping, name: str, where: str) -> list[float]:
    return [
        fields.number({f"{name}[{i}]": value}, f"{name}[{i}]", where)
        for i, value in enumerate(fields.items(row, name, where))
    ]
