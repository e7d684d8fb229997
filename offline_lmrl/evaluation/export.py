"""A run as a plain checkpoint of its base architecture, which any engine serves, and a card that says what it plays.

Exact are: plain policies; Q heads that are linear in the hidden state, reduced by mean or first, over all tokens and
without a clip; and returns as tokens of the vocabulary. Other forms of guidance become the nearest of these, and how
far that is from them is measured on logs.
"""

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from offline_lmrl.data.batching import WindowDataset, encode_trajectories
from offline_lmrl.data.conditioning import ASK_NAMES, Slots, texts_of
from offline_lmrl.data.errors import InputError
from offline_lmrl.data.io import atomic_output, read_trajectories
from offline_lmrl.data.trajectory import Trajectory, Turn
from offline_lmrl.decoding.critic import log_encoder
from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.decoding.sampler import SamplingConfig
from offline_lmrl.evaluation.offline import CHUNK, decoding_log_prob, log_prompts
from offline_lmrl.models.adapters import settings
from offline_lmrl.models.guided import load_model
from offline_lmrl.models.plain import fold, logit_scale, plain, q_matrix, spell_returns
from offline_lmrl.ops.decoding import guide, warp_log_probs

TOLERANCE = 1e-3  # nats by which an exact export may differ from what the run says of a token
EXAMPLE = (Turn("user", "How are you?"),)


@dataclass(frozen=True)
class Divergence:
    """Means over logged agent tokens, in nats: KL of the run's decoding form to π (`before`), of the exported model to
    π (`after`), and of the form to the exported model (`between`). π: the run's policy at its temperature."""

    before: float
    after: float
    between: float
    agent_tokens: int

    def __str__(self) -> str:
        return (
            f"KL per token over {self.agent_tokens} logged agent tokens (nats): run to π {self.before:.4g}, "
            f"checkpoint to π {self.after:.4g}, run to checkpoint {self.between:.4g}"
        )


@dataclass(frozen=True)
class Export:
    """What was written; `str` prints it.

    form: what the checkpoint plays. converted: field of the decoding form -> what it was; "soft cap" where one makes
      the fold inexact. divergence: None where it was not measured. returns: text that asks for a return, null first,
      where the run knows returns as tokens; readable: whether a prompt with one in it is read as it was in training.
    """

    folder: Path
    form: SamplingConfig
    converted: Mapping[str, Any]
    divergence: Divergence | None
    returns: Sequence[str]
    readable: bool

    def __str__(self) -> str:
        form, converted = self.form, dict(self.converted)
        lines = ["plays: the policy as it is"]
        if form.beta != 0:
            lines = [f"plays: log π + {form.beta:g} · Q, {form.q_reduce} of the Q heads, folded into the LM head"]
        if self.returns:
            lines[0] += f", told a return by {self.returns[1]} to {self.returns[-1]}, or {self.returns[0]} for none"
        if not converted:
            lines.append("exact")
        if converted.pop("soft cap", False):
            lines.append("not exact: the base caps its logits behind the LM head")
        lines += [f"converted: {name} {found} to {getattr(form, name)}" for name, found in converted.items()]
        lines += [] if self.divergence is None else [str(self.divergence)]
        if not self.readable:
            lines.append("the tokenizer reads the example prompt otherwise than in training: serve ids, not text")
        return "\n".join(lines)


