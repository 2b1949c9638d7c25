"""What goes through an object store: bytes in arrays, which it shares without a copy.

A snapshot is its manifest, as in the .proto, and one object with the bytes of each of
its tensors. Outcomes and histories are the frames that gRPC would send.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TypeGuard, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from skfac.v1 import preconditioning_pb2 as pb
from skfac.wire.codec import encode_snapshot, parse_snapshot_manifest
from skfac.wire.errors import InvalidRequestError
from skfac.wire.frames import parse_frame
from skfac.wire.messages import encode_header
from skfac.wire.snapshot import Snapshot, TensorHeader

Bytes = NDArray[np.uint8]


def snapshot_manifest(session_id: str, snapshot: Snapshot) -> bytes:
    """Write what a snapshot declares.

    Returns:
        A serialized `SnapshotManifest`.
    """
    (frame,) = encode_snapshot(session_id, replace(snapshot, layers=()))
    manifest = parse_snapshot_manifest(parse_frame(frame).manifest or memoryview(b""))
    manifest.layers.extend(
        pb.LayerRows(
            layer=rows.layer,
            activations=encode_header(rows.activations),
            derivatives=encode_header(rows.derivatives),
        )
        for rows in snapshot.layers
    )
    return manifest.SerializeToString()


def arrays_of(tensors: Iterable[Tensor]) -> list[Bytes]:
    """View CPU tensors as bytes; those that are not contiguous are copied.

    Returns:
        One array for each.
    """
    return [
        tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        for tensor in tensors
    ]


def tensors_of(headers: Sequence[TensorHeader], arrays: object) -> list[Tensor]:
    """View bytes that anybody may have sent as the tensors that were declared.

    Args:
        headers: The tensors.
        arrays: One array of bytes for each.

    Returns:
        Tensors that share the arrays' memory and must not be written to.

    Raises:
        InvalidRequestError: If an array is missing, no array, or of another size.
    """
    if not isinstance(arrays, list) or len(arrays) != len(headers):
        raise InvalidRequestError(
            f"A payload is a list of {len(headers)} arrays, got {_described(arrays)}."
        )
    return [
        _tensor(header, index, array)
        for index, (header, array) in enumerate(zip(headers, arrays, strict=True))
    ]


def frame_arrays(frames: Iterable[bytes]) -> list[Bytes]:
    """View frames as arrays.

    Returns:
        One array for each.
    """
    return [np.frombuffer(frame, np.uint8) for frame in frames]


def frames_of(arrays: object) -> Iterator[bytes]:
    """View arrays that anybody may have sent as frames.

    Yields:
        Each of them, to read from as from bytes.

    Raises:
        InvalidRequestError: If they are no arrays of bytes.
    """
    for array in arrays if isinstance(arrays, list) else [arrays]:
        if not _are_bytes(array):
            raise InvalidRequestError(
                f"A frame is an array of bytes, got {_described(array)}."
            )
        yield cast("bytes", array.data)


class _Shared:
    # torch has no read-only tensors and warns about read-only arrays. numpy keeps this
    # object, and so the store's memory, as long as an array made of it lives.
    def __init__(self, array: Bytes) -> None:
        self._array = array
        interface = array.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}


def _tensor(header: TensorHeader, index: int, array: object) -> Tensor:
    nbytes = math.prod(header.shape) * header.dtype.itemsize
    if not _are_bytes(array) or array.shape != (nbytes,):
        raise InvalidRequestError(
            f"Tensor {index} of a payload is declared as {nbytes} bytes, got "
            f"{_described(array)}."
        )
    if not nbytes:
        return torch.empty(header.shape, dtype=header.dtype)
    flat = torch.from_numpy(np.asarray(_Shared(array)))
    return flat.view(header.dtype).reshape(header.shape)


def _are_bytes(array: object) -> TypeGuard[Bytes]:
    return (
        isinstance(array, np.ndarray)
        and array.dtype == np.uint8
        and array.ndim == 1
        and array.flags.c_contiguous
    )


def _described(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype} and shape {value.shape}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return f"a {type(value).__name__}"
