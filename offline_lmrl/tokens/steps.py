"""Expand trained turns to the steps of their tokens: rewards, discounts and next states, one number per step.

A step is one token that the agent chose, and its state is the position before it (tokens/batching.py). Encoded data
hold one record per trained turn (`TrainedTurn`); the columns of the steps follow from it and are made per batch.
"""

import numpy as np

from offline_lmrl.tokens.episodes import RowKind, StepRule, TurnEnd

TURN = np.dtype(
    [
        ("turn", "i4"),
        ("open_state", "i4"),
        ("actions", "i4"),
        ("in_row", "?"),
        ("last_action", "i4"),
        ("reward", "f8"),
        ("end", "i1"),
        ("next_row_kind", "i1"),
        ("next_state", "i4"),
        ("end_row_kind", "i1"),
        ("end_state", "i4"),
        ("return_after", "f8"),
        ("discount_after", "f8"),
    ]
)  # `TrainedTurn` in numpy
REPLY = np.dtype([("state", "i4"), ("tokens", "i4")])  # an entry of `Window.replies` in numpy


def expand(
    turns: np.ndarray, row_starts: np.ndarray, tokens: np.ndarray, apart: np.ndarray, rule: StepRule
) -> dict[str, np.ndarray]:
    """Return the columns of the N steps of some turns, in order.

    Args:
      turns: (M,) of TURN.
      row_starts: (M,) index in `tokens` of the first token of each turn's row.
      tokens: ids of the rows, concatenated.
      apart: the actions of the turns whose actions are not in their row, concatenated.
      rule: the rule for rewards, discounts and next states.
    Returns: name -> (N,): those of `ActionSteps` (tokens/batching.py) but for the rows, whose kinds (`RowKind`) are in
      `next_row_kind` and `end_row_kind`.
    """
    counts, ends = turns["actions"].astype(np.int64), turns["end"]
    starts = counts.cumsum() - counts
    of = np.repeat(np.arange(len(turns)), counts)  # the turn of each step
    place = np.arange(len(of)) - starts[of]  # the number of the action in its turn
    opening = turns["open_state"][of].astype(np.int64)

    action = tokens[np.minimum(row_starts[of] + opening + 1 + place, len(tokens) - 1)]
    last = (starts + counts - 1)[counts > 0]
    action[~turns["in_row"][of]] = apart
    action[last] = turns["last_action"][counts > 0]

    # The action that leads to the state after the turn is `reach` − 1; powers are those of Python's floats.
    finished, unfinished = ends == TurnEnd.FINISHED, ends == TurnEnd.UNFINISHED
    left = (counts - finished)[of] - place
    known = left > 0
    powers = np.array([rule.discount_per_token**k for k in range(int(counts.max(initial=0)) + 1)])
    reward = np.where(finished, 0.0, turns["reward"])[of]
    turn_discount = np.where(finished | unfinished, 1.0, rule.discount_per_turn)[of]
    paid, discount = powers[left - 1] * reward, powers[left] * turn_discount
    leaves = known & (rule.bootstrap_from_turn | (left == 1))
    return {
        "state": opening + place,
        "action": action,
        "reward": np.where(leaves, paid, 0.0).astype(np.float32),
        "discount": np.where(leaves, discount, rule.discount_per_token).astype(np.float32),
        "next_row_kind": np.where(leaves, turns["next_row_kind"][of], RowKind.OWN),
        "next_state": np.where(leaves, turns["next_state"][of], opening + place + 1),
        "bootstrap": np.where(leaves, (ends != TurnEnd.TERMINATED)[of], 1.0).astype(np.float32),
        "has_target": known,
        "closes_turn": ~unfinished[of] & (place == counts[of] - 1),
        "turn": turns["turn"][of],
        "open_state": opening,
        "return_to_go": np.where(known, paid + discount * turns["return_after"][of], 0.0).astype(np.float32),
        "end_row_kind": turns["end_row_kind"][of],
        "end_state": turns["end_state"][of],
        "end_discount": np.where(known, discount * turns["discount_after"][of], 0.0).astype(np.float32),
    }


def reply_states(replies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the state before each token of some replies of the environment, and the reply of each token.

    Args:
      replies: (M,) of REPLY.
    """
    counts = replies["tokens"].astype(np.int64)
    of = np.repeat(np.arange(len(replies)), counts)
    return replies["state"][of] + np.arange(len(of)) - (counts.cumsum() - counts)[of], of
