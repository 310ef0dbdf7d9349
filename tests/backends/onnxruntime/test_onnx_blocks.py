"""Weights in blocks in ONNX Runtime: kernels, forms, the check of each product, and sizes."""

from __future__ import annotations

from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.backends.onnxruntime import rounded
from graphwright.backends.onnxruntime.check import Differs
from graphwright.backends.onnxruntime.steps.block_codes import kernel_block, stored_blocks
from graphwright.ir.layers.products import weight_value
from graphwright.ir.layers.selectors import layers

pytest.importorskip("onnxruntime")
Rtn = gw.passes.quantize.Rtn


def product(depth: int = 96, out: int = 40, bias: bool = True) -> gw.Program:
    torch.manual_seed(0)
    layer = nn.Linear(depth, out, bias=bias).eval()
    return gw.trace(layer, (torch.randn(5, 3, depth),), {"input": {0: "batch", 1: "length"}})


def lowered(program: gw.Program, **options: Any) -> Any:
    return gw.lower(program, "onnxruntime", **options)


def kinds(compiled: Any) -> list[str]:
    return [node.op_type for node in onnx.load_from_string(compiled.model).graph.node]


def attribute(compiled: Any, kind: str, name: str) -> int:
    nodes = onnx.load_from_string(compiled.model).graph.node
    node = next(n for n in nodes if n.op_type == kind)
    return next(a.i for a in node.attribute if a.name == name)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("depth", [96, 75])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_kernel_computes_with_the_dequantized_weight(
    bits: int, symmetric: bool, depth: int
) -> None:
    program = Rtn(bits=bits, block=32, symmetric=symmetric)(product(depth))
    weight = weight_value(program, layers(program)[0]).double()
    compiled = lowered(program, accuracy_level=1)
    assert (
        kinds(compiled) == ["Gather", "BitShift"] * 2 * (bits == 2) + ["MatMulNBits"] or bits == 2
    )
    assert compiled.notes["kernels"].get("MatMulNBits") == 1
    for shape in [(1, 1, depth), (2, 9, depth)]:
        x = torch.randn(shape)
        wanted = x.double() @ weight.T + program.state["bias"].detach().double()
        assert relative(compiled(x), wanted) < 1e-6


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_other_widths_are_widened_when_the_session_is_made(bits: int) -> None:
    program = Rtn(bits=bits, block=32)(product(1024, 256))
    compiled = lowered(program, accuracy_level=1)
    assert compiled.notes["kernels"] == {"MatMulNBits": 1}
    assert compiled.notes["weights"] == {"weight": [
        f"MatMulNBits, {4 if bits == 3 else 8} bits, block 32"]}  # fmt: skip
    packed = 1024 * 256 * bits // 8
    assert packed < len(compiled.model) < 1.35 * packed + 16000
    x = torch.randn(2, 2, 1024)
    assert relative(compiled(x), program(x)) < 1e-6


@pytest.mark.parametrize(("block", "depth", "kernel"), [
    (64, 96, 64), (96, 96, 32), (48, 96, 16), (-1, 75, 16), (-1, 1024, 128), (512, 1024, 128),
])  # fmt: skip
def test_blocks_without_a_kernel_are_cut(block: int, depth: int, kernel: int) -> None:
    program = Rtn(bits=4, block=block)(product(depth))
    node = next(n for n in program.graph.nodes if "dequantize_blocks" in str(n.target))
    stored = stored_blocks(node)
    assert stored is not None
    assert kernel_block(stored) == kernel
    compiled = lowered(program, accuracy_level=1)
    assert attribute(compiled, "MatMulNBits", "block_size") == kernel
    x = torch.randn(4, 2, depth)
    assert relative(compiled(x), program(x)) < 1e-6


def test_a_block_that_cannot_be_cut_is_rebuilt_and_listed() -> None:
    compiled = lowered(Rtn(bits=4, block=20)(product(1000, 300)))
    assert [left["why"] for left in compiled.notes["left"]] == ["no kernel has blocks of 20"]
    assert len(compiled.model) < 0.3 * 4 * 1000 * 300


