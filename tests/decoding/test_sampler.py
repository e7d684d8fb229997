"""The sampler against distributions enumerated by the model's own uncached forward, and against `generate`."""

import itertools
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
)

from offline_lmrl.decoding import loop as loop_module
from offline_lmrl.decoding import prompts as prompts_module
from offline_lmrl.decoding.cache import CacheMemory
from offline_lmrl.decoding.prompts import CachedModel
from offline_lmrl.decoding.sampler import DecodingConfig, Sampler
from offline_lmrl.errors import InputError
from tests.tiny import one_form

LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Letters:
    """A renderer of one letter per token; the last of `size` ids closes a turn."""

    reply_frame, byte_ids = ("", ""), frozenset()

    def __init__(self, size):
        self.close_id = size - 1
        self.close_ids = frozenset({self.close_id})

    def decode(self, ids):
        return "".join(LETTERS[i] for i in ids if i != self.close_id)

    def encode_turn(self, turn):
        ids = (*(LETTERS.index(letter) for letter in turn.content), self.close_id)
        return one_form(ids, 0, ids)


class WithValues(GPT2LMHeadModel):
    """Two Q heads and V, linear in the hidden state; counts what is asked of them."""

    value_heads = SimpleNamespace(target_q=SimpleNamespace(uses_weight_of=lambda lm_head: False))

    def __init__(self, config):
        super().__init__(config)
        self.q_rows = torch.nn.Parameter(torch.randn(2, config.vocab_size, config.n_embd))
        self.v_row = torch.nn.Parameter(torch.randn(config.n_embd))
        self.asked = Counter()

    def forward_with_hidden(self, logits_to_keep=0, **inputs):
        outputs = self(**inputs, output_hidden_states=True)
        return outputs, outputs.hidden_states[-1]

    def q_values(self, hidden, candidates=None, target=True):
        assert target
        self.asked["rows of Q"] += self.config.vocab_size if candidates is None else candidates.shape[-1]
        q = torch.einsum("...d,hvd->h...v", hidden, self.q_rows)
        return q if candidates is None else q.gather(-1, candidates.expand(2, *candidates.shape))

    def v_values(self, hidden):
        self.asked["v"] += 1
        return hidden @ self.v_row


def tiny(cls=GPT2LMHeadModel, vocabulary=24, seed=0, scale=0.35):
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=vocabulary, n_positions=64, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.1)
    model = cls(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=scale)  # far from uniform, so that mistakes show
    return model


@torch.no_grad()
def next_logits(model, ids):
    return model(torch.tensor([ids])).logits[0, -1]


def sample(model, prompts, seeds=None, memory=None, rows=None, counters=None, options=None, **settings):
    renderer = Letters(model.config.vocab_size)
    seeds = range(len(prompts)) if seeds is None else seeds
    drawer = Sampler(model, renderer, DecodingConfig(**settings))
    return drawer.sample(prompts, seeds, counters, options, memory, rows)


def assert_same_replies(first, second, tolerance=1e-4):
    assert [reply.token_ids for reply in first] == [reply.token_ids for reply in second]
    for one, other in zip(first, second, strict=True):
        assert_close(torch.tensor(one.log_prob), torch.tensor(other.log_prob), atol=tolerance, rtol=0)
        assert_close(torch.tensor(one.policy_log_prob), torch.tensor(other.policy_log_prob), atol=tolerance, rtol=0)


# The distribution

CLOSE = 4  # of the models with 5 tokens
FORMS = [
    {},
    {"beta": 1.5},
    {"beta": 1.5, "clip": 0.0, "q_reduce": "mean"},
    {"beta": 1.0, "top_k": 3, "temperature": 0.7},
    {"beta": -0.5, "candidates": 3, "q_reduce": "first", "support": 0.2},
]


