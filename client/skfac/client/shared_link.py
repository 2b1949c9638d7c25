"""The shared memory of one connection: offered, and used if the server accepts."""

import logging
import secrets
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from skfac.wire.arena import Arena, Slab
from skfac.wire.frames import encode_region, payload_nbytes
from skfac.wire.memory import Pool
from skfac.wire.payload import PayloadBuffer
from skfac.wire.session import LayerSpec, SessionSpec
from skfac.wire.shared_memory import MAX_SNAPSHOTS, TOKEN_BYTES, Area, OwnRegion
from skfac.wire.snapshot import ALIGNMENT, LayerRows, Snapshot, TensorHeader, padded

logger = logging.getLogger(__name__)

_VERSION_SETS = 2  # of all layers' inverses: one is read while the next is written


class SharedLink:
    """Brings tensors to a server on this host, and back, with one copy each way.

    Made for one connection and left with it: what is in its memory stays valid, and
    nothing is put there again, as the server may still be reading it.

    Attributes:
        token: Names the connection to the server.
    """

    def __init__(
        self,
        spec: SessionSpec,
        session_id: str,
        max_snapshot_bytes: int,
        counts: Counter[str],
    ) -> None:
        self.token = secrets.token_bytes(TOKEN_BYTES)
        self._spec = spec
        self._session_id = session_id
        self._max_area_bytes = MAX_SNAPSHOTS * max_snapshot_bytes
        self._counts = counts
        self._lock = threading.Lock()
        self._closed = False
        self._kinds = [True, False]  # sealed ones are faster, but not seen everywhere
        self._region: OwnRegion | None = None
        self._arena: Arena | None = None  # once the region is accepted
        self._snapshot_nbytes = 0
        self._slab: Slab | None = None  # of the snapshot that is captured
        self._begun = False  # whether any of that has memory
        self._in_flight: dict[int, Snapshot] = {}
        self._pool = Pool()

    # ---------------------------------------------------------------- trainer

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """Make a tensor in shared memory for the snapshot that is captured.

        Returns:
            The tensor; None if there is no room, or no such memory.
        """
        arena = self._arena
        if arena is None:
            return None
        if not self._begun:
            self._begun = True
            self._settle_answered()
            self._slab = arena.slab(self._snapshot_nbytes)
        found = None if self._slab is None else self._slab.empty(shape, dtype)
        return self._apart(arena, shape, dtype) if found is None else found

    def end_snapshot(self) -> None:
        """Tell that what `empty` makes from now on is for another snapshot."""
        self._slab, self._begun = None, False

    # ---------------------------------------------------------------- sender

    def offer(self, snapshot: Snapshot) -> Iterator[bytes]:
        """Make a region for snapshots such as this one, if there is none.

        Yields:
            The frame that offers it: at most one of each kind in all.
        """
        while self._kinds and self._region is None and not self._closed:
            if not payload_nbytes(snapshot.header.tensors):
                return
            region = self._make(snapshot, sealed=self._kinds.pop(0))
            if region is None:
                continue
            with self._lock:
                if self._closed:
                    region.discard()
                    return
                self._region = region
            yield encode_region(region.offer.SerializeToString())

    def place(self, snapshot: Snapshot) -> Snapshot:
        """Copy to shared memory what is not there, as far as there is room.

        Returns:
            The snapshot to send; its memory stays as it is until `settle`.
        """
        if self._arena is None:
            return snapshot
        rows = tuple(
            LayerRows(
                layer.layer,
                self._placed(layer.activations),
                self._placed(layer.derivatives),
            )
            for layer in snapshot.layers
        )
        placed = replace(snapshot, layers=rows)
        self._in_flight[snapshot.step] = placed
        return placed

    def locate(self, tensor: Tensor) -> int | None:
        """Find where a tensor is in shared memory.

        Returns:
            Its offset, or None if it is elsewhere.
        """
        return None if self._arena is None else self._arena.offset_of(tensor)

    # ---------------------------------------------------------------- answers

    def answer(self, *, accepted: bool) -> None:
        """Take the server's word on the region."""
        region = self._region
        if region is None:
            return
        region.unlink()
        if accepted:
            self._arena = Arena(region.up_map)
            logger.info("Tensors go through shared memory.")
        else:
            logger.debug("The server cannot open the shared memory.")
            self._region = None
            region.discard()

    def settle(self, step: int) -> None:
        """Let go of a snapshot that the server has answered by a message."""
        self._in_flight.pop(step, None)

    def _settle_answered(self) -> bool:
        # Those that it has answered in the header; tells whether there were any.
        told = None if self._region is None else self._region.answered.read()
        answered = [step for step in list(self._in_flight) if step < (told or 0)]
        for step in answered:
            self.settle(step)
        return bool(answered)

    # ---------------------------------------------------------------- receiver

    def receive(self, headers: Sequence[TensorHeader], end: int) -> PayloadBuffer:
        """Make the buffer of a batch of outcomes, and copy what is in shared memory.

        Args:
            headers: What the batch declares.
            end: How far the shared memory is read then; 0 if nothing of it is there.

        Returns:
            The buffer, to which only the payload is missing.

        Raises:
            InvalidRequestError: If something is not where it is said to be.
        """
        self._settle_answered()  # an outcome comes later than the answer
        area = Area(-1, 0, 0) if self._region is None else self._region.down
        buffer = PayloadBuffer(headers, pool=self._pool)
        self._counts["shared_received_bytes"] += buffer.read_shared(area)
        if end and self._region is not None:
            self._region.consumed.write(end)
        return buffer

    def close(self) -> None:
        """End the use of the region, once no thread receives any more; idempotent."""
        with self._lock:
            self._closed = True
        self._arena = None
        if self._region is not None:
            self._region.discard()

    def _make(self, snapshot: Snapshot, *, sealed: bool) -> OwnRegion | None:
        self._snapshot_nbytes = nbytes = payload_nbytes(snapshot.header.tensors)
        up_nbytes = (self._spec.versions_in_flight + 1) * nbytes
        down_nbytes = _VERSION_SETS * _versions_nbytes(self._spec, snapshot)
        try:
            region = OwnRegion(
                self.token,
                min(up_nbytes, self._max_area_bytes),
                min(down_nbytes, self._max_area_bytes),
                sealed=sealed,
            )
        except OSError as error:
            logger.debug("No memory is shared: %s.", error)
            return None
        region.offer.session_id = self._session_id
        return region

    def _apart(
        self, arena: Arena, shape: tuple[int, ...], dtype: torch.dtype
    ) -> Tensor | None:
        found = arena.empty(shape, dtype)
        if found is None and self._settle_answered():
            found = arena.empty(shape, dtype)
        return found

    def _placed(self, tensor: Tensor) -> Tensor:
        arena = self._arena
        if arena is None:
            return tensor
        if arena.offset_of(tensor) is None:
            copy = self._apart(arena, tuple(tensor.shape), tensor.dtype)
            if copy is None:
                return tensor
            # torch would take threads of its own.
            np.copyto(copy.numpy(), tensor.numpy())
            tensor = copy
        self._counts["shared_sent_bytes"] += tensor.nbytes
        return tensor


def _versions_nbytes(spec: SessionSpec, snapshot: Snapshot) -> int:
    # What the inverses of one version of all layers take at most.
    return sum(
        _inverse_nbytes(spec, spec.layers[rows.layer], tensor, snapshot.settings.rank)
        for rows in snapshot.layers
        for tensor in (rows.activations, rows.derivatives)
    )


def _inverse_nbytes(
    spec: SessionSpec, layer: LayerSpec, rows: Tensor, cap: int | None
) -> int:
    count, dim = rows.shape[-2:]
    if not rows.numel():
        return ALIGNMENT
    rank = min(count * spec.world_size, dim) if spec.history == "snapshot" else dim
    rank = min(rank, cap or rank)
    return padded(layer.groups * rank * dim * rows.element_size())
