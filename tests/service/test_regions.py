"""A real server and shared memory: what it takes, and what it survives."""

import os
import secrets
from dataclasses import replace
from typing import Any

import grpc
import pytest
import torch

from skfac.curvature.layer import precondition_layer
from skfac.service import regions
from skfac.v1 import preconditioning_pb2 as pb
from skfac.wire import frames as wire_frames
from skfac.wire import shared_memory
from skfac.wire.channel import SERVICE
from skfac.wire.codec import build_outcomes, decode_outcomes_manifest
from skfac.wire.errors import InvalidRequestError
from skfac.wire.frames import decode_frame, encode_region
from skfac.wire.payload import PayloadBuffer
from skfac.wire.shared_memory import Area
from skfac.wire.state_codec import _decode_moment
from tests.support.raw_client import TIMEOUT_S, RawClient, snapshot_of, spec_of
from tests.support.servers import serving
from tests.support.shared import SharedPush

INVALID = grpc.StatusCode.INVALID_ARGUMENT.value[0]
ROWS_NBYTES = [4 * 4 * 6, 4 * 4 * 3, 4 * 4 * 3, 4 * 4 * 2]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    path = tmp_path / "shm"
    path.mkdir()
    monkeypatch.setattr(shared_memory, "FOLDER", path)
    yield path
    assert not list(path.iterdir())


@pytest.fixture
def server():
    with serving(max_snapshot_bytes=1_000_000) as server:
        yield server


@pytest.fixture
def client(server):
    with RawClient(server.address, spec_of("honest")) as client:
        yield client


@pytest.fixture(params=[False, True], ids=["named", "sealed"])
def push(request, client):
    with SharedPush(client, sealed=request.param) as push:
        yield push


def answered(frames, down: Area, consume=lambda end: None):
    """Read outcomes by hand; yields each with whether it was in shared memory."""
    for data in frames:
        frame = decode_frame(data)
        if frame.manifest is not None:
            message, headers = decode_outcomes_manifest(frame.manifest)
            buffer = PayloadBuffer(headers)
            buffer.read_shared(down)
            consume(message.shared_end)
        buffer.write(frame.payload)
        if buffer.complete:
            for outcome in build_outcomes(message, buffer.tensors()):
                yield outcome, message.shared_end > 0


def subscribe(client: RawClient, token: bytes):
    call: Any = client.channel.unary_stream(
        f"/{SERVICE}/StreamPreconditioners",
        pb.StreamPreconditionersRequest.SerializeToString,
    )
    request = pb.StreamPreconditionersRequest(
        session_id=client.grant.session_id, token=token
    )
    return call(request, timeout=TIMEOUT_S)


def changed(frame: bytes, *offsets: int) -> bytes:
    """A manifest whose tensors are said to be elsewhere."""
    request = pb.PushSnapshotsRequest.FromString(frame)
    headers = [
        header
        for layer in request.manifest.layers
        for header in (layer.activations, layer.derivatives)
    ]
    for header, offset in zip(headers, offsets, strict=False):
        header.shared_offset = offset
    return request.SerializeToString()


def test_rows_and_inverses_go_through_shared_memory(client, push, folder):
    assert push.offer()
    assert not list(folder.iterdir())  # the server has removed the name
    outcomes = subscribe(client, push.token)
    snapshot = snapshot_of(client.spec, 5)
    (frame,) = push.frames(push.placed(snapshot))
    answer = push.ask(frame)
    assert not answer.HasField("refusal"), answer
    assert not decode_frame(frame).payload

    received = answered(outcomes, push.region.down)
    for rows, (version, shared) in zip(snapshot.layers, received, strict=False):
        expected = precondition_layer(
            rows.activations, rows.derivatives, damping=0.1, split="pi"
        )
        assert shared
        assert all(map(torch.equal, version.preconditioner.tensors, expected.tensors))
    outcomes.cancel()


def test_some_tensors_may_be_shared_and_others_not(client, push):
    assert push.offer()
    snapshot = snapshot_of(client.spec, 1)
    placed = push.placed(snapshot)
    mixed = placed.layers[0], snapshot.layers[1]
    (frame,) = push.frames(replace(snapshot, layers=mixed))
    assert decode_frame(frame).payload
    assert not push.ask(frame).HasField("refusal")

    expected = client.outcomes(2)
    rows = snapshot.layers[1]
    found = precondition_layer(
        rows.activations, rows.derivatives, damping=0.1, split="pi"
    )
    (version,) = (v for v in expected if v.layer == 1)
    assert all(map(torch.equal, version.preconditioner.tensors, found.tensors))


