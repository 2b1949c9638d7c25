"""The command line: `skfac serve`, `status`, `top`, `token` and `ray`."""

import difflib
import json
import logging
import os
import secrets
import signal
import threading
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import SettingsError
from rich.console import Console
from rich.live import Live

from skfac.service.access import rule_of_token
from skfac.service.config import ServiceConfig
from skfac.service.logs import configure_logs
from skfac.service.plain import plain_message
from skfac.service.ray_main import name_and_value, ray_app
from skfac.service.table import StatusView
from skfac.v1 import preconditioning_pb2 as pb
from skfac.v1 import preconditioning_pb2_grpc as rpc
from skfac.wire.addresses import has_port
from skfac.wire.credentials import Credentials, open_channel
from skfac.wire.errors import ConfigurationError
from skfac.wire.handshake import why_unavailable

_SIGNALS_SEEN_EVERY_S = 0.5
_DEFAULTS = ServiceConfig.model_fields
_NOT_SAVED = 3  # exit code: stopped in order, but histories are lost
_INTERRUPTED = 128 + signal.SIGINT  # exit code, as shells have it
_STATUS_BYTES = 1 << 28  # that an answer may have: of thousands of layers it is large

logger = logging.getLogger(__name__)

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
        typer.Option(
            help="host:port or unix:/path; port 0 picks a free one.",
            show_default=_DEFAULTS["address"].default,
        ),
    ] = None,
    metrics_address: Annotated[
        str | None,
        typer.Option(
            help="host:port for Prometheus; empty for none.",
            show_default=_DEFAULTS["metrics_address"].default,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="Where factors are inverted: cpu, cuda, cuda:N.",
            show_default=_DEFAULTS["device"].default,
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="NAME=VALUE of any other setting; repeatable."),
    ] = None,
) -> None:
    """Run a preconditioning server until SIGTERM or Ctrl-C.

    It ends with 0, or with 3 if histories could not be saved to state_dir.

    Settings come, strongest first, from flags, SKFAC_* environment variables (such as
    SKFAC_ADDRESS), the TOML file and the defaults. The settings are: address,
    metrics_address, status_page, metrics_exemplars, insecure_remote, device,
    max_streams, idle_s, grace_s, state_dir, health_address, tls_certificate, tls_key,
    tls_client_ca, access_file, insecure_metrics, log_level, log_format, lease_s,
    assembly_timeout_s, max_sessions, max_layers, max_rank_layers, max_snapshot_bytes,
    max_session_bytes, max_waiting, max_history_bytes.

    Example: skfac serve --address 127.0.0.1:50051 --set lease_s=120
    """
    # At once, as the first process of a container would ignore a signal until then.
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    # Else each failed handshake is a line that gRPC itself writes, on any thread.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    named = {"address": address, "metrics_address": metrics_address, "device": device}
    flags = {name: value for name, value in named.items() if value is not None}
    flags |= dict(map(name_and_value, settings or []))
    # Only this command needs torch, which takes seconds.
    from skfac.service.server import Server
    from skfac.wire.allocator import keep_large_blocks, share_one_arena

    try:
        loaded = ServiceConfig.load(config, flags)
    except tomllib.TOMLDecodeError as error:
        raise typer.BadParameter(f"{config}: {error}.") from None
    except (ValidationError, SettingsError, FileNotFoundError, ValueError) as error:
        raise _usage_error(error) from None
    logs = configure_logs(loaded.log_level, loaded.log_format)
    share_one_arena()
    keep_large_blocks()
    if stop.is_set():
        return
    try:
        server = Server(loaded)
    except (OSError, ConfigurationError) as error:
        raise _usage_error(error) from None
    logs.count_losses(server.metrics.lost_log_lines.inc)
    with server:
        typer.echo(f"Serving on {server.address}")
        if server.metrics_address:
            typer.echo(f"Metrics on http://{server.metrics_address}/metrics")
            if loaded.status_page:
                typer.echo(f"Status on http://{server.metrics_address}/")
        # The kernel may give a signal to any thread, which does not wake this one, and
        # Python runs the handler only when this thread comes to itself.
        while not stop.wait(_SIGNALS_SEEN_EVERY_S):
            pass
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)  # a second one ends it at once
        logger.info("Stopping: solving what was accepted.")
    if server.unsaved:
        logger.error("Histories of %d sessions were not saved.", server.unsaved)
        raise typer.Exit(_NOT_SAVED)


_Address = Annotated[str, typer.Argument(help="host:port or unix:/path of a server.")]


_RootCa = Annotated[
    str | None,
    typer.Option(help="PEM file of who signs servers, or system; none for no TLS."),
]
_Certificate = Annotated[
    Path | None, typer.Option(help="PEM file of the own certificate.")
]
_Key = Annotated[Path | None, typer.Option(help="PEM file of its key.")]
_TokenFile = Annotated[Path | None, typer.Option(help="File that holds a token.")]
_ServerName = Annotated[
    str | None,
    typer.Option(help="Name in the server's certificate, if not its host."),
]


