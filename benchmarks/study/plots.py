"""Draws how the validation losses fall, and what old curvature costs."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from benchmarks.study.plan import (
    HISTORIES,
    LAGS,
    UPDATE_EVERY,
    Variant,
    baseline,
    defaults_variant,
)
from benchmarks.study.records import Record, Records, final_loss, median
from benchmarks.study.tasks import TASKS
from skfac.curvature.settings import History


@dataclass(frozen=True, kw_only=True)
class _Look:
    label: str
    color: str
    line: str


# Okabe and Ito, "Color Universal Design" (2008): told apart by the colour-blind; the
# line differs as well, for print.
_BASELINE_LOOKS = {
    "sgd": _Look(label="SGD", color="#000000", line=":"),
    "adamw": _Look(label="AdamW", color="#0072B2", line="--"),
    "muon": _Look(label="Muon", color="#56B4E9", line="-."),
    "soap": _Look(label="SOAP", color="#CC79A7", line="--"),
    "singd": _Look(label="SINGD", color="#E69F00", line="-."),
    "dense-kfac": _Look(label="dense K-FAC", color="#009E73", line="--"),
}
_DEFAULTS_LOOK = _Look(label="SKFAC, defaults", color="#D55E00", line="-")
_BEST_LOOK = _Look(label="", color="#8B2500", line="-")
_HISTORY_LOOKS: dict[History, _Look] = {
    "snapshot": _Look(label="snapshot", color="#D55E00", line="-"),
    "window": _Look(label="window", color="#0072B2", line="--"),
    "ema": _Look(label="ema", color="#009E73", line="-."),
}


def draw_all(records: Records, folder: Path) -> Iterator[Path]:
    """Draw every figure that there are runs for.

    Args:
        records: What to draw.
        folder: Where the pictures go.

    Yields:
        The file of each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"font.size": 10, "axes.titlesize": 11}):
        for task in TASKS:
            curves = _curves(records, task)
            if curves:
                path = folder / f"convergence_{task}.png"
                _draw_task(TASKS[task].title, curves, path)
                yield path
        path = folder / "convergence_freshness.png"
        _draw_freshness(records, path)
        yield path


def _curves(records: Records, task: str) -> list[tuple[_Look, list[Record]]]:
    shown = [(look, baseline(name)) for name, look in _BASELINE_LOOKS.items()]
    shown.append((_DEFAULTS_LOOK, defaults_variant()))
    if (best := _best_skfac(records, task)) is not None:
        look = _Look(label=best.title, color=_BEST_LOOK.color, line=_BEST_LOOK.line)
        shown.append((look, best))
    found = [(look, records.finals(task, variant)) for look, variant in shown]
    return [(look, runs) for look, runs in found if runs]


def _best_skfac(records: Records, task: str) -> Variant | None:
    ends = {}
    for history in HISTORIES:
        for every in UPDATE_EVERY:
            variant = Variant(
                optimizer="skfac", history=history, lag=1, update_every=every
            )
            end = median(map(final_loss, records.finals(task, variant)))
            if end is not None:
                ends[variant] = end
    return min(ends, key=ends.__getitem__) if ends else None


def _draw_task(
    title: str, curves: Sequence[tuple[_Look, list[Record]]], path: Path
) -> None:
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    by_step, by_seconds = figure.subplots(1, 2, sharey=True)
    for look, runs in curves:
        _add_curve(by_step, look, runs, column=0)
        _add_curve(by_seconds, look, runs, column=1)
    for axes in (by_step, by_seconds):
        _tidy(axes)
    by_step.set(xlabel="steps", ylabel="validation loss, log scale")
    by_seconds.set(xlabel="CPU seconds, without validation", xscale="symlog")
    by_step.legend(frameon=False, fontsize=9)
    figure.suptitle(f"{title}: medians of three seeds, lowest to highest shaded")
    figure.savefig(path, dpi=130)


def _add_curve(axes: Axes, look: _Look, runs: list[Record], *, column: int) -> None:
    # Runs of one variant are validated at the same steps; one that diverged ends early.
    points = list(zip(*(run["val_losses"] for run in runs), strict=False))
    points = [p for p in points if all(loss is not None for _, _, loss in p)]
    at = [statistics.median(point[column] for point in p) for p in points]
    losses = [[loss for _, _, loss in p] for p in points]
    middle = [statistics.median(found) for found in losses]
    axes.plot(at, middle, color=look.color, linestyle=look.line, label=look.label)
    axes.fill_between(
        at,
        [min(found) for found in losses],
        [max(found) for found in losses],
        color=look.color,
        alpha=0.12,
        linewidth=0,
    )


def _draw_freshness(records: Records, path: Path) -> None:
    figure = Figure(figsize=(13, 5.6), layout="constrained")
    grid = figure.subplots(len(UPDATE_EVERY), len(TASKS), sharex=True, sharey="col")
    for row, every in zip(grid, UPDATE_EVERY, strict=True):
        for axes, task in zip(row, TASKS, strict=True):
            for history in HISTORIES:
                _add_lags(axes, records, task, history, every)
            sgd_end = median(map(final_loss, records.finals(task, baseline("sgd"))))
            if sgd_end is not None:
                axes.axhline(sgd_end, color="black", linestyle=":", label="SGD")
            _tidy(axes)
            axes.set_xticks(range(len(LAGS)), list(map(str, LAGS)))
            axes.set_title(f"{TASKS[task].title}, every {every}")
    for axes in grid[-1]:
        axes.set_xlabel("lag in steps")
    for axes in grid[:, 0]:
        axes.set_ylabel("final validation loss")
    grid[0, 0].legend(frameon=False, fontsize=9)
    figure.suptitle("Final validation loss: medians of three seeds, lowest to highest")
    figure.savefig(path, dpi=130)


def _add_lags(
    axes: Axes, records: Records, task: str, history: History, every: int
) -> None:
    look = _HISTORY_LOOKS[history]
    at, middle, below, above = [], [], [], []
    for place, lag in enumerate(LAGS):
        variant = Variant(
            optimizer="skfac", history=history, lag=lag, update_every=every
        )
        losses = [final_loss(record) for record in records.finals(task, variant)]
        if (value := median(losses)) is None:
            continue
        at.append(place)
        middle.append(value)
        below.append(value - min(losses))
        above.append(min(max(losses), 10 * value) - value)
    axes.errorbar(
        at,
        middle,
        yerr=[below, above],
        color=look.color,
        linestyle=look.line,
        marker="o",
        markersize=4,
        capsize=3,
        label=look.label,
    )


def _tidy(axes: Axes) -> None:
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    subs = (1, 1.5, 2, 3, 5, 7) if high < 10 * low else (1, 2, 5)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
