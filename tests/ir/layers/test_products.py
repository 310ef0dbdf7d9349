from __future__ import annotations

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.ir.calibration.hessian import hessian, inverse_factor
from graphwright.ir.errors import ModelError
from graphwright.ir.layers.products import (
    as_matrix,
    from_matrix,
    geometry,
    product,
    rows,
    weight_value,
)
from graphwright.ir.layers.selectors import layers

LAYERS = {
    "linear": (nn.Linear(6, 4, bias=False), (3, 5, 6)),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, bias=False), (3, 4, 11)),
    "conv2d": (nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(1, 0), bias=False), (2, 3, 7, 8)),
    "grouped": (nn.Conv2d(6, 4, 3, groups=2, bias=False), (2, 6, 6, 5)),
    "depthwise": (nn.Conv2d(6, 12, 3, groups=6, bias=False), (2, 6, 6, 5)),
    "same": (nn.Conv1d(4, 6, 3, padding="same", bias=False), (3, 4, 9)),
    "conv3d": (nn.Conv3d(2, 4, 2, stride=(1, 2, 1), bias=False), (2, 2, 4, 5, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_is_a_product_of_its_rows_and_its_matrix(name: str) -> None:
    module, shape = LAYERS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    program = gw.trace(module.eval(), (x,))
    (layer,) = layers(program)
    shape_of = geometry(program, layer)
    weight = weight_value(program, layer)
    matrix = as_matrix(shape_of, weight)
    assert matrix.shape[2] == shape_of.depth
    flat = rows(shape_of, x) @ matrix.transpose(1, 2)  # (groups, n, out / groups)
    flat = flat.permute(1, 0, 2).reshape(-1, shape_of.out)
    expected = module(x)
    expected = expected if name == "linear" else expected.movedim(1, -1)
    torch.testing.assert_close(flat, expected.reshape(-1, shape_of.out))
    assert torch.equal(from_matrix(shape_of, matrix), weight)
    torch.testing.assert_close(product(shape_of, x, weight, None), module(x))


def test_matmul_and_addmm_weights_are_turned() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(4, 3))
            self.bias = nn.Parameter(torch.randn(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.addmm(self.bias, x @ self.a, self.b)

    x = torch.randn(5, 6)
    program = gw.trace(Turned().eval(), {"x": x})
    first, second = layers(program, ("matmul", "addmm"))
    shape = geometry(program, first)
    matrix = as_matrix(shape, weight_value(program, first))
    torch.testing.assert_close((rows(shape, x) @ matrix.transpose(1, 2))[0], x @ program.state["a"])
    assert torch.equal(from_matrix(shape, matrix), program.state["a"])
    assert (shape.out, shape.depth) == (4, 6)
    assert geometry(program, second).out == 3


def test_the_running_hessian_is_the_mean_over_all_rows() -> None:
    data = torch.randn(3, 50, 4, generator=torch.Generator().manual_seed(0))
    found = hessian(iter(data.split([7, 1, 42], dim=1)))
    wide = data.double()
    torch.testing.assert_close(found.matrix.double(), wide.transpose(1, 2) @ wide / 50,
                               rtol=1e-5, atol=1e-6)  # fmt: skip
    torch.testing.assert_close(found.mean.double(), wide.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.square.double(), wide.square().mean(1), rtol=1e-5, atol=1e-6)
    assert found.count == 50


def test_the_factor_is_the_upper_cholesky_factor_of_the_inverse() -> None:
    x = torch.randn(40, 12, generator=torch.Generator().manual_seed(0)).double()
    h = x.T @ x / 40
    factor, damping = inverse_factor(h.float(), 0.01)
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(12).double()
    expected = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    torch.testing.assert_close(factor.double(), expected, rtol=1e-4, atol=1e-4)
    assert damping == 0.01


def test_dead_features_and_too_few_samples_still_have_a_factor() -> None:
    x = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
    x[:, 5] = 0
    factor, _ = inverse_factor(x.T @ x / 3, 0.01)
    assert bool(torch.isfinite(factor).all())
    assert float(factor[5].abs().sum() - factor[5, 5]) == 0.0
    _, raised = inverse_factor(torch.ones(40, 40) - 1e-5 * torch.eye(40), 0.0)
    assert raised > 0


def test_a_matrix_that_stays_singular_or_is_not_finite_is_an_error() -> None:
    with pytest.raises(ModelError, match="singular"):
        inverse_factor(-torch.eye(4), 0.01, "fc")
    with pytest.raises(ModelError, match="NaN or infinity at 'fc'"):
        inverse_factor(torch.full((4, 4), float("nan")), 0.01, "fc")
