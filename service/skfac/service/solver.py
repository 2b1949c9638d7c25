"""Turns the rows of one (layer, step) into its outcome."""

from dataclasses import dataclass

import torch
from torch import Tensor

from skfac.curvature.layer import LayerPreconditioner, precondition_layer
from skfac.service.scheduler import Task
from skfac.wire.outcome import Loss, Outcome, Version
from skfac.wire.staging import Staging

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
    """

    outcome: Outcome
    retries: int


class Solver:
    """Inverts the factors of one task at a time on one device.

    The result depends on the task's rows, damping and specification only, never on
    what else is queued: versions are reproducible bit by bit.
    """

    def __init__(self, device: str) -> None:
        self._staging = Staging(torch.device(device))

    def solve(self, task: Task) -> Solution:
        """Invert both factors, with more damping if that is what it takes.

        Returns:
            A version with finite inverses on the host, or a loss that says why.
        """
        assembly = task.assembly
        layer, step = assembly.layer, assembly.step
        name = task.spec.layers[layer].name
        ranks = sorted(assembly.rows)
        activations = torch.cat([assembly.rows[rank].activations for rank in ranks])
        derivatives = torch.cat([assembly.rows[rank].derivatives for rank in ranks])
        if not len(activations):
            text = f"No rank had rows of layer {name!r} at step {step}."
            return Solution(Loss(layer, step, "empty", text), 0)
        damping = assembly.damping[ranks[0]]
        reason = ""
        for attempt in range(ATTEMPTS):
            try:
                found = self._invert(task, activations, derivatives, damping)
            except (ValueError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
                reason = str(error)
                damping *= DAMPING_GROWTH
            else:
                version = Version(layer, step, found, len(activations), len(ranks))
                return Solution(version, attempt)
        text = f"Layer {name!r} at step {step} was not inverted: {reason}"
        return Solution(Loss(layer, step, "failed", text), ATTEMPTS - 1)

    def _invert(
        self, task: Task, activations: Tensor, derivatives: Tensor, damping: float
    ) -> LayerPreconditioner:
        with self._staging.stream():
            preconditioner = precondition_layer(
                *self._staging.to_device(activations, derivatives),
                damping=damping,
                split=task.spec.damping_split,
            )
            host = self._staging.to_host(preconditioner.tensors).wait()
        if not all(tensor.isfinite().all() for tensor in host):
            raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]  # C++ has it
                f"with damping {damping:.3g} the inverse is not finite."
            )
        return preconditioner.with_tensors(*host)
