"""Writes the tables of docs/convergence.md from the record."""

import re
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from benchmarks.study.plan import (
    HISTORIES,
    LAGS,
    UPDATE_EVERY,
    Variant,
    defaults_variant,
    variants,
)
from benchmarks.study.records import Record, Records, final_loss, median
from benchmarks.study.tasks import TASKS

_NOTHING = "-"


def fill(page: Path, records: Records) -> None:
    """Replace what is between the markers of each table.

    Args:
        page: Has `<!-- table: NAME -->` and `<!-- end -->` around each.
        records: What the tables show.

    Raises:
        ValueError: If the page has no place for a table, or for one that is unknown.
    """
    text = page.read_text()
    names = re.findall(r"<!-- table: (.+?) -->", text)
    if sorted(names) != sorted(_TABLES):
        raise ValueError(
            f"{page} has places for the tables {sorted(names)}, but they are "
            f"{sorted(_TABLES)}: mark a place with <!-- table: NAME --> and "
            "<!-- end -->."
        )
    for name, table in _TABLES.items():
        marker = f"<!-- table: {name} -->"
        pattern = rf"{re.escape(marker)}\n.*?<!-- end -->"
        filled = f"{marker}\n\n{table(records)}\n\n<!-- end -->"
        # A function, since backslashes in a text would mean something.
        text = re.sub(pattern, partial(_constant, filled), text, flags=re.DOTALL)
    page.write_text(text)


def _constant(text: str, _: re.Match[str]) -> str:
    return text


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def _losses(records: Records) -> str:
    rows = []
    for variant in _shown(records):
        cells = [_loss_cell(records, task, variant) for task in TASKS]
        rows.append([variant.title, *cells])
    return _markdown(["", *_titles()], rows)


def _steps(records: Records) -> str:
    rows = []
    for variant in _shown(records):
        cells = [_steps_cell(records, task, variant) for task in TASKS]
        rows.append([variant.title, *cells])
    return _markdown(["", *_titles()], rows)


def _seconds(records: Records) -> str:
    rows = []
    for variant in _shown(records):
        found = [records.finals(task, variant) for task in TASKS]
        cells = [
            f"{statistics.median(r['seconds'] for r in runs):.1f}" if runs else _NOTHING
            for runs in found
        ]
        rows.append([variant.title, *cells])
    return _markdown(["", *_titles()], rows)


def _freshness(records: Records) -> str:
    header = ["", *(f"every {e}, lag {lag}" for e in UPDATE_EVERY for lag in LAGS)]
    rows = []
    for task in TASKS:
        for history in HISTORIES:
            cells = [
                _loss_cell(
                    records,
                    task,
                    Variant(
                        optimizer="skfac",
                        history=history,
                        lag=lag,
                        update_every=every,
                    ),
                )
                for every in UPDATE_EVERY
                for lag in LAGS
            ]
            rows.append([f"{TASKS[task].title}, {history}", *cells])
    return _markdown(header, rows)


def _settings(records: Records) -> str:
    groups = dict.fromkeys(variant.group for variant in variants())
    rows = []
    for group in groups:
        cells = [_settings_cell(records, task, group) for task in TASKS]
        rows.append([group.title, *cells])
    return _markdown(["", *_titles()], rows)


def _verdict(records: Records) -> str:
    """Say of every task whether the library's defaults do what they should.

    Returns:
        A table: half of AdamW's steps, and never worse than SGD.
    """
    rows = []
    for task, shown in TASKS.items():
        runs = records.finals(task, defaults_variant())
        if not runs:
            rows.append([shown.title, *[_NOTHING] * 4])
            continue
        reached, steps = _median_steps(runs), runs[0]["steps"]
        end, sgd_end = median(map(final_loss, runs)), runs[0]["sgd_final_val_loss"]
        rows.append(
            [
                shown.title,
                _NOTHING if reached is None else f"{reached:.0f} of {steps}",
                _yes(reached is not None and 2 * reached <= steps),
                f"{_number(end)}, SGD {_number(sgd_end)}",
                _yes(end is not None and (sgd_end is None or end <= sgd_end)),
            ]
        )
    header = ["", "steps to AdamW's best", "at most half", "final loss", "not worse"]
    return _markdown(header, rows)


_TABLES: dict[str, Callable[[Records], str]] = {
    "verdict": _verdict,
    "losses": _losses,
    "steps": _steps,
    "seconds": _seconds,
    "freshness": _freshness,
    "settings": _settings,
}


def _titles() -> list[str]:
    return [task.title for task in TASKS.values()]


def _shown(records: Records) -> list[Variant]:
    # Every baseline, the defaults, and each history at the lag it was tuned with.
    return [variant for variant in variants() if variant == variant.group]


def _loss_cell(records: Records, task: str, variant: Variant) -> str:
    runs = records.finals(task, variant)
    if not runs:
        return _NOTHING
    losses = [final_loss(record) for record in runs]
    middle = median(losses)
    if middle is None:
        return "diverged"
    cell = f"{_number(middle)} ({_number(min(losses))} to {_number(max(losses))})"
    sgd_end = runs[0]["sgd_final_val_loss"]
    worse = sgd_end is not None and middle > sgd_end
    return f"{cell} ▼" if worse else cell


def _steps_cell(records: Records, task: str, variant: Variant) -> str:
    runs = records.finals(task, variant)
    if not runs:
        return _NOTHING
    reached = _median_steps(runs)
    return "never" if reached is None else f"{reached:.0f}"


def _settings_cell(records: Records, task: str, group: Variant) -> str:
    best = records.best(task, group)
    if best is None:
        return _NOTHING
    shown = {k: v for k, v in best.items() if k not in ("library", "defaults", "rank")}
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def _median_steps(runs: Sequence[Record]) -> float | None:
    never = float("inf")
    steps = [r["steps_to_adamw_best"] for r in runs]
    return median(never if step is None else step for step in steps)


def _number(value: float | None) -> str:
    if value is None:
        return "not finite"
    return f"{value:.1f}" if value >= 10 else f"{value:.3f}"


def _yes(fulfilled: bool) -> str:
    return "yes" if fulfilled else "**no**"
