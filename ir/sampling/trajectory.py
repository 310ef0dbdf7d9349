"""The loop of a trajectory: levels, noise and state through the steps of a solver."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from graphwright.ir.errors import ArgumentError
from graphwright.ir.sampling.solvers.base import Denoise, Path, Solver, State

Watch = Callable[[int, Tensor], None]
"""Called with the number of a finished step and the sample behind it."""


def trajectory(
    denoise: Denoise,
    x: Tensor,
    path: Path,
    solver: Solver,
    noise: Sequence[Tensor] = (),
    watch: Watch | None = None,
) -> Tensor:
    """The sample at the end of a path.

    Args:
        denoise: the guided denoiser.
        x: the sample at the first level, [batch, ...].
        path: its levels.
        solver: of the steps.
        noise: `solver.draws` tensors per step in the shape of x, in the order of use.
        watch: told of every step.

    Raises:
        ArgumentError: too little noise, or of another shape.
    """
    check_noise(x, path.steps * solver.draws, noise)
    state: State = {}
    for i, drawn in enumerate(shares(noise, path.steps, solver.draws)):
        x, state = solver.step(denoise, x, path, i, state, drawn)
        if watch is not None:
            watch(i, x)
    return x


def shares(noise: Sequence[Tensor], steps: int, each: int) -> Iterator[list[Tensor]]:
    """The noise of every step."""
    for i in range(steps):
        yield list(noise[i * each : (i + 1) * each])


def check_noise(x: Tensor, wanted: int, noise: Sequence[Tensor]) -> None:
    """Refuses noise that is not what the steps use.

    Raises:
        ArgumentError: another number of tensors, or of another shape.
    """
    if len(noise) != wanted:
        raise ArgumentError(
            f"the steps use {wanted} tensors of noise, and {len(noise)} are given",
            fix="Draw them with `draw_noise`, or choose a solver without fresh noise (eta = 0).",
        )
    for place, tensor in enumerate(noise):
        if tensor.shape != x.shape:
            raise ArgumentError(
                f"noise {place} has the shape {tuple(tensor.shape)}, the sample {tuple(x.shape)}"
            )


def draw_noise(x: Tensor, steps: int, solver: Solver, seed: int) -> list[Tensor]:
    """The noise that `steps` steps use: the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
        for _ in range(steps * solver.draws)
    ]
