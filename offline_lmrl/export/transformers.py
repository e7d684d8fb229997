"""Export of a run for transformers: base weights, heads, and a `generate` that decodes as the run does.

The folder needs torch and transformers, and nothing of this project:

    model.safetensors, config.json, tokenizer     the base model, with any adapter merged into it
    heads.safetensors                             the target heads and V, and as metadata the settings of the run
    custom_generate/generate.py                   decoding/distribution.py, followed by export/glue.py
    generation_config.json                        the run's temperature, filters, β, ending ids and longest reply

Each Q head becomes  Q(s,a) = z · [row[a], 1],  z = map · [h, 1]  (with relu for mlp heads), so that one function
computes all kinds: the last of the features z holds what depends on the state alone. mlp heads have one feature more,
which is always 1 and multiplies the bias of a token.
"""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from offline_lmrl.decoding import distribution
from offline_lmrl.decoding.config import DecodingConfig
from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.errors import InputError
from offline_lmrl.export import glue
from offline_lmrl.export.beside import Row, RunPlayer
from offline_lmrl.export.folder import set_generation, tokenizer_of
from offline_lmrl.export.forms import Request, Written, formula, samples_alike
from offline_lmrl.export.playing import GeneratePlayer
from offline_lmrl.export.prompts import encode_prompts
from offline_lmrl.export.returns import add_return_tokens, without_requests
from offline_lmrl.logs.trajectory import Turn
from offline_lmrl.models.adapters import part_of
from offline_lmrl.models.loading import find_device
from offline_lmrl.models.plain import plain, spell_returns
from offline_lmrl.models.value_heads import MLPQ, QHead, ScalarHead, TiedQ
from offline_lmrl.tokens.conditioning import STATE_ASKS

PROJECT_IMPORT = b"\nfrom offline_lmrl.decoding.distribution import Form, ModelOutputs, next_token\n"
IN_FORM = ("support", "q_reduce", "candidates", "clip", "condition_scale")  # settings that no request changes
PROBE = 16  # tokens of the reply to the probe
TRIED = 16  # prompts among which the probe is found


@dataclass(frozen=True)
class Transformers:
    """Base weights with a `custom_generate` of transformers that plays every form of decoding (`ExportForm`)."""

    def check(self, request: Request) -> None:
        """Check, from the run's settings only, that one pass per token and a number of a return are enough.

        Raises: InputError that names the setting.
        """
        saved, decoding = request.saved, request.decoding
        if "returns" not in saved:
            return
        for name in ("condition_scale", "beta"):
            if getattr(decoding, name) != 0:
                raise InputError(
                    f"{name}: found {getattr(decoding, name):g} on a return-conditioned model, expected 0: it needs a "
                    "second pass without the requested return, which custom_generate does not make; play the run "
                    "itself (serve, generate)"
                )
        if saved["returns"]["scale"]["per"] == "task":
            raise InputError(
                "returns: found bins of returns per task, expected the same for all: a request names no task"
            )
        if STATE_ASKS.fullmatch(str(decoding.ask)):
            raise InputError(
                f"ask: found {decoding.ask}, which is computed anew for every dialogue, expected a number, max or p90"
            )
        if saved.get("few_shot") is not None:
            raise InputError(
                "few_shot: found a run whose demonstrations show their own returns, expected one without "
                "demonstrations; use --to plain"
            )

    def greedy(self, decoding: DecodingConfig) -> DecodingConfig:
        return replace(decoding, temperature=0.0)

    def write(self, policy: LanguagePolicy, request: Request, folder: Path) -> Written:
        decoding, tokenizer = request.decoding, tokenizer_of(policy.renderer)
        probe = find_probe(policy, request)
        heads, tensors = part_of(policy.model, "value_heads"), {}
        if heads is not None:
            tensors = head_tensors(heads.target_q, heads.v, policy.model.get_output_embeddings())
        settings = run_settings(policy, decoding)
        embedding = policy.model.return_embedding
        table = None if embedding is None else embedding.rows()
        model = plain(policy.model)
        decoder = model.get_decoder()
        settings["decoder"] = next(name for name, module in model.named_modules() if module is decoder)
        settings["relu"] = heads is not None and isinstance(heads.target_q, MLPQ)
        set_settings(model, policy.renderer.close_id, decoding)
        if table is not None:
            ids = add_return_tokens(tokenizer, len(table))
            spell_returns(model, table, ids)
            settings["requests"] = [[token] for token in ids]
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        save_file(tensors, folder / "heads.safetensors", {"run": json.dumps(settings)})
        (folder / "custom_generate").mkdir()
        (folder / "custom_generate" / "generate.py").write_bytes(generate_code())
        lines = _lines(decoding, probe)
        return Written(lines, _card(policy, request, lines, probe), (), _usage(request.output, probe))

    @contextmanager
    def player(self, policy: LanguagePolicy, request: Request, folder: Path) -> Iterator[GeneratePlayer]:
        """Load the folder and play it; the folder inserts the requested return itself."""
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True)
        model, tokens = model.to(find_device(request.device)).eval(), policy.return_tokens
        opening = policy.renderer.agent_opening
        yield GeneratePlayer(model, lambda ids: without_requests(ids, tokens, opening))

    def bounded(self, row: Row) -> Row:
        return samples_alike(row)


