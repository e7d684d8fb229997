import pytest

from offline_lmrl.algorithms.behaviour_cloning import BCConfig, keep_best
from offline_lmrl.errors import InputError
from offline_lmrl.logs.trajectory import Trajectory, Turn


def episode(reward, group=""):
    return Trajectory((Turn("user", "q"), Turn("assistant", "a", reward=reward)), group=group)


def returns(trajectories):
    return [t.total_return for t in trajectories]


def test_share_keeps_the_best_in_their_order():
    data = [episode(r) for r in (1.0, 5.0, 3.0, 4.0, 2.0)]
    assert returns(keep_best(data, share=0.4)) == [5.0, 4.0]
    assert returns(keep_best(data, share=0.5)) == [5.0, 3.0, 4.0]  # 2.5 episodes round up
    assert keep_best(data) == data


def test_a_share_that_is_a_whole_number_of_episodes_keeps_just_that_many():
    data = [episode(float(r)) for r in range(100)]
    assert len(keep_best(data, share=0.07)) == 7  # .07 · 100 = 7.000000000000001 in floating point
    assert len(keep_best(data, share=0.071)) == 8


def test_ties_at_the_edge_go_to_the_earlier_ones():
    data = [episode(1.0, group=str(i)) for i in range(4)]
    assert [t.group for t in keep_best(data, share=0.5)] == ["0", "1"]


def test_share_within_groups_keeps_some_of_each():
    data = [episode(r, group=g) for r, g in ((1.0, "a"), (9.0, "b"), (2.0, "a"), (8.0, "b"))]
    assert returns(keep_best(data, share=0.5)) == [9.0, 8.0]
    assert returns(keep_best(data, share=0.5, per_group=True)) == [9.0, 2.0]


def test_threshold_keeps_all_at_or_above_it():
    assert returns(keep_best([episode(r) for r in (1.0, 2.0, 3.0)], above=2.0)) == [2.0, 3.0]
    with pytest.raises(InputError, match="keep_above: found 7.*best return in the data, 3"):
        keep_best([episode(3.0)], above=7.0)


def test_settings_out_of_range_are_refused(tmp_path):
    with pytest.raises(InputError, match="keep_share: found 0.0"):
        BCConfig(output_dir=str(tmp_path), keep_share=0.0)
    with pytest.raises(InputError, match="stride: found 3, expected 1 to context"):
        BCConfig(output_dir=str(tmp_path), context=2, stride=3)


COUNTS = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "dataloader_num_workers",
)


@pytest.mark.parametrize(
    "name", [*COUNTS, "learning_rate", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay", "max_grad_norm"]
)
def test_what_transformers_takes_and_torch_then_refuses_is_one_line(tmp_path, name):
    with pytest.raises(InputError, match=f"^{name}: found -1, expected "):
        BCConfig(output_dir=str(tmp_path), **{name: -1})
