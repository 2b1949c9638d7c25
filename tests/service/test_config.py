"""Settings: where they come from, which one counts, and what is refused."""

import math
import tomllib
from pathlib import Path

import pytest
from pydantic import ValidationError

from skfac.service.config import EngineConfig, ServiceConfig
from skfac.wire.addresses import is_local

LOCAL = [
    "127.0.0.1:50051",
    "127.9.9.9:0",
    "[::1]:50051",
    "localhost:50051",
    "unix:/run/skfac.sock",
    "unix:/run/skfac.sock",
]
TLS = {"tls_certificate": "c", "tls_key": "k"}
REMOTE = [
    "0.0.0.0:50051",  # that it is refused is the point
    "[::]:50051",
    "10.0.0.1:50051",
    "[fe80::1]:50051",
    "[2001:db8::1]:50051",
    "128.0.0.1:1",
    "example.com:50051",
    "localhost.example.com:50051",
    "127.0.0.1.example.com:50051",
    "dns:localhost:50051",
    ":50051",
]


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    for name in ServiceConfig.model_fields:
        monkeypatch.delenv(f"SKFAC_{name.upper()}", raising=False)


@pytest.fixture
def toml(tmp_path: Path):
    def write(text: str) -> Path:
        file = tmp_path / "service.toml"
        file.write_text(text)
        return file

    return write


def test_defaults():
    config = ServiceConfig.load(None, {})

    assert config.model_dump() == {
        "device": "cpu",
        "lease_s": 60.0,
        "assembly_timeout_s": 10.0,
        "max_sessions": 64,
        "max_layers": 4096,
        "max_rank_layers": 4_000_000,
        "max_snapshot_bytes": 4 * 1024**3,
        "max_session_bytes": 8 * 1024**3,
        "max_waiting": 1_000_000,
        "max_history_bytes": 8 * 1024**3,
        "address": "127.0.0.1:50051",
        "metrics_address": "127.0.0.1:9464",
        "status_page": True,
        "state_dir": "",
        "metrics_exemplars": False,
        "tls_certificate": "",
        "tls_key": "",
        "tls_client_ca": "",
        "access_file": "",
        "insecure_remote": False,
        "insecure_metrics": False,
        "health_address": "",
        "max_streams": 256,
        "idle_s": 30.0,
        "grace_s": 5.0,
        "log_level": "info",
        "log_format": "text",
    }
    assert EngineConfig().model_dump().items() <= config.model_dump().items()


def test_flags_are_stronger_than_the_environment_than_toml(toml, monkeypatch):
    file = toml("lease_s = 1\ngrace_s = 1\nmax_layers = 1\nlog_level = 'debug'\n")
    monkeypatch.setenv("SKFAC_LEASE_S", "2")
    monkeypatch.setenv("SKFAC_GRACE_S", "2")
    monkeypatch.setenv("SKFAC_MAX_STREAMS", "2")

    config = ServiceConfig.load(file, {"lease_s": "3", "max_sessions": "3"})

    assert (config.lease_s, config.max_sessions) == (3.0, 3)
    assert (config.grace_s, config.max_streams) == (2.0, 2)
    assert (config.max_layers, config.log_level) == (1, "debug")
    assert config.assembly_timeout_s == 10.0


def test_the_environment_counts_without_a_file(monkeypatch):
    monkeypatch.setenv("SKFAC_INSECURE_REMOTE", "true")
    monkeypatch.setenv("SKFAC_ADDRESS", "10.0.0.1:1")

    assert ServiceConfig.load(None, {}).address == "10.0.0.1:1"


def test_a_file_is_forgotten_after_it_was_read(toml):
    ServiceConfig.load(toml("lease_s = 1"), {})

    assert ServiceConfig.load(None, {}).lease_s == 60.0


def test_unknown_flags_are_refused():
    with pytest.raises(ValidationError, match=r"leese_s\n.*not permitted"):
        ServiceConfig.load(None, {"leese_s": "1"})
    with pytest.raises(ValidationError, match=r"address\n.*not permitted"):
        EngineConfig(address="127.0.0.1:1")  # type: ignore[call-arg]


