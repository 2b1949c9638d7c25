"""Versions of each layer: expected, arrived, in use; and the rules of time.

A version is applied from its capture step + `lag` on, and no earlier. Only the newest
version that is due counts: one that is still missing is looked for again at each step
until a newer one is due.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence

from skfac.client.checkpoint import StoreState
from skfac.client.link import Link
from skfac.client.notices import Notices
from skfac.client.proposal import Agreement, Proposal
from skfac.client.roster import Roster
from skfac.client.step_log import StepLog
from skfac.client.usable import is_usable
from skfac.wire.errors import (
    LateVersionError,
    ServerUnavailableError,
    ServiceError,
)
from skfac.wire.outcome import Loss, LossReason, Outcome, Version
from skfac.wire.session import SessionSpec

logger = logging.getLogger(__name__)


class Store:
    """What a trainer knows of its preconditioners.

    Transports report through a `Link` from their threads; the trainer's thread calls
    the rest. With several servers each layer's version is expected of one of them.

    Attributes:
        counts: What happened so far: `solved` and each reason of a loss, by layer and
            version; `late` versions that missed their deadline; `corrupt` ones that
            were refused here; `unexpected` ones that nobody asked for; `unlike` ones
            that not all ranks have alike, and none uses; `history_losses` of layers
            whose server forgot earlier updates; `overdamped` versions with more damping
            than was asked for; `waits` of a step and `vain_waits` among them.
        waited_s: Time that steps spent waiting.
    """

    def __init__(
        self,
        spec: SessionSpec,
        servers: int = 1,
        prepare: Callable[[Version], Outcome] = lambda version: version,
    ) -> None:
        self._spec = spec
        self._prepare = prepare  # in the transport's thread
        self._changed = threading.Condition()
        self._expected: dict[int, list[Outcome | None]] = {}
        self._in_use: list[Version | None] = [None] * len(spec.layers)
        self._of_server: dict[int, Sequence[int]] = {}  # step -> server of each layer
        self._doubted: set[int] = set()  # steps that some rank gets no version of
        self._roster = Roster(servers)
        self._said: set[tuple[int | None, LossReason]] = set()
        self.counts: Counter[str] = Counter()
        self._notices = Notices(spec.layers, self.counts)
        self.waited_s = 0.0

    # ---------------------------------------------------------------- links

    def link(self, server: int, log: StepLog | None = None) -> "Link":
        """Give a transport what it reports to.

        Returns:
            The face of this store for one server, which may be a new one.
        """
        with self._changed:
            self._roster.add(server)
        return Link(self, server, log)

    def retire(self, server: int) -> None:
        """Take a server out; what it owes may come for as long as it is connected."""
        with self._changed:
            self._roster.retire(server)
            self._lose_gone()

    def give_up_on(self, servers: Sequence[int]) -> None:
        """Tell which servers will not be back once they are not connected any more."""
        with self._changed:
            self._roster.give_up_on(servers)
            self._lose_gone()

    def owes(self, server: int) -> bool:
        """Tell whether anything that is expected of a server is missing.

        Returns:
            Whether it is.
        """
        with self._changed:
            return any(self._missing(step, server) for step in self._expected)

    def receive(self, server: int, outcomes: list[Outcome]) -> list[int]:
        """See `Link.receive`.

        Returns:
            The steps among them that nothing is missing of any more.
        """
        checked = [self._checked(outcome) for outcome in outcomes]
        with self._changed:
            self._roster.hear(server)
            for outcome in checked:
                slots = self._expected.get(outcome.step)
                known = outcome.layer < len(self._spec.layers)
                if slots is None or not known or slots[outcome.layer] is not None:
                    if isinstance(outcome, Version) or slots is None or not known:
                        self.counts["unexpected"] += 1  # a loss may be told twice
                    continue
                slots[outcome.layer] = outcome
                self._count(outcome)
            self._changed.notify_all()
            steps = sorted({outcome.step for outcome in outcomes})
            return [c for c in steps if not self._missing(c, server)]

    def lose(self, server: int, step: int, reason: LossReason, message: str) -> None:
        """See `Link.lose`."""
        with self._changed:
            self._lose(server, step, reason, message)

    def set_link(self, server: int, *, up: bool) -> None:
        """See `Link.set_link`."""
        with self._changed:
            self._roster.set_link(server, up=up)
            self._lose_gone()

    def fail(self, server: int, error: ServiceError) -> None:
        """See `Link.fail`."""
        with self._changed:
            self._roster.fail(server, error)
            self._changed.notify_all()

    def held(self, server: int) -> dict[int, int]:
        """See `Link.held`.

        Returns:
            Steps by layer.
        """
        with self._changed:
            here: list[Outcome | None] = [*self._in_use]
            for row in self._expected.values():
                here += row
            newest: dict[int, int] = {}
            for o in (outcome for outcome in here if outcome is not None):
                newest[o.layer] = max(newest.get(o.layer, -1), o.step)
            for step in self._expected:
                for layer in self._missing(step, server):
                    newest[layer] = min(newest.get(layer, -1), step - 1)
        return {layer: step for layer, step in newest.items() if step >= 0}

    # ---------------------------------------------------------------- trainer

    @property
    def links(self) -> list[bool]:
        """Whether each server in use is connected, in the order of their numbers."""
        return self._roster.links

    @property
    def failure(self) -> ServiceError | None:
        """Why no server will ever answer; None while one may."""
        return self._roster.failure

    @property
    def in_use(self) -> list[Version | None]:
        """The version of each layer that the latest step used."""
        return list(self._in_use)

    def await_links(self, timeout_s: float) -> bool:
        """Wait for the first answer of every server.

        Returns:
            Whether any is connected.

        Raises:
            ServiceError: If all refuse this trainer.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._roster.all_known, timeout_s)
            if self.failure is not None:
                raise self.failure
            return any(self.links)

    def expect(
        self, step: int, servers: Sequence[int] | None = None, *, hoped: bool = True
    ) -> None:
        """Declare that a snapshot of all layers is captured.

        Args:
            step: The step.
            servers: Who is to answer for each layer; None if there is only one.
            hoped: Whether a version may come to all ranks; if not, nobody waits for it
                under `on_late="keep"`.
        """
        with self._changed:
            if not hoped:
                self._doubted.add(step)
            self._expected[step] = [None] * len(self._spec.layers)
            self._of_server[step] = servers or [0] * len(self._spec.layers)

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
            return Proposal(
                newest,
                wait_s,
                on_time,
                alive=self.failure is None,
                settled=tuple(outcome is not None for outcome in row),
                here=tuple(map(self._identity, row)),
            )

    def adopt(self, proposal: Proposal, least: Sequence[int]) -> None:
        """Use what all ranks have alike, and from now on.

        Args:
            proposal: That of this rank.
            least: The minimum of its `numbers` over all ranks.

        Raises:
            LateVersionError: Under `on_late="raise"`, if a version missed its deadline.
            ServiceError: Under `on_late="wait"` or `"raise"`, if no server will answer.
        """
        agreed = proposal.agreed(least)
        with self._changed:
            row = self._expected[proposal.step]
            for layer, outcome in enumerate(row):
                if agreed.usable[layer]:
                    assert isinstance(outcome, Version)
                    self._in_use[layer] = outcome
                elif agreed.unlike[layer]:
                    self._drop(layer, proposal.step)
            for old in [c for c in self._expected if c <= proposal.step]:
                if old < proposal.step or all(agreed.settled):
                    del self._expected[old], self._of_server[old]
                    self._doubted.discard(old)
            if proposal.on_time:
                self._look_for_late(agreed, proposal.wait_s)

    def settle(self, timeout_s: float) -> StoreState:
        """Wait for everything that is expected, then copy what is there.

        Returns:
            All versions.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: not any(map(self._hoped_for, self._expected)), timeout_s
            )
            expected = {step: list(row) for step, row in self._expected.items()}
            return StoreState(list(self._in_use), expected)

    def restore(self, state: StoreState) -> None:
        """Go on from a checkpoint; what it still expected counts as lost."""
        with self._changed:
            self._in_use = list(state.in_use)
            self._expected = {step: list(row) for step, row in state.expected.items()}
            self._of_server = {c: [0] * len(self._in_use) for c in self._expected}
            for step, row in self._expected.items():
                for layer, outcome in enumerate(row):
                    if outcome is None:
                        text = "The run was resumed from a checkpoint."
                        row[layer] = lost = Loss(layer, step, "superseded", text)
                        self._count(lost)

    # ---------------------------------------------------------------- inside

    def _look_for_late(self, agreed: Agreement, wait_s: float) -> None:
        missing = agreed.settled.count(False)
        if not missing:
            return
        self.counts["late"] += missing
        if self._spec.on_late == "keep":
            return
        if self._roster.first_failure is not None:
            raise self._roster.first_failure
        if not agreed.alive:
            raise ServerUnavailableError("No server answers another rank any more.")
        raise LateVersionError(
            f"{missing} of {len(agreed.settled)} layers have no version after wait_s = "
            f"{wait_s:g} s, lag = {self._spec.lag} steps after their snapshot."
        )

    def _wait_for(self, step: int, wait_s: float) -> None:
        row, policy = self._expected[step], self._spec.on_late
        if None not in row or (policy == "keep" and step in self._doubted):
            return
        self.counts["waits"] += 1
        began_s = time.monotonic()
        if policy == "keep":
            self._changed.wait_for(lambda: not self._hoped_for(step), wait_s)
        else:
            limit_s = None if policy == "wait" else wait_s
            self._changed.wait_for(lambda: self._is_settled(step), limit_s)
        self.waited_s += time.monotonic() - began_s
        if None in row:
            self.counts["vain_waits"] += 1
            there = self._roster.connected
            self._roster.fall_silent(s for s in there if self._missing(step, s))

    def _lose(self, server: int, step: int, reason: LossReason, message: str) -> None:
        for layer in self._missing(step, server):
            self._expected[step][layer] = lost = Loss(layer, step, reason, message)
            self._count(lost)
        self._changed.notify_all()

    def _lose_gone(self) -> None:
        for server in self._roster.lost:
            for step in self._expected:
                self._lose(server, step, "gone", "Its server has left.")
        self._changed.notify_all()

    def _missing(self, step: int, server: int) -> list[int]:
        # Layers whose outcome this server owes.
        slots = zip(
            self._expected.get(step, ()), self._of_server.get(step, ()), strict=True
        )
        return [
            layer
            for layer, (outcome, owner) in enumerate(slots)
            if outcome is None and owner == server
        ]

    def _hoped_for(self, step: int) -> bool:
        # Whether an outcome may come soon: its server is there and not silent.
        return step not in self._doubted and any(
            self._missing(step, server) for server in self._roster.hopeful
        )

    def _is_settled(self, step: int) -> bool:
        # Nothing more will ever come.
        return not any(self._missing(step, server) for server in self._roster.possible)

    def _count(self, outcome: Outcome) -> None:
        if isinstance(outcome, Version):
            self.counts["solved"] += 1
            self._said -= {s for s in self._said if s[0] in (None, outcome.layer)}
            self._notices.look(outcome)
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

    def _drop(self, layer: int, step: int) -> None:
        self.counts["unlike"] += 1
        text = (
            "Its server was restarted and solved it again, of the rows that were left."
        )
        self._expected[step][layer] = lost = Loss(layer, step, "failed", text)
        self._count(lost)

    def _identity(self, outcome: Outcome | None) -> int:
        if not isinstance(outcome, Version):
            return 0
        return outcome.fingerprint if self._spec.world_size > 1 else 1

    def _checked(self, outcome: Outcome) -> Outcome:
        # A server that is wrong must not change the model: such a version is lost.
        if isinstance(outcome, Loss) or outcome.layer >= len(self._spec.layers):
            return outcome
        layer = self._spec.layers[outcome.layer]
        if is_usable(outcome.preconditioner, layer):
            self._identity(outcome)  # kept: here it costs the trainer's thread nothing
            return self._prepare(outcome)
        self.counts["corrupt"] += 1
        text = f"The server sent an unusable inverse of layer {layer.name!r}."
        return Loss(outcome.layer, outcome.step, "failed", text)
