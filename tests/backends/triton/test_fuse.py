"""The fuser: every pattern fires where it should, not where it must not, and keeps the numbers.

Models are written as published ones are. The reference is the traced program itself, whose ops are
torch's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphwright.backends.triton.fuse import count_ops, fuse
from graphwright.ir.check.verify import measure
from graphwright.ir.edit import Editor
from graphwright.ir.ops.int8 import dequantize
from graphwright.ir.program import Program
from graphwright.ir.trace.capture import trace

SIZE = 12


class Plain(nn.Module):
    """A function of x with two linear layers and a vector at hand."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.a, self.b = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE, bias=False)
        self.vector = nn.Parameter(torch.rand(SIZE))

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


@torch.no_grad()
def traced(function: Callable[..., Any], dtype: torch.dtype = torch.float32) -> Program:
    torch.manual_seed(0)
    model = Plain(function).to(dtype).eval()
    return trace(model, (torch.randn(3, 5, SIZE).to(dtype),), dynamic={"x": {0: "batch", 1: "seq"}})


def rms(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """As Llama, Mistral and Qwen write it."""
    wide = x.to(torch.float32)
    variance = wide.pow(2).mean(-1, keepdim=True)
    return weight * (wide * torch.rsqrt(variance + 1e-6)).to(dtype)


def gemma_rms(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (wide * (1.0 + weight.float())).type_as(x)


def gelu_new(x: Tensor) -> Tensor:
    inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))
    return 0.5 * x * (1.0 + torch.tanh(inner))


def residual_rms(model: Plain, x: Tensor) -> Tensor:
    total = x + model.a(x)
    return total + model.b(rms(total, model.vector, x.dtype))


def attention(model: Plain, x: Tensor) -> Tensor:
    mask = torch.zeros(x.shape[1], x.shape[1], dtype=x.dtype).masked_fill(
        torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1), -1e4
    )
    scores = model.a(x) @ model.b(x).transpose(1, 2) / math.sqrt(SIZE) + mask
    return scores.softmax(-1) @ x


FIRES: dict[str, tuple[Callable[..., Any], dict[str, int]]] = {
    "linear_gelu": (lambda m, x: F.gelu(m.a(x)), {"bias_act": 1}),
    "added_bias_relu": (lambda m, x: F.relu(m.b(x) + m.vector), {"bias_act": 1}),
    "gelu_new": (lambda m, x: gelu_new(m.b(x)), {"bias_act": 1}),
    "gelu_erf": (lambda m, x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))), {"bias_act": 1}),
    "quick_gelu": (lambda m, x: x * torch.sigmoid(1.702 * x), {"bias_act": 1}),
    "spelled_silu": (lambda m, x: x * torch.sigmoid(x), {"bias_act": 1}),
    "swiglu": (lambda m, x: F.silu(m.a(x)) * m.b(x), {"gated_act": 1}),
    "swiglu_packed": (lambda m, x: F.silu(x[..., :6]) * x[..., 6:], {"gated_act": 1}),
    "geglu_tanh": (lambda m, x: gelu_new(m.a(x)) * m.b(x), {"gated_act": 1}),
    "rms_norm": (lambda m, x: rms(x, m.vector, x.dtype), {"rms_norm": 1}),
    "aten_rms_norm": (lambda m, x: F.rms_norm(x, (SIZE,), m.vector, 1e-5), {"rms_norm": 1}),
    "gemma": (lambda m, x: gemma_rms(x + m.a(x), m.vector), {"add_rms_norm": 1}),
    "residual_rms": (residual_rms, {"add_rms_norm": 1}),
    "residual_layer_norm": (
        lambda m, x: F.layer_norm(x + m.a(x), (SIZE,), m.vector, m.vector),
        {"add_layer_norm": 1},
    ),
    "attention_mask": (attention, {"scale_mask": 1}),
}


@pytest.mark.parametrize("name", FIRES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fires_and_keeps_the_function(name: str, dtype: torch.dtype) -> None:
    function, expected = FIRES[name]
    program = traced(function, dtype)
    fused = fuse(program)
    assert count_ops(fused.graph) == expected
    generator = torch.Generator().manual_seed(1)
    other = torch.randn(2, 7, SIZE, generator=generator).to(dtype)
    bound = 1e-6 if dtype == torch.float32 else 1e-2
    assert measure(program, fused, [(other,)]).relative <= bound


KEEPS: dict[str, Callable[..., Any]] = {
    "activation read twice": lambda m, x: (lambda y: y * m.b(x) + y)(F.silu(x)),
    "broadcast addition before a norm": lambda m, x: F.layer_norm(x + m.vector, (SIZE,)),
    "norm over two dimensions": lambda m, x: F.layer_norm(x[:, :5] + x[:, :5], (5, SIZE)),
    "mean over another dimension": lambda m, x: (
        m.vector * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6))
    ),
    "cube instead of square": lambda m, x: (
        m.vector * (x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1e-6))
    ),
    "another constant in the activation": lambda m, x: x * torch.sigmoid(1.5 * x),
    "scale and add without a softmax": lambda m, x: x * 0.5 + m.vector,
    "mask that enlarges the scores": lambda m, x: (x[:, :1] * 0.5 + x.new_ones(3, SIZE)).softmax(
        -1
    ),
}


@pytest.mark.parametrize("name", KEEPS)
def test_leaves_what_is_not_the_pattern(name: str) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        program = trace(Plain(KEEPS[name]).eval(), (torch.randn(3, 5, SIZE),))
    assert count_ops(fuse(program).graph) == {}


def test_sum_is_written_only_where_it_is_read() -> None:
    last = fuse(traced(lambda m, x: F.layer_norm(x + m.a(x), (SIZE,))))
    middle = fuse(traced(lambda m, x: (lambda s: s + F.layer_norm(s, (SIZE,)))(x + m.a(x))))
    for program, keep in ((last, False), (middle, True)):
        (call,) = [n for n in program.graph.nodes if "add_layer_norm" in str(n.target)]
        assert call.args[5] is keep


def with_int8_weight(program: Program, name: str) -> Program:
    """The program with one linear weight stored as int8 codes and rebuilt in the graph."""
    editor = Editor(program, by="test")
    weight = program.state[name].detach()
    scale = weight.abs().amax(1) / 127
    editor.add_state(f"{name}.codes", (weight / scale[:, None]).round().to(torch.int8))
    editor.add_state(f"{name}.scale", scale)
    old = editor.get(name)
    (user,) = old.users
    rebuilt = editor.call(
        dequantize, editor.get(f"{name}.codes"), editor.get(f"{name}.scale"), None, 0, before=user
    )
    user.replace_input_with(old, rebuilt)
    return editor.finish()


@pytest.mark.parametrize("weight", ["a.weight", "b.weight"])
def test_int8_weight_and_activation_become_one_op(weight: str) -> None:
    layer = weight[0]
    program = with_int8_weight(
        traced(lambda m, x: F.gelu(getattr(m, layer)(x)) + getattr(m, "ab".replace(layer, ""))(x)),
        weight,
    )
    fused = fuse(program)
    assert count_ops(fused.graph) == {"int8_linear": 1}
    (call,) = [n for n in fused.graph.nodes if "int8_linear" in str(n.target)]
    assert call.args[4] == "gelu"
    assert weight not in fused.state
    assert measure(program, fused).relative <= 1e-6
