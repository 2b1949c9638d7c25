"""Searches settings for the autoencoder of the examples, and compares the best ones.

Every run is added to the result file at once; a run that is in it already is skipped,
so that an interrupted search goes on where it was.
"""

import json
import math
import statistics
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from skfac.client import Preconditioner

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from autoencoder import autoencoding  # noqa: E402  # the example, put on the path above
from common.report import finite, result_of  # noqa: E402
from common.training import Task, train  # noqa: E402

Settings = dict[str, Any]
Record = dict[str, Any]

EPOCHS = 6
SEEDS = range(5)
EQUAL_TIME_EPOCHS = 18  # of AdamW; they take the seconds of SKFAC's 6
EQUAL_TIME_SEEDS = range(3)
SHORT_LIST = 2  # seed 0 alone does not tell which learning rate of two is better
SGD_RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
ADAMW_RATES = (0.0005, 0.001, 0.002, 0.004, 0.006, 0.01)

# A "linear" trust region shrinks from `kl_clip` to 0 as the learning rate does.
SKFAC: Settings = {
    "lr": 0.1,
    "momentum": 0.5,
    "update_every": 2,
    "lag": 1,
    "damping": 0.01,
    "damping_split": "equal",
    "kl_clip": 0.08,
    "kl_clip_schedule": "constant",
}
SKFAC_LINEAR = SKFAC | {"kl_clip_schedule": "linear"}
SKFAC_UPDATE_EVERY_1 = SKFAC_LINEAR | {"update_every": 1, "kl_clip": 0.15}
SKFAC_VARIANTS: tuple[Settings, ...] = (
    {},
    {"kl_clip": 0.02},
    {"kl_clip": 0.04},
    {"kl_clip": 0.15},
    {"momentum": 0.3},
    {"momentum": 0.7},
    {"damping": 0.02},
    {"damping_split": "pi"},
    {"update_every": 1, "kl_clip": 0.15},
)
SKFAC_LINEAR_VARIANTS: tuple[Settings, ...] = (
    {},
    {"kl_clip": 0.04},
    {"kl_clip": 0.15},
    {"damping": 0.003},
    {"damping": 0.02},
    {"damping_split": "pi"},
    {"kl_clip": 0.15, "momentum": 0.0},
    {"momentum": 0.3},
    {"kl_clip": 0.3, "momentum": 0.3},
    {"momentum": 0.7},
    {"momentum": 0.9},
    {"kl_clip": 0.01, "momentum": 0.9},
    {"lr": 0.3},
    {"lag": 2},
    {"lag": 3},
    {"update_every": 1},
    {"update_every": 1, "kl_clip": 0.15},
    {"update_every": 1, "kl_clip": 0.3},
    {"update_every": 1, "kl_clip": 0.15, "damping_split": "pi"},
    {"update_every": 3},
    {"update_every": 3, "kl_clip": 0.04},
    {"update_every": 5, "kl_clip": 0.04},
    {"update_every": 5, "kl_clip": 0.02},
    {"update_every": 10, "kl_clip": 0.02},
    {"update_every": 10, "kl_clip": 0.005},
)
TRIALS = (
    len(SGD_RATES)
    + len(ADAMW_RATES)
    + len(SKFAC_VARIANTS)
    + len(SKFAC_LINEAR_VARIANTS)
    + (2 * SHORT_LIST + 3) * len(SEEDS)
    + len(EQUAL_TIME_SEEDS)
)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A run to be done."""

    optimizer: str
    settings: Settings
    seed: int = 0
    epochs: int = EPOCHS


class Results:
    """The runs that were done, in a file of their own."""

    def __init__(self, path: Path, epoch_steps: int) -> None:
        self._path = path
        self._epoch_steps = epoch_steps
        self._records: list[Record] = []
        if path.exists():
            self._records = json.loads(path.read_text())

    def of(self, trial: Trial) -> Record | None:
        """Look up a run.

        Returns:
            Its record, or None if it has not been done.
        """
        key = self._key(trial)
        return next((r for r in self._records if key.items() <= r.items()), None)

    def add(self, trial: Trial, outcome: Record) -> None:
        """Keep the outcome of a run, in the file as well."""
        self._records.append(self._key(trial) | outcome)
        lines = ",\n".join(json.dumps(record) for record in self._records)
        written = self._path.with_suffix(".part")
        written.write_text(f"[\n{lines}\n]\n")
        written.replace(self._path)

    def _key(self, trial: Trial) -> Record:
        return {
            "optimizer": trial.optimizer,
            "settings": trial.settings,
            "seed": trial.seed,
            "steps": trial.epochs * self._epoch_steps,
        }

    def loss(self, trial: Trial) -> float:
        """Look up how good a run was that has been done.

        Returns:
            Its validation loss; infinity if it was not finite.
        """
        loss = self._record(trial)["val_loss"]
        return math.inf if loss is None else float(loss)

    def median(self, trials: list[Trial]) -> Record:
        """Summarize runs that differ by their seed, all of which have been done.

        Returns:
            Medians of the validation loss and of the seconds.
        """
        return {
            "median_val_loss": statistics.median(map(self.loss, trials)),
            "seeds": len(trials),
            "median_seconds": statistics.median(
                self._record(trial)["seconds"] for trial in trials
            ),
        }

    def _record(self, trial: Trial) -> Record:
        record = self.of(trial)
        assert record is not None, f"{trial} has not been done."
        return record


class Search:
    """What is to be done, some of which depends on what came out so far."""

    def __init__(self, results: Results) -> None:
        self._results = results
        self._grids = {
            "sgd": [
                Trial(optimizer="sgd", settings={"lr": lr, "momentum": 0.9})
                for lr in SGD_RATES
            ],
            "adamw": [
                Trial(optimizer="adamw", settings={"lr": lr}) for lr in ADAMW_RATES
            ],
            "skfac": [
                Trial(optimizer="skfac", settings=base | variant)
                for base, variants in (
                    (SKFAC, SKFAC_VARIANTS),
                    (SKFAC_LINEAR, SKFAC_LINEAR_VARIANTS),
                )
                for variant in variants
            ],
        }

    def trials(self) -> Iterator[Trial]:
        """List all trials; each is done before the next one is asked for.

        Yields:
            The grids, then what is best in them on all seeds.
        """
        for grid in self._grids.values():
            yield from grid
        for name in ("sgd", "adamw"):
            for trial in self._short_list(name):
                yield from _on_seeds(trial)
        for settings in (SKFAC, SKFAC_LINEAR, SKFAC_UPDATE_EVERY_1):
            yield from _on_seeds(Trial(optimizer="skfac", settings=settings))
        yield from self._adamw_equal_time()

    def medians(self) -> dict[str, Record]:
        """Compare the best, once all trials have been done.

        Returns:
            By what was compared, the medians over its seeds.
        """
        every_1 = Trial(optimizer="skfac", settings=SKFAC_UPDATE_EVERY_1)
        compared = {
            "sgd": self._best("sgd"),
            "adamw": self._best("adamw"),
            "adamw_equal_time": self._adamw_equal_time(),
            "skfac": _on_seeds(Trial(optimizer="skfac", settings=SKFAC)),
            "skfac_update_every_1": _on_seeds(every_1),
        }
        return {name: self._results.median(runs) for name, runs in compared.items()}

    def _short_list(self, name: str) -> list[Trial]:
        return sorted(self._grids[name], key=self._results.loss)[:SHORT_LIST]

    def _best(self, name: str) -> list[Trial]:
        finalists = map(_on_seeds, self._short_list(name))
        return min(
            finalists, key=lambda runs: self._results.median(runs)["median_val_loss"]
        )

    def _adamw_equal_time(self) -> list[Trial]:
        longer = replace(self._best("adamw")[0], epochs=EQUAL_TIME_EPOCHS)
        return _on_seeds(longer, EQUAL_TIME_SEEDS)


def _on_seeds(trial: Trial, seeds: Iterable[int] = SEEDS) -> list[Trial]:
    return [replace(trial, seed=seed) for seed in seeds]


def recipe(
    trial: Trial, steps: int, model: nn.Module
) -> tuple[Optimizer, Preconditioner | None]:
    """Make what a trial trains the model with."""
    settings = dict(trial.settings)
    if trial.optimizer == "adamw":
        return AdamW(model.parameters(), **settings), None
    lr, momentum = settings.pop("lr"), settings.pop("momentum")
    optimizer = SGD(model.parameters(), lr=lr, momentum=momentum)
    if trial.optimizer == "sgd":
        return optimizer, None
    kl_clip = settings["kl_clip"]
    if settings.pop("kl_clip_schedule") == "linear":
        settings["kl_clip"] = lambda step: kl_clip * (1 - step / steps)
    return optimizer, Preconditioner(model, optimizer, **settings)


def run(task: Task, trial: Trial) -> Record:
    """Do a trial.

    Returns:
        What is recorded of it.
    """
    build = partial(recipe, trial, trial.epochs * task.epoch_steps)
    result = result_of(train(task, build, epochs=trial.epochs, seed=trial.seed))
    return {
        "val_loss": finite(result.loss),
        "val_squared_error": finite(result.metric),
        "seconds": round(result.seconds, 3),
    }


def main(
    results: Annotated[
        Path, typer.Option(metavar="FILE.json", help="Where runs are kept.")
    ] = ROOT / "benchmarks" / "results" / "autoencoder_grid.json",
) -> None:
    """Search settings for the deep autoencoder and compare the best ones.

    SGD, AdamW and SKFAC each train examples/autoencoder.py's model with a grid of
    settings on seed 0, then with the two best (SKFAC: three recommended ones) on more
    seeds; AdamW also for as many epochs as take the seconds of SKFAC. Runs in the file
    are not done again. The last line printed is one JSON object with the medians of the
    validation loss. Nothing else should run meanwhile, or the seconds mean little.
    """
    task = autoencoding()
    done = Results(results, task.epoch_steps)
    search = Search(done)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        line = bar.add_task("autoencoder", total=TRIALS)
        for trial in search.trials():
            if done.of(trial) is None:
                done.add(trial, run(task, trial))
                bar.console.print_json(json.dumps(done.of(trial)), indent=None)
            bar.advance(line)
    print(json.dumps(search.medians()))


if __name__ == "__main__":
    typer.run(main)
