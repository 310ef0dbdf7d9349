"""Runs a fresh program against its model, at the example's sizes and at others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from graphwright.ir.check.fidelity import compare
from graphwright.ir.graph.random import named, random_nodes
from graphwright.ir.program import Program
from graphwright.ir.signature import DimRange
from graphwright.ir.trace.assemble import output_names
from graphwright.ir.trace.calling import FlatModel
from graphwright.ir.trace.dims import Dynamic, example_sizes, resized
from graphwright.ir.trace.guards import Guard
from graphwright.ir.trace.narrowing import narrowed, violations
from graphwright.ir.trace.prepare import quiet
from graphwright.ir.trace.probes import Budget, probes
from graphwright.ir.trace.untouched import untouched

TOLERANCE = 1e-4
"""Relative error that still counts as rounding: the same operations, other kernels and orders."""

CLOSE = 8
"""Sizes below a lower end that are all tried."""

AS_NUMBER = "the model computes with it as a number"


@dataclass
class Verdict:
    """The result of runs: dimensions to fix, ranges to narrow, notes for the user."""

    fixed: set[str] = field(default_factory=set)
    ranges: dict[str, DimRange] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    differs: bool = False
    """Whether program and model differ on the example inputs."""


def check_against_model(
    program: Program,
    flat: FlatModel,
    dynamic: Dynamic,
    guards: Sequence[Guard],
    asked: Mapping[str, DimRange],
) -> Verdict:
    """Compares outputs at the example's sizes, where a guard does not hold, and at other sizes."""
    verdict = Verdict()
    agreed = _agree(program, flat, flat.inputs)
    if agreed is False:
        if _agree_with_itself(flat):
            return Verdict(differs=True)
        verdict.notes.append(f"the model gives other results on every call{_drawn(program)}")
        return verdict
    checker = _SizeChecker(program, flat, dynamic, verdict)
    checker.try_below(asked)
    checker.try_guards(guards)
    if not verdict.fixed:
        checker.try_sizes()
    if not verdict.fixed:
        checker.try_one()
        checker.try_none()
    return verdict


def agrees(program: Program, flat: FlatModel) -> bool:
    """Whether program and model agree on the example inputs."""
    return _agree(program, flat, flat.inputs) is True


def _drawn(program: Program) -> str:
    """A note that names the calls that draw random numbers, and says that nothing was compared."""
    nodes = random_nodes(program.graph)
    if not nodes:
        return "; it was not compared"
    return f": {named(nodes)} random numbers; it was not compared"


def batch_axes(flat: FlatModel) -> Dynamic:
    """The first axis of every input, as the dimension `batch`; empty when that cannot be free.

    It can when all inputs agree in it, the model runs with one more, and the outputs grow.
    """
    sizes = {t.shape[0] for t in flat.inputs.values() if t.dim() > 0}
    if len(sizes) != 1:
        return {}
    axes = {name: {0: "batch"} for name, t in flat.inputs.items() if t.dim() > 0}
    (size,) = sizes
    try:
        before = flat.run(*flat.inputs.values())
        after = flat.run(*resized(flat.inputs, axes, {"batch": size + 1}).values())
    except Exception:
        return {}
    grew = any(a.shape != b.shape for a, b in zip(before, after, strict=True))
    return axes if grew else {}


def apply_guards(
    guards: Sequence[Guard], example: Mapping[str, int], ranges: Mapping[str, DimRange]
) -> Verdict:
    """Takes every guard of the model's code at its word, where nothing is run."""
    verdict = Verdict(ranges=dict(ranges))
    for guard in guards:
        if guard.by_model and violations(guard, example, verdict.ranges):
            _narrow(verdict, guard, example)
    return verdict


def narrowed_by_torch(
    guards: Sequence[Guard],
    example: Mapping[str, int],
    asked: Mapping[str, DimRange],
    found: Mapping[str, DimRange],
) -> list[str]:
    """Notes on the branches that torch itself has turned into ranges."""
    notes = []
    for guard in guards:
        if guard.by_model and len(guard.dims) == 1 and guard.dims[0] in found:
            (dim,) = guard.dims
            wide = {dim: asked.get(dim, DimRange())}
            if violations(guard, example, wide) and not violations(guard, example, found):
                notes.append(_said(guard, dim, _extent(found[dim])))
    return notes


def _extent(bounds: DimRange) -> str:
    if bounds.min == bounds.max:
        return f"fixed at {bounds.min}"
    if bounds.max is None:
        return f"{bounds.min} or more"
    return f"{bounds.min} to {bounds.max}"


def _said(guard: Guard, dim: str, extent: str) -> str:
    return (
        f"dimension {dim!r} is {extent}: {guard.place}: {AS_NUMBER}, and the trace holds where "
        f"{guard.text}"
    )


def _narrow(verdict: Verdict, guard: Guard, example: Mapping[str, int]) -> None:
    for dim, bounds in narrowed(guard, example, verdict.ranges).items():
        known = verdict.ranges[dim]
        if bounds == known:
            continue
        verdict.ranges[dim] = bounds
        if bounds.min == bounds.max:
            verdict.fixed.add(dim)
        verdict.notes.append(_said(guard, dim, _extent(bounds)))


