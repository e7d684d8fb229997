"""The guided model: the user's own causal LM class with Q and V heads, guided logits, an embedding for requested
returns, and packed per-step outputs.

`guided_class(GPT2LMHeadModel)` is a subclass of GPT2LMHeadModel. Parameter names do not change, so the base class can
load the same folder as a plain policy, and `generate`, caches, PEFT and sharding keep working. The added weights are
in the submodules `value_heads`, `return_embedding` and `return_heads`, the added settings in the run metadata (the
entry `offline_lmrl` of config.json).

Notation: B rows of T tokens (S in a prompt), vocabulary size V, width d of the hidden states, H Q heads. A step is one
token that the agent chose, at a state (row, position); N is the number of steps in a batch, M that of the steps that
close a turn (tokens/batching.py). A requested return is encoded by a reserved id before each agent turn; the null
condition is the reserved id for "no return requested" (tokens/conditioning.py).

A forward hook on the decoder stores the hidden states, and `forward_with_hidden` returns them. The hook is a plain
function that stores them on the module it is called with, so a deep copy never writes into its original. For packed
logits, a pre-hook on the LM head selects the needed positions; the base's own code then applies soft cap and scale.
"""

import functools
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from offline_lmrl.decoding.distribution import Form, ModelOutputs, lookup_in, next_token
from offline_lmrl.errors import InputError, shown
from offline_lmrl.models.adapters import PARTS, run_metadata, without_adapter
from offline_lmrl.models.return_embedding import ReturnEmbedding, asked_inputs
from offline_lmrl.models.return_heads import ReturnHeads
from offline_lmrl.models.step_outputs import StepRequest, packed_outputs
from offline_lmrl.models.value_heads import Head, ValueHeads, ValueHeadsConfig, forward_with_q
from offline_lmrl.tokens.conditioning import ReturnTokens
from offline_lmrl.tokens.rendering import Renderer


def keep_hidden(module: nn.Module, args: tuple, output: Any) -> None:
    # Index 0 is the last hidden state of a tuple and of a ModelOutput alike.
    module.last_hidden = output[0]


def _new_parts(model: PreTrainedModel, metadata: Mapping[str, Any]) -> dict[str, nn.Module]:
    """Return the parts that entries of the run metadata describe, by name, before their weights are drawn."""
    # Take the width from the LM head: some decoders end in a projection, so hidden_size may be another width.
    vocabulary, width = model.get_output_embeddings().weight.shape
    parts = {}
    if stored := metadata.get("value_heads"):
        parts["value_heads"] = ValueHeads(ValueHeadsConfig(**stored), vocabulary, width)
    if (returns := metadata.get("returns")) and returns.get("condition") == "embedding":
        parts["return_embedding"] = ReturnEmbedding(returns["bins"], model.get_input_embeddings().weight.shape[1])
    if stored := metadata.get("return_heads"):
        parts["return_heads"] = ReturnHeads(stored, width)
    return parts


