import pytest

from offline_lmrl.errors import InputError
from offline_lmrl.logs.scale import RewardScale
from offline_lmrl.logs.trajectory import Trajectory, Turn


def episode(*rewards, terminated=True):
    turns = tuple(turn for r in rewards for turn in (Turn("user", "q"), Turn("assistant", "a", reward=r)))
    return Trajectory(turns, terminated=terminated)


def scaled(trajectories):
    scale = RewardScale.fit(trajectories, discounted=False)
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
    assert RewardScale.fit(data, discounted=False).shift == 4.0


def test_no_shift_where_it_would_pay_for_longer_episodes():
    assert RewardScale.fit([episode(-1.0), episode(-1.0, -1.0)], discounted=False).shift == 0.0
    assert RewardScale.fit([episode(1.0), episode(1.0, 1.0, terminated=False)], discounted=False).shift == 0.0


def test_no_shift_where_rewards_are_discounted_because_it_would_pay_for_another_length():
    data = [episode(0.4), episode(None, None, None, 0.5)]  # one scored turn each, but at different depths

    def values(scale, gamma=0.9):
        return [
            sum(gamma**depth * scale.apply(r) for depth, r in enumerate(rewards) if r is not None)
            for rewards in ([0.4], [None, None, None, 0.5])
        ]

    early, late = values(RewardScale.fit(data, discounted=True))
    assert early > late  # as .4 > .9³ · .5 = .3645
    early, late = values(RewardScale.fit(data, discounted=False))
    assert early < late  # what a shift by the mean reward would make of it


def test_a_return_is_shifted_once_for_every_scored_turn():
    data = [episode(1.0, 2.0), episode(5.0, None, 8.0)]  # mean reward 4, returns 3 and 13
    scale = RewardScale.fit(data, discounted=False)
    assert [scale.apply_to_return(t.total_return) for t in data] == pytest.approx([-0.5, 0.5])
    assert [sum(row) for row in scaled(data)] == pytest.approx([-0.5, 0.5])
    assert RewardScale.fit(data, discounted=True).apply_to_return(13.0) == pytest.approx(1.3)


def test_what_is_ahead_of_a_turn_returns_to_logged_units():
    scale = RewardScale.fit([episode(1.0, 2.0), episode(5.0, None, 8.0)], discounted=False)
    ahead = [scale.apply(5.0) + scale.apply(8.0), scale.apply(8.0)]
    assert scale.invert_return(ahead[0]) == pytest.approx(13.0)
    assert scale.invert_return(ahead[1], scored_before=1) == pytest.approx(8.0)
    assert RewardScale(0.0, 20.0).invert_return(0.5, scored_before=3) == 10.0


def test_unscored_turns_pay_nothing_and_the_range_of_returns_becomes_one():
    data = [episode(None, 2.0), episode(None, 10.0)]
    assert scaled(data) == [[0.0, -0.5], [0.0, 0.5]]


def test_equal_returns_keep_the_unit_and_a_scale_of_zero_is_refused():
    assert RewardScale.fit([episode(3.0), episode(3.0)], discounted=False).scale == 1.0
    with pytest.raises(InputError, match="reward_scale: found 0"):
        RewardScale.fit([episode(3.0)], scale=0.0, discounted=False)


def test_round_trip_through_the_saved_block():
    scale = RewardScale(0.5, 4.0, 3)
    assert RewardScale(**scale.to_dict()) == scale