def test_what_was_taken_changes_no_more(client, push):
    assert push.offer()
    snapshot = snapshot_of(client.spec, 1)
    placed = push.placed(snapshot)
    assert not push.ask(*push.frames(placed)).HasField("refusal")
    push.region.up_map[:] = b"\xff" * len(push.region.up_map)  # NaN

    outcomes = client.outcomes(2)
    assert all(o.preconditioner.activations.tensor.isfinite().all() for o in outcomes)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([65_536], "offset 65536 is not in the 65536 bytes"),
        ([65_536 - 64], "96 bytes at offset 65472"),
        ([2**63], "is not in"),
        ([2**64 - 64], "is not in"),
        ([32], "not aligned"),
        ([0, 0, 0, 2**40], "is not in"),
    ],
)
def test_a_tensor_outside_is_refused_and_the_stream_goes_on(
    client, push, offsets, message
):
    assert push.offer()
    good = push.placed(snapshot_of(client.spec, 1))
    (frame,) = push.frames(good)

    refused = push.ask(changed(frame, *offsets))

    assert refused.refusal.code == INVALID
    assert message in refused.refusal.message
    assert not push.ask(frame).HasField("refusal")


def test_overlapping_tensors_are_copied_like_any(client, push):
    assert push.offer()
    (frame,) = push.frames(push.placed(snapshot_of(client.spec, 1)))

    assert not push.ask(changed(frame, 0, 64, 0, 64)).HasField("refusal")
    assert [o.step for o in client.outcomes(2)] == [1, 1]


def test_a_huge_tensor_takes_no_memory(client, push):
    assert push.offer()
    (frame,) = push.frames(push.placed(snapshot_of(client.spec, 1)))
    request = pb.PushSnapshotsRequest.FromString(frame)
    for header in (
        request.manifest.layers[0].activations,
        request.manifest.layers[0].derivatives,
    ):
        header.shape[0] = 2**50

    answer = push.ask(request.SerializeToString())

    assert "max_snapshot_bytes = 1000000" in answer.refusal.message
    assert not push.ask(frame).HasField("refusal")


def test_an_offset_without_a_region_is_refused(client, push):
    (frame,) = push.frames(push.placed(snapshot_of(client.spec, 1)))

    answer = push.ask(frame)

    assert "is not in the 0 bytes of shared memory" in answer.refusal.message
    assert push.offer()
    assert not push.ask(frame).HasField("refusal")


def test_a_file_that_is_cut_costs_its_snapshot_only(client):
    with SharedPush(client) as push:
        assert push.offer()
        good = snapshot_of(client.spec, 1)
        (frame,) = push.frames(push.placed(good))
        os.truncate(push.region.up.fd, 4096 + 64)

        answer = push.ask(frame)

        assert answer.refusal.code == INVALID
        assert "was cut" in answer.refusal.message
        # It is written to all the same: down there the file only grows again.
        outcomes = subscribe(client, push.token)
        assert not push.ask(*client.frames(good)).HasField("refusal")  # inline
        received = answered(outcomes, push.region.down)
        assert [next(received)[0].step for _ in range(2)] == [1, 1]
        outcomes.cancel()


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "../../etc/passwd"},
        {"name": "1/fd/0"},
        {"name": f"{os.getpid()}/fd/0"},
        {"name": "skfac-" + "0" * 32},
        {"name": ""},
        {"token": bytes(16)},
        {"up_nbytes": 65_536 + 4096},
        {"down_nbytes": 4_000_001},
        {"up_nbytes": 2**64 - 1},
    ],
    ids=["path", "other", "own", "missing", "empty", "token", "up", "down", "huge"],
)
def test_an_offer_that_does_not_fit_is_declined(client, push, fields):
    assert not push.offer(**fields)
    assert not push.ask(*client.frames(snapshot_of(client.spec, 1))).HasField("refusal")


def test_an_offer_that_cannot_be_read_is_declined(client, push):
    assert not push.ask(encode_region(b"\xff\xff\xff")).region_accepted
    assert not push.ask(*client.frames(snapshot_of(client.spec, 1))).HasField("refusal")


def test_an_offer_belongs_to_no_snapshot(client, push):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wire_frames, "PAYLOAD_BYTES", 100)
        first, *rest = client.frames(snapshot_of(client.spec, 1))
    push._frames.put(first)
    assert push.offer()
    assert not push.ask(*rest).HasField("refusal")


def test_a_connection_has_one_region(client, push):
    assert push.offer()
    assert not push.offer()
    with SharedPush(client) as second:
        os.pwrite(second.region.up.fd, push.token, 0)
        assert not second.offer(token=push.token)
    (frame,) = push.frames(push.placed(snapshot_of(client.spec, 1)))
    assert not push.ask(frame).HasField("refusal")


