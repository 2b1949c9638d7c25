"""Compares SKFAC with other optimizers on real data, by steps and by seconds.

Every run is added to the record at once, and one that is in it already is skipped, so
that an interrupted study goes on where it was.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.study import ROOT, plan, selection
from benchmarks.study.costs import Costs, overview
from benchmarks.study.plan import Wanted
from benchmarks.study.progress import complete, console
from benchmarks.study.records import Records
from benchmarks.study.runs import check
from benchmarks.study.tasks import TASKS

app = typer.Typer(add_completion=False, no_args_is_help=True)

RESULTS = ROOT / "benchmarks" / "results" / "convergence.json"
ResultsOption = Annotated[
    Path, typer.Option("--results", metavar="FILE.json", help="Where runs are kept.")
]
OnlyOption = Annotated[
    list[str] | None,
    typer.Option(
        "--only",
        metavar="KEY=VALUE,...",
        help="Do only what has these values of task, optimizer, history, lag, "
        "update_every or defaults (yes or no), and the tuning it needs. Given several "
        "times, it selects what any of them does.",
    ),
]
JobsOption = Annotated[
    int, typer.Option("--jobs", min=1, help="Runs at once, each on a core of its own.")
]
DryRunOption = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Only say what would be run and how long it would take, from a few steps "
        "of each.",
    ),
]


@app.command()
def run(
    results: ResultsOption = RESULTS,
    only: OnlyOption = None,
    jobs: JobsOption = 1,
    dry_run: DryRunOption = False,
) -> None:
    """Tune every optimizer with as many trials, then run the best on three seeds.

    Nothing else should run meanwhile, or the seconds mean little. Ctrl-C stops at once
    and loses only the runs that are not finished.
    """
    try:
        wanted = selection.parse(only or [])
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--only") from error
    for trial in plan.tuning(wanted):
        check(trial)  # before an hour is spent on the others
    records = Records(results)
    costs = Costs(records)
    if dry_run:
        _print_plan(wanted, records, costs, jobs)
        return
    try:
        failed = complete("tuning", plan.tuning(wanted), records, costs, jobs=jobs)
        finals = plan.finals(wanted, records.best)
        failed += complete("final", finals, records, costs, jobs=jobs)
    except KeyboardInterrupt:
        console.print(f"Stopped; {len(records)} runs are in {results}.")
        raise typer.Exit(130) from None
    records.compare()
    for done in failed:
        console.print(f"[red]{done.text}")
    if failed:
        raise typer.Exit(1)


@app.command()
def report(
    results: ResultsOption = RESULTS,
    page: Annotated[
        Path, typer.Option(metavar="FILE.md", help="Whose tables are filled.")
    ] = ROOT / "docs" / "convergence.md",
    images: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Where the plots go.")
    ] = ROOT / "docs" / "images",
) -> None:
    """Write the tables of docs/convergence.md, and draw the plots."""
    from benchmarks.study import plots, tables

    records = Records(results)
    records.compare()
    tables.fill(page, records)
    for path in plots.draw_all(records, images):
        typer.echo(path)


def _print_plan(wanted: Wanted, records: Records, costs: Costs, jobs: int) -> None:
    with console.status("Timing a few steps of what has not been run yet"):
        rows = overview(costs, [v for v in plan.variants() if v == v.group])
    table = Table("CPU milliseconds a step", *(task.title for task in TASKS.values()))
    for row in rows:
        table.add_row(*row)
    tuning = plan.tuning(wanted)
    finals = plan.finals(
        wanted, lambda task, v: records.best(task, v) or plan.settings_of(v)[0]
    )
    missing = [trial for trial in tuning + finals if records.of(trial) is None]
    output = Console()
    output.print(table)
    output.print(
        f"{len(plan.groups(wanted))} groups with {plan.TRIALS} trials each and "
        f"{len(finals)} final runs: {len(tuning) + len(finals)} runs, "
        f"{len(missing)} of them to do, in about "
        f"{costs.seconds(missing) / jobs / 60:.0f} minutes with --jobs {jobs}."
    )


if __name__ == "__main__":
    app()
