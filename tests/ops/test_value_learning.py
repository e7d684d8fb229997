import pytest
import torch
from torch.testing import assert_close

from offline_lmrl.ops.value_learning import awr_weight, conservative_loss, expectile_loss, q_loss, td_target

# Two actions over three tokens: Q = [[.5,1,-.5],[.2,0,.4]], actions [1,2], V = [.3,.1], last action terminal,
# min target Q of the actions [.9,.5], rewards [0,1], γ .99, τ .7.
Q = torch.tensor([[0.5, 1.0, -0.5], [0.2, 0.0, 0.4]])
TAKEN = torch.tensor([[1.0, 0.4]])
REWARD, BOOTSTRAP = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])
V, TARGET_Q = torch.tensor([0.3, 0.1]), torch.tensor([0.9, 0.5])


def test_losses_equal_the_numbers_worked_by_hand():
    target = td_target(REWARD, torch.tensor([0.1, 5.0]), BOOTSTRAP, 0.99)
    assert_close(target, torch.tensor([0.099, 1.0]))
    # ((1 - .099)² + (.4 - 1)²) / 2 = (.811801 + .36) / 2
    assert_close(q_loss(TAKEN, target).mean(), torch.tensor(0.5859005))
    # .7 (.6² + .4²) / 2 = .182
    assert_close(expectile_loss(V, TARGET_Q, 0.7).mean(), torch.tensor(0.182))
    # (ln(e^.5 + e^1 + e^-.5) - 1 + ln(e^.2 + e^0 + e^.4) - .4) / 2
    assert_close(conservative_loss(Q.logsumexp(-1)[None], TAKEN).mean(), torch.tensor(0.7580160))


def test_twin_heads_are_summed():
    target = torch.tensor([0.099, 1.0])
    assert_close(q_loss(TAKEN.expand(2, 2), target).mean(), torch.tensor(1.171801))
    assert_close(conservative_loss(Q.logsumexp(-1).expand(2, 2), TAKEN.expand(2, 2)).mean(), torch.tensor(1.516032))


def test_expectile_half_is_half_the_squared_error_and_weights_are_asymmetric():
    v, target = torch.tensor([0.0, 2.0]), torch.tensor([1.0, 1.0])
    assert_close(expectile_loss(v, target, 0.5), torch.tensor([0.5, 0.5]))
    assert_close(expectile_loss(v, target, 0.9), torch.tensor([0.9, 0.1]))


@pytest.mark.parametrize("expectile,expected", [(0.5, 0.3), (0.8, 0.6315789), (0.95, 0.8906250)])
def test_expectile_of_a_bernoulli_has_its_closed_form(expectile, expected):
    # V = τp / (τp + (1−τ)(1−p)) at p = .3, reached by gradient descent on the loss
    samples = torch.tensor([1.0] * 3 + [0.0] * 7)
    v = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.SGD([v], lr=0.5)
    for _ in range(300):
        optimizer.zero_grad()
        expectile_loss(v.expand(10), samples, expectile).mean().backward()
        optimizer.step()
    assert_close(v.detach(), torch.tensor(expected), atol=1e-4, rtol=0)


def test_no_gradient_reaches_targets():
    next_v, target_q = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    assert not td_target(REWARD, next_v, BOOTSTRAP, 0.99).requires_grad
    v = torch.zeros(2, requires_grad=True)
    expectile_loss(v, target_q, 0.7).sum().backward()
    assert target_q.grad is None
    assert v.grad is not None


def test_discount_may_differ_per_step():
    target = td_target(torch.zeros(2), torch.ones(2), torch.ones(2), torch.tensor([1.0, 0.5]))
    assert_close(target, torch.tensor([1.0, 0.5]))


def test_awr_weights_are_clipped_exponentials():
    weight = awr_weight(torch.tensor([-1.0, 0.0, 10.0]), inverse_temperature=3.0, max_weight=100.0)
    assert_close(weight, torch.tensor([0.0497871, 1.0, 100.0]))


def test_wrong_shapes_are_refused_at_the_door():
    with pytest.raises(ValueError, match="axis n has sizes 2 and 3"):
        expectile_loss(torch.zeros(2), torch.zeros(3), 0.7)
    with pytest.raises(ValueError, match="expected axes"):
        q_loss(torch.zeros(2), torch.zeros(2))
