"""Print turns as text, one by one, as the chat template prints the whole dialogue.

A probe is a unique word in place of a turn's content; what the template prints between probes is what it adds.
templates.py explains opening, closing, preamble, generation prompt, and the live and past form of an agent's turn. The
stock template is the tokenizer's own chat template. Control tokens are the added tokens that structure a dialogue.
"""

import functools
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from offline_lmrl.errors import InputError
from offline_lmrl.logs.trajectory import Turn, leading_system_turns
from offline_lmrl.tokens.templates import WHITE_SPACE, ChatTemplate, TemplateText, probe

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

    @classmethod
    def of(cls, *form: tuple[bool, str]) -> "TurnText":
        """Return a turn that has the same form everywhere."""
        return cls(form, form, form, form)

    def opened(self, prompt: str, before: str, usual: Sequence[str]) -> "TurnText":
        """Return this agent turn with another opening, as some templates print it after tool results.

        Args:
          prompt: the generation prompt before the turn.
          before: the whole text before the agent's words; it usually begins with `prompt`.
          usual: the openings to replace, if a form begins with one of them.
        """
        between = before.removeprefix(prompt) if before.startswith(prompt) else ""
        longest_first = sorted(usual, key=len, reverse=True)

        def change(form: Form) -> Form:
            text = form[0][1] + form[1][1]  # the template's text before the agent's words
            old = next((opening for opening in longest_first if text.startswith(opening)), None)
            if old is None:
                return form
            return (False, before.removesuffix(between)), (False, between), (False, text.removeprefix(old)), *form[2:]

        return TurnText(*map(change, self[:4]), self.as_is, prompt)


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

    def result(self, i: int, content: str) -> TurnText:
        """Return the text of tool result i."""
        content = "" if self.dropped else strip(content, self.strips)
        content = json.dumps(content, ensure_ascii=False)[1:-1] if self.quoted else content
        return TurnText.of((False, "" if i else self.around[0]), (True, content), (False, self.around[i + 1]))


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
        self.text, self.stock = text, stock
        self._rewritten = RewrittenTurns(text, stock, appends, controls)
        # If an agent's text contains one of these, the template may do more than print it.
        self._marks = any_of({*THINK, *(name for name in added if not name.isspace())})

    def speaks_as_user(self, turn: Turn) -> bool:
        """True if the turn is printed as a user's."""
        return turn.role == "user" or turn.role in self.text.user_roles

    def preamble(self, turns: Sequence[Turn]) -> str:
        """Return the text before the first turn, with the template's default system text if the turns have none."""
        if turns and turns[0].tools is not None and self._rewritten.with_tools(turns[0]) is not None:
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
        texts = [text._asdict() for text in self.texts(turns)]
        window = in_window(turns, self.speaks_as_user, 0, len(turns), live=not prompt)
        forms = [(turns[i].role, texts[i][name]) for i, name in window]
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

    def texts(self, turns: Sequence[Turn]) -> list[TurnText]:
        """Return every turn of a dialogue, or of a part of one, as text."""
        texts: list[TurnText] = []
        follows: tuple[str, str] | None = None  # as `Block.follows`
        head = leading_system_turns(turns)
        holds_tools = self.stock is not None and head > 0 and turns[head - 1].tools is not None
        while len(texts) < len(turns):
            turn, tools = turns[len(texts)], []
            if turn.role == "assistant":
                tools = list(itertools.takewhile(lambda after: after.role == "tool", turns[len(texts) + 1 :]))
            (text, *results), coming = self._block(turn, tools)
            if follows is not None and turn.role == "assistant":
                text = text.opened(*follows, (self.text.prompt, self.text.live[0], self.text.past[0]))
            if holds_tools and self.speaks_as_user(turn):
                # Templates may print the list of tools inside the first user turn. The system turn's form then
                # contains the opening of that user turn.
                text = text._replace(after_system=((False, ""), *text.ids[1:]))
            texts, follows = [*texts, text, *results], coming
        return texts

    def _block(self, turn: Turn, tools: Sequence[Turn]) -> tuple[list[TurnText], tuple[str, str] | None]:
        """Print an agent's turn with the tool results that answer it, or any other turn alone.

        Args:
          turn: the first turn.
          tools: the tool results that follow it; empty unless `turn` is the agent's.
        Returns: the texts of all these turns; and how an agent's turn directly after them begins, as
          `Block.follows` describes it.
        """
        if tools:
            answers = tuple(replace(tool, content=probe(10 + i)) for i, tool in enumerate(tools))
            block = self._rewritten.block(unsampled(turn), answers)
            if block is not None:
                return [block.agent, *(block.result(i, tool.content) for i, tool in enumerate(tools))], block.follows
        alone = self._agent(turn) if turn.role == "assistant" else self._other(turn)
        return [alone, *map(self._other, tools)], None

    def _other(self, turn: Turn) -> TurnText:
        """Return the text of a turn that is not the agent's."""
        text, content = self.text, strip(turn.content, self.text.strips.get(turn.role, ("", "")))
        if turn.tools is not None:
            form = self._rewritten.with_tools(turn)
            if form is not None:
                last, opening = form[-2][1], text.opening["user"]
                # Some templates print the tools inside the user's turn. If another speaker follows, that turn must be
                # closed first.
                closed = last.removesuffix(opening) if last.endswith(opening) else last + text.closing["user"]
                return TurnText.of(*form[:-2], (False, closed), form[-1])._replace(past=form)
            content = _on_lines(content, turn.tools)
        closing = False, text.closing[turn.role]
        printed = TurnText.of((False, text.opening[turn.role]), (True, text.lead[turn.role] + content), closing)
        if self.speaks_as_user(turn) and text.user_after_system != text.user_opening:
            return printed._replace(after_system=((False, text.user_after_system), (True, content), closing))
        return printed

    def _agent(self, turn: Turn) -> TurnText:
        text, content = self.text, turn.content
        apart = turn.thinking is not None or turn.tool_calls is not None
        if apart or not content or content != content.strip() or self._marks.search(content):
            printed = self._rewritten.agent(unsampled(turn))
            if printed is not None:
                return printed
        content = content if turn.tool_calls is None else _on_lines(content, turn.tool_calls)
        live, past = (self._agent_form(*around, content) for around in (text.live, text.past))
        return TurnText(live, past, past, past)

    def _agent_form(self, before: str, after: str, content: str) -> Form:
        fixed, lead = self.text.before_content(before)
        return (False, before.removesuffix(fixed + lead)), (False, fixed), (True, lead + content), (False, after)


