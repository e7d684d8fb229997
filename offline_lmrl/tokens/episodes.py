"""Cut one trajectory into windows of tokens and steps: the index arithmetic of rewards, next states and cut ends.

A window holds the turns that the policy sees before a reply, and the reply (tokens/windows.py). A step is one token
that the agent chose. A state is a position in a row of tokens: the model has read the tokens up to and including that
position. A log is cut if it ends before the episode does (`Trajectory.terminated` is False); V of the state at its
end, the closing V, then replaces the rewards that were not logged.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import accumulate
from typing import Literal, NamedTuple

from offline_lmrl.logs.scale import RewardScale
from offline_lmrl.logs.trajectory import Trajectory, with_own_token_ids
from offline_lmrl.tokens.rendering import Renderer
from offline_lmrl.tokens.windows import EncodedDialogue, Ids, Span, WindowRule, agent_turns, cut_windows

ReturnIdsFor = Callable[[Trajectory], Sequence[Ids]]
RE_ENCODED = "trajectories encoded from text: their ids are from another tokenizer, template or rendering scheme"


@dataclass(frozen=True)
class StepRule:
    """The rule that assigns rewards, discounts and next states to tokens.

    discount_per_token: γ of every step, from one action token to the next.
    discount_per_turn: an extra factor on the step that closes a turn; that step's discount is the product of both.
    bootstrap_from_turn: False: the next state of a token is the state of the next token. True: it is the first state
      of the agent's next turn, and every token of a turn gets the turn's reward, discounted by the tokens in between
      (an n-step target to the end of the turn).
    """

    discount_per_token: float = 1.0
    discount_per_turn: float = 1.0
    bootstrap_from_turn: bool = False

    @property
    def discounted(self) -> bool:
        """True if a reward counts for less the later it is paid."""
        return min(self.discount_per_token, self.discount_per_turn) < 1


class RowKind(IntEnum):
    """The kind of row that holds a state; a window has up to three rows (`Window`)."""

    OWN = 0  # input_ids, the row with the trained turns
    NEXT = 1  # next_ids, the row up to the opening of the agent's next turn
    END = 2  # end_ids, the row up to the end of a cut log


class Step(NamedTuple):
    """A token that the agent chose, with what is learnt at it. `ActionSteps` (batching.py) explains the other fields.

    next_row_kind: the kind (`RowKind`) of the row that holds the next state; a batch turns it into `next_row`.
    end_row_kind: the kind of the row that holds the state of the closing V; a batch turns it into `end_row`.
    """

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
    """A row of tokens with the steps that are trained in it, and up to two further rows in which only V is computed.

    input_ids: the row that holds the trained turns.
    next_ids: the row up to and including the opening of the agent's next turn; at its last position, V is the value of
      the next state after the window's last turn. Empty if input_ids holds that state, or if the log has none.
    end_ids: for a window before the last one of a cut log, the row whose last position gives the closing V. Empty for
      the last window, whose other rows hold that state, and if the episode terminated.
    environment: the positions in input_ids before each token of the environment's replies to the turns trained here;
      empty unless the encoder was made with `replies`.
    steps: one per trained action token.
    """

    input_ids: list[int]
    next_ids: list[int]
    end_ids: list[int]
    environment: list[int]
    steps: list[Step]


@dataclass(frozen=True)
class EpisodeEncoder:
    """An encoder that cuts trajectories into windows.

    Args:
      renderer: converts turns to tokens. It, `window` and `scale` must be those of the policy that plays later.
      window: the limits of a window.
      step_rule: the rule for rewards, discounts and next states.
      scale: the transform of logged rewards to the units in which Q and V are learnt.
      return_ids_for: a function of a trajectory that returns, for each agent turn and for the turn that would follow
        the log, the ids to put before its opening (`ReturnTokens.of_log` and `.nulls` in tokens/conditioning.py are
        such functions); None = no ids.
      replies: True: a window also holds the environment's reply to its last agent turn, as training targets for a
        model of the environment. The text after the last agent turn of a finished episode is not a reply: nobody acts
        on it.
    """

    renderer: Renderer
    window: WindowRule
    step_rule: StepRule
    scale: RewardScale
    return_ids_for: ReturnIdsFor | None = None
    replies: bool = False

    def encode(self, trajectory: Trajectory, counts: Counter[str], few_shot: Ids = ()) -> Iterator[Window]:
        """Yield all windows of a trajectory.

        Args:
          counts: a Counter, updated in place: message -> number of dropped turns, steps without a target or other
            faults.
          few_shot: ids of the few-shot demonstrations, put after the preamble in every window (tokens/few_shot.py).
        """
        episode = _Episode(self, trajectory, few_shot)
        counts.update(self.renderer.check.faults_in(trajectory.turns))
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
        steps = _TurnSteps(self, episode)
        for span in episode.spans:
            yield episode.window(span, steps)


class _Episode:
    # One trajectory as tokens: the turns of each window (`spans`), and the rows in which states are.

    def __init__(self, encoder: EpisodeEncoder, trajectory: Trajectory, few_shot: Ids):
        turns = with_own_token_ids(trajectory, encoder.renderer.fingerprint).turns
        self.agent_turns, self.rule, self.length = agent_turns(turns), encoder.window, len(turns)
        given, of_turns = encoder.return_ids_for, None
        # The turn that would follow the log has the key len(turns).
        self.return_ids: dict[int, Ids] = {}
        if given is not None:
            self.return_ids = dict(zip([*self.agent_turns, len(turns)], given(trajectory), strict=True))
            of_turns = [self.return_ids[index] for index in self.agent_turns]
        self.dialogue = EncodedDialogue(turns, encoder.renderer, of_turns, few_shot)
        self.encoded, self.left_out = self.dialogue.encoded, 0
        self.answered = self._replies(trajectory.terminated) if encoder.replies else {}
        self.spans, self.dropped = cut_windows(self.dialogue, self.rule, self.answered)
        self.end = self._kind_of_end(trajectory.terminated)

    def _replies(self, terminated: bool) -> dict[int, int]:
        """Map the index of each agent turn to the index after the last turn of the environment's reply to it.

        An agent turn without a reply maps to the index after itself. The last agent turn of a terminated episode never
        has a reply. An agent turn that does not fit in a window together with its reply is missing from the result.
        """
        answered, turns, lengths = {}, self.dialogue.turns, self.dialogue.lengths
        for index in self.agent_turns:
            stop = index + 1
            last = next((i for i in self.agent_turns if i > index), stop if terminated else len(turns))
            while stop < last and turns[stop].role != "assistant":
                stop += 1
            room = self.rule.max_length - self.dialogue.fixed - lengths[index]
            if sum(lengths[index + 1 : stop]) <= room:
                answered[index] = stop
            else:  # count only replies of turns that fit alone; the other turns are counted as dropped
                self.left_out += room >= 0
        return answered

    def _kind_of_end(self, terminated: bool) -> Literal["terminated", "observation", "finished", "unfinished"]:
        """Return "terminated" or, for a cut log, where it was cut.

        "observation": after a turn of another speaker; "finished": after a complete agent turn; "unfinished": inside
        an agent turn. If an agent turn at the end does not fit in a window, the log is shortened to end before it,
        which gives "observation".
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
        """True if the window of `span` starts where it does because of max_length (tokens), not `context` (turns)."""
        return span.first != self.dialogue.first_visible(self.rule.without_max_length, span.stop - 1)

    def ends_inside(self, index: int) -> bool:
        """True if agent turn `index` is unfinished, because the log was cut inside it."""
        return self.end == "unfinished" and index == self.agent_turns[-1]

    def ends_after(self, index: int) -> bool:
        """True if the log was cut directly after agent turn `index`, which is finished."""
        return self.end == "finished" and index == self.agent_turns[-1]

    def _before(self, index: int) -> tuple[int, list[int]]:
        """Return what the agent sees before turn `index`: the first visible turn, and the ids up to its opening.

        All turns are in the form in which they are printed once the dialogue continues. `index` is an agent turn of
        the log, or the turn that would follow the log. That one, or a turn that does not fit in a window, gets the
        opening of the generation prompt, and only its opening is read.
        """
        if index < self.length and index not in self.dropped:
            turn = self.encoded[index]
            opening, length = turn.ids[: turn.action_start], None
            reply = sum(self.dialogue.lengths[index + 1 : self.answered.get(index, index + 1)])
        else:
            seen = self.dialogue.turns[:index]
            opening = (*self.return_ids.get(index, ()), *self.dialogue.renderer.opening_after(seen))
            length, reply = len(opening), 0
        first = self.dialogue.first_visible(self.rule, index, length, reply)
        assert first is not None  # a whole agent turn fits in a window, so its opening does too
        return first, [*self.dialogue.joined(self.dialogue.pieces(first, index, live=False)), *opening]

    def _row(self, span: Span) -> tuple[list[int], dict[int, int]]:
        """Return the ids of a window's row, and a mapping from the index of each turn in it to a position in the row.

        The position is the state before the first token that the turn's speaker chose.
        """
        head, turns = self.dialogue.head, self.dialogue.turns
        pieces = self.dialogue.answered_pieces(span.first, span.stop, span.answered)
        places = [*range(head), *range(max(span.first, head), span.answered)]
        state = {}
        stops = accumulate(map(len, pieces), initial=len(self.dialogue.preamble))
        for i, piece, start in zip(places, pieces, stops, strict=False):  # there is one more stop, that of the row
            # The first action is at the same offset in every form of a turn, except that the opening directly after
            # system turns may be shorter or longer. Therefore the offset counts from the end of the piece for all
            # speakers but the agent. The state of a token is the column before it, hence − 1.
            longer = len(piece) - len(self.encoded[i].ids) if turns[i].role != "assistant" else 0
            state[i] = start + longer + self.encoded[i].action_start - 1
        return self.dialogue.joined(pieces), state

    def window(self, span: Span, steps: "_TurnSteps") -> Window:
        input_ids, state = self._row(span)
        inside = [index for index in self.agent_turns if span.credited <= index < span.stop]
        next_ids, end_ids = [], []
        last = inside[-1]
        done = state[last] + len(self.encoded[last].actions)  # the state after the last action
        upcoming = next((index for index in self.agent_turns if index > last), self.length)
        follows = (RowKind.OWN, 0)
        if upcoming < self.length or self.end == "observation":
            first, opened = self._before(upcoming)
            # If the next turn's context repeats this row up to the closing action (or up to the end of the reply), the
            # row is extended to hold the next opening as well. Otherwise V(s′) needs a row of its own.
            kept = done if span.answered == span.stop else len(input_ids)
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
            end = (RowKind.OWN, done - (self.end == "finished"))
        next_states = [*((RowKind.OWN, state[index]) for index in inside[1:]), follows]
        # A reply is a target only in the window that trains the turn it answers: its content and closing, not its
        # opening, which the environment does not choose.
        replies = [turn for index in inside for turn in range(index + 1, self.answered.get(index, index + 1))]
        return Window(
            input_ids,
            next_ids,
            end_ids,
            [state[turn] + k for turn in replies for k in range(len(self.encoded[turn].actions))],
            [
                step
                for index, place in zip(inside, next_states, strict=True)
                for step in steps.of(index, state[index], place, end)
            ],
        )

    def _end_ids(self) -> list[int]:
        """Return the row whose last position gives the closing V, for windows before the last; [] if terminated."""
        if self.end == "terminated":
            return []
        if self.end == "observation":
            return self._before(self.length)[1]
        # After a finished turn no later state was logged, so V is taken at the state of the closing action.
        last = self.agent_turns[-1]
        turn = self.encoded[last]
        return [*self._before(last)[1], *turn.ids[turn.action_start : turn.action_stop - (self.end == "finished")]]


