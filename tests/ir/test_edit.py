from __future__ import annotations

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.ir.edit import Editor
from graphwright.ir.errors import ModelError
from graphwright.ir.graph.nodes import gw_meta, set_gw_meta

aten = torch.ops.aten


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 6)
        self.b = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x).relu())


@pytest.fixture
def program() -> gw.Program:
    return gw.trace(Two(), (torch.randn(2, 4),), dynamic={"x": {0: "batch"}})


def test_an_edit_leaves_the_program_it_came_from_alone(program: gw.Program) -> None:
    before = str(program.graph)
    x = torch.randn(3, 4)
    expected = program(x)
    editor = Editor(program, by="test.zero")
    editor.set_state("a.weight", torch.zeros(6, 4))
    relu = next(n for n in editor.graph.nodes if n.target is aten.relu.default)
    editor.replace(relu, editor.call(aten.neg.default, relu.args[0], before=relu))
    after = editor.finish()
    assert str(program.graph) == before
    assert torch.equal(program(x), expected)
    assert torch.allclose(after(x), -program.state["a.bias"] @ program.state["b.weight"].T
                          + program.state["b.bias"], atol=1e-6)  # fmt: skip


def test_new_nodes_carry_shape_scope_source_and_author(program: gw.Program) -> None:
    editor = Editor(program, by="test.gelu")
    relu = next(n for n in editor.graph.nodes if n.target is aten.relu.default)
    set_gw_meta(relu, source="net.py:7")
    new = editor.call(aten.gelu.default, relu.args[0], before=relu)
    editor.replace(relu, new)
    editor.finish()
    assert gw_meta(new)["by"] == "test.gelu"
    assert gw_meta(new)["source"] == "net.py:7"
    assert str(new.meta["val"].shape[0]) == str(relu.meta["val"].shape[0])
    assert new.meta["val"].shape[1] == 6


def test_unused_tensors_and_dead_calls_are_dropped(program: gw.Program) -> None:
    editor = Editor(program, by="test.drop")
    linears = [n for n in editor.graph.nodes if n.target is aten.linear.default]
    editor.replace(linears[1], linears[0])
    after = editor.finish()
    assert set(after.state) == {"a.weight", "a.bias"}


def test_names_stay_free_and_tensors_have_one_node(program: gw.Program) -> None:
    editor = Editor(program, by="test.state")
    assert editor.add_state("a.weight", torch.zeros(1)) == "a.weight_1"
    assert editor.get("a.weight") is editor.get("a.weight")


def test_a_shape_that_no_longer_fits_names_the_node_and_its_maker(program: gw.Program) -> None:
    editor = Editor(program, by="test.cut")
    editor.set_state("a.weight", torch.zeros(5, 4))
    editor.set_state("a.bias", torch.zeros(5))
    with pytest.raises(ModelError) as caught:
        editor.finish()
    assert "node linear_1 (aten.linear.default), made by tracing" in str(caught.value)
    assert "relu: (2, 5)" in str(caught.value) or "relu: (s" in str(caught.value)


def test_an_edit_without_a_change_is_the_same_program(program: gw.Program) -> None:
    assert Editor(program, by="test.none").finish() is program


def test_a_tensor_cannot_take_the_name_of_a_module_method(program: gw.Program) -> None:
    editor = Editor(program, by="test.name")
    assert editor.add_state("folded.to", torch.zeros(3)) == "folded.to_1"
    add = editor.graph.output_node()
    first = add.args[0][0]
    add.replace_input_with(
        first, editor.call(aten.add.Tensor, first, editor.get("folded.to_1"), before=add)
    )
    after = editor.finish()
    x = torch.randn(2, 4)
    torch.testing.assert_close(after(x), program(x))
