"""What all codecs share: reading messages, headers of tensors, and enums."""

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import TypeVar

import torch
from google.protobuf.message import DecodeError, Message
from torch import Tensor

from skfac.curvature.settings import History
from skfac.v1 import preconditioning_pb2 as pb
from skfac.wire.errors import InvalidRequestError, LimitExceededError
from skfac.wire.snapshot import TensorHeader, header_of

DTYPES: "dict[pb.Dtype.ValueType, torch.dtype]" = {
    pb.DTYPE_FLOAT32: torch.float32,
    pb.DTYPE_FLOAT64: torch.float64,
}
"""Types of the elements of tensors that can be sent."""

MAX_NUMEL = 2**59
"""Elements of a tensor; strides and bytes of more overflow, even of an empty one."""

MAX_DIMENSIONS = 8
"""Dimensions of a tensor; none that is sent has more than 3."""

_DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}

HISTORIES: "dict[pb.History.ValueType, History]" = {
    pb.HISTORY_SNAPSHOT: "snapshot",
    pb.HISTORY_WINDOW: "window",
    pb.HISTORY_EMA: "ema",
}
"""Which updates a factor can be made of."""

_M = TypeVar("_M", bound=Message)
_C = TypeVar("_C", bound=int)
_V = TypeVar("_V")


def check_layers(whose: str, count: int, max_layers: int) -> None:
    """Refuse a message with too many layers before each of them is looked at.

    Args:
        whose: Beginning of the error's message: what names the layers, and a verb.
        count: How many it names.
        max_layers: How many it may.

    Raises:
        LimitExceededError: If it names more.
    """
    if count > max_layers:
        raise LimitExceededError(f"{whose} {count} layers; max_layers = {max_layers}.")


def parse(kind: type[_M], data: memoryview) -> _M:
    """Read a message.

    Returns:
        It, with nothing checked but that it is a message.

    Raises:
        InvalidRequestError: If the bytes are malformed.
    """
    message = kind()
    try:
        message.ParseFromString(data)  # type: ignore[arg-type]  # views are accepted
    except DecodeError as error:
        raise InvalidRequestError(f"A {kind.__name__} is malformed: {error}.") from None
    return message


def fill_header(
    message: pb.TensorHeader, tensor: Tensor, shared_offset: int | None = None
) -> None:
    """Describe a tensor.

    Args:
        message: An empty header.
        tensor: The tensor.
        shared_offset: Where it is in shared memory; None if it is in the payload.

    Raises:
        InvalidRequestError: If the tensor is of a dtype that cannot be sent.
    """
    message.dtype = encode_dtype(tensor.dtype)
    message.shape.extend(tensor.shape)
    if shared_offset is not None:
        message.shared_offset = shared_offset


def encode_header(tensor: Tensor) -> pb.TensorHeader:
    """Describe a tensor of the payload.

    Returns:
        Its header.

    Raises:
        InvalidRequestError: If the tensor is of a dtype that cannot be sent.
    """
    message = pb.TensorHeader()
    fill_header(message, tensor)
    return message


def decode_header(message: pb.TensorHeader) -> TensorHeader:
    """Read the header of a tensor.

    Returns:
        Its type and shape, and where it is.

    Raises:
        InvalidRequestError: If the dtype is unknown, or there are numbers that no
            tensor has.
    """
    shape = message.shape
    if len(shape) > MAX_DIMENSIONS:
        raise InvalidRequestError(
            f"A tensor has {len(shape)} dimensions; {MAX_DIMENSIONS} are taken."
        )
    header = _header(message.dtype, tuple(shape))
    if message.HasField("shared_offset"):
        return header.at(message.shared_offset)
    return header


@lru_cache(maxsize=4096)
def _header(code: "pb.Dtype.ValueType", shape: tuple[int, ...]) -> TensorHeader:
    if math.prod(extent or 1 for extent in shape) > MAX_NUMEL:
        raise InvalidRequestError(
            f"A tensor has shape {shape}; its extents may multiply to {MAX_NUMEL}, "
            "those that are 0 left out."
        )
    return header_of(decode_dtype(code), shape)


def encode_dtype(dtype: torch.dtype) -> "pb.Dtype.ValueType":
    """Find the code of a dtype.

    Returns:
        The code.

    Raises:
        InvalidRequestError: If tensors of it cannot be sent.
    """
    if dtype not in _DTYPE_CODES:
        raise InvalidRequestError(f"Cannot send tensors of {dtype}.")
    return _DTYPE_CODES[dtype]


def decode_dtype(code: "pb.Dtype.ValueType") -> torch.dtype:
    """Find the dtype of a code.

    Returns:
        The dtype.

    Raises:
        InvalidRequestError: If there is none.
    """
    if code not in DTYPES:
        raise InvalidRequestError(
            f"Unknown dtype code {code}; float32 is {pb.DTYPE_FLOAT32} and "
            f"float64 is {pb.DTYPE_FLOAT64}."
        )
    return DTYPES[code]


def code_of(meanings: Mapping[_C, _V], meaning: _V) -> _C:
    """Find the code of an enum that stands for a value of ours.

    Returns:
        The code.
    """
    return next(code for code, known in meanings.items() if known == meaning)


def meaning_of(meanings: Mapping[_C, _V], code: _C, field: str) -> _V:
    """Find what the code of an enum stands for.

    Returns:
        The value.

    Raises:
        InvalidRequestError: If the code is unknown; the message names `field`.
    """
    if code not in meanings:
        raise InvalidRequestError(f"Unknown {field} code {code}.")
    return meanings[code]
