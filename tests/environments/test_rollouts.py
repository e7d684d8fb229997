"""Rollouts with a scripted counting game: who plays, what is kept, how episodes end."""

import pytest

from offline_lmrl.environments.rollouts import MAX_TURNS, rollout
from offline_lmrl.errors import InputError
from offline_lmrl.logs.protocols import Reply, StepResult, is_vector
from offline_lmrl.logs.trajectory import Turn
from offline_lmrl.tasks import ENVIRONMENTS, make_environment


class Countdown:
    """Starts at the seed; "go" counts down and pays −1; at 0 it ends and pays 10. After 3 steps it is cut."""

    def __init__(self, limit=3):
        self.limit = limit

    def reset(self, seed):
        self.left, self.steps = seed, 0
        return [Turn("system", "count"), Turn("user", str(seed))]

    def step(self, text):
        self.left -= text == "go"
        self.steps += 1
        if self.left == 0:
            return StepResult([], 10.0, True, False)
        return StepResult([Turn("user", str(self.left))], -1.0, False, self.steps == self.limit)

    def labels(self):
        return {"left": self.left}


class Script:
    """Says "go", with made-up ids; remembers what it was asked."""

    fingerprint = "script"

    def __init__(self):
        self.asked = []

    def start(self, seeds):
        self.seeds = seeds
        return self

    def reply(self, rows, histories, options=None):
        self.asked.append((list(rows), [len(history) for history in histories], options))
        return [Reply("go", (5, 6), (-0.5, -0.25), (-1.0, -2.0)) for _ in rows]


def test_episodes_end_terminated_or_cut_and_keep_the_last_observation():
    one, two, five = rollout(Script(), Countdown, [1, 2, 5])
    assert [turn.content for turn in one.turns] == ["count", "1", "go"]
    assert [turn.content for turn in two.turns] == ["count", "2", "go", "1", "go"]
    assert [turn.content for turn in five.turns] == ["count", "5", "go", "4", "go", "3", "go", "2"]
    assert [one.terminated, two.terminated, five.terminated] == [True, True, False]
    assert [t.total_return for t in (one, two, five)] == [10.0, 9.0, -3.0]
    assert [t.labels["left"] for t in (one, two, five)] == [0, 0, 2]


def test_agent_turns_keep_what_was_sampled():
    (episode,) = rollout(Script(), Countdown, [2])
    agent = [turn for turn in episode.turns if turn.is_trainable]
    assert [turn.reward for turn in agent] == [-1.0, 10.0]
    assert {turn.token_ids for turn in agent} == {(5, 6)}
    assert {turn.behaviour_log_prob for turn in agent} == {(-0.5, -0.25)}
    assert episode.labels["seed"] == 2
    assert episode.labels["tokenizer"] == "script"
    assert episode.labels["policy_log_prob"] == [[-1.0, -2.0], [-1.0, -2.0]]


def test_every_episode_has_the_prompt_of_its_seed():
    class Prompted(Script):
        def start(self, seeds, few_shot):
            self.given = [*getattr(self, "given", []), *few_shot]
            return super().start(seeds)

    policy = Prompted()
    rollout(policy, Countdown, [4, 1, 2], batch_size=2, few_shot=lambda seed: None if seed == 1 else [seed])
    assert policy.given == [[4], None, [2]]


def test_only_live_rows_are_asked():
    policy = Script()
    rollout(policy, Countdown, [2, 1, 5])
    assert policy.asked == [
        ([0, 1, 2], [2, 2, 2], [None] * 3),
        ([0, 2], [4, 4], [None] * 2),
        ([2], [6], [None]),
    ]


def test_max_turns_cuts_an_episode():
    (episode,) = rollout(Script(), Countdown, [5], max_turns=2)
    assert episode.turns[-1].content == "3"
    assert not episode.terminated


def test_an_environment_that_never_ends_is_cut_all_the_same():
    class Endless(Countdown):
        def step(self, text):
            return StepResult([Turn("user", "on")], 0.0, False, False)

    (episode,) = rollout(Script(), Endless, [1])
    assert sum(turn.is_trainable for turn in episode.turns) == MAX_TURNS and not episode.terminated


