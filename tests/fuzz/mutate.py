"""Broken frames: whole ones of a kept corpus, with bytes and fields changed.

The corpus in `corpus/` has one whole frame of each kind that a peer can send, and what
once went wrong; `python tests/fuzz/mutate.py` writes it anew. Each mutation is a pure
function of a seed, so that whatever fails can be played again.
"""

import random
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from skfac.curvature.settings import CurvatureSettings
from skfac.v1 import preconditioning_pb2 as pb
from skfac.wire.codec import encode_outcomes, encode_session, encode_snapshot
from skfac.wire.frames import encode_frames, encode_region
from skfac.wire.state import LayerState, SessionState
from skfac.wire.state_codec import encode_state
from tests.support.raw_client import snapshot_of, spec_of
from tests.support.values import folded, version

CORPUS = Path(__file__).parent / "corpus"
SESSION_ID = "0" * 32
"""Stands in the corpus for the id of the session that is open."""

SPEC = spec_of("fuzz", (6, 3), (3, 2), history="ema")

_EXTREME = (0, 1, 127, 128, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
_INSERTED = (
    b"\x00", b"\xff" * 10, b"\x80" * 11, b"\x0a\xff\xff\xff\xff\x0f", b"\x1a\x00",
    struct.pack("<d", float("nan")), struct.pack("<d", float("-inf")),
)  # fmt: skip


def kinds() -> dict[str, bytes]:
    """One whole message of each kind that a peer can send."""
    sent = snapshot_of(SPEC, 7)
    histories = tuple(LayerState(i, 1, folded(SPEC, [sent], i)[0]) for i in range(2))
    region = pb.SharedRegion(
        session_id=SESSION_ID, token=bytes(16), name="skfac-" + "0" * 32,
        up_nbytes=4096, down_nbytes=4096,
    )  # fmt: skip
    return {
        "snapshot": next(encode_snapshot(SESSION_ID, sent)),
        "shared": next(encode_snapshot(SESSION_ID, sent, lambda _: 64)),
        "state": next(encode_state(SESSION_ID, SessionState(histories[:1]))),
        "outcomes": next(encode_outcomes([version(3), version(4, 1)])),
        "region": encode_region(region.SerializeToString()),
        "session": pb.OpenSessionRequest(spec=encode_session(SPEC)).SerializeToString(),
        "payload": next(encode_frames(b"", [torch.ones(16)])),
        "lying": _lying(),
    }


def corpus() -> list[bytes]:
    """The kept messages."""
    return [path.read_bytes() for path in sorted(CORPUS.iterdir())]


def mutated(seed: int, whole: list[bytes]) -> bytes:
    """A broken message; the same for the same seed."""
    choose = random.Random(seed)  # noqa: S311
    message = bytearray(choose.choice(whole))
    for _ in range(choose.randrange(1, 6)):
        message = bytearray(choose.choice(_MUTATIONS)(message, choose, whole))
    return bytes(message)


_Mutation = Callable[[bytearray, random.Random, list[bytes]], bytes | bytearray]


def _flip(message: bytearray, choose: random.Random, _: list[bytes]) -> bytearray:
    if message:
        message[choose.randrange(len(message))] ^= 1 << choose.randrange(8)
    return message


def _cut(message: bytearray, choose: random.Random, _: list[bytes]) -> bytearray:
    return message[: choose.randrange(len(message) + 1)]


def _insert(message: bytearray, choose: random.Random, _: list[bytes]) -> bytearray:
    at = choose.randrange(len(message) + 1)
    return message[:at] + choose.choice(_INSERTED) + message[at:]


def _number(message: bytearray, choose: random.Random, _: list[bytes]) -> bytearray:
    # Where a varint may be: a count, an extent, a length.
    at = choose.randrange(len(message) + 1)
    return message[:at] + _varint(choose.choice(_EXTREME)) + message[at + 1 :]


def _splice(message: bytearray, choose: random.Random, whole: list[bytes]) -> bytearray:
    other = choose.choice(whole)
    return message[: choose.randrange(len(message) + 1)] + bytearray(
        other[choose.randrange(len(other) + 1) :]
    )


def _repeat(message: bytearray, choose: random.Random, _: list[bytes]) -> bytearray:
    begin = choose.randrange(len(message) + 1)
    return message + message[begin : begin + choose.randrange(200)]


_MUTATIONS: tuple[_Mutation, ...] = (_flip, _cut, _insert, _number, _splice, _repeat)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


def _lying() -> bytes:
    # Extents whose product is over 64 bits.
    manifest = pb.SnapshotManifest(session_id=SESSION_ID, step=1)
    manifest.settings.damping = CurvatureSettings(damping=1.0).damping
    rows = manifest.layers.add()
    for header in (rows.activations, rows.derivatives):
        header.dtype = pb.DTYPE_FLOAT32
        header.shape.extend([2**63, 2**63])
    return next(encode_frames(manifest.SerializeToString(), ()))


if __name__ == "__main__":
    for name, message in kinds().items():
        (CORPUS / f"{name}.bin").write_bytes(message)
