"""Scripted Wordle players: what each may say, and what they earn on our lists."""

import functools
import statistics
from pathlib import Path

import numpy as np
import pytest
import yaml

from offline_lmrl.environments.rollouts import rollout
from offline_lmrl.environments.scripted import Forced
from offline_lmrl.errors import InputError
from offline_lmrl.evaluation.metrics import ScoreScale
from offline_lmrl.tasks.wordle import (
    CODES,
    PLAYERS,
    TRIES,
    Knowledge,
    Lexicon,
    Scripted,
    Wordle,
    consistent,
    imagined_return,
    lexicon,
    mixture,
    monte_carlo,
    uniform,
    user,
)

CONFIGS = Path(__file__).parents[2] / "configs" / "wordle"

# Mean returns over 4,096 games by words and rule, as measured: about five games of each word, or a hundred of forty.
MEANS = {
    ("common", "real"): {
        "optimal": -2.109,
        "start_word": -2.394,
        "repeat": -5.231,
        "random_mixture": -4.343,
        "consistent": -2.613,
        "uniform": -5.983,
        "wrong": -5.993,
    },
    ("common", "simplified"): {"optimal": -2.110, "random_mixture": -4.363},
    ("forty", "real"): {"optimal": -1.376, "random_mixture": -3.386},
}
# The chance is numpy's, whose streams may change between versions: two independent means of 4,096 games differ by four
# standard errors of √2 · s.d. / 64 at most, and the largest s.d. is 1.8.
TOLERANCE = {"optimal": 0.005} | dict.fromkeys(["start_word", "consistent"], 0.09)  # no chance; s.d. .9
WIDEST = 0.16


def played(name, episodes, words="common", duplicates="real"):
    game = functools.partial(Wordle, words, duplicates)
    return rollout(Scripted(PLAYERS[name], game()), game, range(episodes))


def guesses(trajectory):
    return ["".join(turn.content.split()) for turn in trajectory.turns if turn.is_trainable]


def knowledge(trajectory, words):
    """What is known before each guess of a game."""
    known, before = Knowledge(words, words.everything), []
    for guess, told in zip(guesses(trajectory), [*trajectory.turns[2::2], None], strict=True):
        before.append(known)
        if told is not None:
            known = known.after(guess, told.content.replace(" ", ""))
    return before


@pytest.mark.parametrize("words, duplicates, name", [(*game, name) for game in MEANS for name in MEANS[game]])
def test_mean_return_over_4096_games_is_the_pinned_one(words, duplicates, name):
    mean = statistics.fmean(t.total_return for t in played(name, 4096, words, duplicates))
    assert mean == pytest.approx(MEANS[words, duplicates][name], abs=TOLERANCE.get(name, WIDEST))


def test_every_player_is_pinned_but_the_person_and_the_slow_one():
    assert set(PLAYERS) - set(MEANS["common", "real"]) == {"user", "monte_carlo"}


@pytest.mark.parametrize("name", ["compare", "two_piece"])
def test_scale_of_a_shipped_comparison_runs_from_the_logs_player_to_the_optimal_one(name):
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    means = MEANS[config["environment"].get("words", "common"), "real"]
    assert config["evaluation"]["score"] == {"min": -6, "mean": means["random_mixture"], "max": means["optimal"]}


def test_published_scores_are_those_of_the_published_returns():
    raw = {"BC": -2.814, "30% BC": -2.850, "MC": -2.160, "ILQL": -2.0354, "PPO": -2.626}
    scale = ScoreScale(-6, -4.121715, -1.935)
    shown = yaml.safe_load((CONFIGS / "compare.yaml").read_text())["reference"]
    assert {name: columns["normalised"] for name, columns in shown.items()} == {
        name: pytest.approx(scale.normalise(value), abs=0.06) for name, value in raw.items()
    }


def test_mean_over_all_secrets_is_that_of_a_secret_drawn_anew_at_every_guess():
    words = lexicon("forty", "simplified")

    def expected(known):
        """Return-to-go of the optimal player where each answer is that of a newly drawn consistent word."""
        if len(known.tries) == TRIES:
            return 0.0
        guess = PLAYERS["optimal"](known, None)
        total = 0.0
        for secret in words.members(known.consistent):
            if words.words[secret] != guess:
                told = words.table[words.index[guess], secret]
                total += -1 + expected(known.after(guess, [text for text, code in CODES.items() if code == told][0]))
        return total / known.consistent.bit_count()

    drawn_once = statistics.fmean(t.total_return for t in played("optimal", 40, "forty", "simplified"))
    assert drawn_once == pytest.approx(expected(Knowledge(words, words.everything)), abs=1e-9)


