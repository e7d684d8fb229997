"""Compare what a renderer prints and encodes with what the stock template, the tokenizer's own, prints."""

import functools
import json
import logging
import operator
from collections.abc import Sequence
from dataclasses import replace
from os.path import commonprefix
from typing import TYPE_CHECKING

from offline_lmrl.errors import InputError
from offline_lmrl.logs.trajectory import Turn
from offline_lmrl.tokens.printing import unsampled

if TYPE_CHECKING:
    from offline_lmrl.tokens.rendering import Renderer

MISMATCH = "dialogues that are rendered differently from what the chat template prints"
TEMPLATE_ROWS = 100  # number of rows compared with the stock template, which is slow
KINDS = ("plain", "thoughts", "tools", "system")  # of dialogues, named after what they contain beside user and agent


class TemplateCheck:
    """A comparison of a renderer with the stock template.

    The plain template has no stock template, and differs from none.

    Args:
      renderer: prints and encodes the dialogues.
    """

    def __init__(self, renderer: "Renderer"):
        self.renderer, self.printer, self._stock = renderer, renderer.printer, renderer.printer.stock
        self._noticed: set[str] = set()
        self.mismatch, self._prints = functools.cache(self._mismatch), functools.cache(self._prints_part)

    def _mismatch(self, kind: str) -> str | None:
        """Compare the texts of the test dialogues (`cells`) of a kind, but not their tokens.

        Returns: one line on the first difference; None if there is none.
        """
        for own, name, turns, prompt in cells():
            if own == kind and (difference := self.text_difference(turns, prompt)) is not None:
                return f"{name}: {difference}"
        return None

    @property
    def mismatches(self) -> dict[str, str]:
        """Map each kind of dialogue that is printed differently to one line on the difference."""
        return {kind: line for kind in KINDS if (line := self.mismatch(kind)) is not None}

    @property
    def prompt_mismatch(self) -> str | None:
        """A line on the generation prompt if the live form of agent turns does not begin with it; None if it does.

        With such a prompt, training on logs does not cover the state in which an inference engine begins a reply.
        """
        text = self.printer.text
        if text.live[0].startswith(text.prompt):
            return None
        return (
            f"the generation prompt ends with {text.prompt[-20:]!r}, but a finished turn of the agent begins "
            f"with {text.live[0][-20:]!r}"
        )

    @functools.cached_property
    def probes(self) -> list[str] | None:
        """The stock template's text for each test dialogue of `cells`; None for the plain template."""
        if self._stock is None:
            return None
        printed = []
        for _, _, turns, prompt in cells():
            try:
                printed.append(self._stock.turns(turns, prompt))
            except InputError:
                printed.append("refused")
        return printed

    def _prints_part(self, part: str) -> bool:
        """True if "thoughts", "tool calls", "tool results" or "lists of tools" are printed at all."""
        user, thought = Turn("user", _word(0)), Turn("assistant", "So", thinking=_word(6))
        turns, word = {
            "thoughts": ([user, thought], _word(6)),
            "tool calls": ([user, _CALL], "look_up"),
            "tool results": ([user, _CALL, _ANSWER, thought], _word(7)),
            "lists of tools": ([_TOOLS, user], "look_up"),
        }[part]
        return word in self.printer.printed(turns)

    def faults_in(self, turns: Sequence[Turn]) -> list[str]:
        """Return one line for each fault in how a dialogue is printed.

        Faults are parts that are not printed at all, differences from the stock template (their lines begin with
        MISMATCH), and agent turns that do not begin with the generation prompt.
        """
        roles = {turn.role for turn in turns}
        parts = {
            "lists of tools": any(turn.tools for turn in turns),
            "thoughts": any(turn.thinking for turn in turns),
            "tool calls": any(turn.tool_calls for turn in turns),
            "tool results": "tool" in roles,
        }
        lines = [
            f"{part} that the chat template does not print"
            for part, held in parts.items()
            if held and not self._prints(part)
        ]
        thoughts = parts.pop("thoughts") or any("</think>" in turn.content for turn in turns)
        kinds = {
            "plain": True,
            "thoughts": thoughts,
            "tools": any(parts.values()),
            "system": "system" in roles and any(turn.role == "system" and turn.content for turn in turns),
        }
        found = [self.mismatch(kind) for kind, held in kinds.items() if held]
        mismatches = [f"{MISMATCH} ({text})" for text in found if text is not None]
        lines += mismatches
        if thoughts or kinds["tools"] or self._is_unusual(turns):
            if not mismatches and self.text_difference(turns, turns[-1].role != "assistant") is not None:
                lines.append(f"{MISMATCH} (in their tools, thoughts, or order of turns; `check` shows where)")
            if self.prompt_mismatch is None and not self._begin_at_prompt(turns):
                lines.append("replies that do not begin with the generation prompt, which opens a thought")
        if self.prompt_mismatch is not None:
            lines.append(f"template: {self.prompt_mismatch}")
        return lines

    def _is_unusual(self, turns: Sequence[Turn]) -> bool:
        """True if the test dialogues (`cells`) lack dialogues with the same order of speakers."""
        roles = ["user" if self.printer.speaks_as_user(turn) else turn.role for turn in turns]
        empty = any(turn.role == "system" and not turn.content for turn in turns)
        return empty or "system" in roles[1:] or any(map(operator.eq, roles, roles[1:]))

    def _begin_at_prompt(self, turns: Sequence[Turn]) -> bool:
        for turn, text in zip(turns, self.printer.texts(turns), strict=True):
            prompt = self.printer.text.prompt if text.prompt is None else text.prompt
            if turn.role == "assistant" and not "".join(piece for _, piece in text.ids).startswith(prompt):
                return False
        return True

    def notice(self, turns: Sequence[Turn]) -> None:
        """Log a warning for each fault that `faults_in` finds in a dialogue, each message only once."""
        for line in self.faults_in(turns):
            if line not in self._noticed:
                self._noticed.add(line)
                logging.getLogger(__name__).warning(line)

    def text_difference(self, turns: Sequence[Turn], prompt: bool) -> str | None:
        """Compare the text of a dialogue with what the stock template prints.

        Args:
          prompt: True: with the generation prompt.
        Returns: one line on the first difference; None if there is none, or no stock template.
        """
        if self._stock is None:
            return None
        try:
            stock = self._printed_by_stock(turns, prompt)
        except InputError as error:
            return f"the template refuses this dialogue: {error.__cause__ or error}"
        ours = self.printer.printed([unsampled(turn) for turn in turns], prompt)
        if stock == ours:
            return None
        i = len(commonprefix([stock, ours]))
        shown = [repr(text[max(i - 10, 0) : i + 30]) for text in (stock, ours)]
        return f"character {i}: the template prints {shown[0]}, but the text for training has {shown[1]}"

    def difference(self, turns: Sequence[Turn], prompt: bool | None = None) -> str | None:
        """Compare the text and tokens for training with what the stock template prints.

        Args:
          prompt: True: compare with the generation prompt added; None = add it unless the agent speaks last.
        Returns: one line on the first difference; None if there is none, or no stock template.
        """
        prompt = turns[-1].role != "assistant" if prompt is None else prompt
        difference = self.text_difference(turns, prompt)
        if difference is not None or self._stock is None:
            return difference
        ids = self.renderer.tokens(turns, prompt)
        stock_ids = self.renderer.encoder.stock(self._printed_by_stock(turns, prompt))
        if stock_ids == ids:
            return None
        i = len(commonprefix([stock_ids, ids]))
        shown = [self.renderer.tokenizer.convert_ids_to_tokens(some[i : i + 4]) for some in (stock_ids, ids)]
        return f"token {i}: same text, but the template's tokens are {shown[0]} and those for training {shown[1]}"

    def first_difference(self, dialogues: Sequence[Sequence[Turn]]) -> str | None:
        """Compare the first TEMPLATE_ROWS of some dialogues with what the stock template prints.

        Returns: one line with the number of dialogues that differ and the first difference; None if all agree.
        """
        compared = map(self.difference, dialogues[:TEMPLATE_ROWS])
        found = [(number, text) for number, text in enumerate(compared, 1) if text is not None]
        if not found:
            return None
        number, text = found[0]
        return (
            f"{len(found)} of the first {min(TEMPLATE_ROWS, len(dialogues))} rows: the stock chat template prints "
            f"them differently from the text for training; row {number}: {text}"
        )

    def _printed_by_stock(self, turns: Sequence[Turn], prompt: bool) -> str:
        """Return the text that the stock template prints for a dialogue.

        Raises: InputError if the template refuses the dialogue.
        """
        as_user = [turn.role == "environment" and self.printer.speaks_as_user(turn) for turn in turns]
        asked = [replace(turn, role="user") if as_user[i] else turn for i, turn in enumerate(map(unsampled, turns))]
        return self._stock.turns(asked, prompt)


