"""Export of a guided run for vLLM: a folder of the base architecture with value heads among its weights.

vLLM plays it by a plugin of this package (export/vllm_plugin.py), which has to be installed in vLLM's environment, and
an override of the architecture on its command line (`command_line`). Without either it refuses the folder, as it finds
weights that the base architecture has not, so that it never plays the base model by mistake.
"""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from offline_lmrl.decoding.config import DecodingConfig
from offline_lmrl.errors import InputError, listed
from offline_lmrl.export.vllm_guidance import ARCHITECTURES, PREFIX
from offline_lmrl.models.plain import merged

PLAYED = ("target_q.", "v.")  # of the value heads; the online Q heads and those of whole turns only train


def check_vllm(saved: Mapping[str, Any], decoding: DecodingConfig) -> None:
    """Check, from a run's settings only, that vLLM can play it.

    Args:
      saved: the run metadata.
      decoding: the decoding settings to reproduce.
    Raises: InputError that names the setting.
    """
    if decoding.beta == 0:
        raise InputError("beta: found 0, expected another number: vLLM plays a run without guidance as --to plain")
    if saved.get("value_heads") is None:
        raise InputError(f"beta: found {decoding.beta:g}, expected 0: this run has no value heads")
    if "returns" in saved:
        raise InputError("run: found a return-conditioned run, expected one without requested returns for --to vllm")


def write_vllm(model: PreTrainedModel, decoding: DecodingConfig, folder: Path) -> str:
    """Write the weights and the config of a guided model, or of a PeftModel around one, which is merged in place.

    Args:
      model: the run's model.
      decoding: the decoding settings to store.
      folder: where to write.
    Returns: the architecture under which the plugin plays the folder.
    Raises: InputError if the plugin does not know the model's architecture.
    """
    model = merged(model)
    if model.base_name not in ARCHITECTURES:
        raise InputError(f"run: found {model.base_name}, expected one of {listed(ARCHITECTURES)} for --to vllm")
    model.config.offline_lmrl |= {"decoding": decoding.to_dict()}
    played = tuple(f"value_heads.{part}" for part in PLAYED)
    weights = model.state_dict().items()
    kept = {name: value for name, value in weights if not name.startswith("value_heads.") or name.startswith(played)}
    model.save_pretrained(folder, state_dict=kept)
    return PREFIX + model.base_name


def command_line(folder: str | Path, architecture: str) -> str:
    """Return the command that serves a folder; `architecture` is what `write_vllm` returned."""
    overrides = shlex.quote(json.dumps({"architectures": [architecture]}))
    return (
        "VLLM_USE_V2_MODEL_RUNNER=0 python -m vllm.entrypoints.openai.api_server "
        f"--model {shlex.quote(str(folder))} --dtype float32 --hf-overrides {overrides}"
    )
