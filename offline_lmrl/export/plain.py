"""Export of a run as a plain checkpoint of its base architecture, which any inference engine can serve, with a model
card.

A run is the folder that `train` wrote; a plain checkpoint is a transformers folder that needs no code of this project.
It generates exactly as the run does for policies without value guidance; for guidance by Q heads that are linear in
the hidden state, whose mean or first is used, over all tokens and without a filter or a clip, because such a Q can be
added to the LM head's weights; and for requested returns, which are text or become special tokens of the vocabulary.
It is then loaded again and compared with the run before the folder gets its final name. To fold any other guidance is
not safe: without the filter that the run applies to the policy before guidance, the Q of tokens that the data never
contained would decide. Such guidance is distilled into the weights (export/distill.py).

The example prompt is a short prompt of one user turn (EXAMPLE), in the format of the run's training. It is printed in
the model card and used in the comparison. For a return-conditioned run it requests the highest return.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from offline_lmrl.decoding.config import DecodingConfig
from offline_lmrl.decoding.distribution import TERMS, Form
from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.errors import InputError
from offline_lmrl.export.beside import Row
from offline_lmrl.export.distill import (
    Distillation,
    bounded_distilled,
    distil,
    logged_texts,
    measure,
    plain_decoding,
)
from offline_lmrl.export.folder import EXAMPLE, prompt_section, set_generation, tokenizer_of
from offline_lmrl.export.forms import Request, Written, formula, samples_alike
from offline_lmrl.export.playing import GeneratePlayer
from offline_lmrl.export.prompts import data_of_run, encode_prompts
from offline_lmrl.export.returns import add_return_tokens, return_names, returns_section
from offline_lmrl.models.loading import find_device
from offline_lmrl.models.plain import add_to_lm_head, head_scale, plain, q_matrix, spell_returns
from offline_lmrl.models.step_outputs import compute_step_outputs
from offline_lmrl.tokens.batching import token_rows
from offline_lmrl.tokens.conditioning import texts_of
from offline_lmrl.tokens.windows import WindowRule, policy_window

TOLERANCE = 1e-3  # nats by which the log-probability of a token may differ between checkpoint and run
DRAWN = (4, 16)  # number and length in tokens of the random texts on which checkpoint and run are compared
REPLY = 24  # largest number of tokens of the run's reply to the example prompt, on which they are compared too
UNLIMITED = 2**31  # max_length of a window that drops no turn


@dataclass(frozen=True)
class PlainWritten(Written):
    """What is known of a written checkpoint.

    Returns are divided into ranges, called bins; a return is requested by the special token of its bin.

    difference: largest absolute difference between a token's log-probability under the checkpoint and under the run,
      in nats.
    states: number of prefixes (states) at which all log-probabilities were compared.
    returns: texts of the special tokens that request a return: first that for "no return requested", then one per bin,
      lowest first. Empty if the run requests returns as text or is not return-conditioned.
    readable: True if the exported tokenizer encodes the text of the example prompt to the same ids as in training.
    """

    difference: float = 0.0
    states: int = 0
    returns: Sequence[str] = ()
    readable: bool = True


def _lines(decoding: DecodingConfig, returns: Sequence[str], readable: bool, how: str, exact: str) -> list[str]:
    """Return what the checkpoint plays and how exact it is, one fact per line.

    Args:
      decoding: the settings that it reproduces.
      returns, readable: as for `PlainWritten`.
      how: how guidance came into the weights.
      exact: how exact the checkpoint is.
    """
    line = "plays: the policy without value guidance"
    if decoding.beta != 0:
        line = f"plays: {formula(decoding)}, {how}"
    if returns:
        line += f"; {returns[1]} to {returns[-1]} request a return, {returns[0]} requests none"
    lines = [line, exact]
    if decoding.stop:
        texts = " or ".join(map(repr, decoding.stop))
        lines.append(f"the run also ends a reply before {texts}: set these stop texts in the engine")
    if decoding.temperature == 0:
        lines.append("the run decodes greedily: engines that do not read do_sample need temperature 0")
    if not readable:
        lines.append("the tokenizer reads the example prompt differently from training: send token ids, not text")
    return lines


@dataclass(frozen=True)
class _Sample:
    """Texts on which the checkpoint is compared with the run.

    ids: (B, T) long, B texts of T tokens, in the run's token ids.
    log_prob: (B·T, C), the run's log-probabilities of the next token after each prefix, normalised over the C tokens
      of the vocabulary other than those that request a return.
    """

    ids: Tensor
    log_prob: Tensor


@dataclass(frozen=True)
class Plain(Distillation):
    """Weights of the base architecture: exactly the run's policy, or distilled from it (`ExportForm`)."""

    def check(self, request: Request) -> None:
        """Check, from the run's settings and data, that a plain checkpoint can hold the run's policy."""
        _check_exportable(request.saved, request.decoding)
        misfit, remedy = _misfit(request.saved, request.decoding)
        if misfit:
            try:
                data_of_run(request.run, ("train",))
            except InputError as error:
                raise InputError(
                    f"beta: found {request.decoding.beta:g} {misfit}, expected guidance that folds into the LM head "
                    "exactly, or a run whose training data can be read, to distil it: use the run itself (evaluate, "
                    f"generate), or export another policy with {remedy}--beta 0, after you have evaluated it"
                ) from error

    def greedy(self, decoding: DecodingConfig) -> DecodingConfig:
        """Return settings for the greedy reply of an engine, which divides folded guidance by no temperature."""
        return replace(decoding, temperature=0.0, beta=decoding.beta * (decoding.temperature or 1.0))

    def write(self, policy: LanguagePolicy, request: Request, folder: Path) -> PlainWritten:
        """Write the checkpoint, load it again and compare its distribution with the run's.

        Raises: InputError if guidance was folded and a log-probability differs, or the model cannot be written as
          plain weights.
        """
        write = self._write_distilled if _is_distilled(policy, request) else _write_exact
        return write(policy, request, folder)

    def _write_distilled(self, policy: LanguagePolicy, request: Request, folder: Path) -> PlainWritten:
        """Distil the run, write the weights, and measure what engines read."""
        saved, decoding = request.saved, request.decoding
        tokenizer = tokenizer_of(policy.renderer)
        logged = logged_texts(policy, data_of_run(request.run, ("train",))[1], self.prompts)
        model = distil(policy, logged, self)
        set_generation(model, policy.renderer.close_id, _drawing(plain_decoding(decoding)))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        example, readable = _example(policy, saved, tokenizer, ())
        exported = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(policy.model.device).eval()
        ids = [prompt.asked for prompt in encode_prompts(policy, request.prompts, None)]
        rows = measure(policy, exported, ids)
        how = f"distilled into the weights in {self.steps} steps, because it does not fold exactly"
        lines = _lines(decoding, (), readable, how, f"near: KL(run ‖ export) is {rows[0].export:.3g} nats per token")
        card = _card(policy, saved, decoding, (), lines, example)
        return PlainWritten(lines, card, rows, (), bounded_distilled, readable=readable)

    @contextmanager
    def player(self, policy: LanguagePolicy, request: Request, folder: Path) -> Iterator[GeneratePlayer]:
        """Load the checkpoint and play it; the run's ids that request a return become its special tokens."""
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        spelt: dict[int, int] = {}
        if policy.return_tokens is not None and policy.return_tokens.null:  # reserved ids, not text
            reserved = [policy.return_tokens.null[0], *(ids[0] for ids in policy.return_tokens.bins)]
            names = return_names(len(reserved))
            tokens = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(names)
            spelt = dict(zip(reserved, tokens, strict=True))
        model = model.to(find_device(request.device)).eval()
        yield GeneratePlayer(model, lambda ids: [spelt.get(token, token) for token in ids])

    def bounded(self, row: Row) -> Row | None:
        return samples_alike(row)


