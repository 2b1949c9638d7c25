"""Rows that hooks collect, against rows computed by hand."""

import threading

import pytest
import torch
from torch import nn

from skfac.client.capture import Capture
from skfac.client.layers import track_layers
from skfac.client.outbox import Outbox


def captured(model: nn.Module, dtype=torch.float32) -> Capture:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Capture(track_layers(model, optimizer, ()), dtype)


def rows_of(capture: Capture):
    return capture.take(0, 7, 0.1).wait().layers


def test_rows_are_inputs_and_derivatives_of_single_examples():
    layer, inputs = nn.Linear(3, 2), torch.randn(5, 3)
    capture = captured(layer)
    layer(inputs).square().sum(1).mean().backward()
    snapshot = capture.take(0, 7, 0.1).wait()
    (rows,) = snapshot.layers

    assert (snapshot.rank, snapshot.step, snapshot.damping) == (0, 7, 0.1)
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
    capture.armed = False
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


def test_an_input_may_be_given_by_name():
    layer, inputs = nn.Linear(3, 2), torch.randn(5, 3)
    capture = captured(layer)
    layer(input=inputs).sum().backward()
    (rows,) = rows_of(capture)

    assert torch.equal(rows.activations[:, :-1], inputs)


def test_rows_have_the_wire_s_type():
    layer = nn.Linear(3, 2, dtype=torch.float64)
    capture = captured(layer, torch.float32)
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


class TestOutbox:
    @pytest.fixture
    def snapshots(self):
        layer = nn.Linear(1, 1)
        capture = captured(layer)
        return [capture.take(0, step, 0.1) for step in range(6)]

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
