"""The distribution of the next token: the policy π, filtered, plus the terms that change it.

    log p(a|s) = log π(a|s) + Σ_k term_k(s, a) + a constant of the state

The order is fixed. First π is filtered and divided by the temperature, because Q is trained only on tokens like those
of the data. Then the terms are added on the remaining tokens (Snell et al. 2023, ILQL, section on policy extraction;
the official code also filters before guidance). A term is a class in TERMS. It has the attributes

    reads    what it needs beside the logits of π: "hidden states", and "null stream" if a return is requested: a
             second pass of the model, in which none is
    folds    the values of settings with which it can be added to the weights of an LM head, the nearest value first

and the methods `of(form)`, which returns the term, or None if the settings switch it off, and `__call__(outputs,
ids)`, which returns its values (..., K) for the token ids (..., K); ids None = for the whole vocabulary.

The tensors here have any leading shape (...) before the vocabulary, such as (B, V) or (B, T, V). In shapes, V is the
size of the vocabulary, K the number of tokens that are still possible, and H the number of Q heads; in equations, V is
the state value. This file needs torch alone, so that an exported checkpoint can contain a copy of it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

Q_REDUCTIONS = ("min", "mean", "first")
INF = float("inf")
SMALLEST = 5e-324  # the smallest number above 0
LOOKUP_COST = 2  # computing Q of a token that is looked up for one state, in units of that of a token for all states


def _at_least_float32(x: Tensor) -> Tensor:
    """Return x widened to fp32 if it is half precision; fp32 and float64 stay as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _differs(setting: float | Tensor | None, *off: float | None) -> bool:
    """True if a setting has another value than these, for any row."""
    return isinstance(setting, Tensor) or setting not in off


def divisor(temperature: float | Tensor) -> float | Tensor:
    """Return the number that log π is divided by: the temperature, and 1 in place of 0 (greedy)."""
    if isinstance(temperature, Tensor):
        return temperature.masked_fill(temperature == 0.0, 1.0)
    return temperature or 1.0


def support_filter(log_prob: Tensor, support: float | Tensor) -> Tensor:
    """Set tokens with π(a|s) < support · max π(·|s) to −inf; the best token always stays.

    This is the threshold of discrete BCQ (Fujimoto et al. 2019).

    Args:
      log_prob: (..., V), log-probabilities or unnormalised logits, as only differences to the best token matter.
      support: the threshold in [0, 1], a number or a tensor (..., 1); 0 keeps all tokens.
    Returns: (..., V), not renormalised.
    """
    if not _differs(support, 0.0):
        return log_prob
    share = (log_prob - log_prob.amax(-1, keepdim=True)).exp()
    return log_prob.masked_fill(share < support, -torch.inf)


def _largest_k(k: int | Tensor, vocabulary: int) -> int:
    """Return the largest k, at most V; for a tensor on a GPU it is V, because to read k would wait for the GPU."""
    if isinstance(k, Tensor):
        k = int(k.max()) if k.device.type == "cpu" else vocabulary
    return min(k, vocabulary)


def _top_k_filter(log_prob: Tensor, k: int | Tensor) -> Tensor:
    vocabulary = log_prob.shape[-1]
    if not isinstance(k, Tensor):
        worst_kept = log_prob.topk(min(k, vocabulary), dim=-1).values[..., -1:]
        return log_prob.masked_fill(log_prob < worst_kept, -torch.inf)
    drops = k < vocabulary
    best = log_prob.topk(_largest_k(k.where(drops, 1), vocabulary), dim=-1).values
    worst_kept = best.gather(-1, k.clamp(max=best.shape[-1]).expand(*best.shape[:-1], 1) - 1)
    return log_prob.masked_fill(drops & (log_prob < worst_kept), -torch.inf)


