"""The model is the program: up to what float32 itself loses, and no further; the node is named."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from models import rounding_nets
from torch import Tensor, fx, nn

import graphwright as gw
from graphwright.backends.onnxruntime import stock, translate
from graphwright.backends.onnxruntime.aten import TABLE
from graphwright.backends.onnxruntime.cached_cases import cached_cases
from graphwright.backends.onnxruntime.check import (
    MOST,
    Differs,
    case_of,
    check_cases,
    compare_outputs,
    tolerance_for,
)
from graphwright.ir.check.fidelity import compare
from graphwright.ir.check.precision import run_in_double
from graphwright.ir.errors import LoweringError
from graphwright.ir.generation.record import Generation
from graphwright.ir.generation.trace import trace_decoder

aten = torch.ops.aten


class LosesDigits(nn.Module):
    """Most digits of x go into a large sum and do not come back."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.register_buffer("size", torch.tensor(size))

    def forward(self, x: Tensor) -> Tensor:
        return (x * 3 + self.size) - self.size


def program(model: nn.Module, *shape: int) -> gw.Program:
    torch.manual_seed(0)
    return gw.trace(model.eval(), (torch.randn(*shape),), dynamic={"x": {0: "n"}})


def noisy(exact: Tensor, share: float) -> Tensor:
    """A float32 tensor at the relative distance `share` from `exact`."""
    noise = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1)).double()
    return (exact + noise / noise.norm() * exact.norm() * share).float()


def test_an_output_may_lose_what_the_program_itself_loses() -> None:
    made = program(LosesDigits(1e5), 64, 8)
    case = check_cases(made)[0]
    (exact,) = run_in_double(made, case.inputs)
    loss = compare(exact, case.expected[0]).relative
    assert 3e-4 < loss < 3e-3
    error = compare_outputs(made, case, (noisy(exact, 2 * loss),), 1e-4)
    assert error > 1e-4  # what is reported is the distance from the program's own output
    with pytest.raises(Differs, match=r"against float64 .*, where the program itself loses"):
        compare_outputs(made, case, (noisy(exact, 20 * loss),), 1e-4)


def test_what_other_runs_lose_counts_where_one_lost_little_by_chance() -> None:
    made = program(Plain(), 4, 8)
    case = replace(check_cases(made)[0], losses=lambda: (1e-4,))
    (exact,) = run_in_double(made, case.inputs)
    compare_outputs(made, case, (noisy(exact, 7e-4),), 1e-5)
    with pytest.raises(Differs):
        compare_outputs(made, case, (noisy(exact, 9e-4),), 1e-5)


def test_runs_of_a_decoder_share_the_most_that_one_of_them_loses() -> None:
    made = trace_decoder(tiny_decoder(), check=False)
    record = Generation.of(made)
    assert record is not None
    cases = [case for case in cached_cases(made, record) if not case.drawn]
    expected = [0.0] * len(made.signature.outputs)
    for case in cases:
        exact = run_in_double(made, case.inputs)
        own = [compare(a, b).relative for a, b in zip(exact, case.expected, strict=True)]
        expected = list(map(max, expected, own))
    assert len(cases) > 5
    assert cases[0].losses is not None
    assert cases[0].losses() == pytest.approx(expected, rel=1e-6)


def tiny_decoder() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
             "num_attention_heads": 2, "max_position_embeddings": 64}  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


def test_a_net_that_loses_nothing_is_held_to_the_bound() -> None:
    made = program(Plain(), 4, 8)
    case = check_cases(made)[0]
    (exact,) = run_in_double(made, case.inputs)
    compare_outputs(made, case, (noisy(exact, 0.9e-4),), 1e-4)
    with pytest.raises(Differs, match=r"allowed 0\.0001"):
        compare_outputs(made, case, (noisy(exact, 1.2e-4),), 1e-4)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.erf(torch.relu(self.one(x))))


def test_a_tenth_is_never_called_rounding() -> None:
    made = program(LosesDigits(3e7), 64, 8)
    case = check_cases(made)[0]
    (exact,) = run_in_double(made, case.inputs)
    assert compare(exact, case.expected[0]).relative > MOST / 8
    with pytest.raises(Differs):
        compare_outputs(made, case, (noisy(exact, 1.5 * MOST),), 1e-4)


def test_without_a_reference_the_bound_is_all() -> None:
    made = program(LosesDigits(1e5), 64, 8)
    case = replace(case_of(made, made.examples), reference=None)
    (exact,) = run_in_double(made, case.inputs)
    with pytest.raises(Differs):
        compare_outputs(made, case, (exact.float(),), 1e-4)


def test_nan_shapes_and_dtypes_differ_however_much_is_lost() -> None:
    made = program(LosesDigits(1e5), 64, 8)
    case = check_cases(made)[0]
    (own,) = case.expected
    wrong = own.clone()
    wrong[0, 0] = float("nan")
    for bad in (wrong, own[:-1], own.double()):
        with pytest.raises(Differs) as caught:
            compare_outputs(made, case, (bad,), 1e-4)
        assert caught.value.inputs is case.inputs


