"""Model files that must be refused: one clear message, exit status 3, and no code run."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hostile.zips import rewritten
from torch import nn

from graphwright.ir.errors import GraphwrightError, ModelError
from graphwright.ir.files import load_model

MARK = "ran.txt"


class Creates:
    """Creates a file in the working folder when it is unpickled."""

    def __reduce__(self) -> Any:
        return open, (MARK, "w")


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()


def exported() -> bytes:
    with torch.no_grad():
        program = torch.export.export(net(), (torch.randn(2, 4),))
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()


def in_graph(edit: Callable[[dict[str, Any]], None]) -> bytes:
    """An export archive whose graph JSON was edited."""

    def change(name: str, content: bytes) -> bytes:
        if not name.endswith("models/model.json"):
            return content
        document = json.loads(content)
        edit(document)
        return json.dumps(document).encode()

    return rewritten(exported(), change)


def hostile_sample_inputs() -> bytes:
    payload = io.BytesIO()
    torch.save(((Creates(),), {}), payload)
    return rewritten(
        exported(), lambda name, c: payload.getvalue() if "sample_inputs" in name else c
    )


def pickled_weights() -> bytes:
    def change(name: str, content: bytes) -> bytes:
        return (
            content.replace(b'"use_pickle": false', b'"use_pickle": true')
            if (name.endswith("weights_config.json"))
            else content
        )

    return rewritten(exported(), change)


def hostile_operator(document: dict[str, Any]) -> None:
    document["graph_module"]["graph"]["nodes"][0]["target"] = "torch.os.system"


def hostile_size(document: dict[str, Any]) -> None:
    values = document["graph_module"]["graph"]["tensor_values"]
    first = next(iter(values.values()))
    text = f"__import__('pathlib').Path('{MARK}').touch()"
    first["sizes"][0] = {"as_expr": {"expr_str": text, "hint": {"as_int": 2}}}


def saved(value: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def tensors(**changes: Any) -> bytes:
    state: dict[str, Any] = {k: v.clone() for k, v in net().state_dict().items()}
    state.update(changes)
    return safetensors.torch.save({k: v for k, v in state.items() if v is not None})


def bomb() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00.")
        archive.writestr("archive/data/0", bytes(200_000_000))
    return out.getvalue()


def onnx_file() -> bytes:
    import onnx
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 3]) for n in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "main", [x], [y])
    model: onnx.ModelProto = helper.make_model(graph, producer_name="pytorch")
    return model.SerializeToString()


def cut(content: bytes, share: float) -> bytes:
    return content[: int(len(content) * share)]


def scripted() -> bytes:
    import warnings

    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(net()), file)
    return file.getvalue()


class Unknown(nn.Module):
    """A module class of this file; its pickle names it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)


@dataclass(frozen=True)
class Bad:
    """A file that must be refused, and what the message says."""

    content: Callable[[], bytes]
    says: str
    name: str = "model.pt"
    factory: bool = False
    kwargs: Any = None
    entry: str = "factory_of_tests:build"


