"""Acceptance gates of reward models, on comparisons whose true worth is known (pref_gold). `pytest -m gates`.

Settings were chosen on seeds from 10 on (over-optimisation: from 100 on), these gates judge others, from 0 on. Better
is a paired difference whose t interval over seeds excludes 0.
"""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
import transformers

from offline_lmrl.algorithms.reward_model import RewardModelConfig, RewardModelTrainer
from offline_lmrl.decoding.scorers import RewardModel, RuleScorer, relabel_trajectories
from offline_lmrl.evaluation.metrics import mean_interval
from offline_lmrl.evaluation.preferences import best_of_n_curve
from offline_lmrl.logs.comparison import Comparison
from offline_lmrl.logs.preferences import score_rows
from offline_lmrl.logs.trajectory import Trajectory, Turn
from offline_lmrl.models.reward_model import build_reward_model
from offline_lmrl.ops.preferences import bradley_terry_loss
from offline_lmrl.tasks.pref_gold import CUES, LETTERS, REPLIES, PrefGold
from offline_lmrl.tokens.tokenizers import train_tokenizer

pytestmark = pytest.mark.gates

SPEC = {
    "model_type": "gpt2",
    "n_layer": 1,
    "n_embd": 32,
    "n_head": 2,
    "n_positions": 48,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
LONGER = {**SPEC, "n_positions": 64}
SPREAD = {**SPEC, "initializer_range": 0.1}  # learns by heart sooner
DEEP = {"spec": {**SPREAD, "n_embd": 64, "n_layer": 2}, "learning_rate": 2e-3}
SEEDS = range(5)
MORE_SEEDS = range(10)  # of differences that vary as much as they are large
TOY = PrefGold()
TOKENIZER = train_tokenizer([*REPLIES[::7], *CUES, "neither a nor b"], 300)


def fitted(folder, rows, seed, steps, *, model=None, spec=SPEC, **settings):
    """A scorer, in units of log odds, that has learnt from these comparisons."""
    common = {
        "max_length": 48,
        "per_device_train_batch_size": 32,
        "learning_rate": 3e-3,
        "normalise": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    }
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
    for seed in MORE_SEEDS:
        rows, fresh = TOY.comparisons(64, seed, options=6, tie=0.0), TOY.comparisons(1000, 1000 + seed, tie=0.0)
        pairs = [row.select(both) for row in rows for both in itertools.combinations(range(6), 2)]
        grouped, shuffled = (
            loss(fitted(tmp_path, data, seed, -1, num_train_epochs=4, per_device_train_batch_size=size, **DEEP), fresh)
            for data, size in ((rows, 8), (pairs, 24))
        )
        print(f"seed {seed}: grouped {grouped:.3f}, shuffled {shuffled:.3f}")
        gains.append(shuffled - grouped)
    assert mean_interval(gains).low > 0


def test_an_error_floor_is_the_better_likelihood_where_a_tenth_of_the_labels_is_flipped(tmp_path):
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


def test_votes_before_a_hundred_pairs_beat_a_hundred_pairs(tmp_path):
    # Votes are many, and less sure than people who are asked. Ten steps are where pairs alone are at their best. Votes
    # made good or bad (`binarise`) helped on two tuning seeds and on one of these five: .685 for .658.
    gains = []
    for seed in MORE_SEEDS:
        votes = TOY.comparisons(4000, 500 + seed, temperature=1.0, flips=0.2)
        rows = TOY.comparisons(100, seed, tie=0.0)
        fresh = TOY.comparisons(1000, 1000 + seed, tie=0.0, flips=0.0)
        alone = loss(fitted(tmp_path, rows, seed, 10), fresh)
        voted = fitted(tmp_path, votes, seed, 600)
        before = loss(voted, fresh)
        after = loss(fitted(tmp_path, rows, seed, 10, model=voted.model), fresh)
        print(f"seed {seed}: pairs {alone:.3f}, votes {before:.3f}, votes and pairs {after:.3f}")
        gains.append(alone - after)
    assert mean_interval(gains).low > 0


class Gold:
    def score(self, context, options):
        return TOY.table[CUES.index(context[0].content)]


def best_of(scorer, ns):
    """Mean score and gold of the best of n replies of the behaviour, over prompts; every reply is listed."""
    policy, options = torch.from_numpy(TOY.behaviour()), [(Turn("assistant", text),) for text in REPLIES]
    found = []
    for gold, prompt in zip(TOY.table, CUES, strict=True):
        score = torch.from_numpy(np.asarray(scorer.score((Turn("user", prompt),), options), dtype=float))
        rows = best_of_n_curve(policy, score, torch.from_numpy(gold), ns)
        assert all(row["kl"] <= row["bound"] + 1e-9 for row in rows)
        found.append([[row["score"], row["gold"]] for row in rows])
    return np.mean(found, axis=0).T


def test_the_best_by_a_reward_model_of_few_pairs_are_worse_than_the_good_by_it(tmp_path):
    # Over-optimisation: from the best of 4,096 to the best of a million by it the score rises and the worth falls. One
    # model in three or so does not fall, so it takes eighty.
    ns = [4**k for k in range(11)]
    few = np.array([best_of(fitted(tmp_path, TOY.comparisons(40, seed), seed, 300), ns) for seed in range(80)])
    many, gold = best_of(fitted(tmp_path, TOY.comparisons(4000, 0), 0, 400), ns), best_of(Gold(), ns)
    fall = mean_interval(few[:, 1, 6] - few[:, 1, -1])
    for name, (score, worth) in {"40 pairs, mean": few.mean(axis=0), "4,000 pairs": many, "gold": gold}.items():
        print(name, "gold", np.round(worth, 2), "score", np.round(score, 1))
        assert (np.diff(score) > -1e-9).all()
    print("fall with 40 pairs", fall)
    assert fall.low > 0
    assert (np.diff(many[1]) > -0.02).all() and (np.diff(gold[1]) > 0).all()


def segments(n, seed):
    """n dialogues of 2 to 5 agent turns of one letter each, and what each letter is worth: half of them 1, half 0."""
    rng = np.random.default_rng(seed)
    worth = dict(zip(LETTERS, np.random.default_rng(seed % 1000).permutation([0.0, 1.0] * 4), strict=True))
    said = [rng.choice(list(LETTERS), rng.integers(2, 6)) for _ in range(n)]
    return [
        tuple(turn for letter in letters for turn in (Turn("user", "next"), Turn("assistant", str(letter))))
        for letters in said
    ], worth


def test_turns_that_are_read_alone_are_credited_for_themselves(tmp_path):
    # Segments are compared by the sum of their letters' worth, which is never told (Christiano et al. 2017). A turn
    # that sees the turns before it is credited for those too; with context: 1 it sees the question alone.
    alone = {"head": "turn", "context": 1}
    settings = {
        "context 1": alone,
        "context 1, standardised": alone | {"normalise": "standard"},
        "shared history": {"head": "turn"},
        "terminal": {},
    }
    found = {name: [] for name in settings}
    for seed in SEEDS:
        said, worth = segments(400, seed)
        totals = [sum(worth[turn.content] for turn in one if turn.is_trainable) for one in said]
        rows = [
            Comparison((), (said[i], said[i + 1]), tuple(0.5 + 0.5 * np.sign([lead, -lead])))
            for i in range(0, 400, 2)
            for lead in [totals[i] - totals[i + 1]]
        ]
        fresh = [Trajectory(one) for one in segments(300, 1000 + seed)[0]]
        for name, correlations in found.items():
            scorer = fitted(tmp_path, rows, seed, 100, spec=LONGER, max_length=64, **settings[name])
            made = relabel_trajectories(fresh, scorer, "turn")
            credit = [(turn.reward, worth[turn.content]) for row in made for turn in row.turns if turn.is_trainable]
            correlations.append(np.corrcoef(np.transpose(credit))[0, 1])
    for name, correlations in found.items():
        print(name, np.round(correlations, 3), mean_interval(correlations))
    gain = mean_interval(np.subtract(found["context 1"], found["shared history"]))
    assert min(found["context 1"]) >= 0.9 > max(found["shared history"]) and gain.low > 0
    assert min(found["context 1, standardised"]) >= 0.9  # each turn has a part of the shift


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

    found = right(lambda rule: RuleScorer(reads, worded(rule)))
    misled = right(lambda rule: RuleScorer(reads, worded(new[new.index(rule) - 1])))
    unread = right(lambda rule: blind)
    print(f"reads {found:.3f}, reads another rule {misled:.3f}, does not read {unread:.3f}")
    assert found > max(misled, unread) + 0.3
