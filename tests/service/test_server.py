"""A real server on a real port: what it refuses, and that others never notice."""

import itertools
import threading
import urllib.request
from dataclasses import replace

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from skfac.curvature.invert import invert_factor
from skfac.curvature.layer import precondition_layer
from skfac.curvature.settings import CurvatureSettings
from skfac.v1 import preconditioning_pb2 as pb
from skfac.wire.channel import SERVICE
from skfac.wire.codec import encode_session
from skfac.wire.outcome import Version
from skfac.wire.session import SessionSpec
from skfac.wire.snapshot import LayerRows, Snapshot
from tests.support.raw_client import TIMEOUT_S, RawClient, snapshot_of, spec_of
from tests.support.servers import serving


@pytest.fixture
def server():
    with serving(max_snapshot_bytes=1_000_000, max_streams=8) as server:
        yield server


@pytest.fixture
def client(server):
    with RawClient(server.address, spec_of("honest")) as client:
        yield client


@pytest.fixture
def other(server):
    with RawClient(server.address, spec_of("other")) as other:
        yield other


def assert_still_serves(client: RawClient, step: int = 100) -> None:
    versions = client.versions_of(step)
    assert [version.step for version in versions] == [step] * len(client.spec.layers)


def with_rows(spec: SessionSpec, activations, derivatives) -> Snapshot:
    good = snapshot_of(spec, 0)
    rows = LayerRows(0, activations, derivatives)
    return replace(good, layers=(rows, good.layers[1]))


def test_versions_are_what_the_mathematics_says(client):
    snapshot = snapshot_of(client.spec, 5)
    versions = client.versions_of(5)

    for rows, version in zip(snapshot.layers, versions, strict=True):
        expected = precondition_layer(
            rows.activations, rows.derivatives, damping=0.1, split="pi"
        )
        assert all(map(torch.equal, version.preconditioner.tensors, expected.tensors))
        assert (version.rows, version.ranks) == (4, 1)


def test_a_stream_starts_with_what_is_newer_than_what_is_held(client):
    for step in (1, 2):
        assert [version.step for version in client.versions_of(step)] == [step] * 2

    newer = client.outcomes(3, held={0: 1})

    assert [(outcome.layer, outcome.step) for outcome in newer] == [
        (1, 1),
        (0, 2),
        (1, 2),
    ]


