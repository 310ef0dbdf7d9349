"""Takes one case through trace, save and load, and both backends, and gives a verdict.

Every result is compared with the module itself, run eagerly on the same inputs in float32. How far
it may be off is measured: four times what float32 costs the module itself (its distance from its
own float64 run), and 2e-6 of the largest value, which covers sums in another order.
"""

from __future__ import annotations

import copy
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from sweep.cases import Case
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import graphwright as gw
from graphwright.ir.errors import GraphwrightError

ROUNDING, OWN_ROUNDING = 2e-6, 4
ILL_POSED = 1e-4
"""A module that loses more in float32 says nothing about the compiler."""
WITHOUT_FLOAT64 = 1e-5
"""Bound for modules that name float32 themselves, so that there is no float64 run."""
STAGES = ("trace", "saved", "onnxruntime", "triton")
VERDICTS = ("right", "narrowed", "refused", "wrong", "unexplained")
"""`narrowed`: right at every size that is left, and a note says why a size is not. `refused`: one
message names the place, the operator and a way out. The last two are failures."""


@dataclass
class Row:
    """What became of one case: per stage `ok`, or what went wrong."""

    theme: str
    name: str
    verdict: str = "right"
    stages: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    translator: str = ""
    error: float = 0.0
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def worsen(self, verdict: str) -> None:
        self.verdict = max(self.verdict, verdict, key=VERDICTS.index)


class _WrongError(Exception):
    """A stage computes something else than the module."""


class _UnexplainedError(Exception):
    """A size is not taken, or an input is refused, and nothing says why."""


@dataclass(frozen=True)
class Expected:
    """The module's own outputs at one choice of sizes, and how far off each may be.

    `settled` are its outputs where of equal values the first one comes first: torch leaves that
    open unless a sort is stable, and ONNX Runtime does not.
    """

    leaves: dict[str, Tensor]
    bounds: dict[str, float]
    settled: dict[str, Tensor]


def judge(case: Case, stages: tuple[str, ...] = STAGES) -> Row:
    """Runs the stages; a failed trace ends the case, any other stage is judged by itself."""
    row = Row(case.theme, case.name)
    start = time.perf_counter()
    references = [expected(case, at) for at in range(6)]
    made: dict[str, Any] = {}

    def attempt(stage: str, make: Callable[[], Any]) -> None:
        if stage not in stages:
            return
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made[stage] = make()
                if stage == "trace":
                    row.notes = list(made[stage].facts.get("trace", {}).get("notes", []))
                if stage == "onnxruntime":
                    row.translator = made[stage].notes["translator"].split(",")[0]
                    row.notes += made[stage].notes.get("narrowed", [])
                row.error = max(row.error, _compare(made, stage, case, references, row))
            row.stages[stage] = "ok"
        except _WrongError as error:
            row.worsen("wrong")
            row.stages[stage] = str(error)
        except Exception as error:
            why = unexplained(error, case)
            row.worsen("unexplained" if why else "refused")
            row.stages[stage] = f"{why}: {error}" if why else str(error)

    attempt("trace", lambda: _trace(case))
    if row.stages["trace"] == "ok":
        attempt("saved", lambda: _reloaded(made["trace"]))
        attempt("onnxruntime", lambda: gw.lower(made["trace"], "onnxruntime"))
        attempt("triton", lambda: gw.lower(made["trace"], "triton"))
    row.seconds = round(time.perf_counter() - start, 2)
    return row


def unexplained(error: Exception, case: Case) -> str:
    """What a refusal lacks; empty when it says where, what, and what to do."""
    if isinstance(error, _UnexplainedError):
        return "no reason"
    if not isinstance(error, GraphwrightError):
        return f"not one of our errors ({type(error).__name__})"
    text = str(error)
    if not error.where and "node" not in text:
        return "no place"
    if not error.fix:
        return "no way out"
    if not any(word in text for word in case.blames) and "themes/" not in error.where:
        return f"it blames none of {', '.join(case.blames)}"
    return ""


def _trace(case: Case) -> Any:
    module = case.module()
    drawn = case.by_name(module)
    examples = dict(zip(drawn, case.tensors(0), strict=True))
    return gw.trace(module, examples, dynamic={name: draw.free for name, draw in drawn.items()})