def test_activations_are_rounded_as_the_emulation_says() -> None:
    program = Rtn(bits=4, block=32)(product(bias=False))
    compiled = lowered(program)
    assert attribute(compiled, "MatMulNBits", "accuracy_level") == 4
    told = compiled.notes["products"]
    assert told["accuracy_level"] == 4
    assert told["largest_error"] < 1e-5
    assert 1e-3 < told["outputs"] < 2e-2
    assert max(case["relative"] for case in compiled.notes["checked"]) < 1e-6
    x = torch.randn(7, 1, 96)
    weight = weight_value(program, layers(program)[0])
    wanted, moves = rounded.emulated(x.reshape(7, 96), weight, 32)
    assert float(moves.max()) == 0
    assert relative(compiled(x).reshape(7, -1), wanted) < 1e-6
    assert 1e-3 < relative(compiled(x), program(x)) < 2e-2


def test_the_emulation_by_hand() -> None:
    x = torch.tensor([[127.0, 1.4, -2.6, 0.5, 0.0, 0.0, 0.0, 2.54]])
    eye = torch.eye(8)
    value, moves = rounded.emulated(x, eye, 4)
    assert value[0].tolist() == pytest.approx([127.0, 1.0, -3.0, 0.0, 0.0, 0.0, 0.0, 2.54])
    # 0.5 lies between two codes: either is right, and they are one step of 1 apart
    assert moves[0].tolist() == pytest.approx([0, 0, 0, 1, 0, 0, 0, 0])


def test_a_wrong_product_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    program = Rtn(bits=4, block=32)(product())
    other = program.replace(state={**program.state, "weight.scale": program.state[
        "weight.scale"] * 1.01})  # fmt: skip
    seen: list[float] = []
    check_products = rounded.check_products

    def swapped(_: gw.Program, *rest: Any) -> float:
        with pytest.raises(Differs, match=r"relative error 0\.009"):
            check_products(other, *rest)
        seen.append(check_products(program, *rest))
        raise Differs("seen")

    monkeypatch.setattr(rounded, "check_products", swapped)
    compiled = lowered(program)
    assert len(seen) == 1
    assert compiled.notes["products"] == {"accuracy_level": 1, "why": "seen"}
    assert attribute(compiled, "MatMulNBits", "accuracy_level") == 1


@pytest.mark.parametrize(("bits", "depth"), [(4, 96), (8, 96), (4, 75)])
def test_the_standard_form_is_fused_by_the_runtime(bits: int, depth: int) -> None:
    program = Rtn(bits=bits, block=32)(product(depth))
    compiled = lowered(program, weights="qdq", accuracy_level=1)
    assert kinds(compiled) == ["DequantizeLinear", "MatMul", "Add"]
    assert compiled.notes["kernels"].get("MatMulNBits") == 1
    x = torch.randn(2, 2, depth)
    assert relative(compiled(x), program(x)) < 1e-6


def test_the_standard_form_needs_opset_21() -> None:
    with pytest.raises(gw.ir.errors.ArgumentError, match="weights: qdq needs opset 21"):
        lowered(product(), weights="qdq", opset=20)


class Table(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(1000, width)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table(ids)


@pytest.mark.parametrize(("bits", "block", "width"), [
    (2, 16, 48), (4, 32, 96), (4, 32, 75), (8, 64, 64), (3, 32, 96), (5, 16, 75), (4, -1, 75),
])  # fmt: skip
def test_rows_of_a_table(bits: int, block: int, width: int) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 1000, (4, 6))
    program = Rtn(bits=bits, block=block)(
        gw.trace(Table(width).eval(), (ids,), {"ids": {0: "batch", 1: "length"}})
    )
    rows = weight_value(program, layers(program)[0])
    compiled = lowered(program)
    ids = torch.randint(0, 1000, (3, 2))
    torch.testing.assert_close(compiled(ids), rows[ids], rtol=1e-6, atol=1e-7)
    by_kernel = bits in (2, 4, 8) and block > 0
    assert (kinds(compiled)[0] == "Reshape" and "GatherBlockQuantized" in kinds(compiled)
            ) == by_kernel  # fmt: skip
    assert len(compiled.model) < (bits / 8 + 8 / max(block, 16)) * 1.1 * 1000 * width + 9000


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(800, 64)
        self.square = nn.Parameter(torch.randn(64, 64) / 8)
        self.bias = nn.Parameter(torch.randn(64))
        self.head = nn.Linear(64, 800, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        y = torch.addmm(self.bias, x.reshape(-1, 64), self.square).reshape(x.shape)
        return self.head(torch.relu(y @ self.square))


def test_tied_weights_are_stored_once() -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 800, (4, 6))
    program = Rtn(bits=4, block=32)(
        gw.trace(Tied().eval(), (ids,), {"ids": {0: "batch", 1: "length"}})
    )
    compiled = lowered(program, accuracy_level=1)
    assert compiled.notes["kernels"]["MatMulNBits"] == 3
    assert compiled.notes["kernels"]["GatherBlockQuantized"] == 1
    assert len(compiled.model) < 0.8 * 800 * 64 + 0.8 * 64 * 64 + 8000
    ids = torch.randint(0, 800, (2, 3))
    assert relative(compiled(ids), program(ids)) < 1e-6


