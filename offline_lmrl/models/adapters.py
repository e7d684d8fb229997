"""LoRA around a guided model: this module trains and saves the heads and the return embedding.

peft would freeze them and save none. It never adapts a head either, because heads hold bare parameters and not the
linear layers that adapters look for. The head of a reward model is such a layer; peft trains and saves it in full
(`modules_to_save`).

The module also reads and checks the run metadata: the settings that training stores with a model. They are the entry
`offline_lmrl` of config.json or, in a LoRA folder, the file offline_lmrl.json.
"""

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from offline_lmrl.errors import InputError, reading, reading_pretrained, shown
from offline_lmrl.logs.hub import ask_hub
from offline_lmrl.logs.scale import RewardScale
from offline_lmrl.models.return_embedding import ReturnEmbedding
from offline_lmrl.models.return_heads import ReturnHeads
from offline_lmrl.models.value_heads import ValueHeads, ValueHeadsConfig
from offline_lmrl.renamed import current
from offline_lmrl.settings import build
from offline_lmrl.tokens.episodes import StepRule
from offline_lmrl.tokens.few_shot import FewShotConfig
from offline_lmrl.tokens.windows import WindowRule

PARTS = ("value_heads", "return_embedding", "return_heads")  # the submodules that a guided model adds
# Not config.json: transformers looks for the weights of a whole model in a folder that has one.
METADATA_FILE = "offline_lmrl.json"
_STORED = {
    "window": WindowRule,
    "few_shot": FewShotConfig,
    "step_rule": StepRule,
    "reward_scale": RewardScale,
    "value_heads": ValueHeadsConfig,
}


def require_peft() -> ModuleType:
    """Return the peft package, an optional dependency. Raises: InputError that names the command to install it."""
    try:
        import peft
    except ImportError as error:
        raise InputError("lora: found no package peft; install it with `pip install 'offline_lmrl[peft]'`") from error
    return peft


@contextmanager
def without_false_alarms() -> Iterator[None]:
    """Context manager: hide two warnings while peft puts an adapter into a model; nothing is wrong in either case.

    peft itself causes both: it reads a property that transformers has renamed, and it sets `fan_in_fan_out` by the
    kind of each layer.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings(
            "ignore", "fan_in_fan_out is set to (True|False) but the target module is", UserWarning
        )
        yield


def most_positions(config: PreTrainedConfig) -> int | None:
    """Return the most tokens that a model with this config reads at once; None if the config names no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def part_of(model: nn.Module, name: str) -> nn.Module | None:
    """Return one of PARTS of a model, or of the model inside a PeftModel; None if it has no such part."""
    return getattr(model, name, None)


def without_adapter(model: nn.Module) -> PreTrainedModel:
    """Return the model itself, or the one inside a PeftModel."""
    return model if isinstance(model, PreTrainedModel) else model.get_base_model()


