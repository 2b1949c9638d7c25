"""Rows that hooks collect, against rows computed by hand."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.func import functional_call

from skfac.client.capture import Capture
from skfac.client.config import PreconditionerConfig
from skfac.client.layers import track_layers
from skfac.client.outbox import Outbox
from skfac.curvature.positions import draw_positions
from skfac.wire.errors import ConfigurationError
from tests.support.dense import geometry_for


def captured(model: nn.Module, step: int | None = 7, **settings) -> Capture:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    layers = track_layers(model, optimizer, ())
    capture = Capture(layers, PreconditionerConfig(**settings), rank=0)
    capture.arm(step)
    return capture


def rows_of(capture: Capture):
    return capture.take(7).wait().layers


def test_rows_are_inputs_and_derivatives_of_single_examples():
    layer, inputs = nn.Linear(3, 2), torch.randn(5, 3)
    capture = captured(layer, damping=0.1, decay=0.5)
    layer(inputs).square().sum(1).mean().backward()
    snapshot = capture.take(7).wait()
    (rows,) = snapshot.layers

    assert (snapshot.rank, snapshot.step) == (0, 7)
    assert (snapshot.settings.damping, snapshot.settings.decay) == (0.1, 0.5)
    assert torch.equal(rows.activations, torch.cat([inputs, torch.ones(5, 1)], 1))
    # The derivative of one example's loss: not divided by the batch size.
    torch.testing.assert_close(rows.derivatives, 2 * layer(inputs).detach())
    mean_gradient = rows.derivatives.T @ rows.activations / 5
    torch.testing.assert_close(mean_gradient[:, :-1], layer.weight.grad)


def test_a_module_used_twice_keeps_its_rows_together():
    layer = nn.Linear(3, 3)
    capture = captured(layer)
    first, second = torch.randn(4, 3), torch.randn(2, 3)
    loss = layer(first).mean() * 4 * 3 / 4 + (layer(second) * 5).sum() / 2
    loss.backward()
    (rows,) = rows_of(capture)

    assert torch.equal(rows.activations[:, :-1], torch.cat([first, second]))
    expected = torch.cat([torch.ones(4, 3), torch.full((2, 3), 5.0)])
    torch.testing.assert_close(rows.derivatives, expected)


def test_only_forwards_that_train_count():
    layer = nn.Linear(3, 2)
    capture = captured(layer)
    with torch.no_grad():
        layer(torch.randn(5, 3))
    layer.eval()
    layer(torch.randn(5, 3)).sum().backward()
    layer.train()
    layer(torch.randn(5, 3))  # without a backward
    capture.arm(None)
    layer(torch.randn(5, 3)).sum().backward()
    (rows,) = rows_of(capture)

    assert rows.activations.shape == (0, 4)
    assert rows.derivatives.shape == (0, 2)


def test_what_a_model_does_in_place_changes_no_rows():
    layer, inputs = nn.Conv2d(1, 2, 1), torch.randn(3, 1, 2, 2)
    capture = captured(layer)
    output = layer(inputs)
    before = output.detach().clone()
    torch.relu_(output).sum(dim=(1, 2, 3)).mean().backward()
    inputs.zero_()
    (rows,) = rows_of(capture)

    torch.testing.assert_close(rows.derivatives, (before > 0).float().sum((2, 3)))
    assert rows.activations[:, 0].abs().min() > 0


def test_a_view_that_is_changed_in_place_changes_no_rows():
    # The output of a linear layer on sequences is a view of a matrix.
    layer, inputs = nn.Linear(3, 2), torch.randn(4, 5, 3)
    capture = captured(layer)
    output = layer(inputs)
    before = output.detach().clone()
    torch.relu_(output).sum(dim=(1, 2)).mean().backward()
    (rows,) = rows_of(capture)

    torch.testing.assert_close(rows.derivatives, (before > 0).float().sum(1))


def test_an_input_may_be_given_by_name():
    layer, inputs = nn.Linear(3, 2), torch.randn(5, 3)
    capture = captured(layer)
    layer(input=inputs).sum().backward()
    (rows,) = rows_of(capture)

    assert torch.equal(rows.activations[:, :-1], inputs)


def test_an_input_may_come_by_name_behind_others():
    layer, inputs = nn.ConvTranspose1d(1, 2, 3), torch.randn(5, 1, 4)
    capture = captured(layer)
    layer(output_size=[6], input=inputs).sum().backward()
    (rows,) = rows_of(capture)

    assert len(rows.activations) == 5


def test_a_forward_that_ran_ahead_gives_no_rows_of_another_step():
    layer = nn.Linear(3, 2)
    capture = captured(layer)
    here, ahead = layer(torch.randn(4, 3)), layer(torch.randn(6, 3))
    here.sum().backward()
    (rows,) = rows_of(capture)
    capture.arm(None)  # nothing is due in the next step
    ahead.sum().backward()
    capture.arm(9)
    layer(torch.randn(5, 3)).sum().backward()
    (later,) = capture.take(9).wait().layers

    assert (rows.count, later.count) == (4, 5)


def test_rows_have_the_wire_s_type():
    layer = nn.Linear(3, 2, dtype=torch.float64)
    capture = captured(layer)
    layer(torch.randn(5, 3, dtype=torch.float64)).sum().backward()
    (rows,) = rows_of(capture)

    assert rows.activations.dtype == rows.derivatives.dtype == torch.float32


def test_taking_empties_and_closing_removes_the_hooks():
    layer = nn.Linear(3, 2)
    capture = captured(layer)
    layer(torch.randn(5, 3)).sum().backward()
    assert len(rows_of(capture)[0].activations) == 5
    assert len(rows_of(capture)[0].activations) == 0
    capture.close()
    capture.close()
    assert not layer._forward_hooks


def batch_loss(layer: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """The losses of single examples, with derivatives that differ."""
    return layer(inputs).square().sum(1)


class TestOneCurvature:
    """S4: how the loss is scaled and split does not change the rows."""

    @pytest.fixture
    def layer(self):
        torch.manual_seed(0)
        return nn.Linear(3, 2, dtype=torch.float64)

    @pytest.fixture
    def inputs(self):
        return torch.randn(8, 3, dtype=torch.float64)

    @pytest.fixture
    def expected(self, layer, inputs):
        capture = captured(layer, wire_dtype="float64")
        batch_loss(layer, inputs).mean().backward()
        capture.close()
        layer.zero_grad()
        return rows_of(capture)[0]

    def assert_same(self, capture, expected):
        (rows,) = rows_of(capture)
        capture.close()
        assert torch.equal(rows.activations, expected.activations)
        torch.testing.assert_close(rows.derivatives, expected.derivatives)

    def test_a_sum_over_the_batch(self, layer, inputs, expected):
        capture = captured(layer, wire_dtype="float64", loss_reduction="sum")
        batch_loss(layer, inputs).sum().backward()
        self.assert_same(capture, expected)

    @pytest.mark.parametrize("sizes", [(2, 2, 2, 2), (4, 4)])
    def test_micro_batches(self, layer, inputs, expected, sizes):
        capture = captured(layer, wire_dtype="float64", accumulation_steps=len(sizes))
        for part in inputs.split(sizes):
            (batch_loss(layer, part).mean() / len(sizes)).backward()
        self.assert_same(capture, expected)

    def test_micro_batches_of_a_sum(self, layer, inputs, expected):
        capture = captured(
            layer, wire_dtype="float64", accumulation_steps=2, loss_reduction="sum"
        )
        for part in inputs.split(4):
            batch_loss(layer, part).sum().backward()
        self.assert_same(capture, expected)

    @pytest.mark.parametrize("scale", [1.0, 65536.0])
    def test_a_loss_scale(self, layer, inputs, expected, scale):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        capture = captured(layer, wire_dtype="float64", grad_scaler=scaler)
        scaler.scale(batch_loss(layer, inputs).mean()).backward()
        self.assert_same(capture, expected)

    def test_a_loss_scale_that_is_switched_off(self, layer, inputs, expected):
        scaler = torch.amp.GradScaler("cpu", init_scale=65536.0, enabled=False)
        capture = captured(layer, wire_dtype="float64", grad_scaler=scaler)
        batch_loss(layer, inputs).mean().backward()
        self.assert_same(capture, expected)

    def test_a_backward_in_two_parts(self, layer, inputs, expected):
        capture = captured(layer, wire_dtype="float64")
        losses = batch_loss(layer, inputs)
        (losses.mean() / 4).backward(retain_graph=True)
        (losses.mean() * 3 / 4).backward()
        self.assert_same(capture, expected)

    def test_gradients_that_were_thrown_away(self, layer, inputs, expected):
        capture = captured(layer, wire_dtype="float64")
        batch_loss(layer, inputs * 2).mean().backward()
        layer.zero_grad()
        batch_loss(layer, inputs).mean().backward()
        self.assert_same(capture, expected)


def test_modules_that_share_their_parameters_give_rows_together():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight, model[1].bias = model[0].weight, model[0].bias
    capture = captured(model)
    inputs = torch.randn(4, 3)
    hidden = model[0](inputs)
    model[1](hidden).sum(1).mean().backward()
    (rows,) = rows_of(capture)

    torch.testing.assert_close(
        rows.activations[:, :-1], torch.cat([inputs, hidden.detach()])
    )
    expected = torch.cat([model[0].weight.sum(0).expand(4, 3), torch.ones(4, 3)])
    torch.testing.assert_close(rows.derivatives, expected.detach())


@pytest.mark.parametrize("reduction", ["reduce", "authors", "subsample", "expand"])
def test_the_reduction_is_the_geometry_s(reduction):
    layer, inputs = nn.Linear(3, 2), torch.randn(4, 5, 3)
    capture = captured(layer, reduction=reduction, positions=2)
    layer(inputs).square().sum((1, 2)).mean().backward()
    (rows,) = rows_of(capture)

    seed = 7 * 1 * 1000
    drawn = draw_positions(reduction, 5, keep=2, seed=seed)
    geometry = geometry_for(layer)
    derivatives = 2 * layer(inputs).detach() / 4
    torch.testing.assert_close(
        rows.activations, geometry.activation_rows(inputs, drawn)
    )
    torch.testing.assert_close(
        rows.derivatives, geometry.derivative_rows(derivatives, drawn, scale=4.0)
    )


def test_each_forward_and_step_draws_its_own_positions():
    layer, inputs = nn.Linear(1, 1, bias=False), torch.arange(50.0).reshape(1, 50, 1)
    capture = captured(layer, reduction="subsample", positions=5)
    drawn = []
    for step in (7, 7, 8):
        capture.arm(step)
        (layer(inputs).sum() + layer(inputs).sum()).backward()
        layer.zero_grad()
        rows = rows_of(capture)[0].activations.flatten().tolist()
        drawn += [tuple(rows[:5]), tuple(rows[5:])]

    assert drawn[0] == drawn[2]
    assert drawn[1] == drawn[3]
    assert len(set(drawn)) == 4


def test_a_sampled_loss_gives_all_derivatives_and_no_gradients():
    layer, inputs = nn.Linear(3, 2), torch.randn(4, 3)
    capture = captured(layer, fisher="monte_carlo")
    output = layer(inputs)
    with capture.sampling():
        torch.autograd.grad((output * 3).sum(1).mean(), layer.weight, retain_graph=True)
    output.square().sum(1).mean().backward()
    (rows,) = rows_of(capture)

    torch.testing.assert_close(rows.derivatives, torch.full((4, 2), 3.0))


def test_two_draws_of_one_forward_are_refused():
    layer = nn.Linear(3, 2)
    capture = captured(layer, fisher="monte_carlo")
    output = layer(torch.randn(4, 3))

    def draw() -> None:
        with capture.sampling():
            torch.autograd.grad(output.mean(), layer.weight, retain_graph=True)

    draw()
    with pytest.raises(ConfigurationError, match="twice for one forward"):
        draw()


def test_a_call_that_no_geometry_describes_gives_no_rows(caplog):
    layer = nn.ConvTranspose1d(1, 2, 3, stride=2)
    capture = captured(layer)
    for _ in range(2):
        layer(torch.randn(4, 1, 5), output_size=[12]).sum().backward()
    (rows,) = rows_of(capture)

    assert rows.activations.shape == (0, 4)
    record, _ = caplog.records  # the other says that no layer had any
    assert "Layer 'model' gives no rows" in record.message
    assert "skip=" in record.message


def test_copies_of_a_model_are_not_captured():
    layer = nn.Linear(3, 2)
    capture = captured(layer)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):  # noqa: S301
        twin(torch.randn(4, 3)).sum().backward()
        (hook,) = twin._forward_hooks.values()
        assert hook._layer is None  # nothing of this trainer is copied along
    assert len(rows_of(capture)[0].activations) == 0
    other = {name: p.detach().clone() for name, p in layer.named_parameters()}
    functional_call(layer, other, torch.randn(4, 3).requires_grad_()).sum().backward()
    assert len(rows_of(capture)[0].activations) == 0


class TestOutbox:
    @pytest.fixture
    def snapshots(self):
        layer = nn.Linear(1, 1)
        capture = captured(layer)
        return [capture.take(step) for step in range(6)]

    def test_it_reads_in_order_and_again_from_the_start(self, snapshots):
        outbox, stop = Outbox(4), threading.Event()
        for snapshot in snapshots[:3]:
            assert outbox.put(snapshot) == []
        steps = []
        for after in (-1, 0, 1, -1):
            found = outbox.next_after(after, stop)
            assert found is not None
            steps.append(found.step)
        assert steps == [0, 1, 2, 0]

    def test_it_drops_the_oldest_when_it_is_full(self, snapshots):
        outbox, stop = Outbox(2), threading.Event()
        dropped = [outbox.put(snapshot) for snapshot in snapshots]
        assert dropped == [[], [], [0], [1], [2], [3]]
        found = outbox.next_after(-1, stop)
        assert found is not None
        assert found.step == 4

    def test_what_has_an_outcome_is_not_sent_again(self, snapshots):
        outbox, stop = Outbox(4), threading.Event()
        for snapshot in snapshots[:2]:
            outbox.put(snapshot)
        outbox.discard(0)
        outbox.discard(0)
        found = outbox.next_after(-1, stop)
        assert found is not None
        assert found.step == 1

    @pytest.mark.parametrize("how", ["close", "stop"])
    def test_waiting_can_be_ended(self, how):
        outbox, stop = Outbox(1), threading.Event()
        found: list[object] = []
        waiter = threading.Thread(
            target=lambda: found.append(outbox.next_after(-1, stop))
        )
        waiter.start()
        if how == "close":
            outbox.close()
        else:
            stop.set()
            outbox.wake()
        waiter.join(10)
        assert found == [None]
