"""Takes one architecture through every column of the table, and says why a cell is not ok."""

from __future__ import annotations

import copy
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from conformance.zoo import Architecture
from torch import Tensor, nn

import graphwright as gw
from graphwright.backends.onnxruntime.ties import with_settled_ties
from graphwright.ir.errors import GraphwrightError

COLUMNS = ("trace", "free batch", "onnxruntime", "triton", "folded", "cut", "int8")
CLEANUP = (
    "Canonicalize",
    "RemoveIdentities",
    "FoldConstants",
    "EliminateCommonSubexpressions",
    "FoldBatchNorm",
    "MergeLinear",
)
BATCH, OTHER_BATCHES = 2, (1, 3)
LEAST_BOUND, MULTIPLE = 1e-5, 10.0
"""An output may be off by this many times what eager float32 itself loses against float64."""
MOST_CUT_ERROR = 1e-4
INTEGER_KERNELS = (
    "QLinearConv",
    "ConvInteger",
    "QLinearConvTranspose",
    "QLinearMatMul",
    "QGemm",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
)
"""ONNX Runtime's op types that multiply integers."""

Inputs = dict[str, Any]


class NotApplicable(Exception):
    """The column asks something that this architecture does not have."""


class Differs(Exception):
    """It ran, and computes something else."""


@dataclass
class Cell:
    """One cell: its state, and the reason or the figure that goes with it."""

    state: Literal["ok", "fails", "n/a"]
    detail: str = ""


@dataclass
class Row:
    """One line of the table.

    Attributes:
        name: of the architecture.
        family: of the architecture.
        cells: by column; a column that was not reached is not there.
        seconds: of CPU time, by column, and "build".
        figures: parameters, loss of eager float32, errors found, kernels.
        notes: what tracing gave up.
    """

    name: str
    family: str
    cells: dict[str, Cell] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def examine(
    architecture: Architecture, report: Callable[[dict[str, Any]], None] = lambda row: None
) -> Row:
    """Returns the row of one architecture.

    Args:
        architecture: built here; one that cannot be built raises as it does.
        report: called with the row so far after every column.
    """
    row = Row(architecture.name, architecture.family)
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        work = _Examination(architecture, row)
    row.seconds["build"] = time.process_time() - start
    report(row.as_json())
    for column in COLUMNS:
        start = time.process_time()
        row.cells[column] = _cell(getattr(work, column.replace(" ", "_")), row)
        row.seconds[column] = time.process_time() - start
        report(row.as_json())
    return row


def _cell(column: Callable[[], str], row: Row) -> Cell:
    try:
        with warnings.catch_warnings(record=True) as caught, torch.no_grad():
            warnings.simplefilter("always")
            detail = column()
        row.notes += [str(w.message) for w in caught if w.category.__name__ == "TraceWarning"]
        return Cell("ok", detail)
    except NotApplicable as reason:
        return Cell("n/a", str(reason))
    except (Differs, GraphwrightError) as error:
        return Cell("fails", str(error)[:2000])
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})"
        return Cell("fails", text[:2000])


