"""Scorers of replies: reward models, their ensembles, rules, value heads, likelihood, functions, and combinations.

All implement `Scorer` (logs/protocols.py): `score(context, options)` returns one number per option, shape (K,), higher
is better. A context is the turns before a reply; each of its K options is a continuation of it, a list of turns.
Scorers that run a model also have `score_each(rows)`, for many pairs of context and options at once, and `fits`, which
is True if the options fit into the model's limit of tokens. `load_scorer` makes a scorer from a name or a mapping:

    runs/reward                                          a reward model
    package.module:function                              a function (context, option) -> number
    {kind: ensemble, scorers: [runs/a, runs/b], k: 1.0}  mean − k · standard deviation
    {kind: sparrow, preference: runs/reward, rules: [{kind: regex, pattern: "https?://"}]}

The token ids stored with a reply are ignored, since they may belong to another tokenizer: text is encoded anew.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from offline_lmrl.decoding.policy import LanguagePolicy, load_value_model, require_no_few_shot
from offline_lmrl.errors import InputError, shown
from offline_lmrl.logs.comparison import Comparison
from offline_lmrl.logs.preferences import Scored, origin_of, score_rows
from offline_lmrl.logs.protocols import Scorer, import_object, optional
from offline_lmrl.logs.scale import RewardScale
from offline_lmrl.logs.terminal import tracked
from offline_lmrl.logs.trajectory import Trajectory, Turn, as_context, finite
from offline_lmrl.logs.yaml_text import read_yaml, yaml_mapping
from offline_lmrl.models.adapters import most_positions, part_of, run_metadata
from offline_lmrl.models.guided import return_tokens_of
from offline_lmrl.models.loading import find_device
from offline_lmrl.models.renderers import renderer_of
from offline_lmrl.models.reward_model import load_reward_model, read_mask, reads_by_turn
from offline_lmrl.models.step_outputs import TOKEN_BUDGET, StepOutputs, compute_step_outputs
from offline_lmrl.ops.preferences import rule_adjusted_score
from offline_lmrl.settings import arguments, parameters_of
from offline_lmrl.tokens.batching import token_batches, token_rows
from offline_lmrl.tokens.comparison_batching import Row, encode_options, row_tensors
from offline_lmrl.tokens.rendering import Renderer
from offline_lmrl.tokens.tokenizers import load_tokenizer
from offline_lmrl.tokens.windows import WindowRule

TOO_LONG = "dropped: a reply longer than the scorer's window"


class ManyScorer:
    """The base class of scorers that score many options at once; a subclass defines `score_each`."""

    shift = 0.0  # the constant in every score that no turn of a reply earned
    score_each: Callable[[Sequence[Scored]], list[np.ndarray]]

    def score(self, context: Sequence[Turn], options: Sequence[Sequence[Turn]]) -> np.ndarray:
        return self.score_each([(context, options)])[0]


class RowScorer(ManyScorer):
    """The base class of scorers that run a model over rows of tokens; a subclass defines `score_rows`.

    The score of an option is the sum over its rows, plus `bias`. An option has one row, context + option; with
    `by_turn` it has one row per agent turn, each with the turns that the window rule shows before that turn. Turns of
    the context that do not fit into max_length are left out.

    Args:
      model: the model, which is put in eval mode.
      renderer: turns a dialogue into token ids.
      window: the limits on the turns and tokens of a row.
      by_turn: True: one row per agent turn; False: one row per option.

    Raises: InputError, when it scores, if an option does not fit into max_length.
    """

    bias = 0.0

    def __init__(self, model: PreTrainedModel, renderer: Renderer, window: WindowRule, by_turn: bool = False):
        self.model, self.renderer, self.window, self.by_turn = model.eval(), renderer, window, by_turn

    @torch.inference_mode()
    def score_each(self, rows: Sequence[Scored]) -> list[np.ndarray]:
        """Return, per pair of context and K options in `rows`, the scores (K,) of the options."""
        encoded = [self._encode(*row) for row in rows]
        # With `by_turn`, options that share a beginning (as in `relabel_trajectories`) share rows: run each only once.
        distinct = {_key(row): row for options in encoded for option in options for row in option}
        places, flat = {key: place for place, key in enumerate(distinct)}, list(distinct.values())
        index = [[places[_key(row)] for row in option] for options in encoded for option in options]
        found = self.score_rows(flat)
        scores = np.array([found[option].sum() + self.bias for option in index])
        return np.split(scores, np.cumsum([len(options) for options in encoded])[:-1])

    def fits(self, context: Sequence[Turn], options: Sequence[Sequence[Turn]]) -> bool:
        return self._rows(context, options) is not None

    def score_rows(self, rows: Sequence[Row]) -> np.ndarray:
        """Return one number per row of tokens, (R,)."""
        raise TypeError(f"{type(self).__name__}: found no method `score_rows`, expected the subclass to define it")

    def _rows(self, context: Sequence[Turn], options: Sequence[Sequence[Turn]]):
        bare = [
            [replace(turn, token_ids=None, behaviour_log_prob=None) for turn in part] for part in (context, *options)
        ]
        return encode_options(bare[0], bare[1:], self.renderer, self.window, Counter(), self.by_turn)

    def _encode(self, context: Sequence[Turn], options: Sequence[Sequence[Turn]]):
        rows = self._rows(context, options)
        if rows is None:
            raise InputError(f"max_length: found {self.window.max_length}, expected enough for each scored reply")
        return rows


def _key(row: Row) -> bytes:
    ids, kinds = row
    return np.array([ids, kinds], dtype=np.int32).tobytes()


def _batch(rows: Sequence[Row], device: torch.device) -> dict[str, Tensor]:
    lengths = np.array([len(ids) for ids, _ in rows])
    ids, kinds = (np.concatenate(values) for values in zip(*rows, strict=True))
    return {name: x.to(device) for name, x in row_tensors((ids, lengths), (kinds, lengths), 0).items()}


class RewardModel(RowScorer):
    """A scorer by a reward model: the model's score plus the bias stored with it.

    Args:
      model: a run of algorithm reward_model, or any ...ForSequenceClassification with one label.
      renderer: turns a dialogue into token ids.
      window: the limits on the turns and tokens that the model reads at once.
    """

    def __init__(self, model: PreTrainedModel, renderer: Renderer, window: WindowRule):
        head = run_metadata(model.config)["reward"]["head"]
        super().__init__(model, renderer, window, reads_by_turn(head, window))

    @property
    def bias(self) -> float:
        return run_metadata(self.model.config)["reward"]["bias"]

    @property
    def shift(self) -> float:
        """The constant in every score that no turn earned: the bias, or 0 for head terminal, whose score is no sum."""
        return 0.0 if run_metadata(self.model.config)["reward"]["head"] == "terminal" else self.bias

    @classmethod
    def load(cls, path: str | Path, *, device: str | None = None) -> "RewardModel":
        """Load a reward model from a folder or hub name.

        If no window is saved with the model, max_length is max_position_embeddings of its config, or 1024.

        Args:
          path: folder or hub name.
          device: where the model is put; None = the first GPU, else the CPU.
        Raises: InputError if there is no reward model, or if it was trained with another tokenizer.
        """
        device = find_device(device)
        model = load_reward_model(path).to(device)
        saved, renderer = run_metadata(model.config), renderer_of(load_tokenizer(path), model, path)
        window = saved.get("window", {"max_length": most_positions(model.config) or 1024})
        return cls(model, renderer, WindowRule(**window))

    def score_rows(self, rows):
        head, found = run_metadata(self.model.config)["reward"]["head"], np.zeros(len(rows))
        batches = token_batches(np.array([len(ids) for ids, _ in rows]), TOKEN_BUDGET)
        for index in tracked(batches, "scoring", len(batches)):
            batch = _batch([rows[i] for i in index], self.model.device)
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            found[index] = self.model(**inputs, read=read_mask(batch, head)).float().cpu().numpy()
        return found


class PolicyScorer(RowScorer):
    """The base class of scorers that run a causal LM.

    Args:
      policy: a run, loaded as a policy.
    Raises: InputError if the model is conditioned on returns, because a scorer has no return to condition on.
    """

    def __init__(self, policy: LanguagePolicy):
        super().__init__(policy.model, policy.renderer, policy.window)
        if return_tokens_of(policy.model, policy.renderer) is not None:
            raise InputError("scorer: found a model that is conditioned on returns, expected one that is not")

    def outputs(
        self, rows: Sequence[Row], want: Sequence[str], only_last: bool = False
    ) -> tuple[StepOutputs, np.ndarray]:
        """Return what the model computes at the N agent tokens of some rows, and the row of each token, (N,).

        Args:
          rows: rows of tokens.
          want: what to compute (`compute_step_outputs`).
          only_last: True: at the last agent token of each row only.
        """
        # A token's state is the column before it: the model's output there predicts the token.
        states = [np.flatnonzero(kinds)[-1 if only_last else 0 :] - 1 for _, kinds in rows]
        outputs = compute_step_outputs(self.model, token_rows([ids for ids, _ in rows], states), want)
        return outputs, np.repeat(np.arange(len(rows)), [len(places) for places in states])


class LikelihoodScorer(PolicyScorer):
    """A scorer by log π(option | context) in nats.

    Args:
      policy: a run, loaded as a policy.
      mean: True: the mean over the option's agent tokens; False: the sum.
    """

    def __init__(self, policy: LanguagePolicy, mean: bool = False):
        super().__init__(policy)
        self.mean = mean

    def score_rows(self, rows):
        outputs, row = self.outputs(rows, ["log_prob"])
        total = np.bincount(row, outputs.log_prob, len(rows))
        return total / np.bincount(row, minlength=len(rows)) if self.mean else total


class ValueHeadsScorer(PolicyScorer):
    """A scorer with the value heads of an ILQL run, in reward units.

    Args:
      policy: the run.
      of: "advantage": Σ over the option's agent tokens of min Q̄(s,a) − V(s), with the minimum over the target heads.
        "utterance": min Q̄ of the whole reply, from heads that only runs with utterance_weight > 0 have. Snell et al.
        2022 (ILQL) rerank by such heads.
    Raises: InputError if `of` is neither, or if the run lacks value heads, or those for whole replies.
    """

    def __init__(self, policy: LanguagePolicy, of: Literal["advantage", "utterance"] = "advantage"):
        super().__init__(policy)
        if of not in ("advantage", "utterance"):
            raise InputError(f"of: found {shown(of)}, expected advantage or utterance")
        self.of = of
        heads = part_of(policy.model, "value_heads")
        if heads is None:
            raise InputError("run: found a model without value heads, expected one that has them (an ILQL run)")
        if of == "utterance" and not heads.utterance:
            raise InputError("of: found utterance, but the run has no heads for whole replies (utterance_weight: 0)")
        self.unit = RewardScale(**run_metadata(policy.model.config).get("reward_scale", {})).scale

    def score_rows(self, rows):
        if self.of == "utterance":
            if not all(np.any(kinds) for _, kinds in rows):
                raise InputError("option: found no turn of the agent, expected one, whose Q is the score")
            return self.unit * self.outputs(rows, ["utterance_q"], only_last=True)[0].utterance_q
        outputs, row = self.outputs(rows, ["target_q", "v"])
        return self.unit * np.bincount(row, outputs.target_q - outputs.v, len(rows))


class FunctionScorer:
    """A scorer that calls a Python function, such as a toy's true reward or a rule.

    Args:
      function: maps (turns of the context, turns of an option) to a number.
      name: the function's name in error messages.
    Raises: InputError if `function` cannot be called; `score` raises it if the function fails or returns no finite
      number.
    """

    def __init__(self, function: Callable[[Sequence[Turn], Sequence[Turn]], float], name: str = "scorer"):
        if not callable(function):
            raise InputError(f"{name}: found {type(function).__name__}, expected a function of (context, option)")
        self.function, self.name = function, name

    def score(self, context: Sequence[Turn], options: Sequence[Sequence[Turn]]) -> np.ndarray:
        return np.array([self._number(context, option) for option in options])

    def _number(self, context: Sequence[Turn], option: Sequence[Turn]) -> float:
        try:
            found = self.function(context, option)
            found = found.item() if isinstance(found, np.generic | np.ndarray | Tensor) else found
        except Exception as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"{self.name}: raised {type(error).__name__}: {reason}, expected a number for (context, "
                f"option), here for {shown(option[-1].content)}"
            ) from error
        return float(found) if isinstance(found, bool) else finite(self.name, found)


def regex_rule(pattern: str, must: bool = False) -> FunctionScorer:
    """Return a scorer that gives 1 if an option keeps a rule and 0 if it breaks it.

    Args:
      pattern: a regular expression. The rule is that no agent turn of the option contains a match.
      must: True: the rule is that at least one agent turn contains a match.
    Raises: InputError if the pattern is not a regular expression.
    """
    try:
        found = re.compile(pattern).search
    except re.error as error:
        raise InputError(f"pattern: found {shown(pattern)} ({error}), expected a regular expression") from error
    return FunctionScorer(lambda context, option: must == any(found(t.content) for t in option if t.is_trainable))


class RuleScorer(ManyScorer):
    """A scorer that gives the probability that an option keeps a rule, by a reward model.

    The reward model gets the rule as a system turn before all other turns. Therefore one model serves every rule,
    including rules that it was not trained on (Glaese et al. 2022, Sparrow): it is trained on comparisons of a reply
    that keeps a rule with a reply that breaks it, each after the rule's text. Deviation: the probability is σ(score),
    so scores have to be above 0 for a kept rule and below 0 for a broken one (`normalise: centre`).

    Args:
      scorer: the reward model.
      text: the rule's text.
    """

    def __init__(self, scorer: Scorer, text: str):
        self.scorer, self.text = scorer, text

    def fits(self, context: Sequence[Turn], options: Sequence[Sequence[Turn]]) -> bool:
        return fits(self.scorer, (Turn("system", self.text), *context), options)

    def score_each(self, rows: Sequence[Scored]) -> list[np.ndarray]:
        rule = Turn("system", self.text)
        scores = score_rows([((rule, *context), options) for context, options in rows], self.scorer)
        return [np.exp(-np.logaddexp(0, -values)) for values in scores]


class Combined(ManyScorer):
    """A scorer that combines the scores of several scorers.

    Args:
      scorers: S scorers.
      how: maps the scores of K options, (S, K), to the combined scores (K,).
      shift: the constant in every combined score that no turn earned. If each turn is rewarded, `relabel_trajectories`
        gives every turn an equal part of it.
    """

    def __init__(self, scorers: Sequence[Scorer], how: Callable[[np.ndarray], np.ndarray], shift: float = 0.0):
        self.scorers, self.how, self.shift = scorers, how, shift

    def fits(self, context: Sequence[Turn], options: Sequence[Sequence[Turn]]) -> bool:
        return all(fits(one, context, options) for one in self.scorers)

    def score_each(self, rows: Sequence[Scored]) -> list[np.ndarray]:
        return [self.how(scores) for scores in self.members(rows)]

    def members(self, rows: Sequence[Scored]) -> list[np.ndarray]:
        """Return, per pair of context and K options in `rows`, the scores of every scorer, (S, K)."""
        return [np.stack(found) for found in zip(*(score_rows(rows, one) for one in self.scorers), strict=True)]


class Ensemble(Combined):
    """A scorer by mean − k · standard deviation over the scores of several scorers (Christiano et al. 2017).

    The scorers must have the same unit: normalise each of them (setting `normalise` of a reward model).

    Args:
      scorers: the members, at least 2.
      k: 0 = the mean. Above 0, options on which the members disagree, which offline data cannot settle, score lower.
    Raises: InputError if there are fewer than 2 scorers.
    """

    def __init__(self, scorers: Sequence[Scorer], k: float = 0.0):
        if len(scorers) < 2:
            raise InputError(f"scorers: found {len(scorers)}, expected at least 2 for an ensemble")
        shift = float(np.mean([optional(one, "shift") for one in scorers]))
        super().__init__(scorers, lambda scores: scores.mean(0) - k * scores.std(0), shift)


def weighted_sum(scorers: Sequence[Scorer], weights: Sequence[float] | None = None) -> Combined:
    """Return a scorer by the weighted sum Σ_i w_i · s_i of scores.

    Args:
      scorers: the scorers of s_i, at least 2.
      weights: w_i, one per scorer; None = all 1.
    Raises: InputError if there is not one weight per scorer, or fewer than 2 scorers.
    """
    weights = [1.0] * len(scorers) if weights is None else weights
    if len(weights) != len(scorers) or len(scorers) < 2:
        raise InputError(
            f"weights: found {len(weights)} for {len(scorers)} scorers, expected one per scorer and at least 2 scorers"
        )
    first, *rest = weights
    shift = sum(weight * optional(one, "shift") for weight, one in zip(weights, scorers, strict=True))
    return Combined(scorers, lambda scores: first * scores[0] + scores[1:].T @ np.array(rest), shift)


def veto(preference: Scorer, rules: Sequence[Scorer], floor: float, threshold: float = 0.5) -> Combined:
    """Return a scorer that gives the preference score if an option keeps every rule, else `floor`.

    Args:
      preference: scores replies.
      rules: give the probability that an option keeps a rule; at least one.
      floor: the score of an option that breaks a rule.
      threshold: a rule counts as kept if its probability is at least this.
    Raises: InputError if there are no rules.
    """
    _require_rules(rules)

    def how(scores: np.ndarray) -> np.ndarray:
        return np.where((scores[1:] >= threshold).all(0), scores[0], floor)

    return Combined([preference, *rules], how, optional(preference, "shift"))


def sparrow(preference: Scorer, rules: Sequence[Scorer], average: float = 0.0) -> Combined:
    """Return a scorer by σ(preference − average) times the geometric mean of the rules' probabilities.

    Glaese et al. 2022 (Sparrow); see `rule_adjusted_score` in ops/preferences.py.

    Args:
      preference: scores replies.
      rules: give the probability that an option keeps a rule; at least one.
      average: the mean preference score of replies; 0 for a centred reward model.
    Raises: InputError if there are no rules; when it scores, if the rules' scores are not probabilities.
    """
    _require_rules(rules)

    def how(scores: np.ndarray) -> np.ndarray:
        score, kept = scores[0], scores[1:].T
        if (kept < 0).any() or (kept > 1).any():
            raise InputError(f"rules: found scores from {kept.min():g} to {kept.max():g}, expected probabilities")
        return rule_adjusted_score(torch.from_numpy(score), average, torch.from_numpy(kept)).numpy()

    return Combined([preference, *rules], how)


def _require_rules(rules: Sequence[Scorer]) -> None:
    if not rules:
        raise InputError("rules: found none, expected at least one")


def _value_heads(run: str, of: str = "advantage", device: str | None = None) -> ValueHeadsScorer:
    return ValueHeadsScorer(require_no_few_shot(load_value_model(run, device=device)), of)


def _likelihood(run: str, mean: bool = False, device: str | None = None) -> LikelihoodScorer:
    return LikelihoodScorer(LanguagePolicy.load(run, device=device), mean)


def _reward_model(run: str, device: str | None = None) -> RewardModel:
    return RewardModel.load(run, device=device)


def _python(function: str) -> FunctionScorer:
    return FunctionScorer(import_object(function, "scorer.function"), function)


# kind -> a function or class that makes the scorer; each parameter takes values of its annotated type (settings.py)
KINDS: dict[str, Callable[..., Scorer]] = {
    "reward_model": _reward_model,
    "likelihood": _likelihood,
    "value_heads": _value_heads,
    "python": _python,
    "regex": regex_rule,
    "rule": RuleScorer,
    "ensemble": Ensemble,
    "sum": weighted_sum,
    "veto": veto,
    "sparrow": sparrow,
}


def load_scorer(spec: str | Path | Mapping[str, Any]) -> Scorer:
    """Make a scorer from its specification; the attribute `origin` of the scorer holds the specification.

    Args:
      spec: a mapping with `kind` (one of KINDS) and the parameters of that kind; such a mapping as YAML text or as the
        name of a YAML file; the folder or hub name of a reward model; or package.module:function.
    Raises: InputError that names the key with a wrong value.
    """
    origin = spec = _without_paths(spec)
    if isinstance(spec, str):
        if spec.startswith("{") or spec.endswith((".yaml", ".yml")):
            try:
                return load_scorer(_read_yaml(spec))
            except RecursionError as error:
                raise InputError(
                    f"scorer: {spec}: found a scorer that contains itself, expected one that does not"
                ) from error
        kind = "python" if re.fullmatch(r"[\w.]+:\w+", spec) else "reward_model"
        spec = {"kind": kind, "function" if kind == "python" else "run": spec}
    found = spec.get("kind") if isinstance(spec, Mapping) else spec
    if not isinstance(found, str) or found not in KINDS:
        raise InputError(f"scorer.kind: found {shown(found)}, expected one of {', '.join(KINDS)}")
    make, given = KINDS[found], {name: value for name, value in spec.items() if name != "kind"}
    made = make(**arguments(parameters_of(make), given, "scorer", {Scorer: load_scorer}))
    made.origin = origin
    return made


def _without_paths(spec: Any) -> Any:
    """Return the specification with every Path as text, so that labels can store it."""
    if isinstance(spec, Mapping):
        return {name: _without_paths(value) for name, value in spec.items()}
    if isinstance(spec, list | tuple):
        return [_without_paths(value) for value in spec]
    return str(spec) if isinstance(spec, Path) else spec


def _read_yaml(text: str) -> Mapping[str, Any]:
    """Return the mapping in YAML text, which starts with a brace, or in a YAML file of this name."""
    try:
        return yaml_mapping(text, shown(text), "a scorer") if text.startswith("{") else read_yaml(text, "a scorer")
    except InputError as error:
        raise InputError(f"scorer: {error}") from error


def fits(scorer: Scorer, context: Sequence[Turn], options: Sequence[Sequence[Turn]]) -> bool:
    """True if the options fit into the scorer's window, or if it has none."""
    return optional(scorer, "fits")(context, options)


