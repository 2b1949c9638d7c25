"""The other process: the real server on an engine that only publishes, and references.

Run as a module it prints its addresses as one JSON line and serves until it is killed.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import torch
from google.protobuf.wrappers_pb2 import BytesValue, Int64Value

from skfac.curvature.inverse import LowRankInverse
from skfac.curvature.layer import LayerPreconditioner
from skfac.service import server as server_module
from skfac.service.config import ServiceConfig
from skfac.service.engine import SessionGrant
from skfac.service.server import Server
from skfac.wire.allocator import keep_large_blocks
from skfac.wire.channel import SERVER_OPTIONS
from skfac.wire.frames import encode_frames
from skfac.wire.outcome import Loss, Outcome, Version
from skfac.wire.session import SessionSpec
from skfac.wire.snapshot import Snapshot, SnapshotHeader

CHUNK_BYTES = 4 * 1024 * 1024
MAX_MESSAGE_BYTES = 2**31 - 1


class PublishingEngine:
    """An `Engine` that answers each snapshot at once.

    In a job whose name begins with "down" it publishes a version of each layer, with a
    matrix of `rank` rows for each side; in any other the word that there is none.
    """

    def __init__(self, *_: object, **__: object) -> None:
        self._specs: dict[str, SessionSpec] = {}
        self._inverses: dict[str, list[LayerPreconditioner]] = {}
        self._subscriptions: dict[str, Outcomes] = {}

    def open_session(self, spec: SessionSpec, rank: int) -> SessionGrant:
        """Remember the layers."""
        self._specs[spec.job] = spec
        self._subscriptions[spec.job] = Outcomes()  # rows may come before it is asked
        return SessionGrant(spec.job, 3600.0, 4 * 1024**3)

    def admit(self, session_id: str, header: SnapshotHeader) -> bool:
        """Take anything."""
        return True

    def submit(self, session_id: str, snapshot: Snapshot) -> bool:
        """Publish what the job is for."""
        spec = self._specs[session_id]
        outcomes: list[Outcome] = [Loss(0, snapshot.step, "empty", "")]
        if session_id.startswith("down"):
            rank = snapshot.settings.rank or 1
            outcomes = [
                Version(layer, snapshot.step, both, rank, 1, 1)
                for layer, both in enumerate(self._made_once(spec, rank))
            ]
        self._subscriptions[session_id].put(outcomes)
        return True

    def subscribe(self, session_id: str, held: Mapping[int, int]) -> "Outcomes":
        """Receive it."""
        return self._subscriptions[session_id]

    def close_session(self, session_id: str, rank: int) -> None:
        """Forget the inverses."""
        self._inverses.pop(session_id, None)

    def status(self, session_id: str = "") -> Any:  # noqa: ANN401
        """Name the job, which is all that is asked."""

        class Session:
            job = session_id

        class Status:
            sessions = (Session,)

        return Status

    def drain(self, timeout_s: float) -> bool:
        """There is nothing to wait for."""
        return True

    def close(self) -> None:
        """There is nothing to close."""

    def _made_once(self, spec: SessionSpec, rank: int) -> list[LayerPreconditioner]:
        if spec.job not in self._inverses:
            self._inverses[spec.job] = [
                LayerPreconditioner(
                    *(LowRankInverse(torch.randn(rank, dim), 0.1) for dim in dims)
                )
                for dims in ((layer.d_in, layer.d_out) for layer in spec.layers)
            ]
        return self._inverses[spec.job]


class Outcomes:
    """A `Subscription` that is filled from outside."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queued: list[Outcome] = []
        self._closed = False
        self.published_s = time.monotonic()

    def put(self, outcomes: list[Outcome]) -> None:
        """Publish."""
        with self._changed:
            if not self._queued:
                self.published_s = time.monotonic()
            self._queued += outcomes
            self._changed.notify_all()

    def take(self, timeout_s: float) -> list[Outcome]:
        """Wait for what was published."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._queued, timeout_s)
            taken, self._queued = self._queued, []
            return taken

    def close(self) -> None:
        """End all waiting."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


# ----------------------------------------------------------------- references


