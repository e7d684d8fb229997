"""Requested returns in an export: special tokens whose rows in the model's own embedding are those of the run."""

from collections.abc import Sequence

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from offline_lmrl.errors import InputError
from offline_lmrl.tokens.conditioning import ReturnTokens


def return_names(count: int) -> list[str]:
    """Return the names of `count` tokens: one for "no return requested", then one per bin of returns, lowest first."""
    return ["<return_none>", *(f"<return_{b}>" for b in range(1, count))]


def add_return_tokens(tokenizer: PreTrainedTokenizerBase, count: int) -> list[int]:
    """Add special tokens that request a return to a tokenizer, in place.

    Args:
      count: number of tokens, as for `return_names`.
    Returns: the ids of the new tokens, in this order.
    Raises: InputError if the tokenizer already has a token of one of these names.
    """
    names = return_names(count)
    if known := set(names) & set(tokenizer.get_vocab()):
        raise InputError(f"tokenizer: found the token {min(known)}, expected no tokens with the names of returns")
    tokenizer.add_tokens([AddedToken(name, normalized=False, special=True) for name in names], special_tokens=True)
    return tokenizer.convert_tokens_to_ids(names)


def without_requests(ids: Sequence[int], tokens: ReturnTokens | None, opening: Sequence[int]) -> list[int]:
    """Remove the ids that request a return from a prompt of the run.

    Args:
      ids: the prompt, with the ids of a return, or of none, before each opening of the agent.
      tokens: the run's ids of returns; None = it has none.
      opening: ids that begin every opening of the agent.
    """
    if tokens is None:
        return list(ids)
    if tokens.null:  # reserved ids, which nothing else has
        return [token for token in ids if token < tokens.null[0]]
    found, start = list(ids), 0
    while start < len(found):
        rest = found[start:]
        request = next((one for one in tokens.bins if rest[: len(one) + len(opening)] == [*one, *opening]), ())
        del found[start : start + len(request)]
        start += 1
    return found
