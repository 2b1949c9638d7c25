"""Server configuration: plain data, validated once, never changed afterwards."""

import ipaddress
import os
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

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
        max_snapshot_bytes: Payload of one snapshot.
        max_session_bytes: Rows of one session that are not solved yet.
        max_history_bytes: What the histories of one session may take, besides those
            rows, once they are full: with `history="ema"` for each layer and side
            8 · groups · d · min(d, rank), with `"window"`
            8 · groups · d · min(d, rows) for each update of the window.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: str = "cpu"
    lease_s: Seconds = 60.0
    assembly_timeout_s: Seconds = 10.0
    max_sessions: Count = 64
    max_layers: Count = 4096
    max_snapshot_bytes: Count = 4 * GiB
    max_session_bytes: Count = 8 * GiB
    max_history_bytes: Count = 8 * GiB

    @field_validator("device")
    @classmethod
    def _device_exists(cls, name: str) -> str:
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
        metrics_address: `host:port` of the Prometheus endpoint; empty for none.
        insecure_remote: Listen beyond loopback although nothing is encrypted and any
            caller is trusted. Without it such an address is refused.
        max_streams: Bulk streams at once; each rank holds two.
        grace_s: Seconds that queued work and calls in flight get on SIGTERM.
        log_level: Least severe messages that are logged.
    """

    model_config = SettingsConfigDict(env_prefix="SKFAC_", frozen=True, extra="forbid")

    address: str = "127.0.0.1:50051"
    metrics_address: str = "127.0.0.1:9464"
    insecure_remote: bool = False
    max_streams: Count = 256
    grace_s: Seconds = 5.0
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @model_validator(mode="after")
    def _only_loopback_is_trusted(self) -> "ServiceConfig":
        for name in ("address", "metrics_address"):
            value: str = getattr(self, name)
            if value and not self.insecure_remote and not is_local(value):
                raise ValueError(
                    f"{name} {value!r} can be reached from other machines and nothing "
                    "is encrypted or authenticated; set insecure_remote to allow it"
                )
        return self

    @model_validator(mode="after")
    def _addresses_have_ports(self) -> "ServiceConfig":
        for name in ("address", "metrics_address"):
            value: str = getattr(self, name)
            unix = name == "address" and value.startswith("unix:")
            optional = name == "metrics_address" and not value
            if not (unix or optional or value.rpartition(":")[2].isdigit()):
                raise ValueError(f"{name} must end with a port, got {value!r}")
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


def is_local(address: str) -> bool:
    """Tell whether only processes of this machine can reach an address.

    Args:
        address: `host:port`, `[v6]:port` or `unix:path`.

    Returns:
        True for Unix sockets, loopback addresses and `localhost`.
    """
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
