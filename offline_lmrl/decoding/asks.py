"""What return is asked of each row of a session: given once, updated with every reward, told to the model in slots."""

import logging
from collections.abc import Sequence
from typing import Any

from offline_lmrl.data.conditioning import ASK_NAMES, Ids, ReturnTable, Slots, check_ask
from offline_lmrl.data.trajectory import Turn

SAID: set[tuple[float | str, ReturnTable]] = set()  # asks that a line has been logged for


class Asks:
    """The asked returns of a session's rows.

    Slots of turns that were sampled in this session stay as they were, so that caches are only extended; of a history
    that the session has not seen they follow from the ask and the rewards in it.

    Args:
      task: of all rows, where the scale has bins per task.
      asks: one per row: a number, a name of the data's returns, "auto", "auto:RUN" or "expert:κ" (the row is then
        given its value where `is_read` says so), or None for the null condition.
    Raises: InputError for an unknown ask, and for a task that is not in the training data.
    """

    def __init__(self, slots: Slots, task: str, asks: Sequence[float | str | None]):
        self.slots, self.task = slots, task
        for ask in asks:
            check_ask(ask)
        names = {ask for ask in asks if isinstance(ask, str) and ASK_NAMES.fullmatch(ask)}
        named = {ask: slots.scale.named_ask(ask, task) for ask in names}
        for ask in sorted(names):
            if line := slots.scale.asks_for_the_usual(ask, task):
                self._say_once(ask, line)
        self.asks = [named.get(ask, ask) for ask in asks]
        self.used: dict[int, list[float]] = {}  # returns asked for at each agent turn, the latest reply's last
        self.read: dict[int, list[tuple[str, str]]] = {}  # the history before that reply
        self.first: dict[int, dict[str, Any]] = {}

    def is_read(self, row: int, history: Sequence[Turn]) -> bool:
        """True if the coming turn's ask is to be read from heads: "expert:κ" before every turn, "auto" before the
        first that the session sees of a history; from then on rewards alone change it."""
        ask = self.asks[row]
        return isinstance(ask, str) and (ask.startswith("expert") or not self._continues(row, history))

    def _continues(self, row: int, history: Sequence[Turn]) -> bool:
        """True if the history is the one before the row's latest reply, with that reply and what came of it."""
        used, read = self.used.get(row, []), self.read.get(row, [])
        agent_turns = sum(turn.is_trainable for turn in history)
        return len(used) == agent_turns > 0 and [(turn.role, turn.content) for turn in history[: len(read)]] == read

    def before_reply(self, row: int, history: Sequence[Turn], value: float | None = None) -> list[Ids]:
        """Slots of all agent turns of the history and of the coming one, which the session remembers.

        Args:
          value: what an ask stands for here that `is_read`.
        """
        agent = [turn for turn in history if turn.is_trainable]
        if self.asks[row] is None:
            return [self.slots.null] * (len(agent) + 1)
        rewards = [turn.reward for turn in agent]
        used, continues = self.used.get(row, []), self._continues(row, history)
        if value is not None:
            asked = [*(used if continues else self.slots.backwards(value, rewards)), value]
        elif continues:
            asked = [*used, *self.slots.remaining(used[-1], rewards[-1:])[1:]]
        else:
            asked = self.slots.remaining(self.asks[row], rewards)
        self.used[row], self.read[row] = asked, [(turn.role, turn.content) for turn in history]
        self._note(row, asked[0], asked[-1])
        return [self.slots.ids(one, self.task) for one in asked]

    def _note(self, row: int, ask: float, now: float) -> None:
        """Keeps what the first reply of a row was asked for, and says once where the data do not reach so far."""
        if row in self.first:
            return
        scale, table, given = self.slots.scale, self.slots.scale.table(self.task), self.asks[row]
        clipped, used = scale.clipped(now, self.task), scale.bin_of(now, self.task)
        self.first[row] = {"ask": ask, "bin": used, "clipped": clipped}
        if clipped:
            found = f"{now:g} for {given}" if isinstance(given, str) else f"{now:g}"
            self._say_once(
                given,
                f"ask: found {found}, expected {table.least:g} to {table.most:g}, the returns in the training data; "
                f"the nearest bin, {used} of 0 to {len(table.counts) - 1}, is asked for",
            )

    def _say_once(self, ask: float | str, line: str) -> None:
        """Logs the line, unless one was logged for this ask of these returns."""
        key = (ask, self.slots.scale.table(self.task))
        if key not in SAID:
            SAID.add(key)
            logging.getLogger(__name__).warning(line)
