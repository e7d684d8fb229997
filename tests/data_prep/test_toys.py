import pytest

from data_prep.toys import Toys
from offline_lmrl.errors import InputError
from offline_lmrl.logs.io import read_trajectories


def test_logs_are_the_toys_own_and_splits_share_no_episode(tmp_path):
    report = Toys(output=tmp_path, task="walk", episodes=20, seed=3).prepare()
    train, held_out = (read_trajectories(tmp_path / f"{name}.jsonl") for name in ("train", "validation"))
    assert (len(train), len(held_out)) == (20, 2) and {t.task for t in train} == {"walk"}
    assert report == {"episodes": 20, "mean_return": pytest.approx(sum(t.total_return for t in train) / 20)}
    assert not {t.group for t in train} & {t.group for t in held_out}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"task": "maze"}, "task: found 'maze', expected a task that has logs"),
        ({"task": "wlk"}, "did you mean 'walk'"),
        ({"task": "walk", "episodes": 0}, "episodes: found 0"),
    ],
)
def test_what_has_no_logs_is_refused_and_leaves_nothing(tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        Toys(output=tmp_path / "out", **settings).prepare()
    assert not (tmp_path / "out").exists()
