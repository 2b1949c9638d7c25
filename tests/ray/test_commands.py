"""`skfac ray` starts, shows and stops pools."""

import json

from typer.testing import CliRunner

from skfac.service.main import app


def run(*arguments: str):
    return CliRunner().invoke(app, ["ray", *arguments])


def test_a_pool_is_started_shown_and_stopped(ray_cluster):
    named = ("--name", "shell", "--namespace", "cli")

    started = run("start", *named, "--cpus", "0", "--set", "lease_s=7")
    shown = run("status", *named)
    again = run("start", *named)
    stopped = run("stop", *named)
    gone = run("status", *named)

    assert (started.exit_code, started.output) == (0, "ray://cli/shell\n")
    assert json.loads(shown.output)["sessions"] == []
    assert again.exit_code == 1
    assert "There is a pool 'shell' in namespace 'cli' already" in again.output
    assert (stopped.exit_code, stopped.output) == (0, "")
    assert gone.exit_code == 1
    assert "There is no pool 'shell'" in gone.output


def test_wrong_settings_are_named(ray_cluster):
    for setting, text in (("lease_s=never", "lease_s"), ("lease_s", "NAME=VALUE")):
        wrong = run("start", "--set", setting)
        assert wrong.exit_code in (1, 2)
        assert text in wrong.output
        assert "Traceback" not in wrong.output
