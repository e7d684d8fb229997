"""Confidence intervals: the quantile of Student's t and the interval of a share, which numpy and torch do not have."""

import math
from functools import lru_cache

import torch

NODES = 4_001  # of the grid for the integral in `student_t`, whose relative error is then at most 1e-5


@lru_cache(maxsize=4096)  # a report asks for hundreds of intervals of few shapes
def student_t(df: float, level: float = 0.95) -> float:
    """Return the x with P(|T| ≤ x) = level for Student's T.

    T = √df · tan θ, where θ has a density proportional to cos^(df − 1) θ on (−π/2, π/2). A fixed grid can integrate
    this density for every df.

    Args:
      df: degrees of freedom, at least 1, not necessarily a whole number.
      level: the probability of the interval.
    """
    if not df >= 1:
        raise ValueError(f"df: found {df}, expected at least 1")
    df = min(df, 1e6)  # with more, T is normal, and the density is too narrow for the grid
    reach = min(math.pi / 2, 12 / math.sqrt(df))  # after 12 standard deviations, the density is 0
    angle = torch.linspace(0, reach, NODES, dtype=torch.float64)
    density = ((df - 1) * angle.cos().clamp(min=1e-300).log()).exp()
    mass = torch.cumulative_trapezoid(density, angle)
    at = int(torch.searchsorted(mass, level * mass[-1]))
    before = mass[at - 1] if at else torch.zeros(())
    theta = angle[at] + (level * mass[-1] - before) / (mass[at] - before) * (angle[at + 1] - angle[at])
    return math.sqrt(df) * math.tan(theta)


def wilson(share: float, n: float, quantile: float) -> tuple[float, float]:
    """Return the lower and upper end, in [0, 1], of Wilson's interval for a share (Wilson 1927).

    Args:
      share: the observed share, in [0, 1].
      n: the number of independent outcomes, above 0, not necessarily a whole number.
      quantile: the half width in standard errors, such as 1.96 for a 95% interval.
    """
    z2 = quantile**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = quantile * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))  # rounding may exclude the share
