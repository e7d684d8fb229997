"""Turns as text: what the chat template prints of a dialogue, piece by piece, and where that cannot be followed."""

import functools
import json
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from offline_lmrl.data.errors import InputError
from offline_lmrl.data.templates import WHITE_SPACE, ChatTemplate, TemplateText, probe
from offline_lmrl.data.trajectory import Turn, leading_system_turns

MISMATCH = "dialogues that are rendered otherwise than the chat template prints them"
THINK = ("<think>", "</think>")

Form = tuple[tuple[bool, str], ...]  # (is it content?, text): opening first, closing last


class TurnText(NamedTuple):
    """A turn as text, in the forms of `EncodedTurn`.

    as_is: the template prints it as it prints any other. prompt: read before it; None = the usual one.
    """

    ids: Form
    loop: Form
    past: Form
    after_system: Form
    as_is: bool = True
    prompt: str | None = None

    def opened(self, prompt: str, before: str, usual: Sequence[str]) -> "TurnText":
        """An agent's turn after another prompt than the usual ones, with `before` as the text before its words."""

        def change(form: Form) -> Form:
            pieces = list(form)
            for opening in sorted(usual, key=len, reverse=True):
                text = "".join(piece for _, piece in pieces[:2]) if not pieces[1][0] else pieces[0][1]
                if text.startswith(opening):
                    rest = [(False, text.removeprefix(opening)), *pieces[1 if pieces[1][0] else 2 :]]
                    between = before.removeprefix(prompt) if before.startswith(prompt) else ""
                    return ((False, before.removesuffix(between)), (False, between), *rest)
            return form

        forms = [change(form) for form in (self.ids, self.loop, self.past, self.after_system)]
        return TurnText(*forms, self.as_is, prompt)


class Block(NamedTuple):
    """An agent's turn that tools answer.

    around: the text before, between and after the results. quoted: results are printed as in JSON. strips: white space
    that they lose. dropped: the template prints nothing of them. follows: prompt, and text before the words, of an
    agent's turn after them; None = the usual ones.
    """

    agent: TurnText
    around: list[str]
    quoted: bool
    strips: tuple[str, str]
    dropped: bool
    follows: tuple[str, str] | None


def in_window(
    turns: Sequence[Turn], speaks_as_user: Callable[[Turn], bool], first: int, stop: int, live: bool
) -> Iterator[tuple[int, str]]:
    """The turns of a window, the leading system turns and turns first..stop−1, and the form that each has there.

    live: a last turn of the agent's is in the form that it is trained in.
    """
    head = leading_system_turns(turns)
    places = [*range(head), *range(max(first, head), stop)]
    # The result of a tool is no new question, whoever the template lets speak it.
    last_user = next((i for i in reversed(places) if speaks_as_user(turns[i]) and turns[i].role != "tool"), -1)
    for n, i in enumerate(places):
        if turns[i].role == "system":
            before_user = n + 1 < len(places) and speaks_as_user(turns[places[n + 1]])
            yield i, "past" if before_user else "loop"
        elif turns[i].role != "assistant":
            yield i, "after_system" if n == head > 0 else "loop"
        elif live and i == stop - 1:
            yield i, "ids"
        else:
            yield i, "past" if i < last_user else "loop"


