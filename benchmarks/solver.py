"""Times the solver: against its bare products, and against dense inversion.

One thread, or a GPU with `--device cuda`, whose own copies the products and the dense
inversion use, while the solver's rows come from the host and its inverses go there.
`ratio_to_products` is a batch of tasks through `Solver.solve`, from float32 rows to
checked float32 inverses, over nothing but the Gram products and triangular solves that
it cannot do without, written plainly on float64 copies of the same rows.
`ratio_to_fastest_products` has products with explicit inverses of the triangles in
place of the solves. `ratio_to_plain` is over all operations that the solver cannot do
without, each in one line for these shapes, on the CPU: what tasks, settings, histories
and checks of the condition cost; `plain_to_products` is of these to the products.
`speedup_over_dense` is per factor, over the Cholesky inversion of the d × d factor in
float32, `speedup_over_dense_float64` over the same in the precision of the solver's
products, and `speedup_over_inv` over `torch.linalg.inv` in float32. All take turns;
figures are medians over the rounds.
"""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.speed.costs import Job, side_flops
from benchmarks.speed.turns import Times, hardware, time_in_turns
from skfac.curvature.settings import CurvatureSettings
from skfac.service.assembler import Assembly
from skfac.service.scheduler import Task
from skfac.service.solver import Solution, Solver
from skfac.wire.allocator import keep_large_blocks, share_one_arena
from skfac.wire.outcome import Version
from skfac.wire.session import LayerSpec, SessionSpec
from skfac.wire.snapshot import LayerRows

DAMPING = 0.1
PLOTTED_DIMS = (512, 1024, 2048, 4096)


