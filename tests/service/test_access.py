"""Who gets in: real calls with and without tokens and certificates."""

import time
from dataclasses import replace as changed

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from skfac.service import access as who_may
from skfac.service.access import Caller, hash_token, read_rules
from skfac.service.monitor import Monitor
from skfac.v1 import preconditioning_pb2 as pb
from skfac.v1 import preconditioning_pb2_grpc as rpc
from skfac.wire.channel import SERVICE
from skfac.wire.codec import encode_session
from skfac.wire.credentials import Credentials, open_channel
from skfac.wire.errors import ConfigurationError
from skfac.wire.frames import encode_region
from tests.support.authority import Authority, access, replace
from tests.support.raw_client import TIMEOUT_S, RawClient, snapshot_of, spec_of
from tests.support.servers import serving

MINE = Credentials(token="my-token")  # noqa: S106
THEIRS = Credentials(token="their-token")  # noqa: S106
UNKNOWN = Credentials(token="no-such-token")  # noqa: S106
CODE = grpc.StatusCode


@pytest.fixture
def file(tmp_path):
    access(tmp_path / "access", mine_any="my-token", secret="their-token")  # noqa: S106
    return tmp_path / "access"


@pytest.fixture
def server(file):
    with serving(access_file=str(file), max_sessions=8) as server:
        yield server


@pytest.fixture
def theirs(server):
    """A busy job that the others must learn nothing of."""
    with RawClient(server.address, spec_of("secret"), credentials=THEIRS) as client:
        client.versions_of(1)
        bad = snapshot_of(spec_of("secret", (7, 3)), 2)
        (answer,) = client.push(*client.frames(bad))
        assert answer.refusal.message
        yield client


def code_of_call(call, *arguments, **keywords) -> tuple[grpc.StatusCode, str]:
    def called() -> None:
        answer = call(*arguments, **keywords)
        if hasattr(answer, "__next__"):
            list(answer)

    with pytest.raises(grpc.RpcError) as caught:
        called()
    return caught.value.code(), caught.value.details() or ""


def open_session(address, job, credentials):
    request = pb.OpenSessionRequest(spec=encode_session(spec_of(job)), rank=0)
    with open_channel(address, credentials) as channel:
        stub = rpc.PreconditioningServiceStub(channel)
        return stub.OpenSession(request, timeout=TIMEOUT_S)


@pytest.mark.parametrize("credentials", [None, UNKNOWN])
def test_every_call_needs_credentials(server, theirs, credentials):
    named = {"session_id": theirs.grant.session_id}
    frames = [*theirs.frames(snapshot_of(theirs.spec, 5))]
    with open_channel(server.address, credentials) as channel:
        bulk = {
            "PushSnapshots": (channel.stream_stream, iter(frames)),
            "ImportState": (channel.stream_unary, iter([])),
            "OpenSession": (channel.unary_unary, pb.OpenSessionRequest()),
            "CloseSession": (channel.unary_unary, pb.CloseSessionRequest(**named)),
            "GetStatus": (channel.unary_unary, pb.GetStatusRequest()),
            "ExportState": (channel.unary_stream, pb.ExportStateRequest(**named)),
            "StreamPreconditioners": (
                channel.unary_stream,
                pb.StreamPreconditionersRequest(**named),
            ),
        }
        methods = pb.DESCRIPTOR.services_by_name["PreconditioningService"].methods
        assert set(bulk) == {method.name for method in methods}
        for name, (kind, request) in bulk.items():
            is_message = hasattr(request, "SerializeToString")
            sent = request.SerializeToString() if is_message else request
            code, text = code_of_call(
                kind(f"/{SERVICE}/{name}"), sent, timeout=TIMEOUT_S
            )
            assert code is CODE.UNAUTHENTICATED
            assert "secret" not in text
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        code, _ = code_of_call(reflection.ServerReflectionInfo, asked)
        assert code is CODE.UNAUTHENTICATED
        watch = health_pb2_grpc.HealthStub(channel).Watch
        code, _ = code_of_call(watch, health_pb2.HealthCheckRequest())
        assert code is CODE.UNAUTHENTICATED
    theirs.versions_of(6)


def test_probes_need_no_credentials(server):
    with open_channel(server.address, None) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        answer = check(health_pb2.HealthCheckRequest(service="ready"))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        code, _ = code_of_call(check, health_pb2.HealthCheckRequest(service="secret"))
        assert code is CODE.NOT_FOUND