class Guided:
    """The mixin that `guided_class` adds to a causal LM class.

    Without value heads, the model is a plain policy with packed outputs.
    """

    def __init__(self, config: PreTrainedConfig, *inputs, **kwargs):
        super().__init__(config, *inputs, **kwargs)
        self._set_up(run_metadata(config))
        self.post_init()
        self.copy_targets()  # post_init has drawn target heads of their own

    def _set_up(self, metadata: Mapping[str, Any]) -> None:
        """Give a model of the base class what this class adds, with the parts that the run metadata describe."""
        self.get_decoder().last_hidden = None
        self.get_decoder().register_forward_hook(keep_hidden)
        parts = _new_parts(self, metadata)
        for name in PARTS:
            setattr(self, name, parts.get(name))

    def copy_targets(self) -> None:
        """Make the target heads, if any, frozen copies of the online heads."""
        if self.value_heads is not None:
            self.update_targets(1.0)
            self.freeze_targets()

    def get_decoder(self) -> nn.Module:
        """Return the module that maps tokens to the hidden states that enter the LM head.

        The candidates, in this order, are what the base class's `get_decoder` returns and the model's direct children.
        The first one that contains the input embedding but not the LM head is returned.

        Raises: InputError if there is no such module.
        """
        embedding, head = self.get_input_embeddings(), self.get_output_embeddings()
        for module in (super().get_decoder(), *self.children()):
            parts = set(module.modules())
            if embedding in parts and head not in parts:
                return module
        raise InputError(f"model: found {self.base_name}, expected a causal LM with a decoder before its LM head")

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, ReturnEmbedding):
            module.reset(self.get_input_embeddings())
        elif isinstance(module, Head):
            module.reset()
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        """Load as the base class does, then freeze the target heads.

        Target heads that are missing on disk become copies of the online heads.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        if model.value_heads is not None:
            if any("target_q" in key for key in info["missing_keys"]):
                model.update_targets(1.0)
            model.freeze_targets()
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory, is_main_process: bool = True, **kwargs) -> None:
        """Save as the base class does, but name the base class in config.json: other engines do not know this one."""
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        # The base class has just written the name of the guided class, so config.json is written again.
        self.config.architectures = [self.base_name]
        if is_main_process:
            self.config.save_pretrained(save_directory)

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Module:
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        if self.value_heads is not None:
            self.value_heads.follow(self.get_output_embeddings().weight)
        return embeddings

    def generate(
        self,
        *args,
        beta: float | Tensor | None = None,
        ask: float | str | Sequence[float | str] | None = None,
        **kwargs,
    ):
        """Generate as the base class does, with value guidance and a requested return.

        Of the decoding settings in the run metadata, `support`, `candidates`, `clip` and `q_reduce` apply, and `beta`
        and `ask` are the defaults. The arguments `temperature`, `top_k` and `top_p` of `generate` act on the guided
        distribution.

        With `ask`, prompts must end with the agent's opening (the generation prompt), and logits processors see only
        the new tokens. Every agent turn in a prompt is conditioned on the same return, because the rewards of earlier
        turns are unknown here: subtract them from `ask`, or use LanguagePolicy, which does. If any prompt contains
        reserved ids, all prompts stay as they are and `ask` is ignored.

        Args:
          beta: the weight of value guidance, one number or one per row (B,); None = the stored value, else 0.
          ask: the requested return, for a model with a return embedding: a number in reward units, a name such as
            "max" or "p90", or a list with one of these per row; None = the stored value.
        Raises: InputError if `ask` is combined with `beta` or a stored `condition_scale` other than 0.
        """
        decoding = run_metadata(self.config).get("decoding") or {}
        beta = decoding.get("beta", 0.0) if beta is None else beta
        if ask is None and self.return_embedding is not None:
            ask = decoding.get("ask")
        ids = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
        if ask is None or ids is None or (ids >= self.get_input_embeddings().weight.shape[0]).any():
            return super().generate(*args, beta=beta, **kwargs)
        if isinstance(beta, Tensor) or beta != 0 or decoding.get("condition_scale", 0.0) != 0:
            raise InputError(
                "ask: found a request together with beta or condition_scale, expected both to be 0: generate runs one "
                "pass, and guidance needs a second pass without the requested return; use LanguagePolicy instead"
            )
        if self.return_embedding is None:
            raise InputError(
                f"ask: found {shown(ask)}, expected None, as this model has no return embedding; train one with "
                "algorithm: return_conditioned and condition: embedding"
            )
        block, mask = run_metadata(self.config)["returns"], kwargs.pop("attention_mask", None)
        embeddings, mask = asked_inputs(self, block, ids, mask, ask)
        rest = {name: value for name, value in kwargs.items() if name not in ("input_ids", "inputs")}
        rest |= {"inputs_embeds": embeddings, "attention_mask": mask}
        output = super().generate(None, *args[1:], beta=0.0, **rest)
        new = output if isinstance(output, Tensor) else output.sequences
        # Given embeddings, generate returns new tokens only; num_return_sequences may make several rows of a prompt.
        whole = torch.cat([ids.repeat_interleave(len(new) // len(ids), 0), new], dim=1)
        if isinstance(output, Tensor):
            return whole
        output.sequences = whole
        return output

    def prepare_inputs_for_generation(self, input_ids: Tensor, inputs_embeds: Tensor | None = None, **kwargs):
        """Prepare inputs as the base class does.

        `inputs_embeds` is an explicit parameter because `generate` accepts embeddings only if the signature names
        them; some families only have **kwargs for them.
        """
        if inputs_embeds is not None:
            kwargs["inputs_embeds"] = inputs_embeds
        return super().prepare_inputs_for_generation(input_ids, **kwargs)

    def forward_with_hidden(self, *args, **kwargs) -> tuple[Any, Tensor]:
        """Run the base class's forward; return its outputs and the decoder's last hidden states (B,T,d)."""
        args, kwargs = self._embedded(args, kwargs)
        outputs = super().forward(*args, **kwargs)
        decoder = self.get_decoder()
        # Cleared at once: a stored tensor would keep the graph of this pass in memory.
        hidden, decoder.last_hidden = decoder.last_hidden, None
        return outputs, hidden

    def hidden_states(self, **inputs: Tensor) -> Tensor:
        """Run the decoder alone, with keywords of its forward; return its last hidden states (B,T,d)."""
        decoder = self.get_decoder()
        decoder(use_cache=False, **self._embedded((), inputs)[1])
        hidden, decoder.last_hidden = decoder.last_hidden, None
        return hidden

    def _embedded(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Replace input_ids by inputs_embeds in the arguments of a forward, if the model has a return embedding.

        The base class's embedding has no rows for the reserved ids, so its lookup must never see them.
        """
        ids = args[0] if args else kwargs.get("input_ids")
        if self.return_embedding is None or ids is None:
            return args, kwargs
        embeddings = self.return_embedding(ids, self.get_input_embeddings())
        args, ids = ((None, *args[1:]), {}) if args else ((), {"input_ids": None})
        return args, kwargs | ids | {"inputs_embeds": embeddings}

    def q_values(self, hidden: Tensor, candidates: Tensor | None = None, target: bool = True) -> Tensor:
        """Compute Q of all tokens, or of some, in scaled reward units.

        Args:
          hidden: hidden states, (..., d).
          candidates: token ids (..., K), K per state; None = the whole vocabulary.
          target: True: use the target heads. False: the online ones.
        Returns: (H, ..., V) or (H, ..., K), fp32.
        """
        head = self.value_heads.target_q if target else self.value_heads.q
        lead = hidden.shape[:-1]
        if candidates is not None:
            candidates = candidates.reshape(-1, candidates.shape[-1])
        q = head(hidden.reshape(-1, hidden.shape[-1]), self.get_output_embeddings().weight, candidates)
        return q.view(q.shape[0], *lead, q.shape[-1])

    def v_values(self, hidden: Tensor) -> Tensor:
        """Compute V of hidden states, (..., d) -> (...), fp32, in scaled reward units."""
        return self.value_heads.v(hidden.reshape(-1, hidden.shape[-1])).view(hidden.shape[:-1])

    def update_targets(self, rate: float) -> None:
        """Set target ← rate · online + (1 − rate) · target; call it once per optimizer step."""
        self.value_heads.update_targets(rate)
        self.value_heads.follow(self.get_output_embeddings().weight)

    def freeze_targets(self) -> None:
        for head in self.value_heads.targets():
            head.requires_grad_(False)


