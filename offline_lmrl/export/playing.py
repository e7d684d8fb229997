"""Play an export by the `generate` of transformers, as somebody without this project does."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.utils import logging

from offline_lmrl.decoding.config import DecodingConfig

AT_ONCE = 32  # prompts in one left-padded batch


class GeneratePlayer:
    """A `Player` (export/beside.py) that calls `model.generate` with the settings in generation_config.json.

    Args:
      model: the exported model, on its device, in eval mode.
      spell: function that returns a prompt of the run in the export's token ids.
      arguments: further arguments of `generate`.
    """

    def __init__(self, model: PreTrainedModel, spell: Callable[[Sequence[int]], list[int]], **arguments: Any):
        self.model, self.spell, self.arguments = model, spell, arguments

    @torch.inference_mode()
    def play(self, prompts: Sequence[Sequence[int]], decoding: DecodingConfig, seed: int) -> list[list[int]]:
        config, found = self.model.generation_config, []
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        arguments = self.arguments | {"max_new_tokens": decoding.max_new_tokens}
        arguments |= {"pad_token_id": ends[0] if config.pad_token_id is None else config.pad_token_id}
        if decoding.temperature == 0:
            arguments["do_sample"] = False
        with torch.random.fork_rng(), errors_only("transformers.generation.configuration_utils"):
            torch.manual_seed(seed)
            for start in range(0, len(prompts), AT_ONCE):
                rows = [torch.tensor(self.spell(prompt)) for prompt in prompts[start : start + AT_ONCE]]
                ids = pad_sequence(rows, batch_first=True, padding_side="left").to(self.model.device)
                mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
                read = {"input_ids": ids, "attention_mask": mask.to(ids.device)}
                new = self.model.generate(**read, **arguments)[:, ids.shape[1] :]
                found += [until_end(reply, ends) for reply in new.tolist()]
        return found


@contextmanager
def errors_only(name: str) -> Iterator[None]:
    """A context manager: silence a logger of transformers, which warns of sampling settings in greedy decoding."""
    logger = logging.get_logger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def until_end(reply: Sequence[int], ends: Sequence[int]) -> list[int]:
    """Return a reply up to the first token that ends it, which is kept; padding follows it."""
    stop = next((i + 1 for i, token in enumerate(reply) if token in ends), len(reply))
    return list(reply[:stop])
