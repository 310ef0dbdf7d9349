"""safetensors, indexes, model folders, saved artifacts, and what is no file at all."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import safetensors.torch
from hostile import archives, pickled
from hostile.case import Creates, Hostile, content

Make = Callable[[Path], Path]


def tensors() -> bytes:
    """The weights of the factory's module."""
    return safetensors.torch.save(dict(pickled.net().state_dict()))


def header(text: bytes, data: bytes = bytes(96), length: int | None = None) -> bytes:
    """A safetensors file with this header."""
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(shape: list[int], start: int, stop: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def table(**entries: Any) -> bytes:
    return header(json.dumps({k.replace("_", "."): v for k, v in entries.items()}).encode())


SAFETENSORS: dict[str, Callable[[], bytes]] = {
    "header beyond the file": lambda: header(b'{"a":1}', length=10**12),
    "header of 90 MB in a small file": lambda: header(b'{"a":1}', length=90 << 20),
    "deep header": lambda: header(b'{"a":' + archives.deep() + b"}"),
    "header of another kind": lambda: header(b'{"a": [1, 2]}'),
    "header that is no text": lambda: header(b"{\xff\xfe\xfd\xfc\xfb\xfa}"),
    "overlap": lambda: table(a=entry([24], 0, 96), b=entry([24], 0, 96)),
    "hole": lambda: table(a=entry([2], 0, 8), b=entry([2], 88, 96)),
    "shape that overflows": lambda: table(a=entry([2**40, 2**40, 2**40], 0, 96)),
    "empty shape beyond measure": lambda: table(**{"0_weight": entry([0, 2**62, 2**62], 0, 0)}),
    "negative size": lambda: table(a=entry([-24], 0, 96)),
    "offsets turned round": lambda: table(a=entry([24], 96, 0)),
    "offsets beyond the file": lambda: table(a=entry([10**9], 0, 4 * 10**9)),
    "unknown dtype": lambda: table(a=entry([24], 0, 96, "PICKLE")),
    "a name twice": lambda: header(
        b'{"a":{"dtype":"F32","shape":[24],"data_offsets":[0,96]},'
        b'"a":{"dtype":"F32","shape":[24],"data_offsets":[0,96]}}'),
    "cut": lambda: tensors()[:-7],
}  # fmt: skip


def index(weight_map: Any, extra: Callable[[Path], object] = lambda f: None) -> Make:
    def make(folder: Path) -> Path:
        extra(folder)
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return path

    return make


CONFIG = {
    "model_type": "bert", "architectures": ["BertModel"], "hidden_size": 8, "vocab_size": 11,
    "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "max_position_embeddings": 16, "type_vocab_size": 2,
}  # fmt: skip


@cache
def bert() -> bytes:
    """Weights that fit CONFIG."""
    import transformers

    config = transformers.BertConfig(**CONFIG)
    return safetensors.torch.save(
        {k: v.clone() for k, v in transformers.BertModel(config).state_dict().items()}
    )


def beside(name: str) -> Make:
    """A whole model folder with a pipe in it."""

    def make(folder: Path) -> Path:
        path = model_folder({})(folder)
        os.mkfifo(path / name)
        return path

    return make


def model_folder(
    change: dict[str, Any], files: dict[str, bytes] | None = None, weights: bool = True
) -> Make:
    """A folder of transformers with entries of its config changed, and further files."""

    def make(folder: Path) -> Path:
        path = folder / "model"
        path.mkdir()
        (path / "config.json").write_text(json.dumps({**CONFIG, **change}))
        if weights:
            (path / "model.safetensors").write_bytes(bert())
        for name, data in (files or {}).items():
            (path / name).write_bytes(data)
        return path

    return make


CODE = b"open('ran.txt', 'w')\n"
BILLION = 10**9

FOLDERS: dict[str, tuple[Make, str]] = {
    "layers": (model_folder({"num_hidden_layers": BILLION}), "num_hidden_layers"),
    "heads": (model_folder({"num_attention_heads": BILLION}), "num_attention_heads"),
    "width": (model_folder({"hidden_size": BILLION}), ""),
    "vocabulary": (model_folder({"vocab_size": BILLION}), "parameters"),
    "positions": (model_folder({"max_position_embeddings": BILLION}), "parameters"),
    "inner width": (model_folder({"intermediate_size": BILLION}), "parameters"),
    "many layers": (model_folder({"num_hidden_layers": 90_000}), "modules"),
    "negative width": (model_folder({"hidden_size": -8}), ""),
    "width of text": (model_folder({"hidden_size": "8; import os"}), ""),
    "nested layers": (model_folder({"text_config": {"num_layers": [1, BILLION]}}), "num_layers"),
    "own code": (
        model_folder({"model_type": "evil", "architectures": ["EvilModel"],
                      "auto_map": {"AutoModel": "evil.EvilModel"}}, {"evil.py": CODE}),
        "never run"),
    "a kernel from the network": (
        model_folder({"_attn_implementation": "evil/kernels"}), "kernel"),
    "architectures of another kind": (model_folder({"architectures": 1e308}), "architecture"),
    "a model type of another kind": (model_folder({"model_type": {"a": 1}}), "architecture"),
    "config of another kind": (model_folder({}, {"config.json": b"[1]"}), "object"),
    "deep config": (model_folder({}, {"config.json": archives.deep()}), "deep"),
    "deep config of objects": (
        model_folder({}, {"config.json": b'{"a":' * 900 + b"1" + b"}" * 900}), ""),
    "index outside": (
        model_folder({}, {"model.safetensors.index.json":
                          b'{"weight_map": {"a": "../../x.safetensors"}}'}, False), "outside"),
    "hostile weights": (
        model_folder({}, {"pytorch_model.bin": pickled.saved({"a": Creates()})}, False), "import"),
    "hostile shard": (
        model_folder({}, {"pytorch_model.bin.index.json": b'{"weight_map": {"a": "b.bin"}}',
                          "b.bin": pickled.saved({"a": Creates()})}, False), "import"),
    "TorchScript as weights": (
        model_folder({}, {"pytorch_model.bin": b"PK"}, False), "damaged"),
    "codes of endless width": (
        model_folder({"quantization_config": {"quant_method": "gptq", "bits": 2**70}}), "bits"),
    "codes of a deep description": (
        model_folder({"quantization_config": {"quant_method": "awq", "bits": [[[4]]]}}), ""),
    "a diffusers model of any width": (
        model_folder({"_diffusers_version": "0.30", "_class_name": "UNet2DModel",
                      "block_out_channels": [BILLION], "layers_per_block": BILLION}),
        "layers_per_block"),
    "a diffusers class of ours": (
        model_folder({"_diffusers_version": "0.30", "_class_name": "os.system"}), "no model"),
}  # fmt: skip


# --- artifacts ---------------------------------------------------------------------------------


def artifact(edit: Callable[[Any], object], files: dict[str, bytes] | None = None) -> Make:
    """A `model.onnx` as ours, changed, with files beside it."""

    def make(folder: Path) -> Path:
        import onnx
        from onnx import TensorProto, helper

        x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 3]) for n in "xy")
        weight = helper.make_tensor("w", TensorProto.FLOAT, [3], [1.0, 2.0, 3.0])
        node = helper.make_node("Add", ["x", "w"], ["y"])
        body = helper.make_graph([node], "main", [x], [y], [weight])
        model: Any = helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)])
        model.ir_version = 8
        signature = {
            "inputs": [{"name": "x", "dtype": "float32", "shape": ["n", 3]}],
            "outputs": [{"name": "y", "dtype": "float32", "shape": ["n", 3]}],
            "structure": 0, "dims": {"n": {"min": 1}}, "constants": {},
        }  # fmt: skip
        model.metadata_props.add(key="graphwright", value=json.dumps({"signature": signature}))
        edit(model)
        for name, data in (files or {}).items():
            (folder / name).write_bytes(data)
        onnx.save(model, folder / "model.onnx") if not isinstance(model, bytes) else None
        return folder / "model.onnx"

    return make


