"""Tracing: calling conventions, free dimensions, ties, outputs, and refusals that help."""

from __future__ import annotations

import collections
import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.graph.nodes import op_name
from graphwright.ir.trace.capture import TraceWarning


def targets(program: gw.Program) -> list[str]:
    return [op_name(node) for node in program.graph.nodes if node.op == "call_function"]


def assert_same(model: nn.Module, program: gw.Program, *inputs: Tensor, **named: Tensor) -> None:
    """Equal up to rounding; the model is run in eval mode."""
    with torch.no_grad():
        torch.testing.assert_close(program(*inputs, **named), model.eval()(*inputs, **named))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, scale: float = 1.0, extra: Tensor | None = None) -> Tensor:
        y = self.b(F.relu(self.a(x))) * scale
        return y if extra is None else y + extra


# ---- calling conventions


def test_arguments_by_position_by_name_and_baked() -> None:
    model, x, extra = Mlp(), torch.randn(2, 6), torch.randn(2, 3)
    free = {"x": {0: "batch"}, "extra": {0: "batch"}}
    program = gw.trace(model, {"x": x, "scale": 2.0, "extra": extra}, free)
    assert [spec.name for spec in program.signature.inputs] == ["x", "extra"]
    assert program.signature.constants == {"scale": 2.0}
    torch.testing.assert_close(program(x, extra), model(x, 2.0, extra))
    with pytest.raises(ArgumentError, match=r"scale = 3.0: tracing baked in 2.0"):
        program(x, extra, scale=3.0)


def test_a_model_of_one_dict_gets_one_input_per_entry() -> None:
    class TakesDict(nn.Module):
        def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
            return {**features, "sum": features["a"] + features["b"]}

    x = torch.randn(2, 3)
    program = gw.trace(TakesDict(), {"a": x, "b": 2 * x}, {"a": {0: "n"}, "b": {0: "n"}})
    assert [spec.name for spec in program.signature.inputs] == ["a", "b"]
    assert [spec.name for spec in program.signature.outputs] == ["a_out", "b_out", "sum"]
    torch.testing.assert_close(program(a=x[:1], b=x[:1])["sum"], 2 * x[:1])


