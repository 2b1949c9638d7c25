"""Trains each architecture in each way a trainer can, and says what came of it."""

import functools
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from skfac.client import PassThroughWarning, Preconditioner
from skfac.wire.snapshot import LayerRows
from tests.support.architectures import ARCHITECTURES, Architecture, Batch, loss_of

STEPS = 20
KL_CLIP = 1e-3  # batches as small as these say little about the next ones
UPDATE_EVERY = 2
MICRO_BATCHES = 2
FALLS_TO = 0.7  # of the loss before; all models reach it in all modes
PRECONDITIONED_STEP = 1  # the first that has versions
LOGGERS = ("skfac", "transformers")
FULLY_CONNECTED = ("Linear", "Conv1D")

Backward = Callable[[nn.Module, Batch], None]


@dataclass(frozen=True)
class Mode:
    """A way to train.

    Attributes:
        backward: Adds the gradients of a batch.
        prepare: Returns the model that is called; it may be changed.
        detail: What to add to the table's cell of an architecture.
        applies: Settings of `apply` to try.
        micro_batches: Backward passes in a step.
    """

    backward: Backward
    prepare: Callable[[Architecture, nn.Module], nn.Module]
    detail: Callable[[Architecture], str] = lambda architecture: ""
    applies: tuple[str, ...] = ("gradient", "row")
    micro_batches: int = 1


@dataclass(frozen=True, eq=False)
class Run:
    """What happened in some steps.

    Attributes:
        before: Loss of the batch of step 0 before all steps.
        after: Loss of the same batch after them.
        caught: All warnings.
        messages: What was logged from level WARNING on.
        report: Of the preconditioner, after the last step.
        rows: Of step 0.
        gradients: Preconditioned, of `PRECONDITIONED_STEP`, by parameter.
        dtypes: Of all parameters.
        fully_connected: Names of the tracked layers that can be in row space.
    """

    before: float
    after: float
    caught: list[warnings.WarningMessage]
    messages: list[str]
    report: dict[str, Any]
    rows: tuple[LayerRows, ...]
    gradients: dict[str, Tensor]
    dtypes: dict[str, torch.dtype]
    fully_connected: set[str]

    @property
    def tracked(self) -> int:
        """Layers that are preconditioned."""
        return len(self.report["layers"])

    @property
    def passed(self) -> dict[str, int]:
        """Modules by type that the warning says to pass through."""
        if not self.caught:
            return {}
        (listed,) = re.findall(r"\((.*)\)\. Name", str(self.caught[0].message))
        counts = {}
        for part in listed.split("; "):
            kind, names = part.split(": ")
            more = re.search(r" and (\d+) more$", names)
            counts[kind] = names.count(", ") + 1 + (int(more[1]) if more else 0)
        return counts


def _backward(model: nn.Module, batch: Batch) -> None:
    loss_of(model, batch).backward()


def _autocast_backward(model: nn.Module, batch: Batch) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model, batch)
    loss.backward()


def _accumulate(model: nn.Module, batch: Batch) -> None:
    for part in batch.split(MICRO_BATCHES):
        (loss_of(model, part) / MICRO_BATCHES).backward()


def _as_it_is(architecture: Architecture, model: nn.Module) -> nn.Module:
    return model


def _checkpointed(architecture: Architecture, model: nn.Module) -> nn.Module:
    architecture.checkpoint(model)
    return model


def _compiled(architecture: Architecture, model: nn.Module) -> nn.Module:
    torch.compiler.reset()
    compiled = torch.compile(model, backend=architecture.backend)
    assert isinstance(compiled, nn.Module)
    return compiled


MODES: dict[str, Mode] = {
    "eager": Mode(_backward, _as_it_is),
    "bf16 autocast": Mode(_autocast_backward, _as_it_is),
    "accumulation": Mode(_accumulate, _as_it_is, micro_batches=MICRO_BATCHES),
    "checkpointing": Mode(
        _backward, _checkpointed, detail=lambda architecture: architecture.checkpointing
    ),
    # What is compiled is the same for both, and compiling it twice takes long.
    "torch.compile": Mode(
        _backward,
        _compiled,
        detail=lambda architecture: architecture.backend,
        applies=("row",),
    ),
}
"""By the name in the table."""

