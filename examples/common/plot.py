"""Draws how the loss of each optimizer falls, by steps and by seconds."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from common.options import OptimizerName
from common.training import Event, Step, Task, Validation

# Okabe and Ito, "Color Universal Design" (2008): told apart by the colour-blind. Line
# and marker differ as well, for print.
_LOOKS = {
    OptimizerName.SGD: ("SGD", "#009E73", ":", "s"),
    OptimizerName.ADAMW: ("AdamW", "#0072B2", "--", "^"),
    OptimizerName.SKFAC: ("SKFAC", "#D55E00", "-", "o"),
}
_SMOOTHING = 0.8


def draw(task: Task, runs: dict[OptimizerName, list[Event]], path: Path) -> None:
    """Draw training losses as curves and validation losses as points.

    Args:
        task: What was trained.
        runs: By optimizer, everything that happened.
        path: Where to put the picture.
    """
    with mpl.rc_context({"font.size": 11, "axes.titlesize": 12}):
        figure = Figure(figsize=(11, 4.6), layout="constrained")
        by_step, by_seconds = figure.subplots(1, 2, sharey=True)
        for axes, against in ((by_step, "step"), (by_seconds, "seconds")):
            for name, events in runs.items():
                _add_run(axes, name, events, against)
            _tidy(axes)
        by_step.set(xlabel="steps", ylabel=f"{task.loss_name}, log scale")
        by_seconds.set(xlabel="seconds, without validation")
        by_step.legend(frameon=False, title="validation loss at the end")
        figure.suptitle("Training loss (lines) and validation loss (markers)")
        figure.savefig(path, dpi=150)


def _add_run(
    axes: Axes, name: OptimizerName, events: list[Event], against: str
) -> None:
    label, color, style, marker = _LOOKS[name]
    steps = [event for event in events if isinstance(event, Step)]
    points = [event for event in events if isinstance(event, Validation)]
    axes.plot(
        [getattr(step, against) for step in steps],
        list(_smoothed(step.loss for step in steps)),
        color=color,
        linestyle=style,
        linewidth=1.4,
    )
    axes.plot(
        [getattr(point, against) for point in points],
        [point.loss for point in points],
        color=color,
        linestyle="",
        marker=marker,
        markersize=7,
        markeredgecolor="white",
    )
    # The legend shows a line with its marker, which no single artist above has.
    label = f"{label}: {points[-1].loss:.3g}"
    axes.plot([], [], color=color, linestyle=style, marker=marker, label=label)


def _tidy(axes: Axes) -> None:
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    subs = (1, 1.5, 2, 3, 5, 7) if high < 10 * low else (1, 2, 5)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(which="minor", left=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.margins(x=0.04)


def _smoothed(losses: Iterable[float]) -> Iterator[float]:
    mean = None
    for loss in losses:
        mean = loss if mean is None else _SMOOTHING * mean + (1 - _SMOOTHING) * loss
        yield mean
