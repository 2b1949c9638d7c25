"""Times whole training steps: SKFAC against the optimizers that people use.

The trainer runs on one core, the server on another; with `--device cuda` both use one
GPU, and a turn is timed as a whole, as steps run ahead of the GPU. All optimizers train
the same model on the same batch in turns, and every figure is a ratio within the run.
"""

import json
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.speed.models import WORKLOADS
from benchmarks.speed.phases import phases_of
from benchmarks.speed.pinned import engine, pin_trainer
from benchmarks.speed.threads import cpu_ms_by_thread
from benchmarks.speed.trainers import BASELINES, Trainer, baseline, skfac
from benchmarks.speed.turns import Times, hardware, time_in_turns

REFERENCE_EVERY = 10
SLOW_TURN_S = 3.0


def main(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(WORKLOADS)}.")] = "mlp",
    width: Annotated[
        int, typer.Option(min=4, help="Of the hidden layers; channels of a cnn.")
    ] = 1024,
    batch: Annotated[int, typer.Option(min=2, help="Samples in a batch.")] = 64,
    update_every: Annotated[
        int, typer.Option(min=1, help="Steps between snapshots.")
    ] = 10,
    lag: Annotated[
        int, typer.Option(min=1, help="Steps from a snapshot to its first use.")
    ] = 1,
    apply: Annotated[
        str, typer.Option(help="Where SKFAC preconditions: auto, row or gradient.")
    ] = "auto",
    device: Annotated[
        str, typer.Option(help="Of the model, and of a server: cpu or cuda.")
    ] = "cpu",
    where: Annotated[
        str,
        typer.Option(help="The engine: embedded, or in a server on cpu or cuda."),
    ] = "",
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each optimizer.")] = 7,
    steps: Annotated[int, typer.Option(min=1, help="Steps in a turn.")] = 30,
    against: Annotated[
        str, typer.Option(help="Optimizers to compare with; sgd and adamw always.")
    ] = ",".join(BASELINES),
) -> None:
    """Time steps of one model with every optimizer.

    `ratio_to_sgd` is of median steps, the median of `rounds` turns; `mean_ratio_to_sgd`
    of mean ones, in which the steps that capture weigh fully. `growth_over_every_10` is
    the median step over one of the same trainer that refreshes every 10 steps;
    `cpu_ms_by_thread` says who takes the time of both.
    """
    if model not in WORKLOADS:
        raise typer.BadParameter(f"model is one of {', '.join(WORKLOADS)}.")
    names = dict.fromkeys(["sgd", "adamw", *filter(None, against.split(","))])
    if device == "cpu":
        pin_trainer()
    torch.manual_seed(0)
    work = WORKLOADS[model](width, batch).on(device)
    where = where or device
    with engine(where) as target, ExitStack() as stack:
        trainers = {name: baseline(name, work) for name in names}
        for every in {update_every, REFERENCE_EVERY}:
            trainer = skfac(work, target, update_every=every, lag=lag, apply=apply)
            assert trainer.preconditioner is not None
            stack.enter_context(trainer.preconditioner)
            trainers[f"every {every}"] = trainer
        times = _times(trainers, device, rounds, steps)
        settings = {
            "model": model,
            "width": width,
            "batch": batch,
            "update_every": update_every,
            "lag": lag,
            "apply": apply,
            "device": device,
            "engine": where,
            "hardware": hardware(device),
        }
        own = trainers[f"every {update_every}"]
        result = {
            **settings,
            **_figures(times, own, update_every),
            **_threads(trainers, device, rounds * steps),
            **phases_of(own, steps),
        }
    print(json.dumps(result))


def _times(
    trainers: dict[str, Trainer], device: str, rounds: int, steps: int
) -> dict[str, Times]:
    if device == "cpu":
        bodies = {name: trainer.step for name, trainer in trainers.items()}
        return time_in_turns(bodies, rounds=rounds, repeats=steps, budget_s=SLOW_TURN_S)
    turns = {name: partial(one.steps, steps) for name, one in trainers.items()}
    times = time_in_turns(turns, rounds=rounds, repeats=1)
    return {name: turn.divided_by(steps) for name, turn in times.items()}


def _threads(trainers: dict[str, Trainer], device: str, steps: int) -> dict[str, Any]:
    if device != "cpu":  # where autograd has threads of its own
        return {}
    ours = {k: one for k, one in trainers.items() if one.preconditioner is not None}
    return {"cpu_ms_by_thread": cpu_ms_by_thread(ours, steps)}


def _figures(times: dict[str, Times], own: Trainer, every: int) -> dict[str, Any]:
    mine = times[f"every {every}"]
    total_s = sum(sum(turn) for turn in mine.rounds)
    assert own.preconditioner is not None
    return {
        "ratio_to_sgd": round(mine.ratio_to(times["sgd"]), 3),
        "ratio_to_adamw": round(mine.ratio_to(times["adamw"]), 3),
        "mean_ratio_to_sgd": round(mine.mean_ratio_to(times["sgd"]), 3),
        "growth_over_every_10": round(
            mine.ratio_to(times[f"every {REFERENCE_EVERY}"]), 3
        ),
        "mean_growth_over_every_10": round(
            mine.mean_ratio_to(times[f"every {REFERENCE_EVERY}"]), 3
        ),
        "wait_share": round(own.waited_s / total_s, 4),
        "median_ms": {name: round(1e3 * t.median_s, 3) for name, t in times.items()},
        "ratios_to_sgd": {
            name: round(t.ratio_to(times["sgd"]), 3) for name, t in times.items()
        },
        "versions": own.preconditioner.report()["versions"],
    }


if __name__ == "__main__":
    typer.run(main)
