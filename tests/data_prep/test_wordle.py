"""Wordle logs: every game is what the environment plays, and the branches are what they are for."""

import json
import statistics
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import yaml

from data_prep.wordle import WordleLogs
from offline_lmrl.errors import InputError
from offline_lmrl.logs.io import read_trajectories
from offline_lmrl.tasks.wordle import CODES, Wordle, lexicon
from offline_lmrl.tokens.tokenizers import train_tokenizer


def made(folder, **settings):
    """(report, all games of both splits)."""
    report = WordleLogs(output=folder, **settings).prepare()
    return report, [game for path in sorted(folder.glob("*.jsonl")) for game in read_trajectories(path)]


def said(game):
    return [turn.content for turn in game.turns if turn.is_trainable]


@pytest.fixture(scope="module")
def adversarial(tmp_path_factory):
    return made(tmp_path_factory.mktemp("adversarial"), logs="adversarial", episodes=100, seed=3)


@pytest.mark.parametrize(
    "settings",
    [
        {"words": "forty", "spelling": "halves", "duplicates": "simplified"},
        {"logs": "branching"},
    ],
)
def test_every_game_is_what_the_environment_plays(tmp_path, settings):
    _, games = made(tmp_path, episodes=30, seed=1, **settings)
    settings = {name: value for name, value in settings.items() if name != "logs"}
    for game in games:
        wordle = Wordle(**settings, secret=game.labels["secret"])
        turns = list(wordle.reset(0))
        for turn in filter(lambda turn: turn.is_trainable, game.turns):
            result = wordle.step(turn.content)
            assert turn.reward == result.reward
            turns += [turn, *result.turns]
        assert tuple(turns) == game.turns
        assert game.terminated and result.terminated


def test_report_adds_up_and_repeats_itself(tmp_path):
    report, games = made(tmp_path / "a", words="forty", episodes=200, seed=2)
    assert report == json.loads((tmp_path / "a" / "report.json").read_text())
    assert report["words"] == 40 and report["episodes"] == len(games) == 200
    assert report["turns"] == sum(len(said(game)) for game in games) == 200 * report["mean_length"]
    assert report["won"] == sum(game.turns[-1].reward == 0 for game in games)
    returns = [game.total_return for game in games]
    assert report["mean_return"] == pytest.approx(sum(returns) / 200)
    assert report["sd_return"] == pytest.approx(statistics.pstdev(returns))
    assert len({game.group for game in games}) == 200
    assert {(game.task, game.source, game.labels["player"]) for game in games} == {
        ("wordle", "scripted", "random_mixture")
    }
    WordleLogs(output=tmp_path / "b", words="forty", episodes=200, seed=2).prepare()
    assert (tmp_path / "a" / "train.jsonl").read_bytes() == (tmp_path / "b" / "train.jsonl").read_bytes()
    _, others = made(tmp_path / "c", words="forty", episodes=200, seed=3)
    assert {game.turns for game in games} != {game.turns for game in others}


def test_expert_games_have_their_failures_beside_them_in_one_group(adversarial):
    report, games = adversarial
    groups = defaultdict(list)
    for game in games:
        groups[game.group].append(game)
    assert len(groups) == 100 and report["episodes"] == len(games)
    for rows in groups.values():
        players = Counter(game.labels["player"] for game in rows)
        (expert,) = (game for game in rows if game.labels["player"] == "optimal")
        assert players == ({"optimal": 1, "repeat": 5, "mixture": 5} if len(said(expert)) > 2 else {"optimal": 1})
        assert {game.labels["secret"] for game in rows} == {expert.labels["secret"]}
        for game in rows:
            if game.labels["player"] == "repeat":
                assert said(game)[:2] == said(expert)[:2] and set(said(game)[2:]) <= set(said(expert)[:2])
                assert game.total_return == -6
    assert len({tuple(said(game)) for game in games if game.labels["player"] == "mixture"}) > 300  # each its own


def test_best_opening_looks_bad_on_average_in_the_adversarial_set(adversarial):
    _, games = adversarial
    best = lexicon("common", "real").by_information[0]
    returns = {True: [], False: []}
    for game in games:
        returns[said(game)[0].replace(" ", "") == best].append(game.total_return)
    assert statistics.fmean(returns[True]) < -5 < -4 < statistics.fmean(returns[False])


def test_branches_contradict_what_the_expert_knew(tmp_path):
    _, games = made(tmp_path, logs="branching", episodes=20)
    words, experts = lexicon("common", "real"), {g.group: g for g in games if g.labels["player"] == "optimal"}
    for group, expert in experts.items():
        branches = [game for game in games if game.group == group and game is not expert]
        assert len(branches) == len(said(expert))  # one from every state
        for game in branches:
            shared = sum(a == b for a, b in zip(said(game), said(expert), strict=False))
            for turn in range(max(shared, 1), len(said(game))):
                assert not all(
                    words.consistent(words.index[guess.replace(" ", "")], CODES[told.content.replace(" ", "")])
                    >> words.index[said(game)[turn].replace(" ", "")]
                    & 1
                    for guess, told in zip(said(game)[:turn], game.turns[2::2], strict=False)
                )


def test_words_of_a_file_are_played_and_left_out_ones_counted(tmp_path):
    (tmp_path / "words.txt").write_text("crane slate cargo toolong crane\n")
    report, games = made(tmp_path / "out", words=str(tmp_path / "words.txt"), logs="optimal", episodes=9)
    assert report["words"] == 3
    assert report["words left out, not five letters a-z"] == report["words left out, repeated"] == 1
    assert Counter(game.labels["secret"] for game in games) == {"crane": 3, "slate": 3, "cargo": 3}


def test_every_guess_of_two_pieces_is_two_tokens_and_so_are_its_colours(tmp_path):
    config = yaml.safe_load((Path(__file__).parents[2] / "configs" / "wordle" / "two_piece.yaml").read_text())
    settings = {key: value for key, value in config["prepare"].items() if key not in ("command", "output")}
    _, games = made(tmp_path, **settings | {"episodes": 1000})
    texts = [turn.content for game in games for turn in game.turns]
    tokenizer = train_tokenizer(texts, config["model"]["vocab_size"])
    assert {len(tokenizer(text).input_ids) for text in set(texts) - {"Wordle:"}} == {2}


@pytest.mark.parametrize("settings", [{"episodes": 0}, {"logs": "oracle"}, {"words": "none.txt"}])
def test_wrong_settings_are_input_errors_and_leave_nothing(tmp_path, settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        WordleLogs(output=tmp_path / "out", **settings).prepare()
    assert not (tmp_path / "out").exists()
