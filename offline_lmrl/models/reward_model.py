"""Reward models: a trunk with one number per token, summed over some of the agent's tokens to the score of a reply.

There are three kinds of head, which sum over different tokens:

    terminal   the last token of the reply (Ziegler et al. 2019, Stiennon et al. 2020)
    turn       the last token of each agent turn
    token      every agent token: per-step rewards from comparisons (Christiano et al. 2017)

A reply is read as a whole, after its context. With a window of `context` turns (turn and token heads only), each agent
turn of the reply is read in a row of its own, after the turns that a policy with that window sees (tokens/windows.py).
Its score then depends on nothing older. Christiano et al. score each step of a segment by its own observation.

A terminal model is a plain ...ForSequenceClassification with one label, the others are ...ForTokenClassification.
Class names, weights and config are those of transformers, which loads them without this project. With LoRA, the folder
holds the adapter and the head in peft's own form, and the run metadata in a file of ours (models/adapters.py).
Without this project, a classification class scores the last token that is not config.pad_token_id, so the pad token
must not be the one that closes a turn.

This module adds `forward(..., read=mask)` and the entry `reward` of the run metadata (in the config's `offline_lmrl`),
which holds the kind of head, as `head`, and a constant, as `bias`. The scorer adds this bias once per reply
(decoding/scorers.py), because the heads have none, or one per token.

A batch has B rows of T tokens and M options, the replies that are compared (tokens/comparison_batching.py).
"""

import functools
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from offline_lmrl.errors import InputError, reading_pretrained, shown
from offline_lmrl.models.adapters import (
    SavedModel,
    adapter_base,
    load_adapter,
    run_metadata,
    saved_model,
    without_adapter,
)
from offline_lmrl.models.loading import from_scratch
from offline_lmrl.tokens.comparison_batching import ComparisonBatch
from offline_lmrl.tokens.windows import WindowRule

HEAD_NAMES = ("score", "classifier")
HEADS = {
    "terminal": AutoModelForSequenceClassification,
    "turn": AutoModelForTokenClassification,
    "token": AutoModelForTokenClassification,
}


class Reward:
    """The mixin that `reward_class` adds to a classification class."""

    def forward(self, *args, read: Tensor | None = None, **kwargs):
        """Run the base class's forward or, with `read`, compute the score of each row.

        Scores leave out the dropout that token classification applies before its head.

        Args:
          read: (B,T) bool, True for the tokens whose numbers are summed; None = the base class's forward.
        Returns: the base class's outputs, or scores (B,), fp32, without the bias of the run metadata.
        """
        if read is None:
            return super().forward(*args, **kwargs)
        hidden = self.base_model(*args, use_cache=False, **kwargs)[0]
        with torch.autocast(hidden.device.type, enabled=False):
            score = head_of(self)(hidden.float()).squeeze(-1)
        return score.masked_fill(~read, 0.0).sum(1)


@functools.cache
def reward_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return a subclass of a classification class, with the argument `read` in its forward.

    It has the name of the base class, which config.json stores for other engines. Its `__module__` is also that of the
    base class, because transformers treats a class of another module as custom code and skips its buffers.
    """
    return type(base.__name__, (Reward, base), {"__module__": base.__module__, "__doc__": Reward.__doc__})


def head_of(model: PreTrainedModel) -> nn.Linear:
    """Return the linear layer that gives one number per token. Raises: InputError if there is none."""
    layers = dict(without_adapter(model).named_children())
    for layer in (layers[name] for name in HEAD_NAMES if name in layers):
        # Of peft's wrapper, take the copy that is trained.
        layer = dict(layer.named_children()).get("modules_to_save", {"default": layer})["default"]
        if isinstance(layer, nn.Linear) and layer.out_features == 1:
            return layer
    raise InputError(
        f"model: found {type(model).__name__}, expected a model with a linear head of one output, named "
        "score or classifier"
    )


def reset_head(model: PreTrainedModel) -> None:
    """Draw the head's weights from N(0, σ = 1/√(d+1)) and set its bias to 0.

    Scores then have about unit variance (Ziegler et al. 2019, their code).
    """
    head = head_of(model)
    nn.init.normal_(head.weight, std=1 / math.sqrt(head.in_features + 1))
    if head.bias is not None:
        nn.init.zeros_(head.bias)


def read_mask(batch: ComparisonBatch, head: str) -> Tensor:
    """Return (B,T) bool, True for the tokens whose numbers a head sums.

    Args:
      head: the kind of head, "terminal", "turn" or "token".
    """
    if head == "terminal":
        positions = torch.arange(batch["input_ids"].shape[1], device=batch["last"].device)
        return positions == batch["last"].unsqueeze(1)
    return batch["closing_mask" if head == "turn" else "action_mask"]


def reads_by_turn(head: str, window: WindowRule) -> bool:
    """True if each agent turn of a reply is scored in a row of its own, after at most `window.context` turns.

    Args:
      head: the kind of head, "terminal", "turn" or "token".
    """
    return window.context is not None and head != "terminal"


def option_scores(model: nn.Module, batch: ComparisonBatch, head: str) -> Tensor:
    """Compute the scores of the M options of a batch; the rows of an option are summed.

    Args:
      model: a reward model, which may be wrapped for peft or for several processes.
      head: the kind of head, "terminal", "turn" or "token".
    Returns: (M,), fp32, without the bias of the run metadata.
    """
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    score = model(**inputs, read=read_mask(batch, head))
    return score.new_zeros(len(batch["comparison"])).index_add(0, batch["option"], score)


def score_bias(model: nn.Module) -> float:
    """Return the constant b in a score w · h + b at one token.

    It is the bias of the linear layer, if any, plus the bias of the run metadata, which normalisation sets
    (`rescale_head`).
    """
    own = head_of(model).bias
    return run_metadata(model.config)["reward"]["bias"] + (0.0 if own is None else own.item())


def with_head_beside(peft_config: Any, model: PreTrainedModel) -> Any:
    """Return a copy of a peft config by which the model's head is trained and saved in full and gets no adapter."""
    name = next(name for name, layer in model.named_children() if layer is head_of(model))
    saved = {*(peft_config.modules_to_save or ()), name}
    return replace(peft_config, modules_to_save=sorted(saved), exclude_modules=[name])


