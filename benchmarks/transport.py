"""How fast tensors go both ways, beside what the machine could do.

    python benchmarks/transport.py [--mib 4] [--total 256] [--rounds 5] [--plot FILE]

The trainer has the first core and the server the last. All measures take turns, and
each ratio is the median over the rounds of the ratio within a round, so that whatever
slows the machine slows both. What is measured is the product: the client's transport
on this side, the real server on the other, with an engine that answers at once.

The last line is one JSON object; a ratio without a direction is the lower of both.

memcpy   one copy of the same size from memory to memory
tcp      a loopback socket with the kernel's default congestion control, and with
         cubic: 4 MiB a call, received into memory that is there
naive    a unary call with a protobuf message for each tensor
bare     a stream of messages as large as ours that are ready, and that nobody reads:
         as fast as stock gRPC gets in Python, whatever is built on it
inline   `PushSnapshots` and `StreamPreconditioners` in frames
packed   the same, with tensors of 64 KiB
shm      the same, through shared memory; rows are there already, inverses are copied
         in by the server and out by the client

Where the time of inline tensors goes, by `perf` in the process that receives, which is
the slower one (0.58 CPU s/GB, 4 MiB, grpcio 1.85): 50 % copying in libc, two of three
times in gRPC's Python layer (slices to bytearray to bytes) and once into the tensor;
28 % the kernel, mostly its copy out of the socket; 9 % the checksum; 8 % the
interpreter. Packed tensors add 5 to 12 μs of Python to each at either end. What comes
down through shared memory is copied twice, on both cores at once, which copy half as
fast then; so it is written where it was read last, and stays in the cache.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.data_plane.trainer import Link, Load, bare, memcpy, naive, peer, tcp
from benchmarks.speed.turns import Times, time_in_turns

MiB = 1024 * 1024
PACKED_BYTES = 64 * 1024
DIRECTIONS = ("up", "down")
RATIOS = {
    "inline_ratio_to_tcp": ("inline", "tcp_default"),
    "inline_over_naive": ("inline", "naive"),
    "packed_ratio_to_tcp": ("packed", "tcp_default"),
    "bare_ratio_to_tcp": ("bare", "tcp_default"),
    "inline_ratio_to_bare": ("inline", "bare"),
    "packed_ratio_to_bare": ("packed", "bare"),
    "shm_ratio_to_memcpy": ("shm", "memcpy"),
    "shm_ratio_to_tcp_cubic": ("shm", "tcp_cubic"),
}


def measure(load: Load, packed: Load, rounds: int) -> dict[str, object]:
    """Run everything.

    Returns:
        What is printed.
    """
    links: list[Link] = []

    def link(carried: Load, *, up: bool, shared: bool = False) -> Callable[[], None]:
        links.append(Link(addresses["skfac"], carried, up=up, shared=shared))
        return links[-1].exchange

    with peer() as addresses:
        bodies = {"memcpy": memcpy(load.nbytes)}
        for way in DIRECTIONS:
            up = way == "up"
            for name, congestion in (("tcp_default", ""), ("tcp_cubic", "cubic")):
                body = tcp(addresses[name], congestion, load.nbytes, up=up)
                bodies[f"{name} {way}"] = body
            bodies[f"naive {way}"] = naive(addresses["naive"], load, up=up)
            bodies[f"bare {way}"] = bare(addresses["bare"], load.nbytes, up=up)
            bodies[f"inline {way}"] = link(load, up=up)
            bodies[f"packed {way}"] = link(packed, up=up)
            bodies[f"shm {way}"] = link(load, up=up, shared=True)
        times = time_in_turns(bodies, rounds=rounds, repeats=3)
        rows_up = links[2]
        cpu_s = rows_up.capture_cpu_s(3 * rounds)
        for each in links:
            each.transport.close()
    return {
        **_ratios(times),
        "capture_cpu_s_per_gb": round(cpu_s, 4),
        "gb_per_s": {
            name: round(load.nbytes / 1e9 / taken.median_s, 2)
            for name, taken in times.items()
        },
        "load_average": round(os.getloadavg()[0], 1),
    }


def _ratios(times: dict[str, Times]) -> dict[str, float]:
    found: dict[str, float] = {}
    for key, (name, reference) in RATIOS.items():
        both = []
        for way in DIRECTIONS:
            other = times.get(f"{reference} {way}") or times[reference]
            both.append(round(1 / times[f"{name} {way}"].ratio_to(other), 3))
            found[f"{key}_{way}"] = both[-1]
        found[key] = min(both)
    return found


def plot(found: dict[str, float], file: Path) -> None:
    """Draw the throughputs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.2), layout="constrained")
    names = list(dict.fromkeys(name.split()[0] for name in found))
    for offset, way in ((-0.2, "up"), (0.2, "down")):
        values = [found.get(f"{name} {way}", found.get(name, 0.0)) for name in names]
        places = [index + offset for index in range(len(names))]
        axes.bar(places, values, width=0.38, label=way)
    axes.set_xticks(range(len(names)), [name.replace("_", "\n") for name in names])
    axes.set_ylabel("GB/s")
    axes.legend()
    figure.savefig(file, dpi=150)


def main() -> None:
    """Measure, and print one JSON object last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=float, default=4.0, help="of one tensor")
    parser.add_argument("--total", type=int, default=256, help="MiB of one exchange")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--short", action="store_true", help="seconds, for CI")
    parser.add_argument("--plot", type=Path, help="PNG file of the throughputs")
    options = parser.parse_args()
    if options.short:
        options.total, options.rounds = 8, 1
    total = options.total * MiB
    load = Load.of(int(options.mib * MiB), total)
    packed = Load.of(PACKED_BYTES, load.nbytes)
    found = measure(load, packed, options.rounds)
    speeds = found["gb_per_s"]
    assert isinstance(speeds, dict)
    for name, value in speeds.items():
        print(f"{name:18} {value:6.2f} GB/s")
    if options.plot is not None:
        plot(speeds, options.plot)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
