"""Print turns as text, one by one, as the chat template prints the whole dialogue, and report any difference.

A probe is a unique word in place of a turn's content; what the template prints between probes is what it adds.
templates.py explains opening, closing, preamble, generation prompt, and the live and past form of an agent's turn. The
stock template is the tokenizer's own chat template. Control tokens are the added tokens that structure a dialogue.
"""

import functools
import json
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from offline_lmrl.errors import InputError
from offline_lmrl.logs.trajectory import Turn, leading_system_turns
from offline_lmrl.tokens.templates import WHITE_SPACE, ChatTemplate, TemplateText, probe

MISMATCH = "dialogues that are rendered differently from what the chat template prints"
THINK = ("<think>", "</think>")

Form = tuple[tuple[bool, str], ...]  # (is content, text) pairs: opening first, closing last


class TurnText(NamedTuple):
    """A turn as text, in the forms ids, loop, past and after_system of `EncodedTurn` (rendering.py).

    as_is: True if the template prints the turn's content unchanged between the usual opening and closing.
    prompt: the generation prompt before an agent's turn; None = the usual one.
    """

    ids: Form
    loop: Form
    past: Form
    after_system: Form
    as_is: bool = True
    prompt: str | None = None

    def opened(self, prompt: str, before: str, usual: Sequence[str]) -> "TurnText":
        """Return this agent turn with another opening, as some templates print it after tool results.

        Args:
          prompt: the generation prompt before the turn.
          before: the whole text before the agent's words; it usually begins with `prompt`.
          usual: the openings to replace, if a form begins with one of them.
        """

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
    """An agent's turn together with the text around the n tool results that answer it.

    agent: the agent's turn.
    around: n + 1 texts, before, between and after the results.
    quoted: True if the contents of results are printed as JSON strings.
    strips: two texts, the white-space characters that the template removes on the left of a result's content, and
      those that it removes on the right.
    dropped: True if the template does not print results at all.
    follows: how an agent's turn directly after the results begins, as two texts: its generation prompt, and the whole
      text before the agent's words. None = as any other agent's turn.
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
    """Yield the index and the form of each turn of a window: the leading system turns and turns first..stop−1.

    The form is the name of a field of `TurnText` and `EncodedTurn`: "ids", "loop", "past" or "after_system".

    Args:
      turns: all turns of the dialogue.
      speaks_as_user: a function that returns True for a turn that is printed as a user's.
      live: True: an agent turn at the end of the window is in the form in which it is trained ("ids").
    """
    head = leading_system_turns(turns)
    places = [*range(head), *range(max(first, head), stop)]
    # A tool's result is not a new question, even if the template prints it as a user's turn.
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
    """A printer of turns as text under one template.

    Args:
      text: the text around turns.
      stock: the stock template; None for the plain template.
      appends: True: a printed turn never changes later (`template: assembled`).
      controls: the texts of the control tokens.
      added: the texts of all added tokens of the tokenizer.
    """

    def __init__(
        self, text: TemplateText, stock: ChatTemplate | None, appends: bool, controls: set[str], added: Sequence[str]
    ):
        self.text, self._stock, self._appends = text, stock, appends
        # If an agent's text contains one of these, the template may do more than print it.
        self._marks = _any_of({*THINK, *(name for name in added if not name.isspace())})
        self._typed = re.compile(f"{_any_of(controls - set(THINK)).pattern}|Probe\\d+Word|Held\\d+Word")
        self._ending = re.compile(f"({_any_of(controls).pattern})\\s*$")
        self._printed_turn = functools.lru_cache(maxsize=1 << 12)(self._print_turn)
        self._printed_block = functools.lru_cache(maxsize=1 << 12)(self._print_block)

    def speaks_as_user(self, turn: Turn) -> bool:
        """True if the turn is printed as a user's."""
        return turn.role == "user" or turn.role in self.text.user_roles

    def preamble(self, turns: Sequence[Turn]) -> str:
        """Return the text before the first turn, with the template's default system text if the turns have none."""
        if turns and turns[0].tools is not None and self._with_tools(turns[0]) is not None:
            return ""  # the system turn contains the preamble
        return self.text.preamble["system" if turns and turns[0].role == "system" else "default"]

    def own_prompt(self, turns: Sequence[Turn]) -> str | None:
        """Return the generation prompt after these turns; None = the usual one.

        After tool results, some templates print another prompt than usual, or none.
        """
        if not turns or turns[-1].role != "tool":
            return None
        return self.texts([*turns, Turn("assistant", "x")])[-1].prompt

    def dialogue(self, turns: Sequence[Turn], prompt: bool) -> list[tuple[str, Form]]:
        """Return the role and the printed text of every turn of a dialogue.

        Args:
          prompt: True: the generation prompt will follow, so that an agent turn at the end is not in its live form.
        """
        texts = self.texts(turns)
        window = in_window(turns, self.speaks_as_user, 0, len(turns), live=not prompt)
        forms = [(turns[i].role, getattr(texts[i], name)) for i, name in window]
        if not prompt and self.speaks_as_user(turns[-1]):
            role, form = forms[-1]
            forms[-1] = role, (*form[:-1], (False, self.text.user_last))
        return forms

    def printed(self, turns: Sequence[Turn], prompt: bool = False, before: str = "") -> str:
        """Return the dialogue as text.

        Args:
          prompt: True: add the generation prompt.
          before: text put directly before the generation prompt, such as the text of a requested return.
        """
        ours = self.preamble(turns) + "".join(text for _, form in self.dialogue(turns, prompt) for _, text in form)
        if not prompt:
            return ours
        own = self.own_prompt(turns)
        return ours + before + (self.text.prompt if own is None else own)

    # Differences from the stock template.

    @functools.cached_property
    def mismatches(self) -> dict[str, str]:
        """Map each kind of dialogue that is printed differently from the stock template to one line on the difference.

        The kinds are "plain" (user and agent alone), "system", "thoughts" and "tools", named after what such a
        dialogue contains. They are found on the test dialogues of `cells`, whose texts are compared, but not tokens. A
        kind without a difference is missing.
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
        """A line on the generation prompt if the live form of agent turns does not begin with it; None if it does.

        With such a prompt, training on logs does not cover the state in which an inference engine begins a reply.
        """
        if self.text.live[0].startswith(self.text.prompt):
            return None
        return (
            f"the generation prompt ends with {self.text.prompt[-20:]!r}, but a finished turn of the agent begins "
            f"with {self.text.live[0][-20:]!r}"
        )

    def _is_unusual(self, turns: Sequence[Turn]) -> bool:
        """True if the dialogue contains something of which the test dialogues (`cells`) lack some combinations."""
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
        """The kinds of text that are never printed: "thoughts", "tool calls", "tool results", "lists of tools"."""
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
        """Return one line for each fault in how a dialogue is printed.

        Faults are parts that are not printed at all, differences from the stock template (their lines begin with
        MISMATCH), and agent turns that do not begin with the generation prompt.
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
                lines.append("replies that do not begin with the generation prompt, which opens a thought")
        if self.prompt_mismatch is not None:
            lines.append(f"template: {self.prompt_mismatch}")
        return lines

    def differences(self, turns: Sequence[Turn], prompt: bool) -> str | None:
        """Compare the text of a dialogue with what the stock template prints.

        Args:
          prompt: True: with the generation prompt.
        Returns: one line on the first difference; None if there is none, or no stock template.
        """
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
        return (
            f"character {i}: the template prints {_shown(stock, i)}, but the text for training has {_shown(ours, i)}"
        )

    def stock(self, turns: Sequence[Turn], prompt: bool) -> str:
        """Return the text that the stock template prints for a dialogue.

        Args:
          prompt: True: with the generation prompt.
        Raises: InputError if the template refuses the dialogue.
        """
        return self._stock.turns(
            [
                replace(turn, role="user") if turn.role == "environment" and self.speaks_as_user(turn) else turn
                for turn in map(unsampled, turns)
            ],
            prompt,
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

    # Conversion of turns to text.

    def texts(self, turns: Sequence[Turn]) -> list[TurnText]:
        texts: list[TurnText] = []
        opened: tuple[str, str] | None = None  # for an agent's turn after tools: prompt, text before the words
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
                # Templates may print the list of tools inside the first user turn. The system turn's form then
                # contains the opening of that user turn.
                block[0] = block[0]._replace(after_system=((False, ""), *block[0].ids[1:]))
            texts, opened = texts + block, follows
        return texts

    def _block(self, turn: Turn, tools: Sequence[Turn]) -> tuple[list[TurnText], tuple[str, str] | None]:
        """Print an agent's turn with the tool results that answer it, or any other turn alone.

        Args:
          turn: the first turn.
          tools: the tool results that follow it; empty unless `turn` is the agent's.
        Returns: the texts of all these turns; and how an agent's turn directly after them begins, as
          `Block.follows` describes it.
        """
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
        """Return the text of a turn that is not the agent's."""
        text, content = self.text, _strip(turn.content, self.text.strips.get(turn.role, ("", "")))
        if turn.tools is not None:
            form = self._with_tools(turn)
            if form is not None:
                last, opening = form[-2][1], self.text.opening["user"]
                # Some templates print the tools inside the user's turn. If another speaker follows, that turn must be
                # closed first.
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
        """Split the text between the generation prompt and the agent's words.

        Returns: the template's own text, and the white space after it, which is tokenised together with the words.
        """
        between = before.removeprefix(self.text.prompt) if before.startswith(self.text.prompt) else ""
        lead = between if between.isspace() else " " if between.endswith(" ") else ""
        return between.removesuffix(lead), lead

    @property
    def _user_opening(self) -> str:
        return self.text.opening["user"] + self.text.lead["user"]

    def _with_tools(self, turn: Turn) -> Form | None:
        """Return the printed text of a leading system turn with tools, from the preamble to the next user's opening.

        Returns: the text as a form; None if the template refuses the dialogue or loses a probe, or if there is no
          stock template.
        """
        if self._stock is None:
            return None
        turn, names = self._held(turn)
        pieces = self._stock.around([turn, Turn("user", probe(0)), Turn("assistant", probe(1))])
        return None if pieces is None else self._segments(pieces[0].removesuffix(self.text.lead["user"]), "", names)

    def _print_turn(self, turn: Turn) -> TurnText | None:
        """Return an agent's turn as the stock template prints it in a dialogue whose other turns are probes.

        Returns: the turn in all forms; None if the template refuses the dialogue or loses a probe.
        """
        turn, names = self._held(turn)
        printed = self._print_forms(turn)
        if printed is None:
            return None
        live, past = (self._segments(*form, names, self.text.prompt) for form in printed)
        return TurnText(live, past, past, past, as_is=False)

    def _print_forms(self, turn: Turn) -> tuple[tuple[str, str], tuple[str, str]] | None:
        """Return (text up to the closing, closing) of an agent's turn, in the live and in the past form.

        If the template refuses a later turn, the past form is the live form. None if it refuses the turn itself.
        """
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
        """Split a turn's text from its closing, which is `closing` or, if the text ends otherwise, a control token."""
        if not text.endswith(closing):
            ending = self._ending.search(text)
            closing = "" if ending is None else text[ending.start() :]
        return text.removesuffix(closing), closing

    def _print_block(self, turn: Turn, tools: tuple[Turn, ...]) -> "Block | None":
        """Let the stock template print an agent's turn and the tool results that answer it, and split what it prints.

        Args:
          tools: the tool turns, whose contents are probes.
        Returns: None if the template refuses the dialogue, or prints it in a way that cannot be split into turns.
        """
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
        # Before tool results, the template may print the agent's turn in its live or in its past form.
        loop_body = next((text for text in (body, past_body) if printed.startswith(text)), None)
        if loop_body is None:
            return None
        rest = printed.removeprefix(loop_body)
        loop_closing = next((text for text in (closing, past_closing) if rest.startswith(text)), "")
        opening = rest.removeprefix(loop_closing)
        around = ["" if dropped else opening, *prompted[2:]]
        usual = around[-1].endswith(self.text.prompt)
        if dropped:
            # Without results, the text after the turn must be the prompt, or nothing.
            usual, around = opening == self.text.prompt, [""] * (len(tools) + 1)
            if not usual and opening:
                return None
            opening = ""
        elif usual:
            around[-1] = around[-1].removesuffix(self.text.prompt)
        follows = None
        if not usual:
            # Without a generation prompt after the results, past[-3] is the text from the last result to the next
            # words.
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
        """True if the template prints nothing for tool results."""
        user = Turn("user", probe(0))
        try:
            return self._stock.turns([user, turn, *tools], True) == self._stock.turns([user, turn], True)
        except InputError:
            return False

    def _changed_results(self, turn: Turn, tool: Turn) -> tuple[bool, tuple[str, str]]:
        """Find out how the template changes the content of a tool's result.

        Args:
          turn: the agent's turn with the call.
          tool: the result, whose content is a probe.
        Returns: True if the content is printed as a JSON string; and a pair of the white-space characters that the
          content loses on the left, and on the right.
        """
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
        """Replace control tokens and probe words that are typed in a turn by placeholders such as Held0Word.

        Only <think> and </think> stay as they are.

        Returns: the changed turn, and the replaced texts; placeholder i replaces text i.
        """
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
        """Convert text that the template printed to a form, in which typed control tokens count as content.

        Args:
          text: the printed text, with placeholders such as Held0Word.
          closing: the text after it, which becomes the closing.
          names: the texts that the placeholders replace (`_held`).
          opening: becomes the opening, if `text` begins with it.
        """
        opening = opening if text.startswith(opening) else ""
        pieces = _HELD.split(text.removeprefix(opening))
        inner = [(i % 2 == 1, names[int(piece)] if i % 2 else piece) for i, piece in enumerate(pieces)]
        return (False, opening), *inner, (False, closing)


_HELD = re.compile(r"Held(\d+)Word")


def _any_of(texts: set[str]) -> re.Pattern:
    """Return a pattern that matches any of these texts, trying the longest first."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")


def _strip(text: str, sides: tuple[str, str]) -> str:
    left, right = sides
    if set(left) >= set(WHITE_SPACE):  # assume that the template uses strip(), which also removes Unicode spaces
        text = text.lstrip()
    elif left:
        text = text.lstrip(left)
    if set(right) >= set(WHITE_SPACE):
        return text.rstrip()
    return text.rstrip(right) if right else text


def unsampled(turn: Turn) -> Turn:
    """Return the turn without sampled ids, log-probabilities, `trainable` and reward, which no template prints."""
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
    """Return the test dialogues on which a `Printer` is compared with the stock template.

    The fingerprint of a renderer covers the texts printed for them, so a change here must raise SCHEME (rendering.py).

    Returns: for each dialogue, its kind (one of those that `Printer.mismatches` lists), its name, its turns, and True
      if the generation prompt is added.
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
    """Return the first index at which two sequences differ; if one begins the other, the length of the shorter."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _shown(text: str, i: int) -> str:
    return repr(text[max(i - 10, 0) : i + 30])
