"""What an engine keeps about one job."""

import math
from collections import Counter, deque

from skfac.service.assembler import Assembler
from skfac.service.config import EngineConfig
from skfac.service.engine import LatencySummary, LayerStatus, SessionStatus
from skfac.service.publisher import Publisher
from skfac.wire.codec import DTYPES
from skfac.wire.errors import InvalidRequestError, LimitExceededError, ServiceError
from skfac.wire.frames import payload_nbytes
from skfac.wire.session import LayerSpec, SessionSpec
from skfac.wire.snapshot import RowsHeader, SnapshotHeader

_LATENCIES_KEPT = 512


class Session:
    """The state of one session; the engine's lock guards it.

    Attributes:
        session_id: Its name in calls.
        spec: What the job declared.
        assembler: Rows that wait for other ranks.
        publisher: Outcomes for the subscribers.
        open_ranks: Ranks that have opened and not closed it.
        subscriptions: Open streams of outcomes.
        end: Why it was closed; None while it is open.
        last_seen_s: Time of the latest call.
        outcomes: How many (layer, step)s had which outcome.
        failing: Layers whose latest (layer, step) had no version.
        refused: Snapshots that were refused.
        latencies_s: The latest inversion latencies.
    """

    def __init__(
        self, session_id: str, spec: SessionSpec, config: EngineConfig, now_s: float
    ) -> None:
        self.session_id = session_id
        self.spec = spec
        self.assembler = Assembler(spec, timeout_s=config.assembly_timeout_s)
        self.publisher = Publisher(spec)
        self.open_ranks: set[int] = set()
        self.subscriptions = 0
        self.end: ServiceError | None = None
        self.last_seen_s = now_s
        self.outcomes: Counter[str] = Counter()
        self.failing: set[int] = set()
        self.refused = 0
        self.latencies_s: deque[float] = deque(maxlen=_LATENCIES_KEPT)
        self._opened_s = now_s
        self._config = config

    def check(self, header: SnapshotHeader) -> None:
        """Check what a snapshot declares, before memory is taken for it.

        Raises:
            InvalidRequestError: If the rank, damping, a layer, shape or dtype is wrong.
            LimitExceededError: If it is larger than a snapshot may be.
        """
        self.spec.check_rank(header.rank)
        if not (header.damping > 0 and math.isfinite(header.damping)):
            raise InvalidRequestError(
                f"The damping of step {header.step} must be positive and finite, "
                f"got {header.damping}."
            )
        declared = [rows.layer for rows in header.layers]
        if len(set(declared)) < len(declared):
            raise InvalidRequestError("A snapshot has rows of a layer twice.")
        for rows in header.layers:
            self._check_rows(rows)
        nbytes = payload_nbytes(header.tensors)
        if nbytes > self._config.max_snapshot_bytes:
            raise LimitExceededError(
                f"A snapshot of {nbytes} bytes is over max_snapshot_bytes = "
                f"{self._config.max_snapshot_bytes}."
            )

    def _check_rows(self, rows: RowsHeader) -> None:
        if not 0 <= rows.layer < len(self.spec.layers):
            raise InvalidRequestError(
                f"Layer index {rows.layer} is outside the session's "
                f"{len(self.spec.layers)} layers."
            )
        layer: LayerSpec = self.spec.layers[rows.layer]
        sides = (
            ("activations", rows.activations, layer.d_in),
            ("derivatives", rows.derivatives, layer.d_out),
        )
        for side, tensor, dim in sides:
            if len(tensor.shape) != 2 or tensor.shape[1] != dim:
                raise InvalidRequestError(
                    f"The {side} of layer {layer.name!r} have shape {tensor.shape}; "
                    f"expected (rows, {dim})."
                )
        if rows.activations.shape[0] != rows.derivatives.shape[0]:
            raise InvalidRequestError(
                f"Layer {layer.name!r} has {rows.activations.shape[0]} rows of "
                f"activations and {rows.derivatives.shape[0]} of derivatives."
            )
        if rows.activations.dtype not in DTYPES.values():
            raise InvalidRequestError(
                f"Layer {layer.name!r} has rows of dtype {rows.activations.dtype}; "
                "float32 and float64 are taken."
            )
        if rows.activations.dtype != rows.derivatives.dtype:
            raise InvalidRequestError(
                f"Layer {layer.name!r} has activations of {rows.activations.dtype} "
                f"and derivatives of {rows.derivatives.dtype}."
            )

    def lease_ends_s(self) -> float | None:
        """Tell when the session is dropped.

        Returns:
            The time, or None while somebody is subscribed.
        """
        return None if self.subscriptions else self.last_seen_s + self._config.lease_s

    def status(self, now_s: float, queued: int) -> SessionStatus:
        """Describe the session.

        Returns:
            What `skfac status` shows of it.
        """
        layers = []
        for index, layer in enumerate(self.spec.layers):
            newest = self.publisher.newest_version(index)
            step, rows = (newest.step, newest.rows) if newest else (None, 0)
            layers.append(LayerStatus(layer.name, step, rows))
        return SessionStatus(
            job=self.spec.job,
            world_size=self.spec.world_size,
            open_ranks=len(self.open_ranks),
            age_s=now_s - self._opened_s,
            layers=tuple(layers),
            solved=self.outcomes["solved"],
            superseded=self.outcomes["superseded"],
            failed=self.outcomes["failed"],
            refused=self.refused,
            queued=queued,
            inversion=_summary(sorted(self.latencies_s)),
        )


def _summary(ordered_s: list[float]) -> LatencySummary:
    if not ordered_s:
        return LatencySummary(0, 0.0, 0.0)

    def quantile(share: float) -> float:
        return ordered_s[min(int(share * len(ordered_s)), len(ordered_s) - 1)]

    return LatencySummary(len(ordered_s), quantile(0.5), quantile(0.99))
