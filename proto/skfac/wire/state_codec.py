"""Histories <-> frames, one layer after the other."""

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from skfac.curvature.factor import Form, Moment
from skfac.curvature.history import LayerHistory
from skfac.v1 import preconditioning_pb2 as pb
from skfac.wire.errors import InvalidRequestError
from skfac.wire.frames import decode_frame, encode_frames
from skfac.wire.messages import (
    HISTORIES,
    check_layers,
    code_of,
    decode_dtype,
    decode_header,
    encode_dtype,
    encode_header,
    meaning_of,
    parse,
)
from skfac.wire.payload import PayloadBuffer
from skfac.wire.state import LayerState, LayerStateHeader, MomentHeader, SessionState

_FORMS: "dict[pb.Moment.Form.ValueType, Form]" = {
    pb.Moment.FORM_ROWS: "rows",
    pb.Moment.FORM_DENSE: "dense",
    pb.Moment.FORM_DIAGONAL: "diagonal",
}

MAX_LAYERS = 2**20
"""Layers of one stream, where no server's own limit is lower."""

Admit = Callable[[str, LayerStateHeader, int], None]
"""Refuses a layer of a session by raising a `ServiceError`, before memory is taken for
it; the last argument is the bytes of the layers before it."""


def encode_state(session_id: str, state: SessionState) -> Iterator[bytes]:
    """Write histories as frames.

    Args:
        session_id: The session that they are meant for; may be empty in an export.
        state: The histories, on the CPU.

    Yields:
        The messages of `ExportState` and `ImportState`, made one at a time.
    """
    manifest = pb.StateManifest(session_id=session_id)
    if not state.layers:
        yield from encode_frames(manifest.SerializeToString(), ())
    for layer in state.layers:
        del manifest.layers[:]
        manifest.layers.append(_encode_layer(layer))
        yield from encode_frames(manifest.SerializeToString(), layer.tensors)


def state_manifest(state: SessionState) -> pb.StateManifest:
    """Describe all histories in one message.

    Returns:
        The message; it names no session.
    """
    return pb.StateManifest(layers=map(_encode_layer, state.layers))


def state_of_manifest(
    manifest: pb.StateManifest, tensors: Sequence[Tensor]
) -> SessionState:
    """Put histories together again; whether they fit a session is not checked.

    Args:
        manifest: As `state_manifest` makes it.
        tensors: Those of all layers in their order.

    Returns:
        The histories.

    Raises:
        InvalidRequestError: If the tensors are not those of the manifest.
    """
    headers = [_decode_layer(layer) for layer in manifest.layers]
    declared = [(t.dtype, t.shape) for header in headers for t in header.tensors]
    if declared != [(tensor.dtype, tuple(tensor.shape)) for tensor in tensors]:
        raise InvalidRequestError("The tensors are not those that the manifest names.")
    remaining = iter(tensors)
    return SessionState(tuple(_build(header, remaining) for header in headers))


class StateReceiver:
    """Joins frames to histories.

    Args:
        admit: Called before memory is taken for a layer.
        max_layers: Most layers of one stream.

    Attributes:
        session_id: The session that all manifests named; None before the first.
    """

    def __init__(self, admit: Admit, max_layers: int = MAX_LAYERS) -> None:
        self._admit = admit
        self._max_layers = max_layers
        self.session_id: str | None = None
        self._layers: list[LayerState] = []
        self._headers: list[LayerStateHeader] = []
        self._buffer: PayloadBuffer | None = None
        self._nbytes = 0

    def receive(self, message: bytes) -> None:
        """Take one frame.

        Raises:
            ServiceError: If `admit` raises it.
            InvalidRequestError: If the frame is malformed or does not follow the ones
                before it.
            LimitExceededError: If there is not enough memory.
        """
        frame = decode_frame(message)
        if frame.manifest is not None:
            self._begin(parse(pb.StateManifest, frame.manifest))
        if self._buffer is None:
            raise InvalidRequestError("A payload came without a manifest.")
        self._buffer.write(frame.payload)
        if self._buffer.complete:
            remaining = iter(self._buffer.tensors())
            self._layers += [_build(header, remaining) for header in self._headers]
            self._buffer, self._headers = None, []

    def finish(self) -> tuple[str, SessionState]:
        """End the stream.

        Returns:
            The session that was named, and the histories, which share the memory of
            what was received.

        Raises:
            InvalidRequestError: If something is missing.
        """
        if self.session_id is None:
            raise InvalidRequestError("A stream of histories has no manifest.")
        self._check_complete()
        return self.session_id, SessionState(tuple(self._layers))

    def _begin(self, manifest: pb.StateManifest) -> None:
        self._check_complete()
        if self.session_id not in {None, manifest.session_id}:
            raise InvalidRequestError("One stream has histories of two sessions.")
        self.session_id = manifest.session_id
        count = len(self._layers) + len(manifest.layers)
        check_layers("The histories are of", count, self._max_layers)
        self._headers = [_decode_layer(layer) for layer in manifest.layers]
        for header in self._headers:
            self._admit(manifest.session_id, header, self._nbytes)
            self._nbytes += header.nbytes
        tensors = [tensor for header in self._headers for tensor in header.tensors]
        self._buffer = PayloadBuffer(tensors)

    def _check_complete(self) -> None:
        if self._buffer is not None:
            raise InvalidRequestError(
                f"A history is truncated: {self._buffer.missing_bytes} bytes of layer "
                f"{self._headers[-1].layer} are missing."
            )


def _encode_layer(state: LayerState) -> pb.LayerState:
    history = state.history
    return pb.LayerState(
        layer=state.layer,
        step=state.step,
        history=code_of(HISTORIES, history.history),
        diagonal=history.diagonal,
        updates=history.updates,
        dtype=encode_dtype(history.dtype),
        activations=map(_encode_moment, history.activations),
        derivatives=map(_encode_moment, history.derivatives),
    )


def _encode_moment(moment: Moment) -> pb.Moment:
    return pb.Moment(
        form=code_of(_FORMS, moment.form),
        tensor=encode_header(moment.tensor),
        weight=moment.weight,
        dropped=moment.dropped,
    )


def _decode_layer(message: pb.LayerState) -> LayerStateHeader:
    return LayerStateHeader(
        layer=message.layer,
        step=message.step,
        history=meaning_of(HISTORIES, message.history, "history"),
        diagonal=message.diagonal,
        updates=message.updates,
        dtype=decode_dtype(message.dtype),
        activations=tuple(map(_decode_moment, message.activations)),
        derivatives=tuple(map(_decode_moment, message.derivatives)),
    )


def _decode_moment(message: pb.Moment) -> MomentHeader:
    tensor = decode_header(message.tensor)
    if tensor.shared_offset is not None:
        raise InvalidRequestError("Histories are not sent through shared memory.")
    return MomentHeader(
        form=meaning_of(_FORMS, message.form, "form"),
        tensor=tensor,
        weight=message.weight,
        dropped=message.dropped,
    )


def _build(header: LayerStateHeader, tensors: Iterator[Tensor]) -> LayerState:
    history = LayerHistory(
        history=header.history,
        diagonal=header.diagonal,
        activations=_moments(header.activations, tensors),
        derivatives=_moments(header.derivatives, tensors),
        updates=header.updates,
        dtype=header.dtype,
    )
    return LayerState(header.layer, header.step, history)


def _moments(
    headers: Sequence[MomentHeader], tensors: Iterator[Tensor]
) -> tuple[Moment, ...]:
    return tuple(
        Moment(header.form, next(tensors), header.weight, header.dropped)
        for header in headers
    )
