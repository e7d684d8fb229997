"""`generate` of transformers by the formula above, with the heads and settings of the run in heads.safetensors."""

import copy
import json
import threading

import torch
from safetensors import safe_open
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, GenerationConfig, LogitsProcessorList
from transformers.utils import cached_file

from offline_lmrl.decoding.distribution import Form, ModelOutputs, next_token

FIXED = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "return_dict_in_generate": True}
ASSISTED = ("assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens", "use_mtp")
SEEN = threading.local()  # .hidden: the decoder's latest output in this thread, (B, T, d)


class Heads:
    """The heads and settings of a run, read once for each model, with the LM head in fp32, which tied heads share."""

    def __init__(self, model):
        self.folder, lm_head = model.config._name_or_path, model.get_output_embeddings().weight.detach()
        path = cached_file(self.folder, "heads.safetensors", revision=vars(model.config).get("_commit_hash"))
        with safe_open(path, "pt") as file:
            self.run = json.loads(file.metadata()["run"])
            self.tensors = {name: file.get_tensor(name).to(lm_head.device) for name in file.keys()}
        self.rows = self.tensors["q.rows"] if "q.rows" in self.tensors else lm_head.float().unsqueeze(0)

    def features(self, name, hidden):
        """Map hidden states (B, d), to which a 1 is appended, to the features of each head, (H, B, k)."""
        h = torch.nn.functional.pad(hidden.to(self.rows.device).float(), (0, 1), value=1.0)
        return torch.einsum("nd,hkd->hnk", h, self.tensors[name])

    def q(self, hidden, ids):
        """Return Q of each head, (H, B, K), for token ids (B, K), None = all. The last feature is one of the state."""
        z = self.features("q.map", hidden).relu() if self.run["relu"] else self.features("q.map", hidden)
        rows = self.rows.unsqueeze(1) if ids is None else self.rows[:, ids.to(z.device)]
        return (torch.einsum("hnk,hnvk->hnv", z[..., :-1], rows) + z[..., -1:]).to(hidden.device)

    def v(self, hidden):
        return (self.features("v.map", hidden)[0].relu() @ self.tensors["v.weight"]).to(hidden.device)

    def insert(self, ids, mask, ask):
        """Insert the ids that request a return before each agent turn of the prompts (B, S); return ids and mask."""
        opening, past, rows = self.run["opening"], self.run["past_opening"], []
        request = self.run["requests"][0 if ask is None else 1 + sum(edge <= ask for edge in self.run["edges"])]
        kept = ids >= 0 if mask is None else mask.bool()
        for row in (row[own].tolist() for row, own in zip(ids, kept, strict=True)):
            last = len(row) - len(opening)
            if row[last:] != opening:
                raise ValueError("found a prompt without the agent's opening at its end: use add_generation_prompt")
            places = {i for i in range(last) if row[i : i + len(past)] == past} | {last}
            rows.append(torch.tensor([x for i, one in enumerate(row) for x in [*request * (i in places), one]]))
        return [pad_sequence(part, True, 0, "left").to(ids) for part in (rows, [torch.ones_like(row) for row in rows])]


def generate(inputs=None, generation_config=None, logits_processor=None, *, model, beta=None, ask=None, **arguments):
    """Generate as the class does. beta: a number, or B of them. ask: a return, "max", or "p0" to "p100"."""
    heads = model.guidance_heads = vars(model).get("guidance_heads") or Heads(model)
    run, config = heads.run, copy.deepcopy(generation_config) or GenerationConfig()
    arguments = {"input_ids": inputs} | config.update(**arguments)  # those that are not in the config
    found = {k: x for p in (run, vars(model.generation_config), vars(config)) for k, x in p.items() if x is not None}
    if found.get("num_beams", 1) > 1 or any(map((found | arguments).get, ASSISTED)):
        raise ValueError("found beams or assisted decoding, expected greedy decoding or sampling")
    beta, copies = found["beta"] if beta is None else beta, found.get("num_return_sequences", 1)
    each = torch.as_tensor(beta, device=model.device).repeat_interleave(copies).view(-1, 1)
    beta = beta if isinstance(beta, int | float) else each
    temperature = found.get("temperature", 1.0) if found.get("do_sample") else 0.0
    form = Form(temperature, *(found.get(x) or None for x in ("top_k", "top_p", "min_p")), beta=beta, **run["form"])
    config.update(**FIXED, do_sample=temperature > 0, disable_compile=True, stop_strings=found["stop_strings"] or None)
    if config.stop_strings:
        arguments["tokenizer"] = arguments.get("tokenizer") or AutoTokenizer.from_pretrained(heads.folder)
    ids, mask = arguments["input_ids"], arguments.get("attention_mask")
    ask = run.get("ask") if ask is None else run.get("quantiles", {}).get(ask, ask)
    if isinstance(ask, str) or (ask is not None and not run["requests"]):
        raise ValueError(f"found ask {ask!r}, expected a number, max or p0 to p100; none for a run without returns")
    if run["requests"]:
        arguments |= zip(("input_ids", "attention_mask"), heads.insert(ids, mask, ask), strict=True)

    def guide(_, scores):
        hidden = SEEN.hidden[:, -1].to(scores.device)
        outputs = ModelOutputs(lambda some: heads.q(hidden, some), lambda: heads.v(hidden))
        return next_token(scores, form, outputs).over_vocabulary(scores.shape[-1])

    processors, decoder = LogitsProcessorList([guide, *(logits_processor or ())]), model.get_submodule(run["decoder"])
    hook = decoder.register_forward_hook(lambda module, args, output: vars(SEEN).update(hidden=output[0]))
    try:
        written = type(model).generate(model, None, config, processors, **arguments)
    finally:
        hook.remove()
    if run["requests"]:  # what was inserted is not part of the caller's prompts
        new = written.sequences[:, arguments["input_ids"].shape[1] :]
        written.sequences = torch.cat([ids.repeat_interleave(copies, 0), new], 1)
    return written if found.get("return_dict_in_generate") else written.sequences
