"""Turns the rows of some (layer, step)s into their outcomes."""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skfac.curvature import stacks
from skfac.curvature.damped import NoInverse
from skfac.curvature.factor import Moment, look_at
from skfac.curvature.history import LayerHistory, updates_of
from skfac.curvature.layer import (
    DampedLayer,
    LayerPreconditioner,
    precondition_layers,
)
from skfac.service.assembler import Assembly
from skfac.service.scheduler import Task
from skfac.service.warm_up import warm_up_tasks
from skfac.wire.outcome import Loss, LossReason, Outcome, Version
from skfac.wire.runs import runs_within
from skfac.wire.staging import Staging
from skfac.wire.state import SessionState

logger = logging.getLogger(__name__)

DAMPING_GROWTH = 10.0
"""By how much damping grows from one attempt to the next."""

ATTEMPTS = 4
"""How often an inversion is tried before its version is given up."""

_PART = 1 << 23  # bytes of float64 rows that are solved together on the CPU


@dataclass(frozen=True, eq=False)
class Solution:
    """The outcome of a task and what it took.

    Attributes:
        outcome: A version, or a loss.
        retries: Attempts with more damping than was asked for.
        history: The layer's history with the task's rows; None leaves it as it was, as
            with `history="snapshot"`, of which nothing is kept.
        conditions: Upper bounds of the condition of both damped factors, activations
            first; zeros without a version.
    """

    outcome: Outcome
    retries: int = 0
    history: LayerHistory | None = None
    conditions: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True, eq=False)
class _Folded:
    # A task whose rows are in the history, and what is to be inverted.
    task: Task
    history: LayerHistory
    moments: tuple[Moment, Moment]

    def damped(self, attempt: int) -> DampedLayer:
        damping = self.task.assembly.agreed.damping * DAMPING_GROWTH**attempt
        split = self.task.spec.damping_split
        return DampedLayer(*self.moments, damping, split, self.history.dtype)


