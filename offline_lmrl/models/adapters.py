"""LoRA around a guided model: peft freezes the heads and saves none of them, so this module does both.

LoRA itself never lands on a head: the heads hold bare parameters, not the linear layers that adapters look for.
"""

import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedConfig

from offline_lmrl.data.errors import InputError
from offline_lmrl.models.value_heads import ValueHeads

HEADS_FILE = "value_heads.safetensors"
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


def _heads(model: nn.Module) -> ValueHeads | None:
    heads = model.value_heads
    if not isinstance(heads, ValueHeads | None):
        raise InputError("lora.modules_to_save: found value_heads, which are always trained and saved; leave them out")
    return heads


def unfreeze_heads(model: nn.Module) -> None:
    """After `get_peft_model`: online heads train, targets do not."""
    heads = _heads(model)
    if heads is not None:
        heads.requires_grad_(True)
        model.freeze_targets()


def save_heads(model: nn.Module, folder: str | Path) -> None:
    """Writes the heads, if there are any, and the config's `offline_lmrl` block beside the adapter files."""
    heads, folder = _heads(model), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / ".writing"
    if heads is not None:
        save_file({name: tensor.contiguous() for name, tensor in heads.state_dict().items()}, temporary)
        os.replace(temporary, folder / HEADS_FILE)
    temporary.write_text(json.dumps(settings(model.config), indent=2, sort_keys=True) + "\n")
    os.replace(temporary, folder / SETTINGS_FILE)


def load_heads(model: nn.Module, folder: str | Path) -> None:
    """Reads value_heads.safetensors into the model's heads. Raises: InputError if it is not there."""
    heads, path = _heads(model), Path(folder) / HEADS_FILE
    if heads is None:
        return
    if not path.exists():
        raise InputError(f"model: {path}: not found, but {SETTINGS_FILE} names value heads")
    heads.load_state_dict(load_file(path))