def _write_exact(policy: LanguagePolicy, request: Request, folder: Path) -> PlainWritten:
    """Write weights that play exactly as the run does, load them again and compare all log-probabilities."""
    saved, decoding = request.saved, request.decoding
    tokenizer = tokenizer_of(policy.renderer)
    embedding = policy.model.return_embedding
    table = None if embedding is None else embedding.rows()
    ids = [] if table is None else add_return_tokens(tokenizer, len(table))
    rows = policy.model.get_input_embeddings().weight.shape[0]
    samples = _samples(policy, saved, ids)
    model = _plain_model(policy.model, decoding)
    set_generation(model, policy.renderer.close_id, _drawing(decoding))
    if table is not None:
        spell_returns(model, table, ids)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    difference = _difference(folder, policy, samples, rows, ids)
    example, readable = _example(policy, saved, tokenizer, ids)
    states = sum(len(sample.log_prob) for sample in samples)
    returns = tokenizer.convert_ids_to_tokens(ids)
    exact = (
        f"exact: the largest difference of a log-probability from the run's is {difference:.1g} nats, "
        f"measured after {states} prefixes of random tokens and of the run's own text"
    )
    lines = _lines(decoding, returns, readable, "folded into the LM head", exact)
    card = _card(policy, saved, decoding, returns, lines, example)
    return PlainWritten(lines, card, (), (), None, difference, states, returns, readable)


