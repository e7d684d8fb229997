"""LoRA around a guided model: peft freezes the heads and saves none of them, so this module does both.

LoRA itself never lands on a head: the heads hold bare parameters, not the linear layers that adapters look for.
"""

import os
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import nn

from offline_lmrl.data.errors import InputError
from offline_lmrl.models.value_heads import ValueHeads

HEADS_FILE = "value_heads.safetensors"


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
    """Writes value_heads.safetensors, if there are heads, and config.json beside the adapter files."""
    heads, folder = _heads(model), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / ".writing"
    if heads is not None:
        save_file({name: tensor.contiguous() for name, tensor in heads.state_dict().items()}, temporary)
        os.replace(temporary, folder / HEADS_FILE)
    model.config.to_json_file(temporary)
    os.replace(temporary, folder / "config.json")


def load_heads(model: nn.Module, folder: str | Path) -> None:
    """Reads value_heads.safetensors into the model's heads. Raises: InputError if it is not there."""
    heads, path = _heads(model), Path(folder) / HEADS_FILE
    if heads is None:
        return
    if not path.exists():
        raise InputError(f"model: {path}: not found, but config.json names value heads")
    heads.load_state_dict(load_file(path))