def drop_too_long(comparisons: Sequence[Comparison], scorer: Scorer, counts: Counter[str]) -> list[Comparison]:
    """Return the comparisons whose replies all fit into the scorer's window.

    Args:
      comparisons: the comparisons to filter.
      scorer: the scorer.
      counts: the number of comparisons left out is added to its entry TOO_LONG.
    Raises: InputError if no comparison is left.
    """
    kept = [row for row in comparisons if fits(scorer, row.context, row.options)]
    counts[TOO_LONG] += len(comparisons) - len(kept)
    if not kept:
        raise InputError(f"comparisons: found none that fits into the scorer's window ({counts[TOO_LONG]} left out)")
    return kept


def relabel_comparisons(comparisons: Sequence[Comparison], scorer: Scorer) -> list[Comparison]:
    """Return the comparisons with the human judgements replaced by those of a scorer.

    The target (the probability of each option to be the best) becomes softmax(scores), as in the Bradley-Terry model,
    and the ranking is in the order of the scores. `labels["scores"]` holds the scores, `labels["scorer"]` the origin
    of the scorer (`origin_of`), and `labels["target"]` the old target.
    """
    rows = score_rows([(row.context, row.options) for row in comparisons], scorer)
    return [_relabelled(row, scores, origin_of(scorer)) for row, scores in zip(comparisons, rows, strict=True)]


