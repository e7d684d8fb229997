"""Reward models: a trunk with one number per token, read at some of the agent's tokens; their sum is a reply's score.

    terminal   the last token of the reply (Ziegler et al. 2019, Stiennon et al. 2020)
    turn       the last token of each agent turn
    token      every agent token: per-step rewards from comparisons (Christiano et al. 2017)

A reply is read as a whole, after its context. With a window of `context` turns (turn and token), each of its agent
turns is read on its own, after the turns that a policy with that window sees there (data/windows.py): its score
then depends on nothing older. Christiano et al. score each step of a segment by its own observation.

A terminal model is a plain ...ForSequenceClassification with one label, the others are ...ForTokenClassification:
class names, weights and config are those of transformers, which loads them without this project. With LoRA the folder
holds the adapter and the head in peft's own form, and our block beside it (models/adapters.py). A classification class
of its own reads the last token that is not config.pad_token_id, so the pad token must not be what closes a turn.
What is added is `forward(..., read=mask)` and the config's block `offline_lmrl.reward`: head and bias. The bias is
added by the scorer (decoding/scorers.py), once per reply, as these heads have none, or one per token.
"""

import functools
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from offline_lmrl.data.comparison_batching import ComparisonBatch
from offline_lmrl.data.errors import InputError, opening, shown
from offline_lmrl.data.windows import WindowRule
from offline_lmrl.models.adapters import check_settings, read_settings, require_peft, settings
from offline_lmrl.models.guided import from_scratch

HEAD_NAMES = ("score", "classifier")
HEADS = {
    "terminal": AutoModelForSequenceClassification,
    "turn": AutoModelForTokenClassification,
    "token": AutoModelForTokenClassification,
}


class Reward:
    """What `reward_class` puts before a classification class."""

    def forward(self, *args, read: Tensor | None = None, **kwargs):
        """The base's; with `read` (B,T) instead the scores (B,), fp32, without bias: the sum over the tokens that are
        read. A dropout before the head, as token classification has it, is left out there."""
        if read is None:
            return super().forward(*args, **kwargs)
        hidden = self.base_model(*args, use_cache=False, **kwargs)[0]
        with torch.autocast(hidden.device.type, enabled=False):
            score = head_of(self)(hidden.float()).squeeze(-1)
        return score.masked_fill(~read, 0.0).sum(1)


@functools.cache
def reward_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A classification class with `read`; it keeps its name, which is what config.json tells other engines, and its
    module: elsewhere transformers takes a class for custom code, and skips its buffers."""
    return type(base.__name__, (Reward, base), {"__module__": base.__module__, "__doc__": Reward.__doc__})


def head_of(model: PreTrainedModel) -> nn.Linear:
    """The layer that gives one number per token. Raises: InputError where there is none."""
    for name in HEAD_NAMES:
        layer = getattr(model, name, None)
        if hasattr(layer, "modules_to_save"):  # peft's wrapper around the copy that is trained
            layer = layer.modules_to_save["default"]
        if isinstance(layer, nn.Linear) and layer.out_features == 1:
            return layer
    raise InputError(
        f"model: found {type(model).__name__}, expected one with a linear head of one output, named "
        "score or classifier, as the decoder families have it"
    )


def reset_head(model: PreTrainedModel) -> None:
    """N(0, 1/√(d+1)) and bias 0: scores of about unit variance (Ziegler et al. 2019, their code)."""
    head = head_of(model)
    nn.init.normal_(head.weight, std=1 / math.sqrt(head.in_features + 1))
    if head.bias is not None:
        nn.init.zeros_(head.bias)


def read_mask(batch: ComparisonBatch, head: str) -> Tensor:
    """(B,T) bool: the tokens at which a head is read."""
    if head == "terminal":
        positions = torch.arange(batch["input_ids"].shape[1], device=batch["last"].device)
        return positions == batch["last"].unsqueeze(1)
    return batch["closing_mask" if head == "turn" else "action_mask"]


def reads_by_turn(head: str, window: WindowRule) -> bool:
    """True if each agent turn is read in a row of its own, after at most `window.context` turns."""
    return window.context is not None and head != "terminal"


def option_scores(model: nn.Module, batch: ComparisonBatch, head: str) -> Tensor:
    """The scores (M,) of the options of a batch, fp32, without bias: the sums over their rows."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    score = model(**inputs, read=read_mask(batch, head))
    return score.new_zeros(len(batch["comparison"])).index_add(0, batch["option"], score)


