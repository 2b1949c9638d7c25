"""Every decoder that takes bytes from a peer, fed with any bytes.

A decoder may refuse with a `ServiceError`; anything else that it raises is a bug.
"""

from contextlib import suppress

import torch

from skfac.v1 import preconditioning_pb2 as pb
from skfac.wire.codec import (
    build_outcomes,
    decode_outcomes_manifest,
    decode_session,
    decode_snapshot_header,
    parse_snapshot_manifest,
)
from skfac.wire.errors import LimitExceededError, ServiceError
from skfac.wire.frames import decode_frame, parse_frame, payload_nbytes
from skfac.wire.messages import parse
from skfac.wire.payload import PayloadBuffer
from skfac.wire.shared_memory import Area, open_region
from skfac.wire.snapshot import TensorHeader
from skfac.wire.state import LayerStateHeader
from skfac.wire.state_codec import StateReceiver

MOST_BYTES = 1_000_000
_NOWHERE = Area(-1, 0, 0)


def feed(message: bytes) -> None:
    """Give a message to all of them."""
    for decoder in (_frame, _snapshot, _outcomes, _histories, _region, _session):
        with suppress(ServiceError):
            decoder(message)


def _frame(message: bytes) -> None:
    frame = decode_frame(message)
    assert len(frame.payload) <= len(message)


def _snapshot(message: bytes) -> None:
    manifest = parse_frame(message).manifest
    if manifest is None:
        return
    header = decode_snapshot_header(parse_snapshot_manifest(manifest))
    assert header.settings.damping > 0
    _fill(header.tensors, message)


def _outcomes(message: bytes) -> None:
    manifest = parse_frame(message).manifest
    if manifest is None:
        return
    parsed, headers = decode_outcomes_manifest(manifest)
    build_outcomes(parsed, _fill(headers, message))


def _fill(headers: list[TensorHeader], message: bytes) -> list[torch.Tensor]:
    nbytes = payload_nbytes(headers)
    if nbytes > MOST_BYTES:
        raise LimitExceededError("as a server checks before it")
    buffer = PayloadBuffer(headers)
    buffer.read_shared(_NOWHERE)
    payload = parse_frame(message).payload
    buffer.write(payload)
    buffer.write(memoryview(bytes(buffer.missing_bytes)))
    tensors = buffer.tensors()
    assert [tuple(t.shape) for t in tensors] == [h.shape for h in headers]
    return tensors


def _histories(message: bytes) -> None:
    receiver = StateReceiver(_admit)
    receiver.receive(message)
    receiver.finish()


def _admit(_: str, header: LayerStateHeader, taken_bytes: int) -> None:
    if taken_bytes + header.nbytes > MOST_BYTES:
        raise LimitExceededError("as a server checks it")


def _region(message: bytes) -> None:
    region = parse_frame(message).region
    if region is None:
        return
    offer = parse(pb.SharedRegion, region)
    with suppress(OSError):
        open_region(offer, MOST_BYTES).close()


def _session(message: bytes) -> None:
    request = parse(pb.OpenSessionRequest, memoryview(message))
    decode_session(request.spec).check_rank(request.rank)
