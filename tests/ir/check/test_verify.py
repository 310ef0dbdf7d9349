from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.ir.check.difference import first_difference
from graphwright.ir.check.promise import Promise
from graphwright.ir.check.verify import Checker, check_contract, run
from graphwright.ir.context import Context
from graphwright.ir.edit import Editor
from graphwright.ir.errors import ArgumentError, ContractError, ModelError

aten = torch.ops.aten


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(6)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


@pytest.fixture(scope="module")
def program() -> gw.Program:
    torch.manual_seed(0)
    return gw.trace(Deep(), (torch.randn(4, 8),), dynamic={"x": {0: "n"}})


def scaled(program: gw.Program, name: str, factor: float) -> gw.Program:
    editor = Editor(program, by="test.scale")
    editor.set_state(name, program.state[name] * factor)
    return editor.finish()


@pytest.mark.parametrize("index", range(6))
def test_the_first_differing_node_is_the_layer_that_was_changed(
    program: gw.Program, index: int
) -> None:
    broken = scaled(program, f"layers.{index}.weight", 1.5)
    found = first_difference(program, broken, 1e-5)
    assert found is not None
    assert found.scope == f"layers.{index}"
    assert found.op == "aten.linear.default"


def test_a_new_node_is_named_with_the_pass_that_made_it(program: gw.Program) -> None:
    editor = Editor(program, by="test.wrong")
    tanh = [n for n in editor.graph.nodes if n.target is aten.tanh.default][3]
    editor.replace(tanh, editor.call(aten.sin.default, tanh.args[0], before=tanh))
    found = first_difference(program, editor.finish(), 1e-5)
    assert found is not None
    assert (found.op, found.by) == ("aten.sin.default", "test.wrong")


def test_a_new_node_in_front_of_a_kept_one_is_blamed_and_not_the_kept_one() -> None:
    class Wave(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(torch.exp(x)) + 1

    program = gw.trace(Wave(), (torch.randn(4, 8),))
    editor = Editor(program, by="test.wrong")
    exp = next(n for n in editor.graph.nodes if n.target is aten.exp.default)
    editor.replace(exp, editor.call(aten.sin.default, exp.args[0], before=exp))
    found = first_difference(program, editor.finish(), 1e-5)
    assert found is not None
    assert (found.op, found.by) == ("aten.sin.default", "test.wrong")
    # an output that is new itself is the one, whatever it reads
    editor = Editor(program, by="test.wrong")
    last = next(n for n in editor.graph.nodes if n.target is aten.add.Tensor)
    inner = editor.call(aten.sub.Tensor, last.args[0], 0, before=last)
    editor.replace(last, editor.call(aten.mul.Tensor, inner, 2, before=last))
    found = first_difference(program, editor.finish(), 1e-5)
    assert found is not None
    assert found.op == "aten.mul.Tensor"


def test_an_exact_pass_that_is_not_exact_is_refused(program: gw.Program) -> None:
    with pytest.raises(ContractError) as caught:
        check_contract(program, scaled(program, "layers.2.bias", 2.0), Promise("a.b", "exact"))
    text = str(caught.value)
    assert caught.value.exit_code == 4
    assert text.startswith("a.b broke its contract (exact): relative error ")
    assert "first node that differs: linear_2 (aten.linear.default) in layers.2" in text


def test_a_program_that_draws_random_numbers_is_checked_with_the_same_draws() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x)) + torch.randn(x.shape[0], 4)

    with pytest.warns(UserWarning, match="other results on every call"):
        noisy = gw.trace(Noisy(), {"x": torch.randn(3, 4)}, dynamic={"x": {0: "batch"}})
    merged = gw.passes.cleanup.MergeLinear()(noisy)
    assert len(merged.state) == 2
    before = torch.get_rng_state()
    assert torch.equal(run(noisy, noisy.examples)[0], run(noisy, noisy.examples)[0])
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ContractError, match=r"node 'randn' .* random numbers: a pass that changes"):
        check_contract(noisy, scaled(noisy, "first.weight", 1.01), Promise("a.b", "exact"))


def test_a_lossy_pass_is_bounded_only_by_its_own_bound(program: gw.Program) -> None:
    changed = scaled(program, "layers.2.bias", 2.0)
    error = check_contract(program, changed, Promise("a.b", "lossy"))
    assert error.relative > 1e-3
    with pytest.raises(ContractError, match="allowed 1e-06"):
        check_contract(program, changed, Promise("a.b", "lossy", max_error=1e-6))


def test_nan_breaks_every_contract(program: gw.Program) -> None:
    with pytest.raises(ContractError, match="NaN or infinity"):
        check_contract(program, scaled(program, "layers.5.bias", float("nan")),
                       Promise("a.b", "lossy"))  # fmt: skip


def test_a_chain_is_measured_step_by_step_and_as_a_whole(program: gw.Program) -> None:
    checker = Checker(program, [(torch.randn(7, 8),)])
    once = scaled(program, "layers.5.bias", 1.01)
    twice = scaled(once, "layers.5.bias", 1.01)
    first = checker.accept(once, Promise("a.b", "lossy"))
    second = checker.accept(twice, Promise("a.b", "lossy"))
    assert checker.total().relative > max(first.relative, second.relative)