def export(
    run: str | Path,
    output: str | Path,
    data: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    **sampling: Any,
) -> Export:
    """Writes a checkpoint that plays as the run does, for engines that know nothing of this project.

    Args:
      run: a run directory. output: a folder that is not there yet.
      data: held-out logs; on them the decoding form is compared with the exported one. Needed where it has to change.
      device: where models are read; None = the first accelerator, else the CPU.
      sampling: settings that replace those saved with the run.
    Raises: InputError for what is no run of a policy, a folder that is there, and what cannot be exported.
    """
    output = Path(output)
    if output.exists():
        raise InputError(f"output: found {output}, which is there already, expected a new folder")
    logs = None if data is None else read_trajectories(data)
    # Whoever serves it asks for a return; here there may be no task to look a name up in, and no critic.
    policy = LanguagePolicy.load(run, device=device, **{**sampling, "ask": None})
    policy.model.eval()
    _check_exportable(run, policy, sampling.get("ask"))
    model = load_model(run).eval()
    saved = settings(policy.model.config).get("sampling") or {}
    form, converted = _nearest_form(SamplingConfig.from_dict({**saved, **sampling}))
    rows = None
    if form.beta != 0:
        rows = q_matrix(model.value_heads.target_q, model.get_output_embeddings().weight, form.q_reduce)
    table = None if model.return_embedding is None else model.return_embedding.rows()
    model = plain(model)
    if rows is not None:
        scale, linear = logit_scale(model)
        fold(model, (form.temperature or 1.0) * form.beta / scale * rows)
        converted |= {} if linear else {"soft cap": True}
    if converted and logs is None:
        raise InputError(_unmeasured(form, converted))
    tokenizer = copy.deepcopy(policy.renderer.tokenizer)
    if policy.renderer.template == "plain":
        tokenizer.chat_template = None  # not what the run was trained with
    ids: list[int] = []
    if table is not None:
        ids = _add_tokens(tokenizer, len(table))
        spell_returns(model, table, ids)
    _set_generation(model, form, policy.renderer.close_id)
    with atomic_output(output) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        del model
        exported = load_model(temporary).to(policy.model.device).eval()
        _check_same(policy, form, exported, ids, exact=not converted)
        divergence = None if logs is None else _divergence(policy, form, exported, ids, logs)
        example, readable = _example(policy, tokenizer, ids)
        report = Export(output, form, converted, divergence, tokenizer.convert_ids_to_tokens(ids), readable)
        (temporary / "README.md").write_text(_card(policy, report, example), encoding="utf-8")
    return report


def _check_exportable(run: str | Path, policy: LanguagePolicy, ask: float | str | None) -> None:
    saved, form = settings(policy.model.config), policy.sampling
    if ask is not None and policy.slots is None:
        raise InputError(f"ask: found {ask!r}, expected none, as this model was not trained with returns")
    algorithm = saved.get("algorithm")
    if algorithm in (None, "reward_model"):
        found = "a model that no run of this project wrote" if algorithm is None else "a reward model"
        raise InputError(f"run: found {found} in {run}, expected the run of a policy; such a folder is plain already")
    if form.condition_scale != 0:
        raise InputError(
            f"condition_scale: found {form.condition_scale:g}, expected 0: guidance by returns reads each prompt "
            "twice, which no plain engine does"
        )
    if form.beta != 0 and "returns" in saved:
        raise InputError(
            f"beta: found {form.beta:g} on a model that is told returns, expected 0: Q is read where none is asked "
            "for, and no plain engine reads a prompt twice"
        )
    if form.beta != 0 and saved["value_heads"]["kind"] == "mlp":
        raise InputError(
            f"beta: found {form.beta:g} on mlp heads, which do not fold into the LM head, expected heads "
            "that are tied or linear, or 0, which exports the policy without them"
        )


def _nearest_form(form: SamplingConfig) -> tuple[SamplingConfig, dict[str, Any]]:
    """The decoding form that a plain checkpoint can have, and the fields in which the given one is another.

    Engines filter what the LM head says, hence after guidance, but do all that is done to a policy without any.
    """
    exact: dict[str, Any] = {"support": 0.0}
    if form.beta != 0:
        exact |= dict.fromkeys(("candidates", "clip", "top_k", "top_p", "min_p"))
        exact["q_reduce"] = "mean" if form.q_reduce == "min" else form.q_reduce
    converted = {name: getattr(form, name) for name, value in exact.items() if getattr(form, name) != value}
    return replace(form, **exact), converted


def _unmeasured(form: SamplingConfig, converted: Mapping[str, Any]) -> str:
    if "soft cap" in converted:
        return (
            "run: found a base with a soft cap behind its LM head, through which Q does not fold exactly; give "
            "--data to convert it and measure the difference, or --beta 0"
        )
    name, found = next(iter(converted.items()))
    return (
        f"{name}: found {found!r}, expected {getattr(form, name)!r}, as a plain checkpoint cannot play otherwise; "
        "set it so, or give --data to convert it and measure the difference"
    )


def _add_tokens(tokenizer: PreTrainedTokenizerBase, count: int) -> list[int]:
    """Ids of new special tokens, that of no return first."""
    names = ["<return_none>", *(f"<return_{b}>" for b in range(1, count))]
    if known := set(names) & set(tokenizer.get_vocab()):
        raise InputError(f"tokenizer: found {min(known)} among its tokens, expected none of the names of returns")
    tokenizer.add_tokens([AddedToken(name, normalized=False, special=True) for name in names], special_tokens=True)
    return tokenizer.convert_tokens_to_ids(names)