def _relabelled(row: Comparison, scores: np.ndarray, origin: Any) -> Comparison:
    shares = np.exp(scores - scores.max())
    levels = sorted(set(scores.tolist()), reverse=True)
    ranking = tuple(tuple(np.flatnonzero(scores == level).tolist()) for level in levels)
    labels = {name: value for name, value in row.labels.items() if name != "strength"}
    labels |= {"scores": scores.tolist(), "scorer": origin, "target": list(row.target)}
    return replace(row, target=tuple((shares / shares.sum()).tolist()), ranking=ranking, labels=labels)


def relabel_trajectories(
    trajectories: Sequence[Trajectory],
    scorer: Scorer,
    reward_at: Literal["end", "turn"] = "end",
    counts: Counter[str] | None = None,
) -> list[Trajectory]:
    """Return the trajectories with their rewards replaced by scores.

    `labels["scorer"]` holds the origin of the scorer (`origin_of`), and `labels["rewards"]` the old rewards, one per
    agent turn.

    Args:
      trajectories: each with at least one agent turn.
      scorer: scores the turns from the first agent turn on as one option, after the turns before it.
      reward_at: "end": the last agent turn earns the score of the whole trajectory. "turn": each agent turn earns the
        score of the trajectory up to this turn, minus the score up to the previous agent turn. The sum is the same.
      counts: the number of trajectories that are left out, because a reply does not fit into the scorer's window, is
        added to its entry TOO_LONG; None = they are not counted.
    Raises: InputError for another reward_at, for a trajectory without agent turns, or if no trajectory is left.
    """
    if reward_at not in ("end", "turn"):
        raise InputError(f"reward_at: found {shown(reward_at)}, expected end or turn")
    counts = Counter() if counts is None else counts
    rows, kept, paid = [], [], []
    for trajectory in trajectories:
        agent = [i for i, turn in enumerate(trajectory.turns) if turn.is_trainable]
        if not agent:
            raise InputError("relabel: found a trajectory without an agent turn, expected at least one")
        turns, start = [replace(turn, reward=None) for turn in trajectory.turns], agent[0]
        # As options of one row, all beginnings are scored after the same context, even if the window drops part of it.
        stops = [*(i + 1 for i in agent[:-1] if reward_at == "turn"), len(turns)]
        row = (as_context(turns[:start]), [turns[start:stop] for stop in stops])
        if not fits(scorer, *row):
            counts[TOO_LONG] += 1
            continue
        rows.append(row)
        kept.append(trajectory)
        paid.append(agent if reward_at == "turn" else agent[-1:])
    if not kept:
        raise InputError(f"relabel: found no trajectory that fits into the scorer's window ({dict(counts)})")
    # Differences of scores add up to the score of the whole for every scorer, even one that is no sum over turns. The
    # shift of normalisation belongs to no turn. Divided equally, it changes each turn's reward little, and the sum
    # does not depend on the number of turns. (Added to the first turn alone, it would hide what that turn earns. Added
    # once per turn, as a reward model adds it to whatever it scores, a negative shift would reward short dialogues.)
    shift = optional(scorer, "shift")
    rewards = [(np.diff(scores, prepend=shift) + shift / len(scores)).tolist() for scores in score_rows(rows, scorer)]
    origin = origin_of(scorer)
    return [
        _rescored(row, dict(zip(places, values, strict=True)), origin)
        for row, places, values in zip(kept, paid, rewards, strict=True)
    ]


