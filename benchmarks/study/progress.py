"""Does what is missing of a stage, and shows how far it is."""

from collections.abc import Sequence
from contextlib import closing

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.study.costs import Costs
from benchmarks.study.plan import Trial
from benchmarks.study.records import Records
from benchmarks.study.runs import Done, run_all

console = Console(stderr=True)

_COLUMNS = (
    TextColumn("{task.description:>6}"),
    BarColumn(),
    TextColumn("{task.fields[runs]}/{task.fields[all_runs]} runs, ETA"),
    TimeRemainingColumn(elapsed_when_finished=True),
)


def complete(
    stage: str, trials: Sequence[Trial], records: Records, costs: Costs, *, jobs: int
) -> list[Done]:
    """Do the trials that have no record, the long ones first, and record them.

    Args:
        stage: What the trials are for.
        trials: Those that have a record already are only counted.
        records: Where they are kept.
        costs: What the order and the bar go by.
        jobs: How many to do at once.

    Returns:
        What failed.
    """
    missing = [trial for trial in trials if records.of(trial) is None]
    with console.status("Timing a few steps of what has not been run yet"):
        weights = [costs.seconds([trial]) for trial in missing]
    ranks = sorted(range(len(missing)), key=weights.__getitem__, reverse=True)
    missing = [missing[rank] for rank in ranks]
    failed = []
    with (
        Progress(*_COLUMNS, console=console) as bar,
        closing(run_all(missing, jobs=jobs)) as running,
    ):
        runs = len(trials) - len(missing)
        line = bar.add_task(stage, total=sum(weights), runs=runs, all_runs=len(trials))
        for runs, done in enumerate(running, start=runs + 1):  # noqa: B020
            if done.outcome is None:
                failed.append(done)
                bar.console.print(f"[red]{done.text}")
            else:
                records.add(done.trial, done.outcome)
            bar.update(line, advance=costs.seconds([done.trial]), runs=runs)
    return failed
