"""Histories outlive a restart of their server on a volume, or it is said why not."""

import errno
import mmap
import os
import signal
import subprocess
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from skfac.service.local_engine import LocalEngine
from skfac.service.metrics import Metrics
from skfac.service.state_volume import StateVolume
from tests.support.raw_client import RawClient, snapshot_of, spec_of
from tests.support.servers import ServerProcess, serving
from tests.support.values import assert_same_history, folded

pytestmark = pytest.mark.timeout(240)  # processes; a busy machine

SETTINGS = {"decay": 0.7, "window": 3, "rank_cap": 4}
SPEC = spec_of("job", history="ema")


def count(metrics: Metrics, result: str) -> float:
    sample = metrics.registry.get_sample_value
    return sample("skfac_state_files_total", {"result": result}) or 0.0


def filled(directory) -> None:
    """A server that ran for three steps and was stopped."""
    with (
        serving(state_dir=str(directory)) as server,
        RawClient(server.address, SPEC) as client,
    ):
        for step in range(3):
            client.versions_of(step, **SETTINGS)
        server.close()
    assert server.unsaved == 0


@pytest.mark.parametrize("history", ["window", "ema"])
def test_a_restarted_server_goes_on(tmp_path, history):
    spec = spec_of("job", history=history)
    with (
        ServerProcess(state_dir=tmp_path) as server,
        RawClient(server.address, spec) as client,
    ):
        for step in range(3):
            client.versions_of(step, **SETTINGS)
        code, _ = server.interrupt(signal.SIGTERM)
    assert code == 0
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    with (
        ServerProcess(state_dir=tmp_path) as server,
        RawClient(server.address, spec) as client,
    ):
        assert not list(tmp_path.glob("*.safetensors"))  # the session has it
        client.versions_of(3, **SETTINGS)
        state = client.export_state()
    sent = [snapshot_of(spec, step, **SETTINGS) for step in range(4)]
    for layer, found in enumerate(state.layers):
        assert_same_history(found.history, folded(spec, sent, layer)[0])


def test_sessions_that_have_ended_leave_no_file(tmp_path):
    with (
        serving(state_dir=str(tmp_path)) as server,
        RawClient(server.address, SPEC) as client,
    ):
        client.versions_of(0, **SETTINGS)
        server._engine.close_session(client.grant.session_id, 0)

    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


@pytest.mark.parametrize("change", [{"instance": "other"}, {"lag": 2}])
def test_another_run_does_not_get_them(tmp_path, caplog, change):
    filled(tmp_path)
    metrics = Metrics()
    other = spec_of("job", **{"history": "ema", **change})

    with closing(StateVolume(tmp_path, 60.0, metrics)) as volume:
        assert volume.claim(other).layers == ()
    assert "are dropped" in caplog.text
    assert count(metrics, "mismatched") == 1
    assert not list(tmp_path.glob("*.safetensors"))


def test_nobody_has_them_after_a_lease(tmp_path):
    filled(tmp_path)
    now_s, metrics = [0.0], Metrics()
    with closing(StateVolume(tmp_path, 60.0, metrics, lambda: now_s[0])) as volume:
        now_s[0] = 61.0
        assert volume.claim(SPEC).layers == ()
    assert count(metrics, "expired") == 1
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_damaged_file_is_named_and_left_alone(tmp_path, caplog):
    filled(tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    damaged = path.read_bytes()[:-9]
    path.write_bytes(damaged)
    metrics = Metrics()

    with closing(StateVolume(tmp_path, 60.0, metrics)) as volume:
        assert volume.claim(SPEC).layers == ()
    assert str(path) in caplog.text
    assert count(metrics, "unreadable") == 1
    assert path.read_bytes() == damaged


def test_files_of_others_are_left_alone(tmp_path, caplog):
    filled(tmp_path)
    weights = {"0": torch.zeros(2, dtype=torch.bfloat16)}  # which NumPy has not
    save_file(weights, tmp_path / "model.safetensors")
    save_file(weights, tmp_path / f"{'0' * 32}.safetensors")
    (tmp_path / "download.partial").write_bytes(b"half")
    (tmp_path / f"{'a' * 32}.partial").mkdir()
    own = tmp_path / f"{'b' * 32}.partial"  # of a server that was killed
    own.write_bytes(b"half")
    theirs = sorted(set(tmp_path.iterdir()) - {own})

    with closing(StateVolume(tmp_path, 60.0, Metrics())) as volume:
        assert sorted(tmp_path.iterdir()) == theirs
        assert volume.claim(SPEC).layers
    assert "model.safetensors" not in caplog.text


def test_a_file_that_cannot_be_removed_costs_nothing(tmp_path, monkeypatch, caplog):
    filled(tmp_path)
    (path,) = tmp_path.glob("*.safetensors")

    def read_only(self, missing_ok=False):
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "unlink", read_only)
    with (
        serving(state_dir=str(tmp_path)) as server,
        RawClient(server.address, SPEC) as client,
    ):
        assert client.export_state().layers
        shown = server._engine.status().sessions[0].history_bytes
        labels = {"session": "job"}
        sample = server.metrics.registry.get_sample_value
        assert sample("skfac_history_bytes", labels) == shown > 0
    assert f"{path} cannot be removed" in caplog.text


