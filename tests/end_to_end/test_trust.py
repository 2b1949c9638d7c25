"""Training while certificates are rotated and tokens revoked, and what logs hold."""

import json
import socket
import ssl
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from skfac.client import (
    ConfigurationError,
    Credentials,
    Preconditioner,
    ServiceError,
)
from skfac.service.access import rule_of_token
from tests.end_to_end.test_faults import Trainer, ages
from tests.end_to_end.test_ranks import train
from tests.support.authority import PAST, Authority, access, nobody, replace
from tests.support.models import sgd, small_cnn
from tests.support.ranks import run_ranks
from tests.support.servers import LONG_S, ServerProcess, serving

TOKEN = "a-token-nobody-could-guess"  # noqa: S105
JOB: dict[str, Any] = {"job": "mine-1"}


@pytest.fixture
def ca(tmp_path):
    return Authority(tmp_path)


def certificate_of(address: str) -> bytes:
    """The certificate that new connections get."""
    host, _, port = address.rpartition(":")
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with (
        socket.create_connection((host, int(port)), LONG_S) as raw,
        context.wrap_socket(raw) as secured,
    ):
        return secured.getpeercert(binary_form=True) or b""


def test_both_ends_certificates_are_rotated_in_mid_training(ca, tmp_path, caplog):
    own = ca.issue("trainer")
    trusted = tmp_path / "trusted.pem"
    replace(trusted, ca.pem.decode())
    settings = {**ca.server(), "tls_client_ca": str(ca.file)}
    credentials = Credentials(root_ca=trusted, certificate=own[0], key=own[1])
    with (
        serving(**settings) as server,
        Trainer(
            server.address,
            credentials=credentials,
            update_every=1,
            wait_s=LONG_S,
            on_late="raise",  # no version may be late, let alone lost
            **JOB,
        ) as trainer,
    ):
        trainer.step_until(lambda report: report["versions"].get("solved", 0) >= 8)
        before = certificate_of(server.address)
        next_ca = Authority(tmp_path, "next")
        replace(trusted, (ca.pem + next_ca.pem).decode())
        trainer.step_until(lambda report: report["transport"]["connects"] == 2)
        own[1].write_text("half of a key")  # changes nothing but the log
        trainer.step_until(lambda _: "The connection stays as it is" in caplog.text)
        next_ca.server()  # over the files of the first
        ca.issue("trainer")
        report = trainer.step_until(lambda r: r["transport"].get("renewals", 0) >= 2)
        report = trainer.step_until(
            lambda r: r["versions"]["solved"] >= report["versions"]["solved"] + 8
        )
        after = certificate_of(server.address)
        value = server.metrics.registry.get_sample_value
        expiry_s = value(
            "skfac_certificate_expiry_timestamp_seconds", {"certificate": "server"}
        )

    assert before != after
    assert expiry_s is not None
    assert expiry_s > 1.7e9
    assert ages(report) == {1}
    assert caplog.text.count("The connection stays as it is") == 1
    assert report["transport"].get("disconnects", 0) == 0
    assert {"late", "superseded", "failed", "refused"}.isdisjoint(report["versions"])


def test_a_revoked_token_ends_the_session_and_not_the_training(tmp_path, caplog):
    file = tmp_path / "access"
    access(file, mine_any=TOKEN, other="another")
    settings = {
        "update_every": 1,
        "wait_s": 1.0,
        "credentials": Credentials(token=TOKEN),
    }
    with (
        serving(access_file=str(file), lease_s=1.0) as server,
        Trainer(server.address, **settings, **JOB) as trainer,
    ):
        value = server.metrics.registry.get_sample_value
        trainer.step_until(lambda report: report["versions"].get("solved", 0) >= 8)
        access(file, other="another")
        trainer.step_until(lambda report: not report["connected"])
        kept = trainer.preconditioner.report()
        trainer.step_until(lambda _: value("skfac_sessions") == 0)
        report = trainer.step_until(
            lambda r: (
                r["transport"].get("denials", 0) >= 2 and r["step"] > kept["step"] + 5
            )
        )
        assert report["versions"]["late"] > 0
        assert min(ages(report)) >= 5  # the old versions are kept, and used
        # Once when it is lost and once when it is not there, not at every try.
        assert caplog.text.count("The token is not known to this server") <= 2
        assert "Traceback" not in caplog.text
        assert TOKEN not in caplog.text

        access(file, mine_any=TOKEN)  # given again: it goes on by itself
        trainer.step_until(lambda report: report["connected"] and max(ages(report)) < 4)


