"""The one place where text becomes tokens, in training and in generation alike.

Every turn is tokenised on its own, as opening + content + closing, and appended, so tokens already read never change.
Openings and closings are the template's text with its special tokens active; in content, special tokens stay text, so
nobody can close a turn or open another one by typing. Where this assembly differs from what the stock chat template
prints (templates that rewrite history, strip white space or refuse a dialogue), assembly holds and
`Renderer.differences` tells.
"""

import functools
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from tokenizers import Tokenizer

from offline_lmrl.data.errors import InputError
from offline_lmrl.data.templates import derive_template, plain_template, print_chat
from offline_lmrl.data.trajectory import ROLES, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class EncodedTurn(NamedTuple):
    """The tokens of one turn.

    Attributes:
      ids: opening, content and closing.
      action_start, action_stop: ids[action_start:action_stop] are what the speaker chose, content and closing token;
        what the template prints after the closing token is not chosen.
      closed: False for a sampled agent turn that was cut before its closing token.
    """

    ids: tuple[int, ...]
    action_start: int
    action_stop: int
    closed: bool


class Renderer:
    """Turns as tokens under one tokenizer and template.

    Args:
      tokenizer: a fast tokenizer.
      template: "auto": the tokenizer's chat template if it has one, else "plain"; "plain": a line per turn with the
        speaker's name, the agent's turn ended by EOS.

    Attributes:
      preamble: ids before the first turn; may be empty.
      agent_opening: ids of opening("assistant"): the prompt of an agent turn, never empty.
      close_id: the token that ends an agent turn.
      strips: for user and assistant, the sides ("left", "right") where the stock template would strip white space;
        assembly keeps the text as it is.
      fingerprint: equal for equal tokenizer and template, also after saving and loading.

    Roles that the template lacks are rendered as the user's. Raises InputError for a tokenizer or template that cannot
    be used.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", template: str = "auto"):
        if template not in ("auto", "plain"):
            raise InputError(f"template: found {template!r}, expected 'auto' or 'plain'")
        if not getattr(tokenizer, "is_fast", False):
            raise InputError(f"tokenizer: found {type(tokenizer).__name__}, expected a fast one (tokenizer.json)")
        self.tokenizer, self.template = tokenizer, template
        stock = tokenizer.chat_template if template == "auto" else None
        description = json.loads(tokenizer.backend_tokenizer.to_str())
        added = {token["content"]: token for token in description["added_tokens"]}
        if stock is None:
            text = plain_template(tokenizer.bos_token or "", tokenizer.eos_token or "")
        else:
            text = derive_template(tokenizer, list(added))
        self._stock, self._text, self.strips = stock, text, text.strips
        self.fingerprint = _fingerprint(description, stock, tokenizer)

        # Added tokens that structure the dialogue: all special ones, and the others that the template prints.
        printed = "\0".join([text.preamble, *text.opening.values(), *text.closing.values()])
        controls = {name for name, token in added.items()
                    if token["special"] or (name in printed and not name.isspace())}
        self._controls = {added[name]["id"] for name in controls}
        if tokenizer.unk_token != tokenizer.eos_token:
            self._controls.discard(tokenizer.unk_token_id)  # what the tokenizer cannot spell, not something typed
        self._inside_control = _inside(controls)
        self._backend = _content_backend(description, controls)
        self._content_ids = functools.lru_cache(maxsize=1 << 16)(self._encode_content)
        self._derive_ids()

    def _derive_ids(self) -> None:
        text, tokenizer = self._text, self.tokenizer
        closing = text.closing["assistant"]
        ids = self._template_ids("x", closing)
        if self._controls.isdisjoint(ids) and tokenizer.eos_token:
            closing = tokenizer.eos_token + closing
            ids = self._template_ids("x", closing)
        closes = [i for i, token in enumerate(ids) if token in self._controls]
        if not closes and len(ids) != 1:
            raise InputError(f"tokenizer: found no token that ends an agent turn ({closing!r} is {len(ids)} tokens), "
                             "expected a tokenizer with an eos_token")
        stop = closes[0] if closes else 0
        self.close_id = ids[stop]
        self._chosen_closing, self._printed_closing = ids[:stop + 1], ids[stop + 1:]
        self._before_close = self._backend.decode(ids[:stop], skip_special_tokens=False)
        self._agent_closing = closing

        self.preamble = self._template_ids("", text.preamble)
        self._closing = {role: self._template_ids("x", text.closing[role]) for role in ROLES} | {"assistant": ids}
        self._opening = {role: self._template_ids(closing, text.opening[role]) for role in ROLES}
        self.agent_opening = self._template_ids(text.closing["user"] or "x", text.opening["assistant"])
        self._opening["assistant"] = self.agent_opening
        if not self.agent_opening:
            raise InputError("chat template: found nothing printed before the agent's text, expected at least "
                             "one token there, or the setting template: plain")

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies and other processes derive everything again; the cache does not travel.
        return Renderer, (self.tokenizer, self.template)

    def opening(self, role: str) -> tuple[int, ...]:
        """Ids that the template prints before a turn of this role."""
        return self._opening[role]

    def closing(self, role: str) -> tuple[int, ...]:
        """Ids that the template prints after a turn of this role."""
        return self._closing[role]

    def encode_content(self, text: str) -> list[int]:
        """Ids of an agent's text as `encode_turn` writes them between opening and closing; `decode` is the inverse.

        Special tokens typed in the text stay text. Raises InputError if the tokenizer cannot keep them apart.
        """
        return list(self._content_ids(self._text.lead["assistant"] + text))

    def encode_turn(self, turn: Turn) -> EncodedTurn:
        """A turn as tokens: opening + content + closing.

        An agent turn's `token_ids` (sampled content and closing token) are used as they are; without the closing token
        the turn is unfinished, and nothing is appended. The caller removes ids of another tokenizer first.
        """
        opening = self._opening[turn.role]
        start = len(opening)
        if turn.role == "assistant" and turn.token_ids is not None:
            closed = turn.token_ids[-1:] == (self.close_id,)
            ids = opening + turn.token_ids + (self._printed_closing if closed else ())
            return EncodedTurn(ids, start, start + len(turn.token_ids), closed)
        content = self._content_ids(self._text.lead[turn.role] + turn.content)
        closing = self._closing[turn.role]
        chosen = len(self._chosen_closing) if turn.role == "assistant" else len(closing)
        return EncodedTurn(opening + content + closing, start, start + len(content) + chosen, True)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an agent turn's sampled ids, without its closing token and what follows that."""
        ids = list(ids)
        closed = self.close_id in ids
        if closed:
            ids = ids[:ids.index(self.close_id)]
        text = self._backend.decode(ids, skip_special_tokens=False)
        text = text.removesuffix(self._before_close) if closed else text
        return text.removeprefix(self._text.lead["assistant"])

    def printed(self, turns: Sequence[Turn], prompt: bool = False, slot: str = "") -> str:
        """The assembly as text; `prompt` adds the opening of the agent's next turn, with `slot` before it."""
        text, closing = self._text, self._text.closing | {"assistant": self._agent_closing}
        ours = text.preamble + "".join(text.opening[turn.role] + text.lead[turn.role] + turn.content
                                       + closing[turn.role] for turn in turns)
        return ours + slot + text.opening["assistant"] if prompt else ours

    def differences(self, turns: Sequence[Turn]) -> str | None:
        """One line on the first difference between this assembly and what the stock template prints; None if none.

        A dialogue that does not end with the agent is compared together with the prompt of the agent's next turn.
        The plain template has no stock to differ from.
        """
        if self._stock is None:
            return None
        prompt = turns[-1].role != "assistant"
        try:
            stock = print_chat(self.tokenizer, [(turn.role, turn.content) for turn in turns], prompt)
        except InputError as error:
            return f"the template refuses this dialogue: {error.__cause__}"
        ours = self.printed(turns, prompt)
        if stock != ours:
            i = _first_difference(stock, ours)
            return f"character {i}: the template prints {_shown(stock, i)}, the assembly has {_shown(ours, i)}"
        ids = [*self.preamble, *(token for turn in turns for token in self.encode_turn(replace(
            turn, token_ids=None, behaviour_log_prob=None)).ids), *(self.agent_opening if prompt else ())]
        stock_ids = self._stock_ids(stock)
        if stock_ids == ids:
            return None
        i = _first_difference(stock_ids, ids)
        shown = [self.tokenizer.convert_ids_to_tokens(some[i:i + 4]) for some in (stock_ids, ids)]
        return f"token {i}: same text, the template's tokens are {shown[0]}, the assembly's {shown[1]}"

    def _stock_ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"]

    def _template_ids(self, before: str, text: str) -> tuple[int, ...]:
        """Ids of template text as they come out where it follows `before`: some tokenizers mark the start of a text,
        or of what follows a special token, with a space."""
        head, whole = self._stock_ids(before), self._stock_ids(before + text)
        if whole[:len(head)] == head:
            return tuple(whole[len(head):])
        return tuple(self._stock_ids(text))

    def _encode_content(self, text: str) -> tuple[int, ...]:
        ids = self._backend.encode(text, add_special_tokens=False).ids
        if not self._controls.isdisjoint(ids):
            # Unigram and whole-word models have special tokens in their plain vocabulary too: cut these in two.
            pieces = self._inside_control.split(text)
            ids = [token for piece in pieces for token in self._backend.encode(piece, add_special_tokens=False).ids]
        for token in ids:
            if token == self.close_id or token in self._controls:
                name = self._backend.id_to_token(token)
                raise InputError(f"content: the tokenizer reads text as {name!r}, which marks turns; expected a "
                                 "tokenizer with an eos_token that plain text cannot give")
        return tuple(ids)