@app.command()
def status(
    address: _Address = "127.0.0.1:50051",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of tables.")
    ] = False,
    root_ca: _RootCa = None,
    certificate: _Certificate = None,
    key: _Key = None,
    token_file: _TokenFile = None,
    server_name: _ServerName = None,
) -> None:
    """Show load, latencies, sessions, errors and layers of a running server, once.

    Example: skfac status 127.0.0.1:50051 --json
    """
    credentials = _credentials(
        root_ca=root_ca,
        certificate=certificate,
        key=key,
        token_file=token_file,
        server_name=server_name,
    )
    with _answers(address, credentials) as ask:
        answer = ask()
        if as_json:
            typer.echo(json.dumps(plain_message(answer)))
        else:
            Console().print(StatusView(answer))


@app.command()
def top(
    address: _Address = "127.0.0.1:50051",
    refresh_s: Annotated[
        float, typer.Option("--refresh", min=0.1, help="Seconds from one to the next.")
    ] = 2.0,
    root_ca: _RootCa = None,
    certificate: _Certificate = None,
    key: _Key = None,
    token_file: _TokenFile = None,
    server_name: _ServerName = None,
) -> None:
    """Show what `skfac status` shows, again and again until Ctrl-C.

    Where the output is no terminal it is shown once.

    Example: skfac top 127.0.0.1:50051 --refresh 1
    """
    console = Console()
    credentials = _credentials(
        root_ca=root_ca,
        certificate=certificate,
        key=key,
        token_file=token_file,
        server_name=server_name,
    )
    with _answers(address, credentials) as ask:
        answer = ask()
        if not console.is_terminal:
            console.print(StatusView(answer))
            return
        # An exception instead might be raised where it is swallowed, as in a callback.
        stop = threading.Event()
        signal.signal(signal.SIGINT, lambda *_: stop.set())
        first = StatusView(answer, height=console.height)
        with Live(first, console=console, screen=True, auto_refresh=False) as live:
            while not stop.wait(refresh_s):
                try:
                    answer, warning = ask(), ""
                except grpc.RpcError as error:
                    why = _no_answer(address, credentials, error)
                    warning = f"{why} What follows is old."
                view = StatusView(answer, warning, console.height)
                live.update(view, refresh=True)


@contextmanager
def _answers(
    address: str, credentials: Credentials
) -> Iterator[Callable[[], pb.GetStatusResponse]]:
    if not has_port(address):
        raise typer.BadParameter(
            f"{address!r} has no port: use host:port or unix:/path."
        )
    try:
        opened = open_channel(address, credentials, receive_bytes=_STATUS_BYTES)
    except ConfigurationError as error:
        raise _usage_error(error) from None
    with opened as channel:
        stub = rpc.PreconditioningServiceStub(channel)
        try:
            yield lambda: stub.GetStatus(pb.GetStatusRequest(), timeout=5.0)
        except grpc.RpcError as error:
            typer.echo(_no_answer(address, credentials, error), err=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            raise typer.Exit(_INTERRUPTED) from None


def _no_answer(address: str, credentials: Credentials, error: grpc.RpcError) -> str:
    why = why_unavailable(address, credentials) or error.details()
    return f"No answer from {address}: {why}"


def _credentials(**given: Any) -> Credentials:  # noqa: ANN401
    try:
        return Credentials(**given)
    except ConfigurationError as error:
        raise _usage_error(error) from None


@app.command()
def token(
    jobs: Annotated[str, typer.Argument(help="Pattern of jobs, such as 'mnist-*'.")],
    file: Annotated[Path, typer.Argument(help="Where to write it; must not exist.")],
) -> None:
    """Make a token for jobs, in a file that only its user can read.

    Prints the line for the server's access_file, which does not reveal the token.

    Example: skfac token 'mnist-*' mnist.token >> access
    """
    if len(jobs.split()) != 1 or "#" in jobs:
        raise typer.BadParameter("A pattern of jobs has no spaces or '#'; '?' is any.")
    made = secrets.token_urlsafe(32)
    try:
        opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise typer.BadParameter(f"Cannot make {file}: {error.strerror}.") from None
    with os.fdopen(opened, "w") as stream:
        stream.write(made + "\n")
    typer.echo(rule_of_token(jobs, made))


def _usage_error(error: Exception) -> typer.BadParameter:
    if not isinstance(error, ValidationError):
        return typer.BadParameter(str(error))
    lines = map(_wrong_setting, error.errors(include_url=False))
    return typer.BadParameter("; ".join(lines))


def _wrong_setting(error: ErrorDetails) -> str:
    name, said = ".".join(map(str, error["loc"])), error["msg"]
    said = said.removeprefix("Value error, ")
    if not name:
        return said
    if error["type"] != "extra_forbidden":
        return f"{name}: {said} (got {error['input']!r})"
    near = difflib.get_close_matches(name, ServiceConfig.model_fields, 1)
    meant = f"did you mean {near[0]}? " if near else ""
    return f"There is no setting {name!r}; {meant}`skfac serve --help` lists them."
