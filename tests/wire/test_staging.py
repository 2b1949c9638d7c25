"""Copies between host and device: nothing to do on the CPU, side streams on a GPU."""

import pytest
import torch

from skfac.service.solver import Solver
from skfac.wire.outcome import Version
from skfac.wire.staging import Staging
from tests.support.tasks import solved
from tests.support.values import layer_spec, session_spec, task_of


def test_the_cpu_copies_nothing():
    staging = Staging(torch.device("cpu"))
    tensor = torch.randn(3, 2, requires_grad=True)

    (host,) = staging.to_host([tensor]).wait()
    (device,) = staging.to_device(host)
    with staging.stream():
        assert host.data_ptr() == device.data_ptr() == tensor.data_ptr()
    assert not host.requires_grad


@pytest.mark.gpu
def test_a_gpu_copies_what_was_queued_before_and_nothing_later():
    device = torch.device("cuda")
    staging = Staging(device)
    tensor = torch.zeros(4_000_000, device=device)
    for _ in range(50):
        tensor += 1  # queued, not done yet
    copy = staging.to_host([tensor])
    (host,) = copy.wait()

    assert host.device.type == "cpu"
    assert host.is_pinned()
    assert host.min() == host.max() == 50
    (back,) = staging.to_device(host)
    assert torch.equal(back, tensor)


@pytest.mark.gpu
@pytest.mark.parametrize("count", [4, 64])
def test_a_gpu_finds_the_same_inverses(count):
    spec = session_spec(layer_spec(d_in=40, d_out=20))
    task = task_of(spec, count=count)
    outcomes = [solved(task, Solver(device)).outcome for device in ("cpu", "cuda")]

    assert all(isinstance(outcome, Version) for outcome in outcomes)
    pairs = zip(*(o.preconditioner.tensors for o in outcomes), strict=True)
    for on_cpu, on_gpu in pairs:
        assert on_gpu.device.type == "cpu"
        torch.testing.assert_close(on_gpu, on_cpu)