def _content_backend(description: dict[str, Any], controls: set[str]) -> Tokenizer:
    """The tokenizer for content: control tokens are text, and no space is added in front of a piece of text."""
    description = dict(description, truncation=None, padding=None)
    description["added_tokens"] = [token | {"special": token["content"] in controls}
                                   for token in description["added_tokens"]]
    for part in ("normalizer", "pre_tokenizer"):
        bare = _without_prefix(description[part])
        if bare != description[part]:
            description[part] = bare
            description["decoder"] = _without_strip(description["decoder"])
    backend = Tokenizer.from_str(json.dumps(description))
    backend.encode_special_tokens = True
    return backend


def _without_prefix(part: dict[str, Any] | None) -> dict[str, Any] | None:
    """A normalizer or pre-tokenizer that puts no space in front of the text; later members of a sequence see words,
    where the space belongs to the word."""
    match part:
        case {"type": "Sequence"}:
            key = "normalizers" if "normalizers" in part else "pretokenizers"
            first = _without_prefix(part[key][0]) if part[key] else None
            return part | {key: [*([first] if first else []), *part[key][1:]]}
        case {"type": "Metaspace"}:
            return part | {"prepend_scheme": "never"}
        case {"type": "ByteLevel"}:
            return part | {"add_prefix_space": False}
        case {"type": "Prepend"}:
            return None
    return part


