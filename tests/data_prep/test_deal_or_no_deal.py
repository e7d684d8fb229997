"""Negotiation logs: both line forms, what they earn, what stays hidden, and counts that add up. All lines are ours."""

import json

import pytest

from data_prep.deal_or_no_deal import DealOrNoDeal, permutations, read_log, to_trajectory
from offline_lmrl.errors import InputError
from offline_lmrl.logs.io import read_trajectories
from offline_lmrl.logs.protocols import Reply
from offline_lmrl.tasks.negotiation import Negotiation, Scenario, read_scenarios

OWN, PARTNER = "1 8 2 0 1 2", "1 0 2 4 1 2"  # one book, two hats, one ball; this side wants the book
KEY = Scenario((1, 2, 1), ((8, 0, 2), (0, 4, 2))).key


def plain(selection="item0=1 item1=0 item2=1", reward="10", flag="agree", talk=None, own=OWN, partner=PARTNER):
    talk = talk or "YOU: book and ball please <eos> THEM: fine <eos> YOU: <selection>"
    return f"{own} {talk} {selection} <eos> reward={reward} {flag} {partner}"


def tagged(output="item0=1 item1=0 item2=1 item0=0 item1=2 item2=0", talk=None, own=OWN, partner=PARTNER):
    talk = talk or "THEM: hats for me <eos> YOU: sure <eos> THEM: <selection>"
    return (
        f"<input> {own} </input> <dialogue> {talk} </dialogue> <output> {output} </output> "
        f"<partner_input> {partner} </partner_input>"
    )


def read(tmp_path, *lines):
    path = tmp_path / "data.txt"
    path.write_text("".join(line + "\n" for line in lines))
    sides, counts = read_log(path)
    return [to_trajectory(side, source=path.name) for side in sides], counts


def contents(row):
    return [(turn.role, turn.content) for turn in row.turns]


def test_plain_line_becomes_the_episode_of_this_side(tmp_path):
    (row,), _ = read(tmp_path, plain())
    assert contents(row) == [
        ("user", "books 1 worth 8, hats 2 worth 0, balls 1 worth 2"),
        ("assistant", "book and ball please"),
        ("user", "fine"),
        ("assistant", "<selection>"),
        ("environment", "divide"),
        ("assistant", "take books 1, hats 0, balls 1"),
    ]
    assert [turn.reward for turn in row.turns] == [None] * 5 + [10.0]
    assert (row.terminated, row.group, row.task, row.source) == (True, KEY, "deal-or-no-deal", "data.txt")


def test_tagged_line_becomes_the_episode_of_this_side(tmp_path):
    (row,), _ = read(tmp_path, tagged())
    assert contents(row) == [
        ("user", "books 1 worth 8, hats 2 worth 0, balls 1 worth 2"),
        ("user", "hats for me"),
        ("assistant", "sure"),
        ("user", "<selection>"),
        ("environment", "divide"),
        ("assistant", "take books 1, hats 0, balls 1"),
    ]
    assert row.turns[-1].reward == 10.0


@pytest.mark.parametrize(
    ("line", "outcome", "text", "reward"),
    [
        (plain("item0=1 item1=0 item2=0", "8"), "agreement", "take books 1, hats 0, balls 0", 8),
        (plain(flag="disagree"), "selections do not fit", "take books 1, hats 0, balls 1", 0),
        (plain("item0=2 item1=0 item2=1", "18"), "selections do not fit", "take books 2, hats 0, balls 1", 0),
        (plain("no agreement", "no agreement", "agree"), "no agreement", "no agreement", 0),
        (plain("no agreement", "no agreement", "disagree"), "no agreement", "no agreement", 0),
        (
            tagged("item0=1 item1=0 item2=1 item0=0 item1=1 item2=0"),
            "selections do not fit",
            "take books 1, hats 0, balls 1",
            0,
        ),
        (tagged(" ".join(["<no_agreement>"] * 6)), "no agreement", "no agreement", 0),
    ],
)
def test_only_selections_that_fit_earn(tmp_path, line, outcome, text, reward):
    (row,), _ = read(tmp_path, line)
    assert (row.labels["outcome"], row.labels["agreement"]) == (outcome, outcome == "agreement")
    assert (row.turns[-1].content, row.turns[-1].reward, row.terminated) == (text, reward, True)