def _set_generation(model: PreTrainedModel, form: SamplingConfig, close_id: int) -> None:
    """What an engine does by itself: ends a reply where the agent's turn ends, and draws as the run does."""
    generation = model.generation_config
    generation._from_model_config = False  # older engines would make it anew
    ends = generation.eos_token_id
    ends = {close_id, *(ends if isinstance(ends, list) else [] if ends is None else [ends])}
    generation.eos_token_id = sorted(ends) if len(ends) > 1 else close_id
    drawing = {"temperature": form.temperature, "top_k": form.top_k or 0, "top_p": form.top_p or 1.0,
               "min_p": form.min_p}  # fmt: skip
    generation.update(do_sample=form.temperature > 0,
                      **(drawing if form.temperature > 0 else dict.fromkeys(drawing)))  # fmt: skip


def _spelt(input_ids: Tensor, rows: int, ids: Sequence[int]) -> Tensor:
    """Ids as the exported model reads them; `rows`: where the run's reserved ids begin."""
    new = torch.tensor([*range(rows), *ids], device=input_ids.device)
    return new[input_ids]


@torch.inference_mode()
def _check_same(
    policy: LanguagePolicy, form: SamplingConfig, exported: PreTrainedModel, ids: Sequence[int], exact: bool
) -> None:
    """Compares the checkpoint with the run on made-up tokens. Raises: InputError where they differ and should not."""
    model = policy.model
    rows = model.get_input_embeddings().weight.shape[0]
    columns = min([rows, *ids])
    known = torch.arange(columns + len(ids))
    known[columns:] += rows - columns  # the reserved ids
    drawn = torch.randint(len(known), (4, 8), generator=torch.Generator().manual_seed(0))
    read = known[drawn].to(model.device)
    inputs = {"attention_mask": torch.ones_like(read), "use_cache": False}
    outputs, hidden = model.forward_with_hidden(input_ids=read, **inputs)
    expected = outputs.logits.float() / (form.temperature or 1.0)
    if form.beta != 0:
        expected = guide(expected, model.q_values(hidden), None, form.beta, form.q_reduce)
    expected = expected.flatten(0, 1)[:, :columns].log_softmax(-1)
    found = exported(input_ids=_spelt(read, rows, ids), **inputs).logits.flatten(0, 1)[:, :columns].float()
    found = (found / (form.temperature or 1.0)).log_softmax(-1)
    difference = (found - expected).abs().max().item()
    if exact and not difference < TOLERANCE:
        raise InputError(
            f"run: found an export of {exported.config.model_type} that differs from the run by "
            f"{difference:.2g} nats, expected less than {TOLERANCE:g}: this family cannot be exported"
        )


