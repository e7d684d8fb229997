"""Reward models from comparisons or ratings (Christiano 2017, Ziegler 2019, Stiennon 2020, Ouyang 2022, and others).

A comparison is one context (the turns before a reply) with K options, the replies that were compared. The score s of
an option is the sum of the head's outputs over the tokens that the head scores (models/reward_model.py). Let t, the
target, be the probability that an option is the best of its comparison (one-hot, a tie, or soft), and p the
probability that option i of a pair (i, j) is the better one. ε is `error_rate` and m the margin. The loss of one
comparison is

    pairs          mean over its pairs of  −[p log P̃ + (1 − p) log(1 − P̃)],  P̃ = (1 − ε) σ(s_i − s_j − m) + ε/2
    best_of_k      −Σ_i t_i log softmax_i(s)
    plackett_luce  −log P(ranking)

(ops/preferences.py). With two options all three are Bradley–Terry. A scored trajectory is a rating of one reply; its
loss is

    regression     ½ (s − rating)², ratings with mean 0 and standard deviation 1

Batch sizes count comparisons, so all pairs of one prompt are one element. The loss of a batch is the mean over its
comparisons, each multiplied by its weight divided by the mean weight of the data.

Preferences leave the location of scores free. After training, the scores of `reference` replies are therefore shifted
and scaled to mean 0 and standard deviation 1 (`normalise: standard`; Ziegler et al. 2019 use samples of the reference
policy) or shifted to mean 0 (`centre`; Stiennon et al. 2020 use human summaries). Without `reference`, the options of
the training data are used. With `none`, a model trained on ratings scores in the ratings' unit.

An ensemble is several runs with different `seed` and `bootstrap`. Each run learns from groups (the comparisons of one
root prompt or conversation) drawn with replacement, and is evaluated on the groups that were not drawn, 1/e of all
(Christiano et al. 2017 draw single comparisons; but comparisons of one conversation are alike, so one would not be a
test of a model that was trained on another).
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from offline_lmrl.decoding.probe import check_scores
from offline_lmrl.errors import InputError, require, shown
from offline_lmrl.logs.comparison import Comparison
from offline_lmrl.logs.io import (
    data_hash,
    group_key,
    holds_comparisons,
    read_trajectories,
    store,
    store_comparisons,
)
from offline_lmrl.logs.preferences import binarised
from offline_lmrl.logs.terminal import tracked
from offline_lmrl.logs.trajectory import Trajectory
from offline_lmrl.models.renderers import rendering_block
from offline_lmrl.models.reward_model import (
    build_reward_model,
    load_reward_model,
    option_scores,
    reads_by_turn,
    rescale_head,
    with_head_beside,
)
from offline_lmrl.ops.preferences import (
    all_pairs_loss,
    best_of_k_loss,
    centring_bias,
    gain_and_bias,
    known_pairs,
    plackett_luce_loss,
    regression_loss,
)
from offline_lmrl.settings import setting
from offline_lmrl.tokens.comparison_batching import ComparisonDataset, encode_comparisons
from offline_lmrl.training.config import BaseConfig, check_range
from offline_lmrl.training.starting_model import check_model, check_template
from offline_lmrl.training.trainer import BaseTrainer

NORMALISED_ON = 1000  # largest number of comparisons on which scores are normalised

Rows = Sequence[Comparison] | Sequence[Trajectory]


@dataclass
class RewardModelConfig(BaseConfig):
    """The settings of a reward model; square brackets hold a paper's value."""

    head: Literal["terminal", "turn", "token"] = setting(
        "terminal",
        "Tokens of a reply that are scored: terminal (its last token), turn (the last token of each of its agent "
        "turns) or token (every agent token). The reply's score is the sum over these tokens.",
    )
    context: int | None = setting(
        None,
        "With head turn or token, score each agent turn on its own, after at most this many turns before it and the "
        "leading system turns, as a policy with the same `context` sees it. With 1 a turn is scored after the turn "
        "that it answers (Christiano et al. 2017). null = a reply is scored as a whole, and its turns share its "
        "history.",
    )
    loss: Literal["pairs", "best_of_k", "plackett_luce", "regression"] = setting(
        "pairs",
        "pairs, best_of_k or plackett_luce for comparisons, or regression for scored trajectories. plackett_luce "
        "needs a ranking in every comparison of more than two options.",
    )
    error_rate: float = setting(
        0.0,
        "ε of loss pairs, the share of labels assumed to be random, 0 to .999 [.1 in Christiano et al.; 0 elsewhere].",
    )
    margin: float = setting(
        0.0,
        "m of loss pairs, in score units per unit of `labels.strength` and of the difference of the targets; 0 = "
        "none.",
    )
    binarise: bool = setting(
        False,
        "Replace each pair by two comparisons of a reply marked good with the same reply marked bad, to pre-train on "
        "cheap preferences such as votes (Askell et al. 2021; `binarised`). A run on the preferences of interest then "
        "starts from this one.",
    )
    bootstrap: int | None = setting(
        None,
        "Seed of a sample of the data's groups, drawn with replacement, as many as there are. After training, "
        "metrics.jsonl and complete.json hold `oob_loss`, `oob_accuracy` and `oob_cross_entropy` (of the labels, in "
        "nats per comparison, without margin and weights) on the groups that were not drawn. null = train on all "
        "data.",
    )
    normalise: Literal["none", "centre", "standard"] = setting(
        "standard",
        "Change of the scores after training: none (as learnt; after loss regression in the ratings' unit), centre "
        "(to mean 0) or standard (to mean 0 and standard deviation 1). The shift is that of a whole reply; if "
        "`relabel` rewards each turn, each gets an equal part of it.",
    )
    reference: str | None = setting(
        None,
        "File, folder or hub name of trajectories, such as the output of `generate`, whose replies get the mean and "
        "standard deviation named in `normalise`. null = the training data.",
    )

    def __post_init__(self) -> None:
        require(
            self.context is None or self.head != "terminal",
            f"context: found {self.context} with head: terminal, which reads all turns of a reply at "
            "once, expected null, or head: turn or token",
        )
        check_range(self, error_rate=(0, 0.999), margin=(0, 1e6))
        for name, value in (("error_rate", self.error_rate), ("margin", self.margin)):
            require(
                self.loss == "pairs" or value == 0,
                f"{name}: found {value:g} with loss: {self.loss}, expected 0, as only loss: pairs uses it",
            )
        require(
            self.reference is None or self.normalise != "none",
            "reference: found a source with normalise: none, expected normalise: centre or standard",
        )
        require(
            self.loss != "regression" or not self.binarise,
            "binarise: found true with loss: regression, expected a loss for comparisons",
        )
        super().__post_init__()

    @property
    def named_data(self) -> dict[str, str]:
        return super().named_data | ({} if self.reference is None else {"reference": self.reference})

    @property
    def by_turn(self) -> bool:
        """True if each agent turn of a reply is a row of its own."""
        return reads_by_turn(self.head, self.window)

    def read_rows(self, source: str | Path, counts: Counter[str] | None = None, reward: str | None = None) -> Rows:
        if not holds_comparisons(source):
            return super().read_rows(source, counts, reward)
        require(
            reward is None,
            f"data.reward: found {shown(reward)} for the comparisons of {source}, expected none: "
            "a comparison has no score of its own",
        )
        return store_comparisons(source, counts=counts, processes=self.processes)

    def new_model(self, spec, tokenizer):
        return build_reward_model(spec, tokenizer, self.head)

    def open_model(self, path, trust_remote_code=False):
        return load_reward_model(path, self.head, trust_remote_code=trust_remote_code)


