"""The support source: its trajectories are what `prepare chat-thumbs` makes of the chats beside them."""

from data_prep.chat_thumbs import ChatThumbs
from data_prep.support import SupportLogs
from offline_lmrl.logs.io import group_key, read_trajectories


def test_trajectories_are_those_of_the_chats_with_thumbs(tmp_path):
    report = SupportLogs(output=tmp_path / "out", chats=60, seed=3).prepare()
    again = ChatThumbs(input=tmp_path / "out" / "thumbs.json", output=tmp_path / "again", validation=0.2, seed=3)
    assert again.prepare() == report and report["imported"] == 60
    names = ("train.jsonl", "validation.jsonl")
    assert all((tmp_path / "out" / n).read_text() == (tmp_path / "again" / n).read_text() for n in names)
    train, validation = (read_trajectories(tmp_path / "out" / n) for n in names)
    assert len(train) + len(validation) == 60 and not {*map(group_key, train)} & {*map(group_key, validation)}
    assert {turn.reward for row in train for turn in row.turns if turn.reward is not None} == {1.0, -1.0}