class _TurnSteps:
    # The steps of an episode's agent turns, with rewards, discounts and returns.

    def __init__(self, encoder: EpisodeEncoder, episode: _Episode):
        self.rule, self.episode = encoder.step_rule, episode
        self.reward = [encoder.scale.apply(turn.reward) for turn in episode.dialogue.turns]
        # Index of an agent turn -> the discounted return after it and the discount of the closing V, both from the
        # first state of the next agent turn. The discount is 0 if the episode terminated.
        self.after: dict[int, tuple[float, float]] = {}
        after = 0.0, float(episode.end != "terminated")
        for index in reversed(episode.agent_turns):
            self.after[index] = after
            after = self._return_from(index, 0)

    def _return_from(self, index: int, k: int) -> tuple[float, float]:
        """Return the discounted return from action k of a turn on, and the discount of the closing V from there."""
        gamma, left = self.rule.discount_per_token, len(self.episode.encoded[index].actions) - k
        if self.episode.ends_after(index):
            # V at the state of the last action closes the log, so the reward of that action must not count as well.
            return 0.0, gamma ** (left - 1)
        # The reward is paid at the last action, left − 1 steps after action k, and the next turn opens one step later.
        total, factor = self.after[index]
        later = gamma**left * self._turn_discount(index)
        return gamma ** (left - 1) * self.reward[index] + later * total, later * factor

    def _turn_discount(self, index: int) -> float:
        # discount_per_turn belongs to the action that closes a turn, which an unfinished turn does not have.
        return 1.0 if self.episode.ends_inside(index) else self.rule.discount_per_turn

    def of(self, index: int, opening: int, follows: tuple[int, int], end: tuple[int, int]) -> Iterator[Step]:
        """Yield the steps of agent turn `index`.

        Args:
          opening: the state before the turn's first action.
          follows: kind of row (`RowKind`) and column of the first state of the agent's next turn.
          end: kind of row and column of the state whose V closes a cut log.
        """
        actions, gamma = self.episode.encoded[index].actions, self.rule.discount_per_token
        n, inside = len(actions), self.episode.ends_inside(index)
        terminal = self.episode.end == "terminated" and index == self.episode.agent_turns[-1]
        reward, turn_discount = self.reward[index], self._turn_discount(index)
        reach = n  # the state `follows` is `reach` actions after the opening
        if inside:
            follows = (RowKind.OWN, opening + n)
        elif self.episode.ends_after(index):
            # No state after the closing action was logged: V is taken before it, and it gets no target itself.
            follows, reward, reach, turn_discount = (RowKind.OWN, opening + n - 1), 0.0, n - 1, 1.0
        for k in range(n):
            has_target = k < reach
            paid, discount, place, bootstrap = 0.0, gamma, (RowKind.OWN, opening + k + 1), 1.0
            # The last action, and with bootstrap_from_turn every action, bootstraps from the state `follows`.
            if has_target and (self.rule.bootstrap_from_turn or k == reach - 1):
                left = reach - k
                paid, discount = gamma ** (left - 1) * reward, gamma**left * turn_discount
                place, bootstrap = follows, float(not terminal)
            total, factor = self._return_from(index, k) if has_target else (0.0, 0.0)
            yield Step(
                state=opening + k,
                action=actions[k],
                reward=paid,
                discount=discount,
                next_row_kind=place[0],
                next_state=place[1],
                bootstrap=bootstrap,
                has_target=has_target,
                closes_turn=k == n - 1 and not inside,
                turn=index,
                open_state=opening,
                return_to_go=total,
                end_row_kind=end[0],
                end_state=end[1],
                end_discount=factor,
            )
