"""Server configuration: plain data, validated once, never changed afterwards."""

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from skfac.service.logs import LogFormat
from skfac.wire.addresses import has_port, is_local

MiB = 1024 * 1024
GiB = 1024 * MiB

DAY_S = 86_400.0

Seconds = Annotated[float, Field(gt=0, le=DAY_S)]
Count = Annotated[int, Field(ge=1)]


class EngineConfig(BaseModel):
    """What the engine needs to know, wherever it runs.

    Attributes:
        device: Where factors are inverted: `"cpu"`, `"cuda"` or `"cuda:N"`.
        lease_s: A session without a call or an open stream for this long is dropped.
        assembly_timeout_s: How long a version waits for the rows of further ranks once
            the first are in; after that it is solved with those that came.
        max_sessions: Sessions at once.
        max_layers: Layers of one session.
        max_rank_layers: Ranks times layers of one session: which steps have come is
            remembered of each, in about 300 bytes.
        max_snapshot_bytes: Payload of one snapshot.
        max_session_bytes: Rows of one session that are not solved yet.
        max_waiting: Their number, one for each layer, rank and step, whatever their
            size: each takes about 2 KiB besides.
        max_history_bytes: What the histories of one session may take, besides those
            rows, once they are full: with `history="ema"` for each layer and side
            8 · groups · d · min(d, rank), with `"window"`
            8 · groups · d · min(d, rows) for each update of the window, and 1 KiB for
            each of these.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: str = "cpu"
    lease_s: Seconds = 60.0
    assembly_timeout_s: Seconds = 10.0
    max_sessions: Count = 64
    max_layers: Count = 4096
    max_rank_layers: Count = 4_000_000
    max_snapshot_bytes: Count = 4 * GiB
    max_session_bytes: Count = 8 * GiB
    max_waiting: Count = 1_000_000
    max_history_bytes: Count = 8 * GiB

    @field_validator("device")
    @classmethod
    def _device_exists(cls, name: str) -> str:
        import torch  # which takes seconds, and commands without a device need it not

        try:
            device = torch.device(name)
        except RuntimeError:
            raise ValueError(f"device must be cpu or cuda, got {name!r}") from None
        if device.type not in {"cpu", "cuda"}:
            raise ValueError(f"device must be cpu or cuda, got {name!r}")
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(
                f"device {name!r} is not here: torch sees "
                f"{torch.cuda.device_count()} CUDA devices"
            )
        return name


class ServiceConfig(EngineConfig, BaseSettings):
    """Everything a server needs to know before it starts.

    Values come, strongest first, from flags, `SKFAC_*` environment variables, a TOML
    file and the defaults; an unknown name is an error in each of them.

    Attributes:
        address: `host:port` or `unix:/path` to listen on; port 0 picks a free one.
        metrics_address: `host:port` of the Prometheus endpoint and the status page;
            empty for none. It is for operators: whoever reaches it sees all jobs.
        status_page: Whether there is a status page on it.
        metrics_exemplars: Add layer and step of an inversion to its latency's bucket,
            for a Prometheus that stores exemplars.
        tls_certificate: PEM file of the server's certificate and its chain; empty for
            no TLS. It and the next two are read anew when they change.
        tls_key: PEM file of its key.
        tls_client_ca: PEM file of those who sign clients' certificates: every client
            has to have one (mutual TLS).
        access_file: Who may have which jobs, by token or certificate; empty: all who
            can connect may have all. Read anew when it changes; docs/security.md says
            what is in it.
        insecure_remote: Listen beyond loopback although nothing is encrypted or any
            caller is trusted. Without it such an address is refused.
        insecure_metrics: Give metrics, which name the jobs, to other machines.
        health_address: `host:port` of a gRPC health service without TLS, for probes
            that know no TLS; it tells `live` and `ready` and nothing else. Empty for
            none.
        max_streams: Bulk streams at once; each rank holds two.
        idle_s: A call whose peer lets the server wait this long, for a message or for
            room to send one, is ended; but rows may come at any time as long as the
            session is open.
        grace_s: Seconds that queued work and calls in flight get on SIGTERM.
        state_dir: Directory that the histories of open sessions are saved to on
            SIGTERM, and restored from at the next start; empty for none.
        log_level: Least severe messages that are logged.
        log_format: `"text"`, or `"json"` for one object a line.
    """

    model_config = SettingsConfigDict(env_prefix="SKFAC_", frozen=True, extra="forbid")

    address: str = "127.0.0.1:50051"
    metrics_address: str = "127.0.0.1:9464"
    status_page: bool = True
    metrics_exemplars: bool = False
    tls_certificate: str = ""
    tls_key: str = ""
    tls_client_ca: str = ""
    access_file: str = ""
    insecure_remote: bool = False
    insecure_metrics: bool = False
    health_address: str = ""
    max_streams: Count = 256
    idle_s: Seconds = 30.0
    grace_s: Seconds = 5.0
    state_dir: str = ""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: LogFormat = "text"

    @model_validator(mode="after")
    def _tls_is_whole(self) -> "ServiceConfig":
        if bool(self.tls_certificate) != bool(self.tls_key):
            raise ValueError("tls_certificate and tls_key belong together: set both")
        if self.tls_client_ca and not self.tls_certificate:
            raise ValueError("tls_client_ca needs tls_certificate and tls_key")
        return self

    @model_validator(mode="after")
    def _addresses_have_ports(self) -> "ServiceConfig":
        for name in ("address", "metrics_address", "health_address"):
            value: str = getattr(self, name)
            unix = value.startswith("unix:") and name == "address"
            if unix and not value.removeprefix("unix:").startswith("/"):
                raise ValueError(f"{name} needs an absolute path, got {value!r}")
            optional = name != "address" and not value
            port = not value.startswith("unix:") and has_port(value)
            if not (unix or optional or port):
                raise ValueError(
                    f"{name} must be host:port with a port from 0 to 65535, got "
                    f"{value!r}"
                )
        return self

    @model_validator(mode="after")
    def _only_loopback_is_trusted(self) -> "ServiceConfig":
        known = bool(self.tls_client_ca or self.access_file)
        safe = self.insecure_remote or (bool(self.tls_certificate) and known)
        if not (safe or is_local(self.address)):
            raise ValueError(
                f"address {self.address!r} can be reached from other machines, and "
                "nothing is encrypted or authenticated: set tls_certificate, tls_key "
                "and access_file or tls_client_ca, or set insecure_remote to allow it"
            )
        open_metrics = self.insecure_remote or self.insecure_metrics
        if self.metrics_address and not (
            open_metrics or is_local(self.metrics_address)
        ):
            raise ValueError(
                f"metrics_address {self.metrics_address!r} can be reached from other "
                "machines, and nothing is encrypted or authenticated: set "
                "insecure_metrics or set insecure_remote to allow it"
            )
        return self

    @model_validator(mode="after")
    def _no_unknown_variables(self) -> "ServiceConfig":
        prefix = self.model_config["env_prefix"]
        known = {f"{prefix}{name}".upper() for name in type(self).model_fields}
        given = {name.upper() for name in os.environ if name.upper().startswith(prefix)}
        if given - known:
            raise ValueError(f"{min(given - known)} is no setting of the server")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Order the sources: flags, environment, TOML file.

        Returns:
            The sources, strongest first.
        """
        toml = TomlConfigSettingsSource(settings_cls)
        return init_settings, env_settings, toml

    @classmethod
    def load(cls, file: Path | None, flags: dict[str, str]) -> "ServiceConfig":
        """Read all sources.

        Args:
            file: TOML file, or None.
            flags: Values that were given on the command line.

        Returns:
            The configuration.

        Raises:
            FileNotFoundError: If `file` does not exist.
            pydantic.ValidationError: If a value is out of range or a name unknown.
        """
        if file is None:
            return cls(**flags)  # type: ignore[arg-type]  # pydantic converts strings
        if not file.is_file():
            raise FileNotFoundError(f"There is no configuration file {file}.")
        config = SettingsConfigDict(toml_file=file)
        with_file = type(cls.__name__, (cls,), {"model_config": config})
        loaded: ServiceConfig = with_file(**flags)
        return loaded
