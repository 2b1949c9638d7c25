"""The learning rates that an optimizer has now."""

from operator import is_
from typing import Any

import torch
from torch import Tensor, nn


class LearningRates:
    """Looks up the learning rate of a parameter.

    Groups are found by their parameters: `load_state_dict` puts other groups there,
    and a trainer may add, drop or reorder them.

    Args:
        optimizer: Trains the parameters.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._groups: list[dict[str, Any]] = []
        self._of: dict[int, dict[str, Any]] = {}

    def of(self, *parameters: nn.Parameter | None) -> float | Tensor:
        """Find the largest rate of some parameters.

        Returns:
            It; 0 if the optimizer has none of them.
        """
        groups, known = self._optimizer.param_groups, self._groups
        if len(groups) != len(known) or not all(map(is_, groups, known)):
            self._groups = list(groups)
            self._of = {id(p): group for group in groups for p in group["params"]}
        found = [self._of.get(id(p)) for p in parameters if p is not None]
        first = found[0]
        if first is not None and all(group is first for group in found):
            rate: float | Tensor = first["lr"]
            return rate
        own = [group["lr"] for group in found if group is not None]
        return _largest(own) if own else 0.0


def _largest(rates: list[float | Tensor]) -> float | Tensor:
    on_device = next((rate for rate in rates if isinstance(rate, Tensor)), None)
    if on_device is None:
        return max(rates)
    device = on_device.device
    return torch.stack([torch.as_tensor(r, device=device) for r in rates]).amax()