def _is_distilled(policy: LanguagePolicy, request: Request) -> bool:
    """True if guidance is distilled, because it cannot be added to the LM head's weights.

    Raises: InputError if the model's logits are no multiple of its LM head, and there are no data to distil it on.
    """
    if request.decoding.beta == 0 or _misfit(request.saved, request.decoding)[0]:
        return request.decoding.beta != 0
    try:
        head_scale(policy.model)
    except InputError as misfit:
        try:
            data_of_run(request.run, ("train",))
        except InputError:
            raise misfit from None
        return True
    return False


def _check_exportable(saved: Mapping[str, Any], decoding: DecodingConfig) -> None:
    """Check, from the run's settings only, that a plain checkpoint can hold the run's policy.

    Args:
      saved: the run metadata: the settings saved with the model.
      decoding: the decoding settings to reproduce.
    Raises: InputError that names the setting.
    """
    if decoding.condition_scale != 0:
        raise InputError(
            f"condition_scale: found {decoding.condition_scale:g}, expected 0: guidance by returns reads each prompt "
            "twice, which inference engines do not do"
        )
    if decoding.beta == 0:
        if decoding.support > 0 and decoding.temperature > 0 and decoding.top_p not in (None, 1.0):
            raise InputError(
                f"support: found {decoding.support:g} with top_p {decoding.top_p:g}, expected one of them: "
                "engines filter by top_p first; give --support 0 or --top_p null, and evaluate the run with this "
                "before you serve it"
            )
        return
    if "returns" in saved:
        raise InputError(
            f"beta: found {decoding.beta:g} on a return-conditioned model, expected 0: Q is computed without a "
            "requested return, and engines do not read a prompt twice"
        )


def _misfit(saved: Mapping[str, Any], decoding: DecodingConfig) -> tuple[str, str]:
    """Return why guidance cannot be added to the LM head's weights, and the settings with which it could.

    With filters it cannot: engines apply them to the LM head's output and therefore after guidance, while the run
    filters π before guidance.

    Args:
      saved: the run metadata.
      decoding: the decoding settings to reproduce.
    Returns: two parts of a message; "" and "" if guidance folds, or there is none.
    """
    if decoding.beta == 0:
        return "", ""
    heads = saved["value_heads"]
    if heads["kind"] == "mlp":
        return "on mlp heads", ""
    folds = {name: values for term in TERMS for name, values in term.folds.items()}
    exact = {
        "q_reduce": folds["q_reduce"],  # listed first in the message
        "support": (0.0,),
        "candidates": (None,),
        **folds,
        "top_k": (None,),
        "top_p": (None, 1.0),
        "min_p": (None, 0.0),
    }
    if heads["heads"] == 1:  # every reduction of one head is that head
        del exact["q_reduce"]
    form = decoding.to_dict()
    wrong = {name: values[0] for name, values in exact.items() if form[name] not in values}
    if not wrong:
        return "", ""
    found = ", ".join(f"{name} {form[name]}" for name in wrong)
    given = " ".join(f"--{name} {_setting(value)}" for name, value in wrong.items())
    return f"with {found}", f"{given}, or with "


