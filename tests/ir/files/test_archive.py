"""Saved programs: lossless, equal bytes, opened by torch's own loader too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from graphwright.ir.edit import Editor
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.files.archive import load_program, save_program
from graphwright.ir.files.exported import from_exported_program, to_exported_program
from graphwright.ir.graph.digest import digest
from graphwright.ir.graph.nodes import gw_meta
from graphwright.ir.program import Program, Provenance
from graphwright.ir.signature import DimRange
from graphwright.ir.trace.capture import trace


class Net(nn.Module):
    """Tied head, buffers kept and not, a constant, a chunk, named dims, a nested output."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.rand(8))
        self.register_buffer("shift", torch.rand(8), persistent=False)
        self.constant = torch.rand(8)
        self.norm.bias.requires_grad_(False)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, Any]:
        x = self.norm(self.embed(ids)) * self.scale + self.shift - self.constant
        x = torch.where(mask[..., None], x, x.new_zeros(()))
        left, right = x.chunk(2, -1)
        return {"logits": self.head(x), "parts": (left, [right * x.shape[1]]), "none": None}


def net_program() -> Program:
    torch.manual_seed(0)
    axes = {0: "batch", 1: "seq"}
    examples = {"ids": torch.randint(0, 20, (2, 6)), "mask": torch.rand(2, 6) > 0.3}
    program = trace(
        Net().eval(), examples, {"ids": axes, "mask": axes},
        dims={"batch": DimRange(1, 32), "seq": DimRange(2, 64)}, ranges={"ids": (0, 20)},
    )  # fmt: skip
    done = Provenance("cleanup.x", {"a": [1, 2.5], "b": None}, 3, "exact", "abc")
    return program.replace(provenance=(done,), facts={"cleanup.x": {"n": 1.25e-7}})


@pytest.fixture(scope="module")
def program() -> Program:
    return net_program()


