"""Negotiation: the two views of a dialogue, the score, and what a seed stands for."""

import json
from dataclasses import dataclass, field

import pytest

from offline_lmrl.errors import InputError
from offline_lmrl.logs.protocols import Reply
from offline_lmrl.logs.trajectory import Turn
from offline_lmrl.tasks.negotiation import (
    DIVIDE,
    SELECTION,
    Negotiation,
    Scenario,
    division_text,
    divisions,
    fits,
    is_pareto_optimal,
    read_scenarios,
    scenario_entry,
    worth,
)

# One book, two hats, one ball; the first side wants the book, the second the hats.
SCENARIO = Scenario((1, 2, 1), ((8, 0, 2), (0, 4, 2)))
OTHER = Scenario((2, 1, 1), ((1, 4, 4), (5, 0, 0)))


@dataclass
class Script:
    """A player that says its lines in order and, where only options are allowed, the last line."""

    lines: list[str]
    closed: bool = True
    calls: list = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)

    def start(self, seeds):
        self.seeds = list(seeds)
        return self

    def reply(self, rows, histories, options=None):
        self.calls.append((list(rows), [list(history) for history in histories], options))
        return [self._line(history, allowed) for history, allowed in zip(histories, options, strict=True)]

    def _line(self, history, allowed):
        said = sum(turn.role == "assistant" for turn in history)
        return Reply(self.lines[-1] if allowed else self.lines[said], token_ids=(7,), closed=self.closed)


def contents(turns):
    return [(turn.role, turn.content) for turn in turns]


def test_whole_dialogue_from_both_views():
    partner = Script(["deal ", "take books 0, hats 2, balls 0"])
    game = Negotiation([SCENARIO], partner, first="agent")
    (opening,) = game.reset([0])
    assert contents(opening) == [("user", "books 1 worth 8, hats 2 worth 0, balls 1 worth 2")]
    assert game.options(0) is None
    (talk,) = game.step([0], ["you get the hats\n"])
    assert (contents(talk.turns), talk[1:]) == ([("user", "deal")], (0.0, False, False))
    (selected,) = game.step([0], [SELECTION])
    assert (selected.turns, selected[1:]) == ((DIVIDE,), (0.0, False, False))
    assert len(partner.calls) == 1  # nobody answers the selection
    assert {
        "take books 1, hats 0, balls 1",
        "take books 1, hats 2, balls 1",
        "take books 0, hats 0, balls 0",
        "no agreement",
    } < set(game.options(0))
    assert len(game.options(0)) == 2 * 3 * 2 + 1
    (end,) = game.step([0], ["take books 1, hats 0, balls 1"])
    assert end == ((), 10.0, True, False)  # 8 for the book, 2 for the ball
    rows, (view,), (options,) = partner.calls[-1]
    assert contents(view) == [
        ("user", "books 1 worth 0, hats 2 worth 4, balls 1 worth 2"),
        ("user", "you get the hats"),
        ("assistant", "deal "),
        ("user", SELECTION),
        ("environment", "divide"),
    ]
    assert options == list(divisions((1, 2, 1)))
    assert game.labels(0) == {
        "score": 10,
        "score_when_agreed": 10,
        "partner_score": 8,
        "agreement": True,
        "pareto": True,
        "turns": 3,
        "agent_words": 4,
        "scenario": SCENARIO.key,
        "side": 0,
        "order": "agent",
        "invalid": 0,
    }


def test_partner_may_speak_first_and_select():
    partner = Script(["the hats are mine", SELECTION, "take books 0, hats 2, balls 0"])
    game = Negotiation([SCENARIO], partner, first="partner")
    (opening,) = game.reset([0])
    assert contents(opening)[1:] == [("user", "the hats are mine")]
    (heard,) = game.step([0], ["ok"])
    assert contents(heard.turns) == [("user", SELECTION), ("environment", "divide")]
    (end,) = game.step([0], ["take books 1, hats 0, balls 1"])
    assert (end.reward, end.terminated) == (10.0, True)
    assert contents(partner.calls[-1][1][0])[-2:] == [("assistant", SELECTION), ("environment", "divide")]


@pytest.mark.parametrize(
    ("agent", "partner", "scores", "invalid"),
    [
        ("take books 1, hats 0, balls 0", "take books 0, hats 2, balls 1", (8, 10), 0),
        ("take books 1, hats 0, balls 1", "take books 0, hats 2, balls 1", (0, 0), 0),  # the ball is taken twice
        ("take books 1, hats 0, balls 0", "take books 0, hats 2, balls 0", (0, 0), 0),  # the ball is left
        ("no agreement", "take books 0, hats 2, balls 1", (0, 0), 0),
        ("no agreement", "no agreement", (0, 0), 0),
        ("take books 2, hats 0, balls 0", "take books 0, hats 2, balls 1", (0, 0), 1),  # there is one book
        ("everything", "no agreement", (0, 0), 1),
    ],
)
def test_only_divisions_that_add_up_to_the_pool_pay(agent, partner, scores, invalid):
    game = Negotiation([SCENARIO], Script([partner]), first="agent")
    game.reset([0])
    game.step([0], [SELECTION])
    (end,) = game.step([0], [agent])
    labels = game.labels(0)
    assert (end.reward, end.terminated) == (scores[0], True)
    assert (labels["score"], labels["partner_score"]) == scores
    assert labels["agreement"] == (scores != (0, 0))
    assert labels["invalid"] == invalid


def test_scores_follow_the_side():
    game = Negotiation([SCENARIO], Script(["take books 1, hats 0, balls 1"]), first="agent")
    game.reset([1])
    game.step([0], [SELECTION])
    (end,) = game.step([0], ["take books 0, hats 2, balls 0"])
    labels = game.labels(0)
    assert (end.reward, labels["partner_score"], labels["side"], labels["pareto"]) == (8.0, 10, 1, True)


