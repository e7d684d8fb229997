"""What values cost, as ratios of paired repeats in one run: printed and explained, never asserted.

Run with `pytest -m benchmarks -s`.
"""

import functools
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from offline_lmrl.logs.trajectory import Trajectory, Turn
from offline_lmrl.tokens.tokenizers import train_tokenizer
from tests.benchmarks import pairs

pytestmark = pytest.mark.benchmarks

paired = functools.partial(pairs.paired, clock=time.perf_counter)
SHAPES = {
    "maze": {"n_layer": 2, "n_embd": 64, "n_head": 4, "vocabulary": 320, "length": 30, "rows": 128},
    "gpt2-small": {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocabulary": 50257, "length": 128, "rows": 4},
}


def tokenizer_of(vocabulary):
    """A small tokenizer; the model's vocabulary may be larger."""
    return train_tokenizer(["a b c d e f g h"], 300)


def model_of(shape, heads):
    from transformers import GPT2Config, GPT2LMHeadModel

    from offline_lmrl.models.guided import add_value_heads, as_guided
    from offline_lmrl.models.value_heads import ValueHeadsConfig

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=shape["n_layer"],
        n_embd=shape["n_embd"],
        n_head=shape["n_head"],
        vocab_size=shape["vocabulary"],
        n_positions=1024,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = GPT2LMHeadModel(config)
    return add_value_heads(model, ValueHeadsConfig(kind=heads)) if heads else as_guided(model)


def step_of(shape_name, kind):
    """A function that makes one training step: forward, backward, AdamW, target update. kind: "bc" or the Q heads'."""
    from offline_lmrl.algorithms.behaviour_cloning import BCConfig, BCTrainer
    from offline_lmrl.algorithms.ilql import ILQLConfig, ILQLTrainer

    shape = SHAPES[shape_name]
    words = shape["length"] // 4 - 2  # two turns, half of them the agent's
    turns = (Turn("user", "a" * words), Turn("assistant", "b" * words, reward=1.0))
    logs = [Trajectory(turns + turns) for _ in range(shape["rows"])]
    options = {
        "output_dir": "unused",
        "max_length": 1024,
        "use_cpu": not torch.cuda.is_available(),
        "report_to": "none",
    }
    tokenizer = tokenizer_of(shape["vocabulary"])
    if kind == "bc":
        trainer = BCTrainer(model_of(shape, None), BCConfig(**options), logs, None, tokenizer)
    else:
        config = ILQLConfig(value_heads=kind, conservative_weight=0.1, **options)
        trainer = ILQLTrainer(model_of(shape, None), config, logs, None, tokenizer)
    batch = trainer._prepare_inputs(trainer.train_dataset.batch(range(shape["rows"])))
    optimizer = torch.optim.AdamW([p for p in trainer.model.parameters() if p.requires_grad], lr=1e-5)
    count = torch.tensor(len(batch["steps"]["row"]))

    def step():
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=count).backward()
        optimizer.step()
        optimizer.zero_grad()
        if kind != "bc":
            trainer.model.update_targets(0.005)

    return step


def report(name, ratio):
    print(
        f"\n{name}: median {ratio[0]:.2f} [{ratio[1]:.2f}, {ratio[2]:.2f}] over {pairs.PAIRS} pairs, "
        f"{torch.get_num_threads()} threads"
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["tied", "linear", "mlp"])
def test_time_of_an_ilql_step_over_a_bc_step(shape, kind):
    report(f"ILQL step ({kind} heads) over BC step, {shape}", paired(step_of(shape, kind), step_of(shape, "bc")))


