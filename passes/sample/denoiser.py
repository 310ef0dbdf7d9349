"""sample.denoiser: says what a network's output means, and makes the pair (D, E) of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from graphwright.ir.errors import ModelError
from graphwright.ir.graft import graft
from graphwright.ir.options import Options
from graphwright.ir.program import Program
from graphwright.ir.sampling.diffusers import Scheduler, read_scheduler
from graphwright.ir.sampling.grid import Grid
from graphwright.ir.sampling.guidance import over
from graphwright.ir.sampling.parameterization import (
    Parameterization,
    canonical,
    check_pair,
    network_input,
)
from graphwright.ir.sampling.record import (
    ALPHA,
    DENOISED,
    FACT,
    JOINT_FACT,
    NOISE,
    PAIR,
    SIGMA,
)  # fmt: skip
from graphwright.ir.sampling.record import Denoiser as Record
from graphwright.ir.sampling.schedule import NoiseSchedule
from graphwright.ir.sampling.solvers.table import make_solver
from graphwright.ir.sampling.surgery import Interface, NewInput
from graphwright.ir.signature import TensorSpec
from graphwright.passes.base import Action, Context, Result
from graphwright.passes.sample._form.base import Named, Run, SamplePass
from graphwright.passes.sample._form.configuration import configuration


class DenoiserOptions(Options):
    """Options of sample.denoiser."""

    parameterization: Parameterization = "epsilon"
    """Meaning of the network's output: the noise, the data, v = a e - s x0, the score, the velocity
    e - x0 of a flow, or the raw network F behind edm's preconditioning."""

    schedule: NoiseSchedule = NoiseSchedule()
    """Levels of noise that it was trained on."""

    sigma_data: Annotated[float, Field(gt=0)] = 0.5
    """Of edm: standard deviation of the data."""

    scheduler: str | None = None
    """Path of a diffusers `scheduler_config.json`, which then says parameterization, schedule, grid
    and solver; `pipeline` is that of the pipeline's folder which the network came from."""

    sample: str | None = None
    """Input that is noisy; the first one when absent."""

    time: str | None = None
    """Input that says how noisy; the second one when absent."""

    conditions: tuple[str, ...] | None = None
    """Inputs that guidance leads by; all others when absent."""

    unconditional: dict[str, float] = Field(default_factory=dict)
    """By condition, the number that stands for none (the label that was put in the place of dropped
    ones in training). For a condition that is not named, sampling is given `negative_<name>`."""

    distilled: str | None = None
    """Of a network that was distilled from guided predictions: the condition that is their scale.
    Passes that guide by a prediction without the condition are then refused."""

    grid: Grid = Grid()
    """Levels of a trajectory that is told no others."""

    solver: str = "euler"
    """Solver of a trajectory that is told no other."""


