"""Trains a digit classifier on several ranks, with DDP or with FSDP2.

    torchrun --nproc-per-node 2 examples/torchrun_train.py --fsdp

The trainer is that of one rank, with the model wrapped as ever. What SKFAC asks for is
the same `Preconditioner` on all ranks, with one server as its target, made after the
model is sharded and the optimizer made.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import torch
import typer
from classifier import Digits, DigitsOption, accuracy, build_model
from common import options
from common.data import Split, digits, mnist_5k
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from skfac.client import Preconditioner, SkfacError
from skfac.service.config import ServiceConfig
from skfac.service.server import Server

BATCH_SIZE = 128  # of all ranks together

Show = Callable[[dict[str, Any]], None]
"""Shows how the training goes, on one rank."""


@contextmanager
def served(target: str | None) -> Iterator[str]:
    """Find the server of all ranks: the one there is, or one that rank 0 runs.

    Yields:
        Its address.
    """
    if target is not None:
        yield target
        return
    if distributed.get_rank() > 0:
        yield _from_rank_0("")
        return
    config = ServiceConfig(address="127.0.0.1:0", metrics_address="")
    with Server(config) as server:
        yield _from_rank_0(server.address)


def _from_rank_0(text: str) -> str:
    texts = [text]
    distributed.broadcast_object_list(texts)
    return texts[0]


def shares(count: int, epoch: int, seed: int) -> Iterator[Tensor]:
    """Draw an epoch's batches, the same on all ranks.

    Yields:
        This rank's share of each: which digits.
    """
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    generator = torch.Generator().manual_seed(1000 * seed + epoch)
    order = torch.randperm(count, generator=generator)
    for batch in torch.split(order, BATCH_SIZE)[: count // BATCH_SIZE]:
        yield batch.chunk(ranks)[rank]


def spread(model: nn.Sequential, *, fsdp: bool) -> nn.Module:
    """Let the ranks train one model.

    Returns:
        What computes the loss: replicas of the model, or the model, sharded.
    """
    if not fsdp:
        return DistributedDataParallel(model)
    for layer in model:
        if any(True for _ in layer.parameters()):
            fully_shard(layer)
    fully_shard(model)
    return model


def train(
    split: Split, target: str, show: Show, *, epochs: int, seed: int, fsdp: bool
) -> None:
    """Train as one of the ranks."""
    torch.manual_seed(seed)
    model = build_model(*split.inputs.shape[2:])
    trained = spread(model, fsdp=fsdp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    rank = distributed.get_rank()
    seconds = 0.0
    with Preconditioner(
        model, optimizer, target=target, update_every=2, damping=0.03, kl_clip=0.05
    ) as preconditioner:
        for epoch in range(epochs):
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * (1 - epoch / epochs)
            began = time.perf_counter()
            for share in shares(len(split.inputs), epoch, seed):
                loss = cross_entropy(trained(split.inputs[share]), split.labels[share])
                loss.backward()  # type: ignore[no-untyped-call]
                preconditioner.step()
                optimizer.step()
                optimizer.zero_grad()
            seconds += time.perf_counter() - began
            with torch.no_grad():  # on all ranks: a sharded model needs them
                outputs = trained(split.val_inputs)
            report = preconditioner.report()
            if rank == 0:
                show({
                    "epoch": epoch + 1,
                    "seconds": round(seconds, 3),
                    "val_loss": cross_entropy(outputs, split.val_labels).item(),
                    "val_accuracy": accuracy(outputs, split.val_labels).item(),
                    "ranks": report["world_size"],
                    "solved": report["versions"].get("solved", 0),
                    "late": report["versions"].get("late", 0),
                })  # fmt: skip


def _line(found: dict[str, Any]) -> None:
    typer.echo(
        f"epoch {found['epoch']}: validation loss {found['val_loss']:.4f}, "
        f"{found['val_accuracy']:.1%} right; {found['seconds']:.1f} s on "
        f"{found['ranks']} ranks, {found['solved']} layer versions, "
        f"{found['late']} late"
    )


def _json(found: dict[str, Any]) -> None:
    typer.echo(json.dumps(found))


Fsdp = Annotated[
    bool,
    typer.Option(
        "--fsdp",
        help="Shard parameters, gradients and optimizer state over the ranks "
        "(fully_shard) instead of keeping replicas (DistributedDataParallel).",
    ),
]


def main(
    data: DigitsOption = Digits.MNIST,
    target: options.SharedTarget = None,
    epochs: options.Epochs = 6,
    seed: options.Seed = 0,
    fsdp: Fsdp = False,
    as_json: options.Json = False,
) -> None:
    """Train a small convolutional network on digits, on several ranks.

    Start it with torchrun, which tells each process its rank:

    torchrun --nproc-per-node 2 examples/torchrun_train.py

    All ranks need one server, because a factor is made of the rows of all of them. To
    have one beside the trainer, run `skfac serve --address 127.0.0.1:50051` and pass
    `--target 127.0.0.1:50051`. Rank 0 shows the progress. The processes use CPUs and
    gloo; with GPUs, init_process_group("nccl") and a device for each rank are all that
    changes.
    """
    if "RANK" not in os.environ:
        raise typer.BadParameter(
            "this process has no rank. Start it with torchrun --nproc-per-node 2 "
            "examples/torchrun_train.py."
        )
    split = mnist_5k() if data is Digits.MNIST else digits()
    torch.set_num_threads(1)  # the ranks share the cores
    distributed.init_process_group("gloo")
    try:
        with served(target) as address:
            show = _json if as_json else _line
            train(split, address, show, epochs=epochs, seed=seed, fsdp=fsdp)
    except SkfacError as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise typer.Exit(1) from error
    finally:
        distributed.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
