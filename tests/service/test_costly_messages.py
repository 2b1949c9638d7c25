"""Small things in great numbers are refused before each of them is looked at.

What a reader does for each of them in Python holds up all other sessions.
"""

import grpc
import pytest

from skfac.v1 import preconditioning_pb2 as pb
from skfac.wire.codec import encode_session
from skfac.wire.errors import InvalidRequestError
from skfac.wire.frames import MAX_FRAME_FIELDS, encode_frames, parse_frame
from skfac.wire.messages import MAX_DIMENSIONS, decode_header
from tests.support.raw_client import RawClient, snapshot_of, spec_of
from tests.support.servers import serving

LIMIT = {"max_layers": 2}


@pytest.fixture
def client():
    with (
        serving(**LIMIT) as server,
        RawClient(server.address, spec_of("job", history="ema")) as client,
    ):
        yield client
        assert client.versions_of(9)  # it serves on


def refused(call):
    with pytest.raises(grpc.RpcError) as caught:
        call()
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    return caught.value.details()


def test_fields_of_a_frame():
    field = b"\x78\x01"  # an unknown one
    assert parse_frame(field * (MAX_FRAME_FIELDS - 1)).manifest is None
    with pytest.raises(InvalidRequestError, match=f"{MAX_FRAME_FIELDS} fields or more"):
        parse_frame(field * MAX_FRAME_FIELDS)


def test_dimensions_of_a_tensor():
    header = pb.TensorHeader(dtype=pb.DTYPE_FLOAT32, shape=[1] * MAX_DIMENSIONS)
    assert decode_header(header).shape == (1,) * MAX_DIMENSIONS
    header.shape.append(1)
    with pytest.raises(InvalidRequestError, match="has 9 dimensions; 8 are taken"):
        decode_header(header)


def test_layers_of_a_snapshot(client):
    sent = pb.PushSnapshotsRequest.FromString(
        client.frames(snapshot_of(client.spec, 3))[0]
    )
    sent.manifest.layers.add().layer = 9  # which would be refused for another reason

    (answer,) = client.push(sent.SerializeToString())

    assert answer.refusal.message == "Step 3 has 3 layers; max_layers = 2."
    assert answer.step == 3


def test_layers_of_a_session(client):
    wrong = encode_session(spec_of("other"))
    wrong.layers.add()  # of no name

    request = pb.OpenSessionRequest(spec=wrong)

    why = refused(lambda: client.stub.OpenSession(request, timeout=30))
    assert why == "Job 'other' declares 3 layers; max_layers = 2."


def test_versions_that_a_client_holds(client):
    held = dict.fromkeys(range(3), 0)

    why = refused(lambda: next(client.subscribe(held)))
    assert why == "The client holds 3 layers; max_layers = 2."


def test_layers_of_histories(client):
    manifest = pb.StateManifest(session_id=client.grant.session_id)
    for index in range(3):  # without a dtype, which would be refused
        manifest.layers.add(layer=index)

    frames = encode_frames(manifest.SerializeToString(), ())

    why = refused(lambda: client.import_frames(*frames))
    assert why == "The histories are of 3 layers; max_layers = 2."
