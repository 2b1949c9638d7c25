"""Histories on a volume, from the stop of a server to its next start.

One safetensors file a job, which holds what the job declared and its histories. A file
is there only while no server has the session: the session that takes its histories
removes it, and so does the first look after nobody came for a lease.
"""

import base64
import fcntl
import hashlib
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from skfac.service.metrics import Metrics
from skfac.v1 import preconditioning_pb2 as pb
from skfac.wire.codec import decode_session, encode_session
from skfac.wire.errors import ServiceError
from skfac.wire.messages import parse
from skfac.wire.session import SessionSpec
from skfac.wire.state import SessionState
from skfac.wire.state_codec import state_manifest, state_of_manifest

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[0-9a-f]{32}")  # see `_path`
_SUFFIX = ".safetensors"
_PARTIAL = ".partial"


class StateVolume:
    """The directory of one server, which no other may use at the same time.

    Args:
        directory: Made if it is not there.
        lease_s: How long a saved session may be claimed from now on.
        metrics: Count what was saved and restored.
        clock: Seconds.

    Raises:
        OSError: If the directory cannot be written, or another server uses it.
    """

    def __init__(
        self,
        directory: Path,
        lease_s: float,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._directory = directory
        self._results = metrics.state_files
        self._clock = clock
        self._ends_s = clock() + lease_s
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=directory, suffix=_PARTIAL) as probe:
                probe.write(b"\0")
                os.fsync(probe.fileno())
            self._lock = (directory / "lock").open("w")
        except OSError as error:
            raise OSError(f"Cannot write to state_dir {directory}: {error}.") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise OSError(
                f"Another server uses state_dir {directory}; each needs its own."
            ) from None
        for partial in self._own(_PARTIAL):
            partial.unlink()
        self._saved: dict[str, tuple[SessionSpec, SessionState]] = {}
        for path in self._own(_SUFFIX):
            self._load(path)

    def claim(self, spec: SessionSpec) -> SessionState:
        """Hand a session its histories, once.

        Returns:
            Them; none if they are of another run or specification.
        """
        self._forget_old()
        found = self._saved.pop(spec.job, None)
        if found is None:
            return SessionState(())
        saved, state = found
        self._remove(spec.job)
        difference = saved.first_difference(spec)
        if difference is not None:
            logger.warning(
                "The saved histories of job %r are dropped: %s.", spec.job, difference
            )
            self._results.labels("mismatched").inc()
            return SessionState(())
        self._results.labels("restored").inc()
        logger.info("Job %r: %d saved histories.", spec.job, len(state.layers))
        return state

    def save(self, states: Sequence[tuple[SessionSpec, SessionState]]) -> int:
        """Write the histories of all sessions that have any.

        Returns:
            How many sessions could not be saved; each is logged and counted.
        """
        self._forget_old()
        failed = 0
        for spec, state in states:
            if not state.layers:
                continue
            try:
                self._write(spec, state)
            except (OSError, SafetensorError) as error:
                failed += 1
                self._results.labels("failed").inc()
                logger.error(
                    "The histories of job %r are lost: they cannot be saved to "
                    "state_dir %s: %s", spec.job, self._directory, error,
                )  # fmt: skip
            else:
                self._results.labels("saved").inc()
        return failed

    def close(self) -> None:
        """Let another server use the directory; idempotent."""
        self._lock.close()

    # ---------------------------------------------------------------- files

    def _path(self, job: str) -> Path:
        name = hashlib.blake2b(job.encode(), digest_size=16).hexdigest()
        return self._directory / f"{name}{_SUFFIX}"

    def _own(self, suffix: str) -> list[Path]:
        # Files of others may lie beside: a folder of models has such names, too.
        found = self._directory.glob(f"*{suffix}")
        return sorted(p for p in found if _NAME.fullmatch(p.stem) and p.is_file())

    def _write(self, spec: SessionSpec, state: SessionState) -> None:
        path = self._path(spec.job)
        partial = path.with_suffix(_PARTIAL)
        tensors = [tensor for layer in state.layers for tensor in layer.tensors]
        arrays = {str(i): t.contiguous().numpy() for i, t in enumerate(tensors)}
        metadata = {
            "spec": _text(encode_session(spec).SerializeToString()),
            "manifest": _text(state_manifest(state).SerializeToString()),
        }
        try:
            save_file(arrays, partial, metadata)
            _sync(partial)
            partial.replace(path)
            _sync(self._directory)
        finally:
            partial.unlink(missing_ok=True)

    def _load(self, path: Path) -> None:
        try:
            with safe_open(path, framework="np") as file:
                metadata = file.metadata() or {}
                count = len(file.keys())
                tensors = [
                    torch.from_numpy(file.get_tensor(str(i))) for i in range(count)
                ]
            spec = parse(pb.SessionSpec, _data(metadata["spec"]))
            manifest = parse(pb.StateManifest, _data(metadata["manifest"]))
            decoded = decode_session(spec)
            self._saved[decoded.job] = decoded, state_of_manifest(manifest, tensors)
        except OSError as error:  # which says nothing about the file
            logger.error("The saved histories %s cannot be read: %s", path, error)
            self._results.labels("unreadable").inc()
        except (
            *(SafetensorError, ServiceError),
            *(KeyError, ValueError, TypeError),  # the last of dtypes that NumPy lacks
        ) as error:
            text = "The saved histories %s are left alone: they cannot be read (%s)."
            logger.error(text, path, error)
            self._results.labels("unreadable").inc()

    def _forget_old(self) -> None:
        if self._clock() < self._ends_s:
            return
        for job in list(self._saved):
            logger.warning("Nobody came for the saved histories of job %r.", job)
            self._results.labels("expired").inc()
            del self._saved[job]
            self._remove(job)

    def _remove(self, job: str) -> None:
        path = self._path(job)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:  # a volume that fails must not cost a training
            logger.error(
                "%s cannot be removed, and may be old one day: %s", path, error
            )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _data(text: str) -> memoryview:
    return memoryview(base64.b64decode(text, validate=True))
