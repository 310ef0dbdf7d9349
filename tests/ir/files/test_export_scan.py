"""The grammars that strings of an export archive must match before torch sees them."""

from __future__ import annotations

import copy
import io
import json
import zipfile
from typing import Any

import pytest
import torch
from torch import nn

from graphwright.ir.errors import ModelError
from graphwright.ir.files.export_scan import (
    is_plain_operator,
    scan_model,
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, *, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.fc(x).reshape(x.shape[0] // 2, -1)
        return {"y": y * scale, "n": torch.full((x.shape[0],), 1.0)}


@pytest.fixture(scope="module")
def model() -> dict[str, Any]:
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(
        Net().eval(),
        (torch.randn(4, 8),),
        {"scale": torch.ones(())},
        dynamic_shapes={"x": {0: 2 * batch}, "scale": None},
    )
    file = io.BytesIO()
    torch.export.save(exported, file)
    with zipfile.ZipFile(file) as archive:
        value: dict[str, Any] = json.loads(archive.read("archive/models/model.json"))
    return value


@pytest.mark.parametrize(
    ("target", "plain"),
    [
        ("torch.ops.aten.linear.default", True),
        ("torch.ops.graphwright.anything.default", True),
        ("torch.ops.higher_order.cond", True),
        ("_operator.mul", True),
        ("torch.sym_max", True),
        ("math.ceil", True),
        ("torch.os.system", False),
        ("torch.ops.aten.from_file.default", False),
        ("torch.ops.mine.write.default", False),
        ("torch.ops.higher_order.triton_kernel_wrapper_functional", False),
        ("torch.ops.load_library", False),
        ("torch.hub.load", False),
        ("_operator.call", False),
        ("_operator.attrgetter", False),
        ("math.__loader__.load_module", False),
        ("#ext:op", False),
        ("builtins.eval", False),
    ],
)
def test_operators(target: str, plain: bool) -> None:
    assert is_plain_operator(target) is plain


def test_what_torch_writes_passes_and_loses_only_guards_and_stray_metadata(
    model: dict[str, Any],
) -> None:
    found = scan_model(copy.deepcopy(model), "m.pt2")
    assert found["guards_code"] == []
    nodes = found["graph_module"]["graph"]["nodes"]
    assert all(set(node["metadata"]) <= {"nn_module_stack", "custom"} for node in nodes)
    for node, old in zip(nodes, model["graph_module"]["graph"]["nodes"], strict=True):
        assert {**node, "metadata": 0} == {**old, "metadata": 0}


CODE = "x):\n    pass\nopen('ran.txt', 'w')\ndef g(self"


def _node_name(model: dict[str, Any]) -> None:
    model["graph_module"]["graph"]["nodes"][0]["outputs"][0]["as_tensor"]["name"] = CODE


def _node_own_name(model: dict[str, Any]) -> None:
    model["graph_module"]["graph"]["nodes"][0]["name"] = CODE


def _value_name(model: dict[str, Any]) -> None:
    values = model["graph_module"]["graph"]["tensor_values"]
    values[CODE] = next(iter(values.values()))


def _parameter_name(model: dict[str, Any]) -> None:
    spec = model["graph_module"]["signature"]["input_specs"][0]
    spec["parameter"]["parameter_name"] = 'a"); open("ran.txt", "w"); ("'


def _argument_name(model: dict[str, Any]) -> None:
    model["graph_module"]["module_call_graph"][0]["signature"]["forward_arg_names"] = [CODE]


def _keyword_name(model: dict[str, Any]) -> None:
    signature = model["graph_module"]["module_call_graph"][0]["signature"]
    signature["in_spec"] = signature["in_spec"].replace('\\"scale\\"', '\\"scale=exit()\\"')


def _context_imports(model: dict[str, Any]) -> None:
    signature = model["graph_module"]["module_call_graph"][0]["signature"]
    tree = {
        "type": "collections.defaultdict",
        "context": json.dumps({"default_factory_module": "antigravity"}),
        "children_spec": [],
    }
    signature["out_spec"] = json.dumps([1, tree])


def _enum_context(model: dict[str, Any]) -> None:
    signature = model["graph_module"]["module_call_graph"][0]["signature"]
    context = json.dumps([{"__enum__": True, "fqn": "antigravity:x", "name": "a"}])
    tree = {"type": "builtins.dict", "context": context, "children_spec": []}
    signature["out_spec"] = json.dumps([1, tree])


def _operator_argument(model: dict[str, Any]) -> None:
    node = model["graph_module"]["graph"]["nodes"][0]
    node["inputs"].append({"name": "f", "arg": {"as_operator": "torch.os.system"}, "kind": 1})


def _torch_bind(model: dict[str, Any]) -> None:
    spec = {"custom_obj": {"arg": {"name": "o", "class_fqn": "x"}, "custom_obj_name": "o"}}
    model["graph_module"]["signature"]["input_specs"].append(spec)


@pytest.mark.parametrize(
    "edit",
    [
        _node_name, _node_own_name, _value_name, _parameter_name, _argument_name, _keyword_name,
        _context_imports, _enum_context, _operator_argument, _torch_bind,
    ],
)  # fmt: skip
def test_strings_that_become_source_or_imports_are_refused(
    edit: Any, model: dict[str, Any]
) -> None:
    """Names are pasted into the generated `forward`; contexts name modules to import."""
    changed = copy.deepcopy(model)
    edit(changed)
    assert changed != model
    with pytest.raises(ModelError, match="could run code") as caught:
        scan_model(changed, "m.pt2")
    assert caught.value.exit_code == 3
    assert caught.value.details


@pytest.mark.parametrize("value", [None, [], {}, {"graph_module": 1}, {"graph_module": {}}])
def test_other_json_is_refused(value: Any) -> None:
    with pytest.raises(ModelError, match=r"not what torch\.export writes"):
        scan_model(value, "m.pt2")
