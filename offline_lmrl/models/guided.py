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

import difflib
import functools
import inspect
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL_LMS

from offline_lmrl.decoding.distribution import Form, ModelOutputs, lookup_in, next_token
from offline_lmrl.errors import InputError, reading_pretrained, shown
from offline_lmrl.models.adapters import (
    PARTS,
    check_run_metadata,
    load_heads,
    read_run_metadata,
    require_peft,
    run_metadata,
    unfreeze_heads,
)
from offline_lmrl.models.return_embedding import ReturnEmbedding
from offline_lmrl.models.return_heads import ReturnHeads
from offline_lmrl.models.step_outputs import StepRequest, packed_outputs
from offline_lmrl.models.value_heads import Head, ValueHeads, ValueHeadsConfig
from offline_lmrl.tokens.conditioning import ReturnTokens, check_ask, with_return_ids
from offline_lmrl.tokens.rendering import Renderer

MOST_LAYERS = 10_000


def _table_rows(config: PreTrainedConfig) -> int | None:
    """Return the number of bins of the return embedding in a model's config; None = the model has no embedding."""
    block = run_metadata(config).get("returns") or {}
    return block["bins"] if block.get("condition") == "embedding" else None


def _stored_decoding(config: PreTrainedConfig) -> dict[str, Any]:
    return run_metadata(config).get("decoding") or {}


def _keep_hidden(module: nn.Module, args: tuple, output: Any) -> None:
    # Index 0 is the last hidden state of a tuple and of a ModelOutput alike.
    module.last_hidden = output[0]


