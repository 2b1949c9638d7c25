"""What an engine keeps about one job."""

from collections import Counter, deque
from collections.abc import Mapping

from skfac.curvature.finite import all_finite
from skfac.service.assembler import Assembler
from skfac.service.config import EngineConfig
from skfac.service.engine import LayerStatus, SessionStatus
from skfac.service.histories import Histories
from skfac.service.publisher import Publisher
from skfac.service.stages import summary
from skfac.wire.errors import InvalidRequestError, LimitExceededError, ServiceError
from skfac.wire.frames import payload_nbytes
from skfac.wire.messages import DTYPES
from skfac.wire.outcome import Version
from skfac.wire.session import MAX_WINDOW, LayerSpec, SessionSpec
from skfac.wire.snapshot import RowsHeader, Snapshot, SnapshotHeader

_LATENCIES_KEPT = 512


class Session:
    """The state of one session; the engine's lock guards it.

    Attributes:
        session_id: Its name in calls.
        spec: What the job declared.
        assembler: Rows that wait for other ranks.
        histories: Earlier updates of the layers.
        publisher: Outcomes for the subscribers.
        open_ranks: Ranks that have opened and not closed it.
        subscriptions: Open streams of outcomes.
        end: Why it was closed; None while it is open.
        last_seen_s: Time of the latest call.
        newest_step: The newest step that rows have come of; -1 for none.
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
        self.histories = Histories(spec, max_bytes=config.max_history_bytes)
        self.publisher = Publisher(spec)
        self.open_ranks: set[int] = set()
        self.subscriptions = 0
        self.end: ServiceError | None = None
        self.last_seen_s = now_s
        self.newest_step = -1
        self.outcomes: Counter[str] = Counter()
        self.failing: set[int] = set()
        self.refused = 0
        self.latencies_s: deque[float] = deque(maxlen=_LATENCIES_KEPT)
        self._pushed_s: dict[int, float] = {}
        self._opened_s = now_s
        self._config = config

    def check(self, header: SnapshotHeader) -> None:
        """Check what a snapshot declares, before memory is taken for it.

        Raises:
            InvalidRequestError: If the rank, window, a layer, shape or dtype is wrong.
            SessionMismatchError: If it is not newer than an imported history.
            LimitExceededError: If it is larger than a snapshot may be, or the histories
                would be.
        """
        self.spec.check_rank(header.rank)
        if header.settings.window > MAX_WINDOW:
            raise InvalidRequestError(
                f"The window of step {header.step} is {header.settings.window}; at "
                f"most {MAX_WINDOW} updates are kept one by one."
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
        self.histories.check_snapshot(header)

    def check_quota(
        self, header: SnapshotHeader, queued_bytes: int, queued_parts: int
    ) -> None:
        """Check that there is room for the rows of a snapshot.

        Args:
            header: What it declares.
            queued_bytes: Rows of the session that wait for the solver.
            queued_parts: Their number, one for each layer, rank and step.

        Raises:
            LimitExceededError: If there is not.
        """
        waiting = self.assembler.waiting + queued_parts + len(header.layers)
        if waiting > self._config.max_waiting:
            raise LimitExceededError(
                f"Job {self.spec.job!r} would have rows of {waiting} layers, ranks and "
                f"steps that are not solved yet; max_waiting = "
                f"{self._config.max_waiting}."
            )
        held = self.assembler.nbytes + queued_bytes
        declared = sum(tensor.nbytes for tensor in header.tensors)
        if held + declared > self._config.max_session_bytes:
            raise LimitExceededError(
                f"Job {self.spec.job!r} has {held} bytes of rows that are not solved "
                f"yet; {declared} more are over max_session_bytes = "
                f"{self._config.max_session_bytes}."
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
            shape = tensor.shape
            if len(shape) < 2 or shape != (*layer.block_shape, shape[-2], dim):
                expected = ", ".join(map(str, (*layer.block_shape, "rows", dim)))
                raise InvalidRequestError(
                    f"The {side} of layer {layer.name!r} have shape {shape}; "
                    f"expected ({expected}).",
                    layer=layer.name,
                )
        count = rows.activations.shape[-2]
        if count != rows.count and not layer.diagonal:
            raise InvalidRequestError(
                f"Layer {layer.name!r} has {count} rows of activations and "
                f"{rows.count} of derivatives.",
                layer=layer.name,
            )
        if rows.activations.dtype not in DTYPES.values():
            raise InvalidRequestError(
                f"Layer {layer.name!r} has rows of dtype {rows.activations.dtype}; "
                "float32 and float64 are taken.",
                layer=layer.name,
            )
        if rows.activations.dtype != rows.derivatives.dtype:
            raise InvalidRequestError(
                f"Layer {layer.name!r} has activations of {rows.activations.dtype} "
                f"and derivatives of {rows.derivatives.dtype}.",
                layer=layer.name,
            )

    def since_latest(self, rank: int, now_s: float) -> float | None:
        """Note a snapshot of a rank.

        Returns:
            Seconds since its latest one; None if it is the first.
        """
        before_s, self._pushed_s[rank] = self._pushed_s.get(rank), now_s
        return None if before_s is None else now_s - before_s

    def lease_ends_s(self) -> float | None:
        """Tell when the session is dropped.

        Returns:
            The time, or None while somebody is subscribed.
        """
        return None if self.subscriptions else self.last_seen_s + self._config.lease_s

    def status(self, now_s: float, queued: int) -> SessionStatus:
        """Describe the session, all but its layers, of which there may be many.

        Returns:
            What `skfac status` shows of it, without layers.
        """
        return SessionStatus(
            job=self.spec.job,
            world_size=self.spec.world_size,
            open_ranks=len(self.open_ranks),
            age_s=now_s - self._opened_s,
            layers=(),
            solved=self.outcomes["solved"],
            superseded=self.outcomes["superseded"],
            failed=self.outcomes["failed"],
            refused=self.refused,
            queued=queued,
            inversion=summary(self.latencies_s),
            history_bytes=self.histories.nbytes,
        )

    def layers_status(
        self, newest: Mapping[int, Version], newest_step: int
    ) -> tuple[LayerStatus, ...]:
        """Describe the layers, which needs no lock.

        Args:
            newest: A copy of the newest versions by layer.
            newest_step: The newest step that rows have come of.

        Returns:
            Each of the session's layers.
        """
        layers = []
        for index, layer in enumerate(self.spec.layers):
            version = newest.get(index)
            if version is None:
                layers.append(LayerStatus(layer.name, None, 0, None))
            else:
                behind = max(newest_step - version.step, 0)
                layers.append(
                    LayerStatus(layer.name, version.step, version.rows, behind)
                )
        return tuple(layers)


def first_bad_rows(snapshot: Snapshot) -> tuple[int, str] | None:
    """Look for NaN and infinities, which takes long: without the engine's lock.

    Returns:
        Layer and side of the first rows that have any.
    """
    for rows in snapshot.layers:
        for side in ("activations", "derivatives"):
            if not all_finite(getattr(rows, side)):
                return rows.layer, side
    return None


def refusal_of(
    spec: SessionSpec, step: int, bad_rows: tuple[int, str]
) -> InvalidRequestError:
    """Say why a snapshot with bad rows is refused.

    Returns:
        An error that names them.
    """
    layer, side = spec.layers[bad_rows[0]].name, bad_rows[1]
    return InvalidRequestError(
        f"The {side} of layer {layer!r} at step {step} have NaN or infinite entries; "
        "the whole snapshot is dropped.",
        layer=layer,
    )
