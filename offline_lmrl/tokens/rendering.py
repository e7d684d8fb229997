"""Convert text to tokens, by the same code in training and in generation.

Every turn is tokenised on its own, as opening + content + closing, and appended. Openings and closings are text of the
template, in which special tokens are active. In content, special tokens are plain text, so nobody can close a turn or
open another one by typing.

The stock template is the tokenizer's own chat template. With `template: auto`, a dialogue is printed as it does. Once
a dialogue continues, a template may print an agent's turn differently: without its thought, or with another closing.
Such a turn has several forms (`EncodedTurn`). If the forms differ in more than the closing, a window (a row of
training data) ends with the turn, and the next agent turn gets a window of its own, whose history is in the past form.
With `template: assembled`, tokens are only ever appended. `Printer.mismatches` (printing.py) and
`Renderer.differences` report where the result differs from the stock template.

Control tokens are the added tokens that structure a dialogue: the special tokens, and others that the template prints.
The scheme is the version of these rules (SCHEME).
"""

import functools
import hashlib
import json
import logging
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from tokenizers import Tokenizer

from offline_lmrl.errors import InputError
from offline_lmrl.logs.trajectory import Turn
from offline_lmrl.tokens.printing import THINK, Form, Printer, TurnText, first_difference, in_window, unsampled
from offline_lmrl.tokens.templates import ChatTemplate, TemplateText, appended_only, derive_template, plain_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEMPLATES = ("auto", "assembled", "plain")
# The version of the rendering. Version 1 always printed a default system text, and had no forms and no tool calls.
SCHEME = 2


class EncodedTurn(NamedTuple):
    """The tokens of one turn, in every form that a window may hold.

    Attributes:
      ids: opening, content and closing as the last turn of a dialogue. An agent is trained on this form.
      action_start: index in `ids` of the first token that the speaker chose.
      actions: the tokens that the speaker chose, the closing token last. Other forms may have another token in place
        of the closing one. If the template prints no closing, the closing token is not in `ids` but would follow them.
      closed: False for a sampled agent turn that was cut before its closing token.
      loop: the form if other turns follow, such as tool results, but no user's turn.
      past: the form if a user's turn follows at any later place; for a system turn, if it follows directly.
      after_system: the form of a turn directly after the leading system turns, if it is not the agent's.
    """

    ids: tuple[int, ...]
    action_start: int
    actions: tuple[int, ...]
    closed: bool
    loop: tuple[int, ...]
    past: tuple[int, ...]
    after_system: tuple[int, ...]

    @property
    def action_stop(self) -> int:
        """The index in `ids` after the last action; len(ids) + 1 if the template prints no closing token."""
        return self.action_start + len(self.actions)

    @property
    def stays(self) -> bool:
        """True if windows of later turns contain this turn with the same tokens, up to the action that closes it."""
        kept = self.action_stop - self.closed
        return self.ids[:kept] == self.loop[:kept] and self.loop == self.past

    @property
    def longest(self) -> int:
        """The number of tokens of the longest form (`after_system` left out), which a window rule counts."""
        return max(map(len, (self.ids, self.loop, self.past)))

    def with_prefix(self, prefix: tuple[int, ...]) -> "EncodedTurn":
        """Return the turn with the ids `prefix` put before its opening."""
        if not prefix:
            return self
        forms = {name: (*prefix, *getattr(self, name)) for name in ("ids", "loop", "past", "after_system")}
        return self._replace(action_start=len(prefix) + self.action_start, **forms)


