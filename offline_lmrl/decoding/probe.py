"""A check of a model on a few tokens before it is trained or played.

The model's output for a row must depend on that row alone: not on the other rows of the batch, on padding, or on
whether a cache is used. Some model families of transformers break this, and they do so without an error: the numbers
are wrong.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from offline_lmrl.decoding.cache import is_kept_per_token, new_cache
from offline_lmrl.decoding.prompts import CachedModel, evaluating
from offline_lmrl.errors import InputError
from offline_lmrl.models.adapters import without_adapter
from offline_lmrl.models.guided import Guided
from offline_lmrl.models.lm_head import packed_logits
from offline_lmrl.tokens.rendering import Renderer

TEXT = "Twelve sly wolves quickly jumped over my boxing dog, and ran."
LONG, SHORT = 11, 6  # tokens of the two rows; no family processes blocks of a size that divides both
# Nats, or shares of the spread of log-probabilities; in 180 families rounding is below 2e-5, faults are above 3e-3.
TOLERANCE = 1e-3


def check_plays(model: nn.Module, renderer: Renderer) -> None:
    """Check the model's log-probabilities in a left-padded batch, run piece by piece with a cache, as in the sampler.

    Args:
      model: a guided model (`guided_class`), or a PeftModel around one.
      renderer: encodes the check's text.
    Raises: InputError, with the name of the model's class, if the log-probabilities differ from those of each row run
      alone, or if the model fails.
    """
    if not _is_first():
        return
    rows = _rows(model, renderer)
    with probing(model), torch.inference_mode():
        alone = _alone(model, rows)
        cached_model, cache = CachedModel(model), new_cache(model, 0)
        ids, mask = _batch(rows, "left")
        position = (mask.cumsum(-1) - 1).clamp(min=0)
        several = is_kept_per_token(cache)  # other caches only ever get one token per call after the first
        cuts = (0, LONG - (3 if several else 2), LONG - 1, LONG)
        for start, stop in pairwise(cuts):
            part = slice(start, stop)
            logits = cached_model.forward(ids[:, part], mask[:, :stop], position[:, part], cache, frozenset()).logits
            expected = torch.stack([row[stop - LONG - 1] for row in alone])
            _check(model, logits.log_softmax(-1), expected, "in a batch with a cache")


def check_trains(model: nn.Module, renderer: Renderer) -> None:
    """Check the model's log-probabilities in a right-padded batch, as in training, and that train mode works too.

    Args:
      model: a guided model (`guided_class`), or a PeftModel around one.
      renderer: encodes the check's text.
    Raises: InputError, with the name of the model's class, if the log-probabilities differ from those of each row run
      alone, or if the model fails.
    """
    if not _is_first():
        return
    rows = _rows(model, renderer)
    ids, mask = _batch(rows, "right")
    row, state = mask.nonzero(as_tuple=True)
    with probing(model):
        with torch.inference_mode():
            expected = torch.cat(_alone(model, rows))
            logits, _ = packed_logits(model, row, state, input_ids=ids, attention_mask=mask)
            _check(model, logits.float().log_softmax(-1), expected, "in a batch")
    with probing(model), torch.random.fork_rng():
        model.train()
        packed_logits(model, row, state, input_ids=ids, attention_mask=mask)


def check_scores(model: PreTrainedModel, renderer: Renderer) -> None:
    """Check the scores of a reward model in a right-padded batch, as in training.

    Args:
      model: a reward model (`Reward` in models/reward_model.py).
      renderer: encodes the check's text.
    Raises: InputError, with the name of the model's class, if the scores differ from those of each row run alone, or
      if the model fails.
    """
    if not _is_first():
        return
    rows = _rows(model, renderer)
    ids, mask = _batch(rows, "right")
    with probing(model), torch.inference_mode():
        alone = [model(ids.unsqueeze(0), read=torch.ones_like(ids, dtype=torch.bool).unsqueeze(0)) for ids in rows]
        found = model(ids, attention_mask=mask, read=mask)
        _check(model, found.unsqueeze(-1), torch.cat(alone).unsqueeze(-1), "in a batch")


def _is_first() -> bool:
    """True in the first process of a machine; with sharding, the others get their weights only later."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _rows(model: nn.Module, renderer: Renderer) -> list[Tensor]:
    known = renderer.tokenizer.encode(TEXT, add_special_tokens=False)
    ids = torch.tensor(((known or [0]) * LONG)[:LONG], device=model.device)
    return [ids, ids[-SHORT:].flip(0)]


def _batch(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Pad two rows of token ids to LONG tokens on `side`, "left" or "right"; return ids and mask, (2, LONG) each.

    The padding is an ordinary token: the embedding of a pad token may be 0, and then a model that ignores the mask
    would go unnoticed.
    """
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
    padding = rows[0][0].item()
    return pad_sequence(rows, batch_first=True, padding_value=padding, padding_side=side), mask.bool()


def _alone(model: nn.Module, rows: list[Tensor]) -> list[Tensor]:
    """Return the log-probabilities (T, V) of each row, run alone and without a cache."""
    batches = [ids.unsqueeze(0) for ids in rows]
    return [
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0].float().log_softmax(-1)
        for ids in batches
    ]


def _check(model: nn.Module, found: Tensor, expected: Tensor, how: str) -> None:
    if found.shape == expected.shape:
        # Equal entries may both be −inf, whose difference is NaN.
        apart = torch.where(found == expected, 0.0, (found - expected).abs()).max().item()
        if apart <= TOLERANCE * max(1.0, expected[expected.isfinite()].std().item()):
            return
        raise InputError(
            f"model: found {_name(model)}, whose outputs {how} differ by up to {apart:.2g} from those of "
            "each row alone, expected a model whose output for a row depends on that row only"
        )
    raise InputError(
        f"model: found {_name(model)}, whose outputs {how} have shape {tuple(found.shape)}, expected "
        f"{tuple(expected.shape)}"
    )


def _name(model: nn.Module) -> str:
    inner = without_adapter(model)
    return inner.base_name if isinstance(inner, Guided) else type(inner).__name__


@contextmanager
def probing(model: nn.Module) -> Iterator[None]:
    """A context manager: put the model in eval mode, and turn any exception of its code into a one-line InputError."""
    try:
        with evaluating(model):
            yield
    except InputError:
        raise
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        raise InputError(
            f"model: found {_name(model)}, which fails on a test text ({type(error).__name__}: {first}), expected a "
            "model that can be trained and played here"
        ) from error
