"""Parts of exports that are folders of transformers: tokenizer, generation config, and how to prompt them."""

import copy
from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.logs.trajectory import Turn
from offline_lmrl.tokens.rendering import Renderer

EXAMPLE = (Turn("user", "How are you?"),)


def tokenizer_of(renderer: Renderer) -> PreTrainedTokenizerBase:
    """Return a copy of a run's tokenizer, without a chat template if the run was not trained with it."""
    tokenizer = copy.deepcopy(renderer.tokenizer)
    if renderer.template == "plain":
        tokenizer.chat_template = None
    return tokenizer


def set_generation(model: PreTrainedModel, close_id: int, drawing: Mapping[str, Any]) -> None:
    """Replace the model's generation config, so that engines end the agent's turn and sample as the run does.

    Of the base model's settings only the special token ids are kept: a repetition penalty, for example, is not part of
    the run's policy.

    Args:
      model: changed in place.
      close_id: id of the token that ends an agent turn.
      drawing: settings by which tokens are sampled; none = greedily.
    """
    base = model.generation_config
    ends = {close_id, *(base.eos_token_id if isinstance(base.eos_token_id, list) else [base.eos_token_id])} - {None}
    model.generation_config = GenerationConfig(
        bos_token_id=base.bos_token_id,
        pad_token_id=base.pad_token_id,
        eos_token_id=sorted(ends) if len(ends) > 1 else close_id,
        do_sample=bool(drawing),
        **drawing,
    )


def prompt_section(policy: LanguagePolicy, saved: Mapping[str, Any], example: str) -> list[str]:
    """Return the lines of a model card that say how a prompt has to look.

    Args:
      policy: the run.
      saved: the run metadata.
      example: the prompt EXAMPLE as text.
    """
    window = policy.window
    turns = "all" if window.context is None else f"at most {window.context}"
    stock = policy.renderer.check.difference(EXAMPLE)
    shown = "" if saved.get("few_shot") is None else "; few-shot demonstrations of the task come first"
    return [
        "## Prompts",
        "",
        f"As in training: turns before the agent's own: {turns}; tokens, reply included: {window.max_length}{shown}. "
        "Example of a prompt:",
        "",
        *(f"    {line}" for line in example.splitlines()),
        "",
        f"The reply ends with {policy.renderer.tokenizer.convert_ids_to_tokens(policy.renderer.close_id)!r}, or after "
        f"{policy.decoding.max_new_tokens} tokens.",
        *([] if stock is None else ["", f"The stock chat template prints different text: {stock}."]),
    ]
