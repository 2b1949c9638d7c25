"""Runs every benchmark of speed, keeps the figures and draws them.

`make bench` is this. Each benchmark is a script of its own that prints one JSON object
on its last line; what is here is only which ones, with which options.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.speed.plots import draw_steps

HERE = Path(__file__).parent
IMAGES = HERE.parent / "docs" / "images"
SCRIPTS = ("step", "solver", "transport", "scale")


def _options(**values: object) -> list[str]:
    pairs = ((f"--{name.replace('_', '-')}", str(v)) for name, v in values.items())
    return [part for pair in pairs for part in pair]


def jobs_on_gpu() -> list[tuple[str, list[str]]]:
    """List what is run with `--device cuda`; names of scripts with their options."""
    # A step takes milliseconds there, less than the copies to the engine and back.
    common = _options(device="cuda", lag=10, rounds=3)
    small = _options(model="transformer", width=768, batch=32, against="adamw")
    large = _options(model="transformer", width=2048, batch=64, steps=20)
    steps = [
        small,
        [*small, *_options(where="embedded")],
        _options(model="mlp", width=4096, batch=256, against="adamw", steps=100),
        [*large, *_options(against="adamw")],
        [*large, *_options(against="adamw", where="embedded")],
        _options(model="cnn", width=128, batch=256, against="adamw"),
        [*large, *_options(against="adamw", update_every=3)],
        [*large, *_options(against="adamw", where="cpu")],
        [*large, *_options(against="adamw,muon,dense-kfac")],
    ]
    solver = [_options(device="cuda", dim=dim) for dim in (1024, 2048, 4096)]
    solver.append(_options(device="cuda", dim=4096, rows=1024, factors=16))
    return [
        *(("solver", options) for options in solver),
        *(("step", [*common, *options]) for options in steps),
    ]


def jobs(*, short: bool) -> list[tuple[str, list[str]]]:
    """List what is run.

    Args:
        short: Seconds each, only to see that they run.

    Returns:
        Names of scripts with their options.
    """
    if short:
        quick = _options(width=32, batch=8, rounds=1, steps=12)
        steps = [[*quick, *_options(model=m)] for m in ("mlp", "cnn", "transformer")]
        return [
            *(("step", options) for options in steps),
            ("solver", _options(dim=128, factors=4, rounds=1)),
            ("transport", ["--short"]),
            ("scale", ["--short"]),
        ]
    grid = [
        _options(width=width, batch=batch)
        for width in (512, 1024, 2048)
        for batch in (32, 64, 128)
    ]
    grid += [_options(update_every=every) for every in (1, 3, 100)]
    grid += [_options(width=2048, update_every=1), _options(apply="gradient")]
    grid += [
        _options(model=model, width=width, steps=10, update_every=every)
        for model, width in (("cnn", 32), ("transformer", 128))
        for every in (10, 1)
    ]
    grid.append(_options(model="deep", width=128, batch=32))
    solver = [_options(dim=dim) for dim in (1024, 2048, 4096)]
    return [
        *(("step", options) for options in grid),
        *(("solver", options) for options in solver),
        ("transport", _options(plot=IMAGES / "speed_transport.png")),
        ("scale", _options(plot=IMAGES / "speed_scale.png")),
        ("scale", _options(transport="grpc")),
    ]


def run_one(name: str, options: list[str]) -> dict[str, Any]:
    """Run a script.

    Returns:
        Its figures.

    Raises:
        RuntimeError: If it fails.
    """
    command = [sys.executable, str(HERE / f"{name}.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    figures: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def _keep(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    # After each one: half an hour is long enough for something to go wrong.
    kept = json.loads(path.read_text()) if path.exists() else {}
    done = {name: figures for name, figures in found.items() if figures}
    path.write_text(json.dumps({**kept, **done}, indent=1) + "\n")


def main(
    results: Annotated[
        Path | None,
        typer.Option(help="Where the figures are kept, if not in results/."),
    ] = None,
    only: Annotated[
        str, typer.Option(help=f"Some of {', '.join(SCRIPTS)}; the others stay.")
    ] = ",".join(SCRIPTS),
    device: Annotated[
        str, typer.Option(help="cpu, or cuda for what a GPU makes faster.")
    ] = "cpu",
    short: Annotated[
        bool, typer.Option("--short", help="Only see that all of them run; keep none.")
    ] = False,
) -> None:
    """Run the benchmarks; about half an hour on two idle cores, which they all use."""
    names = only.split(",")
    on_gpu = device != "cpu"
    every = jobs_on_gpu() if on_gpu else jobs(short=short)
    wanted = [job for job in every if job[0] in names]
    kept_in = results or HERE / "results" / ("gpu.json" if on_gpu else "speed.json")
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    console = Console(stderr=True)
    failed = 0
    for name, options in track(wanted, "benchmarks", console=console):
        console.print(name, *options)
        try:
            found[name].append(run_one(name, options))
        except RuntimeError as error:  # the others take long enough to go on with them
            failed += 1
            console.print(str(error), markup=False)
        if not short:
            _keep(found, kept_in)
    if not (short or on_gpu) and found.get("step"):
        draw_steps(found["step"], IMAGES / "speed_step.png")
    print(json.dumps({name: len(figures) for name, figures in found.items()}))
    if failed:
        sys.exit(f"{failed} of {len(wanted)} failed.")


if __name__ == "__main__":
    typer.run(main)
