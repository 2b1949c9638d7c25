"""Values <-> messages: sessions, snapshots and outcomes."""

from collections.abc import Callable, Iterator, Sequence
from typing import get_args

from torch import Tensor

from skfac.curvature.damping import DampingSplit
from skfac.curvature.inverse import (
    DenseInverse,
    DiagonalInverse,
    FactorInverse,
    LowRankInverse,
)
from skfac.curvature.layer import LayerPreconditioner
from skfac.curvature.settings import CurvatureSettings
from skfac.v1 import preconditioning_pb2 as pb
from skfac.wire.down_queue import Placement
from skfac.wire.errors import InvalidRequestError
from skfac.wire.frames import encode_frames
from skfac.wire.messages import (
    HISTORIES,
    code_of,
    decode_header,
    fill_header,
    meaning_of,
    parse,
)
from skfac.wire.outcome import Loss, LossReason, Outcome, Version
from skfac.wire.report import decode_report, encode_report
from skfac.wire.session import LayerSpec, OnLate, SessionSpec
from skfac.wire.snapshot import (
    LayerRows,
    RowsHeader,
    Snapshot,
    SnapshotHeader,
    TensorHeader,
)

_SPLITS: "dict[pb.DampingSplit.ValueType, DampingSplit]" = {
    pb.DAMPING_SPLIT_PI: "pi",
    pb.DAMPING_SPLIT_EQUAL: "equal",
}
_ON_LATE: "dict[pb.OnLate.ValueType, OnLate]" = {
    pb.ON_LATE_KEEP: "keep",
    pb.ON_LATE_WAIT: "wait",
    pb.ON_LATE_RAISE: "raise",
}
_FORMS: """dict[
    pb.FactorInverse.Form.ValueType,
    type[LowRankInverse] | type[DenseInverse] | type[DiagonalInverse],
]""" = {
    pb.FactorInverse.FORM_LOW_RANK: LowRankInverse,
    pb.FactorInverse.FORM_DENSE: DenseInverse,
    pb.FactorInverse.FORM_DIAGONAL: DiagonalInverse,
}
_FORM_CODES: "dict[type[FactorInverse], pb.FactorInverse.Form.ValueType]" = {
    form: code for code, form in _FORMS.items()
}
_LOSS_REASONS: dict[str, LossReason] = {
    reason: reason for reason in get_args(LossReason)
}

_OUTCOMES_PER_MANIFEST = 256  # so that no manifest outgrows a frame
_SHARED_BATCH_BYTES = 8 * 1024 * 1024  # one is read while the next is written

Locate = Callable[[Tensor], int | None]
"""Finds where a tensor is in shared memory; None if it must be in the payload."""

Place = Callable[[Sequence[Tensor]], Placement | None]
"""Writes tensors to shared memory; None if they must be in the payload."""


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
                groups=layer.groups,
                diagonal=layer.diagonal,
            )
            for layer in spec.layers
        ],
        damping_split=code_of(_SPLITS, spec.damping_split),
        history=code_of(HISTORIES, spec.history),
        update_every=spec.update_every,
        lag=spec.lag,
        on_late=code_of(_ON_LATE, spec.on_late),
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
        layers=tuple(map(_decode_layer, message.layers)),
        damping_split=meaning_of(_SPLITS, message.damping_split, "damping_split"),
        history=meaning_of(HISTORIES, message.history, "history"),
        update_every=message.update_every,
        lag=message.lag,
        on_late=meaning_of(_ON_LATE, message.on_late, "on_late"),
    )


# ------------------------------------------------------------------- snapshots


def encode_snapshot(
    session_id: str, snapshot: Snapshot, locate: Locate = lambda _: None
) -> Iterator[bytes]:
    """Write a snapshot as frames.

    Args:
        session_id: The session.
        snapshot: The rows, on the CPU.
        locate: Finds those that are in shared memory.

    Returns:
        The messages of `PushSnapshots`, made one at a time.
    """
    manifest = pb.SnapshotManifest(
        session_id=session_id,
        rank=snapshot.rank,
        step=snapshot.step,
        settings=_encode_settings(snapshot.settings),
        report=encode_report(snapshot.report),
    )
    offsets = [locate(tensor) for tensor in snapshot.tensors]
    remaining = iter(offsets)
    for rows in snapshot.layers:
        message = manifest.layers.add()
        message.layer = rows.layer
        fill_header(message.activations, rows.activations, next(remaining))
        fill_header(message.derivatives, rows.derivatives, next(remaining))
    inline = _inline(snapshot.tensors, offsets)
    return encode_frames(manifest.SerializeToString(), inline)


def parse_snapshot_manifest(data: memoryview) -> pb.SnapshotManifest:
    """Read the manifest of a snapshot.

    Returns:
        The message for `decode_snapshot_header`.

    Raises:
        InvalidRequestError: If the message is malformed.
    """
    return parse(pb.SnapshotManifest, data)


def decode_snapshot_header(message: pb.SnapshotManifest) -> SnapshotHeader:
    """Read what the manifest of a snapshot declares.

    Returns:
        The declaration.

    Raises:
        InvalidRequestError: If a dtype is unknown, or any number out of range.
    """
    layers = tuple(
        RowsHeader(
            rows.layer,
            decode_header(rows.activations),
            decode_header(rows.derivatives),
        )
        for rows in message.layers
    )
    try:
        settings = _decode_settings(message.settings)
    except ValueError as error:
        text = f"The settings of step {message.step} are wrong: {error}"
        raise InvalidRequestError(text) from None
    report = decode_report(message.report)
    return SnapshotHeader(message.rank, message.step, settings, layers, report)


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
    settings, report = header.settings, header.report
    return Snapshot(header.rank, header.step, settings, tuple(rows), report)


