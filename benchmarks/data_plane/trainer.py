"""This process: the client's own transport, and the references, each as one body."""

import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import grpc
import torch
from google.protobuf.wrappers_pb2 import BytesValue, Int64Value
from torch import Tensor

from benchmarks.data_plane.peer import (
    MAX_MESSAGE_BYTES,
    buffer,
    ready_frames,
    receive,
    send,
    set_congestion,
)
from skfac.client.capture import PendingSnapshot
from skfac.client.grpc_transport import GrpcTransport
from skfac.curvature.settings import CurvatureSettings
from skfac.wire.channel import CLIENT_OPTIONS
from skfac.wire.outcome import Outcome
from skfac.wire.session import LayerSpec, SessionSpec
from skfac.wire.staging import HostCopy

PATIENCE_S = 60.0


@dataclass(frozen=True)
class Load:
    """What one body moves.

    Attributes:
        tensor_bytes: Of one tensor.
        layers: Layers, each with two of them.
        columns: Of each tensor.
    """

    tensor_bytes: int
    layers: int
    columns: int

    @classmethod
    def of(cls, tensor_bytes: int, total_bytes: int) -> "Load":
        """Divide a total into tensors, two a layer."""
        columns = 64
        while columns * columns * 4 < tensor_bytes:
            columns *= 2  # at least as many as rows, as in a factor of low rank
        return cls(tensor_bytes, max(total_bytes // tensor_bytes // 2, 1), columns)

    @property
    def rows(self) -> int:
        """Of each tensor."""
        return self.tensor_bytes // 4 // self.columns

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return 2 * self.layers * self.tensor_bytes


@dataclass(eq=False)
class Answers:
    """A store that only counts what comes."""

    spec: SessionSpec
    done: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    linked: threading.Event = field(default_factory=threading.Event)
    missing: int = 0

    def guard(self) -> Any:  # noqa: ANN401
        """Let errors out."""
        return nullcontext()

    def held(self) -> dict[int, int]:
        """Hold nothing."""
        return {}

    def set_link(self, *, up: bool) -> None:
        """Tell that a server is there."""
        if up:
            self.linked.set()

    def fail(self, error: Exception) -> None:
        """End the benchmark, from whichever thread."""
        print("The transport failed:", error)
        os._exit(1)

    def lose(self, step: int, reason: str, message: str) -> None:
        """End the benchmark, from whichever thread."""
        print(f"Step {step} was lost: {reason}: {message}")
        os._exit(1)

    def receive(self, outcomes: list[Outcome]) -> list[int]:
        """Count down to what an exchange waits for."""
        self.missing -= len(outcomes)
        if self.missing > 0:
            return []
        self.done.release()
        return [outcomes[-1].step]


class Link:
    """The product's transport to the peer, in one direction.

    Args:
        target: The peer.
        load: What each exchange moves.
        up: Whether it is rows that go up, or inverses that come down.
        shared: Whether shared memory is there; it is used if it is.
    """

    _numbers = itertools.count()

    def __init__(self, target: str, load: Load, *, up: bool, shared: bool) -> None:
        self._load, self._up = load, up
        job = f"{'up' if up else 'down'}-{next(self._numbers)}"
        layers = tuple(
            LayerSpec(f"fc{i}", "linear", load.columns, load.columns, True)
            for i in range(load.layers)
        )
        spec = SessionSpec(
            job=job, instance="1", world_size=1, layers=layers, damping_split="pi",
            history="ema", update_every=1, lag=1, on_late="keep",
        )  # fmt: skip
        self._answers = Answers(spec)
        self.transport = GrpcTransport(target, spec, 0, self._answers)  # type: ignore[arg-type]
        assert self._answers.linked.wait(PATIENCE_S)
        self._settings = CurvatureSettings(damping=0.1, rank=load.rows)
        self._step = itertools.count()
        # What comes down is asked for by one row, of one layer or, as that is how large
        # the shared memory is made for, of each.
        count = load.rows if up else 1
        sides = 2 * (load.layers if up or shared else 1)
        self.rows = [torch.randn(count, load.columns) for _ in range(sides)]
        self._begin(shared=shared)

    def _begin(self, *, shared: bool) -> None:
        # A region is offered once, after the first snapshot.
        missing = mock.patch(
            "skfac.client.shared_link.OwnRegion", side_effect=OSError("not wanted")
        )
        with nullcontext() if shared else missing:
            for _ in range(3):
                self.exchange()
        counts = self.transport.counts()
        name = f"shared_{'sent' if self._up else 'received'}_bytes"
        if (counts.get(name, 0) > 0) != shared:
            raise SystemExit(f"Shared memory is not as it was wanted: {counts}")
        if self._up:
            self.produce(self.rows[0].clone())

    def produce(self, source: Tensor) -> None:
        """Write all rows anew, where the transport wants them."""
        shape = tuple(source.shape)
        self.rows.clear()  # what was sent is over: its memory may be used again
        for _ in range(2 * self._load.layers):
            rows = self.transport.empty(shape, torch.float32)
            torch.mul(source, 2.0, out=rows)
            self.rows.append(rows)

    def exchange(self) -> None:
        """Push a snapshot and wait for all that comes of it."""
        step = next(self._step)
        pairs = zip(self.rows[::2], self.rows[1::2], strict=True)
        copies = {i: HostCopy([a, d], None) for i, (a, d) in enumerate(pairs)}
        self._answers.missing = 1 if self._up else self._load.layers
        self.transport.push(PendingSnapshot(0, step, self._settings, copies))
        assert self._answers.done.acquire(timeout=PATIENCE_S)

    def capture_cpu_s(self, rounds: int) -> float:
        """CPU time of this process for each GB that it produces and pushes.

        Returns:
            Without that of producing the same in memory of its own.
        """
        source = self.rows[0].clone()
        own = [torch.empty_like(source) for _ in self.rows]

        def produce() -> None:
            for rows in own:
                torch.mul(source, 2.0, out=rows)

        def produce_and_push() -> None:
            self.produce(source)
            self.exchange()

        spent: list[float] = []
        for _ in range(rounds + 1):
            began_s = time.process_time()
            produce()
            between_s = time.process_time()
            produce_and_push()
            ended_s = time.process_time()
            spent.append(ended_s - between_s - (between_s - began_s))
        return statistics.median(spent[1:]) / self._load.nbytes * 1e9


def tcp(port: int, congestion: str, nbytes: int, *, up: bool) -> Callable[[], None]:
    """Plain TCP, 4 MiB a call, between memory that is there already."""
    connection = socket.create_connection(("127.0.0.1", port))
    set_congestion(connection, congestion)
    view = buffer(nbytes)
    length = nbytes.to_bytes(8, "little")

    def body() -> None:
        connection.sendall((b"u" if up else b"d") + length)
        if up:
            send(connection, view)
            connection.recv(1)
        else:
            receive(connection, view)

    return body


def naive(address: str, load: Load, *, up: bool) -> Callable[[], None]:
    """One unary call a tensor."""
    channel = grpc.insecure_channel(
        address, [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]
    )
    put: Any = channel.unary_unary(
        "/Naive/Put", BytesValue.SerializeToString, Int64Value.FromString
    )
    get: Any = channel.unary_unary(
        "/Naive/Get", Int64Value.SerializeToString, BytesValue.FromString
    )
    tensors = [torch.randn(load.tensor_bytes // 4) for _ in range(2 * load.layers)]

    def body() -> None:
        for tensor in tensors:
            if up:
                put(BytesValue(value=tensor.numpy().tobytes()))
            else:
                answer = get(Int64Value(value=load.tensor_bytes))
                torch.frombuffer(bytearray(answer.value), dtype=torch.float32)

    return body


def bare(address: str, nbytes: int, *, up: bool) -> Callable[[], None]:
    """A stream of messages as large as frames, made before, of which nothing is read.

    Channel, allocator and sizes are those of the product; what it does not do is make
    the messages, check them and copy them into tensors.
    """
    channel = grpc.insecure_channel(address, CLIENT_OPTIONS)
    put: Any = channel.stream_unary("/Bare/Put")
    get: Any = channel.unary_stream("/Bare/Get")
    frames = ready_frames(nbytes) if up else []

    def body() -> None:
        if up:
            put(iter(frames), timeout=PATIENCE_S)
            return
        for _ in get(nbytes.to_bytes(8, "little"), timeout=PATIENCE_S):
            pass

    return body


def memcpy(nbytes: int) -> Callable[[], None]:
    """One copy from memory to memory."""
    source, target = (torch.ones(nbytes // 4) for _ in range(2))

    def body() -> None:
        target.copy_(source)

    return body


@contextmanager
def peer() -> Iterator[dict[str, Any]]:
    """The other process, on the last core; this one moves to the first.

    Yields:
        Its addresses.
    """
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[0]})
    torch.set_num_threads(1)
    process = subprocess.Popen(  # noqa: S603
        [sys.executable, "-m", "benchmarks.data_plane.peer", str(cores[-1])],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        yield json.loads(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()
