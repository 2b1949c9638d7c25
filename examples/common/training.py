"""One training run, as a stream of what happens in it."""

import math
import os
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from skfac.client import Preconditioner

BATCH_SIZE = 128

Recipe = Callable[[nn.Module], tuple[Optimizer, Preconditioner | None]]
"""Makes what trains a model."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Task:
    """What is trained, with what, and how it is judged.

    Attributes:
        inputs: (train, ...) what the model sees.
        targets: (train, ...) what the loss compares its outputs with.
        val_inputs: (validation, ...) as `inputs`, held out.
        val_targets: (validation, ...) as `targets`, held out.
        build_model: Makes the model, with fresh parameters.
        loss: Mean over the batch, of outputs and targets.
        loss_name: What the loss is called.
        metric: What is also reported of the validation, of outputs and targets.
        metric_name: What the metric is called.
        batch_size: Examples of a step.
        validate_every: Steps between validations; None validates after each epoch.
    """

    inputs: Tensor
    targets: Tensor
    val_inputs: Tensor
    val_targets: Tensor
    build_model: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    loss_name: str
    metric: Callable[[Tensor, Tensor], Tensor]
    metric_name: str
    batch_size: int = BATCH_SIZE
    validate_every: int | None = None

    @property
    def epoch_steps(self) -> int:
        """Full batches in an epoch; the rest of it is left out."""
        return len(self.inputs) // self.batch_size


@dataclass(frozen=True)
class Step:
    """A step that was taken, and the loss of its batch before it."""

    step: int
    seconds: float
    loss: float


@dataclass(frozen=True)
class Validation:
    """How the model does on the held-out digits after a step."""

    step: int
    seconds: float
    loss: float
    metric: float


@dataclass(frozen=True)
class Result:
    """How a run ended; `report` is the preconditioner's, if there was one."""

    steps: int
    seconds: float
    loss: float
    metric: float
    report: dict[str, Any] | None


Event = Step | Validation | Result


def train(
    task: Task,
    recipe: Recipe,
    *,
    epochs: int,
    seed: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Generator[Event, None, None]:
    """Train a model, its learning rate falling linearly to 0.

    Seconds are those of the steps alone: making the model, validating and whatever the
    caller does with an event do not count.

    Args:
        task: What is trained.
        recipe: Makes the optimizer, and perhaps a preconditioner.
        epochs: Passes over the training digits.
        seed: Fixes the initial parameters and the order of the batches.
        clock: Tells the seconds.

    Yields:
        A `Step` after each step, a `Validation` at the start, whenever the task asks
        for it and after the last step, and one `Result` at the end, which comes early
        if the loss is not finite.
    """
    torch.manual_seed(seed)
    model = task.build_model()
    steps = epochs * task.epoch_steps
    optimizer, preconditioner = recipe(model)
    schedule = LambdaLR(optimizer, lambda step: 1 - step / steps)
    validate_every = task.validate_every or task.epoch_steps
    seconds = 0.0
    with preconditioner or nullcontext(), a_core_for_the_engine_of(preconditioner):
        validation = _validate(task, model, 0, seconds)
        yield validation
        for step, batch in enumerate(_batches(task, epochs, seed), start=1):
            start = clock()
            loss = task.loss(model(task.inputs[batch]), task.targets[batch])
            loss.backward()  # type: ignore[no-untyped-call]  # torch has no types here
            if preconditioner is not None:
                preconditioner.step()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            seconds += clock() - start
            yield Step(step, seconds, loss.item())
            diverged = not math.isfinite(loss.item())
            if diverged or step % validate_every == 0 or step == steps:
                validation = _validate(task, model, step, seconds)
                yield validation
            if diverged:
                break
        report = None if preconditioner is None else preconditioner.report()
        yield Result(step, seconds, validation.loss, validation.metric, report)


def usable_cores() -> int:
    """Count the cores that this process may use.

    Returns:
        At least 1.
    """
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def a_core_for_the_engine_of(preconditioner: Preconditioner | None) -> Iterator[None]:
    """Leave a core to an engine in this process.

    All threads of a product wait for the one that shares its core with the engine: on
    two cores steps take a third longer with two threads than with one.

    Yields:
        Nothing.
    """
    threads, cores = torch.get_num_threads(), usable_cores()
    if preconditioner is not None and "embedded" in preconditioner.report()["servers"]:
        torch.set_num_threads(max(1, min(threads, cores - 1)))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _batches(task: Task, epochs: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1000 + seed)
    for _ in range(epochs):
        order = torch.randperm(len(task.inputs), generator=generator)
        yield from torch.split(order, task.batch_size)[: task.epoch_steps]


@torch.no_grad()
def _validate(task: Task, model: nn.Module, step: int, seconds: float) -> Validation:
    outputs = model(task.val_inputs)
    loss = task.loss(outputs, task.val_targets).item()
    metric = task.metric(outputs, task.val_targets).item()
    return Validation(step, seconds, loss, metric)
