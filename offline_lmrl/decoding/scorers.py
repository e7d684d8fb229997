"""What rates replies: reward models, their ensembles, rules, value heads, likelihood, functions, and combinations.

All implement `Scorer` (data/protocols.py): `score(context, options)` gives one number per option. Those that run a
model also have `score_each(rows)`, for many contexts at once. `load_scorer` makes one from a name or a small mapping:

    runs/reward                                          a reward model
    package.module:function                              a function (context, option) -> number
    {kind: ensemble, scorers: [runs/a, runs/b], k: 1.0}  mean − k · standard deviation
    {kind: sparrow, preference: runs/reward, rules: [{kind: regex, pattern: "https?://"}]}

Ids that a reply was sampled with are not trusted here, since they may be another tokenizer's: text is encoded anew.
"""

import inspect
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

from offline_lmrl.data.batching import pad
from offline_lmrl.data.comparison import Comparison
from offline_lmrl.data.comparison_batching import Row, encode_options
from offline_lmrl.data.errors import InputError
from offline_lmrl.data.preferences import Scored, origin_of, score_rows
from offline_lmrl.data.protocols import Scorer, imported
from offline_lmrl.data.rendering import Renderer
from offline_lmrl.data.scale import RewardScale
from offline_lmrl.data.tokenizers import load_tokenizer
from offline_lmrl.data.trajectory import Trajectory, Turn, as_context, finite, require_list, require_text, shown
from offline_lmrl.data.windows import WindowRule
from offline_lmrl.data.yaml_text import read_yaml, yaml_mapping
from offline_lmrl.decoding.policy import LanguagePolicy, load_critic, require_no_prompt
from offline_lmrl.models.adapters import settings
from offline_lmrl.models.guided import find_device, slots_of
from offline_lmrl.models.renderers import renderer_of
from offline_lmrl.models.reward_model import load_reward_model, read_mask, reads_by_turn
from offline_lmrl.ops.preferences import rule_adjusted_score

TOO_LONG = "dropped: a reply longer than the scorer's window"
MOST_TOKENS = 4096  # rows × longest row of one forward pass