def expected_next(
    model, ids, beta=0.0, clip=None, q_reduce="min", temperature=1.0, top_k=5, candidates=5, support=0.0
):
    """The formula written out for one state, with plain Python and the uncached model."""
    with torch.no_grad():
        outputs, hidden = model.forward_with_hidden(input_ids=torch.tensor([ids]))
        q = model.q_values(hidden[0, -1]).tolist()
        v = model.v_values(hidden[0, -1]).item()
    policy = outputs.logits[0, -1].softmax(-1).tolist()
    ranked = sorted(range(5), key=lambda a: -policy[a])
    kept = [a for a in ranked[: min(top_k, candidates)] if policy[a] >= support * max(policy)]
    weights = [0.0] * 5
    for a in kept:
        pair = [q[0][a], q[1][a]]
        advantage = {"min": min(pair), "mean": sum(pair) / 2, "first": pair[0]}[q_reduce] - v
        if clip is not None:
            advantage = min(advantage, clip)
        weights[a] = policy[a] ** (1 / temperature) * torch.tensor(beta * advantage).double().exp().item()
    return [weight / sum(weights) for weight in weights]


@pytest.mark.parametrize("form", FORMS)
def test_samples_follow_the_enumerated_distribution(form):
    model, prompt, n, horizon = tiny(WithValues, 5), [0, 3, 1], 20_000, 3
    expected = {}
    for reply in itertools.product(range(5), repeat=horizon):
        end = reply.index(CLOSE) + 1 if CLOSE in reply else horizon
        if reply[end:] != (0,) * (horizon - end):
            continue  # one representative of what follows the close
        p = 1.0
        for t in range(end):
            p *= expected_next(model, [*prompt, *reply[:t]], **form)[reply[t]]
        expected[reply[:end]] = p
    assert sum(expected.values()) == pytest.approx(1, abs=1e-5)

    replies = sample(model, [prompt] * n, max_new_tokens=horizon, **form)
    counts = Counter(reply.token_ids for reply in replies)
    common = [reply for reply, p in expected.items() if p * n >= 5]
    rare = n - sum(counts[reply] for reply in common)
    rare_expected = n * (1 - sum(expected[reply] for reply in common))
    chi_square = sum((counts[reply] - n * expected[reply]) ** 2 / (n * expected[reply]) for reply in common)
    chi_square += (rare - rare_expected) ** 2 / max(rare_expected, 5)
    degrees = len(common)
    # Wilson and Hilferty: the .999 quantile of chi-square, z = 3.09.
    assert chi_square < degrees * (1 - 2 / (9 * degrees) + 3.09 * (2 / (9 * degrees)) ** 0.5) ** 3
    for reply in replies[:200]:
        assert sum(reply.log_prob) == pytest.approx(torch.tensor(expected[reply.token_ids]).log().item(), abs=1e-3)


def test_policy_log_prob_is_pi_at_that_temperature_before_filters_and_guidance():
    model = tiny(WithValues)
    (reply,) = sample(model, [[1, 2]], temperature=0.5, top_k=3, beta=2.0, max_new_tokens=5)
    ids = [1, 2]
    for token, policy_log_prob in zip(reply.token_ids, reply.policy_log_prob, strict=True):
        expected = (next_logits(model, ids) / 0.5).log_softmax(-1)[token].item()
        assert policy_log_prob == pytest.approx(expected, abs=1e-4)
        ids.append(token)


def test_beta_zero_is_the_policy_and_asks_no_head():
    model = tiny(WithValues)
    replies = sample(model, [[1, 2]] * 5, candidates=2, max_new_tokens=8)
    assert_same_replies(replies, sample(tiny(WithValues), [[1, 2]] * 5, max_new_tokens=8))
    assert all(reply.log_prob == pytest.approx(reply.policy_log_prob, abs=1e-5) for reply in replies)
    assert not model.asked


def test_a_large_beta_takes_the_best_q_on_the_support():
    model = tiny(WithValues)
    ids = [3, 1]
    (reply,) = sample(model, [ids], beta=1e4, top_k=6, max_new_tokens=6)
    for token in reply.token_ids:
        with torch.no_grad():
            outputs, hidden = model.forward_with_hidden(input_ids=torch.tensor([ids]))
            q = model.q_values(hidden[0, -1]).amin(0)
        support = outputs.logits[0, -1].topk(6).indices
        assert token == support[q[support].argmax()]
        ids.append(token)


