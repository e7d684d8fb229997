"""Hidden states of a trunk that is not trained, computed once and kept on disk, on which value heads are trained.

With a frozen trunk, π and the inputs of Q and V are the same in every epoch and for every setting of the heads. They
are computed in one pass over the data and written in bf16, 2·d bytes per place (a token at which some Q or V is read).
Files are named by the tokens, the places and the weights that they depend on, so another run on the same data reads
them again.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from offline_lmrl.decoding.prompts import evaluating
from offline_lmrl.errors import require
from offline_lmrl.logs.files import cache_folder
from offline_lmrl.logs.io import atomic_output
from offline_lmrl.logs.terminal import tracked
from offline_lmrl.models.lm_head import log_probs_at
from offline_lmrl.models.step_outputs import TOKEN_BUDGET, collect_outputs, split_rows
from offline_lmrl.tokens.batching import PackedDataset, TokenBatch, WindowDataset, places_of, token_batches

log = logging.getLogger(__name__)

LARGEST_SHARE = 0.5  # of the free disk space that hidden states may take
PLACES = ("", "next_", "end_")  # of a step: its state, its next state, and the end of its log
# The fields of a turn (`TrainedTurn` in tokens/episodes.py) on which these places and the actions depend.
TURN_PLACES = (
    "open_state", "actions", "in_row", "last_action", "end", "next_row_kind", "next_state", "end_row_kind", "end_state"
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class HiddenWindows(PackedDataset):
    """A data set of windows whose hidden states are known.

    Args:
      windows: the windows, with N steps.
      hidden: hidden states at P places, (P,d) bf16, mapped from disk.
      place: index of each step's places among them, (N,3), in the order of PLACES.
      log_prob: log π of each action, (N,), in nats.
    """

    windows: WindowDataset
    hidden: torch.Tensor
    place: np.ndarray
    log_prob: np.ndarray

    def __len__(self) -> int:
        return len(self.windows)

    items_in = staticmethod(WindowDataset.items_in)

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each window, (len(self),)."""
        return self.windows.lengths

    @property
    def tokens(self) -> int:
        """The number of tokens in an epoch, none of which is read again."""
        return self.windows.tokens

    def summary(self) -> dict[str, int]:
        return self.windows.summary() | {"places with hidden states": len(self.hidden)}

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        """Return the steps of the windows with these indices, and the hidden states at their places.

        Returns: "hidden" (1,U,d); "log_prob" (N,); "steps", in which every row is 0 and every state a column of
          `hidden`; "windows", which is None.
        """
        index = np.asarray(indices)
        chosen, _ = places_of(self.windows.step_offsets, index)
        used, column = np.unique(self.place[chosen], return_inverse=True)
        at = dict(zip(PLACES, torch.from_numpy(column.reshape(-1, len(PLACES))).unbind(-1), strict=True))
        steps = self.windows.step_columns(index)
        for name, state in at.items():
            steps |= {f"{name}row": torch.zeros_like(state), f"{name}state": state}
        return {
            "hidden": self.hidden[torch.from_numpy(used)].unsqueeze(0),
            "log_prob": torch.from_numpy(self.log_prob[chosen]),
            "steps": steps,
            "windows": None,
        }

    def surplus_batch(self) -> dict[str, Any]:
        """Return a batch without steps, for a rank that has no data left but must run a forward pass."""
        batch = self.batch([0])
        return batch | {
            "log_prob": batch["log_prob"][:0],
            "steps": {name: values[:0] for name, values in batch["steps"].items()},
        }


