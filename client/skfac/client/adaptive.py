"""Damping that follows how well the curvature predicts the loss.

Source: the Levenberg-Marquardt rule of Martens & Grosse, "Optimizing Neural Networks
with Kronecker-factored Approximate Curvature", ICML 2015, section 6.5. Deviations: the
curvature term of the prediction is its upper bound `lr² <P, ∇W>`, which needs no extra
pass; and since a new damping reaches the steps only with versions captured after it,
the rule waits for these before it judges again. Without that it would go on raising
the damping while the steps that it judges still use the old one.
"""

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from skfac.wire.errors import ConfigurationError
from skfac.wire.outcome import Version

_TRUSTED = 0.75
_DISTRUSTED = 0.25


class LevenbergMarquardt:
    """A schedule for `damping` that learns from the losses it is shown.

    Pass it as `damping=LevenbergMarquardt()` and show it a loss when
    `preconditioner.wants_losses` is true (see `Preconditioner.observe_losses`).
    It takes the ratio of the loss's decrease to the one that the quadratic model
    predicted for a plain gradient step: above 3/4 the damping is divided by `factor`,
    below 1/4 (or if the loss is not finite) multiplied by it. Momentum makes steps
    longer than the prediction knows: the ratio is too large by up to
    `1 / (1 - momentum)`.

    Args:
        start: First damping, above 0.
        every: Steps from one judgement to the next, at least 1. Each costs a forward.
        factor: How much one judgement changes it, above 1.
        least: Smallest damping, above 0.
        most: Largest damping.

    Raises:
        ConfigurationError: If a number is out of range.
    """

    def __init__(
        self,
        start: float = 0.03,
        *,
        every: int = 5,
        factor: float = 1.3,
        least: float = 1e-5,
        most: float = 10.0,
    ) -> None:
        if not 0 < least <= start <= most < math.inf:
            raise ConfigurationError(
                f"LevenbergMarquardt needs 0 < least <= start <= most, got least = "
                f"{least}, start = {start}, most = {most}."
            )
        if factor <= 1 or every < 1:
            raise ConfigurationError(
                f"LevenbergMarquardt needs factor > 1 and every >= 1, got {factor} and "
                f"{every}."
            )
        self._value = start
        self._every = every
        self._factor = factor
        self._least = least
        self._most = most
        self._changed_at = 0

    def __call__(self, step: int) -> float:
        """Give the damping of the snapshots that are captured now.

        Returns:
            λ.
        """
        return self._value

    def wants(self, step: int, oldest_version: int | None) -> bool:
        """Tell whether the step that was just taken can be judged.

        Args:
            step: It.
            oldest_version: Capture step of the oldest version that it used; None if a
                layer with a gradient had none.

        Returns:
            Whether its losses are asked for.
        """
        if oldest_version is None or oldest_version < self._changed_at:
            return False  # it used another damping than the one to be judged
        return step % self._every == 0

    def observe(self, step: int, *, decrease: float, predicted: float) -> None:
        """Judge a step by the decrease of the loss on its own batch."""
        ratio = decrease / predicted if predicted > 0 else math.nan
        if ratio > _TRUSTED:
            value = max(self._value / self._factor, self._least)
        elif not ratio >= _DISTRUSTED:  # NaN, too
            value = min(self._value * self._factor, self._most)
        else:
            return
        if value != self._value:
            self._value = value
            self._changed_at = step + 1

    def state_dict(self) -> dict[str, Any]:
        """Copy what later judgements depend on.

        Returns:
            Plain numbers.
        """
        return {"value": self._value, "changed_at": self._changed_at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was called."""
        self._value, self._changed_at = state["value"], state["changed_at"]


def oldest_step(versions: Iterable[Version | None]) -> int | None:
    """Find the oldest of some versions.

    Returns:
        Its capture step; None if one is missing, or there are none.
    """
    steps = [None if version is None else version.step for version in versions]
    known = [step for step in steps if step is not None]
    return min(known, default=None) if len(known) == len(steps) else None


def difference(before: float | Tensor, after: float | Tensor) -> float:
    """Tell how far a loss fell.

    Returns:
        `before - after`.
    """
    first, second = (
        float(loss.detach()) if isinstance(loss, Tensor) else loss
        for loss in (before, after)
    )
    return first - second
