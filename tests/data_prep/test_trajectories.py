"""What all importers of scored replies share: totals that add up whatever a file holds, splits that share no group."""

import itertools
import json

import pytest

from data_prep.chat_thumbs import ChatThumbs
from data_prep.kto import Kto
from data_prep.lmrl_gym import LmrlGym
from data_prep.oasst import OasstRatings
from data_prep.red_team import RedTeam
from data_prep.scored import Scored
from data_prep.stepwise import Stepwise
from data_prep.summarize import SummarizeAxes
from data_prep.trajectories import scored_pairs
from offline_lmrl.logs.io import read_trajectories
from offline_lmrl.logs.trajectory import Trajectory, Turn
from tests.comparisons import check_other_files_are_refused, mutated_lines
from tests.data_prep import (
    test_chat_thumbs,
    test_lmrl_gym,
    test_oasst,
    test_red_team,
    test_scored,
    test_summarize_axes,
)

AGENT = {"role": "assistant", "content": "a"}
ROWS = {
    Kto: [
        *({"prompt": f"q{i}", "completion": f"reply {i}", "label": i % 2 == 0} for i in range(7)),
        {"prompt": [{"role": "user", "content": "q8"}, AGENT, {"role": "user", "content": "go on"}],
         "completion": [{**AGENT, "content": [{"type": "text", "text": "b"}]}], "label": False, "worker": "w"},
        {"prompt": "\n\nHuman: q9\n\nAssistant:", "completion": " a", "label": True, "labels": {"note": 1}}],
    RedTeam: [test_red_team.row(f"\n\nHuman: q{i}\n\nAssistant: a", tags=["x"]) for i in range(9)],
    Stepwise: [
        *({"prompt": f"q{i}", "completions": ["a", "b"], "labels": [True, i % 2 == 0]} for i in range(8)),
        {"prompt": [{"role": "user", "content": "q8"}], "completions": ["a"], "labels": [False], "group": "g"}],
    ChatThumbs: [
        *(test_chat_thumbs.chat({"turn": 1, "value": 1}, messages=[{"role": "user", "content": f"q{i}"}, AGENT])
          for i in range(7)), test_chat_thumbs.comparia(1, "Yes.", False, True)],
    OasstRatings: [
        *(test_oasst.message(f"q{i}") for i in range(14)),
        *(test_oasst.message(f"a{i}", f"q{i}", **(test_oasst.EXPORT, test_oasst.HUB)[i % 2]) for i in range(14))],
    LmrlGym: [{**row, "played": i} for i, row in enumerate(
        [*({**test_lmrl_gym.QUIZ, "lines": [f"Is it {i}? No."]} for i in range(7)), test_lmrl_gym.NAV,
         test_lmrl_gym.WORDLE, test_lmrl_gym.SALE])],
    Scored: [*({**row, "prompt": f"q{i}", "label": True, "completion": "a", "worker": i} for i, row in enumerate(
        [{}] * 6)), *({**row, "reward": 1, "worker": "w"} for row in test_scored.KEPT)],
    SummarizeAxes: [test_summarize_axes.row(info={"id": f"t3_{i}", "post": f"p{i}"}) for i in range(9)],
}  # fmt: skip
IMPORTERS = pytest.mark.parametrize("importer", ROWS, ids=lambda importer: importer.__name__)


@IMPORTERS
def test_a_thousand_broken_rows_are_imported_or_dropped_for_a_reason(tmp_path, importer):
    lines = [*(json.dumps(row).encode() for row in ROWS[importer]), *mutated_lines(ROWS[importer], 1000, seed=0)]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    report = importer(input=tmp_path / "in.jsonl", output=tmp_path / "out").prepare()
    assert report["rows"] == len(lines) == report["imported"] + sum(report["dropped"].values())
    written = sum(split["rows"] for split in report["splits"].values())
    if importer is not OasstRatings:  # its rows are messages
        assert report["imported"] == written + report["removed, their group is in a later split"]
    assert written == sum(len(read_trajectories(tmp_path / "out" / f"{split}.jsonl")) for split in report["splits"])
    assert sum(report["dropped"].values()) > 300 and len(report["dropped"]) < 60
    assert report["dropped"]["text: expected UTF-8"] > 50


@IMPORTERS
def test_every_row_of_its_own_is_imported_with_a_group_and_a_score_on_an_agents_turn(tmp_path, importer):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[importer]))
    report = importer(input=tmp_path / "in.jsonl", output=tmp_path / "out", validation=0.3).prepare()
    assert report["imported"] == len(ROWS[importer]) and not report["dropped"]
    splits = {name: read_trajectories(tmp_path / "out" / f"{name}.jsonl") for name in report["splits"]}
    groups = [{row.group for row in rows} for rows in splits.values()]
    assert len(groups) == 2 and all(groups[0]) and all(groups[1]) and not groups[0] & groups[1]
    for row in itertools.chain(*splits.values()):
        assert row.source and row.labels
        assert any(turn.reward is not None and turn.role == "assistant" for turn in row.turns)


@IMPORTERS
def test_a_column_says_what_stays_in_one_split_and_rows_without_it_are_dropped(tmp_path, importer):
    rows = [{**row, "customer": f"c{i}" if i % 2 else i} for i, row in enumerate(ROWS[importer])]
    lacking = {name: value for name, value in rows[0].items() if name != "customer"}
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (*rows, lacking)))
    report = importer(input=tmp_path / "in.jsonl", output=tmp_path / "out", validation=0.5, group="customer").prepare()
    assert report["dropped"] == {"customer: expected a group: text or a whole number": 1}
    made = [read_trajectories(tmp_path / "out" / f"{split}.jsonl") for split in report["splits"]]
    found = [{row.group for row in split} for split in made]
    assert len(found) == 2 and not found[0] & found[1]
    Scored = rows[14:] if importer is OasstRatings else rows  # its other rows are prompts
    assert found[0] | found[1] == {str(row["customer"]) for row in Scored}


@IMPORTERS
def test_files_of_another_kind_are_one_line_errors(tmp_path, importer):
    def prepare(name):
        importer(input=tmp_path / name, output=tmp_path / "out").prepare()

    check_other_files_are_refused(tmp_path, ROWS[importer][0], prepare)


def test_pairs_for_the_baselines_hold_every_scored_turn_at_most_once_and_the_better_one_first():
    rows = [
        Trajectory((Turn("user", "q"), Turn("assistant", f"{i}", reward=float(i % 2)), Turn("assistant", "free")))
        for i in range(100)
    ]
    pairs = scored_pairs(rows)
    said = [[int(option[0].content) for option in row.options] for row, _, _ in pairs]
    assert 10 < len(pairs) < 40  # half of 50 pairs differ
    assert all(better % 2 == 1 and worse % 2 == 0 for better, worse in said)
    assert len({number for pair in said for number in pair}) == 2 * len(pairs)
