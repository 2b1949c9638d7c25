"""What the audit of dependencies says of a report, and when it fails."""

import runpy

import pytest

from tests.support.chart import ROOT

verdict = runpy.run_path(str(ROOT / "deploy/tools/audit.py"))["verdict"]

GOOD = {"name": "good", "version": "1", "vulns": []}
BAD = {"name": "bad", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": []}]}
SKIPPED = {"name": "unknown", "skip_reason": "nobody answers"}


@pytest.mark.parametrize(
    ("packages", "code", "strict_code", "said"),
    [
        ([GOOD], 0, 0, "0 of 1 packages are known to be vulnerable; 0 could not"),
        ([GOOD, SKIPPED], 0, 1, "0 of 2 packages are known to be vulnerable; 1 could"),
        ([GOOD, BAD, SKIPPED], 1, 1, "bad 2: [{'id': 'CVE-1'"),
    ],
)
def test_what_is_vulnerable_fails_and_what_is_unknown_is_said(
    capsys, packages, code, strict_code, said
):
    assert verdict({"dependencies": packages}, strict=False) == code
    assert said in capsys.readouterr().out
    assert verdict({"dependencies": packages}, strict=True) == strict_code
