"""What the documents print, followed as a new operator would."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.models import backward, sgd, small_cnn

ROOT = Path(__file__).parents[2]
PROGRAMS = Path(sys.executable).parent  # where `skfac` is


def blocks(document: str, language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    text = (ROOT / "docs" / document).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def shell(script: str, folder: Path) -> "subprocess.Popen[str]":
    """Run a block as bash does when it is pasted, in a session of its own."""
    path = f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", script],  # noqa: S607
        cwd=folder,
        env={**os.environ, "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def done(script: str, folder: Path) -> str:
    """Run a block to its end, and return what it printed."""
    process = shell(script, folder)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    return output


@pytest.fixture
def secured(tmp_path) -> Iterator[Path]:
    """A folder where the blocks of security.md were run; its server runs."""
    assert shutil.which("openssl"), "docs/security.md needs openssl"
    certificates, token, serve, _ = blocks("security.md", "sh")
    done(certificates, tmp_path)
    done(token, tmp_path)
    server = shell(f"{serve.rstrip()}\nwait", tmp_path)
    assert server.stdout is not None
    try:
        printed = server.stdout.readline()
        assert printed == "Serving on 127.0.0.1:50443\n", printed + server.stdout.read()
        yield tmp_path
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.communicate(timeout=60)


@pytest.mark.timeout(240)
def test_the_guide_to_security_works_as_printed(secured, monkeypatch):
    *_, status = blocks("security.md", "sh")
    assert "0 sessions" in done(status, secured)

    monkeypatch.chdir(secured)
    model, seen = small_cnn(), []
    (trainer,) = blocks("security.md", "python")

    def train(preconditioner):
        until_solved(preconditioner, model)
        seen.append(json.loads(done(f"{status.strip()} --json", secured)))

    names = {"model": model, "optimizer": sgd(model), "train": train}
    exec(trainer.replace("...", "train(preconditioner)"), names)  # noqa: S102

    ((session,),) = (answer["sessions"] for answer in seen)
    assert (session["job"], int(session["solved"]) > 0) == ("mnist-7", True)
    other = (secured / "mnist.token").read_text()[::-1]
    (secured / "mnist.token").write_text(other)
    refused = shell(status, secured)
    assert refused.communicate(timeout=60)[0].startswith("No answer from localhost:")
    assert refused.returncode == 1


def until_solved(preconditioner, model):
    end_s = time.monotonic() + 60.0
    while "solved" not in preconditioner.report()["versions"]:
        assert time.monotonic() < end_s, preconditioner.report()
        backward(model, preconditioner.report()["step"])
        preconditioner.step()