def external(location: str, **facts: str) -> Callable[[Any], None]:
    def edit(model: Any) -> None:
        weight = model.graph.initializer[0]
        weight.ClearField("float_data")
        weight.data_location = 1
        for key, value in {"location": location, **facts}.items():
            weight.external_data.add(key=key, value=value)

    return edit


def metadata(text: str) -> Callable[[Any], None]:
    def edit(model: Any) -> None:
        model.metadata_props[0].value = text

    return edit


def context(model: Any) -> None:
    from onnx import helper

    model.graph.node.append(
        helper.make_node("EPContext", ["x"], ["z"], domain="com.microsoft", ep_cache_context="/x")
    )


def unknown(model: Any) -> None:
    model.graph.node[0].op_type = "RunsAnything"


def inside(model: Any) -> None:
    """The tensor lies in an attribute of a node in a subgraph."""
    from onnx import TensorProto, helper

    tensor = helper.make_tensor("t", TensorProto.FLOAT, [1], [1.0])
    tensor.ClearField("float_data")
    tensor.data_location = 1
    tensor.external_data.add(key="location", value="/etc/passwd")
    node = helper.make_node("Constant", [], ["c"], value=tensor)
    body = helper.make_graph([node], "b", [], [])
    model.graph.node.append(
        helper.make_node("If", ["x"], ["q"], then_branch=body, else_branch=body)
    )


def linked(folder: Path) -> Path:
    path = artifact(external("d.bin", length="12"))(folder)
    (folder / "d.bin").symlink_to("/etc/passwd")
    return path


