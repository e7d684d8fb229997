"""Parameters that a loss does not reach, such as the vision tower of a model that reads text.

They are frozen before anything is trained: an optimizer would keep state for them, and processes that share gradients
would wait for theirs for ever.
"""

from collections import defaultdict
from collections.abc import Iterator

from torch import Tensor, nn


def freeze_unreached(model: nn.Module, output: Tensor) -> bool:
    """Freezes what a number that the model gave was not computed from, as its autograd graph says.

    One of several experts may be left out by the tokens of one batch and read by those of another: a parameter stays
    free where its like is reached, that is, one of the same name in modules of the same classes but for numbers.

    Args:
      output: of a forward pass whose parts of the model are those that training runs.
    Returns: whether some that stay free were not reached this time.
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
    """The parameters that a tensor was computed from."""
    waiting, seen = [output.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        waiting += [before for before, _ in node.next_functions]
