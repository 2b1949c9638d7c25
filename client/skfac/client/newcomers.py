"""Parameters that begin to train after a `Preconditioner` was made."""

import logging
from collections.abc import Iterator

import torch
from torch import nn

logger = logging.getLogger(__name__)

_NAMED = 3  # of them, in the message


class Newcomers:
    """Says once that layers which were unfrozen or added are not preconditioned.

    Args:
        model: Trained by `optimizer`.
        optimizer: What it has now is known.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._optimizer = optimizer
        self._said = False
        self._known = set(map(id, self._trained()))

    def look(self) -> None:
        """Look for parameters that train and did not."""
        if self._said:
            return
        new = [id(p) for p in self._trained() if id(p) not in self._known]
        names = [self._names[one] for one in new if one in self._names]
        if names:
            self._said = True
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            logger.warning(
                "%s%s train now, and did not when the Preconditioner was made: their "
                "gradients stay raw, outside the trust region. Close it and make a new "
                "one to precondition them.",
                ", ".join(names[:_NAMED]),
                more,
            )

    def _trained(self) -> Iterator[nn.Parameter]:
        for group in self._optimizer.param_groups:
            yield from (p for p in group["params"] if p.requires_grad)