class RewrittenTurns:
    """Turns whose text the stock template rewrites, each printed by it in a dialogue whose other turns are probes.

    The methods return None if the template refuses such a dialogue, or prints it in a way that cannot be split into
    turns, and always if there is no stock template. The arguments are those of `Printer`.
    """

    def __init__(self, text: TemplateText, stock: ChatTemplate | None, appends: bool, controls: set[str]):
        self.text, self._stock, self._appends = text, stock, appends
        self._typed = re.compile(f"{any_of(controls - set(THINK)).pattern}|Probe\\d+Word|Held\\d+Word")
        self._ending = re.compile(f"({any_of(controls).pattern})\\s*$")
        self.agent = functools.lru_cache(maxsize=1 << 12)(self._agent)
        self.block = functools.lru_cache(maxsize=1 << 12)(self._block)

    def with_tools(self, turn: Turn) -> Form | None:
        """Return the text of a leading system turn with tools, from the preamble to the next user's opening."""
        turn, names = self._held(turn)
        pieces = self._around([turn, _USER, Turn("assistant", probe(1))])
        return None if pieces is None else _segments(pieces[0].removesuffix(self.text.lead["user"]), "", names)

    def _agent(self, turn: Turn) -> TurnText | None:
        """Return an agent's turn without tool results after it."""
        turn, names = self._held(turn)
        printed = self._live_and_past(turn)
        if printed is None:
            return None
        live, past = (_segments(*form, names, self.text.prompt) for form in printed)
        return TurnText(live, past, past, past, as_is=False)

    def _block(self, turn: Turn, tools: tuple[Turn, ...]) -> Block | None:
        """Return an agent's turn and the text around the tool results that answer it.

        Args:
          tools: the tool turns, whose contents are probes.
        """
        turn, names = self._held(turn)
        forms = self._live_and_past(turn)
        if forms is None:
            return None
        (body, closing), (past_body, past_closing) = forms
        later = Turn("assistant", probe(1)), Turn("user", probe(2))
        prompted, past = (self._around([_USER, turn, *tools, *more], prompt=True) for more in ((), later))
        dropped = prompted is None and self._drops(turn, tools)
        if dropped:
            prompted, past = (self._around([_USER, turn, *more], prompt=True) for more in ((), later))
        if prompted is None or past is None:
            return None
        printed, printed_past = (pieces[1].removeprefix(self.text.closing["user"]) for pieces in (prompted, past))
        # Before tool results, the template may print the agent's turn in its live or in its past form.
        loop_body = next((text for text in (body, past_body) if printed.startswith(text)), None)
        if loop_body is None:
            return None
        rest = printed.removeprefix(loop_body)
        loop_closing = next((text for text in (closing, past_closing) if rest.startswith(text)), "")
        opening = rest.removeprefix(loop_closing)  # of the first result
        if dropped:
            # Without results, the text after the turn must be the prompt, or nothing.
            if opening not in ("", self.text.prompt):
                return None
            usual, opening, around = opening == self.text.prompt, "", [""] * (len(tools) + 1)
        else:
            around = [opening, *prompted[2:]]
            usual = around[-1].endswith(self.text.prompt)
            around[-1] = around[-1].removesuffix(self.text.prompt)
        # Without a generation prompt after the results, past[-3] is the text from the last result to the next words.
        follows = None if usual else ("", past[-3].removeprefix(around[-1]))
        after = loop_closing + opening
        if self._appends or dropped or not printed_past.endswith(after):
            past_body = loop_body
        else:
            past_body = printed_past.removesuffix(after)
        live, loop, past_form = (
            _segments(*form, names, self.text.prompt)
            for form in ((body, closing), (loop_body, loop_closing), (past_body, loop_closing))
        )
        agent = TurnText(live, loop, past_form, past_form, as_is=False)
        quoted = not dropped and self._quotes(turn, tools[0])
        strips = ("", "") if dropped or quoted else self._stock.lost_space([_USER, turn, tools[0]], 2, prompt=True)
        return Block(agent, around, quoted, strips, dropped, follows)

    def _around(self, turns: Sequence[Turn], prompt: bool = False) -> list[str] | None:
        return None if self._stock is None else self._stock.around(turns, prompt)

    def _live_and_past(self, turn: Turn) -> tuple[tuple[str, str], tuple[str, str]] | None:
        """Return (text up to the closing, closing) of an agent's turn, in the live and in the past form.

        If the template refuses a later turn, the past form is the live form.
        """
        live = self._around([_USER, turn])
        if live is None:
            return None
        body, closing = self._split(live[1].removeprefix(self.text.closing["user"]), self.text.live[1])
        past = self._around([_USER, turn, Turn("user", probe(1)), Turn("assistant", probe(2))])
        if past is None:
            return (body, closing), (body, closing)
        printed = past[1].removeprefix(self.text.closing["user"]).removesuffix(self.text.user_opening)
        past_body, past_closing = self._split(printed, self.text.past[1])
        return (body, closing), (body if self._appends else past_body, past_closing)

    def _split(self, text: str, closing: str) -> tuple[str, str]:
        """Split a turn's text from its closing, which is `closing` or, if the text ends otherwise, a control token."""
        if not text.endswith(closing):
            ending = self._ending.search(text)
            closing = "" if ending is None else text[ending.start() :]
        return text.removesuffix(closing), closing

    def _drops(self, turn: Turn, tools: Sequence[Turn]) -> bool:
        """True if the template prints nothing for tool results."""
        try:
            return self._stock.turns([_USER, turn, *tools], True) == self._stock.turns([_USER, turn], True)
        except InputError:
            return False

    def _quotes(self, turn: Turn, tool: Turn) -> bool:
        """True if the template prints the content of a tool's result, which is a probe, as a JSON string."""
        text = f'"{tool.content}"'
        return json.dumps(text)[1:-1] in self._stock.turns([_USER, turn, replace(tool, content=text)])

    def _held(self, turn: Turn) -> tuple[Turn, list[str]]:
        """Replace control tokens and probe words that are typed in a turn by placeholders such as Held0Word.

        Only <think> and </think> stay as they are.

        Returns: the changed turn, and the replaced texts; placeholder i replaces text i.
        """
        names: list[str] = []

        def hold(match: re.Match) -> str:
            names.append(match.group())
            return f"Held{len(names) - 1}Word"

        typed = {name: text for name, text in vars(turn).items() if text and name in _TYPED_FIELDS}
        return replace(turn, **{name: self._typed.sub(hold, text) for name, text in typed.items()}), names


