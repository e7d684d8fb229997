"""Cut one trajectory into windows of tokens and steps: the index arithmetic of rewards, next states and cut ends."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from itertools import accumulate
from typing import NamedTuple

from offline_lmrl.logs.scale import RewardScale
from offline_lmrl.logs.trajectory import Trajectory, leading_system_turns, with_own_token_ids
from offline_lmrl.tokens.rendering import Renderer
from offline_lmrl.tokens.windows import Span, WindowRule, answered_ids, cut_windows, first_visible

ReturnIdsFor = Callable[[Trajectory], Sequence[tuple[int, ...]]]
RE_ENCODED = "trajectories encoded from text: their ids are from another tokenizer, template or rendering scheme"


@dataclass(frozen=True)
class StepRule:
    """The rule that assigns rewards, discounts and next states to tokens.

    discount_per_token: γ of every step, from one action token to the next.
    discount_per_turn: an extra factor on the step that closes a turn; that step's discount is the product of both.
    bootstrap_from_turn: False: the next state of a token is the state of the next token. True: it is the first state
      of the agent's next turn, and the turn's reward is brought forward (an n-step target to the end of the turn).
    """

    discount_per_token: float = 1.0
    discount_per_turn: float = 1.0
    bootstrap_from_turn: bool = False

    @property
    def discounted(self) -> bool:
        """True if a reward counts for less the later it is paid."""
        return min(self.discount_per_token, self.discount_per_turn) < 1


class RowKind(IntEnum):
    """The row of a batch that holds a state."""

    OWN = 0  # the window's own row
    NEXT = 1  # the row up to the agent's next turn
    END = 2  # the row up to the end of a cut log


class Step(NamedTuple):
    """One action token; `ActionSteps` (batching.py) explains the fields. next_row_kind, end_row_kind: a RowKind."""

    state: int
    action: int
    reward: float
    discount: float
    next_row_kind: int
    next_state: int
    bootstrap: float
    has_target: bool
    closes_turn: bool
    turn: int
    open_state: int
    return_to_go: float
    end_row_kind: int
    end_state: int
    end_discount: float


class Window(NamedTuple):
    """A row of tokens, the steps that are trained in it, and up to two rows in which only V is computed.

    input_ids: the row that holds the trained turns.
    next_ids: the row up to the agent's next turn, whose last state gives V(s′); empty where input_ids holds that
      state.
    end_ids: the row whose last state gives the V that closes a cut log; empty where another row holds that state, or
      the episode terminated.
    environment: the states in input_ids whose next token belongs to the environment's reply to a turn that is trained
      there; empty unless the encoder keeps replies.
    steps: one per trained action token.
    """

    input_ids: list[int]
    next_ids: list[int]
    end_ids: list[int]
    environment: list[int]
    steps: list[Step]


class EpisodeEncoder:
    """An encoder that cuts trajectories into windows.

    The renderer, window rule and reward scale must be those of the policy that plays later.

    Args:
      step_rule: the rule for rewards, discounts and next states.
      return_ids_for: a function of the trajectory that returns the ids to put before the opening of each agent turn,
        and before the one that would follow the log (`ReturnTokens` in tokens/conditioning.py has two such methods);
        None = no ids.
      replies: True: a window also holds the environment's reply to its last agent turn, as training targets for a
        model of the environment. The text after the last agent turn of a finished episode is not a reply: nobody acts
        on it.
    """

    def __init__(
        self,
        renderer: Renderer,
        window: WindowRule,
        step_rule: StepRule,
        scale: RewardScale,
        return_ids_for: ReturnIdsFor | None = None,
        *,
        replies: bool = False,
    ):
        self.renderer, self.window, self.step_rule, self.scale = renderer, window, step_rule, scale
        self.return_ids_for = return_ids_for
        self.replies = replies

    def encode(self, trajectory: Trajectory, counts: Counter[str], few_shot: tuple[int, ...] = ()) -> Iterator[Window]:
        """Yield all windows of a trajectory.

        Args:
          counts: updated in place with the number of dropped items and of steps without a target, by reason.
          few_shot: ids of the few-shot demonstrations, put after the preamble in every window (tokens/few_shot.py).
        """
        episode = _Episode(self, trajectory, few_shot)
        counts.update(self.renderer.printer.faults_in(trajectory.turns))
        counts[RE_ENCODED] += trajectory.labels.get("tokenizer") != self.renderer.fingerprint and any(
            turn.token_ids is not None for turn in trajectory.turns
        )
        counts["agent turns dropped: longer than max_length"] += len(episode.dropped)
        if not episode.spans:
            counts["trajectories without an agent turn that fits into max_length"] += 1
            return
        counts["last actions without a target: the log was cut after a finished agent turn"] += (
            episode.end == "finished"
        )
        counts["windows that lost old turns to max_length"] += sum(map(episode.lost_to_length, episode.spans))
        counts["replies of the environment left out: longer than the space that max_length leaves"] += episode.left_out
        for span in episode.spans:
            yield episode.window(span)


class _Episode:
    # The intermediate results for one trajectory: encoded turns, spans, and returns after each turn.

    def __init__(self, encoder: EpisodeEncoder, trajectory: Trajectory, few_shot: tuple[int, ...]):
        self.renderer, self.rule, self.step_rule = encoder.renderer, encoder.window, encoder.step_rule
        turns = with_own_token_ids(trajectory, encoder.renderer.fingerprint).turns
        agent = [turn.is_trainable for turn in turns]
        self.agent_turns = [index for index, is_agent in enumerate(agent) if is_agent]
        given = encoder.return_ids_for
        return_ids = given(trajectory) if given else [()] * (len(self.agent_turns) + 1)
        # The turn that would follow the log has the key len(turns).
        self.return_ids = dict(zip([*self.agent_turns, len(turns)], return_ids, strict=True))
        self.turns = turns
        self.encoded = [
            turn.with_prefix(self.return_ids.get(index, ()))
            for index, turn in enumerate(encoder.renderer.encode(turns))
        ]
        self.lengths = [turn.longest for turn in self.encoded]
        self.reward = [encoder.scale.apply(turn.reward) for turn in turns]
        self.from_environment = [turn.role != "assistant" for turn in turns]
        self.head = leading_system_turns(turns)
        self.preamble = (*self.renderer.preamble_of(turns), *few_shot)
        self.fixed = len(self.preamble) + sum(self.lengths[: self.head])
        self.left_out = 0
        self.answered = self._replies(trajectory.terminated) if encoder.replies else {}
        stays = [turn.stays for turn in self.encoded]
        self.spans, self.dropped = cut_windows(
            self.rule, self.lengths, agent, stays, self.head, self.fixed, self.answered
        )
        self.length = len(turns)
        self.end = self._kind_of_end(trajectory.terminated)
        self.after = self._returns_after_turns() if self.spans else {}

    def _replies(self, terminated: bool) -> dict[int, int]:
        """Return, per agent turn, the index after the last turn of the environment's reply to it.

        A turn without a reply maps to the index after itself; the last agent turn of a terminated episode never has
        one. A turn that does not fit in a window together with its reply is left out.
        """
        answered = {}
        for index, following in zip(self.agent_turns, [*self.agent_turns[1:], None], strict=True):
            stop = index + 1
            last = following or (stop if terminated else len(self.turns))
            while stop < last and self.from_environment[stop]:
                stop += 1
            needed = self.fixed + sum(self.lengths[index:stop])
            if needed <= self.rule.max_length:
                answered[index] = stop
            else:  # count only replies of turns that fit alone; the other turns are counted as dropped
                self.left_out += self.fixed + self.lengths[index] <= self.rule.max_length
        return answered

    def _kind_of_end(self, terminated: bool) -> str:
        """Return "terminated", or how the log was cut.

        "observation": after a turn of another speaker; "finished": after a complete agent turn; "unfinished": inside
        an agent turn.
        """
        if terminated:
            return "terminated"
        last = self.agent_turns[-1] if self.agent_turns else -1
        if last < self.length - 1:
            return "observation"
        if last in self.dropped:  # V cannot be computed inside a turn that does not fit, so end the log before it
            self.agent_turns.pop()
            self.length = last
            return "observation"
        return "finished" if self.encoded[last].closed else "unfinished"

    def lost_to_length(self, span: Span) -> bool:
        """True if max_length, rather than context, determined where the window starts."""
        roomy = first_visible(replace(self.rule, max_length=10**9), self.lengths, span.stop - 1, self.head, self.fixed)
        return span.first != roomy

    def _reply_length(self, index: int) -> int:
        return sum(self.lengths[index + 1 : self.answered.get(index, index + 1)])

    def _actions(self, index: int) -> int:
        return len(self.encoded[index].actions)

    def _returns_after_turns(self) -> dict[int, tuple[float, float]]:
        """Map every agent turn to the discounted return after it and the discount of the V that closes a cut log."""
        after = {}
        total, factor = 0.0, float(self.end != "terminated")
        for index in reversed(self.agent_turns):
            after[index] = (total, factor)
            total, factor = self._return_from(index, 0, total, factor)
        return after

    def _return_from(self, index: int, k: int, total: float, factor: float) -> tuple[float, float]:
        """Return the discounted return from action k of a turn and the discount of the V that closes the log.

        Args:
          total: the discounted return after the turn.
          factor: the discount of the closing V as seen from after the turn.
        """
        gamma, left = self.step_rule.discount_per_token, self._actions(index) - k
        if self.end == "finished" and index == self.agent_turns[-1]:
            # V at the state of the last action closes the log, so the reward of that action must not count as well.
            return 0.0, gamma ** (left - 1)
        # The reward is paid at the last action, left − 1 steps after action k, and the next turn opens one step later.
        later = gamma**left * self._turn_discount(index)
        return gamma ** (left - 1) * self.reward[index] + later * total, later * factor

    def _turn_discount(self, index: int) -> float:
        # discount_per_turn belongs to the action that closes a turn, which an unfinished turn does not have.
        inside = self.end == "unfinished" and index == self.agent_turns[-1]
        return 1.0 if inside else self.step_rule.discount_per_turn

    def _tokens(self, first: int, stop: int) -> list[int]:
        """Return the ids of preamble, demonstrations, leading system turns and turns first..stop−1 in history form."""
        pieces = self.renderer.window_ids(self.turns, self.encoded, first, stop, live=False)
        return [*self.preamble, *(token for ids in pieces for token in ids)]

    def _row(self, span: Span) -> tuple[list[int], dict[int, int]]:
        """Return the ids of a window and, per turn index, the state before the first token that the speaker chose."""
        if span.answered > span.stop:
            pieces = answered_ids(self.renderer, self.turns, self.encoded, span.first, span.stop, span.answered)
        else:
            pieces = self.renderer.window_ids(self.turns, self.encoded, span.first, span.stop, live=True)
        ids = [*self.preamble, *(token for piece in pieces for token in piece)]
        places = [*range(self.head), *range(max(span.first, self.head), span.answered)]
        ends = accumulate(map(len, pieces), initial=len(self.preamble))
        # `ends` begins with the end of the preamble, so its value at i is where piece i starts. The first action is at
        # the same offset in every form of a turn, except that the opening directly after system turns may be shorter
        # or longer. Therefore the offset counts from the end of the piece for all speakers but the agent.
        starts = (
            end + len(piece) - len(self.encoded[i].ids) if self.from_environment[i] else end
            for i, piece, end in zip(places, pieces, ends, strict=False)
        )
        # The state of a token is the column before it, hence − 1.
        return ids, {i: start + self.encoded[i].action_start - 1 for i, start in zip(places, starts, strict=True)}

    def _opening(self, index: int) -> tuple[int, ...]:
        """Return the opening ids of the agent's turn `index`: one of the log, or the one that would follow it."""
        if index < self.length and index not in self.dropped:
            return self.encoded[index].ids[: self.encoded[index].action_start]
        return (*self.return_ids[index], *self.renderer.opening_after(self.turns[:index]))

    def _visible_at(self, index: int) -> int:
        """Return the first turn that the agent sees at `index`: a turn of the log or the one that would follow it."""
        if index < self.length and index not in self.dropped:
            lengths, reply = self.lengths, self._reply_length(index)
        else:  # only the opening is read there
            lengths, reply = [*self.lengths[:index], len(self._opening(index))], 0
        first = first_visible(self.rule, lengths, index, self.head, self.fixed, reply)
        assert first is not None  # a whole agent turn fits in a window, so its opening does too
        return first

    def window(self, span: Span) -> Window:
        input_ids, state = self._row(span)
        inside = [index for index in self.agent_turns if span.credited <= index < span.stop]
        next_ids, end_ids = [], []
        last = inside[-1]
        upcoming = next((index for index in self.agent_turns if index > last), self.length)
        follows = (RowKind.OWN, 0)
        if upcoming < self.length or self.end == "observation":
            first = self._visible_at(upcoming)
            opened = [*self._tokens(first, upcoming), *self._opening(upcoming)]
            # If the next turn's context repeats this row up to the closing action (or up to the end of the reply), the
            # row is extended to hold the next opening as well. Otherwise V(s′) needs a row of its own.
            kept = state[last] + self._actions(last) if span.answered == span.stop else len(input_ids)
            if first == span.first and opened[:kept] == input_ids[:kept]:
                input_ids, follows = opened, (RowKind.OWN, len(opened) - 1)
            else:
                next_ids, follows = opened, (RowKind.NEXT, len(opened) - 1)
        end = follows
        # The log ends after this window: the V that closes it needs its own row, unless the episode terminated.
        if upcoming < self.length:
            end_ids = self._end_ids()
            end = (RowKind.END, len(end_ids) - 1) if end_ids else (RowKind.OWN, 0)
        elif self.end in ("finished", "unfinished"):
            end = (RowKind.OWN, state[last] + self._actions(last) - (self.end == "finished"))
        steps = []
        for index, after in zip(inside, [*inside[1:], None], strict=True):
            place = follows if after is None else (RowKind.OWN, state[after])
            steps += self._steps(state[index], index, place, end)
        # A reply is a target only in the window that trains the turn it answers: its content and closing, not its
        # opening, which the environment does not choose.
        replies = [turn for index in inside for turn in range(index + 1, self.answered.get(index, index + 1))]
        environment = [state[turn] + k for turn in replies for k in range(self._actions(turn))]
        return Window(input_ids, next_ids, end_ids, environment, steps)

    def _end_ids(self) -> list[int]:
        """Return the row whose last state gives the V that closes the log, for windows before the last one."""
        if self.end == "terminated":
            return []
        last = self.agent_turns[-1]
        if self.end == "observation":
            return [*self._tokens(self._visible_at(self.length), self.length), *self._opening(self.length)]
        # After a finished turn no later state was logged, so V is taken at the state of the closing action.
        read = self.encoded[last].action_stop - (self.end == "finished")
        return [*self._tokens(self._visible_at(last), last), *self.encoded[last].ids[:read]]

    def _steps(self, opening: int, index: int, follows: tuple[int, int], end: tuple[int, int]) -> Iterator[Step]:
        # opening: the state before the turn's first action. follows: kind of row (own or next) and column of the first
        # state of the agent's next turn. end: kind of row and column of the state whose V closes a cut log.
        actions, gamma = self.encoded[index].actions, self.step_rule.discount_per_token
        n = len(actions)
        is_last = index == self.agent_turns[-1]
        bootstrap, turn_discount = 1.0, self._turn_discount(index)
        reward, reach = self.reward[index], n  # the state `follows` is `reach` actions after the opening
        if is_last and self.end == "terminated":
            bootstrap = 0.0
        elif is_last and self.end == "unfinished":
            follows = (RowKind.OWN, opening + n)
        elif is_last and self.end == "finished":
            # No state after the closing action was logged: V is taken before it, and it gets no target itself.
            follows, reward, reach, turn_discount = (RowKind.OWN, opening + n - 1), 0.0, n - 1, 1.0
        for k in range(n):
            has_target = k < reach
            # The last action, and with bootstrap_from_turn every action, bootstraps from the state `follows`.
            if has_target and (self.step_rule.bootstrap_from_turn or k == reach - 1):
                left = reach - k
                paid, discount = gamma ** (left - 1) * reward, gamma**left * turn_discount
                place, counts = follows, bootstrap
            else:
                paid, discount, place, counts = 0.0, gamma, (RowKind.OWN, opening + k + 1), 1.0
            total, factor = self._return_from(index, k, *self.after[index]) if has_target else (0.0, 0.0)
            yield Step(
                state=opening + k,
                action=actions[k],
                reward=paid if has_target else 0.0,
                discount=discount,
                next_row_kind=place[0],
                next_state=place[1],
                bootstrap=counts,
                has_target=has_target,
                closes_turn=k == n - 1 and not (is_last and self.end == "unfinished"),
                turn=index,
                open_state=opening,
                return_to_go=total,
                end_row_kind=end[0],
                end_state=end[1],
                end_discount=factor,
            )
