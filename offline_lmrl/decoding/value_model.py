"""Q and V of every logged step, computed by a trained model with value heads, and logs relabelled with them.

A step is one token that the agent wrote (`ActionSteps` in tokens/batching.py). Its state is the text before the token.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch.nn.utils.rnn import pad_sequence

from offline_lmrl.decoding.policy import LanguagePolicy, load_value_model, require_no_few_shot
from offline_lmrl.errors import InputError, shown
from offline_lmrl.logs.io import read_trajectories
from offline_lmrl.logs.scale import RewardScale
from offline_lmrl.logs.trajectory import Trajectory
from offline_lmrl.models.adapters import run_metadata
from offline_lmrl.models.guided import return_tokens_of
from offline_lmrl.models.step_outputs import compute_step_outputs
from offline_lmrl.ops.returns import qdt_returns_to_go
from offline_lmrl.tokens.batching import WindowDataset, encode_trajectories
from offline_lmrl.tokens.conditioning import LABEL
from offline_lmrl.tokens.episodes import EpisodeEncoder, StepRule


def log_encoder(policy: LanguagePolicy) -> EpisodeEncoder:
    """Return an encoder that encodes logs as the policy's training did: with its windows, reward scale and discounts.

    Logs for a return-conditioned model are encoded without a requested return, as they were when the values were
    trained.
    """
    saved, return_tokens = run_metadata(policy.model.config), return_tokens_of(policy.model, policy.renderer)
    scale, rule = RewardScale(**saved.get("reward_scale", {})), StepRule(**saved.get("step_rule", {}))
    return EpisodeEncoder(policy.renderer, policy.window, rule, scale, return_tokens and return_tokens.nulls)


def relabel(
    trajectories: Sequence[Trajectory] | str | Path,
    value_model: LanguagePolicy | str | Path,
    label: Literal["max", "q"] = "max",
    discount_per_turn: float = 1.0,
) -> list[Trajectory]:
    """Set `labels["return_to_go"]` of trajectories from the Q or V of a value model.

    The label is a list with one number per agent turn, in reward units. `label` chooses how it is computed:
    "max": R_t = r_t + γ · max(R_{t+1}, V(s_{t+1})), backwards (`qdt_returns_to_go`). It combines good parts of
    different episodes (stitching), but a lucky outcome stays in the label.
    "q": Q(s_t, a_t), the minimum over target heads at the turn's last token. It averages luck out, but depends on Q
    being accurate.

    If a log is cut after a finished agent turn, there is no next state for that turn's reward; both labels are then V
    before the turn's last token. Q and V are discounted as in the value model's training.

    Args:
      trajectories: a list, or a path or hub name that `read_trajectories` takes.
      value_model: a run with value heads, loaded or as its folder or hub name. It should be trained with an expectile
        of at least .8, since a V that is too low gives labels that are too low.
      label: "max" or "q".
      discount_per_turn: γ of the returns, the same as of the model that is trained on them.
    Returns: copies of the trajectories with the label; all else is unchanged.
    Raises: InputError if the label is unknown, if the value model has no value heads or was trained with few-shot
      demonstrations, or if agent turns do not fit into its window.
    """
    if label not in ("max", "q"):
        raise InputError(f"label: found {shown(label)}, expected 'max' or 'q'")
    if isinstance(trajectories, str | Path):
        trajectories = read_trajectories(trajectories)
    policy = require_no_few_shot(
        value_model if isinstance(value_model, LanguagePolicy) else load_value_model(value_model)
    )
    encoder = log_encoder(policy)
    counts: Counter[str] = Counter()
    encoded = encode_trajectories(trajectories, encoder, counts)
    windows = WindowDataset(encoded, policy.renderer.close_id, next_rows=True, end_rows=False)
    values = compute_step_outputs(policy.model, windows, ("target_q", "v", "next_v"))
    last = windows.last_steps
    columns = windows.columns("has_target", "reward", "bootstrap")
    known, logged, bootstrap = (torch.from_numpy(values[last]) for values in columns.values())
    target_q, v, next_v = (torch.from_numpy(column[last]) for column in (values.target_q, values.v, values.next_v))
    # If a log is cut after a finished agent turn, V before its last token is used for the whole remaining return.
    reward = torch.where(known, logged, v)
    next_v = torch.where(known, next_v * bootstrap, 0.0)
    agent_turns = [sum(turn.is_trainable for turn in t.turns) for t in trajectories]
    if sum(agent_turns) != len(next_v):
        raise InputError(
            f"relabel: found {sum(agent_turns) - len(next_v)} agent turns that do not fit the value model's window of "
            f"{policy.window.max_length} tokens, expected none; leave out their trajectories"
        )
    if label == "q":
        rows = torch.where(known, target_q, v).split(agent_turns)
    else:
        padded = [
            pad_sequence(column.split(agent_turns), batch_first=True, padding_side="left")
            for column in (reward, next_v)
        ]
        labels = qdt_returns_to_go(*padded, discount_per_turn)
        rows = [row[len(row) - n :] for row, n in zip(labels, agent_turns, strict=True)]
    return [_labelled(t, row.tolist(), encoder.scale) for t, row in zip(trajectories, rows, strict=True)]


def _labelled(trajectory: Trajectory, scaled: Sequence[float], scale: RewardScale) -> Trajectory:
    returns, scored = [], 0
    agent = [turn for turn in trajectory.turns if turn.is_trainable]
    for turn, value in zip(agent, scaled, strict=True):
        returns.append(scale.invert_return(value, scored))
        scored += turn.reward is not None
    return replace(trajectory, labels={**trajectory.labels, LABEL: returns})