def test_regions_are_of_one_connection(client, push):
    assert push.offer()
    for token in (b"", secrets.token_bytes(16)):
        outcomes = subscribe(client, token)
        if not token:
            assert not push.ask(
                *push.frames(push.placed(snapshot_of(client.spec, 1)))
            ).HasField("refusal")
        received = answered(outcomes, Area(-1, 0, 0))
        assert [next(received)[1] for _ in range(2)] == [False, False]
        outcomes.cancel()


def test_what_was_taken_or_known_may_be_answered_in_the_header(client, push):
    assert push.offer(answers_in_header=True)
    one, two = (push.placed(snapshot_of(client.spec, step)) for step in (1, 2))
    (first,), (second,) = push.frames(one), push.frames(two)
    assert push.region.answered.read() == 0

    push.tell(first)
    push.until_answered(2)
    push.tell(second, first)  # the last is known: all before 3 are answered anyhow
    push.until_answered(3)
    (third,) = push.frames(push.placed(snapshot_of(client.spec, 3)))
    refused = push.ask(changed(third, 2**40))
    assert "is not in" in refused.refusal.message  # and the only message

    assert push.region.answered.read() == 3
    assert {outcome.step for outcome in client.outcomes(4)} == {1, 2}


def test_a_header_that_cannot_be_written_is_made_up_for_by_a_message(
    client, push, monkeypatch
):
    assert push.offer(answers_in_header=True)
    (frame,) = push.frames(push.placed(snapshot_of(client.spec, 1)))

    def fails(self, value):
        raise OSError("No file")

    monkeypatch.setattr(shared_memory.Counter, "write", fails)
    answer = push.ask(frame)

    assert answer.step == 1
    assert not answer.HasField("refusal")


def test_a_region_ends_with_its_stream(client, push, monkeypatch):
    closed: list[object] = []
    real = regions.Regions.close
    monkeypatch.setattr(
        regions.Regions,
        "close",
        lambda self, key: (real(self, key), closed.append((key, len(self)))),
    )
    assert push.offer()
    outcomes = subscribe(client, push.token)
    (frame,) = push.frames(push.placed(snapshot_of(client.spec, 1)))
    assert not push.ask(frame).HasField("refusal")
    received = answered(outcomes, push.region.down)
    assert next(received)[1]
    assert next(received)[1]

    push.end()
    assert closed == [((push.session_id, push.token), 0)]
    client.push(*client.frames(snapshot_of(client.spec, 2)))
    assert not next(received)[1]
    outcomes.cancel()


@pytest.mark.parametrize("told", [None, 1, 2**40, 2**64 - 1])
def test_a_reader_that_lies_or_sleeps_gets_the_rest_inline(client, told):
    # Each version of both layers takes 4 tensors of 64 or 128 bytes.
    with SharedPush(client, down_nbytes=512) as push:
        assert push.offer()
        outcomes = subscribe(client, push.token)
        received = answered(outcomes, push.region.down)
        ways = []
        for step in range(1, 8):
            snapshot = snapshot_of(client.spec, step)
            answer = push.ask(*push.frames(push.placed(snapshot)))
            assert not answer.HasField("refusal")
            for _ in range(2):
                version, shared = next(received)
                rows = snapshot.layers[version.layer]
                expected = precondition_layer(
                    rows.activations, rows.derivatives, damping=0.1, split="pi"
                )
                pairs = zip(
                    version.preconditioner.tensors, expected.tensors, strict=True
                )
                assert all(torch.equal(mine, theirs) for mine, theirs in pairs)
                ways.append(shared)
            if told is not None:
                push.region.consumed.write(told)
        outcomes.cancel()

    assert ways[0]
    assert not any(ways[4:])


def test_a_reader_that_keeps_up_gets_all_through_shared_memory(client):
    with SharedPush(client, down_nbytes=1024) as push:
        assert push.offer()
        outcomes = subscribe(client, push.token)
        consume = push.region.consumed.write
        received = answered(outcomes, push.region.down, consume)
        ways = []
        for step in range(1, 20):
            snapshot = snapshot_of(client.spec, step)
            push.ask(*push.frames(push.placed(snapshot)))
            ways += [next(received)[1] for _ in range(2)]
        outcomes.cancel()

    assert all(ways)


def test_histories_are_never_shared():
    moment = pb.Moment(form=pb.Moment.FORM_DENSE, weight=1.0)
    moment.tensor.dtype = pb.DTYPE_FLOAT32
    moment.tensor.shared_offset = 0
    with pytest.raises(InvalidRequestError, match="not sent through shared memory"):
        _decode_moment(moment)
