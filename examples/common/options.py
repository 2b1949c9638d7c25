"""The command line that the examples share."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from skfac.client import ConfigurationError
from skfac.client.config import check_target


class OptimizerName(StrEnum):
    """What a model can be trained with here."""

    SGD = "sgd"
    ADAMW = "adamw"
    SKFAC = "skfac"


def _known_target(target: str | None) -> str | None:
    try:
        if target is not None:
            check_target(target)
    except ConfigurationError as error:
        raise typer.BadParameter(str(error)) from error
    return target


def _writable_plot(plot: Path | None) -> Path | None:
    if plot is not None and plot.suffix != ".png":
        raise typer.BadParameter(f"{str(plot)!r} does not end in .png.")
    if plot is not None and not plot.absolute().parent.is_dir():
        raise typer.BadParameter(f"There is no folder {str(plot.parent)!r}.")
    return plot


Optimizer = Annotated[
    OptimizerName | None,
    typer.Option(
        "--optimizer",
        show_default="all, one after the other",
        help="Train with this one only.",
    ),
]
Target = Annotated[
    str,
    typer.Option(
        "--target",
        metavar="embedded | HOST:PORT | unix:/PATH | ray://NAMESPACE/POOL",
        callback=_known_target,
        help="Where SKFAC inverts its factors: on a thread of this process, or on the "
        "server (`skfac serve`) that listens there, or in Ray's actors.",
    ),
]
SharedTarget = Annotated[
    str | None,
    typer.Option(
        "--target",
        metavar="HOST:PORT | unix:/PATH | ray://NAMESPACE/POOL",
        callback=_known_target,
        show_default="a server on a thread of rank 0",
        help="Where SKFAC inverts the factors of all ranks: on the server (`skfac "
        "serve`) that listens there, or in Ray's actors.",
    ),
]
Epochs = Annotated[
    int,
    typer.Option(
        "--epochs",
        min=1,
        help="Passes over the training digits. The learning rate falls linearly, to 0 "
        "after the last one.",
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        "--seed",
        min=0,
        help="Fixes the initial parameters and the order of the batches. The "
        "validation digits are always the same.",
    ),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print one JSON object a line: the training loss at every tenth step, the "
        "validation after every epoch, and the result as last line of each run. What "
        "is not finite is null.",
    ),
]
Plot = Annotated[
    Path | None,
    typer.Option(
        "--plot",
        metavar="FILE.png",
        callback=_writable_plot,
        help="Draw the losses against steps and against seconds.",
    ),
]