class Guided:
    """The mixin that `guided_class` adds to a causal LM class.

    Without value heads, the model is a plain policy with packed outputs.
    """

    def __init__(self, config: PreTrainedConfig, *inputs, **kwargs):
        super().__init__(config, *inputs, **kwargs)
        stored = run_metadata(config).get("value_heads")
        heads = run_metadata(config).get("return_heads")
        self._add_parts(ValueHeadsConfig(**stored) if stored else None, _table_rows(config), heads)
        self.post_init()
        if self.value_heads is not None:  # post_init has drawn target heads of their own
            self.update_targets(1.0)
            self.freeze_targets()

    def _add_parts(
        self, value_heads: ValueHeadsConfig | None, bins: int | None, return_heads: Mapping[str, Any] | None
    ) -> None:
        self.get_decoder().last_hidden = None
        self.get_decoder().register_forward_hook(_keep_hidden)
        # Take the width from the LM head: some decoders end in a projection, so hidden_size may be another width.
        self.value_heads = value_heads and ValueHeads(value_heads, *self.get_output_embeddings().weight.shape)
        self.return_embedding = bins and ReturnEmbedding(bins, self.get_input_embeddings().weight.shape[1])
        self.return_heads = return_heads and ReturnHeads(return_heads, self.get_output_embeddings().weight.shape[1])

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
        decoding = _stored_decoding(self.config)
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
        kwargs = {name: value for name, value in kwargs.items() if name not in ("input_ids", "inputs")}
        embeddings, mask = self._asked(ids, kwargs.pop("attention_mask", None), ask)
        options = kwargs | {"inputs_embeds": embeddings, "attention_mask": mask}
        output = super().generate(None, *args[1:], beta=0.0, **options)
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

    def _asked(
        self, ids: Tensor, mask: Tensor | None, ask: float | str | Sequence[float | str]
    ) -> tuple[Tensor, Tensor]:
        """Insert the requested return before every opening of the agent, and embed the prompts.

        Args:
          ids: prompts, (B,S).
          mask: (B,S), 0 for padding; None = no padding.
          ask: one requested return for all rows, or one per row.
        Returns: embeddings (B,T,width) and mask (B,T), padded on the left.
        Raises: InputError if the model has no return embedding, or a request or prompt cannot be used.
        """
        if self.return_embedding is None:
            raise InputError(
                f"ask: found {shown(ask)}, expected None, as this model has no return embedding; train one with "
                "algorithm: return_conditioned and condition: embedding"
            )
        block = run_metadata(self.config)["returns"]
        return_tokens = ReturnTokens.from_block(block, self.get_input_embeddings().weight.shape[0], None)
        asks = [ask] * len(ids) if isinstance(ask, int | float | str) else list(ask)
        real = torch.ones_like(ids) if mask is None else mask
        rows = []
        for row, kept, asked in zip(ids, real.bool(), asks, strict=True):
            check_ask(asked)
            value = return_tokens.scale.named_ask(asked) if isinstance(asked, str) else asked
            rows.append(
                with_return_ids(
                    row[kept].tolist(), block["opening"], return_tokens.ids(value), block.get("past_opening")
                )
            )
        width = max(map(len, rows))
        # Padded on the left, because generate continues after the last column; the mask hides the padding id 0.
        padded = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=ids.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=ids.device)
        return self.return_embedding(padded, self.get_input_embeddings()), mask

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

    def forward_with_q(self, *args, **kwargs) -> tuple[Any, Tensor, Tensor]:
        """Run the base class's forward and compute Q of all tokens, in the same pass of the LM head if heads are tied.

        Returns: its outputs, with logits at n positions; the decoder's last hidden states (B,T,d); and Q by the target
          heads at the last n of these, (H,B,n,V), fp32, in scaled reward units.
        """
        head, lm_head = self.value_heads.target_q, self.get_output_embeddings()
        # Hooks cannot be added while a graph is traced for a compiler.
        if torch.compiler.is_compiling() or not head.uses_weight_of(lm_head):
            outputs, hidden = self.forward_with_hidden(*args, **kwargs)
            return outputs, hidden, self.q_values(hidden[:, -outputs.logits.shape[1] :])
        with head.beside_logits(lm_head, lambda: self.get_decoder().last_hidden) as q:
            outputs, hidden = self.forward_with_hidden(*args, **kwargs)
        return outputs, hidden, q[0]

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

    def _guided_outputs(self, beta: float | Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run the base class's forward; return its outputs with guided logits, (B,n,V), fp32.

        They are logits + β · advantage for the tokens that `support` and `candidates` keep, and −inf for others.
        `support`, `candidates`, `clip` and `q_reduce` are the decoding settings of the run metadata.

        Args:
          beta: β, one number or one per row (B,); a row whose β is 0 keeps its logits.
          args: positional arguments of the forward.
          kwargs: keyword arguments of the forward.
        Raises: InputError if the model has no value heads.
        """
        if self.value_heads is None:
            raise InputError(f"beta: found {beta}, expected 0, as this model has no value heads; train them (ILQL)")
        decoding = _stored_decoding(self.config)
        if isinstance(beta, Tensor):
            beta = beta.view(-1, 1, 1)  # (B,1,1), to broadcast over positions and vocabulary
        names = ("support", "candidates", "clip", "q_reduce")
        form = Form(beta=beta, **{name: decoding[name] for name in names if name in decoding})
        keep = kwargs.get("logits_to_keep", 0)
        # As in transformers, logits_to_keep 0 means all: slice(-0, None) is the whole axis.
        kept = slice(-keep, None) if isinstance(keep, int) else keep
        if form.reads_all_of_q(self.device) and isinstance(keep, int):
            outputs, hidden, q = self.forward_with_q(*args, **kwargs)
            read_q = lookup_in(q)
        else:
            outputs, hidden = self.forward_with_hidden(*args, **kwargs)
            read_q = functools.partial(self.q_values, hidden[:, kept])
        logits, values = outputs.logits, ModelOutputs(q=read_q, v=lambda: self.v_values(hidden[:, kept]))
        guided = next_token(logits, form, values, normalised=False).over_vocabulary(logits.shape[-1])
        outputs.logits = torch.where(beta == 0, logits.float(), guided) if isinstance(beta, Tensor) else guided
        return outputs

    def packed_logits(self, row: Tensor, state: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Compute logits at N states only, which saves memory, and the hidden states of all positions.

        Args:
          row: (N,) long, the batch row of each state.
          state: (N,) long, the position of each state in its row: tokens 0..state have been read.
          inputs: keyword arguments of the forward for the whole batch, such as `input_ids` and `attention_mask`.
        Returns: logits (N,V) of the token after each state, and the last hidden states (B,T,d).
        """
        head = self.get_output_embeddings()
        # The head gets (1,N,d), three axes as usual, and multiplies N states instead of B·T.
        handle = head.register_forward_pre_hook(lambda module, args: (args[0][row, state].unsqueeze(0),))
        try:
            outputs, hidden = self.forward_with_hidden(use_cache=False, **inputs)
        finally:
            handle.remove()
        return outputs.logits[0], hidden


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
            return self._guided_outputs(beta, args, kwargs)
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


def _without_adapter(model: nn.Module) -> PreTrainedModel:
    """Return the model itself, or the one inside a PeftModel."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def as_guided(model: PreTrainedModel) -> PreTrainedModel:
    """Turn a causal LM, or the one inside a PeftModel, into a guided model without heads, in place.

    A model that is already guided stays as it is, with its heads.

    Returns: the object that was passed.
    """
    inner = _without_adapter(model)
    if not isinstance(inner, Guided):
        inner.__class__ = guided_class(type(inner))
        inner._add_parts(None, None, None)
    return model


def add_value_heads(model: PreTrainedModel, value_heads: ValueHeadsConfig) -> PreTrainedModel:
    """Turn a model into a guided one with fresh value heads, in place.

    Args:
      model: a causal LM, or a PeftModel around one; existing value heads are replaced.
      value_heads: kind and number of the heads.
    Returns: the object that was passed.
    """
    inner = _without_adapter(as_guided(model))
    inner.config.offline_lmrl = run_metadata(inner.config) | {"value_heads": asdict(value_heads)}
    inner.value_heads = ValueHeads(value_heads, *inner.get_output_embeddings().weight.shape).to(inner.device)
    # Targets are drawn too, so they are made copies of the online heads before they are frozen.
    inner.value_heads.apply(inner._initialize_weights)
    inner.update_targets(1.0)
    inner.freeze_targets()
    return model


def add_returns(model: PreTrainedModel, block: Mapping[str, Any]) -> PreTrainedModel:
    """Make a guided model return-conditioned, in place.

    Args:
      model: a guided model, or a PeftModel around one.
      block: the new entry `returns` of the run metadata (`ReturnTokens.from_block`). With `condition: embedding`, the
        model gets a fresh return embedding with one row for null and one for each of the `bins`.
    Returns: the object that was passed.
    """
    inner = _without_adapter(model)
    inner.config.offline_lmrl = run_metadata(inner.config) | {"returns": dict(block)}
    if bins := _table_rows(inner.config):
        embedding = inner.get_input_embeddings()
        inner.return_embedding = ReturnEmbedding(bins, embedding.weight.shape[1]).to(embedding.weight.device)
        inner.return_embedding.reset(embedding)
    return model


def add_return_heads(model: PreTrainedModel, block: Mapping[str, Any]) -> PreTrainedModel:
    """Add fresh return heads, which predict rewards and returns of turns, to a guided model, in place.

    Args:
      model: a guided model, or a PeftModel around one.
      block: the new entry `return_heads` of the run metadata (`fit_heads` in models/return_heads.py).
    Returns: the object that was passed.
    """
    inner = _without_adapter(model)
    inner.config.offline_lmrl = run_metadata(inner.config) | {"return_heads": dict(block)}
    inner.return_heads = ReturnHeads(block, inner.get_output_embeddings().weight.shape[1]).to(inner.device)
    inner.return_heads.apply(inner._initialize_weights)
    return model


def return_tokens_of(model: PreTrainedModel, renderer: Renderer) -> ReturnTokens | None:
    """Return the ids that encode requested returns for a model; None if it is not return-conditioned."""
    block = run_metadata(model.config).get("returns")
    return block and ReturnTokens.from_block(block, model.get_input_embeddings().weight.shape[0], renderer)


def remove_heads(model: PreTrainedModel) -> PreTrainedModel:
    """Remove the value heads, the return heads and the return embedding of a guided model, in place.

    Their entries in the run metadata, and the entry `decoding`, are removed too.

    Returns: the object that was passed.
    """
    inner = _without_adapter(model)
    inner.value_heads = inner.return_embedding = inner.return_heads = None
    gone = ("value_heads", "returns", "return_heads", "decoding")
    inner.config.offline_lmrl = {name: block for name, block in run_metadata(inner.config).items() if name not in gone}
    return model


def from_scratch(auto_class: type, spec: Mapping[str, Any], tokenizer, **extra: Any) -> PreTrainedModel:
    """Build a model with fresh fp32 weights from the user's config fields.

    Args:
      auto_class: the auto class of transformers that decides the head, such as AutoModelForCausalLM.
      spec: {"model_type": "gpt2", "n_layer": 2, ...}: a model type that transformers has as a causal LM, and fields of
        its config.
      tokenizer: gives the vocabulary size and the ids of pad, BOS and EOS, unless `spec` sets them.
      extra: further config fields, set by the caller and not by the user.
    Raises: InputError that names the wrong field.
    """
    fields = dict(spec)
    model_type = fields.pop("model_type", None)
    if not isinstance(model_type, str) or model_type not in CAUSAL_LMS:
        near = _nearest(str(model_type)[:100], CAUSAL_LMS)
        raise InputError(
            f"model.scratch.model_type: found {shown(model_type)}, expected a causal LM of transformers{near}"
        )
    known = AutoConfig.for_model(model_type)
    for name in fields:
        if name.startswith("_") or not hasattr(known, name) or callable(getattr(known, name)):
            raise InputError(
                f"model.scratch.{shown(name)[1:-1]}: {model_type} has no such field"
                f"{_nearest(name[:100], known.to_dict())}"
            )
    sizes = {"vocab_size": len(tokenizer)}
    sizes |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    try:
        config = AutoConfig.for_model(model_type, **sizes | fields | extra)
        _require_room(auto_class, config)
        return auto_class.from_config(config, dtype=torch.float32)
    except InputError:
        raise
    except Exception as error:  # the fields are the only input, so any error is about them
        if wrong := re.search(r"Field '(\w+)' expected (.+?), got", str(error)):
            found = shown((sizes | fields).get(wrong[1]))
            raise InputError(f"model.scratch.{wrong[1]}: found {found}, expected {wrong[2]}") from error
        message = str(error).strip() or type(error).__name__
        raise InputError(
            f"model.scratch: found fields from which transformers cannot make a {model_type} model "
            f"({message.splitlines()[0]}), expected other values"
        ) from error


def _require_room(auto_class: type, config: PreTrainedConfig) -> None:
    """Check that the weights, in fp32, fit into this machine's RAM, before any are allocated.

    Raises: InputError if they do not, or if the model has more than MOST_LAYERS layers.
    """
    layers = getattr(config.get_text_config(), "num_hidden_layers", None) or 0
    if layers > MOST_LAYERS:
        raise InputError(f"model.scratch: found {layers} layers, expected at most {MOST_LAYERS}")
    with torch.device("meta"):
        model = auto_class.from_config(config, dtype=torch.float32)
    needed = sum(tensor.nbytes for tensor in chain(model.parameters(), model.buffers()))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise InputError(
            f"model.scratch: found a model of {needed / 1e9:.3g} GB, expected at most {memory / 1e9:.3g} GB, the "
            "memory of this machine"
        )


def build_model(spec: Mapping[str, Any], tokenizer) -> PreTrainedModel:
    """Build a guided model with fresh weights and no heads; arguments and errors are those of `from_scratch`."""
    return as_guided(from_scratch(AutoModelForCausalLM, spec, tokenizer))


def find_device(name: str | torch.device | None) -> torch.device:
    """Return the device of this name; None = the first GPU, or the CPU if there is none.

    Raises: InputError if torch has no such device.
    """
    try:
        return torch.empty(0, device=name or ("cuda" if torch.cuda.is_available() else "cpu")).device
    except (RuntimeError, AssertionError, ImportError) as error:
        first = str(error).partition("\n")[0]
        raise InputError(f"device: found {shown(name)} ({first}), expected a device of torch, such as cpu") from error


def load_model(
    path_or_name: str | Path,
    *,
    value_heads: ValueHeadsConfig | None = None,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a guided model from the folder or hub name of any causal LM, guided or not, or from a LoRA folder.

    For a LoRA folder, the result is a PeftModel around the guided model, to which it forwards attributes and methods;
    adapter, online heads and return embedding are trainable.

    Args:
      path_or_name: the folder or hub name.
      value_heads: the value heads to make, fresh, if there are none on disk; None = make none. Not used for a LoRA
        folder.
      dtype: dtype of the trunk; heads are always fp32.
      trust_remote_code: run code that comes with the model, as in transformers.
    Raises: InputError if there is no model, if it is a reward model, if the config names heads whose weights are
      missing, or if the heads on disk differ from `value_heads` in kind, number or utterance heads.
    """
    name = str(path_or_name)
    if os.path.isfile(os.path.join(name, "adapter_config.json")):
        return _load_adapter(Path(name), dtype=dtype, trust_remote_code=trust_remote_code)
    with reading_pretrained(name, "model"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    check_run_metadata(name, run_metadata(config))
    _require_no_reward_model(name, run_metadata(config))
    with reading_pretrained(name, "model"):
        guided = guided_class(_causal_lm_class(config, trust_remote_code))
    with reading_pretrained(name, "model"):
        model, info = guided.from_pretrained(name, config=config, dtype=dtype, output_loading_info=True)
    _require_token_ids(name, model)
    stored = run_metadata(config).get("value_heads")
    missing = [key for key in info["missing_keys"] if key.startswith(PARTS) and "target_q" not in key]
    if missing:
        part = missing[0].partition(".")[0].replace("_", " ")
        raise InputError(f"model: {name}: config.json names {part}, but {missing[0]} is not among the weights")
    if stored is None:
        return model if value_heads is None else add_value_heads(model, value_heads)
    if value_heads is not None:
        check_same_heads(name, asdict(value_heads), asdict(ValueHeadsConfig(**stored)))
    return model


def _require_token_ids(name: str, model: PreTrainedModel) -> None:
    """Check that the special tokens in config.json and generation_config.json are ids.

    Args:
      name: the model's name, for the error.
    Raises: InputError if they are not.
    """
    for source in (model.config, model.generation_config):
        for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
            found = getattr(source, field, None)
            ids = found if isinstance(found, list) else [found]
            if not all(token is None or (isinstance(token, int) and not isinstance(token, bool)) for token in ids):
                raise InputError(
                    f"model: {name}: {field}: found {shown(found)}, expected the id of a token, a list of ids, or null"
                )


def _causal_lm_class(config: PreTrainedConfig, trust_remote_code: bool) -> type[PreTrainedModel]:
    """Return the class that AutoModelForCausalLM would choose, which may be remote code.

    The auto class does not know the config class of the text part of some multimodal models; for these, return the
    causal LM class that config.json names.
    """
    named = getattr(transformers, (config.architectures or [""])[0], None)
    if type(config) not in AutoModelForCausalLM._model_mapping and named and named.__name__.endswith("ForCausalLM"):
        return named
    with torch.device("meta"):
        return type(AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code))


def _require_no_reward_model(name: str | Path, block: Mapping[str, Any]) -> None:
    if "reward" in block:
        raise InputError(f"model: {name}: found a reward model, expected a causal LM")


def _load_adapter(folder: Path, **options) -> nn.Module:
    peft = require_peft()
    with reading_pretrained(folder, "model"):
        base = peft.PeftConfig.from_pretrained(folder).base_model_name_or_path
    if not base:
        raise InputError(f"model: {folder}/adapter_config.json names no base model, expected its folder or hub name")
    block = read_run_metadata(folder)
    _require_no_reward_model(folder, block)
    stored = block.get("value_heads")
    model = load_model(base, **options)  # any heads of the base are replaced by those saved beside the adapter
    model = remove_heads(model)
    if stored:
        model = add_value_heads(model, ValueHeadsConfig(**stored))
    model.config.offline_lmrl = block
    if "returns" in block:
        model = add_returns(model, block["returns"])
    if "return_heads" in block:
        model = add_return_heads(model, block["return_heads"])
    with reading_pretrained(folder, "model"):
        model = peft.PeftModel.from_pretrained(model, folder, is_trainable=True)
    load_heads(model, folder)
    # peft has frozen all that it does not adapt, the heads too.
    unfreeze_heads(model)
    return model


def check_same_heads(name: str, asked: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    """Check that requested value heads have the form of the stored ones (kind, number, utterance heads).

    Args:
      name: the model's name, for the error.
      asked: the requested ValueHeadsConfig as a dict.
      stored: the ValueHeadsConfig of the heads that the model has, as a dict.
    Raises: InputError if they differ.
    """
    for field in ("kind", "heads", "utterance"):
        if asked[field] != stored[field]:
            raise InputError(
                f"value_heads.{field}: found {shown(asked[field])}, but {name} has heads with {stored[field]!r}; "
                "set the same value, or start from a model without value heads"
            )


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; the nearest is {near[0]!r}" if near else ""
