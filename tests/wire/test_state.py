"""Histories keep their bits on the wire; what is cut or malformed is refused."""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from skfac.curvature.factor import Moment
from skfac.curvature.history import LayerHistory
from skfac.curvature.settings import CurvatureSettings
from skfac.v1 import preconditioning_pb2 as pb
from skfac.wire import frames as frames_module
from skfac.wire.channel import MAX_FRAME_BYTES
from skfac.wire.errors import InvalidRequestError, LimitExceededError
from skfac.wire.frames import encode_frames
from skfac.wire.session import MAX_WINDOW
from skfac.wire.state import LayerState, LayerStateHeader, SessionState
from skfac.wire.state_codec import StateReceiver, encode_state
from tests.support.dense import normal
from tests.support.values import assert_same_history

UINT64 = st.integers(1, 2**64 - 1)
NUMBERS = st.floats(allow_nan=False)
DTYPES = st.sampled_from([torch.float32, torch.float64])


SHAPES = st.lists(st.integers(0, 4), min_size=2, max_size=3)
MOMENTS = st.tuples(
    st.sampled_from(["rows", "dense", "diagonal"]), SHAPES, DTYPES, NUMBERS, NUMBERS
)
SIDES = st.lists(MOMENTS, max_size=3)
LAYERS = st.fixed_dictionaries(
    {
        "layer": st.integers(0, 2**32 - 1),
        "step": UINT64,
        "history": st.sampled_from(["snapshot", "window", "ema"]),
        "diagonal": st.booleans(),
        "activations": SIDES,
        "derivatives": SIDES,
        "updates": UINT64,
        "dtype": DTYPES,
    }
)


def state_of(drawn) -> LayerState:
    """Any numbers in any form: whether they fit a session is another question."""
    history = LayerHistory(
        history=drawn["history"],
        diagonal=drawn["diagonal"],
        activations=moments_of(drawn["activations"]),
        derivatives=moments_of(drawn["derivatives"]),
        updates=drawn["updates"],
        dtype=drawn["dtype"],
    )
    return LayerState(drawn["layer"], drawn["step"], history)


def moments_of(side) -> tuple[Moment, ...]:
    return tuple(
        Moment(form, normal(*shape, seed=seed).to(dtype), weight, dropped)
        for seed, (form, shape, dtype, weight, dropped) in enumerate(side)
    )


def received(frames: Iterable[bytes]) -> tuple[str, SessionState]:
    receiver = StateReceiver(admit=lambda *_: None)
    for frame in frames:
        receiver.receive(frame)
    return receiver.finish()


def small_state(history: str = "window", layers: int = 2) -> SessionState:
    states = []
    for layer in range(layers):
        found = LayerHistory.empty(history)  # type: ignore[arg-type]
        for seed in range(3):
            rows = normal(4, 5, seed=seed), normal(4, 6, seed=9 + seed)
            found = found.fold(*rows, CurvatureSettings(damping=1.0))
        states.append(LayerState(layer, 7 + layer, found))
    return SessionState(tuple(states))