def _rescored(trajectory: Trajectory, rewards: Mapping[int, float], origin: Any) -> Trajectory:
    turns = tuple(replace(turn, reward=rewards.get(i)) for i, turn in enumerate(trajectory.turns))
    logged = [turn.reward for turn in trajectory.turns if turn.is_trainable]
    return replace(trajectory, turns=turns, labels={**trajectory.labels, "scorer": origin, "rewards": logged})


def most_disputed(comparisons: Sequence[Comparison], ensemble: Ensemble, n: int) -> list[Comparison]:
    """Return the n pairs of options on which the members of an ensemble disagree most, as comparisons, most first.

    Disagreement is the variance, over members, of the predicted preference σ(s_i − s_j). Each comparison gives at most
    one pair. Christiano et al. 2017 collect labels for such pairs. `labels["disagreement"]` of a pair is the standard
    deviation. Pairs of equal disagreement keep the order of the data.
    """
    found = []
    members = ensemble.members([(row.context, row.options) for row in comparisons])
    for row, scores in zip(comparisons, members, strict=True):  # scores (members, K)
        prob = np.exp(-np.logaddexp(0, scores[:, None, :] - scores[:, :, None]))  # [:, i, j]: σ(s_i − s_j)
        spread = np.triu(prob.std(0), 1)
        i, j = np.unravel_index(spread.argmax(), spread.shape)
        j = max(int(j), int(i) + 1)  # if all agree, argmax is the pair (0, 0)
        pair = row.select([int(i), j])
        found.append(replace(pair, labels={**pair.labels, "disagreement": float(spread.max())}))
    return sorted(found, key=lambda pair: -pair.labels["disagreement"])[:n]
