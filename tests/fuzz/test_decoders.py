"""Decoders of what peers send: any bytes are taken or refused, and nothing else."""

import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from skfac.service.intake import Intake
from skfac.service.local_engine import LocalEngine
from skfac.service.metrics import Metrics
from skfac.service.receiving import Receiving
from skfac.service.regions import Regions
from skfac.v1 import preconditioning_pb2 as pb
from skfac.wire.codec import build_outcomes, encode_snapshot
from skfac.wire.errors import InvalidRequestError, LimitExceededError, ServiceError
from skfac.wire.frames import encode_frames
from skfac.wire.messages import decode_header
from skfac.wire.session import MAX_NAME_LENGTH, MAX_WORLD_SIZE, LayerSpec
from skfac.wire.state_codec import StateReceiver
from tests.fuzz.decoders import MOST_BYTES, feed
from tests.fuzz.mutate import CORPUS, SESSION_ID, SPEC, corpus, kinds, mutated
from tests.support.raw_client import snapshot_of, spec_of

WHOLE = corpus()
EXTENTS = st.one_of(
    st.integers(0, 9), st.sampled_from([2**31, 2**32, 2**62, 2**63, 2**64 - 1])
)
HEADERS = st.builds(
    pb.TensorHeader,
    dtype=st.integers(0, 3),
    shape=st.lists(EXTENTS, max_size=4),
    shared_offset=st.one_of(st.none(), EXTENTS),
)
NUMBERS = st.floats(allow_nan=True, allow_infinity=True)
SETTINGS = st.builds(
    pb.CurvatureSettings, damping=NUMBERS, decay=NUMBERS, window=EXTENTS, rank=EXTENTS
)
SMALL = st.sampled_from([0, 1, 2, 2**31, 2**32 - 1])
SNAPSHOTS = st.builds(
    pb.SnapshotManifest,
    session_id=st.sampled_from(["", SESSION_ID]),
    rank=SMALL,
    step=EXTENTS,
    settings=SETTINGS,
    layers=st.lists(
        st.builds(pb.LayerRows, layer=SMALL, activations=HEADERS, derivatives=HEADERS),
        max_size=3,
    ),
)
INVERSES = st.builds(
    pb.FactorInverse, form=st.integers(0, 4), damping=NUMBERS, matrix=HEADERS
)
OUTCOMES = st.builds(
    pb.OutcomesManifest,
    outcomes=st.lists(
        st.builds(
            pb.LayerOutcome,
            layer=SMALL,
            step=EXTENTS,
            preconditioner=st.builds(
                pb.LayerPreconditioner, activations=INVERSES, derivatives=INVERSES
            ),
        ),
        max_size=3,
    ),
)
MOMENTS = st.lists(
    st.builds(
        pb.Moment,
        form=st.integers(0, 4),
        tensor=HEADERS,
        weight=NUMBERS,
        dropped=NUMBERS,
    ),
    max_size=2,
)
HISTORIES = st.builds(
    pb.StateManifest,
    session_id=st.sampled_from(["", SESSION_ID]),
    layers=st.lists(
        st.builds(
            pb.LayerState,
            layer=SMALL,
            step=EXTENTS,
            history=st.integers(0, 4),
            updates=EXTENTS,
            dtype=st.integers(0, 3),
            activations=MOMENTS,
            derivatives=MOMENTS,
        ),
        max_size=2,
    ),
)


def test_the_corpus_has_a_message_of_every_kind():
    assert {path.stem for path in CORPUS.iterdir()} >= set(kinds())
    assert len(set(WHOLE)) == len(WHOLE)


@given(st.binary(max_size=200))
def test_any_bytes(message):
    feed(message)


@settings(max_examples=300)
@given(st.one_of(SNAPSHOTS, OUTCOMES, HISTORIES))
def test_any_manifest(manifest):
    feed(next(encode_frames(manifest.SerializeToString(), ())))


def test_broken_messages_of_the_corpus():
    for seed in range(5000):
        feed(mutated(seed, WHOLE))


