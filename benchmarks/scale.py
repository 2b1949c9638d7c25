"""Pushes the layers of real models from 1 to 64 ranks, and waits for all versions.

One engine solves on one core: in this process, or with `--transport grpc` in a server,
whose time and memory are measured then. In mode `sessions` every rank is a job of its
own; in mode `ranks` all are of one job, and the rows of a layer are joined. For
each number of ranks, the largest first:

- `seconds` from the first push to the last version, and `cpu_seconds`, which others on
  the machine disturb less. `queue_ratio` is of these to those of the bare solver on the
  same tasks, without a past: what assembling, queueing and publishing make of it.
  `exponent` is the slope of log CPU seconds over log ranks: 1 if queueing grows
  linearly (with `ranks` the products themselves grow faster).
- `lost`: versions that were pushed and not published exactly once.
- `memory_ratio`: the peak of resident memory above what the process had before there
  were rows, over the bytes that must be there: all rows before the first is solved, and
  at the end the inverses that are kept for subscribers and the histories, whichever is
  more. It is that of the most ranks. The process takes memory from one arena, as
  `skfac serve` does.
"""

import json
import math
import statistics
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.speed.memory import peak_bytes, reset_peak, resident_bytes
from benchmarks.speed.places import Place, place
from benchmarks.speed.shapes import ARCHITECTURES, layers_of
from skfac.curvature.settings import CurvatureSettings
from skfac.service.assembler import Assembly
from skfac.service.scheduler import Task
from skfac.service.solver import Solver
from skfac.wire.allocator import share_one_arena
from skfac.wire.outcome import Version
from skfac.wire.session import SessionSpec
from skfac.wire.snapshot import LayerRows, Snapshot

MODES = ("sessions", "ranks")
SETTINGS = CurvatureSettings(damping=0.1, rank=64, window=2)


@dataclass(frozen=True)
class Load:
    """What is pushed.

    Attributes:
        spec: The session of a job; its name and world are those of one rank.
        mode: One of `MODES`.
        ranks: Ranks in all.
        rows: Rows of each layer that a rank has.
        steps: Steps that are pushed.
    """

    spec: SessionSpec
    mode: str
    ranks: int
    rows: int
    steps: int

    def sessions(self) -> list[SessionSpec]:
        """The sessions: one with all ranks, or one for each."""
        if self.mode == "ranks":
            return [replace(self.spec, world_size=self.ranks)]
        return [replace(self.spec, job=str(i)) for i in range(self.ranks)]

    def snapshots(self) -> Iterator[tuple[int, Snapshot]]:
        """Draw what each session gets, step by step."""
        for step in range(self.steps):
            for rank in range(self.ranks):
                rows = tuple(
                    LayerRows(
                        index,
                        torch.randn(self.rows, layer.d_in),
                        torch.randn(self.rows, layer.d_out),
                    )
                    for index, layer in enumerate(self.spec.layers)
                )
                of_one_job = self.mode == "ranks"
                snapshot = Snapshot(rank if of_one_job else 0, step, SETTINGS, rows)
                yield (0 if of_one_job else rank), snapshot


def run(engine: Place, load: Load) -> dict[str, float]:
    """Push a load and wait for its versions.

    Returns:
        Figures by name.
    """
    specs = load.sessions()
    names = [
        engine.open(spec, rank) for spec in specs for rank in range(spec.world_size)
    ][:: specs[0].world_size]
    before = resident_bytes(engine.pid)
    reset_peak(engine.pid)
    waiting = deque(load.snapshots())
    rows_bytes = sum(t.nbytes for _, one in waiting for t in one.tensors)
    began_s, cpu_began_s = time.perf_counter(), engine.cpu_s()
    while waiting:
        index, snapshot = waiting.popleft()
        engine.submit(names[index], [snapshot])
    del snapshot
    versions, kept_bytes = Counter[tuple[int, int, int]](), 0
    for index, name in enumerate(names):
        for version in _versions(engine, name, load.steps * len(load.spec.layers)):
            versions[index, version.layer, version.step] += 1
            kept_bytes += sum(t.nbytes for t in version.preconditioner.tensors)
    seconds = time.perf_counter() - began_s
    cpu_seconds = engine.cpu_s() - cpu_began_s
    above_bytes = peak_bytes(engine.pid) - before
    kept_bytes += engine.history_bytes()
    for spec, name in zip(specs, names, strict=True):
        for rank in range(spec.world_size):
            engine.leave(name, rank)
    pushed = len(names) * load.steps * len(load.spec.layers)
    return {
        "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu_seconds, 3),
        "lost": pushed - sum(count == 1 for count in versions.values()),
        "live_mib": round(max(rows_bytes, kept_bytes) / 2**20, 1),
        "peak_mib": round(above_bytes / 2**20, 1),
        "memory_ratio": round(above_bytes / max(rows_bytes, kept_bytes), 3),
    }


def _versions(engine: Place, name: str, count: int) -> Iterator[Version]:
    with closing(engine.outcomes(name)) as outcomes:
        for outcome in islice(outcomes, count):
            if isinstance(outcome, Version):
                yield outcome


