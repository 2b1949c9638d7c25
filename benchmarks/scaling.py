"""Measures how the service scales here, and calculates how it would elsewhere.

Measured on this machine: the operations a second of the solver on one core; one engine
with 1 to 64 simulated ranks of one job (`scale.py`, which must be solved together); a
step of a trainer whose layers are spread over 1, 2 and 4 servers on loopback and over
1 and 2 Ray actors, with `lag=0`, so that nothing overlaps. Calculated
(`speed/costs.py`): what ResNet-50, GPT-2 medium and LLaMA-7B need at 8, 64 and 1,024
ranks. `make scaling` writes the record, the tables of docs/scaling.md and its plot.
"""

import json
import logging
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.scale import SETTINGS, Load, _spec, measure, solver_seconds
from benchmarks.speed import scaling_report
from benchmarks.speed.costs import Job, Server, costs, solve_flops
from benchmarks.speed.shapes import ARCHITECTURES, gpt2_medium, layers_of, llama_7b
from skfac.client import Preconditioner

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "scaling.json"
RANKS = (8, 64, 1024)
MODELS = {
    "ResNet-50": (ARCHITECTURES["resnet50"], 0.2),
    "GPT-2 medium": (gpt2_medium, 0.5),
    "LLaMA-7B": (llama_7b, 2.0),
}
"""Layers, and the seconds of a training step that are assumed."""

_START_S = 120.0
_SERVER = "import typer; from skfac.service.main import serve; typer.run(serve)"


def solver_flops(rows: int, *, short: bool) -> float:
    """Measure the bare solver on GPT-2's layers, cut to the rank cap of `scale.py`.

    Returns:
        Operations a second in float64, by the formula of `costs`.
    """
    layers = layers_of("gpt2", 2 if short else 12)
    load = Load(_spec(layers, "snapshot"), "ranks", 4, rows, 1)
    job = Job(
        layers=layers,
        ranks=4,
        rows=rows,
        cap=SETTINGS.rank,
        update_every=1,
        step_s=1.0,
    )
    solver_seconds(load)  # warm
    spent_s = statistics.median(solver_seconds(load) for _ in range(1 if short else 5))
    return sum(solve_flops(job, layer) for layer in layers) / spent_s


@contextmanager
def servers(count: int) -> Iterator[list[str]]:
    """Run `skfac serve` several times on loopback.

    Yields:
        The addresses.
    """
    with ExitStack() as stack:
        processes = [stack.enter_context(_server()) for _ in range(count)]
        addresses = []
        for process in processes:
            assert process.stdout is not None
            line = process.stdout.readline()  # "Serving on ADDRESS"
            addresses.append(line.split()[-1])
        yield addresses


