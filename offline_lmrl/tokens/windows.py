"""The turns that the policy sees before a reply: one rule that cuts training windows and live dialogues alike.

Agent turn i sees every leading system turn and the turns from `first_visible(i)` on. The first visible turn moves
forward in steps of `stride` turns, and only as far as needed to keep at most `context` turns of history and at most
`max_length` tokens. With stride 1 the agent sees exactly the last `context` turns. With a larger stride many agent
turns share one window (and one cache), but the history varies between context − stride + 1 and context turns.

If `context` alone determines the window, training and live play start at the same turn. If max_length binds, they may
differ. Training counts the tokens of the logged turn. Live play cannot know the reply, so it counts the tokens of the
agent's opening and of the longest possible reply (`reserve`, the sampler's max_new_tokens). A logged turn shorter than
that may then be trained with older turns in view that the agent would not see live; a longer one with fewer turns.

A window may also hold the environment's reply to its last agent turn, as a training target for a model of the
environment (tokens/episodes.py). If max_length binds, the oldest turns are dropped until turn and reply both fit.

Terms. Preamble: what the chat template prints before the first turn. Opening and closing: what it prints before and
after the text of one turn, such as a role header and an end-of-turn token. Few-shot demonstrations: other episodes,
which are put between the preamble and the first turn (tokens/few_shot.py).
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import TYPE_CHECKING, NamedTuple

from offline_lmrl.errors import InputError, require
from offline_lmrl.logs.trajectory import Turn, leading_system_turns

if TYPE_CHECKING:  # rendering imports transformers, which takes a second of `prepare SOURCE --help`
    from offline_lmrl.tokens.rendering import Renderer

Ids = tuple[int, ...]


@dataclass(frozen=True)
class WindowRule:
    """The limits on how much of an episode the policy sees at once.

    context: maximum number of turns of history before an agent turn; None = all. With 1, the policy sees only the
      latest turn, as suits a game whose turns show its whole state.
    stride: number of turns by which the window's start moves at a time, 1 ≤ stride ≤ context.
    max_length: maximum number of tokens in a window. The oldest turns are dropped whole; the reply itself never is.
    """

    context: int | None = None
    stride: int = 1
    max_length: int = 1024

    def __post_init__(self) -> None:
        require(
            self.context is None or self.context >= 1,
            f"context: found {self.context}, expected a whole number of turns, at least 1",
        )
        require(
            1 <= self.stride <= (self.context or self.stride),
            f"stride: found {self.stride}, expected 1 to context ({self.context})",
        )
        require(self.max_length >= 2, f"max_length: found {self.max_length}, expected at least 2 tokens")

    @property
    def without_max_length(self) -> "WindowRule":
        return replace(self, max_length=sys.maxsize)


class Span(NamedTuple):
    """One window: the leading system turns, then turns first..stop−1. All fields are turn indices.

    first: the first visible turn after the leading system turns.
    credited: the first agent turn that is trained in this window; earlier agent turns are only context.
    stop: one after the window's last agent turn.
    answered: one after the environment's reply to the last agent turn, which the window also holds; equal to `stop` if
      the window holds no reply.
    """

    first: int
    credited: int
    stop: int
    answered: int


class EncodedDialogue:
    """A dialogue as tokens, from which windows are cut.

    Args:
      turns: all turns of the dialogue.
      renderer: the renderer that encodes the turns.
      return_ids: for each agent turn, the ids put before its opening, which encode the requested return
        (tokens/conditioning.py); None = no ids.
      few_shot: ids of the few-shot demonstrations.

    Attributes:
      encoded: the turns as tokens; those of the agent begin with their return ids, if any.
      preamble: the ids before the first turn: preamble and few-shot demonstrations. They are never dropped.
      head: the number of leading system turns.
      lengths: the number of tokens of each turn in its longest form.
      fixed: the number of tokens that every window holds: preamble, demonstrations and leading system turns.
    """

    def __init__(
        self,
        turns: Sequence[Turn],
        renderer: "Renderer",
        return_ids: Sequence[Ids] | None = None,
        few_shot: Sequence[int] = (),
    ):
        self.turns, self.renderer, self.encoded = turns, renderer, renderer.encode(turns)
        if return_ids is not None:
            for index, ids in zip(agent_turns(turns), return_ids, strict=True):
                self.encoded[index] = self.encoded[index].with_prefix(ids)
        self.preamble: Ids = (*renderer.preamble_of(turns), *few_shot)
        self.head, self.lengths = leading_system_turns(turns), [turn.longest for turn in self.encoded]
        self.fixed = len(self.preamble) + sum(self.lengths[: self.head])

    def first_visible(self, rule: WindowRule, index: int, length: int | None = None, reply: int = 0) -> int | None:
        """Return the index of the first turn that agent turn `index` sees, after the leading system turns.

        Args:
          rule: the limits of a window.
          index: index of the agent turn, which may be the next one, not yet written.
          length: number of tokens of that turn; None = those of the encoded turn.
          reply: number of tokens of the environment's reply that the window holds after the turn. They count towards
            max_length, but not towards `context`. The caller makes sure that turn and reply fit together.
        Returns: an index up to `index`, or None if the turn does not even fit without earlier turns. The result never
          decreases as `index` grows and does not depend on earlier windows, so training and live play agree whenever
          the lengths are equal.
        """
        first = min(self.head, index)  # a reply may itself begin with a system turn, which is not visible before it
        needed = len(self.preamble) + sum(self.lengths[:first]) + (self.lengths[index] if length is None else length)
        if needed > rule.max_length:
            return None
        if rule.context is not None and index - first > rule.context:
            first += -(-(index - first - rule.context) // rule.stride) * rule.stride  # −(−a // b) rounds a / b up
        while first < index and needed + sum(self.lengths[first:index]) + reply > rule.max_length:
            first = min(first + rule.stride, index)
        return first

    def pieces(self, first: int, stop: int, live: bool) -> list[Ids]:
        """Return the ids of each leading system turn and of turns first..stop−1 (`Renderer.window_ids`)."""
        return self.renderer.window_ids(self.turns, self.encoded, first, stop, live)

    def joined(self, pieces: Sequence[Sequence[int]]) -> list[int]:
        """Return the ids of a window: the preamble, then the ids of its turns."""
        return [*self.preamble, *chain.from_iterable(pieces)]

    def answered_pieces(self, first: int, stop: int, answered: int) -> list[Ids]:
        """Return the ids of each turn of a window that ends with agent turn stop−1 and its reply, up to answered−1.

        The reply must follow the tokens that the agent saw and wrote, but a template may print turns differently once
        the dialogue continues. If only the closing of the agent's turn differs, all ids are those of the continued
        dialogue. If the turn itself or an earlier one differs, the tokens that the agent saw and wrote are kept, and
        only the reply is taken from the continued dialogue. Without a reply, all ids are those that the agent saw and
        wrote.

        Args:
          first: the first visible turn after the leading system turns.
        """
        written = self.pieces(first, stop, live=True)
        if answered == stop:
            return written
        history = self.pieces(first, answered, live=False)
        last, turn = len(written) - 1, self.encoded[stop - 1]
        kept = turn.action_stop - turn.closed
        if history[:last] == written[:last] and history[last][:kept] == written[last][:kept]:
            return history
        return [*written, *history[last + 1 :]]


def agent_turns(turns: Sequence[Turn]) -> list[int]:
    """Return the indices of the trainable turns, those of the agent."""
    return [index for index, turn in enumerate(turns) if turn.is_trainable]


def cut_windows(
    dialogue: EncodedDialogue, rule: WindowRule, answered: Mapping[int, int]
) -> tuple[list[Span], list[int]]:
    """Cut an episode into windows, in which consecutive agent turns share a window if they see the same first turn.

    After a visible turn that changes its tokens once the dialogue continues (`EncodedTurn.stays`), the next agent turn
    starts a new window.

    Args:
      answered: index of an agent turn -> one after the environment's reply that its window also holds. An agent turn
        that is missing here gets no reply.
    Returns: the windows, and the indices of the agent turns that do not fit and are dropped.
    """
    spans: list[Span] = []
    dropped = []
    # For each turn, the last turn up to it that changes.
    changing = list(accumulate((-1 if turn.stays else i for i, turn in enumerate(dialogue.encoded)), max))
    for index in agent_turns(dialogue.turns):
        stop = answered.get(index, index + 1)
        first = dialogue.first_visible(rule, index, reply=sum(dialogue.lengths[index + 1 : stop]))
        if first is None:
            dropped.append(index)
        elif spans and spans[-1].first == first and changing[spans[-1].stop - 1] < max(first, dialogue.head):
            spans[-1] = spans[-1]._replace(stop=index + 1, answered=stop)
        else:
            spans.append(Span(first, index, index + 1, stop))
    return spans, dropped


def policy_window(
    turns: Sequence[Turn],
    renderer: "Renderer",
    rule: WindowRule,
    reserve: int = 0,
    return_ids: Sequence[Ids] | None = None,
    few_shot: Sequence[int] = (),
) -> list[int]:
    """Return the ids that the agent sees before its next turn: preamble, demonstrations, visible turns, its opening.

    Args:
      turns: the dialogue so far.
      reserve: number of tokens kept free for the reply (max_new_tokens). If max_length binds, the window starts where
        training would start it for a turn of the opening and this many tokens, whatever the reply's real length.
      return_ids: for each past agent turn and, last, for the next one, the ids put before its opening, which encode
        the requested return (tokens/conditioning.py); None = no ids.
      few_shot: ids of the few-shot demonstrations, which are never dropped.
    Raises: InputError if the demonstrations and the leading system turns leave too few tokens for the reply.
    """
    renderer.check.notice(turns)
    opening = renderer.opening_after(turns)
    if return_ids is not None:
        *return_ids, coming = return_ids
        opening = (*coming, *opening)
    dialogue = EncodedDialogue(turns, renderer, return_ids, few_shot)
    length = len(opening) + reserve
    first = dialogue.first_visible(rule, len(turns), length)
    if first is None:
        reply = f"a reply of max_new_tokens ({reserve})" if reserve else "a reply"
        also = "the few-shot demonstrations, " if few_shot else ""
        raise InputError(
            f"max_length: found {rule.max_length}, expected at least {dialogue.fixed + length} to hold {also}"
            f"the system turns and {reply}"
        )
    return [*dialogue.joined(dialogue.pieces(first, len(turns), live=False)), *opening]


def reply_window(dialogue: EncodedDialogue, rule: WindowRule, reserve: int = 0) -> list[int] | None:
    """Return the ids after which a model of the environment writes the reply to the agent's last turn.

    They are the window of the agent's turn, the turn itself, and the opening of the reply. Training windows hold the
    same ids before a logged reply.

    Args:
      dialogue: the turns so far, up to and including the agent's turn, and the reply as a turn without text.
      reserve: number of tokens kept free for the reply.
    Returns: the ids, or None if turn and reply do not fit even without earlier turns; training leaves such a reply
      out.
    """
    dialogue.renderer.check.notice(dialogue.turns[:-1])
    stop, opened = len(dialogue.turns) - 1, dialogue.encoded[-1].action_start
    if dialogue.fixed + dialogue.lengths[stop - 1] + opened + reserve > rule.max_length:
        return None
    first = dialogue.first_visible(rule, stop - 1, reply=opened + reserve)
    *kept, blank = dialogue.answered_pieces(first, stop, stop + 1)
    return dialogue.joined([*kept, blank[:opened]])
