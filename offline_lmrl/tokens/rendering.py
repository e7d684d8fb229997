"""Convert text to tokens, by the same code in training and in generation.

Every turn is tokenised on its own, as opening + content + closing, and appended. Openings and closings are text of the
template, in which special tokens are active. In content, special tokens are plain text, so nobody can close a turn or
open another one by typing.

The stock template is the tokenizer's own chat template. With `template: auto`, a dialogue is printed as it does. Once
a dialogue continues, a template may print an agent's turn differently: without its thought, or with another closing.
Such a turn has several forms (`EncodedTurn`). If the forms differ in more than the closing, a window (a row of
training data) ends with the turn, and the next agent turn gets a window of its own, whose history is in the past form.
With `template: assembled`, tokens are only ever appended. `TemplateCheck` (template_check.py) reports where the result
differs from the stock template. The scheme is the version of these rules (SCHEME).
"""

import hashlib
import json
from collections.abc import Sequence
from os.path import commonprefix
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerFast

from offline_lmrl.errors import require
from offline_lmrl.logs.trajectory import Turn
from offline_lmrl.tokens.printing import THINK, Form, Printer, TurnText, in_window, unsampled
from offline_lmrl.tokens.template_check import TemplateCheck
from offline_lmrl.tokens.templates import ChatTemplate, TemplateText, appended_only, derive_template, plain_template
from offline_lmrl.tokens.tokenizers import TextEncoder

TEMPLATES = ("auto", "assembled", "plain")
# The version of the rendering. Version 1 always printed a default system text, and had no forms and no tool calls.
SCHEME = 2
FORMS = ("ids", "loop", "past", "after_system")  # the fields of `EncodedTurn` and `TurnText` that `in_window` names


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
        forms = {name: (*prefix, *ids) for name, ids in self._asdict().items() if name in FORMS}
        return self._replace(action_start=len(prefix) + self.action_start, **forms)


_FIELD = {name: i for i, name in enumerate(EncodedTurn._fields)}


