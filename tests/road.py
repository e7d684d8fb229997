"""A new user's way on the real model, from thumbs logs to a served model: `make real`.

Support chats with thumbs are prepared and checked, SmolLM2-135M-Instruct is trained on them with LoRA, its value heads
go on alone, β is chosen from held-out logs, the run is exported to all three forms and served. Then the plain model,
the run, each export and the server reply to the same customers, and one table shows the share of wanted replies of
each, its difference from the run, and the share of broken replies. Every step is a command that a guide names; each
one is printed.

Run `python tests/road.py FOLDER`; `--replies N` sets the number of replies of each, `--seed S` that of the logs. The
export for vLLM is played where `make engines` has made its environment, and left out, with a line, elsewhere.
"""

import argparse
import asyncio
import json
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from offline_lmrl import LanguagePolicy
from offline_lmrl.evaluation.metrics import mean_interval
from offline_lmrl.logs.protocols import Reply
from offline_lmrl.logs.replies import is_broken, least_likely
from offline_lmrl.logs.trajectory import Turn
from offline_lmrl.tasks.support import Support, asks_back

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "models" / "smollm2-135m"
ENGINES = Path(os.environ.get("ENGINES", ROOT / ".engines")).resolve() / "bin" / "python"
FIRST_SEED = 100_000  # of the customers, who are in no logs
BATCH = 100  # prompts of one call of `generate`
AT_ONCE = 16  # requests that are open at the same time
EQUIVALENT = 0.05  # a share is equivalent to the run's if the interval of their difference is within ± this
MOST_BROKEN = 0.02
JUDGED = 800  # replies of each that are read by the plain model, to count the broken ones
GREEDY = 200  # prompts that are also answered greedily
REPLY = 64  # most tokens of a reply, as in configs/support


class Answer(NamedTuple):
    """A reply. closed: True if it ended by itself, before max_new_tokens."""

    text: str
    closed: bool


class Played(NamedTuple):
    """The replies of a player: sampled ones to all prompts, and greedy ones to the first of them."""

    sampled: list[Answer]
    greedy: list[Answer]


def command(*words: object) -> str:
    """Run a command of this project, print it and what it prints, and return its standard output."""
    words = [str(word) for word in words]
    print(f"\n$ {shlex.join(['offline-lmrl', *words])}", flush=True)
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "offline_lmrl.cli", *words], cwd=ROOT, text=True, stdout=subprocess.PIPE
    )
    print(done.stdout + f"({time.perf_counter() - start:.0f} s)", flush=True)
    if done.returncode:
        sys.exit(f"error: the command above ended with exit code {done.returncode}")
    return done.stdout


# ------------------------------------------------------------------------------------------------------------- players


def sampled(policy: LanguagePolicy, prompts: Sequence[Sequence[Turn]]) -> list[Answer]:
    """Let a policy reply to each prompt, with the seeds 0, 1, ..."""
    answers = []
    for start in range(0, len(prompts), 4 * BATCH):
        part = prompts[start : start + 4 * BATCH]
        session = policy.start(range(start, start + len(part)))
        answers += [Answer(one.text, one.closed) for one in session.reply(range(len(part)), part)]
    return answers