def pairs_loss(score: Tensor, batch: Mapping[str, Tensor], config: RewardModelConfig) -> Tensor:
    pairs = known_pairs(batch["target"], batch["rank"], batch["comparison"])
    margin = config.margin * batch["strength"][batch["comparison"]] * batch["target"] if config.margin > 0 else None
    return all_pairs_loss(score, pairs, margin, config.error_rate)


def cross_entropy(score: Tensor, batch: Mapping[str, Tensor], config: RewardModelConfig) -> Tensor:
    """Return −log P(target) of each of C comparisons, (C,) in nats, without margin.

    P is the preference model that `config.loss` names: Bradley–Terry over pairs, the best of K, or Plackett–Luce.

    Args:
      score: (M,), the scores of all options of the batch.
      batch: a `ComparisonBatch` (tokens/comparison_batching.py).
      config: the settings.
    """
    if config.loss == "pairs":
        pairs = known_pairs(batch["target"], batch["rank"], batch["comparison"])
        return all_pairs_loss(score, pairs, None, config.error_rate)
    return LOSSES[config.loss](score, batch, config)


# maps (score (M,) of options, batch, config) to the loss per comparison (C,)
LOSSES: dict[str, Callable[[Tensor, Mapping[str, Tensor], RewardModelConfig], Tensor]] = {
    "pairs": pairs_loss,
    "best_of_k": lambda score, batch, config: best_of_k_loss(score, batch["target"], batch["comparison"]),
    "plackett_luce": lambda score, batch, config: plackett_luce_loss(score, batch["rank"], batch["comparison"]),
    "regression": lambda score, batch, config: regression_loss(score, batch["target"]),
}