_TYPED_FIELDS = ("content", "thinking", "tool_calls", "tools")
_USER = Turn("user", probe(0))
_HELD = re.compile(r"Held(\d+)Word")


def _segments(text: str, closing: str, names: Sequence[str], opening: str = "") -> Form:
    """Convert text that the template printed to a form, in which typed control tokens count as content.

    Args:
      text: the printed text, with placeholders such as Held0Word.
      closing: the text after it, which becomes the closing.
      names: the texts that the placeholders replace (`RewrittenTurns._held`).
      opening: becomes the opening, if `text` begins with it.
    """
    opening = opening if text.startswith(opening) else ""
    pieces = _HELD.split(text.removeprefix(opening))
    inner = [(i % 2 == 1, names[int(piece)] if i % 2 else piece) for i, piece in enumerate(pieces)]
    return (False, opening), *inner, (False, closing)


def any_of(texts: set[str]) -> re.Pattern:
    """Return a pattern that matches any of these texts, trying the longest first."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")


def strip(text: str, sides: tuple[str, str]) -> str:
    """Remove white-space characters on the left and on the right of a text."""
    if text == text.strip():
        return text
    # If all of them are removed, assume that the template uses strip(), which also removes Unicode spaces.
    left, right = (None if set(side) >= set(WHITE_SPACE) else side for side in sides)
    return text.lstrip(left).rstrip(right)


def _on_lines(content: str, data: str) -> str:
    return f"{content}\n{data}" if content else data


def unsampled(turn: Turn) -> Turn:
    """Return the turn without sampled ids, log-probabilities, `trainable` and reward, which no template prints."""
    if turn.role == "assistant" or turn.token_ids is not None:
        return replace(turn, trainable=None, reward=None, token_ids=None, behaviour_log_prob=None)
    return turn
