"""How long the runs will take, from those that were done or from a few steps."""

import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch
from common.training import Task, Validation, train

from benchmarks.study.plan import Trial, Variant, settings_of
from benchmarks.study.records import Records
from benchmarks.study.runs import recipe
from benchmarks.study.tasks import TASKS, steps_of, task_of

_STEPS = 20
"""Long enough for two snapshots of `update_every=10`."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a run of a variant takes on a task.

    Attributes:
        step_s: CPU seconds of a step, with its share of the curvature's updates.
        run_s: Seconds of a whole run, with its validations.
    """

    step_s: float
    run_s: float


class Costs:
    """Costs by task and variant, each found out once.

    Args:
        records: Runs that were done.
    """

    def __init__(self, records: Records) -> None:
        self._records = records
        self._costs: dict[tuple[str, Variant], Cost] = {}

    def of(self, task: str, variant: Variant) -> Cost:
        """Find out what a variant costs, whatever its lag is.

        Returns:
            The medians of runs that were done, or else what a few steps took here.
        """
        key = task, variant.group
        if key not in self._costs:
            self._costs[key] = self._recorded(*key) or _measured(*key)
        return self._costs[key]

    def seconds(self, trials: Iterable[Trial]) -> float:
        """Add up what trials take, one after the other.

        Returns:
            Seconds.
        """
        return sum(self.of(trial.task, trial.variant).run_s for trial in trials)

    def _recorded(self, task: str, group: Variant) -> Cost | None:
        same = (group.optimizer, group.history, group.update_every)
        found = [
            record
            for record in self._records
            if record["task"] == task
            and (record["optimizer"], record["history"], record["update_every"]) == same
            and not record["diverged"]
        ]
        if not found:
            return None
        return Cost(
            step_s=statistics.median(r["seconds"] / r["steps"] for r in found),
            run_s=statistics.median(record["wall_s"] for record in found),
        )


def _measured(name: str, variant: Variant) -> Cost:
    task = task_of(name)
    short = _shortened(task)
    trial = Trial(
        task=name,
        variant=variant,
        settings=settings_of(variant)[0],
        seed=0,
        stage="tune",
    )
    torch.set_num_threads(1)
    # CPU seconds: what else runs here now does not count.
    clock = time.process_time
    start, seconds, validations = clock(), 0.0, 0
    running = train(short, partial(recipe, trial), epochs=1, seed=0, clock=clock)
    for event in running:
        validations += isinstance(event, Validation)
        seconds = event.seconds
    other_s = clock() - start - seconds
    steps = steps_of(name)
    assert task.validate_every is not None
    count = steps / task.validate_every + 1
    step_s = seconds / short.epoch_steps
    return Cost(step_s=step_s, run_s=step_s * steps + other_s * count / validations)


def _shortened(task: Task) -> Task:
    size = _STEPS * task.batch_size
    return replace(
        task,
        inputs=task.inputs[:size],
        targets=task.targets[:size],
        validate_every=_STEPS,
    )


def overview(costs: Costs, variants: Iterable[Variant]) -> list[list[str]]:
    """Tabulate milliseconds of a step.

    Returns:
        A row per variant: its title, then one cell per task.
    """
    return [
        [
            variant.title,
            *(f"{1000 * costs.of(task, variant).step_s:.1f}" for task in TASKS),
        ]
        for variant in variants
    ]