def _reloaded(program: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt2"
        program.save(path)
        return gw.load(path)


def expected(case: Case, at: int) -> Expected:
    """The module's outputs, from a fresh copy: what it keeps between calls is not the sizes'."""
    inputs = case.tensors(at)
    leaves = dict(_leaves(_run(case, inputs)))
    with _FirstOfEqual():
        settled = dict(_leaves(_run(case, inputs)))
    exact = _float64_run(case, inputs)
    bounds: dict[str, float] = {}
    for name, value in leaves.items():
        if not value.dtype.is_floating_point:
            continue
        reference = exact.get(name)
        if reference is None or reference.dtype != torch.float64:
            bounds[name] = WITHOUT_FLOAT64
            continue
        own = _distance(reference, value)
        if own > ILL_POSED:
            raise AssertionError(f"{case.title}: float32 alone moves {name} by {own:.1e}")
        bounds[name] = OWN_ROUNDING * own + ROUNDING
    return Expected(leaves, bounds, settled)


class _FirstOfEqual(TorchDispatchMode):
    """Makes every sort stable, and what a sort can give is taken from it."""

    supports_higher_order_operators = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name not in ("aten.sort.default", "aten.topk.default", "aten.kthvalue.default"):
            return func(*args, **(kwargs or {}))
        bound = {**dict(zip((a.name for a in func._schema.arguments), args, strict=False)),
                 **(kwargs or {})}  # fmt: skip
        dim = bound.get("dim", -1)
        largest = bound.get("descending", bound.get("largest", name == "aten.topk.default"))
        found = torch.sort(bound["self"], stable=True, dim=dim, descending=largest)
        if name == "aten.topk.default":
            return tuple(part.narrow(dim, 0, bound["k"]) for part in found)
        if name == "aten.kthvalue.default":
            return tuple(part.select(dim, bound["k"] - 1) for part in found)
        return found


def _float64_run(case: Case, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The same in float64; empty where the module names float32 itself."""
    wide = tuple(t.double() if t.dtype == torch.float32 else t for t in inputs)
    torch.set_default_dtype(torch.float64)
    try:
        return dict(_leaves(_run(case, wide, double=True)))
    except (RuntimeError, TypeError, ValueError):
        return {}
    finally:
        torch.set_default_dtype(torch.float32)


def _run(case: Case, inputs: tuple[Tensor, ...], double: bool = False) -> Any:
    torch.set_default_dtype(torch.float32)
    module = case.module()
    if double:
        module = copy.deepcopy(module).double()
        torch.set_default_dtype(torch.float64)
    plainly = torch.compiler.set_stance("force_eager")  # torch.cond compiles itself
    with torch.no_grad(), plainly, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return module(*(t.clone() for t in inputs))


def _compare(
    made: dict[str, Any], stage: str, case: Case, references: list[Expected], row: Row
) -> float:
    """Largest error over all sizes that the signature takes; the others must be refused."""
    worst = 0.0
    run = made[stage]
    signature = getattr(run, "signature", made["trace"].signature)
    for at, reference in enumerate(references):
        lost = _not_taken(signature, case, at)
        if lost:
            row.worsen("narrowed")
            silent = [dim for dim in lost if not any(repr(dim) in note for note in row.notes)]
            if silent:
                raise _UnexplainedError(f"no note says why {silent} is not free at {case.at(at)}")
            _expect_refusal(run, case, at)
            continue
        try:
            outputs = run(*case.tensors(at))
        except GraphwrightError:
            raise
        except Exception as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise _WrongError(f"fails at {case.at(at)}: {first[:200]}") from error
        actual, where = dict(_leaves(outputs)), f"at {case.at(at)}"
        try:
            worst = max(worst, _largest(reference, reference.leaves, actual, where))
        except _WrongError:
            if stage != "onnxruntime":
                raise
            worst = max(worst, _largest(reference, reference.settled, actual, where))
    return worst


def _not_taken(signature: Any, case: Case, at: int) -> list[str]:
    """Free dimensions whose size the signature does not take."""
    sizes = case.at(at)
    lost = []
    for spec, drawn in zip(signature.inputs, case.inputs.values(), strict=True):
        for axis, dim in drawn.free.items():
            have = spec.shape[axis]
            bounds = signature.dims.get(have) if isinstance(have, str) else None
            fits = (
                have == sizes[dim]
                if bounds is None
                else bounds.min <= sizes[dim] <= (bounds.max or sizes[dim])
            )
            if not fits and dim not in lost:
                lost.append(dim)
    return lost


def _expect_refusal(run: Any, case: Case, at: int) -> None:
    try:
        run(*case.tensors(at))
    except GraphwrightError:
        return
    except Exception as error:
        raise _UnexplainedError(f"{type(error).__name__} at {case.at(at)}: {error}") from error
    raise _UnexplainedError(f"runs at {case.at(at)}, which the signature does not take")


def _largest(
    reference: Expected, leaves: dict[str, Tensor], actual: dict[str, Tensor], where: str
) -> float:
    if set(leaves) - set(actual):
        raise _WrongError(f"{where}: outputs {sorted(actual)}, not {sorted(leaves)}")
    worst = 0.0
    for name, want in leaves.items():
        have = actual[name]
        if want.shape != have.shape or want.dtype != have.dtype:
            raise _WrongError(
                f"{where}: {name} is {have.dtype} {tuple(have.shape)}, "
                f"the module's {want.dtype} {tuple(want.shape)}"
            )
        if not want.dtype.is_floating_point:
            if not torch.equal(want, have):
                raise _WrongError(f"{where}: {name} has other integers")
            continue
        error = _distance(want, have)
        if not error <= reference.bounds[name]:
            raise _WrongError(
                f"{where}: {name} is off by {error:.1e}, allowed {reference.bounds[name]:.1e}"
            )
        worst = max(worst, error)
    return worst


def _distance(want: Tensor, have: Tensor) -> float:
    """Largest difference over the largest finite value; infinite where NaN or infinity differ."""
    a, b = want.double(), have.double()
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()):
        return float("inf")
    if not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
        return float("inf")
    if not finite.any():
        return 0.0
    largest = a[finite].abs().max().item()
    difference = (a - b)[finite].abs().max().item()
    return difference / largest if largest else difference


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of an output with its path; a plain number counts as a tensor."""
    if isinstance(value, Tensor):
        yield path or "output", value.detach()
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _leaves(part, f"{path}.{key}" if path else str(key))
    elif isinstance(value, tuple | list):
        for index, part in enumerate(value):
            yield from _leaves(part, f"{path}.{index}" if path else str(index))
