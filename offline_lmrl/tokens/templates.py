"""Find the text that a chat template prints around turns.

A chat template is a program that maps messages to text. We run it on dialogues whose turns contain only probes, which
are unique words; what is printed between the probes is what the template adds. A few such dialogues give the text
around every kind of turn (`TemplateText`). It is derived once, saved with a run and reused. Turns whose text the
template itself rewrites (thoughts, tool calls, white space at the edges) are printed by the template one at a time, in
a dialogue whose other turns are probes.

The text that the template prints before a turn's content is the turn's opening, the text after it the closing. The
generation prompt is the text after which the agent writes. The preamble is the text before the first turn.

An agent's turn has two forms. The *live* form is the last turn of a finished dialogue; the agent is trained to write
it. The *past* form is printed once the dialogue continues; it may lack a thought, or have another closing.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from offline_lmrl.errors import InputError, time_limit
from offline_lmrl.logs.trajectory import ROLES, Turn, message_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SECONDS = 5  # time limit for printing one dialogue
PLAIN_DIALOGUE = ("user", "assistant", "user", "assistant")
WHITE_SPACE = " \t\n\r\v\f"


@dataclass(frozen=True)
class TemplateText:
    """The text that a chat template prints around turns.

    Attributes:
      preamble: the text before the first turn, under two keys. "system": if that is a system turn; "default": if not,
        with the system text that the template adds by itself.
      opening: role -> the text before a turn, for each role except the agent's.
      lead: role -> white space after the opening that is tokenised together with the content ("User:" is followed by
        the single token " Hi").
      closing: role -> the text after a turn, for each role except the agent's.
      user_after_system: the opening of a user turn directly after the system turns.
      user_last: the closing of a user turn that ends a dialogue without a generation prompt.
      prompt: the generation prompt, after which the agent writes.
      live: the text before and after the agent's words in the live form.
      past: the text before and after the agent's words in the past form.
      strips: role -> the white-space characters that the template removes on the left and on the right of a content.
      user_roles: the roles that the template lacks, and which are therefore printed as the user's.
      parts: True if the template accepts content only as a list of parts ({"type": "text", "text": content}).
      date: the day, YYYY-MM-DD, on which a template that prints the date was derived; "" for any other template.
    """

    preamble: dict[str, str]
    opening: dict[str, str]
    lead: dict[str, str]
    closing: dict[str, str]
    user_after_system: str
    user_last: str
    prompt: str
    live: tuple[str, str]
    past: tuple[str, str]
    strips: dict[str, tuple[str, str]]
    user_roles: tuple[str, ...] = ()
    parts: bool = False
    date: str = ""

    @property
    def printed(self) -> list[str]:
        """All texts that are printed around turns."""
        around = (self.preamble, self.opening, self.closing)
        return [*(text for texts in around for text in texts.values()), self.prompt, *self.live, *self.past]

    @property
    def user_opening(self) -> str:
        return self.opening["user"] + self.lead["user"]

    def before_content(self, before: str) -> tuple[str, str]:
        """Split the text between the generation prompt and the agent's words.

        Args:
          before: the text before the agent's words, as in `live` and `past`.
        Returns: the template's own text, and the white space after it, which is tokenised together with the words.
        """
        between = before.removeprefix(self.prompt) if before.startswith(self.prompt) else ""
        lead = between if between.isspace() else " " if between.endswith(" ") else ""
        return between.removesuffix(lead), lead

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TemplateText":
        """Build the text from the values of `to_dict`."""
        pairs = {name: tuple(values[name]) for name in ("live", "past", "user_roles")}
        strips = {role: tuple(sides) for role, sides in values["strips"].items()}
        return cls(**{**values, **pairs, "strips": strips})


def plain_template(bos: str, eos: str) -> TemplateText:
    """Return a template of one line per turn with the speaker's name.

    Args:
      bos: the text before the first turn, such as the BOS token; may be "".
      eos: the text that ends an agent turn, such as the EOS token; "" = a line break.
    """
    others = [role for role in ROLES if role != "assistant"]
    opening = {role: f"{role.capitalize()}:" for role in others}
    around = "Assistant: ", eos or "\n"
    return TemplateText(
        {"system": bos, "default": bos},
        opening,
        dict.fromkeys(others, " "),
        dict.fromkeys(others, "\n"),
        "User: ",
        "\n",
        "Assistant:",
        around,
        around,
        {role: ("", "") for role in ROLES},
    )


def appended_only(text: TemplateText) -> TemplateText:
    """Change a template's text so that a printed turn never changes later: the live form gets the past form's opening.

    If the past form does not begin with the generation prompt (for example, because the prompt opens a thought), the
    prompt is replaced by the opening of the past form.
    """
    before = text.past[0]
    prompt = text.prompt if before.startswith(text.prompt) else before.rstrip(" ")
    return replace(text, prompt=prompt, live=(before, text.live[1]))


class ChatTemplate:
    """A tokenizer's chat template, as a program that prints dialogues.

    Args:
      tokenizer: the tokenizer that holds the template.
      date: the day, YYYY-MM-DD, that a template prints as today's date; "" = the real date.
      parts: True: pass content to the template as a list of parts ({"type": "text", "text": content}).
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", date: str = "", parts: bool = False):
        self.tokenizer, self.date, self.parts = tokenizer, date, parts
        longest_first = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        self._unit = re.compile("|".join([*map(re.escape, longest_first), "."]), flags=re.DOTALL)

    def turns(self, turns: Sequence[Turn], prompt: bool = False) -> str:
        """Return the text that the template prints for turns, with their tool calls, thoughts and tools.

        The template gets the arguments of tool calls as an object, or as JSON text if it refuses objects.

        Args:
          prompt: True: add the generation prompt.
        Raises: InputError, with the template's own message, if the template refuses the dialogue.
        """
        tools = next((json.loads(turn.tools) for turn in turns if turn.tools), None)
        messages = [message_of(turn) for turn in turns if turn.content or not turn.tools]
        if self.parts:
            for message in messages:
                message["content"] = [{"type": "text", "text": message["content"]}]
        try:
            return self._printed(messages, prompt, tools)
        except InputError:
            if not any(turn.tool_calls for turn in turns):
                raise
        for call in (call for message in messages for call in message.get("tool_calls", ())):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        return self._printed(messages, prompt, tools)

    def _printed(self, messages: list[dict[str, Any]], prompt: bool, tools: Any) -> str:
        try:
            source = self.tokenizer.get_chat_template(tools=tools)
            if self.date:
                day = date.fromisoformat(self.date)
                source = _CLOCK.sub(lambda match: repr(day.strftime(match.group(2))), source)
            with time_limit(_SECONDS, "chat template"):
                return self.tokenizer.apply_chat_template(
                    messages, tools=tools, chat_template=source, tokenize=False, add_generation_prompt=prompt
                )
        except InputError:
            raise
        except Exception as error:  # a template is third-party code and may raise anything
            raise InputError(f"chat template: {str(error) or type(error).__name__}") from error

    def around(self, turns: Sequence[Turn], prompt: bool = False) -> list[str] | None:
        """Return the texts that the template prints before, between and after the probes of a dialogue.

        Args:
          turns: turns whose content is a probe (`probe`) or any other text, which then belongs to the texts between.
          prompt: True: add the generation prompt.
        Returns: one text more than there are probes; None if the template refuses the dialogue, or loses, repeats or
          reorders a probe.
        """
        try:
            text = self.turns(turns, prompt)
        except InputError:
            return None
        probes = [turn.content for turn in turns if _PROBE.fullmatch(turn.content)]
        pieces = _PROBE.split(text)
        return pieces if _PROBE.findall(text) == probes else None

    def around_roles(self, roles: Sequence[str], prompt: bool = False) -> list[str] | None:
        """Return `around` for a dialogue of probes spoken by these roles."""
        return self.around(_probes(roles), prompt)

    def lost_space(self, turns: Sequence[Turn], place: int, prompt: bool = False) -> tuple[str, str]:
        """Return the white-space characters that the template removes on the left and right of a turn's content.

        Args:
          turns: a dialogue that the template prints.
          place: index of the turn, whose content is a probe.
          prompt: True: add the generation prompt.
        """
        word, printed = turns[place].content, self.turns(turns, prompt)

        def lost(text: str) -> bool:
            edged = [*turns[:place], replace(turns[place], content=text), *turns[place + 1 :]]
            return self.turns(edged, prompt) != printed.replace(word, text)

        return (
            "".join(space for space in WHITE_SPACE if lost(space + word)),
            "".join(space for space in WHITE_SPACE if lost(word + space)),
        )

    def shared(self, *texts: str, at_end: bool = False) -> str:
        """Return the longest common prefix, or suffix (`at_end`), of texts that cuts no added token in the middle."""
        step = -1 if at_end else 1
        units = [self._unit.findall(text)[::step] for text in texts]
        common = [row[0] for row in takewhile(lambda row: len(set(row)) == 1, zip(*units, strict=False))]
        return "".join(common[::step])

    @property
    def has_clock(self) -> bool:
        """True if the template prints today's date."""
        return "strftime_now" in json.dumps(self.tokenizer.chat_template)