@pytest.mark.parametrize("line", [plain("disconnect", "disconnect"), tagged(" ".join(["<disconnect>"] * 6))])
def test_disconnect_is_cut_before_the_division(tmp_path, line):
    (row,), _ = read(tmp_path, line)
    assert not row.terminated
    assert contents(row)[-1] == ("environment", "divide")
    assert row.total_return == 0


@pytest.mark.parametrize(
    ("talk", "last"),
    [("YOU: the book <eos> THEM: <selection>", "the book"), ("THEM: my hats <eos> YOU: <selection>", "<selection>")],
)
def test_hidden_division_puts_its_zero_on_the_last_turn_of_this_side(tmp_path, talk, last):
    (row,), counts = read(tmp_path, tagged(" ".join(["<disagree>"] * 6), talk=talk))
    rewarded = [turn for turn in row.turns if turn.reward is not None]
    assert [(turn.content, turn.reward) for turn in rewarded] == [(last, 0.0)]
    assert row.terminated
    assert ("environment", "divide") not in contents(row)
    assert counts["repaired"] == {"division not logged: reward 0 on the last turn of this side": 1}


def test_partners_values_and_selection_are_labels_and_never_in_a_turn(tmp_path):
    pairs = [
        (plain(), plain(partner="1 10 2 0 1 0")),
        (
            tagged("item0=0 item1=0 item2=0 item0=1 item1=2 item2=1"),
            tagged("item0=0 item1=0 item2=0 item0=0 item1=1 item2=1", partner="1 10 2 0 1 0"),
        ),
    ]
    for lines in pairs:
        (one, other), _ = read(tmp_path, *lines)
        assert one.turns == other.turns  # only what this side does not know differs
        assert one.labels["partner_values"] == [0, 4, 2]
        assert other.labels["partner_values"] == [10, 0, 0]


def test_wrong_logged_reward_is_replaced_and_counted(tmp_path):
    (row,), counts = read(tmp_path, plain(reward="7"))
    assert row.total_return == 10
    assert counts["repaired"] == {"logged reward is not the value of the selection: value used": 1}


def test_both_sides_of_a_dialogue_share_their_group(tmp_path):
    rows, _ = read(tmp_path, plain(), plain(own=PARTNER, partner=OWN), tagged(), plain(partner="1 10 2 0 1 0"))
    assert [row.group == KEY for row in rows] == [True, True, True, False]


def test_drops_are_counted_by_reason_and_add_up(tmp_path):
    lines = {
        "blank line": "",
        "a line in neither of the two forms": "hello",
        "the two sides have different counts": plain(partner="2 0 1 4 1 6"),
        "a turn without speaker or words": plain(talk="YOU:  <eos> THEM: <selection>"),
        "the selection is not the last turn": plain(talk="YOU: <selection> <eos> THEM: wait <eos> YOU: <selection>"),
        "a selection that is neither a division nor a known word": plain("everything"),
        "a selection with the wrong number of items": tagged("item0=1 item1=0 item2=1"),
        "this side has neither a turn nor a division": tagged(
            " ".join(["<disconnect>"] * 6), talk="THEM: <selection>"
        ),
    }
    rows, counts = read(tmp_path, *lines.values(), plain(), plain(flag="disagree"))
    assert counts["dropped"] == dict.fromkeys(lines, 1)
    assert counts["repaired"] == {"selections do not fit: reward 0": 1}
    assert counts["outcomes"] == {"agreement": 1, "selections do not fit": 1}
    assert counts["lines"] == 10 == len(rows) + sum(counts["dropped"].values())