def test_candidates_ask_for_their_rows_only_and_v_only_where_it_matters():
    model = tiny(WithValues)
    sample(model, [[1]], beta=1.0, candidates=3, max_new_tokens=1)
    assert model.asked == {"rows of Q": 3}
    sample(model, [[1]], beta=1.0, clip=0.5, max_new_tokens=1)
    assert model.asked == {"rows of Q": 3 + 24, "v": 1}


def test_q_is_computed_for_the_tokens_that_the_support_leaves():
    model = tiny(WithValues)
    logits = next_logits(model, [1])
    left = int((logits >= logits.max() + math.log(0.3)).sum())
    sample(model, [[1]], beta=1.0, support=0.3, max_new_tokens=1)
    assert 1 < left <= model.asked["rows of Q"] < 2 * left  # rounded up to a power of two


@pytest.mark.parametrize(
    "form", [{"support": 0.1, "clip": 0.0}, {"candidates": 5}, {"top_p": 0.8, "temperature": 0.7}]
)
def test_q_of_all_tokens_as_on_a_gpu_gives_the_same_replies(monkeypatch, form):
    before = sample(tiny(WithValues), PROMPTS, beta=1.0, max_new_tokens=8, **form)
    monkeypatch.setattr(DecodingConfig, "reads_all_of_q", lambda self, device: True)
    model = tiny(WithValues)
    assert_same_replies(before, sample(model, PROMPTS, beta=1.0, max_new_tokens=8, **form))
    assert model.asked["rows of Q"] % 24 == 0  # of the whole vocabulary, with each token


def test_as_many_candidates_as_tokens_change_nothing():
    prompts = [[1, 2], [3]]
    everything = sample(tiny(WithValues), prompts, beta=1.0, max_new_tokens=6)
    assert_same_replies(everything, sample(tiny(WithValues), prompts, beta=1.0, candidates=24, max_new_tokens=6))


def test_a_constant_added_to_q_changes_nothing_without_a_clip():
    class Shifted(WithValues):
        def q_values(self, hidden, candidates=None, target=True):
            return super().q_values(hidden, candidates) + 7 * hidden[..., :1]  # another constant in every state

    prompts = [[1, 2], [3], [5, 6, 7]]
    settings = {"beta": 1.0, "max_new_tokens": 6}
    plain, shifted = (sample(tiny(cls), prompts, **settings) for cls in (WithValues, Shifted))
    assert_same_replies(plain, shifted, tolerance=1e-3)
    plain, shifted = (sample(tiny(cls), prompts, clip=0.0, **settings) for cls in (WithValues, Shifted))
    assert [reply.log_prob for reply in plain] != [reply.log_prob for reply in shifted]


# Batches

PROMPTS = [[1, 2, 3, 4, 5, 6], [7], [8, 9], [1, 2, 3], [7]]


@pytest.mark.parametrize("settings", [{}, {"beta": 1.0, "candidates": 4}, {"temperature": 0.0}])
def test_a_ragged_batch_gives_each_row_what_it_gets_alone(settings):
    model = tiny(WithValues)
    together = sample(model, PROMPTS, [3, 4, 5, 6, 7], max_new_tokens=10, **settings)
    alone = [sample(model, [PROMPTS[i]], [3 + i], max_new_tokens=10, **settings)[0] for i in range(5)]
    assert_same_replies(together, alone)


def llama(cls=LlamaForCausalLM, config=LlamaConfig, **options):
    torch.manual_seed(0)
    return cls(
        config(
            vocab_size=24,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            initializer_range=0.6,
            **options,
        )
    ).eval()


def mistral():
    return llama(MistralForCausalLM, MistralConfig, sliding_window=4)