@torch.inference_mode()
def _divergence(
    policy: LanguagePolicy, form: SamplingConfig, exported: PreTrainedModel, ids: Sequence[int],
    logs: Sequence[Trajectory],
) -> Divergence:  # fmt: skip
    """KLs at every agent token of the logs. Raises: InputError where none fits the policy's window."""
    model, rows = policy.model, policy.model.get_input_embeddings().weight.shape[0]
    tokens = min([rows, *ids])  # without those of returns, which are suppressed
    encoder = log_encoder(policy)
    columns = encode_trajectories(logs, encoder, Counter(), log_prompts(policy, logs, None, encoder.slots))
    windows = WindowDataset(columns, policy.renderer.close_id, next_rows=False, end_rows=False)
    sums, size = torch.zeros(3, dtype=torch.float64), max(1, CHUNK // (rows * int(windows.lengths.max())))
    for index in torch.arange(len(windows)).split(size):
        batch = windows.batch(index.numpy())
        read, mask = (batch[name].to(model.device) for name in ("input_ids", "attention_mask"))
        row, state = (batch["steps"][name].to(model.device) for name in ("row", "state"))
        logits, hidden = model.packed_logits(row, state, input_ids=read, attention_mask=mask)
        q = v = None
        if form.beta != 0:
            q, v = model.q_values(hidden[row, state]), model.v_values(hidden[row, state])
        before = decoding_log_prob(policy, logits, q, v, policy.sampling.beta)[:, :tokens]
        found, _ = exported.packed_logits(row, state, input_ids=_spelt(read, rows, ids), attention_mask=mask)
        after = warp_log_probs(found[:, :tokens], form.temperature, form.top_k, form.top_p, form.min_p)
        base = warp_log_probs(logits[:, :tokens], form.temperature)
        sums += torch.stack([_kl(before, base), _kl(after, base), _kl(before, after)]).sum(-1).double().cpu()
    return Divergence(*(sums / windows.action_tokens).tolist(), windows.action_tokens)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p ‖ q) (N,) of log-probabilities (N,V); a token that p drops adds nothing."""
    return (p.exp() * (p - q).masked_fill(p == -torch.inf, 0.0)).sum(-1)


def _example(policy: LanguagePolicy, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[str, bool]:
    """The text of a prompt with everything in its place, and whether the tokenizer reads it as it was in training."""
    renderer, block = policy.renderer, settings(policy.model.config).get("returns")
    text, slot = "", ()
    if block is not None:  # the highest return
        text = tokenizer.convert_ids_to_tokens(ids[-1]) if ids else texts_of(block)[-1]
        slot = ids[-1:] if ids else policy.slots.bins[-1]
    encoded = renderer.encode(EXAMPLE)
    said = [token for ids in renderer.window_ids(EXAMPLE, encoded, 0, len(EXAMPLE), live=False) for token in ids]
    text = renderer.printer.printed(EXAMPLE, prompt=True, slot=text)
    expected = [*renderer.preamble_of(EXAMPLE), *said, *slot, *renderer.agent_opening]
    return text, tokenizer(text, add_special_tokens=False)["input_ids"] == expected


def _card(policy: LanguagePolicy, report: Export, example: str) -> str:
    saved, window = settings(policy.model.config), policy.window
    turns = "all" if window.context is None else f"at most {window.context}"
    stock = policy.renderer.differences(EXAMPLE)
    shown = "" if saved.get("prompt") is None else "; demonstrations of the task before all else"
    lines = [
        f"# {policy.model.config.model_type}, trained by offline RL from logs",
        "",
        f"A run of offline_lmrl (algorithm {saved['algorithm']}) as a plain checkpoint: transformers and other "
        "engines load it as they load its base model.",
        "",
        *(f"- {line}" for line in str(report).splitlines()),
        "",
        "## Prompts",
        "",
        f"As in training: turns before the agent's own: {turns}; tokens with the reply: {window.max_length}{shown}. "
        "A prompt reads",
        "",
        *(f"    {line}" for line in example.splitlines()),
        "",
        f"and the reply ends with {policy.renderer.tokenizer.convert_ids_to_tokens(policy.renderer.close_id)!r}.",
        *([] if stock is None else ["", f"The stock chat template prints something else: {stock}."]),
        *_returns_card(policy, saved.get("returns"), report),
    ]
    return "\n".join(lines) + "\n"


def _returns_card(policy: LanguagePolicy, block: Mapping[str, Any] | None, report: Export) -> list[str]:
    if block is None:
        return []
    slots, ask, tokens = policy.slots, report.form.ask, report.returns
    texts = tokens[1:] or list(map(repr, texts_of(block)))
    none = f"`{tokens[0]}`" if tokens else "nothing"
    lines = [
        "",
        "## Returns",
        "",
        "The return that is still asked for stands as text before every turn of the agent, the coming one and earlier "
        f"ones, as in the prompt above; {none} stands where none is asked for. After a turn that earned r, "
        f"what is left of R is (R − r) / {slots.discount_per_turn:g}; turns that were told something keep it.",
    ]
    if tokens:
        lines[-1] += (" `generation_config.json` suppresses these tokens in replies; engines that do not read "
                      "`suppress_tokens` have to be told not to emit them.")  # fmt: skip
    lines += ["", f"The run asks for {_asked(slots, ask, texts)}. The training data, in reward units:", "",
              "| task | text | from | to | training turns |", "|---|---|---|---|---|"]  # fmt: skip
    for task, table in slots.scale.tables.items():
        bounds = [table.least, *table.edges, table.most]
        rows = zip(texts, bounds, bounds[1:], table.counts, strict=False)  # the finest table has all bins
        lines += [f"| {task} | `{text}` | {low:g} | {high:g} | {count} |" for text, low, high, count in rows]
    return lines


def _asked(slots: Slots, ask: float | str | None, texts: Sequence[str]) -> str:
    if isinstance(ask, str) and not ASK_NAMES.fullmatch(ask):
        return f"{ask}, which is read from heads that this checkpoint does not have: choose a return"
    if ask is None or slots.scale.per == "task":
        return "none" if ask is None else f"{ask} of the task"
    value = slots.scale.named_ask(ask) if isinstance(ask, str) else ask
    return f"{ask}, `{texts[slots.scale.bin_of(value)]}`"
