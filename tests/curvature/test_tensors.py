"""Nothing is done where nothing is to be done, and what must be is."""

import torch

from skfac.curvature.tensors import in_dtype, on_device, without_graph


def test_what_is_right_stays_the_very_tensor():
    tensor = torch.ones(2)

    assert in_dtype(tensor, torch.float32) is tensor
    assert on_device(tensor, torch.device("cpu")) is tensor
    assert without_graph(tensor) is tensor


def test_what_is_not_is_changed():
    tensor = torch.ones(2, requires_grad=True)
    plain = without_graph(tensor)

    assert in_dtype(tensor, torch.float64).dtype == torch.float64
    assert on_device(tensor, torch.device("meta")).device.type == "meta"
    assert not plain.requires_grad
    assert plain.data_ptr() == tensor.data_ptr()
