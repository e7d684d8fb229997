"""The plugin by which vLLM plays guided runs.

vLLM loads this module itself, by the entry point `vllm.general_plugins`; nothing of this project imports it.
`register` adds an architecture "Guided…" for each of ARCHITECTURES. A folder that `export --to vllm` wrote names the
base architecture, under which vLLM refuses it, as it finds weights of value heads that the base has not. It plays it
with

    --hf-overrides '{"architectures": ["GuidedLlamaForCausalLM"]}'

Three parts play together. The model (`GuidedModel`) has value heads beside the weights of its base class, and keeps
the hidden states from which it has just computed logits. The logits processor (`ValueGuidance`) adds the guidance of
each request to its logits. The checks of the engine's settings (`GuidedConfig`) switch that processor on, for guided
architectures alone, and refuse what would play without guidance.
"""

import functools
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from vllm import ModelRegistry
from vllm.config import VllmConfig
from vllm.distributed import tensor_model_parallel_all_gather, tensor_model_parallel_all_reduce
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from offline_lmrl.decoding.distribution import Form
from offline_lmrl.export.vllm_guidance import (
    ARCHITECTURES,
    PREFIX,
    LMHead,
    PlayedHeads,
    check_request,
    guided_logits,
    request_form,
    stored_form,
)
from offline_lmrl.models.value_heads import ValueHeadsConfig

_MODELS: "WeakValueDictionary[str, GuidedModel]" = WeakValueDictionary()  # of this process, by the engine's instance


class GuidedConfig:
    """The part of the settings' checks that guided architectures add to those of their base."""

    @classmethod
    def verify_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Switch value guidance on.

        Raises: ValueError if the folder has no value heads, or an engine with these settings would play it otherwise
          than the run does.
        """
        super().verify_and_update_config(vllm_config)
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        if not _metadata(vllm_config).get("value_heads"):
            raise ValueError(
                f"{model.model}: found no value heads in config.json, expected what export --to vllm wrote"
            )
        refused = {
            "speculative decoding": vllm_config.speculative_config is not None,
            "vLLM's V2 model runner (start with VLLM_USE_V2_MODEL_RUNNER=0)": vllm_config.use_v2_model_runner,
            "LoRA adapters": vllm_config.lora_config is not None,
            f"quantization {model.quantization}": model.quantization is not None,
            "pipeline parallelism": parallel.pipeline_parallel_size > 1,
            "batch-sharded sampling": bool(parallel.enable_batch_sharded_sampling),
        }
        for found, is_on in refused.items():
            if is_on:
                raise ValueError(f"value guidance: found {found}, expected it off, as replies would not be the run's")
        model.logits_processors = [*(model.logits_processors or ()), f"{__name__}:{ValueGuidance.__name__}"]


def register() -> None:
    """Add the guided architectures to vLLM; it calls this in every one of its processes, perhaps more than once."""
    for base in ARCHITECTURES:
        name = PREFIX + base
        ModelRegistry.register_model(name, f"{__name__}:{name}")
        checks = MODELS_CONFIG_MAP.get(base, VerifyAndUpdateConfig)
        MODELS_CONFIG_MAP[name] = type(name, (GuidedConfig, checks), {})


def _metadata(vllm_config: VllmConfig) -> dict[str, Any]:
    """Return the run metadata in config.json; {} if there is none."""
    return vllm_config.model_config.hf_config.to_dict().get("offline_lmrl") or {}


class GuidedModel:
    """The mixin that `guided_class` adds to a causal LM of vLLM.

    After logits of N rows have been computed, `lm_head_used` is the layer that gave them, and `hidden` are the rows
    (N, d) that entered it.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any):
        super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
        config = vllm_config.model_config.hf_text_config
        heads = ValueHeadsConfig(**_metadata(vllm_config)["value_heads"])
        self.value_heads = PlayedHeads(heads, config.vocab_size, config.hidden_size)
        # Families differ in where their LM head is and in what they pass to it, but all pass it to this layer.
        self.logits_processor.register_forward_pre_hook(self._keep)
        self.lm_head_used, self.hidden = None, None
        _MODELS[vllm_config.instance_id] = self

    def _keep(self, layer: nn.Module, args: tuple) -> None:
        # A tuple, since a module as an attribute would become a child a second time.
        self.lm_head_used, self.hidden = (args[0],), args[1]

    def guide(self, logits: Tensor, rows: list[int], forms: list[Form]) -> Tensor:
        """Guide some rows of the logits that were computed last.

        Args:
          logits: (B, V), fp32.
          rows: the rows to guide; at least one.
          forms: the form of each of them.
        Returns: (B, V); rows that are not guided stay as they are.
        """
        hidden, (layer,) = self.hidden, self.lm_head_used
        if len(hidden) != len(logits):
            raise RuntimeError(f"found {len(hidden)} hidden states and {len(logits)} rows of logits, expected as many")
        lm_head = LMHead(layer.weight, logits.shape[-1])
        if layer.tp_size > 1:
            first = layer.shard_indices.padded_org_vocab_start_index
            shared = {"add": tensor_model_parallel_all_reduce, "gather": tensor_model_parallel_all_gather}
            lm_head = LMHead(layer.weight, logits.shape[-1], first, **shared)
        if len(rows) == len(logits):
            return guided_logits(logits, forms, self.value_heads.outputs(hidden, lm_head))
        index = torch.tensor(rows, device=logits.device)
        outputs = self.value_heads.outputs(hidden[index], lm_head)
        return logits.index_copy(0, index, guided_logits(logits[index], forms, outputs))


@functools.cache
def guided_class(base: type[nn.Module]) -> type[nn.Module]:
    """Return the guided subclass of a causal LM of vLLM."""
    return type(PREFIX + base.__name__, (GuidedModel, base), {"__module__": __name__})


def __getattr__(name: str) -> type[nn.Module]:
    """Return the class of a guided architecture, which vLLM looks up by its name when it loads one."""
    base = name.removeprefix(PREFIX)
    if base == name or base not in ARCHITECTURES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return guided_class(ModelRegistry.models[base].load_model_cls())


class ValueGuidance(LogitsProcessor):
    """The logits processor that adds the guidance of each request.

    `forms` holds the form of each guided request, by its row in the batch.
    """

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        check_request(sampling_params)

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool):
        self.stored = stored_form(_metadata(vllm_config)["decoding"])
        self.instance = vllm_config.instance_id
        self.forms: dict[int, Form] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def _form(self, params: SamplingParams, *_: Any) -> Form | None:
        form = request_form(self.stored, params)
        return form if form.guided else None

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self.forms, batch_update, self._form)

    def apply(self, logits: Tensor) -> Tensor:
        if not self.forms:
            return logits
        rows = sorted(self.forms)
        return _MODELS[self.instance].guide(logits, rows, [self.forms[row] for row in rows])