def _top_p_filter(log_prob: Tensor, top_p: float | Tensor) -> Tensor:
    """Keep the smallest set of best tokens with a total probability of at least top_p; set the others to −inf."""
    prob, order = log_prob.softmax(-1).sort(-1, descending=True)
    before = prob.cumsum(-1) - prob  # mass of the better tokens: 0 for the best, which therefore always stays
    beyond = (before >= top_p) & (before > 0.0)  # a top_p that fp32 rounds to 0 keeps the best, too
    if isinstance(top_p, Tensor):
        beyond &= top_p < 1.0  # rounded sums may reach 1 before the last token
    dropped = torch.zeros_like(beyond).scatter(-1, order, beyond)
    return log_prob.masked_fill(dropped, -torch.inf)


def number(default: float | None, help: str, low: float, high: float, expected: str) -> Any:
    """Return a dataclass field for a number.

    Args:
      default: the default.
      help: the text that the command line shows.
      low, high: the numbers in range, including these.
      expected: the range in words, for errors.
    """
    return field(default=default, metadata={"help": help, "low": low, "high": high, "expected": expected})


@dataclass(frozen=True)
class Form:
    """The settings of the formula; `DecodingConfig` (decoding/config.py) adds those of requests and replies.

    So that one batch holds rows with different settings, those in PER_ROW may also be tensors (..., 1), such as
    (B, 1); `of_rows` makes them. In a tensor, a row without a top_k, top_p, min_p or clip has the value in PER_ROW.
    Without terms, `candidates` has no effect.
    """

    temperature: float = number(
        1.0, "Divides log π; 0 is greedy (argmax of the guided scores).", 0.0, INF, "0 (greedy) or more"
    )
    top_k: int | None = number(
        None,
        "Keep only the k most probable tokens of π, at that temperature; null = off.",
        1,
        INF,
        "a whole number from 1, or null",
    )
    top_p: float | None = number(
        None,
        "Keep the smallest set of most probable tokens that holds this share of π, at that temperature; null = off.",
        SMALLEST,
        1.0,
        "a share above 0 and up to 1, or null",
    )
    min_p: float | None = number(
        None,
        "Drop tokens with less than min_p times the largest probability of π, at that temperature; null = off.",
        0.0,
        1.0,
        "a share from 0 to 1, or null",
    )
    support: float = number(
        0.0,
        "Drop tokens with π(a|s) < support · max π(·|s), at temperature 1 (discrete BCQ); 0 = off.",
        0.0,
        1.0,
        "a share from 0 to 1",
    )
    beta: float = number(0.0, "Weight of value guidance; 0 = the plain policy.", -INF, INF, "a finite number")
    q_reduce: str = field(default="min", metadata={"help": "How the Q heads are combined: min, mean or first."})
    candidates: int | None = number(
        None,
        "Guide only the policy's k most probable tokens and drop the others; null = all. Unused without guidance.",
        1,
        INF,
        "a whole number from 1, or null",
    )
    clip: float | None = number(
        None,
        "Upper limit on the advantage Q − V; null = no limit (V then cancels and is not computed).",
        -INF,
        INF,
        "a finite number, or null",
    )
    condition_scale: float = number(
        0.0,
        "w ≥ 0 of return guidance, (1 + w)·log π(·|ask) − w·log π(·); 0 = plain conditioning.",
        0.0,
        INF,
        "0 (no return guidance) or more",
    )

    @classmethod
    def of_rows(cls, forms: "Sequence[Form]", device: torch.device) -> "Form":
        """Return one form for B rows, in which a setting that differs between them is a tensor (B, 1).

        Args:
          forms: the form of each row; all of the same `kind`.
          device: the device of the tensors.
        """
        if all(form is forms[0] for form in forms):
            return forms[0]
        settings = {one.name: getattr(forms[0], one.name) for one in fields(Form)}
        for name, off in PER_ROW.items():
            values = [off if getattr(form, name) is None else getattr(form, name) for form in forms]
            if any(value != values[0] for value in values):
                dtype = torch.long if name == "top_k" else torch.float32
                settings[name] = torch.tensor(values, device=device, dtype=dtype).unsqueeze(-1)
        # `candidates` of the first row has no effect there if that row is not guided, but would have in the others.
        return Form(**settings | {"candidates": forms[0].kind[2]})

    @property
    def kind(self) -> tuple:
        """The settings that rows of one batch need to share: those that are not in PER_ROW, and an order of columns.

        With `candidates` or `top_k`, guided rows have their most probable token first (`_possible`), and the order
        decides which token a random number draws.
        """
        candidates = self.candidates if self.guided else None
        ordered = self.guided if self.top_k is not None or candidates is not None else None
        return self.q_reduce, self.condition_scale, candidates, ordered

    @property
    def guided(self) -> bool:
        return _differs(self.beta, 0.0) or self.condition_scale != 0

    @property
    def keeps_all(self) -> bool:
        """True if every token stays possible."""
        filters = (self.top_k, self.top_p, self.min_p, self.candidates)
        return not _differs(self.support, 0.0) and all(setting is None for setting in filters)

    def reads_all_of_q(self, device: torch.device) -> bool:
        """True if Q of all tokens should be computed together with the logits, and False for Q of the tokens left.

        Where every token is left, the former is faster. On a GPU it is so in any case: the weights of the LM head are
        read once for both, and the number of tokens left is not waited for.
        """
        return _differs(self.beta, 0.0) and (self.keeps_all or device.type != "cpu")

    def terms(self) -> "list[ReturnTerm | ValueTerm]":
        """Return the terms that these settings switch on, in the order of TERMS; none = the plain policy."""
        return [term for kind in TERMS if (term := kind.of(self)) is not None]


