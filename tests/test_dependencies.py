"""What is installed with skfac: pinned, as the lock says, and under known licences."""

import re
import tomllib
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
LOCKS = sorted((ROOT / "requirements").glob("*.lock"))
ALLOWED = re.compile(
    r"Apache|BSD|MIT|PSF|Python Software Foundation|ISC|MPL[- ]2|0BSD|Zlib"
)


def pinned(file: Path) -> dict[str, str]:
    """Version by name, of lines that are all `name==version`."""
    found = {}
    for line in file.read_text().splitlines():
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.+!]+)", line)
        assert match, f"{file.name}: {line!r} is not pinned"
        found[str(canonicalize_name(match[1]))] = match[2]
    return found


def needed_to_run() -> dict[str, Distribution]:
    """All packages that skfac needs when it runs, here and now."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted, found = [*project["dependencies"]], {}
    while wanted:
        requirement = Requirement(wanted.pop())
        name = str(canonicalize_name(requirement.name))
        marker = requirement.marker
        if name in found or (marker and not marker.evaluate({"extra": ""})):
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            pytest.fail(f"{name} is needed and not installed.")
        wanted += found[name].requires or []
    return found


@pytest.mark.parametrize("file", LOCKS, ids=lambda file: file.name)
def test_every_line_of_a_lock_is_one_version(file):
    assert pinned(file)


def test_what_runs_is_what_the_lock_says():
    lock = pinned(ROOT / "requirements/dev.lock")
    for name, found in needed_to_run().items():
        if name != "setuptools":  # constraints.txt has it: torch wants one at all
            assert found.version.split("+")[0] == lock[name], name


def test_licences_are_known_and_allow_use():
    for name, found in needed_to_run().items():
        metadata = found.metadata
        texts = [
            metadata.get("License-Expression") or "",
            (metadata.get("License") or "").split("\n")[0],
            *(c for c in metadata.get_all("Classifier") or [] if "License" in c),
        ]
        assert ALLOWED.search(" ".join(texts)), f"{name}: {texts}"
