"""What a training step costs: ours ÷ the causal-LM step of transformers' Trainer, same model, same batch.

Run with `pytest -m benchmarks -s tests/benchmarks/test_training_step.py`, on one core with OMP_NUM_THREADS=1. A step
is forward, loss and backward pass. Every token after the first of a row is the agent's, unless a share is named. The
ratios are of process CPU time, of neighbouring pairs; they are printed with an interval of their median, never
asserted.
"""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from offline_lmrl.algorithms.behaviour_cloning import BCConfig, BCTrainer
from offline_lmrl.algorithms.ilql import ILQLConfig, ILQLTrainer
from offline_lmrl.logs.trajectory import Trajectory, Turn
from tests.benchmarks.pairs import paired

pytestmark = pytest.mark.benchmarks

SMOLLM2 = "models/smollm2-135m"
SHAPES = {
    "gpt2-small": {"layers": 12, "width": 768, "heads": 12, "vocabulary": 50257, "tokens": 128, "rows": 4},
    "wordle": {"layers": 4, "width": 128, "heads": 4, "vocabulary": 40, "tokens": 96, "rows": 64},
    "smollm2": {"tokens": 256, "rows": 2},
}
CASES = {
    "gpt2-small": [
        *(("bc", {}), ("tied", {}), ("tied", {"share": 0.25}), ("tied", {"share": 0})),
        *((kind, {"share": share}) for kind in ("linear", "mlp") for share in (1, 0)),
    ],
    "wordle": [("bc", {}), ("tied", {})],
    "smollm2": [("bc", {}), ("tied", {}), ("tied", {"agent": 0.25})],
}


def model_of(shape, dropout=0.1):
    if shape == "smollm2":
        return AutoModelForCausalLM.from_pretrained(SMOLLM2)
    torch.manual_seed(0)
    sizes = SHAPES[shape]
    config = GPT2Config(
        n_layer=sizes["layers"],
        n_embd=sizes["width"],
        n_head=sizes["heads"],
        vocab_size=sizes["vocabulary"],
        bos_token_id=1,
        eos_token_id=2,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout),
    )
    return GPT2LMHeadModel(config)


def tokenizer_of_characters():
    """A tokenizer of 40 tokens, as many as the smallest model has."""
    names = ["<pad>", "<bos>", "<eos>", "?", "\n", " ", ":", *"abcdefghijklmnopqrstuvwxyz", *"0123456"]
    tokenizer = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="?"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="?"
    )


def ids_of(shape):
    sizes = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, sizes.get("vocabulary", 40000), (sizes["rows"], sizes["tokens"]), generator=generator)


def step_of(trainer, batch, count):
    trainer.model.train()

    def step():
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(count))
        loss.backward()
        trainer.model.zero_grad()
        return loss

    return step


def stock_step(shape, bf16, folder):
    """A function that makes one step of transformers' Trainer on all tokens."""
    options = TrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none", bf16=bf16)
    ids = ids_of(shape)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    return step_of(Trainer(model_of(shape), options), batch, ids.numel() - len(ids))


def our_step(shape, kind, bf16, folder, share=1.0, agent=1.0):
    """A function that makes one of our steps.

    Args:
      kind: "bc", or the kind of the Q heads.
      share: share of the tokens in the conservative term; 0 = without the term.
      agent: share of the tokens that are the agent's: the last ones of each row.
    """
    options = {"output_dir": str(folder), "max_length": 1024, "use_cpu": True, "report_to": "none", "bf16": bf16}
    logs = [Trajectory((Turn("user", "a"), Turn("assistant", "b", reward=1.0))) for _ in ids_of(shape)]
    model = model_of(shape, dropout=0.0 if shape == "wordle" else 0.1)
    tokenizer = tokenizer_of_characters()
    if kind == "bc":
        trainer = BCTrainer(model, BCConfig(**options), logs, None, tokenizer)
    else:
        term = {"conservative_weight": 0.1, "conservative_share": share} if share else {"conservative_weight": 0.0}
        trainer = ILQLTrainer(model, ILQLConfig(value_heads=kind, **term, **options), logs, None, tokenizer)
    ids = ids_of(shape)
    steps = steps_of(ids, agent)
    like = trainer.train_dataset.batch(range(len(ids)))
    steps = {name: steps.get(name, values[:1].expand(len(steps["row"]))) for name, values in like["steps"].items()}
    mask = torch.ones_like(ids, dtype=torch.bool)
    return step_of(trainer, like | {"input_ids": ids, "attention_mask": mask, "steps": steps}, len(steps["row"]))


def steps_of(ids, agent):
    rows, tokens = ids.shape
    own = round(agent * (tokens - 1))
    row = torch.arange(rows).repeat_interleave(own)
    state = torch.arange(tokens - 1 - own, tokens - 1).repeat(rows)
    closes = state == tokens - 2
    known = torch.ones_like(closes)
    places = {"next_row": row, "next_state": state + 1, "end_row": row, "end_state": torch.full_like(row, tokens - 1)}
    return {"row": row, "state": state, "action": ids[row, state + 1], "closes_turn": closes, "has_target": known,
            "bootstrap": 1.0 - closes.float(), "reward": closes.float()} | places  # fmt: skip


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_time_over_the_stock_step(shape, bf16, tmp_path):
    stock = stock_step(shape, bf16, tmp_path)
    for kind, options in CASES[shape]:
        median, low, high = paired(our_step(shape, kind, bf16, tmp_path, **options), stock)
        named = ", ".join(f"{name} {value}" for name, value in options.items())
        print(f"\n{shape} {'bf16' if bf16 else 'fp32'} {kind} {named}: {median:.2f} [{low:.2f}, {high:.2f}]", end="")