ARTIFACTS: dict[str, tuple[Make, str]] = {
    "bytes outside": (artifact(external("../../etc/passwd")), "outside"),
    "bytes at an absolute path": (artifact(external("/etc/passwd")), "outside"),
    "bytes nowhere": (artifact(external("")), "outside"),
    "bytes that are missing": (artifact(external("d.bin")), "no file"),
    "bytes behind a link": (linked, "no file"),
    "bytes beyond the end": (
        artifact(external("d.bin", offset="8", length="10000"), {"d.bin": bytes(16)}), "beyond"),
    "a negative offset": (
        artifact(external("d.bin", offset="-8", length="4"), {"d.bin": bytes(16)}), "beyond"),
    "an offset of text": (
        artifact(external("d.bin", offset="x"), {"d.bin": bytes(16)}), "beyond"),
    "bytes outside, in a subgraph": (artifact(inside), "outside"),
    "a file of its choice": (artifact(context), "EPContext"),
    "an unknown operator": (artifact(unknown), "cannot open"),
    "no metadata": (artifact(lambda m: m.ClearField("metadata_props")), "metadata"),
    "deep metadata": (artifact(metadata('{"signature":' + "[" * 10**5)), "damaged"),
    "metadata of another kind": (artifact(metadata("[1]")), "damaged"),
    "metadata that is cut": (artifact(metadata('{"signature": {')), "damaged"),
    "no protobuf": (content(lambda: b"\x08\x07:\xff\xff\xff\xff", "model.onnx"), "readable"),
    "deep protobuf": (content(lambda: b":\x7f" * 3000, "model.onnx"), "readable"),
}  # fmt: skip


# --- no files ----------------------------------------------------------------------------------


def pipe(name: str) -> Make:
    def make(folder: Path) -> Path:
        os.mkfifo(folder / name)
        return folder / name

    return make


def a_socket(folder: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as end:
        end.bind("s.sock")  # a path of a test's folder is too long for it
    return folder / "s.sock"


def circle(folder: Path) -> Path:
    (folder / "a.pt").symlink_to(folder / "b.pt")
    (folder / "b.pt").symlink_to(folder / "a.pt")
    return folder / "a.pt"


def to_pipe(folder: Path) -> Path:
    os.mkfifo(folder / "p")
    (folder / "m.pt").symlink_to(folder / "p")
    return folder / "m.pt"


def pipe_in_folder(name: str) -> Make:
    def make(folder: Path) -> Path:
        path = model_folder({}, weights=name == "config.json")(folder)
        (path / name).unlink(missing_ok=True)
        os.mkfifo(path / name)
        return path

    return make


NO_FILES: dict[str, tuple[Make, str]] = {
    "a pipe": (pipe("m.pt"), "pipe"),
    "a pipe of an artifact": (pipe("model.onnx"), "pipe"),
    "a link to a pipe": (to_pipe, "pipe"),
    "a device without end": (lambda f: Path("/dev/zero"), "device"),
    "a device": (lambda f: Path("/dev/null"), "device"),
    "a terminal": (lambda f: Path("/dev/tty"), ""),
    "a socket": (a_socket, "socket"),
    "a circle of links": (circle, ""),
    "an empty folder": (lambda f: f, "config.json"),
    "nothing there": (lambda f: f / "no.pt", "no such file"),
    "config.json is a pipe": (pipe_in_folder("config.json"), ""),
    "weights are a pipe": (pipe_in_folder("model.safetensors"), "no weights"),
    "pickled weights are a pipe": (pipe_in_folder("pytorch_model.bin"), "no weights"),
    "GGUF": (content(lambda: b"GGUF" + b"\xff" * 300, "m.gguf"), "GGUF"),
    "text": (content(lambda: b"import os\n" * 99), "no model file"),
    "deep JSON": (content(lambda: b'{"a":' + archives.deep() + b"}"), "deep"),
    "a number of 10000 digits": (content(lambda: b'{"a": ' + b"9" * 10000 + b"}"), "JSON"),
}

CASES: dict[str, Hostile] = {
    **{f"safetensors: {name}": Hostile(content(make, "m.safetensors"), "", True)
       for name, make in SAFETENSORS.items()},
    "index: outside": Hostile(index({"a": "../x.safetensors"}), "outside", True),
    "index: absolute": Hostile(index({"a": "/etc/passwd"}), "outside", True),
    "index: missing": Hostile(index({"a": "x.safetensors"}), "missing", True),
    "index: itself": Hostile(index({"a": "model.safetensors.index.json"}), "", True),
    "index: a pipe": Hostile(
        index({"a": "x.safetensors"}, lambda f: os.mkfifo(f / "x.safetensors")), "missing", True),
    "index: of another kind": Hostile(index([1, 2]), "index", True),
    "index: names that are no texts": Hostile(index({"a": [1]}), "index", True),
    "index: a pickle": Hostile(
        index({"a": "x.bin"}, lambda f: (f / "x.bin").write_bytes(pickled.saved(Creates()))),
        "", True),
    **{f"folder: {name}": Hostile(make, says) for name, (make, says) in FOLDERS.items()},
    "folder: a pipe beside it": Hostile(beside("generation_config.json"), is_harmless=True),
    "folder: codes that no weight has": Hostile(
        model_folder({"quantization_config": {"quant_method": "gptq", "bits": 4,
                                              "group_size": -BILLION}}), is_harmless=True),
    **{f"artifact: {name}": Hostile(make, says) for name, (make, says) in ARTIFACTS.items()},
    **{f"no file: {name}": Hostile(make, says) for name, (make, says) in NO_FILES.items()},
}  # fmt: skip
