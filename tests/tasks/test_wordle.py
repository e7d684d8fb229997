"""Wordle: both colour rules by hand and by brute force, sets of words, the game's rewards, and the lists we ship."""

import configparser
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from offline_lmrl.errors import InputError
from offline_lmrl.tasks.wordle import (
    CODES,
    COLOURS,
    LISTS,
    TRIES,
    Lexicon,
    Wordle,
    colour_codes,
    lexicon,
    read_words,
)

SIZES = {"common": 833, "forty": 40}


def coloured(guess, secret, duplicates):
    """The answer as the game gives it, without spaces."""
    letters = np.array([list(secret.encode())])
    return COLOURS[colour_codes(np.array(list(guess.encode())), letters, duplicates)[0]]


def by_hand(guess, secret, duplicates):
    """The same from the rule's wording: greens, then yellows from the left while copies are left."""
    told = ["g" if a == b else "b" for a, b in zip(guess, secret, strict=True)]
    left = Counter(b for a, b in zip(guess, secret, strict=True) if a != b)
    for place, letter in enumerate(guess):
        if told[place] == "b" and (left[letter] if duplicates == "real" else letter in secret):
            told[place] = "y"
            left[letter] -= 1
    return "".join(told)


def play(game, seed, texts):
    first = game.reset(seed)
    return first, [game.step(text) for text in texts]


@pytest.mark.parametrize(
    "guess, secret, real, simplified",
    [
        ("crane", "cargo", "gyybb", "gyybb"),  # no letter twice: the rules agree
        ("eerie", "crane", "bbybg", "yyybg"),  # crane's one e is taken by the last place
        ("level", "eagle", "yybyb", "yybyy"),  # eagle has two e and one l, which the first place takes
        ("eagle", "level", "ybbyy", "ybbyy"),
        ("sense", "geese", "bgbgg", "ygbgg"),  # its one s is green
    ],
)
def test_colours_by_hand(guess, secret, real, simplified):
    assert (coloured(guess, secret, "real"), coloured(guess, secret, "simplified")) == (real, simplified)


@pytest.mark.parametrize("duplicates", ["real", "simplified"])
def test_table_and_sets_agree_with_brute_force(duplicates):
    known, rng = lexicon("common", duplicates), random.Random(0)
    for _ in range(1000):
        i, j = rng.randrange(833), rng.randrange(833)
        assert COLOURS[known.table[i, j]] == by_hand(known.words[i], known.words[j], duplicates)
    for _ in range(20):
        guess, told = rng.choice(known.words), COLOURS[known.table[rng.randrange(833), rng.randrange(833)]]
        fitting = known.consistent(known.index[guess], CODES[told])
        assert [known.words[j] for j in known.members(fitting)] == [
            word for word in known.words if by_hand(guess, word, duplicates) == told
        ]
        assert fitting.bit_count() == len(known.members(fitting))
    assert known.members(known.everything).tolist() == list(range(833))


def test_the_rules_differ_on_our_list():
    real, simplified = (lexicon("common", rule).table for rule in ("real", "simplified"))
    assert 0.01 < (real != simplified).mean() < 0.2
    assert (np.diag(real) == CODES["ggggg"]).all() and (np.diag(simplified) == CODES["ggggg"]).all()


def test_information_is_the_entropy_of_the_answers():
    words = Lexicon(["mmmma", "mmmmb", "mmmmc", "abczz"], "real")
    everything = words.members(words.everything)
    # abczz is answered in four ways, one by each secret; mmmma by itself, by two others alike, and by abczz
    assert words.information(words.index["abczz"], everything) == pytest.approx(2)
    assert words.information(words.index["mmmma"], everything) == pytest.approx(1.5)
    assert words.words[words.most_informative(words.everything)] == words.by_information[0] == "abczz"


def test_guesses_and_colours_are_spelled_in_pieces_and_only_the_last_is_not_answered():
    opening, (first, last) = play(Wordle(secret="crane"), 0, ["c r a w l", "crane\n"])
    assert [(turn.role, turn.content) for turn in opening] == [("user", "Wordle:")]
    assert first.turns[0].content == "g g g b b"
    assert (first.reward, first.terminated, first.truncated) == (-1, False, False)
    assert last == ((), 0.0, True, False)
    halves = Wordle("forty", spelling="halves", secret="grain")
    assert halves.spell("grade") == "gr ade"
    assert play(halves, 0, ["gr ade"])[1][0].turns[0].content == "gg gbb"


def test_six_wrong_guesses_are_an_end_that_costs_six():
    game = Wordle(secret="crane")
    results = play(game, 0, ["slate"] * TRIES)[1]
    assert sum(result.reward for result in results) == -6
    assert [result.terminated for result in results] == [False] * 5 + [True]
    assert not any(result.truncated for result in results)
    assert game.labels() == {"secret": "crane", "won": False, "invalid": 0}


def test_a_word_that_is_not_in_the_list_costs_a_try_and_tells_nothing():
    game = Wordle(secret="crane")
    results = play(game, 0, ["zzzzz", "cranes", "", "C r a n e", "crane"])[1]
    assert [result.turns[0].content for result in results[:4]] == ["unknown word"] * 4
    assert [result.reward for result in results] == [-1, -1, -1, -1, 0]
    assert game.labels() == {"secret": "crane", "won": True, "invalid": 4}
    game.reset(1)
    assert game.labels()["invalid"] == 0


def test_as_many_seeds_as_words_play_each_word_once_in_mixed_order():
    game, secrets = Wordle("forty"), []
    for seed in range(40):
        game.reset(seed)
        secrets.append(game.labels()["secret"])
    assert sorted(secrets) == list(read_words("forty")) != secrets


@pytest.mark.parametrize("name", LISTS)
def test_shipped_list_is_clean_and_sorted_and_installed(name):
    text = LISTS[name].read_text()
    counts = Counter()
    assert text.split() == list(read_words(name, counts)) and len(text.split()) == SIZES[name]
    assert not counts
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[2] / "setup.cfg")
    pattern = setup["options.package_data"]["offline_lmrl.tasks"]
    assert LISTS[name] in LISTS[name].parents[1].glob(pattern)


def test_forty_words_share_their_halves():
    words = read_words("forty")
    assert len({word[:2] for word in words}) == 13 and len({word[2:] for word in words}) == 8


def test_a_file_of_words_is_read_and_what_is_left_out_is_counted(tmp_path):
    file, counts = tmp_path / "words.txt", Counter()
    file.write_text("Crane slate\ncrane\nhouses\nnaïve it's! cargo\n", encoding="utf-8")
    assert read_words(str(file), counts) == ("cargo", "crane", "slate")
    assert counts == {"not five letters a-z": 3, "repeated": 1}
    assert len(Wordle(str(file)).lexicon.words) == 3


def test_words_that_cannot_be_used_are_input_errors(tmp_path):
    with pytest.raises(InputError, match="words: found 'commn' .No such file.*expected common, forty or a text file"):
        read_words("commn")
    (tmp_path / "one.txt").write_text("crane toolong\n")
    with pytest.raises(InputError, match="found 1 words of five letters in .*one.txt, expected at least 2"):
        read_words(str(tmp_path / "one.txt"))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9s crane slate")
    with pytest.raises(InputError, match="not UTF-8"):
        read_words(str(tmp_path / "latin.txt"))


@pytest.mark.parametrize("arguments", [{"duplicates": "none"}, {"spelling": "thirds"}, {"secret": "zzzzz"}])
def test_unknown_setting_is_an_input_error_that_names_it(arguments):
    with pytest.raises(InputError, match=next(iter(arguments))):
        Wordle(**arguments)
