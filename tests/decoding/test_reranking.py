"""Best-of-n by hand and by frequency, abstention at the coverage asked for, rejection sampling back to data."""

import numpy as np
import pytest
import torch

from offline_lmrl.decoding.reranking import CANDIDATE_STRIDE, BestOfN, calibrated_threshold, rejection_sample
from offline_lmrl.decoding.scorers import FunctionScorer
from offline_lmrl.environments.rollouts import rollout
from offline_lmrl.errors import InputError
from offline_lmrl.logs.protocols import Reply
from offline_lmrl.logs.trajectory import Turn
from offline_lmrl.ops.preferences import abstention_threshold, best_of_n
from offline_lmrl.tasks.gamble import Gamble

PROB = [0.4, 0.3, 0.2, 0.1]
VALUE = {"a": 2.0, "b": 0.0, "c": 3.0, "d": 1.0}
GOLD = FunctionScorer(lambda context, option: VALUE[option[-1].content])


class Dice:
    """A policy without a tokenizer: a word by its probability, from the row's seed and the number of turns."""

    def start(self, seeds):
        return DiceSession(seeds)


class DiceSession:
    def __init__(self, seeds):
        self.seeds = list(seeds)

    def reply(self, rows, histories, options=None):
        words = [options[i] if options and options[i] else list(VALUE) for i in range(len(rows))]
        drawn = []
        for row, history, own in zip(rows, histories, words, strict=True):
            u = np.random.default_rng([self.seeds[row], len(history)]).random()
            place = int(np.searchsorted(np.cumsum(PROB[: len(own)]) / sum(PROB[: len(own)]), u))
            drawn.append(Reply(own[place]))
        return drawn


def questions(n):
    return [[Turn("user", f"question {i}")] for i in range(n)]


def test_the_best_of_n_is_drawn_as_often_as_theory_says():
    n, draws = 3, 4000
    replies = BestOfN(Dice(), GOLD, n).start(range(draws)).reply(range(draws), [[Turn("user", "?")]] * draws)
    found = [sum(reply.text == word for reply in replies) / draws for word in VALUE]
    expected = best_of_n(torch.tensor(PROB), torch.tensor(list(VALUE.values())), n)
    np.testing.assert_allclose(found, expected, atol=4 * 0.5 / draws**0.5)
    # by hand: c scores best, P = 1 − .8³ = .488; b only if all three are b: .3³ = .027
    assert expected[2].item() == pytest.approx(0.488) and expected[1].item() == pytest.approx(0.027)


def test_one_sample_is_the_policys_own_and_more_are_its_further_ones():
    plain = Dice().start([5, 6]).reply([0, 1], questions(2))
    assert BestOfN(Dice(), GOLD, 1).start([5, 6]).reply([0, 1], questions(2)) == plain
    drawn = BestOfN(Dice(), GOLD, 3).start([5, 6]).candidates([1], questions(1))
    seeds = [6 + j * CANDIDATE_STRIDE for j in range(3)]
    assert drawn[0][0] == Dice().start(seeds).reply(range(3), questions(1) * 3)
    assert drawn[0][1].tolist() == [VALUE[reply.text] for reply in drawn[0][0]]


def test_a_reply_says_what_it_scored_among_how_many_and_whether_it_was_held_back():
    drawn = BestOfN(Dice(), GOLD, 3).start([5]).candidates([0], questions(1))[0][1]
    (best,) = BestOfN(Dice(), GOLD, 3, threshold=max(drawn)).start([5]).reply([0], questions(1))
    assert best.labels == {"score": max(drawn), "n": 3, "abstained": False} and best.text in VALUE
    (none,) = BestOfN(Dice(), GOLD, 3, threshold=max(drawn) + 1).start([5]).reply([0], questions(1))
    assert none.labels == {"score": max(drawn), "n": 3, "abstained": True} and none.text == "I don't know."


def test_rows_keep_their_seed_when_others_have_ended_and_options_bind_all_samples():
    session = BestOfN(Dice(), GOLD, 4).start(range(3))
    alone = BestOfN(Dice(), GOLD, 4).start([2]).reply([0], questions(1))
    assert session.reply([2], questions(1)) == alone
    assert {reply.text for reply in session.reply([0, 1], questions(2), [["b", "d"], ["b"]])} <= {"b", "d"}


def test_equal_scores_leave_the_first_sample():
    indifferent = FunctionScorer(lambda context, option: 1.0)
    assert BestOfN(Dice(), indifferent, 5).start([3]).reply([0], questions(1)) == Dice().start([3]).reply(
        [0], questions(1)
    )


