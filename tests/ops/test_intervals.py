import pytest

from offline_lmrl.ops.intervals import student_t, wilson


@pytest.mark.parametrize(
    ("df", "quantile"),  # of published tables, two-sided 95 %
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (9, 2.26216), (29, 2.04523), (1e9, 1.95996)],
)
def test_the_quantile_of_t_is_that_of_the_tables(df, quantile):
    assert student_t(df) == pytest.approx(quantile, rel=2e-5)


def test_the_quantile_takes_any_level_and_falls_between_whole_degrees():
    assert student_t(4, 0.9) == pytest.approx(2.13185, rel=2e-5)
    assert student_t(2) > student_t(2.5) > student_t(3)
    with pytest.raises(ValueError, match="df: found 0.5"):
        student_t(0.5)


def test_wilsons_interval_is_the_one_worked_by_hand():
    # 8 of 10, z = 2: middle (.8 + .2) / 1.4, half 2 · √(.016 + .01) / 1.4
    assert wilson(0.8, 10, 2.0) == pytest.approx((0.483936, 0.944636), abs=1e-6)
    assert wilson(1.0, 16, 2.0) == (0.8, 1.0) and wilson(0.0, 16, 2.0) == (0.0, 0.2)
