"""Helpers for the tests of tasks."""


def play(environment, seed, texts):
    """The turns of a reset, and the results of one step per text."""
    first = environment.reset(seed)
    return first, [environment.step(text) for text in texts]


def agent_turns(trajectory):
    return [turn for turn in trajectory.turns if turn.is_trainable]
