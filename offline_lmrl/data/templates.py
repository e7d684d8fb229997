"""What a template prints around the text of turns, derived once by rendering probe dialogues.

A chat template is a program from messages to text. Here it is run on dialogues of unique probe words; the text between
the probes is what the template adds. Nothing is assumed about the program but that it prints a plain dialogue of user
and assistant in order, each text once.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from offline_lmrl.data.errors import InputError
from offline_lmrl.data.trajectory import ROLES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PLAIN_DIALOGUE = ("user", "assistant", "user", "assistant")


@dataclass(frozen=True)
class TemplateText:
    """A turn is printed as `opening[role] + lead[role] + content + closing[role]`; a dialogue starts with `preamble`.

    Attributes:
      preamble: text before the first turn: BOS and a system text that the template puts in by itself.
      opening, lead, closing: of every role. `lead` is white space that belongs to the text's own tokens ("Assistant:"
        is followed by the one token " Hi"); the agent writes it itself.
      strips: the sides ("left", "right") of a user's and an assistant's text where the template removes white space.
    """

    preamble: str
    opening: dict[str, str]
    lead: dict[str, str]
    closing: dict[str, str]
    strips: dict[str, tuple[str, ...]]


def plain_template(bos: str, eos: str) -> TemplateText:
    """A line per turn with the speaker's name; the agent's turn ends with `eos`, or with its line where that is ""."""
    closing = dict.fromkeys(ROLES, "\n") | {"assistant": eos or "\n"}
    return TemplateText(bos, {role: f"{role.capitalize()}:" for role in ROLES}, dict.fromkeys(ROLES, " "), closing,
                        dict.fromkeys(("user", "assistant"), ()))


def print_chat(tokenizer: "PreTrainedTokenizerFast", messages: Sequence[tuple[str, str]], prompt: bool = False) -> str:
    """The stock template's text for (role, content) pairs; `prompt` adds the generation prompt.

    Raises InputError with the template's own words where it refuses the dialogue.
    """
    chat = [{"role": role, "content": content} for role, content in messages]
    try:
        return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
    except (TemplateError, TypeError, ValueError) as error:
        raise InputError(f"chat template: {error}") from error


def derive_template(tokenizer: "PreTrainedTokenizerFast", tokens: Sequence[str]) -> TemplateText:
    """What the tokenizer's chat template prints around turns.

    The agent's opening is what the generation prompt prints; a template that prints none (it would be empty) lends the
    agent the user's closing as its opening, so that a state before the agent's first token always exists. A role that
    the template refuses, leaves out or prints inside another's turn is printed as a user's.

    Args:
      tokens: the tokenizer's added tokens: never cut in the middle.

    Raises InputError if the template does not print a plain dialogue.
    """
    plain = _around_probes(tokenizer, PLAIN_DIALOGUE)
    bare = _around_probes(tokenizer, PLAIN_DIALOGUE[:3])
    prompted = _around_probes(tokenizer, PLAIN_DIALOGUE[:3], prompt=True)
    if plain is None or bare is None or prompted is None:
        raise InputError("chat template: found no way to print user, assistant, user, assistant in this order, each "
                         "text once; expected one, or the setting template: plain")
    head, before_agent, before_user, _, tail = plain
    user_closing, agent_opening, agent_lead = _agent_marks(before_agent, bare[-1], prompted[-1], tokens)

    # The end of a dialogue shows where the agent's closing stops at the earliest: a default system text closes like a
    # turn, and so would share more than the user's opening with what is printed between agent and user.
    between = before_user.removeprefix(tail)
    shared = _shared_prefix(_units(head, tokens)[::-1], _units(between, tokens)[::-1])
    user_opening = "".join(reversed(shared))
    agent_closing = before_user.removesuffix(user_opening)
    preamble = head.removesuffix(user_opening)

    opening, closing = dict.fromkeys(ROLES, user_opening), dict.fromkeys(ROLES, user_closing)
    marks = _Marks(preamble, user_opening, before_agent.removeprefix(user_closing), agent_closing)
    for role in ("system", "tool", "environment"):
        own = _system_marks(tokenizer, marks) if role == "system" else _reply_marks(tokenizer, role, marks)
        if own is not None:
            opening[role], closing[role] = own
    lead = {role: " " if text.endswith(" ") else "" for role, text in opening.items()}
    opening = {role: text.removesuffix(lead[role]) for role, text in opening.items()}
    return TemplateText(preamble, opening | {"assistant": agent_opening}, lead | {"assistant": agent_lead},
                        closing | {"assistant": agent_closing}, _stripped_sides(tokenizer))


@dataclass(frozen=True)
class _Marks:
    preamble: str
    user_opening: str
    agent_opening: str     # as printed in a dialogue that goes on, white space included
    agent_closing: str


def _agent_marks(before_agent: str, bare: str, prompted: str, tokens: Sequence[str]) -> tuple[str, str, str]:
    """The user's closing, the agent's opening and its lead.

    Args:
      before_agent: printed between user and agent; bare, prompted: printed after a last user turn, without and with
        the generation prompt.
    """
    has_prompt = prompted != bare
    following = prompted if has_prompt else before_agent
    user_closing = "".join(_shared_prefix(_units(bare, tokens), _units(following, tokens)))
    opening = following.removeprefix(user_closing)
    if not opening.strip():
        user_closing, opening = "", following
    if has_prompt:
        rest = before_agent.removeprefix(prompted) if before_agent.startswith(prompted) else ""
        return user_closing, opening, rest if rest.isspace() else ""
    lead = " " if opening.endswith(" ") else ""
    return user_closing, opening.removesuffix(lead), lead


def _system_marks(tokenizer: "PreTrainedTokenizerFast", marks: _Marks) -> tuple[str, str] | None:
    """Opening and closing of a system turn; None if it has none of its own. The template may print it bare."""
    pieces = _around_probes(tokenizer, ("system", *PLAIN_DIALOGUE))
    if pieces is None or not pieces[1].endswith(marks.user_opening):
        return None
    head, bos = pieces[0], tokenizer.bos_token or ""
    preamble = marks.preamble if head.startswith(marks.preamble) else bos if marks.preamble.startswith(bos) else ""
    return head.removeprefix(preamble), pieces[1].removesuffix(marks.user_opening)


def _reply_marks(tokenizer: "PreTrainedTokenizerFast", role: str, marks: _Marks) -> tuple[str, str] | None:
    """Opening and closing of a role that answers the agent; None if it has none of its own, or is taken for the agent
    by a template that only asks whether the user speaks."""
    # The agent's turn after it is not the last one: templates print more there, for example an empty thought.
    pieces = _around_probes(tokenizer, ("user", "assistant", role, "assistant", "user", "assistant"))
    if pieces is None or not (pieces[2].startswith(marks.agent_closing) and pieces[3].endswith(marks.agent_opening)):
        return None
    opening = pieces[2].removeprefix(marks.agent_closing)
    if not opening.strip() or opening == marks.agent_opening:
        return None
    return opening, pieces[3].removesuffix(marks.agent_opening)


def _stripped_sides(tokenizer: "PreTrainedTokenizerFast") -> dict[str, tuple[str, ...]]:
    """The sides of the text where white space gets lost, for the user and the assistant."""
    edges: dict[str, Callable[[str, str], str]] = {"left": lambda probe, space: space + probe,
                                                   "right": lambda probe, space: probe + space}
    messages = [(role, _probe(i)) for i, role in enumerate(PLAIN_DIALOGUE)]
    printed = print_chat(tokenizer, messages)
    strips = {}
    for i, role in enumerate(PLAIN_DIALOGUE[:2]):
        lost = []
        for side, edged in edges.items():
            texts = [edged(_probe(i), space) for space in " \n"]
            if any(print_chat(tokenizer, [*messages[:i], (role, text), *messages[i + 1:]])
                   != printed.replace(_probe(i), text) for text in texts):
                lost.append(side)
        strips[role] = tuple(lost)
    return strips


def _probe(i: int) -> str:
    return f"Probe{i}Word"


def _around_probes(
    tokenizer: "PreTrainedTokenizerFast", roles: Sequence[str], prompt: bool = False
) -> list[str] | None:
    """The template's text before, between and after the probes; None if it refuses, loses or reorders a turn."""
    try:
        text = print_chat(tokenizer, [(role, _probe(i)) for i, role in enumerate(roles)], prompt)
    except InputError:
        return None
    pieces = re.split("|".join(map(_probe, range(len(roles)))), text)
    rebuilt = pieces[0] + "".join(_probe(i) + piece for i, piece in enumerate(pieces[1:]))
    return pieces if len(pieces) == len(roles) + 1 and rebuilt == text else None


def _units(text: str, tokens: Sequence[str]) -> list[str]:
    """The text as added tokens and single characters."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.findall("|".join([*map(re.escape, longest_first), "."]), text, flags=re.DOTALL)


def _shared_prefix(first: Sequence[str], second: Sequence[str]) -> list[str]:
    return [unit for unit, _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))]
