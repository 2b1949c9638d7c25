"""The command line: `skfac serve`, `skfac status` and `skfac ray`."""

import json
import logging
import signal
import threading
import time
from pathlib import Path
from typing import Annotated

import grpc
import typer
from google.protobuf.json_format import MessageToDict
from pydantic import ValidationError
from pydantic_settings import SettingsError
from rich.console import Console
from rich.live import Live

from skfac.service.config import ServiceConfig
from skfac.service.ray_main import name_and_value, ray_app
from skfac.service.server import Server
from skfac.service.table import status_table
from skfac.v1 import preconditioning_pb2 as pb
from skfac.v1 import preconditioning_pb2_grpc as rpc
from skfac.wire.allocator import keep_large_blocks, share_one_arena
from skfac.wire.channel import CLIENT_OPTIONS

app = typer.Typer(
    help="SKFAC preconditioning as a service.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(ray_app, name="ray")


@app.command()
def serve(
    config: Annotated[
        Path | None, typer.Option(help="TOML file with any of the settings.")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="host:port or unix:/path; port 0 picks a free one."),
    ] = None,
    metrics_address: Annotated[
        str | None, typer.Option(help="host:port for Prometheus; empty for none.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Where factors are inverted: cpu, cuda, cuda:N.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="NAME=VALUE of any other setting; repeatable."),
    ] = None,
) -> None:
    """Run a preconditioning server until SIGTERM or Ctrl-C.

    Settings come, strongest first, from flags, SKFAC_* environment variables (such as
    SKFAC_ADDRESS), the TOML file and the defaults. The settings are: address,
    metrics_address, insecure_remote, device, max_streams, grace_s, log_level, lease_s,
    assembly_timeout_s, max_sessions, max_layers, max_snapshot_bytes,
    max_session_bytes, max_history_bytes.

    Example: skfac serve --address 127.0.0.1:50051 --set lease_s=120
    """
    named = {"address": address, "metrics_address": metrics_address, "device": device}
    flags = {name: value for name, value in named.items() if value is not None}
    flags |= dict(map(name_and_value, settings or []))
    try:
        loaded = ServiceConfig.load(config, flags)
    except (ValidationError, SettingsError, FileNotFoundError, ValueError) as error:
        raise _usage_error(error) from None
    logging.basicConfig(
        level=loaded.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    share_one_arena()
    keep_large_blocks()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        server = Server(loaded)
    except OSError as error:
        raise _usage_error(error) from None
    with server:
        typer.echo(f"Serving on {server.address}")
        if server.metrics_address:
            typer.echo(f"Metrics on http://{server.metrics_address}/metrics")
        stop.wait()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)  # a second one ends it at once
        typer.echo("Stopping: solving what was accepted.")


@app.command()
def status(
    address: Annotated[
        str, typer.Argument(help="host:port or unix:/path of a server.")
    ] = "127.0.0.1:50051",
    watch: Annotated[
        float, typer.Option(help="Show it again every so many seconds; 0 for once.")
    ] = 0.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of a table.")
    ] = False,
) -> None:
    """Show the sessions, versions and latencies of a running server.

    Example: skfac status 127.0.0.1:50051 --watch 1
    """
    with grpc.insecure_channel(address, CLIENT_OPTIONS) as channel:
        stub = rpc.PreconditioningServiceStub(channel)
        try:
            answer = stub.GetStatus(pb.GetStatusRequest(), timeout=5.0)
            if as_json:
                as_dict = MessageToDict(answer, preserving_proto_field_name=True)
                typer.echo(json.dumps(as_dict))
                return
            with Live(status_table(answer), console=Console()) as live:
                while watch:
                    time.sleep(watch)
                    answer = stub.GetStatus(pb.GetStatusRequest(), timeout=5.0)
                    live.update(status_table(answer))
        except grpc.RpcError as error:
            typer.echo(f"No answer from {address}: {error.details()}", err=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            raise typer.Exit(0) from None


def _usage_error(error: Exception) -> typer.BadParameter:
    if not isinstance(error, ValidationError):
        return typer.BadParameter(str(error))
    lines = (
        f"{'.'.join(map(str, e['loc'])) or 'settings'}: {e['msg']} (got {e['input']!r})"
        for e in error.errors(include_url=False)
    )
    return typer.BadParameter("; ".join(lines))
