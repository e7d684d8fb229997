"""Groups by the source's id and by words."""

from data_prep.source import join_groups
from offline_lmrl.logs.comparison import Comparison
from offline_lmrl.logs.preference_forms import root_group
from offline_lmrl.logs.trajectory import Trajectory, Turn


def row(question, group):
    return Trajectory((Turn("user", question), Turn("assistant", "a")), group=group)


def test_rows_linked_by_an_id_or_by_their_words_are_one_group_in_any_order():
    rows = [row("one", "p"), row("Two!", "q"), row("one, edited", "p"), row("three", "r"), row("two", "p")]
    rows.append(Comparison((Turn("user", "three"),), ((Turn("assistant", "a"),), (Turn("assistant", "b"),)), (1, 0)))
    for order in (rows, rows[::-1]):
        made = join_groups({"train": order[:2], "test": order[2:]})
        groups = [one.group for one in made["train"] + made["test"]]
        groups = groups if order is rows else groups[::-1]
        assert groups[0] == groups[1] == groups[2] == groups[4] != groups[3] == groups[5]
        assert groups[3] == root_group((Turn("user", "three"),))
        assert groups[0] == min(root_group((Turn("user", text),)) for text in ("one", "two", "one, edited"))


def test_without_an_id_the_words_are_the_group_and_without_words_the_id():
    opening = Trajectory((Turn("assistant", "a"),))
    (bare, identified, asked) = join_groups({"all": [opening, Trajectory(opening.turns, group="p"), row("one", "")]})[
        "all"
    ]
    assert (bare.group, identified.group, asked.group) == ("", "p", root_group((Turn("user", "one"),)))
