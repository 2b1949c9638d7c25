"""What a trainer can set: plain data, validated once, never changed afterwards."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch

from skfac.curvature.damping import DampingSplit
from skfac.wire.errors import ConfigurationError
from skfac.wire.session import OnLate

Schedule = float | Callable[[int], float]
"""A hyper-parameter: a constant, or a function of the step that starts at 0."""

WIRE_DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True, kw_only=True)
class PreconditionerConfig:
    """Everything about a `Preconditioner` but its model, optimizer and target.

    Attributes:
        damping: λ > 0, added to the Kronecker product of each layer's two factors. A
            constant or a function of the step.
        damping_split: `"pi"` weighs the factors by their mean eigenvalues, `"equal"`
            gives both √λ as the authors of SKFAC do.
        update_every: Steps between two snapshots. At least 1.
        lag: Steps from a snapshot to the first use of its preconditioners; the service
            has that long to answer. 0 waits for the answer in the same step.
        wait_s: Seconds that a step waits for a version that is due and not there. A
            server that was waited for in vain is not waited for again until it speaks.
        on_late: `"keep"` goes on with the previous version when `wait_s` is over,
            `"wait"` waits for ever, `"raise"` raises `LateVersionError`.
        max_staleness: Steps after which a version is too old; the raw gradient is used
            then, under the same trust region. At least `update_every + lag`.
        history: Rows a factor is made of: `"snapshot"` takes those of one update.
            (`"window"` and `"ema"` are not built yet.)
        window: Updates of `history="window"`. (Not built yet.)
        decay: β of `history="window"` and `"ema"`. (Not built yet.)
        rank: Most rows of a factor, None for no limit. (Not built yet.)
        energy: Share of a factor's trace that is kept. (Below 1 not built yet.)
        reduction: How positions of a convolution or sequence become rows: `"reduce"`
            averages inputs and sums derivatives. (Others are not built yet.)
        positions: Positions that `reduction="subsample"` keeps. (Not built yet.)
        trust: `"kl"` bounds each step's change of the model's output. (`"graft"` and
            `"none"` are not built yet.)
        kl_clip: κ > 0 of `trust="kl"`. A constant or a function of the step.
        apply: `"gradient"` preconditions weight gradients; `"auto"` chooses.
            (`"row"` is not built yet, so `"auto"` is `"gradient"`.)
        skip: Patterns (as in `fnmatch`) of layer names to leave alone, silently.
        grad_scaler: The trainer's GradScaler. (Not built yet.)
        accumulation_steps: Backward passes before each step. (Above 1 not built yet.)
        process_group: Ranks that train together. (Not built yet.)
        job: Names the run at the server; None makes up a name of its own.
        credentials: TLS and token for the server. (Not built yet.)
        wire_dtype: `"float32"` or `"float64"`: of rows and inverses. (16-bit types are
            not built yet.)

    Raises:
        ConfigurationError: If a value is out of range, unknown or not built yet.
    """

    damping: Schedule = 0.03
    damping_split: DampingSplit = "pi"
    update_every: int = 10
    lag: int = 1
    wait_s: float = 5.0
    on_late: OnLate = "keep"
    max_staleness: int = 1000
    history: Literal["snapshot"] = "snapshot"
    window: int = 10
    decay: float = 0.95
    rank: int | None = None
    energy: float = 1.0
    reduction: Literal["reduce"] = "reduce"
    positions: int | None = None
    trust: Literal["kl"] = "kl"
    kl_clip: Schedule = 1e-3
    apply: Literal["auto", "gradient"] = "auto"
    skip: tuple[str, ...] = ()
    grad_scaler: None = None
    accumulation_steps: int = 1
    process_group: None = None
    job: str | None = None
    credentials: None = None
    wire_dtype: Literal["float32", "float64"] = "float32"

    def __post_init__(self) -> None:
        self._check_built()
        for name in ("damping", "kl_clip"):
            value = getattr(self, name)
            if not callable(value):
                _check_positive(name, value)
        for name, least in (("update_every", 1), ("lag", 0), ("max_staleness", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ConfigurationError(
                    f"{name} must be a whole number of steps from {least} on, got "
                    f"{value!r}."
                )
        if not (isinstance(self.wait_s, (int, float)) and self.wait_s >= 0):
            raise ConfigurationError(f"wait_s must be 0 or more, got {self.wait_s!r}.")
        if self.max_staleness < self.update_every + self.lag:
            raise ConfigurationError(
                f"max_staleness = {self.max_staleness} is less than update_every + lag "
                f"= {self.update_every + self.lag}: even versions in time would be "
                "too old."
            )
        if isinstance(self.skip, str):
            object.__setattr__(self, "skip", (self.skip,))

    def _check_built(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices.built:
                raise ConfigurationError(_not_built(name, value, choices))
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in _DEFAULT_ONLY and value != field.default:
                raise ConfigurationError(
                    f"{field.name}={value!r} is not built yet; this version of skfac "
                    f"only knows {field.name}={field.default!r}."
                )

    def damping_at(self, step: int) -> float:
        """Evaluate the damping.

        Returns:
            λ of this step.

        Raises:
            ConfigurationError: If a schedule gives a value that is not positive.
        """
        return _value_at("damping", self.damping, step)

    def kl_clip_at(self, step: int) -> float:
        """Evaluate the trust region.

        Returns:
            κ of this step.

        Raises:
            ConfigurationError: If a schedule gives a value that is not positive.
        """
        return _value_at("kl_clip", self.kl_clip, step)

    @classmethod
    def of(cls, settings: dict[str, Any]) -> "PreconditionerConfig":
        """Build a configuration from keywords.

        Returns:
            The validated configuration.

        Raises:
            ConfigurationError: If a keyword is unknown or a value is wrong.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(settings.keys() - set(known))
        if unknown:
            raise ConfigurationError(
                f"There is no setting {unknown[0]!r}; the settings are "
                f"{', '.join(known)}."
            )
        return cls(**settings)


