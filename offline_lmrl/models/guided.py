"""The guided model: the user's own causal LM class with Q and V heads, guided logits, rows for returns, and packed
per-step outputs.

`guided_class(GPT2LMHeadModel)` is a subclass of GPT2LMHeadModel: parameter names stay, so the base class loads the
same folder as the plain policy, and `generate`, caches, PEFT and sharding keep working. What is added lies in the
submodules `value_heads` and `return_embedding` and in the `offline_lmrl` block of config.json.

Hidden states are kept by a forward hook on the decoder and taken by `forward_with_hidden`. The hook is a plain
function that stores on the module it is called with, so a deep copy never writes into its original. Packed logits come
from a pre-hook on the LM head that passes only the wanted positions: soft cap and scale are then the base's own.
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
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL_LMS

from offline_lmrl.data.conditioning import Slots, check_ask, with_slots
from offline_lmrl.data.errors import InputError, opening, shown
from offline_lmrl.data.rendering import Renderer
from offline_lmrl.models.adapters import (
    PARTS,
    check_settings,
    load_heads,
    read_settings,
    require_peft,
    settings,
    unfreeze_heads,
)
from offline_lmrl.models.return_embedding import ReturnEmbedding
from offline_lmrl.models.return_heads import ReturnHeads, outcomes
from offline_lmrl.models.value_heads import Head, ValueHeads, ValueHeadsConfig
from offline_lmrl.ops.decoding import guide, support_filter

MOST_LAYERS = 10_000


def _table_rows(config: PreTrainedConfig) -> int | None:
    """Bins of the return embedding that a config asks for; None = no table (returns as text need none)."""
    block = settings(config).get("returns") or {}
    return block["bins"] if block.get("condition") == "embedding" else None


def _sampling_form(config: PreTrainedConfig) -> dict[str, Any]:
    return settings(config).get("sampling") or {}


def _keep_hidden(module: nn.Module, args: tuple, output: Any) -> None:
    module.last_hidden = output[0]


def _scale_gradient(hidden: Tensor, scale: float) -> Tensor:
    """scale · h + (1 − scale) · h.detach(): the values of h, `scale` times its gradient."""
    return hidden.detach() if scale == 0 else hidden.detach().lerp(hidden, scale)


def _several_ranks() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


class Guided:
    """What `guided_class` puts before a causal LM class; without value heads a plain policy with packed outputs."""

    def __init__(self, config: PreTrainedConfig, *inputs, **kwargs):
        super().__init__(config, *inputs, **kwargs)
        stored = settings(config).get("value_heads")
        heads = settings(config).get("return_heads")
        self._add_parts(ValueHeadsConfig(**stored) if stored else None, _table_rows(config), heads)
        self.post_init()
        if self.value_heads is not None:
            self.update_targets(1.0)
            self.freeze_targets()

    def _add_parts(
        self, value_heads: ValueHeadsConfig | None, bins: int | None, return_heads: Mapping[str, Any] | None
    ) -> None:
        self.get_decoder().last_hidden = None
        self.get_decoder().register_forward_hook(_keep_hidden)
        # Sized by the LM head's matrix: some decoders end in a projection, so hidden_size is not always its width.
        self.value_heads = value_heads and ValueHeads(value_heads, *self.get_output_embeddings().weight.shape)
        self.return_embedding = bins and ReturnEmbedding(bins, self.get_input_embeddings().weight.shape[1])
        self.return_heads = return_heads and ReturnHeads(return_heads, self.get_output_embeddings().weight.shape[1])

    def get_decoder(self) -> nn.Module:
        """The module that reads the tokens and hands hidden states on towards the LM head: the base's answer where it
        is that, else the part of the model that holds the embedding and not the LM head.

        Raises: InputError where there is no such part.
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
        """As the base's; target heads that are not on disk start equal to the online ones, and all are frozen."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        if model.value_heads is not None:
            if any("target_q" in key for key in info["missing_keys"]):
                model.update_targets(1.0)
            model.freeze_targets()
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory, is_main_process: bool = True, **kwargs) -> None:
        """As the base's; config.json names the base class, which other engines know."""
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
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
        """As the base's, guided. beta: a number, or one per row (B,); None takes the stored sampling form's, else 0.

        The stored support, candidates, clip and q_reduce apply; `temperature`, `top_k` and `top_p` of `generate` then
        act on the guided distribution.

        ask: for a model with a table of returns, what is asked of the agent: a number in reward units, or "max" or
        "p90", or one per row; None takes the stored form's. Prompts then end with the agent's opening, and every agent
        turn in them is told the same return, as their rewards are not known here: where earlier turns earned
        something, take it off the ask, or play with LanguagePolicy, which does. Logits processors see new tokens only.
        Prompts with reserved ids of their own are left as they are.
        """
        form = _sampling_form(self.config)
        beta = form.get("beta", 0.0) if beta is None else beta
        if ask is None and self.return_embedding is not None:
            ask = form.get("ask")
        ids = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
        if ask is None or ids is None or (ids >= self.get_input_embeddings().weight.shape[0]).any():
            return super().generate(*args, beta=beta, **kwargs)
        if isinstance(beta, Tensor) or beta != 0 or form.get("condition_scale", 0.0) != 0:
            raise InputError(
                "ask: found it with beta or condition_scale, expected both to be 0 in generate, which "
                "reads each prompt once: guidance needs it without returns too; play with LanguagePolicy"
            )
        kwargs = {name: value for name, value in kwargs.items() if name not in ("input_ids", "inputs")}
        embeddings, mask = self._asked(ids, kwargs.pop("attention_mask", None), ask)
        options = kwargs | {"inputs_embeds": embeddings, "attention_mask": mask}
        output = super().generate(None, *args[1:], beta=0.0, **options)
        new = output if isinstance(output, Tensor) else output.sequences
        whole = torch.cat([ids.repeat_interleave(len(new) // len(ids), 0), new], dim=1)
        if isinstance(output, Tensor):
            return whole
        output.sequences = whole
        return output

    def prepare_inputs_for_generation(self, input_ids: Tensor, inputs_embeds: Tensor | None = None, **kwargs):
        """As the base's. `generate` takes embeddings only where they are named here; some families pass them on with
        all else."""
        if inputs_embeds is not None:
            kwargs["inputs_embeds"] = inputs_embeds
        return super().prepare_inputs_for_generation(input_ids, **kwargs)

    def _asked(
        self, ids: Tensor, mask: Tensor | None, ask: float | str | Sequence[float | str]
    ) -> tuple[Tensor, Tensor]:
        """Embeddings (B,T,d) and mask (B,T) of prompts with a slot before every opening of the agent, left-padded."""
        if self.return_embedding is None:
            raise InputError(
                f"ask: found {shown(ask)}, but this model has no table of returns (algorithm: "
                "return_conditioned, condition: embedding)"
            )
        block = settings(self.config)["returns"]
        slots = Slots.from_block(block, self.get_input_embeddings().weight.shape[0], None)
        asks = [ask] * len(ids) if isinstance(ask, int | float | str) else list(ask)
        real = torch.ones_like(ids) if mask is None else mask
        rows = []
        for row, kept, asked in zip(ids, real.bool(), asks, strict=True):
            check_ask(asked)
            value = slots.scale.named_ask(asked) if isinstance(asked, str) else asked
            rows.append(with_slots(row[kept].tolist(), block["opening"], slots.ids(value), block.get("past_opening")))
        width = max(map(len, rows))
        padded = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=ids.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=ids.device)
        return self.return_embedding(padded, self.get_input_embeddings()), mask

    def forward_with_hidden(self, *args, **kwargs) -> tuple[Any, Tensor]:
        """The base's own outputs, and the decoder's last hidden states (B,T,d)."""
        args, kwargs = self._embedded(args, kwargs)
        outputs = super().forward(*args, **kwargs)
        decoder = self.get_decoder()
        hidden, decoder.last_hidden = decoder.last_hidden, None
        return outputs, hidden

    def _embedded(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Where there is a table of returns, inputs_embeds instead of input_ids; a hook on the model's embedding would
        see ids that it has no row for."""
        ids = args[0] if args else kwargs.get("input_ids")
        if self.return_embedding is None or ids is None:
            return args, kwargs
        embeddings = self.return_embedding(ids, self.get_input_embeddings())
        args, ids = ((None, *args[1:]), {}) if args else ((), {"input_ids": None})
        return args, kwargs | ids | {"inputs_embeds": embeddings}

    def q_values(self, hidden: Tensor, candidates: Tensor | None = None, target: bool = True) -> Tensor:
        """Q in fp32 of every token, (..., d) -> (H, ..., V), or of candidates (..., K), token ids: (H, ..., K)."""
        head = self.value_heads.target_q if target else self.value_heads.q
        lead = hidden.shape[:-1]
        if candidates is not None:
            candidates = candidates.reshape(-1, candidates.shape[-1])
        q = head(hidden.reshape(-1, hidden.shape[-1]), self.get_output_embeddings().weight, candidates)
        return q.view(q.shape[0], *lead, q.shape[-1])

    def v_values(self, hidden: Tensor) -> Tensor:
        """V, (..., d) -> (...). fp32."""
        return self.value_heads.v(hidden.reshape(-1, hidden.shape[-1])).view(hidden.shape[:-1])

    def update_targets(self, rate: float) -> None:
        """target ← rate · online + (1 − rate) · target, once per optimizer step."""
        self.value_heads.update_targets(rate)
        self.value_heads.follow(self.get_output_embeddings().weight)

    def freeze_targets(self) -> None:
        for head in self.value_heads.targets():
            head.requires_grad_(False)

    def _guided_logits(self, logits: Tensor, hidden: Tensor, beta: float | Tensor) -> Tensor:
        """logits (B,T,V) + β · advantage on what support and candidates leave, −inf elsewhere; hidden (B,T,d). A row
        whose β is 0 keeps its logits."""
        if self.value_heads is None:
            raise InputError(f"beta: found {beta}, but this model has no value heads; train them, or use 0")
        form = _sampling_form(self.config)
        if isinstance(beta, Tensor):
            beta = beta.view(-1, 1, 1)  # one per row
        scores = support_filter(logits.float(), form.get("support", 0.0))
        v = None if form.get("clip") is None else self.v_values(hidden)
        options = {"beta": beta, "q_reduce": form.get("q_reduce", "min"), "clip": form.get("clip")}
        if form.get("candidates") is None:
            guided = guide(scores, self.q_values(hidden), v, **options)
        else:
            best, index = scores.topk(min(form["candidates"], scores.shape[-1]), dim=-1)
            guided = guide(best, self.q_values(hidden, index), v, **options)
            guided = torch.full_like(scores, -torch.inf).scatter(-1, index, guided)
        return torch.where(beta == 0, logits.float(), guided) if isinstance(beta, Tensor) else guided

    def packed_logits(self, row: Tensor, state: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (N,V) behind the states (row, state) alone, each (N,), and the last hidden states (B,T,d) of all."""
        head = self.get_output_embeddings()
        handle = head.register_forward_pre_hook(lambda module, args: (args[0][row, state].unsqueeze(0),))
        try:
            outputs, hidden = self.forward_with_hidden(use_cache=False, **inputs)
        finally:
            handle.remove()
        return outputs.logits[0], hidden

    def _packed(
        self,
        kwargs: dict,
        steps: Mapping[str, Tensor],
        windows: int | None,
        scale: float,
        conservative: bool,
        condition_dropout: float,
        environment: Mapping[str, Tensor] | None,
    ) -> dict[str, Tensor]:
        """Per-step outputs; the LM head sees the N states only, and E more of the environment's."""
        row, state, action = steps["row"], steps["state"], steps["action"]
        inputs = {name: value for name, value in kwargs.items() if value is not None}  # peft names more than is given
        if self.training and condition_dropout > 0:
            inputs["input_ids"] = self._without_conditions(inputs["input_ids"], condition_dropout)
        extra = None
        if windows:
            extra = self._rows_behind(inputs, windows)
            inputs = {name: value[:windows] for name, value in inputs.items()}
        if environment is not None:
            row, state = (torch.cat([steps[name], environment[name]]) for name in ("row", "state"))
            action = torch.cat([action, inputs["input_ids"][environment["row"], environment["state"] + 1]])
        logits, hidden = self.packed_logits(row, state, **inputs)
        log_prob = -F.cross_entropy(logits.float(), action, reduction="none")
        packed = {"log_prob": log_prob[: len(steps["row"])]}
        if environment is not None:
            packed["environment_log_prob"] = log_prob[len(steps["row"]) :]
        if self.return_heads is not None:
            packed |= self._packed_outcomes(inputs["input_ids"], hidden, steps)
        if self.value_heads is None:
            return packed
        read = hidden.detach() if extra is None else torch.cat([hidden.detach(), extra])
        return packed | self._packed_values(hidden, read, steps, scale, conservative)

    def _packed_outcomes(self, input_ids: Tensor, hidden: Tensor, steps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The return heads' log-probability of what the M turns earned, and whether no return was asked for there."""
        turns = {name: column[steps["closes_turn"]] for name, column in steps.items()}
        row = turns["row"]
        log_prob = self.return_heads.log_prob(
            hidden[row, turns["open_state"]], hidden[row, turns["state"] + 1], outcomes(turns)
        )
        null = (input_ids <= self.get_input_embeddings().weight.shape[0]).all(1)[row] & turns["has_target"]
        return {"outcome_log_prob": log_prob, "outcome_counts": null}

    def _without_conditions(self, input_ids: Tensor, share: float) -> Tensor:
        """Null for every return in a random share of the rows: so the policy without a condition is learnt too."""
        null = self.get_input_embeddings().weight.shape[0]
        dropped = torch.rand(len(input_ids), 1, device=input_ids.device) < share
        return torch.where(dropped, input_ids.clamp(max=null), input_ids)

    @torch.no_grad()
    def _rows_behind(self, inputs: Mapping[str, Tensor], windows: int) -> Tensor | None:
        """Hidden states of the rows that only serve V of a next state; None where there are none.

        Ranks of a sharded model must run the decoder equally often, so among several a rank without such rows reads
        one row for nothing. A plain policy has no such rows on any rank.
        """
        extra = {name: value[windows:] for name, value in inputs.items()}
        wanted = len(extra["input_ids"]) > 0
        if not wanted:
            if self.value_heads is None or not _several_ranks():
                return None
            extra = {name: value[:1] for name, value in inputs.items()}
        decoder = self.get_decoder()
        decoder(use_cache=False, **self._embedded((), extra)[1])
        hidden, decoder.last_hidden = decoder.last_hidden, None
        return hidden if wanted else None

    def _packed_values(
        self, hidden: Tensor, read: Tensor, steps: Mapping[str, Tensor], scale: float, conservative: bool
    ) -> dict[str, Tensor]:
        """hidden: of the windows, (B,T,d). read: of all rows, without gradient, where next states are looked up."""
        heads, matrix = self.value_heads, self.get_output_embeddings().weight
        action = steps["action"].unsqueeze(1)
        states = _scale_gradient(hidden[steps["row"], steps["state"]], scale)  # (N,d)
        packed = {"q": heads.q(states, matrix, action).squeeze(-1), "v": heads.v(states)[0]}
        if conservative:
            packed["logsumexp_q"] = heads.q.logsumexp(states, matrix)
        with torch.no_grad():
            packed["target_q"] = heads.target_q(states, matrix, action).squeeze(-1).amin(0)
            packed["next_v"] = heads.v(read[steps["next_row"], steps["next_state"]])[0]
            packed["end_v"] = heads.v(read[steps["end_row"], steps["end_state"]])[0]
        if hasattr(heads, "utterance_q"):
            closing = {name: index[steps["closes_turn"]] for name, index in steps.items()}  # the M last actions
            packed |= self._packed_utterances(hidden, read, closing, scale)
        return packed

    def _packed_utterances(
        self, hidden: Tensor, read: Tensor, closing: Mapping[str, Tensor], scale: float
    ) -> dict[str, Tensor]:
        """Q of a whole turn is read behind its closing token, V before its first."""
        heads, row = self.value_heads, closing["row"]
        turns = _scale_gradient(hidden[row, closing["state"] + 1], scale)  # (M,d)
        opens = _scale_gradient(hidden[row, closing["open_state"]], scale)
        packed = {"utterance_q": heads.utterance_q(turns), "utterance_v": heads.utterance_v(opens)[0]}
        with torch.no_grad():
            packed["utterance_target_q"] = heads.utterance_target_q(turns).amin(0)
            packed["utterance_next_v"] = heads.utterance_v(read[closing["next_row"], closing["next_state"]])[0]
        return packed


@functools.cache
def guided_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The subclass "Guided" + base name of a causal LM class; a guided class is its own."""
    if issubclass(base, Guided):
        return base

    def forward(
        self,
        *args,
        beta=None,
        steps=None,
        windows=None,
        value_grad_scale=1.0,
        conservative=False,
        condition_dropout=0.0,
        environment=None,
        **kwargs,
    ):
        """The base's forward with two more uses.

        beta: a number or (B,); logits become logits + β · advantage under the stored sampling form; None and 0 leave
        the base's own.
        steps: packed action steps (data/batching.py). The result is then a dict: "log_prob" (N,) and with value heads
        "q" (H,N), "v" (N,), and without gradient "target_q" (N,) (the minimum), "next_v" (N,), "end_v" (N,). With
        utterance heads also, for the M steps that close a turn, "utterance_q" (H,M), "utterance_v" (M,), and without
        gradient "utterance_target_q" (M,), "utterance_next_v" (M,).
        Inputs are then input_ids and attention_mask, by name. windows: number of rows that have steps; the rows behind
        them only serve V of a next state and are read without gradient. None: all rows have steps.
        conservative: also "logsumexp_q" (H,N). value_grad_scale: share of the values' gradient that reaches the trunk.
        condition_dropout: share of rows whose returns become null in training mode, drawn anew each time.
        environment: row and state (E,) of tokens of the environment's turns; also "environment_log_prob" (E,).
        With return heads also, for the M steps that close a turn, "outcome_log_prob" (M,) and "outcome_counts" (M,),
        False where a return is asked for, which tells what the heads are to say.
        """
        if steps is not None:
            return self._packed(kwargs, steps, windows, value_grad_scale, conservative, condition_dropout, environment)
        outputs, hidden = self.forward_with_hidden(*args, **kwargs)
        if isinstance(beta, Tensor) or beta:
            keep = kwargs.get("logits_to_keep", 0)
            kept = hidden[:, slice(-keep, None) if isinstance(keep, int) else keep]
            outputs.logits = self._guided_logits(outputs.logits, kept, beta)
        return outputs

    # generate and Trainer read the signature: without the base's names GPT-2 loses its position ids, silently.
    own = [p for p in inspect.signature(forward).parameters.values() if p.kind is p.KEYWORD_ONLY]
    signature = inspect.signature(base.forward)
    parameters = sorted([*signature.parameters.values(), *own], key=lambda parameter: parameter.kind)
    forward.__signature__ = signature.replace(parameters=parameters)
    parts = {
        "forward": forward,
        "base_name": base.__name__,
        "__module__": base.__module__,  # elsewhere transformers takes a class for custom code, and skips its buffers
        "__doc__": f"{base.__name__} with value heads and rows for returns; see `Guided`.",
        "_keep_in_fp32_modules_strict": {*(base._keep_in_fp32_modules_strict or ()), *PARTS},
    }
    name = f"Guided{base.__name__}"
    # Old checkpoints, as those of Pythia, name some weights otherwise; transformers looks that up by the class's name.
    if (renamed := get_checkpoint_conversion_mapping(base.__name__)) is not None:
        register_checkpoint_conversion_mapping(name, renamed, overwrite=True)
    return type(name, (Guided, base), parts)


def _without_adapter(model: nn.Module) -> PreTrainedModel:
    """The model itself, or the one inside a PeftModel."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def attach(model: PreTrainedModel, value_heads: ValueHeadsConfig | None) -> PreTrainedModel:
    """Turns a causal LM, or the one in a PeftModel, into a guided one in place; returns the same object.

    value_heads: fresh heads instead of those that are there, if any; None leaves them as they are.
    """
    inner = _without_adapter(model)
    if not isinstance(inner, Guided):
        inner.__class__ = guided_class(type(inner))
        inner._add_parts(None, None, None)
    if value_heads is not None:
        inner.config.offline_lmrl = settings(inner.config) | {"value_heads": asdict(value_heads)}
        inner.value_heads = ValueHeads(value_heads, *inner.get_output_embeddings().weight.shape).to(inner.device)
        inner.value_heads.apply(inner._initialize_weights)
        inner.update_targets(1.0)
        inner.freeze_targets()
    return model


def attach_returns(model: PreTrainedModel, block: Mapping[str, Any]) -> PreTrainedModel:
    """Conditions a guided model on returns in place; returns the same object.

    block: becomes the config's block `returns` (`Slots.from_block`). Where it says `condition: embedding` the model
    gets a fresh table for its `bins`.
    """
    inner = _without_adapter(model)
    inner.config.offline_lmrl = settings(inner.config) | {"returns": dict(block)}
    if bins := _table_rows(inner.config):
        embedding = inner.get_input_embeddings()
        inner.return_embedding = ReturnEmbedding(bins, embedding.weight.shape[1]).to(embedding.weight.device)
        inner.return_embedding.reset(embedding)
    return model


def attach_return_heads(model: PreTrainedModel, block: Mapping[str, Any]) -> PreTrainedModel:
    """Gives a guided model fresh return heads in place; returns the same object.

    block: becomes the config's block `return_heads` (`ReturnHeads`).
    """
    inner = _without_adapter(model)
    inner.config.offline_lmrl = settings(inner.config) | {"return_heads": dict(block)}
    inner.return_heads = ReturnHeads(block, inner.get_output_embeddings().weight.shape[1]).to(inner.device)
    inner.return_heads.apply(inner._initialize_weights)
    return model


def slots_of(model: PreTrainedModel, renderer: Renderer) -> Slots | None:
    """How returns are told to a model; None where it was not trained with any."""
    block = settings(model.config).get("returns")
    return block and Slots.from_block(block, model.get_input_embeddings().weight.shape[0], renderer)


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Takes heads and table of returns off a guided model in place, and their blocks out of its config; returns the
    same object."""
    inner = _without_adapter(model)
    inner.value_heads = inner.return_embedding = inner.return_heads = None
    gone = ("value_heads", "returns", "return_heads", "sampling")
    inner.config.offline_lmrl = {name: block for name, block in settings(inner.config).items() if name not in gone}
    return model


def from_scratch(auto_class: type, spec: Mapping[str, Any], tokenizer, **extra: Any) -> PreTrainedModel:
    """A model of a causal LM's family with fresh weights, sized by the tokenizer.

    Args:
      auto_class: what it is for: one of transformers' auto classes for models.
      spec: {"model_type": "gpt2", "n_layer": 2, ...}, fields of that type's transformers config.
      extra: further fields, that nobody chose.
    Raises: InputError naming the field.
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
    except Exception as error:  # whatever is raised here is about the fields
        if wrong := re.search(r"Field '(\w+)' expected (.+?), got", str(error)):
            found = shown((sizes | fields).get(wrong[1]))
            raise InputError(f"model.scratch.{wrong[1]}: found {found}, expected {wrong[2]}") from error
        said = str(error).strip() or type(error).__name__
        raise InputError(
            f"model.scratch: found fields of which {model_type} cannot be made "
            f"({said.splitlines()[0]}), expected others"
        ) from error


def _require_room(auto_class: type, config: PreTrainedConfig) -> None:
    """Raises: InputError for a model that this machine cannot hold, before it tries to."""
    layers = getattr(config.get_text_config(), "num_hidden_layers", None) or 0
    if layers > MOST_LAYERS:
        raise InputError(f"model.scratch: found {layers} layers, expected at most {MOST_LAYERS}")
    with torch.device("meta"):
        model = auto_class.from_config(config, dtype=torch.float32)
    needed = sum(tensor.nbytes for tensor in chain(model.parameters(), model.buffers()))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise InputError(
            f"model.scratch: found fields of a model of {needed / 1e9:.3g} GB, expected at most this "
            f"machine's {memory / 1e9:.3g} GB"
        )


def build_model(spec: Mapping[str, Any], tokenizer) -> PreTrainedModel:
    """A guided model with fresh weights, without value heads; arguments and errors as `from_scratch`."""
    return attach(from_scratch(AutoModelForCausalLM, spec, tokenizer), None)


def find_device(name: str | torch.device | None) -> torch.device:
    """The device of this name; None = the first accelerator, else the CPU. Raises: InputError where there is none."""
    try:
        return torch.empty(0, device=name or ("cuda" if torch.cuda.is_available() else "cpu")).device
    except (RuntimeError, AssertionError, ImportError) as error:
        first = str(error).partition("\n")[0]
        raise InputError(f"device: found {shown(name)} ({first}), expected one that torch has, such as cpu") from error


def load_model(
    path_or_name: str | Path,
    *,
    value_heads: ValueHeadsConfig | None = None,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A guided model from a folder or hub name of any causal LM, guided or not, or from a LoRA folder.

    Heads on disk are loaded; where there are none, `value_heads` asks for fresh ones. A LoRA folder gives the
    PeftModel around the guided model (it passes on attributes and methods), with adapter and online heads trainable.

    Raises: InputError where there is no model or a reward model, where the config names heads whose weights are
    missing, and where other heads than those on disk are asked for.
    """
    name = str(path_or_name)
    if os.path.isfile(os.path.join(name, "adapter_config.json")):
        return _load_adapter(Path(name), dtype=dtype, trust_remote_code=trust_remote_code)
    with opening(name, "model"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    check_settings(name, settings(config))
    _require_no_reward_model(name, settings(config))
    with opening(name, "model"):
        guided = guided_class(_causal_lm_class(config, trust_remote_code))
    with opening(name, "model"):
        model, info = guided.from_pretrained(name, config=config, dtype=dtype, output_loading_info=True)
    _require_token_ids(name, model)
    stored = settings(config).get("value_heads")
    missing = [key for key in info["missing_keys"] if key.startswith(PARTS) and "target_q" not in key]
    if missing:
        part = missing[0].partition(".")[0].replace("_", " ")
        raise InputError(f"model: {name}: config.json names {part}, but {missing[0]} is not among the weights")
    if stored is None:
        return attach(model, value_heads)
    if value_heads is not None:
        check_same_heads(name, asdict(value_heads), asdict(ValueHeadsConfig(**stored)))
    return model


def _require_token_ids(name: str, model: PreTrainedModel) -> None:
    """Raises: InputError where config.json or generation_config.json names special tokens by what is no id."""
    for source in (model.config, model.generation_config):
        for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
            found = getattr(source, field, None)
            ids = found if isinstance(found, list) else [found]
            if not all(token is None or (isinstance(token, int) and not isinstance(token, bool)) for token in ids):
                raise InputError(f"model: {name}: {field}: found {shown(found)}, expected the id of a token, or ids")


def _causal_lm_class(config: PreTrainedConfig, trust_remote_code: bool) -> type[PreTrainedModel]:
    """The class that the auto class would choose, remote code too. The text part of some models has a config of its
    own that the auto class does not know; there the class is the causal LM that config.json names."""
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
    with opening(folder, "model"):
        base = peft.PeftConfig.from_pretrained(folder).base_model_name_or_path
    if not base:
        raise InputError(f"model: {folder}/adapter_config.json names no base model; LoRA needs one that is saved")
    block = read_settings(folder)
    _require_no_reward_model(folder, block)
    stored = block.get("value_heads")
    model = load_model(base, **options)  # its own heads, if any, are not those that lie with the adapter
    model = detach(model)
    if stored:
        model = attach(model, ValueHeadsConfig(**stored))
    model.config.offline_lmrl = block
    if "returns" in block:
        model = attach_returns(model, block["returns"])
    if "return_heads" in block:
        model = attach_return_heads(model, block["return_heads"])
    with opening(folder, "model"):
        model = peft.PeftModel.from_pretrained(model, folder, is_trainable=True)
    load_heads(model, folder)
    unfreeze_heads(model)
    return model


def check_same_heads(name: str, asked: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    """Raises: InputError where the heads asked for are not of the form of those that are there."""
    for field in ("kind", "heads", "utterance"):
        if asked[field] != stored[field]:
            raise InputError(
                f"value_heads.{field}: found {shown(asked[field])}, but {name} has heads with {stored[field]!r}; "
                "start from its plain policy or ask for the same"
            )


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; the nearest is {near[0]!r}" if near else ""