# The settings that may differ between rows -> the value that means none, for those that may be None.
PER_ROW = {
    "temperature": None,
    "top_k": 2**31,
    "top_p": 1.0,
    "min_p": 0.0,
    "support": None,
    "beta": None,
    "clip": INF,
}


def filter_policy(logits: Tensor, form: Form) -> Tensor:
    """Filter π: support filter at temperature 1, then temperature, top-k, top-p and min-p.

    The support filter comes first because it estimates which tokens occur in the data, which does not depend on the
    temperature. The other steps are in the order of transformers' `generate`, and min-p is that of Nguyen et al. 2024.

    Args:
      logits: (..., V); −inf marks tokens that a constraint forbids.
      form: the settings. Temperature 0 (greedy) has the effect of 1 here, and the caller takes the argmax.
    Returns: (..., V), fp32 or float64, logits divided by the temperature; −inf for dropped tokens.
    """
    scores = support_filter(_at_least_float32(logits), form.support)
    if _differs(form.temperature, 0.0, 1.0):
        scores = scores / divisor(form.temperature)
    if form.top_k is not None:
        scores = _top_k_filter(scores, form.top_k)
    if _differs(form.top_p, None, 1.0):
        scores = _top_p_filter(scores, form.top_p)
    if form.min_p is not None:
        scores = support_filter(scores, form.min_p)
    return scores


def reduce_q(q: Tensor, q_reduce: str) -> Tensor:
    """Reduce Q of H heads to one Q.

    Args:
      q: (H, ...).
      q_reduce: "min" (used in the papers), "mean", or "first" (the first head). The last two are linear, so Q can be
        merged into the weights of an LM head.
    Returns: (...).
    """
    if q_reduce == "min":
        return q.amin(0)
    if q_reduce == "mean":
        return q.mean(0)
    if q_reduce == "first":
        return q[0]
    raise ValueError(f"q_reduce: found {q_reduce!r}, expected one of {', '.join(Q_REDUCTIONS)}")


