"""Trains a deep autoencoder with SGD, with AdamW and with SKFAC.

SKFAC takes a `Preconditioner` beside the optimizer, as `optimizer_of` makes it here,
and one more line in the training loop, which is in `common/training.py`:

    loss.backward()
    preconditioner.step()  # turns the gradients into preconditioned ones
    optimizer.step()
    optimizer.zero_grad()
"""

from functools import partial
from itertools import pairwise

import torch
import typer
from common import options
from common.data import mnist_5k
from common.report import Request, compare
from common.training import Task
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.optim import SGD, AdamW, Optimizer

from skfac.client import Preconditioner

WIDTHS = (784, 512, 256, 128, 30, 128, 256, 512, 784)


def optimizer_of(
    name: options.OptimizerName, model: nn.Module, *, target: str
) -> tuple[Optimizer, Preconditioner | None]:
    """Make what trains the model, with the best settings found for each optimizer."""
    if name == "sgd":
        return SGD(model.parameters(), lr=0.003, momentum=0.9), None
    if name == "adamw":
        return AdamW(model.parameters(), lr=0.006), None
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.5)
    preconditioner = Preconditioner(
        model,
        optimizer,
        target=target,
        update_every=2,
        lag=1,
        damping=0.01,
        damping_split="equal",
        kl_clip=0.08,
    )
    return optimizer, preconditioner


def build_model() -> nn.Sequential:
    """Make the autoencoder: tanh between layers, but a linear code and output."""
    model = nn.Sequential()
    for d_in, d_out in pairwise(WIDTHS):
        model.append(nn.Linear(d_in, d_out))
        if d_out not in {min(WIDTHS), WIDTHS[-1]}:
            model.append(nn.Tanh())
    return model


def reconstruction_loss(logits: Tensor, pixels: Tensor) -> Tensor:
    """Sum the binary cross-entropy over pixels; mean over digits."""
    summed = binary_cross_entropy_with_logits(logits, pixels, reduction="sum")
    return summed / len(pixels)


def squared_error(logits: Tensor, pixels: Tensor) -> Tensor:
    """Sum the squared error over pixels; mean over digits."""
    return (torch.sigmoid(logits) - pixels).square().sum() / len(pixels)


def autoencoding() -> Task:
    """Describe the task: 4,000 MNIST digits through a code of 30 numbers and back."""
    split = mnist_5k()
    inputs, val_inputs = split.inputs.flatten(1), split.val_inputs.flatten(1)
    return Task(
        inputs=inputs,
        targets=inputs,
        val_inputs=val_inputs,
        val_targets=val_inputs,
        build_model=build_model,
        loss=reconstruction_loss,
        loss_name="BCE",
        metric=squared_error,
        metric_name="squared error",
    )


def main(
    optimizer: options.Optimizer = None,
    target: options.Target = "embedded",
    epochs: options.Epochs = 6,
    seed: options.Seed = 0,
    as_json: options.Json = False,
    plot: options.Plot = None,
) -> None:
    """Train a deep autoencoder on MNIST digits, and compare optimizers.

    784-512-256-128-30 and back, tanh between layers, 4,000 digits of 28x28 pixels to
    train with and 1,000 to validate with. First-order optimizers have it hard here: in
    the 186 steps of 6 epochs SGD does not leave the plateau where every digit is
    reconstructed as the mean of all, at a cross-entropy (BCE) of about 207. AdamW comes
    to about 182, and SKFAC to about 98. A step of SKFAC takes two to three times as
    long: compare the seconds, or draw both with --plot.

    Lower is better, for the cross-entropy as for the squared error: both are sums over
    the pixels and means over the digits. The settings of each optimizer are the best of
    benchmarks/autoencoder_grid.py; it also shows how much they matter.
    """
    request = Request(
        optimizer=optimizer, epochs=epochs, seed=seed, as_json=as_json, plot=plot
    )
    compare(autoencoding(), partial(optimizer_of, target=target), request)


if __name__ == "__main__":
    typer.run(main)
