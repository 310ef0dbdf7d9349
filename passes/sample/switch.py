"""sample.switch: a small network for the first steps of a trajectory, the own one behind (P21)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field

from graphwright.ir.check.precision import run_in_double
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.files.archive import load_program
from graphwright.ir.options import Options
from graphwright.ir.program import Program
from graphwright.ir.sampling.beside import put_beside
from graphwright.ir.sampling.record import FACT, Denoiser, refuse_stream
from graphwright.ir.sampling.variants import SWITCH, networks
from graphwright.passes.base import Action, Context, Result, find_pass
from graphwright.passes.sample._form.base import Named, Run, SamplePass
from graphwright.passes.sample._form.guider import GUIDERS

NOT_SHARED = ("parameterization", "sigma_data", "cached", "settings", "grid", "solver",
              "solver_options")  # fmt: skip
"""What the two denoisers may differ in; grid and solver are those of the program."""


OF_ONE_NETWORK = ("sample.reuse", "sample.retrieve")
"""Passes that the other network does not go through."""


class SwitchOptions(Options):
    """Options of sample.switch."""

    network: Annotated[str, Field(examples=["small.pt2"])]
    """File of the other network: a program saved by `program.save`. A plain network goes through
    the passes of sample that this one went through; one that is a denoiser already is taken as it
    is."""

    until: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of the steps, the noisiest ones, that the other network takes."""


class Switch(SamplePass[SwitchOptions]):
    """Lets another network take the first steps of a trajectory.

    A small network is enough for the noisy steps, where the layout of a picture is decided; the
    own one does the details. Both have the same inputs, noise levels and guidance, so the solver
    and its history go from one to the other as if there were one. A bundle has the programs of
    both; a step asks one of them.

    Source: P21 (A-SDM), its sampling by several U-Nets. Its small U-Net, assembled and trained by
    distillation, is what the file brings; the share of the steps is a choice of the user.
    """

    papers = ("P21",)
    behind: ClassVar[tuple[str, ...]] = ("sample.denoiser",)
    after: ClassVar[tuple[str, ...]] = (*SamplePass.after, *GUIDERS, "sample.reuse")
    conflicts: ClassVar[tuple[str, ...]] = (
        "sample.linear_guidance", "sample.stream", "sample.switch",
    )  # fmt: skip

    def run(self, program: Program, context: Context) -> Result:
        """Puts the other denoiser beside this one.

        Raises:
            ArgumentError: no program can be read from the file.
            ModelError: the two are no denoisers of one trajectory.
        """
        record = Denoiser.required(program, self.id)
        refuse_stream(record, self.id)
        path = context.folder / self.options.network
        if not path.is_file():
            raise ArgumentError(f"{self.id}: there is no file of the other network",
                                where=str(path))  # fmt: skip
        other = self._denoiser(load_program(path), program, context)
        theirs = Denoiser.required(other, self.id)
        _refuse(record, theirs, self.id)
        made = put_beside(program, other, SWITCH, self.id)
        switch = {"until": self.options.until, "record": theirs.to_json()}
        facts = record.replace(settings={**record.settings, SWITCH: switch}).to_json()
        share = _weights(other) / max(_weights(program), 1)
        text = f"steps up to {self.options.until:g} by {Path(self.options.network).name}"
        return Result(
            made.replace(facts={**made.facts, FACT: facts}), (Action("denoiser", text),),
            {"weights of the other network, share": share},
        )  # fmt: skip

    def expected(self, after: Program, run: Run, given: Named) -> Mapping[str, Any]:
        """The program before, and the other one by itself."""
        _, other = networks(after)
        inputs = tuple(given[spec.name] for spec in other.signature.inputs)
        wide = given[Denoiser.required(after, self.id).sample].dtype == torch.float64
        found = run_in_double(other, inputs) if wide else other.run_flat(inputs)
        names = [f"{SWITCH}_{spec.name}" for spec in other.signature.outputs]
        return {**run(given), **dict(zip(names, found, strict=True))}

    def _denoiser(self, other: Program, program: Program, context: Context) -> Program:
        """The other network behind the passes of sample that this one went through."""
        if Denoiser.of(other) is not None:
            return other
        for done in program.provenance:
            if done.id.startswith("sample.") and done.id not in OF_ONE_NETWORK:
                other = find_pass(done.id)(**done.options).execute(other, context).program
        return other


def _refuse(own: Denoiser, other: Denoiser, by: str) -> None:
    if other.cached or other.settings:
        raise ModelError(
            f"{by}: steps of the other network differ among themselves",
            fix="Save it behind `sample.denoiser` and guidance alone.",
        )
    mine, theirs = own.to_json(), other.to_json()
    different = [n for n in mine if n not in NOT_SHARED and mine[n] != theirs[n]]
    if different:
        name = different[0]
        raise ModelError(
            f"{by}: {name} of the two denoisers differs, so one trajectory cannot go through both",
            details=(f"here:  {mine[name]}", f"there: {theirs[name]}"),
        )


def _weights(program: Program) -> int:
    return sum(tensor.numel() for tensor in program.state.values())