@pytest.mark.parametrize("family", [llama, mistral])
def test_other_families_are_equal_alone_and_together(family):
    model = family()
    together = sample(model, PROMPTS, max_new_tokens=8)
    assert_same_replies(together, [sample(model, [PROMPTS[i]], [i], max_new_tokens=8)[0] for i in range(5)])


def test_seeds_reproduce_and_differ():
    model = tiny()
    first = sample(model, [[1, 2]] * 20, max_new_tokens=8)
    assert first == sample(model, [[1, 2]] * 20, max_new_tokens=8)
    assert len({reply.token_ids for reply in first}) > 10
    assert len({reply.token_ids for reply in sample(model, [[1, 2]] * 20, [5] * 20, max_new_tokens=8)}) == 1
    later = sample(model, [[1, 2]] * 20, counters=[8] * 20, max_new_tokens=8)
    assert sum(one.token_ids != other.token_ids for one, other in zip(first, later, strict=True)) > 10


@pytest.mark.parametrize("name, value", [("MOST_TOKENS", 30), ("MOST_LOGITS", 48), ("ENOUGH_ROWS", 1)])
def test_how_rows_are_batched_changes_nothing(monkeypatch, name, value):
    model = tiny()
    before = sample(model, PROMPTS, max_new_tokens=10)
    monkeypatch.setattr(prompts_module, name, value)
    assert_same_replies(before, sample(model, PROMPTS, max_new_tokens=10))


def test_finished_rows_are_frozen_and_leave(monkeypatch):
    model = tiny()
    sizes = []
    forward = CachedModel.forward

    def counted(self, ids, *args):
        sizes.append(len(ids))
        return forward(self, ids, *args)

    monkeypatch.setattr(CachedModel, "forward", counted)
    replies = sample(model, [[i % 20] for i in range(40)], max_new_tokens=30)
    ends = [reply for reply in replies if reply.closed]
    assert 5 < len(ends) < 40
    assert all(reply.token_ids.count(23) == 1 and reply.token_ids[-1] == 23 for reply in ends)
    assert all(23 not in reply.token_ids and len(reply.token_ids) == 30 for reply in replies if not reply.closed)
    assert all(len(reply.token_ids) == len(reply.log_prob) == len(reply.policy_log_prob) for reply in replies)
    assert sizes[0] == 20  # equal prompts are read once
    assert sizes[1] == 40 and sizes[-1] < 40


def test_the_accelerator_rhythm_gives_the_same_replies(monkeypatch):
    model = tiny()
    before = sample(model, PROMPTS, max_new_tokens=11)
    monkeypatch.setattr(loop_module, "sync_every", lambda device: 4)
    assert_same_replies(before, sample(model, PROMPTS, max_new_tokens=11))


# Greedy, stops, options


def test_greedy_equals_generate():
    model = tiny()
    prompts = [[1, 2, 3], [4, 5, 6], [9, 8, 7]]
    ids = model.generate(torch.tensor(prompts), do_sample=False, max_new_tokens=12, eos_token_id=23, pad_token_id=0)
    replies = sample(model, prompts, temperature=0.0, max_new_tokens=12)
    for reply, row in zip(replies, ids[:, 3:].tolist(), strict=True):
        assert list(reply.token_ids) == row[: len(reply.token_ids)]
        assert len(reply.token_ids) == 12 or reply.token_ids[-1] == 23


def test_greedy_log_prob_is_of_the_guided_distribution_at_temperature_one():
    model = tiny(WithValues, 5)
    (reply,) = sample(model, [[0, 3]], temperature=0.0, beta=1.0, max_new_tokens=1)
    expected = expected_next(model, [0, 3], beta=1.0)
    assert reply.token_ids[0] == expected.index(max(expected))
    assert reply.log_prob[0] == pytest.approx(torch.tensor(max(expected)).log().item(), abs=1e-4)


