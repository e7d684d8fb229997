"""A policy and V of its states in one module, for training by playing (PPO).

A step is one token that the agent chose, and its state the position before it (tokens/batching.py).
"""

import contextlib

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from offline_lmrl.models.lm_head import packed_logits
from offline_lmrl.models.reward_model import Reward, head_of, score_bias
from offline_lmrl.models.step_outputs import split_rows
from offline_lmrl.models.value_heads import ScalarHead
from offline_lmrl.tokens.batching import TokenBatch


class ActorCritic(nn.Module):
    """Policy and V in one forward pass: one module to train, and to share between processes.

    Args:
      policy: a guided model without value heads, or a PeftModel around one.
      value_model: the model from whose hidden states V is computed, which is trained too: a guided model, or a reward
        model (`load_reward_model`) without an adapter; None = the policy. V starts at the reward model's score, else
        at 0.
      reward_scale: the number by which rewards are divided; V starts at the reward model's score / reward_scale.
    """

    def __init__(self, policy: nn.Module, value_model: PreTrainedModel | None, reward_scale: float = 1.0):
        super().__init__()
        self.policy = policy
        score = isinstance(value_model, Reward) and head_of(value_model)
        if score:
            self.value_trunk, width = value_model.base_model, score.in_features
        else:
            self.value_trunk = value_model and value_model.get_decoder()
            width = (value_model or policy).get_output_embeddings().weight.shape[1]
        self.value_head = ScalarHead(1, width, 0.0)
        self.value_head.reset()
        self.value_head.to(policy.device)
        if score:
            self.value_head.start_at(score.weight[0] / reward_scale, score_bias(value_model) / reward_scale)
        self.eval()  # permanently: with dropout, the policy would differ from the one that played

    def forward(self, batch: TokenBatch, *, next_v: bool = False, value_only: bool = False) -> dict[str, Tensor]:
        """Compute the policy's logits and V at the N steps of a batch.

        Args:
          batch: rows of tokens with packed steps; with `next_v`, it must contain the rows for next states.
          next_v: True: also compute V of the next states.
          value_only: True: gradients reach the value head only.
        Returns: "logits" (N, vocabulary size), "v" (N,), and with `next_v` "next_v" (N,).
        """
        steps, (own, extra) = batch["steps"], split_rows(batch)
        place, outputs = (steps["row"], steps["state"]), {}
        with torch.no_grad() if value_only else contextlib.nullcontext():
            outputs["logits"], hidden = packed_logits(self.policy, *place, **own)
            if self.value_trunk is not None:
                hidden = self.value_trunk(**own, use_cache=False)[0]
        outputs["v"] = self.value_head(hidden[place])[0]
        if next_v:
            if len(extra["input_ids"]):
                trunk = self.value_trunk or self.policy.get_decoder()
                hidden = torch.cat([hidden, trunk(**extra, use_cache=False)[0]])
            outputs["next_v"] = self.value_head(hidden[steps["next_row"], steps["next_state"]])[0]
        return outputs
