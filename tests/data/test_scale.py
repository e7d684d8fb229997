import pytest

from offline_lmrl.data.errors import InputError
from offline_lmrl.data.scale import RewardScale
from offline_lmrl.data.trajectory import Trajectory, Turn


def episode(*rewards, terminated=True):
    turns = tuple(turn for r in rewards for turn in (Turn("user", "q"), Turn("assistant", "a", reward=r)))
    return Trajectory(turns, terminated=terminated)


def scaled(trajectories):
    scale = RewardScale.fit(trajectories)
    return [[scale.apply(turn.reward) for turn in t.turns if turn.role == "assistant"] for t in trajectories]


def changed(trajectories, change):
    def of(turn):
        return turn if turn.reward is None else Turn(turn.role, turn.content, reward=change(turn.reward))

    return [Trajectory(tuple(map(of, t.turns)), terminated=t.terminated) for t in trajectories]


def test_scaling_rewards_changes_nothing_after_the_transform():
    data = [episode(-1.0, -1.0, 0.0), episode(-1.0)]
    assert scaled(changed(data, lambda r: 10 * r)) == scaled(data)


def test_shifting_rewards_changes_nothing_where_every_episode_has_equally_many_scored_turns():
    data = [episode(None, 4.0), episode(8.0), episode(None, None, 0.0)]
    shifted = [value for row in scaled(changed(data, lambda r: r - 1)) for value in row]
    assert shifted == pytest.approx([value for row in scaled(data) for value in row])
    assert RewardScale.fit(data).shift == 4.0


def test_no_shift_where_it_would_pay_for_longer_episodes():
    assert RewardScale.fit([episode(-1.0), episode(-1.0, -1.0)]).shift == 0.0
    assert RewardScale.fit([episode(1.0), episode(1.0, 1.0, terminated=False)]).shift == 0.0


def test_unscored_turns_pay_nothing_and_the_range_of_returns_becomes_one():
    data = [episode(None, 2.0), episode(None, 10.0)]
    assert scaled(data) == [[0.0, -0.5], [0.0, 0.5]]


def test_equal_returns_keep_the_unit_and_a_scale_of_zero_is_refused():
    assert RewardScale.fit([episode(3.0), episode(3.0)]).scale == 1.0
    with pytest.raises(InputError, match="reward_scale: found 0"):
        RewardScale.fit([episode(3.0)], scale=0.0)


def test_round_trip_through_the_saved_block():
    scale = RewardScale(0.5, 4.0)
    assert RewardScale.from_dict(scale.to_dict()) == scale
