"""Runs one optimizer after the other, and shows how they do."""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from torch import nn
from torch.optim import Optimizer

from common.options import OptimizerName
from common.training import Event, Result, Step, Task, Validation, train
from skfac.client import Preconditioner, SkfacError

_JSON_EVERY_STEPS = 10

Build = Callable[[OptimizerName, nn.Module], tuple[Optimizer, Preconditioner | None]]
"""Makes what trains a model, for the name of an optimizer."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asked for.

    Attributes:
        optimizer: The only one to train with, None for all.
        epochs: Passes over the training digits.
        seed: Fixes the initial parameters and the order of the batches.
        as_json: Whether a program reads along.
        plot: Where to draw the losses, None for nowhere.
    """

    optimizer: OptimizerName | None
    epochs: int
    seed: int
    as_json: bool
    plot: Path | None


def compare(task: Task, build: Build, request: Request) -> None:
    """Train as requested, and show it while it goes on and afterwards.

    Raises:
        typer.Exit: If the library refuses to go on, which is said on standard error.
    """
    chosen = [request.optimizer] if request.optimizer else list(OptimizerName)
    try:
        runs = {name: _watch(task, build, name, request) for name in chosen}
    except SkfacError as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise typer.Exit(1) from error
    if request.plot:
        from common.plot import draw  # not everyone who trains has matplotlib

        draw(task, runs, request.plot)
    if not request.as_json:
        _print_results(task, {name: result_of(run) for name, run in runs.items()})
        if request.plot:
            typer.echo(f"The plot is in {request.plot}.")


def result_of(events: Iterable[Event]) -> Result:
    """Go through a run to its end.

    Returns:
        How it ended.
    """
    *_, last = events
    assert isinstance(last, Result)
    return last


def finite(value: float) -> float | None:
    """Make a number fit for JSON, which has no infinities.

    Returns:
        The value, or None if it is not finite.
    """
    return value if math.isfinite(value) else None


def _watch(
    task: Task, build: Build, name: OptimizerName, request: Request
) -> list[Event]:
    steps = request.epochs * task.epoch_steps
    sink = _json_lines(task, name) if request.as_json else _progress_bar(name, steps)
    run = train(task, partial(build, name), epochs=request.epochs, seed=request.seed)
    events = []
    with closing(run), sink as show:
        for event in run:
            show(event)
            events.append(event)
    return events


@contextmanager
def _progress_bar(name: OptimizerName, steps: int) -> Iterator[Callable[[Event], None]]:
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description:>6}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:7.4g}"),
        TextColumn("ETA"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        line = bar.add_task(name, total=steps, loss=math.nan)

        def show(event: Event) -> None:
            if isinstance(event, Step):
                bar.update(line, completed=event.step, loss=event.loss)

        yield show


@contextmanager
def _json_lines(task: Task, name: OptimizerName) -> Iterator[Callable[[Event], None]]:
    val_metric = f"val_{task.metric_name.replace(' ', '_')}"

    def show(event: Event) -> None:
        line: dict[str, Any] = {"optimizer": name}
        seconds = round(event.seconds, 3)
        match event:
            case Step(step):
                if step % _JSON_EVERY_STEPS:
                    return
                line |= {"step": step, "seconds": seconds, "loss": finite(event.loss)}
            case Validation(step):
                line |= {"step": step, "seconds": seconds}
                line |= {"val_loss": finite(event.loss)}
                line |= {val_metric: finite(event.metric)}
            case Result(steps):
                line |= {"steps": steps, "val_loss": finite(event.loss)}
                line |= {val_metric: finite(event.metric)}
                line |= {"seconds": seconds, "report": event.report}
        print(json.dumps(line, allow_nan=False), flush=True)

    yield show


def _print_results(task: Task, results: dict[OptimizerName, Result]) -> None:
    table = Table()
    table.add_column("optimizer")
    numbers = ("steps", f"val {task.loss_name}", f"val {task.metric_name}", "seconds")
    for heading in numbers:
        table.add_column(heading, justify="right")
    for name, result in results.items():
        table.add_row(
            name,
            str(result.steps),
            f"{result.loss:.4g}",
            f"{result.metric:.4g}",
            f"{result.seconds:.1f}",
        )
    console = Console()
    console.print(table)
    for result in results.values():
        if result.report is not None:
            console.print(_summary(result.report), highlight=False)


def _summary(report: dict[str, Any]) -> str:
    counts = report["versions"]
    summary = (
        f"skfac: {counts.get('solved', 0)} layer versions solved, "
        f"{counts.get('late', 0)} late; {report['raw_gradients']} raw gradients of "
        f"{report['step'] * len(report['layers'])}; "
        f"{report['waited_s']:.2f} s waited"
    )
    return f"{summary}; {report['failure']}" if report["failure"] else f"{summary}."
