"""Rows that go from one process's memory to another's, past Ray's object store.

Ray Direct Transport leaves the tensors where they are and lets the receiver read them:
with NIXL through shared memory on a host, and RDMA or TCP between hosts. A receiver
that is not made for it waits for ever (ray#66264), so a trainer asks it first.
"""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from skfac.wire.objects import arrays_of

if TYPE_CHECKING:
    import ray  # which those who need it look for, and say what to install

logger = logging.getLogger(__name__)

TRANSPORT = "nixl"

LEAST_BYTES = 1 << 20
"""Rows of a snapshot that are worth it; registering memory takes milliseconds."""


def is_available() -> bool:
    """Start NIXL's agent in this process, unless it runs.

    Returns:
        Whether it runs: the packages `nixl` and `nixl-cu12` or `-cu13` are there, and
        find a way between processes.
    """
    try:
        from ray.experimental.rdt.util import get_tensor_transport_manager

        manager: Any = get_tensor_transport_manager(TRANSPORT.upper())
        manager.get_nixl_agent()
    except Exception as error:  # of an interface that is young, and of its libraries
        logger.warning(
            "Rows go through the object store: NIXL does not start: %s", error
        )
        return False
    return True


def is_worth_it(tensors: Sequence[Tensor]) -> bool:
    """Tell whether rows are large; empty tensors have no memory to be read from.

    Returns:
        Whether they should go past the store.
    """
    sizes = [tensor.nbytes for tensor in tensors]
    return sum(sizes) >= LEAST_BYTES and all(sizes)


def put(tensors: Sequence[Tensor]) -> "ray.ObjectRef[Any]":
    """Offer the bytes of CPU tensors, which must stay as they are meanwhile.

    Returns:
        The reference; the memory is held as long as it is.
    """
    import ray

    views = [torch.from_numpy(array) for array in arrays_of(tensors)]
    return ray.put(views, _tensor_transport=TRANSPORT)


def arrays_in(payload: object) -> object:
    """View the tensors of a payload as the arrays that the store would have given.

    Returns:
        Arrays for tensors on the CPU; anything else as it is, to be refused.
    """
    if not isinstance(payload, list):
        return payload
    return [
        one.numpy() if isinstance(one, Tensor) and one.device.type == "cpu" else one
        for one in payload
    ]
