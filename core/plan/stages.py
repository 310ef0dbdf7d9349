"""The stages of a program's run, estimated when it is traced and its data opened."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from graphwright.plan.estimate import Estimator, Step, estimate

if TYPE_CHECKING:
    from graphwright.ir.program import Program
    from graphwright.job.run import Run
    from graphwright.plan.rates import Rates
    from graphwright.specs.spec import Spec


def estimated(run: Run, program: Program, data: Mapping[str, Any]) -> list[Step]:
    """The plan of a run on its way; nothing in a process that only helps, or without rates.

    A pass whose cost cannot be told is no reason for a run to fail: then a warning says why there
    are no estimates.
    """
    if not run.place.is_main:
        return []
    from graphwright.plan.rates import measured_rates

    with run.stage("estimate"):
        found = measured_rates(run.settings.device, run.progress.note)
        if found is None:
            return []
        try:
            return planned(run, program, data, found)
        except Exception as error:  # a pass of the user's own raises anything
            run.warn(f"nothing is estimated: {type(error).__name__}: {error}")
            return []


def planned(run: Run, program: Program, data: Mapping[str, Any], rates: Rates) -> list[Step]:
    """The stages behind tracing and reading of data.

    Args:
        run: with the spec, and the name of the part.
        program: as traced.
        data: opened, by name of the spec's section; what is still to be made is not there.
        rates: of the machine.
    """
    from graphwright.job.chain import CHECK_BATCHES
    from graphwright.job.memory import resident_bytes
    from graphwright.passes.base import find_pass
    from graphwright.plan.facts import data_size, load_of, made_size

    sizes = {name: data_size(program, batches) for name, batches in data.items()}
    made = [name for name in ("calibration", "training") if is_made(run.spec, name)]
    sizes |= {name: made_size(program, getattr(run.spec, name)) for name in made}
    load = load_of(program, sizes.get("calibration"), sizes.get("training"), CHECK_BATCHES)
    passes = [find_pass(call.id)(**call.options) for call in run.spec.passes]
    sums = Estimator(load, rates, resident_bytes(), run.part)
    for name in made:
        if data.get(name) is None:
            section = getattr(run.spec, name)
            sums.make_data(section, made_size(program, section))
    estimate(sums, run.spec, passes, sizes.get("evaluate"))
    return sums.steps


def is_made(spec: Spec, name: str) -> bool:
    """Whether the data of a section is made of the model."""
    return getattr(getattr(spec, name), "source", None) is not None