def inputs(batch: int, seq: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(batch)
    return {"ids": torch.randint(0, 20, (batch, seq)), "mask": torch.rand(batch, seq) > 0.5}


def same_results(a: Program, b: Program, batch: int, seq: int) -> bool:
    named = inputs(batch, seq)
    pairs = zip(a.run_flat(a.bind(**named)), b.run_flat(b.bind(**named)), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def test_everything_comes_back(program: Program, tmp_path: Path) -> None:
    save_program(program, tmp_path / "p.pt2")
    loaded = load_program(tmp_path / "p.pt2")
    assert loaded.signature == program.signature
    assert loaded.aliases == program.aliases == {"embed.weight": ("embed.weight", "head.weight")}
    assert loaded.provenance == program.provenance
    assert loaded.facts == program.facts
    assert all(torch.equal(a, b) for a, b in zip(loaded.examples, program.examples, strict=True))
    assert list(loaded.state) == list(program.state)
    for name, tensor in program.state.items():
        assert type(loaded.state[name]) is type(tensor)
        assert loaded.state[name].requires_grad is tensor.requires_grad
        assert torch.equal(loaded.state[name], tensor)
    assert set(loaded.trainable()) == {"embed.weight", "norm.weight"}
    for node in loaded.graph.nodes:
        twin = next(n for n in program.graph.nodes if n.name == node.name)
        assert (node.op, str(node.target)) == (twin.op, str(twin.target))
        assert gw_meta(node) == gw_meta(twin)
        assert (node.meta.get("nn_module_stack") or {}) == (twin.meta.get("nn_module_stack") or {})
        if isinstance(node.meta.get("val"), torch.Tensor):
            assert str(node.meta["val"].shape) == str(twin.meta["val"].shape)
            assert node.meta["val"].dtype == twin.meta["val"].dtype
    for size in ((1, 2), (5, 9), (32, 64)):
        assert same_results(program, loaded, *size)
    output = loaded(**inputs(3, 4))
    assert set(output) == {"logits", "parts", "none"}
    assert isinstance(output["parts"], tuple)
    assert isinstance(output["parts"][1], list)


def test_saving_again_gives_the_same_bytes_under_any_name(program: Program, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    save_program(program, tmp_path / "p.pt2")
    first = (tmp_path / "p.pt2").read_bytes()
    save_program(load_program(tmp_path / "p.pt2"), tmp_path / "sub" / "other name.bin")
    assert (tmp_path / "sub" / "other name.bin").read_bytes() == first
    assert str(tmp_path).encode() not in first
    assert str(Path(__file__).parent).encode() not in first


def test_bytes_and_digest_are_those_of_another_process(program: Program, tmp_path: Path) -> None:
    save_program(program, tmp_path / "here.pt2")
    code = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("test_archive", {str(Path(__file__))!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
program = module.net_program()
module.save_program(program, "there.pt2")
print(module.digest(program))
"""
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, check=True,
        capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": "7"},
    )  # fmt: skip
    assert ran.stdout.split()[-1] == digest(program)
    # The class of the model is named after its module, which is __main__ for neither.
    here, there = (zipfile.ZipFile(tmp_path / n) for n in ("here.pt2", "there.pt2"))
    for name in here.namelist():
        if "weight" in name or "examples" in name:
            assert here.read(name) == there.read(name)


def test_an_edited_program_comes_back_and_can_be_edited_again(
    program: Program, tmp_path: Path
) -> None:
    def halved(old: Program, name: str) -> Program:
        editor = Editor(old, by="custom.halve")
        node = next(n for n in editor.graph.nodes if n.target is torch.ops.aten.linear.default)
        factor = editor.add_state(name, torch.tensor(0.5))
        after = next(iter(node.users))
        new = editor.call(torch.ops.aten.mul.Tensor, node, editor.get(factor), before=after)
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        return editor.finish(propagate=True)

    once = halved(program, "half")
    save_program(once, tmp_path / "p.pt2")
    loaded = load_program(tmp_path / "p.pt2")
    assert digest(loaded) == digest(once) != digest(program)
    assert any(gw_meta(node).get("by") == "custom.halve" for node in loaded.graph.nodes)
    twice = halved(loaded, "half")
    assert sum(name.startswith("half") for name in twice.state) == 2
    assert torch.equal(twice(**inputs(3, 5))["logits"], program(**inputs(3, 5))["logits"] * 0.25)
    save_program(twice, tmp_path / "q.pt2")
    assert same_results(load_program(tmp_path / "q.pt2"), twice, 2, 3)


class Weights(nn.Module):
    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(x + b.to(torch.float32).sum() for b in self.buffers())


BASE = torch.arange(48, dtype=torch.float32)


@pytest.mark.parametrize(
    "tensors",
    [
        {"a": torch.randn(3, 4).to(torch.bfloat16), "b": torch.randn(5).half()},
        {"a": torch.randint(-99, 99, (6,), dtype=torch.int8), "b": torch.tensor([True, False])},
        {"a": torch.randn(4, 6).t()},
        {"a": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)},
        {"a": BASE[4:20].view(4, 4), "b": BASE[10:30]},
        {"a": BASE.view(6, 8)[:, ::2], "b": BASE.view(6, 8)},
        {"a": torch.zeros(0, 3), "b": torch.tensor(2.5), "c": torch.ones(1).expand(7)},
        {"a": torch.randn(2, dtype=torch.float64)},
        {"a": torch.randn(9).to(torch.float8_e4m3fn)},
    ],
    ids=["half", "integers", "transposed", "channels_last", "shared views", "strided view",
         "odd shapes", "double", "float8"],
)  # fmt: skip
def test_every_kind_of_tensor(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    program = trace(Weights(tensors), (torch.randn(2, 3),))
    save_program(program, tmp_path / "p.pt2")
    loaded = load_program(tmp_path / "p.pt2")
    for name, tensor in tensors.items():
        back = loaded.state[name]
        assert back.dtype == tensor.dtype
        assert back.shape == tensor.shape
        assert torch.equal(back.float(), tensor.float())
        if tensor.is_contiguous(memory_format=torch.channels_last) and tensor.dim() == 4:
            assert back.stride() == tensor.stride()
    assert digest(loaded) == digest(program)
    save_program(loaded, tmp_path / "q.pt2")
    assert (tmp_path / "q.pt2").read_bytes() == (tmp_path / "p.pt2").read_bytes()
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    with zipfile.ZipFile(tmp_path / "p.pt2") as archive:
        stored = sum(i.file_size for i in archive.infolist() if "/weights/weight_" in i.filename)
    assert stored <= max(size, 64)


def test_one_of_our_ops(tmp_path: Path) -> None:
    from graphwright.ir.ops import OPS

    names = [n for n, op in OPS.items() if op.schema.startswith("(Tensor x")]
    program = trace(nn.Sequential(nn.Linear(4, 4)), (torch.randn(3, 4),), {"input": {0: "n"}})
    op = OPS["bias_activation"] if "bias_activation" in OPS else OPS[names[0]]
    editor = Editor(program, by="test")
    linear = next(n for n in editor.graph.nodes if n.target is torch.ops.aten.linear.default)
    weight, bias = linear.args[1], linear.args[2]
    plain = editor.call(torch.ops.aten.linear.default, linear.args[0], weight, before=linear)
    new = editor.call(op.overload, plain, bias, "relu", before=linear)
    editor.replace(linear, new)
    fused = editor.finish()
    save_program(fused, tmp_path / "p.pt2")
    code = (
        "from graphwright.ir.files.archive import load_program; import torch;"
        "print([str(n.target) for n in load_program('p.pt2').graph.nodes])"
    )
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    assert f"graphwright.{op.name}" in ran.stdout
    x = torch.randn(5, 4)
    assert torch.equal(load_program(tmp_path / "p.pt2")(x), fused(x))


def test_torch_opens_it_too(program: Program, tmp_path: Path) -> None:
    save_program(program, tmp_path / "p.pt2")
    exported = torch.export.load(tmp_path / "p.pt2")
    named = inputs(3, 5)
    found = exported.module()(*named.values())
    assert set(found) == {"logits", "parts"}
    assert torch.equal(found["logits"], program(**named)["logits"])


def test_training_mode_is_part_of_the_program(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.4))
    program = trace(model.eval(), (torch.randn(3, 1, 6, 6),)).train()
    save_program(program, tmp_path / "p.pt2")
    loaded = load_program(tmp_path / "p.pt2")
    x = torch.randn(3, 1, 6, 6)
    torch.manual_seed(5)
    expected = program(x)
    torch.manual_seed(5)
    assert torch.equal(loaded(x), expected)
    assert torch.equal(loaded.eval()(x), program.eval()(x))


def test_gradients_reach_the_loaded_parameters(program: Program, tmp_path: Path) -> None:
    save_program(program, tmp_path / "p.pt2")
    loaded = load_program(tmp_path / "p.pt2")
    loaded(**inputs(2, 4))["logits"].square().sum().backward()
    gradient = loaded.parameters()["embed.weight"].grad
    assert gradient is not None
    assert gradient.abs().sum() > 0
    before = (tmp_path / "p.pt2").read_bytes()
    with torch.no_grad():
        loaded.parameters()["embed.weight"].add_(1.0)
    assert (tmp_path / "p.pt2").read_bytes() == before  # mapped privately, never written through


def test_lifting_and_its_inverse(program: Program) -> None:
    exported = to_exported_program(program)
    kinds = [spec.kind.name for spec in exported.graph_signature.input_specs]
    assert kinds == ["PARAMETER"] * 3 + ["BUFFER"] * 3 + ["USER_INPUT"] * 2
    ranges = sorted((int(r.lower), int(r.upper)) for r in exported.range_constraints.values())
    assert ranges == [(1, 32), (2, 64)]
    assert exported.state_dict["embed.weight"] is program.state["embed.weight"]
    graph, state = from_exported_program(exported)
    assert set(state) == set(program.state)
    again = program.replace(graph=graph, state=state)
    assert same_results(again, program, 4, 7)


@pytest.mark.filterwarnings("ignore:.*LeafSpec")  # torch's own, in its decompositions
def test_the_lifted_program_decomposes_and_runs(program: Program) -> None:
    exported = to_exported_program(program).run_decompositions()
    named = inputs(3, 5)
    found = exported.module(check_guards=False)(*named.values())["logits"]
    torch.testing.assert_close(found, program(**named)["logits"], rtol=1e-5, atol=1e-6)


def test_digest_sees_every_part(program: Program) -> None:
    base = digest(program)
    name, tensor = next(iter(program.state.items()))
    other = nn.Parameter(tensor.detach() + 1e-3)
    editor = Editor(program, by="x")
    linear = next(n for n in editor.graph.nodes if n.target is torch.ops.aten.linear.default)
    relu = editor.call(torch.ops.aten.relu.default, linear, before=next(iter(linear.users)))
    linear.replace_all_uses_with(relu, delete_user_cb=lambda user: user is not relu)
    changed = [
        program.replace(state={**program.state, name: other}),
        program.replace(provenance=()),
        program.replace(facts={}),
        program.replace(aliases={}),
        program.replace(examples=tuple(e.clone().zero_() for e in program.examples)),
        editor.finish(),
    ]
    assert len({base, *(digest(p) for p in changed)}) == 1 + len(changed)
    assert digest(program.replace(state=dict(program.state))) == base


def test_a_tensor_changed_in_place_is_hashed_again() -> None:
    program = trace(nn.Linear(2, 2), (torch.randn(2, 2),))
    before = digest(program)
    with torch.no_grad():
        program.state["weight"].add_(1)
    assert digest(program) != before


def test_failures_leave_nothing_behind(program: Program, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="not JSON"):
        save_program(program.replace(facts={"x": {1j}}), tmp_path / "p.pt2")
    sparse = {**program.state, "scale": torch.eye(8).to_sparse()}
    with pytest.raises((ArgumentError, ModelError)):
        save_program(program.replace(state=sparse), tmp_path / "p.pt2")
    with pytest.raises(ArgumentError, match="cannot write"):
        save_program(program, tmp_path / "no such folder" / "p.pt2")
    assert list(tmp_path.iterdir()) == []


def _edited(source: Path, target: Path, edit: Any) -> None:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            content = old.read(info)
            if info.filename.endswith("graphwright.json"):
                record = json.loads(content)
                edit(record)
                content = json.dumps(record).encode()
            new.writestr(zipfile.ZipInfo(info.filename), content)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda r: r.update(format=99), "newer Graphwright"),
        (lambda r: r.pop("signature"), "damaged"),
        (lambda r: r.update(state=["nothing"]), "damaged"),
        (lambda r: r.update(provenance=[{"who": 1}]), "damaged"),
        (lambda r: r["signature"]["inputs"][0].update(name="x): exit()\ndef f(y"), "damaged"),
        (lambda r: r["signature"].update(inputs=[]), "damaged"),
    ],
)
def test_a_damaged_record(edit: Any, says: str, program: Program, tmp_path: Path) -> None:
    save_program(program, tmp_path / "p.pt2")
    _edited(tmp_path / "p.pt2", tmp_path / "q.pt2", edit)
    with pytest.raises(ModelError, match=says):
        load_program(tmp_path / "q.pt2")


def test_another_export_archive_is_no_program(tmp_path: Path) -> None:
    exported = torch.export.export(nn.Linear(2, 2), (torch.randn(2, 2),))
    torch.export.save(exported, tmp_path / "e.pt2")
    with pytest.raises(ModelError, match="not written by Graphwright"):
        load_program(tmp_path / "e.pt2")