def test_pareto_optimal_is_what_no_division_improves():
    # values 8, 0, 2 and 0, 4, 2: book to the first, hats to the second, the ball to either
    assert is_pareto_optimal(SCENARIO, (8, 10))
    assert is_pareto_optimal(SCENARIO, (10, 8))
    assert not is_pareto_optimal(SCENARIO, (8, 6))  # a hat given away for nothing
    assert not is_pareto_optimal(SCENARIO, (0, 0))


def test_worth_and_fit_by_hand():
    assert worth((1, 2, 0), (8, 1, 5)) == 10
    assert fits((1, 2, 1), (1, 0, 1), (0, 2, 0))
    assert not fits((1, 2, 1), (1, 0, 1), (0, 1, 0))
    assert not fits((1, 2, 1), None, (1, 2, 1))
    assert (division_text((0, 4, 1)), division_text(None)) == ("take books 0, hats 4, balls 1", "no agreement")


def test_dialogue_without_selection_is_cut_with_its_last_observation():
    game = Negotiation([SCENARIO], Script(["no"] * 9), first="agent", max_turns=4)
    game.reset([0])
    (first,) = game.step([0], ["please"])
    (second,) = game.step([0], [""])
    assert (first.truncated, second.truncated) == (False, True)
    assert (second.reward, second.terminated, contents(second.turns)) == (0.0, False, [("user", "no")])
    labels = game.labels(0)
    assert (labels["score"], labels["agreement"], labels["turns"], labels["invalid"]) == (0, False, 4, 1)


def test_selection_on_the_last_turn_is_still_divided():
    game = Negotiation([SCENARIO], Script([SELECTION, "take books 0, hats 2, balls 1"]), first="agent", max_turns=2)
    game.reset([0])
    (heard,) = game.step([0], ["i want the book"])
    assert not heard.truncated
    assert game.step([0], ["take books 1, hats 0, balls 0"])[0].reward == 8


def test_seeds_are_every_scenario_side_and_order_once_then_again():
    game = Negotiation([SCENARIO, OTHER], Script(["hello"]))
    assert game.episodes == 8
    game.reset(range(16))
    seen = [(labels["scenario"], labels["side"], labels["order"]) for labels in map(game.labels, range(16))]
    assert len(set(seen[:8])) == 8
    assert seen[8:] == seen[:8]
    assert game.reset([3]) == [game.reset(range(8))[3]]


def test_partner_is_asked_in_one_batch_for_the_rows_that_need_it():
    partner = Script(["hello", "deal", "take books 0, hats 0, balls 0"])
    game = Negotiation([SCENARIO], partner)
    openings = game.reset([0, 1, 2, 3])
    assert [len(opening) for opening in openings] == [1, 1, 2, 2]
    assert [call[0] for call in partner.calls] == [[2, 3]]
    game.step([0, 1, 2], [SELECTION, "hi", "hi"])
    assert partner.calls[-1][0] == [1, 2]
    game.step([2, 0], ["ok", "take books 1, hats 2, balls 1"])
    rows, _, options = partner.calls[-1]
    assert rows == [2, 0]
    assert options[0] is None and "no agreement" in options[1]
    assert game.labels(0)["score"] == 10
    assert game.labels(1)["turns"] == 2


def test_partner_never_draws_with_the_seed_of_the_agent():
    partner = Script(["hello"])
    seeds = [0, 1, 4, 5]
    Negotiation([SCENARIO], partner).reset(seeds)
    assert len(set(partner.seeds) | set(seeds)) == 8


def test_partners_sampled_ids_are_kept_only_for_closed_turns():
    for closed, expected in ((True, (7,)), (False, None)):
        partner = Script(["hello", "well"], closed=closed)
        game = Negotiation([SCENARIO], partner, first="partner")
        game.reset([0])
        game.step([0], ["hi"])
        assert partner.calls[-1][1][0][1] == Turn("assistant", "hello", token_ids=expected)


def test_scenarios_come_from_a_file_and_a_key_knows_no_sides(tmp_path):
    path = tmp_path / "scenarios.json"
    path.write_text(json.dumps([scenario_entry(SCENARIO), scenario_entry(OTHER)]))
    assert read_scenarios(path) == [SCENARIO, OTHER]
    assert Negotiation(path, Script([])).scenarios == [SCENARIO, OTHER]
    swapped = Scenario(SCENARIO.counts, SCENARIO.values[::-1])
    assert swapped.key == SCENARIO.key != OTHER.key


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "not JSON"),
        ("[" * 9999, "nested too deep"),
        ("[]", "no scenario"),
        ("{}", "no scenario"),
        ('[{"counts": [1, 2], "values": [[1, 2, 3], [1, 2, 3]]}]', ":1: found"),
        ('[{"counts": [1, 2, 1], "values": [[1, 2, 3]]}]', ":1: found"),
        ('[{"counts": [1, 2, true], "values": [[1, 2, 3], [1, 2, 3]]}]', ":1: found"),
        ("[3]", ":1: found"),
    ],
)
def test_broken_scenario_file_is_an_input_error(tmp_path, text, message):
    path = tmp_path / "scenarios.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as error:
        read_scenarios(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_missing_scenario_file_and_wrong_settings_are_input_errors(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        Negotiation(tmp_path / "missing.json", Script([]))
    with pytest.raises(InputError, match="first"):
        Negotiation([SCENARIO], Script([]), first="nobody")
    with pytest.raises(InputError, match="max_turns"):
        Negotiation([SCENARIO], Script([]), max_turns=1)
    with pytest.raises(InputError, match="scenarios"):
        Negotiation([], Script([]))
