"""The quantile of Student's t and the interval of a share: what an interval needs that numpy and torch lack."""

import math
from functools import lru_cache

import torch

NODES = 4_001  # of the quantile's integral; it is then right to 1e-5 of itself


@lru_cache(maxsize=4096)  # a report asks for hundreds of intervals of few shapes
def student_t(df: float, level: float = 0.95) -> float:
    """The x with P(|T| ≤ x) = level for Student's T with `df` degrees of freedom, a number of at least 1.

    T = √df · tan θ, where θ has a density proportional to cos^(df − 1) θ on (−π/2, π/2), which a fixed grid integrates
    for every df.
    """
    if not df >= 1:
        raise ValueError(f"df: found {df}, expected at least 1")
    df = min(df, 1e6)  # beyond, the density is narrower than the grid resolves and T is normal
    reach = min(math.pi / 2, 12 / math.sqrt(df))  # the density beyond 12 standard deviations is 0
    angle = torch.linspace(0, reach, NODES, dtype=torch.float64)
    density = ((df - 1) * angle.cos().clamp(min=1e-300).log()).exp()
    mass = torch.cumulative_trapezoid(density, angle)
    at = int(torch.searchsorted(mass, level * mass[-1]))
    before = mass[at - 1] if at else torch.zeros(())
    theta = angle[at] + (level * mass[-1] - before) / (mass[at] - before) * (angle[at + 1] - angle[at])
    return math.sqrt(df) * math.tan(theta)


def wilson(share: float, n: float, quantile: float) -> tuple[float, float]:
    """The ends of the interval of a share (Wilson 1927) of `n` independent outcomes, within 0 and 1."""
    z2 = quantile**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = quantile * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))  # rounding
