"""Builders of what crosses the wire, with defaults for what a test is not about."""

import random
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor

from skfac.curvature.history import LayerHistory
from skfac.curvature.layer import LayerPreconditioner, precondition_layer
from skfac.curvature.settings import CurvatureSettings
from skfac.service.assembler import Assembly
from skfac.service.config import EngineConfig
from skfac.service.local_engine import LocalEngine
from skfac.service.metrics import Metrics
from skfac.service.scheduler import Task
from skfac.service.subscription import LocalSubscription
from skfac.wire.outcome import Loss, LossReason, Outcome, Version
from skfac.wire.session import LayerSpec, SessionSpec
from skfac.wire.snapshot import LayerRows, Snapshot
from tests.support.dense import normal

PATIENCE_S = 30.0
"""How long a test waits for what should come at once."""


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


def layer_spec(
    name: str = "fc", d_in: int = 3, d_out: int = 2, **changes: Any
) -> LayerSpec:
    return replace(LayerSpec(name, "linear", d_in, d_out, True), **changes)


MIXED = (
    layer_spec("linear", 9, 5),
    layer_spec("grouped", 6, 4, kind="conv2d", groups=3),
    layer_spec("embedding", 11, 7, kind="embedding", bias=False, diagonal=True),
)
"""One layer of each shape that rows can have."""


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
    """Normal rows of one layer; a diagonal one has more activations than rows."""
    declared = spec.layers[layer]
    activations = count + 3 if declared.diagonal else count
    shapes = (activations, declared.d_in), (count, declared.d_out)
    rows = (normal(*declared.block_shape, *s, seed=seed).to(dtype) for s in shapes)
    return LayerRows(layer, *rows)


def snapshot(
    spec: SessionSpec,
    step: int = 0,
    rank: int = 0,
    *,
    layers: Sequence[int] | None = None,
    count: int = 4,
    damping: float = 0.5,
    **settings: Any,
) -> Snapshot:
    """Normal rows of `layers`, by default all, that differ by rank and step.

    The settings' `rank` is called `rank_cap` here.
    """
    settings["rank"] = settings.pop("rank_cap", None)
    indices = range(len(spec.layers)) if layers is None else layers
    seed = 1000 * rank + step
    rows = tuple(layer_rows(spec, i, count=count, seed=seed) for i in indices)
    return Snapshot(rank, step, CurvatureSettings(damping=damping, **settings), rows)


def assembly_of(snapshots: Sequence[Snapshot], layer: int = 0) -> Assembly:
    """What the ranks' snapshots of one step hold of one layer."""
    assembly = Assembly(layer, snapshots[0].step, started_s=0.0)
    for taken in snapshots:
        rows = next(rows for rows in taken.layers if rows.layer == layer)
        assembly.rows[taken.rank] = rows
        assembly.settings[taken.rank] = taken.settings
    return assembly


def task_of(
    spec: SessionSpec,
    step: int = 0,
    layer: int = 0,
    *,
    count: int = 4,
    owner: str = "",
    **settings: Any,
) -> Task:
    """A complete assembly of rank 0's rows, by default of the session "job"."""
    assembly = assembly_of([snapshot(spec, step, count=count, **settings)], layer)
    return Task(owner or spec.job, spec, assembly, queued_s=0.0)


def version(step: int = 0, layer: int = 0, *, count: int = 4) -> Version:
    """A version of a 2 × 3 weight."""
    rows = layer_rows(session_spec(), count=count, seed=step)
    state = random.getstate()  # beartype draws from it, a strategy must not
    found = precondition_layer(
        rows.activations, rows.derivatives, damping=0.5, split="pi"
    )
    random.setstate(state)
    return Version(layer, step, found, count, 1, 1)


def loss(step: int = 0, layer: int = 0, *, reason: LossReason = "failed") -> Loss:
    return Loss(layer, step, reason, f"Step {step} is {reason}.")