class RowScorer:
    """Runs a model over rows of tokens; a subclass says what is read of a batch of them (`read`).

    An option's score is the sum over its rows, plus `bias`. Its row is context + option; with `by_turn` it has one for
    each agent turn, after what the window shows there. An option that the window cannot hold raises an InputError;
    turns of the context that it cannot hold are left out.
    """

    bias = 0.0

    def __init__(self, model: PreTrainedModel, renderer: Renderer, window: WindowRule, by_turn: bool = False):
        self.model, self.renderer, self.window, self.by_turn = model.eval(), renderer, window, by_turn

    def score(self, context: Sequence[Turn], options: Sequence[Sequence[Turn]]) -> np.ndarray:
        return self.score_each([(context, options)])[0]

    @torch.inference_mode()
    def score_each(self, rows: Sequence[Scored]) -> list[np.ndarray]:
        """Scores (K,) of each row's options."""
        encoded = [self._encode(*row) for row in rows]
        # Options that begin alike, as those of `relabel_trajectories`, share rows by turn: each is read once.
        distinct = {_key(row): row for options in encoded for option in options for row in option}
        places, flat = {key: place for place, key in enumerate(distinct)}, list(distinct.values())
        index = [[places[_key(row)] for row in option] for options in encoded for option in options]
        order = sorted(range(len(flat)), key=lambda i: -len(flat[i][0]))  # like lengths together: little padding
        found, start = np.zeros(len(flat)), 0
        while start < len(order):
            size = max(1, MOST_TOKENS // len(flat[order[start]][0]))
            chunk = order[start : start + size]
            found[chunk] = self.read(_batch([flat[i] for i in chunk], self.model.device)).float().cpu().numpy()
            start += size
        scores = np.array([found[option].sum() + self.bias for option in index])
        return np.split(scores, np.cumsum([len(options) for options in encoded])[:-1])

    def fits(self, context: Sequence[Turn], options: Sequence[Sequence[Turn]]) -> bool:
        return self._rows(context, options) is not None

    def read(self, batch: Mapping[str, Tensor]) -> Tensor:
        """One number per row, (B,), of a batch with the fields input_ids to last of `ComparisonBatch`."""
        raise TypeError(f"{type(self).__name__} does not say what it reads")

    def _rows(self, context: Sequence[Turn], options: Sequence[Sequence[Turn]]):
        bare = [
            [replace(turn, token_ids=None, behaviour_log_prob=None) for turn in part] for part in (context, *options)
        ]
        return encode_options(bare[0], bare[1:], self.renderer, self.window, Counter(), self.by_turn)

    def _encode(self, context: Sequence[Turn], options: Sequence[Sequence[Turn]]):
        rows = self._rows(context, options)
        if rows is None:
            raise InputError(f"max_length: found {self.window.max_length}, expected room for each scored reply")
        return rows


def _key(row: Row) -> bytes:
    ids, kinds = row
    return np.array([ids, kinds], dtype=np.int32).tobytes()


def _batch(rows: Sequence[Row], device: torch.device) -> dict[str, Tensor]:
    lengths = np.array([len(ids) for ids, _ in rows])
    ids, mask = pad([(np.concatenate([ids for ids, _ in rows]), lengths)], 0)
    kinds, _ = pad([(np.concatenate([kinds for _, kinds in rows]), lengths)], 0)
    batch = {
        "input_ids": ids,
        "attention_mask": mask,
        "action_mask": kinds > 0,
        "closing_mask": kinds > 1,
        "last": kinds.shape[1] - 1 - (kinds > 0)[:, ::-1].argmax(axis=1),
    }
    return {name: torch.from_numpy(values).to(device) for name, values in batch.items()}


class RewardModel(RowScorer):
    """A run of algorithm reward_model, or any ...ForSequenceClassification with one label: its score plus its bias."""

    def __init__(self, model: PreTrainedModel, renderer: Renderer, window: WindowRule):
        head = settings(model.config)["reward"]["head"]
        super().__init__(model, renderer, window, reads_by_turn(head, window))

    @property
    def bias(self) -> float:
        return settings(self.model.config)["reward"]["bias"]

    @property
    def shift(self) -> float:
        """What is added to every sum over turns; 0 of a terminal score, which is no such sum."""
        return 0.0 if settings(self.model.config)["reward"]["head"] == "terminal" else self.bias

    @classmethod
    def load(cls, path: str | Path, *, device: str | None = None) -> "RewardModel":
        """Raises: InputError where there is no reward model, or another tokenizer than it was trained with."""
        device = find_device(device)
        model = load_reward_model(path).to(device)
        saved, renderer = settings(model.config), renderer_of(load_tokenizer(path), model, path)
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1024
        return cls(model, renderer, WindowRule(**saved.get("window", {"max_length": positions})))

    def read(self, batch):
        head = settings(self.model.config)["reward"]["head"]
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        return self.model(**inputs, read=read_mask(batch, head))


class PolicyScorer(RowScorer):
    """A causal LM as a judge. Raises: InputError for one that is conditioned on returns, as it knows none here."""

    def __init__(self, policy: LanguagePolicy):
        super().__init__(policy.model, policy.renderer, policy.window)
        if slots_of(policy.model, policy.renderer) is not None:
            raise InputError("scorer: found a model that is conditioned on returns, expected one that is not")

    def _states(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Row, state and token (N,) of the options' agent tokens: the token stands behind its state."""
        row, place = batch["action_mask"].nonzero(as_tuple=True)
        return row, place - 1, batch["input_ids"][row, place]


class Likelihood(PolicyScorer):
    """log π(option | context), the sum over its agent tokens, or their mean where `mean` is set."""

    def __init__(self, policy: LanguagePolicy, mean: bool = False):
        super().__init__(policy)
        self.mean = mean

    def read(self, batch):
        row, state, token = self._states(batch)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits = self.model(**inputs, use_cache=False).logits[row, state].float()
        log_prob = logits.log_softmax(-1).gather(-1, token.unsqueeze(-1)).squeeze(-1)
        total = log_prob.new_zeros(len(batch["last"])).index_add(0, row, log_prob)
        return total / batch["action_mask"].sum(1) if self.mean else total


class ValueHeads(PolicyScorer):
    """Q heads of an ILQL run, in reward units: Σ over agent tokens of min Q̄(s,a) − V(s), or min Q̄ of the whole reply.

    of: advantage, or utterance for the heads that a run with utterance_weight > 0 has. Snell et al. 2022 (ILQL) rerank
      by these.
    """

    def __init__(self, policy: LanguagePolicy, of: Literal["advantage", "utterance"] = "advantage"):
        super().__init__(policy)
        if of not in ("advantage", "utterance"):
            raise InputError(f"of: found {shown(of)}, expected advantage or utterance")
        self.of, self.heads = of, policy.model.value_heads
        if of == "utterance" and not hasattr(self.heads, "utterance_q"):
            raise InputError("of: found utterance, but the run has no heads for whole replies (utterance_weight: 0)")
        self.unit = RewardScale(**settings(policy.model.config).get("reward_scale", {})).scale

    def read(self, batch):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        _, hidden = self.model.forward_with_hidden(**inputs, use_cache=False)
        if self.of == "utterance":
            closing = hidden[torch.arange(len(hidden), device=hidden.device), batch["last"]]
            return self.unit * self.heads.utterance_target_q(closing).amin(0)
        row, state, token = self._states(batch)
        states = hidden[row, state]
        q = self.model.q_values(states, token.unsqueeze(-1)).amin(0).squeeze(-1)
        advantage = q - self.model.v_values(states)
        return self.unit * advantage.new_zeros(len(hidden)).index_add(0, row, advantage)


class Function:
    """A function of (context turns, option turns) that gives a number: gold functions, rules in Python.

    name: what errors call it. Raises: InputError for what is no function; `score` does for what is no finite number.
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
            found = found.item() if hasattr(found, "item") else found  # of numpy or torch
        except Exception as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"{self.name}: raised {type(error).__name__}: {reason}, expected a number for (context, "
                f"option), here {shown(option[-1].content)}"
            ) from error
        return float(found) if isinstance(found, bool) else finite(self.name, found)


def regex_rule(pattern: str, must: bool = False) -> Function:
    """1 where the rule is kept, else 0: no agent turn of the option holds the pattern, or with `must` one does."""
    try:
        found = re.compile(pattern).search
    except re.error as error:
        raise InputError(f"pattern: found {shown(pattern)} ({error}), expected a regular expression") from error
    return Function(lambda context, option: must == any(found(t.content) for t in option if t.is_trainable))


class Rule:
    """Probability that a rule is kept, by a reward model that reads the rule as a system turn before all others.

    So one model serves every rule, also those that it was not trained on (Glaese et al. 2022, Sparrow): it learns from
    comparisons of a reply that keeps a rule with one that breaks it, each with the rule's text in front. Deviation:
    σ of the score, so 0 has to lie between kept and broken (`normalise: centre`).
    """

    def __init__(self, scorer: Scorer, text: str):
        self.scorer, self.text = scorer, text

    def score(self, context: Sequence[Turn], options: Sequence[Sequence[Turn]]) -> np.ndarray:
        return self.score_each([(context, options)])[0]

    def fits(self, context: Sequence[Turn], options: Sequence[Sequence[Turn]]) -> bool:
        return fits(self.scorer, (Turn("system", self.text), *context), options)

    def score_each(self, rows: Sequence[Scored]) -> list[np.ndarray]:
        rule = Turn("system", self.text)
        scores = score_rows([((rule, *context), options) for context, options in rows], self.scorer)
        return [np.exp(-np.logaddexp(0, -values)) for values in scores]


class Ensemble:
    """mean − k · standard deviation over scorers that are each normalised on their own (Christiano et al. 2017).

    k > 0 distrusts what they disagree on, which offline data cannot settle.
    """

    def __init__(self, scorers: Sequence[Scorer], k: float = 0.0):
        if len(scorers) < 2:
            raise InputError(f"scorers: found {len(scorers)}, expected at least 2 for an ensemble")
        self.scorers, self.k = scorers, k

    def score(self, context: Sequence[Turn], options: Sequence[Sequence[Turn]]) -> np.ndarray:
        return self.score_each([(context, options)])[0]

    def fits(self, context: Sequence[Turn], options: Sequence[Sequence[Turn]]) -> bool:
        return all(fits(one, context, options) for one in self.scorers)

    @property
    def shift(self) -> float:
        return float(np.mean([getattr(one, "shift", 0.0) for one in self.scorers]))

    def score_each(self, rows: Sequence[Scored]) -> list[np.ndarray]:
        return [member.mean(0) - self.k * member.std(0) for member in self.members(rows)]

    def members(self, rows: Sequence[Scored]) -> list[np.ndarray]:
        """Per row what each member says, (members, K)."""
        return [np.stack(found) for found in zip(*(score_rows(rows, one) for one in self.scorers), strict=True)]


class Combined:
    """A preference and what else counts, by `how`, a function of (preference (K,), others (K, R)) -> (K,).

    shift: what of it belongs to no turn of a reply (`relabel_trajectories`).
    """

    def __init__(
        self,
        preference: Scorer,
        others: Sequence[Scorer],
        how: Callable[[np.ndarray, np.ndarray], np.ndarray],
        shift: float = 0.0,
    ):
        self.preference, self.others, self.how, self.shift = preference, others, how, shift

    def score(self, context: Sequence[Turn], options: Sequence[Sequence[Turn]]) -> np.ndarray:
        return self.score_each([(context, options)])[0]

    def fits(self, context: Sequence[Turn], options: Sequence[Sequence[Turn]]) -> bool:
        return all(fits(one, context, options) for one in (self.preference, *self.others))

    def score_each(self, rows: Sequence[Scored]) -> list[np.ndarray]:
        others = zip(*(score_rows(rows, one) for one in self.others), strict=True)
        return [
            self.how(preference, np.stack(rest, axis=1))
            for preference, rest in zip(score_rows(rows, self.preference), others, strict=True)
        ]


def weighted_sum(scorers: Sequence[Scorer], weights: Sequence[float] | None = None) -> Combined:
    """Σ_i w_i · s_i; weights None = all 1."""
    weights = [1.0] * len(scorers) if weights is None else weights
    if len(weights) != len(scorers) or len(scorers) < 2:
        raise InputError(f"weights: found {len(weights)} for {len(scorers)} scorers, expected one for each of several")
    first, *rest = weights
    shift = sum(weight * getattr(one, "shift", 0.0) for weight, one in zip(weights, scorers, strict=True))
    return Combined(scorers[0], scorers[1:], lambda score, others: first * score + others @ np.array(rest), shift)


def veto(preference: Scorer, rules: Sequence[Scorer], floor: float, threshold: float = 0.5) -> Combined:
    """The preference where every rule is kept with at least this probability, else `floor`."""
    _require_rules(rules)
    shift = getattr(preference, "shift", 0.0)
    return Combined(preference, rules, lambda score, kept: np.where((kept >= threshold).all(1), score, floor), shift)


def sparrow(preference: Scorer, rules: Sequence[Scorer], average: float = 0.0) -> Combined:
    """Preference against the average times how surely all rules are kept (`rule_adjusted_score`; Glaese et al. 2022).

    average: the mean score of replies; 0 for a reward model that is centred.
    """
    _require_rules(rules)

    def how(score: np.ndarray, kept: np.ndarray) -> np.ndarray:
        if (kept < 0).any() or (kept > 1).any():
            raise InputError(f"rules: found scores from {kept.min():g} to {kept.max():g}, expected probabilities")
        return rule_adjusted_score(torch.from_numpy(score), average, torch.from_numpy(kept)).numpy()

    return Combined(preference, rules, how)


def _require_rules(rules: Sequence[Scorer]) -> None:
    if not rules:
        raise InputError("rules: found none, expected at least one")


def _value_heads(run: str, of: str = "advantage", device: str | None = None) -> ValueHeads:
    return ValueHeads(require_no_prompt(load_critic(run, device=device)), of)


# kind -> what makes it; `_setting` says of what type a parameter is by its name
KINDS: dict[str, Callable[..., Scorer]] = {
    "reward_model": lambda run, device=None: RewardModel.load(run, device=device),
    "likelihood": lambda run, mean=False, device=None: Likelihood(LanguagePolicy.load(run, device=device), mean),
    "value_heads": _value_heads,
    "python": lambda function: Function(imported(function, "scorer.function"), function),
    "regex": regex_rule,
    "rule": Rule,
    "ensemble": Ensemble,
    "sum": weighted_sum,
    "veto": veto,
    "sparrow": sparrow,
}


def load_scorer(spec: str | Path | Mapping[str, Any]) -> Scorer:
    """A scorer from a mapping with `kind` and what that kind takes, such a mapping as YAML text or file, the folder or
    hub name of a reward model, or package.module:function. Its `origin` is that mapping or name.

    Raises: InputError that names the key.
    """
    origin = spec = _without_paths(spec)
    if isinstance(spec, str):
        if spec.startswith("{") or spec.endswith((".yaml", ".yml")):
            try:
                return load_scorer(_read_yaml(spec))
            except RecursionError as error:
                raise InputError(f"scorer: {spec}: found a scorer in itself, expected one that ends") from error
        kind = "python" if re.fullmatch(r"[\w.]+:\w+", spec) else "reward_model"
        spec = {"kind": kind, "function" if kind == "python" else "run": spec}
    found = spec.get("kind") if isinstance(spec, Mapping) else spec
    if not isinstance(found, str) or found not in KINDS:
        raise InputError(f"scorer.kind: found {shown(found)}, expected one of {', '.join(KINDS)}")
    given = {name: value for name, value in spec.items() if name != "kind"}
    parameters = inspect.signature(KINDS[spec["kind"]]).parameters
    for name in given:
        if name not in parameters:
            raise InputError(f"scorer: {spec['kind']} has no setting {shown(name)}, expected {', '.join(parameters)}")
    for name, parameter in parameters.items():
        if name not in given and parameter.default is parameter.empty:
            raise InputError(f"scorer.{name}: missing, {spec['kind']} needs it")
    made = KINDS[spec["kind"]](**{name: _setting(name, value, parameters[name]) for name, value in given.items()})
    made.origin = origin
    return made


def _without_paths(spec: Any) -> Any:
    """The same with text for paths, as labels keep it."""
    if isinstance(spec, Mapping):
        return {name: _without_paths(value) for name, value in spec.items()}
    if isinstance(spec, list | tuple):
        return [_without_paths(value) for value in spec]
    return str(spec) if isinstance(spec, Path) else spec


def _setting(name: str, value: Any, parameter: inspect.Parameter) -> Any:
    """What a kind takes for a value of the specification; one name means the same to all kinds."""
    where = f"scorer.{name}"
    if value is None and parameter.default is None:
        return None
    if name in ("preference", "scorer"):
        return load_scorer(value)
    if name in ("scorers", "rules"):
        return [load_scorer(one) for one in require_list(where, value)]
    if name == "weights":
        return [finite(where, one) for one in require_list(where, value)]
    if name in ("k", "average", "floor", "threshold"):
        return finite(where, value)
    if name in ("mean", "must"):
        if not isinstance(value, bool):
            raise InputError(f"{where}: found {shown(value)}, expected true or false")
        return value
    require_text(where, value)
    return value


def _read_yaml(text: str) -> Mapping[str, Any]:
    """The mapping in a YAML file, or in YAML that starts with a brace."""
    try:
        return yaml_mapping(text, shown(text), "a scorer") if text.startswith("{") else read_yaml(text, "a scorer")
    except InputError as error:
        raise InputError(f"scorer: {error}") from error


def fits(scorer: Scorer, context: Sequence[Turn], options: Sequence[Sequence[Turn]]) -> bool:
    """Whether these options are not too long for the scorer; one without a window takes all."""
    own = getattr(scorer, "fits", None)
    return own is None or own(context, options)


def fitting(comparisons: Sequence[Comparison], scorer: Scorer, counts: Counter[str]) -> list[Comparison]:
    """The comparisons that the scorer can read whole; `counts` gets the others. Raises: InputError if none is left."""
    kept = [row for row in comparisons if fits(scorer, row.context, row.options)]
    counts[TOO_LONG] += len(comparisons) - len(kept)
    if not kept:
        raise InputError(f"comparisons: found only replies longer than the scorer's window ({counts[TOO_LONG]})")
    return kept


def relabel_comparisons(comparisons: Sequence[Comparison], scorer: Scorer) -> list[Comparison]:
    """The comparisons with what the scorer says instead of what people said: target softmax(scores), as Bradley and
    Terry have it, and the ranking by score. `labels["scores"]` keeps the scores, `labels["scorer"]` their `origin_of`,
    `labels["target"]` the old target."""
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
    place: Literal["terminal", "turn"] = "terminal",
    counts: Counter[str] | None = None,
) -> list[Trajectory]:
    """The trajectories with scores as rewards; `labels["scorer"]` keeps whose (`origin_of`), `labels["rewards"]` what
    was logged, per agent turn.

    place: terminal: all that follows the first prompt is scored at once, and the last agent turn earns it; turn: each
      agent turn earns what it adds to the score of what ends with the agent turn before it. Both have the same sum.
    counts: gets the trajectories that are left out as a reply is longer than the scorer's window.
    """
    if place not in ("terminal", "turn"):
        raise InputError(f"place: found {shown(place)}, expected terminal or turn")
    counts = Counter() if counts is None else counts
    rows, kept, paid = [], [], []
    for trajectory in trajectories:
        agent = [i for i, turn in enumerate(trajectory.turns) if turn.is_trainable]
        if not agent:
            raise InputError("relabel: found a trajectory without an agent turn, expected at least one")
        turns, start = [replace(turn, reward=None) for turn in trajectory.turns], agent[0]
        # Options of one row: all are read behind the same turns of the prompt, however many of those the window drops.
        stops = [*(i + 1 for i in agent[:-1] if place == "turn"), len(turns)]
        row = (as_context(turns[:start]), [turns[start:stop] for stop in stops])
        if not fits(scorer, *row):
            counts[TOO_LONG] += 1
            continue
        rows.append(row)
        kept.append(trajectory)
        paid.append(agent if place == "turn" else agent[-1:])
    if not kept:
        raise InputError(f"relabel: found no trajectory that the scorer can read ({dict(counts)})")
    # Differences of scores add up to the score of the whole for every scorer, also one that is no sum over turns. The
    # shift of normalisation belongs to no turn: in equal parts it leaves each turn nearly its own worth, and the sum
    # does not depend on how many turns there are. (On the first turn alone it would hide what that turn is worth; once
    # for every turn, as a reward model adds it to whatever it reads, a shift below 0 would teach to hang up.)
    shift = getattr(scorer, "shift", 0.0)
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
    """The n pairs of options whose predicted preference σ(s_i − s_j) the members of an ensemble disagree on most, by
    variance, most first; at most one pair of each comparison. Christiano et al. 2017 ask for labels of those.

    `labels["disagreement"]` is the standard deviation. Ties keep the order of the data.
    """
    found = []
    members = ensemble.members([(row.context, row.options) for row in comparisons])
    for row, scores in zip(comparisons, members, strict=True):  # scores (members, K)
        prob = np.exp(-np.logaddexp(0, scores[:, None, :] - scores[:, :, None]))  # [:, i, j]: σ(s_i − s_j)
        spread = np.triu(prob.std(0), 1)
        i, j = np.unravel_index(spread.argmax(), spread.shape)
        j = max(int(j), int(i) + 1)  # where all agree
        pair = row.select([int(i), j])
        found.append(replace(pair, labels={**pair.labels, "disagreement": float(spread.max())}))
    return sorted(found, key=lambda pair: -pair.labels["disagreement"])[:n]