def test_a_file_that_cannot_be_read_now_is_kept(tmp_path, monkeypatch, caplog):
    filled(tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    metrics = Metrics()

    def fail(*_, **__):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr("skfac.service.state_volume.safe_open", fail)
        with closing(StateVolume(tmp_path, 60.0, metrics)) as volume:
            assert volume.claim(SPEC).layers == ()
    assert f"{path} cannot be read: [Errno 24]" in caplog.text
    assert count(metrics, "unreadable") == 1
    with closing(StateVolume(tmp_path, 60.0, metrics)) as volume:
        assert volume.claim(SPEC).layers


@pytest.mark.parametrize("fails", [False, True])
def test_one_job_costs_no_other_its_histories(tmp_path, monkeypatch, caplog, fails):
    other, export = spec_of("other", history="ema"), LocalEngine.export_state

    def leave_or_fail(self, session_id):
        monkeypatch.undo()
        if fails:
            raise RuntimeError("no memory")
        self.close_session(session_id, 0)
        return export(self, session_id)

    with (
        serving(state_dir=str(tmp_path)) as server,
        RawClient(server.address, SPEC) as first,
        RawClient(server.address, other) as second,
    ):
        first.versions_of(0, **SETTINGS)
        second.versions_of(0, **SETTINGS)
        monkeypatch.setattr(LocalEngine, "export_state", leave_or_fail)
        server.close()
        assert not server._engine._thread.is_alive()

    assert server.unsaved == fails
    assert ("The histories of job 'job' are lost" in caplog.text) is fails
    with closing(StateVolume(tmp_path, 60.0, Metrics())) as volume:
        assert not volume.claim(SPEC).layers
        assert volume.claim(other).layers


def test_a_directory_that_cannot_be_used_is_said_at_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Cannot write to state_dir"):
        serving(state_dir=str(tmp_path / "file")).__enter__()
    with (
        serving(state_dir=str(tmp_path)),
        pytest.raises(OSError, match="Another server uses state_dir"),
    ):
        serving(state_dir=str(tmp_path)).__enter__()


def test_a_full_disk_costs_the_histories_and_says_so(tmp_path, monkeypatch, caplog):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with (
        serving(state_dir=str(tmp_path)) as server,
        RawClient(server.address, SPEC) as client,
    ):
        client.versions_of(0, **SETTINGS)
        monkeypatch.setattr(os, "fsync", full)
        server.close()

    assert server.unsaved == 1
    assert "No space left on device" in caplog.text
    assert count(server.metrics, "failed") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


@contextmanager
def small_disk(directory):
    """A file system of one page, which root may make."""
    size = f"size={mmap.PAGESIZE}"
    mount = ["mount", "-t", "tmpfs", "-o", size, "none", str(directory)]
    unmount = ["umount", "--lazy", str(directory)]
    made = subprocess.run(mount, capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"No file system may be mounted here: {made.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(unmount, check=True)


@pytest.mark.skipif(os.getuid() != 0, reason="only root may mount")
def test_a_file_system_without_room_is_an_error_and_no_signal(tmp_path, caplog):
    large = spec_of("job", (1024, 4), history="ema")  # 4 rows of 8 KiB
    with small_disk(tmp_path):
        with (
            serving(state_dir=str(tmp_path)) as server,
            RawClient(server.address, large) as client,
        ):
            client.versions_of(0, **SETTINGS)
            server.close()
        left = [path.name for path in tmp_path.iterdir()]

    assert server.unsaved == 1
    assert "os error 28" in caplog.text
    assert count(server.metrics, "failed") == 1
    assert left == ["lock"]
