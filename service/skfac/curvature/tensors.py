"""What nearly never is to be done to a tensor, and costs nothing then.

torch's own methods take microseconds to find out that there is nothing to do, for each
tensor of each layer; an attribute tells at once.
"""

import torch
from torch import Tensor


def in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a tensor, if it must be.

    Returns:
        A tensor of that dtype.
    """
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device, if it must be.

    Returns:
        A tensor there.
    """
    return tensor if tensor.device == device else tensor.to(device)


def without_graph(tensor: Tensor) -> Tensor:
    """Take a tensor out of autograd's graph, if it is in one.

    Returns:
        Its values, in its memory.
    """
    return tensor.detach() if tensor.requires_grad else tensor