_CLOCK = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
_PROBE = re.compile(r"Probe\d+Word")


def probe(i: int) -> str:
    """Return the probe word number i, which takes the place of a turn's content."""
    return f"Probe{i}Word"


def _probes(roles: Sequence[str]) -> list[Turn]:
    return [Turn(role, probe(i)) for i, role in enumerate(roles)]


def derive_template(template: ChatTemplate) -> TemplateText:
    """Derive the text that a chat template prints around turns.

    If the template prints no generation prompt, the text before the agent's words serves as one, so that a state
    before the agent's first token always exists. A role that the template refuses, leaves out or prints inside
    another's turn is printed as a user's.

    Raises: InputError if the template does not print a plain dialogue.
    """
    if template.has_clock and not template.date:
        template.date = date.today().isoformat()
    for template.parts in (False, True):
        plain = template.around_roles(PLAIN_DIALOGUE)
        if plain is not None:
            break
    bare = template.around_roles(PLAIN_DIALOGUE[:3])
    prompted = template.around_roles(PLAIN_DIALOGUE[:3], prompt=True)
    if plain is None or bare is None or prompted is None:
        raise InputError(
            "chat template: found no way to print user, assistant, user, assistant in this order, each "
            "text once, expected a template that prints such dialogues; otherwise set template: plain"
        )
    head, before_past, before_user, before_live, tail = plain
    user_closing, prompt = _user_closing(template, before_past, before_live, bare[-1], prompted[-1])
    live_before = before_live.removeprefix(user_closing)
    past_before = before_past.removeprefix(user_closing)
    if not prompt:
        prompt = live_before.removesuffix(" ")

    # The agent's closing contains at least the end of the dialogue, or the end of a user turn. Remove that part before
    # looking for the user's opening as a common suffix: a default system text ends with the same closing, so the
    # common suffix would otherwise contain the closing too.
    closing = next((text for text in (tail, user_closing) if text and before_user.startswith(text)), "")
    user_opening = template.shared(head, before_user.removeprefix(closing), at_end=True)
    past_after = before_user.removesuffix(user_opening)

    default = head.removesuffix(user_opening)
    system, preamble, user_after_system = _system_text(template, user_opening) or (None, default, user_opening)
    around = {
        "user": (user_opening, user_closing),
        "system": system,
        "tool": _reply_text(template, "tool", past_before, past_after),
        "environment": _reply_text(template, "environment", past_before, past_after),
    }
    user_roles = tuple(role for role, texts in around.items() if texts is None)
    opening, closings = ({role: (texts or around["user"])[i] for role, texts in around.items()} for i in (0, 1))
    lead = {role: " " if text.endswith(" ") else "" for role, text in opening.items()}
    return TemplateText(
        {"default": default, "system": preamble},
        {role: text.removesuffix(lead[role]) for role, text in opening.items()},
        lead,
        closings,
        user_after_system,
        bare[-1],
        prompt,
        (live_before, tail),
        (past_before, past_after),
        _stripped(template, user_roles),
        user_roles,
        template.parts,
        template.date,
    )


