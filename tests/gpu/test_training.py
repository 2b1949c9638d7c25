"""A model on a GPU trains as on the CPU, wherever its engine is."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from skfac.client import Preconditioner
from tests.support.models import batch_at, flat_parameters, sgd, small_cnn
from tests.support.servers import ServerProcess, free_address
from tests.support.targets import unix_address

pytestmark = pytest.mark.gpu
STEPS = 12
SETTINGS = {"update_every": 2, "lag": 1, "on_late": "wait", "damping": 0.1}
PLACES = {
    "embedded": ("", ""),
    "server with a GPU, shared memory": ("unix", "cuda"),
    "server with a GPU, frames": ("tcp", "cuda"),
    "server without one, shared memory": ("unix", "cpu"),
}


@pytest.fixture(autouse=True)
def _exact_convolutions():
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@contextmanager
def engine(place: str, folder):
    way, device = PLACES[place]
    if place == "embedded":
        yield "embedded"
        return
    address = unix_address(folder) if way == "unix" else free_address()
    with ServerProcess(address, device=device) as server:
        yield server.address


def train(model, pre, optimizer, steps=range(STEPS), device="cuda") -> None:
    for step in steps:
        images, labels = (tensor.to(device) for tensor in batch_at(step))
        nn.functional.cross_entropy(model(images), labels).backward()
        pre.step()
        optimizer.step()
        optimizer.zero_grad()


def trained(device, target="embedded", **settings):
    model = small_cnn().to(device)
    optimizer = sgd(model)
    settings = {**SETTINGS, **settings}
    with Preconditioner(model, optimizer, target=target, **settings) as pre:
        train(model, pre, optimizer, device=device)
        return flat_parameters(model).cpu(), pre.report()


@pytest.mark.parametrize("history", ["snapshot", "window", "ema"])
@pytest.mark.parametrize("place", PLACES)
def test_it_ends_where_the_cpu_does(place, history, tmp_path):
    with engine(place, tmp_path) as target:
        found, report = trained("cuda", target, history=history)
    expected, as_expected = trained("cpu", history=history)

    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert report["raw_gradients"] == as_expected["raw_gradients"]
    assert report["versions"]["solved"] == as_expected["versions"]["solved"]
    assert {"late", "failed", "corrupt"}.isdisjoint(report["versions"])


@pytest.mark.parametrize("apply", ["row", "gradient"])
@pytest.mark.parametrize("wire_dtype", ["float32", "float64"])
def test_every_way_to_apply(apply, wire_dtype):
    settings = {"apply": apply, "wire_dtype": wire_dtype}
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 90), nn.Tanh(), nn.Linear(90, 5))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ends = []
    for device in ("cpu", "cuda"):
        model = model.to(device)
        model.load_state_dict(state)
        optimizer = sgd(model)
        with Preconditioner(model, optimizer, **SETTINGS, **settings) as pre:
            train(model, pre, optimizer, device=device)
        ends.append(flat_parameters(model).cpu())

    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-4)


def test_a_checkpoint_goes_on_with_a_fresh_server(tmp_path):
    whole, _ = trained("cuda", history="ema")
    model = small_cnn().cuda()
    optimizer = sgd(model)
    settings = {**SETTINGS, "history": "ema"}
    address = unix_address(tmp_path)
    with (
        ServerProcess(address, device="cuda"),
        Preconditioner(model, optimizer, target=address, **settings) as pre,
    ):
        train(model, pre, optimizer, range(7))
        state = pre.state_dict()
    with (
        ServerProcess(address, device="cuda"),
        Preconditioner(model, optimizer, target=address, **settings) as pre,
    ):
        pre.load_state_dict(state)
        train(model, pre, optimizer, range(7, STEPS))
        assert "history_losses" not in pre.report()["versions"]

    torch.testing.assert_close(flat_parameters(model).cpu(), whole.cpu())


def test_a_model_that_is_moved_after_it_was_wrapped():
    expected, _ = trained("cpu")
    model = small_cnn()
    optimizer = sgd(model)
    with Preconditioner(model, optimizer, **SETTINGS) as pre:
        train(model, pre, optimizer, range(5), device="cpu")
        model.cuda()
        for state in optimizer.state.values():
            state["momentum_buffer"] = state["momentum_buffer"].cuda()
        train(model, pre, optimizer, range(5, STEPS))

    found = flat_parameters(model).cpu()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_with_a_scaler(dtype):
    expected, _ = trained("cpu")
    model = small_cnn().cuda()
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40, growth_interval=10_000)
    skipped = 0
    with Preconditioner(model, optimizer, grad_scaler=scaler, **SETTINGS) as pre:
        step = 0
        while step < STEPS:
            images, labels = (tensor.cuda() for tensor in batch_at(step))
            with torch.autocast("cuda", dtype):
                loss = nn.functional.cross_entropy(model(images), labels)
            scaler.scale(loss).backward()
            before = scaler.get_scale()
            pre.step()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            overflowed = scaler.get_scale() < before
            skipped += overflowed
            step += not overflowed
            assert skipped < 60
        report = pre.report()

    found = flat_parameters(model).cpu()
    assert found.isfinite().all()
    assert (skipped > 0) == (dtype is torch.float16)  # 2^40 is too much for it
    assert report["versions"]["solved"] > 0
    start = flat_parameters(small_cnn())
    # Not the same steps, as rounding and skipped ones change the refreshes.
    assert (found - expected).norm() < 0.5 * (expected - start).norm()


@pytest.mark.timeout(200)  # Inductor compiles
@pytest.mark.filterwarnings("default")  # of torch itself
def test_a_compiled_model():
    expected, _ = trained("cpu")
    model = small_cnn().cuda()
    optimizer = sgd(model)
    with Preconditioner(model, optimizer, **SETTINGS) as pre:
        train(torch.compile(model), pre, optimizer)
        assert pre.report()["raw_gradients"] > 0

    found = flat_parameters(model).cpu()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_memory_of_the_device_does_not_grow():
    model = small_cnn().cuda()
    optimizer = sgd(model)
    settings = {**SETTINGS, "update_every": 1}
    used = []
    with Preconditioner(model, optimizer, **settings) as pre:
        for begin in (0, 10, 20, 30):
            train(model, pre, optimizer, range(begin, begin + 10))
            pre._store.settle(30.0)
            torch.cuda.synchronize()
            used.append(torch.cuda.memory_allocated())

    assert used[-1] <= used[1], used