def accuracy(score: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Return 1 for each pair of options whose better option scores higher, ½ for equal scores, else 0: (P,).

    Pairs that are labelled as a tie, and comparisons of weight 0, are left out.

    Args:
      score: (M,), the scores of all options of the batch.
      batch: a `ComparisonBatch` (tokens/comparison_batching.py).
    """
    pairs = known_pairs(batch["target"], batch["rank"], batch["comparison"])
    counted = (pairs.prob != 0.5) & (batch["weight"] > 0)[pairs.comparison]
    lead = (score[pairs.first] - score[pairs.second]).sign() * (pairs.prob - 0.5).sign()
    return (0.5 + 0.5 * lead)[counted]


def bootstrap_sample(rows: Rows, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw as many groups (the rows of one root prompt or conversation) as there are, with replacement.

    Args:
      rows: the comparisons or trajectories.
      seed: seed of the draw.
    Returns: the indices of the rows in drawn groups, an index n times if its group was drawn n times; and the indices
      of all other rows.
    """
    groups: dict[str, int] = {}
    group = np.fromiter((groups.setdefault(group_key(row), len(groups)) for row in rows), np.int64, len(rows))
    times = np.bincount(np.random.default_rng(seed).integers(len(groups), size=len(groups)), minlength=len(groups))
    return np.repeat(np.arange(len(rows)), times[group]), np.flatnonzero(times[group] == 0)


class RewardModelTrainer(BaseTrainer):
    """The trainer that fits a reward model to comparisons or scored trajectories.

    After `model` it takes the arguments of `BaseTrainer`: settings, training data, held-out data, tokenizer, peft
    config.

    Args:
      model: a reward model; or the folder or hub name of a reward model or of a causal LM, whose trunk then gets a
        fresh head.
    """

    algorithm = "reward_model"
    next_commands = (
        "evaluate scorer {run} --data HELD_OUT.jsonl",
        "relabel DATA.jsonl --scorer {run} --output SCORED.jsonl",
        "plot {run}",
    )

    def prepare(self, model, train: Rows, held_out: Rows | None):
        args = self.args
        check_model(model, self.renderer, args.max_length)
        check_scores(model, self.renderer)
        if self.peft_config is not None:
            self.peft_config = with_head_beside(self.peft_config, model)
        model.config.get_text_config().pad_token_id = self._pad_id()
        encoded, self.left_out = self._encode_training(train)
        first = (row.turns if isinstance(row, Trajectory) else (*row.context, *row.options[0]) for row in train)
        check_template(self.renderer, first, self.counts)
        model.config.offline_lmrl = {
            "algorithm": self.algorithm,
            **rendering_block(self.renderer),
            "window": asdict(args.window),
            "reward": {"head": args.head, "bias": 0.0},
            "data": data_hash(train),
        }
        if held_out is not None:
            held_out = self._encode(held_out, Counter())
        if args.loss == "regression":
            encoded, held_out, self.left_out = self._standardised(encoded, held_out, self.left_out)
        self.reference = encoded
        if args.reference is not None:
            replies = read_trajectories(args.reference)
            self.reference = encode_comparisons(replies, self.renderer, args.window, Counter(), by_turn=args.by_turn)
        return model, encoded, held_out

    def _encode_training(self, rows: Rows) -> tuple[ComparisonDataset, ComparisonDataset | None]:
        """Return the data to train on, and those that `bootstrap` left out, if any of them can be encoded."""
        seed = self.args.bootstrap
        if seed is None:
            return self._encode(rows, self.counts), None
        drawn, left_out = (store(rows[i] for i in places) for places in bootstrap_sample(rows, seed))
        if not left_out:
            self.counts["comparisons, all drawn by bootstrap, so none is left to measure the run on"] = len(rows)
        encoded = self._encode(drawn, self.counts)
        try:
            return encoded, self._encode(left_out, Counter()) if left_out else None
        except InputError as error:  # for example, none of them fits max_length: training can go on without them
            self.counts[f"comparisons that bootstrap left out, useless to measure the run ({error})"] = len(left_out)
            return encoded, None

    def _pad_id(self) -> int:
        """Return an id for padding that closes no turn.

        Classifiers of transformers score the last token that is not padding, which must be the closing token.
        """
        tokenizer = self.renderer.tokenizer
        candidates = (tokenizer.pad_token_id, *tokenizer.all_special_ids, 0, 1)
        return next(token for token in candidates if token not in (None, self.renderer.close_id))

    def _encode(self, rows: Rows, counts: Counter[str]) -> ComparisonDataset:
        args = self.args
        scored = isinstance(rows[0], Trajectory)
        if scored != (args.loss == "regression"):
            kinds = ("comparisons", "scored trajectories")
            raise InputError(f"loss: found {args.loss} with {kinds[scored]}, expected {kinds[not scored]}")
        rows = store(binarised(rows)) if args.binarise else rows
        if args.loss == "plackett_luce":
            for number, row in enumerate(rows, 1):
                require(
                    row.ranking is not None or len(row.options) <= 2,
                    f"loss: found plackett_luce, but comparison {number} has {len(row.options)} "
                    "options without a ranking; expected rankings, or loss: best_of_k",
                )
        encoded = encode_comparisons(rows, self.renderer, args.window, counts, args.processes, args.by_turn)
        # The scale of weights does not change the loss.
        return replace(encoded, weight=encoded.weight / encoded.weight.mean())

    def _standardised(
        self, train: ComparisonDataset, *others: ComparisonDataset | None
    ) -> list[ComparisonDataset | None]:
        """Return data sets with ratings standardised by mean and standard deviation of the training ratings.

        `self.rating` stores both numbers.

        Args:
          train: the training data.
          others: further data sets; None stays None.
        Raises: InputError if the training ratings do not differ.
        """
        self.rating = mean, spread = float(train.target.mean()), float(train.target.std())
        require(spread > 0, f"loss: found regression on ratings that are all {mean:g}, expected several")
        return [data and replace(data, target=(data.target - mean) / spread) for data in (train, *others)]

    def outputs(self, model, batch):
        return {"score": option_scores(model, batch, self.args.head)}

    def losses(self, outputs, batch):
        score, counted = outputs["score"], batch["weight"] > 0
        loss = LOSSES[self.args.loss](score, batch, self.args) * batch["weight"]
        if self.args.loss == "regression":
            error = self.rating[1] * (score - batch["target"]).abs()
            return loss, {"error": error[counted]}
        logged = {"accuracy": accuracy(score, batch)}
        if not self.model.training:
            logged["cross_entropy"] = cross_entropy(score, batch, self.args)[counted]
        return loss, logged

    def train(self, *args, **kwargs):
        """Train as `BaseTrainer` does, evaluate on the groups that `bootstrap` left out, then normalise the scores.

        Checkpoints hold the weights before normalisation.
        """
        result = super().train(*args, **kwargs)
        if self.left_out is not None:
            found = self.evaluate(self.left_out, metric_key_prefix="oob")
            measured = ("oob_loss", "oob_accuracy", "oob_cross_entropy", "oob_error")
            self.outcome = {"oob_comparisons": len(self.left_out)} | {
                name: found[name] for name in measured if name in found
            }
        self.normalise()
        return result

    @torch.no_grad()
    def normalise(self) -> None:
        """Shift and scale the head, in place, as the setting `normalise` names it.

        Mean and standard deviation are those of the scores of the options in at most NORMALISED_ON reference rows. If
        `normalise` is "none", a model trained on ratings is scaled back to the unit of the ratings.

        Raises: InputError for "standard" if the scores do not differ, so that no gain gives them a spread.
        """
        model = self.accelerator.unwrap_model(self.model).eval()
        if self.args.normalise == "none":
            if self.args.loss == "regression":
                mean, spread = self.rating
                rescale_head(model, spread, mean)
            return
        order = np.random.default_rng(0).permutation(len(self.reference))[:NORMALISED_ON]
        scores = []
        starts = range(0, len(order), self.args.eval_batch_size)
        for start in tracked(starts, "normalising scores", len(starts)):
            batch = self._prepare_inputs(self.reference.batch(order[start : start + self.args.eval_batch_size]))
            scores.append(option_scores(model, batch, self.args.head))
        score = torch.cat(scores)
        if self.args.normalise == "centre":
            rescale_head(model, 1.0, centring_bias(score))
            return
        try:
            rescale_head(model, *gain_and_bias(score))
        except ValueError as error:
            raise InputError(f"normalise: {error}; take normalise: centre, or train longer") from error