BAD = {
    "empty": Bad(lambda: b"", "empty"),
    "one byte": Bad(lambda: b"\x80", ""),
    "text": Bad(lambda: b"hello, world, this is no model at all\n" * 9, ""),
    "json": Bad(lambda: b'{"model": 1}', ""),
    "random bytes": Bad(lambda: np.random.default_rng(0).bytes(4096), ""),
    "a PNG": Bad(lambda: b"\x89PNG\r\n\x1a\n" + bytes(100), ""),
    "GGUF": Bad(lambda: b"GGUF" + bytes(200), "GGUF"),
    "HDF5": Bad(lambda: b"\x89HDF\r\n\x1a\n" + bytes(200), "HDF5"),
    "NumPy": Bad(lambda: b"\x93NUMPY" + bytes(200), "NumPy"),
    "gzip": Bad(lambda: b"\x1f\x8b" + bytes(200), "gzip"),
    "Git LFS pointer": Bad(lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
                           "LFS"),
    "ONNX": Bad(lambda: onnx_file(), "ONNX"),
    "a plain zip": Bad(lambda: rewritten(exported(), lambda n, c: None, {"a.txt": b"x"}), ""),
    "bare pickle": Bad(lambda: pickle.dumps(Creates()), "pickle"),
    "bare pickle, protocol 0": Bad(lambda: pickle.dumps(Creates(), 0), "pickle"),
    "bare pickle, protocol 5": Bad(lambda: pickle.dumps(Creates(), 5), "pickle"),
    "pickled module": Bad(lambda: saved(net()), "--allow-pickle"),
    "pickled module, old format": Bad(
        lambda: saved(net(), _use_new_zipfile_serialization=False), "--allow-pickle"),
    "pickled module of an unknown class": Bad(lambda: saved(Unknown()), "--allow-pickle"),
    "state dict with a hidden object": Bad(
        lambda: saved({**net().state_dict(), "x": Creates()}), "--allow-pickle", factory=True),
    "old state dict with a hidden object": Bad(
        lambda: saved({**net().state_dict(), "x": Creates()}, _use_new_zipfile_serialization=False),
        "--allow-pickle", factory=True),
    "export archive: hostile weights": Bad(pickled_weights, "", "m.pt2"),
    "export archive: hostile operator": Bad(
        lambda: in_graph(hostile_operator), "torch.os.system", "m.pt2"),
    "export archive: hostile size": Bad(lambda: in_graph(hostile_size), "", "m.pt2"),
    "export archive: compiled library": Bad(
        lambda: rewritten(exported(), lambda n, c: c,
                          {"archive/data/aotinductor/model/a.so": b"\x7fELF"}), "", "m.pt2"),
    "export archive: path trick": Bad(
        lambda: rewritten(exported(), lambda n, c: c, {"archive/../../evil": b"x"}), "", "m.pt2"),
    "export archive: absolute path": Bad(
        lambda: rewritten(exported(), lambda n, c: c, {"/etc/evil": b"x"}), "", "m.pt2"),
    "export archive: cut short": Bad(lambda: cut(exported(), 0.6), "", "m.pt2"),
    "export archive: no graph": Bad(
        lambda: rewritten(exported(), lambda n, c: None if n.endswith("model.json") else c), "",
        "m.pt2"),
    "export archive: graph is no JSON": Bad(
        lambda: rewritten(exported(), lambda n, c: b"{" if n.endswith("model.json") else c), "",
        "m.pt2"),
    "export archive: a weight is missing": Bad(
        lambda: rewritten(exported(), lambda n, c: None if n.endswith("weight_0") else c), "",
        "m.pt2"),
    "zip bomb": Bad(bomb, "", factory=True),
    "state dict, cut short": Bad(lambda: cut(saved(net().state_dict()), 0.5), "", factory=True),
    "state dict, no factory": Bad(lambda: saved(net().state_dict()), "factory"),
    "a single tensor": Bad(lambda: saved(torch.randn(3)), "", factory=True),
    "an optimizer's state": Bad(
        lambda: saved(torch.optim.SGD(net().parameters(), lr=1.0).state_dict()), "", factory=True),
    "safetensors, no factory": Bad(tensors, "factory", "m.safetensors"),
    "safetensors, cut short": Bad(lambda: cut(tensors(), 0.9), "", "m.safetensors", True),
    "safetensors, header too long": Bad(
        lambda: (10**12).to_bytes(8, "little") + b"{" + bytes(99), "", "m.safetensors", True),
    "safetensors, header no JSON": Bad(
        lambda: (8).to_bytes(8, "little") + b"{oh no!}" + bytes(99), "", "m.safetensors", True),
    "a weight is missing": Bad(
        lambda: tensors(**{"0.bias": None}), "0.bias", "m.safetensors", True),
    "a weight of another shape": Bad(
        lambda: tensors(**{"0.weight": torch.zeros(5, 4)}), "0.weight", "m.safetensors", True),
    "a weight of another type": Bad(
        lambda: tensors(**{"0.weight": torch.zeros(6, 4, dtype=torch.int64)}), "0.weight",
        "m.safetensors", True),
    "no such factory module": Bad(tensors, "not_there", "m.safetensors", True,
                                  entry="not_there:build"),
    "no such factory function": Bad(tensors, "buld", "m.safetensors", True,
                                    entry="factory_of_tests:buld"),
    "a factory with other arguments": Bad(tensors, "depth", "m.safetensors", True, {"depth": 3}),
    "a factory that raises": Bad(tensors, "no luck", "m.safetensors", True,
                                 entry="factory_of_tests:raises"),
    "a factory of no module": Bad(tensors, "", "m.safetensors", True,
                                  entry="factory_of_tests:number"),
    "TorchScript, cut short": Bad(lambda: cut(scripted(), 0.7), ""),
}  # fmt: skip

