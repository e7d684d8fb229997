"""Scripted play: cut episodes keep their end, and given turns come before the policy's."""

from offline_lmrl.environments.rollouts import rollout
from offline_lmrl.environments.scripted import Forced, scripted_episode
from offline_lmrl.logs.protocols import Reply, StepResult
from offline_lmrl.logs.trajectory import Turn


class Echo:
    """Repeats the agent for three turns, then cuts; "stop" ends it."""

    def reset(self, seed):
        self.steps = 0
        return (Turn("user", "talk"),)

    def step(self, text):
        self.steps += 1
        if text == "stop":
            return StepResult((), 1.0, True, False)
        return StepResult((Turn("user", text),), 0.5, False, self.steps == 3)


class Counter:
    """Says how many agent turns it has seen and how much they earned; remembers the seeds."""

    def start(self, seeds):
        self.seeds = list(seeds)
        return self

    def reply(self, rows, histories, options=None):
        earned = [[turn.reward for turn in history if turn.is_trainable] for history in histories]
        return [Reply(f"{len(rewards)} {sum(rewards)}") for rewards in earned]


def test_an_episode_ends_where_the_environment_ends_or_cuts_it():
    environment = Echo()
    texts = iter(["a", "stop"])
    ended = scripted_episode(environment, environment.reset(0), lambda: next(texts), task="echo")
    assert [turn.content for turn in ended.turns] == ["talk", "a", "a", "stop"]
    assert [turn.reward for turn in ended.turns] == [None, 0.5, None, 1.0]
    assert (ended.terminated, ended.task, ended.source) == (True, "echo", "scripted")
    cut = scripted_episode(environment, environment.reset(0), lambda: "a")
    assert [turn.content for turn in cut.turns] == ["talk"] + ["a"] * 6
    assert not cut.terminated


def test_given_turns_come_first_and_the_policy_goes_on_from_what_they_earned():
    policy = Counter()
    played = rollout(Forced(policy, ["x", "y"]), Echo, [4, 5])
    for episode in played:
        assert [turn.content for turn in episode.turns if turn.is_trainable] == ["x", "y", "2 1.0"]
    assert policy.seeds == [4, 5]
