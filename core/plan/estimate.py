"""Seconds and bytes of every stage of a run, from counted work and measured rates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from graphwright.ir.work import BACKWARD, FORWARD, DataSize, Load, Work

if TYPE_CHECKING:
    from graphwright.passes.base import Pass
    from graphwright.plan.rates import Rates
    from graphwright.specs.spec import Spec

CHECK_OF_EXACT = 3
"""Runs of a check of an exact pass, in those of a lossy one: inputs far from the examples too."""

REBUILT = 8.0
"""Bytes moved to rebuild a weight from codes, in those of the weight."""

LOWERED_COPIES = 7.0
"""Copies of the weights that are alive at the peak of lowering: the program's, the model's and
its serialized form, and of two sessions (with and without optimizations) the initializers and
what is packed of them."""

LOWERED_RUNS = 4.0
"""Runs of the artifact and of the program for every run of a check, while it is lowered."""


@dataclass(frozen=True)
class Step:
    """A stage of a run.

    Attributes:
        name: as in the report's `stages`: `0 quantize.int8` is the pass, `0 check` its check.
        seconds: estimated. peak_rss_bytes: of the process. disk_bytes: written, at most.
        part: of a model of several programs.
    """

    name: str
    seconds: float
    peak_rss_bytes: int
    disk_bytes: int = 0
    part: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


class Estimator:
    """Adds stages up, and follows what memory holds between them.

    Args:
        load: sizes of the program and its data.
        rates: of the machine.
        held: resident bytes now, the traced program among them.
        part: of the model.
    """

    def __init__(self, load: Load, rates: Rates, held: int, part: str = "") -> None:
        self.load, self.rates, self.part = load, rates, part
        self.held = float(held)
        self.made = 0.0
        self.steps: list[Step] = []

    def add(self, name: str, work: Work, *, seconds: float = 0.0) -> None:
        """A stage of this work, and of some seconds that do not depend on the model."""
        peak = self.held + self.made + work.memory
        took = self.rates.time(work) + seconds
        self.steps.append(Step(name, took, round(peak), round(work.disk), self.part))
        if work.kept:  # the weights before the pass go when it is done, but for the original's
            self.made = work.kept

    def make_data(self, section: Any, size: DataSize) -> None:
        """Data made of the model: as many forward and backward passes as there are iterations."""
        iterations = section.synthesis.iterations if section.synthesis is not None else 0
        work = self.load.forward(size).times((FORWARD + BACKWARD) * max(iterations, 1))
        self.add(section.source, work)

    def run_pass(self, index: int, step: Pass[Any]) -> None:
        """A pass, a checkpoint where it takes long, and the check."""
        work = step.cost(self.load)
        if self.rates.time(work) >= CHECKPOINT_SECONDS:
            work = replace(work, disk=work.disk + self.load.weight_bytes)
        self.add(f"{index} {step.id}", work)
        check = self.check()
        if step.contract != "lossy":
            check = check.times(CHECK_OF_EXACT)
        self.add(f"{index} check", check)

    def check(self) -> Work:
        """One run on all inputs of a check, with weights in codes rebuilt."""
        found = self.load.forward(self.load.checked)
        rebuilt = REBUILT * self.load.weight_bytes * self.load.checked.batches if self.made else 0.0
        return replace(found, moved=found.moved + rebuilt)

    def lower(self, backend: str) -> None:
        """Translation, and the checks of the artifact."""
        cost = self.rates.lowered.get(backend)
        runs = self.check().times(LOWERED_RUNS)
        size = self.load.weight_bytes
        memory = LOWERED_COPIES * size + (0.0 if cost is None else cost.memory)
        work = replace(runs, moved=runs.moved + LOWERED_COPIES * size * 2, memory=memory)
        seconds = 0.0 if cost is None else cost.first + cost.node * self.load.nodes
        self.add(backend, work, seconds=seconds)
        self.held += (0.0 if cost is None else cost.memory) + size


CHECKPOINT_SECONDS = 2.0
"""Seconds of work that a run saves; the default of `JobSettings.checkpoint_seconds`."""


def estimate(
    sums: Estimator, spec: Spec, passes: Sequence[Pass[Any]], evaluated: DataSize | None
) -> None:
    """Adds the stages behind reading of data, in the order in which they run.

    Args:
        sums: what they are added to.
        spec: backends and exports. passes: of its chain.
        evaluated: data of the evaluation.
    """
    from graphwright.job.latency import DEFAULT_BUDGET_S

    load, rates = sums.load, sums.rates
    sums.add("first run", sums.check())
    for index, step in enumerate(passes):
        sums.run_pass(index, step)
    for call in spec.lower:
        sums.lower(call.id)
    # codes are no more bytes than the weights that they stand for
    copies = len(spec.lower) or 1
    written = Work(disk=float(load.weight_bytes * copies), memory=2.0 * load.weight_bytes)
    sums.add("write", written)
    for export in spec.export:
        sums.add(f"export {export.id}", replace(written, disk=float(load.weight_bytes)))
    sums.add("fidelity", load.forward(load.measured))
    if evaluated is not None:
        sums.add("evaluate", load.forward(evaluated).times(2))
    least = rates.time(load.run.times(2 * LATENCY_CALLS))
    sums.add("latency", Work(), seconds=max(DEFAULT_BUDGET_S, least) if spec.lower else 0.0)
    # two counts of the program, and a run in which every layer is compared
    sums.add("report", load.run.times(2) + Work(edited=COUNTED * load.nodes))


COUNTED = 0.25
"""Nodes whose rewriting takes as long as to count one of both programs for the report."""

LATENCY_CALLS = 5
"""Calls of a model that latency takes at least: two that warm up, and three rounds."""


def total(steps: Iterable[Step]) -> tuple[float, int, int]:
    """Seconds, peak and bytes on disk of all stages together."""
    rows = list(steps)
    peak = max((row.peak_rss_bytes for row in rows), default=0)
    return sum(row.seconds for row in rows), peak, sum(row.disk_bytes for row in rows)
