"""What training starts from: a tokenizer, a model that can read the data as they are rendered, and an adapter."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from offline_lmrl.decoding.probe import check_plays, check_trains, probing
from offline_lmrl.errors import InputError, require
from offline_lmrl.logs.trajectory import Turn
from offline_lmrl.models.adapters import (
    has_adapter,
    most_positions,
    require_peft,
    run_metadata,
    unfreeze_heads,
    without_false_alarms,
)
from offline_lmrl.models.renderers import scheme_of
from offline_lmrl.tokens.rendering import SCHEME, Renderer
from offline_lmrl.tokens.template_check import MISMATCH, TEMPLATE_ROWS
from offline_lmrl.tokens.tokenizers import load_tokenizer


def check_policy(model: PreTrainedModel, renderer: Renderer, max_length: int) -> None:
    """Check that a guided model can be trained and played on rows of `max_length` tokens that `renderer` makes.

    Raises: InputError if it cannot (`check_model`), or if its outputs for a row depend on other rows or on a cache.
    """
    check_model(model, renderer, max_length)
    check_trains(model, renderer)
    check_plays(model, renderer)


def check_model(model: PreTrainedModel, renderer: Renderer, max_length: int) -> None:
    """Check that the model can read rows of `max_length` tokens that `renderer` makes.

    Raises: InputError if the model has too few positions or embeddings, or was trained with another tokenizer or
      template.
    """
    limit = most_positions(model.config)
    require(
        limit is None or max_length <= limit,
        f"max_length: found {max_length}, expected at most the model's {limit} positions",
    )
    block = run_metadata(model.config)
    found, expected = renderer.fingerprint, block.get("tokenizer")
    require(
        expected == found or scheme_of(block) != SCHEME,
        f"tokenizer: found fingerprint {found}, expected {expected}: "
        "the model was trained with another tokenizer or chat template",
    )
    tokens, rows = len(renderer.tokenizer), model.get_input_embeddings().weight.shape[0]
    require(tokens <= rows, f"tokenizer: found {tokens} tokens, expected at most the model's {rows} embeddings")


def check_template(renderer: Renderer, dialogues: Iterable[Sequence[Turn]], counts: Counter[str]) -> None:
    """Check that the first dialogues are rendered as the tokenizer's own chat template prints them.

    Args:
      renderer: converts dialogues to tokens.
      dialogues: the turns of each dialogue.
      counts: is incremented under a line that describes the difference, if there is one.
    Raises: InputError with `template: auto`, if `counts` holds such a difference, found here or while the data were
      encoded.
    """
    first = list(islice(dialogues, TEMPLATE_ROWS))
    if (difference := renderer.check.first_difference(first)) is not None:
        counts[difference] += 1
    for line, n in counts.items():
        require(
            not line.startswith(MISMATCH) or renderer.template != "auto",
            f"template: found {n} {line}, expected template: assembled to train on them all the same, or plain",
        )


def with_adapter(model: PreTrainedModel, peft_config: Any) -> torch.nn.Module:
    """Return the model inside a trainable adapter; heads stay trainable in full.

    Args:
      model: the model.
      peft_config: a config of peft for the adapter, such as LoraConfig.
    Raises: InputError if the model has an adapter already, or cannot take this one.
    """
    require(
        not has_adapter(model),
        "lora: found a model with an adapter already; leave lora out to train that one, or merge it",
    )
    peft = require_peft()
    routers = _linear_layers_with_several_outputs(model)
    if peft_config.target_modules == "all-linear":
        peft_config = replace(peft_config, exclude_modules=[*(peft_config.exclude_modules or ()), *routers])
    try:
        with without_false_alarms():
            model = peft.get_peft_model(model, peft_config)
    except (TypeError, ValueError) as error:
        raise InputError(f"model.lora: {error}") from error
    inner = model.get_base_model()
    for name in routers:
        require(
            not isinstance(inner.get_submodule(name), peft.tuners.tuners_utils.BaseTunerLayer),
            f"model.lora.target_modules: found {name}, a layer with several outputs, expected layers "
            "with one, which is what an adapter adds to",
        )
    unfreeze_heads(model)
    return model


@torch.no_grad()
def _linear_layers_with_several_outputs(model: PreTrainedModel) -> list[str]:
    """Return the names of linear layers that return more than one tensor, such as routers of mixtures of experts."""
    found: list[str] = []
    handles = [
        module.register_forward_hook(
            lambda module, args, output, name=name: None if isinstance(output, Tensor) else found.append(name)
        )
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    with probing(model):
        ids = torch.ones(1, 2, dtype=torch.long, device=model.device)
        model(input_ids=ids, attention_mask=ids)
    for handle in handles:
        handle.remove()
    return found


def tokenizer_beside(model: PreTrainedModel | str) -> PreTrainedTokenizerBase:
    """Return the tokenizer saved with a model (the model, or its folder or hub name).

    Raises: InputError if there is none.
    """
    return load_tokenizer(model if isinstance(model, str) else model.config._name_or_path)
