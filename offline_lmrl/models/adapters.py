"""LoRA around a guided model: peft freezes the heads and the table of returns and saves neither, so this module does.

LoRA itself never lands on a head: the heads hold bare parameters, not the linear layers that adapters look for. The
head of a reward model is such a layer; there peft trains and saves it in full (`modules_to_save`).
"""

import json
import os
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from offline_lmrl.data.demonstrations import PromptSpec
from offline_lmrl.data.episodes import StepRule
from offline_lmrl.data.errors import InputError, opening, reading, shown
from offline_lmrl.data.scale import RewardScale
from offline_lmrl.data.windows import WindowRule
from offline_lmrl.models.return_embedding import ReturnEmbedding
from offline_lmrl.models.return_heads import ReturnHeads
from offline_lmrl.models.value_heads import ValueHeads, ValueHeadsConfig

PARTS = ("value_heads", "return_embedding", "return_heads")  # the submodules that a guided model adds
# Not config.json: in a folder that has one, transformers would look for the weights of a whole model.
SETTINGS_FILE = "offline_lmrl.json"
_STORED = {
    "window": WindowRule,
    "prompt": PromptSpec,
    "step_rule": StepRule,
    "reward_scale": RewardScale,
    "value_heads": ValueHeadsConfig,
}


def require_peft() -> ModuleType:
    """The peft package, an extra. Raises: InputError that says what to install."""
    try:
        import peft
    except ImportError as error:
        raise InputError("lora: found no peft; install it with `pip install 'offline_lmrl[peft]'`") from error
    return peft


def settings(config: PreTrainedConfig) -> dict[str, Any]:
    """The `offline_lmrl` block of a config, {} where there is none."""
    return getattr(config, "offline_lmrl", None) or {}


def check_settings(name: str | Path, block: Any) -> None:
    """Raises: InputError where the block of a run holds what training does not write."""
    where = f"model: {name}: offline_lmrl"
    if not isinstance(block, dict):
        raise InputError(f"{where}: found {shown(block)}, expected an object")
    for key in ("returns", "return_heads", "reward", "sampling"):
        if not isinstance(block.get(key), dict | None):
            raise InputError(f"{where}.{key}: found {shown(block[key])}, expected an object")
    for key in ("tokenizer", "template"):
        if not isinstance(block.get(key, ""), str):
            raise InputError(f"{where}.{key}: found {shown(block[key])}, expected text")
    for key, stored in _STORED.items():
        known, given = {field.name: field.default for field in fields(stored)}, block.get(key)
        if given is None:
            continue
        if not isinstance(given, dict) or given.keys() - known.keys():
            raise InputError(f"{where}.{key}: found {shown(given)}, expected {', '.join(known)}")
        if key == "value_heads" and not {"kind", "heads"} <= given.keys():
            raise InputError(f"{where}.{key}: found {shown(given)}, expected kind and heads in it")
        for field, value in given.items():
            kind = (int, float) if type(known[field]) is float else type(known[field])
            fits = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
            if known[field] is not None and not fits:
                raise InputError(
                    f"{where}.{key}.{field}: found {shown(value)}, expected a value such as {known[field]!r}"
                )
        try:
            stored(**given)
        except InputError as error:
            raise InputError(f"{where}.{key}: {error}") from error


def read_settings(folder: str | Path) -> dict[str, Any]:
    """The block that `save_heads` wrote. Raises: InputError if it is not there, or not whole."""
    path = Path(folder) / SETTINGS_FILE
    if not path.exists():
        raise InputError(f"model: {path}: not found, so this LoRA folder was not written by offline_lmrl")
    with reading(path, "settings"):
        block = json.loads(path.read_text(encoding="utf-8"))
    check_settings(folder, block)
    return block


def saved_settings(path_or_name: str | Path) -> dict[str, Any]:
    """Read the block of a folder or hub name, of a LoRA folder too, without its weights. Raises: InputError where
    there is no model."""
    if (Path(path_or_name) / "adapter_config.json").exists():
        return read_settings(path_or_name)
    with opening(path_or_name, "model"):
        block = settings(AutoConfig.from_pretrained(path_or_name))
    check_settings(path_or_name, block)
    return block


def _parts(model: nn.Module) -> dict[str, nn.Module]:
    """The submodules of a guided model that peft knows nothing of, by name."""
    parts = {name: getattr(model, name) for name in PARTS if getattr(model, name, None) is not None}
    for name, part in parts.items():
        if not isinstance(part, ValueHeads | ReturnEmbedding | ReturnHeads):
            raise InputError(f"lora.modules_to_save: found {name}, which are always trained and saved; leave them out")
    return parts


def unfreeze_heads(model: nn.Module) -> None:
    """After `get_peft_model`: online heads and the table of returns train, targets do not."""
    parts = _parts(model)
    for part in parts.values():
        part.requires_grad_(True)
    if "value_heads" in parts:
        model.freeze_targets()


def save_heads(model: nn.Module, folder: str | Path) -> None:
    """Writes the heads and the table of returns, if there are any, and the config's `offline_lmrl` block beside the
    adapter files."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / ".writing"
    for name, part in _parts(model).items():
        save_file({key: tensor.contiguous() for key, tensor in part.state_dict().items()}, temporary)
        os.replace(temporary, folder / f"{name}.safetensors")
    temporary.write_text(json.dumps(settings(model.config), indent=2, sort_keys=True) + "\n")
    os.replace(temporary, folder / SETTINGS_FILE)


def load_heads(model: nn.Module, folder: str | Path) -> None:
    """Reads what `save_heads` wrote into the model's parts. Raises: InputError where a file is not there."""
    for name, part in _parts(model).items():
        path = Path(folder) / f"{name}.safetensors"
        if not path.exists():
            raise InputError(f"model: {path}: not found, but {SETTINGS_FILE} names {name.replace('_', ' ')}")
        with reading(path, "weights"):
            part.load_state_dict(load_file(path))
