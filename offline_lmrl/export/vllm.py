"""Export of a guided run for vLLM: a folder of the base architecture with value heads among its weights.

vLLM plays it by a plugin of this package (export/vllm_plugin.py), which has to be installed in vLLM's environment, and
an override of the architecture on its command line (`command_line`). Without either it refuses the folder, as it finds
weights that the base architecture has not, so that it never plays the base model by mistake.
"""

import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch
from transformers import PreTrainedModel

from offline_lmrl.decoding.config import DecodingConfig
from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.errors import InputError, listed
from offline_lmrl.export.beside import Row
from offline_lmrl.export.folder import EXAMPLE, prompt_section, set_generation, tokenizer_of
from offline_lmrl.export.forms import Request, Written, formula, samples_alike
from offline_lmrl.export.vllm_guidance import ARCHITECTURES, PREFIX
from offline_lmrl.models.plain import merged
from offline_lmrl.models.value_heads import TiedQ
from offline_lmrl.settings import setting

PLAYED = ("target_q.", "v.")  # of the value heads; the online Q heads and those of whole turns only train
HAS_BOTH = "from importlib.util import find_spec as f; print(bool(f('vllm') and f('offline_lmrl')))"


@dataclass(frozen=True)
class VLLM:
    """A folder that vLLM plays as the run does, by the plugin of this package (`ExportForm`)."""

    python: str | None = setting(
        None,
        "Interpreter of an environment with vLLM and this package, in which the export is played beside the run, such "
        "as .engines/bin/python after `make engines`; null = the present one.",
    )

    def check(self, request: Request) -> None:
        """Check, from the run's settings only, that vLLM can play the run, and that there is a vLLM to try it."""
        check_vllm(request.saved, request.decoding)
        if not request.force and not self._has_vllm():
            raise InputError(
                f"form.python: found no vLLM beside this package in {self.python or sys.executable}; give "
                "--form.python PYTHON, an interpreter that has both (make engines makes .engines/bin/python), or "
                "--force, which writes the export without playing it"
            )

    def _has_vllm(self) -> bool:
        command = [self.python or sys.executable, "-c", HAS_BOTH]
        try:
            return subprocess.run(command, capture_output=True, text=True, cwd="/").stdout.strip() == "True"
        except OSError as error:
            raise InputError(
                f"form.python: found {self.python} ({error.strerror}), expected an interpreter"
            ) from error

    def greedy(self, decoding: DecodingConfig) -> DecodingConfig:
        return replace(decoding, temperature=0.0)

    def write(self, policy: LanguagePolicy, request: Request, folder: Path) -> Written:
        """Write the folder.

        Raises: InputError if the plugin does not know the model's architecture.
        """
        saved, decoding = request.saved, request.decoding
        tokenizer = tokenizer_of(policy.renderer)
        example = policy.renderer.printer.printed(EXAMPLE, prompt=True)
        architecture = write_vllm(policy.model, decoding, policy.renderer.close_id, folder)
        tokenizer.save_pretrained(folder)
        serve = command_line(request.output, architecture)
        lines = [f"plays: {formula(decoding)}, inside vLLM, in an environment that has this package too"]
        if decoding.stop:
            texts = " or ".join(map(repr, decoding.stop))
            lines.append(f"the run also ends a reply before {texts}: send these as stop texts")
        if decoding.temperature == 0:
            lines.append("the run decodes greedily: send temperature 0, for which vLLM has no default in a folder")
        card = [
            f"# {policy.model.config.model_type}, trained by offline RL from logs, for vLLM",
            "",
            f"A run of offline_lmrl (algorithm {saved['algorithm']}): weights of the base model, and value heads.",
            "",
            *(f"- {line}" for line in lines),
            "",
            *prompt_section(policy, saved, example),
            "",
            "## Serve",
            "",
            f"    {serve}",
            "",
            "vLLM refuses this folder where this package is missing, and without the override of the architecture. "
            f"The run's replies have at most {decoding.max_new_tokens} tokens: send it as max_tokens. A request may "
            'bring its own weight of the values: `extra_body={"vllm_xargs": {"beta": 8}}` in the openai client, 0 = '
            "the base model. configs/guides/serving.md has the rest.",
        ]
        return Written(lines, card, (), ["serve it with:", serve])

    @contextmanager
    def player(self, policy: LanguagePolicy, request: Request, folder: Path) -> Iterator["VLLMPlayer | None"]:
        """Play the export in vLLM; None where there is no vLLM, which --force allows."""
        if not self._has_vllm():
            yield None
            return
        with tempfile.TemporaryFile("w+") as log:
            player = VLLMPlayer(self.python or sys.executable, folder, policy.sampler.close_ids, log)
            try:
                yield player
            finally:
                player.close()

    def bounded(self, row: Row) -> Row:
        return samples_alike(row)


def check_vllm(saved: Mapping[str, Any], decoding: DecodingConfig) -> None:
    """Check, from a run's settings only, that vLLM can play it.

    Args:
      saved: the run metadata.
      decoding: the decoding settings to reproduce.
    Raises: InputError that names the setting.
    """
    if "returns" in saved:
        raise InputError("run: found a return-conditioned run, expected one without requested returns for --to vllm")
    if decoding.beta == 0:
        raise InputError("beta: found 0, expected another number: vLLM plays a run without guidance as --to plain")