def generated(folder: Path, prompts: Sequence[Sequence[Turn]], **settings: bool) -> list[Answer]:
    """Let an exported folder reply to each prompt through transformers, which needs no code of this project.

    Args:
      folder: the export.
      prompts: the dialogues to reply to.
      settings: arguments of `generate`; trust_remote_code is also one of loading.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    trust = {name: value for name, value in settings.items() if name == "trust_remote_code"}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **trust).eval()
    answers = []
    torch.manual_seed(0)
    for start in range(0, len(prompts), BATCH):
        chats = [as_messages(prompt) for prompt in prompts[start : start + BATCH]]
        read = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, return_tensors="pt", padding=True, return_dict=True
        )
        ids = model.generate(**read, **settings)[:, read["input_ids"].shape[1] :]
        ends = torch.tensor(model.generation_config.eos_token_id).flatten()
        closed = torch.isin(ids, ends).any(-1).tolist()
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        answers += [Answer(text.strip(), end) for text, end in zip(texts, closed, strict=True)]
    return answers


def asked_over_http(address: str, model: str, prompts: Sequence[Sequence[Turn]], **extra: object) -> list[Answer]:
    """Ask an OpenAI-compatible server for a reply to each prompt, with the seeds 0, 1, ..., AT_ONCE at a time."""
    from openai import AsyncOpenAI

    async def ask_all() -> list[Answer]:
        free = asyncio.Semaphore(AT_ONCE)

        async def ask(client: AsyncOpenAI, seed: int, prompt: Sequence[Turn]) -> Answer:
            async with free:
                got = await client.chat.completions.create(
                    model=model, messages=as_messages(prompt), seed=seed, **extra
                )
            choice = got.choices[0]
            return Answer(choice.message.content.strip(), choice.finish_reason == "stop")

        async with AsyncOpenAI(base_url=f"{address}/v1", api_key="none", timeout=600) as client:
            return await asyncio.gather(*(ask(client, seed, prompt) for seed, prompt in enumerate(prompts)))

    return asyncio.run(ask_all())


def over_http(address: str, model: str, prompts: Sequence[Sequence[Turn]], **extra: object) -> Played:
    """Ask a server for sampled replies to all prompts, and for greedy ones to the first."""
    drawn = asked_over_http(address, model, prompts, **extra)
    return Played(drawn, asked_over_http(address, model, prompts[:GREEDY], temperature=0.0, **extra))


def served_by_vllm(printed: str, folder: Path) -> AbstractContextManager[str]:
    """Start vLLM with the command that the export printed (`serving`)."""
    line = next(line for line in printed.splitlines() if "vllm.entrypoints" in line)
    port = free_port()
    words = [ENGINES if word == "python" else word for word in shlex.split(line)] + ["--port", port, "--enforce-eager"]
    words = ["env", "VLLM_CPU_KVCACHE_SPACE=1", *map(str, words)]
    return serving(words, port, folder.with_suffix(".log"))


def as_messages(prompt: Sequence[Turn]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in prompt]


@contextmanager
def serving(words: Sequence[str], port: int, log: Path) -> Iterator[str]:
    """Start a server, wait until it answers, yield its address, and stop it."""
    import httpx2

    print(f"\n$ {shlex.join(words)}", flush=True)
    address = f"http://127.0.0.1:{port}"
    with log.open("w") as output, subprocess.Popen(words, cwd=ROOT, stdout=output, stderr=output) as process:
        try:
            for _ in range(600):
                if process.poll() is not None:
                    sys.exit(f"error: the server has ended:\n{log.read_text()[-3000:]}")
                try:
                    httpx2.get(f"{address}/health").raise_for_status()
                    break
                except httpx2.HTTPError:
                    time.sleep(0.5)
            yield address
        finally:
            process.terminate()


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


# --------------------------------------------------------------------------------------------------------------- table


@torch.inference_mode()
def log_probs(base: LanguagePolicy, prompts: Sequence[Sequence[Turn]], answers: Sequence[Answer]) -> list[float]:
    """Return the mean log-probability per token of each reply under the plain model, in nats."""
    renderer, head, found = base.renderer, base.model.get_output_embeddings(), [0.0] * len(answers)
    both = []
    for prompt, answer in zip(prompts, answers, strict=True):
        reply = [*renderer.tokenizer(answer.text, add_special_tokens=False)["input_ids"], renderer.close_id]
        both.append((base.null_window(prompt, base.decoding.max_new_tokens), reply))
    by_length = sorted(range(len(both)), key=lambda i: len(both[i][0]) + len(both[i][1]))
    for start in range(0, len(both), 20):
        places = by_length[start : start + 20]
        ids = pad_sequence([torch.tensor([*both[i][0], *both[i][1]]) for i in places], batch_first=True)
        hidden = base.model.hidden_states(input_ids=ids)  # padding on the right is never looked back at
        for row, i in enumerate(places):
            read, reply = both[i]
            logits = head(hidden[row, len(read) - 1 : len(read) + len(reply) - 1])
            found[i] = logits.log_softmax(-1).gather(-1, torch.tensor(reply)[:, None]).mean().item()
    return found


def broken(base: LanguagePolicy, prompts: Sequence[Sequence[Turn]], answers: Sequence[Answer], limit: float) -> float:
    """Return the share of broken replies (offline_lmrl/logs/replies.py)."""
    count = 0
    for answer, log_prob in zip(answers, log_probs(base, prompts, answers), strict=True):
        tokens = base.renderer.tokenizer(answer.text, add_special_tokens=False)["input_ids"]
        count += is_broken(Reply(answer.text, None, (), (), closed=answer.closed), tokens, log_prob, limit)
    return count / len(answers)


def table(base: LanguagePolicy, prompts: Sequence[Sequence[Turn]], both: dict[str, Played]) -> list[dict]:
    """Print one line per player, and return the rows.

    Args:
      base: the plain model.
      prompts: what all of them replied to.
      both: the replies of each; "plain model" and "run" are among them.
    """
    played = {name: one.sampled for name, one in both.items()}
    wanted = {name: [float(asks_back(one.text)) for one in answers] for name, answers in played.items()}
    openings = [prompt[0].content for prompt in prompts]
    limit = least_likely(log_probs(base, prompts[:JUDGED], played["plain model"][:JUDGED]))
    rows = []
    print(f"\n{'':14}{'wanted':>20}{'minus the run':>24}{'equivalent':>12}{'broken':>9}{'same greedy text':>18}")
    for name, answers in played.items():
        share = mean_interval(wanted[name], openings)
        apart = mean_interval([a - b for a, b in zip(wanted[name], wanted["run"], strict=True)], openings)
        row = {
            "player": name,
            "wanted": share.mean,
            "interval": share.interval,
            "difference": apart.mean,
            "difference_interval": apart.interval,
            "equivalent": -EQUIVALENT <= apart.low and apart.high <= EQUIVALENT,
            "broken": broken(base, prompts[:JUDGED], answers[:JUDGED], limit),
            "same_greedy": sum(a.text == b.text for a, b in zip(both[name].greedy, both["run"].greedy, strict=True)),
            "replies": len(answers),
        }
        rows.append(row)
        print(
            f"{name:14}{100 * share.mean:7.1f} % [{100 * share.low:.1f}, {100 * share.high:.1f}]"
            f"{100 * apart.mean:+9.1f} [{100 * apart.low:+.1f}, {100 * apart.high:+.1f}]"
            f"{'yes' if row['equivalent'] else 'no':>10}{row['broken']:>10.1%}"
            f"{row['same_greedy']:>9} of {len(both[name].greedy)}"
        )
    return rows


# ---------------------------------------------------------------------------------------------------------------- road


def main() -> None:
    """Go the whole road and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where everything is written")
    parser.add_argument("--seed", type=int, default=0, help="of the logs")
    parser.add_argument("--replies", type=int, default=2400, help="of each player")
    parser.add_argument("--forms", nargs="*", default=["plain", "transformers", "vllm"], help="of the export")
    given = parser.parse_args()
    folder = given.folder.resolve()
    data, run = folder / "data", folder / "run"

    command("prepare", "support", "--output", data, "--seed", given.seed)
    command("check", data / "train.jsonl", data / "validation.jsonl", "--tokenizer", BASE)
    files = ["--data.train", data / "train.jsonl", "--data.validation", data / "validation.jsonl"]
    policy = folder / "policy"
    command("train", "support/ilql", "--model.path", BASE, *files, "--args.output_dir", policy)
    command("train", "support/values", "--model.path", policy, *files, "--args.output_dir", run)
    command("evaluate", "logs", run, "--data", data / "validation.jsonl", "--output", folder / "choice")
    beta = json.loads((folder / "choice" / "choices.json").read_text())["chosen"]["beta"]
    print(f"\nβ chosen from the held-out logs: {beta:g}")

    environment = Support()
    prompts = [environment.reset(FIRST_SEED + i) for i in range(given.replies)]
    first = prompts[:GREEDY]
    base = LanguagePolicy.load(BASE, max_new_tokens=REPLY)
    policy = LanguagePolicy.load(run, beta=beta)
    played = {
        name: Played(sampled(one, prompts), sampled(one.with_decoding(temperature=0.0), first))
        for name, one in (("plain model", base), ("run", policy))
    }
    for form in given.forms:
        if form == "vllm" and not ENGINES.exists():
            print("\nvllm: left out, as `make engines` has not been run")
            continue
        output = folder / form
        words = ["--form.python", ENGINES] if form == "vllm" else []
        printed = command("export", run, "--to", form, "--output", output, "--beta", beta, *words)
        if form == "vllm":
            with served_by_vllm(printed, output) as address:
                played[form] = over_http(address, str(output), prompts, max_tokens=REPLY)
        else:
            trust = {"trust_remote_code": True} if form == "transformers" else {}
            drawn = generated(output, prompts, do_sample=True, **trust)
            played[form] = Played(drawn, generated(output, first, do_sample=False, **trust))
    port = free_port()
    words = [sys.executable, "-m", "offline_lmrl.cli", "serve", str(run), "--beta", str(beta), "--port", str(port)]
    with serving(words, port, folder / "serve.log") as address:
        played["server"] = over_http(address, "run", prompts)

    for name, answers in played.items():
        print(f"\n{name}:")
        for prompt, answer in zip(prompts[:5], answers.sampled[:5], strict=True):
            print(f"  {prompt[0].content}\n    {answer.text!r}")
    rows = table(base, prompts, played)
    (folder / "road.json").write_text(json.dumps({"seed": given.seed, "beta": beta, "rows": rows}, indent=1))
    ours = [row for row in rows if row["player"] != "plain model"]
    failed = [row["player"] for row in ours if not row["equivalent"] or row["broken"] > MOST_BROKEN]
    sys.exit(f"not equivalent to the run, or broken: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
