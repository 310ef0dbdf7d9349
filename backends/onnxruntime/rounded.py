"""Checking matrix products that round their activations to 8 bits as they come.

At accuracy level 4 the kernels of MatMulNBits round each row of the activation, block by block, to
whole multiples of max|x| / 127. That is about half a percent of every product, too much for a
sharp comparison of whole models. So the model is checked with float32 products first (level 1),
against the program and at float32's bound; then the level is raised, and every product is checked
by itself: from the activation that it really read, our own rounding and the program's own weight
have to give the result that it really gave.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from graphwright.backends.onnxruntime.attempt import Attempt
from graphwright.backends.onnxruntime.check import Case, Differs
from graphwright.backends.onnxruntime.options import OnnxRuntimeOptions
from graphwright.backends.onnxruntime.runtime import (
    SessionSettings,
    feeds_for,
    open_session,
)
from graphwright.backends.onnxruntime.steps.blocks import EXACT, PRODUCTS_FACT
from graphwright.backends.onnxruntime.translate import translate_with_values
from graphwright.backends.onnxruntime.written import content_of
from graphwright.ir.ops.blocks import dequantize_blocks
from graphwright.ir.program import Program

BOUND = 1e-4
"""Largest relative error of one product against the emulated one, in float32."""

TIE = 1e-3
"""Nearer than this to the middle between two codes, in codes, either of them is right."""


def set_level(model: ir.Model, level: int) -> None:
    """Sets the accuracy level of every MatMulNBits."""
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", level)


def raise_level(
    program: Program,
    options: OnnxRuntimeOptions,
    settings: SessionSettings,
    model: ir.Model,
    made: Attempt,
    cases: Sequence[Case],
) -> SessionSettings | None:
    """Lets the products of weights in blocks round their activations, as the options ask.

    Returns:
        the settings of a session on the changed model; None where it stays as it is.
    """
    if not made.program.facts.get(PRODUCTS_FACT):
        return None
    made.products = {"accuracy_level": EXACT}
    if options.accuracy_level == EXACT:
        return None
    if made.translator != "direct":
        made.products["why"] = "checked by product only where the model is translated directly"
        return None
    fast = replace(settings, accuracy_level=options.accuracy_level)
    try:
        error = check_products(
            program, made.program, options, fast, [c.inputs for c in cases if not c.drawn]
        )
    except Differs as error:
        made.products["why"] = str(error)
        return None
    set_level(model, options.accuracy_level)
    made.products = {"accuracy_level": options.accuracy_level, "largest_error": error}
    return fast


def emulated(x: Tensor, weight: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """x @ weight^T, x (n, k) rounded to 8 bits in blocks of each row, and how far it may be off.

    The rounding is in float32, as the kernels do it; the product in float64. A value of x between
    two codes may be rounded either way, which moves a result by one step times the weight.

    Returns:
        the product (n, out), and the sum of such moves (n, out): 0 in most rows.
    """
    n, k = x.shape
    wide = torch.nn.functional.pad(x.float(), (0, -k % block)).reshape(n, -1, block)
    peak = wide.abs().amax(-1, keepdim=True)
    scaled = wide * torch.where(peak > 0, 127.0 / peak, torch.zeros_like(peak))
    step = (peak / 127.0).double()
    rounded = torch.round(scaled).clamp(-127, 127).double() * step
    is_tie = (scaled - torch.floor(scaled) - 0.5).abs() < TIE
    moves = is_tie.double() * step
    matrix = weight.double().t()
    return rounded.reshape(n, -1)[:, :k] @ matrix, moves.reshape(n, -1)[:, :k] @ matrix.abs()


def check_products(
    program: Program,
    lowered: Program,
    options: OnnxRuntimeOptions,
    settings: SessionSettings,
    inputs: Sequence[tuple[Tensor, ...]],
) -> float:
    """Largest relative error of a product, on the activations that the runtime computed.

    Args:
        program: the program, whose stored weights are the reference.
        lowered: it behind all steps.
        options, settings: as the model is made and run.
        inputs: of every run, one tensor per input.

    Raises:
        Differs: a product gives something else than its weight and rounded activation.
    """
    products: Mapping[str, Any] = lowered.facts[PRODUCTS_FACT]
    model, values = translate_with_values(lowered, options.opset)
    set_level(model, 4)
    by_name = {node.name: value for node, value in values.items()}
    wanted = {n: by_name[n] for p, r in products.items() for n in (p, r["x"])}
    shown = {value.name for value in model.graph.outputs}
    given = {value.name for value in model.graph.inputs}
    for value in wanted.values():
        if value.name not in shown | given:
            shown.add(value.name)
            model.graph.outputs.append(value)
    with TemporaryDirectory() as folder:
        content = content_of(model, Path(folder), options.external_data_mb)
        session = open_session(content, settings)
    names = [str(value.name) for value in model.graph.outputs]
    runs = []
    for each in inputs:
        feeds = feeds_for(session, program.signature, each)
        runs.append({**feeds, **dict(zip(names, session.run(names, feeds), strict=True))})
    worst = 0.0
    for name, record in products.items():
        pairs = [
            [torch.as_tensor(run[str(wanted[n].name)]) for n in (record["x"], name)] for run in runs
        ]
        error = _error(program, record, pairs)
        if not error <= BOUND:
            raise Differs(f"product {name}: relative error {error:.3g}, allowed {BOUND:.3g}")
        worst = max(worst, error)
    return worst


def _error(program: Program, record: Mapping[str, Any], pairs: Sequence[Sequence[Tensor]]) -> float:
    """Largest relative error of a product over pairs of what it read and gave; against float32
    where a kernel does not round."""
    codes, scale, zero = (program.state.get(name) for name in record["weight"])
    assert scale is not None
    # In float16 programs too the kernel computes in float32, and rounds its result alone.
    weight = dequantize_blocks(codes, scale.float(), zero, *record["layout"])
    bias = program.state[record["bias"]].detach().double() if record["bias"] else 0.0
    sizes = [x.numel() // x.shape[-1] for x, _ in pairs]
    rows = torch.cat([x.reshape(-1, x.shape[-1]) for x, _ in pairs])
    y = torch.cat([y.reshape(n, -1) for (_, y), n in zip(pairs, sizes, strict=True)])
    rounding = _half_ulps(y)
    y = y.double() - bias
    exact = rows.double() @ weight.double().t()
    rounded, moves = emulated(rows, weight, record["block"])
    excess = ((y - rounded).abs() - moves - rounding).clamp(min=0).split(sizes)
    # A kernel that has no 8-bit form computes in float32.
    float_excess = ((y - exact).abs() - rounding).clamp(min=0).split(sizes)
    worst = 0.0
    for a, b, whole in zip(excess, float_excess, exact.split(sizes), strict=True):
        error, size = min(float(a.norm()), float(b.norm())), float(whole.norm())
        worst = max(worst, error / size if size > 0 else error)
    return worst


def _half_ulps(y: Tensor) -> Tensor:
    """Largest error of rounding to float16, for each value; 0 for float32, which `BOUND` covers."""
    if y.dtype != torch.float16:
        return torch.zeros((), dtype=torch.float64)
    return torch.clamp(y.double().abs() * 2**-11, min=2**-25)