def write_vllm(model: PreTrainedModel, decoding: DecodingConfig, close_id: int, folder: Path) -> str:
    """Write the weights and configs of a guided model, or of a PeftModel around one, which is merged in place.

    Args:
      model: the run's model.
      decoding: the decoding settings to store.
      close_id: id of the token that ends an agent turn.
      folder: where to write.
    Returns: the architecture under which the plugin plays the folder.
    Raises: InputError if the plugin does not know the model's architecture, or Q would change with the merged weights.
    """
    rows = model.get_output_embeddings().weight.detach().clone()
    model = merged(model)
    if model.base_name not in ARCHITECTURES:
        raise InputError(f"run: found {model.base_name}, expected one of {listed(ARCHITECTURES)} for --to vllm")
    if isinstance(model.value_heads.target_q, TiedQ) and not torch.equal(rows, model.get_output_embeddings().weight):
        raise InputError("run: found an adapter on the LM head, expected none: tied Q heads read its rows without it")
    # Requests take their temperature from here. The form's filters are not here: vLLM would apply them after guidance.
    drawing = {"temperature": decoding.temperature, "top_k": 0} if decoding.temperature > 0 else {}
    set_generation(model, close_id, drawing)
    model.config.offline_lmrl |= {"decoding": decoding.to_dict()}
    played = tuple(f"value_heads.{part}" for part in PLAYED)
    weights = model.state_dict().items()
    kept = {name: value for name, value in weights if not name.startswith("value_heads.") or name.startswith(played)}
    model.save_pretrained(folder, state_dict=kept)
    return PREFIX + model.base_name


def command_line(folder: str | Path, architecture: str) -> str:
    """Return the command that serves a folder; `architecture` is what `write_vllm` returned."""
    overrides = shlex.quote(json.dumps({"architectures": [architecture]}))
    return (
        "VLLM_USE_V2_MODEL_RUNNER=0 python -m vllm.entrypoints.openai.api_server "
        f"--model {shlex.quote(str(folder))} --dtype float32 --hf-overrides {overrides}"
    )


def architecture_of(folder: Path) -> str:
    """Return the architecture under which the plugin plays a folder."""
    return PREFIX + json.loads((folder / "config.json").read_text())["architectures"][0]


class VLLMPlayer:
    """A `Player` (export/beside.py) that plays a folder by vLLM, in a process of another interpreter.

    Args:
      python: the interpreter.
      folder: what `write_vllm` wrote.
      ends: ids of tokens that end a reply.
      log: an open file, for what vLLM prints.
    """

    def __init__(self, python: str, folder: Path, ends: frozenset[int], log: IO[str]):
        self.python, self.folder, self.ends, self.log = python, folder, ends, log
        self.process: subprocess.Popen[str] | None = None

    def _start(self, longest: int) -> subprocess.Popen[str]:
        """Start the engine; `longest`: the largest number of tokens of a prompt with its reply."""
        # One process starts sooner than two, and its errors are in the log.
        fixed = {"VLLM_USE_V2_MODEL_RUNNER": "0", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1"} | os.environ | fixed
        process = subprocess.Popen(
            [self.python, "-m", "offline_lmrl.export.vllm_play"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment,
        )
        arguments = {
            "model": str(self.folder.resolve()),
            "hf_overrides": {"architectures": [architecture_of(self.folder)]},
            "dtype": "float32",
            "enforce_eager": True,
            "skip_tokenizer_init": True,
            "max_model_len": longest,
            "gpu_memory_utilization": 0.5,  # the run is on the same device
        }
        self._send(process, arguments)
        return process

    def _send(self, process: subprocess.Popen[str], message: Mapping[str, Any]) -> None:
        try:
            print(json.dumps(message), file=process.stdin, flush=True)
        except BrokenPipeError as error:
            raise self._died(process) from error

    def _died(self, process: subprocess.Popen[str]) -> InputError:
        process.wait()
        self.log.seek(0)
        lines = [line for line in self.log.read().splitlines() if line.strip()] or ["no message"]
        errors = [line for line in lines if "Error" in line] or lines
        return InputError(f"form.python: found a vLLM in {self.python} that does not play the export: {errors[-1]}")

    def play(self, prompts: Sequence[Sequence[int]], decoding: DecodingConfig, seed: int) -> list[list[int]]:
        """Reply to each prompt once (`Player`).

        Raises: InputError with vLLM's last error, if it ends.
        """
        if self.process is None:
            self.process = self._start(max(map(len, prompts)) + decoding.max_new_tokens)
        one = {"temperature": decoding.temperature, "max_tokens": decoding.max_new_tokens}
        one |= {"stop_token_ids": sorted(self.ends), "extra_args": {"beta": decoding.beta}}
        sampling = [one | {"seed": seed + i} for i in range(len(prompts))]
        self._send(self.process, {"prompts": [list(ids) for ids in prompts], "sampling": sampling})
        answer = self.process.stdout.readline()
        if not answer:
            raise self._died(self.process)
        return json.loads(answer)

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()