def write_folder(folder, scenarios=6):
    """data.txt with both sides of one dialogue for each scenario, val.txt with another and the first again."""
    folder.mkdir()
    pools = [(f"1 {10 - 2 * n} 2 {n} 1 0", f"1 0 2 {n} 1 {10 - 2 * n}") for n in range(5)]
    pools += [(f"2 {n} 1 {10 - 2 * n} 1 0", f"2 {n} 1 0 1 {10 - 2 * n}") for n in range(5)]
    no = {"selection": "no agreement", "reward": "no agreement"}
    lines = [
        plain(**no, own=a, partner=b)
        for own, partner in pools[:scenarios]
        for a, b in ((own, partner), (partner, own))
    ]
    (folder / "data.txt").write_text("\n".join(lines) + "\n")
    (folder / "train.txt").write_text("must not be read beside data.txt\n")
    (folder / "val.txt").write_text(
        "\n".join(
            tagged(" ".join(["<no_agreement>"] * 6), own=own, partner=partner) for own, partner in (pools[9], pools[0])
        )
    )


def test_prepare_keeps_scenarios_of_the_splits_apart(tmp_path):
    write_folder(tmp_path / "in")
    report = DealOrNoDeal(input=tmp_path / "in", output=tmp_path / "out", held_out_scenarios=2).prepare()
    splits = {name: read_trajectories(tmp_path / "out" / f"{name}.jsonl") for name in ("train", "tune", "validation")}
    groups = {name: {row.group for row in rows} for name, rows in splits.items()}
    # 6 scenarios in data.txt, of which validation has one and tune gets two
    assert {name: len(names) for name, names in groups.items()} == {"train": 3, "tune": 2, "validation": 2}
    assert not groups["train"] & groups["tune"] and not groups["train"] & groups["validation"]
    assert report["removed_from_train_scenario_in_validation_or_test"] == 2
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 6, "tune": 4, "validation": 2}
    assert report["files"]["data.txt"]["lines"] == 12 == 6 + 4 + 2
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    for name, keys in groups.items():
        scenarios = read_scenarios(tmp_path / "out" / f"scenarios_{name}.json")
        assert {scenario.key for scenario in scenarios} == keys
        assert len(scenarios) == len(keys)


def test_permuted_items_change_places_everywhere_alike(tmp_path):
    talk = "YOU: a book and 2 balls , that is all <eos> THEM: hats ? <eos> YOU: <selection>"
    path = tmp_path / "data.txt"
    path.write_text(plain("item0=1 item1=0 item2=2", "10", talk=talk, own="1 6 3 0 2 2", partner="1 0 3 2 2 2") + "\n")
    (side,), _ = read_log(path)
    versions = [to_trajectory(version, "data.txt") for version in permutations(side)]
    assert len({row.turns for row in versions}) == 5
    (row,) = [row for row in versions if row.turns[0].content == "books 2 worth 2, hats 1 worth 6, balls 3 worth 0"]
    words = ["a hat and 2 books , that is all", "balls ?", "<selection>", "divide", "take books 2, hats 1, balls 0"]
    assert [content for _, content in contents(row)[1:]] == words
    assert row.labels["partner_values"] == [2, 0, 2]
    assert {row.total_return for row in versions} == {10}


def test_permuted_dialogues_join_the_train_split_and_no_held_out_scenario(tmp_path):
    write_folder(tmp_path / "in")
    with open(tmp_path / "in" / "val.txt", "a") as file:  # scenario 1 of data.txt with books and balls exchanged
        file.write(tagged(own="1 0 2 1 1 8", partner="1 8 2 1 1 0") + "\n")
    plain_report = DealOrNoDeal(input=tmp_path / "in", output=tmp_path / "plain", held_out_scenarios=2).prepare()
    report = DealOrNoDeal(
        input=tmp_path / "in", output=tmp_path / "out", held_out_scenarios=2, permute_items=True
    ).prepare()
    logged, rows = (read_trajectories(tmp_path / name / "train.jsonl") for name in ("plain", "out"))
    assert rows[: len(logged)] == logged
    assert len(rows) - len(logged) == report["item_permutations"]["added"] > 0
    assert {row.group for row in rows} == {row.group for row in logged}
    held_out = {
        row.turns[0].content
        for name in ("tune", "validation")
        for row in read_trajectories(tmp_path / "out" / f"{name}.jsonl")
    }
    assert report["item_permutations"]["left_out"] > 0
    assert not held_out & {row.turns[0].content for row in rows}
    assert plain_report["splits"]["tune"] == report["splits"]["tune"]


