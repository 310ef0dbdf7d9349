"""Parametrized weights: every quantize pass stores them first, and says so."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import graphwright as gw
from graphwright.ir.errors import ModelError
from graphwright.ir.layers.selectors import layers
from graphwright.ir.stored.parametrized import store_weights
from graphwright.passes.registry import all_passes


def old_weight_norm(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(module)


NORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "weight norm of old": old_weight_norm,
    "spectral norm of old": nn.utils.spectral_norm,
}


def traced(norm: Callable[[nn.Module], nn.Module]) -> gw.Program:
    torch.manual_seed(0)
    model = nn.Sequential(norm(nn.Linear(32, 64)), nn.ReLU(), norm(nn.Linear(64, 32))).eval()
    return gw.trace(model, (torch.randn(8, 32),), "batch")


@pytest.mark.parametrize("name", NORMS)
def test_the_weights_are_stored_under_their_modules_name(name: str) -> None:
    program = traced(NORMS[name])
    stored, names = store_weights(program, "quantize.test")
    assert names == ["0", "2"]
    assert [(layer.name, layer.weight) for layer in layers(stored)] == [
        ("0", "0.weight"), ("2", "2.weight"),
    ]  # fmt: skip
    x = torch.randn(5, 32)
    torch.testing.assert_close(stored(x), program(x))


def test_a_product_of_low_rank_and_a_transposed_table_stay_as_they_are() -> None:
    class Factors(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(64, 2)), nn.Parameter(torch.randn(2, 32))
            self.table = nn.Parameter(torch.randn(64, 8))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(nn.functional.linear(x, self.a @ self.b), self.table.T)

    program = gw.trace(Factors(), (torch.randn(4, 32),))
    assert store_weights(program, "quantize.test") == (program, [])


def test_every_pass_that_quantizes_weights_stores_them() -> None:
    quantize = {name: cls for name, cls in all_passes().items() if name.startswith("quantize.")}
    without = [name for name, cls in quantize.items() if not cls.stores_weights]
    # they change norms, biases or a decoder's cache alone
    assert without == ["quantize.bias_tuning", "quantize.bn_tuning", "quantize.kv_cache"]


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("method", ["Int8", "Rtn", "Gptq", "Nf4"])
def test_parametrized_layers_are_quantized(name: str, method: str) -> None:
    program = traced(NORMS[name])
    data = [(torch.randn(8, 32),) for _ in range(2)]
    quantized = getattr(gw.passes.quantize, method)()(program, calibration=data)
    assert not any("original" in key or "weight_g" in key for key in quantized.state)
    assert [layer.weight for layer in layers(quantized)] == ["", ""]
    x = torch.randn(8, 32)
    error = (quantized(x) - program(x)).norm() / program(x).norm()
    assert error < 0.25  # 4 bits


def test_their_layers_are_selected_by_name() -> None:
    program = traced(NORMS["weight norm"])
    quantized = gw.passes.quantize.Int8(targets=["2"])(program)
    assert "0.weight" in quantized.state
    with pytest.raises(ModelError, match="matches no layer"):
        gw.passes.quantize.Int8(targets=["fc"])(program)