def test_a_token_is_replaced_in_mid_training(tmp_path):
    file, token = tmp_path / "access", tmp_path / "token"
    access(file, mine_any=TOKEN)
    replace(token, TOKEN + "\n")
    settings = {"update_every": 1, "wait_s": LONG_S, "on_late": "raise"}
    with (
        serving(access_file=str(file)) as server,
        Trainer(
            server.address, credentials=Credentials(token_file=token), **settings, **JOB
        ) as trainer,
    ):
        trainer.step_until(lambda report: report["versions"].get("solved", 0) >= 8)
        lines = file.read_text()
        access(file, mine_any="the-next")
        replace(file, lines + file.read_text())  # both, for a while
        replace(token, "the-next")
        trainer.step_until(lambda report: report["transport"].get("renewals") == 1)
        access(file, mine_any="the-next")
        report = trainer.step_until(lambda r: r["transport"].get("connects", 0) >= 2)
        report = trainer.step_until(lambda r: r["step"] >= report["step"] + 5)

    assert report["transport"].get("denials", 0) == 0
    assert {"late", "superseded", "failed", "refused"}.isdisjoint(report["versions"])


@pytest.mark.parametrize(
    ("credentials", "job"),
    [
        (None, "mine-1"),
        (Credentials(token="no"), "mine-1"),  # noqa: S106
        (Credentials(token=TOKEN), "x"),
    ],
)
def test_a_trainer_without_good_credentials_is_told_at_once(tmp_path, credentials, job):
    file = access(tmp_path / "access", mine_any=TOKEN)
    with (
        serving(access_file=file) as server,
        pytest.raises(ServiceError, match=r"gives? access to jobs"),
    ):
        Trainer(server.address, credentials=credentials, job=job)


def why_not(caplog, address: str, credentials: Credentials | None) -> str:
    with Trainer(address, credentials=credentials, wait_s=0.0) as trainer:
        trainer.step_until(lambda _: " yet: " in caplog.text)
        assert not trainer.preconditioner.report()["connected"]
    return caplog.text


def test_handshakes_that_fail_say_why(ca, tmp_path, caplog):
    own = ca.issue("trainer")
    other = Authority(tmp_path, "other")
    wrong = other.issue("wrong")
    mutual = {**ca.server(), "tls_client_ca": str(ca.file)}
    cases = {
        "does not talk to callers without TLS": None,
        "certificate is not accepted: unable to get local issuer": Credentials(
            root_ca=other.file, certificate=own[0], key=own[1]
        ),
        "certificate is not valid for 'elsewhere'": Credentials(
            root_ca=ca.file, certificate=own[0], key=own[1], server_name="elsewhere"
        ),
        "wants a certificate of this end": Credentials(root_ca=ca.file),
        "of this end, or another one": Credentials(
            root_ca=ca.file, certificate=wrong[0], key=wrong[1]
        ),
    }
    with serving(**mutual) as server:
        for message, credentials in cases.items():
            caplog.clear()
            assert message in why_not(caplog, server.address, credentials)
    caplog.clear()
    with serving() as server:
        text = why_not(caplog, server.address, Credentials(root_ca=ca.file))
    assert "does not talk TLS" in text


def test_a_certificate_that_has_expired_is_the_reason(ca, caplog):
    # Good when the server read it, as with one that nobody renewed.
    until = datetime.now(UTC) + timedelta(seconds=4)
    with serving(**ca.server(until=until)) as server:
        while datetime.now(UTC) <= until:
            time.sleep(0.1)
        text = why_not(caplog, server.address, Credentials(root_ca=ca.file))
    assert "certificate is not accepted: certificate has expired" in text