class Streams(RuleBasedStateMachine):
    """Frames in any order on a push stream and on one of histories, of a real engine.

    Whatever comes, each stream answers or refuses, and a good snapshot is taken.
    """

    def __init__(self) -> None:
        super().__init__()
        self.engine, self.step = LocalEngine(), 10
        self.session_id = self.engine.open_session(SPEC, 0).session_id
        self.receiving = Receiving("max_session_bytes", MOST_BYTES)
        self.regions = Regions(MOST_BYTES)
        self.intake = self._intake()
        self.receiver = StateReceiver(self.engine.admit_state)

    def _intake(self) -> Intake:
        return Intake(
            self.engine,
            Metrics(),
            self.regions,
            session_id=self.session_id,
            receiving=self.receiving,
            max_layers=len(SPEC.layers),
            pinned=False,
        )

    def _named(self, message: bytes) -> bytes:
        return message.replace(SESSION_ID.encode(), self.session_id.encode())

    @rule(seed=st.integers(0, 10**9))
    def push(self, seed):
        try:
            answers = self.intake.receive(self._named(mutated(seed, WHOLE)))
        except ServiceError:
            self.intake.close()
            self.intake = self._intake()
            return
        assert len(answers) <= 2

    @rule(seed=st.integers(0, 10**9))
    def import_state(self, seed):
        try:
            self.receiver.receive(self._named(mutated(seed, WHOLE)))
        except ServiceError:
            self.receiver = StateReceiver(self.engine.admit_state)

    @rule()
    def push_a_good_one(self):
        # Bit flips may have pushed a step of any size before: on that the job is new.
        spec = spec_of(f"good-{self.step}")
        self.step += 1
        session_id = self.engine.open_session(spec, 0).session_id
        frames = list(encode_snapshot(session_id, snapshot_of(spec, 1)))
        *_, last = (self.intake.receive(frame) for frame in frames)
        assert last, "A good snapshot has no answer."
        assert not last[-1].HasField("refusal"), last[-1].refusal.message
        self.engine.close_session(session_id, 0)

    def teardown(self):
        self.intake.close()
        assert not len(self.receiving)
        assert not len(self.regions)
        self.engine.close()


Streams.TestCase.settings = settings(max_examples=25, stateful_step_count=25)
TestStreams = Streams.TestCase


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize("shape", [(0, 2**63), (2**32, 2**32), (0, 2**40, 2**40)])
def test_extents_that_overflow_are_refused(shape):
    header = pb.TensorHeader(dtype=pb.DTYPE_FLOAT32, shape=shape)
    with pytest.raises(InvalidRequestError, match=r"multiply to 576460752303423488"):
        decode_header(header)


@pytest.mark.parametrize(
    ("form", "shape"),
    [
        (pb.FactorInverse.FORM_DENSE, (2, 3)),
        (pb.FactorInverse.FORM_DENSE, (2,)),
        (pb.FactorInverse.FORM_DIAGONAL, (2, 2)),
        (pb.FactorInverse.FORM_LOW_RANK, ()),
    ],
)
def test_inverses_of_wrong_shapes_are_refused(form, shape):
    message = pb.OutcomesManifest()
    both = message.outcomes.add().preconditioner
    both.activations.form = form
    both.activations.matrix.shape.extend(shape)
    with pytest.raises(InvalidRequestError, match=rf"form {form} has shape"):
        build_outcomes(message, [torch.ones(shape), torch.ones(1, 1)])


@pytest.mark.parametrize(
    ("changes", "limit"),
    [
        ({"instance": "x" * (MAX_NAME_LENGTH + 1)}, MAX_NAME_LENGTH),
        ({"world_size": MAX_WORLD_SIZE + 1}, MAX_WORLD_SIZE),
    ],
)
def test_what_a_server_remembers_of_a_session_is_bounded(changes, limit):
    with pytest.raises(InvalidRequestError, match=f"{limit} are allowed"):
        spec_of("job", **changes)


def test_the_kind_of_a_layer_is_bounded():
    with pytest.raises(InvalidRequestError, match=f"{MAX_NAME_LENGTH} are allowed"):
        LayerSpec("fc", "x" * (MAX_NAME_LENGTH + 1), 1, 1, False)


def test_layers_are_compared_in_linear_time():
    layers = [LayerSpec(str(i), "linear", 1, 1, False) for i in range(60_000)]
    layers[-1] = layers[-2]
    began_s = time.process_time()
    with pytest.raises(InvalidRequestError, match="'59998' is declared twice"):
        spec_of("job", layers=tuple(layers))
    assert time.process_time() - began_s < 10  # it was 30 s and more


def test_streams_of_a_session_share_what_may_be_half_received():
    receiving = Receiving("max_session_bytes", 100)
    first = receiving.begin("a", 60)
    with pytest.raises(
        LimitExceededError, match=r"60 bytes .* max_session_bytes = 100"
    ):
        receiving.begin("a", 41)
    other = receiving.begin("b", 100)
    first.close()
    first.close()
    receiving.begin("a", 100).close()
    other.close()
    receiving.begin("c", 0).close()
    assert not len(receiving)


def test_shares_of_many_threads_add_up():
    receiving = Receiving("max_session_bytes", 10**9)

    def use() -> None:
        for _ in range(2000):
            receiving.begin("a", 7).close()

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not len(receiving)


def test_nothing_is_left_open():
    before = len(list(Path("/proc/self/fd").iterdir()))
    for seed in range(500):
        feed(mutated(seed, WHOLE))
    assert len(list(Path("/proc/self/fd").iterdir())) <= before
