"""The trainer's GradScaler: what the loss is multiplied by, and taking it back."""

import torch
from torch import Tensor


class LossScale:
    """Reads and undoes the scale of a GradScaler without stopping the device."""

    def __init__(
        self,
        scaler: torch.amp.GradScaler | None,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._optimizer = optimizer

    def scaled(self, loss: Tensor) -> Tensor:
        """Multiply a loss as the trainer does.

        Returns:
            The scaled loss.
        """
        return loss if self._scaler is None else self._scaler.scale(loss)

    def unscale(self, device: torch.device) -> Tensor | float:
        """Unscale the gradients unless the trainer has done so in this step.

        Returns:
            The scale that was live in the backward, on the device.

        Raises:
            RuntimeError: If the scaler has stepped already.
        """
        if self._scaler is None:
            return 1.0
        scale = self._scaler.scale(torch.ones((), device=device))
        try:
            self._scaler.unscale_(self._optimizer)
        except RuntimeError as error:
            if "already been called" not in str(error):
                raise
        return scale
