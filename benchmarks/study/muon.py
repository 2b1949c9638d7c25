"""Muon in the dtype of its parameters.

`torch.optim.Muon` orthogonalizes in bfloat16, which on a CPU without instructions for
it takes thirty times as long as float32 and would make a run last ten minutes. This one
takes the same steps up to that rounding, which a test checks, and convolutions too, as
matrices of one row per output channel.

Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024,
https://kellerjordan.github.io/posts/muon/
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


class Muon(Optimizer):
    """Steps along the orthogonalized Nesterov momentum of each gradient.

    Args:
        parameters: Weights of two dimensions or more.
        lr: Learning rate; a matrix with more rows than columns takes it times the root
            of their ratio.
        momentum: Share of the momentum that a step keeps.
    """

    def __init__(
        self, parameters: Iterable[Parameter], *, lr: float, momentum: float = 0.95
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closures
        """Take a step."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                self._step_one(parameter, group["lr"], group["momentum"])

    def _step_one(self, parameter: Parameter, lr: float, momentum: float) -> None:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        mean = state["momentum"].lerp_(parameter.grad, 1 - momentum)
        matrix = parameter.grad.lerp(mean, momentum).flatten(1)
        ratio = math.sqrt(max(1.0, matrix.shape[0] / matrix.shape[1]))
        update = orthogonalized(matrix).reshape(parameter.shape)
        parameter.sub_(update, alpha=lr * ratio)


def orthogonalized(matrix: Tensor) -> Tensor:
    """Bring all singular values near 1.

    Args:
        matrix: (rows, columns).

    Returns:
        A matrix of the same shape and singular vectors.
    """
    a, b, c = _COEFFICIENTS
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = wide @ wide.T
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    result: Tensor = wide.T if matrix.shape[0] > matrix.shape[1] else wide
    return result
