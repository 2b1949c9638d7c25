"""Numeric settings: their ranges, and schedules of them."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from skfac.wire.errors import ConfigurationError

Schedule = float | Callable[[int], float]
"""A number: a constant, or a function of the step that starts at 0."""

IntSchedule = int | Callable[[int], int]
"""A whole number: a constant, or a function of the step that starts at 0."""


@dataclass(frozen=True)
class _Range:
    text: str
    whole: bool
    holds: Callable[[float], bool]
    optional: bool = False

    def __contains__(self, value: object) -> bool:
        if value is None:
            return self.optional
        kinds = (int,) if self.whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds):
            return False
        return math.isfinite(value) and self.holds(value)


_POSITIVE = _Range("positive and finite", False, lambda value: value > 0)
_COUNT = _Range("a whole number from 1 on", True, lambda value: value >= 1)

_RANGES = {
    "damping": _POSITIVE,
    "kl_clip": _POSITIVE,
    "wait_s": _Range("a number of seconds from 0 on", False, lambda value: value >= 0),
    "decay": _Range("from 0 to below 1", False, lambda value: 0 <= value < 1),
    "energy": _Range("above 0 and at most 1", False, lambda value: 0 < value <= 1),
    "update_every": _COUNT,
    "lag": _Range("a whole number from 0 on", True, lambda value: value >= 0),
    "max_staleness": _COUNT,
    "window": _COUNT,
    "rank": _Range("a whole number from 1 on, or None", True, lambda v: v >= 1, True),
    "positions": _COUNT,
    "accumulation_steps": _COUNT,
    "resolve_every_s": _POSITIVE,
}


def check_number(name: str, value: object, where: str = "") -> None:
    """Check a constant, or one value of a schedule; other settings are not checked.

    Raises:
        ConfigurationError: If it is out of the range of the setting `name`.
    """
    allowed = _RANGES.get(name)
    if allowed is not None and value not in allowed:
        raise ConfigurationError(
            f"{name}{where} must be {allowed.text}, got {value!r}."
        )


def number_at(name: str, value: Schedule | IntSchedule | None, step: int) -> float:
    """Evaluate a setting at a step.

    Returns:
        The constant, or what the schedule gives; infinity for None, no limit.

    Raises:
        ConfigurationError: If the schedule gives a value out of range.
    """
    if not callable(value):
        return math.inf if value is None else float(value)
    found: float | None = value(step)
    check_number(name, found, f" at step {step}")
    return math.inf if found is None else float(found)