class Printer:
    """Turns as text under one template.

    Args:
      text: the text around turns. stock: the chat template; None for the plain one.
      appends: what was printed never changes (`template: assembled`).
      controls: tokens that structure the dialogue; added: all added tokens of the tokenizer.
    """

    def __init__(
        self, text: TemplateText, stock: ChatTemplate | None, appends: bool, controls: set[str], added: Sequence[str]
    ):
        self.text, self._stock, self._appends = text, stock, appends
        # Where an agent's text holds one of these, the template may do more with it than print it.
        self._marks = _any_of({*THINK, *(name for name in added if not name.isspace())})
        self._typed = re.compile(f"{_any_of(controls - set(THINK)).pattern}|Probe\\d+Word|Held\\d+Word")
        self._ending = re.compile(f"({_any_of(controls).pattern})\\s*$")
        self._printed_turn = functools.lru_cache(maxsize=1 << 12)(self._print_turn)
        self._printed_block = functools.lru_cache(maxsize=1 << 12)(self._print_block)

    def speaks_as_user(self, turn: Turn) -> bool:
        """Whether the turn is printed as a user's."""
        return turn.role == "user" or turn.role in self.text.user_roles

    def preamble(self, turns: Sequence[Turn]) -> str:
        """The text before the first of these turns: with the template's own system text where they bring none."""
        if turns and turns[0].tools is not None and self._with_tools(turns[0]) is not None:
            return ""  # the turn holds it
        return self.text.preamble["system" if turns and turns[0].role == "system" else "default"]

    def own_prompt(self, turns: Sequence[Turn]) -> str | None:
        """The text read before an agent's turn that follows these; None = the usual prompt, as after all but tools."""
        if not turns or turns[-1].role != "tool":
            return None
        return self.texts([*turns, Turn("assistant", "x")])[-1].prompt

    def dialogue(self, turns: Sequence[Turn], prompt: bool) -> list[tuple[str, Form]]:
        """Role and text of every turn of a dialogue; with `prompt`, of one in which the agent speaks next."""
        texts = self.texts(turns)
        window = in_window(turns, self.speaks_as_user, 0, len(turns), live=not prompt)
        forms = [(turns[i].role, getattr(texts[i], name)) for i, name in window]
        if not prompt and self.speaks_as_user(turns[-1]):
            role, form = forms[-1]
            forms[-1] = role, (*form[:-1], (False, self.text.user_last))
        return forms

    def printed(self, turns: Sequence[Turn], prompt: bool = False, slot: str = "") -> str:
        """The dialogue as text; `prompt` adds the opening of the agent's next turn, with `slot` before it."""
        ours = self.preamble(turns) + "".join(text for _, form in self.dialogue(turns, prompt) for _, text in form)
        if not prompt:
            return ours
        own = self.own_prompt(turns)
        return ours + slot + (self.text.prompt if own is None else own)

    # Where the stock template prints something else.

    @functools.cached_property
    def mismatches(self) -> dict[str, str]:
        """Kinds of dialogue that are not rendered as the stock template prints them, with the first difference.

        Keys: "plain" (user and agent alone), "system", "thoughts", "tools": what a dialogue must hold to be of the
        kind. Probe dialogues are compared, up to three turns and a prompt, and not their tokens.
        """
        found: dict[str, str] = {}
        for kind, name, turns, prompt in cells():
            if kind not in found:
                difference = self.differences(turns, prompt)
                if difference is not None:
                    found[kind] = f"{name}: {difference}"
        return found

    @property
    def prompt_mismatch(self) -> str | None:
        """One line where the generation prompt is no beginning of a finished turn: what is learnt from logs is then
        learnt elsewhere than where an engine begins a reply."""
        if self.text.live[0].startswith(self.text.prompt):
            return None
        return (
            f"the generation prompt ends with {self.text.prompt[-20:]!r}, but a finished turn of the agent begins "
            f"with {self.text.live[0][-20:]!r}"
        )

    def _is_unusual(self, turns: Sequence[Turn]) -> bool:
        """Whether the dialogue holds what the probe dialogues do not cover in every combination."""
        roles = ["user" if self.speaks_as_user(turn) else turn.role for turn in turns]
        apart = any(
            turn.thinking
            or turn.tool_calls
            or turn.tools
            or turn.role == "tool"
            or "</think>" in turn.content
            or (turn.role == "system" and not turn.content)
            for turn in turns
        )
        return apart or "system" in roles[1:] or any(map(operator.eq, roles, roles[1:]))

    def _begins_at_prompt(self, text: TurnText) -> bool:
        prompt = self.text.prompt if text.prompt is None else text.prompt
        return "".join(piece for _, piece in text.ids).startswith(prompt)

    @functools.cached_property
    def unprinted(self) -> frozenset[str]:
        """The kinds of text that are rendered nowhere: "thoughts", "tool calls", "tool results", "lists of tools"."""
        user, thought, call = (
            Turn("user", _word(0)),
            Turn("assistant", "So", thinking=_word(1)),
            Turn("assistant", "", tool_calls=json.dumps(_CALLS)),
        )
        answer = Turn("tool", _word(2), name="look_up", tool_call_id="call00000")
        shown = {
            "thoughts": ([user, thought], _word(1)),
            "tool calls": ([user, call], "look_up"),
            "tool results": ([user, call, answer, thought], _word(2)),
            "lists of tools": ([Turn("system", "", tools=json.dumps(_TOOLS)), user], "look_up"),
        }
        return frozenset(name for name, (turns, word) in shown.items() if word not in self.printed(turns))

    def faults_in(self, turns: Sequence[Turn]) -> list[str]:
        """What of a dialogue is rendered otherwise than the stock template prints it, or not at all: one line each.

        Those of the first kind begin with MISMATCH.
        """
        held = {
            "thoughts": any(turn.thinking for turn in turns),
            "tool calls": any(turn.tool_calls for turn in turns),
            "tool results": any(turn.role == "tool" for turn in turns),
            "lists of tools": any(turn.tools for turn in turns),
        }
        lines = [f"{name} that the chat template does not print" for name in sorted(self.unprinted) if held[name]]
        if self.mismatches:
            kinds = {
                "plain": True,
                "system": any(turn.role == "system" and turn.content for turn in turns),
                "thoughts": held["thoughts"] or any("</think>" in turn.content for turn in turns),
                "tools": held["tool calls"] or held["tool results"] or held["lists of tools"],
            }
            lines += [f"{MISMATCH} ({text})" for kind, text in self.mismatches.items() if kinds[kind]]
        if self._is_unusual(turns):
            prompt = turns[-1].role != "assistant"
            named = any(line.startswith(MISMATCH) for line in lines)
            if not named and self.differences(turns, prompt) is not None:
                lines.append(f"{MISMATCH} (in their tools, thoughts, or order of turns; `check` shows where)")
            agent = [text for turn, text in zip(turns, self.texts(turns), strict=True) if turn.role == "assistant"]
            if self.prompt_mismatch is None and not all(map(self._begins_at_prompt, agent)):
                lines.append("replies that do not begin where the generation prompt ends, which opens a thought")
        if self.prompt_mismatch is not None:
            lines.append(f"template: {self.prompt_mismatch}")
        return lines

    def differences(self, turns: Sequence[Turn], prompt: bool) -> str | None:
        """One line on the first difference between this text and what the stock template prints; None if none."""
        if self._stock is None:
            return None
        try:
            stock = self.stock(turns, prompt)
        except InputError as error:
            return f"the template refuses this dialogue: {error.__cause__ or error}"
        ours = self.printed([unsampled(turn) for turn in turns], prompt)
        if stock == ours:
            return None
        i = first_difference(stock, ours)
        return f"character {i}: the template prints {_shown(stock, i)}, the assembly has {_shown(ours, i)}"

    def stock(self, turns: Sequence[Turn], prompt: bool) -> str:
        """The stock template's own text for a dialogue. Raises InputError where it refuses that."""
        return self._stock.turns(
            [
                replace(turn, role="user") if turn.role == "environment" and self.speaks_as_user(turn) else turn
                for turn in map(unsampled, turns)
            ],
            prompt,
        )

    @functools.cached_property
    def probes(self) -> list[str] | None:
        """What the stock template prints of the probe dialogues; None for the plain template."""
        if self._stock is None:
            return None
        printed = []
        for _, _, turns, prompt in cells():
            try:
                printed.append(self._stock.turns(turns, prompt))
            except InputError:
                printed.append("refused")
        return printed

    # Turns.

    def texts(self, turns: Sequence[Turn]) -> list[TurnText]:
        texts: list[TurnText] = []
        opened: tuple[str, str] | None = None  # of an agent's turn after tools: prompt, and text before the words
        head = leading_system_turns(turns)
        holds_tools = head > 0 and turns[head - 1].tools is not None
        while len(texts) < len(turns):
            start = len(texts)
            stop = start + 1
            while turns[start].role == "assistant" and stop < len(turns) and turns[stop].role == "tool":
                stop += 1
            block, follows = self._block(turns[start], turns[start + 1 : stop])
            if opened is not None and turns[start].role == "assistant":
                block[0] = block[0].opened(*opened, (self.text.prompt, self.text.live[0], self.text.past[0]))
            if holds_tools and self.speaks_as_user(turns[start]) and self._stock is not None:
                # What the tools print may stand in the first user turn; its opening belongs to the system turn.
                block[0] = block[0]._replace(after_system=((False, ""), *block[0].ids[1:]))
            texts, opened = texts + block, follows
        return texts

    def _block(self, turn: Turn, tools: Sequence[Turn]) -> tuple[list[TurnText], tuple[str, str] | None]:
        """An agent's turn with the tool results that answer it, or any other turn alone; and the prompt and the text
        before the words of an agent's turn that follows, where they are not the usual ones."""
        block = None
        if tools and self._stock is not None:
            answers = tuple(replace(tool, content=probe(10 + i)) for i, tool in enumerate(tools))
            block = self._printed_block(unsampled(turn), answers)
        if block is None:
            alone = self._agent(turn) if turn.role == "assistant" else self._other(turn)
            return [alone, *map(self._other, tools)], None
        texts = [block.agent]
        for i, tool in enumerate(tools):
            content = _strip(tool.content, block.strips)
            content = json.dumps(content, ensure_ascii=False)[1:-1] if block.quoted else content
            content = "" if block.dropped else content
            form = (False, block.around[0] if i == 0 else ""), (True, content), (False, block.around[i + 1])
            texts.append(TurnText(form, form, form, form))
        return texts, block.follows

    def _other(self, turn: Turn) -> TurnText:
        """A turn that is not the agent's."""
        text, content = self.text, _strip(turn.content, self.text.strips.get(turn.role, ("", "")))
        if turn.tools is not None:
            form = self._with_tools(turn)
            if form is not None:
                last, opening = form[-2][1], self.text.opening["user"]
                # Some templates print the tools inside the user's turn, which is closed before anybody else speaks.
                closed = last.removesuffix(opening) if last.endswith(opening) else last + self.text.closing["user"]
                bare = (*form[:-2], (False, closed), form[-1])
                return TurnText(bare, bare, form, bare)
            content = f"{content}\n{turn.tools}" if content else turn.tools
        closing = False, text.closing[turn.role]
        form = (False, text.opening[turn.role]), (True, text.lead[turn.role] + content), closing
        if not self.speaks_as_user(turn) or text.user_after_system == text.opening["user"] + text.lead["user"]:
            return TurnText(form, form, form, form)
        return TurnText(form, form, form, ((False, text.user_after_system), (True, content), closing))

    def _agent(self, turn: Turn) -> TurnText:
        text, content = self.text, turn.content
        if self._stock is not None:
            apart = turn.thinking is not None or turn.tool_calls is not None
            if apart or not content or content != content.strip() or self._marks.search(content):
                printed = self._printed_turn(unsampled(turn))
                if printed is not None:
                    return printed
        if turn.tool_calls is not None:
            content = f"{content}\n{turn.tool_calls}" if content else turn.tool_calls
        live, past = (self._agent_form(*around, content) for around in (text.live, text.past))
        return TurnText(live, past, past, past)

    def _agent_form(self, before: str, after: str, content: str) -> Form:
        fixed, lead = self.before_content(before)
        return (False, before.removesuffix(fixed + lead)), (False, fixed), (True, lead + content), (False, after)

    def before_content(self, before: str) -> tuple[str, str]:
        """The text between the generation prompt and the agent's words: what is the template's own, and white space
        that belongs to the words' tokens."""
        between = before.removeprefix(self.text.prompt) if before.startswith(self.text.prompt) else ""
        lead = between if between.isspace() else " " if between.endswith(" ") else ""
        return between.removesuffix(lead), lead

    @property
    def _user_opening(self) -> str:
        return self.text.opening["user"] + self.text.lead["user"]

    def _with_tools(self, turn: Turn) -> Form | None:
        """A leading system turn that holds tools, from the preamble to the opening of the user's turn; None where no
        template prints it."""
        if self._stock is None:
            return None
        turn, names = self._held(turn)
        pieces = self._stock.around([turn, Turn("user", probe(0)), Turn("assistant", probe(1))])
        return None if pieces is None else self._segments(pieces[0].removesuffix(self.text.lead["user"]), "", names)

    def _print_turn(self, turn: Turn) -> TurnText | None:
        """An agent's turn as the template itself prints it between probes; None where it refuses that."""
        turn, names = self._held(turn)
        printed = self._print_forms(turn)
        if printed is None:
            return None
        live, past = (self._segments(*form, names, self.text.prompt) for form in printed)
        return TurnText(live, past, past, past, as_is=False)

    def _print_forms(self, turn: Turn) -> tuple[tuple[str, str], tuple[str, str]] | None:
        """Text up to the closing, and closing, of an agent's turn: live and past."""
        user, later = Turn("user", probe(0)), (Turn("user", probe(1)), Turn("assistant", probe(2)))
        live = self._stock.around([user, turn])
        if live is None:
            return None
        body, closing = self._split(live[1].removeprefix(self.text.closing["user"]), self.text.live[1])
        past = self._stock.around([user, turn, *later])
        if past is None:
            return (body, closing), (body, closing)
        printed = past[1].removeprefix(self.text.closing["user"]).removesuffix(self._user_opening)
        past_body, past_closing = self._split(printed, self.text.past[1])
        return (body, closing), (body if self._appends else past_body, past_closing)

    def _split(self, text: str, closing: str) -> tuple[str, str]:
        """A turn's text and its closing: the template's usual one, or a control token at the end."""
        if not text.endswith(closing):
            ending = self._ending.search(text)
            closing = "" if ending is None else text[ending.start() :]
        return text.removesuffix(closing), closing

    def _print_block(self, turn: Turn, tools: tuple[Turn, ...]) -> "Block | None":
        """An agent's turn and the tool results, probes, that answer it; None where the template refuses them."""
        turn, names = self._held(turn)
        user, later = Turn("user", probe(0)), (Turn("assistant", probe(1)), Turn("user", probe(2)))
        forms = self._print_forms(turn)
        prompted = self._stock.around([user, turn, *tools], prompt=True)
        past = self._stock.around([user, turn, *tools, *later], prompt=True)
        dropped = prompted is None and self._drops(turn, tools)
        if dropped:
            prompted = self._stock.around([user, turn], prompt=True)
            past = self._stock.around([user, turn, *later], prompt=True)
        if forms is None or prompted is None or past is None:
            return None
        (body, closing), (past_body, past_closing) = forms
        printed, printed_past = (pieces[1].removeprefix(self.text.closing["user"]) for pieces in (prompted, past))
        loop_body = next((text for text in (body, past_body) if printed.startswith(text)), None)
        if loop_body is None:
            return None
        rest = printed.removeprefix(loop_body)
        loop_closing = next((text for text in (closing, past_closing) if rest.startswith(text)), "")
        opening = rest.removeprefix(loop_closing)
        around = ["" if dropped else opening, *prompted[2:]]
        usual = around[-1].endswith(self.text.prompt)
        if dropped:
            # The text after the turn is the prompt, or nothing.
            usual, around = opening == self.text.prompt, [""] * (len(tools) + 1)
            if not usual and opening:
                return None
            opening = ""
        elif usual:
            around[-1] = around[-1].removesuffix(self.text.prompt)
        follows = None
        if not usual:
            follows = "", past[-3].removeprefix(around[-1])
        after = loop_closing + opening
        if self._appends or dropped or not printed_past.endswith(after):
            past_body = loop_body
        else:
            past_body = printed_past.removesuffix(after)
        live, loop, past_form = (
            self._segments(*form, names, self.text.prompt)
            for form in ((body, closing), (loop_body, loop_closing), (past_body, loop_closing))
        )
        agent = TurnText(live, loop, past_form, past_form, as_is=False)
        quoted, strips = (False, ("", "")) if dropped else self._changed_results(turn, tools[0])
        return Block(agent, around, quoted, strips, dropped, follows)

    def _drops(self, turn: Turn, tools: Sequence[Turn]) -> bool:
        """Whether the template prints nothing of tool results."""
        user = Turn("user", probe(0))
        try:
            return self._stock.turns([user, turn, *tools], True) == self._stock.turns([user, turn], True)
        except InputError:
            return False

    def _changed_results(self, turn: Turn, tool: Turn) -> tuple[bool, tuple[str, str]]:
        """Whether a tool's result is quoted as in JSON, and the white space that it loses on both sides."""
        user, word = Turn("user", probe(0)), tool.content
        plain = self._stock.turns([user, turn, tool], True)

        def lost(text: str) -> bool:
            edged = replace(tool, content=text)
            return self._stock.turns([user, turn, edged], True) != plain.replace(word, text)

        quoted = json.dumps(f'"{word}"')[1:-1] in self._stock.turns([user, turn, replace(tool, content=f'"{word}"')])
        if quoted:
            return True, ("", "")
        return False, (
            "".join(space for space in WHITE_SPACE if lost(space + word)),
            "".join(space for space in WHITE_SPACE if lost(word + space)),
        )

    def _held(self, turn: Turn) -> tuple[Turn, list[str]]:
        """The turn with a word in place of every control token typed in it, and what the words stand for."""
        names: list[str] = []

        def hold(match: re.Match) -> str:
            names.append(match.group())
            return f"Held{len(names) - 1}Word"

        fields = {
            name: self._typed.sub(hold, getattr(turn, name))
            for name in ("content", "thinking", "tool_calls", "tools")
            if getattr(turn, name)
        }
        return replace(turn, **fields), names

    def _segments(self, text: str, closing: str, names: Sequence[str], opening: str = "") -> Form:
        """What the template printed as a form: its text, with typed control tokens as content."""
        opening = opening if text.startswith(opening) else ""
        pieces = _HELD.split(text.removeprefix(opening))
        inner = [(i % 2 == 1, names[int(piece)] if i % 2 else piece) for i, piece in enumerate(pieces)]
        return (False, opening), *inner, (False, closing)


