"""Load models from disk, or make them from scratch.

A guided model is a causal LM with the parts of models/guided.py. A LoRA folder holds an adapter, the heads that were
trained with it, and the name of its base model (models/adapters.py).
"""

import os
import re
from collections.abc import Mapping
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL_LMS

from offline_lmrl.errors import InputError, reading_pretrained, shown
from offline_lmrl.models.adapters import PARTS, adapter_base, load_adapter, load_heads, saved_model, unfreeze_heads
from offline_lmrl.models.guided import add_parts, add_value_heads, as_guided, guided_class, remove_heads
from offline_lmrl.models.value_heads import ValueHeadsConfig
from offline_lmrl.settings import nearest

MOST_LAYERS = 10_000
EXPORTED = ("heads.safetensors", "custom_generate/generate.py")  # in a folder of export/transformers.py


def from_scratch(auto_class: type, spec: Mapping[str, Any], tokenizer, **extra: Any) -> PreTrainedModel:
    """Build a model with fresh fp32 weights from the user's config fields.

    Args:
      auto_class: the auto class of transformers that decides the head, such as AutoModelForCausalLM.
      spec: {"model_type": "gpt2", "n_layer": 2, ...}: a model type that transformers has as a causal LM, and fields of
        its config.
      tokenizer: gives the vocabulary size and the ids of pad, BOS and EOS, unless `spec` sets them.
      extra: further config fields, set by the caller and not by the user.
    Raises: InputError that names the wrong field.
    """
    fields = dict(spec)
    model_type = fields.pop("model_type", None)
    if not isinstance(model_type, str) or model_type not in CAUSAL_LMS:
        near = nearest(str(model_type), CAUSAL_LMS)
        raise InputError(
            f"model.scratch.model_type: found {shown(model_type)}, expected a causal LM of transformers{near}"
        )
    known = AutoConfig.for_model(model_type)
    for name in fields:
        if name.startswith("_") or not hasattr(known, name) or callable(getattr(known, name)):
            raise InputError(
                f"model.scratch.{shown(name)[1:-1]}: {model_type} has no such field{nearest(name, known.to_dict())}"
            )
    sizes = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    # The same function in one kernel, forward and backward, in place of eight.
    fused = {name: "gelu_pytorch_tanh" for name, value in known.to_dict().items() if value == "gelu_new"}
    try:
        config = AutoConfig.for_model(model_type, **fused | sizes | fields | extra)
        _require_memory(auto_class, config)
        return auto_class.from_config(config, dtype=torch.float32)
    except InputError:
        raise
    except Exception as error:  # the fields are the only input, so any error is about them
        if wrong := re.search(r"Field '(\w+)' expected (.+?), got", str(error)):
            found = shown((sizes | fields).get(wrong[1]))
            raise InputError(f"model.scratch.{wrong[1]}: found {found}, expected {wrong[2]}") from error
        message = str(error).strip() or type(error).__name__
        raise InputError(
            f"model.scratch: found fields from which transformers cannot make a {model_type} model "
            f"({message.splitlines()[0]}), expected other values"
        ) from error


def _require_memory(auto_class: type, config: PreTrainedConfig) -> None:
    """Check that the weights, in fp32, fit into this machine's RAM, before any are allocated.

    Raises: InputError if they do not, or if the model has more than MOST_LAYERS layers.
    """
    layers = getattr(config.get_text_config(), "num_hidden_layers", None) or 0
    if layers > MOST_LAYERS:
        raise InputError(f"model.scratch: found {layers} layers, expected at most {MOST_LAYERS}")
    with torch.device("meta"):
        model = auto_class.from_config(config, dtype=torch.float32)
    needed = sum(tensor.nbytes for tensor in chain(model.parameters(), model.buffers()))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise InputError(
            f"model.scratch: found a model of {needed / 1e9:.3g} GB, expected at most {memory / 1e9:.3g} GB, the "
            "memory of this machine"
        )


def build_model(spec: Mapping[str, Any], tokenizer) -> PreTrainedModel:
    """Build a guided model with fresh weights and no heads; arguments and errors are those of `from_scratch`."""
    return as_guided(from_scratch(AutoModelForCausalLM, spec, tokenizer))


def find_device(name: str | torch.device | None) -> torch.device:
    """Return the device of this name; None = the first GPU, or the CPU if there is none.

    Raises: InputError if torch has no such device.
    """
    try:
        return torch.empty(0, device=name or ("cuda" if torch.cuda.is_available() else "cpu")).device
    except (RuntimeError, AssertionError, ImportError) as error:
        first = str(error).partition("\n")[0]
        raise InputError(f"device: found {shown(name)} ({first}), expected a device of torch, such as cpu") from error