class Heads(nn.Module):
    """Outputs of very different sizes, also within one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        h = self.b(torch.tanh(self.a(x)))
        return {"large": 1e6 * h, "small": 1e-9 * h, "both": torch.cat([1e6 * h, 1e-6 * h], 1)}


@pytest.fixture(scope="module")
def heads() -> gw.Program:
    torch.manual_seed(0)
    return gw.trace(Heads(), (torch.randn(4, 8),), dynamic={"x": {0: "n"}})


def zeroed(program: gw.Program, which: int, inside: bool) -> gw.Program:
    """An output that is zero, or the small part of one."""
    editor = Editor(program, by="test.zero")
    output = editor.graph.output_node()
    results = list(output.args[0])
    victim = results[which]
    small = victim.args[0][1] if inside else victim
    new = editor.call(aten.mul.Tensor, small, 0.0, before=victim if inside else output)
    if inside:
        victim.args = ([victim.args[0][0], new], *victim.args[1:])
    else:
        results[which] = new
        output.args = (tuple(results),)
    return editor.finish()


@pytest.mark.parametrize(("which", "inside"), [(1, False), (2, True)])
def test_a_small_output_beside_a_large_one_may_not_vanish(
    heads: gw.Program, which: int, inside: bool
) -> None:
    with pytest.raises(ContractError, match=r"broke its contract \(exact\): relative error 1,"):
        check_contract(heads, zeroed(heads, which, inside), Promise("a.b", "exact"))


def test_a_lossy_pass_may_not_wipe_out_an_output(heads: gw.Program) -> None:
    with pytest.raises(ContractError, match=r"cast\.dtype makes the output 'small' all zeros"):
        gw.passes.cast.Dtype(to="float16")(heads)  # 1e-9 is zero in float16


def test_the_bound_of_a_lossy_pass_holds_for_every_output(heads: gw.Program) -> None:
    editor = Editor(heads, by="test.doubles")
    output = editor.graph.output_node()
    large, small, both = output.args[0]
    output.args = ((large, editor.call(aten.mul.Tensor, small, 2.0, before=output), both),)
    doubled = editor.finish()
    error = check_contract(heads, doubled, Promise("a.b", "lossy", max_error=1.0))
    assert error.relative < 1e-12  # over all outputs it is nothing
    with pytest.raises(ContractError, match=r"allowed 0\.5 \(output 'small'\)"):
        check_contract(heads, doubled, Promise("a.b", "lossy", max_error=0.5))


def test_a_net_without_finite_outputs_is_not_verified(program: gw.Program) -> None:
    blind = scaled(program, "layers.5.bias", float("nan"))
    with pytest.raises(ModelError, match="no output of the model has a finite value") as caught:
        check_contract(blind, blind, Promise("a.b", "exact"))
    assert caught.value.details == ("stored tensor with NaN or infinity: layers.5.bias",)


def test_an_exact_pass_is_exact_far_from_the_examples(program: gw.Program) -> None:
    """A pass that cuts values off where the examples never go."""
    editor = Editor(program, by="test.clamps")
    (x,) = editor.graph.find_nodes(op="placeholder")
    first = next(iter(x.users))
    new = editor.call(aten.clamp.default, x, -4.0, 4.0, before=first)
    first.replace_input_with(x, new)
    assert float(program.examples[0].abs().max()) < 4
    with pytest.raises(ContractError, match=r"first node that differs: clamp"):
        check_contract(program, editor.finish(), Promise("a.b", "exact"))


class _Clip(gw.Pass):
    """Clamps the first tanh; used below as somebody's own pass."""

    contract = "lossy"
    needs = "calibration"

    def run(self, program: gw.Program, context: Context) -> gw.Result:
        return gw.Result(program)


def test_a_pass_says_when_it_lacks_calibration_data(program: gw.Program) -> None:
    clip = gw.register("test.clip")(_Clip)
    with pytest.raises(ArgumentError, match=r"test\.clip needs calibration data"):
        clip()(program)


def test_options_are_refused_with_a_reason() -> None:
    with pytest.raises(ArgumentError, match=r"cast\.dtype: to: .*'float8'"):
        gw.passes.cast.Dtype(to="float8")
    with pytest.raises(ArgumentError, match="sparsity"):
        gw.passes.cast.Dtype(sparsity=0.5)


def test_a_taken_id_cannot_be_registered_again() -> None:
    class Other(gw.Pass):
        pass

    with pytest.raises(ArgumentError, match="already taken"):
        gw.register("cast.dtype")(Other)
    with pytest.raises(ArgumentError, match="not of the form"):
        gw.register("nodot")(Other)


def test_generators_are_independent_and_repeatable() -> None:
    def draw(context: Context, *path: Any) -> int:
        return int(torch.randint(0, 2**31, (1,), generator=context.generator(*path)))

    context = Context(seed=1, scope=(0, "a.b"))
    state = torch.get_rng_state()
    assert draw(context, "x") == draw(context, "x")
    assert len({draw(context, "x"), draw(context, "y"), draw(context.within(1), "x")}) == 3
    assert torch.equal(torch.get_rng_state(), state)
