"""Optimizers whose steps are timed, each on a model of its own."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from benchmarks.speed.models import Workload
from benchmarks.study import optimizers
from skfac.client import PassThroughWarning, Preconditioner

_KFAC = {"damping": 0.03, "kl_clip": 0.15, "update_every": 10}
_SETTINGS: dict[str, optimizers.Settings] = {
    "sgd": {"lr": 1e-3},
    "adamw": {"lr": 1e-4},
    "muon": {"lr": 1e-3, "adamw_lr": 1e-4},
    "singd": {"lr": 1e-4, "adamw_lr": 1e-4, "T": 10},
    "dense-kfac": {"lr": 1e-3, "momentum": 0.0, **_KFAC},
}

BASELINES = tuple(_SETTINGS)
"""Names of what a step of SKFAC is compared with."""


class Trainer:
    """A model and what trains it.

    Attributes:
        preconditioner: Of SKFAC, else None.
    """

    def __init__(
        self,
        work: Workload,
        make: Callable[[nn.Module], tuple[Optimizer, Preconditioner | None]],
    ) -> None:
        torch.manual_seed(0)
        self._work = work
        self._model = work.build()
        self._optimizer, self.preconditioner = make(self._model)

    def step(self) -> None:
        """Take one whole step."""
        self._work.loss(self._model).backward()  # type: ignore[no-untyped-call]
        if self.preconditioner is not None:
            self.preconditioner.step()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def steps(self, count: int) -> None:
        """Take some steps, and wait until the GPU has done them."""
        for _ in range(count):
            self.step()
        torch.cuda.synchronize()

    @property
    def waited_s(self) -> float:
        """Seconds spent waiting for versions so far."""
        report = None if self.preconditioner is None else self.preconditioner.report()
        return 0.0 if report is None else float(report["waited_s"])


def baseline(name: str, work: Workload) -> Trainer:
    """Make a trainer without SKFAC, by a name of `BASELINES`."""

    def make(model: nn.Module) -> tuple[Optimizer, None]:
        optimizer = optimizers.BASELINES[name](model, _SETTINGS[name])
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]  # as a schedule does, which study expects
        return optimizer, None

    return Trainer(work, make)


def skfac(work: Workload, target: str, **settings: Any) -> Trainer:  # noqa: ANN401
    """Make SGD with SKFAC before each step, with settings of the preconditioner."""

    def make(model: nn.Module) -> tuple[Optimizer, Preconditioner]:
        optimizer = optimizers.sgd(model, _SETTINGS["sgd"])
        with warnings.catch_warnings():
            # Norms pass through, as they do with every K-FAC.
            warnings.simplefilter("ignore", PassThroughWarning)
            return optimizer, Preconditioner(
                model, optimizer, target=target, **settings
            )

    return Trainer(work, make)
