"""The commands of docs/kubernetes.md, as they are printed."""

import re
import shlex

import pytest

from tests.support.chart import ROOT, errors_of, helm, objects

GUIDE = (ROOT / "docs/kubernetes.md").read_text()
COMMANDS = re.findall(r"^    (.+)$", GUIDE, re.MULTILINE)
INSTALLS = [line for line in COMMANDS if line.startswith("helm upgrade --install ")]
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def test_there_are_commands():
    assert len(INSTALLS) >= 6


@pytest.mark.parametrize("line", INSTALLS)
def test_it_renders_what_is_valid(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    _, *arguments = shlex.split(line.replace("upgrade --install", "template"))
    ran = helm(*arguments)
    assert ran.returncode == 0, ran.stderr
    assert errors_of(objects(ran.stdout)) == []


def test_builds_set_arguments_that_there_are():
    known = set(re.findall(r"^ARG (\w+)", DOCKERFILE, re.MULTILINE))
    named = set(re.findall(r'--build-arg "?(\w+)=', GUIDE))
    assert named
    assert named <= known