def test_a_vector_environment_needs_reset_and_step_alone():
    class Bare:
        def reset(self, seeds):
            return [[Turn("user", str(seed))] for seed in seeds]

        def step(self, rows, texts):
            return [StepResult([], float(row), True, False) for row in rows]

    class Silent:
        def start(self, seeds):
            return self

        def reply(self, rows, histories, options=None):
            return [Reply("go") for _ in rows]

    played = rollout(Silent(), Bare(), [4, 9])
    assert [t.total_return for t in played] == [0.0, 1.0]
    assert [t.labels for t in played] == [{"seed": 4}, {"seed": 9}]


@pytest.mark.parametrize("reward", [None, "much", float("nan"), float("inf"), [1.0, 2.0]])
def test_an_environment_that_pays_no_number_is_one_line(reward):
    class Odd(Countdown):
        def step(self, text):
            return StepResult([], reward, True, False)

    with pytest.raises(InputError, match="found the reward .* of seed 4, expected a finite number"):
        rollout(Script(), Odd, [4])


def test_batches_give_the_same_episodes_and_report_progress():
    seen = []
    batched = rollout(Script(), Countdown, [1, 5, 2], batch_size=2, progress=lambda *count: seen.append(count))
    assert batched == rollout(Script(), Countdown, [1, 5, 2])
    assert seen == [(1, 3), (2, 3), (3, 3)]


class Echo:
    """A VectorEnvironment with options and no labels: pays for every row's own number."""

    def reset(self, seeds):
        self.seeds = list(seeds)
        return [[Turn("user", str(seed))] for seed in seeds]

    def step(self, rows, texts):
        return [
            StepResult([], float(text == str(self.seeds[row])), True, False)
            for row, text in zip(rows, texts, strict=True)
        ]

    def options(self, row):
        return ["7", "8"] if self.seeds[row] == 7 else None


class Picker:
    def start(self, seeds):
        return self

    def reply(self, rows, histories, options=None):
        return [Reply("?" if allowed is None else allowed[0]) for allowed in options]


def test_a_vector_environment_gives_options_and_text_alone_is_enough():
    seven, nine = rollout(Picker(), Echo(), [7, 9])
    assert [seven.total_return, nine.total_return] == [1.0, 0.0]
    assert seven.turns[-1] == Turn("assistant", "7", reward=1.0)
    assert dict(seven.labels) == {"seed": 7}


def test_a_single_environment_object_is_refused():
    with pytest.raises(InputError, match="factory of it, such as the class Countdown"):
        rollout(Script(), Countdown(), [1])


@pytest.mark.parametrize("name", ["batch_size", "max_turns"])
def test_settings_out_of_range_are_refused(name):
    with pytest.raises(InputError, match=f"{name}: found 0"):
        rollout(Script(), Countdown, [1], **{name: 0})


def test_known_environments_can_be_made():
    assert rollout(Picker(), make_environment("gamble"), [0])[0].total_return == 0.0
    for name in sorted(set(ENVIRONMENTS) - {"negotiation", "prompts"}):  # these need settings
        assert not is_vector(make_environment(name)())


def test_your_own_environment_is_found_by_its_dotted_name(tmp_path, monkeypatch):
    (tmp_path / "my_game.py").write_text("from offline_lmrl.tasks.gamble import Gamble as Game\n")
    monkeypatch.chdir(tmp_path)
    assert rollout(Picker(), make_environment("my_game:Game"), [0])[0].terminated


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("mase", {}, "found 'mase', expected package.module:Class or one of maze, .*did you mean 'maze'"),
        ("no.such.module:Class", {}, "cannot be imported"),
        ("offline_lmrl.tasks.corridor:Corridr", {}, "has no Corridr"),
        ("math:Corridor", {}, "has no Corridor"),
        ("maze", {"colour": "red"}, "colour"),
        ("maze", {"observed": "half"}, "half"),
    ],
)
def test_a_wrong_name_or_setting_is_one_line(name, settings, message):
    with pytest.raises(InputError, match=message) as error:
        make_environment(name, **settings)
    assert "\n" not in str(error.value)
