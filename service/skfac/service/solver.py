"""Turns the rows of one (layer, step) into its outcome."""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from skfac.curvature.history import LayerHistory
from skfac.curvature.layer import LayerPreconditioner
from skfac.service.assembler import Assembly
from skfac.service.scheduler import Task
from skfac.wire.outcome import Loss, Outcome, Version
from skfac.wire.staging import Staging
from skfac.wire.state import SessionState

logger = logging.getLogger(__name__)

DAMPING_GROWTH = 10.0
"""By how much damping grows from one attempt to the next."""

ATTEMPTS = 4
"""How often an inversion is tried before its version is given up."""


@dataclass(frozen=True, eq=False)
class Solution:
    """The outcome of a task and what it took.

    Attributes:
        outcome: A version, or a loss.
        retries: Attempts with more damping than was asked for.
        history: The layer's history with the task's rows; None leaves it as it was.
    """

    outcome: Outcome
    retries: int = 0
    history: LayerHistory | None = None


class Solver:
    """Folds and inverts the factors of one task at a time on one device.

    The result depends on the task's history, rows, settings and specification only,
    never on what else is queued: versions are reproducible bit by bit.
    """

    def __init__(self, device: str) -> None:
        self._staging = Staging(torch.device(device))

    def solve(self, task: Task) -> Solution:
        """Fold the rows, then invert both factors.

        Rows that cannot be folded leave the history as it is. Once they are folded they
        stay, even if the result cannot be inverted.

        Returns:
            A version with finite inverses on the host, or a loss that says why; and the
            history for the layer's next task.
        """
        assembly = task.assembly
        layer, step = assembly.layer, assembly.step
        name = task.spec.layers[layer].name
        history = task.history or LayerHistory.empty(
            task.spec.history, diagonal=task.spec.layers[layer].diagonal
        )
        for old in task.earlier:
            history, problem = self._fold(history, old)
            if problem:
                text = "Job %r: step %d of layer %r is not in its history: %s"
                logger.warning(text, task.spec.job, old.step, name, problem)
        if not assembly.count:
            text = f"No rank had rows of layer {name!r} at step {step}."
            return Solution(Loss(layer, step, "empty", text), 0, history)
        history, problem = self._fold(history, assembly)
        if problem:
            text = f"Layer {name!r} at step {step} was not inverted: {problem}"
            return Solution(Loss(layer, step, "failed", text), 0, history)
        return self._invert(task, history)

    def load(self, state: SessionState) -> SessionState:
        """Copy histories to the device.

        Returns:
            They, where `solve` can use them.
        """
        with self._staging.stream():
            copies = [self._staging.to_device(*layer.tensors) for layer in state.layers]
        return _held_in(state, copies)

    def unload(self, state: SessionState) -> SessionState:
        """Copy histories to the host.

        Returns:
            They, on the CPU.
        """
        with self._staging.stream():
            copies = [self._staging.to_host(layer.tensors) for layer in state.layers]
        return _held_in(state, [copy.wait() for copy in copies])

    def _fold(
        self, history: LayerHistory, assembly: Assembly
    ) -> tuple[LayerHistory, str]:
        # The second is why the rows are not in it, or nothing.
        try:
            with self._staging.stream():
                rows = self._staging.to_device(*assembly.stacked())
                return history.fold(rows[0], rows[1], assembly.agreed), ""
        except (ValueError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
            return history, str(error)

    def _invert(self, task: Task, history: LayerHistory) -> Solution:
        assembly = task.assembly
        layer, step = assembly.layer, assembly.step
        damping, reason = assembly.agreed.damping, ""
        for attempt in range(ATTEMPTS):
            try:
                found = self._precondition(task, history, damping)
            except (ValueError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
                reason = str(error)
                damping *= DAMPING_GROWTH
            else:
                counts = assembly.count, len(assembly.rows), history.updates
                return Solution(Version(layer, step, found, *counts), attempt, history)
        name = task.spec.layers[layer].name
        text = f"Layer {name!r} at step {step} was not inverted: {reason}"
        return Solution(Loss(layer, step, "failed", text), ATTEMPTS - 1, history)

    def _precondition(
        self, task: Task, history: LayerHistory, damping: float
    ) -> LayerPreconditioner:
        with self._staging.stream():
            preconditioner = history.precondition(
                task.assembly.agreed, task.spec.damping_split, damping=damping
            )
            host = self._staging.to_host(preconditioner.tensors).wait()
        if not all(tensor.isfinite().all() for tensor in host):
            raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]  # C++ has it
                f"with damping {damping:.3g} the inverse is not finite."
            )
        return preconditioner.with_tensors(*host)


def _held_in(state: SessionState, copies: list[list[Tensor]]) -> SessionState:
    pairs = zip(state.layers, copies, strict=True)
    return SessionState(tuple(layer.with_tensors(copy) for layer, copy in pairs))
