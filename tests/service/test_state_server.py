"""Histories through real servers: bit for bit the same, or refused by name."""

import io
import itertools
import threading
import urllib.request
from dataclasses import replace
from typing import Any

import grpc
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from skfac.client.capture import PendingSnapshot
from skfac.client.store import Store
from skfac.client.transport import connect
from skfac.curvature.settings import CurvatureSettings
from skfac.service.table import StatusView
from skfac.v1 import preconditioning_pb2 as pb
from skfac.wire.outcome import Version
from skfac.wire.session import SessionSpec
from skfac.wire.snapshot import LayerRows, Snapshot
from skfac.wire.staging import HostCopy
from skfac.wire.state import LayerState, SessionState
from skfac.wire.state_codec import encode_state
from tests.support.raw_client import TIMEOUT_S, RawClient, snapshot_of, spec_of
from tests.support.servers import serving
from tests.support.stores import versions_at
from tests.support.values import (
    MIXED,
    assert_same_history,
    assert_same_preconditioner,
    folded,
    session_spec,
)

HISTORIES = pytest.mark.parametrize("history", ["snapshot", "window", "ema"])
SETTINGS: dict[str, Any] = {"decay": 0.7, "window": 3, "rank_cap": 4}


def spec_with(history: str) -> SessionSpec:
    return session_spec(*MIXED, history=history, lag=1, on_late="wait")


def assert_versions(spec: SessionSpec, versions: list[Version], steps: range) -> None:
    sent = [snapshot_of(spec, step, **SETTINGS) for step in steps]
    assert len(versions) == len(spec.layers)
    for version in versions:
        history, found = folded(spec, sent, version.layer)
        assert version.updates == history.updates
        assert_same_preconditioner(version.preconditioner, found)


@pytest.fixture
def server():
    with serving(max_history_bytes=1_000_000) as server:
        yield server


@HISTORIES
def test_versions_over_several_steps_are_those_of_the_history(server, history):
    spec = spec_with(history)
    with RawClient(server.address, spec) as client:
        for step in range(5):
            versions = client.versions_of(step, **SETTINGS)
            assert_versions(spec, versions, range(step + 1))


@pytest.mark.parametrize("history", ["window", "ema"])
def test_a_second_server_goes_on_where_the_first_was(server, history):
    spec = spec_with(history)
    with RawClient(server.address, spec) as client:
        for step in range(4):
            client.versions_of(step, **SETTINGS)
        state = client.export_state()
    with serving() as second, RawClient(second.address, spec) as client:
        client.import_state(state)
        client.import_state(state)
        assert_versions(spec, client.versions_of(4, **SETTINGS), range(5))
        again = client.export_state()

    sent = [snapshot_of(spec, step, **SETTINGS) for step in range(5)]
    for layer, exported in enumerate(again.layers):
        assert (exported.layer, exported.step) == (layer, 4)
        assert_same_history(exported.history, folded(spec, sent, layer)[0])


def test_a_history_of_many_frames_passes():
    spec = spec_of("large", (3000, 2), history="ema")
    settings = CurvatureSettings(damping=1.0)
    rows = LayerRows(0, torch.rand(300, 3000), torch.rand(300, 2))
    with serving() as server, RawClient(server.address, spec) as client:
        client.push(*client.frames(Snapshot(0, 0, settings, (rows,))))
        client.outcomes(1)
        state = client.export_state()

    frames = list(encode_state("id", state))
    assert len(frames) == 4  # 7.2 MB of float64
    expected, _ = folded(spec, [Snapshot(0, 0, settings, (rows,))])
    assert_same_history(state.layers[0].history, expected)


def state_of(spec: SessionSpec) -> SessionState:
    sent = [snapshot_of(spec, step, **SETTINGS) for step in range(2)]
    layers = range(len(spec.layers))
    return SessionState(
        tuple(LayerState(i, 1, folded(spec, sent, i)[0]) for i in layers)
    )


def refusal_of(client: RawClient, *frames: bytes) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        client.import_frames(*frames)
    return caught.value.code(), caught.value.details() or ""


