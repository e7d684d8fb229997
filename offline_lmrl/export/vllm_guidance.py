"""Guidance for one step of vLLM: the settings of requests, and the formula on vLLM's logits.

vLLM hands a logits processor the logits of π for B requests, with −inf for tokens that it forbids, and afterwards
divides what comes back by the temperature T of each request. `guided_logits` therefore returns T times the scores that
`next_token` (decoding/distribution.py) gives, so that vLLM samples as the run does: filters act on π first, then

    log π(a|s) / T + β · clip(reduce(Q(s,a)) − V(s))

on the tokens that they leave. vLLM's own top_p, top_k, min_p and penalties would act after guidance; `check_request`
refuses them for guided requests. This module needs torch and the heads alone, and not vLLM.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from offline_lmrl.decoding.config import check_numbers
from offline_lmrl.decoding.distribution import Form, ModelOutputs, divisor, next_token
from offline_lmrl.errors import InputError, shown
from offline_lmrl.models.value_heads import Q_HEADS, ScalarHead, TiedQ, ValueHeadsConfig
from offline_lmrl.settings import nearest

# The classes of vLLM that were tried. They end in one layer that maps the decoder's last hidden states to logits.
ARCHITECTURES = (
    "CohereForCausalLM",
    "GPTJForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "GemmaForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)
PREFIX = "Guided"  # of the architecture that plays a folder with values, before the name of its base
GREEDY_BELOW = 1e-5  # vLLM decodes greedily at temperatures below this
OF_REQUESTS = ("beta", "support", "top_k", "top_p", "min_p")  # settings that a request may bring in `extra_args`
# What vLLM would apply after guidance -> the values that switch it off; filters act only where tokens are sampled.
FILTERS = {"top_p": (1.0,), "top_k": (0, -1), "min_p": (0.0,)}
PENALTIES = {"presence_penalty": (0.0,), "frequency_penalty": (0.0,), "repetition_penalty": (1.0,)}


class Request(Protocol):
    """The fields of vLLM's SamplingParams that matter here."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    extra_args: Mapping[str, Any] | None


def stored_form(decoding: Mapping[str, Any]) -> Form:
    """Return the form that a folder stores (`offline_lmrl.decoding` in config.json)."""
    known = {one.name for one in fields(Form)}
    return Form(**{name: value for name, value in decoding.items() if name in known})


def request_form(stored: Form, request: Request) -> Form:
    """Return the form of one request: the stored one, with the request's temperature and its own settings.

    Args:
      stored: the form that the folder stores.
      request: vLLM's sampling parameters; `extra_args` (over HTTP `vllm_xargs`) may set OF_REQUESTS. top_k 0 means
        none, as in vLLM.
    Raises: InputError if a setting is out of range.
    """
    temperature = 0.0 if request.temperature < GREEDY_BELOW else request.temperature
    extra = request.extra_args or {}
    own = {name: extra[name] for name in OF_REQUESTS if name in extra}
    if own.get("top_k") == 0:
        own["top_k"] = None
    form = replace(stored, temperature=temperature, **own)
    check_numbers(form)
    return form


def check_request(request: Request) -> None:
    """Check that vLLM plays a request as the run would.

    Raises: InputError if a setting in `extra_args` is out of range, one of the folder's alone, or misspelt, or if a
      guided request uses what vLLM would apply after guidance. A request with beta 0 is not guided and may use all of
      vLLM. Other names in `extra_args` are those of other plugins.
    """
    for name in set(request.extra_args or ()) - set(OF_REQUESTS):
        near = nearest(name, OF_REQUESTS)
        if near or name in Form.__dataclass_fields__:
            raise InputError(f"{name}: found it in extra_args, expected {' or '.join(OF_REQUESTS)}{near}")
    # What is stored is not known here, but it has a β other than 0 (`check_vllm`), so any other number serves.
    if request_form(Form(beta=1.0), request).beta == 0:
        if unused := sorted(set(OF_REQUESTS[1:]) & set(request.extra_args)):
            raise InputError(f"{unused[0]}: found it in extra_args with beta 0, expected it as vLLM's own setting")
        return
    sampled = request.temperature >= GREEDY_BELOW
    for name, off in (FILTERS if sampled else {}).items():
        if (found := getattr(request, name)) not in off:
            raise InputError(
                f"{name}: found {shown(found)} in a guided request, expected none, as vLLM would apply it after "
                f"guidance; send it as vllm_xargs (extra_args) {name}, which filters the policy before guidance"
            )
    for name, off in PENALTIES.items():
        if (found := getattr(request, name)) not in off:
            raise InputError(f"{name}: found {shown(found)} in a guided request, expected {off[0]:g}, or beta 0")


