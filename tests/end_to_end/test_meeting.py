"""Ranks that do not fit together are told so, all of them, and none waits for ever."""

import time
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from skfac.client import ConfigurationError, Preconditioner
from skfac.client.config import PreconditionerConfig
from skfac.client.meeting import check_steps, made_by_all
from skfac.client.shards import _buckets
from skfac.client.world import Alone, Ranks, check_joined
from tests.support.models import backward, sgd, small_cnn
from tests.support.ranks import run_ranks
from tests.support.servers import serving

pytestmark = pytest.mark.timeout(240)  # processes; a busy machine


class Others(Alone):
    """Says what another rank says, besides what this one does."""

    def __init__(self, other: str) -> None:
        super().__init__()
        self._other = other

    def gather(self, text: str) -> list[str]:
        return [text, self._other]


def said(settings: dict[str, Any]) -> str:
    """What a rank with some settings tells the others."""
    texts: list[str] = []

    class Listening(Alone):
        def gather(self, text: str) -> list[str]:
            texts.append(text)
            return [text]

    made_by_all(Listening(), PreconditionerConfig(**settings), lambda: None)
    return texts[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kl_clip": 0.5}, r"kl_clip is 0\.15 on rank 0 and 0\.5 on rank 1"),
        ({"trust": "graft"}, r"trust is 'kl' on rank 0 and 'graft' on rank 1"),
        ({"accumulation_steps": 2}, "accumulation_steps is 1 on rank 0 and 2 on"),
        ({"damping": lambda step: 0.1}, r"damping is 0\.\d+ on rank 0 and of type f"),
        ({"skip": ("a", "b")}, r"skip is \(\) on rank 0 and \('a', 'b'\) on rank 1"),
    ],
)
def test_settings_that_differ_are_named(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        made_by_all(Others(said(settings)), PreconditionerConfig(), lambda: None)


def test_settings_of_a_rank_s_own_may_differ():
    other = said({"wait_s": 1.0, "resolve_every_s": 5.0, "job": "mine"})

    assert made_by_all(Others(other), PreconditionerConfig(), lambda: 7) == 7


def test_ranks_that_begin_at_different_steps_are_named():
    check_steps(Others("3 4"), 3, 4)
    with pytest.raises(ConfigurationError, match="Rank 0 begins at step 0 and rank 1"):
        check_steps(Others("3 4"), 0, 0)


def refusals(rank: int, address: str) -> list[str]:
    """What each of some mistakes is answered with."""

    def answer(act: Any) -> str:
        try:
            act()
        except ConfigurationError as error:
            return str(error)
        return ""

    def frozen() -> None:
        model = small_cnn()
        optimizer = sgd(model)
        model.requires_grad_(rank == 0)
        Preconditioner(model, optimizer, target=address).close()

    def settings() -> None:
        model = small_cnn()
        clip = 0.1 + 0.1 * rank
        Preconditioner(model, sgd(model), target=address, kl_clip=clip).close()

    def resumed() -> None:
        model = small_cnn()
        for last in (0, 1):
            with Preconditioner(model, sgd(model), target=address) as pre:
                if last == 0:
                    state = pre.state_dict() | {"step": 3, "next_capture": 3}
                elif rank == 0:
                    pre.load_state_dict(state)
                backward(model, 0)
                pre.step()

    return [answer(act) for act in (frozen, settings, resumed)]


def test_mistakes_of_one_rank_are_told_to_all():
    with serving() as server:
        ranks = run_ranks(2, refusals, server.address)

    for answers in ranks:
        frozen, settings, resumed = answers
        assert "no layer to precondition" in frozen
        assert settings.startswith("kl_clip is 0.1 on rank 0 and 0.2 on rank 1")
        assert resumed.startswith("Rank 0 begins at step 3 and rank 1 at step 0")
    assert ranks[0][0].startswith("Rank 1 is refused: ")


def lonely(rank: int) -> str:
    """A preconditioner that was made too early."""
    try:
        check_joined(Alone(by_chance=True))
    except ConfigurationError as error:
        return str(error)
    check_joined(Alone(rank))  # of a process_group of one
    return ""


def test_a_preconditioner_that_was_made_too_early_is_refused():
    answers = run_ranks(2, lonely)

    assert all("make it after init_process_group" in answer for answer in answers)
    model = small_cnn()
    with Preconditioner(model, sgd(model)) as pre:
        assert pre._world.by_chance
        backward(model, 0)
        pre.step()


def impatient(rank: int) -> float:
    """How long a rank waits for one that does not come."""
    group = distributed.new_group([0, 1], timeout=timedelta(seconds=1))
    assert group is not None
    world = Ranks(group)
    began_s = time.monotonic()
    if rank == 0:
        with pytest.raises(RuntimeError):
            world.least([1])
    else:
        time.sleep(3)
    return time.monotonic() - began_s


def test_ranks_wait_as_long_as_their_group_does():
    waited_s, _ = run_ranks(2, impatient)

    assert 0.5 < waited_s < 60


def test_layers_that_send_nothing_count_nothing():
    def part(columns: int, *, by_columns: bool) -> Any:
        shard = SimpleNamespace(by_columns=by_columns)
        derivatives = SimpleNamespace(tensor=torch.empty(1024, 8))
        ready = SimpleNamespace(derivatives=derivatives)
        gradient: Tensor = torch.empty(1, 1).expand(8, columns)
        return SimpleNamespace(shard=shard, ready=ready, gradient=gradient)

    def places(own: int) -> list[list[int]]:
        embedding = part(own, by_columns=True)
        others = [part(10_000, by_columns=False) for _ in range(3)]
        return list(map(list, _buckets([embedding, *others])))

    assert places(0) == places(1 << 20)


def sampled(rank: int, address: str, static: bool) -> str:
    """Take rows of drawn targets in a model that DDP has wrapped."""
    model = nn.Linear(4, 2)
    wrapped = nn.parallel.DistributedDataParallel(model, static_graph=static)
    with Preconditioner(model, sgd(model), target=address, fisher="monte_carlo") as pre:
        output = wrapped(torch.randn(5, 4))
        try:
            pre.capture_from(output.square().mean())
        except ConfigurationError as error:
            return str(error)
        output.mean().backward()
        pre.step()
    return ""


def test_sampled_losses_of_a_static_graph_are_refused():
    with serving() as server:
        static = run_ranks(2, sampled, server.address, True)
        usual = run_ranks(2, sampled, server.address, False)

    assert all("Leave static_graph out" in answer for answer in static)
    assert usual == ["", ""]
