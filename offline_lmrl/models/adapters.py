"""LoRA around a guided model: peft freezes the heads and the table of returns and saves neither, so this module does.

LoRA itself never lands on a head: the heads hold bare parameters, not the linear layers that adapters look for. The
head of a reward model is such a layer; there peft trains and saves it in full (`modules_to_save`).
"""

import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from offline_lmrl.data.errors import InputError, opening
from offline_lmrl.models.return_embedding import ReturnEmbedding
from offline_lmrl.models.return_heads import ReturnHeads
from offline_lmrl.models.value_heads import ValueHeads

PARTS = ("value_heads", "return_embedding", "return_heads")  # the submodules that a guided model adds
# Not config.json: in a folder that has one, transformers would look for the weights of a whole model.
SETTINGS_FILE = "offline_lmrl.json"


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


def read_settings(folder: str | Path) -> dict[str, Any]:
    """The block that `save_heads` wrote. Raises: InputError if it is not there."""
    path = Path(folder) / SETTINGS_FILE
    if not path.exists():
        raise InputError(f"model: {path}: not found, so this LoRA folder was not written by offline_lmrl")
    return json.loads(path.read_text())


def saved_settings(path_or_name: str | Path) -> dict[str, Any]:
    """Read the block of a folder or hub name, of a LoRA folder too, without its weights. Raises: InputError where
    there is no model."""
    if (Path(path_or_name) / "adapter_config.json").exists():
        return read_settings(path_or_name)
    with opening(path_or_name, "model"):
        return settings(AutoConfig.from_pretrained(path_or_name))


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
        part.load_state_dict(load_file(path))