def _setting(value: Any) -> str:
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _plain_model(model: PreTrainedModel, decoding: DecodingConfig) -> PreTrainedModel:
    """Remove the heads from a guided model, in place, and add the guidance of these settings to its LM head's weights.

    Returns: the plain model.
    Raises: InputError if, with β other than 0, the logits are not a multiple of the LM head applied to the decoder's
      output.
    """
    rows = None
    if decoding.beta != 0:
        rows = q_matrix(model.value_heads.target_q, model.get_output_embeddings().weight, decoding.q_reduce)
    model = plain(model)
    if rows is not None:
        # The run adds guidance after dividing by the temperature; engines divide last, so multiply it by that here.
        add_to_lm_head(model, (decoding.temperature or 1.0) * decoding.beta / head_scale(model) * rows)
    return model


def _drawing(decoding: DecodingConfig) -> dict[str, Any]:
    """Return the settings of generation_config.json by which an engine samples as the run does.

    The filter `support` becomes min-p. `support` is defined at temperature 1, and min-p at the sampling temperature T,
    so min_p = support^(1/T); if the run also has min_p, the larger of the two is used.
    """
    if decoding.temperature == 0:
        return {}
    min_p = max(decoding.min_p or 0.0, decoding.support ** (1 / decoding.temperature))
    return {
        "temperature": decoding.temperature,
        "top_k": decoding.top_k or 0,
        "top_p": decoding.top_p or 1.0,
        "min_p": min_p or None,
    }


@torch.inference_mode()
def _samples(policy: LanguagePolicy, saved: Mapping[str, Any], ids: Sequence[int]) -> list[_Sample]:
    """Return the texts on which the checkpoint is compared with the run, with the run's log-probabilities.

    The first sample holds random token ids, ids that request a return included. The second holds the example prompt
    with the run's greedy reply.

    Args:
      policy: the run.
      saved: the run metadata.
      ids: ids of the checkpoint's special tokens: the one for "no return requested", then one per bin of returns,
        lowest first; empty if the checkpoint has no such tokens.
    """
    longest, rows = policy.window.max_length, policy.model.get_input_embeddings().weight.shape[0]
    columns = min([rows, *ids])  # ids below this are ordinary tokens, the same in run and checkpoint
    known = torch.arange(columns + len(ids))
    known[columns:] += rows - columns  # the run's ids for returns start after the last row of the embedding
    shape = (DRAWN[0], min(DRAWN[1], longest))
    drawn = known[torch.randint(len(known), shape, generator=torch.Generator().manual_seed(0))]
    played = torch.tensor([_example_ids(policy, saved)[-longest:]])
    for _ in range(min(REPLY, longest - played.shape[1])):
        best = _run_log_prob(policy, played)[-1:, :columns].argmax(-1, keepdim=True)
        played = torch.cat([played, best.cpu()], dim=1)
    return [_Sample(read, _run_log_prob(policy, read)[:, :columns].log_softmax(-1)) for read in (drawn, played)]


def _run_log_prob(policy: LanguagePolicy, read: Tensor) -> Tensor:
    """Return the run's logits of the next token for every prefix, with temperature and guidance, without filters.

    Args:
      policy: the run.
      read: (B, T) long, token ids of B texts.
    Returns: (B·T, vocabulary), not normalised.
    """
    decoding = policy.decoding
    form = Form(decoding.temperature, beta=decoding.beta, q_reduce=decoding.q_reduce)
    texts = token_rows(read.tolist(), [range(read.shape[1])] * len(read))
    outputs = compute_step_outputs(
        policy.model, texts, measure=lambda states: {"scores": states.distribution(form, normalised=False)}
    )
    return torch.from_numpy(outputs.measured["scores"]).to(policy.model.device)


