"""Receives the snapshots of one push stream, frame by frame."""

import time

from skfac.service.engine import EngineCalls
from skfac.service.metrics import Metrics
from skfac.service.receiving import Receiving, Share
from skfac.service.regions import OpenRegion, Regions
from skfac.service.stages import RECEIVE
from skfac.v1 import preconditioning_pb2 as pb
from skfac.wire.codec import (
    build_snapshot,
    decode_snapshot_header,
    parse_snapshot_manifest,
)
from skfac.wire.errors import (
    InvalidRequestError,
    LimitExceededError,
    ServiceError,
    SessionMismatchError,
    SessionNotFoundError,
    code_of,
)
from skfac.wire.frames import Frame, parse_frame, payload_nbytes
from skfac.wire.memory import Pool
from skfac.wire.messages import check_layers, parse
from skfac.wire.payload import PayloadBuffer
from skfac.wire.shared_memory import Area
from skfac.wire.snapshot import SnapshotHeader

# Of one snapshot only: the stream goes on. Other errors end it.
_REFUSALS = (InvalidRequestError, SessionMismatchError, LimitExceededError)


class Intake:
    """Turns frames into snapshots, checked before memory is taken for them.

    After a refusal or a duplicate the frames that are left of the snapshot are ignored,
    whatever they hold, up to the next manifest.
    """

    def __init__(
        self,
        engine: EngineCalls,
        metrics: Metrics,
        regions: Regions,
        *,
        session_id: str,
        receiving: Receiving,
        max_layers: int,
        pinned: bool,
    ) -> None:
        self._engine = engine
        self._metrics = metrics
        self._regions = regions
        self._region: OpenRegion | None = None
        self._max_layers = max_layers
        self._pinned = pinned
        self._receiving = receiving
        self._share: Share | None = None  # of the buffer
        self._pool = Pool()
        self._session_id, self._step = session_id, 0
        self._header: SnapshotHeader | None = None
        self._buffer: PayloadBuffer | None = None
        self._skipping = False
        self._began_s = 0.0

    def receive(self, message: bytes) -> list[pb.PushSnapshotsResponse]:
        """Take one frame.

        Returns:
            The messages that are due: one for each snapshot that is complete, refused,
            a duplicate, or cut off by the beginning of the next, but for those that
            are answered in shared memory; and one for a region.

        Raises:
            SessionNotFoundError: If the session is unknown.
            ServerUnavailableError: If the engine is closing.
        """
        answers = []
        try:
            frame = parse_frame(message)
            if frame.region is not None:
                return [self._open_region(frame.region)]
            if frame.manifest is not None and self._buffer is not None:
                answers.append(self._refuse(self._truncated()))
            answers += self._accept(frame)
        except _REFUSALS as error:
            # What cannot be read of a snapshot that has its answer gets no second one.
            if not self._skipping:
                answers.append(self._refuse(error))
        return answers

    def finish(self) -> None:
        """Check that the stream does not end within a snapshot.

        Raises:
            InvalidRequestError: If it does.
        """
        if self._buffer is not None:
            raise self._truncated()

    def may_wait(self) -> bool:
        """Tell whether the peer may take its time before the next frame.

        Returns:
            Whether it owes nothing of a snapshot and its session is open.
        """
        if self._buffer is not None or not self._session_id:
            return False
        try:
            return bool(self._engine.status(self._session_id).sessions)
        except ServiceError:
            return False

    def close(self) -> None:
        """End the use of memory, shared or not; idempotent."""
        self._drop_buffer()
        if self._region is not None:
            self._region.close()

    def _open_region(self, message: memoryview) -> pb.PushSnapshotsResponse:
        try:
            offer = parse(pb.SharedRegion, message)
            self._engine.status(offer.session_id)  # it must be the caller's
        except (InvalidRequestError, SessionNotFoundError):
            return pb.PushSnapshotsResponse(region_accepted=False)
        if self._region is None:
            self._region = self._regions.open(offer)
            return pb.PushSnapshotsResponse(region_accepted=self._region is not None)
        return pb.PushSnapshotsResponse(region_accepted=False)

    def _accept(self, frame: Frame) -> list[pb.PushSnapshotsResponse]:
        if frame.manifest is not None:
            self._header, self._skipping, self._step = None, False, 0
            manifest = parse_snapshot_manifest(frame.manifest)
            self._session_id, self._step = manifest.session_id, manifest.step
            whose, count = f"Step {self._step} has", len(manifest.layers)
            check_layers(whose, count, self._max_layers)
            self._header = header = decode_snapshot_header(manifest)
            if not self._engine.admit(self._session_id, header):
                self._skipping = True
                return self._answer(header.step, duplicate=True)
            self._began_s = time.monotonic()
            self._buffer = self._begin(header)
        if self._buffer is None or self._header is None:
            return []
        frame.check()
        self._buffer.write(frame.payload)
        if not self._buffer.complete:
            return []
        return self._submit(self._header, self._buffer)

    def _begin(self, header: SnapshotHeader) -> PayloadBuffer:
        nbytes = payload_nbytes(header.tensors)
        self._share = self._receiving.begin(self._session_id, nbytes)
        area = Area(-1, 0, 0) if self._region is None else self._region.up
        buffer = PayloadBuffer(header.tensors, pinned=self._pinned, pool=self._pool)
        buffer.read_shared(area)
        return buffer

    def _submit(
        self, header: SnapshotHeader, buffer: PayloadBuffer
    ) -> list[pb.PushSnapshotsResponse]:
        received_s = time.monotonic() - self._began_s
        snapshot = build_snapshot(header, buffer.tensors())
        self._drop_buffer()  # from here on the engine counts it
        new = self._engine.submit(self._session_id, snapshot)
        self._metrics.observe(RECEIVE, "", received_s)
        self._header = None
        return self._answer(header.step, duplicate=not new)

    def _answer(self, step: int, *, duplicate: bool) -> list[pb.PushSnapshotsResponse]:
        if self._region is not None and self._region.answer(step):
            return []
        return [pb.PushSnapshotsResponse(step=step, duplicate=duplicate)]

    def _drop_buffer(self) -> None:
        self._buffer = None
        if self._share is not None:
            self._share.close()
            self._share = None

    def _truncated(self) -> InvalidRequestError:
        assert self._buffer is not None
        assert self._header is not None
        return InvalidRequestError(
            f"The snapshot of step {self._header.step} is truncated: "
            f"{self._buffer.missing_bytes} bytes are missing."
        )

    def _refuse(self, error: ServiceError) -> pb.PushSnapshotsResponse:
        self._drop_buffer()
        self._header = None
        self._skipping = True
        refusal = pb.Refusal(code=code_of(error), message=str(error))
        return pb.PushSnapshotsResponse(step=self._step, refusal=refusal)