def _guided_outputs(model: PreTrainedModel, beta: float | Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Run the base class's forward; return its outputs with guided logits, (B,n,V), fp32.

    They are logits + β · advantage for the tokens that `support` and `candidates` keep, and −inf for others.
    `support`, `candidates`, `clip` and `q_reduce` are the decoding settings of the run metadata.

    Args:
      model: the guided model.
      beta: β, one number or one per row (B,); a row whose β is 0 keeps its logits.
      args: positional arguments of the forward.
      kwargs: keyword arguments of the forward.
    Raises: InputError if the model has no value heads.
    """
    if model.value_heads is None:
        raise InputError(f"beta: found {beta}, expected 0, as this model has no value heads; train them (ILQL)")
    decoding = run_metadata(model.config).get("decoding") or {}
    if isinstance(beta, Tensor):
        beta = beta.view(-1, 1, 1)  # (B,1,1), to broadcast over positions and vocabulary
    names = ("support", "candidates", "clip", "q_reduce")
    form = Form(beta=beta, **{name: decoding[name] for name in names if name in decoding})
    keep = kwargs.get("logits_to_keep", 0)
    # As in transformers, logits_to_keep 0 means all: slice(-0, None) is the whole axis.
    kept = slice(-keep, None) if isinstance(keep, int) else keep
    if form.reads_all_of_q(model.device) and isinstance(keep, int):
        outputs, hidden, q = forward_with_q(model, *args, **kwargs)
        read_q = lookup_in(q)
    else:
        outputs, hidden = model.forward_with_hidden(*args, **kwargs)
        read_q = functools.partial(model.q_values, hidden[:, kept])
    logits, values = outputs.logits, ModelOutputs(q=read_q, v=lambda: model.v_values(hidden[:, kept]))
    guided = next_token(logits, form, values, normalised=False).over_vocabulary(logits.shape[-1])
    outputs.logits = torch.where(beta == 0, logits.float(), guided) if isinstance(beta, Tensor) else guided
    return outputs


@functools.cache
def guided_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return the guided subclass of a causal LM class, named "Guided" + base name; return a guided class as it is."""
    if issubclass(base, Guided):
        return base

    def forward(self, *args, beta: float | Tensor | None = None, request: StepRequest | None = None, **kwargs):
        """Run the base class's forward, with guided logits (`beta`), or compute outputs of logged steps (`request`).

        Args:
          beta: β, one number or one per row (B,); logits become logits + β · advantage under the stored decoding
            settings. None and 0 = the base class's logits.
          request: what to compute at logged steps; all other arguments must then be the keywords input_ids and
            attention_mask. None = nothing.
        Returns: the base class's outputs; with `request` the dict of tensors that `StepRequest` describes.
        """
        if request is not None:
            # peft passes arguments that nobody gave, as None.
            given = {name: value for name, value in kwargs.items() if value is not None}
            return packed_outputs(self, request, given)
        if isinstance(beta, Tensor) or beta:
            return _guided_outputs(self, beta, args, kwargs)
        return self.forward_with_hidden(*args, **kwargs)[0]

    # generate and Trainer inspect the signature: without the base's names, GPT-2 would silently lose its position ids.
    own = [p for p in inspect.signature(forward).parameters.values() if p.kind is p.KEYWORD_ONLY]
    signature = inspect.signature(base.forward)
    parameters = sorted([*signature.parameters.values(), *own], key=lambda parameter: parameter.kind)
    forward.__signature__ = signature.replace(parameters=parameters)
    parts = {
        "forward": forward,
        "base_name": base.__name__,
        "__module__": base.__module__,  # in another module it would count as custom code, whose buffers are skipped
        "__doc__": f"{base.__name__} with value heads and a return embedding; see `Guided`.",
        "_keep_in_fp32_modules_strict": {*(base._keep_in_fp32_modules_strict or ()), *PARTS},
    }
    name = f"Guided{base.__name__}"
    # Old checkpoints, such as Pythia's, have other names for some weights; transformers maps them by class name.
    if (renamed := get_checkpoint_conversion_mapping(base.__name__)) is not None:
        register_checkpoint_conversion_mapping(name, renamed, overwrite=True)
    return type(name, (Guided, base), parts)


def add_parts(model: PreTrainedModel, metadata: Mapping[str, Any]) -> PreTrainedModel:
    """Add entries to the run metadata of a model, and the parts that they describe with fresh weights, in place.

    Args:
      model: a causal LM, or a PeftModel around one, which becomes guided if it is not; parts of the same kinds are
        replaced.
      metadata: the new entries, of which `value_heads`, `returns` and `return_heads` describe parts.
    Returns: the object that was passed.
    """
    inner = without_adapter(as_guided(model))
    inner.config.offline_lmrl = run_metadata(inner.config) | metadata
    for name, part in _new_parts(inner, metadata).items():
        setattr(inner, name, part.to(inner.device))
        part.apply(inner._initialize_weights)
    if "value_heads" in metadata:
        inner.copy_targets()
    return model


def as_guided(model: PreTrainedModel) -> PreTrainedModel:
    """Turn a causal LM, or the one inside a PeftModel, into a guided model without heads, in place.

    A model that is already guided stays as it is, with its heads.

    Returns: the object that was passed.
    """
    inner = without_adapter(model)
    if not isinstance(inner, Guided):
        inner.__class__ = guided_class(type(inner))
        inner._set_up({})
    return model


def add_value_heads(model: PreTrainedModel, value_heads: ValueHeadsConfig) -> PreTrainedModel:
    """Turn a model into a guided one with fresh value heads, in place.

    Args:
      model: a causal LM, or a PeftModel around one; existing value heads are replaced.
      value_heads: kind and number of the heads.
    Returns: the object that was passed.
    """
    return add_parts(model, {"value_heads": asdict(value_heads)})


def add_returns(model: PreTrainedModel, block: Mapping[str, Any]) -> PreTrainedModel:
    """Make a guided model return-conditioned, in place.

    Args:
      model: a guided model, or a PeftModel around one.
      block: the new entry `returns` of the run metadata (`ReturnTokens.from_block`). With `condition: embedding`, the
        model gets a fresh return embedding with one row for null and one for each of the `bins`.
    Returns: the object that was passed.
    """
    return add_parts(model, {"returns": dict(block)})


def add_return_heads(model: PreTrainedModel, block: Mapping[str, Any]) -> PreTrainedModel:
    """Add fresh return heads, which predict rewards and returns of turns, to a guided model, in place.

    Args:
      model: a guided model, or a PeftModel around one.
      block: the new entry `return_heads` of the run metadata (`fit_heads` in models/return_heads.py).
    Returns: the object that was passed.
    """
    return add_parts(model, {"return_heads": dict(block)})


def return_tokens_of(model: PreTrainedModel, renderer: Renderer) -> ReturnTokens | None:
    """Return the ids that encode requested returns for a model; None if it is not return-conditioned."""
    block = run_metadata(model.config).get("returns")
    return block and ReturnTokens.from_block(block, model.get_input_embeddings().weight.shape[0], renderer)


def remove_heads(model: PreTrainedModel) -> PreTrainedModel:
    """Remove the value heads, the return heads and the return embedding of a guided model, in place.

    Their entries in the run metadata, and the entry `decoding`, are removed too.

    Returns: the object that was passed.
    """
    inner = without_adapter(model)
    inner.value_heads = inner.return_embedding = inner.return_heads = None
    gone = ("value_heads", "returns", "return_heads", "decoding")
    inner.config.offline_lmrl = {name: block for name, block in run_metadata(inner.config).items() if name not in gone}
    return model