class _SizeChecker:
    """Tries sizes, each once; writes down in a verdict what they teach."""

    def __init__(
        self, program: Program, flat: FlatModel, dynamic: Dynamic, verdict: Verdict
    ) -> None:
        self.program, self.flat, self.dynamic, self.verdict = program, flat, dynamic, verdict
        # sizes that follow from others are not chosen
        sizes = example_sizes(flat.inputs, dynamic)
        self.example = {dim: n for dim, n in sizes.items() if dim not in flat.derived.sums}
        verdict.ranges.update({dim: program.signature.dims[dim] for dim in self.example})
        weights = sum(t.numel() for t in program.state.values())
        self.budget = Budget(flat.inputs, dynamic, self.example, weights, flat.derived)
        self.known: dict[tuple[tuple[str, int], ...], bool | None] = {}

    def agree(self, sizes: Mapping[str, int]) -> bool | None:
        """Whether program and model agree; None where the model refuses these sizes."""
        key = tuple(sorted(sizes.items()))
        if key not in self.known:
            full = self.flat.derived.completed({**self.example, **sizes})
            inputs = resized(self.flat.inputs, self.dynamic, full)
            self.known[key] = _agree(self.program, self.flat, inputs)
        return self.known[key]

    # ---- guards

    def try_below(self, asked: Mapping[str, DimRange]) -> None:
        """Takes back lower ends that torch asked for and the model does not.

        An operator's shape rule often holds from some size on, and the operator at all sizes.
        """
        for dim, found in self.verdict.ranges.items():
            least, low = asked.get(dim, DimRange()).min, found.min
            while low > least and low > found.min - CLOSE and self.agree({dim: low - 1}):
                low -= 1
            if low == found.min - CLOSE:
                others = {n for n in (least, 2, 3, low // 2) if least <= n < low}
                low = least if all(self.agree({dim: n}) for n in others) else low
            self.verdict.ranges[dim] = DimRange(low, found.max)

    def try_guards(self, guards: Sequence[Guard]) -> None:
        """Narrows or fixes dimensions by the guards that matter, the model's own first."""
        for guard in sorted(guards, key=lambda g: not g.by_model):
            if self._matters(guard):
                _narrow(self.verdict, guard, self.example)

    def _matters(self, guard: Guard) -> bool:
        """Whether the program is wrong where the guard does not hold, as far as can be tried."""
        if guard.layout:
            return False
        tried = False
        failing = violations(guard, self.example, self.verdict.ranges)
        if guard.archived:
            return bool(failing)
        for sizes in failing:
            allowed = self.budget.affordable(sizes)
            if allowed is None or not (guard.by_model or self.budget.spend(allowed)):
                continue
            tried = True
            if self.agree(allowed) is False:
                return True
        return bool(failing) and not tried

    # ---- other sizes

    def try_sizes(self) -> None:
        """Fixes the dimensions at whose other sizes the program parts from the model."""
        together = {
            dim: size + 1 for dim, size in self.example.items() if self._allowed(dim, size + 1)
        }
        if together and self.agree(together) is not True:
            for dim, size in together.items():
                self._try(dim, {dim: size})
        for dim, sizes in probes(self.example, self.verdict.ranges):
            allowed = self.budget.affordable(sizes)
            if dim not in self.verdict.fixed and allowed is not None and self.budget.spend(allowed):
                self._try(dim, allowed)

    def _try(self, dim: str, sizes: Mapping[str, int]) -> None:
        if self.agree(sizes) is False:
            self.verdict.fixed.add(dim)
            self.verdict.notes.append(
                f"dimension {dim!r} is fixed at {self.example[dim]}: at {sizes[dim]} the traced "
                "program and the model differ"
            )

    def try_one(self) -> None:
        """Sizes of 1, which torch takes to be no free size."""
        ones = [dim for dim in self.example if self._allowed(dim, 1)]
        if not ones or self.agree(dict.fromkeys(ones, 1)) is True:
            return
        for dim in ones:
            if self.agree({dim: 1}) is False:
                self.verdict.ranges[dim] = DimRange(2, self.verdict.ranges[dim].max)
                self.verdict.notes.append(
                    f"dimension {dim!r} is 2 or more: at 1 the model takes another way through "
                    "its code"
                )

    def try_none(self) -> None:
        """Sizes of 0, where an input may be empty."""
        for dim in self.example:
            bounds = self.verdict.ranges[dim]
            if bounds.min == 0 and self.agree({dim: 0}) is not True:
                self.verdict.ranges[dim] = DimRange(1, bounds.max)
                self.verdict.notes.append(
                    f"dimension {dim!r} is 1 or more: at 0 the traced program and the model differ"
                )

    def _allowed(self, dim: str, size: int) -> bool:
        bounds = self.verdict.ranges[dim]
        return size >= bounds.min and (bounds.max is None or size <= bounds.max)


def _agree(program: Program, flat: FlatModel, inputs: Mapping[str, Tensor]) -> bool | None:
    """Whether both give the same; None where the model itself refuses these inputs."""
    tensors = tuple(inputs.values())
    try:
        with quiet():
            expected = flat.run(*(t.clone() for t in tensors))
    except Exception:
        return None
    try:
        with quiet(), untouched(flat.model):  # whose tensors the program shares
            actual = program.run_flat(tuple(t.clone() for t in tensors))
    except Exception:
        return False
    # A size among the outputs is a number in eager mode and a tensor in the graph.
    names = output_names(flat.record.structure, flat.inputs)
    found = {spec.name: t for spec, t in zip(program.signature.outputs, actual, strict=True)}
    if any(names[i] not in found for i in range(len(expected))):
        return False
    return _close(expected, tuple(found[names[i]] for i in range(len(expected))))


def _agree_with_itself(flat: FlatModel) -> bool:
    tensors = tuple(flat.inputs.values())
    return _close(flat.run(*tensors), flat.run(*tensors))


def _close(expected: tuple[Tensor, ...], actual: tuple[Tensor, ...]) -> bool:
    return len(expected) == len(actual) and all(
        compare(a, b).within(TOLERANCE) for a, b in zip(expected, actual, strict=True)
    )
