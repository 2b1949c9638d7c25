"""The commands of `skfac ray`: start, look at and stop pools of actors."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from pydantic import ValidationError

from skfac.wire.errors import SkfacError

ray_app = typer.Typer(
    help="Engines in the actors of a Ray cluster; needs Ray.",
    no_args_is_help=True,
)

_Address = Annotated[str, typer.Option(help="Of the cluster; auto finds a local one.")]
_Name = Annotated[str, typer.Option(help="Of the pool.")]
_Namespace = Annotated[str, typer.Option(help="Ray's namespace of the actors.")]


@ray_app.command()
def start(
    actors: Annotated[int, typer.Option(help="How many engines.")] = 1,
    gpus: Annotated[float, typer.Option(help="GPUs of each.")] = 0,
    cpus: Annotated[float, typer.Option(help="CPUs of each.")] = 1,
    takes_direct: Annotated[
        bool,
        typer.Option(
            "--takes-direct", help="Large rows come past the object store, with NIXL."
        ),
    ] = False,
    name: _Name = "skfac",
    namespace: _Namespace = "skfac",
    address: _Address = "auto",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="NAME=VALUE of a setting of engines; repeatable."),
    ] = None,
) -> None:
    """Start a pool, which lives until it is stopped; prints its target.

    Example: skfac ray start --actors 2 --gpus 1 --set lease_s=120
    """
    chosen = dict(map(name_and_value, settings or []))
    with _cluster(address):
        from skfac.service.ray import start_pool

        pool = start_pool(
            actors,
            name=name,
            namespace=namespace,
            num_gpus=gpus,
            takes_direct=takes_direct,
            settings=chosen,
            num_cpus=cpus,
        )
        typer.echo(pool.target)


@ray_app.command()
def status(
    name: _Name = "skfac", namespace: _Namespace = "skfac", address: _Address = "auto"
) -> None:
    """Print what each engine of a pool holds, as JSON, one line each."""
    with _cluster(address):
        from skfac.service.ray import get_pool

        for answer in get_pool(name, namespace).status():
            typer.echo(json.dumps(answer))


@ray_app.command()
def stop(
    name: _Name = "skfac", namespace: _Namespace = "skfac", address: _Address = "auto"
) -> None:
    """Solve what was accepted, then end a pool for good."""
    with _cluster(address):
        from skfac.service.ray import get_pool

        get_pool(name, namespace).stop()


def name_and_value(text: str) -> tuple[str, str]:
    """Read `NAME=VALUE`.

    Returns:
        Both parts.

    Raises:
        typer.BadParameter: If there is no `=`.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise typer.BadParameter(f"--set takes NAME=VALUE, got {text!r}.")
    return name, value


@contextmanager
def _cluster(address: str) -> Iterator[None]:
    # Errors that a user can do something about are sentences, not tracebacks.
    try:
        from skfac.service.ray import join_cluster  # says what to install

        join_cluster(address)
        yield
    except (ImportError, ConnectionError, SkfacError, ValidationError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
