"""Draws what the benchmarks of speed have measured."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt

mpl.use("Agg")

_LABELS = {
    "adamw": "AdamW",
    "muon": "Muon",
    "singd": "SINGD",
    "dense-kfac": "dense K-FAC",
}


def draw_steps(records: list[dict[str, Any]], path: Path) -> None:
    """Draw step times over SGD's, one group of bars for each model.

    Args:
        records: Results of `step.py`; those with 64 samples, an update every 10 steps
            and the default way to apply are drawn.
        path: PNG to write.
    """
    drawn = {"batch": 64, "update_every": 10, "apply": "auto"}
    chosen = [record for record in records if drawn.items() <= record.items()]
    names = [*_LABELS, "skfac"]
    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    room = 0.8 / len(names)
    for place, name in enumerate(names):
        key = "every 10" if name == "skfac" else name
        heights = [record["ratios_to_sgd"].get(key, 0) for record in chosen]
        centres = [
            i + (place - len(names) / 2 + 0.5) * room for i in range(len(chosen))
        ]
        label = "SKFAC, update_every=10" if name == "skfac" else _LABELS[name]
        bars = axes.bar(centres, heights, room, label=label)
        axes.bar_label(bars, fmt="%.3g", fontsize=7)
    axes.axhline(1, color="grey", linewidth=1)
    axes.set(yscale="log", ylabel="median step time over SGD's")
    axes.set_xticks(range(len(chosen)), [f"{r['model']} {r['width']}" for r in chosen])
    axes.set_ylim(top=4 * axes.get_ylim()[1])  # room for the legend
    axes.legend(ncols=len(names), fontsize=7, loc="upper center")
    axes.set_title("A training step, batch of 64, one core; the server on another")
    figure.savefig(path, dpi=120)
    plt.close(figure)
