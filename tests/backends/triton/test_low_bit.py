"""Models whose weights are compressed by a pass: what the fuser makes of them.

The reference is the quantized program itself, which rebuilds every weight and multiplies by it.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphwright as gw
from graphwright.backends.triton.fuse import count_ops, fuse
from graphwright.ir.check.verify import measure
from graphwright.ir.edit import Editor
from graphwright.ir.ops.int8 import dequantize
from graphwright.ir.ops.low_rank import add_low_rank
from graphwright.ir.ops.registry import SWITCH
from graphwright.ir.program import Program

REBUILD = ("dequantize_blocks", "dequantize_table", "dequantize_codebook", "add_low_rank")
SIZE = 64


class Model(nn.Module):
    """An embedding that is tied to the head, a gated block, a residual, a weight turned."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(40, SIZE)
        self.gate, self.up = nn.Linear(SIZE, 96), nn.Linear(SIZE, 96, bias=False)
        self.down, self.inner = nn.Linear(96, SIZE), nn.Linear(SIZE, SIZE)
        self.turned = nn.Parameter(torch.randn(SIZE, SIZE) / 8)
        self.head = nn.Linear(SIZE, 40, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        x = x + self.down(F.silu(self.gate(x)) * self.up(x))
        return self.head(F.gelu(self.inner(x)) @ self.turned)


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    ids = torch.randint(0, 40, (3, 5))
    return gw.trace(Model().eval(), {"ids": ids}, dynamic={"ids": {0: "batch", 1: "seq"}})


@pytest.fixture(scope="module")
def batches() -> list[tuple[Tensor]]:
    torch.manual_seed(1)
    return [(torch.randint(0, 40, (6, 5)),) for _ in range(2)]


QUANTIZERS: dict[str, tuple[Callable[[], gw.Pass], str, int]] = {
    "blocks": (lambda: gw.passes.quantize.Rtn(bits=4, block=32), "blocks", 1),
    "three bits": (lambda: gw.passes.quantize.Rtn(bits=3, block=16), "blocks", 1),
    "table": (lambda: gw.passes.quantize.Nf4(), "table", 1),
    "codebook": (
        lambda: gw.passes.quantize.Vptq(
            vector_length=4, centroids=16, residual_centroids=8, outlier_percent=10,
            outlier_vector_length=2, outlier_centroids=8, fit_steps=2,
        ),
        "codebook",
        3,
    ),
}  # fmt: skip
"""The pass, its form, and how many lookups it makes of a layer."""


@pytest.mark.parametrize("corrected", [False, True], ids=["plain", "corrected"])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_no_weight_is_rebuilt(
    program: Program, batches: list[tuple[Tensor]], name: str, corrected: bool
) -> None:
    make, form, lookups = QUANTIZERS[name]
    quantized = make()(program, calibration=batches)
    if corrected:
        quantized = gw.passes.compensate.Eora(rank=4)(
            quantized, calibration=batches, teacher=program
        )
    compiled = gw.lower(quantized, "triton")
    fused = compiled.notes["fused"]
    assert not set(fused) & set(REBUILD)
    products = 6 if form != "codebook" else 5  # vptq leaves an embedding and what is tied to it
    assert fused[f"{form}_linear"] == products * lookups
    if form != "codebook":
        assert fused[f"{form}_embedding"] == 1
    dense = [
        name
        for name, tensor in compiled.body.state_dict().items()
        if tensor.is_floating_point() and tensor.numel() >= 40 * SIZE
    ]
    assert len(dense) == (1 if form == "codebook" else 0)
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 40, (2, 7), generator=generator)
    with torch.no_grad():
        wanted = quantized(ids)
        assert float((compiled(ids) - wanted).norm() / wanted.norm()) <= 1e-6