def generate_code() -> bytes:
    """Return custom_generate/generate.py: the formula and the glue, whose import of the formula is left out."""
    formula, own = (Path(module.__file__).read_bytes() for module in (distribution, glue))
    return formula + b"\n\n" + own.replace(PROJECT_IMPORT, b"")


@torch.no_grad()
def head_tensors(q: QHead, v: ScalarHead, lm_head: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of Q heads and of V in the form that the module's docstring describes, on the CPU, fp32.

    Tied heads have no "q.rows" if the exported LM head has their rows.
    """
    heads, width = len(q.state_dict().get("map", q.state_dict().get("weight"))), q.width
    inner = 2 * width + 1 if isinstance(q, MLPQ) else width
    mapped, found = torch.zeros(heads, inner + 1, width + 1), {}
    if isinstance(q, MLPQ):
        mapped[:, : 2 * width, :width], mapped[:, : 2 * width, width] = q.hidden_weight, q.hidden_bias
        mapped[:, 2 * width, width] = 1.0
        found["q.rows"] = torch.cat([q.weight, q.bias.unsqueeze(-1)], -1)
    elif isinstance(q, TiedQ):
        mapped[:, :width, :width] = q.row_scale * q.map
        mapped[:, width, :width], mapped[:, width, width] = q.state_weight, q.state_bias
        if not q.uses_weight_of(lm_head):  # merging an adapter changes the LM head, which Q does not follow
            found["q.rows"] = q.rows(lm_head.weight).clone()
    else:
        mapped[:, :width, :width], mapped[:, width, width] = torch.eye(width), q.constant
        found["q.rows"] = q.weight
    own = torch.zeros(1, 2 * width + 1, width + 1)
    own[0, : 2 * width, :width], own[0, : 2 * width, width] = v.hidden_weight[0], v.hidden_bias[0]
    own[0, 2 * width, width] = 1.0
    found |= {"q.map": mapped, "v.map": own, "v.weight": torch.cat([v.weight[0], v.bias])}
    return {name: tensor.detach().float().cpu().contiguous() for name, tensor in found.items()}


def run_settings(policy: LanguagePolicy, decoding: DecodingConfig) -> dict[str, Any]:
    """Return the settings that the glue reads, as plain values, but for the names of modules."""
    form = {name: value for name, value in asdict(decoding).items() if name in IN_FORM}
    settings = {"form": form, "beta": decoding.beta, "stop_strings": list(decoding.stop), "requests": []}
    if (tokens := policy.return_tokens) is None:
        return settings
    table = tokens.scale.table()
    return settings | {
        "requests": [list(tokens.null), *map(list, tokens.bins)],
        "ask": tokens.scale.value_of(decoding.ask),
        "edges": list(table.edges),
        "quantiles": {f"p{i}": value for i, value in enumerate(table.quantiles)} | {"max": table.quantiles[-1]},
        "opening": list(policy.renderer.agent_opening),
        "past_opening": list(policy.renderer.past_opening),
    }


def set_settings(model: PreTrainedModel, close_id: int, decoding: DecodingConfig) -> None:
    """Store the run's settings in the generation config of a model, from which the glue takes them, in place."""
    drawing = {}
    if decoding.temperature > 0:
        names = ("temperature", "top_p", "min_p")
        drawing = {name: value for name in names if (value := getattr(decoding, name)) is not None}
        drawing["top_k"] = decoding.top_k or 0
    set_generation(model, close_id, drawing)
    config = model.generation_config
    config.max_new_tokens, config.beta = decoding.max_new_tokens, decoding.beta
    if config.pad_token_id is None:
        config.pad_token_id = close_id


@dataclass(frozen=True)
class Probe:
    """A request whose answer shows whether an engine plays the run or the base model.

    body: the request of /v1/chat/completions, or of /v1/completions where there is no chat template.
    run: the run's greedy reply, PROBE tokens at most.
    base: the base model's.
    """

    body: Mapping[str, Any]
    run: str
    base: str


def find_probe(policy: LanguagePolicy, request: Request) -> Probe | None:
    """Return a probe: of TRIED prompts, the one whose greedy replies differ first; None if none differs."""
    decoding = replace(request.decoding, temperature=0.0, max_new_tokens=PROBE)
    histories = [history for history in request.prompts if _body(policy, history) is not None][:TRIED]
    ids, player = encode_prompts(policy, histories, decoding.ask), RunPlayer(policy)
    guided = player.play([prompt.asked for prompt in ids], decoding, 0)
    # Without the glue, nothing is inserted into the prompt either.
    bare = [_bare(policy, prompt.asked) for prompt in ids]
    plain_replies = player.play(bare, replace(decoding, beta=0.0, condition_scale=0.0), 0)
    found = []
    for place, pair in enumerate(zip(guided, plain_replies, strict=True)):
        first = next((i for i, tokens in enumerate(zip(*pair, strict=False)) if tokens[0] != tokens[1]), None)
        if first is not None:
            found.append((first, place))
    if not found:
        return None
    _, place = min(found)
    tokenizer = policy.renderer.tokenizer
    texts = [tokenizer.decode(replies[place], skip_special_tokens=True) for replies in (guided, plain_replies)]
    return Probe(_body(policy, histories[place]), *texts)


def _bare(policy: LanguagePolicy, ids: Sequence[int]) -> list[int]:
    return without_requests(ids, policy.return_tokens, policy.renderer.agent_opening)


def _body(policy: LanguagePolicy, history: Sequence[Turn]) -> dict[str, Any] | None:
    """Return the part of a request that holds the prompt; None if its text is not encoded as in training."""
    renderer = policy.renderer
    (ids,) = encode_prompts(policy, [history], None)
    expected = _bare(policy, ids.asked)
    messages = [{"role": turn.role, "content": turn.content} for turn in history]
    if renderer.template == "plain" or renderer.tokenizer.chat_template is None:
        text = renderer.printer.printed(history, prompt=True, before="")
        found = renderer.tokenizer(text, add_special_tokens=False)["input_ids"]
        body = {"prompt": text}
    else:
        try:
            text = renderer.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception:  # a template refuses dialogues of a form that it does not know, by an error of its own
            return None
        found, body = renderer.tokenizer(text, add_special_tokens=False)["input_ids"], {"messages": messages}
    return body if found == expected else None


def _lines(decoding: DecodingConfig, probe: Probe | None) -> list[str]:
    first = f"plays: {formula(decoding)}"
    if decoding.ask is not None:
        first += f", with the return {decoding.ask} requested"
    how = "greedily" if decoding.temperature == 0 else f"at temperature {decoding.temperature:g}"
    lines = [f"{first}, {how}"]
    if probe is None:
        lines.append("no probe: run and base model reply alike to all prompts")
    return lines


def _usage(folder: Path, probe: Probe | None) -> list[str]:
    lines = ["", f"play: transformers serve {shlex.quote(str(folder))} --trust-remote-code"]
    if probe is not None:
        lines += ["probe: " + line for line in _probe_lines(probe, str(folder))]
    return lines


def _probe_lines(probe: Probe, model: str) -> list[str]:
    door = "chat/completions" if "messages" in probe.body else "completions"
    body = {"model": model, **probe.body, "temperature": 0, "max_tokens": PROBE}
    text = json.dumps(body, ensure_ascii=False)
    address = f"http://localhost:8000/v1/{door}"
    return [
        f"curl -s {address} -H 'Content-Type: application/json' -d {shlex.quote(text)}",
        f"the run answers: {probe.run!r}",
        f"the base model answers: {probe.base!r}",
    ]


def _card(policy: LanguagePolicy, request: Request, lines: Sequence[str], probe: Probe | None) -> list[str]:
    from jinja2 import Template

    decoding = request.decoding
    text = Template(Path(__file__).with_name("transformers.md.j2").read_text(encoding="utf-8")).render(
        model_type=policy.model.config.model_type,
        algorithm=request.saved["algorithm"],
        lines=lines,
        probe=probe and _probe_lines(probe, "FOLDER"),
        stop=" or ".join(map(repr, decoding.stop)),
        most=decoding.max_new_tokens,
        returns=policy.return_tokens is not None,
        ask="none" if decoding.ask is None else decoding.ask,
    )
    return text.splitlines()