@pytest.mark.parametrize("text", ["leese_s = 1", "[engine]\nlease_s = 1"])
def test_unknown_names_in_toml_are_refused(toml, text):
    with pytest.raises(ValidationError, match="not permitted"):
        ServiceConfig.load(toml(text), {})


def test_unknown_environment_variables_are_refused(monkeypatch):
    monkeypatch.setenv("SKFAC_LEESE_S", "1")

    with pytest.raises(ValidationError):
        ServiceConfig.load(None, {})


def test_malformed_toml_is_refused(toml):
    with pytest.raises(ValueError, match="Invalid value"):
        ServiceConfig.load(toml("lease_s ="), {})


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no configuration file .*gone\.toml"):
        ServiceConfig.load(tmp_path / "gone.toml", {})


def test_a_folder_is_not_a_file(tmp_path):
    with pytest.raises((OSError, ValueError)):
        ServiceConfig.load(tmp_path, {})


@pytest.mark.parametrize("name", ["lease_s", "assembly_timeout_s", "grace_s"])
@pytest.mark.parametrize("value", ["0", "-1", "nan", "soon"])
def test_seconds_must_be_positive(name, value):
    with pytest.raises(ValidationError, match=name):
        ServiceConfig.load(None, {name: value})


@pytest.mark.parametrize("name", ["lease_s", "assembly_timeout_s", "grace_s"])
@pytest.mark.parametrize("value", ["inf", "1e10"])
def test_seconds_must_be_what_a_thread_can_wait_for(name, value):
    with pytest.raises(ValidationError, match=name):
        ServiceConfig.load(None, {name: value})


@pytest.mark.parametrize(
    "name",
    [
        "max_sessions",
        "max_layers",
        "max_snapshot_bytes",
        "max_session_bytes",
        "max_streams",
    ],
)
def test_counts_must_be_at_least_one(name):
    for value in ("0", "-1", "1.5", "many"):
        with pytest.raises(ValidationError, match=name):
            ServiceConfig.load(None, {name: value})
    assert getattr(ServiceConfig.load(None, {name: "1"}), name) == 1


@pytest.mark.parametrize("value", ["INFO", "trace", ""])
def test_unknown_log_levels_are_refused(value):
    with pytest.raises(ValidationError, match="log_level"):
        ServiceConfig.load(None, {"log_level": value})


@pytest.mark.parametrize("config", [EngineConfig(), ServiceConfig()])
def test_settings_do_not_change(config):
    with pytest.raises(ValidationError, match="frozen"):
        config.lease_s = math.pi


@pytest.mark.parametrize(
    ("name", "value"),
    [("address", value) for value in LOCAL]
    # Prometheus does not scrape Unix sockets.
    + [("metrics_address", v) for v in LOCAL if not v.startswith("unix:")],
)
def test_addresses_of_this_machine_are_trusted(name, value):
    assert is_local(value)
    assert getattr(ServiceConfig.load(None, {name: value}), name) == value


@pytest.mark.parametrize("name", ["address", "metrics_address"])
@pytest.mark.parametrize("value", REMOTE)
def test_other_addresses_need_insecure_remote(name, value):
    assert not is_local(value)
    with pytest.raises(ValidationError, match=f"{name} .* set insecure_remote"):
        ServiceConfig.load(None, {name: value})
    with pytest.raises(ValidationError, match=name):  # a list alone encrypts nothing
        ServiceConfig.load(None, {name: value, "access_file": "a"})
    with pytest.raises(ValidationError, match=name):  # TLS alone lets everybody in
        ServiceConfig.load(None, {name: value, **TLS})

    allowed = ServiceConfig.load(None, {name: value, "insecure_remote": "true"})

    assert getattr(allowed, name) == value


