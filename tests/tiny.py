"""Small tokenizers and chat templates, built in memory: one of each family that users bring."""

import json
from collections.abc import Callable, Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from offline_lmrl.tokens.printing import in_window
from offline_lmrl.tokens.rendering import EncodedTurn
from offline_lmrl.tokens.tokenizers import train_tokenizer


class OneByOne:
    """The rest of a renderer whose turns have one form each: a subclass says `encode_turn`, and the ids `preamble` and
    `agent_opening`."""

    preamble, agent_opening = (), ()

    @property
    def check(self):
        return self

    def encode(self, turns):
        return [self.encode_turn(turn) for turn in turns]

    def notice(self, turns):
        pass

    def faults_in(self, turns):
        return []

    def speaks_as_user(self, turn):
        return turn.role == "user"

    def preamble_of(self, turns):
        return self.preamble

    def opening_after(self, turns):
        return self.agent_opening

    def window_ids(self, turns, encoded, first, stop, live):
        return [getattr(encoded[i], form) for i, form in in_window(turns, self.speaks_as_user, first, stop, live)]


def one_form(ids: tuple[int, ...], start: int, actions: tuple[int, ...], closed: bool = True) -> EncodedTurn:
    """A turn of the same ids everywhere."""
    return EncodedTurn(ids, start, actions, closed, ids, ids, ids)


TEXTS = (
    "Hello there, how are you?",
    "I would like the book and 2 hats.\nDeal?",
    "the player moved up to 5, 12\n",
    "User: hi Assistant: no thanks System: Tool: Environment: [INST] [/INST] <|user|> assistant model turn",
) * 2

CHATML = """{%- for m in messages -%}
{{ '<|im_start|>' + m['role'] + '\\n' }}
{%- if m['role'] == 'assistant' -%}
{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
{%- else -%}{{ m['content'] + '<|im_end|>\\n' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""

# A system text is put in where the dialogue brings none.
DEFAULT_SYSTEM = (
    """{%- if messages[0]['role'] != 'system' -%}
{{ '<|im_start|>system\\nYou are a helpful player.<|im_end|>\\n' }}{%- endif -%}"""
    + CHATML
)

# Thoughts of earlier turns are cut out; the last turn shows an empty thought where it has none.
THINKING = """{%- for m in messages -%}
{%- if m['role'] == 'tool' -%}
{{ '<|im_start|>user\\n<tool_response>\\n' + m['content'] + '\\n</tool_response><|im_end|>\\n' }}
{%- elif m['role'] == 'assistant' -%}
{%- set parts = m['content'].split('</think>') -%}
{%- set thought = parts[0].split('<think>')[-1] if parts[1:] else '\\n\\n' -%}
{{ '<|im_start|>assistant\\n' }}
{%- if loop.last -%}{{ '<think>' + thought + '</think>\\n\\n' }}{%- endif -%}
{{ parts[-1].lstrip('\\n') + '<|im_end|>\\n' }}
{%- elif m['role'] in ('user', 'system') -%}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""

# No generation prompt, BOS before every user turn, the system text inside the first user turn, strict alternation.
BRACKETS = """{%- if messages[0]['role'] == 'system' -%}
{%- set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' -%}{%- set messages = messages[1:] -%}
{%- else -%}{%- set system = '' -%}{%- endif -%}
{%- for m in messages -%}
{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('roles must alternate') }}{%- endif -%}
{%- if m['role'] == 'user' -%}
{{ bos_token + '[INST] ' + (system if loop.first else '') + m['content'].strip() + ' [/INST]' }}
{%- elif m['role'] == 'assistant' -%}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{%- endif -%}
{%- endfor -%}"""

HEADERS = """{%- for m in messages -%}
{{ bos_token if loop.first else '' }}
{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif -%}"""