@torch.inference_mode()
def _difference(
    folder: Path, policy: LanguagePolicy, samples: Sequence[_Sample], rows: int, ids: Sequence[int]
) -> float:
    """Load the checkpoint and measure the largest difference between its log-probabilities and the run's, in nats.

    Args:
      folder: folder of the checkpoint.
      policy: the run.
      samples: texts with the run's log-probabilities.
      rows: number of ordinary token ids of the run; its ids that request a return are rows, rows + 1, and so on.
      ids: the checkpoint's special token ids that request these returns, in the same order; empty if the checkpoint
        has no such tokens.
    Raises: InputError if the difference is not below TOLERANCE, or transformers cannot open the checkpoint.
    """
    device, difference = policy.model.device, 0.0
    try:
        exported = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    except ValueError as error:  # the text model inside some multimodal ones has a config that no auto class knows
        raise InputError(
            f"run: found a {type(policy.model.config).__name__}, which engines cannot open as a causal "
            f"LM ({str(error).splitlines()[0]}), expected a causal LM"
        ) from error
    spelt = torch.tensor([*range(rows), *ids])
    for sample in samples:
        read = spelt[sample.ids].to(device)
        logits = exported(input_ids=read, attention_mask=torch.ones_like(read), use_cache=False).logits
        scores = logits.flatten(0, 1)[:, : sample.log_prob.shape[1]].float() / (policy.decoding.temperature or 1.0)
        apart = (scores.log_softmax(-1) - sample.log_prob).abs().max()
        difference = max(difference, apart.nan_to_num(torch.inf).item())
    if not difference < TOLERANCE:
        remedy = "" if policy.decoding.beta == 0 else "; give --beta 0 to export the policy without guidance"
        raise InputError(
            f"run: found an export of {exported.config.model_type} that differs from the run by "
            f"{difference:.2g} nats, expected less than {TOLERANCE:g}: this run cannot be exported exactly{remedy}"
        )
    return difference


def _example_ids(policy: LanguagePolicy, saved: Mapping[str, Any]) -> list[int]:
    """Return the example prompt in the run's token ids.

    If the run was trained with returns, the prompt requests the highest one.

    Args:
      policy: the run.
      saved: the run metadata.
    """
    return_ids = [policy.return_tokens.bins[-1]] if "returns" in saved else None
    return policy_window(EXAMPLE, policy.renderer, WindowRule(max_length=UNLIMITED), return_ids=return_ids)


def _example(
    policy: LanguagePolicy, saved: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]
) -> tuple[str, bool]:
    """Return the example prompt as text, and check how `tokenizer` encodes it.

    Args:
      policy: the run.
      saved: the run metadata.
      tokenizer: the checkpoint's tokenizer.
      ids: ids of the checkpoint's special tokens: the one for "no return requested", then one per bin of returns,
        lowest first; empty if the checkpoint has no such tokens.
    Returns: the text; and True if `tokenizer` encodes it to the same ids as in training.
    """
    text = ""
    if "returns" in saved:  # the highest return
        text = tokenizer.convert_ids_to_tokens(ids[-1]) if ids else texts_of(saved["returns"])[-1]
    text = policy.renderer.printer.printed(EXAMPLE, prompt=True, before=text)
    expected = _example_ids(policy, saved)
    if ids:
        expected = [ids[-1] if token == policy.return_tokens.bins[-1][0] else token for token in expected]
    return text, tokenizer(text, add_special_tokens=False)["input_ids"] == expected


def _card(
    policy: LanguagePolicy,
    saved: Mapping[str, Any],
    decoding: DecodingConfig,
    returns: Sequence[str],
    report: Sequence[str],
    example: str,
) -> list[str]:
    return [
        f"# {policy.model.config.model_type}, trained by offline RL from logs",
        "",
        f"A run of offline_lmrl (algorithm {saved['algorithm']}) as a plain checkpoint: transformers and other "
        "engines load it in the same way as its base model.",
        "",
        *(f"- {line}" for line in report),
        "",
        *prompt_section(policy, saved, example),
        *returns_section(policy, saved.get("returns"), decoding.ask, returns),
    ]
