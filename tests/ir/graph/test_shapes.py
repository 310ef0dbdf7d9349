"""Shapes propagated fast are those of torch's fake tensors, node by node."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from conformance import zoo
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import disable_fake_tensor_cache

import graphwright as gw
from graphwright.ir.graph import fake_calls
from graphwright.ir.graph.fake import fake_call
from graphwright.ir.graph.nodes import fake_mode_of
from graphwright.ir.graph.shapes import propagate_shapes

aten = torch.ops.aten


def plain_values(program: gw.Program) -> dict[str, Any]:
    """Every call of a graph on fake tensors, nothing remembered and nothing left out."""
    mode = fake_mode_of(program.graph)
    values: dict[fx.Node, Any] = {}
    with disable_fake_tensor_cache(mode), torch.no_grad():
        for node in program.graph.nodes:
            if node.op == "get_attr":
                tensor = program.state[str(node.target)].detach()
                values[node] = mode.from_tensor(tensor, static_shapes=True)
            elif node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
                values[node] = fake_call(node.target, args, kwargs, mode)
            elif node.op == "placeholder":
                values[node] = node.meta["val"]
    return {node.name: value for node, value in values.items()}


def described(value: Any, names: dict[str, str]) -> Any:
    """All that a value says of itself; symbols are numbered as they come."""
    if isinstance(value, Tensor):
        numbers = (*value.shape, *value.stride(), value.storage_offset())
        kind = (value.dtype, value.device, value.layout, value.requires_grad, value.is_conj())
        return (*(described(number, names) for number in numbers), *kind)
    if isinstance(value, list | tuple):
        return (type(value), *(described(part, names) for part in value))
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        expression = value.node.expr
        symbols = sorted(expression.free_symbols, key=lambda s: (len(s.name), s.name))
        for symbol in symbols:
            names.setdefault(symbol.name, f"size_{len(names)}")
        return str(expression.xreplace({s: sympy.Symbol(names[s.name]) for s in symbols}))
    return value


def assert_exact(program: gw.Program) -> None:
    names: dict[str, str] = {}
    expected = {n: described(v, names) for n, v in plain_values(program).items()}
    env = fake_mode_of(program.graph).shape_env
    known = (len(env.guards), str(env.replacements)) if env is not None else None
    propagate_shapes(program)
    names = {}
    nodes = [n for n in program.graph.nodes if n.op != "output"]
    assert {n.name: described(n.meta["val"], names) for n in nodes} == expected
    # no free size was made a fixed one, or tied to another
    assert known == ((len(env.guards), str(env.replacements)) if env is not None else None)


@pytest.mark.parametrize("free", [True, False], ids=["free", "fixed"])
@pytest.mark.parametrize(
    "name",
    [
        "resnet",
        "convnext",
        "bert",
        "gpt2",
        pytest.param("mixtral", marks=pytest.mark.slow),
        pytest.param("unispeech", marks=pytest.mark.slow),
    ],
)
def test_architectures_have_the_shapes_that_torch_gives(name: str, free: bool) -> None:
    architecture = zoo.load()[name]
    examples = {**architecture.inputs(), **architecture.constants}
    dynamic = architecture.dynamic if free else None
    program = gw.trace(architecture.build(), examples, dynamic=dynamic, check=False)
    assert_exact(program)


class Odd(nn.Module):
    """What is easily told wrong: sizes of 1, channels last, offsets, ties, mixed dtypes, views."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 1, 3, padding=1)
        self.one = nn.BatchNorm2d(1)
        self.wide = nn.Conv2d(1, 4, 1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        x = self.one(self.conv(image)).relu()
        x = self.norm(self.wide(x).to(memory_format=torch.channels_last)).relu()
        left, right = x.chunk(2, dim=1)
        turned = right.permute(0, 2, 3, 1).tanh() + left.permute(0, 2, 3, 1).tanh()
        mixed = (x > 0) & (x.double() + x > 1)
        counts = x.long()
        copies = (x.clone(memory_format=torch.contiguous_format) * 2, counts * 2, counts * 2.0)
        pooled = self.norm(x.mean((2, 3), keepdim=True))
        scaled = (pooled + x[:, :, :1, :1], pooled > 0, x + x[:, :1], pooled * x)
        return (turned, mixed, x[:, 1:], *copies, *scaled)


@pytest.mark.parametrize("free", [True, False], ids=["free", "fixed"])
def test_odd_layouts(free: bool) -> None:
    image = torch.randn(2, 3, 6, 6)
    dynamic = {"image": {0: "batch"}} if free else None
    assert_exact(gw.trace(Odd().eval(), {"image": image}, dynamic=dynamic, check=False))


class Frames(nn.Module):
    """Strides over a size that might be 0, as far as its expression says."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 4, 16, stride=8)
        self.linear = nn.Linear(4, 4)

    def forward(self, sound: Tensor) -> Tensor:
        return self.linear(self.conv(sound).transpose(1, 2)).relu()


def test_sizes_that_might_be_zero() -> None:
    dynamic = {"sound": {0: "batch", 2: "time"}}
    sound = torch.randn(2, 1, 64)
    assert_exact(gw.trace(Frames().eval(), {"sound": sound}, dynamic=dynamic, check=False))


class Found(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return (x > 0).nonzero() * 2, (y > 0).nonzero() * 2


def test_sizes_that_depend_on_data_stay_apart() -> None:
    examples = {"x": torch.randn(3, 5), "y": torch.randn(3, 5)}
    program = gw.trace(Found(), examples, check=False)
    assert_exact(program)
    first, second = (node.meta["val"] for node in program.graph.output_node().args[0])
    assert str(first.shape[0]) != str(second.shape[0])


class Blocks(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU()) for _ in range(depth))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


def test_equal_blocks_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    compute = fake_calls.FakeCalls._compute

    def counted(self: Any, target: Any, args: Any, kwargs: Any) -> Any:
        asked.append(target)
        return compute(self, target, args, kwargs)

    program = gw.trace(Blocks(5).eval(), (torch.randn(2, 3, 8),), dynamic={"x": {0: "batch"}})
    monkeypatch.setattr(fake_calls.FakeCalls, "_compute", counted)
    propagate_shapes(program)
    assert sorted(map(str, asked)) == [
        "aten.gelu.default", "aten.layer_norm.default", "aten.linear.default",
    ]  # fmt: skip
    values = [node.meta["val"] for node in program.graph.nodes if node.op == "call_function"]
    assert len({id(value) for value in values}) == len(values) == 15