@pytest.mark.parametrize("known", ["access_file", "tls_client_ca"])
def test_tls_and_a_way_to_know_callers_open_other_addresses(known):
    config = ServiceConfig.load(None, {"address": "0.0.0.0:1", **TLS, known: "a"})

    assert config.address == "0.0.0.0:1"
    with pytest.raises(ValidationError, match=r"metrics_address .* insecure_metrics"):
        ServiceConfig.load(None, {"metrics_address": "0.0.0.0:1", **TLS, known: "a"})


def test_metrics_are_opened_on_their_own():
    opened = {"metrics_address": "0.0.0.0:1", "insecure_metrics": "true"}

    assert ServiceConfig.load(None, opened).metrics_address == "0.0.0.0:1"
    with pytest.raises(ValidationError, match="address"):
        ServiceConfig.load(None, {**opened, "address": "0.0.0.0:1"})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tls_certificate": "a"}, "set both"),
        ({"tls_key": "a"}, "set both"),
        ({"tls_client_ca": "a"}, "needs tls_certificate"),
        ({"health_address": "127.0.0.1"}, "health_address must be host:port"),
        ({"log_format": "xml"}, "log_format"),
    ],
)
def test_half_of_tls_is_refused(given, message):
    with pytest.raises(ValidationError, match=message):
        ServiceConfig.load(None, given)


@pytest.mark.parametrize("name", ["address", "metrics_address"])
@pytest.mark.parametrize("value", ["127.0.0.1", "unix", "localhost:http", "[::1]:"])
def test_addresses_have_ports(name, value):
    with pytest.raises(ValidationError, match=f"{name} must be host:port"):
        ServiceConfig.load(None, {name: value, "insecure_remote": "true"})


def test_metrics_need_a_port_not_a_socket():
    with pytest.raises(ValidationError, match="metrics_address must be host:port"):
        ServiceConfig.load(None, {"metrics_address": "unix:/run/skfac.sock"})


def test_no_metrics_need_no_address():
    assert ServiceConfig.load(None, {"metrics_address": ""}).metrics_address == ""


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7"])
def test_a_gpu_that_is_not_here_is_refused(device, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)

    with pytest.raises(ValidationError, match=f"'{device}' is not here: torch sees 0"):
        EngineConfig(device=device)


def test_gpus_are_counted_from_zero(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)

    assert [EngineConfig(device=d).device for d in ("cuda", "cuda:1")] == [
        "cuda",
        "cuda:1",
    ]
    with pytest.raises(ValidationError, match="'cuda:2' is not here: torch sees 2"):
        EngineConfig(device="cuda:2")


def test_other_devices_are_refused():
    with pytest.raises(ValidationError, match="must be cpu or cuda, got 'meta'"):
        EngineConfig(device="meta")


@pytest.mark.parametrize("device", ["gpu", "cuda:-1", ""])
def test_devices_that_torch_does_not_know_are_refused(device):
    with pytest.raises(ValidationError, match="device"):
        EngineConfig(device=device)


def test_the_sample_file_shows_every_setting_with_its_default():
    sample = Path(__file__).parents[2] / "deploy/skfac.toml"

    read = ServiceConfig.load(sample, {}).model_dump()
    assert read == ServiceConfig.load(None, {}).model_dump()
    shown = tomllib.loads(sample.read_text())
    assert shown.keys() == read.keys()


@pytest.mark.parametrize("name", ["address", "metrics_address", "health_address"])
@pytest.mark.parametrize("value", ["127.0.0.1:65536", "127.0.0.1:-1", "10.0.0.1", "x:"])
def test_a_port_that_is_none_is_refused_before_anything_else(name, value):
    with pytest.raises(ValidationError, match=f"{name} must be host:port with a port"):
        ServiceConfig.load(None, {name: value})


def test_a_socket_has_an_absolute_path():
    with pytest.raises(ValidationError, match="address needs an absolute path"):
        ServiceConfig.load(None, {"address": "unix:skfac.sock"})
    assert ServiceConfig.load(None, {"address": "unix:///run/skfac.sock"})
