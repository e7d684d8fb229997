import torch
from torch.testing import assert_close

from offline_lmrl.ops.returns import (
    lambda_return,
    monte_carlo_mixture,
    qdt_returns_to_go,
    return_to_go,
)


def test_return_to_go_by_hand():
    reward = torch.tensor([[1.0, 2.0, 4.0]])
    discount = torch.tensor([[0.5, 0.5, 0.0]])
    assert_close(
        return_to_go(reward, discount), torch.tensor([[1 + 0.5 * (2 + 0.5 * 4), 2 + 0.5 * 4, 4.0]])
    )  # 3, 4, 4


def test_return_to_go_ends_at_a_terminal_action_and_bootstraps_at_a_cut():
    reward = torch.tensor([[0.0, 1.0, -1.0], [0.0, 1.0, -1.0]])
    discount = torch.tensor([[1.0, 0.9, 0.0], [1.0, 0.9, 0.9]])
    end_value = torch.tensor([7.0, 10.0])
    # row 0: G2 = -1, G1 = 1 - .9 = .1, G0 = .1;  row 1: G2 = -1 + 9 = 8, G1 = 1 + 7.2 = 8.2, G0 = 8.2
    expected = torch.tensor([[0.1, 0.1, -1.0], [8.2, 8.2, 8.0]])
    assert_close(return_to_go(reward, discount, end_value), expected)


def test_return_to_go_survives_zero_discounts_and_long_sequences():
    reward = torch.ones(1, 3000)
    assert_close(return_to_go(reward, torch.zeros(1, 3000)), reward)
    assert_close(return_to_go(reward, torch.full((1, 3000), 0.5))[0, 0], torch.tensor(2.0))


def test_lambda_return_interpolates_between_one_step_and_monte_carlo():
    reward = torch.tensor([[1.0, 1.0]])
    next_v = torch.tensor([[10.0, 20.0]])
    discount = torch.tensor([[0.5, 0.5]])
    assert_close(lambda_return(reward, next_v, discount, 0.0), torch.tensor([[6.0, 11.0]]))
    assert_close(lambda_return(reward, next_v, discount, 1.0), torch.tensor([[1 + 0.5 * 11.0, 11.0]]))
    # λ = .25: G1 = 11, G0 = 1 + .5 (.75·10 + .25·11) = 6.125
    assert_close(lambda_return(reward, next_v, discount, 0.25), torch.tensor([[6.125, 11.0]]))


def test_mixture_is_linear_in_the_share():
    td, realised = torch.tensor([0.0, 1.0]), torch.tensor([10.0, 3.0])
    assert_close(monte_carlo_mixture(td, realised, 0.3), torch.tensor([3.0, 1.6]))


def test_relabelled_returns_of_three_turns_take_the_better_of_log_and_critic():
    reward = torch.tensor([[1.0, 2.0, -1.0]] * 3)
    next_v = torch.tensor([[2.0, 4.0, 0.0], [9.0, -3.0, 0.0], [0.0, 0.0, 5.0]])
    # terminated, V = 4 before the last turn:  R2 = -1, R1 = 2 + max(-1, 4) = 6, R0 = 1 + max(6, 2) = 7
    # terminated, V = 9 before the second:     R2 = -1, R1 = 2 + max(-1, -3) = 1, R0 = 1 + max(1, 9) = 10
    # cut where V = 5:                         R2 = 4, R1 = 2 + max(4, 0) = 6, R0 = 1 + max(6, 0) = 7
    expected = torch.tensor([[7.0, 6.0, -1.0], [10.0, 1.0, -1.0], [7.0, 6.0, 4.0]])
    assert_close(qdt_returns_to_go(reward, next_v), expected)
    # γ = .5, the first row:  R2 = -1, R1 = 2 + .5 · 4 = 4, R0 = 1 + .5 · 4 = 3
    assert_close(qdt_returns_to_go(reward, next_v, 0.5)[0], torch.tensor([3.0, 4.0, -1.0]))


def test_relabelling_with_a_critic_that_knows_nothing_better_keeps_the_logged_return():
    reward = torch.tensor([[0.0, 1.0, 3.0]])  # padded on the left where it is shorter
    assert_close(qdt_returns_to_go(reward, torch.tensor([[-9.0, -9.0, 0.0]])), torch.tensor([[4.0, 4.0, 3.0]]))
    alone = qdt_returns_to_go(torch.tensor([[1.0, 3.0]]), torch.tensor([[-9.0, 0.0]]))
    assert_close(alone, torch.tensor([[4.0, 3.0]]))