FACTORY = """
from torch import nn
def build(): return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
def raises(): raise RuntimeError("no luck")
def number(): return 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "factory_of_tests.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("factory_of_tests", None)
    return tmp_path


@pytest.mark.parametrize("name", BAD)
def test_refused_with_one_message_and_nothing_run(name: str, folder: Path) -> None:
    bad = BAD[name]
    file = folder / bad.name
    file.write_bytes(bad.content())
    before = {p.name for p in folder.iterdir()}
    section = {"factory": bad.entry, "kwargs": bad.kwargs or {}} if bad.factory else None
    with pytest.raises(GraphwrightError) as caught:
        load_model(file, section=section)
    message = str(caught.value)
    assert caught.value.exit_code == 3, message
    assert bad.says in message
    assert bad.name in message or bad.factory
    assert len(message) < 1500
    assert {p.name for p in folder.iterdir()} - {"__pycache__"} == before


def test_hostile_sample_inputs_are_not_unpickled(folder: Path) -> None:
    """Torch's own loader runs them; ours leaves them out, so that the file opens."""
    (folder / "m.pt2").write_bytes(hostile_sample_inputs())
    with contextlib.suppress(ModelError):
        load_model(folder / "m.pt2")
    assert not (folder / MARK).exists()


def test_hostile_guards_are_not_executed(folder: Path) -> None:
    def edit(document: dict[str, Any]) -> None:
        document["guards_code"] = [f"open('{MARK}', 'w') is not None"]

    (folder / "m.pt2").write_bytes(in_graph(edit))
    with contextlib.suppress(ModelError):
        module = load_model(folder / "m.pt2").module
        assert module is not None
        module(torch.randn(2, 4))
    assert not (folder / MARK).exists()


def test_nothing_there_a_folder_without_a_model_and_a_locked_file(folder: Path) -> None:
    (folder / "empty").mkdir()
    for path in (folder / "no.pt", folder / "empty"):
        with pytest.raises(GraphwrightError) as caught:
            load_model(path)
        assert caught.value.exit_code == 3
        assert path.name in str(caught.value)


def test_nan_weights_are_a_warning_that_names_them(folder: Path) -> None:
    bias = torch.zeros(6)
    bias[2] = float("nan")
    (folder / "m.safetensors").write_bytes(tensors(**{"0.bias": bias}))
    loaded = load_model(folder / "m.safetensors", section={"factory": "factory_of_tests:build"})
    assert any("NaN" in w and "0.bias" in w for w in loaded.warnings)


def test_an_audit_hook_sees_no_execution(folder: Path) -> None:
    """In a process of its own, every attempt to open MARK for writing would be recorded."""
    (folder / "a.pt").write_bytes(pickle.dumps(Creates()))
    (folder / "b.pt").write_bytes(saved({"x": Creates()}))
    (folder / "c.pt2").write_bytes(hostile_sample_inputs())
    code = f"""
import sys
from graphwright.ir.errors import GraphwrightError
from graphwright.ir.files import load_model
import torch.export
seen = []
sys.addaudithook(lambda event, args: seen.append(args[0]) if event == "open" else None)
for name in ("a.pt", "b.pt", "c.pt2"):
    try:
        load_model(name)
    except GraphwrightError:
        pass
print("{MARK}" in [str(s) for s in seen])
"""
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    assert ran.stdout.strip() == "False"
    assert not (folder / MARK).exists()


def test_a_name_that_is_no_text_is_one_message(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"mod\xe9.pt2")
    path.write_bytes(b"PK")
    with pytest.raises(ModelError, match="not UTF-8") as caught:
        load_model(path)
    assert caught.value.exit_code == 3
    str(caught.value).encode()
