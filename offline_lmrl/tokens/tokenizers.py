"""Load a tokenizer, or, for a model with fresh weights, train one on the texts of the task."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config, tokenizer_class_from_name

from offline_lmrl.errors import InputError, reading_pretrained
from offline_lmrl.logs.trajectory import ROLES

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")
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
    with reading_pretrained(name, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        config = get_tokenizer_config(name, trust_remote_code=trust_remote_code)
        saved = tokenizer_class_from_name(config.get("tokenizer_class") or "") if "backend" in config else None
        if saved is not None and type(tokenizer) is not saved:
            tokenizer = saved.from_pretrained(name)
        tokenizer("a b", add_special_tokens=False)  # unusable settings raise an error only in a call
    if tokenizer.vocab_size == 0:  # some classes load a folder without tokenizer files
        raise InputError(f"{name}: found no tokenizer files, expected those that the model was trained with")
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
    if vocab_size < smallest:
        raise InputError(
            f"vocab_size: found {vocab_size}, expected at least {smallest}: "
            f"{len(alphabet)} bytes and {len(special)} special tokens"
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
