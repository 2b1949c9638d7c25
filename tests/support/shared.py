"""A trainer's end of shared memory, by hand."""

import queue
import secrets
import time
from contextlib import suppress
from dataclasses import replace
from typing import Any

import grpc

from skfac.v1 import preconditioning_pb2 as pb
from skfac.wire.arena import Arena
from skfac.wire.channel import SERVICE
from skfac.wire.codec import encode_snapshot
from skfac.wire.frames import encode_region
from skfac.wire.shared_memory import OwnRegion
from skfac.wire.snapshot import LayerRows, Snapshot
from tests.support.raw_client import TIMEOUT_S, RawClient


class SharedPush:
    """A push stream that stays open, and a region that was offered on it."""

    def __init__(
        self,
        client: RawClient,
        up_nbytes: int = 65_536,
        down_nbytes: int = 65_536,
        *,
        sealed: bool = False,
    ) -> None:
        self.session_id = client.grant.session_id
        self.token = secrets.token_bytes(16)
        self.region = OwnRegion(self.token, up_nbytes, down_nbytes, sealed=sealed)
        self.region.offer.session_id = self.session_id
        self.region.offer.answers_in_header = False  # `ask` waits for messages
        self.arena = Arena(self.region.up_map)
        self._frames: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        push: Any = client.channel.stream_stream(
            f"/{SERVICE}/PushSnapshots",
            response_deserializer=pb.PushSnapshotsResponse.FromString,
        )
        self._call = push(iter(self._frames.get, None), timeout=TIMEOUT_S)

    def __enter__(self) -> "SharedPush":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        self.region.discard()

    def ask(self, *frames: bytes) -> pb.PushSnapshotsResponse:
        """Send frames and wait for one answer."""
        self.tell(*frames)
        return next(self._call)

    def tell(self, *frames: bytes) -> None:
        """Send frames."""
        for frame in frames:
            self._frames.put(frame)

    def until_answered(self, value: int) -> None:
        """Wait until the header says so."""
        end_s = time.monotonic() + TIMEOUT_S
        while self.region.answered.read() != value:
            assert time.monotonic() < end_s, self.region.answered.read()
            time.sleep(0.005)

    def offer(self, **fields: Any) -> bool:
        """Offer the region, or what it is not; returns whether it is accepted."""
        offer = pb.SharedRegion()
        offer.CopyFrom(self.region.offer)
        for name, value in fields.items():
            setattr(offer, name, value)
        answer = self.ask(encode_region(offer.SerializeToString()))
        assert answer.HasField("region_accepted")
        return answer.region_accepted

    def placed(self, snapshot: Snapshot) -> Snapshot:
        """The same rows in the region."""

        def moved(rows):
            copy = self.arena.empty(tuple(rows.shape), rows.dtype)
            assert copy is not None
            return copy.copy_(rows)

        layers = tuple(
            LayerRows(r.layer, moved(r.activations), moved(r.derivatives))
            for r in snapshot.layers
        )
        return replace(snapshot, layers=layers)

    def frames(self, snapshot: Snapshot) -> list[bytes]:
        """The frames of a snapshot whose rows are in the region as far as they are."""
        return list(encode_snapshot(self.session_id, snapshot, self.arena.offset_of))

    def end(self) -> None:
        """Close the stream and wait until the server has."""
        self._frames.put(None)
        with suppress(grpc.RpcError):
            list(self._call)
