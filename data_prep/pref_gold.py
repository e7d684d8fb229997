"""Generate comparisons of the toy pref_gold, in which simulated people label pairs of replies.

Each reply has a gold reward: the true reward, which is known but hidden from the learner (tasks/pref_gold.py).
"""

from dataclasses import dataclass

from data_prep.comparisons import open_buckets
from data_prep.source import VALIDATION_SHARE, Report, Source, check_share
from offline_lmrl.settings import setting
from offline_lmrl.tasks.pref_gold import PrefGold


@dataclass(frozen=True, kw_only=True)
class PrefGoldPairs(Source):
    """Draw labelled pairs and write train.jsonl, validation.jsonl and report.json."""

    pairs: int = setting(2000, "number of pairs")
    temperature: float = setting(
        0.5,
        "noise of the labels, above 0, in units of the gold reward (its standard deviation is 1). A label prefers the "
        "first reply with probability σ((its gold reward − that of the second reply) / temperature)",
    )
    flips: float = setting(0.1, "probability that a label is reversed, 0 to 1")
    tie: float = setting(
        0.1, "largest difference of the two gold rewards at which a pair is a tie, in units of the gold reward"
    )
    gold_seed: int = setting(0, "random seed from which the gold rewards of all replies are made")
    validation: float = setting(VALIDATION_SHARE, "share of the pairs that goes to validation")

    def check(self) -> None:
        """Check the settings."""
        check_share(self.validation)

    def make(self) -> Report:
        """Draw the pairs and write them."""
        noise = {"temperature": self.temperature, "flips": self.flips, "tie": self.tie}
        rows = {"all": PrefGold(self.gold_seed).comparisons(self.pairs, self.seed, **noise)}
        gold = {"the reply with more gold": lambda row, i: row.labels["options"][i]["gold"]}
        with open_buckets(self.output, list(rows), self.validation, self.seed) as buckets:
            return buckets.publish(rows, {"rows": self.pairs}, gold)
