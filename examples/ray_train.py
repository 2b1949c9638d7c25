"""Trains a digit classifier with Ray Train: two workers, one pool of engines.

The workers are the ranks of one job. Each has its own `Preconditioner` with the same
target, and all of them take the same steps, as with DistributedDataParallel alone.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import ray
import torch
import typer
from common.data import digits
from ray import train
from ray.train.torch import TorchConfig, TorchTrainer, prepare_model
from torch import nn
from torch.nn.functional import cross_entropy

from skfac.client import Preconditioner
from skfac.service.ray import start_pool

BATCH_SIZE = 64  # of each worker


def train_worker(settings: dict[str, Any]) -> None:
    """Train as one of the workers."""
    context = train.get_context()
    rank, ranks = context.get_world_rank(), context.get_world_size()
    split = digits()
    torch.manual_seed(0)
    model = prepare_model(
        nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    with Preconditioner(
        model, optimizer, target=settings["target"], job="digits", kl_clip=0.05
    ) as preconditioner:
        for epoch in range(settings["epochs"]):
            generator = torch.Generator().manual_seed(epoch)
            order = torch.randperm(len(split.inputs), generator=generator)[rank::ranks]
            for batch in torch.split(order, BATCH_SIZE):
                loss = cross_entropy(model(split.inputs[batch]), split.labels[batch])
                loss.backward()  # type: ignore[no-untyped-call]
                preconditioner.step()
                optimizer.step()
                optimizer.zero_grad()
            with torch.no_grad():
                right = model(split.val_inputs).argmax(1) == split.val_labels
            metrics = {
                "epoch": epoch + 1,
                "val_accuracy": right.float().mean().item(),
                "solved": preconditioner.report()["versions"].get("solved", 0),
            }
            with TemporaryDirectory() as folder:
                state = {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "preconditioner": preconditioner.state_dict(),
                }
                torch.save(state, Path(folder, "state.pt"))
                mine = train.Checkpoint.from_directory(folder) if rank == 0 else None
                train.report(metrics, checkpoint=mine)


def main(
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the digits.")] = 5,
    workers: Annotated[int, typer.Option(min=1, help="Ranks.")] = 2,
) -> None:
    """Train with several workers whose curvature is inverted by one actor."""
    ray.init(include_dashboard=False, log_to_driver=False)
    # An engine has its CPU in a real cluster; here workers and engine share two.
    with TemporaryDirectory() as folder, start_pool(num_cpus=0) as pool:
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={"target": pool.target, "epochs": epochs},
            torch_config=TorchConfig(backend="gloo"),
            scaling_config=train.ScalingConfig(num_workers=workers),
            run_config=train.RunConfig(storage_path=folder),
        )
        metrics = trainer.fit().metrics
    ray.shutdown()
    print(json.dumps(metrics))


if __name__ == "__main__":
    typer.run(main)
