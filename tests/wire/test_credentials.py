"""Credentials that contradict themselves, and where tokens may go."""

import pytest

from skfac.wire.credentials import Credentials, open_channel
from skfac.wire.errors import ConfigurationError

TOKEN = "a-secret"  # noqa: S105


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"root_ca": "ca", "certificate": "a"}, "belong together"),
        ({"root_ca": "ca", "key": "a"}, "belong together"),
        ({"certificate": "a", "key": "b"}, "give root_ca"),
        ({"server_name": "a"}, "give root_ca"),
        ({"token": "a", "token_file": "b"}, "not both"),
        ({"token": ""}, "is empty"),
        ({"token": "two words"}, "is empty or has spaces"),
        ({"token": "line\n"}, "is empty or has spaces"),
        ({"token": "é"}, "not ASCII"),
    ],
)
def test_what_contradicts_itself_is_refused(given, message):
    with pytest.raises(ConfigurationError, match=message) as caught:
        Credentials(**given)
    assert "two words" not in str(caught.value)


def test_a_token_is_not_shown():
    assert TOKEN not in repr(Credentials(token=TOKEN))


@pytest.mark.parametrize("target", ["10.0.0.1:1", "host.example:1"])
def test_a_token_does_not_leave_the_machine_unencrypted(target, tmp_path):
    (tmp_path / "token").write_text(TOKEN)
    given = [{"token": TOKEN}, {"token_file": tmp_path / "token"}]
    for credentials in (Credentials(**one) for one in given):
        with pytest.raises(ConfigurationError, match=f"to {target} unencrypted"):
            open_channel(target, credentials)
    open_channel(target, Credentials(token=TOKEN, insecure_token=True)).close()
    open_channel(target, Credentials(token=TOKEN, root_ca="system")).close()


@pytest.mark.parametrize("target", ["127.0.0.1:1", "localhost:1", "unix:/a"])
def test_on_this_machine_a_token_needs_no_tls(target):
    open_channel(target, Credentials(token=TOKEN)).close()