def score_bias(model: nn.Module) -> float:
    """What a terminal score, or that of one turn, is beside w · h: the head's own bias, if it has one, and that of
    normalisation."""
    own = head_of(model).bias
    return settings(model.config)["reward"]["bias"] + (0.0 if own is None else own.item())


def with_head_beside(peft_config: Any, model: PreTrainedModel) -> Any:
    """The peft config with the head trained and saved in full, and no adapter on it."""
    name = next(name for name in HEAD_NAMES if getattr(model, name, None) is head_of(model))
    saved = {*(peft_config.modules_to_save or ()), name}
    return replace(peft_config, modules_to_save=sorted(saved), exclude_modules=[name])


def build_reward_model(spec: Mapping[str, Any], tokenizer, head: str) -> PreTrainedModel:
    """A reward model with fresh weights; arguments and errors as `from_scratch`."""
    model = _with_read(from_scratch(HEADS[head], spec, tokenizer, num_labels=1), head)
    reset_head(model)
    return model


def load_reward_model(
    path_or_name: str | Path, head: str | None = None, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A reward model from a folder or hub name: of a reward model, of any classifier of sequences with one label, or,
    where `head` says which to add, of a causal LM, guided or not. Weights are fp32. A LoRA folder gives the PeftModel
    around the model, with adapter and head trainable.

    Raises: InputError where there is no such model, and where it has another head than the one asked for.
    """
    name = str(path_or_name)
    if os.path.isfile(os.path.join(name, "adapter_config.json")):
        return _load_adapter(Path(name), head, trust_remote_code)
    with opening(name, "model"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    check_settings(name, settings(config))
    stored = _stored_head(config)
    if (head or stored) is None:
        found = ", ".join(config.architectures or ["no architecture"])
        judge = f"{{kind: value_heads, run: {name}}}"
        raise InputError(
            f"{name}: found no reward model ({found}), expected one; an ILQL run judges pairs as "
            f"'{judge}', and any policy is judged on what relabel --make rewards makes of them"
        )
    if None not in (head, stored) and head != stored:
        raise InputError(f"head: found {shown(head)}, but {name} has the head {stored!r}")
    if stored is not None and config.num_labels != 1:
        raise InputError(f"{name}: found a classifier with {config.num_labels} labels, expected one")
    config.num_labels = 1
    with opening(name, "model"):
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


def is_reward_model(path_or_name: str | Path) -> bool:
    """True if the folder or hub name is one that `load_reward_model` opens without being told a head."""
    name = str(path_or_name)
    if os.path.isfile(os.path.join(name, "adapter_config.json")):
        return "reward" in read_settings(name)
    with opening(name, "model"):
        config = AutoConfig.from_pretrained(name)
    check_settings(name, settings(config))
    return _stored_head(config) is not None


def _load_adapter(folder: Path, head: str | None, trust_remote_code: bool) -> nn.Module:
    peft = require_peft()
    block = read_settings(folder)
    stored = block.get("reward", {}).get("head")
    if stored is None or head not in (None, stored):
        raise InputError(f"head: found {shown(head)}, but {folder} has the head {stored!r}")
    with opening(folder, "model"):
        base = peft.PeftConfig.from_pretrained(folder).base_model_name_or_path
    model = load_reward_model(base, stored, trust_remote_code=trust_remote_code)
    model.config.offline_lmrl = block
    with opening(folder, "model"):
        return peft.PeftModel.from_pretrained(model, folder, is_trainable=True)


def fold(model: PreTrainedModel, gain: float, bias: float) -> None:
    """score ← gain · score + bias, from raw scores: the gain goes into the head, the bias into the config."""
    head = head_of(model)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter *= gain
    block = settings(model.config)
    model.config.offline_lmrl = block | {"reward": block["reward"] | {"bias": bias}}


def _with_read(model: PreTrainedModel, head: str) -> PreTrainedModel:
    model.__class__ = reward_class(type(model))
    block = settings(model.config)
    model.config.offline_lmrl = block | {"reward": {"bias": 0.0, **block.get("reward", {}), "head": head}}
    return model


def _stored_head(config: Any) -> str | None:
    """The head that the folder of this config has; None = none."""
    stored = settings(config).get("reward", {}).get("head")
    if stored is None and any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
        return "terminal"
    return stored