class _Examination:
    """One method per column; each returns the detail of a cell that is ok, or raises."""

    def __init__(self, architecture: Architecture, row: Row) -> None:
        self.architecture = architecture
        self.row = row
        self.model = architecture.build()
        settle_(self.model, [self.inputs(4, seed) for seed in range(4)])
        self.expected = {n: self.model_on(n) for n in (BATCH, *OTHER_BATCHES)}
        loss = loss_of_float32(self.model, self.inputs(BATCH), self.expected[BATCH])
        self.bound = max(LEAST_BOUND, MULTIPLE * loss)
        row.figures["float32"] = loss
        row.figures["parameters"] = sum(p.numel() for p in self.model.parameters())
        self.program: gw.Program | None = None
        self.folded_program: gw.Program | None = None

    def inputs(self, batch: int, seed: int = 7) -> Inputs:
        return draw(self.architecture, batch, seed)

    def model_on(self, batch: int) -> Any:
        """Returns the model's outputs; for another batch than the example's, what it raises."""
        try:
            with torch.no_grad():
                outputs = self.model(**self.inputs(batch), **self.architecture.constants)
        except Exception as error:
            if batch == BATCH:
                raise
            return error
        return outputs

    def compare(
        self,
        run: Callable[..., Any],
        batches: tuple[int, ...],
        figure: str,
        reference: Callable[..., Any] | None = None,
    ) -> None:
        """Compares outputs with the model's, at every batch that the program and it take.

        Args:
            run: what is compared.
            batches: sizes of the batch.
            figure: name under which the largest error is kept.
            reference: stands in for the model, where that leaves something open.
        """
        for batch in batches:
            if isinstance(self.expected[batch], Exception) or not (self.is_free or batch == BATCH):
                continue
            values = self.inputs(batch)
            expected = self.expected[batch] if reference is None else reference(**values)
            result = gw.compare(expected, run(**values))
            known = self.row.figures.get(figure, 0.0)
            self.row.figures[figure] = max(known, result.relative)
            if not result.relative <= self.bound or not result.elements:
                raise Differs(f"at batch {batch}: {result}; the bound is {self.bound:.1e}")

    @property
    def is_free(self) -> bool:
        assert self.program is not None
        return "batch" in self.program.signature.dims

    def traced(self) -> gw.Program:
        if self.program is None:
            raise NotApplicable("not traced")
        return self.program

    def trace(self) -> str:
        example = {**self.inputs(BATCH), **self.architecture.constants}
        program = gw.trace(self.model, example, dynamic=self.architecture.dynamic)
        self.program = program
        self.row.figures["nodes"] = len(program.graph.nodes)
        self.compare(program, (BATCH,), "trace")
        return ""

    def free_batch(self) -> str:
        program = self.traced()
        for batch in OTHER_BATCHES:
            if isinstance(self.expected[batch], Exception):
                why = str(self.expected[batch]).splitlines() or ["it raises"]
                raise NotApplicable(f"the model itself does not run at batch {batch}: {why[0]}")
        if "batch" not in {d for axes in self.architecture.dynamic.values() for d in axes.values()}:
            raise NotApplicable("the model has no batch")
        if not self.is_free:
            notes = "; ".join(program.facts.get("trace", {}).get("notes", ()))
            raise Differs(notes or "the batch was fixed without a note")
        self.compare(program, OTHER_BATCHES, "free batch")
        return ""

    def onnxruntime(self) -> str:
        return self.lowered("onnxruntime")

    def triton(self) -> str:
        return self.lowered("triton")

    def lowered(self, backend: str) -> str:
        compiled = gw.lower(self.traced(), backend)
        self.row.figures[f"{backend} notes"] = {
            key: compiled.notes[key] for key in ("translator", "dropped") if compiled.notes.get(key)
        }
        tied = "ties" in compiled.notes
        reference = with_settled_ties(self.traced()) if tied else None
        self.compare(compiled, (BATCH, *OTHER_BATCHES), backend, reference)
        return "(equal values sorted in their order)" if tied else ""

    def folded(self) -> str:
        program = self.traced()
        for name in CLEANUP:
            try:
                program = getattr(gw.passes.cleanup, name)()(program)
            except GraphwrightError as error:
                raise Differs(f"{name}: {error}") from error
        self.compare(program, (BATCH, *OTHER_BATCHES), "folded")
        self.folded_program = program
        return ""

    def cut(self) -> str:
        program = self.traced()
        groups = gw.channel_groups(program)
        picks = {g: range(0, g.units - 1, 2) for g in groups if g.prunable and g.units > 1}
        if not picks:
            reasons = dict.fromkeys(g.reason for g in groups if g.reason)
            raise NotApplicable(f"no group can be pruned: {'; '.join(reasons) or 'there is none'}")
        zeroed, smaller = gw.zero(program, picks), gw.cut(program, picks)
        values = self.inputs(BATCH)
        result = gw.compare(zeroed(**values), smaller(**values))
        self.row.figures["cut"] = result.relative
        if not result.relative <= max(MOST_CUT_ERROR, self.bound) or not result.elements:
            raise Differs(f"the cut program differs from the zeroed one: {result}")
        before, after = (
            sum(p.numel() for p in q.parameters().values()) for q in (program, smaller)
        )
        return f"{100 * after / before:.0f}%"

    def int8(self) -> str:
        program = self.traced() if self.folded_program is None else self.folded_program
        batches = [self.inputs(BATCH, seed) for seed in range(20, 24)]
        quantized = gw.passes.quantize.Int8(activations="static")(program, calibration=batches)
        layers = quantized_layers(quantized)
        compiled = gw.lower(quantized, "onnxruntime")
        kernels = {k: n for k, n in compiled.notes["kernels"].items() if k in INTEGER_KERNELS}
        values, expected = self.inputs(BATCH), self.expected[BATCH]
        meant = gw.compare(expected, with_settled_ties(quantized)(**values))
        made = gw.compare(expected, compiled(**values))
        self.row.figures["int8"] = {
            "layers": layers,
            "kernels": kernels,
            "relative": meant.relative,
            "cosine": made.cosine,
            "translator": compiled.notes["translator"],
            "dropped": compiled.notes["dropped"],
        }
        if not made.relative <= 2 * meant.relative + 0.05:
            raise Differs(f"the artifact is off by {made}; the quantized program by {meant}")
        share = f"{sum(kernels.values())}/{layers}"
        if not kernels and layers:
            raise Differs(f"{share}: no layer became an integer kernel")
        return share


def draw(architecture: Architecture, batch: int, seed: int = 7) -> Inputs:
    """Returns inputs at a batch size, the same at every call with the same seed."""
    generator = torch.Generator().manual_seed(1000 * seed + batch)
    sizes = {"seq": 8, **architecture.base, "batch": batch}
    return {name: f.sample(sizes, generator) for name, f in architecture.fields.items()}


@torch.no_grad()
def settle_(model: nn.Module, batches: list[Inputs]) -> None:
    """Sets the statistics of every batch norm by data; leaves the rest of the model alone."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    norms = [m for m in norms if m.track_running_stats and m.running_mean is not None]
    momenta = [m.momentum for m in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average
        norm.train()
    if norms:
        for batch in batches:
            model(**batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


@torch.no_grad()
def loss_of_float32(model: nn.Module, inputs: Inputs, outputs: Any) -> float:
    """Returns the relative error of the outputs against those in float64; 0 where it has none."""
    try:
        exact = copy.deepcopy(model).double()(**{n: _double(x) for n, x in inputs.items()})
        loss = gw.compare(exact, outputs).relative
    except Exception:
        return 0.0  # a model that names float32 in its code
    return loss if loss < 1 else 0.0


def _double(value: Any) -> Any:
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if is_float else value


def quantized_layers(program: gw.Program) -> int:
    """Returns how many operators, lookups of tables aside, read a weight that is int8 codes."""
    readers = {
        reader.name
        for node in program.graph.nodes
        if node.op == "call_function" and _name(node.target) == "dequantize"
        for reader in node.users
        if _name(reader.target) != "embedding"
    }
    return len(readers)


def _name(target: Any) -> str:
    packet = getattr(target, "overloadpacket", target)
    return str(getattr(packet, "__name__", packet)).rpartition(".")[2]
