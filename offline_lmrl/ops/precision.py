"""The floating point precision of the functions in this folder: fp32, or float64 for float64 inputs."""

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Return x widened to fp32 if it is half precision; fp32 and float64 stay as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
