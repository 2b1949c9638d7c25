"""What came out of each run, in one file that is never half written."""

import json
import math
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.study.plan import (
    TUNE_SEED,
    Settings,
    Trial,
    Variant,
    baseline,
    settings_of,
)

Record = dict[str, Any]


class Records:
    """All runs that were done.

    Args:
        path: The file, which need not exist.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._records: list[Record] = []
        if path.exists():
            self._records = json.loads(path.read_text())
        self._by_key = {_frozen(record): record for record in self._records}

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def of(self, trial: Trial) -> Record | None:
        """Look up a run.

        Returns:
            Its record, or None if it has not been done.
        """
        return self._by_key.get(_frozen(trial.key()))

    def add(self, trial: Trial, outcome: Record) -> None:
        """Keep what came out of a run, in the file as well.

        Args:
            trial: The run.
            outcome: `steps`, `val_losses`, `final_val_loss`, `seconds`, `diverged`.
        """
        record = trial.key() | outcome
        record |= {"steps_to_adamw_best": None, "sgd_final_val_loss": None}
        self._records.append(record)
        self._by_key[_frozen(record)] = record
        self.write()

    def write(self) -> None:
        """Replace the file at once, so that a reader never sees half of it."""
        lines = ",\n".join(json.dumps(r, allow_nan=False) for r in self._records)
        written = self._path.with_suffix(".part")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        written.write_text(f"[\n{lines}\n]\n")
        written.replace(self._path)

    def best(self, task: str, group: Variant) -> Settings | None:
        """Choose the settings whose tuning run ended lowest.

        Args:
            task: Where.
            group: A variant at the lag it was tuned with.

        Returns:
            The first of the best ones; None while a trial of the group is missing.
        """
        trials = [
            Trial(
                task=task,
                variant=group,
                settings=settings,
                seed=TUNE_SEED,
                stage="tune",
            )
            for settings in settings_of(group)
        ]
        found = [self.of(trial) for trial in trials]
        ends = [math.inf if r is None else final_loss(r) for r in found]
        if any(record is None for record in found) or not math.isfinite(min(ends)):
            return None
        return trials[ends.index(min(ends))].settings

    def finals(self, task: str, variant: Variant) -> list[Record]:
        """Look up the final runs of the settings that are the best by now.

        Returns:
            One record per seed that was run, by seed.
        """
        settings = self.best(task, variant.group)
        wanted = {
            "task": task,
            "optimizer": variant.optimizer,
            "history": variant.history,
            "lag": variant.lag,
            "update_every": variant.update_every,
            "stage": "final",
            "settings": settings,
        }
        found = [r for r in self._records if wanted.items() <= r.items()]
        return sorted(found, key=lambda record: record["seed"])

    def compare(self) -> None:
        """Fill in `steps_to_adamw_best` and `sgd_final_val_loss` everywhere."""
        for task in {record["task"] for record in self._records}:
            adamw = self.finals(task, baseline("adamw"))
            sgd = self.finals(task, baseline("sgd"))
            target = median(map(best_loss, adamw))
            sgd_end = median(map(final_loss, sgd))
            for record in self._records:
                if record["task"] == task:
                    record["steps_to_adamw_best"] = steps_to(record, target)
                    record["sgd_final_val_loss"] = sgd_end
        self.write()


def final_loss(record: Record) -> float:
    """Read how a run ended.

    Returns:
        Its last validation loss; infinity if it was not finite.
    """
    loss = record["final_val_loss"]
    return math.inf if loss is None else float(loss)


def best_loss(record: Record) -> float:
    """Find the lowest validation loss on the way.

    Returns:
        It; infinity if none was finite.
    """
    losses = [loss for _, _, loss in record["val_losses"] if loss is not None]
    return min(losses, default=math.inf)


def steps_to(record: Record, target: float | None) -> int | None:
    """Find when a run first reached a loss.

    Args:
        record: Of the run.
        target: The loss; None for one that is not known.

    Returns:
        The step of the first validation at or below it; None if there is none.
    """
    if target is None:
        return None
    for step, _, loss in record["val_losses"]:
        if loss is not None and loss <= target:
            return int(step)
    return None


def median(values: Iterable[float]) -> float | None:
    """Take the median of losses or steps, of which a run that failed has infinity.

    Returns:
        It; None if there is none or it is not finite, as JSON has no infinity.
    """
    middle = statistics.median([*values] or [math.inf])
    return middle if math.isfinite(middle) else None


_KEY = ("task", "optimizer", "history", "lag", "update_every", "seed")


def _frozen(record: Record) -> str:
    key = {name: record[name] for name in (*_KEY, "settings")}
    return json.dumps(key, sort_keys=True)
