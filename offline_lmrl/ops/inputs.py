"""What the functions in this folder ask of their inputs: named shapes, and at least fp32.

A wrong axis would broadcast silently. Half precision is widened; float64 inputs stay as they are.
"""

import torch
from torch import Tensor


def check_shapes(spec: str, *tensors: Tensor) -> None:
    """Check that tensors have the named shapes: `check_shapes("h n, n", q, reward)`.

    Args:
      spec: a comma-separated list with the axis names of each tensor; axes of the same name must have the same size.
      tensors: as many as `spec` names.
    Raises: ValueError if a tensor has another shape.
    """
    sizes: dict[str, int] = {}
    for names, tensor in zip(spec.split(","), tensors, strict=True):
        axes = names.split()
        if tensor.ndim != len(axes):
            raise ValueError(f"expected axes ({names.strip()}), found shape {tuple(tensor.shape)}")
        for axis, size in zip(axes, tensor.shape, strict=True):
            if sizes.setdefault(axis, size) != size:
                raise ValueError(f"axis {axis} has sizes {sizes[axis]} and {size} in ({spec})")


def at_least_float32(x: Tensor) -> Tensor:
    """Return x widened to fp32 if it is half precision; fp32 and float64 stay as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