def run_metadata(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the run metadata in a model's config, with settings under their current names; {} if there is none."""
    return current(getattr(config, "offline_lmrl", None) or {})


def check_run_metadata(name: str | Path, block: Any) -> None:
    """Check that the run metadata of a model has the form that training writes.

    Args:
      name: the model's name, for the error.
      block: the run metadata as read from JSON.
    Raises: InputError if it has another form.
    """
    where = f"model: {name}: offline_lmrl"
    if not isinstance(block, dict):
        raise InputError(f"{where}: found {shown(block)}, expected an object")
    for key in ("returns", "return_heads", "reward", "decoding"):
        if not isinstance(block.get(key), dict | None):
            raise InputError(f"{where}.{key}: found {shown(block[key])}, expected an object")
    for key in ("tokenizer", "template"):
        if not isinstance(block.get(key, ""), str):
            raise InputError(f"{where}.{key}: found {shown(block[key])}, expected text")
    for key, stored in _STORED.items():
        given = block.get(key)
        if given is None:
            continue
        needed = ("kind", "heads") if key == "value_heads" else ()
        if not isinstance(given, dict) or set(needed) - given.keys():
            keys = f" with the keys {' and '.join(needed)}" if needed else ""
            raise InputError(f"{where}.{key}: found {shown(given)}, expected an object{keys}")
        try:
            made = asdict(build(stored, given))
        except InputError as error:
            raise InputError(f"{where}.{key}: {error}") from error
        for field, value in given.items():
            if made[field] != value:  # a number that was written as text
                raise InputError(f"{where}.{key}.{field}: found {shown(value)}, expected {made[field]!r}")


def read_run_metadata(folder: str | Path) -> dict[str, Any]:
    """Read the run metadata that `save_heads` wrote into a LoRA folder; {} for an adapter made by another library.

    Raises: InputError if they are damaged, or missing beside heads that they describe.
    """
    path = Path(folder) / METADATA_FILE
    if not path.exists():
        for heads in (path.with_name(f"{part}.safetensors") for part in PARTS):
            if heads.exists():
                raise InputError(f"model: {path}: not found, but it describes {heads.name}, which is in the folder")
        return {}
    with reading(path, "settings"):
        block = current(json.loads(path.read_text(encoding="utf-8")))
    check_run_metadata(folder, block)
    return block


class SavedModel(NamedTuple):
    """What is known of a model without its weights.

    config: its config; None for a LoRA folder.
    metadata: its run metadata, {} if there are none.
    """

    config: PreTrainedConfig | None
    metadata: dict[str, Any]


def saved_model(path_or_name: str | Path, trust_remote_code: bool = False) -> SavedModel:
    """Read what is known of a model without its weights, from a folder (LoRA or not) or hub name.

    Raises: InputError if there is no model, if the run metadata are damaged, or if a LoRA folder has none.
    """
    if os.path.isfile(os.path.join(path_or_name, "adapter_config.json")):
        return SavedModel(None, read_run_metadata(path_or_name))
    ask_hub(path_or_name, "model", "config.json")
    with reading_pretrained(path_or_name, "model"):
        config = AutoConfig.from_pretrained(path_or_name, trust_remote_code=trust_remote_code)
    check_run_metadata(path_or_name, run_metadata(config))
    return SavedModel(config, run_metadata(config))


def saved_run_metadata(path_or_name: str | Path) -> dict[str, Any]:
    """Read the run metadata of a model as `saved_model` does; {} if it has none."""
    return saved_model(path_or_name).metadata


def adapter_base(folder: str | Path) -> str:
    """Return the folder or hub name of the base model of a LoRA folder. Raises: InputError if it names none."""
    peft = require_peft()
    with reading_pretrained(folder, "model"):
        base = peft.PeftConfig.from_pretrained(folder).base_model_name_or_path
    if not base:
        raise InputError(f"model: {folder}/adapter_config.json names no base model, expected its folder or hub name")
    return base


def load_adapter(model: PreTrainedModel, folder: str | Path, metadata: Mapping[str, Any]) -> nn.Module:
    """Return a PeftModel with the adapter of a LoRA folder, which is trainable, around its base model.

    Args:
      model: the base model, which gets the run metadata.
      folder: the LoRA folder.
      metadata: its run metadata; {} for an adapter of another library, for which those of the base hold.
    Raises: InputError if the folder is damaged.
    """
    if metadata:
        model.config.offline_lmrl = metadata
    with reading_pretrained(folder, "model"), without_false_alarms():
        return require_peft().PeftModel.from_pretrained(model, folder, is_trainable=True)


def has_adapter(model: nn.Module) -> bool:
    """True if peft has put an adapter into the model."""
    return hasattr(model, "peft_config")


def heads_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the heads and the return embedding of a guided model, which peft does not handle, by name.

    Raises: InputError if peft wraps one of them, because `modules_to_save` names it.
    """
    parts = {name: part for name in PARTS if (part := part_of(model, name)) is not None}
    for name, part in parts.items():
        if not isinstance(part, ValueHeads | ReturnEmbedding | ReturnHeads):
            raise InputError(f"lora.modules_to_save: found {name}, which are always trained and saved; leave them out")
    return parts


def unfreeze_heads(model: nn.Module) -> None:
    """Make the return embedding and all heads except the target heads trainable; `get_peft_model` froze them."""
    parts = heads_of(model)
    for part in parts.values():
        part.requires_grad_(True)
    if "value_heads" in parts:
        model.freeze_targets()


def save_heads(model: nn.Module, folder: str | Path) -> None:
    """Write the heads and the return embedding, if any, and the run metadata into an adapter's folder.

    Each file is replaced as a whole, so that an interrupted call leaves no partial file under its name.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / ".writing"  # renamed when complete, so that no file is ever half written
    for name, part in heads_of(model).items():
        save_file({key: tensor.contiguous() for key, tensor in part.state_dict().items()}, temporary)
        os.replace(temporary, folder / f"{name}.safetensors")
    temporary.write_text(json.dumps(run_metadata(model.config), indent=2, sort_keys=True) + "\n")
    os.replace(temporary, folder / METADATA_FILE)


def load_heads(model: nn.Module, folder: str | Path) -> None:
    """Load the weights that `save_heads` wrote into the heads and the return embedding that the model has.

    Raises: InputError if a file is missing or damaged.
    """
    for name, part in heads_of(model).items():
        path = Path(folder) / f"{name}.safetensors"
        if not path.exists():
            raise InputError(f"model: {path}: not found, but {METADATA_FILE} lists {name.replace('_', ' ')}")
        with reading(path, "weights"):
            part.load_state_dict(load_file(path))