@pytest.mark.parametrize("name, fits", [("consistent", {True}), ("wrong", {False}), ("random_mixture", {True, False})])
def test_words_of_a_player_fit_the_colours_as_it_promises(name, fits):
    words = lexicon("common", "real")
    found = set()
    for game in played(name, 100):
        for known, guess in zip(knowledge(game, words)[1:], guesses(game)[1:], strict=True):
            found.add(bool(known.consistent >> words.index[guess] & 1))
    assert found == fits


def test_start_word_opens_with_one_of_the_28_most_informative():
    openings = {guesses(game)[0] for game in played("start_word", 500)}
    assert openings == set(lexicon("common", "real").by_information[:28])


def test_repeat_says_its_first_two_words_again_and_loses_unless_one_is_right():
    for game in played("repeat", 200):
        said = guesses(game)
        assert set(said[2:]) <= set(said[:2])
        assert game.labels["won"] == (game.labels["secret"] in said[:2])
    assert len({tuple(guesses(game)) for game in played("repeat", 200)}) > 3  # in no fixed order


def test_mixture_takes_the_first_player_so_often():
    words = lexicon("common", "real")
    one = Knowledge(words, 1)  # only the first word is consistent
    player, rng = mixture(0.3, consistent, uniform), np.random.default_rng(0)
    said = [player(one, rng) for _ in range(2000)]
    # .3 and hardly ever by chance: 600, give or take four standard deviations of 20
    assert 520 < said.count(words.words[0]) < 680


def test_monte_carlo_sees_the_word_that_tells_the_others_apart():
    words = Lexicon(["mmmma", "mmmmb", "mmmmc", "mmmmd", "abcdz"], "real")
    # abcdz, then certainty: −4/5. mmmma, then one of three by chance: (0 − 1 − 1 − 2 − 3)/5 = −1.4.
    known = Knowledge(words, words.everything)
    assert monte_carlo(known, np.random.default_rng(0), samples=200) == "abcdz"
    last = known.after("mmmma", "ggggb").after("mmmmb", "ggggb").after("mmmmc", "ggggb")
    assert monte_carlo(last, np.random.default_rng(0)) == "mmmmd"


def test_monte_carlo_plays_better_than_what_it_imagines_and_counts_its_tries():
    games = played("monte_carlo", 160, "forty")
    # consistent play earns −1.76 there, s.d. .84; 160 games have a standard error of .07
    assert -1.76 < statistics.fmean(game.total_return for game in games) < -1.3
    words = lexicon("forty", "real")
    fifth = Knowledge(words, words.everything, (("stone", ""),) * 5)
    returns = {imagined_return(fifth, guess, np.random.default_rng(guess)) for guess in range(40)}
    assert returns <= {0, -1}


def test_game_does_not_depend_on_its_neighbours_and_its_past_may_be_anybodys():
    game = functools.partial(Wordle, "forty")
    policy = Scripted(PLAYERS["random_mixture"], game())
    assert rollout(policy, game, [3, 4, 5])[2] == rollout(policy, game, [5])[0]
    forced = rollout(Forced(Scripted(PLAYERS["consistent"], game()), ["s t a r e", "nonsense"]), game, range(40))
    words = lexicon("forty", "real")
    for row in forced:
        said = guesses(row)
        assert said[0] == "stare"
        if len(said) > 2:
            told = row.turns[2].content.replace(" ", "")
            assert row.turns[4].content == "unknown word"
            assert words.consistent(words.index["stare"], CODES[told]) >> words.index[said[2]] & 1


def test_person_at_the_keyboard_plays_one_game(monkeypatch, capsys):
    typed = iter(["Stare ", "what", "stone", "snare", "share", "spare"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    game = functools.partial(Wordle, "forty", secret="share")
    (row,) = rollout(Scripted(user, game()), game, [0])
    assert guesses(row) == ["stare", "what", "stone", "snare", "share"]
    assert (row.total_return, row.labels["invalid"]) == (-4, 2)
    assert "stare  gbggg  (" in (shown := capsys.readouterr().out) and "what  unknown word" in shown
    monkeypatch.setattr("builtins.input", lambda prompt: (_ for _ in ()).throw(EOFError))
    with pytest.raises(InputError, match="standard input: found its end"):
        rollout(Scripted(user, game()), game, [0])
