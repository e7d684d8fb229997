"""Load a tokenizer, or, for a model with fresh weights, train one on the texts of the task; encode texts with it.

Control tokens are the added tokens that structure a dialogue: the special tokens, and others that the template prints.
"""

import functools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config, tokenizer_class_from_name

from offline_lmrl.errors import InputError, reading_pretrained, require
from offline_lmrl.logs.hub import ask_hub
from offline_lmrl.logs.trajectory import ROLES

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")
BYTE = re.compile("<0x[0-9A-F]{2}>")
ROLE_TOKENS = tuple(f"<{role}>" for role in ROLES)
# One token opens a turn and one token closes it, which keeps contexts short and turn markers out of the text.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def load_tokenizer(name: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or hub name, with the class with which it was saved.

    For model types that are known for wrong class names on the hub (for example qwen2), AutoTokenizer uses another
    class than the saved one, and that class may tokenise text differently. From version 5 on, transformers writes
    `backend` next to the class name; if it is present, the class name is right.

    Raises: InputError if there is no tokenizer.
    """
    ask_hub(name, "tokenizer", "tokenizer_config.json")
    with reading_pretrained(name, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        config = get_tokenizer_config(name, trust_remote_code=trust_remote_code)
        saved = tokenizer_class_from_name(config.get("tokenizer_class") or "") if "backend" in config else None
        if saved is not None and type(tokenizer) is not saved:
            tokenizer = saved.from_pretrained(name)
        tokenizer("a b", add_special_tokens=False)  # unusable settings raise an error only in a call
    # Some classes load a folder without tokenizer files.
    require(
        tokenizer.vocab_size > 0, f"{name}: found no tokenizer files, expected those that the model was trained with"
    )
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer (Sennrich et al. 2016, over UTF-8 bytes).

    The special tokens <pad>, <bos>, <eos> have the ids 0, 1, 2, followed by one token per role; the chat template uses
    these tokens. Encoding is lossless for every text: all 256 bytes are tokens, nothing is normalised and no space is
    added in front. Equal texts give equal tokenizers.

    Args:
      texts: the training texts.
      vocab_size: maximum number of tokens, special tokens included. There are fewer if the texts have no more pairs to
        merge.
    Raises: InputError if `vocab_size` is less than the number of bytes and special tokens.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [*SPECIAL_TOKENS, *ROLE_TOKENS]
    smallest = len(alphabet) + len(special)
    require(
        vocab_size >= smallest,
        f"vocab_size: found {vocab_size}, expected at least {smallest}: "
        f"{len(alphabet)} bytes and {len(special)} special tokens",
    )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    pad, bos, eos = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        additional_special_tokens=list(ROLE_TOKENS),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


class TextEncoder:
    """An encoder of two kinds of text: the template's, in which control tokens are active, and content.

    In content, control tokens are plain text, so nobody can close a turn or open another one by typing.

    Args:
      tokenizer: a fast tokenizer.
      printed: all texts of the template that are printed around turns.
      closing: the text of the template after an agent's turn that ends a dialogue.

    Attributes:
      description: the content of tokenizer.json.
      added: text -> id of the tokenizer's added tokens.
      control_names: the texts of the control tokens.
      controls: the ids of the control tokens.
      close_id: the token that ends an agent turn: the control token in `closing`, or EOS.
      byte_ids: the tokens of single bytes whose text depends on the bytes after them.

    Raises: InputError if `closing` has no such token and the tokenizer no EOS.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, printed: Iterable[str], closing: str):
        self.tokenizer, self.description = tokenizer, json.loads(tokenizer.backend_tokenizer.to_str())
        tokens, printed = self.description["added_tokens"], "\0".join(printed)
        self.added = {token["content"]: token["id"] for token in tokens}
        special = {token["content"] for token in tokens if token["special"]}
        self.control_names = special | {name for name in self.added if name in printed and not name.isspace()}
        self.controls = {self.added[name] for name in self.control_names}
        if tokenizer.unk_token != tokenizer.eos_token:
            self.controls.discard(tokenizer.unk_token_id)  # content that the tokenizer cannot spell gives it
        # A decoder of single bytes gives one sign for each byte of a run that is no text, also for those that are.
        falls_back = '"ByteFallback"' in json.dumps(self.description["decoder"])
        self.byte_ids = frozenset(
            i for name, i in tokenizer.get_vocab().items() if falls_back and BYTE.fullmatch(name)
        )
        self._inside_control = _inside(self.control_names)
        self._backend = _content_backend(self.description, self.control_names)
        self.content = functools.lru_cache(maxsize=1 << 16)(self._content)
        self.template = functools.lru_cache(maxsize=1 << 12)(self._template)
        chosen, rest = self.closing(closing)
        require(
            bool(chosen) or tokenizer.eos_token_id is not None,
            f"tokenizer: found no token that ends an agent turn ({closing!r} is {len(rest)} tokens), expected a "
            "tokenizer with an eos_token",
        )
        self.close_id = chosen[-1] if chosen else tokenizer.eos_token_id
        self._marks = self.controls | {self.close_id}

    def stock(self, text: str) -> list[int]:
        """Return the ids that the tokenizer itself gives to a text."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def _template(self, before: str, text: str) -> tuple[int, ...]:
        """Return the ids of `text`, a text of the template, when it follows the text `before`.

        The preceding text matters: some tokenizers add a space at the start of a text or after a special token.
        """
        if not text:
            return ()
        head, whole = self.stock(before), self.stock(before + text)
        # If the two texts merge into one token at the seam, no suffix of `whole` belongs to `text` alone.
        return tuple(whole[len(head) :] if whole[: len(head)] == head else self.stock(text))

    def _content(self, text: str) -> tuple[int, ...]:
        """Return the ids of content.

        Raises: InputError if the tokenizer cannot distinguish it from control tokens.
        """
        ids = self._spelt(text)
        if not self.controls.isdisjoint(ids):
            # Unigram and whole-word models also have special tokens in their plain vocabulary. Cutting a typed special
            # token in two keeps the model from finding it.
            ids = [token for piece in self._inside_control.split(text) for token in self._spelt(piece)]
        if not self._marks.isdisjoint(ids):
            name = self._backend.id_to_token(next(token for token in ids if token in self._marks))
            raise InputError(
                f"content: found text that the tokenizer encodes as {name!r}, which marks turns, expected a "
                "tokenizer with an eos_token that plain text cannot produce"
            )
        return tuple(ids)

    def _spelt(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def closing(self, text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Encode an agent's closing and split its ids after the closing token, which the agent chooses.

        Returns: the ids up to and including that token, () if the closing has none, and the ids after it.
        """
        ids = self.template("x", text)
        stop = next((i for i, token in enumerate(ids) if token in self.controls), None)
        if stop is None and self.tokenizer.eos_token_id is None and len(ids) == 1:
            stop = 0  # without an EOS token, the end of the line closes the turn
        return ((), ids) if stop is None else (ids[: stop + 1], ids[stop + 1 :])


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
