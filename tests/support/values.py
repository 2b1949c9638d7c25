"""Builders of what crosses the wire, with defaults for what a test is not about."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from skfac.curvature.layer import precondition_layer
from skfac.service.assembler import Assembly
from skfac.service.scheduler import Task
from skfac.wire.outcome import Loss, LossReason, Version
from skfac.wire.session import LayerSpec, SessionSpec
from skfac.wire.snapshot import LayerRows, Snapshot
from tests.support.dense import normal


class FakeClock:
    """Stands still until a test moves it."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def same_bits(actual: Tensor, expected: Tensor) -> bool:
    """Whether dtype, shape and every bit are the same; NaN equals itself."""
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        return False
    both = (t.contiguous().reshape(-1).view(torch.uint8) for t in (actual, expected))
    return torch.equal(*both)


def layer_spec(name: str = "fc", d_in: int = 3, d_out: int = 2) -> LayerSpec:
    return LayerSpec(name, "linear", d_in, d_out, True)


def session_spec(*layers: LayerSpec, **changes: Any) -> SessionSpec:
    """A session of one rank that solves each version at once."""
    spec = SessionSpec(
        job="job",
        instance="run 1",
        world_size=1,
        layers=layers or (layer_spec(),),
        damping_split="pi",
        history="snapshot",
        update_every=1,
        lag=0,
        on_late="keep",
    )
    return replace(spec, **changes)


def layer_rows(
    spec: SessionSpec,
    layer: int = 0,
    *,
    count: int = 4,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> LayerRows:
    """Normal rows of one layer."""
    dims = spec.layers[layer].d_in, spec.layers[layer].d_out
    activations, derivatives = (normal(count, d, seed=seed).to(dtype) for d in dims)
    return LayerRows(layer, activations, derivatives)


def snapshot(
    spec: SessionSpec,
    step: int = 0,
    rank: int = 0,
    *,
    layers: Sequence[int] | None = None,
    count: int = 4,
    damping: float = 0.5,
) -> Snapshot:
    """Normal rows of `layers`, by default all, that differ by rank and step."""
    indices = range(len(spec.layers)) if layers is None else layers
    seed = 1000 * rank + step
    rows = tuple(layer_rows(spec, i, count=count, seed=seed) for i in indices)
    return Snapshot(rank, step, damping, rows)


def assembly_of(snapshots: Sequence[Snapshot], layer: int = 0) -> Assembly:
    """What the ranks' snapshots of one step hold of one layer."""
    assembly = Assembly(layer, snapshots[0].step, started_s=0.0)
    for taken in snapshots:
        rows = next(rows for rows in taken.layers if rows.layer == layer)
        assembly.rows[taken.rank] = rows
        assembly.damping[taken.rank] = taken.damping
    return assembly


def task_of(
    spec: SessionSpec, step: int = 0, layer: int = 0, *, count: int = 4, owner: str = ""
) -> Task:
    """A complete assembly of rank 0's rows, by default of the session "job"."""
    assembly = assembly_of([snapshot(spec, step, count=count)], layer)
    return Task(owner or spec.job, spec, assembly, queued_s=0.0)


def version(step: int = 0, layer: int = 0, *, count: int = 4) -> Version:
    """A version of a 2 × 3 weight."""
    rows = layer_rows(session_spec(), count=count, seed=step)
    found = precondition_layer(
        rows.activations, rows.derivatives, damping=0.5, split="pi"
    )
    return Version(layer, step, found, count, 1)


def loss(step: int = 0, layer: int = 0, *, reason: LossReason = "failed") -> Loss:
    return Loss(layer, step, reason, f"Step {step} is {reason}.")
