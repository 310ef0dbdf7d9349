from __future__ import annotations

import pytest
import torch
from models.heavy_tailed import heavy_tailed, layer, samples
from models.processor import saturates
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.layers.products import product, weight_value
from graphwright.ir.layers.selectors import layers
from graphwright.ir.program import Program
from graphwright.passes.quantize._math import adaquant

CHAIN = ("text", [("quantize.adaquant", {"iterations": 2})])


def settings(**changes: object) -> adaquant.AdaquantSettings:
    values: dict[str, object] = {
        "bits": 4, "activation_bits": None, "block": 24, "symmetric": False, "iterations": 200,
        "batch": 50, "rate": 1e-4, "bias_rate": 1e-3, "range_rate": 1e-3, "input_rate": 1e-2,
    }  # fmt: skip
    return adaquant.AdaquantSettings(**{**values, **changes})  # type: ignore[arg-type]


def test_a_rounded_value_is_within_half_a_step_and_zero_stays_zero() -> None:
    x = torch.cat([torch.linspace(-2, 5, 99), torch.zeros(1)])
    for bits in (2, 4, 8):
        scale, zero = adaquant.parameters(x.min(), x.max() - x.min(), bits, False)
        value = adaquant.fake(x, scale, zero, bits)
        assert float((value - x).abs().max()) <= float(scale) * 0.5001 + float(scale) * 0.5
        inside = (x >= (0 - zero) * scale) & (x <= (2**bits - 1 - zero) * scale)
        assert float((value - x)[inside].abs().max()) <= float(scale) * 0.5001
        assert float(value[-1]) == 0.0
        assert len(value.unique()) <= 2**bits


def test_gradients_reach_weight_bias_and_ranges() -> None:
    g, weight, bias = layer()
    x = heavy_tailed(20)
    student = adaquant.Student(g, weight, bias, samples(x), settings(activation_bits=4))
    student(x).square().sum().backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().sum()) > 0, name


@pytest.mark.parametrize("inputs", [None, 4])
def test_learning_lowers_the_error_on_data_it_has_not_seen(inputs: int | None) -> None:
    g, weight, bias = layer()
    seen, other = heavy_tailed(400), heavy_tailed(400, seed=1)

    def held_out(iterations: int) -> float:
        found = adaquant.learn(
            g, weight, bias, samples(seen), settings(activation_bits=inputs, iterations=iterations),
            False, 0,
        )  # fmt: skip
        x = other
        if found.grid is not None:
            scale, zero, low, high = found.grid
            x = ((x / scale).round() + zero).clamp(low, high).sub(zero) * scale
        value = (found.codes.float() - found.zero.float()) * found.scale
        y = product(g, x, value, found.bias)
        target = product(g, other, weight, bias)
        return float((y - target).norm() / target.norm())

    assert held_out(400) < 0.96 * held_out(0)


def test_without_steps_it_is_rounding_to_nearest() -> None:
    g, weight, bias = layer()
    found = adaquant.learn(
        g, weight, bias, samples(heavy_tailed(50)), settings(iterations=0), False, 0
    )
    low, high = weight.double().amin(1).clamp(max=0), weight.double().amax(1).clamp(min=0)
    scale = ((high - low) / 15)[:, None]
    zero = (-low[:, None] / scale).round()
    codes = ((weight.double() / scale) + zero).round().clamp(0, 15)
    assert int((codes - found.codes.double()).abs().max()) <= 1  # ties in float32
    assert float((codes != found.codes.double()).double().mean()) < 0.01
    torch.testing.assert_close(found.scale.double(), scale, rtol=1e-5, atol=0)
    assert torch.equal(found.zero.double(), zero)


def test_what_is_not_better_is_not_kept() -> None:
    g, weight, bias = layer()
    found = adaquant.learn(
        g, weight, bias, samples(heavy_tailed(50)), settings(rate=10.0), False, 0
    )
    plain = adaquant.learn(
        g, weight, bias, samples(heavy_tailed(50)), settings(iterations=0), False, 0
    )
    assert torch.equal(found.codes, plain.codes)
    assert found.after == found.before


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.fc = nn.Linear(32, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.deep(torch.relu(self.conv(x))))
        return self.fc(torch.nn.functional.adaptive_avg_pool2d(h, 2).flatten(1))


def program() -> Program:
    torch.manual_seed(0)
    return gw.trace(Net().eval(), {"x": torch.randn(4, 3, 8, 8)}, dynamic={"x": {0: "batch"}})


def batches() -> list[tuple[Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(16, 3, 8, 8),) for _ in range(2)]


FAST = {"iterations": 60, "lr": 1e-3}


