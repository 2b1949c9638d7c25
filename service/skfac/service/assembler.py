"""Collects the rows of all ranks for each (layer, step) of one session."""

from dataclasses import dataclass, field

from torch import Tensor

from skfac.curvature.settings import CurvatureSettings
from skfac.wire.errors import SessionMismatchError
from skfac.wire.session import SessionSpec
from skfac.wire.snapshot import LayerRows, Snapshot, SnapshotHeader


@dataclass(eq=False)
class Assembly:
    """Rows of one (layer, step), rank by rank.

    Attributes:
        layer: Index in the session's layers.
        step: Capture step.
        started_s: When the first rows came.
        rows: Rows by rank.
        settings: How the rows are weighed and damped, by rank.
    """

    layer: int
    step: int
    started_s: float
    rows: dict[int, LayerRows] = field(default_factory=dict)
    settings: dict[int, CurvatureSettings] = field(default_factory=dict)

    @property
    def agreed(self) -> CurvatureSettings:
        """The settings that count: the lowest rank's."""
        return self.settings[min(self.settings)]

    @property
    def count(self) -> int:
        """Examples of all ranks."""
        return sum(rows.count for rows in self.rows.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return sum(rows.nbytes for rows in self.rows.values())

    @property
    def sides(self) -> tuple[list[Tensor], list[Tensor]]:
        """Activations and derivatives of each rank, in the order of the ranks.

        They are not to be modified.
        """
        rows = [self.rows[rank] for rank in sorted(self.rows)]
        return [one.activations for one in rows], [one.derivatives for one in rows]


class Assembler:
    """Turns the snapshots of the ranks into complete assemblies.

    An assembly is complete when all ranks' rows are in, or `timeout_s` after the first
    with those that came. Rows that are here already, or whose assembly has left, are
    ignored: resending is always safe.

    Attributes:
        nbytes: Bytes of the rows that wait for other ranks.
        waiting: Their number, one for each layer, rank and step.
    """

    def __init__(self, spec: SessionSpec, *, timeout_s: float) -> None:
        self.nbytes = 0
        self._spec = spec
        self._timeout_s = timeout_s
        self._open: dict[tuple[int, int], Assembly] = {}
        self._seen: dict[int, dict[int, tuple[int, ...]]] = {}  # rank -> layer -> steps
        self._length = spec.versions_in_flight + 1
        self.waiting = 0
        self._left: dict[int, int] = {}  # layer -> newest step that was handed on

    @property
    def deadline_s(self) -> float | None:
        """When the oldest assembly times out; None if nothing waits."""
        starts = (assembly.started_s for assembly in self._open.values())
        oldest = min(starts, default=None)
        return None if oldest is None else oldest + self._timeout_s

    def completes(self, header: SnapshotHeader) -> bool:
        """Tell whether rows are of assemblies that wait for them.

        Returns:
            Whether all of them are.
        """
        return all((rows.layer, header.step) in self._open for rows in header.layers)

    def wants(self, header: SnapshotHeader) -> bool:
        """Check the order of a rank's steps.

        Returns:
            Whether any of its rows are new.

        Raises:
            SessionMismatchError: If rows are new and older than the rank's newest.
        """
        new = [rows for rows in header.layers if self._is_new(header, rows.layer)]
        for rows in new:
            steps = self._steps(header.rank, rows.layer)
            if steps and header.step < steps[-1]:
                name = self._spec.layers[rows.layer].name
                raise SessionMismatchError(
                    f"Rank {header.rank} pushed step {header.step} of layer {name!r} "
                    f"after step {steps[-1]}; steps must not go backwards."
                )
        return bool(new)

    def add(self, snapshot: Snapshot, now_s: float) -> list[Assembly]:
        """Take a snapshot that is wanted.

        Returns:
            The assemblies that it completed.
        """
        complete = []
        for rows in snapshot.layers:
            if not self._is_new(snapshot, rows.layer):
                continue
            self._remember(snapshot.rank, rows.layer, snapshot.step)
            key = rows.layer, snapshot.step
            if key not in self._open and snapshot.step <= self._left.get(key[0], -1):
                continue  # solved without this rank after the timeout
            assembly = self._open.setdefault(key, Assembly(*key, started_s=now_s))
            assembly.rows[snapshot.rank] = rows
            assembly.settings[snapshot.rank] = snapshot.settings
            self.nbytes += rows.nbytes
            self.waiting += 1
            if len(assembly.rows) == self._spec.world_size:
                complete.append(self._hand_on(assembly))
        return complete

    def drop(self, snapshot: Snapshot) -> list[int]:
        """Expect no rows any more of what a rank's bad snapshot is part of.

        Returns:
            The layers that will have no rows of its step, then.
        """
        dropped = []
        for rows in snapshot.layers:
            layer, step = rows.layer, snapshot.step
            found = self._open.get((layer, step))
            if found is not None:
                self._hand_on(found)
            elif step <= self._left.get(layer, -1):
                continue  # solved without this rank after the timeout
            self._left[layer] = max(step, self._left.get(layer, -1))
            dropped.append(layer)
        return dropped

    def expired(self, now_s: float) -> list[Assembly]:
        """Give up waiting for ranks that are too late.

        Returns:
            The assemblies whose time is over, as they are, oldest step first.
        """
        over = [
            a for a in self._open.values() if a.started_s + self._timeout_s <= now_s
        ]
        return [self._hand_on(a) for a in sorted(over, key=lambda a: (a.step, a.layer))]

    def _is_new(self, header: SnapshotHeader | Snapshot, layer: int) -> bool:
        return header.step not in self._steps(header.rank, layer)

    def _steps(self, rank: int, layer: int) -> tuple[int, ...]:
        return self._seen.get(rank, {}).get(layer, ())

    def _remember(self, rank: int, layer: int, step: int) -> None:
        # As many as a client may send again after a broken stream.
        steps = (*self._steps(rank, layer), step)
        self._seen.setdefault(rank, {})[layer] = steps[-self._length :]

    def _hand_on(self, assembly: Assembly) -> Assembly:
        del self._open[assembly.layer, assembly.step]
        self.nbytes -= assembly.nbytes
        self.waiting -= len(assembly.rows)
        newest = max(assembly.step, self._left.get(assembly.layer, -1))
        self._left[assembly.layer] = newest
        return assembly
