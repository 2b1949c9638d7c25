"""What a target stands for, and what a lookout does with answers of name servers."""

import socket
import threading

import pytest

from skfac.client import ConfigurationError
from skfac.client.targets import Lookout, Names
from skfac.client.world import Alone
from tests.support.names import NAME, name_server
from tests.support.servers import LONG_S


def test_a_name_stands_for_all_of_its_addresses(monkeypatch):
    def look_up(host, port, **_):
        assert host == "skfac"
        found = ["127.0.0.3", "127.0.0.2", "::1", "127.0.0.3"]
        return [(socket.AF_INET, None, 6, "", (a, port)) for a in found]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)

    names = Names(["10.0.0.1:7", "dns:///skfac:50051"])

    assert names.moving
    assert names.shared(Alone()) == (
        "10.0.0.1:7",
        "127.0.0.2:50051",
        "127.0.0.3:50051",
        "[::1]:50051",
    )


def test_one_name_server_can_be_asked():
    with name_server("127.0.0.3", "127.0.0.2") as (_, authority):
        found = Names(f"dns://{authority}/{NAME}:7").look_up()
        with pytest.raises(ConfigurationError, match="cannot be looked up"):
            Names(f"dns://{authority}/other.test:7").look_up()

    assert found == ("127.0.0.2:7", "127.0.0.3:7")


def test_addresses_do_not_move():
    assert not Names(["10.0.0.1:7", "unix:/run/skfac.sock"]).moving


@pytest.mark.parametrize(
    "target",
    ["dns:///name", "dns:///name:0", "dns://skfac:7", "dns://no-address/skfac:7"],
)
def test_what_is_no_name_says_so(target):
    with pytest.raises(ConfigurationError, match=r"is not a target|is no address"):
        Names(target).look_up()


class SecondRank:
    """A world in which rank 0 found something, or nothing."""

    rank, size = 1, 2

    def __init__(self, first: str) -> None:
        self.first = first

    def share(self, text: str) -> str:
        return self.first


def test_other_ranks_begin_with_what_the_first_has_found():
    names = Names("dns:///no-such-name.invalid:1")

    assert names.shared(SecondRank("\na:1\nb:1")) == ("a:1", "b:1")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="It is unknown"):
        names.shared(SecondRank("It is unknown."))  # type: ignore[arg-type]


def test_a_lookout_sees_changes_and_outlives_bad_answers(caplog):
    views: list[tuple[str, ...]] = []
    seen = threading.Condition()

    def found(view: tuple[str, ...]) -> None:
        with seen:
            views.append(view)
            seen.notify_all()

    with name_server("127.0.0.2") as (records, authority):
        names = Names(f"dns://{authority}/{NAME}:7")
        lookout = Lookout(names, names.look_up(), 0.01, lambda: False, found)
        try:
            records.addresses = ()
            with seen:
                while lookout.failures < 3:
                    seen.wait(0.01)
                assert lookout.view == ("127.0.0.2:7",)  # nothing is no answer
                records.addresses = ("127.0.0.2", "127.0.0.4")
                both = ("127.0.0.2:7", "127.0.0.4:7")
                assert seen.wait_for(lambda: both in views, LONG_S)
        finally:
            lookout.close()

    assert lookout.view == both
    assert caplog.text.count("The servers stay as they are.") == 1


def test_a_lookout_hurries_while_a_server_is_down(monkeypatch):
    monkeypatch.setattr("skfac.client.targets._TICK_S", 0.01)
    down, looks = threading.Event(), threading.Semaphore(0)
    names = Names("dns:///localhost:7")
    lookout = Lookout(names, (), 3600.0, down.is_set, lambda view: looks.release())
    try:
        assert looks.acquire(timeout=LONG_S)  # at once, for its own view
        assert not looks.acquire(timeout=0.2)
        down.set()
        assert looks.acquire(timeout=LONG_S)
    finally:
        lookout.close()