def relative(before: Program, after: Program) -> float:
    torch.manual_seed(2)
    x = torch.randn(32, 3, 8, 8)
    with torch.no_grad():
        return float((after(x) - before(x)).norm() / before(x).norm())


def test_a_network_gets_closer_than_by_rounding() -> None:
    before = program()
    errors = []
    for options in ({"iterations": 0}, FAST):
        after = gw.passes.quantize.Adaquant(bits=3, activation_bits=4, **options)(
            before, calibration=batches()
        )
        errors.append(relative(before, after))
    assert errors[1] < 0.9 * errors[0]


def test_every_layer_is_reported_and_depthwise_ones_keep_eight_bits() -> None:
    context = Context(calibration=batches())
    result = gw.passes.quantize.Adaquant(bits=3, activation_bits=4, **FAST).run(program(), context)
    told = {a.layer: a.what.split(",")[0] for a in result.actions}
    assert told == {"conv": "int3 on int4 inputs", "deep": "int8 on int8 inputs",
                    "fc": "int3 on int4 inputs"}  # fmt: skip
    assert result.metrics["layer_error_learned"] < result.metrics["layer_error_rounded"]
    names = {str(n.target) for n in result.program.graph.nodes}
    assert "graphwright.fake_quantize.default" in names
    assert "graphwright.dequantize_blocks.default" in names


def test_later_layers_learn_from_what_the_quantized_ones_give() -> None:
    before = program()
    one = gw.passes.quantize.Adaquant(bits=2, sequential=True, **FAST)
    other = gw.passes.quantize.Adaquant(bits=2, sequential=False, **FAST)
    chained, parallel = (p(before, calibration=batches()) for p in (one, other))
    first, *_, last = layers(before)

    def weight(found: Program, name: str) -> Tensor:
        return weight_value(found, next(x for x in layers(found) if x.name == name))

    assert torch.equal(weight(chained, first.name), weight(parallel, first.name))
    assert not torch.equal(weight(chained, last.name), weight(parallel, last.name))


def is_integer_where_that_is_exact(compiled: gw.Compiled) -> bool:
    """On a processor that saturates, the layer is computed in float, and the summary says so."""
    is_integer = "MatMulIntegerToFloat" in compiled.notes["kernels"]
    said = any("computed in float: fc" in text for text in compiled.notes.get("warnings", []))
    return (is_integer, said) == (not saturates(), saturates())


def test_eight_bits_around_zero_run_on_integer_kernels() -> None:
    before = program()
    after = gw.passes.quantize.Adaquant(
        bits=8, activation_bits=8, symmetric=True, targets=["fc"], **FAST
    )(before, calibration=batches())
    compiled = gw.lower(after, "onnxruntime")
    assert is_integer_where_that_is_exact(compiled)
    x = batches()[0][0]
    torch.testing.assert_close(compiled(x), after(x).detach(), rtol=1e-3, atol=1e-3)


def test_a_program_of_codes_is_refused() -> None:
    rough = gw.passes.quantize.Rtn(bits=4)(program())
    with pytest.raises(ModelError, match="can quantize none of its targets"):
        gw.passes.quantize.Adaquant()(rough, calibration=batches())


def test_weights_and_biases_are_frozen() -> None:
    before = program()
    after = gw.passes.quantize.Adaquant(bits=8, activation_bits=8, method="nelder_mead")(
        before, calibration=batches()
    )
    assert torch.equal(after.state["conv.bias"], before.state["conv.bias"])
    assert not any("bias" in name and "fc" in name for name in after.state)
    for one in layers(before):
        other = next(x for x in layers(after) if x.name.startswith(one.name))
        was, now = weight_value(before, one), weight_value(after, other)
        assert float((was - now).abs().max()) < 0.05 * float(was.abs().max())
    rounded = gw.passes.quantize.Adaquant(bits=8, activation_bits=8, iterations=0)(
        before, calibration=batches()
    )
    assert relative(before, after) < 0.7 * relative(before, rounded)


def test_searched_ranges_around_zero_run_on_integer_kernels() -> None:
    before = program()
    after = gw.passes.quantize.Adaquant(
        bits=8, activation_bits=8, symmetric=True, targets=["fc"], method="nelder_mead"
    )(before, calibration=batches())
    assert is_integer_where_that_is_exact(gw.lower(after, "onnxruntime"))


@pytest.mark.parametrize("option", ["batch_size", "lr", "bias_lr", "range_lr", "input_lr"])
def test_the_search_takes_no_options_of_steps(option: str) -> None:
    value = 7 if option == "batch_size" else 0.5
    gw.passes.quantize.Adaquant(**{option: value})
    with pytest.raises(ArgumentError, match=f"{option} has no part in method nelder_mead"):
        gw.passes.quantize.Adaquant(method="nelder_mead", **{option: value})
