"""Cut one trajectory into windows of tokens and steps: the index arithmetic of rewards, next states and cut ends.

A window holds the turns that the policy sees before a reply, and the reply (tokens/windows.py). A step is one token
that the agent chose. A state is a position in a row of tokens: the model has read the tokens up to and including that
position. A log is cut if it ends before the episode does (`Trajectory.terminated` is False); V of the state at its
end, the closing V, then replaces the rewards that were not logged.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import accumulate
from typing import Literal, NamedTuple

import tokenizers

from offline_lmrl.logs.scale import RewardScale
from offline_lmrl.logs.trajectory import Trajectory, with_own_token_ids
from offline_lmrl.tokens.rendering import Renderer
from offline_lmrl.tokens.windows import EncodedDialogue, Ids, Span, WindowRule, agent_turns, cut_windows

ReturnIdsFor = Callable[[Trajectory], Sequence[Ids]]
ENCODING = 1  # the version of the windows and of their form in files; raise it whenever either changes
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


class TurnEnd(IntEnum):
    """What the log holds after the last action of a trained turn."""

    CONTINUES = 0  # a state from which V bootstraps
    TERMINATED = 1  # nothing, because the episode ended
    FINISHED = 2  # nothing, because the log was cut after the turn: its last action has no target
    UNFINISHED = 3  # nothing, because the log was cut inside the turn, whose last action does not close it


class TrainedTurn(NamedTuple):
    """The actions of one turn in a window, and all that their steps follow from (`expand` in tokens/steps.py).

    turn: index of the turn in its trajectory.
    open_state: the state before the turn's first action.
    actions: number of actions.
    in_row: True if all actions but the last are the tokens of input_ids after `open_state`, as they are unless a turn
      that is no assistant's is trained and printed with another opening there.
    last_action: id of the last action, 0 if there is none; it may differ from the token of input_ids, or follow it.
    reward: scaled reward of the turn.
    end: what follows the last action (`TurnEnd`).
    next_row_kind: the kind (`RowKind`) of the row that holds the first state of the agent's next turn, or the state
      from which V bootstraps at the end of a cut log.
    next_state: column of that state.
    end_row_kind: the kind of the row that holds the state of the closing V.
    end_state: column of that state.
    return_after: discounted scaled return after the turn, from that next state on.
    discount_after: discount from that next state to the closing V; 0 if the episode terminated.
    """

    turn: int
    open_state: int
    actions: int
    in_row: bool
    last_action: int
    reward: float
    end: int
    next_row_kind: int
    next_state: int
    end_row_kind: int
    end_state: int
    return_after: float
    discount_after: float


class Window(NamedTuple):
    """A row of tokens with the turns that are trained in it, and up to two further rows in which only V is computed.

    input_ids: the row that holds the trained turns.
    next_ids: the row up to and including the opening of the agent's next turn; at its last position, V is the value of
      the next state after the window's last turn. Empty if input_ids holds that state, or if the log has none.
    end_ids: for a window before the last one of a cut log, the row whose last position gives the closing V. Empty for
      the last window, whose other rows hold that state, and if the episode terminated.
    replies: for each reply of the environment to the turns trained here, the state before its first token and its
      number of tokens; empty unless the encoder was made with `replies`.
    turns: the turns trained here.
    apart: the actions of those turns that are not in input_ids (`TrainedTurn.in_row`), concatenated.
    """

    input_ids: list[int]
    next_ids: list[int]
    end_ids: list[int]
    replies: list[tuple[int, int]]
    turns: list[TrainedTurn]
    apart: list[int]


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

    @property
    def fingerprint(self) -> str:
        """A hash of all on which the windows of given trajectories depend.

        `return_ids_for`, if given, must be a method of an object whose repr holds its whole state (`ReturnTokens`).
        """
        renderer = self.renderer
        rendering = tokenizers.__version__, renderer.fingerprint, renderer.template, renderer.ends
        rules = self.window, self.step_rule, self.scale, self.return_ids_for, self.replies
        return hashlib.sha256(repr((ENCODING, *rendering, *rules)).encode()).hexdigest()[:32]

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
        outcomes = _outcomes(self, episode)
        for span in episode.spans:
            yield episode.window(span, outcomes)


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

    def window(self, span: Span, outcomes: Mapping[int, "_Outcome"]) -> Window:
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
        turns, apart = [], []
        for index, place in zip(inside, next_states, strict=True):
            opening, actions = state[index], self.encoded[index].actions
            kind, place = self._end_of(index, opening + len(actions), place)
            in_row = tuple(input_ids[opening + 1 : opening + len(actions)]) == actions[:-1]
            apart += () if in_row else actions
            last, (reward, *after) = actions[-1] if actions else 0, outcomes[index]
            turns.append(TrainedTurn(index, opening, len(actions), in_row, last, reward, kind, *place, *end, *after))
        answers = [(state[turn], len(self.encoded[turn].actions)) for turn in replies]
        return Window(input_ids, next_ids, end_ids, answers, turns, apart)

    def _end_of(self, index: int, done: int, follows: tuple[int, int]) -> tuple[TurnEnd, tuple[int, int]]:
        """Return what follows agent turn `index`, and the state from which V bootstraps: kind of row, column.

        Args:
          done: the state after the turn's last action.
          follows: kind of row and column of the first state of the agent's next turn.
        """
        if self.ends_inside(index):
            return TurnEnd.UNFINISHED, (RowKind.OWN, done)
        if self.ends_after(index):
            # No state after the closing action was logged: V is taken before it, and it gets no target itself.
            return TurnEnd.FINISHED, (RowKind.OWN, done - 1)
        terminal = self.end == "terminated" and index == self.agent_turns[-1]
        return TurnEnd.TERMINATED if terminal else TurnEnd.CONTINUES, follows

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


class _Outcome(NamedTuple):
    """The scaled reward of an agent turn, and the fields `return_after` and `discount_after` of `TrainedTurn`."""

    reward: float
    return_after: float
    discount_after: float


def _outcomes(encoder: EpisodeEncoder, episode: _Episode) -> dict[int, _Outcome]:
    """Map the index of each agent turn of an episode to its outcome."""
    rule, turns = encoder.step_rule, episode.dialogue.turns
    found, after = {}, (0.0, float(episode.end != "terminated"))
    for index in reversed(episode.agent_turns):
        reward = encoder.scale.apply(turns[index].reward)
        found[index] = _Outcome(reward, *after)
        gamma, actions = rule.discount_per_token, len(episode.encoded[index].actions)
        if episode.ends_after(index):
            # V at the state of the last action closes the log, so the reward of that action must not count as well.
            after = 0.0, gamma ** (actions - 1)
            continue
        # The reward is paid at the last action, and the next turn opens one step later. discount_per_turn belongs to
        # the action that closes a turn, which an unfinished turn does not have.
        later = gamma**actions * (1.0 if episode.ends_inside(index) else rule.discount_per_turn)
        after = gamma ** (actions - 1) * reward + later * after[0], later * after[1]
    return found