def serve_socket(congestion: str) -> int:
    """Take or send bytes over plain TCP, as asked by "u" or "d" and a length.

    Returns:
        The port.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    set_congestion(listener, congestion)

    def run() -> None:
        while True:
            connection, _ = listener.accept()
            set_congestion(connection, congestion)
            threading.Thread(target=answer, args=[connection], daemon=True).start()

    def answer(connection: socket.socket) -> None:
        with connection:
            while request := connection.recv(9, socket.MSG_WAITALL):
                nbytes = int.from_bytes(request[1:], "little")
                if request[:1] == b"u":
                    receive(connection, buffer(nbytes))
                    connection.sendall(b"!")
                else:
                    send(connection, buffer(nbytes))

    threading.Thread(target=run, daemon=True).start()
    port: int = listener.getsockname()[1]
    return port


def set_congestion(connection: socket.socket, name: str) -> None:
    """Choose a congestion control; an empty name leaves the kernel's default."""
    if name:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name.encode())


def send(connection: socket.socket, view: memoryview) -> None:
    """Send all of a view, in large pieces."""
    for first in range(0, len(view), CHUNK_BYTES):
        connection.sendall(view[first : first + CHUNK_BYTES])


def receive(connection: socket.socket, view: memoryview) -> None:
    """Fill a view."""
    filled = 0
    while filled < len(view):
        filled += connection.recv_into(view[filled:])


_BUFFERS: dict[int, memoryview] = {}


def buffer(nbytes: int) -> memoryview:
    """Memory whose pages are there already."""
    if nbytes not in _BUFFERS:
        _BUFFERS[nbytes] = memoryview(bytearray(nbytes))
    return _BUFFERS[nbytes]


def serve_naive() -> int:
    """Unary calls with one tensor in a `bytes` field, as one would write first.

    Returns:
        The port.
    """
    tensors: dict[int, torch.Tensor] = {}

    def put(request: BytesValue, context: object) -> Int64Value:
        tensor = torch.frombuffer(bytearray(request.value), dtype=torch.float32)
        return Int64Value(value=tensor.numel())

    def get(request: Int64Value, context: object) -> BytesValue:
        if request.value not in tensors:
            tensors[request.value] = torch.randn(request.value // 4)
        return BytesValue(value=tensors[request.value].numpy().tobytes())

    return _serve(
        "Naive",
        grpc.unary_unary_rpc_method_handler(
            put, BytesValue.FromString, Int64Value.SerializeToString
        ),
        grpc.unary_unary_rpc_method_handler(
            get, Int64Value.FromString, BytesValue.SerializeToString
        ),
        [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)],
    )


def serve_bare() -> int:
    """Streams of ready messages that nobody looks at: all that gRPC itself takes.

    Returns:
        The port.
    """
    frames: dict[bytes, list[bytes]] = {}

    def put(messages: Iterator[bytes], context: object) -> bytes:
        for _ in messages:
            pass
        return b""

    def get(request: bytes, context: object) -> Iterator[bytes]:
        if request not in frames:
            frames[request] = ready_frames(int.from_bytes(request, "little"))
        yield from frames[request]

    return _serve(
        "Bare",
        grpc.stream_unary_rpc_method_handler(put),
        grpc.unary_stream_rpc_method_handler(get),
        SERVER_OPTIONS,
    )


def _serve(service: str, put: Any, get: Any, options: list[tuple[str, int]]) -> int:  # noqa: ANN401
    server = grpc.server(ThreadPoolExecutor(4), options=options)
    handlers = {"Put": put, "Get": get}
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(service, handlers),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    _SERVERS.append(server)
    return port


def ready_frames(nbytes: int) -> list[bytes]:
    """Make the messages that a payload of this size is sent in."""
    return list(encode_frames(b"", [torch.randn(nbytes // 4)]))


_SERVERS: list[object] = []  # else they would stop


def main(core: int) -> None:
    """Serve everything until killed."""
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    keep_large_blocks()
    setattr(server_module, "LocalEngine", PublishingEngine)  # noqa: B010
    config = ServiceConfig(address="127.0.0.1:0", metrics_address="")
    _SERVERS.append(server := Server(config))
    addresses = {
        "skfac": server.address,
        "naive": f"127.0.0.1:{serve_naive()}",
        "bare": f"127.0.0.1:{serve_bare()}",
        "tcp_default": serve_socket(""),
        "tcp_cubic": serve_socket("cubic"),
    }
    print(json.dumps(addresses), flush=True)
    sys.stdin.read()  # until the parent is gone


if __name__ == "__main__":
    main(int(sys.argv[1]))
    os._exit(0)