def test_unnamed_arguments() -> None:
    class TakesMany(nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            return sum(tensors, torch.zeros(()))

    program = gw.trace(TakesMany(), (torch.ones(2), torch.ones(2)))
    torch.testing.assert_close(program(torch.ones(2), torch.full((2,), 3.0)), torch.full((2,), 4.0))


def test_an_unknown_argument_is_named() -> None:
    with pytest.raises(ArgumentError, match=r"takes no \['y'\]; its arguments are \['x', 'scale'"):
        gw.trace(Mlp(), {"x": torch.randn(2, 6), "y": torch.randn(2)})


# ---- the model afterwards


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    model.train()
    model[1].eval()  # a frozen norm
    state, x = {k: v.clone() for k, v in model.state_dict().items()}, torch.randn(3, 4)
    random_state = torch.get_rng_state()
    gw.trace(model, (x,))
    assert [m.training for m in model] == [True, False, True]
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_table_that_the_model_caches_is_not_left_behind() -> None:
    class Caches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table: Tensor | None = None
            self.drop = nn.Dropout(0.1)

        def forward(self, x: Tensor) -> Tensor:
            self.table = torch.arange(x.shape[1]) * 2.0
            q = self.drop(x + self.table)[:, None]
            return F.scaled_dot_product_attention(q, q, q)

    model, x = Caches(), torch.randn(2, 3, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TraceWarning)
        program = gw.trace(model, (x,))
    assert model.table is None
    assert_same(model, program, x)


def test_a_move_that_changes_nothing_is_no_obstacle() -> None:
    class Moves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.fc = self.fc.to(torch.float32)
            return self.fc(x)

    model, x = Moves(), torch.randn(2, 3)
    assert_same(model, gw.trace(model, (x,)), x)


# ---- free dimensions


def test_an_example_of_size_one_does_not_fix_the_batch() -> None:
    model = Mlp()
    program = gw.trace(model, (torch.randn(1, 6),), {"x": {0: "batch"}})
    assert program.signature.inputs[0].shape == ("batch", 6)
    assert program.examples[0].shape == (1, 6)
    for size in (1, 2, 7):
        assert_same(model, program, torch.randn(size, 6))


def test_a_dimension_that_the_model_fixes_becomes_static_with_a_warning() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(5, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.table

    with pytest.warns(TraceWarning, match="dimension 'seq' is fixed at 5"):
        program = gw.trace(Positions(), (torch.randn(2, 5, 4),), {"x": {0: "batch", 1: "seq"}})
    assert program.signature.inputs[0].shape == ("batch", 5, 4)
    assert "seq" in program.facts["trace"]["notes"][0]


class Length(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.shape[0] == 4 else x  # length


def test_the_line_that_fixes_a_dimension_is_named() -> None:
    with pytest.warns(TraceWarning, match="dimension 'n' is fixed at 4") as caught:
        gw.trace(Length(), (torch.randn(4, 3),), {"x": {0: "n"}})
    assert here("length") in str(caught[0].message)


def test_a_size_that_only_divides_by_luck_is_found_by_running() -> None:
    class Halves(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x[: x.shape[0] // 2].sum(0), x[x.shape[0] // 2 :].sum(0)])

    model = Halves()
    program = gw.trace(model, (torch.randn(4, 3),), {"x": {0: "n"}})
    for size in (2, 5, 6):
        assert_same(model, program, torch.randn(size, 3))


def test_a_python_number_computed_from_a_size_does_not_go_wrong_silently() -> None:
    class Counts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * float(torch.arange(int(x.shape[0])).shape[0])

    model = Counts()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TraceWarning)
        program = gw.trace(model, (torch.randn(4, 3),), {"x": {0: "n"}})
    assert_same(model, program, torch.randn(4, 3))
    if program.signature.inputs[0].shape[0] == "n":
        assert_same(model, program, torch.randn(6, 3))


def test_a_branch_on_size_one_is_refused_below_two() -> None:
    class Special(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sum(0) if x.shape[0] == 1 else x.mean(0) * 3

    with pytest.warns(TraceWarning, match="dimension 'n' is 2 or more"):
        program = gw.trace(Special(), (torch.randn(4, 3),), {"x": {0: "n"}})
    assert program.signature.dims["n"].min == 2
    with pytest.raises(ArgumentError, match="dimension 'n' of input 'x' is 1"):
        program(torch.randn(1, 3))


def test_the_length_of_a_recurrent_layer_stays_free() -> None:
    model = nn.LSTM(4, 5, num_layers=2, bidirectional=True, batch_first=True)
    program = gw.trace(model, (torch.randn(2, 6, 4),), {"input": {0: "batch", 1: "seq"}})
    assert targets(program).count("lstm") == 1
    for batch, seq in ((1, 1), (3, 9)):
        x = torch.randn(batch, seq, 4)
        assert_same(model, program, x)


def test_free_batch_axes_are_found_by_running_at_two_sizes() -> None:
    model = Mlp()
    program = gw.trace(model, (torch.randn(2, 6),), "batch")
    assert program.signature.inputs[0].shape == ("batch", 6)

    class Mixes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(4, -1).sum(0)

    program = gw.trace(Mixes(), (torch.randn(2, 6),), "batch")
    assert program.signature.inputs[0].shape == (2, 6)


@pytest.mark.parametrize(
    ("dynamic", "message"),
    [
        ({"y": {0: "n"}}, r"names the input 'y'; the inputs are \['x'\]"),
        ({"x": {2: "n"}}, "input 'x' has 2 axes, and no axis 2"),
        ({"x": {0: "n", 1: "n"}}, "dimension 'n' is 2 and 6 in the example inputs"),
    ],
)
def test_a_wrong_request_is_refused(dynamic: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        gw.trace(Mlp(), {"x": torch.randn(2, 6)}, dynamic)


# ---- outputs


Pair = collections.namedtuple("Pair", ["left", "right"])


@dataclasses.dataclass
class Record:
    logits: Tensor
    states: tuple[Tensor, ...]
    loss: Tensor | None = None


def test_structured_outputs_come_back_without_the_users_class() -> None:
    class Structured(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return Record(x + 1, (x, x * 2)), [Pair(x, None), {"n": 3}]

    x = torch.randn(2, 3)
    record, (pair, rest) = gw.trace(Structured(), (x,))(x)
    torch.testing.assert_close(record.logits, x + 1)
    torch.testing.assert_close(record.states[1], x * 2)
    torch.testing.assert_close(pair.left, x)
    assert rest == {"n": 3}
    assert "loss" not in record


def test_an_output_that_is_no_tensor_is_left_out_with_a_warning() -> None:
    class Cached(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Any]:
            return {"y": x + 1, "cache": object()}

    with pytest.warns(TraceWarning, match="output 'cache' is a object"):
        program = gw.trace(Cached(), (torch.ones(2),))
    assert program(torch.ones(2))["cache"] is None


def test_a_model_without_tensors_to_return_is_refused() -> None:
    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> None:
            return None

    with pytest.raises(ModelError, match="the model returns no tensors"):
        gw.trace(Nothing(), (torch.ones(2),))


def test_a_size_among_the_outputs_is_a_tensor() -> None:
    class Sized(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, int]:
            return x * 2, x.shape[0]

    program = gw.trace(Sized(), (torch.ones(2, 3),), {"x": {0: "n"}})
    assert int(program(torch.ones(5, 3))[1]) == 5


# ---- ties


def test_a_tied_tensor_has_its_first_name_and_an_alias() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(10, 4)
            self.head = nn.Linear(4, 10, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embedding(x))

    model = Tied()
    program = gw.trace(model, (torch.tensor([[1, 2]]),))
    assert list(program.state) == ["embedding.weight"]
    assert program.aliases == {"embedding.weight": ("embedding.weight", "head.weight")}
    assert program.state["embedding.weight"] is model.head.weight


# ---- refusals


def here(marker: str) -> str:
    """file:line of the line of this file that ends in a marker comment."""
    lines = Path(__file__).read_text().splitlines()
    (number,) = [i for i, line in enumerate(lines, 1) if line.endswith(f"# {marker}")]
    return f"{__file__}:{number}"


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # branch
            return x
        return -x


class Items(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[: int(x.abs().max().item())]  # item


class Numpy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.from_numpy(x.numpy() ** 2)  # numpy


@pytest.mark.parametrize(
    ("model", "marker", "reason", "fix"),
    [
        (Branches(), "branch", "depends on the values of a tensor", "Use torch.where"),
        (Items(), "item", "depends on the values of a tensor", "Use torch.where"),
        (Numpy(), "numpy", "turned into a NumPy array", "Use the torch function"),
    ],
)
def test_a_refusal_names_the_users_line_the_reason_and_the_remedy(
    model: nn.Module, marker: str, reason: str, fix: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ModelError) as caught:
        gw.trace(model, (torch.ones(4),), {"x": {0: "n"}})
    assert caught.value.where == here(marker)
    assert reason in caught.value.message
    assert caught.value.fix.startswith(fix)
    assert capfd.readouterr().err == ""


def test_a_model_that_does_not_run_is_told_apart() -> None:
    with pytest.raises(ModelError, match="does not run on the example inputs: mat1 and mat2"):
        gw.trace(Mlp(), (torch.randn(2, 5),))


def test_a_model_that_is_random_in_eval_mode_is_reported() -> None:
    class Random(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.randn(x.shape)

    with pytest.warns(TraceWarning, match="gives other results on every call"):
        program = gw.trace(Random(), (torch.randn(2, 3),))
    assert program(torch.zeros(2, 3)).shape == (2, 3)


# ---- forms of published code


def test_a_transformer_with_its_own_mask_traces() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True)
            self.body = nn.TransformerDecoder(layer, 1)

        def forward(self, x: Tensor) -> Tensor:
            mask = torch.triu(torch.full((x.shape[1],) * 2, float("-inf")), diagonal=1)
            return self.body(x, x, tgt_mask=mask)

    model = Masked()
    program = gw.trace(model, (torch.randn(2, 5, 8),), {"x": {0: "batch", 1: "seq"}})
    assert_same(model, program, torch.randn(1, 7, 8))


def test_gradient_switches_inside_the_model_leave_a_flat_graph() -> None:
    class Switches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                y = x * 2
            with torch.enable_grad():
                return (y + x).relu()

    model = Switches()
    program = gw.trace(model, (torch.randn(2, 3),), {"x": {0: "n"}})
    assert targets(program) == ["mul", "add", "relu"]
    assert_same(model, program, torch.randn(4, 3))