@pytest.mark.parametrize("coverage", [0.3, 0.7])
def test_the_threshold_answers_the_share_asked_for_and_the_more_it_drops_the_better_the_rest(coverage):
    # the score is the hidden quality of the answer, which differs between questions
    quality = np.random.default_rng(0).normal(size=10_000)

    def score(context, option):
        return quality[int(context[-1].content.split()[1])] + 0.1 * VALUE[option[-1].content]

    reranked = BestOfN(Dice(), FunctionScorer(score), 2)
    everything = questions(10_000)
    threshold = calibrated_threshold(reranked, everything[:5000], coverage)
    careful = BestOfN(Dice(), FunctionScorer(score), 2, threshold, "pass")
    session = careful.start(range(5000, 10_000))
    replies = session.reply(range(5000), everything[5000:])
    answered = np.array([reply.text != "pass" for reply in replies])
    assert answered.mean() == pytest.approx(coverage, abs=0.02)  # other questions: three standard deviations
    on_its_own = calibrated_threshold(reranked, everything[5000:], coverage, range(5000, 10_000))
    scores = np.array([session.labels(row)["scores"][0] for row in range(5000)])
    assert (scores >= on_its_own).mean() == coverage
    assert [session.labels(row)["abstained"] for row in range(5000)] == (~answered).astype(int).tolist()
    right = quality[5000:] > 0
    shares = (0.2, 0.4, 0.6, 0.8, 1.0)
    accuracy = [right[scores >= abstention_threshold(torch.tensor(scores), share)].mean() for share in shares]
    assert accuracy == sorted(accuracy, reverse=True) and accuracy[0] == 1.0 and accuracy[-1] == right.mean()


class Reader:
    """A policy that says the first word of what it reads first."""

    def start(self, seeds):
        return self

    def reply(self, rows, histories, options=None):
        return [Reply(history[0].content.split()[0]) for history in histories]


def test_candidates_read_the_contexts_in_turn_and_the_scorer_the_history():
    seen = []

    def score(context, option):
        seen.append(context[0].content)
        return VALUE[option[-1].content]

    def documents(history):
        return [(Turn("system", f"{word} document"), *history) for word in ("b", "c", "d")]

    session = BestOfN(Reader(), FunctionScorer(score), 5, contexts=documents).start([0, 1])
    replies, scores = session.candidates([0, 1], questions(2))[1]
    assert [reply.text for reply in replies] == ["b", "c", "d", "b", "c"]
    assert set(seen) == {"question 0", "question 1"} and scores.tolist() == [0.0, 3.0, 1.0, 0.0, 3.0]
    made = rejection_sample(BestOfN(Reader(), GOLD, 5, contexts=documents), questions(1))
    assert [turn.content for turn in made[0].turns] == ["question 0", "c"]
    with pytest.raises(InputError, match="contexts: found 3, expected 1 to n"):
        BestOfN(Reader(), GOLD, 2, contexts=documents).start([0]).reply([0], questions(1))


def test_best_of_n_plays_environments_and_says_what_it_scored():
    greedy = FunctionScorer(lambda context, option: float(option[-1].content == "a"))
    played = rollout(BestOfN(Dice(), greedy, 8), Gamble, range(6))
    assert [row.labels["abstained"] for row in played] == [0] * 6 and len(played[0].labels["scores"]) == 1
    silent = rollout(BestOfN(Dice(), greedy, 2, threshold=2.0, abstention="safe"), Gamble, range(6))
    assert [row.total_return for row in silent] == [5.0] * 6 and silent[0].labels["abstained"] == 1


def test_rejection_sampling_keeps_the_best_different_replies_above_the_threshold():
    drawn = BestOfN(Dice(), GOLD, 12).start([0]).candidates([0], questions(1))[0][0]
    words = sorted({reply.text for reply in drawn}, key=lambda word: -VALUE[word])
    made = rejection_sample(BestOfN(Dice(), GOLD, 12), questions(1), keep=2)
    assert [row.turns[-1].content for row in made] == words[:2] and made[0].total_return == VALUE[words[0]]
    assert [row.labels["rank"] for row in made] == [0, 1] and made[0].labels["n"] == 12
    high = rejection_sample(BestOfN(Dice(), GOLD, 12, threshold=2.5), questions(1), keep=2)
    assert [row.turns[-1].content for row in high] == [word for word in words[:2] if VALUE[word] >= 2.5]
    with pytest.raises(InputError, match="keep: found 3, expected 1 to n"):
        rejection_sample(BestOfN(Dice(), GOLD, 2), questions(1), keep=3)


def test_settings_out_of_range_are_refused():
    with pytest.raises(InputError, match="n: found 0"):
        BestOfN(Dice(), GOLD, 0)
    with pytest.raises(InputError, match="coverage: found 1.5"):
        calibrated_threshold(BestOfN(Dice(), GOLD, 1), questions(2), 1.5)