def condition_shift(conditional: Tensor, null: Tensor, scale: float, temperature: float | Tensor = 1.0) -> Tensor:
    """Compute how a requested return R changes log π(a|s):  (1 + w) · (log π(a|s,R) − log π(a|s)) / T.

    The sum of log π(·|s) / T and this change is classifier-free guidance (Ho and Salimans 2022, on log-probabilities),
    ((1+w)·log π(·|s,R) − w·log π(·|s)) / T.

    Args:
      conditional: logits of the model whose input requests the return R, (..., V).
      null: logits of the same model whose input requests no return (the null condition), (..., V).
      scale: w; with 0 the sum is log π(·|s,R) / T.
      temperature: T; 0 has the effect of 1, as in `filter_policy`.
    Returns: (..., V), fp32 or float64.
    """
    conditional, null = _at_least_float32(conditional), _at_least_float32(null)
    difference = conditional.log_softmax(-1) - null.log_softmax(-1)
    return (1.0 + scale) / divisor(temperature) * difference


@dataclass(frozen=True)
class ModelOutputs:
    """What a model computed at some states, beside the logits of π, for the terms to read.

    Args:
      q: function that maps token ids (..., K), or None for the whole vocabulary, to Q of the H heads in scaled reward
        units, (H, ..., K); None = no Q.
      v: function that returns V(s) in scaled reward units, (...); None = no V.
      conditional: logits of a pass with a requested return, (..., V); None = no return is requested.
      null: logits of the same pass without a requested return, (..., V); needed with `conditional`.
    """

    q: Callable[[Tensor | None], Tensor] | None = None
    v: Callable[[], Tensor] | None = None
    conditional: Tensor | None = None
    null: Tensor | None = None


NOTHING_ELSE = ModelOutputs()


def lookup_in(q: Tensor) -> Callable[[Tensor | None], Tensor]:
    """Return the function `q` of `ModelOutputs` for Q of all tokens, (H, ..., V), that is computed already."""
    return lambda ids: q if ids is None else q.gather(-1, ids.expand(len(q), *ids.shape))


@dataclass(frozen=True)
class ReturnTerm:
    """Guidance by a requested return R:  (1 + w) · (log π(a|s,R) − log π(a|s)) / T.

    Args:
      scale: w.
      temperature: T; 0 has the effect of 1.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"null stream"})
    folds: ClassVar[Mapping[str, tuple[Any, ...]]] = {"condition_scale": (0.0,)}

    scale: float
    temperature: float | Tensor = 1.0

    @classmethod
    def of(cls, form: Form) -> "ReturnTerm | None":
        # With w = β = 0 the sum is log π(a|s,R), so one pass that is conditioned on R gives it without this term.
        return cls(form.condition_scale, form.temperature) if form.guided else None

    def __call__(self, outputs: ModelOutputs, ids: Tensor | None) -> Tensor | float:
        if outputs.conditional is None:
            return 0.0
        shift = condition_shift(outputs.conditional, outputs.null, self.scale, self.temperature)
        return shift if ids is None else shift.gather(-1, ids)


@dataclass(frozen=True)
class ValueTerm:
    """Guidance by values:  β · clip(reduce(Q(s,a)) − V(s)).

    V cancels in the softmax unless the advantage is clipped, so it is computed only then.

    Args:
      beta: β, a number or a tensor (..., 1).
      q_reduce: how the H heads become one Q (`reduce_q`).
      clip: the upper limit of the advantage, a number or a tensor (..., 1); 0.0 only punishes tokens below V; None =
        no limit.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"hidden states", "null stream"})  # Q is trained without requests
    folds: ClassVar[Mapping[str, tuple[Any, ...]]] = {"q_reduce": ("mean", "first"), "clip": (None,)}

    beta: float | Tensor
    q_reduce: str = "min"
    clip: float | Tensor | None = None

    @classmethod
    def of(cls, form: Form) -> "ValueTerm | None":
        return cls(form.beta, form.q_reduce, form.clip) if _differs(form.beta, 0.0) else None

    def __call__(self, outputs: ModelOutputs, ids: Tensor | None) -> Tensor:
        advantage = reduce_q(outputs.q(ids), self.q_reduce)
        if self.clip is not None:
            if outputs.v is None:
                raise ValueError("clip caps Q − V, but v is None; pass v or drop the clip")
            advantage = (advantage - outputs.v().unsqueeze(-1)).clamp(max=self.clip)
        if not isinstance(self.beta, Tensor):
            return self.beta * advantage
        # A row without guidance does not depend on Q, even if Q is not finite.
        return (self.beta * advantage).masked_fill(self.beta == 0.0, 0.0)


