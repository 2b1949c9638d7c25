"""Trains a small network against servers: python train.py TARGET [CREDENTIALS].

CREDENTIALS are a JSON object, the arguments of `skfac.client.Credentials`. It fails
unless the servers' inverses were used and the loss fell: a test of a deployment from
the trainer's side.
"""

import json
import sys
from typing import Any

import torch
from torch import nn
from torch.nn.functional import mse_loss

from skfac.client import Preconditioner

STEPS = 20


def options_of(arguments: list[str]) -> dict[str, Any]:
    """Read what the command line adds to the preconditioner's settings.

    Returns:
        Keywords of `Preconditioner`.
    """
    if not arguments:
        return {}
    from skfac.client import Credentials

    return {"credentials": Credentials(**json.loads(arguments[0]))}


def main() -> None:
    """Train, then compare the last loss with the first."""
    target, *rest = sys.argv[1:]
    torch.manual_seed(0)
    inputs = torch.randn(64, 8)
    wanted = inputs @ torch.randn(8, 3)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    with Preconditioner(
        model, optimizer, target=target, job="skfac-deployment-test", update_every=2,
        lag=1, on_late="wait", **options_of(rest),
    ) as preconditioner:  # fmt: skip
        for _ in range(STEPS):
            loss = mse_loss(model(inputs), wanted)
            loss.backward()
            preconditioner.step()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        report = preconditioner.report()
    ages = {name: layer["age"] for name, layer in report["layers"].items()}
    sys.stdout.write(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; ages {ages}\n")
    if None in ages.values() or not losses[-1] < losses[0] / 2:
        sys.exit(f"No inverses came, or the loss did not fall: {report}")


if __name__ == "__main__":
    main()