def _user_closing(
    template: ChatTemplate, before_past: str, before_live: str, bare: str, prompted: str
) -> tuple[str, str]:
    """Separate the closing of a user turn from what follows it.

    Args:
      before_past: the text between the contents of a user turn and of an agent turn that other turns follow.
      before_live: the text between the contents of a user turn and of the last agent turn.
      bare: the text after the content of a last user turn, without the generation prompt.
      prompted: the text after the content of a last user turn, with the generation prompt.
    Returns: the closing, and the generation prompt; "" for one that the template does not print.
    """
    has_prompt = prompted != bare
    following = prompted if has_prompt else before_live
    closing = template.shared(bare, following, before_past, before_live)
    if not following.removeprefix(closing).strip():
        closing = ""
    return closing, following.removeprefix(closing) if has_prompt else ""


def _system_text(template: ChatTemplate, user_opening: str) -> tuple[tuple[str, str], str, str] | None:
    """Derive the texts around a system turn, which may be "" or put the turn inside the user's turn.

    Returns: opening and closing of the system turn; the preamble before it; and the opening of the user turn after it;
      None if the template has no system turn.
    """
    pieces = template.around_roles(("system", *PLAIN_DIALOGUE))
    if pieces is None:
        return None
    head, join, bos = pieces[0], pieces[1], template.tokenizer.bos_token or ""
    closing = join.removesuffix(user_opening)
    after = user_opening if join.endswith(user_opening) else ""
    twice = template.around_roles(("system", "system", *PLAIN_DIALOGUE))
    opening = "" if twice is None else twice[1].removeprefix(closing)
    if not opening or not head.endswith(opening):
        # If BOS is also the token that opens turns, it belongs to the system turn's opening, not to the preamble.
        opening = head.removeprefix("" if bos and user_opening.startswith(bos) else bos)
    return (opening, closing), head.removesuffix(opening), after


