"""Draws against tables worked out by hand."""

import torch

from offline_lmrl.ops.decoding import sample_from, uniform


def test_inverse_cdf_draws_the_token_whose_interval_holds_u():
    scores = torch.tensor([[0.25, 0.0, 0.5, 0.25, 0.0]]).log() - 7.0  # cdf .25 .25 .75 1 1
    u = torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 0.7501, 1 - 2.0**-53], dtype=torch.float64)
    drawn, total = sample_from(scores.expand(6, 5), u)
    assert drawn.tolist() == [0, 0, 2, 2, 3, 3]
    torch.testing.assert_close(total, torch.full((6,), -7.0, dtype=torch.float64))  # log(Σ p · e⁻⁷), Σ p = 1


def test_the_normaliser_is_exact_for_scores_far_from_0():
    scores = torch.tensor([[-100.0, -101.0, -torch.inf]])
    _, total = sample_from(scores, torch.tensor([0.5]))
    assert abs(total.item() - (-99.68673831248178)) < 1e-7  # −100 + log(1 + 1/e); fp32 would be 4e-6 off


def test_uniform_is_a_function_of_seed_and_counter_alone():
    seeds = torch.tensor([7, 7, 8, -3, 2**62])
    counters = torch.tensor([0, 1, 0, 5, 9])
    together = uniform(seeds, counters)
    alone = torch.cat([uniform(seeds[i : i + 1], counters[i : i + 1]) for i in range(5)])
    assert torch.equal(together, alone)
    assert together.unique().numel() == 5


def test_uniform_matches_splitmix64_on_python_integers():
    def mix(x):
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    golden = 0x9E3779B97F4A7C15
    for seed, counter in ((0, 0), (1, 2), (123456789, 987654321)):
        bits = mix((mix((seed + golden) % 2**64) + counter * golden) % 2**64)
        assert uniform(torch.tensor([seed]), torch.tensor([counter])).item() == (bits >> 11) / 2**53


def test_uniform_fills_the_interval_over_seeds_and_over_counters():
    index = torch.arange(100_000)
    for u in (uniform(index, index * 0), uniform(index * 0, index)):
        counts = torch.histc(u.float(), bins=10, min=0, max=1)
        chi_square = ((counts - 10_000) ** 2 / 10_000).sum()
        assert chi_square < 27.88  # 9 degrees of freedom, p = .001
        assert abs(torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1]) < 0.015
