"""Every accepted kind of file gives the model that was saved; what was adjusted is said."""

from __future__ import annotations

import importlib
import io
import json
import os
import subprocess
import sys
import types
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from graphwright.ir.errors import ModelError
from graphwright.ir.files import load_model, pickles
from graphwright.ir.files.detect import detect
from graphwright.ir.files.pickles import read_content, unsafe
from graphwright.ir.trace.capture import trace

NETS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.first = nn.Linear(4, width)
        self.last = nn.Linear(width, 4)
        self.register_buffer("count", torch.arange(3))

    def forward(self, x):
        return self.last(torch.relu(self.first(x)))

class Tied(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.first = nn.Linear(4, width)
        self.last = nn.Linear(width, 4)
        self.copy = nn.Linear(4, width, bias=False)
        self.copy.weight = self.first.weight

    def forward(self, x):
        return self.last(torch.relu(self.first(x)) + self.copy(x))

def build(width=6, tied=False):
    return Tied(width) if tied else Net(width)

def build_half():
    return Net().half()
"""
SECTION = {"factory": "nets_of_tests:build", "kwargs": {}}
TIED = {"factory": "nets_of_tests:build", "kwargs": {"tied": True}}


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets_of_tests.py").write_text(NETS)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("nets_of_tests", None)
    importlib.invalidate_caches()
    return importlib.import_module("nets_of_tests")


def net(nets: types.ModuleType, **kwargs: Any) -> nn.Module:
    torch.manual_seed(1)
    model: nn.Module = nets.build(**kwargs)
    return model.eval()


def scripted(model: nn.Module, how: str, x: torch.Tensor) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(model, x) if how == "trace" else torch.jit.script(model)


def write(model: nn.Module, kind: str, path: Path) -> None:
    x, state = torch.randn(3, 4), model.state_dict()
    batch = torch.export.Dim("batch", min=1, max=64)
    if kind == "export":
        exported = torch.export.export(model, (x,), dynamic_shapes={"x": {0: batch}})
        torch.export.save(exported, path)
    elif kind in ("trace", "script"):
        torch.jit.save(scripted(model, kind, x), path)
    elif kind == "safetensors":
        safetensors.torch.save_file(state, path)
    elif kind == "program":
        trace(model, {"x": x}, {"x": {0: "batch"}}).save(path)
    elif kind.endswith("module"):
        torch.save(model, path, _use_new_zipfile_serialization="old" not in kind)
    else:
        torch.save(state, path, _use_new_zipfile_serialization="old" not in kind)


KINDS = ["export", "trace", "script", "safetensors", "program", "state", "old state", "module",
         "old module"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_every_kind_under_a_wrong_suffix(kind: str, nets: Any, tmp_path: Path) -> None:
    model, path = net(nets), tmp_path / "weights.dat"
    write(model, kind, path)
    section = None if kind in ("export", "trace", "script", "program") else SECTION
    loaded = load_model(path, section=section, allow_pickle="module" in kind)
    x = torch.randn(5, 4)
    if loaded.program is not None:
        assert kind == "program"
        assert loaded.module is None
        assert torch.equal(loaded.program(x), model(x))
        return
    assert loaded.module is not None
    assert not loaded.module.training
    torch.testing.assert_close(loaded.module(x), model(x), rtol=0, atol=0)
    program = trace(loaded.module, {"x": torch.randn(3, 4)}, {"x": {0: "batch"}})
    assert program.signature.inputs[0].shape == ("batch", 4)
    assert set(program.state) == {"first.weight", "first.bias", "last.weight", "last.bias"}
    torch.testing.assert_close(program(x), model(x), rtol=1e-6, atol=1e-6)
    assert len(loaded.sha256) == 64
    assert loaded.file_bytes == path.stat().st_size
    assert loaded.source == path


def test_an_export_archive_says_its_inputs(nets: Any, tmp_path: Path) -> None:
    write(net(nets), "export", tmp_path / "m.pt2")
    inputs = load_model(tmp_path / "m.pt2").inputs
    assert inputs is not None
    assert inputs["x"]["dtype"] == "float32"
    assert isinstance(inputs["x"]["shape"][0], str)
    assert inputs["x"]["shape"][1:] == (4,)
    assert inputs["x"]["example"] == (3, 4)


@pytest.mark.parametrize("kind", ["export", "program", "script"])
@pytest.mark.filterwarnings("ignore")
def test_tied_weights_stay_tied(kind: str, nets: Any, tmp_path: Path) -> None:
    model = net(nets, tied=True)
    write(model, kind, tmp_path / "m")
    loaded = load_model(tmp_path / "m")
    program = loaded.program or trace(loaded.module, {"x": torch.randn(3, 4)})  # type: ignore[arg-type]
    shared = [n for n in program.state if n in ("first.weight", "copy.weight")]
    assert len(shared) == 1
    assert program.aliases == {"first.weight": ("first.weight", "copy.weight")}


def test_tied_weights_of_a_factory(nets: Any, tmp_path: Path) -> None:
    """safetensors keeps a shared tensor once; a state dict keeps it under both names."""
    model = net(nets, tied=True)
    once = {k: v for k, v in model.state_dict().items() if k != "copy.weight"}
    safetensors.torch.save_file(once, tmp_path / "once")
    torch.save(model.state_dict(), tmp_path / "both")
    torch.save({**model.state_dict(), "copy.weight": torch.zeros(6, 4)}, tmp_path / "differ")
    x = torch.randn(2, 4)
    for name in ("once", "both", "differ"):
        loaded = load_model(tmp_path / name, section=TIED)
        module: Any = loaded.module
        assert module.copy.weight is module.first.weight
        assert torch.equal(module(x), model(x))
        assert any("ties" in w and "copy.weight" in w for w in loaded.warnings) == (
            name == "differ"
        )


@pytest.mark.parametrize(
    ("wrap", "says"),
    [
        (lambda s: {"state_dict": s, "epoch": 3, "optimizer": {}}, "'state_dict'"),
        (lambda s: {"model": s}, "'model'"),
        (lambda s: {f"module.{k}": v for k, v in s.items()}, "'module.'"),
        (lambda s: {f"_orig_mod.{k}": v for k, v in s.items()}, "'_orig_mod.'"),
        (lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()}, "'module._orig_mod.'"),
        (lambda s: {"state_dict": {f"model.{k}": v for k, v in s.items()}}, "'model.'"),
        (lambda s: {**s, "version": 3}, "version"),
        (lambda s: {k: v.half() if v.is_floating_point() else v for k, v in s.items()}, "widened"),
        (lambda s: {k: v.bfloat16() if v.is_floating_point() else v for k, v in s.items()},
         "widened"),
    ],
)  # fmt: skip
def test_what_training_scripts_save(wrap: Any, says: str, nets: Any, tmp_path: Path) -> None:
    model = net(nets)
    torch.save(wrap(model.state_dict()), tmp_path / "m.pt")
    loaded = load_model(tmp_path / "m.pt", section=SECTION)
    assert any(says in w for w in loaded.warnings), loaded.warnings
    x = torch.randn(2, 4)
    tolerance = 2e-2 if says == "widened" else 0.0  # bfloat16 keeps 8 bits
    assert loaded.module is not None
    torch.testing.assert_close(loaded.module(x), model(x), rtol=tolerance, atol=tolerance)


def test_narrowing_is_refused(nets: Any, tmp_path: Path) -> None:
    safetensors.torch.save_file(net(nets).state_dict(), tmp_path / "m")
    with pytest.raises(ModelError, match="another dtype") as caught:
        load_model(tmp_path / "m", section={"factory": "nets_of_tests:build_half"})
    assert "first.weight: torch.float32 in the file, torch.float16" in str(caught.value)


def test_files_stay_mapped(nets: Any, tmp_path: Path) -> None:
    """Weights of 40 MB cost no memory of their own until they are read."""
    model = net(nets, width=1_250_000)
    write(model, "safetensors", tmp_path / "m.safetensors")
    write(model, "state", tmp_path / "m.pt")
    write(model, "export", tmp_path / "m.pt2")
    for name in ("m.safetensors", "m.pt", "m.pt2"):
        wide = {"factory": "nets_of_tests:build", "kwargs": {"width": 1_250_000}}
        loaded = load_model(tmp_path / name, section=None if name == "m.pt2" else wide)
        maps = Path("/proc/self/maps")
        if not maps.exists():
            pytest.skip("no /proc on this system")
        assert str(tmp_path / name) in maps.read_text()
        del loaded


def test_a_sharded_index(nets: Any, tmp_path: Path) -> None:
    model = net(nets)
    items = list(model.state_dict().items())
    table = {}
    for part in range(2):
        name = f"model-{part}.safetensors"
        chosen = dict(items[part::2])
        safetensors.torch.save_file(chosen, tmp_path / name)
        table.update(dict.fromkeys(chosen, name))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": table}))
    loaded = load_model(index, section=SECTION)
    x = torch.randn(2, 4)
    assert loaded.module is not None
    assert torch.equal(loaded.module(x), model(x))
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model-1.safetensors' is missing"):
        load_model(index, section=SECTION)
    for name in ("../model-0.safetensors", "/etc/passwd", "a/b", ".."):
        index.write_text(json.dumps({"weight_map": {"first.bias": name}}))
        with pytest.raises(ModelError, match="outside the folder"):
            load_model(index, section=SECTION)


def bert(folder: Path) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model: nn.Module = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(folder)  # type: ignore[operator]
    return model


def test_a_hugging_face_folder(tmp_path: Path) -> None:
    model = bert(tmp_path)
    loaded = load_model(tmp_path)
    ids = torch.randint(0, 30, (2, 5))
    assert type(loaded.module) is type(model)
    assert loaded.module is not None
    assert torch.equal(loaded.module(ids).logits, model(ids).logits)
    assert loaded.tokenizer == tmp_path
    assert loaded.inputs is not None
    assert set(loaded.inputs) == {"input_ids", "attention_mask"}
    assert loaded.inputs["input_ids"]["range"] == (0, 30)


def test_a_pickled_hugging_face_folder(tmp_path: Path) -> None:
    """Accepted as a state dict; a hidden object is refused before transformers sees it."""
    model = bert(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    loaded = load_model(tmp_path)
    ids = torch.randint(0, 30, (2, 5))
    assert loaded.module is not None
    assert torch.equal(loaded.module(ids).logits, model(ids).logits)
    torch.save({**model.state_dict(), "x": Creates()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="would import"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "mine", "auto_map": {"AutoModel": "code.Net"}}, "never run"),
        ({"model_type": "no_such_model"}, "does not know"),
        ({"_attn_implementation": "someone/kernel"}, "from the network"),
        ({"hidden_size": 24}, "another shape"),
    ],
)
def test_hugging_face_folders_that_are_refused(change: Any, says: str, tmp_path: Path) -> None:
    bert(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    (tmp_path / "code.py").write_text("open('ran.txt', 'w')")
    with pytest.raises(ModelError, match=says):
        load_model(tmp_path)
    assert not (tmp_path / "ran.txt").exists()


def test_a_diffusers_folder(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=4,
        block_out_channels=(8, 8), down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    x = torch.randn(1, 1, 8, 8)
    assert loaded.module is not None
    # float32 sums: memory of another alignment takes another path through the convolutions
    torch.testing.assert_close(loaded.module(x, 3).sample, model(x, 3).sample, rtol=1e-5, atol=1e-5)


def test_folders_that_are_no_model(tmp_path: Path) -> None:
    for name, files, says in [
        ("adapter", {"adapter_config.json": "{}"}, "adapter"),
        ("pipeline", {"model_index.json": "{}", "unet/config.json": "{}"}, "unet"),
        ("weights", {"net.pt": "x"}, "net.pt"),
        ("bare", {"config.json": '{"model_type": "bert"}'}, "no weights"),
        ("tensorflow", {"saved_model.pb": "x"}, "TensorFlow"),
        ("broken", {"config.json": "{"}, "JSON"),
    ]:
        for file, text in files.items():
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        with pytest.raises(ModelError, match=says):
            load_model(tmp_path / name)


class Creates:
    """Makes a folder in the working folder when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("ran.txt",)


@pytest.mark.filterwarnings("ignore")
def test_torchscript_that_does_more_than_compute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.jit.script(nn.Linear(2, 2)).save("m.pt")
    with zipfile.ZipFile("m.pt") as old, zipfile.ZipFile("bad.pt", "w") as new:
        for info in old.infolist():
            content = old.read(info)
            if info.filename.endswith(".py"):
                content = content.replace(b"return ", b'torch.save(input, "ran.txt")\n    return ')
            new.writestr(zipfile.ZipInfo(info.filename), content)
    with pytest.raises(ModelError, match=r"more than compute[\s\S]*aten::save") as caught:
        load_model("bad.pt")
    assert caught.value.exit_code == 3
    assert not (tmp_path / "ran.txt").exists()


@pytest.mark.filterwarnings("ignore")
def test_torchscript_with_a_branch_on_data_is_a_message(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(Branches()), tmp_path / "m.pt")
    module = load_model(tmp_path / "m.pt").module
    assert module is not None
    with pytest.raises(ModelError, match="cannot be traced"):
        trace(module, {"x": torch.randn(3, 4)})


class Branches(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if bool(x.sum() > 0):
            return x
        return -x


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_globals_are_named_in_every_protocol(protocol: int) -> None:
    import collections
    import pickle

    hostile = {"a": [1, 2.0, "os system"], "b": (Creates(), Creates())}
    assert unsafe(read_content(pickle.dumps(hostile, protocol)).globals) == [f"{os.name}.mkdir"]
    plain = pickle.dumps(collections.OrderedDict(a=1, b=["posix", "system"]), protocol)
    assert unsafe(read_content(plain).globals) == []


def test_containers_of_a_pickle_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "MAX_CONTAINERS", 1000)
    read_content(b"]" * 1000 + b".")
    with pytest.raises(ModelError, match="absurd number of containers"):
        read_content(b"]" * 1001 + b".")


@pytest.mark.parametrize(
    "stream",
    [
        b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
        b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94\x8c\x05torch\x8c\x04Size\x30\x30\x93.",
        b"\x80\x04\x8c\x02os\x8c\x06system(\x8c\x05torch\x8c\x04Size1\x93.",
        b"\x80\x04\x8c\x02os\x94\x30\x8c\x06system\x94\x30h\x00h\x01\x93.",
        b"\x80\x02cos\nsystem\n.",
        b"(ios\nsystem\n.",
        b"\x80\x02\x82\x01.",
        b"\x80\x04\x8c\x02os2\x93.",
    ],
    ids=["plain", "popped decoys", "mark decoys", "memo", "global", "inst", "extension", "dup"],
)
def test_globals_that_hide(stream: bytes) -> None:
    """Decoys on the stack, names from the memo, old opcodes: never taken for plain data."""
    assert unsafe(read_content(stream).globals)


def test_two_readings_of_one_zip(tmp_path: Path, nets: Any) -> None:
    """A member listed under a name that its own header does not have."""
    write(net(nets), "state", tmp_path / "m.pt")
    content = (tmp_path / "m.pt").read_bytes()
    local = content.index(b"data.pkl")
    (tmp_path / "bad.pt").write_bytes(content[:local] + b"DATA.PKL" + content[local + 8 :])
    with pytest.raises(ModelError, match="another name"):
        load_model(tmp_path / "bad.pt", section=SECTION)


def test_zip_members_with_tricks(tmp_path: Path) -> None:
    def archive(members: list[tuple[zipfile.ZipInfo | str, bytes]]) -> Path:
        path = tmp_path / "m.pt"
        with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as file:
            warnings.simplefilter("ignore")
            file.writestr("archive/data.pkl", b"\x80\x02}q\x00.")
            for name, content in members:
                file.writestr(name, content)
        return path

    link = zipfile.ZipInfo("archive/data/0")
    link.external_attr = 0o120777 << 16
    for members, says in [
        ([("archive/data.pkl", b"\x80\x02}q\x00.")], "twice"),
        ([(link, b"/etc/passwd")], "symbolic link"),
        ([("archive/../../x", b"x")], "outside"),
        ([("/x", b"x")], "absolute"),
        ([("archive/c:\\x", b"x")], "foreign"),
    ]:
        with pytest.raises(ModelError, match=says):
            load_model(archive(members))  # type: ignore[arg-type]


def test_detecting_runs_nothing_and_needs_no_torch(tmp_path: Path) -> None:
    torch.save({"x": Creates()}, tmp_path / "m.pt")
    code = (
        "import sys; from pathlib import Path; from graphwright.ir.files.detect import detect;"
        "print(detect(Path('m.pt')).name, 'torch' in sys.modules)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True,
        env=dict(os.environ),
    )  # fmt: skip
    assert ran.stdout.split() == ["CHECKPOINT", "False"]
    assert detect(tmp_path / "m.pt").name == "CHECKPOINT"
    assert not (tmp_path / "ran.txt").exists()


def hostile(name: str) -> bytes:
    """An export archive with one trap, each of which torch's own loader or module walks into."""
    file, payload = io.BytesIO(), io.BytesIO()
    torch.export.save(torch.export.export(nn.Linear(4, 4), (torch.randn(2, 4),)), file)
    torch.save(((Creates(),), {}), payload)
    out = io.BytesIO()
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(out, "w") as new:
        for info in old.infolist():
            content = old.read(info)
            if name == "sample inputs" and "sample_inputs" in info.filename:
                content = payload.getvalue()
            if name == "pickled weight" and info.filename.endswith("model_weights_config.json"):
                content = content.replace(b'"use_pickle": false', b'"use_pickle": true')
            if info.filename.endswith("models/model.json"):
                model = json.loads(content)
                if name == "guard":
                    model["guards_code"] = ["open('ran.txt', 'w') is not None"]
                if name == "size":
                    values = model["graph_module"]["graph"]["tensor_values"]
                    size = {"as_expr": {"expr_str": "open('ran.txt', 'w')", "hint": None}}
                    next(iter(values.values()))["sizes"][0] = size
                content = json.dumps(model).encode()
            new.writestr(zipfile.ZipInfo(info.filename), content)
    return out.getvalue()


@pytest.mark.parametrize("name", ["sample inputs", "pickled weight", "guard", "size"])
def test_hostile_export_archives_are_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("m.pt2").write_bytes(hostile(name))
    with pytest.raises(ModelError, match=r"could run code|import and call") as caught:
        load_model("m.pt2")
    assert caught.value.exit_code == 3
    assert "--allow-pickle" in str(caught.value)
    assert os.listdir() == ["m.pt2"]


def test_the_trap_works_where_it_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files above are hostile indeed: with pickles allowed, torch's loader runs this one."""
    monkeypatch.chdir(tmp_path)
    Path("m.pt2").write_bytes(hostile("sample inputs"))
    load_model("m.pt2", allow_pickle=True)
    assert Path("ran.txt").exists()
