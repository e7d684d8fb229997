"""What return is asked of each row of a session: given once, updated with every reward, told to the model in slots.

What earned most: exact expected returns of sampled play, one per training seed; differences from BC are means with a
95 % t interval over the seeds. Settings were tuned on other seeds. The random walk (configs/walk/compare.yaml: bc,
ilql, return_conditioned; the best return is −2.50), seeds 0 to 4:

    BC                                −7.33  −7.66  −7.63  −7.21  −7.35
    V before every turn               −9.97  −9.93 −10.00  −9.98  −9.95    −2.53 [−2.78, −2.28]
    V once, less what is earned       −8.30  −8.24  −8.39  −8.23  −8.32    −0.86 [−1.09, −0.63]
    best Q once (auto)                −7.13  −7.32  −7.25  −7.15  −7.21     0.22 [0.06, 0.39]
    best Q before every turn          −4.50  −4.53  −4.75  −4.53  −4.80     2.81 [2.54, 3.09]
    p90 once (the default)            −4.54  −4.58  −4.96  −5.15  −5.08     2.57 [2.06, 3.08]
    max once                          −4.08  −4.02  −4.40  −4.32  −4.47     3.17 [2.79, 3.56]

The fully observed maze (configs/maze/full.yaml: bc, critic, dt; the best is −6.84), seeds 0 and 1, too few for
an interval, and 5, on which kinds of ask were explored:

    BC                                −80.4  −83.3  −83.2
    V before every turn               −87.2  −98.6  −93.4
    V once, less what is earned       −77.2  −71.8  −77.0
    best Q once (auto)                −77.4  −72.0  −77.1
    best Q before every turn          −87.5  −98.5  −93.4
    p90 once (the default)            −75.7  −72.2  −75.1
    max once                          −75.5  −72.1  −75.0

V lies near what the logs earn, so asking for it is asking for usual play, and an ask of V that is renewed before every
turn never grows urgent. Renewed, the best Q helps only where Q is near the truth: the maze's critic is some 15 too low
at the far starts. So auto is the one ask from values that was above BC on all these seeds. p90, which needs no values,
earned more on nearly all of them and is the default. Negotiations are not measured.
"""

import logging
from collections.abc import Sequence
from typing import Any

from offline_lmrl.data.conditioning import ASK_NAMES, Ids, ReturnTable, Slots, check_ask
from offline_lmrl.data.trajectory import Turn

SAID: set[tuple[float | str, str, ReturnTable]] = set()  # asks, and the kinds of line that have been logged for them


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
                self._say_once(ask, "usual", line)
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
                "clipped",
                f"ask: found {found}, expected {table.least:g} to {table.most:g}, the returns in the training data; "
                f"the nearest bin, {used} of 0 to {len(table.counts) - 1}, is asked for",
            )

    def _say_once(self, ask: float | str, kind: str, line: str) -> None:
        """Logs the line, unless one of its kind was logged for this ask of these returns."""
        key = (ask, kind, self.slots.scale.table(self.task))
        if key not in SAID:
            SAID.add(key)
            logging.getLogger(__name__).warning(line)
