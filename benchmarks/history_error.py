"""What a compressed history costs in accuracy, and what it saves in bytes and time.

Prints one JSON object; `docs/history.md` quotes it. One thread, about a minute.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from skfac.curvature.factor import Moment
from skfac.curvature.history import LayerHistory
from skfac.curvature.layer import LayerPreconditioner, precondition_moments
from skfac.curvature.settings import CurvatureSettings

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from common.data import mnist_5k  # noqa: E402  # the examples, put on the path above

Rows = tuple[Tensor, Tensor]

DAMPING = 0.03
DECAY = 0.95
BATCH = 32
UPDATES = 80
WIDTH = 512
RANKS = (16, 32, 64, 128, 256)
TIMED_WIDTH = 1024
TIMED_RANKS = (64, 128, 256)
REPEATS = 15


def synthetic_rows(exponent: float) -> Iterator[Rows]:
    """Yield normal rows whose factors' i-th eigenvalue is `i ** -exponent`, mean 1."""
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, WIDTH + 1, dtype=torch.float64) ** -exponent
    scale = (spectrum / spectrum.mean()).sqrt()
    while True:
        a, d = torch.randn(2, BATCH, WIDTH, generator=generator, dtype=torch.float64)
        yield a * scale, d * scale


def mnist_rows() -> Iterator[Rows]:
    """Yield rows of the hidden layer of a classifier of digits while it is trained."""
    torch.manual_seed(0)
    split = mnist_5k()
    first, hidden, last = (
        nn.Linear(784, WIDTH),
        nn.Linear(WIDTH, WIDTH),
        nn.Linear(WIDTH, 10),
    )
    model = nn.ModuleList([first, hidden, last])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    while True:
        batch = torch.randint(len(split.inputs), (BATCH,))
        inputs = torch.tanh(first(split.inputs[batch].flatten(1)))
        outputs = hidden(inputs)
        outputs.retain_grad()
        loss = cross_entropy(last(torch.tanh(outputs)), split.labels[batch])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no types here
        optimizer.step()
        assert outputs.grad is not None
        activations = torch.cat([inputs.detach(), torch.ones(BATCH, 1)], 1)
        yield activations.double(), BATCH * outputs.grad.double()


def settings(rank: int | None = None) -> CurvatureSettings:
    """Make the settings of every run, but for the rank."""
    return CurvatureSettings(damping=DAMPING, decay=DECAY, rank=rank)


def preconditioner(moments: list[Moment]) -> LayerPreconditioner:
    """Invert both sides in float64."""
    return precondition_moments(
        *moments, damping=DAMPING, split="pi", dtype=torch.float64
    )


def errors(source: Iterator[Rows]) -> dict[str, Any]:
    """Compare compressed histories with the exact one, on a fresh batch's gradient."""
    exact = LayerHistory.empty("ema")
    cut = dict.fromkeys(RANKS, exact)
    for _ in range(UPDATES):
        rows = next(source)
        exact = exact.fold(*rows, settings())
        cut = {r: kept.fold(*rows, settings(r)) for r, kept in cut.items()}
    fresh, newest = next(source), LayerHistory.empty("snapshot").fold(*rows, settings())
    gradient = fresh[1].T @ fresh[0] / BATCH
    whole = [exact.activations[0], exact.derivatives[0]]
    expected = preconditioner(whole).apply(gradient)

    def error(moments: list[Moment]) -> float:
        applied = preconditioner(moments).apply(gradient)
        return round(float((applied - expected).norm() / expected.norm()), 5)

    by_rank = {}
    for rank, kept in cut.items():
        sides = [kept.activations[0], kept.derivatives[0]]
        by_rank[rank] = {
            "compressed": error(sides),
            "best_of_that_rank": error([side.compressed(rank=rank) for side in whole]),
            "trace_not_given_back": error([replace(side, dropped=0) for side in sides]),
            "dropped_share_of_trace": [
                round(side.mean_dropped / side.mean_eigenvalue, 4) for side in sides
            ],
        }
    snapshot = [newest.activations[0], newest.derivatives[0]]
    return {"by_rank": by_rank, "snapshot": error(snapshot)}


def median_ms(action: Callable[[], object]) -> float:
    """Time an action."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return round(1000 * statistics.median(times), 3)


def costs(rank: int | None) -> dict[str, Any]:
    """Measure one update of a square layer whose history is full."""
    torch.manual_seed(0)
    kept = LayerHistory.empty("ema")
    for _ in range(-(-TIMED_WIDTH // BATCH)):
        rows = torch.randn(BATCH, TIMED_WIDTH), torch.randn(BATCH, TIMED_WIDTH)
        kept = kept.fold(*rows, settings(rank))
    layer = kept.precondition(settings(rank), "pi", damping=DAMPING)
    gradient = torch.randn(TIMED_WIDTH, TIMED_WIDTH)
    return {
        "state_bytes": kept.nbytes,
        "wire_bytes": sum(tensor.nbytes for tensor in layer.tensors),
        "fold_ms": median_ms(lambda: kept.fold(*rows, settings(rank))),
        "precondition_ms": median_ms(
            lambda: kept.precondition(settings(rank), "pi", damping=DAMPING)
        ),
        "apply_ms": median_ms(lambda: layer.apply(gradient)),
    }


def main() -> None:
    """Print the errors and costs."""
    torch.set_num_threads(1)
    sources = {
        "synthetic 1/i": synthetic_rows(1.0),
        "synthetic 1/i^2": synthetic_rows(2.0),
        "mnist": mnist_rows(),
    }
    print(
        json.dumps(
            {
                "torch": torch.__version__,
                "damping": DAMPING,
                "decay": DECAY,
                "rows_per_update": BATCH,
                "updates": UPDATES,
                "width": WIDTH,
                "errors": {name: errors(rows) for name, rows in sources.items()},
                "costs_width": TIMED_WIDTH,
                "costs": {
                    str(rank or "dense"): costs(rank) for rank in (*TIMED_RANKS, None)
                },
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    typer.run(main)