def of_rank(rank: int, target: str, root_ca: str) -> dict[str, Any]:
    token = f"{TOKEN}-{rank}"  # each rank has one of its own for the job
    credentials = Credentials(root_ca=root_ca, token=token)
    return train(rank, target, ddp=False, credentials=credentials, **JOB)


def test_several_ranks_show_credentials(ca, tmp_path):
    file = tmp_path / "access"
    lines = [rule_of_token("mine-*", f"{TOKEN}-{rank}") for rank in range(2)]
    replace(file, "\n".join(lines) + "\n")
    with ServerProcess(**ca.server(), access_file=file) as server:
        ranks = run_ranks(2, of_rank, server.address, str(ca.file))

    assert ranks[0]["digests"] == ranks[1]["digests"]
    for rank in ranks:
        assert rank["report"]["connected"]
        assert rank["report"]["versions"]["solved"] > 0


def test_files_that_are_no_good_are_refused_by_name(ca, tmp_path):
    certificate, key = ca.issue("trainer")
    expired = ca.issue("expired", until=PAST)
    _, another = ca.issue("another")
    empty = tmp_path / "empty"
    empty.write_text("")
    good = {"root_ca": ca.file, "certificate": certificate, "key": key}
    cases = {
        r"expired\.pem expired on 2": {"certificate": expired[0], "key": expired[1]},
        r"another\.key is not that of the certificate": {"key": another},
        r"empty holds no private key": {"key": empty},
        r"empty holds no certificate": {"certificate": empty},
        r"Cannot read .*gone: No such file": {"root_ca": tmp_path / "gone"},
        r"The token in .*empty is empty": {"token_file": empty},
    }
    for message, changes in cases.items():
        with pytest.raises(ConfigurationError, match=message):
            Trainer("127.0.0.1:1", credentials=Credentials(**{**good, **changes}))
        if not changes.keys() & {"token_file", "root_ca"}:
            chosen = {**good, **changes}
            settings = {
                "tls_certificate": str(chosen["certificate"]),
                "tls_key": str(chosen["key"]),
            }
            with pytest.raises(ConfigurationError, match=message), serving(**settings):
                pass
    key.chmod(0o600)
    tmp_path.chmod(0o755)
    with nobody(), pytest.raises(ConfigurationError, match="Permission denied"):
        Credentials(**good).read_tls()


@pytest.mark.parametrize("target", ["embedded", "ray://a/b"])
def test_only_servers_take_credentials(target):
    model = small_cnn()
    with pytest.raises(ConfigurationError, match="credentials are for servers"):
        Preconditioner(
            model, sgd(model), target=target, credentials=Credentials(token=TOKEN)
        )


def test_logs_are_json_and_hold_neither_tokens_nor_tensors(tmp_path):
    file = access(tmp_path / "access", mine_any=TOKEN)
    settings = {"access_file": file, "log_format": "json", "log_level": "debug"}
    with ServerProcess(**settings) as server:
        with Trainer(
            server.address, credentials=Credentials(token=TOKEN), update_every=1, **JOB
        ) as trainer:
            trainer.model[3].weight.data[0, 0] = 0.123456789
            trainer.step_until(lambda r: r["versions"].get("solved", 0) >= 8)
            with pytest.raises(ServiceError, match="not good for job"):
                Trainer(server.address, credentials=Credentials(token=TOKEN), job="x")
        server.process.terminate()
        output, _ = server.process.communicate(timeout=LONG_S)

    spoken = "Metrics on ", "Stopping: "
    lines = [x for x in output.splitlines() if not x.startswith(spoken)]
    records = [json.loads(line) for line in lines]
    messages = " ".join(record["message"] for record in records)
    assert "Job 'mine-1' opened" in messages
    assert {"time", "level", "logger", "thread", "message"} <= records[0].keys()
    assert TOKEN not in output
    assert "sha256" not in output
    assert "tensor(" not in output
    assert "0.1234567" not in output