# VmHWM and not ru_maxrss: the latter keeps the size that the parent had when it forked.
MEMORY = """
import re, sys
sys.path.insert(0, {here!r})
from test_cost import step_of
step = step_of({shape!r}, {kind!r})
for _ in range(2): step()
print(re.search("VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


def peak_memory(shape, kind):
    """GiB of a fresh process that makes two steps (Linux)."""
    code = MEMORY.format(here=str(Path(__file__).parent), shape=shape, kind=kind)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    return int(done.stdout.splitlines()[-1]) / 2**20


def test_peak_memory_of_a_fresh_process():
    for shape in SHAPES:
        used = {kind: peak_memory(shape, kind) for kind in ("bc", "tied", "linear", "mlp")}
        print(
            f"\npeak memory, {shape}: " + ", ".join(f"{k} {v:.2f} GiB ({v / used['bc']:.2f})" for k, v in used.items())
        )


def decoding_sampler(model, **decoding):
    from offline_lmrl.decoding.sampler import DecodingConfig, Sampler
    from offline_lmrl.tokens.rendering import Renderer

    renderer = Renderer(tokenizer_of(model.config.vocab_size))
    return Sampler(model, renderer, DecodingConfig(max_new_tokens=64, **decoding))


def decoder(shape_name, heads=None, **decoding):
    model = model_of(SHAPES[shape_name], heads).eval()
    sampler = decoding_sampler(model, **decoding)
    prompts = [[1, 3, *range(20, 34)] for _ in range(8)]
    return model, prompts, lambda: sampler.sample(prompts, list(range(8)), [0] * 8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("candidates", [None, 64])
def test_time_of_guided_over_plain_decoding(shape, candidates):
    _, _, plain = decoder(shape, top_k=64)
    for kind in ("tied", "linear", "mlp"):
        _, _, guided = decoder(shape, kind, top_k=64, beta=2.0, candidates=candidates)
        report(f"guided ({kind}, candidates {candidates}) over plain decoding, {shape}", paired(guided, plain))


@pytest.mark.parametrize("shape", SHAPES)
def test_time_of_our_plain_decoding_over_generate(shape):
    model, prompts, ours = decoder(shape)
    ids = torch.tensor(prompts)

    def theirs():
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            top_k=0,
            max_new_tokens=64,
            min_new_tokens=64,
            pad_token_id=0,
            beta=0.0,
        )

    report(f"our plain decoding over generate, {shape}", paired(ours, theirs))


BINS, NEVER = {"edges": [0.5], "means": [0.0, 1.0]}, {"edges": [], "means": [0.0]}
HEADS = {"returns": BINS, "reward": BINS, "after": BINS, "ended": NEVER, "discount_per_turn": 1.0}


def player(shape_name, returns=True, **decoding):
    """A policy of 16 tokens a turn, that knows returns and what turns earn or neither."""
    from offline_lmrl.decoding.policy import LanguagePolicy
    from offline_lmrl.decoding.sampler import DecodingConfig
    from offline_lmrl.models.guided import add_return_heads, add_returns
    from offline_lmrl.tokens.conditioning import ReturnScale
    from offline_lmrl.tokens.rendering import Renderer

    shape = SHAPES[shape_name]
    renderer, model = Renderer(tokenizer_of(shape["vocabulary"])), model_of(shape, None).eval()
    if returns:
        rewards = (Turn("assistant", "b", reward=float(reward)) for reward in range(5))
        scale = ReturnScale.fit([Trajectory((turn,)) for turn in rewards])
        add_returns(
            model,
            {
                "condition": "embedding",
                "bins": scale.bins,
                "discount_per_turn": 1.0,
                "scale": scale.to_dict(),
                "opening": list(renderer.agent_opening),
            },
        )
        add_return_heads(model, HEADS)
    return LanguagePolicy(model, renderer, DecodingConfig(max_new_tokens=16, top_k=64, **decoding))


def play_of(policy, turns=1):
    """A function that plays eight dialogues."""

    def play():
        session, histories = policy.start(range(8)), [[Turn("user", "a b c d e f g h")] for _ in range(8)]
        for _ in range(turns):
            replies = session.reply(range(8), histories)
            for history, reply in zip(histories, replies, strict=True):
                history += [Turn("assistant", reply.text, None, 0.0, reply.token_ids), Turn("user", "a")]

    return play


@pytest.mark.parametrize("shape", SHAPES)
def test_time_of_conditioned_over_plain_turns(shape):
    plain, null = play_of(player(shape, returns=False)), play_of(player(shape))
    told = play_of(player(shape, ask=3.0))
    guided = play_of(player(shape, ask=3.0, condition_scale=0.5))
    report(f"conditioned over plain turn, {shape}", paired(told, plain))
    report(f"conditioned with guidance over plain turn, {shape}", paired(guided, plain))
    report(
        f"both conditions in one batch and cache over one after the other, {shape}",
        paired(guided, lambda: (told(), null())),
    )


@pytest.mark.parametrize("depth", [1, 2])
def test_time_of_planned_over_plain_turns(monkeypatch, depth):
    from offline_lmrl.decoding import planner as planning

    plain, planner = player("maze", returns=False), planning.Planner(player("maze"), width=4, expand=4, depth=depth)
    report(f"planned (4 x 4, depth {depth}) over plain turn, maze", paired(play_of(planner), play_of(plain)))

    def anew():
        with monkeypatch.context() as patch:
            patch.setattr(planning, "CACHE_BYTES", 0)
            play_of(planner, turns=3)()

    report(
        f"three planned turns (depth {depth}) from one cache over reading anew, maze",
        paired(play_of(planner, turns=3), anew),
    )