def solver_seconds(load: Load) -> float:
    """Time the bare solver on the tasks of one step.

    Returns:
        CPU seconds for all steps.
    """
    solver = Solver("cpu")
    by_session: dict[int, list[Snapshot]] = {}
    for index, snapshot in replace(load, steps=1).snapshots():
        by_session.setdefault(index, []).append(snapshot)
    spent_s = 0.0
    for snapshots in by_session.values():
        for layer in range(len(load.spec.layers)):
            assembly = Assembly(layer, 0, 0.0)
            for one in snapshots:
                assembly.rows[one.rank] = one.layers[layer]
                assembly.settings[one.rank] = one.settings
            task = Task("", load.spec, assembly, 0.0)
            began_s = time.process_time()
            solver.solve([task])
            spent_s += time.process_time() - began_s
    return spent_s * load.steps


def measure(load: Load, counts: list[int], transport: str) -> dict[str, Any]:
    """Run one load with each number of ranks.

    Returns:
        Figures by name; lists are in the order of `ranks`.
    """
    found: list[dict[str, float]] = []
    for ranks in sorted(counts, reverse=True):
        one = replace(load, ranks=ranks)
        with place(transport, max(counts)) as engine:
            run(engine, replace(load, ranks=1, steps=1))  # warm
            figures = run(engine, one)
        bare_s = solver_seconds(one)
        queue_ratio = round(figures["cpu_seconds"] / bare_s, 3)
        found.insert(0, {"ranks": ranks, **figures, "queue_ratio": queue_ratio})
        print(json.dumps(found[0]), flush=True)
    logs = [[math.log(one[name]) for one in found] for name in ("ranks", "cpu_seconds")]
    several = len(found) > 1
    return {
        "mode": load.mode,
        "transport": transport,
        "layers": len(load.spec.layers),
        "history": load.spec.history,
        "rows": load.rows,
        "steps": load.steps,
        "ranks": [one["ranks"] for one in found],
        "seconds": [one["seconds"] for one in found],
        "cpu_seconds": [one["cpu_seconds"] for one in found],
        "queue_ratio": [one["queue_ratio"] for one in found],
        "exponent": round(statistics.linear_regression(*logs).slope, 3)
        if several
        else 1,
        "lost": sum(one["lost"] for one in found),
        "memory_ratio": found[-1]["memory_ratio"],
    }


def draw(results: list[dict[str, Any]], plot: Path) -> None:
    """Draw seconds and their ratio to the bare solver's against the ranks."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(9, 3.5), layout="constrained"
    )
    for one in results:
        label = f"{one['model']}, {one['mode']}"
        left.plot(one["ranks"], one["seconds"], "o-", label=label)
        right.plot(one["ranks"], one["queue_ratio"], "o-", label=label)
    left.set(xscale="log", yscale="log", xlabel="ranks", ylabel="s to all versions")
    right.set(
        xscale="log", xlabel="ranks", ylabel="over the bare solver", ylim=(0, None)
    )
    for axes in (left, right):
        axes.set_xticks(results[0]["ranks"], map(str, results[0]["ranks"]))
        axes.minorticks_off()
        axes.legend()
    figure.savefig(plot, dpi=120)


def main(
    models: Annotated[
        str, typer.Option(help=f"Of {', '.join(ARCHITECTURES)}.")
    ] = ",".join(ARCHITECTURES),
    modes: Annotated[str, typer.Option(help=f"Of {', '.join(MODES)}.")] = ",".join(
        MODES
    ),
    ranks: Annotated[str, typer.Option(help="Numbers of ranks.")] = "1,4,16,64",
    layers: Annotated[
        int, typer.Option(min=0, help="Layers of a model; 0 for all it has.")
    ] = 0,
    rows: Annotated[int, typer.Option(min=1, help="Rows of a rank.")] = 8,
    steps: Annotated[int, typer.Option(min=1, max=3, help="Steps pushed.")] = 2,
    history: Annotated[str, typer.Option(help="Of the sessions.")] = "snapshot",
    transport: Annotated[
        str, typer.Option(help="embedded, or grpc: a server in another process.")
    ] = "embedded",
    short: Annotated[bool, typer.Option(help="Few ranks and layers.")] = False,
    plot: Annotated[Path | None, typer.Option(help="PNG of all results.")] = None,
) -> None:
    """Measure each model in each mode, and print one JSON object of all."""
    share_one_arena()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    counts = [1, 2] if short else [int(one) for one in ranks.split(",")]
    results = []
    for model in models.split(","):
        spec = _spec(layers_of(model, 6 if short else layers), history)
        for mode in modes.split(","):
            load = Load(spec, mode, 1, rows, steps)
            results.append({"model": model, **measure(load, counts, transport)})
            print(json.dumps(results[-1]), flush=True)
    if plot:
        draw(results, plot)
    worst = {
        "exponent": max(one["exponent"] for one in results if one["mode"] == "sessions")
        if "sessions" in modes
        else None,
        "queue_ratio": max(ratio for one in results for ratio in one["queue_ratio"]),
        "lost": sum(one["lost"] for one in results),
        "memory_ratio": max(one["memory_ratio"] for one in results),
    }
    print(json.dumps({**worst, "results": results}))


def _spec(layers: tuple[Any, ...], history: str) -> SessionSpec:
    return SessionSpec(
        job="scale",
        instance="",
        world_size=1,
        layers=layers,
        damping_split="pi",
        history=history,  # type: ignore[arg-type]  # the session checks it
        update_every=1,
        lag=1,
        on_late="wait",
    )


if __name__ == "__main__":
    typer.run(main)
