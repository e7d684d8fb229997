"""Shapes, checked at the door of the losses and returns: there a wrong axis would broadcast in silence."""

from torch import Tensor


def check_shapes(spec: str, *tensors: Tensor) -> None:
    """Raise a ValueError unless the tensors have the named shapes: `check_shapes("h n, n", q, reward)`.

    One comma-separated group of axis names per tensor; an axis named twice must have one size.
    """
    sizes: dict[str, int] = {}
    for names, tensor in zip(spec.split(","), tensors, strict=True):
        axes = names.split()
        if tensor.ndim != len(axes):
            raise ValueError(f"expected axes ({names.strip()}), found shape {tuple(tensor.shape)}")
        for axis, size in zip(axes, tensor.shape, strict=True):
            if sizes.setdefault(axis, size) != size:
                raise ValueError(f"axis {axis} has sizes {sizes[axis]} and {size} in ({spec})")