def build_reward_model(spec: Mapping[str, Any], tokenizer, head: str) -> PreTrainedModel:
    """Build a reward model with fresh weights.

    Args:
      spec: model type and config fields, as for `from_scratch` in models/loading.py.
      tokenizer: gives the vocabulary size and special tokens.
      head: the kind of head, "terminal", "turn" or "token".
    Raises: InputError that names a wrong field of `spec`.
    """
    model = _with_read(from_scratch(HEADS[head], spec, tokenizer, num_labels=1), head)
    reset_head(model)
    return model


def load_reward_model(
    path_or_name: str | Path, head: str | None = None, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load a reward model with fp32 weights.

    Args:
      path_or_name: a folder or hub name: of a reward model, of any sequence classifier with one label or, if `head` is
        given, of a causal LM (guided or not), which then gets a fresh head.
      head: the kind of head that the model must have or get, "terminal", "turn" or "token"; None = the stored one.
      trust_remote_code: run code that comes with the model, as in transformers.
    Returns: the model; for a LoRA folder, the PeftModel around it, with trainable adapter and head.
    Raises: InputError if there is no such model, or if its head is of another kind than `head`.
    """
    name = str(path_or_name)
    config, metadata = saved = saved_model(name, trust_remote_code)
    stored = _stored_head(saved)
    if config is None:
        if stored is None or head not in (None, stored):
            raise InputError(f"head: found {shown(head)}, but {name} has the head {stored!r}")
        base = load_reward_model(adapter_base(name), stored, trust_remote_code=trust_remote_code)
        return load_adapter(base, name, metadata)
    if (head or stored) is None:
        found = ", ".join(config.architectures or ["no architecture"])
        scorer = f"{{kind: value_heads, run: {name}}}"
        raise InputError(
            f"{name}: found no reward model ({found}), expected one; to score with an ILQL run, give '{scorer}'; to "
            "evaluate a policy on pairs, turn them into trajectories with relabel --make rewards"
        )
    if None not in (head, stored) and head != stored:
        raise InputError(f"head: found {shown(head)}, but {name} has the head {stored!r}")
    if stored is not None and config.num_labels != 1:
        raise InputError(f"{name}: found a classifier with {config.num_labels} labels, expected one label")
    config.num_labels = 1
    with reading_pretrained(name, "model"), _without_load_report():
        model, info = HEADS[head or stored].from_pretrained(
            name, config=config, dtype=torch.float32, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    model = _with_read(model, head or stored)
    own = {key for key, weight in model.state_dict(keep_vars=True).items() if weight is head_of(model).weight}
    missing = {key for key in info["missing_keys"] if not key.endswith(".bias")}
    if missing - own or (missing and stored is not None):
        raise InputError(f"model: {name}: {sorted(missing)[0]} is not among the weights")
    if missing:
        reset_head(model)
    return model


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Context manager: hide transformers' list of missing and unexpected weights.

    The caller refuses missing weights itself, except those of a head that is made anew; unexpected ones are the heads
    that a causal LM has instead.
    """

    def is_other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def is_reward_model(path_or_name: str | Path) -> bool:
    """True if `load_reward_model` can load the folder or hub name without the argument `head`."""
    return _stored_head(saved_model(path_or_name)) is not None


def rescale_head(model: PreTrainedModel, gain: float, bias: float) -> None:
    """Normalise the model's scores, in place: score ← gain · (score of the head) + bias.

    The head's weights are multiplied by the gain; the bias replaces the one in the run metadata.
    """
    head = head_of(model)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter *= gain
    block = run_metadata(model.config)
    model.config.offline_lmrl = block | {"reward": block["reward"] | {"bias": bias}}


def _with_read(model: PreTrainedModel, head: str) -> PreTrainedModel:
    model.__class__ = reward_class(type(model))
    block = run_metadata(model.config)
    model.config.offline_lmrl = block | {"reward": {"bias": 0.0, **block.get("reward", {}), "head": head}}
    return model


def _stored_head(saved: SavedModel) -> str | None:
    """Return the kind of head that a model has; None if it is no reward model."""
    names = (saved.config and saved.config.architectures) or ()
    default = "terminal" if any(name.endswith("ForSequenceClassification") for name in names) else None
    return saved.metadata.get("reward", {}).get("head", default)