def test_a_state_of_another_model_is_refused_and_nothing_is_kept(server):
    spec = spec_with("ema")
    narrow = replace(spec, layers=(*MIXED[:2], replace(MIXED[2], d_out=8)))
    with RawClient(server.address, spec) as client:
        frames = encode_state(client.grant.session_id, state_of(narrow))
        code, details = refusal_of(client, *frames)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "The history of layer 'embedding' has derivatives of shape" in details
        assert client.export_state().layers == ()
        assert_versions(spec, client.versions_of(0, **SETTINGS), range(1))


def test_a_late_import_is_refused(server):
    spec = spec_with("ema")
    with RawClient(server.address, spec) as client:
        client.versions_of(0, **SETTINGS)
        frames = encode_state(client.grant.session_id, state_of(spec))
        code, details = refusal_of(client, *frames)

    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "has complete snapshots already" in details


def test_an_oversize_state_takes_no_memory(server):
    spec = spec_of("job", (2**29, 2**29), history="ema")
    with RawClient(server.address, spec) as client:
        small = state_of(spec_of("job", (6, 3), history="ema"))
        frame = next(encode_state(client.grant.session_id, small))
        request = pb.ImportStateRequest.FromString(frame)
        (moment,) = request.manifest.layers[0].activations
        moment.tensor.shape[:] = [2**29, 2**29]
        (moment,) = request.manifest.layers[0].derivatives
        moment.tensor.shape[:] = [2**29, 2**29]
        code, details = refusal_of(client, request.SerializeToString())

    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (
        f"take up to {2**62 + 2048} bytes, over max_history_bytes = 1000000" in details
    )


def test_a_cut_import_and_an_unknown_session_are_refused(server):
    spec = spec_with("ema")
    with RawClient(server.address, spec) as client:
        frames = list(encode_state(client.grant.session_id, state_of(spec)))
        request = pb.ImportStateRequest.FromString(frames[1])
        request.ClearField("payload")
        request.ClearField("checksum")
        cut = request.SerializeToString()
        code, details = refusal_of(client, frames[0], cut)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "A history is truncated" in details
        code, _ = refusal_of(client, *encode_state("nobody", state_of(spec)))
        assert code is grpc.StatusCode.NOT_FOUND
        code, details = refusal_of(client)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "has no manifest" in details
        client.grant.session_id = "nobody"
        with pytest.raises(grpc.RpcError) as caught:
            client.export_state()
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_exports_and_imports_are_bulk_streams():
    spec = spec_with("ema")
    with (
        serving(max_streams=1) as server,
        RawClient(server.address, spec) as client,
    ):
        release = threading.Event()

        def endless():
            release.wait(TIMEOUT_S)
            yield from ()

        open_push = client.channel.stream_stream(
            "/skfac.v1.PreconditioningService/PushSnapshots"
        )
        call = open_push(endless(), timeout=TIMEOUT_S)
        # The next has no room once the server has seen the push.
        with pytest.raises(grpc.RpcError) as caught:
            list(map(lambda _: client.export_state(), itertools.count()))  # noqa: C417
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        code, details = refusal_of(client, *encode_state("any", state_of(spec)))
        release.set()
        assert list(call) == []

    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "max_streams = 1" in details


def test_status_and_metrics_show_histories(server):
    spec = spec_with("ema")
    with RawClient(server.address, spec) as client:
        for step in range(3):
            client.versions_of(step, **SETTINGS)
        nbytes = sum(state.history.nbytes for state in client.export_state().layers)
        status = client.stub.GetStatus(pb.GetStatusRequest(), timeout=TIMEOUT_S)
        samples = scraped(server.metrics_address)

    assert status.sessions[0].history_bytes == nbytes
    assert samples["skfac_history_bytes", ("session", "job")] == nbytes
    side = ("side", "activations")
    count, total = (
        sum(v for k, v in samples.items() if k[0] == name and k[-1] == side)
        for name in ("skfac_inverse_rank_count", "skfac_inverse_rank_sum")
    )
    assert count == 9
    # Four rows at first, then at most the rank 4; one row of an embedding's diagonal.
    assert total == 3 * (4 + 4 + 1)
    status.sessions[0].history_bytes = 3 * 2**19
    output = io.StringIO()
    Console(file=output, width=120).print(StatusView(status))
    assert "history" in output.getvalue()
    assert "1.5 MiB" in output.getvalue()


