"""A server that stops publishes what it has accepted before its streams end."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from skfac.client.capture import PendingSnapshot
from skfac.client.grpc_transport import GrpcTransport
from skfac.client.store import Store
from skfac.service.solver import Solver
from skfac.wire.outcome import Outcome, Version
from skfac.wire.session import SessionSpec
from skfac.wire.staging import HostCopy
from tests.support.raw_client import (
    TIMEOUT_S,
    RawClient,
    decoded,
    snapshot_of,
    spec_of,
)
from tests.support.servers import serving


@pytest.fixture
def allowed(monkeypatch):
    """Nothing is solved until this is set."""
    solve, allowed = Solver.solve, threading.Event()

    def delayed(self, batch):
        allowed.wait(TIMEOUT_S)
        return solve(self, batch)

    monkeypatch.setattr(Solver, "solve", delayed)
    yield allowed
    allowed.set()


def health_of(client, name):
    stub = health_pb2_grpc.HealthStub(client.channel)
    request = health_pb2.HealthCheckRequest(service=name)
    return stub.Check(request, timeout=TIMEOUT_S).status


def test_what_was_accepted_is_published(allowed):
    received: list[Outcome] = []
    with serving(grace_s=TIMEOUT_S) as server:
        with RawClient(server.address, spec_of("job")) as client:
            (answer,) = client.push(*client.frames(snapshot_of(client.spec, 3)))
            subscriber = threading.Thread(
                target=lambda: received.extend(client.outcomes(2))
            )
            subscriber.start()
            session = server._engine._sessions.of_job("job")
            while not session.subscriptions:
                pass  # the stream is about to open
            closer = threading.Thread(target=server.close)
            closer.start()
            while health_of(client, "ready") == health_pb2.HealthCheckResponse.SERVING:
                pass
            assert health_of(client, "live") == health_pb2.HealthCheckResponse.SERVING
            with pytest.raises(grpc.RpcError) as caught:
                RawClient(server.address, spec_of("late"))
            allowed.set()
            subscriber.join(TIMEOUT_S)
        closer.join(TIMEOUT_S)

    assert not answer.HasField("refusal")
    assert [(o.layer, o.step) for o in received] == [(0, 3), (1, 3)]
    assert all(isinstance(outcome, Version) for outcome in received)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_rows_that_others_wait_for_are_taken_and_no_others():
    spec = spec_of("job", world_size=2)
    with (
        serving(grace_s=TIMEOUT_S) as server,
        RawClient(server.address, spec, rank=0) as first,
        RawClient(server.address, spec, rank=1) as second,
    ):
        stream = first.subscribe()
        first.push(*first.frames(snapshot_of(spec, 3)))
        closer = threading.Thread(target=server.close)
        closer.start()
        while not server._engine._draining:
            pass
        with pytest.raises(grpc.RpcError, match="The server is stopping") as caught:
            first.push(*first.frames(snapshot_of(spec, 4)))
        (answer,) = second.push(*second.frames(snapshot_of(spec, 3, rank=1)))
        received = list(until_stopped(stream))
        closer.join(TIMEOUT_S)

    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert not answer.HasField("refusal")
    assert [(o.layer, o.step, o.ranks) for o in received] == [(0, 3, 2), (1, 3, 2)]


def until_stopped(stream: Iterator[bytes]) -> Iterator[Version]:
    """All outcomes up to the end of the server, which must be versions."""
    try:
        for outcome in decoded(stream):
            assert isinstance(outcome, Version), outcome
            yield outcome
    except grpc.RpcError as error:
        assert error.code() is grpc.StatusCode.UNAVAILABLE  # noqa: PT017


class Rank(threading.Thread):
    """Pushes step after step until the server takes no more."""

    def __init__(self, address: str, spec: SessionSpec, rank: int) -> None:
        super().__init__()
        self.client = RawClient(address, spec, rank)
        self.may_push = threading.Semaphore(IN_FLIGHT // 2)  # released by versions
        self.acknowledged: list[int] = []
        self.code: grpc.StatusCode | None = None

    def run(self) -> None:
        client, step = self.client, 0
        while self.may_push.acquire(timeout=TIMEOUT_S):
            sent = snapshot_of(client.spec, step, rank=client.rank, decay=0.5)
            try:
                (answer,) = client.push(*client.frames(sent))
            except grpc.RpcError as error:
                self.code = error.code()
                return
            assert not answer.HasField("refusal"), answer
            self.acknowledged.append(step)
            step += 1


RANKS, IN_FLIGHT, ENOUGH = 4, 64, 5


def test_what_four_ranks_were_told_is_taken_is_solved_and_saved(tmp_path):
    spec = spec_of("job", world_size=RANKS, history="ema", lag=IN_FLIGHT - 1)
    found: dict[int, list[int]] = {0: [], 1: []}  # of each step the number of ranks
    with ExitStack() as stack:
        server = stack.enter_context(
            serving(grace_s=TIMEOUT_S, state_dir=str(tmp_path))
        )
        ranks = [Rank(server.address, spec, rank) for rank in range(RANKS)]
        stream = ranks[0].client.subscribe()
        closer = threading.Thread(target=server.close)  # as SIGTERM does
        for rank in ranks:
            stack.enter_context(rank.client)
            rank.start()
        for version in until_stopped(stream):
            assert version.step == len(found[version.layer])
            found[version.layer].append(version.ranks)
            if version.layer == 0:
                for rank in ranks:
                    rank.may_push.release()
                if version.step == ENOUGH:
                    closer.start()
        for thread in (closer, *ranks):
            thread.join(TIMEOUT_S)

    stopped = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
    assert {rank.code for rank in ranks} <= stopped
    told = Counter(step for rank in ranks for step in rank.acknowledged)
    assert found[0] == found[1] == [RANKS] * len(told)
    with (
        serving(state_dir=str(tmp_path)) as again,
        RawClient(again.address, spec) as client,
    ):
        saved = [state.history.updates for state in client.export_state().layers]
    assert saved == [len(told)] * 2


def test_a_trainer_gets_what_was_accepted_though_its_next_push_is_refused(
    allowed, tmp_path
):
    spec = spec_of("job", history="ema", lag=2)
    store, directory = Store(spec), str(tmp_path)

    def push(step: int) -> None:
        sent = snapshot_of(spec, step, decay=0.5)
        rows = {
            r.layer: HostCopy([r.activations, r.derivatives], None) for r in sent.layers
        }
        store.expect(step)
        transport.push(PendingSnapshot(0, step, sent.settings, rows))

    def versions(step: int) -> list[Outcome | None]:
        row = store._expected[step]
        with store._changed:
            assert store._changed.wait_for(lambda: None not in row, TIMEOUT_S)
        return row

    with serving(grace_s=TIMEOUT_S, state_dir=directory) as server:
        transport = GrpcTransport(server.address, spec, 0, store.link(0))
        assert store.await_links(TIMEOUT_S)
        push(0)
        session = server._engine._sessions.of_job("job")
        while session.newest_step < 0 or not session.subscriptions:
            pass
        closer = threading.Thread(target=server.close)
        closer.start()
        while not server._engine._draining:
            pass
        push(1)
        with store._changed:
            assert store._changed.wait_for(lambda: store.links == [False], TIMEOUT_S)
        allowed.set()
        updates = [getattr(outcome, "updates", outcome) for outcome in versions(0)]
        closer.join(TIMEOUT_S)
    with serving(address=server.address, state_dir=directory), closing(transport):
        updates += [getattr(outcome, "updates", outcome) for outcome in versions(1)]

    assert updates == [1, 1, 2, 2]
    assert store.counts == {"solved": 4}