CELLS = [(name, mode) for name in ARCHITECTURES for mode in MODES]


@functools.cache
def run(name: str, mode: str, apply: str) -> Run:
    """Train an architecture in a mode; the same values give the same object."""
    architecture, way = ARCHITECTURES[name], MODES[mode]
    model = architecture.model()
    with warnings.catch_warnings(action="ignore"):  # of torch's compiler, on import
        called = way.prepare(architecture, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    before = _loss(model, architecture)
    with (
        warnings.catch_warnings(record=True) as caught,
        _logged() as messages,
    ):
        warnings.simplefilter("always")
        with Preconditioner(
            model,
            optimizer,
            lag=1,
            update_every=UPDATE_EVERY,
            on_late="wait",
            apply=apply,
            damping_split="pi",
            kl_clip=KL_CLIP,
            accumulation_steps=way.micro_batches,
        ) as preconditioner:
            pushed = record_rows(preconditioner)
            for step in range(STEPS):
                way.backward(called, architecture.batch(step))
                preconditioner.step()
                if step == PRECONDITIONED_STEP:
                    gradients = gradients_of(model)
                optimizer.step()
                optimizer.zero_grad()
            report = preconditioner.report()
    return Run(
        before=before,
        after=_loss(model, architecture),
        caught=caught,
        messages=messages,
        report=report,
        rows=pushed[0],
        gradients=gradients,
        dtypes={name: p.dtype for name, p in model.named_parameters()},
        fully_connected=_fully_connected(model, report["layers"]),
    )


def problems(name: str, apply: str, run: Run) -> list[str]:
    """Compare a run with what is expected of its architecture.

    Returns:
        What is wrong, in words.
    """
    architecture, layers = ARCHITECTURES[name], run.report["layers"]
    newest = STEPS - UPDATE_EVERY
    updates = len(range(0, STEPS, UPDATE_EVERY))
    counts = {k: v for k, v in run.report["versions"].items() if k != "waits"}
    in_rows = {layer for layer, found in layers.items() if found["apply"] == "row"}
    declared = [PassThroughWarning] if architecture.passed else []
    checks = {
        f"the loss went from {run.before:.2f} to {run.after:.2f}": run.after
        < FALLS_TO * run.before,
        f"{run.tracked} layers are preconditioned": run.tracked == architecture.tracked,
        f"{run.passed} pass through": run.passed == architecture.passed,
        f"warnings: {[str(w.message) for w in run.caught]}": declared
        == [w.category for w in run.caught],
        f"log: {run.messages}": not run.messages,
        f"versions: {counts}": counts == {"solved": run.tracked * updates},
        f"not all layers use version {newest}": {newest}
        == {layer["version"] for layer in layers.values()},
        f"{run.report['not_finite']} gradients are not finite": not run.report[
            "not_finite"
        ],
        f"in row space: {in_rows}": in_rows
        == (run.fully_connected if apply == "row" else set()),
    }
    return [problem for problem, fine in checks.items() if not fine]


def record_rows(preconditioner: Preconditioner) -> list[tuple[LayerRows, ...]]:
    """Note the rows of every snapshot that is sent from now on.

    Returns:
        A list that grows.
    """
    transport = preconditioner._servers
    push, pushed = transport.push, []

    def record(snapshot: Any) -> None:
        pushed.append(snapshot.wait().layers)
        push(snapshot)

    transport.push = record  # type: ignore[method-assign]
    return pushed


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all gradients, by parameter."""
    found = {name: p.grad for name, p in model.named_parameters()}
    return {name: g.clone() for name, g in found.items() if g is not None}


def _fully_connected(model: nn.Module, names: dict[str, Any]) -> set[str]:
    kinds = {name: type(model.get_submodule(name)).__name__ for name in names}
    return {name for name, kind in kinds.items() if kind in FULLY_CONNECTED}


@torch.no_grad()
def _loss(model: nn.Module, architecture: Architecture) -> float:
    return loss_of(model, architecture.batch(0)).item()


@contextmanager
def _logged() -> Iterator[list[str]]:
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    for name in LOGGERS:
        logging.getLogger(name).addHandler(handler)
    try:
        yield messages
    finally:
        for name in LOGGERS:
            logging.getLogger(name).removeHandler(handler)
