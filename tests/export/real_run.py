"""A run of the real chat model whose values, and adapter, change its replies: made at once, without training."""

from pathlib import Path
from typing import Any

import pytest
import torch

from offline_lmrl.models.adapters import save_heads, unfreeze_heads
from offline_lmrl.models.loading import load_model
from offline_lmrl.models.value_heads import ValueHeadsConfig
from offline_lmrl.tokens.rendering import Renderer
from offline_lmrl.tokens.tokenizers import load_tokenizer
from tests.smollm2 import FOLDER

FORM = {"beta": 4.0, "q_reduce": "min", "support": 0.02}  # as ILQL saves it


def save_real_run(folder: Path, *, adapter: bool, **form: Any) -> None:
    """Write a run of the kind that configs/support/ilql.yaml trains: tied heads, drawn at random with seed 0.

    Args:
      folder: the folder to write.
      adapter: True: with a LoRA adapter, drawn at random too.
      form: DecodingConfig fields beside those of FORM.
    """
    torch.manual_seed(0)
    tokenizer, model = load_tokenizer(FOLDER), load_model(FOLDER, value_heads=ValueHeadsConfig("tied"))
    saved = {"algorithm": "ilql", "tokenizer": Renderer(tokenizer).fingerprint, "decoding": FORM | form}
    model.config.offline_lmrl |= saved
    if adapter:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.01)
    with torch.no_grad():
        model.value_heads.target_q.map.normal_(std=0.01)
    if adapter:
        unfreeze_heads(model)
    model.save_pretrained(folder)
    if adapter:
        save_heads(model, folder)
    tokenizer.save_pretrained(folder)
