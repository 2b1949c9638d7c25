"""Whether an optimizer uses what was preconditioned."""

import logging

import torch

logger = logging.getLogger(__name__)


class StepOrder:
    """Says once if an optimizer takes a step that nothing was preconditioned for.

    Args:
        optimizer: One of torch's; of another kind, that has no hooks, nothing is known.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._preconditioned = False
        self._said = False
        self._handle = None
        try:
            # After the step: a closure may have run backward and preconditioner.
            self._handle = optimizer.register_step_post_hook(self._look)
        except AttributeError:
            logger.debug("%s has no hooks.", type(optimizer).__name__)

    def precondition(self) -> None:
        """Tell that the gradients of the optimizer's next step are preconditioned."""
        self._preconditioned = True

    def close(self) -> None:
        """Look no more; idempotent."""
        if self._handle is not None:
            self._handle.remove()

    def _look(self, *_: object) -> None:
        if torch.compiler.is_compiling():
            return  # it is called once then, and not at each step
        if not (self._preconditioned or self._said):
            self._said = True
            logger.warning(
                "optimizer.step() used raw gradients: no step() of the Preconditioner "
                "came before it. Call that after backward() and before "
                "optimizer.step()."
            )
        self._preconditioned = False