def test_a_job_is_had_by_its_token_alone(server, theirs):
    assert open_session(server.address, "mine-1", MINE).session_id
    texts = set()
    for job in ("secret", "absent"):
        code, text = code_of_call(open_session, server.address, job, MINE)
        assert code is CODE.PERMISSION_DENIED
        texts.add(text.replace(job, "JOB"))
    assert len(texts) == 1  # whether there is such a job or not


def test_other_jobs_sessions_are_as_if_they_were_not_there(server, theirs):
    own = RawClient(server.address, spec_of("mine-1"), credentials=MINE)
    with own:
        for session_id in (theirs.grant.session_id, "0" * 32, ""):
            own.grant.session_id = session_id
            calls = [
                (own.push, *own.frames(snapshot_of(own.spec, 9))),
                (own.outcomes, 1),
                (own.export_state,),
            ]
            for call in calls:
                code, text = code_of_call(*call)
                assert code is CODE.NOT_FOUND
                assert text.startswith("There is no such session")
            own.stub.CloseSession(pb.CloseSessionRequest(session_id=session_id))
        history = RawClient(
            server.address, spec_of("secret"), credentials=THEIRS
        ).export_state()
        own.grant.session_id = theirs.grant.session_id
        code, _ = code_of_call(own.import_state, history)
        assert code in {CODE.NOT_FOUND, CODE.INVALID_ARGUMENT}
    theirs.versions_of(6)  # it was neither closed nor changed


def test_memory_is_not_shared_with_other_jobs_sessions(server, theirs):
    with RawClient(server.address, spec_of("mine-1"), credentials=MINE) as own:
        offer = pb.SharedRegion(
            session_id=theirs.grant.session_id,
            name="skfac-" + "0" * 32,
            token=b"0" * 16,
            up_nbytes=4096,
            down_nbytes=4096,
        )
        (answer,) = own.push(encode_region(offer.SerializeToString()))
        assert answer.HasField("region_accepted")
        assert not answer.region_accepted


def test_status_costs_what_own_jobs_cost(server, theirs, monkeypatch):
    described, describe = [], Monitor._session

    def counted(self, session, *arguments):
        described.append(session.spec.job)
        return describe(self, session, *arguments)

    monkeypatch.setattr(Monitor, "_session", counted)
    with RawClient(server.address, spec_of("mine-1"), credentials=MINE) as own:
        own.stub.GetStatus(pb.GetStatusRequest(), timeout=TIMEOUT_S)
    assert set(described) == {"mine-1"}


def test_status_shows_own_jobs_alone(server, theirs):
    with RawClient(server.address, spec_of("mine-1"), credentials=MINE) as own:
        answer = own.stub.GetStatus(pb.GetStatusRequest(), timeout=TIMEOUT_S)
        assert [session.job for session in answer.sessions] == ["mine-1"]
        assert b"secret" not in answer.SerializeToString()
        named = pb.GetStatusRequest(session_id=theirs.grant.session_id)
        assert code_of_call(own.stub.GetStatus, named)[0] is CODE.NOT_FOUND
    both = theirs.stub.GetStatus(pb.GetStatusRequest(), timeout=TIMEOUT_S)
    assert [session.job for session in both.sessions] == ["secret"]


def test_a_revoked_token_ends_open_streams_and_another_one_goes_on(server, file):
    access(file, mine_any="my-token", secret="their-token")  # noqa: S106
    with (
        RawClient(server.address, spec_of("mine-1"), credentials=MINE) as own,
        RawClient(server.address, spec_of("secret"), credentials=THEIRS) as other,
    ):
        calls = []
        for client in (own, other):
            fetch = client.channel.unary_stream(f"/{SERVICE}/StreamPreconditioners")
            request = pb.StreamPreconditionersRequest(
                session_id=client.grant.session_id
            )
            calls.append(fetch(request.SerializeToString(), timeout=TIMEOUT_S))
        access(file, secret="their-token")  # noqa: S106
        code, _ = code_of_call(lambda: list(calls[0]))
        assert code is CODE.CANCELLED
        assert code_of_call(own.versions_of, 1)[0] is CODE.UNAUTHENTICATED
        other.versions_of(1)
        assert calls[1].is_active()
        calls[1].cancel()
        access(file, mine_any="my-token", secret="their-token")  # noqa: S106
        wait_until(lambda: own.versions_of(2))


def test_a_list_that_is_no_good_changes_nothing(server, file, caplog):
    replace(file, "my-token\n")
    wait_until(lambda: "old list" in caplog.text)
    assert "Line 1 of access_file" in caplog.text
    assert "my-token" not in caplog.text
    replace(file, "")
    wait_until(lambda: "has no rule" in caplog.text)
    file.unlink()
    wait_until(lambda: "Cannot read" in caplog.text)
    assert open_session(server.address, "mine-1", MINE).session_id
    value = server.metrics.registry.get_sample_value
    assert value("skfac_reload_failures_total", {"file": "access"}) == 3


