"""The speed of guided decoding as a share of that of plain decoding, both ours: printed, never asserted.

Run with `OMP_NUM_THREADS=1 pytest -m benchmarks -s tests/benchmarks/test_guided.py`. Every figure is the median over
paired repeats of plain time ÷ guided time, with the interval that holds the true median with 96 %: from the second
smallest to the second largest of nine. Time is that of the process on its CPUs, since other processes disturb that of
the clock.
"""

import pytest
import torch

from tests.benchmarks.pairs import paired
from tests.smollm2 import FOLDER, needs_smollm2

pytestmark = pytest.mark.benchmarks

TOKENS, PROMPT = 12, 4
BETA = 2.0
FORMS = {"default form": {"support": 0.02}, "no filter": {}}


def gpt2_small():
    """A random model of GPT-2-small's shape whose policy keeps some hundred tokens, as trained ones do."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from offline_lmrl.models.guided import add_value_heads
    from offline_lmrl.models.value_heads import ValueHeadsConfig

    torch.manual_seed(0)
    model = add_value_heads(GPT2LMHeadModel(GPT2Config()), ValueHeadsConfig())
    torch.nn.init.constant_(model.transformer.ln_f.weight, 4.2)
    return model.eval()


def smollm2():
    from offline_lmrl.models.loading import load_model
    from offline_lmrl.models.value_heads import ValueHeadsConfig

    return load_model(FOLDER, value_heads=ValueHeadsConfig()).eval()


def our_decoding(model, ids, form, beta):
    from offline_lmrl.decoding.sampler import DecodingConfig, Sampler
    from offline_lmrl.tokens.rendering import Renderer
    from offline_lmrl.tokens.tokenizers import train_tokenizer

    renderer = Renderer(train_tokenizer(["a b c d e f g h"], 300))
    sampler = Sampler(model, renderer, DecodingConfig(max_new_tokens=TOKENS, beta=beta, **form))
    sampler.ends = torch.tensor([-1])  # so that all replies have the same length
    return lambda: sampler.sample(ids.tolist(), range(len(ids)))


def generation(model, ids, form, beta):
    options = {"do_sample": True, "top_k": 0, "pad_token_id": 0, "beta": beta}
    length = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS}

    def decode():
        model.config.offline_lmrl = {**model.config.offline_lmrl, "decoding": form}
        model.generate(ids, attention_mask=torch.ones_like(ids), **options, **length)

    return decode


def print_speeds(make, dtype, rows):
    model = make().to(dtype)
    ids = torch.arange(PROMPT) + 300 + 1000 * torch.arange(rows).unsqueeze(1)  # rows that share no work
    for decoding in (our_decoding, generation):
        for name, form in FORMS.items():
            plain, guided = (decoding(model, ids, form, beta) for beta in (0.0, BETA))
            median, low, high = paired(plain, guided)
            print(
                f"\n{make.__name__:10} {str(dtype)[6:]:8} B {rows:2}  {decoding.__name__:12} {name:16} "
                f"{median:.2f} [{low:.2f}, {high:.2f}]",
                end="",
                flush=True,
            )


on_every_batch = pytest.mark.parametrize("rows", [1, 8, 32])
in_both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@on_every_batch
@in_both_dtypes
def test_speed_of_guided_over_plain_decoding(dtype, rows):
    print_speeds(gpt2_small, dtype, rows)


@needs_smollm2
@on_every_batch
@in_both_dtypes
def test_speed_of_guided_over_plain_decoding_of_a_trained_model(dtype, rows):
    print_speeds(smollm2, dtype, rows)
