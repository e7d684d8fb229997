"""The requested return of each episode: set once, updated after every reward, and passed to the model as ids.

A session plays one batch of episodes; a row is the index of an episode in it. The ids that encode the return requested
for an agent turn (return ids: `ReturnTokens` in tokens/conditioning.py) come directly before the turn's opening, the
tokens that start the turn, such as a role header. Under the null condition no return is requested.

The tables below compare the requests. They show exact expected returns of sampled play, one column per training seed;
the last column is the mean difference from BC with its 95 % t interval over the seeds. Settings were tuned on other
seeds. The random walk (configs/walk/compare.yaml: bc, ilql, return_conditioned; the best return is −2.50), seeds 0 to
4:

    BC                                −7.33  −7.66  −7.63  −7.21  −7.35
    V before every turn               −9.97  −9.93 −10.00  −9.98  −9.95    −2.53 [−2.78, −2.28]
    V once, less what is earned       −8.30  −8.24  −8.39  −8.23  −8.32    −0.86 [−1.09, −0.63]
    best Q once (auto)                −7.13  −7.32  −7.25  −7.15  −7.21     0.22 [0.06, 0.39]
    best Q before every turn          −4.50  −4.53  −4.75  −4.53  −4.80     2.81 [2.54, 3.09]
    p90 once (the default)            −4.54  −4.58  −4.96  −5.15  −5.08     2.57 [2.06, 3.08]
    max once                          −4.08  −4.02  −4.40  −4.32  −4.47     3.17 [2.79, 3.56]

The fully observed maze (configs/maze/full.yaml: bc, value_model, dt; the best is −6.84), seeds 0 and 1, which are too
few for an interval, and seed 5, on which the kinds of request were explored:

    BC                                −80.4  −83.3  −83.2
    V before every turn               −87.2  −98.6  −93.4
    V once, less what is earned       −77.2  −71.8  −77.0
    best Q once (auto)                −77.4  −72.0  −77.1
    best Q before every turn          −87.5  −98.5  −93.4
    p90 once (the default)            −75.7  −72.2  −75.1
    max once                          −75.5  −72.1  −75.0

V is close to what the logs earn, so requesting V requests usual play; and if V is requested anew before every turn,
the request does not become more demanding after a bad turn. The best Q before every turn helps only if Q is accurate:
the maze's value_model is about 15 too low at the far starts. Therefore auto is the only request computed from values
that beat BC on all these seeds. p90, which needs no values, earned more on nearly all of them and is the default.
Negotiation has not been measured.
"""

import logging
from collections.abc import Sequence
from typing import Any

from offline_lmrl.logs.trajectory import Turn
from offline_lmrl.tokens.conditioning import ASK_NAMES, ReturnTable, ReturnTokens, check_ask
from offline_lmrl.tokens.windows import Ids

_WARNED: set[tuple[float | str, str, ReturnTable]] = set()  # request, kind and returns of each warning logged