@pytest.mark.parametrize("bits", [3, 4])
def test_convolutions_stay_small_in_the_file(bits: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(64, 128, 3), nn.ReLU(), nn.Conv2d(128, 128, 3, groups=128))
    program = Rtn(bits=bits, block=64)(
        gw.trace(net.eval(), (torch.randn(2, 64, 9, 9),), {"input": {0: "batch"}})
    )
    compiled = lowered(program)
    x = torch.randn(3, 64, 9, 9)
    assert relative(compiled(x), program(x)) < 1e-5
    assert len(compiled.notes["left"]) == 2
    assert len(compiled.model) < 0.25 * 4 * 64 * 128 * 9


def test_weights_that_come_out_as_floats_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from graphwright.backends.onnxruntime import job

    program = Rtn(bits=4, block=32)(product(512, 512))
    plain = job.translate_with_values

    def folded(given: gw.Program, opset: int) -> Any:
        model, values = plain(given, opset)
        data = ir.Value(name="folded", const_value=ir.Tensor(torch.zeros(512, 512).numpy()))
        model.graph.initializers["folded"] = data
        return model, values

    monkeypatch.setattr(job, "translate_with_values", folded)
    with pytest.raises(gw.ir.errors.LoweringError, match="its weights take"):
        lowered(program)


class Half(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(20, 64), nn.Linear(64, 96), nn.Linear(96, 32)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(self.table(ids))))


@pytest.mark.parametrize(
    ("quantize", "options", "wanted"),
    [
        (Rtn(bits=4, block=32), {}, ["GatherBlockQuantized", "MatMulNBits", "MatMulNBits"]),
        (
            Rtn(bits=8, block=32, symmetric=False),
            {},
            ["GatherBlockQuantized", *["MatMulNBits"] * 2],
        ),
        (Rtn(bits=4, block=32), {"weights": "qdq"}, ["DequantizeLinear", "DequantizeLinear"]),
        (gw.passes.quantize.Nf4(), {}, ["MatMulBnb4", "MatMulBnb4"]),
    ],
)
def test_half_precision_keeps_its_kernels(quantize: Any, options: Any, wanted: list[str]) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 20, (2, 7))
    program = quantize(gw.trace(Half().half().eval(), (ids,), {"ids": {0: "batch"}}))
    compiled = lowered(program, **options)
    assert all(kinds(compiled).count(kind) >= wanted.count(kind) for kind in wanted)
    y = compiled(ids)
    assert y.dtype == torch.float16
    bound = 1e-2 if compiled.notes["products"].get("accuracy_level") == 4 else 2e-3
    assert relative(y, program(ids)) < bound
    assert compiled.notes["warnings"] == []


def test_a_wrong_product_in_half_precision_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound allows the rounding of the result to 11 bits, and no more."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 96, bias=False).half().eval()
    program = Rtn(bits=4, block=32)(gw.trace(layer, (torch.randn(8, 64).half(),)))
    assert lowered(program).notes["products"]["accuracy_level"] == 4
    plain = rounded.dequantize_blocks

    def other(codes: Any, scale: Any, *rest: Any) -> torch.Tensor:
        return plain(codes, scale * 1.002, *rest)

    monkeypatch.setattr(rounded, "dequantize_blocks", other)
    products = lowered(program).notes["products"]
    assert products["accuracy_level"] == 1
    assert "relative error" in products["why"]


def test_weights_without_a_kernel_are_in_the_summary() -> None:
    program = Rtn(bits=4, block=20)(product(80))
    (text,) = lowered(program).notes["warnings"]
    assert "1 weight of few bits rebuilt as floats" in text
    assert text.endswith("no kernel has blocks of 20: weight")


def test_saved_and_opened_again(tmp_path: Any) -> None:
    program = Rtn(bits=3, block=32)(product())
    compiled = lowered(program)
    compiled.save(tmp_path)
    x = torch.randn(2, 3, 96)
    assert torch.equal(gw.load(tmp_path / "model.onnx")(x), compiled(x))
