"""A real Prometheus that scrapes some servers of a test."""

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
RULES = ROOT / "deploy/helm/skfac/files/rules.yaml"
BINARIES = Path(os.environ.get("PROMETHEUS", ROOT / ".tools/prometheus")) / "usr/bin"
PATIENCE_S = 60.0  # for what takes a second or two, on a machine that may be busy

Sample = tuple[dict[str, str], float]


class Prometheus:
    """Asks a running Prometheus."""

    def __init__(self, address: str) -> None:
        self._address = address

    def get(self, path: str, **arguments: str) -> Any:
        """What `/api/v1/PATH` answers; an error of it is raised with its text."""
        query = urllib.parse.urlencode(arguments)
        url = f"http://{self._address}/api/v1/{path}?{query}"
        try:
            with urllib.request.urlopen(url, timeout=PATIENCE_S) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{arguments}: {error.read().decode()}") from None

    def query(self, expression: str) -> list[Sample]:
        """The samples of an expression now."""
        found = self.get("query", query=expression)["result"]
        return [(one["metric"], float(one["value"][1])) for one in found]

    def wait_for(
        self, expression: str, good: Callable[[list[Sample]], bool] = bool
    ) -> list[Sample]:
        """Ask until the answer is good; by default, not empty."""
        end_s = time.monotonic() + PATIENCE_S
        while not good(found := self.query(expression)):
            assert time.monotonic() < end_s, f"{expression} is still {found}"
            time.sleep(0.2)
        return found


@contextmanager
def prometheus(folder: Path, *targets: str) -> Iterator[Prometheus]:
    """Run one with our rules; it scrapes the targets twice a second."""
    config = {
        "global": {"scrape_interval": "500ms", "evaluation_interval": "500ms"},
        "rule_files": [str(RULES)],
        "scrape_configs": [
            {"job_name": "skfac", "static_configs": [{"targets": list(targets)}]}
        ],
    }
    file = folder / "prometheus.yml"
    file.write_text(json.dumps(config))  # which is YAML, too
    address = f"127.0.0.1:{_free_port()}"
    log = (folder / "prometheus.log").open("w")
    process = subprocess.Popen(
        [
            BINARIES / "prometheus",
            f"--config.file={file}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={address}",
        ],
        stdout=log,
        stderr=log,
    )
    try:
        _await_ready(process, address, folder / "prometheus.log")
        yield Prometheus(address)
    finally:
        process.terminate()
        process.wait(PATIENCE_S)
        log.close()


def promtool(*arguments: str | Path) -> str:
    """Run promtool; it must succeed."""
    done = subprocess.run(
        [BINARIES / "promtool", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def _await_ready(process: "subprocess.Popen[bytes]", address: str, log: Path) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while True:
        assert process.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(f"http://{address}/-/ready", timeout=5).close()
            return
        except OSError:
            assert time.monotonic() < end_s, log.read_text()
            time.sleep(0.1)