class ReturnRequests:
    """The requested returns of a session's rows.

    The return ids of turns that were sampled in this session never change, so that caches need only be extended. For
    a history that the session has not seen, the return ids are computed from the request and the rewards in the
    history.

    Args:
      return_tokens: the token ids of each return bin and of the null condition.
      task: the task of all rows, for a model whose return bins differ between tasks.
      asks: the requested return of each row. None = the null condition. A number is in reward units. "max" or a
        percentile such as "p90" is one of the training returns. "auto" (the best Q), "auto:RUN" (the best Q of the
        run RUN) and "expert:κ" (`ReturnHeads.expert`) depend on the dialogue: the caller computes their value
        whenever `is_read` is True, and passes it to `before_reply`.
    Raises: InputError if a request is unknown, or if the task is not in the training data.
    """

    def __init__(self, return_tokens: ReturnTokens, task: str, asks: Sequence[float | str | None]):
        self.return_tokens, self.task = return_tokens, task
        for ask in asks:
            check_ask(ask)
        names = {ask for ask in asks if isinstance(ask, str) and ASK_NAMES.fullmatch(ask)}
        named = {ask: return_tokens.scale.named_ask(ask, task) for ask in names}
        for ask in sorted(names):
            if line := return_tokens.scale.asks_for_the_usual(ask, task):
                self._say_once(ask, "usual", line)
        self.asks = [named.get(ask, ask) for ask in asks]
        self.used: dict[int, list[float]] = {}  # per row, the return requested at each agent turn up to the latest
        self.read: dict[int, list[tuple[str, str]]] = {}  # per row, the history before its latest reply
        self.first: dict[int, dict[str, Any]] = {}

    def is_read(self, row: int, history: Sequence[Turn]) -> bool:
        """True if the caller must compute the value of the row's request before the next agent turn.

        This is so for "expert:κ" before every turn. For "auto" and "auto:RUN" it is so only if `history` does not
        continue the row's earlier turns in this session; if it does, the value changes only by the rewards earned.
        """
        ask = self.asks[row]
        return isinstance(ask, str) and (ask.startswith("expert") or not self._continues(row, history))

    def _continues(self, row: int, history: Sequence[Turn]) -> bool:
        """True if `history` is that of the row's latest reply, continued by one agent turn and the turns after it."""
        used, read = self.used.get(row, []), self.read.get(row, [])
        agent_turns = sum(turn.is_trainable for turn in history)
        return len(used) == agent_turns > 0 and [(turn.role, turn.content) for turn in history[: len(read)]] == read

    def before_reply(self, row: int, history: Sequence[Turn], value: float | None = None) -> list[Ids]:
        """Return the ids that encode the requested return of each agent turn in `history` and, last, of the next turn.

        The requested returns are stored, so that the next call for this row can continue them.

        Args:
          row: the row in the session.
          history: the turns before the next agent turn.
          value: the value of the request in reward units, if `is_read` is True for this row and history; else None.
        """
        agent = [turn for turn in history if turn.is_trainable]
        if self.asks[row] is None:
            return [self.return_tokens.null] * (len(agent) + 1)
        rewards = [turn.reward for turn in agent]
        used, continues = self.used.get(row, []), self._continues(row, history)
        if value is not None:
            asked = [*(used if continues else self.return_tokens.backwards(value, rewards)), value]
        elif continues:
            asked = [*used, *self.return_tokens.remaining(used[-1], rewards[-1:])[1:]]
        else:
            asked = self.return_tokens.remaining(self.asks[row], rewards)
        self.used[row], self.read[row] = asked, [(turn.role, turn.content) for turn in history]
        self._note(row, asked[0], asked[-1])
        return [self.return_tokens.ids(one, self.task) for one in asked]

    def _note(self, row: int, ask: float, now: float) -> None:
        """Record the return requested for a row's first reply; warn once if it is outside the training range.

        Later calls for the same row do nothing.

        Args:
          row: the row in the session.
          ask: the return requested at the first agent turn of the history, in reward units.
          now: the return requested at the next agent turn, in reward units.
        """
        if row in self.first:
            return
        scale, table, given = self.return_tokens.scale, self.return_tokens.scale.table(self.task), self.asks[row]
        clipped, used = scale.clipped(now, self.task), scale.bin_of(now, self.task)
        self.first[row] = {"ask": ask, "bin": used, "clipped": clipped}
        if clipped:
            found = f"{now:g} for {given}" if isinstance(given, str) else f"{now:g}"
            self._say_once(
                given,
                "clipped",
                f"ask: found {found}, expected {table.least:g} to {table.most:g}, the returns in the training data; "
                f"the nearest bin, {used} of 0 to {len(table.counts) - 1}, is requested instead",
            )

    def _say_once(self, ask: float | str, kind: str, line: str) -> None:
        """Log `line` as a warning, unless one of the same kind, request and training returns was logged before."""
        key = (ask, kind, self.return_tokens.scale.table(self.task))
        if key not in _WARNED:
            _WARNED.add(key)
            logging.getLogger(__name__).warning(line)
