"""Export archives (`.pt2`) of torch and of ours."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hostile.case import FLAG, Creates, Hostile, content
from hostile.pickled import bomb, net, rebuilt, saved
from hostile.zips import kept, rewritten

RUNS = f"__import__('pathlib').Path('{FLAG}').touch()"


@cache
def exported() -> bytes:
    """An archive of torch.export with a dynamic size."""
    with torch.no_grad():
        program = torch.export.export(
            net(), (torch.randn(2, 4),), dynamic_shapes=({0: torch.export.Dim("n", max=64)},)
        )
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()


@cache
def ours() -> bytes:
    """An archive of ours."""
    import tempfile

    import graphwright as gw

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "p.pt2"
        gw.trace(net(), {"input": torch.randn(2, 4)}).save(path)
        return path.read_bytes()


Edit = Callable[[Any], None]


def edited(edit: Edit, member: str = "models/model.json", base: Any = exported) -> bytes:
    """The archive with one JSON member edited."""

    def change(name: str, data: bytes) -> bytes | None:
        if not name.endswith(member):
            return data
        document = json.loads(data)
        edit(document)
        return json.dumps(document).encode()

    return rewritten(base(), change)


def replaced(member: str, data: bytes, base: Any = exported) -> bytes:
    return rewritten(base(), lambda n, c: data if n.endswith(member) else c)


def graph(document: Any) -> Any:
    return document["graph_module"]["graph"]


def target(text: str) -> Edit:
    def edit(document: Any) -> None:
        graph(document)["nodes"][0]["target"] = text

    return edit


def size(text: str, hint: int = 2) -> Edit:
    def edit(document: Any) -> None:
        first = next(iter(graph(document)["tensor_values"].values()))
        first["sizes"][0] = {"as_expr": {"expr_str": text, "hint": {"as_int": hint}}}

    return edit


def guard(text: str) -> Edit:
    def edit(document: Any) -> None:
        document["guards_code"] = [text]

    return edit


def tree(kind: str, context: Any) -> Edit:
    def edit(document: Any) -> None:
        call = document["graph_module"]["module_call_graph"][0]["signature"]
        leaf = {"type": None, "context": None, "children_spec": []}
        call["out_spec"] = json.dumps(
            [1, {"type": kind, "context": context, "children_spec": [leaf]}]
        )

    return edit


def table(key: str, value: Any) -> Edit:
    """Changes one entry of the table of weights."""

    def edit(document: Any) -> None:
        first = next(iter(document["config"].values()))
        holder = first if key in first else first["tensor_meta"]
        holder[key] = value

    return edit


WEIGHTS = "model_weights_config.json"
ints = lambda *sizes: [{"as_int": n} for n in sizes]  # noqa: E731


def names(text: str) -> Edit:
    def edit(document: Any) -> None:
        graph(document)["nodes"][0]["inputs"][0]["name"] = text
        for node in graph(document)["nodes"]:
            for output in node["outputs"]:
                if "as_tensor" in output:
                    output["as_tensor"]["name"] = text

    return edit


def stack(document: Any) -> None:
    for node in graph(document)["nodes"]:
        node["metadata"]["nn_module_stack"] = f"L;{RUNS},x,y"


def custom(document: Any) -> None:
    graph(document)["custom_obj_values"] = {"x": {"name": "x", "class_fqn": "os.system"}}


def deep(depth: int = 100_000) -> bytes:
    return b"[" * depth + b"]" * depth


def sample(data: bytes) -> bytes:
    return replaced("sample_inputs/model.pt", data)


def record(edit: Edit) -> bytes:
    return edited(edit, "extra/graphwright.json", ours)


def put(*path: Any, value: Any) -> Edit:
    def edit(document: Any) -> None:
        for key in path[:-1]:
            document = document[key]
        document[path[-1]] = value

    return edit


def pt2(make: Callable[[], bytes], says: str = "", *, harmless: bool = False) -> Hostile:
    return Hostile(content(make, "m.pt2"), says, is_harmless=harmless)


OPERATORS = (
    "torch.os.system", "builtins.exec", "os.system", "torch.ops.aten.from_file.default",
    "torch.ops.aten.save.default", "torch.ops.load_library",
    "torch.ops.profiler._record_function_enter.default",
    "torch.ops.torchaudio.sox_io_save_audio_file.default", "torch.ops.image.write_file.default",
    "torch.ops.higher_order.hints_wrapper", "torch.ops.higher_order.print", "_operator.attrgetter",
    "math.perm", "torch.serialization.load", "torch.hub.load", "torch.ops.aten.manual_seed.default",
    "torch.ops.aten.set_.source_Tensor", "torch.sym_int.__globals__",
)  # fmt: skip

EXPRESSIONS = (
    RUNS, "9**9**9**9", "Pow(Integer(9), Integer(999999999))",
    "LShift(Integer(1), Integer(1 << 40))",
    "Pow(Integer(9), Symbol('s0', integer=True)*0 + 999999999)", "Symbol('s0').func.__globals__",
    "(lambda: 0)()", "[x for x in ()]", "Symbol('s0; import os')", "eval('1')", "s0.__class__",
    "f'{1}'", "(" * 300 + "1" + ")" * 300, "-" * 5000 + "1", "factorial(99999999)",
    "Integer('__import__')",
)  # fmt: skip

GUARDS = (
    f"open('{FLAG}', 'w') is not None", "L['x'].size()[0].__class__ is not None", "9**9**9**9 > 0",
    f"{RUNS} is None", "2 ** (L['x'].size()[0]*0 + 999999999) > 0",
)  # fmt: skip

CASES: dict[str, Hostile] = {
    **{f".pt2: operator {name}": pt2(lambda name=name: edited(target(name)), "operator")
       for name in OPERATORS},
    **{f".pt2: size {text[:30]}": pt2(lambda text=text: edited(size(text)), "size")
       for text in EXPRESSIONS},
    **{f".pt2: guard {text[:30]}": pt2(lambda text=text: edited(guard(text)), "guard")
       for text in GUARDS},
    ".pt2: a power of a large size": pt2(
        lambda: edited(size("Pow(Integer(3), Symbol('s0', positive=True, integer=True))", 10**9)),
        "sizes up to"),
    ".pt2: tree defaultdict": pt2(
        lambda: edited(tree("collections.defaultdict", json.dumps({"default_factory_module": "os",
            "default_factory_name": "system", "dict_context": ["a"]}))), "container"),
    ".pt2: tree enum": pt2(
        lambda: edited(tree("builtins.dict", json.dumps([{"__enum__": True, "fqn": "os:x"}]))),
        "container"),
    ".pt2: node name": pt2(lambda: edited(names(f"x\n{RUNS}\ny")), "name"),
    ".pt2: module stack": pt2(lambda: edited(stack), harmless=True),
    ".pt2: custom object": pt2(lambda: edited(custom), "torch-bind"),
    ".pt2: weights as pickles": pt2(lambda: edited(table("use_pickle", True), WEIGHTS), "pickle"),
    ".pt2: opaque object": pt2(
        lambda: edited(table("path_name", "opaque_obj_0"), WEIGHTS), "pickle"),
    ".pt2: bytes elsewhere": pt2(
        lambda: edited(table("path_name", "../../models/model.json"), WEIGHTS), "missing"),
    ".pt2: beyond the bytes": pt2(lambda: edited(table("sizes", ints(10**9, 4)), WEIGHTS), "fit"),
    ".pt2: negative stride": pt2(lambda: edited(table("strides", ints(-1, 1)), WEIGHTS), "fit"),
    ".pt2: negative offset": pt2(
        lambda: edited(table("storage_offset", {"as_int": -4}), WEIGHTS), "fit"),
    ".pt2: repeats itself": pt2(
        lambda: edited(lambda d: (table("sizes", ints(10**9, 10**6))(d),
                                  table("strides", ints(0, 0))(d)), WEIGHTS), "repeats"),
    ".pt2: sizes beyond 64 bits": pt2(
        lambda: edited(table("sizes", ints(2**70, 0)), WEIGHTS)),
    ".pt2: no such dtype": pt2(lambda: edited(table("dtype", 99), WEIGHTS), "table"),
    ".pt2: table of another kind": pt2(lambda: replaced(WEIGHTS, b"[1]"), "table"),
    ".pt2: deep graph": pt2(lambda: replaced("models/model.json", deep()), ""),
    ".pt2: deep table": pt2(lambda: replaced(WEIGHTS, deep()), ""),
    ".pt2: deep tree": pt2(lambda: edited(put(
        "graph_module", "module_call_graph", 0, "signature", "in_spec",
        value=deep(5000).decode())), ""),
    ".pt2: graph of another kind": pt2(lambda: replaced("models/model.json", b"[]"), "not what"),
    ".pt2: hostile sample inputs": pt2(lambda: sample(saved(((Creates(),), {}))), "sample inputs"),
    ".pt2: sample inputs of a bare pickle": pt2(
        lambda: sample(saved((Creates(),), _use_new_zipfile_serialization=False)), "bare pickle"),
    ".pt2: a bomb in the sample inputs": pt2(lambda: sample(bomb()), "bomb"),
    ".pt2: endless sample inputs": pt2(
        lambda: sample(rebuilt(b"\x8a\x05\x00\xe4\x0bT\x02\x85", b"K\x00\x85")), ""),
    ".pt2: compiled library": pt2(
        lambda: rewritten(exported(), kept, {"archive/data/aotinductor/m/a.so": b"ELF"}),
        "more"),
    ".pt2: pickled weights of an older torch": pt2(
        lambda: rewritten(exported(), kept, {"archive/data/weights/model.pt": b"x"}), "pickle"),
    ".pt2: before 2.8": pt2(
        lambda: rewritten(exported(), lambda n, c: None,
                          {"serialized_exported_program.json": b"{}"}), "2.7"),
    ".pt2: member outside": pt2(
        lambda: rewritten(exported(), kept, {"archive/extra/../../x": b""}), "outside"),
    ".pt2: cut": pt2(lambda: exported()[:-100]),
    "ours: deep record": pt2(lambda: replaced("extra/graphwright.json", deep(), ours), ""),
    "ours: deep structure": pt2(lambda: record(put("signature", "structure",
                                                   value=json.loads(deep(500)))), harmless=True),
    "ours: record of another kind": pt2(lambda: record(lambda d: d.clear()), "record"),
    "ours: input name": pt2(lambda: record(put("signature", "inputs", 0, "name", value=RUNS)), ""),
    "ours: nodes": pt2(lambda: record(put("nodes", value=[1])), "record"),
    "ours: restored calls": pt2(
        lambda: record(put("sizes", value={"x": {"call": "exec", "of": "x", "rest": [],
                                                 "made": []}})), "record"),
    "ours: a format to come": pt2(lambda: record(put("format", value=10**9)), "newer"),
    "ours: provenance": pt2(lambda: record(put("provenance", value=[{"run": RUNS}])), "record"),
    "ours: examples": pt2(lambda: replaced("examples.b64", b"!!!!", ours), "record"),
    "ours: endless examples": pt2(
        lambda: replaced("examples.b64", b"//////////8=", ours), "record"),
    "ours: operator": pt2(lambda: edited(target("torch.os.system"), base=ours), "operator"),
}  # fmt: skip