NAN = torch.tensor([[float("nan")] + [0.0] * 5])
REFUSED = {
    "wrong shape": (
        (torch.randn(4, 7), torch.randn(4, 3)),
        "activations of layer 'fc0' have shape (4, 7); expected (rows, 6)",
    ),
    "three dimensions": (
        (torch.randn(4, 6, 1), torch.randn(4, 3)),
        "activations of layer 'fc0' have shape (4, 6, 1)",
    ),
    "rows that do not match": (
        (torch.randn(4, 6), torch.randn(5, 3)),
        "4 rows of activations and 5 of derivatives",
    ),
    "mixed types": (
        (torch.randn(4, 6), torch.randn(4, 3).double()),
        "activations of torch.float32 and derivatives of torch.float64",
    ),
    "NaN rows": ((NAN, torch.ones(1, 3)), "activations of layer 'fc0' at step 0"),
    "oversize": (
        (torch.randn(30_000, 6), torch.randn(30_000, 3)),
        "max_snapshot_bytes = 1000000",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_snapshot_is_refused_by_name(client, other, case):
    arguments, message = REFUSED[case]
    bad = client.frames(with_rows(client.spec, *arguments))
    good = client.frames(snapshot_of(client.spec, 1))

    answers = client.push(*bad, *good)

    assert message in answers[0].refusal.message
    assert answers[0].refusal.code in {
        grpc.StatusCode.INVALID_ARGUMENT.value[0],
        grpc.StatusCode.RESOURCE_EXHAUSTED.value[0],
    }
    assert not answers[1].HasField("refusal")  # the stream goes on
    assert len(answers) == 2
    assert_still_serves(other)


@pytest.mark.parametrize("damping", [0.0, -1.0, float("nan"), float("inf")])
def test_a_bad_setting_is_refused_with_its_step(client, other, damping):
    frame = pb.PushSnapshotsRequest.FromString(
        client.frames(snapshot_of(client.spec, 7))[0]
    )
    frame.manifest.settings.damping = damping

    (answer,) = client.push(frame.SerializeToString())

    assert f"positive and finite, got {damping}" in answer.refusal.message
    assert answer.refusal.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert answer.step == 7
    assert_still_serves(client)
    assert_still_serves(other)


def test_an_unknown_dtype_is_refused(client, other):
    frame = pb.PushSnapshotsRequest.FromString(
        client.frames(snapshot_of(client.spec, 3))[0]
    )
    frame.manifest.layers[0].activations.dtype = 99  # type: ignore[assignment]

    (answer,) = client.push(frame.SerializeToString())

    assert "Unknown dtype code 99" in answer.refusal.message
    assert answer.step == 3
    assert_still_serves(client)
    assert_still_serves(other)


def test_an_oversize_declaration_takes_no_memory(client, other):
    frame = pb.PushSnapshotsRequest.FromString(
        client.frames(snapshot_of(client.spec, 0))[0]
    )
    for tensor in (
        frame.manifest.layers[0].activations,
        frame.manifest.layers[0].derivatives,
    ):
        tensor.shape[0] = 2**50

    (answer,) = client.push(frame.SerializeToString())

    assert "max_snapshot_bytes = 1000000" in answer.refusal.message
    assert answer.refusal.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    assert_still_serves(client)
    assert_still_serves(other)


def test_a_truncated_snapshot_is_refused(client, other):
    snapshot = snapshot_of(client.spec, 0)
    frame = pb.PushSnapshotsRequest.FromString(client.frames(snapshot)[0])
    short = pb.PushSnapshotsRequest(manifest=frame.manifest).SerializeToString()

    with pytest.raises(grpc.RpcError) as caught:
        client.push(short)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "step 0 is truncated" in caught.value.details()

    cut_off, fine = client.push(short, *client.frames(snapshot))
    assert "step 0 is truncated" in cut_off.refusal.message
    assert not fine.HasField("refusal")
    assert_still_serves(other)


def test_a_cut_frame_and_a_wrong_checksum_are_refused(client, other):
    (frame,) = client.frames(snapshot_of(client.spec, 0))
    flipped = frame[:-1] + bytes([frame[-1] ^ 1])

    cut, wrong = client.push(frame[:-5], flipped)

    assert "A frame is cut" in cut.refusal.message
    assert "checksum" in wrong.refusal.message
    assert_still_serves(client)
    assert_still_serves(other)


def test_a_payload_that_is_too_long_is_refused(client):
    frame = pb.PushSnapshotsRequest.FromString(
        client.frames(snapshot_of(client.spec, 0))[0]
    )
    del frame.manifest.layers[1]

    (answer,) = client.push(frame.SerializeToString())

    assert "declared as" in answer.refusal.message
    assert_still_serves(client)


def test_a_snapshot_has_one_answer_whatever_follows(client):
    bad = with_rows(client.spec, torch.randn(7, 6), torch.randn(8, 3))
    (first,) = client.frames(bad)
    rest = client.frames(snapshot_of(client.spec, 0))[0][:-9]  # cannot be read
    payload = pb.PushSnapshotsRequest(payload=b"more", checksum=1).SerializeToString()
    good = client.frames(snapshot_of(client.spec, 1))

    answers = client.push(first, payload, rest, *good, *good, payload)

    assert [a.HasField("refusal") for a in answers] == [True, False, False]
    assert [a.duplicate for a in answers] == [False, False, True]


def test_steps_do_not_go_backwards(client, other):
    later, earlier = (snapshot_of(client.spec, step) for step in (7, 6))

    answers = client.push(*client.frames(later), *client.frames(earlier))

    assert "pushed step 6 of layer 'fc0' after step 7" in answers[1].refusal.message
    assert answers[1].refusal.code == grpc.StatusCode.FAILED_PRECONDITION.value[0]
    assert_still_serves(other)


def test_a_resent_snapshot_is_a_duplicate(client):
    frames = client.frames(snapshot_of(client.spec, 3))

    first, second = client.push(*frames, *frames)

    assert not first.duplicate
    assert second.duplicate
    assert client.stub.GetStatus(pb.GetStatusRequest()).sessions[0].refused == 0


def test_a_rank_whose_layers_differ_is_refused(server, other):
    mine = spec_of("pair", (6, 3), world_size=2)
    theirs = spec_of("pair", (6, 4), world_size=2)
    with RawClient(server.address, mine):
        request = pb.OpenSessionRequest(spec=encode_session(theirs), rank=1)
        with pytest.raises(grpc.RpcError) as caught:
            other.stub.OpenSession(request, timeout=TIMEOUT_S)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "layer 0 is" in caught.value.details()
    assert "d_out=4" in caught.value.details()
    assert_still_serves(other)


def test_two_ranks_are_stacked_in_the_order_of_ranks(server):
    spec = spec_of("pair", world_size=2)
    with (
        RawClient(server.address, spec) as zero,
        RawClient(server.address, spec, rank=1) as one,
    ):
        snapshots = [snapshot_of(spec, 0, rank=rank) for rank in (0, 1)]
        one.push(*one.frames(snapshots[1]))
        zero.push(*zero.frames(snapshots[0]))
        received = [zero.outcomes(2), one.outcomes(2)]

    rows = [snapshot.layers[0] for snapshot in snapshots]
    expected = precondition_layer(
        torch.cat([r.activations for r in rows]),
        torch.cat([r.derivatives for r in rows]),
        damping=0.1,
        split="pi",
    )
    for version in (outcomes[0] for outcomes in received):
        assert isinstance(version, Version)
        assert (version.rows, version.ranks) == (8, 2)
        assert all(map(torch.equal, version.preconditioner.tensors, expected.tensors))


def test_an_unknown_session_is_not_found(client):
    frames = client.frames(snapshot_of(client.spec, 0))
    client.stub.CloseSession(
        pb.CloseSessionRequest(session_id=client.grant.session_id), timeout=TIMEOUT_S
    )

    for call in (lambda: client.push(*frames), lambda: client.outcomes(1)):
        with pytest.raises(grpc.RpcError) as caught:
            call()
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_streams_never_starve_control_calls(server, client):
    release = threading.Event()

    def endless():
        release.wait(TIMEOUT_S)
        yield from ()

    open_push = client.channel.stream_stream(f"/{SERVICE}/PushSnapshots")
    calls = [open_push(endless(), timeout=TIMEOUT_S) for _ in range(8)]
    # The ninth has no room once the server has seen the others.
    with pytest.raises(grpc.RpcError) as caught:
        list(map(lambda _: client.push(), itertools.count()))  # noqa: C417
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "max_streams = 8" in caught.value.details()
    assert client.stub.GetStatus(pb.GetStatusRequest(), timeout=TIMEOUT_S).sessions

    release.set()
    assert [list(call) for call in calls] == [[]] * 8
    assert_still_serves(client)


def test_health_and_reflection_answer(client):
    stub = health_pb2_grpc.HealthStub(client.channel)
    for name in ("", "live", "ready", SERVICE):
        answer = stub.Check(health_pb2.HealthCheckRequest(service=name))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING

    reflection = reflection_pb2_grpc.ServerReflectionStub(client.channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    (listed,) = reflection.ServerReflectionInfo(iter([request]))
    assert SERVICE in [s.name for s in listed.list_services_response.service]


def test_probes_without_tls_have_an_address_of_their_own():
    with serving(health_address="127.0.0.1:0") as server:
        with grpc.insecure_channel(server.health_address) as channel:
            check = health_pb2_grpc.HealthStub(channel).Check
            answer = check(health_pb2.HealthCheckRequest(service="ready"))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            with pytest.raises(grpc.RpcError, match="UNIMPLEMENTED"):
                channel.unary_unary(f"/{SERVICE}/GetStatus")(b"")
        with pytest.raises(OSError, match="Cannot listen on health_address"):
            serving(health_address=server.health_address).__enter__()


def test_metrics_are_scraped(server, client):
    for step in range(3):
        client.versions_of(step)
    bad = with_rows(client.spec, torch.randn(4, 7), torch.randn(4, 3))
    client.push(*client.frames(bad))

    url = f"http://{server.metrics_address}/metrics"
    text = urllib.request.urlopen(url, timeout=TIMEOUT_S).read().decode()

    samples = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    job = ("session", "honest")
    assert samples["skfac_inversion_seconds_count", job] == 6
    assert samples["skfac_stage_seconds_count", job, ("stage", "solve")] == 6
    assert samples["skfac_outcomes_total", ("outcome", "solved"), job] == 6
    assert samples["skfac_received_bytes_total", job] == 3 * 4 * (6 + 3 + 3 + 2) * 4
    assert samples["skfac_sent_bytes_total", job] > 0
    assert samples["skfac_queue_depth",] == 0
    assert samples["skfac_sessions",] == 1
    refused = ("skfac_refused_total", job, ("status", "INVALID_ARGUMENT"))
    assert samples[refused] == 1


def test_an_empty_and_a_huge_tensor_pass():
    columns = 39_321_600  # 300 MiB with two rows of float32
    spec = spec_of("huge", (columns, 1), (5, 2))
    with serving() as server, RawClient(server.address, spec) as client:
        huge = LayerRows(0, torch.rand(2, columns), torch.rand(2, 1))
        empty = LayerRows(1, torch.empty(0, 5), torch.empty(0, 2))
        sent = Snapshot(0, 0, CurvatureSettings(damping=1e6), (huge, empty))
        (answer,) = client.push(*client.frames(sent))
        outcomes = client.outcomes(2)

    assert not answer.HasField("refusal")
    version, lost = sorted(outcomes, key=lambda outcome: outcome.layer)
    assert isinstance(version, Version)
    inverse = version.preconditioner.activations
    assert huge.activations.nbytes == 300 * 1024 * 1024
    again = invert_factor(huge.activations, damping=inverse.damping)
    assert torch.equal(inverse.tensor, again.tensor)
    assert lost.reason == "empty"  # type: ignore[union-attr]
