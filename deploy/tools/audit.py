"""Looks for known vulnerabilities in what is locked: audit.py [--strict].

Fails if there are any, and with --strict also if packages could not be looked up: that
needs a vulnerability service, which machines without the network do not reach.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / ".venv-audit" / "bin" / "pip-audit"
REPORT = ROOT / "build" / "audit.json"
LOCKS = ("dev.lock", "oracle.lock", "nixl.lock")


def main() -> int:
    """Audit, and say in a sentence what came of it.

    Returns:
        The exit code.
    """
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.unlink(missing_ok=True)
    locks = [str(ROOT / "requirements" / lock) for lock in LOCKS]
    files = [word for lock in locks for word in ("--requirement", lock)]
    told = subprocess.run(  # noqa: S603
        [PROGRAM, "--no-deps", "--disable-pip", "--timeout", "5", "--format", "json",
         "--progress-spinner", "off", "--output", str(REPORT), *files],
        stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    if not REPORT.exists():
        print(told.stderr, file=sys.stderr)
        return 1
    return verdict(json.loads(REPORT.read_text()), strict="--strict" in sys.argv[1:])


def verdict(report: dict[str, list[dict[str, object]]], *, strict: bool) -> int:
    """Read a report of pip-audit.

    Returns:
        The exit code.
    """
    packages = report["dependencies"]
    skipped = sum("skip_reason" in package for package in packages)
    found = [package for package in packages if package.get("vulns")]
    for package in found:
        print(f"{package['name']} {package['version']}: {package['vulns']}")
    print(
        f"Audit: {len(found)} of {len(packages)} packages are known to be vulnerable; "
        f"{skipped} could not be looked up."
    )
    return int(bool(found) or (strict and skipped > 0))


if __name__ == "__main__":
    sys.exit(main())