class Solver:
    """Folds and inverts the factors of batches of tasks on one device.

    The result of a task depends on its history, rows, settings and specification only,
    never on what else is in its batch or queued: on the CPU versions are reproducible
    bit by bit. A GPU may round a product in a stack of another height differently.
    """

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._staging = Staging(self._device)

    def solve(self, batch: Sequence[Task]) -> list[Solution]:
        """Fold the rows of each task, then invert all factors together.

        Rows that cannot be folded leave the history as it is. Once they are folded they
        stay, even if the result cannot be inverted.

        Args:
            batch: At most one task for each layer of a session.

        Returns:
            For each task a version with finite inverses on the host, or a loss that
            says why; and the history for the layer's next task.
        """
        return [s for part in self._parts(batch) for s in self._solve_part(part)]

    def warm(self) -> None:
        """Let a GPU load all that it will need before anyone waits for it."""
        if self._device.type != "cpu":
            self.solve(warm_up_tasks())

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

    def _parts(self, batch: Sequence[Task]) -> Iterator[Sequence[Task]]:
        # Where nothing is stacked, the float64 rows of a part are freed before the
        # next. Of more tasks than one, as a small operation takes half as long after
        # its like as it takes after a large product.
        limit = math.inf if stacks.faster_on(self._device) else _PART
        return runs_within(limit, batch, _size)

    def _solve_part(self, part: Sequence[Task]) -> list[Solution]:
        with self._staging.stream():
            solutions: dict[int, Solution] = {}
            folded: dict[int, _Folded] = {}
            for place, one in enumerate(self._fold(part)):
                if isinstance(one, Solution):
                    solutions[place] = one
                else:
                    folded[place] = one
            look_at([moment for one in folded.values() for moment in one.moments])
            inverted = self._invert(list(folded.values()))
        solutions.update(zip(folded, inverted, strict=True))
        return [solutions[place] for place in range(len(part))]

    def _fold(self, part: Sequence[Task]) -> Iterator[_Folded | Solution]:
        histories = [self._before(task) for task in part]
        updates = iter(
            updates_of(
                [self._rows(task.assembly) for task in part if task.assembly.count],
                diagonal=[
                    history.diagonal
                    for task, history in zip(part, histories, strict=True)
                    if task.assembly.count
                ],
            )
        )
        for task, history in zip(part, histories, strict=True):
            assembly, name = task.assembly, _name(task)
            if not assembly.count:
                text = f"No rank had rows of layer {name!r} at step {assembly.step}."
                yield _lost(task, "empty", text, history)
                continue
            kept = history
            try:
                kept = history.with_update(next(updates), assembly.agreed)
                yield _Folded(task, kept, kept.mean(assembly.agreed))
            except (ValueError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
                yield _failed(task, str(error), kept)

    def _before(self, task: Task) -> LayerHistory:
        # The history of a task, with what nothing was to be solved of.
        diagonal = task.spec.layers[task.assembly.layer].diagonal
        history = task.history or LayerHistory.empty(
            task.spec.history, diagonal=diagonal
        )
        for old in task.earlier:
            try:
                history = history.fold(*self._rows(old), old.agreed)
            except (ValueError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
                text = "Job %r: step %d of layer %r is not in its history: %s"
                logger.warning(text, task.spec.job, old.step, _name(task), error)
        return history

    def _rows(self, assembly: Assembly) -> tuple[Tensor, Tensor]:
        activations, derivatives = map(self._joined, assembly.sides)
        return activations, derivatives

    def _joined(self, parts: Sequence[Tensor]) -> Tensor:
        # Joined there, not here: a GPU does so faster, and copies pinned memory only.
        rows = self._staging.to_device(*parts)
        return rows[0] if len(rows) == 1 else torch.cat(rows, -2)

    def _invert(self, folded: list[_Folded]) -> list[Solution]:
        solutions: dict[int, Solution] = {}
        for attempt in range(ATTEMPTS):
            left = [i for i in range(len(folded)) if i not in solutions]
            if not left:
                break
            layers = [folded[i].damped(attempt) for i in left]
            found = self._precondition(layers)
            for i, layer, preconditioner in zip(left, layers, found, strict=True):
                if isinstance(preconditioner, LayerPreconditioner):
                    solutions[i] = _solved(folded[i], layer, preconditioner, attempt)
                elif attempt == ATTEMPTS - 1:
                    task, history = folded[i].task, folded[i].history
                    solutions[i] = _failed(
                        task, preconditioner.reason, history, attempt
                    )
        return [solutions[i] for i in range(len(folded))]

    def _precondition(
        self, layers: list[DampedLayer]
    ) -> list[LayerPreconditioner | NoInverse]:
        found = precondition_layers(layers)
        tensors = [
            tensor
            for preconditioner in found
            if isinstance(preconditioner, LayerPreconditioner)
            for tensor in preconditioner.tensors
        ]
        host = iter(self._staging.to_host(tensors).wait())
        return [
            preconditioner
            if isinstance(preconditioner, NoInverse)
            else preconditioner.with_tensors(next(host), next(host))
            for preconditioner in found
        ]


def _solved(
    folded: _Folded,
    layer: DampedLayer,
    preconditioner: LayerPreconditioner,
    retries: int,
) -> Solution:
    assembly, history = folded.task.assembly, folded.history
    counts = assembly.count, len(assembly.rows), history.updates
    factor = DAMPING_GROWTH**retries
    version = Version(assembly.layer, assembly.step, preconditioner, *counts, factor)
    first, second = layer.factors
    conditions = first.condition_bound, second.condition_bound
    return Solution(version, retries, _kept(history), conditions)


def _failed(
    task: Task, reason: str, history: LayerHistory, retries: int = 0
) -> Solution:
    step = task.assembly.step
    text = f"Layer {_name(task)!r} at step {step} was not inverted: {reason}"
    return _lost(task, "failed", text, history, retries)


def _size(task: Task) -> int:
    older = 0 if task.history is None else task.history.nbytes
    return 2 * task.assembly.nbytes + older  # rows come in float32, if not wider


def _name(task: Task) -> str:
    return task.spec.layers[task.assembly.layer].name


def _lost(
    task: Task,
    reason: LossReason,
    text: str,
    history: LayerHistory,
    retries: int = 0,
) -> Solution:
    loss = Loss(task.assembly.layer, task.assembly.step, reason, text)
    return Solution(loss, retries, _kept(history))


def _kept(history: LayerHistory) -> LayerHistory | None:
    # Else the float64 rows of a whole batch would wait for it to end.
    return None if history.history == "snapshot" else history


def _held_in(state: SessionState, copies: list[list[Tensor]]) -> SessionState:
    pairs = zip(state.layers, copies, strict=True)
    return SessionState(tuple(layer.with_tensors(copy) for layer, copy in pairs))
