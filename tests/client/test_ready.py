"""Versions on their way to a device: here one stands for a GPU that copies nothing."""

import gc
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from skfac.client import Preconditioner
from skfac.client.layers import track_layers
from skfac.client.link import Link
from skfac.client.ready import ReadyVersions
from skfac.client.store import Store
from skfac.client.transport import connect
from skfac.service.config import EngineConfig
from skfac.wire.outcome import Loss, Version
from skfac.wire.staging import DeviceCopy, Staging
from tests.support.stores import versions_at
from tests.support.values import layer_spec, session_spec, version

ELSEWHERE = torch.device("meta")
CPU = torch.device("cpu")


class FakeStaging(Staging):
    """Remembers what it was asked to copy, and returns it in the dtype."""

    def __init__(self, device: torch.device) -> None:
        self.uploads: list[Sequence[Tensor]] = []
        assert device == ELSEWHERE

    def upload(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> DeviceCopy:
        self.uploads.append(tensors)
        return DeviceCopy([tensor.to(dtype) for tensor in tensors], None)


@pytest.fixture
def ready(monkeypatch) -> ReadyVersions:
    """Of a model of one layer that is not on the CPU, in float64."""
    monkeypatch.setattr("skfac.client.ready.Staging", FakeStaging)
    model = nn.Sequential(nn.Linear(2, 2)).to(ELSEWHERE, torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return ReadyVersions(track_layers(model, optimizer, ()))


def uploads(ready: ReadyVersions) -> list[Sequence[Tensor]]:
    (staging,) = ready._staging.values()
    assert isinstance(staging, FakeStaging)
    return staging.uploads


def test_a_version_is_copied_once_when_it_arrives(ready):
    new = version()

    assert ready.begin(new) is new
    first = ready.get(0, [new], CPU, torch.float64)
    again = ready.get(0, [new], CPU, torch.float64)

    assert first is again
    assert first is not None
    assert [len(tensors) for tensors in uploads(ready)] == [2]
    for copy, tensor in zip(first.tensors, new.preconditioner.tensors, strict=True):
        assert copy.dtype == torch.float64
        assert torch.equal(copy, tensor.double())
    assert not ready._begun


def test_the_copy_that_was_begun_is_what_is_used(ready):
    new = version()
    ready.begin(new)
    begun = ready._begun[new].take()

    used = ready.get(0, [new], CPU, torch.float64)

    assert used is not None
    assert all(a is b for a, b in zip(used.tensors, begun, strict=True))


def test_a_version_that_nobody_keeps_leaves_nothing(ready):
    new = version()
    ready.begin(new)
    assert len(ready._begun) == 1

    del new
    gc.collect()

    assert not ready._begun


def test_on_the_cpu_nothing_is_copied():
    model = nn.Sequential(nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ready, new = ReadyVersions(track_layers(model, optimizer, ())), version()

    assert ready.begin(new) is new
    assert not ready._begun
    assert ready.get(0, [new], CPU, torch.float32) is new.preconditioner


def test_a_device_without_room_loses_the_version_and_keeps_the_last(ready, monkeypatch):
    def full(self, tensors, dtype):
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    spec = session_spec(layer_spec("0"), lag=1, update_every=1)
    store = Store(spec, 1, ready.begin)
    link = store.link(0)
    link.set_link(up=True)
    old = version(0)
    for step, new in enumerate([old, version(1)]):
        if step:
            monkeypatch.setattr(FakeStaging, "upload", full)
        store.expect(step)
        link.receive([new])
        assert versions_at(store, step + 1, 0.0) == [old]

    assert (store.counts["solved"], store.counts["failed"]) == (1, 1)


def test_that_loss_says_why(ready, monkeypatch):
    error = torch.OutOfMemoryError("tried to allocate 2 GiB")
    monkeypatch.setattr(FakeStaging, "upload", lambda *_: (_ for _ in ()).throw(error))

    lost = ready.begin(version(7))

    assert isinstance(lost, Loss)
    assert (lost.layer, lost.step, lost.reason) == (0, 7, "failed")
    assert "meta has no room" in lost.message
    assert "2 GiB" in lost.message


@pytest.mark.parametrize(
    ("device", "expected"), [("cuda:1", "cuda:1"), ("cpu", "cpu"), ("meta", "cpu")]
)
def test_an_embedded_engine_is_where_the_model_is(device, expected, monkeypatch):
    asked = []

    def config(*, device: str) -> EngineConfig:
        asked.append(device)
        return EngineConfig()

    monkeypatch.setattr("skfac.client.embedded.EngineConfig", config)
    spec = session_spec(layer_spec("0"))
    link = Link(Store(spec), 0)

    connect(
        "embedded", link=link, spec=spec, rank=0, device=torch.device(device)
    ).close()

    assert asked == [expected]


def test_a_trainer_tells_where_its_model_is(monkeypatch):
    told = []

    def noted(target, **settings):
        told.append((target, settings["device"]))
        return connect(target, **settings)

    monkeypatch.setattr("skfac.client.preconditioner.connect", noted)
    model = nn.Linear(2, 2, device=ELSEWHERE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    Preconditioner(model, optimizer).close()

    assert told == [("embedded", ELSEWHERE)]


def test_an_upload_never_narrows():
    wide, narrow = torch.randn(2).double(), torch.randn(2)

    copies = Staging(CPU).upload([wide, narrow], torch.float32).take()

    assert [copy.dtype for copy in copies] == [torch.float64, torch.float32]
    assert copies[0] is wide


def test_versions_are_told_apart_by_identity(ready):
    # Two of the same step, as after a reconnection, are not the same copy.
    first, second = version(3), version(3)
    for one in (first, second):
        assert isinstance(ready.begin(one), Version)

    assert len(ready._begun) == 2