@dataclass(frozen=True, eq=False)
class Factors:
    """The same factors in each form that is timed.

    Attributes:
        tasks: Two factors each, of float32 rows.
        rows: Float64 copies of them.
        cholesky: Of a damped Gram matrix.
        inverse: Of `cholesky`.
        kept: The batch that was solved last, as a server keeps it for its subscribers.
        kept_plainly: The same without what says what it is.
    """

    tasks: list[Task]
    rows: list[Tensor]
    cholesky: Tensor
    inverse: Tensor
    kept: list[list[Solution]] = field(default_factory=list)
    kept_plainly: list[Tensor] = field(default_factory=list)
    device: str = "cpu"

    @classmethod
    def draw(cls, dim: int, rows: int, count: int, device: str) -> "Factors":
        """Draw normal rows.

        Returns:
            As many factors, two of each layer.
        """
        layers = tuple(
            LayerSpec(str(i), "linear", dim, dim, False) for i in range(count // 2)
        )
        spec = SessionSpec(
            job="benchmark",
            instance="",
            world_size=1,
            layers=layers,
            damping_split="pi",
            history="snapshot",
            update_every=1,
            lag=1,
            on_late="keep",
        )
        tasks = []
        for index in range(len(layers)):
            activations, derivatives = torch.randn(2, rows, dim)
            if device != "cpu":  # as a server with a GPU receives them
                activations = activations.pin_memory()
                derivatives = derivatives.pin_memory()
            drawn = LayerRows(index, activations, derivatives)
            settings = CurvatureSettings(damping=DAMPING)
            assembly = Assembly(index, 0, 0.0, {0: drawn}, {0: settings})
            tasks.append(Task(spec.job, spec, assembly, 0.0))
        taken = [task.assembly.rows[0] for task in tasks]
        sides = [t for r in taken for t in (r.activations, r.derivatives)]
        copies = [side.to(device, torch.float64) for side in sides]
        gram = copies[0] @ copies[0].T / rows
        gram.diagonal().add_(DAMPING**0.5)
        cholesky = torch.linalg.cholesky(gram)
        inverse = torch.linalg.inv(cholesky)
        return cls(tasks, copies, cholesky, inverse, device=device)

    def solve(self) -> None:
        """Solve the batch."""
        solutions = Solver(self.device).solve(self.tasks)
        assert all(isinstance(solution.outcome, Version) for solution in solutions)
        self.kept[:] = [solutions]

    def products(self) -> None:
        """Multiply and solve, plainly."""
        for rows in self.rows:
            _ = rows @ rows.T
            torch.linalg.solve_triangular(self.cholesky, rows, upper=False)

    def plain(self) -> None:
        """Do what the solver does to each factor, and nothing else."""
        taken = [task.assembly.rows[0] for task in self.tasks]
        self.kept_plainly[:] = [
            _inverted_plainly(side)
            for rows in taken
            for side in (rows.activations, rows.derivatives)
        ]

    def fastest_products(self) -> None:
        """Multiply alone."""
        for rows in self.rows:
            _ = rows @ rows.T
            _ = self.inverse @ rows

    def dense(self, dtype: torch.dtype = torch.float32) -> None:
        """Invert one factor as a whole, the fastest way that torch has."""
        torch.cholesky_inverse(torch.linalg.cholesky(self._damped_factor(dtype)))

    def dense_inv(self) -> None:
        """Invert one factor as a whole, as most do."""
        torch.linalg.inv(self._damped_factor(torch.float32))

    def _damped_factor(self, dtype: torch.dtype) -> Tensor:
        rows = self.rows[0].to(dtype)
        factor = rows.T @ rows / len(rows)
        factor.diagonal().add_(DAMPING**0.5)
        return factor


def _inverted_plainly(rows: Tensor) -> Tensor:
    wide = rows.double()
    norm = float(torch.linalg.vector_norm(wide))  # of which the damping is a part
    damped = wide @ wide.mT
    damped.diagonal().add_(len(rows) * DAMPING**0.5)
    cholesky, minor = torch.linalg.cholesky_ex(damped)
    identity = torch.eye(len(rows), dtype=wide.dtype)
    root = torch.linalg.solve_triangular(cholesky, identity, upper=False)
    found: Tensor = (root @ wide).float()
    assert int(minor) == 0
    assert math.isfinite(norm + float(found.sum()))
    return found


def measure(
    dim: int, rows: int, count: int, rounds: int, device: str
) -> dict[str, Any]:
    """Time one size.

    Returns:
        Figures by name.
    """
    factors = Factors.draw(dim, rows, count, device)
    bodies: dict[str, Callable[[], None]] = {
        "solver": factors.solve,
        "products": factors.products,
        "fastest": factors.fastest_products,
        "dense": factors.dense,
        "dense float64": partial(factors.dense, torch.float64),
        "inv": factors.dense_inv,
    }
    if device == "cpu":
        bodies["plain"] = factors.plain
    else:
        bodies = {name: partial(_until_done, body) for name, body in bodies.items()}
    times = time_in_turns(bodies, rounds=rounds, repeats=1)
    solver = times["solver"]
    return {
        "dim": dim,
        "rows": rows,
        "factors": count,
        "rounds": rounds,
        "hardware": hardware(device),
        "gflops": round(count * _flops(dim, rows) / solver.median_s / 1e9, 1),
        "solver_ms": round(1000 * solver.median_s, 3),
        "factor_ms": round(1000 * solver.median_s / count, 4),
        "dense_factor_ms": round(1000 * times["dense"].median_s, 3),
        "ratio_to_products": round(solver.ratio_to(times["products"]), 3),
        **_beside_plain(times),
        "ratio_to_fastest_products": round(solver.ratio_to(times["fastest"]), 3),
        "speedup_over_dense": round(count * times["dense"].ratio_to(solver), 1),
        "speedup_over_dense_float64": round(
            count * times["dense float64"].ratio_to(solver), 1
        ),
        "speedup_over_inv": round(count * times["inv"].ratio_to(solver), 1),
    }


def _beside_plain(times: dict[str, Times]) -> dict[str, float]:
    if "plain" not in times:
        return {}
    plain = times["plain"]
    return {
        "ratio_to_plain": round(times["solver"].ratio_to(plain), 3),
        "plain_to_products": round(plain.ratio_to(times["products"]), 3),
    }


def _until_done(body: Callable[[], None]) -> None:
    body()
    torch.cuda.synchronize()


def _flops(dim: int, rows: int) -> float:
    job = Job(layers=(), ranks=1, rows=rows, cap=None, update_every=1, step_s=1.0)
    return side_flops(job, dim)


def draw(found: list[dict[str, Any]], plot: Path) -> None:
    """Draw ratios and times against the size of the factors."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    dims = [one["dim"] for one in found]
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(9, 3.5), layout="constrained"
    )
    for name in ("ratio_to_products", "ratio_to_fastest_products"):
        left.plot(dims, [one[name] for one in found], "o-", label=name)
    left.axhline(1.0, color="grey", linewidth=0.8)
    left.set(xscale="log", xlabel="d", ylabel="ratio", ylim=(0, None))
    for name in ("factor_ms", "dense_factor_ms"):
        right.plot(dims, [one[name] for one in found], "o-", label=name)
    right.set(xscale="log", yscale="log", xlabel="d", ylabel="ms a factor")
    for axes in (left, right):
        axes.set_xticks(dims, [f"{dim:g}" for dim in dims])
        axes.minorticks_off()
        axes.legend()
    figure.savefig(plot, dpi=120)


def main(
    dim: Annotated[int, typer.Option(min=2, help="Size d of a factor.")] = 2048,
    rows: Annotated[int, typer.Option(min=1, help="Rows n of a factor.")] = 64,
    factors: Annotated[int, typer.Option(min=2, help="Factors of a batch.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each.")] = 7,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    plot: Annotated[
        Path | None, typer.Option(help=f"PNG of d = {PLOTTED_DIMS} and --dim.")
    ] = None,
) -> None:
    """Time a batch of factors, and print one JSON object for each size."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    share_one_arena()  # as a server does
    keep_large_blocks()
    others = [one for one in PLOTTED_DIMS if one != dim] if plot else []
    found = []
    for size in (*others, dim):
        found.append(measure(size, rows, factors, rounds, device))
        print(json.dumps(found[-1]), flush=True)
    if plot:
        draw(sorted(found, key=lambda one: one["dim"]), plot)


if __name__ == "__main__":
    typer.run(main)