def _without_strip(decoder: dict[str, Any] | None) -> dict[str, Any] | None:
    """The decoder that does not remove the space which `_without_prefix` no longer puts in."""
    match decoder:
        case {"type": "Sequence"}:
            return decoder | {"decoders": [_without_strip(part) for part in decoder["decoders"]]}
        case {"type": "Metaspace"}:
            return decoder | {"prepend_scheme": "never"}
        case {"type": "Strip"}:
            return decoder | {"start": 0}
    return decoder


def _inside(controls: set[str]) -> re.Pattern:
    """Matches the place behind the first character of every control token."""
    places = [f"(?<={re.escape(name[0])})(?={re.escape(name[1:])})" for name in sorted(controls) if len(name) > 1]
    return re.compile("|".join(places) or "(?!)")


def _fingerprint(description: dict[str, Any], stock: Any, tokenizer: "PreTrainedTokenizerFast") -> str:
    # Truncation and padding change with every call; the post-processor is not used here.
    unused = ("truncation", "padding", "post_processor")
    fixed = {key: value for key, value in description.items() if key not in unused}
    parts = json.dumps([fixed, stock, tokenizer.bos_token, tokenizer.eos_token], sort_keys=True)
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


def _first_difference(first: Sequence, second: Sequence) -> int:
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _shown(text: str, i: int) -> str:
    return repr(text[max(i - 10, 0):i + 30])
