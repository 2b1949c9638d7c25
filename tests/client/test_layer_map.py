"""Layers over servers: even, the same everywhere, and moved no more than needed."""

from hypothesis import given
from hypothesis import strategies as st

from skfac.client.layer_map import LayerMap
from skfac.wire.session import LayerSpec

SERVERS = ("skfac-0:1", "skfac-1:1", "skfac-2:1", "skfac-3:1")

layers = st.lists(
    st.tuples(st.integers(2, 5000), st.integers(2, 5000)), min_size=1, max_size=40
).map(
    lambda dims: tuple(
        LayerSpec(f"layer.{i}", "linear", d_in, d_out, bias=False)
        for i, (d_in, d_out) in enumerate(dims)
    )
)
servers = st.integers(1, 4).map(lambda count: SERVERS[:count])


def loads(specs, assigned, count) -> list[int]:
    totals = [0] * count
    for spec, server in zip(specs, assigned, strict=True):
        totals[server] += spec.d_in + spec.d_out
    return totals


@given(layers, servers)
def test_no_server_has_more_than_a_layer_above_the_least(specs, names):
    assigned = LayerMap(specs, names).at([True] * len(names))

    totals = loads(specs, assigned, len(names))
    assert max(totals) - min(totals) <= max(s.d_in + s.d_out for s in specs)


@given(layers, servers, st.data())
def test_losing_servers_moves_their_layers_only(specs, names, data):
    up = data.draw(st.lists(st.booleans(), min_size=len(names), max_size=len(names)))
    layer_map = LayerMap(specs, names)
    home, now = layer_map.at([True] * len(names)), layer_map.at(up)

    for before, after in zip(home, now, strict=True):
        if up[before] or not any(up):
            assert after == before
        else:
            assert up[after]
    assert layer_map.at([True] * len(names)) == home  # they return


def test_the_layers_of_a_lost_server_are_shared_by_the_others():
    specs = tuple(LayerSpec(f"l{i}", "linear", 8, 8, bias=False) for i in range(60))
    layer_map = LayerMap(specs, SERVERS)
    home = layer_map.at([True] * 4)

    now = layer_map.at([False, True, True, True])

    moved = [now[i] for i, server in enumerate(home) if server == 0]
    assert set(moved) == {1, 2, 3}


def test_groups_and_diagonals_weigh_what_they_cost():
    specs = (
        LayerSpec("embedding", "embedding", 50_000, 64, bias=False, diagonal=True),
        LayerSpec("grouped", "conv2d", 9, 1, bias=False, groups=64),
        LayerSpec("linear", "linear", 320, 320, bias=False),
    )

    embedding, grouped, linear = LayerMap(specs, SERVERS[:2]).at([True, True])

    assert embedding == linear != grouped or embedding == grouped != linear
    assert linear != grouped
