"""The renderer of a model, with the template text stored for it and the tokens that end its replies.

A renderer converts dialogues to tokens with a tokenizer and a chat template; the scheme is the version of its rules
(tokens/rendering.py). Run metadata are the settings that training stores with a model (models/adapters.py).
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import get_last_checkpoint

from offline_lmrl.errors import InputError, reading
from offline_lmrl.models.adapters import METADATA_FILE, run_metadata
from offline_lmrl.tokens.rendering import SCHEME, Renderer
from offline_lmrl.tokens.templates import TemplateText


def reply_ends(model: nn.Module) -> tuple[int, ...]:
    """Return the ids that end a reply of the model, from its generation config."""
    generation = getattr(model, "generation_config", None)  # models that do not generate have none
    ends = generation and generation.eos_token_id
    return tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,)


def rendering_block(renderer: Renderer) -> dict[str, Any]:
    """Return the entries of the run metadata from which `renderer_of` rebuilds this renderer."""
    return {"template": renderer.template, "template_text": renderer.text.to_dict(), "tokenizer": renderer.fingerprint}


def renderer_of(tokenizer: PreTrainedTokenizerBase, model: nn.Module, where: str | Path) -> Renderer:
    """Return the renderer that a trained model needs; for a model without run metadata, make a new one.

    If the model was trained under another rendering scheme, make a new renderer from its template and log a warning.

    Args:
      tokenizer: the model's tokenizer.
      model: a guided model, or any other.
      where: the model's folder or hub name, for warnings and errors.
    Raises: InputError if the model was trained with another tokenizer or template.
    """
    block = run_metadata(model.config)
    expected, text = block.get("tokenizer"), None
    if scheme_of(block) == SCHEME:
        text = _stored_text(block, where)
    elif expected is not None:
        logging.getLogger(__name__).warning(
            f"{where}: trained under rendering scheme {scheme_of(block)}, now {SCHEME}: dialogues are rendered by its "
            "template under the new scheme, and their tokens may differ from those in training"
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
    """Return the renderer for training, with the template text that earlier training stored, if there is one.

    Some templates print today's date, so template text that is derived anew can differ from the stored one. The stored
    text of the last checkpoint in `output_dir` is used or, without a checkpoint, that of `model`. The text is derived
    anew if there is no stored one, or if `model` was trained under another scheme, or if the stored text was made with
    another setting `template`.

    Args:
      tokenizer: the model's tokenizer.
      model: the model that training starts from.
      template: form of the text: "auto" (by the chat template; plain if the tokenizer has none), "assembled" (the chat
        template's text around turns, so that later turns only append) or "plain" (one line per turn).
      output_dir: the folder of the training run.
    Raises: InputError if the last checkpoint in `output_dir` was made under another scheme.
    """
    start = run_metadata(model.config)
    checkpoint = get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None
    if checkpoint is not None:
        start = _stored_block(Path(checkpoint)) or start
        if start.get("tokenizer") and scheme_of(start) != SCHEME:
            raise InputError(
                f"{checkpoint}: found a run in progress under rendering scheme {scheme_of(start)}, expected "
                f"{SCHEME}: from here on, its data would be rendered differently; take another output_dir"
            )
    text = None
    if scheme_of(start) == SCHEME and start.get("template") == template:
        text = _stored_text(start, output_dir)
    with reading(output_dir, "a template_text"):
        return Renderer(tokenizer, template, text, reply_ends(model))


def scheme_of(block: Mapping[str, Any]) -> int | None:
    """Return the version of the rendering scheme under which a model was trained.

    Args:
      block: the model's run metadata.
    Returns: the version; None if the run metadata name no tokenizer.
    """
    fingerprint = block.get("tokenizer")
    if not isinstance(fingerprint, str):
        return None
    scheme, dash, _ = fingerprint.partition("-")
    return int(scheme) if dash and scheme.isdecimal() and "template_text" in block else 1


def _stored_text(block: Mapping[str, Any], where: str | Path) -> TemplateText:
    with reading(where, "a template_text"):
        return TemplateText.from_dict(block["template_text"])


def _stored_block(folder: Path) -> dict[str, Any]:
    """Read the run metadata of a checkpoint; {} if there are none."""
    for name, key in ((METADATA_FILE, None), ("config.json", "offline_lmrl")):
        try:
            found = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # the code that loads the checkpoint reports the fault
        found = found.get(key) if key is not None and isinstance(found, dict) else found
        return found if isinstance(found, dict) else {}
    return {}
