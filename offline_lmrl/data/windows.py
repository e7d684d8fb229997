"""What the policy sees of an episode: one rule that cuts training windows and shortens a live dialogue alike.

Agent turn i sees the turns from `first_visible(i)` on, and every leading system turn. The start moves in steps of
`stride` turns, as little as keeps at most `context` turns of history and at most `max_length` tokens. With stride 1
that is exactly "the last k turns"; a larger stride lets many agent turns share one window (and one cache) at the price
of a history that varies between context − stride + 1 and context turns.

Where `context` alone decides, training and live play start at the same turn. Where max_length binds they may not:
training counts the tokens of the logged turn, live play, which cannot know them, those of the agent's opening and of
the longest reply (`reserve`, the sampler's max_new_tokens). A logged turn that is shorter may then be trained with
older turns in view that the agent would not see live, a longer one with fewer.

A window may also hold the environment's reply to its last agent turn, as a target (data/episodes.py). The reply is
read after the same turns as the agent's turn; where max_length binds, oldest turns make room for both.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from offline_lmrl.data.errors import InputError
from offline_lmrl.data.rendering import EncodedTurn, Renderer
from offline_lmrl.data.trajectory import Turn, leading_system_turns


@dataclass(frozen=True)
class WindowRule:
    """How much of an episode is one context.

    context: most turns of history before an agent turn; None = all. 1 makes a fully observed game Markov.
    stride: turns by which the window's start moves at a time, 1 ≤ stride ≤ context.
    max_length: most tokens of a window; whole oldest turns are dropped, never the reply itself.
    """

    context: int | None = None
    stride: int = 1
    max_length: int = 1024

    def __post_init__(self) -> None:
        if self.context is not None and self.context < 1:
            raise InputError(f"context: found {self.context}, expected a whole number of turns, at least 1")
        if not 1 <= self.stride <= (self.context or self.stride):
            raise InputError(f"stride: found {self.stride}, expected 1 to context ({self.context})")
        if self.max_length < 2:
            raise InputError(f"max_length: found {self.max_length}, expected at least 2 tokens")


class Span(NamedTuple):
    """One window: the leading system turns, then turns first..stop−1; agent turns from `credited` on are trained.

    answered: the window also holds turns stop..answered−1, with which the environment answers the last agent turn.
    """

    first: int
    credited: int
    stop: int
    answered: int


def first_visible(
    rule: WindowRule, lengths: Sequence[int], index: int, head: int, fixed: int, reply: int = 0
) -> int | None:
    """First turn that agent turn `index` sees.

    Args:
      lengths: tokens of each turn up to and including turn `index`.
      head: number of leading system turns; fixed: their tokens and the preamble's.
      reply: tokens of the environment's reply that the window holds after the turn. They count for max_length only,
        and turn and reply fit together.
    Returns: a turn in head..index, or None where not even the turn alone fits. The rule is monotone in index and does
      not depend on earlier windows, so training and a live dialogue that give the same lengths agree.
    """
    if fixed + lengths[index] > rule.max_length:
        return None
    first = min(head, index)
    if rule.context is not None and index - first > rule.context:
        first += -(-(index - first - rule.context) // rule.stride) * rule.stride
    while first < index and fixed + sum(lengths[first : index + 1]) + reply > rule.max_length:
        first = min(first + rule.stride, index)
    return first


def cut_windows(
    rule: WindowRule,
    lengths: Sequence[int],
    agent: Sequence[bool],
    stays: Sequence[bool],
    head: int,
    fixed: int,
    answered: Mapping[int, int],
) -> tuple[list[Span], list[int]]:
    """All windows of an episode, and the agent turns that cannot fit (dropped, to be counted).

    Args:
      lengths: tokens of each turn. agent: whether the turn is the agent's (trainable). stays: whether later windows
        hold a turn as it was read and trained; a window that would show one otherwise is another window.
      answered: agent turn -> index after the environment's reply that its window holds too; absent without one.
    """
    spans: list[Span] = []
    dropped = []
    changing = list(accumulate((-1 if same else i for i, same in enumerate(stays)), max))  # the last one up to i
    for index in (i for i, is_agent in enumerate(agent) if is_agent):
        stop = answered.get(index, index + 1)
        first = first_visible(rule, lengths, index, head, fixed, sum(lengths[index + 1 : stop]))
        if first is None:
            dropped.append(index)
        elif spans and spans[-1].first == first and changing[spans[-1].stop - 1] < max(first, head):
            spans[-1] = spans[-1]._replace(stop=index + 1, answered=stop)
        else:
            spans.append(Span(first, index, index + 1, stop))
    return spans, dropped


def answered_ids(
    renderer: Renderer, turns: Sequence[Turn], encoded: Sequence[EncodedTurn], first: int, stop: int, answered: int
) -> list[tuple[int, ...]]:
    """Ids of every turn of a window that ends with the agent's turn stop−1 and its reply, turns stop..answered−1.

    The reply is read after what the agent read and wrote. Where the template prints only the closing of the agent's
    turn differently once the dialogue goes on, it is closed as in history; where it rewrites the turn, or one before
    it, the tokens stay as they were.
    """
    written = renderer.window_ids(turns, encoded, first, stop, live=True)
    history = renderer.window_ids(turns, encoded, first, answered, live=False)
    last, turn = len(written) - 1, encoded[stop - 1]
    kept = turn.action_stop - turn.closed
    if history[:last] == written[:last] and history[last][:kept] == written[last][:kept]:
        return history
    return [*written, *history[last + 1 :]]


def policy_window(
    turns: Sequence[Turn],
    renderer: Renderer,
    rule: WindowRule,
    reserve: int = 0,
    slots: Sequence[tuple[int, ...]] | None = None,
    prompt: Sequence[int] = (),
) -> list[int]:
    """Ids the agent sees before its coming turn: preamble, prompt, visible turns, its own opening.

    Args:
      prompt: ids that stay whatever is dropped behind them (data/demonstrations.py).
      slots: ids before the opening of each agent turn, the coming one's last; None = none.
      reserve: tokens kept free for the reply (max_new_tokens). Where max_length binds, the window starts where
        training would start it for a turn of the opening and that many tokens, however long the reply turns out.
    Raises: InputError where the prompt and the leading system turns alone leave no room.
    """
    renderer.notice(turns)
    opening = renderer.opening_after(turns)
    if slots is not None:
        *slots, coming = slots
        opening = (*coming, *opening)
    encoded, preamble, head, fixed = _encoded(turns, renderer, slots, prompt)
    lengths = [*(turn.longest for turn in encoded), len(opening) + reserve]
    first = first_visible(rule, lengths, len(turns), head, fixed)
    if first is None:
        reply = f"a reply of max_new_tokens ({reserve})" if reserve else "a reply"
        also = "the prompt, " if prompt else ""
        raise InputError(
            f"max_length: found {rule.max_length}, expected at least {fixed + lengths[-1]} to hold {also}"
            f"the system turns and {reply}"
        )
    kept = renderer.window_ids(turns, encoded, first, len(turns), live=False)
    return [*preamble, *(token for ids in kept for token in ids), *opening]


def reply_window(
    turns: Sequence[Turn],
    role: str,
    renderer: Renderer,
    rule: WindowRule,
    reserve: int = 0,
    slots: Sequence[tuple[int, ...]] | None = None,
    prompt: Sequence[int] = (),
) -> list[int] | None:
    """Ids read before the environment's reply to the last of these turns, the agent's: that turn's own window, the
    turn, and the opening of a turn of this role. Training windows hold the same ids before a logged reply. None where
    turn and reply alone do not fit; training leaves such a reply out.

    Args:
      slots: ids before the opening of each agent turn; None = none. prompt: as for `policy_window`.
      reserve: tokens kept free for the reply.
    """
    renderer.notice(turns)
    said = [*turns, Turn(role, "")]
    encoded, preamble, head, fixed = _encoded(said, renderer, slots, prompt)
    lengths = [turn.longest for turn in encoded]
    index, reply = len(turns) - 1, encoded[-1].action_start + reserve
    if fixed + lengths[index] + reply > rule.max_length:
        return None
    first = first_visible(rule, lengths, index, head, fixed, reply)
    *kept, blank = answered_ids(renderer, said, encoded, first, len(turns), len(said))
    return [*preamble, *(token for ids in kept for token in ids), *blank[: encoded[-1].action_start]]


def _encoded(
    turns: Sequence[Turn], renderer: Renderer, slots: Sequence[tuple[int, ...]] | None, prompt: Sequence[int]
) -> tuple[list[EncodedTurn], tuple[int, ...], int, int]:
    """The turns with their slots, the ids before them, the number of leading system turns, and the tokens of both."""
    encoded = renderer.encode(turns)
    if slots is not None:
        for index, slot in zip((i for i, turn in enumerate(turns) if turn.is_trainable), slots, strict=True):
            encoded[index] = encoded[index].behind(slot)
    head, preamble = leading_system_turns(turns), (*renderer.preamble_of(turns), *prompt)
    return encoded, preamble, head, len(preamble) + sum(turn.longest for turn in encoded[:head])
