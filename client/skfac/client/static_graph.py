"""The one kind of graph that a second backward beside the training's spoils."""

from torch import Tensor

from skfac.wire.errors import ConfigurationError


def check_not_static(loss: Tensor) -> None:
    """Check that a loss is not of `DistributedDataParallel(static_graph=True)`.

    That averages the gradients at the end of its first backward, whichever it is, and
    of none after that if this was not the training's.

    Raises:
        ConfigurationError: If it is.
    """
    seen, left = set(), [loss.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        left += [other for other, _ in node.next_functions]
        of = getattr(node, "ddp_weakref", None)  # the first node inside the model
        wrapper = None if of is None else of()
        if wrapper is not None and getattr(wrapper, "static_graph", False):
            raise ConfigurationError(
                "fisher='monte_carlo' cannot be used with DistributedDataParallel("
                "static_graph=True): after another backward than the training's it "
                "averages no gradients any more. Leave static_graph out."
            )