class Denoiser(SamplePass[DenoiserOptions]):
    """Makes a denoiser of a network: declares what its output means and on which noise.

    The program behind it takes the network's inputs and the levels `alpha` and `sigma` of every
    sample, x = alpha x0 + sigma e, and returns `denoised`, the data D, and `noise`, the direction
    E, with x = alpha D + sigma E. All other passes of the family sample build on it, solvers walk
    by D and E alone, and lowering makes a bundle that samples by itself.

    Source: Karras et al. 2022, table 1, for edm; Salimans and Ho 2022, appendix D, for v.
    """

    def run(self, program: Program, context: Context) -> Result:
        """Adds the levels and the arithmetic.

        Raises:
            ModelError: an input is not there, or the output has not the sample's shape.
            ArgumentError: the parameterization has no form on this schedule.
        """
        said = _Said(self.options, context.folder, program)
        if Record.of(program) is not None:
            raise ModelError(f"{self.id}: the program is a denoiser already")
        record = self._record(program, said)
        edit = Interface(program, self.id)
        x = edit.input(record.sample)
        batch = edit.spec(record.sample).shape[0]
        rows = edit.example(record.sample).shape[0]
        kind, spread = record.parameterization, self.options.sigma_data
        pair = (2,) if PAIR in record.settings else ()  # each picture has its own level
        example = said.schedule.level(sum(said.schedule.ends()) / 2)
        levels = [
            edit.add_input(
                NewInput(TensorSpec(name, "float32", (batch, *pair), (0.25, 0.75)),
                         torch.full((rows, *pair), value)), x
            )
            for name, value in ((ALPHA, example.a), (SIGMA, example.s))
        ]  # fmt: skip
        if kind == "edm":
            readers = list(x.users)
            first = next(n for n in edit.editor.graph.nodes if n.op == "call_function")
            (scaled,) = graft(edit.editor, _NetworkInput(kind, spread), x, levels[1],
                              name="network_input", before=first)  # fmt: skip
            for reader in readers:
                reader.replace_input_with(x, scaled)
        (out,) = edit.outputs
        made = graft(edit.editor, _Pair(kind, spread), out, x, *levels, name="pair",
                     before=edit.output)  # fmt: skip
        shape = edit.spec(record.sample).shape
        edit.set_outputs([(n, m, shape) for n, m in zip((DENOISED, NOISE), made, strict=True)])
        edit.editor.facts[FACT] = record.to_json()
        text = f"{kind} on {said.schedule.kind}"
        return Result(edit.finish(), (Action("network", f"D and E of its {text}"),))

    def expected(self, after: Program, run: Run, given: Named) -> Mapping[str, Any]:
        """The formulas of table 1 on the network's own output."""
        record = Record.required(after, self.id)
        x = given[record.sample]
        a, s = (over(given[name], x) for name in (ALPHA, SIGMA))
        kind, spread = record.parameterization, record.sigma_data
        (out,) = run({**given, record.sample: network_input(kind, x, s, spread)}).values()
        return dict(zip((DENOISED, NOISE), canonical(kind, out, x, a, s, spread), strict=True))

    def _record(self, program: Program, said: _Said) -> Record:
        options = self.options
        names = [spec.name for spec in program.signature.inputs]
        joint = program.facts.get(JOINT_FACT, {})
        sample = options.sample or joint.get("sample", names[0])
        time = options.time or joint.get("time", names[1] if len(names) > 1 else None)
        rest = tuple(name for name in names if name not in (sample, time))
        conditions = rest if options.conditions is None else options.conditions
        asked = (sample, *conditions, *options.unconditional, *([time] if time else []))
        for name in asked:
            if name not in names:
                raise ModelError(f"{self.id}: the program has no input {name!r}, but {names}")
        for name in options.unconditional:
            if name not in conditions:
                raise ModelError(f"{self.id}: {name!r} of `unconditional` is no condition")
        if options.distilled is not None and options.distilled not in conditions:
            raise ModelError(f"{self.id}: {options.distilled!r} of `distilled` is no condition")
        _refuse_shape(program, sample, self.id)
        return Record(
            sample=sample, time=time,
            conditions={name: options.unconditional.get(name) for name in conditions},
            parameterization=said.parameterization,
            schedule=said.schedule.model_dump(mode="json"), sigma_data=options.sigma_data,
            grid=said.grid.model_dump(mode="json"), solver=said.solver,
            solver_options=said.solver_options, distilled=options.distilled,
            settings={PAIR: joint["names"]} if joint else {},
        )  # fmt: skip


def _refuse_shape(program: Program, sample: str, by: str) -> None:
    """The output is one tensor in the shape of the sample."""
    outputs = program.signature.outputs
    (wanted,) = (spec for spec in program.signature.inputs if spec.name == sample)
    if len(outputs) != 1:
        names = ", ".join(spec.name for spec in outputs)
        raise ModelError(f"{by}: a denoiser has one output, and this has {len(outputs)}: {names}")
    if outputs[0].shape != wanted.shape:
        raise ModelError(
            f"{by}: the output has the shape {outputs[0].shape}, the sample {sample!r} "
            f"{wanted.shape}",
            fix="A network that also gives a variance needs its second half of channels cut off.",
        )


class _Pair(nn.Module):
    """D and E of the network's output."""

    def __init__(self, parameterization: str, sigma_data: float) -> None:
        super().__init__()
        self.kind, self.sigma_data = parameterization, sigma_data

    def forward(self, out: Tensor, x: Tensor, a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """(D, E); out and x [batch, ...], a and s [batch]."""
        made = canonical(self.kind, out, x, over(a, x), over(s, x), self.sigma_data)
        # a clone where one is the output itself: outputs are tensors of their own
        first, second = (part.clone() if part is out else part for part in made)
        return first, second


class _NetworkInput(nn.Module):
    """What the network reads in the place of the sample."""

    def __init__(self, parameterization: str, sigma_data: float) -> None:
        super().__init__()
        self.kind, self.sigma_data = parameterization, sigma_data

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        """x [batch, ...], s [batch]."""
        made: Tensor = network_input(self.kind, x, over(s, x), self.sigma_data)
        return made


class _Said:
    """The options, with what a scheduler's configuration says in their place."""

    def __init__(self, options: DenoiserOptions, folder: Path, program: Program) -> None:
        read: Scheduler | None = None
        if options.scheduler is not None:
            read = read_scheduler(configuration("scheduler", options.scheduler, folder, program))
        self.parameterization = read.parameterization if read else options.parameterization
        self.schedule = read.schedule if read else options.schedule
        self.grid = read.grid if read else options.grid
        self.solver = read.solver if read else options.solver
        self.solver_options = dict(read.options) if read else {}
        check_pair(self.parameterization, self.schedule)
        make_solver(self.solver, **self.solver_options)