def _reply_text(template: ChatTemplate, role: str, past_before: str, past_after: str) -> tuple[str, str] | None:
    """Derive opening and closing of a role that replies to the agent ("tool" or "environment").

    Args:
      past_before: the text before the agent's words in the past form.
      past_after: the text after the agent's words in the past form.
    Returns: opening and closing; None if the template has no text for this role, or prints its turn as the agent's,
      because it distinguishes only the user from everybody else.
    """
    pieces = template.around_roles(_reply_dialogue(role))
    if pieces is None or not (pieces[2].startswith(past_after) and pieces[3].endswith(past_before)):
        return None
    opening = pieces[2].removeprefix(past_after)
    if not opening.strip() or opening == past_before:
        return None
    return opening, pieces[3].removesuffix(past_before)


def _stripped(template: ChatTemplate, user_roles: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Return `TemplateText.strips`: role -> the white space that the template removes on the left and on the right.

    Args:
      user_roles: the roles that are printed as the user's.
    """
    dialogues = {
        "user": PLAIN_DIALOGUE,
        "assistant": ("user", "assistant"),
        "system": ("system", *PLAIN_DIALOGUE),
        "tool": _reply_dialogue("tool"),
        "environment": _reply_dialogue("environment"),
    }
    strips = {
        role: template.lost_space(_probes(roles), roles.index(role))
        for role, roles in dialogues.items()
        if role not in user_roles
    }
    return strips | {role: strips["user"] for role in user_roles}


def _reply_dialogue(role: str) -> tuple[str, ...]:
    # The agent's turn after the reply must not be the last one: templates print more there, such as an empty thought.
    return "user", "assistant", role, "assistant", "user", "assistant"