@pytest.mark.parametrize("rhythm", [1, 4])
def test_a_stop_text_ends_a_reply_and_is_cut(monkeypatch, rhythm):
    monkeypatch.setattr(loop_module, "sync_every", lambda device: rhythm)
    model = tiny()
    free = sample(model, [[i % 20] for i in range(30)], max_new_tokens=20)
    stop = Counter(reply.text[3:5] for reply in free if len(reply.text) > 8).most_common(1)[0][0]
    stopped = sample(model, [[i % 20] for i in range(30)], max_new_tokens=20, stop=("?", stop))
    assert any(stop in reply.text for reply in free)
    for before, after in zip(free, stopped, strict=True):
        if stop in before.text:
            end = before.text.index(stop)
            assert (after.text, after.token_ids, after.closed) == (before.text[:end], None, True)
            assert len(after.log_prob) == len(after.policy_log_prob) == end + 2
        else:
            assert_same_replies([before], [after])


def test_max_new_tokens_leaves_a_reply_open():
    model = tiny()
    replies = sample(model, [[i] for i in range(20)], max_new_tokens=12)
    assert {reply.closed for reply in replies} == {True, False}
    assert all(reply.closed == (reply.token_ids[-1] == 23) for reply in replies)


def test_options_are_respected_and_follow_the_policy_restricted_to_them():
    model = tiny()
    allowed = ["ab", "acd", "b"]
    replies = sample(model, [[1, 2]] * 4000, options=[allowed] * 4000, max_new_tokens=4)
    assert {reply.text for reply in replies} == set(allowed)
    assert all(reply.closed and len(reply.token_ids) == len(reply.text) + 1 for reply in replies)
    first = next_logits(model, [1, 2])[:2].softmax(-1)  # a or b
    assert sum(reply.text == "b" for reply in replies) / 4000 == pytest.approx(first[1].item(), abs=0.03)
    b = next(reply for reply in replies if reply.text == "b")
    assert b.log_prob == pytest.approx((first[1].log().item(), 0.0), abs=1e-4)  # after "b" only the close is left
    full = next_logits(model, [1, 2]).log_softmax(-1)[1].item()
    assert b.policy_log_prob[0] == pytest.approx(full, abs=1e-4)


def test_options_may_differ_by_row_and_hold_under_guidance_and_filters():
    model = tiny(WithValues)
    options = [["aa", "bb"], None, ["c"], ["aa", "bb"]] * 10
    settings = {"beta": 2.0, "candidates": 2, "top_p": 0.9, "max_new_tokens": 6}
    replies = sample(model, [[1, 2]] * 40, options=options, **settings)
    assert all(allowed is None or reply.text in allowed for reply, allowed in zip(replies, options, strict=True))
    assert_same_replies(replies[1::4], sample(model, [[1, 2]] * 10, range(1, 40, 4), **settings))


def test_options_that_cannot_be_said_are_refused():
    with pytest.raises(InputError, match="max_new_tokens: found 3, expected at least 4, .* option 'abc'"):
        sample(tiny(), [[1]], options=[["abc"]], max_new_tokens=3)
    with pytest.raises(InputError, match="options: found an empty list"):
        sample(tiny(), [[1]], options=[[]])


# Caches between turns


def play(model, memory, turns=4, rows=(0, 1, 2), **settings):
    """Three rows of a dialogue whose environment says something of another length to each row in each turn."""
    windows = {row: [row + 1] * (row + 2) for row in rows}
    counters = dict.fromkeys(rows, 0)
    everything = []
    for turn in range(turns):
        asked = [row for row in rows if (row, turn) != (1, 2)]  # one row misses one turn
        prompts = [windows[row] for row in asked]
        replies = sample(
            model, prompts, asked, memory, asked, [counters[row] for row in asked], max_new_tokens=5, **settings
        )
        for row, reply in zip(asked, replies, strict=True):
            counters[row] += len(reply.log_prob)
            windows[row] = windows[row] + list(reply.token_ids or []) + [turn + 3] * (1 + (row + turn) % 3)
        everything += replies
    return everything


