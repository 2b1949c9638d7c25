"""Values <-> messages: sessions, snapshots and outcomes."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from google.protobuf.message import DecodeError, Message
from torch import Tensor

from skfac.curvature.damping import DampingSplit
from skfac.curvature.inverse import DenseInverse, FactorInverse, LowRankInverse
from skfac.curvature.layer import LayerPreconditioner
from skfac.v1 import preconditioning_pb2 as pb
from skfac.wire.errors import InvalidRequestError
from skfac.wire.frames import encode_frames
from skfac.wire.outcome import Loss, LossReason, Outcome, Version
from skfac.wire.session import History, LayerSpec, OnLate, SessionSpec
from skfac.wire.snapshot import (
    LayerRows,
    RowsHeader,
    Snapshot,
    SnapshotHeader,
    TensorHeader,
)

DTYPES: "dict[pb.DType.ValueType, torch.dtype]" = {
    pb.DTYPE_FLOAT32: torch.float32,
    pb.DTYPE_FLOAT64: torch.float64,
}
_SPLITS: "dict[pb.DampingSplit.ValueType, DampingSplit]" = {
    pb.DAMPING_SPLIT_PI: "pi",
    pb.DAMPING_SPLIT_EQUAL: "equal",
}
_HISTORIES: "dict[pb.History.ValueType, History]" = {pb.HISTORY_SNAPSHOT: "snapshot"}
_ON_LATE: "dict[pb.OnLate.ValueType, OnLate]" = {
    pb.ON_LATE_KEEP: "keep",
    pb.ON_LATE_WAIT: "wait",
    pb.ON_LATE_RAISE: "raise",
}
_LOSS_REASONS: dict[str, LossReason] = {
    "superseded": "superseded",
    "failed": "failed",
    "empty": "empty",
    "refused": "refused",
}

_OUTCOMES_PER_MANIFEST = 256  # so that no manifest outgrows a frame

_M = TypeVar("_M", bound=Message)
_C = TypeVar("_C", bound=int)
_V = TypeVar("_V")


# ------------------------------------------------------------------- sessions


def encode_session(spec: SessionSpec) -> pb.SessionSpec:
    """Write a session's specification as a message.

    Returns:
        The message.
    """
    return pb.SessionSpec(
        job=spec.job,
        instance=spec.instance,
        world_size=spec.world_size,
        layers=[
            pb.LayerSpec(
                name=layer.name,
                kind=layer.kind,
                d_in=layer.d_in,
                d_out=layer.d_out,
                bias=layer.bias,
            )
            for layer in spec.layers
        ],
        damping_split=_code(_SPLITS, spec.damping_split),
        history=_code(_HISTORIES, spec.history),
        update_every=spec.update_every,
        lag=spec.lag,
        on_late=_code(_ON_LATE, spec.on_late),
    )


def decode_session(message: pb.SessionSpec) -> SessionSpec:
    """Read a session's specification.

    Returns:
        The checked specification.

    Raises:
        InvalidRequestError: If a field is missing, unknown or out of range.
    """
    return SessionSpec(
        job=message.job,
        instance=message.instance,
        world_size=message.world_size,
        layers=tuple(
            LayerSpec(layer.name, layer.kind, layer.d_in, layer.d_out, layer.bias)
            for layer in message.layers
        ),
        damping_split=_meaning(_SPLITS, message.damping_split, "damping_split"),
        history=_meaning(_HISTORIES, message.history, "history"),
        update_every=message.update_every,
        lag=message.lag,
        on_late=_meaning(_ON_LATE, message.on_late, "on_late"),
    )


# ------------------------------------------------------------------- snapshots


def encode_snapshot(session_id: str, snapshot: Snapshot) -> Iterator[bytes]:
    """Write a snapshot as frames.

    Returns:
        The messages of `PushSnapshots`, made one at a time.
    """
    manifest = pb.SnapshotManifest(
        session_id=session_id,
        rank=snapshot.rank,
        step=snapshot.step,
        damping=snapshot.damping,
        layers=[
            pb.LayerRows(
                layer=rows.layer,
                activations=_encode_header(rows.activations),
                derivatives=_encode_header(rows.derivatives),
            )
            for rows in snapshot.layers
        ],
    )
    return encode_frames(manifest.SerializeToString(), snapshot.tensors)


def decode_snapshot_manifest(data: memoryview) -> tuple[str, SnapshotHeader]:
    """Read the manifest of a snapshot.

    Returns:
        The session it belongs to, and what it declares.

    Raises:
        InvalidRequestError: If the message is malformed or names an unknown dtype.
    """
    message = _parse(pb.SnapshotManifest, data)
    layers = tuple(
        RowsHeader(
            rows.layer,
            _decode_header(rows.activations),
            _decode_header(rows.derivatives),
        )
        for rows in message.layers
    )
    header = SnapshotHeader(message.rank, message.step, message.damping, layers)
    return message.session_id, header


def build_snapshot(header: SnapshotHeader, tensors: Sequence[Tensor]) -> Snapshot:
    """Join what a snapshot declares with its payload.

    Args:
        header: The declaration.
        tensors: One tensor for each of `header.tensors`.

    Returns:
        The snapshot; it shares the tensors' memory.
    """
    pairs = zip(tensors[::2], tensors[1::2], strict=True)
    rows = (
        LayerRows(declared.layer, activations, derivatives)
        for declared, (activations, derivatives) in zip(
            header.layers, pairs, strict=True
        )
    )
    return Snapshot(header.rank, header.step, header.damping, tuple(rows))


# ------------------------------------------------------------------- outcomes


def encode_outcomes(outcomes: Sequence[Outcome]) -> Iterator[bytes]:
    """Write outcomes as frames, small ones packed together.

    Yields:
        The messages of `StreamPreconditioners`, made one at a time.
    """
    for first in range(0, max(len(outcomes), 1), _OUTCOMES_PER_MANIFEST):
        batch = outcomes[first : first + _OUTCOMES_PER_MANIFEST]
        manifest = pb.OutcomesManifest(outcomes=map(_encode_outcome, batch))
        versions = (o for o in batch if isinstance(o, Version))
        tensors = (tensor for v in versions for tensor in v.preconditioner.tensors)
        yield from encode_frames(manifest.SerializeToString(), tensors)


def decode_outcomes_manifest(
    data: memoryview,
) -> tuple[pb.OutcomesManifest, list[TensorHeader]]:
    """Read the manifest of a batch of outcomes.

    Returns:
        The message for `build_outcomes`, and the tensors of its payload.

    Raises:
        InvalidRequestError: If the message is malformed or names an unknown dtype.
    """
    message = _parse(pb.OutcomesManifest, data)
    inverses = (
        outcome.preconditioner
        for outcome in message.outcomes
        if outcome.HasField("preconditioner")
    )
    headers = [
        _decode_header(inverse.matrix)
        for both in inverses
        for inverse in (both.activations, both.derivatives)
    ]
    return message, headers


def build_outcomes(
    message: pb.OutcomesManifest, tensors: Sequence[Tensor]
) -> list[Outcome]:
    """Join a manifest with its payload.

    Args:
        message: The manifest.
        tensors: One tensor for each header that `decode_outcomes_manifest` gave.

    Returns:
        The outcomes in the order they were published.

    Raises:
        InvalidRequestError: If an inverse has no known form, or a loss no known reason.
    """
    remaining = iter(tensors)
    return [_decode_outcome(outcome, remaining) for outcome in message.outcomes]


# ------------------------------------------------------------------- pieces


def _encode_outcome(outcome: Outcome) -> pb.LayerOutcome:
    if isinstance(outcome, Loss):
        lost = pb.LostVersion(reason=outcome.reason, message=outcome.message)
        return pb.LayerOutcome(layer=outcome.layer, step=outcome.step, lost=lost)
    preconditioner = pb.LayerPreconditioner(
        activations=_encode_inverse(outcome.preconditioner.activations),
        derivatives=_encode_inverse(outcome.preconditioner.derivatives),
        rows=outcome.rows,
        ranks=outcome.ranks,
    )
    return pb.LayerOutcome(
        layer=outcome.layer, step=outcome.step, preconditioner=preconditioner
    )


def _decode_outcome(message: pb.LayerOutcome, tensors: Iterator[Tensor]) -> Outcome:
    if not message.HasField("preconditioner"):
        reason = _LOSS_REASONS.get(message.lost.reason)
        if reason is None:
            raise InvalidRequestError(
                f"Unknown reason {message.lost.reason!r} of a loss."
            )
        return Loss(message.layer, message.step, reason, message.lost.message)
    inverses = message.preconditioner
    preconditioner = LayerPreconditioner(
        activations=_decode_inverse(inverses.activations, next(tensors)),
        derivatives=_decode_inverse(inverses.derivatives, next(tensors)),
    )
    return Version(
        message.layer, message.step, preconditioner, inverses.rows, inverses.ranks
    )


def _encode_inverse(inverse: FactorInverse) -> pb.FactorInverse:
    low_rank = isinstance(inverse, LowRankInverse)
    forms = pb.FactorInverse
    return pb.FactorInverse(
        form=pb.FactorInverse.FORM_LOW_RANK if low_rank else forms.FORM_DENSE,
        damping=inverse.damping,
        matrix=_encode_header(inverse.tensor),
    )


def _decode_inverse(message: pb.FactorInverse, matrix: Tensor) -> FactorInverse:
    if message.form == pb.FactorInverse.FORM_LOW_RANK:
        return LowRankInverse(matrix, message.damping)
    if message.form == pb.FactorInverse.FORM_DENSE:
        return DenseInverse(matrix, message.damping)
    raise InvalidRequestError(f"Unknown form {message.form} of an inverse.")


def _encode_header(tensor: Tensor) -> pb.TensorHeader:
    if tensor.dtype not in DTYPES.values():
        raise InvalidRequestError(f"Cannot send tensors of {tensor.dtype}.")
    return pb.TensorHeader(dtype=_code(DTYPES, tensor.dtype), shape=tensor.shape)


def _decode_header(message: pb.TensorHeader) -> TensorHeader:
    dtype = DTYPES.get(message.dtype)
    if dtype is None:
        raise InvalidRequestError(
            f"Unknown dtype code {message.dtype}; float32 is {pb.DTYPE_FLOAT32} and "
            f"float64 is {pb.DTYPE_FLOAT64}."
        )
    return TensorHeader(dtype, tuple(message.shape))


def _parse(kind: type[_M], data: memoryview) -> _M:
    message = kind()
    try:
        message.ParseFromString(data)  # type: ignore[arg-type]  # views are accepted
    except DecodeError as error:
        raise InvalidRequestError(f"A {kind.__name__} is malformed: {error}.") from None
    return message


def _code(meanings: Mapping[_C, _V], meaning: _V) -> _C:
    return next(code for code, known in meanings.items() if known == meaning)


def _meaning(meanings: Mapping[_C, _V], code: _C, field: str) -> _V:
    if code not in meanings:
        raise InvalidRequestError(f"Unknown {field} code {code}.")
    return meanings[code]
