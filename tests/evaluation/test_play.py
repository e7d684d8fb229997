import pytest

from offline_lmrl.errors import InputError
from offline_lmrl.evaluation.play import evaluate_policy
from offline_lmrl.logs.protocols import Reply, StepResult
from offline_lmrl.logs.trajectory import Turn


class Counting:
    """Pays the number that is said, for seed % 3 + 1 turns; the last turn of seed 2 (mod 3) is cut instead."""

    def reset(self, seed):
        self.left, self.cut, self.invalid, self.start = seed % 3 + 1, seed % 3 == 2, 0, [seed % 2, 7]
        return (Turn("user", "how much?"),)

    def step(self, text):
        self.left -= 1
        self.invalid += not text.isdigit()
        over = self.left == 0
        reward = float(text) if text.isdigit() else 0.0
        return StepResult((Turn("user", "and?"),), reward, over and not self.cut, over and self.cut)

    def labels(self):
        return {"invalid": self.invalid, "start": self.start, "odd": self.start[0] == 1, "score": 3}


class Speaker:
    """Says the same text always, as two tokens; remembers the seeds it was started with."""

    def __init__(self, text="2"):
        self.text, self.started = text, []

    def start(self, seeds):
        self.started += seeds
        return self

    def reply(self, rows, histories, options=None):
        return [Reply(self.text, (1, 2), (-0.5, -0.5), (-0.5, -0.5)) for _ in rows]


def test_an_episode_is_one_row():
    result = evaluate_policy(Speaker(), Counting, [3, 4, 5])
    labels = {"invalid": 0, "start": [0, 7], "odd": False, "score": 3}
    assert result.episodes[1] == {
        "seed": 4,
        "repeat": 0,
        "cluster": 4,
        "score": 4.0,
        "turns": 2,
        "tokens": 4,
        "invalid": 0,
        "truncated": False,
        "labels": labels,
    }
    assert [row["truncated"] for row in result.episodes] == [False, False, True]
    assert [t.total_return for t in result.trajectories] == [2.0, 4.0, 6.0]


def test_the_summary_is_the_mean_over_episodes_with_rates_per_turn():
    summary = evaluate_policy(Speaker("two"), Counting, [0, 1, 2]).summary()
    assert summary == {
        "n": 3,
        "turns": 2.0,
        "tokens": 4.0,
        "invalid_rate": 1.0,
        "truncated_rate": 1 / 3,
        "labels": {"odd": 1 / 3},
    }


class Noting(Speaker):
    """A speaker with a tokenizer, whose words were guided away from its policy by a quarter nat each."""

    fingerprint = "f"

    def reply(self, rows, histories, options=None):
        return [Reply(self.text, (1, 2), (-0.5, -0.5), (-0.75, -0.75)) for _ in rows]


def test_kl_is_the_sum_over_an_episodes_tokens():
    result = evaluate_policy(Noting(), Counting, [0, 1, 2])
    assert result.kl() == pytest.approx(0.5 * 2)  # half a nat a turn, two turns in the mean
    assert evaluate_policy(Speaker(), Counting, [0]).kl() is None


def test_scores_stand_beside_their_cells():
    result = evaluate_policy(Speaker(), Counting, [3, 4, 5], repeats=2, cluster="odd")
    assert result.cells() == [(True, 16.0, 4), (False, 8.0, 2)]  # seeds 3 and 5 pay 2 and 6, seed 4 pays 4
    assert result.scores() == [[2.0, 6.0, 2.0, 6.0], [4.0, 4.0]]


def test_repeats_keep_the_episode_and_change_the_dice_only():
    speaker = Speaker()
    result = evaluate_policy(speaker, Counting, [1, 2], repeats=3)
    assert [(row["seed"], row["repeat"]) for row in result.episodes] == [(s, r) for r in range(3) for s in (1, 2)]
    assert len(set(speaker.started)) == 6 and speaker.started[:2] == [1, 2]
    assert result.cells() == [(1, 12.0, 3), (2, 18.0, 3)]  # 3 · 4 and 3 · 6


def test_repeats_keep_the_prompt_of_the_episode():
    class Prompted(Speaker):
        def start(self, seeds, few_shot):
            self.given = [*getattr(self, "given", []), *few_shot]
            return super().start(seeds)

    speaker = Prompted()
    evaluate_policy(speaker, Counting, [1, 2], repeats=2, few_shot=lambda seed: [seed])
    assert speaker.given == [[1], [2], [1], [2]] and len(set(speaker.started)) == 4


def test_a_cluster_is_the_label_that_episodes_share():
    result = evaluate_policy(Speaker(), Counting, [0, 1, 2], cluster="start")
    assert result.cells() == [("[0, 7]", 8.0, 2), ("[1, 7]", 4.0, 1)]
    assert result.score().mean == 4.0


def test_a_cluster_that_is_no_label_is_an_input_error():
    with pytest.raises(InputError, match="cluster: found 'scenario', expected a label of the environment: inv"):
        evaluate_policy(Speaker(), Counting, [0], cluster="scenario")


def test_progress_counts_over_repeats():
    told = []
    evaluate_policy(Speaker(), Counting, [0, 1], repeats=2, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (4, 4) and sorted(told) == told
