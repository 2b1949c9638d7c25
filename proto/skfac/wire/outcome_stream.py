"""Puts the frames of `StreamPreconditioners` together."""

from collections.abc import Callable, Iterable, Iterator

from skfac.wire.codec import build_outcomes, decode_outcomes_manifest
from skfac.wire.errors import InvalidRequestError
from skfac.wire.frames import decode_frame
from skfac.wire.outcome import Outcome
from skfac.wire.payload import PayloadBuffer
from skfac.wire.snapshot import TensorHeader

BufferOf = Callable[[list[TensorHeader], int], PayloadBuffer]


def _own_memory(headers: list[TensorHeader], _: int) -> PayloadBuffer:
    return PayloadBuffer(headers)


def outcomes_of(
    frames: Iterable[bytes], buffer_of: BufferOf = _own_memory
) -> Iterator[list[Outcome]]:
    """Put outcomes together.

    Args:
        frames: What the stream yields, in its order.
        buffer_of: Makes what the tensors of a manifest are received in, from their
            headers and from where the sender's area of shared memory ends for them.

    Yields:
        The outcomes of each manifest.

    Raises:
        InvalidRequestError: If a frame is damaged, or none that may come next.
    """
    message, buffer = None, None
    for data in frames:
        frame = decode_frame(data)
        if frame.manifest is not None:
            message, headers = decode_outcomes_manifest(frame.manifest)
            buffer = buffer_of(headers, message.shared_end)
        if message is None or buffer is None:
            raise InvalidRequestError("A payload came without a manifest.")
        buffer.write(frame.payload)
        if buffer.complete:
            yield build_outcomes(message, buffer.tensors())
            message, buffer = None, None
