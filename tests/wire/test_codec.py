"""Values keep their bits on the wire; what has no meaning is refused by name."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from skfac.curvature.history import LayerHistory
from skfac.curvature.inverse import DiagonalInverse
from skfac.curvature.layer import precondition_layer
from skfac.curvature.settings import CurvatureSettings
from skfac.v1 import preconditioning_pb2 as pb
from skfac.wire.channel import MAX_FRAME_BYTES
from skfac.wire.codec import (
    build_outcomes,
    build_snapshot,
    decode_outcomes_manifest,
    decode_session,
    decode_snapshot_header,
    encode_outcomes,
    encode_session,
    encode_snapshot,
    parse_snapshot_manifest,
)
from skfac.wire.errors import InvalidRequestError
from skfac.wire.frames import decode_frame
from skfac.wire.outcome import Loss, LossReason, Outcome, Version
from skfac.wire.payload import PayloadBuffer
from skfac.wire.session import MAX_EXTENT, MAX_IN_FLIGHT, MAX_WORLD_SIZE, LayerSpec
from skfac.wire.snapshot import LayerRows, Snapshot, TensorHeader
from tests.support.dense import normal
from tests.support.values import (
    layer_rows,
    layer_spec,
    loss,
    same_bits,
    session_spec,
    version,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=9)
UINT32, UINT64 = st.integers(1, 2**32 - 1), st.integers(1, 2**64 - 1)
KINDS = st.sampled_from(["linear", "conv2d"])
EXTENT = st.integers(1, MAX_EXTENT)
GROUPED = st.builds(
    LayerSpec,
    *(TEXT, KINDS, st.integers(1, 2**20), st.integers(1, 2**20), st.booleans()),
    groups=st.integers(1, 2**20),
)
LAYER = GROUPED | st.builds(
    LayerSpec,
    *(TEXT, KINDS, EXTENT, EXTENT, st.booleans()),
    diagonal=st.booleans(),
)
UNIT = st.floats(0, 1, exclude_min=True)
SETTINGS = st.builds(
    CurvatureSettings,
    damping=st.floats(0, exclude_min=True, allow_infinity=False),
    decay=st.floats(0, 1, exclude_max=True),
    window=UINT64,
    rank=st.none() | UINT64,
    energy=UNIT,
)
SESSIONS = st.builds(
    lambda layers, **changes: session_spec(*layers, **changes),
    st.lists(LAYER, min_size=1, max_size=4, unique_by=lambda layer: layer.name),
    job=TEXT,
    instance=TEXT,
    world_size=st.integers(1, MAX_WORLD_SIZE),
    damping_split=st.sampled_from(["pi", "equal"]),
    history=st.sampled_from(["snapshot", "window", "ema"]),
    update_every=UINT32,
    lag=st.integers(0, MAX_IN_FLIGHT - 1),
    on_late=st.sampled_from(["keep", "wait", "raise"]),
)
BROKEN = [b"\xff", b"\x0a\x05a", b"\x0a\x02\xff\xfe", b"\x0b"]


def payload_of(
    frames: Iterable[bytes], headers: Sequence[TensorHeader]
) -> PayloadBuffer:
    buffer = PayloadBuffer(headers)
    for frame in frames:
        buffer.write(decode_frame(frame).payload)
    return buffer


def sent_snapshot(sent: Snapshot) -> tuple[str, Snapshot]:
    frames = list(encode_snapshot("id", sent))
    manifest = decode_frame(frames[0]).manifest
    assert manifest is not None
    message = parse_snapshot_manifest(manifest)
    header = decode_snapshot_header(message)
    assert header == sent.header
    tensors = payload_of(frames, header.tensors).tensors()
    return message.session_id, build_snapshot(header, tensors)


def sent_outcomes(outcomes: Sequence[Outcome]) -> list[Outcome]:
    frames = list(encode_outcomes(outcomes))
    manifest = decode_frame(frames[0]).manifest
    assert manifest is not None
    message, headers = decode_outcomes_manifest(manifest)
    return build_outcomes(message, payload_of(frames, headers).tensors())


def assert_same(actual: Outcome, expected: Outcome) -> None:
    if isinstance(expected, Loss):
        assert actual == expected
        return
    assert isinstance(actual, Version)
    for field in ("layer", "step", "rows", "ranks", "updates"):
        assert getattr(actual, field) == getattr(expected, field)
    for side in ("activations", "derivatives"):
        mine = getattr(actual.preconditioner, side)
        theirs = getattr(expected.preconditioner, side)
        assert type(mine) is type(theirs)
        assert mine.damping == theirs.damping
        assert same_bits(mine.tensor, theirs.tensor)


@given(spec=SESSIONS)
def test_sessions_arrive_as_they_were(spec):
    data = encode_session(spec).SerializeToString()

    assert decode_session(pb.SessionSpec.FromString(data)) == spec


@pytest.mark.parametrize("code", [0, 99])
@pytest.mark.parametrize("field", ["damping_split", "history", "on_late"])
def test_sessions_with_unknown_codes_are_refused(field, code):
    message = encode_session(session_spec())
    setattr(message, field, code)

    with pytest.raises(InvalidRequestError, match=f"Unknown {field} code {code}"):
        decode_session(message)


def test_sessions_are_checked_when_they_arrive():
    message = encode_session(session_spec())
    message.layers[0].d_in = 0

    with pytest.raises(InvalidRequestError, match="'fc' declares a 2 × 0 weight"):
        decode_session(message)


@given(
    counts=st.lists(st.integers(0, 5), max_size=4),
    dtypes=st.lists(st.sampled_from([torch.float32, torch.float64]), min_size=4),
    rank=st.integers(0, 2**32 - 1),
    step=st.integers(0, 2**64 - 1),
    settings=SETTINGS,
)
def test_snapshots_arrive_bit_by_bit(counts, dtypes, rank, step, settings):
    spec = session_spec(*(layer_spec(f"fc{i}", i + 1, 4 - i) for i in range(4)))
    rows = tuple(
        layer_rows(spec, i, count=count, dtype=dtypes[i], seed=i)
        for i, count in reversed(list(enumerate(counts)))
    )
    sent = Snapshot(rank, step, settings, rows)

    session_id, received = sent_snapshot(sent)

    assert session_id == "id"
    assert [r.layer for r in received.layers] == [r.layer for r in rows]
    assert len(received.tensors) == len(sent.tensors)
    assert all(map(same_bits, received.tensors, sent.tensors))


@pytest.mark.parametrize("side", ["activations", "derivatives"])
@pytest.mark.parametrize("code", [0, 99])
def test_snapshots_of_unknown_dtypes_are_refused(code, side):
    known = pb.TensorHeader(dtype=pb.DTYPE_FLOAT32, shape=[1, 1])
    rows = pb.LayerRows(activations=known, derivatives=known)
    getattr(rows, side).dtype = code

    with pytest.raises(InvalidRequestError, match=f"Unknown dtype code {code}; float"):
        decode_snapshot_header(pb.SnapshotManifest(layers=[rows]))


@pytest.mark.parametrize("data", BROKEN)
def test_malformed_manifests_are_refused_by_name(data):
    with pytest.raises(InvalidRequestError, match="A SnapshotManifest is malformed"):
        parse_snapshot_manifest(memoryview(data))
    with pytest.raises(InvalidRequestError, match="A OutcomesManifest is malformed"):
        decode_outcomes_manifest(memoryview(data + b"\xff"))


@given(data=st.binary(max_size=40))
def test_arbitrary_manifests_are_read_or_refused(data):
    with suppress(InvalidRequestError):
        decode_snapshot_header(parse_snapshot_manifest(memoryview(data)))
    with suppress(InvalidRequestError):
        decode_outcomes_manifest(memoryview(data))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int32])
def test_tensors_of_other_dtypes_cannot_be_sent(dtype):
    rows = LayerRows(0, torch.zeros(1, 3, dtype=dtype), torch.zeros(1, 2))

    with pytest.raises(InvalidRequestError, match=f"Cannot send tensors of {dtype}"):
        encode_snapshot("id", Snapshot(0, 0, CurvatureSettings(damping=1.0), (rows,)))


@given(
    outcomes=st.lists(
        st.one_of(
            st.builds(version, UINT64, UINT32, count=st.integers(1, 4)),
            st.builds(
                loss, UINT64, UINT32, reason=st.sampled_from(get_args(LossReason))
            ),
        ),
        max_size=6,
    )
)
def test_outcomes_arrive_in_order_and_bit_by_bit(outcomes):
    received = sent_outcomes(outcomes)

    assert len(received) == len(outcomes)
    for actual, expected in zip(received, outcomes, strict=True):
        assert_same(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 5, 40])
def test_a_preconditioner_gives_the_same_bits_on_the_other_end(count, dtype):
    """S2, the part of the wire: low rank, mixed and dense forms."""
    rows = normal(count, 30).to(dtype), normal(count, 17, seed=1).to(dtype)
    here = precondition_layer(*rows, damping=1e-3, split="pi")
    gradient = normal(17, 30, seed=2).to(dtype)

    sent = Version(0, 0, here, count, 1, 1, damping_factor=100.0)

    (there,) = sent_outcomes([sent])

    assert isinstance(there, Version)
    assert there.damping_factor == 100
    assert same_bits(there.preconditioner.apply(gradient), here.apply(gradient))


@pytest.mark.parametrize("history", ["snapshot", "window", "ema"])
def test_grouped_and_diagonal_preconditioners_give_the_same_bits(history):
    settings = CurvatureSettings(damping=1e-3)
    grouped = LayerHistory.empty(history)
    diagonal = LayerHistory.empty(history, diagonal=True)
    for seed in range(3):
        rows = normal(3, 4, 9, seed=seed), normal(3, 4, 5, seed=9 + seed)
        grouped = grouped.fold(*rows, settings)
        rows = normal(7, 9, seed=seed), normal(4, 5, seed=9 + seed)
        diagonal = diagonal.fold(*rows, settings)
    sent = [
        Version(i, 3, h.precondition(settings, "pi", damping=1e-3), 4, 1, h.updates)
        for i, h in enumerate((grouped, diagonal))
    ]

    received = sent_outcomes(sent)

    for actual, expected in zip(received, sent, strict=True):
        assert_same(actual, expected)
    assert isinstance(received[1], Version)
    assert isinstance(received[1].preconditioner.activations, DiagonalInverse)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("damping", 0.0, "damping must be positive and finite, got 0.0"),
        ("damping", float("nan"), "got nan"),
        ("decay", 1.0, "decay must be from 0 to below 1, got 1.0"),
        ("window", 0, "window must be at least 1, got 0"),
        ("energy", 0.0, "energy must be above 0 and at most 1: 0.0"),
    ],
)
def test_settings_out_of_range_are_refused_with_their_step(field, value, message):
    good = {"damping": 1.0, "decay": 0.5, "window": 1, "rank": 0, "energy": 1.0}
    settings = pb.CurvatureSettings(**{**good, field: value})

    with pytest.raises(InvalidRequestError, match=f"settings of step 7 .*{message}"):
        decode_snapshot_header(pb.SnapshotManifest(step=7, settings=settings))


def test_settings_that_are_missing_are_refused():
    with pytest.raises(InvalidRequestError, match="settings of step 7 are wrong"):
        decode_snapshot_header(pb.SnapshotManifest(step=7))


def manifest_of(outcome: Outcome) -> pb.OutcomesManifest:
    manifest = decode_frame(next(encode_outcomes([outcome]))).manifest
    assert manifest is not None
    return decode_outcomes_manifest(manifest)[0]


@pytest.mark.parametrize("side", ["activations", "derivatives"])
@pytest.mark.parametrize("code", [0, 99])
def test_unknown_forms_are_refused(code, side):
    outcome = version()
    message = manifest_of(outcome)
    getattr(message.outcomes[0].preconditioner, side).form = code

    with pytest.raises(InvalidRequestError, match=f"Unknown form {code} of an inverse"):
        build_outcomes(message, outcome.preconditioner.tensors)


@pytest.mark.parametrize("side", ["activations", "derivatives"])
def test_inverses_of_unknown_dtypes_are_refused(side):
    message = manifest_of(version())
    getattr(message.outcomes[0].preconditioner, side).matrix.dtype = 99

    with pytest.raises(InvalidRequestError, match="Unknown dtype code 99"):
        decode_outcomes_manifest(memoryview(message.SerializeToString()))


def test_unknown_reasons_are_refused():
    message = manifest_of(loss())
    message.outcomes[0].lost.reason = "tired"

    with pytest.raises(InvalidRequestError, match="Unknown reason 'tired' of a loss"):
        build_outcomes(message, [])


def test_an_outcome_that_is_neither_is_refused():
    with pytest.raises(InvalidRequestError, match="Unknown reason ''"):
        build_outcomes(pb.OutcomesManifest(outcomes=[pb.LayerOutcome(layer=1)]), [])


def test_any_number_of_outcomes_fits_into_frames():
    losses = [loss(10**6 + i, i % 4096) for i in range(150_000)]

    assert max(map(len, encode_outcomes(losses))) <= MAX_FRAME_BYTES