def hidden_windows(model: PreTrainedModel, windows: WindowDataset, folder: Path | None = None) -> HiddenWindows:
    """Return windows with their hidden states, read from disk if they were computed before.

    Args:
      model: the guided model, in whose own dtype and mode nothing changes.
      windows: the encoded data.
      folder: where the files are; None = hidden_states in the user's cache folder.
    Raises: InputError if the files would take more than LARGEST_SHARE of the free disk space.
    """
    folder = cache_folder("hidden_states") if folder is None else folder
    path = folder / _fingerprint(model, windows)
    if not (path / "shape.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        _check_space(folder, largest_size(windows, model))
        with atomic_output(path) as unfinished:
            _compute(model, windows, unfinished)
    shape = json.loads((path / "shape.json").read_text())
    numbers = np.memmap(path / "hidden.bf16", np.int16, "c", shape=(shape["places"], shape["width"]))
    return HiddenWindows(
        windows,
        torch.from_numpy(np.asarray(numbers)).view(torch.bfloat16),
        np.load(path / "place.npy", mmap_mode="r"),
        np.load(path / "log_prob.npy", mmap_mode="r"),
    )


def _fingerprint(model: PreTrainedModel, windows: WindowDataset) -> str:
    """Hash all that hidden states, places and log π depend on: weights, tokens and places."""
    digest = hashlib.sha256(
        repr((type(model).__name__, str(model.dtype), windows.next_rows, windows.end_rows)).encode()
    )
    for name, weight in model.state_dict().items():
        if not in_value_heads(name):
            digest.update(name.encode())
            digest.update(weight.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy())
    digest.update(repr(windows.encoded.step_rule.bootstrap_from_turn).encode())
    for name, (values, offsets) in windows.encoded.lists.items():
        digest.update(np.ascontiguousarray(offsets))
        for field in TURN_PLACES if name == "turns" else (...,):
            digest.update(np.ascontiguousarray(values[field]))
    return digest.hexdigest()[:32]


def largest_size(windows: WindowDataset, model: PreTrainedModel) -> int:
    """Return the most bytes that the hidden states of these windows take."""
    places = min(windows.tokens, len(PLACES) * windows.action_tokens)
    return places * _width(model) * torch.bfloat16.itemsize


def in_value_heads(name: str) -> bool:
    """True for the name of a parameter of the value heads, which are all that is trained on a frozen trunk."""
    return "value_heads." in name  # an adapter puts its own name before it


def freeze_trunk(model: nn.Module) -> None:
    """Freeze all parameters of a guided model, or of a PeftModel around one, but those of its value heads."""
    for name, parameter in model.named_parameters():
        if not in_value_heads(name):
            parameter.requires_grad_(False)


def _width(model: PreTrainedModel) -> int:
    return model.get_output_embeddings().weight.shape[1]


def _check_space(folder: Path, most: int) -> None:
    free = shutil.disk_usage(folder).free
    log.warning("%s: hidden states of at most %.3g GB are written, %.3g GB are free", folder, most / 1e9, free / 1e9)
    require(
        most <= LARGEST_SHARE * free,
        f"model.freeze: found hidden states of at most {most / 1e9:.3g} GB, expected at most {LARGEST_SHARE:.0%} of "
        f"the {free / 1e9:.3g} GB that are free in {folder}; set XDG_CACHE_HOME to a larger disk, or take fewer data",
    )


@torch.no_grad()
def _compute(model: PreTrainedModel, windows: WindowDataset, folder: Path) -> None:
    """Run the trunk once over the windows and write their hidden states to a folder."""
    folder.mkdir(exist_ok=True)
    batches, count = token_batches(windows.lengths, TOKEN_BUDGET), 0
    with open(folder / "hidden.bf16", "wb") as file, evaluating(model):

        def write(batch: TokenBatch) -> dict[str, torch.Tensor]:
            nonlocal count
            steps, (own, extra) = batch["steps"], split_rows(batch)
            actions = steps["row"], steps["state"], steps["action"]
            (log_prob,), hidden, _ = log_probs_at(model, [actions], True, **own)
            if len(extra["input_ids"]):
                hidden = torch.cat([hidden, model.hidden_states(**extra)])
            columns = [steps[f"{name}row"] * hidden.shape[1] + steps[f"{name}state"] for name in PLACES]
            used, place = torch.stack(columns, dim=-1).unique(return_inverse=True)
            rows = hidden.flatten(0, 1)[used].to(torch.bfloat16).cpu()
            file.write(rows.view(torch.int16).numpy().tobytes())
            count += len(rows)
            return {"log_prob": log_prob, "place": place + (count - len(rows))}

        shown = tracked(batches, "computing hidden states", len(batches))
        for name, values in collect_outputs(windows, write, model.device, shown).items():
            np.save(folder / f"{name}.npy", values)
    (folder / "shape.json").write_text(json.dumps({"places": count, "width": _width(model)}))