@contextmanager
def _server() -> Iterator["subprocess.Popen[str]"]:
    options = ["--address", "127.0.0.1:0", "--metrics-address", ""]
    process = subprocess.Popen(  # noqa: S603  # our own command
        [sys.executable, "-c", _SERVER, *options],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        yield process
    finally:
        process.terminate()
        process.communicate()


@contextmanager
def actors(count: int) -> Iterator[str]:
    """Run engines in the actors of a local Ray.

    Yields:
        Their target.
    """
    import ray

    from skfac.service.ray import start_pool

    ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        with start_pool(count, num_cpus=0) as pool:
            yield pool.target
    finally:
        ray.shutdown()


def step_seconds(target: Any, *, width: int, steps: int) -> float:  # noqa: ANN401
    """Time `Preconditioner.step` with nothing overlapped, eight layers wide.

    Returns:
        Median seconds of a step: capture, push, solve, return and apply.
    """
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(8)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    inputs, times = torch.randn(64, width), []
    with Preconditioner(
        model, optimizer, target=target, update_every=1, lag=0, wait_s=_START_S
    ) as preconditioner:
        for _ in range(steps + 2):
            model(inputs).square().mean().backward()
            began_s = time.perf_counter()
            preconditioner.step()
            times.append(time.perf_counter() - began_s)
            optimizer.zero_grad()
    return statistics.median(times[2:])


def spread(*, short: bool) -> list[dict[str, Any]]:
    """Measure a trainer whose layers are on several servers, or in Ray's actors.

    Returns:
        A record for each: `what`, `count`, `step_s`.
    """
    size = {"width": 64, "steps": 3} if short else {"width": 1024, "steps": 10}
    found: list[dict[str, Any]] = []
    for count in (1, 2) if short else (1, 2, 4):
        with servers(count) as addresses:
            spent_s = step_seconds(addresses, **size)
        found.append({"what": "servers", "count": count, "step_s": round(spent_s, 4)})
        print(json.dumps(found[-1]), flush=True)
    for count in () if short else (1, 2):
        with actors(count) as target:
            spent_s = step_seconds(target, **size)
        found.append({"what": "actors", "count": count, "step_s": round(spent_s, 4)})
        print(json.dumps(found[-1]), flush=True)
    return found


def measured_here(rows: int, *, short: bool) -> dict[str, Any]:
    """Measure all that is measured.

    Returns:
        The part `measured` of the record.
    """
    torch.set_num_threads(1)
    load_before = round(os.getloadavg()[0], 1)
    flops = solver_flops(rows, short=short)
    layers = layers_of("gpt2", 2 if short else 12)
    load = Load(_spec(layers, "snapshot"), "ranks", 1, 8, 2)
    counts = [1, 2] if short else [1, 4, 16, 64]
    return {
        "load_average_before": load_before,
        "cores": os.cpu_count(),
        "solver_gflops": round(flops / 1e9, 2),
        "one_engine": measure(load, counts, "embedded"),
        "spread": spread(short=short),
    }


def calculated(server: Server, rows: int, every: int) -> list[dict[str, Any]]:
    """Calculate every model at every number of ranks, with and without a cap.

    Returns:
        A record for each: what it is for, and the figures of `costs`.
    """
    found = []
    for model, (layers, step_s) in MODELS.items():
        for ranks in RANKS:
            for cap in (None, 256):
                job = Job(
                    layers=layers(),
                    ranks=ranks,
                    rows=rows,
                    cap=cap,
                    update_every=every,
                    step_s=step_s,
                )
                what = {"model": model, "ranks": ranks, "cap": cap, "step_s": step_s}
                found.append({**what, **costs(job, server)})
    return found


def main(
    rows: Annotated[
        int, typer.Option(min=1, help="Rows a rank sends of a layer.")
    ] = 32,
    every: Annotated[int, typer.Option(min=1, help="`update_every`.")] = 10,
    link_gb_per_s: Annotated[
        float, typer.Option(help="Of a server's link, each way; assumed.")
    ] = 1.2,
    gpu_tflops: Annotated[
        float, typer.Option(help="Of a GPU in float64, over a solve of many rows.")
    ] = 12.0,
    gpu_layer_ms: Annotated[
        float, typer.Option(help="Of a GPU for a layer, however few rows it has.")
    ] = 0.3,
    calculate: Annotated[
        bool,
        typer.Option("--calculate", help="Measure nothing: take it from the record."),
    ] = False,
    short: Annotated[
        bool, typer.Option("--short", help="Only see that it runs; keep nothing.")
    ] = False,
) -> None:
    """Measure, calculate, and print one JSON object; minutes on two idle cores.

    What a GPU does is by default what an H100 did: results/gpu.json.
    """
    measured = (
        json.loads(RESULTS.read_text())["measured"]
        if calculate
        else measured_here(rows, short=short)
    )
    link = link_gb_per_s * 1e9
    core = Server(measured["solver_gflops"] * 1e9, link)
    gpu = Server(gpu_tflops * 1e12, link, gpu_layer_ms / 1e3)
    found = {
        "measured": measured,
        "assumed": {
            "rows": rows,
            "update_every": every,
            "link_gb_per_s": link_gb_per_s,
            "gpu_tflops": gpu_tflops,
            "gpu_layer_ms": gpu_layer_ms,
        },
        "core": calculated(core, rows, every),
        "gpu": calculated(gpu, rows, every),
    }
    if not short:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
        scaling_report.write(found, ROOT / "docs")
    print(json.dumps(found))


if __name__ == "__main__":
    typer.run(main)
