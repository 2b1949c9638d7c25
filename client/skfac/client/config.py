"""What a trainer can set: plain data, validated once, never changed afterwards."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch.distributed import ProcessGroup

from skfac.client.handles import ActorTarget
from skfac.client.numbers import IntSchedule, Schedule, check_number, number_at
from skfac.curvature.damping import DampingSplit
from skfac.curvature.positions import Reduction
from skfac.curvature.settings import CurvatureSettings, History
from skfac.curvature.trust import Trust
from skfac.wire.credentials import Credentials
from skfac.wire.errors import ConfigurationError
from skfac.wire.pool import pool_of
from skfac.wire.session import OnLate

WIRE_DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True, kw_only=True)
class PreconditionerConfig:
    """Everything about a `Preconditioner` but its model, optimizer and target.

    Numbers marked (schedule) are a constant or a function of the step, which starts
    at 0; a schedule is asked at each step that needs it.

    Attributes:
        damping: λ > 0, added to the Kronecker product of each layer's two factors
            (schedule). A `LevenbergMarquardt` adapts it while training. Where a factor
            has no inverse in the dtype of its rows, the engine tries 10, 100 and 1000
            times as much, which is said, counted (`overdamped`) and reported.
        damping_split: `"equal"` gives both factors √λ as the authors of SKFAC do,
            `"pi"` weighs them by their mean eigenvalues.
        update_every: Steps between two snapshots, at least 1 (schedule, asked at each
            snapshot for the distance to the next one).
        lag: Steps from a snapshot to the first use of its preconditioners; the service
            has that long to answer. 0 waits for the answer in the same step. Fixed for
            a run: both ends size their queues by it.
        wait_s: Seconds that a step waits for a version that is due and not there
            (schedule). A server that was waited for in vain is not waited for again
            until it speaks.
        on_late: `"keep"` goes on with the previous version when `wait_s` is over,
            `"wait"` waits for ever, `"raise"` raises `LateVersionError`.
        max_staleness: Steps after which a version is too old; the raw gradient is used
            then, under the same trust region. At least `update_every + lag`
            (schedule).
        history: Rows a factor is made of: `"snapshot"` takes those of one update,
            `"window"` those of the last `window` updates, `"ema"` of all, the older
            the lighter. docs/history.md says how.
        window: Updates of `history="window"`, at least 1 (schedule).
        decay: β of `history="window"` and `"ema"`: what an update keeps of the ones
            before it, from 0 to below 1 (schedule).
        rank: Most directions that a factor is kept in, None for no limit (schedule).
            What is cut off still counts as damping.
        energy: Share of a factor's trace that its inverse keeps, in (0, 1]; the rest
            counts as damping (schedule).
        reduction: How positions of a convolution or sequence become rows: `"reduce"`
            averages inputs and sums derivatives, `"authors"` averages both,
            `"subsample"` takes `positions` of them, `"expand"` all.
        positions: Positions that `reduction="subsample"` keeps, at least 1 (schedule).
        loss_reduction: Whether the loss is a `"mean"` or a `"sum"` over the batch.
        fisher: `"empirical"` takes the derivatives of the training loss, as SKFAC
            does; `"monte_carlo"` takes those that `capture_from` is given.
        trust: `"kl"` bounds each step's change of the model's output, `"graft"` gives
            each layer's step the length of its raw gradient, `"none"` does nothing.
        kl_clip: κ > 0 of `trust="kl"` (schedule).
        apply: Where fully connected layers are preconditioned: `"row"` turns the rows
            inside the backward, `"gradient"` the gradient after it, `"auto"` takes
            what costs less for each layer, by its first forward of a step. The results
            are the same.
        skip: Patterns (as in `fnmatch`) of layer names to leave alone, silently.
        grad_scaler: The trainer's `torch.amp.GradScaler`. `step` unscales the
            gradients unless that has been done.
        accumulation_steps: Backward passes before each step, each of a mean that is
            divided by as many, or of a sum as it is.
        process_group: Ranks that train one model together, with gradients averaged
            over them (`DistributedDataParallel` or an all-reduce of one's own); None
            for all processes of `torch.distributed`, if it is in use.
        resolve_every_s: Seconds between two lookups of the names among the targets
            (`"dns:///name:port"`), above 0; every two seconds at the latest while a
            server is not connected. Servers that come or go change the map of the
            layers at the next snapshot (docs/servers.md).
        job: Names the run at the server; None makes up a name of its own.
        credentials: TLS and a token for servers (`Credentials`); None for none.
        wire_dtype: `"float32"` or `"float64"`: of rows and inverses. (16-bit types are
            not built yet.)

    Raises:
        ConfigurationError: If a value is out of range, unknown or not built yet.
    """

    damping: Schedule = 0.03
    damping_split: DampingSplit = "equal"
    update_every: IntSchedule = 2
    lag: int = 1
    wait_s: Schedule = 5.0
    on_late: OnLate = "keep"
    max_staleness: IntSchedule = 1000
    history: History = "snapshot"
    window: IntSchedule = 10
    decay: Schedule = 0.95
    rank: IntSchedule | None = 256
    energy: Schedule = 1.0
    reduction: Reduction = "reduce"
    positions: IntSchedule = 4
    loss_reduction: Literal["mean", "sum"] = "mean"
    fisher: Literal["empirical", "monte_carlo"] = "empirical"
    trust: Trust = "kl"
    kl_clip: Schedule = 0.15
    apply: Literal["auto", "gradient", "row"] = "auto"
    skip: tuple[str, ...] = ()
    grad_scaler: torch.amp.GradScaler | None = None
    accumulation_steps: int = 1
    process_group: ProcessGroup | None = None
    resolve_every_s: float = 30.0
    job: str | None = None
    credentials: Credentials | None = None
    wire_dtype: Literal["float32", "float64"] = "float32"

    def __post_init__(self) -> None:
        self._check_choices()
        for field in fields(self):
            value = getattr(self, field.name)
            if not callable(value) or field.name in _CONSTANT:
                check_number(field.name, value)
        constants = self.update_every, self.max_staleness
        if all(isinstance(value, int) for value in constants):
            self.max_staleness_at(0)
        if self.apply == "row" and self.lag == 0:
            raise ConfigurationError(
                "apply='row' preconditions inside the backward and needs versions "
                "before it ends: set lag to 1 or more, or apply='auto'."
            )
        if isinstance(self.skip, str):
            object.__setattr__(self, "skip", (self.skip,))

    def _check_choices(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices.built:
                raise ConfigurationError(_not_built(name, value, choices))
        if not (self.job is None or (isinstance(self.job, str) and self.job)):
            raise ConfigurationError(
                f"job must be a name, or None for one that is made up: {self.job!r}."
            )
        if not isinstance(self.credentials, Credentials | None):
            kind = type(self.credentials).__name__  # not the value: it may be a token
            raise ConfigurationError(
                f"credentials must be a skfac.client.Credentials, got a {kind}."
            )
        if not isinstance(self.process_group, ProcessGroup | None):
            raise ConfigurationError(
                "process_group must be a group of torch.distributed, got "
                f"{self.process_group!r}."
            )
        if not isinstance(self.grad_scaler, torch.amp.GradScaler | None):
            raise ConfigurationError(
                f"grad_scaler must be a torch.amp.GradScaler, got {self.grad_scaler!r}."
            )

    def curvature_at(self, step: int) -> CurvatureSettings:
        """Evaluate what travels with the snapshot of a step.

        Returns:
            Its settings.

        Raises:
            ConfigurationError: If a schedule gives a value out of range.
        """
        rank = self.at("rank", step)
        return CurvatureSettings(
            damping=self.at("damping", step),
            decay=self.at("decay", step),
            window=int(self.at("window", step)),
            rank=None if math.isinf(rank) else int(rank),
            energy=self.at("energy", step),
        )

    def max_staleness_at(self, step: int) -> int:
        """Evaluate the age at which a version is too old.

        Returns:
            Steps.

        Raises:
            ConfigurationError: If versions in time would be too old.
        """
        limit = int(self.at("max_staleness", step))
        update_every = int(self.at("update_every", step))
        if limit < update_every + self.lag:
            raise ConfigurationError(
                f"max_staleness = {limit} is less than update_every + lag = "
                f"{update_every + self.lag}: even versions in time would be too old."
            )
        return limit

    def at(self, name: str, step: int) -> float:
        """Evaluate a number.

        Args:
            name: One of the attributes above that are marked (schedule).
            step: The step.

        Returns:
            Its value at that step.

        Raises:
            ConfigurationError: If a schedule gives a value out of range.
        """
        return number_at(name, getattr(self, name), step)

    @property
    def least_update_every(self) -> int:
        """The smallest distance between snapshots that has to be reckoned with."""
        return 1 if callable(self.update_every) else self.update_every

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


_CONSTANT = {"lag", "accumulation_steps", "resolve_every_s"}
_CHOICES = {
    "damping_split": _Choices(("pi", "equal")),
    "on_late": _Choices(("keep", "wait", "raise")),
    "history": _Choices(("snapshot", "window", "ema")),
    "reduction": _Choices(("reduce", "authors", "subsample", "expand")),
    "loss_reduction": _Choices(("mean", "sum")),
    "fisher": _Choices(("empirical", "monte_carlo")),
    "trust": _Choices(("kl", "graft", "none")),
    "apply": _Choices(("auto", "gradient", "row")),
    "wire_dtype": _Choices(tuple(WIRE_DTYPES), ("float16", "bfloat16")),
}


def check_targets(targets: Sequence[str]) -> None:
    """Check where engines are meant to run.

    Raises:
        ConfigurationError: If one is no target, or the embedded engine is one of
            several.
    """
    for target in targets:
        check_target(target)
    if len(targets) > 1 and "embedded" in targets:
        raise ConfigurationError(
            "'embedded' is the engine of this process alone: it cannot be one of "
            f"several targets, {', '.join(targets)}."
        )


def check_target(target: object) -> str:
    """Check where the engine is meant to run.

    Args:
        target: What the trainer passed.

    Returns:
        `"embedded"`, `"host:port"`, `"unix:path"`, `"ray://namespace/pool"`, its actor
        `"ray://namespace/pool/index"`, or an `ActorTarget`.

    Raises:
        ConfigurationError: If it is none of these.
    """
    built = (
        "A target is 'embedded', 'host:port', 'unix:/path', 'dns:///name:port', "
        "'ray://namespace/pool', the handle of a Ray actor, or a list of them."
    )
    if isinstance(target, ActorTarget):
        return target
    if not isinstance(target, str):
        raise ConfigurationError(f"{target!r} is not a target. {built}")
    if target == "embedded":
        return target
    scheme, _, rest = target.partition(":")
    if scheme == "unix":
        if not rest.removeprefix("//").startswith(os.sep):
            raise ConfigurationError(f"{target!r} needs an absolute path. {built}")
        return target
    if scheme == "ray":
        try:
            pool_of(target)
        except ConfigurationError as error:
            raise ConfigurationError(f"{error} {built}") from None
        return target
    host, _, port = target.rpartition(":")
    if "://" in target or not (host and port.isdigit()):
        raise ConfigurationError(f"{target!r} is not a target. {built}")
    if not 0 < int(port) < 65536:
        raise ConfigurationError(f"{target!r} needs a port from 1 to 65535. {built}")
    return target


def _not_built(name: str, value: object, choices: _Choices) -> str:
    built = " or ".join(map(repr, choices.built))
    if value in choices.planned:
        return (
            f"{name}={value!r} is not built yet; this version of skfac offers {built}."
        )
    return f"{name} must be {built}, got {value!r}."
