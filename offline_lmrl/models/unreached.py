"""Parameters on which a loss does not depend, such as the vision tower of a multimodal model that reads text.

They are frozen before training: otherwise the optimizer would keep state for them, and processes that share gradients
would wait for ever for the gradients of these parameters.
"""

from collections import defaultdict
from collections.abc import Iterator

from torch import Tensor, nn


def freeze_unreached(model: nn.Module, output: Tensor) -> bool:
    """Freeze the parameters on which an output of the model does not depend, as its autograd graph shows.

    An expert of a mixture may be unused by one batch and used by another. A parameter therefore stays trainable if the
    output depends on a similar one: one whose name differs only in numbers, in modules of the same classes.

    Args:
      model: the model, whose parameters are frozen in place.
      output: the result of a forward pass that runs the same parts of the model as training does.
    Returns: True if the output does not depend on some parameters that stay trainable, so that data-parallel training
      must search for unused parameters in every step.
    """
    reached = set(map(id, _leaves(output)))
    modules = dict(model.named_modules())
    alike: dict[tuple, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts = name.split(".")
            classes = (type(modules[".".join(parts[:depth])]) for depth in range(len(parts)))
            alike[(*classes, *(part for part in parts if not part.isdecimal()))].append(parameter)
    partly = False
    for parameters in alike.values():
        missing = [parameter for parameter in parameters if id(parameter) not in reached]
        if len(missing) == len(parameters):
            for parameter in missing:
                parameter.requires_grad_(False)
        elif missing:
            partly = True
    return partly


def _leaves(output: Tensor) -> Iterator[Tensor]:
    """Yield the parameters (and other leaves with a gradient) that a tensor was computed from."""
    waiting, seen = [output.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::AccumulateGrad":  # the node that holds a leaf
            yield node.variable
        waiting += [before for before, _ in node.next_functions]