def load_model(
    path_or_name: str | Path,
    *,
    value_heads: ValueHeadsConfig | None = None,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a guided model from the folder or hub name of any causal LM, guided or not, or from a LoRA folder.

    For a LoRA folder, the result is a PeftModel around the guided model, to which it forwards attributes and methods;
    adapter, online heads and return embedding are trainable.

    Args:
      path_or_name: the folder or hub name.
      value_heads: the value heads to make, fresh, if there are none on disk; None = make none. Not used for a LoRA
        folder.
      dtype: dtype of the trunk; heads are always fp32.
      trust_remote_code: run code that comes with the model, as in transformers.
    Raises: InputError if there is no model, if it is a reward model or an export for transformers, if the config names
      heads whose weights are missing, or if the heads on disk differ from `value_heads` in kind, number or utterance
      heads.
    """
    name = str(path_or_name)
    config, metadata = saved_model(name, trust_remote_code)
    if "reward" in metadata:
        raise InputError(f"model: {name}: found a reward model, expected a causal LM")
    if all(Path(name, file).is_file() for file in EXPORTED):
        raise InputError(
            f"model: {name}: found an export for transformers, whose values only its own generate reads, expected the "
            "run that it was made from"
        )
    if config is None:
        base = load_model(adapter_base(name), dtype=dtype, trust_remote_code=trust_remote_code)
        return _with_adapter(name, metadata, base)
    with reading_pretrained(name, "model"):
        guided = guided_class(_causal_lm_class(config, trust_remote_code))
        model, info = guided.from_pretrained(name, config=config, dtype=dtype, output_loading_info=True)
    _require_token_ids(name, model)
    stored = metadata.get("value_heads")
    missing = [key for key in info["missing_keys"] if key.startswith(PARTS) and "target_q" not in key]
    if missing:
        part = missing[0].partition(".")[0].replace("_", " ")
        raise InputError(f"model: {name}: config.json names {part}, but {missing[0]} is not among the weights")
    if stored is None:
        return model if value_heads is None else add_value_heads(model, value_heads)
    if value_heads is not None:
        check_same_heads(name, asdict(value_heads), asdict(ValueHeadsConfig(**stored)))
    return model


def _require_token_ids(name: str, model: PreTrainedModel) -> None:
    """Check that the special tokens in config.json and generation_config.json are ids.

    Args:
      name: the model's name, for the error.
    Raises: InputError if they are not.
    """
    for source in (model.config, model.generation_config):
        for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
            found = source.to_dict().get(field)
            ids = found if isinstance(found, list) else [found]
            if not all(token is None or (isinstance(token, int) and not isinstance(token, bool)) for token in ids):
                raise InputError(
                    f"model: {name}: {field}: found {shown(found)}, expected the id of a token, a list of ids, or null"
                )


def _causal_lm_class(config: PreTrainedConfig, trust_remote_code: bool) -> type[PreTrainedModel]:
    """Return the class that AutoModelForCausalLM would choose, which may be remote code.

    The auto class does not know the config class of the text part of some multimodal models; for these, return the
    causal LM class that config.json names.
    """
    named = getattr(transformers, (config.architectures or [""])[0], None)
    if type(config) not in AutoModelForCausalLM._model_mapping and named and named.__name__.endswith("ForCausalLM"):
        return named
    with torch.device("meta"):
        return type(AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code))


def _with_adapter(folder: str, metadata: Mapping[str, Any], base: PreTrainedModel) -> nn.Module:
    """Return a base model with the heads and the adapter of a LoRA folder, all of them trainable."""
    remove_heads(base)  # those beside the adapter replace any heads of the base
    add_parts(base, metadata)
    model = load_adapter(base, folder, metadata)
    load_heads(model, folder)
    # peft has frozen all that it does not adapt, the heads too.
    unfreeze_heads(model)
    return model


def check_same_heads(name: str, asked: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    """Check that requested value heads have the form of the stored ones (kind, number, utterance heads).

    Args:
      name: the model's name, for the error.
      asked: the requested ValueHeadsConfig as a dict.
      stored: the ValueHeadsConfig of the heads that the model has, as a dict.
    Raises: InputError if they differ.
    """
    for field in ("kind", "heads", "utterance"):
        if asked[field] != stored[field]:
            raise InputError(
                f"value_heads.{field}: found {shown(asked[field])}, but {name} has heads with {stored[field]!r}; "
                "set the same value, or start from a model without value heads"
            )
