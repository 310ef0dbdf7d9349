"""The canonical form: one spelling per operation, same values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.canonical.normalize import canonicalize
from graphwright.ir.graph.nodes import op_name

aten = torch.ops.aten


class Wrap(nn.Module):
    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__()
        self.body = body
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 2, generator=generator()))

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def convolution(m: Wrap, x: Tensor) -> Tensor:
    return torch.convolution(x, m.weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)


def transposed_convolution(m: Wrap, x: Tensor) -> Tensor:
    return torch.convolution(
        x, m.weight.transpose(0, 1), None, [2, 2], [0, 0], [1, 1], True, [1, 1], 1
    )


def same_padding(m: Wrap, x: Tensor) -> Tensor:
    return F.conv2d(x, m.weight, padding="same", dilation=(1, 3))


def native_batch_norm(m: Wrap, x: Tensor) -> Tensor:
    ones = torch.ones(3)
    return torch.native_batch_norm(x, ones, ones, ones * 0.1, ones * 2, False, 0.1, 1e-5)[0]


def native_layer_norm(m: Wrap, x: Tensor) -> Tensor:
    return torch.native_layer_norm(x, [6], None, None, 1e-5)[0]


def native_group_norm(m: Wrap, x: Tensor) -> Tensor:
    return torch.native_group_norm(x, None, None, x.shape[0], 3, 30, 3, 1e-5)[0]


def core_softmax(m: Wrap, x: Tensor) -> Tensor:
    return torch._softmax(x, -1, False) + torch._log_softmax(x, 1, False)


def matrix_product(m: Wrap, x: Tensor) -> Tensor:
    w = m.weight.reshape(12, 6)
    return torch.mm(x.reshape(-1, 6), w.t())


def casts(m: Wrap, x: Tensor) -> Tensor:
    return x.to(torch.float64).type_as(x).float().to("cpu").contiguous().detach().clone()


def other_names(m: Wrap, x: Tensor) -> Tensor:
    y = torch.subtract(torch.multiply(x, 2), torch.min(x, -x))
    return torch.concat([y, y.absolute()], 1).swapaxes(0, 1) * (x > 0).__and__(x < 1).any()


def views(m: Wrap, x: Tensor) -> Tensor:
    y = x.permute(0, 2, 3, 1)
    return y.contiguous().view(x.shape[0], -1).view_as(x.reshape(x.shape[0], -1))


def differences(m: Wrap, x: Tensor) -> Tensor:
    first = torch.diff(x, dim=1, prepend=x[:, :1])
    return first * torch.diff(x > 0, append=x[..., :1] > 0)


def norms(m: Wrap, x: Tensor) -> Tensor:
    return (
        torch.linalg.norm(x, dim=1) + torch.linalg.norm(x) + torch.linalg.norm(x, 1, dim=[-1]).sum()
    )


def broadcasts(m: Wrap, x: Tensor) -> Tensor:
    left, right = torch.broadcast_tensors(x[:, :1], x[:1])
    return left * right


def outer_product(m: Wrap, x: Tensor) -> Tensor:
    return torch.outer(x.mean((1, 2, 3)), torch.arange(3, dtype=torch.float64))


def squared_error(m: Wrap, x: Tensor) -> Tensor:
    return F.mse_loss(x, x * 2) + F.mse_loss(x, x * 3, reduction="sum")


CASES: list[tuple[Callable[..., Any], str]] = [
    (convolution, "conv2d"),
    (transposed_convolution, "transpose conv_transpose2d"),
    (same_padding, "pad conv2d"),
    (native_batch_norm, "ones mul mul batch_norm"),
    (native_layer_norm, "layer_norm"),
    (native_group_norm, "group_norm"),
    (core_softmax, "softmax log_softmax add"),
    (matrix_product, "reshape reshape t mm"),
    (casts, "to to"),
    (other_names, "mul neg minimum sub abs cat transpose gt lt bitwise_and any mul"),
    (norms, "linalg_vector_norm linalg_vector_norm add linalg_vector_norm sum add"),
    (outer_product, "mean arange unsqueeze mul"),
    (squared_error, "mul sub mul mean mul sub mul sum add"),
    (broadcasts, "slice slice slice mul"),
    (differences, "slice slice cat slice slice sub gt slice gt cat slice slice ne mul"),
    (views, "permute reshape reshape reshape"),
]


@pytest.mark.parametrize(("body", "expected"), CASES, ids=lambda v: getattr(v, "__name__", ""))
def test_one_spelling_and_the_same_values(body: Callable[..., Any], expected: str) -> None:
    model = Wrap(body)
    x = torch.randn(2, 3, 5, 6, generator=generator())
    program = gw.trace(model, (x,), {"x": {0: "n"}})
    ops = [op_name(n) for n in program.graph.nodes if n.op == "call_function"]
    assert [op for op in ops if op not in ("sym_size", "expand")] == expected.split()
    for size in (1, 2, 5):
        x = torch.randn(size, 3, 5, 6, generator=generator())
        torch.testing.assert_close(program(x), model(x))


def test_a_linear_layer_that_was_decomposed_is_one_again() -> None:
    class Decomposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.fc.bias, x, self.fc.weight.t())

    model, x = Decomposed(), torch.randn(2, 4)
    program = gw.trace(model, (x,), {"x": {0: "n"}})
    assert [n.target for n in program.graph.nodes if n.op == "call_function"] == [
        aten.linear.default
    ]
    torch.testing.assert_close(program(x), model(x))


def test_canonical_form_is_reached_in_one_step() -> None:
    program = gw.trace(Wrap(other_names), (torch.randn(2, 3, 5, 6),), {"x": {0: "n"}})
    again = canonicalize(program)
    assert [n.target for n in again.graph.nodes] == [n.target for n in program.graph.nodes]


def test_a_size_that_went_through_a_tensor_is_that_size() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(20, 3))

        def forward(self, x: Tensor) -> Tensor:
            span = torch.scalar_tensor(min(x.shape[0], 8), dtype=torch.int64)
            near = self.table[10 - span : span + 10, :]
            return x @ near.t()

    model = Table()
    program = gw.trace(model, (torch.randn(4, 3),), {"x": {0: "n"}})
    assert "item" not in [op_name(n) for n in program.graph.nodes]
    assert program.signature.outputs[0].shape[0] == "n"
    for size in (1, 4, 11):
        x = torch.randn(size, 3)
        torch.testing.assert_close(program(x), model(x))


def test_rotary_embeddings_in_complex_numbers_become_real_ones() -> None:
    class Rotary(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            steps = torch.arange(x.shape[1], dtype=torch.float32)
            angles = torch.outer(steps, 10.0 ** -torch.arange(3.0))
            turn = torch.polar(torch.ones_like(angles), angles)
            turned = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * turn.unsqueeze(0)
            return torch.view_as_real(turned).flatten(2) + turned.conj().imag.abs().sum()

    model = Rotary()
    program = gw.trace(model, (torch.randn(2, 5, 6),), {"x": {0: "n", 1: "seq"}})
    assert not any(
        n.meta["val"].dtype.is_complex
        for n in program.graph.nodes
        if isinstance(n.meta.get("val"), Tensor)
    )
    for batch, seq in ((2, 5), (1, 1), (3, 8)):
        x = torch.randn(batch, seq, 6)
        torch.testing.assert_close(program(x), model(x), rtol=1e-6, atol=1e-6)


def test_a_complex_operation_without_a_rule_stays_and_the_others_become_real() -> None:
    class Filter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 2, generator=generator()))

        def forward(self, x: Tensor) -> Tensor:
            spectrum = torch.fft.rfft(x) * torch.view_as_complex(self.weight)
            spectrum = torch.cat([spectrum[..., :2] * 1j, spectrum[..., 2:] / (2 + 1j)], -1)
            return torch.fft.irfft(spectrum + spectrum.conj() * 0.5) + spectrum.angle().sum()

    model, x = Filter(), torch.randn(2, 8)
    program = gw.trace(model, (x,), {"x": {0: "n"}})
    complexes = [
        op_name(n)
        for n in program.graph.nodes
        if isinstance(n.meta.get("val"), Tensor) and n.meta["val"].dtype.is_complex
    ]
    assert complexes == ["fft_rfft", "complex"]
    for size in (1, 2, 5):
        x = torch.randn(size, 8)
        torch.testing.assert_close(program(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "function",
    [
        lambda z: z @ z.T,
        lambda z: torch.einsum("ij,kj->ik", z, z),
        lambda z: z.exp() + 2.0,
        lambda z: 1.5 - z,
        lambda z: z.reciprocal() - z.real,
        lambda z: z.imag * z.square(),
        lambda z: torch.stack([z, z.roll(1, 0)]).sum(1),
        lambda z: nn.functional.pad(z, (1, 2), value=3.0).mean(1),
        lambda z: torch.log(z) * z.abs(),
        lambda z: torch.sqrt(z),
        lambda z: torch.linalg.inv(z[:, :2].mT @ z[:, :2] + 4 * torch.eye(2)),
    ],
)
def test_complex_arithmetic_gives_what_torch_gives(function: Callable[[Tensor], Tensor]) -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.view_as_real(function(torch.view_as_complex(x.unflatten(-1, (-1, 2)))))

    model, x = Net(), torch.randn(5, 8, generator=generator())
    program = gw.trace(model, (x,), {"x": {0: "n"}})
    for size in (3, 5, 9):
        x = torch.randn(size, 8, generator=generator())
        torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-4)


def test_distances_to_a_codebook_are_products() -> None:
    class Nearest(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.codes = nn.Parameter(torch.randn(40, 6, generator=generator()))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            distances = torch.cdist(x, self.codes)
            return distances, distances.argmin(1)

    model = Nearest()
    program = gw.trace(model, (torch.randn(30, 6, generator=generator()),), {"x": {0: "n"}})
    assert "cdist" not in [op_name(n) for n in program.graph.nodes]
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(7))
    distances, nearest = program(x)
    slow = (x[:, None] - model.codes[None]).double().norm(dim=-1)
    torch.testing.assert_close(distances.double(), slow, rtol=1e-5, atol=1e-5)
    assert torch.equal(nearest, slow.argmin(1))