@pytest.mark.parametrize("settings", [{}, {"beta": 1.0}, {"stop": ("a", "f")}], ids=["plain", "guided", "stops"])
def test_cached_turns_equal_uncached_ones(settings):
    model = tiny(WithValues)
    memory = CacheMemory(2**20)
    assert_same_replies(play(model, memory, **settings), play(model, None, **settings))


def test_caches_are_really_used(monkeypatch):
    model, read = tiny(), []
    forward = CachedModel.forward

    def counted(self, ids, *args):
        read.append(ids.shape[1])
        return forward(self, ids, *args)

    monkeypatch.setattr(CachedModel, "forward", counted)
    memory = CacheMemory(2**20)
    first = sample(model, [[1, 2, 3], [4]], [0, 1], memory, [0, 1], max_new_tokens=4)
    longer = [[1, 2, 3, *first[0].token_ids, 5], [4, *first[1].token_ids, 5]]
    read.clear()
    sample(model, longer, [0, 1], memory, [0, 1], max_new_tokens=4)
    assert read[0] == 2  # the last sampled token and the new one
    read.clear()
    sample(model, [[2, *longer[0]], longer[1]], [0, 1], memory, [0, 1], max_new_tokens=1)
    assert read[0] == len(longer[0]) + 1  # the first row's window slid: it is read anew


def test_a_slid_window_and_a_full_memory_change_nothing():
    model = tiny()
    windows = [[[1, 2, 3, 4], [5, 6]], [[1, 2, 3, 4, 9, 9], [6, 7, 8]], [[3, 4, 9, 9, 1], [6, 7, 8, 2]]]
    for budget in (2**20, 0):
        memory = CacheMemory(budget)
        for prompts in windows:
            cached = sample(model, prompts, [0, 1], memory, [0, 1], max_new_tokens=4)
            assert_same_replies(cached, sample(model, prompts, [0, 1], max_new_tokens=4))
        assert bool(memory.rows) == bool(budget)


def test_models_with_sliding_layers_play_without_memory():
    model = mistral()
    memory = CacheMemory(2**20)
    assert_same_replies(play(model, memory), play(model, None))
    assert not memory.rows


# The door


def test_the_model_is_left_in_its_mode():
    model = tiny()
    model.train()
    model.transformer.h[0].eval()
    reply = sample(model, [[1]], max_new_tokens=4)
    assert model.training and model.transformer.h[1].training and not model.transformer.h[0].training
    assert reply == sample(model.eval(), [[1]], max_new_tokens=4)  # dropout was off


def test_beta_without_value_heads_is_refused():
    with pytest.raises(InputError, match="beta: found 2.0, expected 0, as GPT2LMHeadModel has no value heads"):
        Sampler(tiny(), Letters(24), DecodingConfig(beta=2.0))


def test_a_model_without_a_cache_is_refused():
    model = OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=24, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(InputError, match="model: found OpenAIGPTLMHeadModel, expected one that takes past_key_values"):
        Sampler(model, Letters(24), DecodingConfig())


@pytest.mark.parametrize(
    "name, value",
    [
        ("temperature", -0.1),
        ("top_k", 0),
        ("top_k", 2.5),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -1),
        ("support", 2),
        ("beta", float("nan")),
        ("beta", "high"),
        ("candidates", 0),
        ("clip", float("inf")),
        ("max_new_tokens", 0),
        ("max_new_tokens", None),
        ("q_reduce", "max"),
        ("stop", ("",)),
        ("temperature", True),
    ],
)
def test_settings_out_of_range_name_the_key(name, value):
    with pytest.raises(InputError, match=f"^{name}: found "):
        DecodingConfig(**{name: value})


def test_settings_survive_a_dict_and_unknown_ones_name_the_nearest():
    config = DecodingConfig(beta=4.0, stop=("\n",), top_k=5)
    assert DecodingConfig.from_dict(config.to_dict()) == config
    with pytest.raises(InputError, match="^decoding.temprature: found .*did you mean 'temperature'"):
        DecodingConfig.from_dict({"temprature": 1.0})
