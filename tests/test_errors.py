"""Errors are one short line, whatever was found."""

import signal
import time

import pytest

from offline_lmrl.errors import LONGEST_MESSAGE, InputError, shown, time_limit

HOLDS_ITSELF: list = []
HOLDS_ITSELF.append(HOLDS_ITSELF)
BOMB: list = ["x"]
for _ in range(12):
    BOMB = [BOMB] * 9
DEEP: list = []
for _ in range(100_000):
    DEEP = [DEEP]
LARGE = [
    "x" * 10**7,
    b"x" * 10**7,
    HOLDS_ITSELF,
    BOMB,
    DEEP,
    {"a": BOMB},
    10**6000,
    [10**6000],
    {"x" * 10**6: 1},
    list(range(10**6)),
]


@pytest.mark.parametrize("value", [None, True, 1.5, -7, "a 'word'", b"b", [], (), {}, (1,), [1, "a"], (1, 2),
                                   {"a": [1, {"b": None}], 3: ()}, float("nan"), "\x1b[2J\n"])  # fmt: skip
def test_a_short_value_is_shown_as_python_writes_it(value):
    assert shown(value) == repr(value)


@pytest.mark.parametrize("value", LARGE, ids=range(len(LARGE)))
def test_a_large_value_is_shown_at_once_and_shortly(value):
    start = time.perf_counter()
    assert len(shown(value)) <= 60
    assert time.perf_counter() - start < 0.5


def test_a_long_message_keeps_its_ends():
    said = str(InputError("file:1: field: found " + "x" * 10**6 + ", expected less"))
    assert len(said) <= LONGEST_MESSAGE and said.startswith("file:1: field: ") and said.endswith(", expected less")


def test_a_program_without_an_end_is_stopped_and_the_timer_of_others_goes_on():
    rang = []
    before = signal.signal(signal.SIGALRM, lambda *_: rang.append(True))
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(InputError, match="template: found one that runs for more than 0.1 s, "):
            with time_limit(0.1, "template"):
                while True:
                    pass
        assert not rang
        time.sleep(0.4)
        assert rang
    finally:
        signal.signal(signal.SIGALRM, before)