class Layers(nn.Module):
    """A function of x with one quantized layer."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.layer = nn.Linear(SIZE, SIZE)
        self.vector = nn.Parameter(torch.rand(SIZE))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def quantized_layer(function: Callable[..., Tensor], dtype: torch.dtype) -> Program:
    torch.manual_seed(0)
    model = Layers(function).to(dtype).eval()
    found = gw.trace(model, {"x": torch.randn(2, 3, SIZE).to(dtype)}, dynamic={"x": {0: "batch"}})
    return gw.passes.quantize.Rtn(bits=4, block=32)(found)


EPILOGUES: dict[str, tuple[Callable[..., Tensor], set[str]]] = {
    "activation": (lambda m, x: F.gelu(m.layer(x)), {"bias", "activation"}),
    "another bias": (lambda m, x: F.linear(x, m.layer.weight) + m.vector, {"bias"}),
    "residual": (lambda m, x: F.relu(x + m.layer(x)), {"bias", "added", "activation"}),
    "two residuals": (lambda m, x: x * 2 + m.layer(x) + x, {"bias", "added"}),
    "read twice": (lambda m, x: (lambda y: F.relu(y) + y)(m.layer(x)), {"bias"}),
    "twice itself": (lambda m, x: (lambda y: y + y)(m.layer(x)), {"bias"}),
    "smaller summand": (lambda m, x: m.layer(x) + x[:1], {"bias"}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", EPILOGUES)
def test_what_follows_the_product_goes_into_it(name: str, dtype: torch.dtype) -> None:
    function, expected = EPILOGUES[name]
    program = quantized_layer(function, dtype)
    fused = fuse(program)
    assert count_ops(fused.graph)["blocks_linear"] == 1
    (call,) = [n for n in fused.graph.nodes if "blocks_linear" in str(n.target)]
    found = {"bias"} if call.args[4] is not None else set()
    found |= {"added"} if call.args[7] is not None else set()
    found |= {"activation"} if call.args[10] != "none" else set()
    assert found == expected
    assert measure(program, fused).relative <= (1e-6 if dtype == torch.float32 else 2e-3)


def test_a_convolution_keeps_its_rebuilt_weight() -> None:
    torch.manual_seed(0)
    program = gw.trace(nn.Conv2d(4, 8, 3).eval(), (torch.randn(1, 4, 8, 8),))
    quantized = gw.passes.quantize.Rtn(bits=4, block=16)(program)
    assert count_ops(fuse(quantized).graph) == {"dequantize_blocks": 1}


def test_scales_that_are_quantized_are_computed_once(
    program: Program, batches: list[tuple[Tensor]]
) -> None:
    compiled = gw.lower(gw.passes.quantize.Nf4(double_quantization=True)(program), "triton")
    names = [name for name in compiled.body.state_dict() if name.endswith("_rebuilt")]
    assert len(names) == 6
    assert not any("scale_codes" in n and "rebuilt" not in n for n in compiled.body.state_dict())


def test_the_kernels_compute_what_the_program_does(
    program: Program, batches: list[tuple[Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU by Triton's interpreter: one and several tokens, gathers, corrections."""
    pytest.importorskip("triton")
    ids = torch.randint(0, 40, (1, 3), generator=torch.Generator().manual_seed(3))
    quantized = QUANTIZERS["blocks"][0]()(program, calibration=batches)
    fixed = gw.passes.compensate.Eora(rank=4)(quantized, calibration=batches, teacher=program)
    compiled = gw.lower(fixed, "triton")
    with torch.no_grad():
        for given in (ids[:, :1], ids):
            monkeypatch.delenv(SWITCH, raising=False)
            wanted = fixed(given)
            monkeypatch.setenv(SWITCH, "triton")
            found = compiled(given)
            assert float((found - wanted).norm() / wanted.norm()) <= 2e-6


def test_an_nf4_weight_of_a_half_precision_model() -> None:
    torch.manual_seed(0)
    model = Layers(lambda m, x: m.layer(x)).half().eval()
    program = gw.trace(model, {"x": torch.randn(2, 3, SIZE).half()}, dynamic={"x": {0: "batch"}})
    fused = fuse(gw.passes.quantize.Nf4()(program))
    assert count_ops(fused.graph) == {"table_linear": 1}  # its scales stay in float32
    x = torch.randn(4, 3, SIZE).half()
    assert measure(gw.passes.quantize.Nf4()(program), fused, [(x,)]).relative <= 1e-3


class Turned(nn.Module):
    """A layer as GPT-2 writes it: the weight is (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(SIZE, 48)), nn.Parameter(torch.rand(48))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, SIZE), self.weight)


def test_addmm_with_a_turned_weight() -> None:
    torch.manual_seed(0)
    program = gw.trace(Turned().eval(), {"x": torch.randn(2, 3, SIZE)})
    quantized = gw.passes.quantize.Rtn(bits=4, block=32)(program)
    fused = fuse(quantized)
    assert count_ops(fused.graph) == {"blocks_linear": 1}
    assert measure(quantized, fused).relative <= 1e-6


def test_a_correction_of_an_int8_weight_stands_beside_its_product() -> None:
    torch.manual_seed(0)
    program = gw.trace(nn.Linear(SIZE, 48).eval(), {"input": torch.randn(3, SIZE)})
    editor = Editor(program, by="test")
    (old,) = [n for n in editor.graph.nodes if n.target == "weight"]
    (user,) = old.users
    weight = program.state["weight"].detach()
    scale = weight.abs().amax(1) / 127
    tensors = {
        "codes": (weight / scale[:, None]).round().to(torch.int8),
        "scale": scale,
        "b": torch.randn(48, 3),
        "a": torch.randn(3, SIZE),
    }
    nodes = [editor.get(editor.add_state(name, tensor)) for name, tensor in tensors.items()]
    rebuilt = editor.call(dequantize, *nodes[:2], None, 0, before=user)
    user.replace_input_with(old, editor.call(add_low_rank, rebuilt, *nodes[2:], before=user))
    corrected = editor.finish()
    fused = fuse(corrected)
    assert count_ops(fused.graph) == {"int8_linear": 1}
    assert measure(corrected, fused).relative <= 1e-6
