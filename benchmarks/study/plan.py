"""What the study runs: every variant, its trials on one seed, the best on others."""

from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, Literal

from benchmarks.study.tasks import TASKS
from skfac.client import PreconditionerConfig
from skfac.curvature.settings import History

Settings = dict[str, Any]
Stage = Literal["tune", "final"]

TRIALS = 6
"""Settings that each group is tuned with; the same number for all."""

TUNE_SEED = 0
FINAL_SEEDS = (1, 2, 3)
"""None of them was tuned on."""

HISTORIES: tuple[History, ...] = ("snapshot", "window", "ema")
LAGS = (0, 1, 5, 20)
UPDATE_EVERY = (1, 10)
TUNE_LAG = 1

RANKS: dict[History, int | None] = {"snapshot": None, "window": None, "ema": 128}
WINDOW = 3
"""Both are of all SKFAC runs but those with the library's defaults."""

DEFAULTS_MOMENTUM = 0.5
"""Of the SGD below the library's defaults; it is not the library's to choose."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """An optimizer as the tables name it.

    Attributes:
        optimizer: Its name.
        history: Of SKFAC; None for others.
        lag: Steps until SKFAC uses a snapshot; 0 for the synchronous dense K-FAC.
        update_every: Steps between updates of the curvature.
        defaults: Whether this is SKFAC with the library's defaults, whatever they are.
    """

    optimizer: str
    history: History | None = None
    lag: int | None = None
    update_every: int | None = None
    defaults: bool = False

    @property
    def group(self) -> "Variant":
        """The variant whose tuning this one shares: its own, but at `TUNE_LAG`."""
        if self.history is None or self.defaults:
            return self
        return replace(self, lag=TUNE_LAG)

    @property
    def title(self) -> str:
        """How people read it."""
        if self.defaults:
            return "SKFAC, defaults"
        if self.history is not None:
            return f"SKFAC {self.history}, every {self.update_every}, lag {self.lag}"
        return _TITLES[self.optimizer]


_TITLES = {
    "sgd": "SGD",
    "adamw": "AdamW",
    "muon": "Muon",
    "soap": "SOAP",
    "singd": "SINGD",
    "dense-kfac": "dense K-FAC, synchronous",
}


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A run to be done."""

    task: str
    variant: Variant
    settings: Settings
    seed: int
    stage: Stage

    def key(self) -> Settings:
        """What its record is found by."""
        variant = self.variant
        return {
            "task": self.task,
            "optimizer": variant.optimizer,
            "history": variant.history,
            "lag": variant.lag,
            "update_every": variant.update_every,
            "seed": self.seed,
            "stage": self.stage,
            "settings": self.settings,
        }


def library_defaults() -> Settings:
    """Look up the defaults of the library.

    Returns:
        What can be written as JSON of them.
    """
    found = {
        field.name: field.default
        for field in fields(PreconditionerConfig)
        if field.default is not MISSING
    }
    plain = (int, float, str, bool)
    return {name: value for name, value in found.items() if isinstance(value, plain)}


def variants() -> list[Variant]:
    """List everything that is compared.

    Returns:
        Baselines, SKFAC with the library's defaults, and every other SKFAC.
    """
    return [
        *map(baseline, _TITLES),
        defaults_variant(),
        *(
            Variant(optimizer="skfac", history=history, lag=lag, update_every=every)
            for history in HISTORIES
            for every in UPDATE_EVERY
            for lag in LAGS
        ),
    ]


def baseline(optimizer: str) -> Variant:
    """Make the variant of an optimizer that is not SKFAC.

    Returns:
        It; those with factors update them at every step, and use them at once.
    """
    if optimizer in ("singd", "dense-kfac"):
        return Variant(optimizer=optimizer, lag=0, update_every=1)
    return Variant(optimizer=optimizer)


def defaults_variant() -> Variant:
    """Make the variant of the library's defaults.

    Returns:
        It, with the history and steps that these defaults mean today.
    """
    defaults = library_defaults()
    return Variant(
        optimizer="skfac",
        history=defaults["history"],
        lag=defaults["lag"],
        update_every=defaults["update_every"],
        defaults=True,
    )


def _grid(**choices: Iterable[object]) -> list[Settings]:
    grid: list[Settings] = [{}]
    for name, values in choices.items():
        grid = [{**settings, name: value} for settings in grid for value in values]
    return grid


_RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)

# What a step may change (kl_clip over damping) matters most, then the momentum. The
# first rows suit low-rank, fresh curvature, the last ones curvature of many updates,
# whose steps change the output far more for the same loss; in between are the cautious.
_KFAC: tuple[tuple[float, float, float, float, str], ...] = (
    (0.3, 0.5, 0.01, 0.15, "equal"),
    (0.1, 0.5, 0.03, 0.03, "pi"),
    (0.3, 0.5, 0.03, 0.1, "pi"),
    (0.3, 0.9, 0.1, 0.01, "pi"),
    (1.0, 0.5, 0.1, 30.0, "pi"),
    (1.0, 0.9, 0.03, 1.0, "pi"),
)
_KFAC_NAMES = ("lr", "momentum", "damping", "kl_clip", "damping_split")

_SETTINGS: dict[str, list[Settings]] = {
    "sgd": _grid(lr=_RATES, momentum=[0.9]),
    "adamw": [
        settings | {"betas": [0.9, settings["betas"]], "weight_decay": 0.0}
        for settings in _grid(lr=(0.003, 0.006, 0.015), betas=(0.999, 0.95))
    ],
    "muon": _grid(lr=(0.003, 0.01, 0.03), momentum=[0.95], adamw_lr=(0.003, 0.01)),
    "soap": [
        settings
        | {
            "betas": [settings["betas"], 0.95],
            "weight_decay": 0.0,
            "precondition_frequency": 10,
        }
        for settings in _grid(lr=(0.003, 0.01, 0.03), betas=(0.9, 0.95))
    ],
    "singd": _grid(
        lr=(0.003, 0.01, 0.03),
        damping=(0.003, 0.03),
        momentum=[0.9],
        adamw_lr=[0.003],
        lr_cov=[0.1],
        normalize_lr_cov=[True],
        kfac_approx=["reduce"],
        T=[1],
    ),
    "dense-kfac": [dict(zip(_KFAC_NAMES, row, strict=True)) for row in _KFAC],
    "skfac": [dict(zip(_KFAC_NAMES, row, strict=True)) for row in _KFAC],
}


def settings_of(variant: Variant) -> list[Settings]:
    """List the settings a group is tuned with.

    Returns:
        `TRIALS` of them.
    """
    if variant.history is None:
        return _SETTINGS[variant.optimizer]
    if not variant.defaults:
        fixed: Settings = {"rank": RANKS[variant.history]}
        if variant.history == "window":
            fixed["window"] = WINDOW
        return [settings | fixed for settings in _SETTINGS["skfac"]]
    defaults = library_defaults()
    return [
        {"defaults": True, "lr": lr, "momentum": DEFAULTS_MOMENTUM, "library": defaults}
        for lr in _RATES
    ]


Wanted = Callable[[str, Variant], bool]


def tuning(wanted: Wanted) -> list[Trial]:
    """List the trials of all groups that something wanted belongs to.

    Args:
        wanted: Whether a variant is wanted on a task.

    Returns:
        Trials on `TUNE_SEED`.
    """
    return [
        Trial(task=task, variant=group, settings=settings, seed=TUNE_SEED, stage="tune")
        for task, group in groups(wanted)
        for settings in settings_of(group)
    ]


def groups(wanted: Wanted) -> list[tuple[str, Variant]]:
    """List what is tuned.

    Args:
        wanted: Whether a variant is wanted on a task.

    Returns:
        Task and group of each, once.
    """
    pairs = [(task, v.group) for task in TASKS for v in variants() if wanted(task, v)]
    return list(dict.fromkeys(pairs))


def finals(
    wanted: Wanted, best: Callable[[str, Variant], Settings | None]
) -> list[Trial]:
    """List the runs of the best settings on the final seeds.

    Args:
        wanted: Whether a variant is wanted on a task.
        best: The best settings of a group on a task; None if it was not tuned.

    Returns:
        Trials; none of groups that were not tuned.
    """
    found = [
        (task, variant, best(task, variant.group))
        for task in TASKS
        for variant in variants()
        if wanted(task, variant)
    ]
    return [
        Trial(task=task, variant=variant, settings=settings, seed=seed, stage="final")
        for task, variant, settings in found
        if settings is not None
        for seed in FINAL_SEEDS
    ]