def test_held_out_scenarios_belong_to_the_seed_and_not_to_the_order(tmp_path):
    write_folder(tmp_path / "in", scenarios=10)
    path = tmp_path / "in" / "data.txt"
    held_out = []
    for run, seed in enumerate((0, 0, 1)):
        DealOrNoDeal(input=path, output=tmp_path / f"out{run}", held_out_scenarios=4, seed=seed).prepare()
        held_out.append({row.group for row in read_trajectories(tmp_path / f"out{run}" / "tune.jsonl")})
        path.write_text("\n".join(reversed(path.read_text().splitlines())))
    assert held_out[0] == held_out[1] != held_out[2]


def test_single_file_is_the_split_of_its_name(tmp_path):
    for name, expected in (
        ("val.txt", {"validation.jsonl", "scenarios_validation.json", "report.json"}),
        ("mine.txt", {"train.jsonl", "scenarios_train.json", "report.json"}),
    ):
        (tmp_path / name).write_text(plain() + "\n" + tagged() + "\n")
        DealOrNoDeal(input=tmp_path / name, output=tmp_path / f"out-{name}", held_out_scenarios=0).prepare()
        assert {path.name for path in (tmp_path / f"out-{name}").iterdir()} == expected


@pytest.mark.parametrize("scenarios, tuned", [(1, 0), (6, 1), (10, 2)])
def test_of_a_small_file_a_fifth_of_the_scenarios_is_held_out(tmp_path, scenarios, tuned):
    write_folder(tmp_path / "in", scenarios)
    splits = DealOrNoDeal(input=tmp_path / "in" / "data.txt", output=tmp_path / "out").prepare()["splits"]
    assert splits["train"]["scenarios"] == scenarios - tuned
    assert splits.get("tune", {"scenarios": 0})["scenarios"] == tuned
    with pytest.raises(InputError, match=f"held_out_scenarios: found {scenarios}, expected 0 to {scenarios - 1}"):
        DealOrNoDeal(
            input=tmp_path / "in" / "data.txt", output=tmp_path / "other", held_out_scenarios=scenarios
        ).prepare()


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "prose.txt").write_text("hello\n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "folder").mkdir()
    for name, message in (
        ("missing.txt", "No such file"),
        ("empty.txt", "empty"),
        ("prose.txt", "neither"),
        ("bytes.txt", "UTF-8"),
        ("folder", "data.txt"),
    ):
        with pytest.raises(InputError, match=message) as error:
            DealOrNoDeal(input=tmp_path / name, output=tmp_path / "out").prepare()
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


class Partner:
    """Says the user turns of a logged episode in order, then takes the hats."""

    def __init__(self, row):
        self.lines = [turn.content for turn in row.turns[1:] if turn.role == "user"]

    def start(self, seeds):
        return self

    def reply(self, rows, histories, options=None):
        said = sum(turn.role == "assistant" for turn in histories[0])
        return [Reply("take books 0, hats 2, balls 0" if options[0] else self.lines[said])]


@pytest.mark.parametrize(("line", "first"), [(plain(), "agent"), (tagged(), "partner")])
def test_play_gives_the_turns_and_the_reward_that_the_log_gives(tmp_path, line, first):
    (row,), _ = read(tmp_path, line)
    scenario = Scenario((1, 2, 1), ((8, 0, 2), tuple(row.labels["partner_values"])))
    game = Negotiation([scenario], Partner(row), first=first)
    turns = list(game.reset([0])[0])
    for turn in [turn for turn in row.turns if turn.is_trainable]:
        (result,) = game.step([0], [turn.content])
        turns += [turn, *result.turns]
    assert tuple(turns) == row.turns
    assert (result.reward, result.terminated) == (row.total_return, row.terminated)