@dataclass(frozen=True)
class _Choices:
    built: tuple[str, ...]
    planned: tuple[str, ...] = ()


_CHOICES = {
    "damping_split": _Choices(("pi", "equal")),
    "on_late": _Choices(("keep", "wait", "raise")),
    "history": _Choices(("snapshot",), ("window", "ema")),
    "reduction": _Choices(("reduce",), ("authors", "subsample", "expand")),
    "trust": _Choices(("kl",), ("graft", "none")),
    "apply": _Choices(("auto", "gradient"), ("row",)),
    "wire_dtype": _Choices(tuple(WIRE_DTYPES), ("float16", "bfloat16")),
}
_DEFAULT_ONLY = {
    "window",
    "decay",
    "rank",
    "energy",
    "positions",
    "grad_scaler",
    "accumulation_steps",
    "process_group",
    "credentials",
}


def check_target(target: object) -> str:
    """Check where the engine is meant to run.

    Args:
        target: What the trainer passed.

    Returns:
        `"embedded"`, `"host:port"` or `"unix:path"`.

    Raises:
        ConfigurationError: If it is none of these.
    """
    built = "This version of skfac takes 'embedded', 'host:port' or 'unix:path'."
    if not isinstance(target, str):
        raise ConfigurationError(f"Targets like {target!r} are not built yet. {built}")
    if target == "embedded":
        return target
    scheme, _, rest = target.partition(":")
    if scheme == "unix":
        if not rest.removeprefix("//").startswith(os.sep):
            raise ConfigurationError(f"{target!r} needs an absolute path. {built}")
        return target
    if "://" in target:
        raise ConfigurationError(f"Targets like {target!r} are not built yet. {built}")
    host, _, port = target.rpartition(":")
    if not (host and port.isdigit() and 0 < int(port) < 65536):
        raise ConfigurationError(f"{target!r} is not a target. {built}")
    return target


def _value_at(name: str, schedule: Schedule, step: int) -> float:
    if not callable(schedule):
        return schedule
    value = schedule(step)
    _check_positive(f"{name} at step {step}", value)
    return value


def _check_positive(name: str, value: object) -> None:
    if not (isinstance(value, (int, float)) and value > 0 and math.isfinite(value)):
        raise ConfigurationError(f"{name} must be positive and finite, got {value!r}.")


def _not_built(name: str, value: object, choices: _Choices) -> str:
    built = " or ".join(map(repr, choices.built))
    if value in choices.planned:
        return (
            f"{name}={value!r} is not built yet; this version of skfac offers {built}."
        )
    return f"{name} must be {built}, got {value!r}."
