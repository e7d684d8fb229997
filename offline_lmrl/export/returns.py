"""Requested returns in an export: special tokens whose rows in the model's own embedding are those of the run, and
what its card says of them."""

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.errors import InputError
from offline_lmrl.tokens.conditioning import ASK_NAMES, ReturnTokens, texts_of


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


def returns_section(
    policy: LanguagePolicy, block: Mapping[str, Any] | None, ask: float | str | None, tokens: Sequence[str]
) -> list[str]:
    """Return the lines of a model card that say how a return is requested; [] for a run without returns.

    Args:
      policy: the run.
      block: the entry `returns` of its run metadata; None = it has none.
      ask: the return that the run requests.
      tokens: texts of the special tokens that request a return, as for `return_names`; empty if text does.
    """
    if block is None:
        return []
    return_tokens = policy.return_tokens
    texts = tokens[1:] or list(map(repr, texts_of(block)))
    none = f"`{tokens[0]}`" if tokens else "nothing"
    lines = [
        "",
        "## Returns",
        "",
        "Before each agent turn, the next one and earlier ones, the prompt has the text of the requested return, "
        f"as in the example above, or {none} if no return is requested. After a turn that earned r, the requested "
        f"return R becomes (R − r) / {return_tokens.discount_per_turn:g}; the text before an earlier turn "
        "stays unchanged.",
    ]
    if tokens:
        lines[-1] += (
            " `generation_config.json` suppresses these tokens in replies; engines that do not read "
            "`suppress_tokens` must be configured to suppress them."
        )
    lines += [
        "",
        f"The run requests: {_asked(return_tokens, ask, texts)}. Returns in the training data, in reward units:",
        "",
        "| task | text | from | to | training turns |",
        "|---|---|---|---|---|",
    ]
    for task, table in return_tokens.scale.tables.items():
        bounds = [table.least, *table.edges, table.most]
        rows = zip(texts, bounds, bounds[1:], table.counts, strict=False)  # the finest table has all bins
        lines += [f"| {task} | `{text}` | {low:g} | {high:g} | {count} |" for text, low, high, count in rows]
    return lines


def _asked(return_tokens: ReturnTokens, ask: float | str | None, texts: Sequence[str]) -> str:
    if isinstance(ask, str) and not ASK_NAMES.fullmatch(ask):
        return f"{ask}, which is computed by heads that this checkpoint does not have: choose a return"
    if ask is None or return_tokens.scale.per == "task":
        return "none" if ask is None else f"{ask} of the task"
    return f"{ask}, `{texts[return_tokens.scale.bin_of(return_tokens.scale.value_of(ask))]}`"
