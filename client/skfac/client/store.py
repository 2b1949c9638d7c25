"""Versions of each layer: expected, arrived, in use; and the rules of time.

A version is applied from its capture step + `lag` on, and no earlier. Only the newest
version that is due counts: one that is still missing is looked for again at each step
until a newer one is due.
"""

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from skfac.curvature.inverse import FactorInverse
from skfac.wire.errors import (
    LateVersionError,
    ServerUnavailableError,
    ServiceError,
)
from skfac.wire.outcome import Loss, LossReason, Outcome, Version
from skfac.wire.session import LayerSpec, SessionSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Proposal:
    """What one rank would use now, for all ranks to agree on.

    Attributes:
        step: Capture step of the versions in question.
        on_time: Whether this is their deadline.
        flags: Whether a server may still answer; for each layer whether its version is
            here; for each layer whether nothing more is to be expected.
    """

    step: int
    on_time: bool
    flags: tuple[bool, ...]


@dataclass(frozen=True, eq=False)
class StoreState:
    """All versions of a store, as a checkpoint holds them.

    Attributes:
        in_use: The version of each layer that steps use.
        expected: Capture step -> the outcome of each layer; None if none came yet.
    """

    in_use: list[Version | None]
    expected: dict[int, list[Outcome | None]]


class Store:
    """What a trainer knows of its preconditioners.

    Transports call `receive`, `lose`, `set_link` and `fail` from their threads; the
    trainer's thread calls the rest.

    Attributes:
        counts: What happened so far: `solved` and each reason of a loss, by layer and
            version; `late` versions that missed their deadline; `corrupt` ones that
            were refused here; `unexpected` ones that nobody asked for; `history_losses`
            of layers whose server forgot earlier updates; `waits` of a
            step and `vain_waits` among them.
        waited_s: Time that steps spent waiting.
    """

    def __init__(self, spec: SessionSpec) -> None:
        self._spec = spec
        self._changed = threading.Condition()
        self._expected: dict[int, list[Outcome | None]] = {}
        self._in_use: list[Version | None] = [None] * len(spec.layers)
        self._link_up = False
        self._silent = False  # waited for in vain, and nothing was heard since
        self._failure: ServiceError | None = None
        self._said: set[tuple[int | None, LossReason]] = set()
        self._updates = [0] * len(spec.layers)
        self.counts: Counter[str] = Counter()
        self.waited_s = 0.0

    # ---------------------------------------------------------------- transports

    def receive(self, outcomes: list[Outcome]) -> list[int]:
        """Take what a server published; what nobody expects is counted and dropped.

        Returns:
            The steps among them that nothing is missing of any more.
        """
        checked = [self._checked(outcome) for outcome in outcomes]
        with self._changed:
            self._silent = False
            for outcome in checked:
                slots = self._expected.get(outcome.step)
                known = outcome.layer < len(self._spec.layers)
                if slots is None or not known or slots[outcome.layer] is not None:
                    self.counts["unexpected"] += 1
                    continue
                slots[outcome.layer] = outcome
                self._count(outcome)
            self._changed.notify_all()
            steps = {outcome.step for outcome in outcomes}
            return [c for c in sorted(steps) if None not in self._expected.get(c, [])]

    def lose(self, step: int, reason: LossReason, message: str) -> None:
        """Give up what is missing of a step: no server will answer it."""
        with self._changed:
            slots = self._expected.get(step, [])
            for layer, outcome in enumerate(slots):
                if outcome is None:
                    slots[layer] = lost = Loss(layer, step, reason, message)
                    self._count(lost)
            self._changed.notify_all()

    def set_link(self, *, up: bool) -> None:
        """Tell whether a server is connected; nobody waits for one that is not."""
        with self._changed:
            self._link_up = up
            self._silent = False
            self._changed.notify_all()

    def fail(self, error: ServiceError) -> None:
        """Tell that no server will ever take this trainer's snapshots."""
        with self._changed:
            self._failure = error
            self._changed.notify_all()

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Turn a bug in a transport's thread into a failure that is said and counted.

        Yields:
            Nothing.
        """
        try:
            yield
        except Exception as error:
            logger.exception("The transport failed; no more versions will come.")
            self.set_link(up=False)
            self.fail(ServerUnavailableError(f"{type(error).__name__}: {error}"))

    def newest(self) -> dict[int, int]:
        """Find the newest version that is here, in use or waiting for its step.

        Returns:
            Its step by layer; layers without any are absent.
        """
        with self._changed:
            here: list[Outcome | None] = [*self._in_use]
            for row in self._expected.values():
                here += row
        held: dict[int, int] = {}
        for outcome in here:
            if outcome is not None:
                held[outcome.layer] = max(held.get(outcome.layer, -1), outcome.step)
        return held

    # ---------------------------------------------------------------- trainer

    @property
    def link_up(self) -> bool:
        """Whether a server is connected."""
        return self._link_up

    @property
    def failure(self) -> ServiceError | None:
        """Why no server will ever answer; None while one may."""
        return self._failure

    @property
    def in_use(self) -> list[Version | None]:
        """The version of each layer that the latest step used."""
        return list(self._in_use)

    def await_link(self, timeout_s: float) -> bool:
        """Wait for the first answer of a server.

        Returns:
            Whether one is connected.

        Raises:
            ServiceError: If it refuses this trainer.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._link_up or self._failure, timeout_s)
            if self._failure is not None:
                raise self._failure
            return self._link_up

    def expect(self, step: int) -> None:
        """Declare that a snapshot of all layers is captured at `step`."""
        with self._changed:
            self._expected[step] = [None] * len(self._spec.layers)

    def propose(self, step: int, wait_s: float) -> Proposal | None:
        """Find what may be used from a step on, waiting for what is just due.

        Args:
            step: The trainer's step; must not decrease.
            wait_s: Seconds that it may wait.

        Returns:
            What is due and not decided yet; None, on all ranks alike, if nothing is.
        """
        with self._changed:
            due = [c for c in self._expected if c + self._spec.lag <= step]
            if not due:
                return None
            newest = max(due)
            on_time = newest + self._spec.lag == step
            if on_time:
                self._wait_for(newest, wait_s)
            row = self._expected[newest]
            here = [isinstance(outcome, Version) for outcome in row]
            settled = [outcome is not None for outcome in row]
            flags = (self._failure is None, *here, *settled)
            return Proposal(newest, on_time, flags)

    def adopt(self, proposal: Proposal, agreed: Sequence[bool]) -> None:
        """Use what all ranks have, and from now on.

        Args:
            proposal: That of this rank.
            agreed: Its flags where they are set on every rank.

        Raises:
            LateVersionError: Under `on_late="raise"`, if a version missed its deadline.
            ServiceError: Under `on_late="wait"` or `"raise"`, if no server will answer.
        """
        alive, *rest = agreed
        here, settled = rest[: len(self._in_use)], rest[len(self._in_use) :]
        with self._changed:
            row = self._expected[proposal.step]
            for layer, outcome in enumerate(row):
                if here[layer]:
                    assert isinstance(outcome, Version)
                    self._in_use[layer] = outcome
            for old in [c for c in self._expected if c <= proposal.step]:
                if old < proposal.step or all(settled):
                    del self._expected[old]
            if proposal.on_time:
                self._look_for_late(settled, alive=alive)

    def settle(self, timeout_s: float) -> StoreState:
        """Wait for everything that is expected, then copy what is there.

        Returns:
            All versions.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._settled() or not self._link_up, timeout_s
            )
            expected = {step: list(row) for step, row in self._expected.items()}
            return StoreState(list(self._in_use), expected)

    def restore(self, state: StoreState) -> None:
        """Go on from a checkpoint; what it still expected counts as lost."""
        with self._changed:
            self._in_use = list(state.in_use)
            self._expected = {step: list(row) for step, row in state.expected.items()}
        for step in state.expected:
            self.lose(step, "superseded", "The run was resumed from a checkpoint.")

    # ---------------------------------------------------------------- inside

    def _look_for_late(self, settled: Sequence[bool], *, alive: bool) -> None:
        missing = settled.count(False)
        if not missing:
            return
        self.counts["late"] += missing
        if self._spec.on_late == "keep":
            return
        if self._failure is not None:
            raise self._failure
        if not alive:
            raise ServerUnavailableError("No server answers another rank any more.")
        raise LateVersionError(
            f"{missing} of {len(settled)} layers have no version in time, lag = "
            f"{self._spec.lag} steps after their snapshot."
        )

    def _wait_for(self, step: int, wait_s: float) -> None:
        row, policy = self._expected[step], self._spec.on_late
        if None not in row:
            return
        self.counts["waits"] += 1
        began_s = time.monotonic()
        if policy == "wait":
            self._changed.wait_for(lambda: None not in row or self._failure)
        elif policy == "raise":
            self._changed.wait_for(lambda: None not in row or self._failure, wait_s)
        elif not self._silent:
            self._changed.wait_for(lambda: None not in row or not self._link_up, wait_s)
        self.waited_s += time.monotonic() - began_s
        if None in row:
            self.counts["vain_waits"] += 1
            self._silent = True

    def _count(self, outcome: Outcome) -> None:
        if isinstance(outcome, Version):
            self.counts["solved"] += 1
            self._said -= {s for s in self._said if s[0] in (None, outcome.layer)}
            self._check_history(outcome)
            return
        self.counts[outcome.reason] += 1
        # Said once, not at every step, until a version arrives again: of any layer, or
        # of this one where the others go on.
        idle = outcome.reason == "empty"
        what = (outcome.layer if idle else None), outcome.reason
        level = logging.DEBUG if what in self._said else logging.WARNING
        self._said.add(what)
        text = "The version of step %d is lost (%s): %s"
        logger.log(level, text, outcome.step, outcome.reason, outcome.message)

    def _check_history(self, version: Version) -> None:
        # A server that was restarted begins anew, which changes the curvature.
        before, self._updates[version.layer] = (
            self._updates[version.layer],
            version.updates,
        )
        if version.updates >= before:
            return
        self.counts["history_losses"] += 1
        logger.warning(
            "The history of layer %r has %d updates and had %d: the server was "
            "restarted, or its window made smaller.",
            self._spec.layers[version.layer].name,
            version.updates,
            before,
        )

    def _settled(self) -> bool:
        return all(None not in row for row in self._expected.values())

    def _checked(self, outcome: Outcome) -> Outcome:
        # A server that is wrong must not change the model: such a version is lost.
        if isinstance(outcome, Loss) or outcome.layer >= len(self._spec.layers):
            return outcome
        layer, both = self._spec.layers[outcome.layer], outcome.preconditioner
        pairs = (both.activations, layer.d_in), (both.derivatives, layer.d_out)
        if all(_is_usable(inverse, layer, dim) for inverse, dim in pairs):
            return outcome
        self.counts["corrupt"] += 1
        text = f"The server sent an unusable inverse of layer {layer.name!r}."
        return Loss(outcome.layer, outcome.step, "failed", text)


def _is_usable(inverse: FactorInverse, layer: LayerSpec, dim: int) -> bool:
    matrix = inverse.tensor
    groups = () if layer.groups == 1 else (layer.groups,)
    if matrix.ndim != len(groups) + 2 or matrix.shape[:-2] != groups:
        return False
    if (inverse.dim, matrix.shape[-1]) != (dim, dim):
        return False
    # A sum is one pass; of finite inverses it is far from overflowing.
    return inverse.damping > 0 and math.isfinite(float(matrix.sum()))