TERMS = (ReturnTerm, ValueTerm)


class NextToken(NamedTuple):
    """The scores of the tokens that are possible next.

    scores: (..., K), fp32 or float64; −inf for tokens that were dropped.
    ids: token id of each column, (..., K); None = column c is token c. Only dropped columns repeat a token, that of
      the column before.
    """

    scores: Tensor
    ids: Tensor | None

    def over_vocabulary(self, vocabulary: int) -> Tensor:
        """Return the scores of all V tokens, (..., V), −inf for those without a column."""
        if self.ids is None:
            return self.scores
        everything = self.scores.new_full((*self.scores.shape[:-1], vocabulary), -torch.inf)
        return everything.scatter_reduce(-1, self.ids, self.scores, "amax")


def next_token(
    logits: Tensor, form: Form, outputs: ModelOutputs = NOTHING_ELSE, *, normalised: bool = True
) -> NextToken:
    """Compute the distribution of the next token.

    Args:
      logits: the model's logits, (..., V), without a requested return if there are terms; −inf marks tokens that a
        constraint forbids.
      form: the settings.
      outputs: what the terms read.
      normalised: True: the scores are log-probabilities. False: they are the filtered logits at the temperature plus
        the terms, on the scale of the logits.
    """
    scores, terms, ids = filter_policy(logits, form), form.terms(), None
    if terms:
        scores, ids = _possible(scores, form)
    if normalised:
        scores = scores.log_softmax(-1)  # also before the terms: small numbers lose less when these are added
    for term in terms:
        scores = scores + term(outputs, ids)
    return NextToken(scores.log_softmax(-1) if normalised and terms else scores, ids)


def _possible(scores: Tensor, form: Form) -> NextToken:
    """Reduce filtered scores (..., V) to columns for the tokens that are left, so that terms are computed for these.

    With n such tokens in the state that has the most, there are K columns, where K is n rounded up to a power of two,
    so that few shapes occur. In states with fewer than K such tokens, the other columns are dropped (−inf).
    Columns are in the order of the vocabulary, or, with `candidates` or `top_k`, the most probable token comes first.
    On a GPU all tokens have columns, or `candidates` or `top_k` of them, because to count them would wait for the GPU.
    """
    vocabulary = scores.shape[-1]
    # Tokens beyond top_k are −inf already, so they need no column.
    top_k = vocabulary if form.top_k is None else _largest_k(form.top_k, vocabulary)
    most = min(form.candidates or vocabulary, top_k)
    ordered = most < vocabulary or isinstance(form.top_k, Tensor)
    best, ids = scores.topk(most, dim=-1) if ordered else (scores, None)
    counted = _differs(form.support, 0.0) or form.top_p is not None or form.min_p is not None
    if not counted or scores.device.type != "cpu":
        return NextToken(best, ids)
    left = best != -torch.inf  # also nan, of a model that has diverged
    count = left.sum(-1, keepdim=True)
    columns = 1 << (int(count.max()) - 1).bit_length()
    if columns >= most:
        return NextToken(best, ids)
    if ids is not None:
        return NextToken(best[..., :columns], ids[..., :columns])
    # To look Q of a token up for one state costs several times as much as to compute it in passing for all.
    if LOOKUP_COST * int(count.sum()) > vocabulary:
        return NextToken(scores, None)
    # The tokens that are left, state after state. Where a state has no more of them, its last one is repeated.
    tokens, end = left.nonzero()[:, -1], count.flatten().cumsum(0).view_as(count)
    column = torch.arange(columns, device=scores.device)
    ids = tokens[(end - count + column).clamp(max=end - 1)]
    return NextToken(scores.gather(-1, ids).masked_fill(column >= count, -torch.inf), ids)