_HELD = re.compile(r"Held(\d+)Word")


def _any_of(texts: set[str]) -> re.Pattern:
    """Matches any of these texts, the longest first."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")


def _strip(text: str, sides: tuple[str, str]) -> str:
    left, right = sides
    if set(left) >= set(WHITE_SPACE):  # then any white space, that of other scripts too
        text = text.lstrip()
    elif left:
        text = text.lstrip(left)
    if set(right) >= set(WHITE_SPACE):
        return text.rstrip()
    return text.rstrip(right) if right else text


def unsampled(turn: Turn) -> Turn:
    """The turn without what was sampled, credited and paid, which no template prints."""
    if turn.role == "assistant" or turn.token_ids is not None:
        return replace(turn, trainable=None, reward=None, token_ids=None, behaviour_log_prob=None)
    return turn


_CALLS = [{"id": "call00000", "type": "function", "function": {"name": "look_up", "arguments": {"key": "Key"}}}]
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Look something up.",
            "parameters": {
                "type": "object",
                "properties": {"key": {"type": "string", "description": "What."}},
                "required": ["key"],
            },
        },
    }
]


@functools.cache
def cells() -> tuple[tuple[str, str, tuple[Turn, ...], bool], ...]:
    """Probe dialogues to compare with the stock template: kind, name, turns, and whether a prompt follows.

    Fingerprints are taken of what is printed of them: whoever changes them raises SCHEME (rendering.py).
    """
    user, agent, more, again = (Turn(role, _word(i)) for i, role in enumerate(("user", "assistant") * 2))
    third, system = Turn("user", _word(4)), Turn("system", _word(5))
    thought, inline = replace(agent, thinking=_word(6)), replace(agent, content=f"<think>\n{_word(6)}\n</think>\n\nSo")
    call = replace(agent, content="", tool_calls=json.dumps(_CALLS))
    answer = Turn("tool", _word(7), name="look_up", tool_call_id="call00000")
    tools = Turn("system", "", tools=json.dumps(_TOOLS))
    dialogues: list[tuple[str, str, list[Turn]]] = [
        ("plain", "one turn", [user]),
        ("plain", "two turns", [user, agent]),
        ("plain", "three turns", [user, agent, more]),
        ("plain", "four turns", [user, agent, more, again]),
        ("thoughts", "a thought", [user, thought]),
        ("thoughts", "a thought in an earlier turn", [user, thought, more]),
        ("thoughts", "a thought in an earlier turn", [user, thought, more, again]),
        ("thoughts", "a thought in the text", [user, inline]),
        ("thoughts", "a thought in an earlier text", [user, inline, more]),
        ("tools", "a tool call", [user, call]),
        ("tools", "a tool call and its result", [user, call, answer]),
        ("tools", "a tool call, its result and a reply", [user, call, answer, again]),
        ("tools", "a tool call in an earlier turn", [user, call, answer, again, third]),
        ("tools", "a thought, a tool call and its result", [user, replace(call, thinking=_word(6)), answer]),
        ("tools", "a list of tools", [tools, user]),
    ]
    dialogues += [
        ("system" if kind == "plain" else kind, f"a system turn, {name}", [system, *turns])
        for kind, name, turns in dialogues
        if turns[0] is not tools
    ]
    dialogues.append(("tools", "a system turn and a list of tools", [replace(tools, content=_word(5)), user]))
    prompts = {"user": (True, False), "tool": (True,), "assistant": (False,)}
    return tuple(
        (kind, name + " and the prompt" * prompt, tuple(turns), prompt)
        for kind, name, turns in dialogues
        for prompt in prompts[turns[-1].role]
    )


def _word(i: int) -> str:
    return f"Text{i}Here"


def first_difference(first: Sequence, second: Sequence) -> int:
    """The place where two sequences differ first; the length of the shorter one where it begins the other."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _shown(text: str, i: int) -> str:
    return repr(text[max(i - 10, 0) : i + 30])
