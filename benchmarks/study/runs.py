"""Does the runs, several at once, each on one core with one thread for the maths."""

import multiprocessing
import os
import signal
import time
from collections.abc import Generator, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from multiprocessing.sharedctypes import Synchronized
from typing import Any

import torch
from common.report import finite
from common.training import Event, Result, Task, Validation, train
from torch import nn

from benchmarks.study import optimizers
from benchmarks.study.plan import Trial, Variant
from benchmarks.study.records import Record
from benchmarks.study.tasks import TASKS, task_of
from skfac.client import PreconditionerConfig

_DIVERGED_AT = 1e6
"""A loss that no task here can have unless the run is lost."""


@dataclass(frozen=True, kw_only=True)
class Done:
    """What a worker sends back.

    Attributes:
        trial: What was to be done.
        outcome: What is recorded of it; None if it failed.
        failure: Why it failed.
    """

    trial: Trial
    outcome: Record | None
    failure: str = ""

    @property
    def text(self) -> str:
        """What failed, and why."""
        trial = self.trial
        run = f"{trial.task}, {trial.variant.title}, seed {trial.seed}"
        return f"{run}, {trial.settings} failed: {self.failure}"


def curvature_of(variant: Variant) -> dict[str, Any]:
    """List the preconditioner's keywords that a variant fixes.

    Versions that are late are waited for, so that runs can be repeated.

    Returns:
        None at all for the library's defaults.
    """
    if variant.defaults:
        return {}
    return {
        "history": variant.history,
        "lag": variant.lag,
        "update_every": variant.update_every,
        "on_late": "wait",
    }


def check(trial: Trial) -> None:
    """Refuse what this version of the library cannot do, before anything is run.

    Raises:
        ConfigurationError: If SKFAC refuses a setting.
    """
    if trial.variant.history is None or trial.variant.defaults:
        return
    tuned = {k: v for k, v in trial.settings.items() if k not in ("lr", "momentum")}
    PreconditionerConfig.of(tuned | curvature_of(trial.variant))


def recipe(trial: Trial, model: nn.Module) -> optimizers.Trained:
    """Make what a trial trains its model with."""
    settings = dict(trial.settings)
    variant = trial.variant
    if variant.defaults:
        settings = {name: settings[name] for name in ("lr", "momentum")}
    if variant.history is not None:
        return optimizers.skfac(model, settings, curvature_of(variant))
    if variant.optimizer == "singd":
        many = TASKS[trial.task].positions > 1
        settings["loss_average"] = "batch+sequence" if many else "batch"
    return optimizers.BASELINES[variant.optimizer](model, settings), None


def run(trial: Trial) -> Record:
    """Do a trial.

    Returns:
        What is recorded of it.
    """
    return outcome_of(trial, task_of(trial.task), epochs=TASKS[trial.task].epochs)


def outcome_of(trial: Trial, task: Task, *, epochs: int) -> Record:
    """Do a trial on a task that need not be the study's.

    Returns:
        What is recorded of it.
    """
    events: list[Event] = []
    report: dict[str, Any] | None = None
    diverged = False
    # Of all threads, so that the engine's work counts and other processes do not.
    training = train(
        task,
        partial(recipe, trial),
        epochs=epochs,
        seed=trial.seed,
        clock=time.process_time,
    )
    with closing(training):
        try:
            for event in training:
                events.append(event)
                if isinstance(event, Result):
                    report = event.report
                elif not event.loss < _DIVERGED_AT:  # NaN as well
                    diverged = True
                    break
        # A baseline's factors are not finite.
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # C++ has it
            diverged = True
    points = [event for event in events if isinstance(event, Validation)]
    outcome = {
        "steps": epochs * task.epoch_steps,
        "val_losses": [
            [point.step, round(point.seconds, 3), finite(point.loss)]
            for point in points
        ],
        "final_val_loss": None if diverged else finite(points[-1].loss),
        "seconds": round(events[-1].seconds, 3),
        "diverged": diverged,
    }
    return outcome if report is None else outcome | {"versions": report["versions"]}


def run_all(trials: Iterable[Trial], *, jobs: int) -> Generator[Done]:
    """Do trials in processes of their own, each on a core of its own.

    When the caller stops early, for whatever reason, the processes are ended.

    Args:
        trials: What is to be done.
        jobs: How many at once.

    Yields:
        What came out, as it comes.
    """
    # Read when a process first loads its mathematics.
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    context = multiprocessing.get_context("spawn")
    started = context.Value("i", 0)
    executor = ProcessPoolExecutor(jobs, context, _start_worker, (started,))
    try:
        futures = [executor.submit(_do, trial) for trial in trials]
        for future in as_completed(futures):
            yield future.result()
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
        for child in multiprocessing.active_children():
            child.terminate()


def _start_worker(started: "Synchronized[int]") -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    with started.get_lock():
        core = cores[started.value % len(cores)]
        started.value += 1
    os.sched_setaffinity(0, {core})


def _do(trial: Trial) -> Done:
    start = time.perf_counter()
    try:
        outcome = run(trial)
    except Exception as error:  # said and listed by the parent
        return Done(
            trial=trial, outcome=None, failure=f"{type(error).__name__}: {error}"
        )
    wall_s = round(time.perf_counter() - start, 3)
    return Done(trial=trial, outcome=outcome | {"wall_s": wall_s})
