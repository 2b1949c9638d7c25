"""Makes what trains a model, from the optimizer's name and its settings."""

import warnings
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from benchmarks.study.dense_kfac import DenseKfac, DenseKfacSettings
from benchmarks.study.muon import Muon
from skfac.client import PassThroughWarning, Preconditioner

Settings = dict[str, Any]
Trained = tuple[Optimizer, Preconditioner | None]


def sgd(model: nn.Module, settings: Settings) -> Optimizer:
    """Make torch's SGD; `settings` are its keywords."""
    return SGD(model.parameters(), **settings)


def adamw(model: nn.Module, settings: Settings) -> Optimizer:
    """Make torch's AdamW; `settings` are its keywords."""
    return AdamW(model.parameters(), **settings)


def muon(model: nn.Module, settings: Settings) -> Optimizer:
    """Make Muon for the weights of hidden layers, AdamW for all else.

    Args:
        model: Its last linear layer is its output, which Muon is not meant for.
        settings: Of Muon, and `adamw_lr`.

    Returns:
        Muon, with AdamW attached.
    """
    own = dict(settings)
    adamw_lr = own.pop("adamw_lr")
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    hidden = [next(layer.parameters()) for layer in layers[:-1]]
    optimizer = Muon(hidden, **own)
    return _with_adamw(optimizer, _others(model, hidden), adamw_lr)


def soap(model: nn.Module, settings: Settings) -> Optimizer:
    """Make heavyball's SOAP, uncompiled; `settings` are its keywords."""
    import heavyball

    # Compiling takes longer than a whole run here.
    heavyball.utils.compile_mode = None
    # It supports that as SOAP is made here, and says so by this warning.
    warnings.filterwarnings("ignore", "Learning rate changed", UserWarning)
    optimizer: Optimizer = heavyball.SOAP(model.parameters(), **settings)
    return optimizer


def singd(model: nn.Module, settings: Settings) -> Optimizer:
    """Make dense SINGD for linear layers and convolutions, AdamW for all else.

    Args:
        model: What it trains.
        settings: Of SINGD, and `adamw_lr`.

    Returns:
        SINGD, with AdamW attached if there is anything else.
    """
    from singd.optim.optimizer import SINGD

    own = dict(settings)
    adamw_lr = own.pop("adamw_lr")
    layers = [m for m in model.modules() if isinstance(m, SINGD.SUPPORTED_MODULES)]
    supported = [parameter for m in layers for parameter in m.parameters()]
    optimizer: Optimizer = SINGD(model, params=supported, **own)
    return _with_adamw(optimizer, _others(model, supported), adamw_lr)


def dense_kfac(model: nn.Module, settings: Settings) -> Optimizer:
    """Make SGD with dense K-FAC before each step, of `DenseKfacSettings`."""
    own = dict(settings)
    optimizer = SGD(model.parameters(), lr=own.pop("lr"), momentum=own.pop("momentum"))
    DenseKfac(model, optimizer, DenseKfacSettings(**own))
    return optimizer


BASELINES: dict[str, Callable[[nn.Module, Settings], Optimizer]] = {
    "sgd": sgd,
    "adamw": adamw,
    "muon": muon,
    "soap": soap,
    "singd": singd,
    "dense-kfac": dense_kfac,
}


def skfac(model: nn.Module, settings: Settings, curvature: Settings) -> Trained:
    """Make SGD with SKFAC.

    Args:
        model: What it trains.
        settings: `lr` and `momentum` of SGD, and what of the preconditioner was tuned.
        curvature: The other keywords of the preconditioner; none at all for the
            library's defaults.

    Returns:
        Both.
    """
    own = dict(settings)
    optimizer = SGD(model.parameters(), lr=own.pop("lr"), momentum=own.pop("momentum"))
    with warnings.catch_warnings():
        # The transformer's norms and positions are meant to pass through.
        warnings.simplefilter("ignore", PassThroughWarning)
        return optimizer, Preconditioner(model, optimizer, **own, **curvature)


def _others(model: nn.Module, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    taken = {id(parameter) for parameter in parameters}
    return [p for p in model.parameters() if id(p) not in taken]


def _with_adamw(
    optimizer: Optimizer, parameters: list[nn.Parameter], lr: float
) -> Optimizer:
    # As a hook, because the schedule and the training loop know one optimizer.
    if not parameters:
        return optimizer
    other = AdamW(parameters, lr=lr, weight_decay=0.0)

    def step_other(main: Optimizer, *_: Any) -> None:  # noqa: ANN401
        group = main.param_groups[0]
        other.param_groups[0]["lr"] = lr * group["lr"] / group["initial_lr"]
        other.step()
        other.zero_grad()

    optimizer.register_step_pre_hook(step_other)
    return optimizer
