"""Acceptance gates of reward models, on comparisons whose true worth is known (pref_gold). `pytest -m gates`.

Settings were chosen on seeds from 10 on, these gates judge seeds from 0 on. Better is a paired difference whose
bootstrap interval over five seeds excludes 0.
"""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
import transformers

from offline_lmrl.algorithms.reward_model import RewardModelConfig, RewardModelTrainer
from offline_lmrl.data.comparison import Comparison
from offline_lmrl.data.preferences import score_rows
from offline_lmrl.data.tokenizers import train_tokenizer
from offline_lmrl.data.trajectory import Turn
from offline_lmrl.decoding.scorers import RewardModel, Rule
from offline_lmrl.environments.pref_gold import REPLIES, PrefGold
from offline_lmrl.environments.toys_conditioned import CUES, LETTERS
from offline_lmrl.evaluation.metrics import mean_interval
from offline_lmrl.models.reward_model import build_reward_model
from offline_lmrl.ops.preferences import bradley_terry_loss

pytestmark = pytest.mark.gates

SPEC = {"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 48,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # fmt: skip
SPREAD = {**SPEC, "initializer_range": 0.1}  # learns by heart sooner
DEEP = {"spec": {**SPREAD, "n_embd": 64, "n_layer": 2}, "learning_rate": 2e-3}
SEEDS = range(5)
TOY = PrefGold()
TOKENIZER = train_tokenizer([*REPLIES[::7], *CUES, "neither a nor b"], 300)


def fitted(folder, rows, seed, steps, *, model=None, spec=SPEC, **settings):
    """A scorer, in units of log odds, that has learnt from these comparisons."""
    common = {"max_length": 48, "per_device_train_batch_size": 32, "learning_rate": 3e-3, "normalise": "none",
              "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "report_to": "none"}  # fmt: skip
    transformers.set_seed(seed)
    args = RewardModelConfig(output_dir=str(folder), max_steps=steps, seed=seed, **common | settings)
    model = model or build_reward_model(spec, TOKENIZER, args.head)
    run = RewardModelTrainer(model, args, rows, None, TOKENIZER)
    run.train()
    return RewardModel(run.model, run.renderer, args.window)


def loss(scorer, pairs, error_rate=0.0):
    """Mean cost of these labels, in nats, for a model that takes the share `error_rate` to be given at random."""
    scores = torch.from_numpy(np.stack(score_rows([(row.context, row.options) for row in pairs], scorer)))
    prob = torch.tensor([row.target[0] for row in pairs], dtype=scores.dtype)
    return bradley_terry_loss(scores[:, 0] - scores[:, 1], prob, error_rate=error_rate).mean().item()


def test_all_pairs_of_a_prompt_together_beat_shuffled_pairs(tmp_path):
    # Ouyang et al. 2022 (InstructGPT), on reward modelling: shuffled pairs overfit. As many epochs over the same 960
    # pairs, as many rows per step (8 prompts of 6, 24 pairs of 2) and one learning rate, so that an epoch of shuffled
    # pairs reads each reply five times, in five times as many steps. It is that which overfits: stopped after one
    # epoch, shuffled pairs are as good as grouped ones after two (.676 and .669 on seeds 10 to 12).
    gains = []
    for seed in SEEDS:
        rows, fresh = TOY.comparisons(64, seed, options=6, tie=0.0), TOY.comparisons(1000, 1000 + seed, tie=0.0)
        pairs = [row.select(both) for row in rows for both in itertools.combinations(range(6), 2)]
        grouped, shuffled = (
            loss(fitted(tmp_path, data, seed, -1, num_train_epochs=4, per_device_train_batch_size=size, **DEEP), fresh)
            for data, size in ((rows, 8), (pairs, 24))
        )
        print(f"seed {seed}: grouped {grouped:.3f}, shuffled {shuffled:.3f}")
        gains.append(shuffled - grouped)
    assert mean_interval(gains).low > 0


def test_an_error_floor_beats_none_where_a_tenth_of_the_labels_is_flipped(tmp_path):
    # Labels are nearly certain but for the flips, and training goes on past the best. Each is judged by the likelihood
    # that it is trained by, on labels of the same people. There alone the floor helps: scores that were learnt without
    # it cost no more than those learnt with it, where it is only put on to judge them.
    gains = []
    for seed in SEEDS:
        rows = TOY.comparisons(800, seed, temperature=0.1, tie=0.0)
        fresh = TOY.comparisons(1000, 1000 + seed, temperature=0.1, tie=0.0)
        none, floor = (fitted(tmp_path, rows, seed, 400, spec=SPREAD, error_rate=rate) for rate in (0.0, 0.1))
        without, with_floor, mixed = loss(none, fresh), loss(floor, fresh, 0.1), loss(none, fresh, 0.1)
        print(f"seed {seed}: none {without:.3f}, floor {with_floor:.3f}, none judged with the floor {mixed:.3f}")
        gains.append(without - with_floor)
    assert mean_interval(gains).low > 0


def worded(rule):
    return f"neither {rule[0]} nor {rule[1]}"


def rule_pairs(rules, n, seed):
    """A rule, and a reply that keeps it before one that breaks it."""
    rng, made = np.random.default_rng(seed), []
    while len(made) < n:
        rule, texts = rules[rng.integers(len(rules))], rng.choice(REPLIES, 2)
        breaks = [not set(rule).isdisjoint(text.split()) for text in texts]
        if breaks == [False, True]:
            said = tuple((Turn("assistant", str(text)),) for text in texts)
            made.append((rule, Comparison((Turn("user", CUES[rng.integers(len(CUES))]),), said, (1.0, 0.0))))
    return made


@pytest.mark.parametrize("seed", [0, 1])
def test_a_rule_that_was_never_seen_is_judged_by_its_text(tmp_path, seed):
    # A rule forbids two letters. Of 28 rules 6 are held out; each of their letters is in rules that are trained on.
    rules = list(itertools.combinations(LETTERS, 2))
    order = np.random.default_rng(seed).permutation(len(rules))
    new, known = [rules[i] for i in order[:6]], [rules[i] for i in order[6:]]
    pairs = rule_pairs(known, 2000, seed)
    behind = [dataclasses.replace(row, context=(Turn("system", worded(rule)), *row.context)) for rule, row in pairs]
    reads = fitted(tmp_path / "reads", behind, seed, 300, **DEEP, normalise="centre")
    blind = fitted(tmp_path / "blind", [row for _, row in pairs], seed, 300, **DEEP)

    def right(scorer_of):
        """The share of pairs in which the reply that keeps its rule scores higher."""
        scores = [scorer_of(rule).score(row.context, row.options) for rule, row in rule_pairs(new, 400, seed + 1000)]
        return np.mean([kept > broken for kept, broken in scores])

    found = right(lambda rule: Rule(reads, worded(rule)))
    misled = right(lambda rule: Rule(reads, worded(new[new.index(rule) - 1])))
    unread = right(lambda rule: blind)
    print(f"reads {found:.3f}, reads another rule {misled:.3f}, does not read {unread:.3f}")
    assert found > max(misled, unread) + 0.3