# ------------------------------------------------------------------- outcomes


def encode_outcomes(
    outcomes: Sequence[Outcome], place: Place | None = None
) -> Iterator[bytes]:
    """Write outcomes as frames, small ones packed together.

    Args:
        outcomes: The outcomes.
        place: Writes their tensors to shared memory, if there is one.

    Yields:
        The messages of `StreamPreconditioners`, made one at a time.
    """
    for batch in _batches(outcomes, _SHARED_BATCH_BYTES if place else None):
        tensors = [tensor for outcome in batch for tensor in _tensors_of(outcome)]
        placed = (place and place(tensors)) or Placement([None] * len(tensors), 0)
        offsets = iter(placed.offsets)
        manifest = pb.OutcomesManifest(shared_end=placed.end)
        for outcome in batch:
            _encode_outcome(manifest.outcomes.add(), outcome, offsets)
        inline = _inline(tensors, placed.offsets)
        yield from encode_frames(manifest.SerializeToString(), inline)


def decode_outcomes_manifest(
    data: memoryview,
) -> tuple[pb.OutcomesManifest, list[TensorHeader]]:
    """Read the manifest of a batch of outcomes.

    Returns:
        The message for `build_outcomes`, and the tensors of its payload.

    Raises:
        InvalidRequestError: If the message is malformed or names an unknown dtype.
    """
    message = parse(pb.OutcomesManifest, data)
    inverses = (
        outcome.preconditioner
        for outcome in message.outcomes
        if outcome.HasField("preconditioner")
    )
    headers = [
        decode_header(inverse.matrix)
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


def _inline(
    tensors: Sequence[Tensor], offsets: Sequence[int | None]
) -> Iterator[Tensor]:
    pairs = zip(tensors, offsets, strict=True)
    return (tensor for tensor, offset in pairs if offset is None)


def _batches(
    outcomes: Sequence[Outcome], max_bytes: int | None
) -> Iterator[list[Outcome]]:
    batch: list[Outcome] = []
    nbytes = 0
    for outcome in outcomes:
        batch.append(outcome)
        nbytes += sum(tensor.nbytes for tensor in _tensors_of(outcome))
        full = max_bytes is not None and nbytes >= max_bytes
        if full or len(batch) == _OUTCOMES_PER_MANIFEST:
            yield batch
            batch, nbytes = [], 0
    if batch or not outcomes:
        yield batch


def _tensors_of(outcome: Outcome) -> Sequence[Tensor]:
    return () if isinstance(outcome, Loss) else outcome.preconditioner.tensors


def _encode_outcome(
    message: pb.LayerOutcome, outcome: Outcome, offsets: Iterator[int | None]
) -> None:
    # Filled in place: messages that are given to others are copied.
    message.layer, message.step = outcome.layer, outcome.step
    if isinstance(outcome, Loss):
        message.lost.reason, message.lost.message = outcome.reason, outcome.message
        return
    both, inverses = message.preconditioner, outcome.preconditioner
    both.rows, both.ranks, both.updates = outcome.rows, outcome.ranks, outcome.updates
    both.damping_factor = outcome.damping_factor
    _encode_inverse(both.activations, inverses.activations, next(offsets))
    _encode_inverse(both.derivatives, inverses.derivatives, next(offsets))


def _decode_outcome(message: pb.LayerOutcome, tensors: Iterator[Tensor]) -> Outcome:
    if not message.HasField("preconditioner"):
        reason = _LOSS_REASONS.get(message.lost.reason)
        if reason is None:
            text = f"Unknown reason {message.lost.reason!r} of a loss."
            raise InvalidRequestError(text)
        return Loss(message.layer, message.step, reason, message.lost.message)
    both = message.preconditioner
    preconditioner = LayerPreconditioner(
        activations=_decode_inverse(both.activations, next(tensors)),
        derivatives=_decode_inverse(both.derivatives, next(tensors)),
    )
    counts = both.rows, both.ranks, both.updates, both.damping_factor or 1.0
    return Version(message.layer, message.step, preconditioner, *counts)


def _encode_inverse(
    message: pb.FactorInverse, inverse: FactorInverse, offset: int | None
) -> None:
    message.form = _FORM_CODES[type(inverse)]
    message.damping = inverse.damping
    fill_header(message.matrix, inverse.tensor, offset)


def _decode_inverse(message: pb.FactorInverse, matrix: Tensor) -> FactorInverse:
    if message.form not in _FORMS:
        raise InvalidRequestError(f"Unknown form {message.form} of an inverse.")
    form, shape = _FORMS[message.form], tuple(matrix.shape)
    rows = {DenseInverse: shape[-1:], DiagonalInverse: (1,)}.get(form, shape[-2:-1])
    if len(shape) < 2 or shape[-2:-1] != rows:
        raise InvalidRequestError(f"A matrix of form {message.form} has shape {shape}.")
    return form(matrix, message.damping)


def _decode_layer(message: pb.LayerSpec) -> LayerSpec:
    return LayerSpec(
        name=message.name,
        kind=message.kind,
        d_in=message.d_in,
        d_out=message.d_out,
        bias=message.bias,
        groups=message.groups,
        diagonal=message.diagonal,
    )


def _encode_settings(settings: CurvatureSettings) -> pb.CurvatureSettings:
    return pb.CurvatureSettings(
        damping=settings.damping,
        decay=settings.decay,
        window=settings.window,
        rank=settings.rank or 0,
        energy=settings.energy,
    )


def _decode_settings(message: pb.CurvatureSettings) -> CurvatureSettings:
    return CurvatureSettings(
        damping=message.damping,
        decay=message.decay,
        window=message.window,
        rank=message.rank or None,
        energy=message.energy,
    )