class Renderer:
    """A renderer that converts turns to tokens with one tokenizer and template.

    A role that the template lacks is rendered as a user.

    Args:
      tokenizer: a fast tokenizer.
      template: "auto": print a dialogue as the tokenizer's chat template does, or as "plain" if it has none.
        "assembled": use the same texts around turns, but never change a turn once it has been printed. "plain": print
        one line per turn with the speaker's name, and end the agent's turn with EOS.
      text: the text around turns that was derived from the template earlier and saved with a run; None = derive it
        now.
      ends: further ids that end a reply (the model's `generation_config.eos_token_id`).

    Attributes:
      text: the text around turns.
      printer: prints dialogues as text, and reports where the stock template prints something else.
      agent_opening: ids of the generation prompt, after which the agent writes; never empty.
      close_id: the token that ends an agent turn.
      close_ids: all tokens that end an agent turn.
      fingerprint: a string that is equal for renderers with equal tokenizer and printed texts, also after saving and
        loading; it begins with the scheme.

    Raises: InputError for a tokenizer or template that cannot be used.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerFast",
        template: str = "auto",
        text: TemplateText | None = None,
        ends: Sequence[int] = (),
    ):
        if template not in TEMPLATES:
            raise InputError(f"template: found {template!r}, expected one of {', '.join(TEMPLATES)}")
        if not getattr(tokenizer, "is_fast", False):
            raise InputError(
                f"tokenizer: found {type(tokenizer).__name__}, expected a fast tokenizer (tokenizer.json)"
            )
        self.tokenizer, self.template, self.ends = tokenizer, template, tuple(ends)
        description = json.loads(tokenizer.backend_tokenizer.to_str())
        added = {token["content"]: token for token in description["added_tokens"]}
        stock = None
        if template != "plain" and tokenizer.chat_template is not None:
            date, parts = ("", False) if text is None else (text.date, text.parts)
            stock = ChatTemplate(tokenizer, list(added), date, parts)
        if text is None and stock is None:
            text = plain_template(tokenizer.bos_token or "", tokenizer.eos_token or "")
        elif text is None:
            text = derive_template(stock)
            text = appended_only(text) if template == "assembled" else text
        self.text = text

        # The added tokens that structure the dialogue: all special tokens, and any others that the template prints.
        printed = "\0".join(
            [
                *text.preamble.values(),
                *text.opening.values(),
                *text.closing.values(),
                text.prompt,
                *text.live,
                *text.past,
            ]
        )
        controls = {
            name for name, token in added.items() if token["special"] or (name in printed and not name.isspace())
        }
        self._controls = {added[name]["id"] for name in controls}
        if tokenizer.unk_token != tokenizer.eos_token:
            self._controls.discard(tokenizer.unk_token_id)  # content that the tokenizer cannot spell gives it
        self._kept_controls = self._controls - {added[name]["id"] for name in THINK if name in added}
        self._inside_control = _inside(controls)
        self.printer = Printer(text, stock, template == "assembled", controls, list(added))
        self._backend = _content_backend(description, controls)
        self._content_ids = functools.lru_cache(maxsize=1 << 16)(self._encode_content)
        self._template_ids = functools.lru_cache(maxsize=1 << 12)(self._encode_template)
        self._noticed: set[str] = set()
        self._derive_ids()
        self.fingerprint = _fingerprint(description, text, self.printer.probes)

    def _derive_ids(self) -> None:
        text, tokenizer = self.text, self.tokenizer
        chosen, _ = self._closing_ids(text.live[1])
        if not chosen and tokenizer.eos_token_id is None:
            raise InputError(
                f"tokenizer: found no token that ends an agent turn ({text.live[1]!r} is "
                f"{len(self._template_ids('x', text.live[1]))} tokens), expected a tokenizer with an "
                "eos_token"
            )
        # If the template prints no closing token, the agent closes its turn with EOS, which history does not contain.
        self.close_id = chosen[-1] if chosen else tokenizer.eos_token_id
        self.close_ids = frozenset({self.close_id, *self.ends})
        self._before_close = self._backend.decode(list(chosen[:-1]), skip_special_tokens=False)
        self._live_lead = "".join(self.printer.before_content(text.live[0]))
        self.agent_opening = self._template_ids(text.closing["user"] or "x", text.prompt)
        if not self.agent_opening:
            raise InputError(
                "chat template: found nothing printed before the agent's text, expected at least "
                "one token there; otherwise set template: plain"
            )

    @property
    def past_opening(self) -> tuple[int, ...]:
        """The ids before the agent's words once the dialogue has continued."""
        before = self.text.past[0]
        if before.startswith(self.text.prompt):
            return self.agent_opening
        return self._template_ids(self.text.closing["user"] or "x", before)

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies and other processes derive the ids again; the caches are not pickled.
        return Renderer, (self.tokenizer, self.template, self.text, self.ends)

    def preamble_of(self, turns: Sequence[Turn]) -> tuple[int, ...]:
        """Return the ids before the first turn, with the template's default system text if the turns have none."""
        return self._template_ids("", self.printer.preamble(turns))

    def opening(self, role: str) -> tuple[int, ...]:
        """Return the ids printed before a turn of this role; for the agent, those of the generation prompt."""
        if role == "assistant":
            return self.agent_opening
        return self._template_ids(self.text.past[1] or "x", self.text.opening[role])

    def closing(self, role: str) -> tuple[int, ...]:
        """Return the ids printed after a turn of this role; for the agent, after the last turn of a dialogue."""
        if role != "assistant":
            return self._template_ids("x", self.text.closing[role])
        chosen, rest = self._closing_ids(self.text.live[1])
        return (*(chosen or (self.close_id,)), *rest)

    def encode_content(self, text: str) -> list[int]:
        """Return the ids between opening and closing of an agent turn with this text; `decode` is the inverse.

        Special tokens typed in the text stay text.

        Raises: InputError if the tokenizer cannot distinguish typed text from special tokens.
        """
        fixed, lead = self.printer.before_content(self.text.live[0])
        return [*self._template_ids(self.text.prompt, fixed), *self._content_ids(lead + text)]

    def encode_turn(self, turn: Turn) -> EncodedTurn:
        """Encode one turn on its own."""
        return self.encode([turn])[0]

    def encode(self, turns: Sequence[Turn]) -> list[EncodedTurn]:
        """Encode the turns of a dialogue or of a part of one, each in all its forms.

        `window_ids` then selects the form that a window holds. An agent turn's `token_ids` (sampled content and
        closing token) are used unchanged. If they lack the closing token, the turn is unfinished and nothing is
        appended. The caller must first remove ids of another tokenizer or template (`with_own_token_ids`).
        """
        return [self._encoded(turn, text) for turn, text in zip(turns, self.printer.texts(turns), strict=True)]

    def window_ids(
        self, turns: Sequence[Turn], encoded: Sequence[EncodedTurn], first: int, stop: int, live: bool
    ) -> list[tuple[int, ...]]:
        """Return the ids of each turn of a window: the leading system turns and turns first..stop−1 of a dialogue.

        Args:
          turns: all turns of the dialogue.
          encoded: the same turns, encoded.
          live: True: an agent turn at the end of the window is in the form in which it is trained (`ids`). False: it
            is in the form in which the dialogue continues.
        """
        window = in_window(turns, self.printer.speaks_as_user, first, stop, live)
        return [getattr(encoded[i], form) for i, form in window]

    def _encoded(self, turn: Turn, text: TurnText) -> EncodedTurn:
        ids = self._form_ids(text.ids, turn.role)
        if turn.role != "assistant":
            start = len(self._form_ids(text.ids[:1], turn.role))
            past, joined = (
                ids if form is text.ids else self._form_ids(form, turn.role) for form in (text.past, text.after_system)
            )
            return EncodedTurn(ids, start, ids[start:], True, ids, past, joined)
        chosen, rest = self._closing_ids(text.ids[-1][1])
        opening = self._opening_ids(text.prompt)
        start = first_difference(opening, ids)
        if turn.token_ids is None:
            loop = self._form_ids(text.loop, turn.role)
            past = loop if text.past is text.loop else self._form_ids(text.past, turn.role)
            body = ids[start : len(ids) - len(rest)]
            return EncodedTurn(ids, start, body if chosen else (*body, self.close_id), True, loop, past, past)
        # Sampled ids replace the text that they spell, also in history if the same text is printed there.
        start, sampled = len(opening), (*opening, *turn.token_ids)
        if not (turn.token_ids and turn.token_ids[-1] in self.close_ids):
            return EncodedTurn(sampled, start, turn.token_ids, False, sampled, sampled, sampled)
        ids = (*(sampled if chosen else sampled[:-1]), *rest)
        loop, past = (self._history_ids(turn, form, text) for form in (text.loop, text.past))
        return EncodedTurn(ids, start, turn.token_ids, True, loop, past, past)

    def _history_ids(self, turn: Turn, form: Form, text: TurnText) -> tuple[int, ...]:
        """Return a sampled turn's ids once the dialogue continues: the sampled ids with the template's closing.

        If the template then prints another text than was sampled, the ids are those of the template's text.

        Args:
          form: the form to encode, `text.loop` or `text.past`.
          text: the turn as text, in all forms.
        """
        kept = turn.token_ids[:-1]
        # Sampled control tokens have no text from which they could be encoded again, so the sampled ids are kept.
        same = (text.as_is and self.text.live[0] == self.text.past[0]) or not self._kept_controls.isdisjoint(kept)
        if not same:
            spelt = self._backend.decode(list(kept), skip_special_tokens=False).removesuffix(self._before_close)
            same = (text.prompt or "") + spelt == "".join(piece for _, piece in form[:-1])
        if not same:
            return self._form_ids(form, turn.role)
        before = self._closing_ids(form[-1][1])[0][:-1]
        kept = kept[: -len(before)] if before and kept[-len(before) :] == before else kept
        return (*self._opening_ids(text.prompt), *kept, *self._template_ids("x", form[-1][1]))

    def opening_after(self, turns: Sequence[Turn]) -> tuple[int, ...]:
        """Return the generation prompt's ids after these turns; () if the template prints none after tool results."""
        return self._opening_ids(self.printer.own_prompt(turns))

    def _opening_ids(self, prompt: str | None) -> tuple[int, ...]:
        return self.agent_opening if prompt is None else self._template_ids("x", prompt)

    def decode(self, ids: Sequence[int], role: str = "assistant") -> str:
        """Return the text of a turn's sampled ids, up to the closing token.

        Args:
          ids: the sampled ids; for speakers other than the agent only the content, without the closing.
          role: the speaker.
        """
        ids = list(ids)
        if role != "assistant":
            return self._backend.decode(ids, skip_special_tokens=False).removeprefix(self.text.lead[role])
        end = next((i for i, token in enumerate(ids) if token in self.close_ids), None)
        text = self._backend.decode(ids[:end], skip_special_tokens=False)
        text = text if end is None else text.removesuffix(self._before_close)
        return text.removeprefix(self._live_lead)

    def tokens(self, turns: Sequence[Turn], prompt: bool = False) -> list[int]:
        """Return the ids of a dialogue, encoded from its text rather than from sampled ids.

        Args:
          prompt: True: add the generation prompt after the last turn.
        """
        ids = list(self.preamble_of(turns))
        for role, form in self.printer.dialogue([unsampled(turn) for turn in turns], prompt):
            ids += self._form_ids(form, role)
        return [*ids, *self.opening_after(turns)] if prompt else ids

    # Differences from the stock template.

    def is_control(self, token: int) -> bool:
        """True if the token is a control token, to which no content is encoded."""
        return token in self._controls

    @property
    def closing_stays(self) -> bool:
        """True if the token that closes an agent's turn is still printed once the dialogue continues."""
        chosen = self._closing_ids(self.text.live[1])[0]
        return bool(chosen) and self._closing_ids(self.text.past[1])[0] == chosen

    def notice(self, turns: Sequence[Turn]) -> None:
        """Log a warning for each fault that `Printer.faults_in` finds in a dialogue, each message only once."""
        for line in self.printer.faults_in(turns):
            if line not in self._noticed:
                self._noticed.add(line)
                logging.getLogger(__name__).warning(line)

    def differences(self, turns: Sequence[Turn], prompt: bool | None = None) -> str | None:
        """Compare the text and tokens for training with what the stock template prints.

        Args:
          prompt: True: compare with the generation prompt added; None = add it unless the agent speaks last.
        Returns: one line on the first difference; None if there is none, or no stock template (`template: plain`).
        """
        prompt = turns[-1].role != "assistant" if prompt is None else prompt
        difference = self.printer.differences(turns, prompt)
        if difference is not None or self.printer.probes is None:
            return difference
        ids, stock_ids = self.tokens(turns, prompt), self._stock_ids(self.printer.stock(turns, prompt))
        if stock_ids == ids:
            return None
        i = first_difference(stock_ids, ids)
        shown = [self.tokenizer.convert_ids_to_tokens(some[i : i + 4]) for some in (stock_ids, ids)]
        return f"token {i}: same text, but the template's tokens are {shown[0]} and those for training {shown[1]}"

    # Conversion of text to tokens.

    def _form_ids(self, form: Form, role: str) -> tuple[int, ...]:
        before = (self.text.closing["user"] if role == "assistant" else self.text.past[1]) or "x"
        ids: tuple[int, ...] = ()
        # After content, "x" represents any text, so that the ids of a closing do not depend on the content.
        for is_content, text in form:
            if text:
                ids += self._content_ids(text) if is_content else self._template_ids(before, text)
                before = "x" if is_content else text
            elif is_content:
                before = "x"
        return ids

    def _closing_ids(self, text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Encode an agent's closing and split its ids after the closing token, which the agent chooses.

        Returns: the ids up to and including that token, () if the closing has none, and the ids after it.
        """
        ids = self._template_ids("x", text)
        stop = next((i for i, token in enumerate(ids) if token in self._controls), None)
        if stop is None and self.tokenizer.eos_token_id is None and len(ids) == 1:
            stop = 0  # without an EOS token, the end of the line closes the turn
        return (ids[: stop + 1], ids[stop + 1 :]) if stop is not None else ((), ids)

    def _stock_ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"]

    def _encode_template(self, before: str, text: str) -> tuple[int, ...]:
        """Return the ids of `text`, a text of the template, when it follows the text `before`.

        The preceding text matters: some tokenizers add a space at the start of a text or after a special token.
        """
        if not text:
            return ()
        head, whole = self._stock_ids(before), self._stock_ids(before + text)
        # If the two texts merge into one token at the seam, no suffix of `whole` belongs to `text` alone.
        if whole[: len(head)] == head:
            return tuple(whole[len(head) :])
        return tuple(self._stock_ids(text))

    def _encode_content(self, text: str) -> tuple[int, ...]:
        ids = self._backend.encode(text, add_special_tokens=False).ids
        if not self._controls.isdisjoint(ids):
            # Unigram and whole-word models also have special tokens in their plain vocabulary. Cutting a typed special
            # token in two keeps the model from finding it.
            pieces = self._inside_control.split(text)
            ids = [token for piece in pieces for token in self._backend.encode(piece, add_special_tokens=False).ids]
        for token in ids:
            if token == self.close_id or token in self._controls:
                name = self._backend.id_to_token(token)
                raise InputError(
                    f"content: found text that the tokenizer encodes as {name!r}, which marks turns, expected a "
                    "tokenizer with an eos_token that plain text cannot produce"
                )
        return tuple(ids)


def _content_backend(description: dict[str, Any], controls: set[str]) -> Tokenizer:
    """Return a tokenizer for content, which encodes control tokens as plain text and adds no space before a text.

    Args:
      description: the content of tokenizer.json.
      controls: the texts of the control tokens.
    """
    description = dict(description, truncation=None, padding=None)
    description["added_tokens"] = [
        token | {"special": token["content"] in controls} for token in description["added_tokens"]
    ]
    for part in ("normalizer", "pre_tokenizer"):
        bare = _without_prefix(description[part])
        if bare != description[part]:
            description[part] = bare
            description["decoder"] = _without_strip(description["decoder"])
    backend = Tokenizer.from_str(json.dumps(description))
    backend.encode_special_tokens = True
    return backend


def _without_prefix(part: dict[str, Any] | None) -> dict[str, Any] | None:
    """Change a normalizer or pre-tokenizer so that it adds no space before the text; None if nothing of it is left.

    Of a Sequence, only the first member is changed: the later ones get text that is already split into words, whose
    leading space is part of the word.

    Args:
      part: the section "normalizer" or "pre_tokenizer" of tokenizer.json; None = the tokenizer has none.
    """
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
    """Change a decoder so that it keeps a leading space, because `_without_prefix` has removed the step that adds one.

    Args:
      decoder: the section "decoder" of tokenizer.json; None = the tokenizer has none.
    """
    match decoder:
        case {"type": "Sequence"}:
            return decoder | {"decoders": [_without_strip(part) for part in decoder["decoders"]]}
        case {"type": "Metaspace"}:
            return decoder | {"prepend_scheme": "never"}
        case {"type": "Strip"}:
            return decoder | {"start": 0}
    return decoder


def _inside(controls: set[str]) -> re.Pattern:
    """Return a pattern that matches, in a text, the position after the first character of each control token."""
    places = [f"(?<={re.escape(name[0])})(?={re.escape(name[1:])})" for name in sorted(controls) if len(name) > 1]
    return re.compile("|".join(places) or "(?!)")


def _fingerprint(description: dict[str, Any], text: TemplateText, stock: list[str] | None) -> str:
    # Truncation and padding change with every tokenizer call, and the post-processor is not used here.
    unused = ("truncation", "padding", "post_processor")
    fixed = {key: value for key, value in description.items() if key not in unused}
    parts = json.dumps([fixed, text.to_dict(), stock], sort_keys=True)
    return f"{SCHEME}-{hashlib.sha256(parts.encode()).hexdigest()[:16]}"
