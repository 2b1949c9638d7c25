"""Tasks that need whatever any task may need of a device.

A GPU loads its libraries, and each kernel, when they are first used: that takes seconds
and waits for all that the GPU does, also for the trainer that shares it.
"""

from collections.abc import Iterator
from typing import get_args

import torch

from skfac.curvature.settings import CurvatureSettings, History
from skfac.service.assembler import Assembly
from skfac.service.scheduler import Task
from skfac.wire.session import LayerSpec, SessionSpec
from skfac.wire.snapshot import LayerRows

_DIM = 4
_KINDS = (
    LayerSpec("linear", "linear", _DIM, _DIM, False),
    LayerSpec("groups", "conv1d", _DIM, _DIM, False, groups=2),
    LayerSpec("embedding", "embedding", _DIM, _DIM, False, diagonal=True),
)
_ROWS = (2, 8)  # fewer than columns, and more


def warm_up_tasks() -> list[Task]:
    """Make small tasks of all histories, forms and dtypes.

    Returns:
        Tasks with versions; those with a history have an update before the one that is
        solved, and those of few rows are compressed.
    """
    return [
        _task(history, layer, rows, dtype)
        for history in get_args(History)
        for layer in range(len(_KINDS))
        for rows in _ROWS
        for dtype in (torch.float32, torch.float64)
    ]


def _task(history: History, layer: int, rows: int, dtype: torch.dtype) -> Task:
    spec = SessionSpec(
        job="warm-up",
        instance="",
        world_size=1,
        layers=_KINDS,
        damping_split="pi",
        history=history,
        update_every=1,
        lag=1,
        on_late="keep",
    )
    *earlier, newest = _assemblies(layer, rows, dtype, 1 + (history != "snapshot"))
    return Task("warm-up", spec, newest, 0.0, tuple(earlier))


def _assemblies(
    layer: int, rows: int, dtype: torch.dtype, count: int
) -> Iterator[Assembly]:
    kind = _KINDS[layer]
    groups = (kind.groups,) if kind.groups > 1 else ()
    few = rows < _DIM
    settings = CurvatureSettings(
        damping=1.0, rank=3 if few else None, energy=0.9 if few else 1.0
    )
    for step in range(count):
        sides = torch.linspace(-1, 1, 2 * kind.groups * rows * _DIM, dtype=dtype)
        activations, derivatives = sides.view(2, *groups, rows, _DIM)
        drawn = LayerRows(layer, activations, derivatives)
        yield Assembly(layer, step, 0.0, {0: drawn}, {0: settings})