# Strips, refuses a system turn and turns that do not alternate, calls the assistant "model".
STRIPPING = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}{{ raise_exception('System role not supported') }}{%- endif -%}
{%- for m in messages -%}
{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('roles must alternate') }}{%- endif -%}
{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' }}
{{- m['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"""

BARS = """{%- for m in messages -%}
{%- if m['role'] in ('user', 'system', 'assistant') -%}
{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token + '\\n' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\\n' }}{%- endif -%}"""

# The generation prompt ends before the space that the finished turn has; nothing ends a user turn but the next label.
LABELS = """{{ bos_token }}
{%- for m in messages -%}
{%- if m['role'] == 'user' -%}{{ 'User: ' + m['content'] + '\\n\\n' }}
{%- elif m['role'] == 'assistant' -%}{{ 'Assistant: ' + m['content'] + eos_token }}
{%- elif m['role'] == 'system' -%}{{ m['content'] + '\\n\\n' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'Assistant:' }}{%- endif -%}"""


def byte_level(
    template: str | None, special: Sequence[str] = (), plain_added: Sequence[str] = (), **names: str
) -> PreTrainedTokenizerFast:
    """A byte-level BPE with more special tokens, with added tokens that are not special, and with a chat template."""
    tokenizer = train_tokenizer(TEXTS, 300)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special), **names})
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in plain_added])
    tokenizer.chat_template = template
    return tokenizer


def metaspace(template: str | None, prefix: str) -> PreTrainedTokenizerFast:
    """A BPE on "▁" with byte fallback; `prefix` is where "▁" is added: "first", "always", or "normalizer"."""
    backend = _byte_fallback_bpe(["<unk>", "<s>", "</s>"], pre_tokenizers.Metaspace())
    if prefix == "normalizer":
        backend.pre_tokenizer = None
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix, split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=template
    )


def replacing(template: str | None) -> PreTrainedTokenizerFast:
    """A BPE with "▁" for spaces, byte fallback, and no space added in front."""
    turns = ["<start_of_turn>", "<end_of_turn>"]
    backend = _byte_fallback_bpe(["<pad>", "<eos>", "<bos>", "<unk>", *turns], pre_tokenizers.Metaspace())
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=turns,
        chat_template=template,
    )


def _byte_fallback_bpe(special: Sequence[str], pre_tokenizer: pre_tokenizers.PreTokenizer) -> Tokenizer:
    trained = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    trained.pre_tokenizer = pre_tokenizer
    names = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    trained.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=370, special_tokens=names, show_progress=False))
    description = json.loads(trained.to_str())
    del description["added_tokens"][len(special) :]  # bytes are plain vocabulary
    return Tokenizer.from_str(json.dumps(description))


def unigram() -> PreTrainedTokenizerFast:
    """A Unigram model, which has its special tokens in the plain vocabulary too."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.train_from_iterator(
        TEXTS,
        trainers.UnigramTrainer(
            vocab_size=120,
            special_tokens=["<unk>", "<s>", "</s>"],
            unk_token="<unk>",
            show_progress=False,
            initial_alphabet=[chr(i) for i in range(32, 127)] + ["\n"],
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def word_piece() -> PreTrainedTokenizerFast:
    """A lower-casing WordPiece model: white space and case are lost."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    backend.train_from_iterator(
        TEXTS,
        trainers.WordPieceTrainer(
            vocab_size=200, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"], show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]", bos_token="[CLS]", eos_token="[SEP]"
    )


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "chatml": lambda: byte_level(CHATML, ["<|im_start|>", "<|im_end|>"], eos_token="<|im_end|>"),
    "default system": lambda: byte_level(DEFAULT_SYSTEM, ["<|im_start|>", "<|im_end|>"], eos_token="<|im_end|>"),
    "thinking": lambda: byte_level(THINKING, ["<|im_start|>", "<|im_end|>"], ["<think>", "</think>"]),
    "headers": lambda: byte_level(HEADERS, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]),
    "brackets": lambda: metaspace(BRACKETS, "first"),
    "bars": lambda: metaspace(BARS, "always"),
    "labels": lambda: metaspace(LABELS, "normalizer"),
    "stripping": lambda: replacing(STRIPPING),
    "role tokens": lambda: train_tokenizer(TEXTS, 320),
    "plain unigram": unigram,
    "plain bytes": lambda: byte_level(None),
    "plain words": word_piece,
}