def guided_logits(logits: Tensor, forms: Sequence[Form], outputs: ModelOutputs) -> Tensor:
    """Guide the logits of B requests.

    Args:
      logits: of π, (B, V), fp32; −inf marks tokens that are forbidden.
      forms: the form of each request.
      outputs: Q and V of the B states.
    Returns: (B, V), fp32: the scores of `next_token` times the temperature; −inf for tokens that were dropped.
    """
    form = Form.of_rows(forms, logits.device)
    scores = next_token(logits, form, outputs, normalised=False).over_vocabulary(logits.shape[-1])
    return scores * divisor(form.temperature)


@dataclass(frozen=True)
class LMHead:
    """The weight of an LM head, of which each of several processes may hold a share.

    weight: this process's rows, (rows, d); rows beyond the vocabulary are padding.
    vocabulary: V.
    first: the token id of the first of these rows.
    add: function that adds up a tensor over all processes.
    gather: function that joins the last axis of a tensor over all processes, in the order of their rows.
    """

    weight: Tensor
    vocabulary: int
    first: int = 0
    add: Callable[[Tensor], Tensor] = lambda x: x
    gather: Callable[[Tensor], Tensor] = lambda x: x

    @property
    def whole(self) -> Tensor | None:
        """The weight without padding, (V, d); None if other processes hold a share of it."""
        return self.weight[: self.vocabulary] if len(self.weight) >= self.vocabulary else None

    def rows(self, ids: Tensor) -> Tensor:
        """Return the rows of token ids (C,), whichever process holds them, (C, d)."""
        place = ids - self.first
        elsewhere = (place < 0) | (place >= len(self.weight))
        return self.add(self.weight[place.masked_fill(elsewhere, 0)].masked_fill(elsewhere.unsqueeze(-1), 0.0))

    def products(self, features: Tensor) -> Tensor:
        """Multiply features (..., d) by the rows of all tokens; return (..., V)."""
        return self.gather(F.linear(features, self.weight))[..., : self.vocabulary]


class PlayedHeads(nn.Module):
    """The value heads that play: the target Q heads and V, with the names under which training saves them.

    Args:
      config: the kind and number of the heads.
      vocabulary: V.
      width: d.
    """

    def __init__(self, config: ValueHeadsConfig, vocabulary: int, width: int):
        super().__init__()
        self.target_q = Q_HEADS[config.kind](config.heads, width, vocabulary, config.initial_value)
        self.v = ScalarHead(1, width, config.initial_value)

    def outputs(self, hidden: Tensor, lm_head: LMHead) -> ModelOutputs:
        """Return Q and V of B states for the formula to read; hidden: the decoder's last hidden states, (B, d)."""
        return ModelOutputs(q=lambda ids: self.q(hidden, lm_head, ids), v=lambda: self.v(hidden).squeeze(0))

    def q(self, hidden: Tensor, lm_head: LMHead, ids: Tensor | None) -> Tensor:
        """Compute Q of B states. Rows of Q heads' own are whole in each process; tied heads read those of the LM head.

        Args:
          hidden: (B, d).
          lm_head: the LM head.
          ids: token ids (B, C), C per state; None = the whole vocabulary.
        Returns: (H, B, C) or (H, B, V), fp32.
        """
        head = self.target_q
        if isinstance(head, TiedQ) and ids is None:
            # As in the run's own pass, features are rounded to the weight's dtype: to widen the weight costs more.
            features = head.features(hidden.float()).to(lm_head.weight.dtype)
            return lm_head.products(features).float() + head.offset(hidden.float()).unsqueeze(-1)
        if isinstance(head, TiedQ) and lm_head.whole is None:
            tokens, ids = ids.unique(return_inverse=True)
            return head(hidden, lm_head.rows(tokens), ids)
        return head(hidden, lm_head.whole, ids)