class Harness:
    """An engine and the clock that it lives by."""

    def __init__(self, **config: float) -> None:
        self.clock = FakeClock()
        self.metrics = Metrics()
        checked = EngineConfig.model_validate(config)
        self.engine = LocalEngine(checked, self.metrics, self.clock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.close()

    def open(self, spec: SessionSpec, rank: int = 0) -> str:
        return self.engine.open_session(spec, rank).session_id

    def take(self, subscription: LocalSubscription, count: int) -> list[Outcome]:
        """Wait for `count` outcomes, and get no more."""
        outcomes: list[Outcome] = []
        while len(outcomes) < count:
            taken = subscription.take(PATIENCE_S)
            assert taken, f"{len(outcomes)} of {count} outcomes came"
            outcomes += taken
        assert len(outcomes) == count
        return outcomes

    def solve(self, session_id: str, *sent: Snapshot) -> list[Outcome]:
        """Push all that versions lack, and wait for one outcome of each."""
        room = self.engine._sessions.find(session_id).spec.versions_in_flight + 1
        steps = sorted({one.step for one in sent})
        outcomes: list[Outcome] = []
        with closing(self.engine.subscribe(session_id, {})) as subscription:
            subscription.take(0.0)
            # An engine keeps no more steps for whoever is slow to take them.
            for some in (steps[i : i + room] for i in range(0, len(steps), room)):
                now = [one for one in sent if one.step in some]
                for one in now:
                    assert self.engine.submit(session_id, one)
                versions = {(r.layer, one.step) for one in now for r in one.layers}
                outcomes += self.take(subscription, len(versions))
        return outcomes

    def advance(self, seconds: float) -> None:
        """Move the clock and wait until the engine's thread has acted on it."""
        self.clock.now_s += seconds
        probe = self.open(session_spec(job="probe", instance=str(self.clock.now_s)))
        self.solve(probe, snapshot(session_spec()))
        self.engine.close_session(probe, 0)

    def jobs(self) -> list[str]:
        return [session.job for session in self.engine.status().sessions]


def keys(parts: Sequence[Outcome | Assembly]) -> list[tuple[int, int]]:
    """Layer and step of each."""
    return [(part.layer, part.step) for part in parts]


def folded(
    spec: SessionSpec, sent: Sequence[Snapshot], layer: int = 0
) -> tuple[LayerHistory, LayerPreconditioner]:
    """What a layer's history and newest version must be, the obvious way.

    One snapshot is one update; those without rows are none.
    """
    history = LayerHistory.empty(spec.history, diagonal=spec.layers[layer].diagonal)
    for one in sent:
        rows = next(rows for rows in one.layers if rows.layer == layer)
        if rows.count:
            history = history.fold(rows.activations, rows.derivatives, one.settings)
            settings = one.settings
    found = history.precondition(settings, spec.damping_split, damping=settings.damping)
    return history, found


def assert_same_preconditioner(
    actual: LayerPreconditioner, expected: LayerPreconditioner
) -> None:
    """The same forms, damping and bits on both sides."""
    for mine, theirs in (
        (actual.activations, expected.activations),
        (actual.derivatives, expected.derivatives),
    ):
        assert type(mine) is type(theirs)
        assert mine.damping == theirs.damping
        assert same_bits(mine.tensor, theirs.tensor)


def assert_same_history(actual: LayerHistory, expected: LayerHistory) -> None:
    """The same numbers and the same bits of every moment."""
    for field in ("history", "diagonal", "updates", "dtype"):
        assert getattr(actual, field) == getattr(expected, field)
    for side in ("activations", "derivatives"):
        pairs = zip(getattr(actual, side), getattr(expected, side), strict=True)
        for mine, theirs in pairs:
            assert (mine.form, mine.weight) == (theirs.form, theirs.weight)
            assert mine.dropped == theirs.dropped
            assert same_bits(mine.tensor, theirs.tensor)
