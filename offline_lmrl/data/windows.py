"""What the policy sees of an episode: one rule that cuts training windows and shortens a live dialogue alike.

Agent turn i sees the turns from `first_visible(i)` on, and every leading system turn. The start moves in steps of
`stride` turns, as little as keeps at most `context` turns of history and at most `max_length` tokens. With stride 1
that is exactly "the last k turns"; a larger stride lets many agent turns share one window (and one cache) at the price
of a history that varies between context − stride + 1 and context turns.

Where `context` alone decides, training and live play start at the same turn. Where max_length binds they may not:
training counts the tokens of the logged turn, live play, which cannot know them, those of the agent's opening and of
the longest reply (`reserve`, the sampler's max_new_tokens). A logged turn that is shorter may then be trained with
older turns in view that the agent would not see live, a longer one with fewer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from offline_lmrl.data.errors import InputError
from offline_lmrl.data.rendering import Renderer
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
    """One window: the leading system turns, then turns first..stop−1; agent turns from `credited` on are trained."""

    first: int
    credited: int
    stop: int


def first_visible(rule: WindowRule, lengths: Sequence[int], index: int, head: int, fixed: int) -> int | None:
    """First turn that agent turn `index` sees.

    Args:
      lengths: tokens of each turn up to and including turn `index`.
      head: number of leading system turns; fixed: their tokens and the preamble's.
    Returns: a turn in head..index, or None where not even the turn alone fits. The rule is monotone in index and does
      not depend on earlier windows, so training and a live dialogue that give the same lengths agree.
    """
    if fixed + lengths[index] > rule.max_length:
        return None
    first = min(head, index)
    if rule.context is not None and index - first > rule.context:
        first += -(-(index - first - rule.context) // rule.stride) * rule.stride
    while first < index and fixed + sum(lengths[first : index + 1]) > rule.max_length:
        first = min(first + rule.stride, index)
    return first


def cut_windows(
    rule: WindowRule, lengths: Sequence[int], agent: Sequence[bool], stays: Sequence[bool], head: int, fixed: int
) -> tuple[list[Span], list[int]]:
    """All windows of an episode, and the agent turns that cannot fit (dropped, to be counted).

    Args:
      lengths: tokens of each turn. agent: whether the turn is the agent's (trainable). stays: whether later windows
        hold a turn as it was read and trained; a window that would show one otherwise is another window.
    """
    spans: list[Span] = []
    dropped = []
    changing = list(accumulate((-1 if same else i for i, same in enumerate(stays)), max))  # the last one up to i
    for index in (i for i, is_agent in enumerate(agent) if is_agent):
        first = first_visible(rule, lengths, index, head, fixed)
        if first is None:
            dropped.append(index)
        elif spans and spans[-1].first == first and changing[spans[-1].stop - 1] < max(first, head):
            spans[-1] = spans[-1]._replace(stop=index + 1)
        else:
            spans.append(Span(first, index, index + 1))
    return spans, dropped


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
    encoded = renderer.encode(turns)
    if slots is not None:
        *past, coming = slots
        opening = (*coming, *opening)
        for index, slot in zip((i for i, turn in enumerate(turns) if turn.is_trainable), past, strict=True):
            encoded[index] = encoded[index].behind(slot)
    head = leading_system_turns(turns)
    preamble = (*renderer.preamble_of(turns), *prompt)
    fixed = len(preamble) + sum(turn.longest for turn in encoded[:head])
    lengths = [*(turn.longest for turn in encoded), len(opening) + reserve]
    first = first_visible(rule, lengths, len(turns), head, fixed)
    if first is None:
        needed = fixed + lengths[-1]
        also = "the prompt, " if prompt else ""
        reply = f"a reply of max_new_tokens ({reserve})" if reserve else "a reply"
        raise InputError(f"max_length: found {rule.max_length}, expected at least {needed} to hold {also}the system "
                         f"turns and {reply}")
    kept = renderer.window_ids(turns, encoded, first, len(turns), live=False)
    return [*preamble, *(token for ids in kept for token in ids), *opening]