@pytest.mark.parametrize(("dtype", "bound"), [
    (torch.float32, 1e-4), (torch.float16, 2**-11), (torch.bfloat16, 2**-8),
])  # fmt: skip
def test_half_precision_is_held_to_its_own_rounding(dtype: torch.dtype, bound: float) -> None:
    made = gw.trace(Plain().to(dtype).eval(), (torch.randn(4, 8).to(dtype),))
    assert tolerance_for(made, 1e-4) == bound


@pytest.mark.slow
def test_a_deep_net_is_lowered_though_float32_moves_its_outputs() -> None:
    torch.manual_seed(0)
    model = rounding_nets.with_statistics(rounding_nets.deep(60), (3, 8, 8), 0, 2)
    made = gw.trace(model, (torch.randn(3, 3, 8, 8),), dynamic={"input": {0: "n"}})
    lowered = gw.lower(made, "onnxruntime")
    assert max(row["relative"] for row in lowered.notes["checked"]) > 1e-4
    assert lowered.notes["dropped"] == {}


# ---- the node is named


def wrong_at(made: gw.Program, target: Any, monkeypatch: pytest.MonkeyPatch, only: bool) -> None:
    """Makes the translation of one op wrong; with `only`, at sizes other than the examples'."""
    right = TABLE[target]
    rows = made.examples[0].shape[0]

    def translation(e: Any, node: fx.Node, *args: Any, **kwargs: Any) -> Any:
        value = right(e, node, *args, **kwargs)
        dtype = node.meta["val"].dtype
        if not only:
            return e.op("Mul", value, e.constant(1.01, dtype))
        size = e.op("Cast", e.op("Shape", value, start=0, end=1), to=1)
        off = e.op("Sub", size, e.constant(float(rows), dtype))
        return e.op("Add", value, off)

    monkeypatch.setitem(TABLE, target, translation)


@pytest.mark.parametrize("only", [False, True])
def test_the_node_that_was_translated_wrongly_is_named(
    monkeypatch: pytest.MonkeyPatch, only: bool
) -> None:
    made = program(Plain(), 4, 8)
    wrong_at(made, aten.erf.default, monkeypatch, only)
    with pytest.raises(LoweringError) as caught:
        gw.lower(made, "onnxruntime")
    assert caught.value.details == ("first node that differs: erf (aten.erf.default)",)
    assert ("'n': 2" in str(caught.value)) == only


def test_the_node_is_named_behind_the_standard_exporter(monkeypatch: pytest.MonkeyPatch) -> None:
    made = program(Plain(), 4, 8)
    monkeypatch.setattr(translate, "taken_apart", lambda *_: None)
    monkeypatch.delitem(TABLE, aten.erf.default)
    right = stock.export_with_torch

    def wrong(*args: Any, **kwargs: Any) -> Any:
        model, values = right(*args, **kwargs)
        (relu,) = [node for node in model.graph if node.op_type == "Relu"]
        relu.op_type = "Neg"
        return model, values

    monkeypatch.setattr(stock, "export_with_torch", wrong)
    with pytest.raises(LoweringError) as caught:
        gw.lower(made, "onnxruntime")
    assert caught.value.details == ("first node that differs: relu (aten.relu.default)",)


def test_an_innocent_node_is_not_named_where_digits_are_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lossy, self.plain = LosesDigits(1e4), Plain()

        def forward(self, x: Tensor) -> Tensor:
            return self.plain(self.lossy(torch.sigmoid(x)))

    made = program(Two(), 4, 8)
    wrong_at(made, aten.erf.default, monkeypatch, False)
    # the sum in another order: as right as the program's own
    right = TABLE[aten.sigmoid.default]
    monkeypatch.setitem(
        TABLE, aten.sigmoid.default,
        lambda e, node, x: e.op("Add", right(e, node, x), e.constant(3e-6, torch.float32)),
    )  # fmt: skip
    with pytest.raises(LoweringError) as caught:
        gw.lower(made, "onnxruntime")
    assert "erf (aten.erf.default)" in caught.value.details[0]


class Noise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) + 0.1 * torch.randn_like(x)


def test_random_numbers_are_named_and_not_a_wrong_translation() -> None:
    with pytest.warns(UserWarning, match="other results on every call"):
        program = gw.trace(Noise().eval(), {"x": torch.randn(4, 8)}, dynamic={"x": {0: "n"}})
    with pytest.raises(LoweringError) as caught:
        gw.lower(program, "onnxruntime")
    assert "node 'randn_like'" in caught.value.message
    assert "random numbers, and the model draws others" in caught.value.message
    assert "Make them an input" in caught.value.fix
