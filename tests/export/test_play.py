"""Play before and after `export`: a plain engine that tells returns as the card says, and a real chat model with an
adapter and values, play as the run does."""

import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from offline_lmrl.algorithms.return_conditioned import ReturnConditionedConfig, ReturnConditionedTrainer
from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.environments.rollouts import rollout
from offline_lmrl.errors import InputError
from offline_lmrl.export.prompts import HeldOut
from offline_lmrl.export.run import export_run
from offline_lmrl.logs.protocols import Reply
from offline_lmrl.logs.trajectory import Turn
from offline_lmrl.tasks.count import Count
from tests.export.real_run import save_real_run
from tests.gates.small import SPEC, fitted
from tests.smollm2 import FOLDER, needs_smollm2

LETTERS_READ = 24  # tokens of a reply, many more than a letter needs
CARD_ROW = re.compile(r"\|  \| `(<return_\d+>)` \| (\S+) \| \S+ \| \d+ \|")


class PlainEngine:
    """Knows of the run what its folder says: text in, greedy text out. Implements Policy and its own Session."""

    def __init__(self, folder, ask):
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.bins = [(float(low), name) for name, low in CARD_ROW.findall((folder / "README.md").read_text())]
        self.ask = ask

    def start(self, seeds):
        return self

    def reply(self, rows, histories, options=None):
        return [Reply(self.said(history)) for history in histories]

    @torch.no_grad()
    def said(self, history):
        messages = [{"role": turn.role, "content": turn.content} for turn in history]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        left, told = self.ask, [self.told(self.ask)]
        for turn in history:
            if turn.role == "assistant":
                left -= turn.reward
                told.append(self.told(left))
        first, *rest = text.split("<assistant>")  # of the test tokenizer's template
        text = first + "".join(f"{name}<assistant>{piece}" for name, piece in zip(told, rest, strict=True))
        read = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")
        written = self.model.generate(**read, max_new_tokens=LETTERS_READ)[0, read["input_ids"].shape[1] :]
        return self.tokenizer.decode(written, skip_special_tokens=True)

    def told(self, value):
        return max((low, name) for low, name in self.bins if low <= max(value, self.bins[0][0]))[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    spec = SPEC | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    fitted(
        ReturnConditionedConfig,
        ReturnConditionedTrainer,
        folder,
        Count().logs(400, 0),
        0,
        60,
        spec=spec,
        per_device_train_batch_size=32,
        learning_rate=5e-3,
    )
    return folder


def test_episodes_are_the_same_before_and_after_export(run, tmp_path):
    export_run(run, tmp_path / "plain", held_out=HeldOut([[Turn("user", "go")]] * 2), temperature=0.0)
    earned = []
    for ask in (0.0, 2.0, 5.0, 8.0):
        policy = LanguagePolicy.load(run, ask=ask, temperature=0.0, max_new_tokens=LETTERS_READ)
        (before,) = rollout(policy, Count, [0])
        (after,) = rollout(PlainEngine(tmp_path / "plain", ask), Count, [0])
        assert [turn.content for turn in after.turns] == [turn.content for turn in before.turns]
        assert after.total_return == before.total_return
        earned.append(before.total_return)
    assert len(set(earned)) > 1  # what is told matters


@needs_smollm2
def test_a_real_chat_model_writes_the_same_before_and_after_export(tmp_path):
    save_real_run(tmp_path / "run", adapter=True)
    with pytest.raises(InputError, match="q_reduce min, support 0.02, .*--q_reduce mean --support 0, or"):
        export_run(tmp_path / "run", tmp_path / "plain")
    exact = {"q_reduce": "mean", "support": 0.0, "temperature": 0.0}
    asked = ["How many legs has a spider?", "Write a poem about rain.", "Why is the sky blue?", "Name three fruits."]
    histories = [[Turn("user", text)] for text in asked]
    export_run(tmp_path / "run", tmp_path / "plain", held_out=HeldOut(histories), **exact)
    plain, own = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (tmp_path / "plain", FOLDER))
    policy, changed = LanguagePolicy.load(tmp_path / "run", **exact, max_new_tokens=24), 0
    for history, reply in zip(histories, policy.start([0] * 4).reply(range(4), histories), strict=True):
        message = {"role": "user", "content": history[0].content}
        prompt = policy.renderer.tokenizer.apply_chat_template(
            [message], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        after, before = (m.generate(**prompt, max_new_tokens=24, do_sample=False)[0] for m in (plain, own))
        length = prompt["input_ids"].shape[1]
        assert tuple(after[length:].tolist()) == reply.token_ids
        changed += after.tolist() != before.tolist()
    assert changed > 0  # guidance and adapter do something
