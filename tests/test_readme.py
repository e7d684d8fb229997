"""Every example of the README is run as it stands, in a folder where small models carry the names that it uses."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

from offline_lmrl.tokens.tokenizers import train_tokenizer

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language):
    return [text for name, text in FENCED.findall(README) if name == language]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with logs.jsonl and models named as on the hub."""
    folder = tmp_path_factory.mktemp("readme")
    row = json.loads(blocks("json")[0])
    rows = []
    for i in range(12):
        reply = {"role": "assistant", "content": ("No.", "Yes, at eight.")[i % 2], "reward": float(i % 2)}
        rows.append(
            row if i == 1 else row | {"messages": [{"role": "user", "content": f"Room {i}?"}, reply], "group": str(i)}
        )
    (folder / "logs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    tokenizer = train_tokenizer([json.dumps(rows)], 320)
    small = {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    qwen = Qwen3Config(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        **small,
    )
    Qwen3ForCausalLM(qwen).save_pretrained(folder / "Qwen" / "Qwen3-0.6B")
    tokenizer.save_pretrained(folder / "Qwen" / "Qwen3-0.6B")
    tokenizer.chat_template = None  # as GPT-2's
    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, **small)).save_pretrained(folder / "gpt2")
    tokenizer.save_pretrained(folder / "gpt2")
    return folder


def run(command, folder):
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_the_shell_examples_run_on_a_model_with_a_hub_name(folder):
    shell = f'set -e; offline-lmrl() {{ "{sys.executable}" -m offline_lmrl.cli "$@"; }}\n'
    (script,) = blocks("sh")
    printed = run(["bash", "-c", shell + script], folder)
    assert (folder / "runs" / "mine" / "value_heads.safetensors").exists()  # an adapter, and heads in full
    reply = json.loads(printed.strip().splitlines()[-1])
    assert reply["messages"][-1]["role"] == "assistant"


def test_the_python_examples_run_one_after_another(folder):
    examples = blocks("python")
    assert len(examples) >= 3
    assert len(examples[0].strip().splitlines()) <= 5
    printed = run([sys.executable, "-c", "\n".join(examples)], folder)
    assert (folder / "played.jsonl").exists()
    assert "User: Any room left on Friday?" in printed
