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
    _check_count(wanted, noise)
    for place, tensor in enumerate(noise):
        if tensor.shape != x.shape:
            raise ArgumentError(
                f"noise {place} has the shape {tuple(tensor.shape)}, the sample {tuple(x.shape)}"
            )


def noise_of_steps(
    x: Tensor,
    steps: int,
    solver: Solver,
    latent: int,
    given: Sequence[Tensor] | None,
    seed: int | None,
) -> Sequence[Tensor]:
    """The noise of a whole trajectory: that which is given, or drawn by a seed.

    Args:
        x: the sample, [batch, ...].
        steps: their number.
        solver: says how many tensors a step uses.
        latent: size of the latent behind those of every step; 0 for none.
        given: tensors in the order of use.
        seed: in their place.

    Raises:
        ArgumentError: neither is there and noise is needed; another number of tensors, or of
            another shape.
    """
    each = solver.draws + bool(latent)
    if given is None and each:
        if seed is None:
            raise ArgumentError(
                f"the solver puts in fresh noise, {steps * each} tensors in all",
                fix="Give `step_noise`, or a `seed` to draw it by.",
            )
        given = draw_noise(x, steps, solver, seed, latent)
    found = given or ()
    _check_count(steps * each, found)
    for drawn in shares(found, steps, each):
        check_noise(x, solver.draws, split_latent(x, drawn, latent)[0])
    return found


def _check_count(wanted: int, noise: Sequence[Tensor]) -> None:
    if len(noise) != wanted:
        raise ArgumentError(
            f"the steps use {wanted} tensors of noise, and {len(noise)} are given",
            fix="Draw them with `draw_noise`, or choose a solver without fresh noise (eta = 0).",
        )


def split_latent(
    x: Tensor, noise: Sequence[Tensor], size: int
) -> tuple[Sequence[Tensor], Tensor | None]:
    """The noise of a step's solver, and the latent of its calls, which is the last tensor.

    Args:
        x: the sample, [batch, ...].
        noise: of one step.
        size: of the latent; 0 where there is none.

    Raises:
        ArgumentError: the latent is missing, or of another shape.
    """
    if not size:
        return noise, None
    shape = tuple(noise[-1].shape) if noise else ()
    if shape != (len(x), size):
        raise ArgumentError(
            f"the latent has the shape {shape}, and ({len(x)}, {size}) is wanted",
            fix="Give it as the last tensor of the noise of every step.",
        )
    return noise[:-1], noise[-1]


def draw_noise(x: Tensor, steps: int, solver: Solver, seed: int, latent: int = 0) -> list[Tensor]:
    """The noise that `steps` steps use: the same for the same seed.

    Args:
        x: the sample, [batch, ...].
        steps: their number.
        solver: says how many tensors it uses.
        seed: of the noise.
        latent: size of the latent behind the solver's tensors of every step; 0 for none.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = [x.shape] * solver.draws + [torch.Size((len(x), latent))] * (latent > 0)
    return [
        torch.randn(shape, generator=generator, dtype=x.dtype).to(x.device)
        for _ in range(steps)
        for shape in shapes
    ]