class TurnEncoder:
    """An encoder of turns that have been printed as text.

    Args:
      text: the text around turns.
      encoder: converts texts to tokens.
      ends: further ids that end a reply.

    Attributes:
      agent_opening: ids of the generation prompt, after which the agent writes; never empty.
      close_ids: all tokens that end an agent turn.
      reply_frame: the texts at the start of a reply, and before the token that closes it, which `decode` leaves out.

    Raises: InputError if nothing is printed before the agent's text.
    """

    def __init__(self, text: TemplateText, encoder: TextEncoder, ends: Sequence[int]):
        self.text, self.encoder, self.close_ids = text, encoder, frozenset({encoder.close_id, *ends})
        self.agent_opening = encoder.template(text.closing["user"] or "x", text.prompt)
        require(
            bool(self.agent_opening),
            "chat template: found nothing printed before the agent's text, expected at least "
            "one token there; otherwise set template: plain",
        )
        self._kept_controls = encoder.controls - {encoder.added[name] for name in THINK if name in encoder.added}
        # The text of an agent's closing before the token that closes the turn.
        self._before_close = encoder.decode(encoder.closing(text.live[1])[0][:-1])
        self.reply_frame = "".join(text.before_content(text.live[0])), self._before_close

    def opening(self, prompt: str | None) -> tuple[int, ...]:
        """Return the ids of a generation prompt; None = the usual one."""
        return self.agent_opening if prompt is None else self.encoder.template("x", prompt)

    def form(self, form: Form, role: str) -> tuple[int, ...]:
        """Return the ids of one form of a turn of this role."""
        before = (self.text.closing["user"] if role == "assistant" else self.text.past[1]) or "x"
        ids: tuple[int, ...] = ()
        # After content, "x" represents any text, so that the ids of a closing do not depend on the content.
        for is_content, text in form:
            if text:
                ids += self.encoder.content(text) if is_content else self.encoder.template(before, text)
            if text or is_content:
                before = "x" if is_content else text
        return ids

    def turn(self, turn: Turn, text: TurnText) -> EncodedTurn:
        """Return a turn in all its forms.

        Args:
          turn: the turn; sampled ids, if any, are used unchanged.
          text: the same turn, printed.
        """
        ids = self.form(text.ids, turn.role)
        if turn.role != "assistant":
            start = len(self.form(text.ids[:1], turn.role))
            past, joined = (
                ids if form is text.ids else self.form(form, turn.role) for form in (text.past, text.after_system)
            )
            return EncodedTurn(ids, start, ids[start:], True, ids, past, joined)
        opening = self.opening(text.prompt)
        chosen, rest = self.encoder.closing(text.ids[-1][1])
        if turn.token_ids is None:
            loop = self.form(text.loop, turn.role)
            past = loop if text.past is text.loop else self.form(text.past, turn.role)
            start = len(commonprefix([opening, ids]))
            body = ids[start : len(ids) - len(rest)]
            actions = body if chosen else (*body, self.encoder.close_id)
            return EncodedTurn(ids, start, actions, True, loop, past, past)
        # Sampled ids replace the text that they spell, also in history if the same text is printed there.
        start, sampled = len(opening), (*opening, *turn.token_ids)
        if not (turn.token_ids and turn.token_ids[-1] in self.close_ids):
            return EncodedTurn(sampled, start, turn.token_ids, False, sampled, sampled, sampled)
        ids = (*(sampled if chosen else sampled[:-1]), *rest)
        loop, past = (self._history(turn, form, text) for form in (text.loop, text.past))
        return EncodedTurn(ids, start, turn.token_ids, True, loop, past, past)

    def _history(self, turn: Turn, form: Form, text: TurnText) -> tuple[int, ...]:
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
            spelt = self.encoder.decode(kept).removesuffix(self._before_close)
            same = (text.prompt or "") + spelt == "".join(piece for _, piece in form[:-1])
        if not same:
            return self.form(form, turn.role)
        before = self.encoder.closing(form[-1][1])[0][:-1]
        kept = kept[: -len(before)] if before and kept[-len(before) :] == before else kept
        return (*self.opening(text.prompt), *kept, *self.encoder.template("x", form[-1][1]))

    def decode(self, ids: Sequence[int], role: str = "assistant") -> str:
        """Return the text of a turn's sampled ids, up to the closing token.

        Args:
          ids: the sampled ids; for speakers other than the agent only the content, without the closing.
          role: the speaker.
        """
        if role != "assistant":
            return self.encoder.decode(ids).removeprefix(self.text.lead[role])
        end = next((i for i, token in enumerate(ids) if token in self.close_ids), None)
        text = self.encoder.decode(ids[:end])
        text = text if end is None else text.removesuffix(self._before_close)
        return text.removeprefix(self.reply_frame[0])


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
      encoder: converts the texts of the template and of turns to tokens.
      printer: prints dialogues as text.
      check: reports where the stock template prints something else.
      agent_opening: ids of the generation prompt, after which the agent writes; never empty.
      close_id: the token that ends an agent turn.
      close_ids: all tokens that end an agent turn.
      reply_frame: as in `TurnEncoder`.
      byte_ids: as in `TextEncoder`.
      fingerprint: a string that is equal for renderers with equal tokenizer and printed texts, also after saving and
        loading; it begins with the scheme.

    Raises: InputError for a tokenizer or template that cannot be used.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        template: str = "auto",
        text: TemplateText | None = None,
        ends: Sequence[int] = (),
    ):
        require(template in TEMPLATES, f"template: found {template!r}, expected one of {', '.join(TEMPLATES)}")
        require(
            isinstance(tokenizer, PreTrainedTokenizerFast),
            f"tokenizer: found {type(tokenizer).__name__}, expected a fast tokenizer (tokenizer.json)",
        )
        stock = None
        if template != "plain" and tokenizer.chat_template is not None:
            date, parts = ("", False) if text is None else (text.date, text.parts)
            stock = ChatTemplate(tokenizer, date, parts)
        if text is None and stock is None:
            text = plain_template(tokenizer.bos_token or "", tokenizer.eos_token or "")
        elif text is None:
            text = derive_template(stock)
            text = appended_only(text) if template == "assembled" else text
        self.tokenizer, self.template, self.text, self.ends = tokenizer, template, text, tuple(ends)
        self.encoder = TextEncoder(tokenizer, text.printed, text.live[1])
        self.close_id = self.encoder.close_id
        self._turns = TurnEncoder(text, self.encoder, ends)
        self.agent_opening, self.close_ids = self._turns.agent_opening, self._turns.close_ids
        self.reply_frame, self.byte_ids = self._turns.reply_frame, self.encoder.byte_ids
        controls, added = self.encoder.control_names, list(self.encoder.added)
        self.printer = Printer(text, stock, template == "assembled", controls, added)
        self.check = TemplateCheck(self)
        self.fingerprint = _fingerprint(self.encoder.description, text, self.check.probes)

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies and other processes derive the ids again; the caches are not pickled.
        return Renderer, (self.tokenizer, self.template, self.text, self.ends)

    # The ids around turns.

    @property
    def past_opening(self) -> tuple[int, ...]:
        """The ids before the agent's words once the dialogue has continued."""
        before = self.text.past[0]
        if before.startswith(self.text.prompt):
            return self.agent_opening
        return self.encoder.template(self.text.closing["user"] or "x", before)

    @property
    def closing_stays(self) -> bool:
        """True if the token that closes an agent's turn is still printed once the dialogue continues."""
        chosen, past = (self.encoder.closing(after)[0] for _, after in (self.text.live, self.text.past))
        return chosen == past != ()

    def preamble_of(self, turns: Sequence[Turn]) -> tuple[int, ...]:
        """Return the ids before the first turn, with the template's default system text if the turns have none."""
        return self.encoder.template("", self.printer.preamble(turns))

    def opening_after(self, turns: Sequence[Turn]) -> tuple[int, ...]:
        """Return the generation prompt's ids after these turns; () if the template prints none after tool results."""
        return self._turns.opening(self.printer.own_prompt(turns))

    def closing(self, role: str) -> tuple[int, ...]:
        """Return the ids printed after a turn of this role; for the agent, after the last turn of a dialogue."""
        if role != "assistant":
            return self.encoder.template("x", self.text.closing[role])
        chosen, rest = self.encoder.closing(self.text.live[1])
        return (*(chosen or (self.close_id,)), *rest)

    # Turns and dialogues.

    def encode_content(self, text: str) -> list[int]:
        """Return the ids between opening and closing of an agent turn with this text; `decode` is the inverse.

        Special tokens typed in the text stay text.

        Raises: InputError if the tokenizer cannot distinguish typed text from special tokens.
        """
        fixed, lead = self.text.before_content(self.text.live[0])
        return [*self.encoder.template(self.text.prompt, fixed), *self.encoder.content(lead + text)]

    def encode_turn(self, turn: Turn) -> EncodedTurn:
        """Encode one turn on its own."""
        return self.encode([turn])[0]

    def encode(self, turns: Sequence[Turn]) -> list[EncodedTurn]:
        """Encode the turns of a dialogue or of a part of one, each in all its forms.

        `window_ids` then selects the form that a window holds. An agent turn's `token_ids` (sampled content and
        closing token) are used unchanged. If they lack the closing token, the turn is unfinished and nothing is
        appended. The caller must first remove ids of another tokenizer or template (`with_own_token_ids`).
        """
        return [self._turns.turn(turn, text) for turn, text in zip(turns, self.printer.texts(turns), strict=True)]

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
        return [encoded[i][_FIELD[form]] for i, form in window]

    def decode(self, ids: Sequence[int], role: str = "assistant") -> str:
        """Return the text of a turn's sampled ids (`TurnEncoder.decode`)."""
        return self._turns.decode(ids, role)

    def tokens(self, turns: Sequence[Turn], prompt: bool = False) -> list[int]:
        """Return the ids of a dialogue, encoded from its text rather than from sampled ids.

        Args:
          prompt: True: add the generation prompt after the last turn.
        """
        ids = list(self.preamble_of(turns))
        for role, form in self.printer.dialogue([unsampled(turn) for turn in turns], prompt):
            ids += self._turns.form(form, role)
        return [*ids, *self.opening_after(turns)] if prompt else ids


def _fingerprint(description: dict[str, Any], text: TemplateText, stock: list[str] | None) -> str:
    # Truncation and padding change with every tokenizer call, and the post-processor is not used here.
    unused = ("truncation", "padding", "post_processor")
    fixed = {key: value for key, value in description.items() if key not in unused}
    parts = json.dumps([fixed, text.to_dict(), stock], sort_keys=True)
    return f"{SCHEME}-{hashlib.sha256(parts.encode()).hexdigest()[:16]}"
