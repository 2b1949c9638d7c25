"""`python -m tests.faults`: replays seeded faults, and ends with one line of JSON.

Logs, checkpoints and digits of a run stay in its folder, which is printed, if it was
not good; its seed replays it.
"""

import json
import shutil
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from tests.faults.scenario import WAIT_S, Result, one_seed, summary
from tests.faults.schedule import Shape, planned

console = Console(stderr=True)


def main(
    seeds: Annotated[int, typer.Option(help="How many seeds, from 0 on.")] = 10,
    seed: Annotated[int | None, typer.Option(help="Replay this one only.")] = None,
    ranks: Annotated[int, typer.Option(help="Trainers.")] = 4,
    servers: Annotated[int, typer.Option(help="Servers, at least 2.", min=2)] = 2,
    steps: Annotated[int, typer.Option(help="Steps of each run.")] = 300,
    wait_s: Annotated[float, typer.Option(help="wait_s of the ranks.")] = WAIT_S,
    history: Annotated[str, typer.Option(help="snapshot, window or ema.")] = "snapshot",
    show: Annotated[bool, typer.Option(help="Print the schedules only.")] = False,
) -> None:
    """Train under faults: real ranks, real servers, and links between them."""
    shape = Shape(ranks=ranks, servers=servers, steps=steps)
    chosen = range(seeds) if seed is None else [seed]
    results = []
    for one in chosen:
        if show:
            for event in planned(one, shape):
                console.print(f"seed {one}: {event}")
            continue
        results.append(_run(one, shape, wait_s=wait_s, history=history))
        _tell(results[-1], wait_s)
    if results:
        typer.echo(json.dumps(summary(results, wait_s)))


def _run(seed: int, shape: Shape, **settings: object) -> Result:
    with Progress(
        TextColumn(f"seed {seed} {{task.description}}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    ) as bars:
        tasks = {
            "quiet": bars.add_task("undisturbed", total=shape.steps),
            "faults": bars.add_task("under faults", total=shape.steps),
        }
        return one_seed(
            seed,
            shape,
            lambda what, taken: bars.update(tasks[what], completed=taken),
            **settings,
        )


def _tell(result: Result, wait_s: float) -> None:
    verdict = "[green]good[/]" if result.good else "[red]BAD[/]"
    over_s = result.stall.seconds - wait_s
    console.print(
        f"seed {result.seed}: {verdict}; longest stall {over_s:+.3f} s over wait_s at "
        f"step {result.stall.step}; loss {result.loss:.4g}, undisturbed "
        f"{result.undisturbed_loss:.4g}; {sum(result.events.values())} events"
    )
    for event in result.untraced:
        console.print(f"  not seen: {event}")
    if result.good:
        shutil.rmtree(result.folder)
        return
    console.print(f"  diverged after {result.diverged[:5]}; {result.unfinished}")
    console.print(
        f"  replay: python -m tests.faults --seed {result.seed}; logs: {result.folder}"
    )


if __name__ == "__main__":
    typer.run(main)
