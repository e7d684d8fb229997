"""Generate comparisons of the toy pref_gold, in which simulated people label pairs of replies.

Each reply has a gold reward: the true reward, which is known but hidden from the learner (tasks/pref_gold.py).
"""

from pathlib import Path
from typing import Any

from data_prep.comparisons import publish
from offline_lmrl.tasks.pref_gold import PrefGold


def prepare(
    output: str | Path,
    *,
    pairs: int = 2000,
    temperature: float = 0.5,
    flips: float = 0.1,
    tie: float = 0.1,
    gold_seed: int = 0,
    validation: float = 0.1,
    seed: int = 0,
) -> dict[str, Any]:
    """Draw labelled pairs and write train.jsonl, validation.jsonl and report.json.

    Args:
      output: folder to write to; created if needed.
      pairs: number of pairs.
      temperature: noise of the labels, above 0, in units of the gold reward (its standard deviation is 1). A label
        prefers the first reply with probability σ((its gold reward − that of the second reply) / temperature).
      flips: probability that a label is reversed, 0 to 1.
      tie: largest difference of the two gold rewards at which a pair is a tie, in units of the gold reward.
      gold_seed: random seed from which the gold rewards of all replies are made.
      validation: share of the pairs that goes to validation.
      seed: random seed of the pairs and of the split.
    Returns: the content of report.json: counts of rows, repairs and drops, and facts about the data.
    Raises: InputError for settings out of range or an output that cannot be written.
    """
    rows = PrefGold(gold_seed).comparisons(pairs, seed, temperature=temperature, flips=flips, tie=tie)
    return publish(
        {"all": rows},
        output,
        {"rows": pairs},
        validation,
        seed,
        features={"the reply with more gold": lambda row, i: row.labels["options"][i]["gold"]},
    )