def _word(i: int) -> str:
    return f"Text{i}Here"


_FUNCTION = {
    "name": "look_up",
    "description": "Look something up.",
    "parameters": {
        "type": "object",
        "properties": {"key": {"type": "string", "description": "What."}},
        "required": ["key"],
    },
}
_CALLS = [{"id": "call00000", "type": "function", "function": {"name": "look_up", "arguments": {"key": "Key"}}}]
_AGENT = Turn("assistant", _word(1))
_CALL = replace(_AGENT, content="", tool_calls=json.dumps(_CALLS))
_ANSWER = Turn("tool", _word(7), name="look_up", tool_call_id="call00000")
_TOOLS = Turn("system", "", tools=json.dumps([{"type": "function", "function": _FUNCTION}]))


@functools.cache
def cells() -> tuple[tuple[str, str, tuple[Turn, ...], bool], ...]:
    """Return the test dialogues on which a renderer is compared with the stock template.

    The fingerprint of a renderer covers the texts printed for them, so a change here must raise SCHEME (rendering.py).

    Returns: for each dialogue, its kind (one of KINDS), its name, its turns, and True if the generation prompt is
      added.
    """
    user, more, third = (Turn("user", _word(i)) for i in (0, 2, 4))
    again, system = Turn("assistant", _word(3)), Turn("system", _word(5))
    thought = replace(_AGENT, thinking=_word(6))
    inline = replace(_AGENT, content=f"<think>\n{_word(6)}\n</think>\n\nSo")
    dialogues: list[tuple[str, str, list[Turn]]] = [
        ("plain", "one turn", [user]),
        ("plain", "two turns", [user, _AGENT]),
        ("plain", "three turns", [user, _AGENT, more]),
        ("plain", "four turns", [user, _AGENT, more, again]),
        ("thoughts", "a thought", [user, thought]),
        ("thoughts", "a thought in an earlier turn", [user, thought, more]),
        ("thoughts", "a thought in an earlier turn", [user, thought, more, again]),
        ("thoughts", "a thought in the text", [user, inline]),
        ("thoughts", "a thought in an earlier text", [user, inline, more]),
        ("tools", "a tool call", [user, _CALL]),
        ("tools", "a tool call and its result", [user, _CALL, _ANSWER]),
        ("tools", "a tool call, its result and a reply", [user, _CALL, _ANSWER, again]),
        ("tools", "a tool call in an earlier turn", [user, _CALL, _ANSWER, again, third]),
        ("tools", "a thought, a tool call and its result", [user, replace(_CALL, thinking=_word(6)), _ANSWER]),
        ("tools", "a list of tools", [_TOOLS, user]),
    ]
    dialogues += [
        ("system" if kind == "plain" else kind, f"a system turn, {name}", [system, *turns])
        for kind, name, turns in dialogues
        if turns[0] is not _TOOLS
    ]
    dialogues.append(("tools", "a system turn and a list of tools", [replace(_TOOLS, content=_word(5)), user]))
    prompts = {"user": (True, False), "tool": (True,), "assistant": (False,)}
    return tuple(
        (kind, name + " and the prompt" * prompt, tuple(turns), prompt)
        for kind, name, turns in dialogues
        for prompt in prompts[turns[-1].role]
    )
