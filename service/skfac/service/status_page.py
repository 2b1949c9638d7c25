"""The status page and the data it shows, each as an answer to a request."""

import base64
import hashlib
import json
import math
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib import resources

from skfac.service.engine import EngineStatus, LayerStatus, SessionStatus
from skfac.service.web import Answer

LAYERS_SHOWN = 200
"""Layers told of each session, those that are furthest behind."""

SHORTEST_S = 0.5
"""Requests within this time get the same status."""

_IDLE_SHARE = 19.0  # times as long as a status took: at most 5 % of a core


class StatusPage:
    """A page, and the status that it asks for again and again.

    Describing and encoding a status takes time that grows with the number of layers.
    However many ask, it is done by one at a time, at most every `SHORTEST_S` and for at
    most 5 % of the time; the others get the one before.

    Args:
        status: Describes the engine.
    """

    def __init__(self, status: Callable[[], EngineStatus]) -> None:
        self._status = status
        self._lock = threading.Lock()
        self._fresh_until_s = 0.0
        self._encoded = b""
        self._page = _assemble()

    def pages(self) -> dict[str, Callable[[], Answer]]:
        """Give it paths.

        Returns:
            What answers each path.
        """
        return {"/": lambda: self._page, "/status.json": self._status_json}

    def _status_json(self) -> Answer:
        with self._lock:
            began_s = time.monotonic()
            if began_s >= self._fresh_until_s:
                self._encoded = json.dumps(plain(self._status())).encode()
                ended_s = time.monotonic()
                idle_s = max(SHORTEST_S, _IDLE_SHARE * (ended_s - began_s))
                self._fresh_until_s = ended_s + idle_s
            return Answer("application/json", self._encoded)


def plain(status: EngineStatus) -> dict[str, object]:
    """Turn a status into plain data, with the layers of each session cut to some.

    Returns:
        The fields of `EngineStatus`; each session has its number of layers besides, as
        `layer_count`.
    """
    sessions = [_shortened(session) for session in status.sessions]
    shortened = asdict(replace(status, sessions=tuple(sessions)))
    for session, described in zip(status.sessions, shortened["sessions"], strict=True):
        described["layer_count"] = len(session.layers)
    return shortened


def _shortened(session: SessionStatus) -> SessionStatus:
    if len(session.layers) <= LAYERS_SHOWN:
        return session
    stalest = sorted(session.layers, key=staleness, reverse=True)
    return replace(session, layers=tuple(stalest[:LAYERS_SHOWN]))


def staleness(layer: LayerStatus) -> float:
    """Tell how far behind a layer is.

    Returns:
        Steps; infinity if it has no version.
    """
    return math.inf if layer.behind_steps is None else layer.behind_steps


def _assemble() -> Answer:
    # One page without anything from elsewhere. Its policy allows this style and this
    # script by their hashes and no other, so that a name that gets into the page as
    # markup, if that should ever happen, still could not run.
    folder = resources.files("skfac.service") / "page"
    style, script = ((folder / f"status.{end}").read_text() for end in ("css", "js"))
    html = (folder / "status.html").read_text()
    html = html.replace("/* style */", style).replace("/* script */", script)
    policy = "; ".join(
        (
            "default-src 'none'",
            f"style-src '{_hash(style)}'",
            f"script-src '{_hash(script)}'",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )
    headers = {"Content-Security-Policy": policy}
    return Answer("text/html", html.encode(), headers)


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