def scraped(address: str) -> dict[tuple[object, ...], float]:
    url = f"http://{address}/metrics"
    text = urllib.request.urlopen(url, timeout=TIMEOUT_S).read().decode()
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


# ------------------------------------------------------------------- transports


@pytest.fixture(params=["embedded", "grpc", "unix"])
def target(request, tmp_path):
    if request.param == "embedded":
        yield "embedded"
        return
    unix = {"address": f"unix:{tmp_path}/skfac.sock"}
    with serving(**(unix if request.param == "unix" else {})) as server:
        yield server.address


def pending(sent: Snapshot) -> PendingSnapshot:
    """A snapshot that is on the host already."""
    copies = (HostCopy([r.activations, r.derivatives], None) for r in sent.layers)
    return PendingSnapshot(sent.rank, sent.step, sent.settings, dict(enumerate(copies)))


def run(target: str, spec: SessionSpec, steps: range, state: SessionState | None):
    """A trainer's session: import, push every step, export."""
    store = Store(spec)
    transport = connect(target, spec, 0, store.link(0))
    try:
        assert store.await_links(TIMEOUT_S)
        imported = state is None or transport.import_state(state, TIMEOUT_S)
        for step in steps:
            store.expect(step)
            transport.push(pending(snapshot_of(spec, step, **SETTINGS)))
            versions = versions_at(store, step + spec.lag, TIMEOUT_S)
        return imported, versions, transport.export_state(TIMEOUT_S)
    finally:
        transport.close()


def test_a_transport_brings_histories_from_server_to_server(target):
    spec = spec_with("ema")
    _, _, state = run(target, spec, range(3), None)
    assert state is not None

    again = replace(spec, instance="run 2")
    imported, versions, after = run(target, again, range(3, 5), state)

    assert imported
    assert_versions(spec, [v for v in versions if v is not None], range(5))
    assert after is not None
    assert [layer.history.updates for layer in after.layers] == [5] * 3


def test_a_transport_says_why_a_server_refuses_a_state(target, caplog):
    spec = spec_with("ema")
    other = spec_with("window")

    imported, versions, _ = run(target, spec, range(1), state_of(other))

    assert not imported
    assert (
        "The histories were not imported: The history of layer 'linear'" in caplog.text
    )
    assert_versions(spec, [v for v in versions if v is not None], range(1))


def test_a_transport_without_a_server_has_no_state(tmp_path, caplog):
    spec = spec_with("ema")
    transport = connect(f"unix:{tmp_path}/nobody.sock", spec, 0, Store(spec).link(0))

    assert transport.export_state(0.1) is None
    assert not transport.import_state(state_of(spec), 0.1)
    transport.close()
    assert transport.export_state(0.1) is None

    assert "The histories were not exported: No server is connected." in caplog.text
    assert "The histories were not imported: No server is connected." in caplog.text


def test_a_closed_transport_has_no_state(target, caplog):
    spec = spec_with("ema")
    store = Store(spec)
    transport = connect(target, spec, 0, store.link(0))
    store.await_links(TIMEOUT_S)
    transport.close()

    assert transport.export_state(0.1) is None
    assert not transport.import_state(state_of(spec), 0.1)
    why = "There is no such" if target == "embedded" else "No server is connected."
    assert caplog.text.count(why) + caplog.text.count("The server is stopping") == 2


def test_a_server_that_does_not_answer_in_time_gives_no_state(monkeypatch, caplog):
    spec = spec_with("ema")
    with serving() as server:
        release, export = threading.Event(), server._engine.export_state

        def slow(session_id: str) -> SessionState:
            release.wait(TIMEOUT_S)
            return export(session_id)

        monkeypatch.setattr(server._engine, "export_state", slow)
        store = Store(spec)
        transport = connect(server.address, spec, 0, store.link(0))
        assert store.await_links(TIMEOUT_S)

        assert transport.export_state(0.05) is None
        release.set()
        assert transport.export_state(TIMEOUT_S) is not None
        transport.close()

    assert "DEADLINE_EXCEEDED" in caplog.text