@given(drawn=st.lists(LAYERS, max_size=4), payload_bytes=st.integers(1, 300))
def test_histories_arrive_bit_by_bit(drawn, payload_bytes):
    sent = SessionState(tuple(map(state_of, drawn)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frames_module, "PAYLOAD_BYTES", payload_bytes)
        session_id, state = received(list(encode_state("id", sent)))

    assert session_id == "id"
    assert len(state.layers) == len(sent.layers)
    for actual, expected in zip(state.layers, sent.layers, strict=True):
        assert (actual.layer, actual.step) == (expected.layer, expected.step)
        assert_same_history(actual.history, expected.history)
        assert actual.header == expected.header
        assert actual.header.nbytes == expected.history.nbytes


def test_a_manifest_may_have_several_layers():
    sent = small_state()
    manifest = pb.StateManifest(session_id="id")
    for frame in encode_state("id", sent):
        request = pb.ImportStateRequest.FromString(frame)
        manifest.layers.extend(request.manifest.layers)
    tensors = [tensor for layer in sent.layers for tensor in layer.tensors]

    _, state = received(encode_frames(manifest.SerializeToString(), tensors))

    for actual, expected in zip(state.layers, sent.layers, strict=True):
        assert_same_history(actual.history, expected.history)


def test_other_tensors_can_hold_a_history():
    (state, _) = small_state().layers
    copies = [tensor.clone() for tensor in state.tensors]

    moved = state.with_tensors(copies)

    assert all(a is b for a, b in zip(moved.tensors, copies, strict=True))
    assert (moved.layer, moved.step) == (state.layer, state.step)
    assert_same_history(moved.history, state.history)


def test_the_largest_window_has_frames_that_fit():
    moment = Moment("rows", torch.zeros(0, 2**20), 1e-300, 1e-300)
    history = LayerHistory("window", False, *2 * (MAX_WINDOW * (moment,),), MAX_WINDOW)
    frames = list(encode_state("id", SessionState((LayerState(0, 1, history),))))

    assert max(map(len, frames)) < MAX_FRAME_BYTES // 2


# ------------------------------------------------------------------- refusals


def test_each_layer_is_admitted_before_memory_is_taken():
    sent, asked = small_state(), []

    def admit(session_id: str, header: LayerStateHeader, taken_bytes: int) -> None:
        asked.append((session_id, header, taken_bytes))
        if header.layer == 1:
            raise LimitExceededError("Enough.")

    first, second = encode_state("id", sent)
    receiver = StateReceiver(admit)
    receiver.receive(first)
    with pytest.raises(LimitExceededError, match="Enough"):
        receiver.receive(second)

    headers = [layer.header for layer in sent.layers]
    assert asked == [("id", headers[0], 0), ("id", headers[1], headers[0].nbytes)]


def test_a_truncated_history_is_refused(monkeypatch):
    monkeypatch.setattr(frames_module, "PAYLOAD_BYTES", 64)
    sent = small_state(layers=1)
    frames = list(encode_state("id", sent))

    with pytest.raises(InvalidRequestError, match="64 bytes of layer 0 are missing"):
        received(frames[:-1])
    with pytest.raises(InvalidRequestError, match="history is truncated"):
        received(frames[:-1] + frames)


def test_streams_that_make_no_sense_are_refused():
    frames = list(encode_state("id", small_state()))
    payload = pb.ImportStateRequest.FromString(frames[0])
    payload.ClearField("manifest")

    with pytest.raises(InvalidRequestError, match="has no manifest"):
        received([])
    with pytest.raises(InvalidRequestError, match="payload came without a manifest"):
        received([payload.SerializeToString()])
    with pytest.raises(InvalidRequestError, match="histories of two sessions"):
        received([*frames, *encode_state("other", small_state())])
    with pytest.raises(InvalidRequestError, match="checksum"):
        received([frames[0][:-1] + bytes([frames[0][-1] ^ 1])])
    with pytest.raises(InvalidRequestError, match="A StateManifest is malformed"):
        received(encode_frames(b"\xff", []))


@pytest.mark.parametrize("code", [0, 99])
@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("history", "Unknown history code"),
        ("dtype", "Unknown dtype code"),
        ("form", "Unknown form code"),
        ("tensor", "Unknown dtype code"),
    ],
)
def test_unknown_codes_are_refused(field, message, code):
    (frame,) = encode_state("id", small_state(layers=1))
    request = pb.ImportStateRequest.FromString(frame)
    layer = request.manifest.layers[0]
    if field == "form":
        layer.derivatives[0].form = code
    elif field == "tensor":
        layer.derivatives[0].tensor.dtype = code
    else:
        setattr(layer, field, code)

    with pytest.raises(InvalidRequestError, match=f"{message} {code}"):
        received([request.SerializeToString()])


@given(data=st.binary(max_size=60))
def test_arbitrary_frames_are_read_or_refused(data):
    for frame in (data, next(encode_frames(data, []))):
        with suppress(InvalidRequestError, LimitExceededError):
            received([frame])


def test_dtypes_that_cannot_be_sent_are_refused():
    (state,) = small_state(layers=1).layers
    half = replace(state.history, dtype=torch.float16)

    with pytest.raises(InvalidRequestError, match=r"Cannot send tensors of .*float16"):
        list(encode_state("id", SessionState((replace(state, history=half),))))
