"""S8: where the engine runs makes no difference to a single bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from skfac.client import Preconditioner
from skfac.curvature.geometry import LayerGeometry, geometry_of
from skfac.curvature.history import LayerHistory
from skfac.curvature.layer import LayerPreconditioner
from skfac.curvature.positions import Positions
from skfac.curvature.settings import CurvatureSettings, History
from skfac.curvature.trust import inner, kl_scale
from tests.support.models import backward, flat_parameters, sgd, small_cnn
from tests.support.servers import LONG_S, ServerProcess

STEPS = 50
DAMPING, KL_CLIP = 0.02, 0.01
SETTINGS = CurvatureSettings(damping=DAMPING, decay=0.8, window=3, rank=40)
REDUCED = Positions("reduce", None)


def trained_with(step: Callable[[], None], model, optimizer) -> list[Tensor]:
    """Train; returns the parameters after each step."""
    trajectory = []
    for number in range(STEPS):
        backward(model, number)
        step()
        optimizer.step()
        optimizer.zero_grad()
        trajectory.append(flat_parameters(model))
    return trajectory


def through(
    target: str, lag: int, update_every: int, on_late: str = "wait", **settings: Any
) -> list[Tensor]:
    model = small_cnn()
    optimizer = sgd(model)
    with Preconditioner(
        model,
        optimizer,
        target=target,
        damping=DAMPING,
        damping_split="pi",
        kl_clip=KL_CLIP,
        lag=lag,
        update_every=update_every,
        on_late=on_late,
        wait_s=LONG_S,
        **settings,
    ) as preconditioner:
        return trained_with(preconditioner.step, model, optimizer)


class Reference:
    """The same algorithm in one thread, straight from the formulas."""

    def __init__(
        self, model, optimizer, lag: int, update_every: int, history: History
    ) -> None:
        self.layers = [m for m in model.modules() if geometry_of(m) is not None]
        self.optimizer, self.lag, self.update_every = optimizer, lag, update_every
        self.rows: dict[int, list[Tensor]] = {}
        self.histories = [LayerHistory.empty(history) for _ in self.layers]
        self.versions: dict[int, list[LayerPreconditioner]] = {}
        self.number = 0
        for layer in self.layers:
            layer.register_forward_hook(self.remember)

    @staticmethod
    def geometry(layer) -> LayerGeometry:
        geometry = geometry_of(layer)
        assert geometry is not None
        return geometry

    def remember(self, layer, inputs, output) -> None:
        geometry = self.geometry(layer)
        activations = geometry.activation_rows(inputs[0].detach(), REDUCED)
        self.rows[id(layer)] = [activations]

        def finish(gradient: Tensor) -> None:
            scale = float(len(activations))
            rows = geometry.derivative_rows(gradient, REDUCED, scale=scale)
            self.rows[id(layer)].append(rows)

        output.register_hook(finish)

    def step(self) -> None:
        if self.number % self.update_every == 0:
            self.histories = [
                history.fold(self.rows[id(layer)][0], self.rows[id(layer)][1], SETTINGS)
                for layer, history in zip(self.layers, self.histories, strict=True)
            ]
            self.versions[self.number] = [
                history.precondition(SETTINGS, "pi", damping=DAMPING)
                for history in self.histories
            ]
        due = [c for c in self.versions if c + self.lag <= self.number]
        lr = self.optimizer.param_groups[0]["lr"]
        gradients = [self.matrix(layer) for layer in self.layers]
        steps = gradients
        if due:
            newest = self.versions[max(due)]
            steps = [v.apply(g) for v, g in zip(newest, gradients, strict=True)]
        pairs = zip(steps, gradients, strict=True)
        products = torch.stack([inner(step, g).double() for step, g in pairs])
        decrease = (products * torch.full_like(products, lr).square()).sum()
        scale = kl_scale(decrease, kl_clip=KL_CLIP)
        for layer, step in zip(self.layers, steps, strict=True):
            step = step * scale.float()
            if layer.bias is not None:
                layer.bias.grad.copy_(step[:, -1])
                step = step[:, :-1]
            layer.weight.grad.copy_(step.reshape(layer.weight.shape))
        self.number += 1

    @staticmethod
    def matrix(layer) -> Tensor:
        weight = layer.weight.grad.flatten(1)
        if layer.bias is None:
            return weight
        return torch.cat([weight, layer.bias.grad[:, None]], 1)


@pytest.fixture(scope="module")
def server():
    with ServerProcess() as process:
        yield process


@pytest.mark.parametrize(
    ("lag", "update_every", "history"),
    [
        (0, 1, "snapshot"),
        (0, 3, "snapshot"),
        (3, 1, "snapshot"),
        (3, 5, "snapshot"),
        (1, 2, "window"),
        (1, 2, "ema"),
    ],
)
def test_every_target_takes_the_steps_of_the_reference(
    server, lag, update_every, history
):
    model = small_cnn()
    optimizer = sgd(model)
    reference = Reference(model, optimizer, lag, update_every, history)
    expected = trained_with(reference.step, model, optimizer)
    settings = {
        "apply": "gradient",
        "history": history,
        "window": SETTINGS.window,
        "decay": SETTINGS.decay,
        "rank": SETTINGS.rank,
    }

    embedded = through("embedded", lag, update_every, **settings)
    remote = through(server.address, lag, update_every, **settings)

    for step in range(STEPS):
        assert torch.equal(embedded[step], expected[step]), f"embedded, step {step}"
        assert torch.equal(remote[step], expected[step]), f"gRPC, step {step}"


@pytest.mark.parametrize("lag", [1, 2])
def test_no_version_in_time_is_ever_superseded(server, lag):
    # Timing must decide nothing, although each snapshot is followed by the next.
    assert all(
        map(
            torch.equal,
            through("embedded", lag, 1, on_late="keep"),
            through(server.address, lag, 1, on_late="wait"),
        )
    )


def test_a_unix_socket_is_as_good(tmp_path):
    with ServerProcess(f"unix:{tmp_path}/skfac.sock") as process:
        remote = through(process.address, 3, 1)

    embedded = through("embedded", 3, 1)

    assert all(map(torch.equal, remote, embedded))


def test_the_reference_is_not_plain_sgd():
    # Else the comparisons above would compare nothing.
    model = small_cnn()
    plain = trained_with(lambda: None, model, sgd(model))

    assert not torch.allclose(plain[-1], through("embedded", 0, 1)[-1], atol=1e-3)
