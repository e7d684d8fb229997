"""The renderer of a model: with the text that was derived for it, and every token that ends its replies."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import get_last_checkpoint

from offline_lmrl.data.errors import InputError, reading
from offline_lmrl.data.rendering import SCHEME, Renderer
from offline_lmrl.data.templates import TemplateText
from offline_lmrl.models.adapters import SETTINGS_FILE, settings


def reply_ends(model: nn.Module) -> tuple[int, ...]:
    """The ids that end a reply of the model, by its generation config."""
    generation = getattr(model, "generation_config", None)
    ends = getattr(generation, "eos_token_id", None)
    return tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,)


def rendering_block(renderer: Renderer) -> dict[str, Any]:
    """The entries of a model's `offline_lmrl` block from which `renderer_of` makes the same renderer again."""
    return {"template": renderer.template, "template_text": renderer.text.to_dict(), "tokenizer": renderer.fingerprint}


def renderer_of(tokenizer: PreTrainedTokenizerBase, model: nn.Module, where: str | Path) -> Renderer:
    """The renderer of a run, or of any model with its tokenizer.

    A run of another rendering scheme is rendered anew by its template, which is logged.

    Args:
      where: the run's name, for errors.
    Raises: InputError where the tokenizer is not the one that the model was trained with.
    """
    block = settings(model.config)
    expected, text = block.get("tokenizer"), None
    if scheme_of(block) == SCHEME:
        text = _stored_text(block, where)
    elif expected is not None:
        logging.getLogger(__name__).warning(
            f"{where}: trained under rendering scheme {scheme_of(block)}, now {SCHEME}: dialogues are rendered anew "
            "by its template, and may differ from what it was trained on"
        )
    with reading(where, "a template_text"):
        renderer = Renderer(tokenizer, block.get("template", "auto"), text, reply_ends(model))
    if text is not None and renderer.fingerprint != expected:
        raise InputError(
            f"{where}: tokenizer: found fingerprint {renderer.fingerprint}, expected {expected}: "
            "the model was trained with another tokenizer or chat template"
        )
    return renderer


def training_renderer(
    tokenizer: PreTrainedTokenizerBase, model: nn.Module, template: str, output_dir: str | Path
) -> Renderer:
    """The renderer of a training run: that of its last checkpoint, or of the run that it starts from, or a new one.

    A template may print the date, so what was derived once is kept.

    Raises: InputError where the checkpoint was rendered under another scheme.
    """
    start = settings(model.config)
    checkpoint = get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None
    if checkpoint is not None:
        start = _stored_block(Path(checkpoint)) or start
        if start.get("tokenizer") and scheme_of(start) != SCHEME:
            raise InputError(
                f"{checkpoint}: found a run in progress of rendering scheme {scheme_of(start)}, expected "
                f"{SCHEME}: its data would be rendered otherwise; take another output_dir"
            )
    text = None
    if scheme_of(start) == SCHEME and start.get("template") == template:
        text = _stored_text(start, output_dir)
    with reading(output_dir, "a template_text"):
        return Renderer(tokenizer, template, text, reply_ends(model))


def scheme_of(block: Mapping[str, Any]) -> int | None:
    """The rendering scheme of a run; None where the block names no tokenizer."""
    fingerprint = block.get("tokenizer")
    if not isinstance(fingerprint, str):
        return None
    scheme, dash, _ = fingerprint.partition("-")
    return int(scheme) if dash and scheme.isdecimal() and "template_text" in block else 1


def _stored_text(block: Mapping[str, Any], where: str | Path) -> TemplateText:
    with reading(where, "a template_text"):
        return TemplateText.from_dict(block["template_text"])


def _stored_block(folder: Path) -> dict[str, Any]:
    """The `offline_lmrl` block in a checkpoint, {} where it holds none."""
    for name, key in ((SETTINGS_FILE, None), ("config.json", "offline_lmrl")):
        try:
            found = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # whoever loads the checkpoint says what is wrong with it
        found = found.get(key) if key is not None and isinstance(found, dict) else found
        return found if isinstance(found, dict) else {}
    return {}