def test_a_list_that_cannot_be_read_now_is_read_later(server, file, monkeypatch):
    # As when no file can be opened: nobody touches the list again.
    tries, reading = [], who_may.read_file

    def fail_twice(path):
        tries.append(path)
        if len(tries) < 3:
            raise ConfigurationError(f"Cannot read {path}: Too many open files.")
        return reading(path)

    monkeypatch.setattr(who_may, "read_file", fail_twice)
    access(file, secret="their-token")  # noqa: S106

    def is_denied() -> bool:
        try:
            open_session(server.address, "mine-1", MINE)
        except grpc.RpcError as error:
            return error.code() is CODE.UNAUTHENTICATED
        return False

    wait_until(is_denied)
    assert len(tries) == 3
    value = server.metrics.registry.get_sample_value
    assert value("skfac_reload_failures_total", {"file": "access"}) == 1


def test_denials_are_counted_by_reason(server, theirs):
    for credentials, job in [(None, "x"), (UNKNOWN, "x"), (MINE, "secret")]:
        code_of_call(open_session, server.address, job, credentials)
    with RawClient(server.address, spec_of("mine-1"), credentials=MINE) as own:
        named = pb.GetStatusRequest(session_id=theirs.grant.session_id)
        code_of_call(own.stub.GetStatus, named)
    value = server.metrics.registry.get_sample_value
    for reason in ("no_credentials", "unknown_token", "other_job", "other_session"):
        assert value("skfac_denied_calls_total", {"reason": reason}) == 1


def test_jobs_are_had_by_the_name_in_a_certificate(tmp_path):
    ca = Authority(tmp_path)
    replace(tmp_path / "access", "mine-*  certificate:*.trainers.example\n")
    settings = {"tls_client_ca": ca.file, "access_file": tmp_path / "access"}

    def holder(name: str) -> Credentials:
        certificate, key = ca.issue("cn", name, into=name)
        return Credentials(root_ca=ca.file, certificate=certificate, key=key)

    with serving(**ca.server(), **{k: str(v) for k, v in settings.items()}) as server:
        good, bad = holder("a.trainers.example"), holder("b.elsewhere.example")
        assert open_session(server.address, "mine-1", good).session_id
        code, _ = code_of_call(open_session, server.address, "other", good)
        assert code is CODE.PERMISSION_DENIED
        code, text = code_of_call(open_session, server.address, "mine-1", bad)
        assert code is CODE.UNAUTHENTICATED
        assert "certificate's name is not known" in text
        with_token = changed(bad, token="my-token")  # noqa: S106
        code, text = code_of_call(open_session, server.address, "mine-1", with_token)
        assert code is CODE.UNAUTHENTICATED


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no rule"),
        ("# only a comment\n", "has no rule"),
        ("job\n", "Line 1 of access_file .* is no rule"),
        ("\njob sha256:abc\n", "Line 2 of access_file .* is no rule"),
        ("job SHA256:" + "0" * 64, "is no rule"),
        ("job certificate:", "is no rule"),
        ("a job sha256:" + "0" * 64, "is no rule"),
    ],
)
def test_lists_that_are_no_good_say_where(tmp_path, text, message):
    (tmp_path / "access").write_text(text)
    with pytest.raises(ConfigurationError, match=message):
        read_rules(tmp_path / "access")


def test_rules_are_what_the_lines_say(tmp_path):
    (tmp_path / "access").write_text(
        f"a-*  sha256:{hash_token('t').hex()}  # of Ann\n\nb  certificate:x.*\n"
    )
    first, second = read_rules(tmp_path / "access")
    assert (first.jobs, second.jobs) == ("a-*", "b")
    assert first.is_met_by(Caller(digest=hash_token("t")))
    assert not first.is_met_by(Caller(digest=hash_token("u"), names=("x.y",)))
    assert not first.is_met_by(Caller())
    assert second.is_met_by(Caller(names=("y", "x.y")))
    assert not second.is_met_by(Caller(digest=hash_token("t")))


def wait_until(done) -> None:
    """Try until something is true and raises nothing from gRPC."""
    end_s = time.monotonic() + TIMEOUT_S
    while True:
        try:
            if done():
                return
        except grpc.RpcError:
            pass
        assert time.monotonic() < end_s
        time.sleep(0.05)
