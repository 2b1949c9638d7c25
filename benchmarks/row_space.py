"""What a step costs with rows preconditioned in the backward, and gradients after it.

Prints one JSON object a width: median milliseconds of a step of SGD, of AdamW and of
SKFAC in both spaces, taken in turns in one process, and their ratios to SGD. Steps with
a snapshot and steps without one are told apart.
"""

import json
import statistics
import time
from contextlib import ExitStack
from typing import Annotated

import torch
import typer
from torch import nn
from torch.optim import SGD, AdamW

from skfac.client import Preconditioner

UPDATE_EVERY = 10
INPUTS, CLASSES = 784, 10


class Trainer:
    """One model and what trains it."""

    def __init__(self, width: int, preconditioner: str | None, adamw: bool) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(INPUTS, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, CLASSES),
        )
        parameters = self.model.parameters()
        self.optimizer = AdamW(parameters) if adamw else SGD(parameters, lr=0.01)
        self.preconditioner = None
        if preconditioner is not None:
            self.preconditioner = Preconditioner(
                self.model,
                self.optimizer,
                apply=preconditioner,
                update_every=UPDATE_EVERY,
                lag=5,
                on_late="wait",
            )

    def step(self, inputs: torch.Tensor, labels: torch.Tensor) -> float:
        """Take a step.

        Returns:
            Its milliseconds.
        """
        start = time.perf_counter()
        loss = nn.functional.cross_entropy(self.model(inputs), labels)
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no types here
        if self.preconditioner is not None:
            self.preconditioner.step()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return 1000 * (time.perf_counter() - start)


def measure(width: int, batch: int, steps: int) -> dict[str, float]:
    """Time all trainers in turns.

    Returns:
        Medians and ratios by name.
    """
    with ExitStack() as stack:
        trainers = {
            "sgd": Trainer(width, None, False),
            "adamw": Trainer(width, None, True),
            "row": Trainer(width, "row", False),
            "gradient": Trainer(width, "gradient", False),
        }
        for trainer in trainers.values():
            if trainer.preconditioner is not None:
                stack.enter_context(trainer.preconditioner)
        times: dict[str, list[float]] = {name: [] for name in trainers}
        captures: dict[str, list[float]] = {name: [] for name in trainers}
        for step in range(steps):
            inputs = torch.rand(batch, INPUTS)
            labels = torch.randint(CLASSES, (batch,))
            for name, trainer in trainers.items():
                spent = trainer.step(inputs, labels)
                if step >= 2 * UPDATE_EVERY:  # versions are in use by then
                    kind = times if step % UPDATE_EVERY > 6 else captures
                    kind[name].append(spent)
    result: dict[str, float] = {"width": width, "batch": batch}
    for name in trainers:
        result[f"{name}_ms"] = round(statistics.median(times[name]), 3)
        result[f"{name}_ratio"] = _ratio(times, name)
        result[f"{name}_update_ratio"] = _ratio(captures, name)
    return result


def _ratio(times: dict[str, list[float]], name: str) -> float:
    reference = statistics.median(times["sgd"])
    return round(statistics.median(times[name]) / reference, 2)


def main(
    widths: Annotated[str, typer.Option(help="Hidden widths.")] = "512,1024,2048",
    batch: Annotated[int, typer.Option(min=1, help="Samples in a batch.")] = 64,
    steps: Annotated[int, typer.Option(min=40, help="Steps of each.")] = 200,
) -> None:
    """Compare a step of SGD, AdamW and SKFAC in row space and in gradient space.

    An MLP 784-W-W-10 on random data, one thread. `ratio` is a step without curvature
    work over one of SGD; `update_ratio` one in the half of the interval in which a
    snapshot is taken and solved on the same core.
    """
    torch.set_num_threads(1)

    for width in widths.split(","):
        print(json.dumps(measure(int(width), batch, steps)), flush=True)


if __name__ == "__main__":
    typer.run(main)
