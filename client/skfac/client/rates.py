"""The learning rates that an optimizer has now."""

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
        groups = self._optimizer.param_groups
        known = self._groups
        if len(groups) != len(known) or any(map(_differs, groups, known)):
            self._groups = list(groups)
            self._of = {id(p): group for group in groups for p in group["params"]}
        found = [self._of.get(id(p)) for p in parameters if p is not None]
        own = [group for group in found if group is not None]
        if not own:
            return 0.0
        first: float | Tensor = own[0]["lr"]
        if all(group is own[0] for group in own):
            return first
        return _largest([group["lr"] for group in own])


def _differs(one: object, other: object) -> bool:
    return one is not other


def _largest(rates: list[float | Tensor]) -> float | Tensor:
    on_device = next((rate for rate in rates if isinstance(rate, Tensor)), None)
    if on_device is None:
        return max(rates)
    device = on_device.device
    return torch.stack([torch.as_tensor(r, device=device) for r in rates]).amax()
