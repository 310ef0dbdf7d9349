from __future__ import annotations

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.ir.check.verify import measure
from graphwright.ir.context import Context
from graphwright.ir.errors import ContractError

CHAIN = ("conv", [("cast.dtype", {"to": "float16"})])

aten = torch.ops.aten


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.norm = nn.LayerNorm(16)
        self.up = nn.Linear(16, 64)
        self.down = nn.Linear(64, 16)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        h = self.embed(ids)
        scores = h @ h.transpose(1, 2)
        scores = scores.masked_fill(mask[:, None, :] == 0, torch.finfo(torch.float32).min)
        h = h + scores.softmax(-1) @ h
        return self.down(torch.nn.functional.gelu(self.up(self.norm(h))))


@pytest.fixture(scope="module")
def program() -> gw.Program:
    torch.manual_seed(0)
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[:, 4:] = 0
    dynamic = {"ids": {0: "n"}, "mask": {0: "n"}}
    return gw.trace(Block().eval(), (torch.randint(0, 20, (2, 6)), mask), dynamic)


@pytest.mark.parametrize(("to", "bound"), [("float16", 2e-3), ("bfloat16", 2e-2)])
def test_weights_shrink_and_the_signature_stays(program: gw.Program, to: str, bound: float) -> None:
    after = gw.passes.cast.Dtype(to=to)(program)
    # A dozen roundings to 11 (8) significant bits, each of half a unit in the last place.
    assert measure(program, after).relative < bound
    assert after.signature == program.signature
    types = {str(t.dtype) for n, t in after.state.items() if n.startswith(("up", "down", "embed"))}
    assert types == {f"torch.{to}"}
    assert after.state["norm.weight"].dtype is torch.float32


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_half_precision_is_taken_out(program: gw.Program, stored: str) -> None:
    """Weights keep the values they were rounded to; all arithmetic is in float32."""
    half = gw.passes.cast.Dtype(to=stored)(program)
    after = gw.passes.cast.Dtype(to="float32")(half)
    values = [n.meta["val"].dtype for n in after.graph.nodes if n.op == "call_function"]
    assert not {torch.float16, torch.bfloat16} & {*values, *(t.dtype for t in after.state.values())}
    state = {n: t.to(getattr(torch, stored)).float() for n, t in program.state.items()}
    state |= {n: t for n, t in program.state.items() if n.startswith("norm")}
    exact = program.replace(state={n: state[n] if t.is_floating_point() else t
                                   for n, t in program.state.items()})  # fmt: skip
    assert measure(exact, after).relative < 1e-6


def test_norms_and_softmax_run_in_float32(program: gw.Program) -> None:
    after = gw.passes.cast.Dtype(to="float16")(program)
    for node in after.graph.nodes:
        if node.target in (aten.layer_norm.default, aten.softmax.int):
            assert node.meta["val"].dtype is torch.float32
        if node.target is aten.linear.default:
            assert node.meta["val"].dtype is torch.float16


def test_kept_layers_stay_in_float32(program: gw.Program) -> None:
    result = gw.passes.cast.Dtype(to="float16", keep=["down"]).execute(program, Context())
    assert result.program.state["down.weight"].dtype is torch.float32
    assert result.program.state["up.weight"].dtype is torch.float16
    assert any("in keep" in a.layer for a in result.actions)


def test_the_constant_of_a_mask_stays_finite(program: gw.Program) -> None:
    after = gw.passes.cast.Dtype(to="float16")(program)
    ids, mask = program.examples
    assert bool(torch.isfinite(after(ids, torch.zeros_like(mask))).all())


def test_a_bound_that_is_too_tight_is_refused(program: gw.Program) -> None:
    with pytest.raises(ContractError, match=r"cast\.dtype broke its contract \(lossy\)"):
        gw.passes.cast.Dtype(to="bfloat16", max_error=1e-6)(program)


def test_a_weight_read_in_two_types_is_stored_in_both() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, 8)
            self.head = nn.Linear(8, 10, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(ids))

    program = gw.trace(Tied(), (torch.randint(0, 10, (2, 3)),))
    after = gw.passes.cast.Dtype(to="float16", keep=["head"])(program)
    assert {t.dtype for t in after.state.values()} == {torch.float16, torch.float32}
    one_type = gw.passes.cast.Dtype(to="float16")(program)
    assert len(one_type.state) == 1


@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_layers_on_codes_stay_integer_kernels(program: gw.Program, activations: str) -> None:
    """A cast in front of a quantizer rounds once; inside it would round codes, and hide them."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 20, (4, 6), generator=generator)
    data = [{"ids": ids, "mask": torch.ones_like(ids)}]
    quantize = gw.passes.quantize.Int8(activations=activations, embeddings=False)
    eight = quantize(program, calibration=data)
    result = gw.passes.cast.Dtype(to="float16").execute(eight, Context())
    after = result.program
    assert any("computed on codes" in a.layer for a in result.actions)
    for name in ("up", "down"):
        assert torch.equal(after.state[f"{name}.weight_scale"], eight.state[f"{name}.weight_scale"])
    assert after.state["embed.weight"].dtype is torch.float16
    before, now = gw.lower(eight, "onnxruntime"), gw.lower(after, "onnxruntime")
    integer = ("DynamicQuantizeMatMul", "MatMulIntegerToFloat")
    count = {k: now.notes["kernels"].get(k, 0) for k in integer}
    assert count == {k: before.notes["kernels"].get(k, 0) for k in integer}
    assert sum(count.values()) == 2
    # half precision loses 2^-11 of a value, and may move a code of 255
    error = gw.compare(after.run_flat(program.examples), now.run_flat(program.examples))
    assert error.relative < 0.01
